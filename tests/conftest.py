"""The built-in checkpoint, small sets and targets made once, and a temporary copy of the whole project."""

import gc
import getpass
import hashlib
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial, wraps
from pathlib import Path

import pytest
from coverage import Coverage
from filelock import FileLock
from hypothesis import HealthCheck, Phase, settings
from support import models
from support.kinds import Kinds
from support.project import ROOT, TINY, Project, new_project
from support.reliability import Outcomes
from support.targets import packed, prepare
from support.warm import quicken_exports

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
os.environ["DVC_NO_ANALYTICS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers' threads would spin on each other's cores
if not shutil.which("nvidia-smi"):
    os.environ["TRITON_INTERPRET"] = "1"  # GPU kernels run in Triton's interpreter; read when triton is imported
    sys.path.append(str(ROOT / "build" / "language"))  # `make test` puts triton there


MANY = 8  # times as many inputs in `make reliability` as in `make test`
REPORT = "--reliability"
KINDS = "--kinds"
NIGHTLY = "--nightly"
BENCHMARKS = ROOT / "tests" / "benchmarks"


def pytest_addoption(parser):
    parser.addoption(KINDS, type=Path, metavar="FILE", help="run the tests that show a kind, and write their table")
    parser.addoption(NIGHTLY, action="store_true", help="run the long examples of the documentation too")
    parser.addoption(REPORT, type=Path, metavar="FILE", help="run all faults, many more inputs, and write counts")


def pytest_collection_modifyitems(config, items):
    """Begin with what runs longest; skip, visibly, what needs a GPU where there is none, and what takes too long.

    One worker begins with a file that needs the built project and makes it; the others, meanwhile, with what does not.
    """
    first = next((item.path for item in items if "built" in item.fixturenames), None)

    def turn(item):
        return 0 if item.path == first else 2 if "built" in item.fixturenames else 1

    items.sort(key=lambda item: ("slow" not in item.keywords, turn(item)))
    leave_unmeasured(items)
    if config.getoption(KINDS):
        items[:] = [item for item in items if "kinds" in item.fixturenames]
    if not config.getoption(REPORT):
        for item in items:
            if "reliability" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="`make reliability` runs it"))
    if not config.getoption(NIGHTLY):
        for item in items:
            if "nightly" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="`make test-docs ARGS=--nightly` runs it"))
    if shutil.which("nvidia-smi"):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


