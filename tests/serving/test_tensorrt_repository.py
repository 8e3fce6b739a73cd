"""The repository for Triton's tensorrt backend. No engine of NVIDIA's data-centre library can be built in CI: these are
bytes, which nothing here loads."""

import hashlib
import json
from dataclasses import replace

import pytest
from support.records import checked, parity, timing
from support.triton import ENVIRONMENT, MODEL_NAMES, accepted

from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import BuildEngineConfig, GateLimits, GatesConfig, TritonConfig
from clip_deploy.core.errors import DeployError
from clip_deploy.core.files import sha256
from clip_deploy.core.manifest import Provenance, Run, verify
from clip_deploy.core.parsing import parse, plain
from clip_deploy.core.records import Benchmark, Validation
from clip_deploy.serving.server import find_environment
from clip_deploy.serving.tensorrt_repository import write_engine_repository

LIBRARY = {"library": "TensorRT 10.14.1", "built_for": "NVIDIA H200, 143771 MiB, 580.95.05"}
ORIGIN = Provenance(Run("tiny", 0, {}), checkpoint=None, builds={}, gates={})
ENGINES = {"text.engine": b"text", "vision.engine": b"vision"}
GATES = GatesConfig(fp16=GateLimits(min_cosine=0.999))
CLOSE = {"vision": parity(0.9995), "text": parity(0.9995)}


@pytest.fixture
def write(checkpoint, sets, tmp_path):
    """Write the repository of a target with engines, and return its manifest."""
    built, benchmark = tmp_path / "trt-fp16", tmp_path / "benchmark"
    benchmark.mkdir()
    curve = {batch: timing(throughput_per_s=float(batch)) for batch in (1, 8, 64)}
    timed = Benchmark(status="measured", towers={"vision": curve, "text": curve})
    (benchmark / "trt-fp16.json").write_text(json.dumps(plain(timed)))
    description = Target("tensorrt", "fp16", list(ENGINES), read_target(checkpoint).model, device="cuda")

    def fill(folder, library):
        for name, content in ENGINES.items():
            (folder / name).write_bytes(content)
        return replace(description, build={**LIBRARY, "library": library})

    def run(engine=BuildEngineConfig(max_batch=16), library=LIBRARY["library"], gates=GATES, **changed):  # noqa: B008
        build(built, lambda folder: fill(folder, library), description)
        files = {name: sha256(built / name) for name in ENGINES}
        sound = checked(precision="fp16", parity=plain(CLOSE), files=files)
        record = parse(Validation, sound | changed, "the record")
        output = tmp_path / "triton"
        found = write_engine_repository(
            built,
            parse(Validation, record, "the record"),
            gates,
            ORIGIN,
            sets,
            benchmark,
            engine,
            TritonConfig(max_batch=32),
            output,
        )
        assert json.loads((output / "manifest.json").read_text()) == plain(found)
        return found, output

    return run


def test_towers_are_engines_and_the_rest_is_as_everywhere(write):
    found, output = write()
    assert found.library == "TensorRT 10.14.1"
    assert found.built_for.startswith("NVIDIA H200")
    assert found.origin == ORIGIN
    manifest, differences = verify(output)
    assert (manifest.files, differences) == (plain(found.files), [])
    repository = output / "tensorrt"
    assert sorted(path.name for path in repository.iterdir()) == MODEL_NAMES
    assert (repository / "clip_vision" / "1" / "model.plan").read_bytes() == b"vision"
    config = (repository / "clip_text" / "config.pbtxt").read_text()
    assert 'backend: "tensorrt"' in config
    assert "kind: KIND_GPU" in config
    assert "max_batch_size: 16" in config  # the engine's, which is below triton.max_texts
    assert "preferred_batch_size: [8]" in config
    assert "intra_op_thread_count" not in config
    tokenizer = repository / "clip_tokenize" / "1" / "tokenizer.json"
    assert json.loads(tokenizer.read_text())["model"]["type"] == "BPE"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"status": "fail", "reasons": ["vision: cosine 0.9"]},
            "is not fit to ship: gate fail vision: cosine",
        ),
        (
            {"gates": GatesConfig(fp16=GateLimits(min_cosine=0.9999))},
            "cosine 0.999500 < 0.9999 (gates.fp16.min_cosine)",
        ),
        ({"flips": None}, "flips nan % > 100"),
        ({"library": "TensorRT-RTX 1.6.1.120"}, "backend loads engines of TensorRT only: install NVIDIA's `tensorrt`"),
        ({"engine": BuildEngineConfig(min_batch=2, opt_batch=2)}, "set build_engine.trt-fp16.min_batch to 1"),
    ],
)
def test_what_the_backend_cannot_serve_keeps_its_reason(write, changed, said):
    found, output = write(**changed)
    assert said in found.unavailable
    assert [path.name for path in output.iterdir()] == ["manifest.json"]


def test_an_engine_that_was_not_judged_is_refused(write, tmp_path):
    with pytest.raises(DeployError, match=r"vision\.engine is not the file that was checked"):
        write(files={"text.engine": hashlib.sha256(b"text").hexdigest(), "vision.engine": "0"})
    assert not (tmp_path / "triton").exists()


def test_tritons_own_schema_accepts_the_engines_configs(write):
    try:
        python = find_environment(ENVIRONMENT).python
    except DeployError as error:
        pytest.skip(str(error))
    configs = sorted((write()[1] / "tensorrt").glob("*/config.pbtxt"))
    assert len(configs) == 6
    assert accepted(python, *configs).returncode == 0
