"""A quantized transformers model as an ONNX file: MatMulNBits and an outlier term for each matrix, tables of 8-bit
codes, the rest as torch exports it.

The operator (com.microsoft.MatMulNBits, which onnxruntime has kernels for) computes ``x W^T`` from codes, scales and
zero points of blocks of weights; it has no 8-bit activations, so the file is weight-only: a model with
``activation_bits=8`` computes there what it would with ``activation_bits=None``. GGUF and compressed-tensors have no
place for outlier dimensions; a merged float checkpoint (``prequant_ext.merge``) is the way to other formats.
"""

import copy
import importlib.util
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prequant_ext import ops
from prequant_ext.embedding import PreQuantEmbedding
from prequant_ext.frozen import quantized_modules
from prequant_ext.linear import PreQuantLinear, quantized_linears
from prequant_ext.reference import container_bits
from prequant_ext.sites import is_pretrained_model
from prequant_ext.task_file import write_atomically

OPSET = 20  # of the standard operators
# weights that share a scale: the powers of two that onnxruntime's CPU kernels take at 2, 4 and 8 bits
BLOCK_SIZES = (256, 128, 64, 32, 16)
IN_FLOAT32 = 1  # accuracy_level: x is not rounded, the sums are float32
MAX_BYTES = 2**31 - 1  # of a protobuf message
# of an output's largest value. Sums in another order make some 1e-6 of it; a wrong zero point or outlier dimension, per
# cents
MAX_RELATIVE_ERROR = 1e-4
TRACED, CHECKED = (2, 8), (3, 11)  # (batch, sequence): the check runs at another shape than the one that was traced


@dataclass(frozen=True)
class OnnxFile:
    """What was written.

    difference               the largest between onnxruntime's outputs and the weight-only model's on a random batch;
                             None: onnxruntime is not installed
    relative                 the same in units of each output's largest value
    drops_activation_bits    the model quantizes activations, and the file does not
    """

    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    drops_activation_bits: bool
    difference: float | None
    relative: float | None


