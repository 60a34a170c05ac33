"""Linear layers of other libraries, each made from the same float weight; bench/peers.py measures them.

Int4 weights are rounded to the nearest code in groups of 32 wherever the library takes codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prequant_ext import PreQuantConfig, PreQuantLinear

GROUP = 32
BASELINE = "torch fp32"
PACKAGES = {  # what is imported, by the name that pip knows
    "auto-round-lib": "auto_round_kernel",
    "bitsandbytes": "bitsandbytes",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "torchao": "torchao",
}
Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """make(weight, threads) returns the layer's forward, which takes x of dtype. bits: of a weight, as it is read."""

    make: Callable[[Tensor, int], Call]
    dtype: torch.dtype = torch.float32
    packages: tuple[str, ...] = ()
    bits: int = 4
    precision: str = "highest"


def int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0..15 (N, K) with zero point 8 and scales (N, K / GROUP)."""
    N, K = weight.shape
    groups = weight.view(N, K // GROUP, GROUP)
    scale = (groups.abs().amax(-1) / 7).clamp_min(1e-8)
    return (groups / scale[..., None]).round().clamp(-8, 7).add(8).to(torch.uint8).view(N, K), scale


def pairs(codes: Tensor) -> Tensor:
    """Two codes a byte, the first one low."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def linear(weight: Tensor, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(weight)
    return layer


# ---- torch and PreQuant ----------------------------------------------------------------------------------------------


def torch_float(dtype: torch.dtype) -> Callable[[Tensor, int], Call]:
    def make(weight: Tensor, threads: int) -> Call:
        rounded = weight.to(dtype)
        return lambda x: functional.linear(x, rounded)

    return make


def torch_dynamic_int8(engine: str) -> Callable[[Tensor, int], Call]:
    def make(weight: Tensor, threads: int) -> Call:
        torch.backends.quantized.engine = engine
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear(weight)), {nn.Linear}, torch.qint8)

    return make


def torch_int4(weight: Tensor, threads: int) -> Call:
    codes, scale = int4(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    scale_and_zero = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous().bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scale_and_zero)


def prequant(**settings: Any) -> Callable[[Tensor, int], Call]:
    return lambda weight, threads: PreQuantLinear.from_linear(linear(weight), PreQuantConfig(**settings)).eval()


# ---- others ----------------------------------------------------------------------------------------------------------


def bitsandbytes_nf4(dtype: torch.dtype) -> Callable[[Tensor, int], Call]:
    def make(weight: Tensor, threads: int) -> Call:
        import bitsandbytes

        layer = bitsandbytes.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, compute_dtype=dtype, quant_type="nf4"
        )
        layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
        return layer.to("cpu").eval()

    return make


def torchao_int4(weight: Tensor, threads: int) -> Call:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    layer = nn.Sequential(linear(weight, torch.bfloat16))
    quantize_(layer, PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False))
    return layer


