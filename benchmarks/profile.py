"""Where a tower's time goes, operator by operator, by the runtime's own profiler:

    python -m benchmarks.profile folders=artifacts/ort-int8-dynamic,artifacts/openvino-int8 [batch=1] [tokens=77] ...

folders: each holds vision and text as .onnx or .xml: a target, or what a peer built (build/peers/).
calls:   profiled ones; of each node the median counts (20).
threads: of the runtime (2).
output:  where profile.md goes (reports).
"""

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from omegaconf import OmegaConf

from clip_deploy.core.config import typed
from clip_deploy.core.environment import hardware, software
from clip_deploy.core.errors import ConfigError, DeployError, first_line
from clip_deploy.core.files import write_text

WARM_UP = 3  # calls that do not count
SHOWN = 8  # operators of each table; the others are one row
Profile = dict[str, list[float]]  # operator: median milliseconds of each node


@dataclass
class Settings:
    folders: str = ""
    batch: int = 1
    tokens: int = 77
    calls: int = 20
    threads: int = 2
    output: Path = field(default=Path("reports"))


def main() -> None:
    try:
        settings = typed(Settings, OmegaConf.from_cli(sys.argv[1:]), "command line")
        text = markdown(settings)
    except DeployError as error:
        raise SystemExit(f"error: {error}") from error
    print(text)
    write_text(settings.output / "profile.md", text)


def markdown(settings: Settings) -> str:
    folders = [Path(name) for name in settings.folders.split(",") if name]
    if not folders:
        raise ConfigError("folders is empty: name those to profile, as folders=artifacts/ort-fp32")
    machine = hardware()
    chosen = f"batch={settings.batch} tokens={settings.tokens} calls={settings.calls} threads={settings.threads}"
    lines = [
        "# Where the time goes",
        "",
        "Milliseconds of a call in each kind of operator, as the runtime names it: medians over the calls of each",
        "node, added up. Profiling takes time itself, and no two runs took turns: compare shares here, latencies in",
        "[peers.md](peers.md).",
        "",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores, {', '.join(machine['instruction_sets'])}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in software().items() if version)}",
        f"- Command: `python -m benchmarks.profile folders={','.join(path.name for path in folders)} {chosen}`",
    ]
    for tower in ("vision", "text"):
        for folder in folders:
            lines += ["", f"## {tower}, `{folder.name}`", "", *table(profile(folder, tower, settings))]
    return "\n".join(lines) + "\n"


def profile(folder: Path, tower: str, settings: Settings) -> Profile:
    """Raises ConfigError where the folder holds no graph of the tower, or it does not run at that batch and length."""
    readers = {"onnx": by_onnxruntime, "xml": by_openvino}
    kind = next((kind for kind in readers if (folder / f"{tower}.{kind}").exists()), None)
    if kind is None:
        accepted = "accepted are built ONNX or OpenVINO targets"
        raise ConfigError(f"{folder} holds neither {tower}.onnx nor {tower}.xml; {accepted}")
    try:
        return readers[kind](folder / f"{tower}.{kind}", settings)
    except Exception as error:  # the runtimes' errors share no base class
        given = f"batch={settings.batch} tokens={settings.tokens}"
        reason = first_line(error)
        raise ConfigError(f"{folder.name}: the {tower} tower does not run at {given} ({reason}); try others") from error


def by_onnxruntime(path: Path, settings: Settings) -> Profile:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = feeds([item.name for item in session.get_inputs()], session.get_inputs()[0].shape, settings)
        for _ in range(WARM_UP + settings.calls):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    return gathered((event["args"]["op_name"], event["name"], event["dur"] / 1e3) for event in nodes)


def by_openvino(path: Path, settings: Settings) -> Profile:
    import openvino

    options = {"PERF_COUNT": True, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": settings.threads}
    model = openvino.Core().compile_model(path, "CPU", options)
    shape = [size.get_length() if size.is_static else -1 for size in model.inputs[0].get_partial_shape()]
    inputs = feeds([port.get_any_name() for port in model.inputs], shape, settings)
    request = model.create_infer_request()
    found = []
    for _ in range(WARM_UP + settings.calls):
        request.infer(inputs)
        found += [
            (node.node_type, node.node_name, node.real_time.total_seconds() * 1e3)
            for node in request.profiling_info
            if node.status == openvino.ProfilingInfo.Status.EXECUTED
        ]
    return gathered(found)


def feeds(names: list[str], shape: list, settings: Settings) -> dict[str, np.ndarray]:
    """Noise for images; ones for texts, whose content changes no latency."""
    if len(shape) == 4:
        size = (settings.batch, *shape[1:])
        return {names[0]: np.random.default_rng(0).normal(size=size).astype(np.float32)}
    return {name: np.ones((settings.batch, settings.tokens), np.int64) for name in names}


def gathered(events: Iterable[tuple[str, str, float]]) -> Profile:
    """Medians of the nodes by operator; the first calls are left out."""
    nodes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kind, name, duration in events:
        nodes[kind, name].append(duration)
    found: Profile = defaultdict(list)
    for (kind, _), durations in nodes.items():
        found[kind].append(median(durations[WARM_UP:] or durations))
    return found


def table(found: Profile) -> list[str]:
    total = sum(map(sum, found.values()))
    ranked = sorted(((sum(times), len(times), kind) for kind, times in found.items()), reverse=True)
    rows = [(f"{kind}", count, spent) for spent, count, kind in ranked[:SHOWN]]
    if rest := ranked[SHOWN:]:
        rows.append((f"{len(rest)} others", sum(count for _, count, _ in rest), sum(spent for spent, _, _ in rest)))
    lines = ["| Operator | Nodes | ms | Share % |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {kind} | {count} | {spent:.2f} | {100 * spent / total:.1f} |" for kind, count, spent in rows]
    return [*lines, f"| all | {sum(row[1] for row in rows)} | {total:.2f} | 100.0 |"]


if __name__ == "__main__":
    main()
