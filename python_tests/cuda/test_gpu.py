"""What only a GPU can show: the same bits in every run, CUDA graphs, the right stream and device. `make test-gpu` runs
it, under compute-sanitizer too.

The calls and the comparison of two runs are tried on the CPU and on the emulator as well.
"""

import pytest
import torch

from support.every_operator import LAYERS, OPERATORS, assert_same_bits, calls, results

each_operator = pytest.mark.parametrize("operator", OPERATORS)
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


@each_layer
@each_operator
def test_two_runs_give_the_same_bits(operator, layer, device):
    call, operand = calls(layer, device)[operator]
    first = [result.clone() for result in results(call, operand)]
    for _ in range(3 if device == "cuda" else 1):
        assert_same_bits(results(call, operand), first)


# ---- a GPU alone -----------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@each_layer
@each_operator
def test_a_cuda_graph_replays_it(operator, layer, gpu):
    """Captured once and replayed on other numbers in the same memory: no synchronization, no static state, no memory
    that is gone at the replay.
    """
    call, operand = calls(layer, gpu)[operator]
    original, other = operand.clone(), operand.flip(0).clone()
    expected = {
        name: [result.clone() for result in results(call, numbers)]
        for name, numbers in (("original", original), ("other", other))
    }
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        results(call, operand)  # allocations that belong to the first call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(call, operand)
    for numbers, name in ((original, "original"), (other, "other"), (original, "original")):
        operand.copy_(numbers)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, expected[name])


@pytest.mark.cuda
@each_operator
def test_it_runs_on_the_current_stream(operator, gpu):
    """The operand is filled on a side stream, late: a kernel on any other stream reads it too early."""
    call, operand = calls(LAYERS["ragged"], gpu)[operator]
    right = operand.clone()
    expected = [result.clone() for result in results(call, operand)]
    operand.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # clock cycles, some 30 ms
        operand.copy_(right)
        actual = results(call, operand)
    side.synchronize()
    assert_same_bits(actual, expected)


@pytest.mark.cuda
@each_operator
def test_it_runs_on_the_tensors_device(operator, gpu):
    """Whichever device is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("cuda: one GPU only")
    expected = results(*calls(LAYERS["ragged"], "cuda:0")[operator])
    with torch.cuda.device(0):
        actual = results(*calls(LAYERS["ragged"], "cuda:1")[operator])
        assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda:1") for result in actual)
    torch.cuda.synchronize("cuda:1")
    assert_same_bits([result.cpu() for result in actual], [result.cpu() for result in expected])
