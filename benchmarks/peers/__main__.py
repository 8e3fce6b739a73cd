"""Our targets against other exporters and runtimes, on the same checkpoint, inputs and cores: `make bench-peers`, or

    python -m benchmarks.peers [model=NAME] [targets=A,B] [artifacts=FOLDER] [peers=C,D] [seconds=120] [rounds=150] ...

model:     a file of conf/model/ (vit-b-32-untrained).
targets:   ours that take part; the pipeline builds them in a copy of the repository.
artifacts: take them from this folder as they are instead; its torch-fp32 is the checkpoint, and model is only a name.
peers:     torch, optimum, olive, openvino; each in its own environment, made on demand.
build:     where those environments and all that is built lie (build/peers); what is there is used again.
threads:   of each contestant (2).
seconds:   time limit of the rounds at one tower, batch size and text length, all contestants together.
rounds:    of them, at most; a quick rehearsal is seconds=5 rounds=5.
output:    where peers.json and peers.md go (reports).

Prints the tables that it writes. Every contestant holds the model in memory at once: 15 GB for B/32.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.peers import contestant, environments
from benchmarks.peers.inputs import cases, paddings, write_inputs
from benchmarks.peers.project import build_targets
from benchmarks.peers.race import Contestant, duels, lanes, padding, race, result
from benchmarks.peers.table import markdown
from clip_deploy.core.artifact import read_target, size_bytes
from clip_deploy.core.config import EXPORTED, REFERENCE, typed
from clip_deploy.core.environment import hardware, software
from clip_deploy.core.errors import ConfigError, DeployError
from clip_deploy.core.files import write_text
from clip_deploy.core.json_files import rounded, write_json

BASIS = "ort-fp32"  # its median latency is 1.00x, its size 100 %
TARGETS = (
    *(REFERENCE, EXPORTED, "torchscript-fp32", "torchscript-bf16"),
    *(BASIS, "ort-int8-dynamic", "ort-int8-static"),
    *("openvino-fp32", "openvino-bf16", "openvino-int8"),
)
WORKER = ("-m", "benchmarks.peers.worker")
NAMED = ("torch", "transformers", "onnxruntime", "optimum-onnx", "olive-ai", "openvino", "nncf", "numpy")


@dataclass
class Settings:
    model: str = "vit-b-32-untrained"
    targets: str = ",".join(TARGETS)
    artifacts: Path | None = None
    peers: str = ",".join(contestant.PEERS)
    build: Path = environments.ROOT / "build" / "peers"
    threads: int = 2
    seconds: float = 120
    rounds: int = 150
    output: Path = environments.ROOT / "reports"

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.peer_names) - set(contestant.PEERS)):
            raise ConfigError(f"peers names {unknown[0]!r}: accepted are {', '.join(contestant.PEERS)}")
        if missing := [name for name in (REFERENCE, BASIS) if name not in self.target_names]:
            raise ConfigError(f"targets lacks {missing[0]}, which every row is held against: add it")

    @property
    def target_names(self) -> list[str]:
        return [name for name in self.targets.split(",") if name]

    @property
    def peer_names(self) -> list[str]:
        return [name for name in self.peers.split(",") if name]

    @property
    def command(self) -> str:
        """What repeats the run on any machine: paths are left out."""
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        words = [f"{name}={value}" for name, value in given.items() if isinstance(value, str | int | float)]
        return " ".join(["python -m benchmarks.peers", *words])


def main() -> None:
    try:
        settings = typed(Settings, OmegaConf.from_cli(sys.argv[1:]), "command line")
        record = rounded(bench(settings))
    except DeployError as error:
        raise SystemExit(f"error: {error}") from error
    text = markdown(record)
    print(text)
    write_json(settings.output / "peers.json", record)
    write_text(settings.output / "peers.md", text)


def bench(settings: Settings) -> dict[str, Any]:
    """Build what is missing, run the race, and gather what was found."""
    work = settings.build.resolve() / settings.model
    artifacts = settings.artifacts or build_targets(settings.model, settings.target_names, work / "project")
    checkpoint = (artifacts / REFERENCE).resolve()
    inputs, calibration = work / "inputs.npz", work / "calibration.npz"
    write_inputs(checkpoint, inputs, calibration)
    contestants = [ours(artifacts / name) for name in settings.target_names]
    for peer in settings.peer_names:
        contestants += peers(settings.build.resolve() / peer, peer, settings.model, checkpoint, calibration)
    model, limits = read_target(checkpoint).model, (settings.threads, settings.seconds, settings.rounds)
    found = race(contestants, located(cases(model), inputs), *limits)
    basis = next(one for one in contestants if one.name == BASIS)
    padded = [race(lanes(basis, pair), located(pair[:1], inputs), *limits)[0] for pair in paddings(model)]
    return {
        "command": settings.command,
        "model": settings.model,
        "basis": BASIS,
        "truth": REFERENCE,
        "threads": settings.threads,
        "machine": hardware(),
        "versions": {"clip-deploy": software(), **{peer: versions(peer) for peer in settings.peer_names}},
        "contestants": [described(one, basis) for one in contestants],
        "rows": [result(case, one, BASIS, REFERENCE) for case in found for one in contestants],
        "duels": [row for case in found for row in duels(case, contestants, REFERENCE)],
        "padding": [padding(case) for case in padded],
    }


def located(requests: list[dict], inputs: Path) -> list[dict]:
    return [{**request, "inputs": str(inputs)} for request in requests]


def ours(folder: Path) -> Contestant:
    target = read_target(folder)
    size_mb = None if target.unavailable else size_bytes(folder) / 1e6
    program = (sys.executable, *WORKER)
    return Contestant(folder.name, folder, program, size_mb, target.precision, True, target.unavailable)


def peers(home: Path, peer: str, model: str, checkpoint: Path, calibration: Path) -> list[Contestant]:
    output = environments.build(home, peer, model, checkpoint, calibration)
    return [_peer(output / name, (str(environments.python_of(home)), *WORKER)) for name in contestant.PEERS[peer]]


def _peer(folder: Path, program: tuple[str, ...]) -> Contestant:
    record = contestant.read(folder)
    if "unavailable" in record:
        return Contestant(folder.name, folder, unavailable=record["unavailable"])
    size_mb = sum((folder / file).stat().st_size for file in record["files"]) / 1e6
    return Contestant(folder.name, folder, program, size_mb, record["precision"])


def described(one: Contestant, basis: Contestant) -> dict[str, Any]:
    share = one.size_mb / basis.size_mb if one.size_mb and basis.size_mb else None
    return {"name": one.name, "precision": one.precision, "ours": one.ours, "size_mb": one.size_mb, "size_share": share}


def versions(peer: str) -> dict[str, str]:
    """What its requirements pin, the libraries that decide first."""
    pinned = environments.pins(peer)
    return {name: pinned[name] for name in NAMED if name in pinned}


if __name__ == "__main__":
    main()
