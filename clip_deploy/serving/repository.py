"""Lay a package out as model repositories for Triton, with what runs and watches them beside.

artifacts/triton/onnxruntime/   the towers by Triton's onnxruntime backend, as in NVIDIA's container
artifacts/triton/python/        the same models where a server has the python backend only
artifacts/triton/deploy/        Dockerfile, Kubernetes, KServe, Prometheus, Grafana

    clip_vision      pixel_values or images -> image_embeds
    clip_text        input_ids, attention_mask -> text_embeds; answers are cached
    clip_preprocess  image files -> what clip_vision takes
    clip_tokenize    texts -> what clip_text takes
    clip_score       embeddings -> probabilities
    clip_zero_shot   all of these as one: image files and texts -> probabilities
"""

import json
import shutil
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from clip_deploy.core.artifact import EMBEDS, hashes
from clip_deploy.core.config import TritonConfig
from clip_deploy.core.errors import DeployError, DiskError, UnavailableError
from clip_deploy.core.files import new_folder, sha256, write_text
from clip_deploy.core.json_files import read_json
from clip_deploy.core.manifest import PROVENANCE
from clip_deploy.serving.pbtxt import Word, mapped, pbtxt

BACKENDS = ("onnxruntime", "python")  # a repository for each
MODELS = Path(__file__).with_name("models")
DEPLOY = Path(__file__).with_name("deploy")
KEPT_VERSIONS = 2  # served side by side: the new one and the one to go back to
VERSION = "1"  # publish.py adds others
IMAGE_TYPES = {"pixel_values": "TYPE_FP32", "images": "TYPE_UINT8"}
FLAGS = (  # of every server: those of deploy/ and the one that validate_triton holds the repository against
    "--cache-config=local,size=16777216",  # answers of the text tower
    "--model-control-mode=explicit",  # versions come and go by request, and one that is refused leaves the others
    "--load-model=*",
    "--strict-readiness=false",  # else a version that was refused makes it "not ready" for good, whatever answers
    "--metrics-config=summary_latencies=true",
)
GPU = {"cpu": "", "cuda": ", nvidia.com/gpu: 1"}  # among the container's limits


def write_repository(package: Path, benchmark: Path, settings: TritonConfig, output: Path) -> dict[str, Any]:
    """Write the repositories and deploy/ into `output`, whole or not at all.

    Args:
        package: as the stage `package` writes it.
        benchmark: reports/benchmark, whose curves say which batch sizes are preferred.

    Returns what output/manifest.json holds: only the reason where nothing was packaged.

    Raises DeployError where the package is damaged.
    """
    with new_folder(output) as folder:
        try:
            record = _fill(folder, package, benchmark, settings)
        except UnavailableError as error:
            record = {"unavailable": str(error)}
        write_text(folder / "manifest.json", json.dumps(record, indent=2) + "\n")
    return record


def _fill(folder: Path, package: Path, benchmark: Path, settings: TritonConfig) -> dict[str, Any]:
    manifest = read_package(package)
    preferred = {tower: preferred_sizes(manifest, tower, benchmark, settings.max_batch) for tower in EMBEDS}
    for backend in BACKENDS:
        _write_towers(folder / backend, backend, package, manifest, preferred, settings)
        write_companions(folder / backend, package, manifest, settings)
    write_deploy(folder / "deploy", manifest)
    return {
        **{key: manifest[key] for key in PROVENANCE},
        "towers": {tower: described(manifest["towers"][tower], preferred[tower]) for tower in EMBEDS},
        "backends": list(BACKENDS),
        "files": hashes(folder),
    }


def read_package(package: Path) -> dict[str, Any]:
    """The package's manifest, after its files were held against it.

    Raises UnavailableError where it holds nothing, DeployError where it is damaged.
    """
    manifest = read_json(package / "manifest.json")
    if "unavailable" in manifest:
        raise UnavailableError(f"nothing was packaged: {manifest['unavailable']}")
    if manifest.get("format") != 1:
        raise DeployError(f"{package} has format {manifest.get('format')}: accepted is 1; run `dvc repro package`")
    for name, facts in manifest["files"].items():
        path = package / name
        if not path.is_file() or sha256(path) != facts["sha256"]:
            raise DiskError(f"{path} is missing or was changed after it was packaged: run `dvc repro package`")
    return manifest


def described(tower: dict[str, Any], preferred: list[int]) -> dict[str, Any]:
    return {"target": tower["target"], "sha256": tower["sha256"], "preferred_batch_sizes": preferred}


