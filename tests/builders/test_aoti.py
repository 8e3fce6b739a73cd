import shutil
import subprocess
import sys

import pytest
from support.project import ROOT

from clip_deploy.builders.aoti import export_aoti
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import GateLimits, GatesConfig, Precision
from clip_deploy.core.errors import UnavailableError
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.evaluate.validation import validate

GATES = GatesConfig(fp32=GateLimits(min_cosine=0.9999))


@pytest.fixture(scope="module")
def package(onnx_target, sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aoti") / "aoti-fp32"
    calibration = load_prepared(sets / "calibration")
    build(folder, lambda output: export_aoti(onnx_target, Precision.fp32, calibration, output), Target("aoti", "fp32"))
    return folder


compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler on this machine")


@compiler
def test_a_package_runs_at_every_shape_and_gives_the_references_embeddings(package, sets):
    record = validate(package, load_prepared(sets / "evaluation"), sets / "evaluation" / "reference.npz", GATES, 0)
    assert record.status == "pass", record.reasons
    assert sorted(path.name for path in package.iterdir()) == ["target.json", "text.pt2", "vision.pt2"]


@compiler
def test_a_package_runs_without_the_models_python(package):
    program = (
        "import sys, numpy, pathlib; from clip_deploy.runtimes import open_encoder\n"
        f"encoder = open_encoder(pathlib.Path({str(package)!r}))\n"
        "print(encoder.encode_images(numpy.zeros((3, 3, 48, 48), 'float32')).shape, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(3, 64) False"


def test_without_a_compiler_the_row_is_unavailable(onnx_target, sets, tmp_path):
    from torch._inductor import config

    folder = tmp_path / "aoti-fp32"
    calibration = load_prepared(sets / "calibration")
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        build(
            folder, lambda output: export_aoti(onnx_target, Precision.fp32, calibration, output), Target("aoti", "fp32")
        )
    reason = read_target(folder).unavailable
    assert reason.startswith("AOTInductor cannot compile a C++ file: ")
    assert [path.name for path in folder.iterdir()] == ["target.json"]


@compiler
def test_a_compiler_that_links_its_library_into_the_package_is_refused(onnx_target, sets, tmp_path):
    from torch._inductor import config

    wrapped = tmp_path / "static-g++"
    wrapped.write_text('#!/bin/sh\nexec g++ -static-libstdc++ "$@"\n')
    wrapped.chmod(0o755)
    calibration = load_prepared(sets / "calibration")
    reason = r"static-g\+\+ links libstdc\+\+ statically\. .*: name another compiler in CXX"
    with config.patch({"cpp.cxx": (str(wrapped),)}), pytest.raises(UnavailableError, match=reason):
        export_aoti(onnx_target, Precision.fp32, calibration, tmp_path)
