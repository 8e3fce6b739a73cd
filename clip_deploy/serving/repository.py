"""Lay a package out as model repositories for Triton, with what runs and watches them beside.

artifacts/triton/python/        the towers as the package opens them, whatever their runtime
artifacts/triton/onnxruntime/   of ONNX Runtime's: the same by Triton's onnxruntime backend, as in NVIDIA's container
artifacts/triton/deploy/        Dockerfile, Kubernetes, KServe, Prometheus, Grafana

    clip_vision      pixel_values or images -> image_embeds
    clip_text        input_ids, attention_mask -> text_embeds; in python/, texts seen before come from its cache
    clip_preprocess  image files -> what clip_vision takes
    clip_tokenize    texts -> what clip_text takes
    clip_score       embeddings -> probabilities
    clip_zero_shot   all of these as one: image files and texts -> probabilities
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import numpy as np

from clip_deploy.core.artifact import EMBEDS, MANIFEST
from clip_deploy.core.config import TritonConfig
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.files import new_folder, write_text
from clip_deploy.core.manifest import INSIDE, File, Provenance, files_of, save_manifest
from clip_deploy.core.package import DualEncoder, EmptyPackageError, Package, Tower, read_package
from clip_deploy.core.parsing import FLAT, plain, read_record
from clip_deploy.core.records import Benchmark
from clip_deploy.serving.pbtxt import Message, Word, mapped, pbtxt

MODELS = Path(__file__).with_name("models")
DEPLOY = Path(__file__).with_name("deploy")
LIBRARY = Path(__file__).parents[1]
OPENING = (  # what opens a tower, and keeps embeddings of texts
    *("__init__.py", "core", "runtimes"),
    *("inference/__init__.py", "inference/encoders.py", "inference/text_cache.py"),
)
BESIDES = {"eager": ("checkpoint",), "compiled": ("checkpoint",), "fused": ("onnx_graph",)}  # of these runtimes
KEPT_VERSIONS = 2  # served side by side: the new one and the one to go back to
VERSION = "1"  # publish.py adds others
TOKENIZING = ("context_length", "pad_token", "pad_to_context")  # settings of clip_tokenize
SCORING = ("logit_scale", "logit_bias", "activation")  # of clip_score
IMAGE_TYPES = {"pixel_values": "TYPE_FP32", "images": "TYPE_UINT8"}
CACHE_BYTES = 16_777_216  # of embeddings of texts, in each instance of the python backend's text tower
FLAGS = (  # of every server: those of deploy/ and the one that validate_triton holds the repository against
    "--model-control-mode=explicit",  # versions come and go by request, and one that is refused leaves the others
    "--load-model=*",
    "--strict-readiness=false",  # else a version that was refused makes it "not ready" for good, whatever answers
    "--metrics-config=summary_latencies=true",
)
GPU = {"cpu": "", "cuda": ", nvidia.com/gpu: 1"}  # among the container's limits


@dataclass(frozen=True)
class ServedTower:
    """Which target a tower is, by its graph's SHA-256, and the batch sizes that its batcher prefers."""

    target: str
    sha256: str
    preferred_batch_sizes: list[int]


@dataclass(frozen=True, kw_only=True)
class Repository:
    """manifest.json beside model repositories.

    Attributes:
        towers: by "vision" and "text".
        backends: of Triton, a folder for each.
        library, built_for: of engines, which are valid for one version of TensorRT and one GPU.
        files: below the manifest's folder.
    """

    origin: Provenance = field(metadata=FLAT)
    towers: dict[str, ServedTower]
    backends: list[str]
    library: str | None = None
    built_for: str | None = None
    files: dict[str, File]


@dataclass(frozen=True)
class NoRepository:
    """manifest.json where there is nothing to serve."""

    unavailable: str


def write_repository(package: Path, benchmark: Path, settings: TritonConfig, output: Path) -> Repository | NoRepository:
    """Write the repositories and deploy/ into `output`, whole or not at all.

    Args:
        package: as the stage `package` writes it.
        benchmark: reports/benchmark, whose curves say which batch sizes are preferred.

    Returns what output/manifest.json holds.

    Raises DeployError where the package is damaged.
    """
    record: Repository | NoRepository
    with new_folder(output) as folder:
        try:
            record = _fill(folder, package, benchmark, settings)
        except UnavailableError as error:
            record = NoRepository(str(error))
        save_manifest(folder / INSIDE, record, indent=2)
    return record