def torchao_int8(weight: Tensor, threads: int) -> Call:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = nn.Sequential(linear(weight))
    quantize_(layer, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return layer


def onnxruntime_int4(level: int) -> Callable[[Tensor, int], Call]:
    """MatMulNBits; level 0 computes in float32, 4 with 8-bit activations."""

    def make(weight: Tensor, threads: int) -> Call:
        import numpy
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        N, K = weight.shape
        codes, scale = int4(weight)
        constants = {"B": pairs(codes).view(N, K // GROUP, GROUP // 2).numpy(), "scale": scale.flatten().numpy()}
        settings = {"K": K, "N": N, "bits": 4, "block_size": GROUP, "accuracy_level": level}
        node = helper.make_node("MatMulNBits", ["x", "B", "scale"], ["y"], domain="com.microsoft", **settings)
        x_, y_ = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", size]) for name, size in (("x", K), ("y", N))
        )
        graph = helper.make_graph(
            [node], "linear", [x_], [y_], [numpy_helper.from_array(values, name) for name, values in constants.items()]
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # its workers would take the cores of whoever is next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        serialized = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        session = onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])

        def forward(x: Tensor) -> Tensor:
            y = torch.empty(len(x), N)
            binding = session.io_binding()
            binding.bind_input("x", "cpu", 0, numpy.float32, list(x.shape), x.data_ptr())
            binding.bind_output("y", "cpu", 0, numpy.float32, [len(x), N], y.data_ptr())
            session.run_with_iobinding(binding)
            return y

        return forward

    return make


def openvino_int4(precision: str, activation_group: int) -> Callable[[Tensor, int], Call]:
    """activation_group: activations that share a step of dynamic quantization; 0 leaves them float."""

    def make(weight: Tensor, threads: int) -> Call:
        import numpy
        import openvino
        import openvino.opset13 as op

        N, K = weight.shape
        codes, scale = int4(weight)
        constant = op.constant(
            openvino.Tensor(pairs(codes).contiguous().numpy(), [N, K // GROUP, GROUP], openvino.Type.u4),
            shared_memory=False,
        )
        centred = op.subtract(
            op.convert(constant, "f16"), op.convert(op.constant(numpy.array([[[8]]], numpy.uint8)), "f16")
        )
        scaled = op.multiply(centred, op.constant(scale.half().numpy()[..., None]))
        dense = op.convert(op.reshape(scaled, op.constant(numpy.array([N, K])), False), "f32")
        x_ = op.parameter([-1, K], numpy.float32)
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": precision,
            "ENABLE_CPU_PINNING": False,
        }
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = activation_group
        request = (
            openvino.Core()
            .compile_model(openvino.Model([op.matmul(x_, dense, False, True)], [x_]), "CPU", settings)
            .create_infer_request()
        )

        def forward(x: Tensor) -> Tensor:
            request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
            request.infer()
            return torch.from_numpy(request.get_output_tensor().data)

        return forward

    return make


def auto_round_int4(compute: str) -> Callable[[Tensor, int], Call]:
    def make(weight: Tensor, threads: int) -> Call:
        import auto_round_kernel

        codes, scale = int4(weight)
        N, K = weight.shape
        settings = (GROUP, compute, "int4", "fp32", False)
        signed = (codes.to(torch.int8) - 8).T.contiguous()
        packed = auto_round_kernel.repack_quantized_weight(
            signed, scale.T.contiguous(), torch.empty(0, dtype=torch.int8), *settings
        )
        bias = torch.empty(0)
        return lambda x: auto_round_kernel.woqgemm(x, packed, bias, N, K, *settings)

    return make


BF16 = torch.bfloat16
PEERS: dict[str, Peer] = {
    BASELINE: Peer(torch_float(torch.float32), bits=32),
    "torch bf16": Peer(torch_float(BF16), BF16, bits=16),
    "torch dynamic int8 (fbgemm)": Peer(torch_dynamic_int8("fbgemm"), bits=8),
    "torch dynamic int8 (onednn)": Peer(torch_dynamic_int8("onednn"), bits=8),
    "torch int4 bf16": Peer(torch_int4, BF16),
    "prequant w4a8 per tensor r=5": Peer(prequant()),
    "prequant w4a8 per group 32 r=5": Peer(prequant(strategy="group_wise_sigma", group_size=GROUP)),
    "prequant w4a16 per tensor r=5, high": Peer(prequant(activation_bits=None), precision="high"),
    "bitsandbytes nf4 fp32": Peer(bitsandbytes_nf4(torch.float32), packages=("bitsandbytes",)),
    "bitsandbytes nf4 bf16": Peer(bitsandbytes_nf4(BF16), BF16, ("bitsandbytes",)),
    "torchao int4 bf16": Peer(torchao_int4, BF16, ("torchao",)),
    "torchao dynamic int8": Peer(torchao_int8, packages=("torchao",), bits=8),
    "onnxruntime int4 float32": Peer(onnxruntime_int4(0), packages=("onnx", "onnxruntime")),
    "onnxruntime int4 int8": Peer(onnxruntime_int4(4), packages=("onnx", "onnxruntime")),
    "openvino int4 float32": Peer(openvino_int4("f32", 0), packages=("openvino",)),
    "openvino int4 bf16": Peer(openvino_int4("bf16", 0), packages=("openvino",)),
    "openvino int4 int8": Peer(openvino_int4("f32", GROUP), packages=("openvino",)),
    "auto-round-lib int4 float32": Peer(auto_round_int4("fp32"), packages=("auto-round-lib",)),
    "auto-round-lib int4 bf16": Peer(auto_round_int4("bf16"), packages=("auto-round-lib",)),
    "auto-round-lib int4 int8": Peer(auto_round_int4("int8"), packages=("auto-round-lib",)),
}
