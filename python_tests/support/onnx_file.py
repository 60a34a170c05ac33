"""What an ONNX file holds, for tests."""

import onnx
import torch


class File:
    """An ONNX file's initializers and nodes, by name."""

    def __init__(self, content):
        self.graph = onnx.load_from_string(content).graph
        self.tensors = {
            tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
            for tensor in self.graph.initializer
        }

    def product(self, layer):
        """(attributes, weight_packed, weight_scale, weight_zero_point) of the layer's MatMulNBits."""
        (node,) = (
            node
            for node in self.graph.node
            if node.op_type == "MatMulNBits" and node.input[1] == f"{layer}.weight_packed"
        )
        assert node.domain == "com.microsoft" and len(node.input) == 4
        return {entry.name: entry.i for entry in node.attribute}, *(self.tensors[name] for name in node.input[1:])