def block_size(length: int, container: int) -> int:
    """Weights to a block for ``length`` consecutive ones with one scale: the largest block that divides them, so that
    their bytes are those of the canonical layout; where none does, the block that stores fewest bytes with its padding,
    scale and zero point.
    """
    dividing = [block for block in BLOCK_SIZES if length % block == 0]
    return (
        dividing[0]
        if dividing
        else min(BLOCK_SIZES, key=lambda block: -(-length // block) * ((block + 1) * container + 32))
    )


class _OnnxLinear(nn.Module):
    """A PreQuantLinear whose product is MatMulNBits. In torch it computes nothing: it is there to be exported.

    weight_packed (N, B, bytes), weight_scale (N, B) and packed weight_zero_point (N, bytes): B blocks a row, in the
    order of canonical storage. Where no block divides a row or a group of it, each is padded by codes that are worth 0.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None
    outlier_dims: Tensor
    outlier_weight: Tensor  # transposed, (r, N) or (K, r): as a product wants it

    def __init__(self, layer: PreQuantLinear):
        super().__init__()
        N, K, G = layer.out_features, layer.in_features, layer.weight_scale.shape[1]
        container, group = container_bits(layer.bits), K // G
        block = block_size(group, container)
        blocks = -(-group // block)
        self.shape, self.axis, self.r, self.groups = (N, K), layer.axis, layer.r, G
        # of x, in each group; MatMulNBits itself pads the last block of a row
        self.padding = blocks * block - group if G > 1 else 0
        self.attributes: dict[str, Any] = {
            "K": K + G * self.padding,
            "N": N,
            "bits": container,
            "block_size": block,
            "accuracy_level": IN_FLOAT32,
        }

        packed, zero_point = layer.canonical_packed(), layer.weight_zero_point.detach().expand(N, G)
        if group % block:
            codes = zero_point[..., None].repeat(1, 1, blocks * block)
            codes[..., :group] = ops.unpack(packed, K, layer.bits).view(N, G, group)
            packed = ops.pack(codes.flatten(1), layer.bits)
        self.register_buffer("weight_packed", packed.view(N, G * blocks, block * container // 8))
        self.register_buffer("weight_scale", layer.weight_scale.detach().expand(N, G).repeat_interleave(blocks, 1))
        self.register_buffer("weight_zero_point", ops.pack(zero_point.repeat_interleave(blocks, 1), layer.bits))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.register_buffer("outlier_dims", layer.outlier_dims.detach())
        self.register_buffer("outlier_weight", layer.outlier_weight.detach().T.contiguous())

    @property
    def weight(self) -> Tensor:
        """For code that looks at its shape, dtype and device: T5's does."""
        return self.weight_scale.new_empty(()).expand(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        padded = (
            functional.pad(x.unflatten(-1, (self.groups, -1)), (0, self.padding)).flatten(-2) if self.padding else x
        )
        operands, shape = (
            (padded, self.weight_packed, self.weight_scale, self.weight_zero_point),
            (*x.shape[:-1], self.shape[0]),
        )
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits", operands, self.attributes, dtype=x.dtype, shape=shape, version=1
        )
        if self.bias is not None:
            y = y + self.bias
        if self.r == 0:
            return y
        if self.axis == "input":
            return y + x.index_select(-1, self.outlier_dims) @ self.outlier_weight
        return y.index_add(-1, self.outlier_dims, x @ self.outlier_weight)


class _OnnxEmbedding(nn.Module):
    """A PreQuantEmbedding in standard operators: Gather of codes, Cast, Sub, Mul. The table stays uint8 in the file."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(self, layer: PreQuantEmbedding):
        super().__init__()
        for name in ("weight_packed", "weight_scale", "weight_zero_point"):
            self.register_buffer(name, getattr(layer, name).detach())

    def forward(self, ids: Tensor) -> Tensor:
        scale, zero_point = self.weight_scale, self.weight_zero_point
        if scale.shape[0] > 1:
            scale, zero_point = functional.embedding(ids, scale), functional.embedding(ids, zero_point)
        return (functional.embedding(ids, self.weight_packed).float() - zero_point.float()) * scale


def exportable_(model: nn.Module) -> nn.Module:
    """Put in place of ``model``'s quantized layers those that only torch.onnx.export understands. Returns ``model``."""
    twins: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, PreQuantLinear | PreQuantEmbedding):
            if module not in twins:
                twins[module] = _OnnxLinear(module) if isinstance(module, PreQuantLinear) else _OnnxEmbedding(module)
            model.set_submodule(name, twins[module])
    return model


def weight_only_(model: nn.Module) -> nn.Module:
    """Make the quantized layers of ``model`` take float activations, as the file does. Returns ``model``."""
    for _, layer in quantized_linears(model):
        layer.activation_bits = None
    return model


def onnx_bytes(model: nn.Module, inputs: Mapping[str, Tensor], outputs: list[str]) -> bytes:
    """The file of ``model``, after :func:`exportable_`: traced on ``inputs``, whose first two dimensions are free."""
    shapes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    with _quiet_exporter():
        program = torch.onnx.export(
            model,
            kwargs=dict(inputs),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # it is where dynamo is asked for
    for graph in (program.model.graph, *program.model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.clear()  # its stack trace, with the paths of this machine
    return program.model_proto.SerializeToString()


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch.onnx tells of its internals: operators of libraries that are not there, axes of two inputs that share a
    name.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def run_onnx(content: bytes, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The file's outputs, by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [
        torch.from_numpy(value) for value in session.run(None, {name: value.numpy() for name, value in inputs.items()})
    ]


def difference(values: list[Tensor], expected: Mapping[str, Tensor]) -> tuple[float, float]:
    """The largest absolute difference of any output, and the largest in units of its output's largest value.

    Raises RuntimeError naming the output where that is more than MAX_RELATIVE_ERROR, or not a number.
    """
    differences, relatives = [], []
    for (name, wanted), value in zip(expected.items(), values, strict=True):
        largest, error = wanted.abs().max().item(), (value - wanted).abs().max().item()
        if not error <= MAX_RELATIVE_ERROR * largest:
            raise RuntimeError(
                f"the ONNX graph's {name} differs from the model's by up to {error:.3g} on a random batch where the "
                f"largest value is {largest:.3g}; "
                f"at most {MAX_RELATIVE_ERROR:g} of it is accepted, so nothing was written"
            )
        differences.append(error)
        relatives.append(error / largest if largest else 0.0)
    return max(differences), max(relatives)


def random_inputs(model: Any, batch: int, sequence: int) -> dict[str, Tensor]:
    """Tokens of ``model``'s vocabulary in all that it reads: input_ids, attention_mask with padding in the last row,
    token_type_ids if it tells segments apart.

    Raises ValueError where the model reads something else.
    """
    parameters = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in parameters:
        raise ValueError(
            f"model must be an encoder or a decoder to be exported, but {type(model).__name__} is both; of T5, "
            "T5EncoderModel and "
            "T5EncoderForSequenceClassification are the encoder"
        )
    absent = [name for name in ("input_ids", "attention_mask") if name not in parameters]
    if absent:
        raise ValueError(
            f"model must read input_ids and attention_mask to be exported, but {type(model).__name__} has no "
            f"{absent[0]}"
        )
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, sequence, dtype=torch.int64)
    mask[-1, sequence // 2 :] = 0
    inputs = {
        "input_ids": torch.randint(model.config.vocab_size, (batch, sequence), generator=generator),
        "attention_mask": mask,
    }
    segments = getattr(model.config, "type_vocab_size", 0)
    if "token_type_ids" in parameters and segments > 1:
        inputs["token_type_ids"] = torch.randint(segments, (batch, sequence), generator=generator)
    return inputs


@contextmanager
def _float32_products() -> Iterator[None]:
    """torch's float32 precision at "highest":
    "high" would round factors in the model that the file is compared with.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def export_onnx(model: Any, path: str | os.PathLike) -> OnnxFile:
    """Write a quantized transformers model as ONNX, with free batch and sequence axes; it computes what ``model`` does
    with float activations.

    Inputs are int64 (batch, sequence), see :func:`random_inputs`; outputs float32: logits of a model with a head, else
    last_hidden_state, and pooler_output where there is a pooler. ``model`` stays as it is, and the file appears when it
    is complete and, if onnxruntime is installed, checked.

    Raises ValueError for a model that is not quantized, not of transformers, not float32, has both encoder and decoder,
    or is larger than a file can be, for a path that cannot be a file, and where onnx or onnxscript is not installed;
    RuntimeError where onnxruntime's outputs differ from the model's by more than MAX_RELATIVE_ERROR of the largest.
    """
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"path must be a file in a folder that exists, got {path}")
    _require_packages()
    _require_exportable(model)
    traced, checked = random_inputs(model, *TRACED), random_inputs(model, *CHECKED)
    twin = weight_only_(copy.deepcopy(model).cpu().eval().requires_grad_(False))
    for setting, value in (
        ("use_cache", False),
        ("output_hidden_states", False),
        ("output_attentions", False),
        ("return_dict", True),
    ):
        setattr(twin.config, setting, value)
    with _float32_products():
        expected = dict(twin(**checked))
    content = onnx_bytes(exportable_(twin), traced, list(expected))
    figures = (
        (None, None)
        if importlib.util.find_spec("onnxruntime") is None
        else difference(run_onnx(content, checked), expected)
    )
    write_atomically(target, content)
    drops_activation_bits = any(layer.activation_bits is not None for _, layer in quantized_linears(model))
    return OnnxFile(len(content), tuple(traced), tuple(expected), drops_activation_bits, *figures)


def _require_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"export to ONNX needs {' and '.join(missing)}, not installed here: pip install 'prequant_ext[onnx]'"
        )


def _require_exportable(model: Any) -> None:
    kind = type(model).__name__
    if not is_pretrained_model(model):
        raise ValueError(f"model must be a transformers model to be exported, got a {kind}")
    quantized = [module for _, module in quantized_modules(model)]
    if not quantized:
        raise ValueError(
            f"model must be quantized (quantize_model) to be exported, got a {kind} without quantized layers"
        )
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} | {
        module.compute_dtype for module in quantized
    }
    if dtypes != {torch.float32}:
        raise ValueError(
            f"model must be float32 to be exported, got {', '.join(sorted(map(str, dtypes - {torch.float32})))}: "
            "model.float() makes it so"
        )
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size > MAX_BYTES:
        raise ValueError(
            f"model must fit one ONNX file, at most {MAX_BYTES / 1e9:.2f} GB, but its tensors take {size / 1e9:.2f} GB"
        )
