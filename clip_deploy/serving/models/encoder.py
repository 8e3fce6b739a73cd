"""Triton Python model: one tower, run by ONNX Runtime, for servers that have the python backend only.

Needs numpy and onnxruntime. What the dynamic batcher hands over together is encoded in one call.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

PROVIDERS = {"CPU": ["CPUExecutionProvider"], "GPU": ["CUDAExecutionProvider"]}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.inputs = [given["name"] for given in config["input"]]
        self.output = config["output"][0]["name"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(config["parameters"]["intra_op_thread_count"]["string_value"])
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(path, options, providers=PROVIDERS[args["model_instance_kind"]])

    def execute(self, requests: list[Any]) -> list[Any]:
        fed = [self._arrays(request) for request in requests]
        try:
            return [_response(self.output, rows) for rows in self._together(fed)]
        except Exception:  # one of them is bad: only that one gets an error
            return [self._alone(arrays) for arrays in fed]

    def _arrays(self, request: Any) -> dict[str, np.ndarray]:
        return {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}

    def _together(self, fed: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        whole = {name: np.concatenate([arrays[name] for arrays in fed]) for name in self.inputs}
        counts = [len(arrays[self.inputs[0]]) for arrays in fed]
        return np.split(self.session.run([self.output], whole)[0], np.cumsum(counts)[:-1])

    def _alone(self, arrays: dict[str, np.ndarray]) -> Any:
        try:
            return _response(self.output, self.session.run([self.output], arrays)[0])
        except Exception as error:
            errors = pb_utils.TritonError
            code = errors.INVALID_ARG if isinstance(error, InvalidArgument) else errors.INTERNAL
            return pb_utils.InferenceResponse(error=errors(f"cannot encode this request: {error}", code))


def _response(name: str, rows: np.ndarray) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, rows.astype(np.float32, copy=False))])