def preferred_sizes(manifest: dict[str, Any], tower: str, benchmark: Path, most: int) -> list[int]:
    """The measured batch sizes above 1 and up to `most` that give more per second than every smaller one."""
    path = benchmark / f"{manifest['towers'][tower]['target']}.json"
    sizes = read_json(path).get("towers", {}).get(tower, {}) if path.exists() else {}
    best, kept = 0.0, []
    for batch in sorted(map(int, sizes)):
        if sizes[str(batch)]["throughput_per_s"] > best:
            best = sizes[str(batch)]["throughput_per_s"]
            kept.append(batch)
    return [batch for batch in kept if 1 < batch <= most]


def _write_towers(
    repository: Path,
    backend: str,
    package: Path,
    manifest: dict[str, Any],
    preferred: dict[str, list[int]],
    settings: TritonConfig,
) -> None:
    for tower in EMBEDS:
        config = tower_config(tower, backend, manifest, preferred[tower], settings)
        folder = write_model(repository, config, "encoder" if backend == "python" else None)
        graph = manifest["towers"][tower]["file"]
        for name in [name for name in manifest["files"] if name.startswith(graph)]:  # external data keep their name
            shutil.copyfile(package / name, folder / ("model.onnx" if name == graph else name))
    context = manifest["context_length"]
    write_warm_up(repository / "clip_text", np.ones(context, dtype=np.int64))


def write_warm_up(model: Path, mask: np.ndarray) -> None:
    """The attention mask of the warm-up's text: with nothing but padding a tower would answer NaN."""
    (model / "warmup").mkdir()
    (model / "warmup" / "attention_mask").write_bytes(mask.tobytes())


def write_model(repository: Path, config: dict[str, Any], program: str | None) -> Path:
    """config.pbtxt and, for the python backend, model.py; returns the version's folder."""
    folder = repository / config["name"] / VERSION
    folder.mkdir(parents=True)
    write_text(folder.parent / "config.pbtxt", pbtxt(config))
    if program:
        shutil.copyfile(MODELS / f"{program}.py", folder / "model.py")
    return folder


def tower_config(
    tower: str, backend: str, manifest: dict[str, Any], preferred: list[int], settings: TritonConfig
) -> dict[str, Any]:
    """Dynamic batching, versions, instances and warm-up of one tower.

    The queue has no bound: with one (default_queue_policy), Triton 2.51 prefetches nothing, and on a busy machine a
    request that meets the end of the one before it waits until the batcher looks again, 500 ms later.
    """
    inputs = tower_inputs(tower, manifest)
    return {
        "name": f"clip_{tower}",
        "backend": backend,
        "max_batch_size": settings.max_batch if tower == "vision" else settings.max_texts,
        "input": inputs,
        "output": [_tensor(EMBEDS[tower], "TYPE_FP32", [manifest["dimension"]])],
        "version_policy": _kept(),
        "dynamic_batching": {
            **({"preferred_batch_size": preferred} if preferred else {}),
            "max_queue_delay_microseconds": settings.queue_delay_us,
        },
        "instance_group": _instances(settings.instances, manifest["device"]),
        **({"response_cache": {"enable": True}} if tower == "text" else {}),
        "model_warmup": [_warm_up(tower, manifest, size) for size in (1, *preferred)],
        "parameters": _parameters({"intra_op_thread_count": settings.threads}),
    }


