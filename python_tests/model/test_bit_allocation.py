"""Errors at each width are those of quantizing; a proposal is the best one there is, and quantizing with it gives what
it promises.
"""

import dataclasses
import itertools
import math
import random

import pytest

import prequant_ext
from prequant_ext.bit_allocation import (
    Choice,
    best_choices,
    block_options,
    propose_bits,
    propose_layer_bits,
    rules_of,
    sensitivity,
)
from prequant_ext.blocks import Block, bits_by_block, blocks_of
from prequant_ext.config import PreQuantConfig
from prequant_ext.model import quantize_model
from prequant_ext.sites import family_of
from support.tiny_models import Plain, assert_unchanged, snapshot, tiny_model


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])  # gpt2 stores its matrices as (K, N)
def test_errors_are_those_of_quantizing_at_each_width(model_type):
    model, config = tiny_model(model_type), PreQuantConfig(r=2, layer_bits=[8, 2])
    before = snapshot(model)
    measured = sensitivity(model, config, widths=(8, 2, 3, 4))
    assert_unchanged(model, before)
    for bits in measured.widths:
        report = quantize_model(tiny_model(model_type), dataclasses.replace(config, bits=bits, layer_bits=None))
        assert {matrix.name: math.sqrt(matrix.squared_error[bits]) for matrix in measured.matrices} == {
            row.name: row.l2_error for row in report.rows if row.kind == "linear"
        }
    for matrix in measured.matrices:
        weight = model.get_submodule(matrix.name).weight
        assert matrix.relative_error(4) == pytest.approx(
            math.sqrt(matrix.squared_error[4]) / weight.double().norm().item()
        )
        assert matrix.squared_error[2] > matrix.squared_error[3] > matrix.squared_error[4]


def test_a_matrix_of_zeros_loses_nothing():
    model = tiny_model("bert")
    model.bert.encoder.layer[0].output.dense.weight.data.zero_()
    matrix = next(
        each
        for each in sensitivity(model, PreQuantConfig(r=1)).matrices
        if each.name == "bert.encoder.layer.0.output.dense"
    )
    assert (matrix.squared_norm, matrix.relative_error(2)) == (0, 0)


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_quantizing_with_a_proposal_gives_its_size_and_error(model_type):
    model, config = tiny_model(model_type), PreQuantConfig(r=1)
    proposal = propose_layer_bits(sensitivity(model, config), bits_per_weight=3.3)
    report = quantize_model(model, dataclasses.replace(config, layer_bits=proposal.layer_bits))
    assert report.bytes_after == proposal.model_bytes
    assert report.l2_error == pytest.approx(math.sqrt(proposal.squared_error))
    matrices = [row for row in report.rows if row.kind == "linear"]
    stored = sum(row.bits * math.prod(row.shape) for row in matrices)
    assert proposal.bits_per_weight == stored / sum(math.prod(row.shape) for row in matrices) <= 3.3
    assert len({own.bits for own in proposal.blocks}) > 1  # else the rules would be those of plain bits


def test_a_budget_of_bytes_is_that_of_the_whole_model():
    measured = sensitivity(tiny_model("bert"), PreQuantConfig(r=1))
    at_4, at_2 = (propose_layer_bits(measured, bits_per_weight=bits) for bits in (4, 2))
    assert propose_layer_bits(measured, budget_bytes=at_4.model_bytes) == at_4
    below = propose_layer_bits(measured, budget_bytes=at_4.model_bytes - 1)
    assert below.model_bytes < at_4.model_bytes and below.squared_error > at_4.squared_error
    with pytest.raises(
        ValueError,
        match=rf"budget_bytes must be at least {at_2.model_bytes:,} .*the model with 2 bits in every block, got",
    ):
        propose_layer_bits(measured, budget_bytes=at_2.model_bytes - 1)


def random_options(seed):
    """Four blocks of different sizes whose errors are in no order."""
    generator = random.Random(seed)
    sizes = [generator.randint(5, 40) for _ in range(4)]
    return [
        {bits: (size * {2: 1, 3: 2, 4: 2, 8: 4}[bits], generator.random()) for bits in (2, 3, 4, 8)} for size in sizes
    ]


@pytest.mark.parametrize("seed", range(6))
def test_no_allocation_within_the_budget_is_better(seed):
    options = random_options(seed)
    every = [
        (
            sum(own[bits][0] for own, bits in zip(options, chosen, strict=True)),
            sum(own[bits][1] for own, bits in zip(options, chosen, strict=True)),
        )
        for chosen in itertools.product(*options)
    ]
    smallest, largest = min(size for size, _ in every), max(size for size, _ in every)
    for budget in range(smallest, largest + 1):
        chosen = propose_bits(options, budget)
        size, error = (sum(own[bits][i] for own, bits in zip(options, chosen, strict=True)) for i in (0, 1))
        assert size <= budget and error == pytest.approx(min(error for size, error in every if size <= budget))
    with pytest.raises(ValueError, match=f"budget_bytes must be at least {smallest}, .* got {smallest - 1}"):
        propose_bits(options, smallest - 1)


