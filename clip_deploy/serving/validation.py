"""Hold a model repository against a real server: parity, versions, faults, load, metrics, health and drift."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_deploy.core.artifact import failure, hashes
from clip_deploy.core.config import TritonCheckConfig
from clip_deploy.core.environment import located
from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.core.files import write_text
from clip_deploy.core.package import DualEncoder
from clip_deploy.core.parsing import read_record
from clip_deploy.core.records import Parity
from clip_deploy.core.served import Agreement, Answers, Asked, Drift, Load, Served
from clip_deploy.core.similarity import similarity
from clip_deploy.data.preprocessed import Prepared
from clip_deploy.inference.encoders import read_encoder
from clip_deploy.serving.drift import measure_drift
from clip_deploy.serving.golden import TEXTS, encode_offline, golden_inputs
from clip_deploy.serving.job import ANSWERS, ASKED, ClientJob
from clip_deploy.serving.load_test import Work, measure_load, read_metrics
from clip_deploy.serving.repository import packaged
from clip_deploy.serving.server import (
    Environment,
    Server,
    check_runtimes,
    find_environment,
    load_model,
    model_config,
    serve,
    versions,
)

ROOT = Path(__file__).resolve().parents[2]  # the client's program is imported from here
BACKEND = "python"  # the only one that this server has
REQUESTS = 16  # distinct ones under load
LABELS = 8  # of one zero-shot question under load
CLIENT_S = 600.0  # until the client's program must have ended
MIN_COSINE = 0.9999  # with the offline artifact, on the same inputs in the same batches
MIN_TOGETHER = 0.99  # where the server chose the batches: dynamic INT8 takes its scale from the whole batch
MIN_SENT = 50  # requests while versions come or go: the client waits for as many
MIN_AGREEMENT = 95.0  # percent of the files whose most probable text is the same


def check_served(repository: Path, package: Path, prepared: Prepared, settings: TritonCheckConfig, seed: int) -> Served:
    """What a real server answers with the repository's models."""
    try:
        environment = find_environment(located(settings.environment))
        encoder = packaged(package).encoder
        if encoder.device != "cpu":
            raise UnavailableError("the package is for a GPU, and this server computes on CPUs only")
        check_runtimes(located(settings.environment), encoder.requires)
        inputs = golden_inputs(package, prepared)
        run, arrays = _ask(repository / BACKEND, environment, encoder, inputs, settings)
        offline = encode_offline(package, encoder, inputs, run.threads)
    except UnavailableError as error:
        return Served("unavailable", [str(error)])
    except Exception as error:  # whatever the server and its client do is this check's result
        return Served("fail", [failure(error)])
    answers = Answers(
        server=versions(located(settings.environment)),
        backend=BACKEND,
        threads=run.threads,
        asked=run.asked,
        load=run.load,
        metrics=run.metrics,
        parity=parities(arrays, offline),
        drift=drifts(arrays, seed),
    )
    reasons = check_answers(answers)
    return Served("fail" if reasons else "pass", reasons, answers)


@dataclass(frozen=True)
class Session:
    """What was found while the server ran, as served.Answers has it."""

    threads: int
    asked: Asked
    load: list[Load]
    metrics: list[str]


def _ask(
    repository: Path,
    environment: Environment,
    encoder: DualEncoder,
    inputs: dict[str, np.ndarray],
    settings: TritonCheckConfig,
) -> tuple[Session, dict[str, np.ndarray]]:
    """Start a server over a copy, in which versions come and go, and let clients do all they do."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(shutil.copytree(repository, Path(name) / "repository"))
        with serve(copy, environment, Path(name) / "server.log") as server:
            config = model_config(server, "clip_vision")
            job = ClientJob(
                ports={"http": server.http, "grpc": server.grpc},
                repository=str(copy),
                second=str(changed(repository, Path(name) / "second", negate)),
                broken=str(changed(repository, Path(name) / "broken", spoil)),
                image_input=encoder.towers.vision.image_input,
                text_inputs=encoder.towers.text.inputs,
                max_batch=config["max_batch_size"],
                inputs=inputs,
            )
            asked, arrays = run_client(server, environment, job, Path(name))
            if server.process.poll() is not None:
                last = next((fault.fault for fault in asked.faults if not fault.survived), "the last fault")
                raise DeployError(f"Triton ended with code {server.process.returncode} after {last}")
            load = under_load(server, environment, job, settings)
            metrics = sorted({key.partition("{")[0] for key, _ in read_metrics(server)})
    threads = int(config["parameters"]["intra_op_thread_count"]["string_value"])
    return Session(threads, asked, load, metrics), arrays


def changed(repository: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """A copy of the repository in `folder`, with its manifest, whose image tower's version `change` has rewritten."""
    copy = Path(shutil.copytree(repository, folder / repository.name))
    change(copy / "clip_vision" / "1")
    write_text(folder / "manifest.json", json.dumps({"files": hashes(folder)}))
    return copy


def negate(version: Path) -> None:
    """Turn every embedding round: another model, of which any answer tells that it is not the first."""
    with (version / "model.py").open("a") as program:
        program.write("\n\n_encode = TritonPythonModel.encode\n")
        program.write("TritonPythonModel.encode = lambda self, arrays: -_encode(self, arrays)\n")


def spoil(version: Path) -> None:
    """Make its weights what no runtime reads."""
    for file in read_encoder(version / "settings.json").towers.vision.files:
        (version / file).write_bytes(b"broken")


