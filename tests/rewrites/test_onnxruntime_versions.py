"""What we fuse does not depend on the version of ONNX Runtime, which only runs the graphs to check them."""

import json
import os
import subprocess
import sys

import pytest
from support.project import ROOT

OTHERS = ("1.24.4", "1.30.0")  # whose own optimizer finds no skip connection in what the dynamo exporter writes

FUSE = """
import json, sys
from collections import Counter
from pathlib import Path
import onnx, onnxruntime
from clip_deploy.core.artifact import build, read_target, Target
from clip_deploy.core.config import OptimizeConfig
from clip_deploy.core.files import sha256
from clip_deploy.builders.fused import optimize

source, output = map(Path, sys.argv[1:])
settings = OptimizeConfig(skip_layer_norm=True)
build(output, lambda folder: optimize(source, settings, None, folder), Target("ort", "fp32"))
files = [output / name for name in read_target(output).files]
kinds = [Counter(node.op_type for node in onnx.load(path).graph.node) for path in files]
print(json.dumps([onnxruntime.__version__, *kinds, *map(sha256, files)]))
"""


def fused_with(folder, source, output):
    """The version that ran, the operators of both graphs and their hashes, with the ONNX Runtime in `folder`."""
    path = os.pathsep.join(map(str, filter(None, (folder, ROOT))))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", FUSE, source, output]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    version, *found = json.loads(done.stdout.splitlines()[-1])
    return version, found


@pytest.fixture(scope="module")
def expected(onnx_target, tmp_path_factory):
    """What the version of requirements.lock leads to."""
    version, found = fused_with(None, onnx_target, tmp_path_factory.mktemp("lock") / "ort")
    assert f"onnxruntime-gpu=={version};" in (ROOT / "requirements.lock").read_text()
    return found


@pytest.mark.parametrize("version", OTHERS)
def test_another_onnxruntime_leads_to_the_same_fused_graph(onnx_target, expected, tmp_path, version):
    folder = ROOT / "build" / f"onnxruntime-{version}"
    if not (folder / "ready").exists():
        pytest.skip(f"no onnxruntime {version}: `make test` puts it into build/")
    assert fused_with(folder, onnx_target, tmp_path / "ort") == (version, expected)
    text, vision = expected[:2]
    assert (vision["SkipLayerNormalization"], text["SkipLayerNormalization"]) == (8, 4)
