"""AOTInductor packages of both towers: our fused graphs through torch.export, compiled for this CPU or GPU."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.export import Dim

from clip_deploy.builders.preparation import Preparation
from clip_deploy.checkpoint.towers import dynamic_axes, example_inputs
from clip_deploy.core.artifact import Target, read_source
from clip_deploy.core.config import Device, OptimizeConfig, Precision
from clip_deploy.core.errors import UnavailableError, first_line
from clip_deploy.core.model import Model, TowerShape
from clip_deploy.data.preprocessed import Prepared
from clip_deploy.onnx_graph.torch_module import GraphModule
from clip_deploy.rewrites.fusion import rewrites_of
from clip_deploy.runtimes.pytorch import require

CACHE = "TORCHINDUCTOR_CACHE_DIR"
NOTES = {
    Device.cpu: "compiled for this CPU's instruction sets",
    Device.cuda: "compiled for this GPU, called through CUDA graphs",
}


def export_aoti(
    source: Path, precision: Precision, calibration: Prepared, output: Path, device: Device = Device.cpu
) -> Target:
    """Write vision.pt2 and text.pt2, which PyTorch loads without the model's Python.

    `source` is an ONNX target in FP32; what stands around its towers (preprocessing, heads) is left out. In float16,
    nodes that would overflow on the calibration set stay in float32.
    Raises UnavailableError where the source could not be built, a tower cannot be exported, there is no such device, no
    C++ compiler is found or the one found makes packages that crash.
    """
    require(device.value)
    target = read_source(source)
    towers = Preparation(source, target, calibration, device)
    with _reported("a C++ file"):
        _check_compiler()
    with _cache_in(output):
        for tower, shape in target.model.towers.items():
            graph = _fused(towers, tower, shape, precision, output)
            dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
            with _reported(f"the {tower} tower"), torch.no_grad():
                module = GraphModule(graph, dtype).eval().to(device.value)
                _compile(_program(module, tower, target.model, device), output / f"{tower}.pt2", device)
    return Target(
        runtime="aoti",
        precision=precision.value,
        device=device.value,
        files=["vision.pt2", "text.pt2"],
        model=target.model.bare(),
        build={"compiler": f"AOTInductor, {NOTES[device]}", "source": source.name, **towers.facts()},
    )


def _program(module: GraphModule, tower: str, model: Model, device: Device) -> torch.export.ExportedProgram:
    """Trace a tower for every batch, and every length of text up to the context."""
    longest = {"batch": None, "sequence": model.context_length}
    dimensions = {axis: Dim(word, max=longest[word]) for axis, word in dynamic_axes(model)[tower].items()}
    example = tuple(tensor.to(device.value) for tensor in example_inputs(model)[tower])
    return torch.export.export(module, example, dynamic_shapes=(tuple(dimensions for _ in example),))


def _fused(towers: Preparation, tower: str, shape: TowerShape, precision: Precision, output: Path) -> ir.Model:
    """One tower's fused graph, its weights in memory."""
    settings = OptimizeConfig(precision=Precision.fp16 if precision is Precision.fp16 else Precision.fp32)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        path, _ = towers.fuse(tower, rewrites_of(shape, settings), Path(folder))
        if precision is Precision.fp16:
            towers.to_float16(tower, path)
        graph = ir.load(path)
        for value in graph.graph.initializers.values():  # the file goes with the folder
            if value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy().copy())
    return graph


@contextmanager
def _reported(what: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside PyTorch
            yield
    except UnavailableError:
        raise
    except Exception as error:  # PyTorch's compilers share no base class of errors
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = first_line(error)
        raise UnavailableError(f"AOTInductor cannot compile {what}: {reason}") from error


SOURCE = "#include <locale>\nstd::locale locale() { return std::locale(); }\n"


def _check_compiler() -> None:
    """PyTorch brings C++'s library; a package with another copy inside ends the process that opens it (SIGSEGV)."""
    compiler = get_cpp_compiler()
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "locale.cpp", Path(folder) / "locale.so"
        source.write_text(SOURCE)
        command = [compiler, "-shared", "-fPIC", str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(f"{compiler} cannot compile a C++ file: {done.stderr.strip() or done.returncode}")
        inside = sys.platform == "linux" and b"libstdc++.so" not in library.read_bytes()
    if inside:
        raise UnavailableError(
            f"{compiler} links libstdc++ statically. PyTorch crashes when it opens such a package: name another "
            "compiler in CXX, for example CXX=/usr/bin/g++"
        )


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Let the compiler work in `folder`: nothing is left in the system's temporary folder.

    Its paths end up in what it compiles, so they hold no random part: the same folder gives the same bytes.
    """
    before, cache = os.environ.get(CACHE), folder.absolute() / "compiler"
    os.environ[CACHE] = str(cache)
    try:
        yield
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        del os.environ[CACHE]
        if before is not None:
            os.environ[CACHE] = before


OPTIONS = {
    Device.cpu: {"cpp.dynamic_threads": True},  # else the number of threads is compiled in
    Device.cuda: {"aot_inductor.compile_wrapper_opt_level": "O0"},  # it launches kernels, which a CUDA graph replaces
}


def _compile(program: torch.export.ExportedProgram, path: Path, device: Device) -> None:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=OPTIONS[device])