def _fill(folder: Path, package: Path, benchmark: Path, settings: TritonConfig) -> Repository:
    found = packaged(package)
    encoder = found.encoder
    check_inputs(encoder)
    preferred = {
        tower: preferred_sizes(encoder.towers[tower].target, tower, benchmark, settings.max_batch) for tower in EMBEDS
    }
    backends = backends_of(encoder)
    for backend in backends:
        _write_towers(folder / backend, backend, package, encoder, preferred, settings)
        write_companions(folder / backend, package, encoder, settings)
    write_deploy(folder / "deploy", encoder, backends)
    return Repository(
        origin=found.origin,
        towers={tower: described(encoder.towers[tower], preferred[tower]) for tower in EMBEDS},
        backends=backends,
        files=files_of(folder),
    )


def backends_of(encoder: DualEncoder) -> list[str]:
    """Of Triton's backends those that can run both towers, the one to serve with first."""
    runtimes = {encoder.towers[tower].runtime for tower in EMBEDS}
    return ["onnxruntime", "python"] if runtimes == {"ort"} else ["python"]


def packaged(package: Path) -> Package:
    """As read_package, with an UnavailableError whose words name no folder where nothing was packaged."""
    try:
        return read_package(package)
    except EmptyPackageError as error:
        raise UnavailableError(f"nothing was packaged: {error.reason}") from error


def check_inputs(encoder: DualEncoder) -> None:
    """Raise UnavailableError where the image tower takes more than one input: the models around it hand on one."""
    if encoder.patches:
        raise UnavailableError(
            "the image tower takes patches, their mask and their arrangement (SigLIP 2 NaFlex), and clip_preprocess "
            "makes one tensor: open the package in Python (ZeroShotClassifier)"
        )


def described(tower: Tower, preferred: list[int]) -> ServedTower:
    """What the manifest says of a tower: its target, hash and preferred batch sizes."""
    return ServedTower(tower.target, tower.sha256, preferred)


def preferred_sizes(target: str, tower: str, benchmark: Path, most: int) -> list[int]:
    """The measured batch sizes above 1 and up to `most` that give more per second than every smaller one."""
    path = benchmark / f"{target}.json"
    sizes = read_record(Benchmark, path).towers.get(tower, {}) if path.exists() else {}
    best, kept = 0.0, []
    for batch, timing in sorted(sizes.items()):
        if timing.throughput_per_s > best:
            best = timing.throughput_per_s
            kept.append(batch)
    return [batch for batch in kept if 1 < batch <= most]


def _write_towers(
    repository: Path,
    backend: str,
    package: Path,
    encoder: DualEncoder,
    preferred: dict[str, list[int]],
    settings: TritonConfig,
) -> None:
    for tower in EMBEDS:
        config = tower_config(tower, backend, encoder, preferred[tower], settings)
        version = write_model(repository, config, "encoder" if backend == "python" else None)
        if backend == "python":
            _write_opened(version, package, encoder, tower)
        else:
            _write_graph(version, package, tower, encoder.towers[tower])
    write_warm_up(repository / "clip_text", encoder.context_length)


def _write_graph(version: Path, package: Path, name: str, tower: Tower) -> None:
    """An ONNX graph by the name that the backend looks for; external data keep theirs."""
    for file in tower.files:
        named = Path(file).name
        shutil.copyfile(package / file, version / ("model.onnx" if named == f"{name}.onnx" else named))


def _write_opened(version: Path, package: Path, encoder: DualEncoder, name: str) -> None:
    """A tower as it lies in the package, and what of clip_deploy opens it."""
    tower = encoder.towers[name]
    for file in [f"{tower.target}/{MANIFEST}", *tower.files]:
        _copy(package / file, version / file)
    for part in (*OPENING, *BESIDES.get(tower.runtime, ())):
        for path in [LIBRARY / part] if part.endswith(".py") else sorted((LIBRARY / part).glob("**/*.py")):
            _copy(path, version / path.relative_to(LIBRARY.parent))
    _write_settings(version, plain(encoder))


def _copy(path: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, copy)


def write_warm_up(model: Path, context_length: int) -> None:
    """The attention mask of the warm-up's text: with nothing but padding a tower would answer NaN."""
    (model / "warmup").mkdir()
    (model / "warmup" / "attention_mask").write_bytes(np.ones(context_length, dtype=np.int64).tobytes())


