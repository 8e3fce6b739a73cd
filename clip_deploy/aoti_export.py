"""AOTInductor packages of both towers: torch.export, then C++ compiled for this machine's instruction sets."""

import errno
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.export import Dim

from clip_deploy.artifact import Target, read_target
from clip_deploy.checkpoint import load_model
from clip_deploy.config import Precision
from clip_deploy.errors import UnavailableError
from clip_deploy.torchscript import BFloat16
from clip_deploy.towers import dynamic_axes, example_inputs, split

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def export_aoti(checkpoint: Path, precision: Precision, output: Path) -> Target:
    """Write vision.pt2 and text.pt2, which PyTorch loads without the model's Python.

    Raises UnavailableError where a tower cannot be exported, or no C++ compiler is found.
    """
    source = read_target(checkpoint)
    inputs, axes = example_inputs(source.model), dynamic_axes(source.model)
    for name, tower in split(load_model(checkpoint), inputs).items():
        if precision is Precision.bf16:
            tower = BFloat16(tower).eval()
        longest = {"batch": None, "sequence": source.model["context_length"]}
        dimensions = {axis: Dim(word, max=longest[word]) for axis, word in axes[name].items()}
        shapes = tuple(dimensions for _ in inputs[name])
        try:
            with warnings.catch_warnings(), torch.no_grad(), _cache_in(output):
                warnings.simplefilter("ignore")  # deprecations inside PyTorch
                program = torch.export.export(tower, inputs[name], dynamic_shapes=shapes)
                _compile(program, output / f"{name}.pt2")
        except Exception as error:  # PyTorch's compilers share no base class of errors
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UnavailableError(f"AOTInductor does not compile the {name} tower: {reason}") from error
    return Target(
        runtime="aoti",
        precision=precision.value,
        files=["vision.pt2", "text.pt2"],
        model=source.model,
        build={"note": "torch.export and AOTInductor, compiled for this CPU's instruction sets"},
    )


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Let the compiler work in `folder`: nothing is left in the system's temporary folder."""
    before = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        os.environ[CACHE] = cache
        try:
            yield
        finally:
            del os.environ[CACHE]
            if before is not None:
                os.environ[CACHE] = before


def _compile(program: torch.export.ExportedProgram, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(path),
        inductor_configs={"cpp.dynamic_threads": True},  # else the number of threads is compiled in
    )
