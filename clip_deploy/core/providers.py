"""What ONNX Runtime's providers need before a session opens."""

import ctypes

import onnxruntime

from clip_deploy.core.errors import UnavailableError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
INSTALL = "pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu"


def load_cuda() -> None:
    """Let ONNX Runtime find CUDA and cuDNN where they came as Python packages.

    Raises UnavailableError where this ONNX Runtime has no CUDA provider, or there is no GPU.
    """
    if CUDA not in onnxruntime.get_available_providers():
        raise UnavailableError(f"this ONNX Runtime has no CUDA provider: {INSTALL}")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnavailableError("no CUDA device: NVIDIA's driver is not installed") from error
    onnxruntime.preload_dlls()