def test_the_front_leaves_out_what_another_choice_beats():
    options = [[Choice(2, 9.0, (2,)), Choice(4, 4.0, (3,)), Choice(4, 1.0, (4,)), Choice(8, 1.0, (8,))]] * 2
    assert best_choices(options) == [Choice(4, 18.0, (2, 2)), Choice(6, 10.0, (2, 4)), Choice(8, 2.0, (4, 4))]


def test_three_bits_are_never_proposed():
    """They take the place of 4."""
    measured = sensitivity(tiny_model("bert", num_hidden_layers=4), PreQuantConfig(r=1))
    assert all(sizes[3][0] == sizes[4][0] for sizes in block_options(measured).values())
    proposed = {
        bits
        for budget in range(20, 81)
        for bits in propose_layer_bits(measured, bits_per_weight=budget / 10).layer_bits.values()
    }
    assert proposed == {2, 4, 8}


def test_rules_name_whole_runs_within_a_stack():
    blocks = [Block(stack, index, f"{stack}.{index}") for stack in ("encoder", "decoder") for index in range(3)]
    chosen = dict(zip(blocks, (4, 4, 2, 2, 2, 8), strict=True))
    assert rules_of(chosen) == {"encoder.0-1": 4, "encoder.2": 2, "decoder.0-1": 2, "decoder.2": 8}
    without_a_block = {block: bits for block, bits in chosen.items() if block.name != "encoder.1"}
    assert rules_of(without_a_block) == {"encoder.0": 4, "encoder.2": 2, "decoder.0-1": 2, "decoder.2": 8}


def test_rules_mean_the_proposed_blocks():
    model = tiny_model("t5")
    proposal = propose_layer_bits(sensitivity(model, PreQuantConfig(r=1)), bits_per_weight=3.3)
    assert bits_by_block(proposal.layer_bits, blocks_of(model, family_of(model))) == {
        own.block.name: own.bits for own in proposal.blocks
    }


def test_a_proposal_prints_a_table():
    measured = prequant_ext.sensitivity(tiny_model("bert"), PreQuantConfig(r=1))
    proposal = prequant_ext.propose_layer_bits(measured, bits_per_weight=2)
    lines = str(proposal).splitlines()
    assert (
        lines[0].split("  ")[0] == "block"
        and lines[2].split()[:2] == ["encoder.0", "8,192"]
        and lines[2].split()[-1] == "2"
    )
    own = proposal.blocks[0].squared_error
    assert lines[2].split()[2:-1] == [f"{math.sqrt(own[bits]):.4g}" for bits in (2, 3, 4, 8)]
    assert lines[-2] == "proposed: encoder.0-1=2" and lines[-1].startswith("2.00 stored bits a weight")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "either budget_bytes or bits_per_weight, got None and None"),
        ({"budget_bytes": 1, "bits_per_weight": 3}, "either budget_bytes or bits_per_weight, got 1 and 3"),
        ({"bits_per_weight": 1.9}, "bits_per_weight must be at least 2, what 2 bits in every block take, got 1.9"),
        ({"bits_per_weight": -1.0}, "bits_per_weight must be a positive number, got -1.0"),
        ({"budget_bytes": math.nan}, "budget_bytes must be a positive number, got nan"),
        ({"budget_bytes": "3"}, "budget_bytes must be a positive number, got '3'"),
    ],
)
def test_refused_budgets(budget, message):
    measured = sensitivity(tiny_model("bert"), PreQuantConfig(r=1))
    with pytest.raises(ValueError, match=message):
        propose_layer_bits(measured, **budget)


@pytest.mark.parametrize("widths", [(), (2, 2), (1, 2), (4, 9), (2.0,), (True, 2)])
def test_refused_widths(widths):
    with pytest.raises(ValueError, match="widths must be distinct integers from 2 to 8, got"):
        sensitivity(tiny_model("bert"), PreQuantConfig(r=1), widths=widths)


def test_models_that_cannot_be_measured():
    with pytest.raises(ValueError, match="holds no data: load the model first"):
        sensitivity(tiny_model("bert", device="meta"), PreQuantConfig(r=1))
    model = tiny_model("bert")
    quantize_model(model, PreQuantConfig(r=1))
    with pytest.raises(ValueError, match="already quantized"):
        sensitivity(model, PreQuantConfig(r=1))


def test_without_blocks_there_are_errors_and_no_proposal():
    measured = sensitivity(Plain(), PreQuantConfig(r=1, axis="input"))
    assert len(measured.matrices) == 5 and {matrix.block for matrix in measured.matrices} == {None}
    with pytest.raises(
        ValueError, match=r"blocks.0.up is in no block that layer_bits could name: the family of the model is not known"
    ):
        propose_layer_bits(measured, bits_per_weight=4)