def tower_inputs(tower: str, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    facts = manifest["towers"][tower]
    if tower == "text":
        return [_tensor(name, "TYPE_INT64", [-1]) for name in facts["inputs"]]
    shape = [3, *manifest["image_size"]] if facts["image_input"] == "pixel_values" else [-1, -1, 3]
    return [_tensor(facts["image_input"], IMAGE_TYPES[facts["image_input"]], shape)]


def _warm_up(tower: str, manifest: dict[str, Any], size: int) -> dict[str, Any]:
    """A request of `size` rows before the first real one: kernels are chosen and memory is taken on it."""
    facts = manifest["towers"][tower]
    if tower == "text":
        shape, names = [manifest["context_length"]], facts["inputs"]
    else:
        height, width = manifest["image_size"]
        names = [facts["image_input"]]
        shape = [3, height, width] if names == ["pixel_values"] else [height, width, 3]
    kind = "TYPE_INT64" if tower == "text" else IMAGE_TYPES[names[0]]
    content = {name: {"input_data_file": name} if name == "attention_mask" else {"zero_data": True} for name in names}
    inputs = {name: {"data_type": Word(kind), "dims": shape, **content[name]} for name in names}
    return {"name": f"batch_{size}", "batch_size": size, "inputs": mapped(inputs)}


def write_companions(repository: Path, files: Path, manifest: dict[str, Any], settings: TritonConfig) -> None:
    """The models around the towers, the same for every backend; tokenizer.json and preprocessor.json from `files`."""
    preprocess = write_model(repository, preprocess_config(manifest, settings), "preprocess")
    tokenize = write_model(repository, tokenize_config(manifest, settings), "tokenize")
    score = write_model(repository, score_config(manifest), "score")
    whole = write_model(repository, zero_shot_config(manifest), None)
    _write_settings(tokenize, {name: manifest[name] for name in ("context_length", "pad_token", "pad_to_context")})
    _write_settings(score, {name: manifest[name] for name in ("logit_scale", "logit_bias", "activation")})
    _write_settings(whole, {"towers": manifest["towers"]})  # what the version is
    shutil.copyfile(files / "tokenizer.json", tokenize / "tokenizer.json")
    if (files / "preprocessor.json").exists():
        shutil.copyfile(files / "preprocessor.json", preprocess / "preprocessor.json")


def _write_settings(version: Path, settings: dict[str, Any]) -> None:
    """What differs between versions lies with them: all of a model's versions share one config.pbtxt."""
    write_text(version / "settings.json", json.dumps(settings, indent=2) + "\n")


def preprocess_config(manifest: dict[str, Any], settings: TritonConfig) -> dict[str, Any]:
    """Image files to what the tower takes. Tokens pass through, with a batch axis of their own (max_batch_size 0).

    Triton 2.51 crashes where one step of an ensemble fails while it starts another beside it. So clip_zero_shot starts
    the towers only after all that can be wrong with a request has been seen, one step after the other.
    """
    (image,) = tower_inputs("vision", manifest)
    tokens = [_tensor(name, "TYPE_INT64", [-1, -1]) for name in manifest["towers"]["text"]["inputs"]]
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


def tokenize_config(manifest: dict[str, Any], settings: TritonConfig) -> dict[str, Any]:
    return {
        "name": "clip_tokenize",
        "backend": "python",
        "max_batch_size": settings.max_texts,
        "input": [_tensor("texts", "TYPE_STRING", [1])],
        "output": [_tensor(name, "TYPE_INT64", [-1]) for name in ("input_ids", "attention_mask")],
        "version_policy": _kept(),
        "instance_group": _instances(1, "cpu"),
    }


def score_config(manifest: dict[str, Any]) -> dict[str, Any]:
    """Every image with every text: two batch axes, so that Triton sees none (max_batch_size 0)."""
    dimension = manifest["dimension"]
    return {
        "name": "clip_score",
        "backend": "python",
        "max_batch_size": 0,
        "input": [_tensor(name, "TYPE_FP32", [-1, dimension]) for name in EMBEDS.values()],
        "output": [_tensor("probabilities", "TYPE_FP32", [-1, -1])],
        "version_policy": _kept(),
        "instance_group": _instances(1, "cpu"),
    }


def zero_shot_config(manifest: dict[str, Any]) -> dict[str, Any]:
    image = manifest["towers"]["vision"]["image_input"]
    tokens = {name: name for name in manifest["towers"]["text"]["inputs"]}
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


def _step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> dict[str, Any]:
    """One version of all parts: a newer image tower beside an older text tower would score without an error."""
    return {
        "model_name": model,
        "model_version": int(VERSION),
        "input_map": mapped(inputs),
        "output_map": mapped(outputs),
    }


def _tensor(name: str, kind: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "data_type": Word(kind), "dims": shape}


def _kept() -> dict[str, Any]:
    return {"latest": {"num_versions": KEPT_VERSIONS}}


def _instances(count: int, device: str) -> list[dict[str, Any]]:
    return [{"count": count, "kind": Word({"cpu": "KIND_CPU", "cuda": "KIND_GPU"}[device])}]


def _parameters(values: dict[str, Any]) -> list[dict[str, Any]]:
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return mapped({name: {"string_value": word} for name, word in words.items()})


def write_deploy(folder: Path, manifest: dict[str, Any]) -> None:
    """Manifests for containers and monitoring; those ending in .template get FLAGS, and a GPU if the package needs one.

    JSON's list is one in YAML and in a Dockerfile too.
    """
    folder.mkdir()
    flags = ", ".join(map(json.dumps, FLAGS))
    for path in sorted(DEPLOY.iterdir()):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".template":
            text = Template(text).substitute(gpu=GPU[manifest["device"]], flags=flags)
        write_text(folder / path.name.removesuffix(".template"), text)