def run_client(
    server: Server, environment: Environment, job: ClientJob, folder: Path
) -> tuple[Asked, dict[str, np.ndarray]]:
    """The record and the arrays of the client's program, which runs in the server's environment."""
    job.write(folder)
    command = [str(environment.python), "-m", "clip_deploy.serving.client", str(folder)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        subprocess.run(command, env=variables, check=True, capture_output=True, text=True, timeout=CLIENT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()
        raise DeployError(f"the client failed: {said[-1]}; the server's last line: {server.last_line()}") from error
    with np.load(folder / ANSWERS) as content:
        return read_record(Asked, folder / ASKED), dict(content)


def under_load(server: Server, environment: Environment, job: ClientJob, settings: TritonCheckConfig) -> list[Load]:
    """Both towers and the ensemble; texts from the cache, as under load they come again and again, and without it."""
    vision = [{job.image_input: image} for image in job.inputs["images_0"][:REQUESTS]]
    pairs = zip(*(job.batches(name)[0][:REQUESTS] for name in TEXTS), strict=True)
    text = [{name: row for name, row in zip(TEXTS, pair, strict=True) if name in job.text_inputs} for pair in pairs]
    rows = []
    for protocol in ("http", "grpc"):
        rows += measure_load(server, environment, Work("clip_vision", protocol, vision, "one image"), settings)
    rows += measure_load(server, environment, Work("clip_text", "grpc", text, "one text, cached"), settings)
    if "labels" in job.inputs:
        work = Work("clip_zero_shot", "grpc", questions(job.inputs), f"one image file, {LABELS} texts")
        rows += measure_load(server, environment, work, settings)
    config = model_config(server, "clip_text")
    config["parameters"]["cache_bytes"]["string_value"] = "0"
    load_model(server, "clip_text", config)
    return rows + measure_load(server, environment, Work("clip_text", "grpc", text, "one text"), settings)


def questions(inputs: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Image files with texts: arrays of bytes."""
    texts = np.array([[label.encode()] for label in inputs["labels"][:LABELS].tolist()], dtype=object)
    files = zip(inputs["files"][:REQUESTS], inputs["lengths"][:REQUESTS], strict=True)
    return [{"encoded": np.array([[row[:length].tobytes()]], dtype=object), "texts": texts} for row, length in files]


def parities(answers: dict[str, np.ndarray], offline: dict[str, np.ndarray]) -> dict[str, Parity | Agreement]:
    """By protocol and tower, what is held against the offline artifact; and of the ensemble's probabilities.

    Texts over gRPC come from the cache, in which the same over HTTP left them.
    """
    found: dict[str, Parity | Agreement] = {}
    for protocol in ("http", "grpc"):
        for name in ("images", "texts"):
            found[f"{name}, {protocol}"] = similarity(answers[f"{protocol}_{name}"], offline[name])
        if "probabilities" in offline:
            found[f"probabilities, {protocol}"] = agreement(
                answers[f"{protocol}_probabilities"], offline["probabilities"]
            )
    together = answers["together"]
    found["images, one by one from several clients"] = similarity(together, offline["images"][: len(together)])
    return found


def agreement(actual: np.ndarray, expected: np.ndarray) -> Agreement:
    """The server's probabilities [files, texts] beside the package's own."""
    return Agreement(
        files=len(actual),
        same_answer_percent=100 * float((actual.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        max_abs_diff=float(np.abs(actual - expected).max()),
    )


def drifts(answers: dict[str, np.ndarray], seed: int) -> dict[str, Drift]:
    """The second half of the golden set as live traffic, as it is and darkened, held against the first half."""
    images, moved = answers["grpc_images"], answers["grpc_moved"]
    golden, live = images[: -len(moved)], images[-len(moved) :]
    return {
        "golden images, the other half": measure_drift(live, golden, seed),
        "the same, darkened": measure_drift(moved, golden, seed),
    }


def check_answers(found: Answers) -> list[str]:
    """What went wrong; nothing where the repository is fit to serve."""
    wrong = []
    for name, parity in found.parity.items():
        least = MIN_TOGETHER if "several clients" in name else MIN_COSINE
        if isinstance(parity, Parity) and not parity.cosine_min > least:
            wrong.append(f"{name}: lowest cosine with the offline artifact is {parity.cosine_min:.6f}")
        if isinstance(parity, Agreement) and parity.same_answer_percent < MIN_AGREEMENT:
            wrong.append(f"{name}: {parity.same_answer_percent:.0f} % of the answers are the offline artifact's")
    for fault in found.asked.faults:
        wrong += [] if fault.survived else [f"after {fault.fault} the server was not as before"]
        wrong += [f"{fault.fault} was not refused as a client's mistake"] if fault.refused is False else []
    for step in found.asked.versions:
        wrong += [f"{step.step}: {step.failed} requests failed ({step.error})"] if step.failed else []
        wrong += [] if step.sent >= MIN_SENT else [f"{step.step}: only {step.sent} requests were sent"]
        wrong += [] if step.as_expected else [f"{step.step}: versions {', '.join(step.ready)} answer"]
        wrong += [] if step.right else [f"{step.step}: an answer is not of the version that gave it"]
    wrong += [f"{path} answers {status}" for path, status in found.asked.health.items() if status != 200]
    undisturbed, darkened = found.drift.values()
    wrong += ["drift was found where there is none"] if undisturbed.drifted else []
    wrong += [] if darkened.drifted else ["darkened images were not found to have drifted"]
    return wrong