def write_model(repository: Path, config: Message, program: str | None) -> Path:
    """config.pbtxt and, for the python backend, model.py; returns the version's folder."""
    folder: Path = repository / config["name"] / VERSION
    folder.mkdir(parents=True)
    write_text(folder.parent / "config.pbtxt", pbtxt(config))
    if program:
        shutil.copyfile(MODELS / f"{program}.py", folder / "model.py")
    return folder


def tower_config(
    tower: str, backend: str, encoder: DualEncoder, preferred: list[int], settings: TritonConfig
) -> Message:
    """Dynamic batching, versions, instances and warm-up of one tower.

    Triton's response cache stays off: 2.51 caches errors too, and answers them with 200 and no output. The python
    backend's text tower has a cache of its own, the other backends have none.

    The queue has no bound: with one (default_queue_policy), Triton 2.51 prefetches nothing, and on a busy machine a
    request that meets the end of the one before it waits until the batcher looks again, 500 ms later.
    """
    return {
        "name": f"clip_{tower}",
        "backend": backend,
        "max_batch_size": settings.max_batch if tower == "vision" else settings.max_texts,
        "input": tower_inputs(tower, encoder),
        "output": [_tensor(EMBEDS[tower], "TYPE_FP32", [encoder.dimension])],
        "version_policy": _kept(),
        "dynamic_batching": {
            **({"preferred_batch_size": preferred} if preferred else {}),
            "max_queue_delay_microseconds": settings.queue_delay_us,
        },
        "instance_group": _instances(settings.instances, encoder.device),
        "model_warmup": [_warm_up(tower, encoder, size) for size in (1, *preferred)],
        "parameters": _parameters(
            {
                "intra_op_thread_count": settings.threads,
                **({"cache_bytes": CACHE_BYTES} if (tower, backend) == ("text", "python") else {}),
            }
        ),
    }


def tower_inputs(tower: str, encoder: DualEncoder) -> list[Message]:
    """The inputs of a tower's model, in config.pbtxt's words, with shapes without the batch."""
    if tower == "text":
        return [_tensor(name, "TYPE_INT64", [-1]) for name in encoder.towers.text.inputs]
    name = encoder.towers.vision.image_input
    shape = [3, *encoder.image_size] if name == "pixel_values" else [-1, -1, 3]
    return [_tensor(name, IMAGE_TYPES[name], shape)]


def _warm_up(tower: str, encoder: DualEncoder, size: int) -> Message:
    """A request of `size` rows before the first real one: kernels are chosen and memory is taken on it."""
    names = encoder.towers[tower].inputs
    if tower == "text":
        shape = [encoder.context_length]
    else:
        height, width = encoder.image_size
        shape = [3, height, width] if names == ["pixel_values"] else [height, width, 3]
    kind = "TYPE_INT64" if tower == "text" else IMAGE_TYPES[names[0]]
    content = {name: {"input_data_file": name} if name == "attention_mask" else {"zero_data": True} for name in names}
    inputs = {name: {"data_type": Word(kind), "dims": shape, **content[name]} for name in names}
    return {"name": f"batch_{size}", "batch_size": size, "inputs": mapped(inputs)}


def write_companions(repository: Path, files: Path, encoder: DualEncoder, settings: TritonConfig) -> None:
    """The models around the towers, the same for every backend; tokenizer.json and preprocessor.json from `files`."""
    preprocess = write_model(repository, preprocess_config(encoder, settings), "preprocess")
    tokenize = write_model(repository, tokenize_config(settings), "tokenize")
    score = write_model(repository, score_config(encoder), "score")
    whole = write_model(repository, zero_shot_config(encoder), None)
    _write_settings(tokenize, {name: getattr(encoder, name) for name in TOKENIZING})
    _write_settings(score, {name: getattr(encoder, name) for name in SCORING})
    _write_settings(whole, {"towers": plain(encoder.towers)})  # what the version is
    shutil.copyfile(files / "tokenizer.json", tokenize / "tokenizer.json")
    if (files / "preprocessor.json").exists():
        shutil.copyfile(files / "preprocessor.json", preprocess / "preprocessor.json")


def _write_settings(version: Path, settings: dict[str, object]) -> None:
    """What differs between versions lies with them: all of a model's versions share one config.pbtxt."""
    write_text(version / "settings.json", json.dumps(settings, indent=2) + "\n")


