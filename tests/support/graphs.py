"""Small graphs, written by the TorchScript exporter or read as text, and run."""

import onnx_ir as ir
import onnxruntime
import torch
from onnxscript.optimizer import optimize


def written_out(function, path):
    """A function of [2, 8] as the TorchScript exporter writes it at opset 17, with the shapes that fusion infers."""
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(function, (torch.zeros(2, 8),), str(path), dynamo=False, opset_version=17, **names)
    model = ir.load(path)
    optimize(model)
    return model


def result(model, given):
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": given})[0]


def kinds(model):
    return [node.op_type for node in model.graph if node.op_type != "Constant"]