def leave_unmeasured(items):
    """Mark what coverage gains nothing from, for a tracer takes as long again as our own code.

    That is: slow tests, which work in other processes; tests of benchmarks/, which is not measured; fuzzers, which go
    the same way hundreds of times; and of a test's many inputs all but the first.
    """
    measured = set()
    for item in items:
        name = item.nodeid.partition("[")[0]
        if (
            "slow" in item.keywords
            or "fuzz" in item.fixturenames
            or BENCHMARKS in item.path.parents
            or name in measured
        ):
            item.add_marker(pytest.mark.no_cover)
        measured.add(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Make the fixtures of a test without the tracer too; pytest-cov leaves it out of the call alone."""
    tracer = sys.gettrace()
    if item.get_closest_marker("no_cover"):
        sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


@pytest.fixture(scope="session")
def outcomes(pytestconfig):
    """Where faults and hostile inputs are counted; `make reliability` writes them down."""
    found = Outcomes()
    yield found
    if path := pytestconfig.getoption(REPORT):
        found.write(path)


@pytest.fixture(scope="session")
def kinds(pytestconfig):
    """Where a test notes what comes of a kind of input; `make kinds` writes the table."""
    found = Kinds()
    yield found
    if path := pytestconfig.getoption(KINDS):
        found.write(path)


@pytest.fixture(scope="session")
def fuzz(pytestconfig):
    """Settings of a test by Hypothesis that tries `count` inputs, the same ones each time."""

    def tries(count):
        times = MANY if pytestconfig.getoption(REPORT) else 1
        return settings(
            max_examples=times * count,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # an input is shown as it was found
        )

    return tries


UNTRACED = (
    "torch.onnx.export",
    "torch.export.export",
    "torch.jit.trace",
    "torch._inductor.aoti_compile_and_package",
    "transformers.AutoModel.from_pretrained",
    "transformers.AutoProcessor.from_pretrained",
    "transformers.AutoTokenizer.from_pretrained",
    "hydra._internal.hydra.Hydra.compose_config",
    "yaml.compose",
    "omegaconf.OmegaConf.load",
    "omegaconf.OmegaConf.create",
    "omegaconf.OmegaConf.merge",
    "omegaconf.OmegaConf.structured",
    "omegaconf.OmegaConf.to_container",
    "dvc.repo.Repo.status",
    "onnx_ir.load",
    "onnx_ir.save",
    "clip_deploy.builders.quantize.quantize_dynamic",
    "clip_deploy.builders.quantize.quantize_static",
    "clip_deploy.rewrites.fusion.fold_constants",
    "clip_deploy.rewrites.fusion.simplify",
)


def untraced(function):
    @wraps(function)
    def call(*args, **kwargs):
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            return function(*args, **kwargs)
        finally:
            sys.settrace(tracer)

    return call


@pytest.fixture(scope="session", autouse=True)
def libraries_without_coverage():
    """A tracer doubles the time of what calls itself a million times, and measures nothing there."""
    with pytest.MonkeyPatch.context() as patch:
        if Coverage.current():
            found = untraced(lambda: {name: pkgutil.resolve_name(name) for name in UNTRACED})()  # imports them
            for name, function in found.items():
                patch.setattr(name, untraced(function))
        yield


@pytest.fixture(scope="session", autouse=True)
def libraries_at_once():
    """Let nothing go over what was imported, a million objects: neither the garbage collector nor the ONNX exporter."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
    if "torch" in sys.modules:
        quicken_exports()


@pytest.fixture(scope="session", autouse=True)
def own_turns(tmp_path_factory):
    """Another temporary folder than the other workers' (core/turns.py): a stage would wait where they time theirs.

    Its name is short, for Ray makes sockets below it. What PyTorch compiled is still everybody's.
    """
    tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
        Path(folder).chmod(0o755)  # tests become another user
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    """shared(name, make): a path that `make(path)` fills once for all of pytest-xdist's workers; none may change it."""
    base = tmp_path_factory.getbasetemp()
    folder = base if worker_id == "master" else base.parent

    def path(name, make):
        made = folder / name
        made.parent.mkdir(exist_ok=True)
        with FileLock(f"{made}.lock"):
            if not made.exists():
                make(made)
        return made

    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The built-in model as the target torch-fp32."""
    from clip_deploy.checkpoint.fetch import fetch
    from clip_deploy.core.artifact import Target, build
    from clip_deploy.core.config import ModelConfig

    folder = tmp_path_factory.mktemp("artifacts") / "torch-fp32"
    build(folder, lambda output: fetch(ModelConfig(path=str(TINY)), output), Target("eager", "fp32"))
    return folder


@pytest.fixture(scope="session")
def siglip(shared):
    return shared("siglip/torch-fp32", lambda folder: models.siglip(folder.parent))


@pytest.fixture(scope="session")
def siglip2(tmp_path_factory):
    return models.siglip2(tmp_path_factory.mktemp("siglip2"))


@pytest.fixture(scope="session")
def chinese_clip(shared):
    return shared("chinese-clip/torch-fp32", lambda folder: models.chinese_clip(folder.parent))


@pytest.fixture(scope="module", params=["checkpoint", "siglip", "chinese_clip"])
def family(request):
    """A checkpoint of each family: CLIP, SigLIP with its pooling head, and one with a BERT text tower."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def sets(checkpoint, tmp_path_factory):
    """A folder with small evaluation and calibration sets and the reference's embeddings."""
    return prepare(checkpoint, tmp_path_factory.mktemp("data"), 96, 16, ["a photo of a {}", "a {}"])


@pytest.fixture(scope="session")
def naflex(tmp_path_factory):
    return models.naflex(tmp_path_factory.mktemp("naflex"))


@pytest.fixture(scope="session")
def naflex_sets(naflex, tmp_path_factory):
    return prepare(naflex, tmp_path_factory.mktemp("data"), 16, 8, ["a {}"])


@pytest.fixture(scope="session")
def onnx_target(checkpoint, onnx_of):
    """The built-in model exported at opset 18, beside its checkpoint."""
    folder = checkpoint.parent / "onnx-fp32"
    shutil.copytree(onnx_of(checkpoint), folder)
    return folder


@pytest.fixture(scope="session")
def onnx_of(shared):
    """onnx_of(checkpoint, opset, ...): a checkpoint's export by these settings, made once and left as it is."""
    from clip_deploy.builders import onnx_export
    from clip_deploy.core.artifact import Target, build
    from clip_deploy.core.config import OnnxConfig
    from clip_deploy.core.environment import fingerprint

    def export(source, opset=18, **more):
        settings = OnnxConfig(opset=opset, **more)
        weights, write = fingerprint(source), onnx_export.WRITERS[settings.writer]

        def write_once(tower, inputs, path, *words):
            """A tower's own graph is the same, whatever the settings put around it."""
            name = f"{weights[:16]}-{settings.writer}-{opset}/{path.name}"
            shutil.copy(shared(name, lambda made: write(tower, inputs, made, *words)), path)

        def make(folder):
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(onnx_export.WRITERS, settings.writer, write_once)
                fill = partial(onnx_export.export_onnx, source, settings)
                build(folder, fill, Target("ort", "fp32"))

        key = hashlib.sha256(f"{weights} {settings}".encode()).hexdigest()[:16]
        return shared(f"{key}/onnx-fp32", make)

    return export


@pytest.fixture(scope="session")
def fused(onnx_target, sets):
    """A second target beside the exported one."""
    from clip_deploy.builders.fused import optimize
    from clip_deploy.core.artifact import Target, build
    from clip_deploy.core.config import OptimizeConfig
    from clip_deploy.data.preprocessed import load_prepared

    folder, calibration = onnx_target.parent / "ort-fp32", load_prepared(sets / "calibration")
    build(folder, lambda output: optimize(onnx_target, OptimizeConfig(), calibration, output), Target("ort", "fp32"))
    return folder


@pytest.fixture(scope="session")
def package(onnx_target, sets, tmp_path_factory):
    """The exported built-in model as the stage `package` would pack it."""
    return packed(onnx_target, sets, tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def peft():
    """The library, on the path of one module's tests alone: what is installed is part of a result's identity."""
    with pytest.MonkeyPatch.context() as path:
        path.syspath_prepend(ROOT / "build" / "peft")  # `make test` puts it and sentence-transformers there
        found = pytest.importorskip("peft", reason="peft is not installed: pip install 'clip-deploy[peft]'")
        from transformers.utils import is_peft_available  # which remembers what it saw before

        is_peft_available.cache_clear()
        yield found
    is_peft_available.cache_clear()


@pytest.fixture
def project(tmp_path):
    """A fresh copy in which nothing has been built."""
    return new_project(tmp_path / "project")


@pytest.fixture(scope="session")
def built(shared, tmp_path_factory):
    """A copy in which the whole pipeline has run once and been committed. Tests take their own copy of it."""

    def make(folder):
        project = new_project(tmp_path_factory.mktemp("building") / "project")
        project.repro()
        project.run("git", "add", "-A")
        project.run("git", "commit", "-q", "-m", "Reproduce")
        project.path.rename(folder)

    return Project(shared("built", make))


MOTO = ROOT / "build" / "moto"  # `make test` puts moto there
SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def endpoint():
    """A server with the API of S3 on this machine, which ends with its standard input."""
    if not (MOTO / "ready").is_file():
        pytest.skip("no moto: make build/moto/ready")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        env={**os.environ, "PYTHONPATH": str(MOTO)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield f"127.0.0.1:{process.stdout.readline().strip()}"
    process.communicate()


@pytest.fixture
def bucket(endpoint, monkeypatch):
    """A bucket of its own for each test, as pyarrow's file system; the commands reach it through the environment."""
    from pyarrow import fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    store = fs.S3FileSystem(endpoint_override=endpoint, scheme="http", region="us-east-1", allow_bucket_creation=True)
    name = f"bucket-{time.monotonic_ns()}"
    store.create_dir(name)
    return fs.SubTreeFileSystem(name, store)