def preprocess_config(encoder: DualEncoder, settings: TritonConfig) -> Message:
    """Image files to what the tower takes. Tokens pass through, with a batch axis of their own (max_batch_size 0).

    Triton 2.51 crashes where one step of an ensemble fails while it starts another beside it. So clip_zero_shot starts
    the towers only after all that can be wrong with a request has been seen, one step after the other.
    """
    (image,) = tower_inputs("vision", encoder)
    tokens = [_tensor(name, "TYPE_INT64", [-1, -1]) for name in encoder.towers.text.inputs]
    return {
        "name": "clip_preprocess",
        "backend": "python",
        "max_batch_size": 0,
        "input": [_tensor("encoded", "TYPE_STRING", [-1, 1]), *({**token, "optional": True} for token in tokens)],
        "output": [{**image, "dims": [-1, *image["dims"]]}, *tokens],
        "version_policy": _kept(),
        "instance_group": _instances(settings.workers, "cpu"),
        "parameters": _parameters({"max_images": settings.max_batch}),
    }


def tokenize_config(settings: TritonConfig) -> Message:
    """config.pbtxt of clip_tokenize: texts to token ids."""
    return {
        "name": "clip_tokenize",
        "backend": "python",
        "max_batch_size": settings.max_texts,
        "input": [_tensor("texts", "TYPE_STRING", [1])],
        "output": [_tensor(name, "TYPE_INT64", [-1]) for name in ("input_ids", "attention_mask")],
        "version_policy": _kept(),
        "instance_group": _instances(1, "cpu"),
    }


def score_config(encoder: DualEncoder) -> Message:
    """Every image with every text: two batch axes, so that Triton sees none (max_batch_size 0)."""
    return {
        "name": "clip_score",
        "backend": "python",
        "max_batch_size": 0,
        "input": [_tensor(name, "TYPE_FP32", [-1, encoder.dimension]) for name in EMBEDS.values()],
        "output": [_tensor("probabilities", "TYPE_FP32", [-1, -1])],
        "version_policy": _kept(),
        "instance_group": _instances(1, "cpu"),
    }


def zero_shot_config(encoder: DualEncoder) -> Message:
    """config.pbtxt of the ensemble clip_zero_shot: files of images and texts to probabilities."""
    image = encoder.towers.vision.image_input
    tokens = {name: name for name in encoder.towers.text.inputs}
    passed = {name: f"passed_{name}" for name in tokens}
    return {
        "name": "clip_zero_shot",
        "platform": "ensemble",
        "max_batch_size": 0,
        "input": [_tensor("encoded", "TYPE_STRING", [-1, 1]), _tensor("texts", "TYPE_STRING", [-1, 1])],
        "output": [_tensor("probabilities", "TYPE_FP32", [-1, -1])],
        "ensemble_scheduling": {
            "step": [
                _step("clip_tokenize", {"texts": "texts"}, tokens),
                _step("clip_preprocess", {"encoded": "encoded", **tokens}, {image: image, **passed}),
                _step("clip_vision", {image: image}, {"image_embeds": "image_embeds"}),
                _step("clip_text", passed, {"text_embeds": "text_embeds"}),
                _step("clip_score", {name: name for name in EMBEDS.values()}, {"probabilities": "probabilities"}),
            ]
        },
    }


def _step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> Message:
    """One version of all parts: a newer image tower beside an older text tower would score without an error."""
    return {
        "model_name": model,
        "model_version": int(VERSION),
        "input_map": mapped(inputs),
        "output_map": mapped(outputs),
    }


def _tensor(name: str, kind: str, shape: list[int]) -> Message:
    return {"name": name, "data_type": Word(kind), "dims": shape}


def _kept() -> Message:
    return {"latest": {"num_versions": KEPT_VERSIONS}}


def _instances(count: int, device: str) -> list[Message]:
    return [{"count": count, "kind": Word({"cpu": "KIND_CPU", "cuda": "KIND_GPU"}[device])}]


def _parameters(values: dict[str, int | str | None]) -> list[Message]:
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return mapped({name: {"string_value": word} for name, word in words.items()})


def write_deploy(folder: Path, encoder: DualEncoder, backends: list[str]) -> None:
    """Manifests for containers and monitoring; those ending in .template get what depends on the package.

    JSON's list is one in YAML and in a Dockerfile too.
    """
    content = {
        "flags": ", ".join(map(json.dumps, FLAGS)),
        "gpu": GPU[encoder.device],
        "repository": backends[0],
        "copies": "\n".join(f"COPY {backend} /models/{backend}" for backend in backends),
        "requires": "\n".join(encoder.requires),
    }
    folder.mkdir()
    for path in sorted(DEPLOY.iterdir()):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".template":
            text = Template(text).substitute(content)
        write_text(folder / path.name.removesuffix(".template"), text)
