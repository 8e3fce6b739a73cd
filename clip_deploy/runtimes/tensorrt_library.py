"""TensorRT, whichever of its packages is installed: its name, its log, and what an engine is valid for."""

import functools
from importlib import import_module
from typing import Any

from clip_deploy.core.environment import gpus
from clip_deploy.core.errors import UnavailableError

PACKAGES = ("tensorrt", "tensorrt_rtx_bindings")  # the data centre's, then that for RTX cards; one API
INSTALL = "pip install '.[tensorrt-rtx]'"
NO_GPU = "no GPU in particular (compute capability 8.0 and up)"  # what TensorRT-RTX builds where it sees none


def load_tensorrt() -> Any:
    """The module of TensorRT, or else of TensorRT-RTX; UnavailableError where neither is installed."""
    for name in PACKAGES:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise UnavailableError(f"TensorRT is not installed: {INSTALL}")


def is_rtx(library: Any) -> bool:
    """Whether it is TensorRT-RTX rather than TensorRT."""
    return "rtx" in library.__name__


def validity(library: Any) -> dict[str, str]:
    """What an engine built here is valid for: the library with its version, and the GPUs with memory and driver."""
    name = "TensorRT-RTX" if is_rtx(library) else "TensorRT"
    return {
        "library": f"{name} {library.__version__}",
        "built_for": " and ".join(dict.fromkeys(gpus())) or NO_GPU,
    }


@functools.cache
def log_of(library: Any) -> Any:
    """The process's only log: TensorRT keeps the first that it is given. Its `errors` say why a call gave nothing."""

    class Log(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= library.ILogger.ERROR:
                self.errors.append(message)

        def first_error(self) -> str:
            """The first error since the last call of this."""
            reason = (self.errors or ["TensorRT gives no reason"])[0].strip().splitlines()[0]
            self.errors.clear()
            return reason

    return Log()
