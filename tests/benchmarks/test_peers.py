"""The comparison with other tools, without them: contestants that need no library take the peers' places."""

import json
import sys

import numpy as np
import pytest
from support.project import ROOT

from benchmarks.peers import contestant, environments
from benchmarks.peers.__main__ import Settings, described, located
from benchmarks.peers.inputs import cases, paddings, write_inputs
from benchmarks.peers.project import stage_of
from benchmarks.peers.race import Case, Contestant, duels, lanes, padding, race, result
from benchmarks.peers.table import duel_rows, markdown, reasons, rows
from clip_deploy.core.artifact import read_target
from clip_deploy.core.config import read_yaml
from clip_deploy.core.errors import ConfigError, UnavailableError
from clip_deploy.timing.latency import MIN_ROUNDS

OURS = (sys.executable, "-m", "benchmarks.peers.worker")

# A runtime of numpy alone that speaks the workers' protocol; folder/behaviour.json says how it behaves.
FAKE = """
import json, time
import numpy as np
from benchmarks.peers.worker import prepare_call
from clip_deploy.timing.latency_worker import serve

class Fake:
    def __init__(self, folder, threads):
        self.says = json.loads((folder / "behaviour.json").read_text())
        if "refuses" in self.says:
            raise RuntimeError(self.says["refuses"])
    def encode_images(self, pixels):
        time.sleep(self.says["ms"] / 1000)
        return pixels.reshape(len(pixels), -1)[:, :4] + self.says.get("noise", 0) * np.arange(4, dtype=np.float32)
    def encode_texts(self, ids, mask):
        raise ValueError("no texts here\\nsecond line")

serve(Fake, prepare_call)
"""


@pytest.fixture
def fake(tmp_path):
    program = tmp_path / "fake.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{FAKE}")

    def make(name, **behaviour):
        (tmp_path / name).mkdir()
        (tmp_path / name / "behaviour.json").write_text(json.dumps(behaviour))
        return Contestant(name, tmp_path / name, (sys.executable, str(program)), size_mb=1.5)

    return make


@pytest.fixture
def inputs(tmp_path):
    path, ids = tmp_path / "inputs.npz", np.ones((2, 8), dtype=np.int64)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    np.savez(path, pixel_values=pixels, input_ids_8=ids, attention_mask_8=ids)
    return str(path)


def vision(inputs):
    return {"tower": "vision", "batch": 2, "tokens": None, "inputs": inputs}


def test_contestants_take_turns_and_are_held_against_the_same_two(fake, inputs):
    entered = [fake("truth", ms=1), fake("basis", ms=2), fake("slow", ms=12, noise=0.5)]
    (case,) = race(entered, [vision(inputs)], threads=1, seconds=0, rounds=9)
    found = {one.name: result(case, one, "basis", "truth") for one in entered}
    assert found["basis"]["ratio"] == found["basis"]["ratio_low"] == found["basis"]["ratio_high"] == 1
    assert found["truth"]["ratio"] < 1 < found["slow"]["ratio_low"] <= found["slow"]["ratio"]
    assert found["basis"]["cosine_min"] == pytest.approx(1)
    assert found["slow"]["cosine_min"] < 0.999
    # seconds=0 still runs the fewest rounds that are judged
    assert {row["rounds"] for row in found.values()} == {MIN_ROUNDS}


def test_a_ratio_above_one_is_slower_and_drift_cancels_in_it():
    """All slow down threefold in the second half; the contestant takes twice the basis' time throughout."""
    drift = np.repeat([1.0, 3.0], 20)
    case = Case(vision(""), 40, {"basis": [[10 * d] for d in drift], "peer": [[20 * d] for d in drift]})
    case.embeddings = {name: np.eye(2) for name in case.turns}
    row = result(case, Contestant("peer", ROOT), "basis", "basis")
    assert row["ratio"] == 2
    assert row["ratio_low"] <= 2 <= row["ratio_high"]


def test_our_fastest_that_stays_close_meets_the_fastest_peer_of_its_precision():
    latencies = (("a", 8.0), ("b", 6.0), ("wrong", 1.0), ("x", 5.0), ("y", 3.0))
    case = Case(vision(""), 5, {name: [[ms]] * 5 for name, ms in latencies})
    case.embeddings = {name: np.eye(2) for name in case.turns} | {"wrong": np.ones((2, 2)), "x": np.ones((2, 2))}
    case.turns["stopped"] = [[1.0]]  # failed after its first round
    ours = [Contestant(name, ROOT, precision="fp32", ours=True) for name in ("a", "b", "wrong")]
    peers = [Contestant("x", ROOT, precision="fp32"), Contestant("y", ROOT, precision="int8")]
    (duel,) = duels(case, [*ours, *peers, Contestant("stopped", ROOT, precision="fp32")], truth="a")
    assert (duel["precision"], duel["ours"], duel["peer"]) == ("fp32", "b", "x")
    assert duel["ratio"] == duel["ratio_low"] == duel["ratio_high"] == 1.2
    line = "| vision | 2 | fp32 | b | 1.0000 | x | 0.7071 | 1.20x [1.20, 1.20] |"
    assert " ".join(duel_rows([duel])[2].split()) == line


def test_a_ratio_whose_interval_is_wide_is_marked():
    case = Case(vision(""), 20, {"basis": [[1.0]] * 20, "stalled": [[1.0], [9.0]] * 10})
    case.embeddings = {name: np.eye(2) for name in case.turns}
    found = [result(case, Contestant(name, ROOT), "basis", "basis") for name in case.turns]
    assert [row["unstable"] for row in found] == [False, True]
    assert "~ " in rows(found, [described(Contestant(name, ROOT), Contestant("", ROOT)) for name in case.turns], "")[3]


def test_who_cannot_be_opened_or_fails_keeps_its_row_with_the_reason(fake, inputs):
    text = {"tower": "text", "batch": 1, "tokens": 8, "inputs": inputs}
    entered = [fake("basis", ms=1), fake("broken", refuses="needs AMX\nand more"), Contestant("absent", ROOT)]
    entered[2].unavailable = "no wheel for this Python"
    measured, failed = race(entered, [vision(inputs), text], threads=1, seconds=0, rounds=5)
    assert "p50_ms" in result(measured, entered[0], "basis", "basis")
    assert result(failed, entered[0], "basis", "basis")["unavailable"] == "ValueError: no texts here"
    found = [result(measured, one, "basis", "basis") for one in entered]
    table = rows(found, [described(one, entered[0]) for one in entered], "basis")
    assert "Ratio to basis, batch 2" in table[0]
    assert " 100.0 |" in table[2]
    assert "| broken " in table[3]
    assert " unavailable |" in table[3]
    assert reasons(found)[2:4] == ["- `broken`: RuntimeError: needs AMX", "- `absent`: no wheel for this Python"]
    assert len({len(line) for line in table}) == 1


def test_our_targets_answer_the_peers_protocol(onnx_target, checkpoint, tmp_path):
    write_inputs(checkpoint, tmp_path / "inputs.npz", tmp_path / "calibration.npz")
    entered = [Contestant(folder.name, folder, OURS) for folder in (checkpoint, onnx_target)]
    requests = located(cases(read_target(checkpoint).model), tmp_path / "inputs.npz")
    assert [(case["tower"], case["batch"], case["tokens"]) for case in requests] == [
        *(("vision", batch, None) for batch in (1, 8)),
        *(("text", batch, tokens) for tokens in (32, 8) for batch in (1, 8)),
    ]
    found = race(entered, requests, threads=1, seconds=0, rounds=5)
    lowest = [result(case, entered[1], "torch-fp32", "torch-fp32")["cosine_min"] for case in found]
    assert min(lowest) > 0.9999
    assert [len(case.embeddings["onnx-fp32"]) for case in found] == [1, 8, 1, 8, 1, 8]


def test_short_texts_race_against_themselves_padded(onnx_target, checkpoint, tmp_path):
    write_inputs(checkpoint, tmp_path / "inputs.npz", tmp_path / "calibration.npz")
    with np.load(tmp_path / "inputs.npz") as arrays:
        assert arrays["input_ids_8_in_32"].shape == (8, 32)
        assert (arrays["input_ids_8_in_32"][:, :8] == arrays["input_ids_8"]).all()
        assert not arrays["attention_mask_8_in_32"][:, 8:].any()
    pair = paddings(read_target(checkpoint).model)[1]
    entered = lanes(Contestant("onnx-fp32", onnx_target, OURS), pair)
    (case,) = race(entered, located(pair[:1], tmp_path / "inputs.npz"), threads=1, seconds=0, rounds=5)
    row = padding(case)
    assert (row["batch"], row["tokens"], row["cosine_min"]) == (8, 8, pytest.approx(1, abs=1e-4))
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


def test_the_page_names_machine_versions_and_command(fake, inputs):
    entered = [fake("torch-fp32", ms=1), fake("ort-fp32", ms=1)]
    found = race(entered, [vision(inputs)], threads=1, seconds=0, rounds=5)
    machine = {"cpu": "Zilog Z80", "cores": 1, "instruction_sets": ["nop"], "memory_gb": 1, "system": "CP/M"}
    record = {
        "command": Settings().command,
        "model": "tiny",
        "basis": "ort-fp32",
        "truth": "torch-fp32",
        "threads": 1,
        "machine": machine,
        "versions": {"optimum": {"onnx": "1.2.3"}},
        "duels": [],
        "padding": [],
        "contestants": [described(one, entered[1]) for one in entered],
        "rows": [result(found[0], one, "ort-fp32", "torch-fp32") for one in entered],
    }
    page = markdown(record)
    assert "Zilog Z80" in page
    assert "- optimum: onnx 1.2.3" in page
    assert "`python -m benchmarks.peers model=vit-b-32-untrained" in page
    assert str(ROOT) not in page
    assert "| torch-fp32 " in page
    assert "Short texts" not in page


def test_what_is_made_already_is_not_made_again(tmp_path):
    made = []

    def build(folder):
        made.append(folder.name)
        return {"runtime": "ort", "precision": "fp32", "files": []}

    contestant.build_all(tmp_path, "first", {"one": build})
    contestant.build_all(tmp_path, "first", {"one": build, "two": build})
    assert made == ["one", "two"]
    (tmp_path / "one" / contestant.MANIFEST).unlink()  # as a killed build leaves it
    contestant.build_all(tmp_path, "first", {"one": build, "two": build})
    contestant.build_all(tmp_path, "second", {"two": build})
    assert made == ["one", "two", "one", "two"]


def test_what_a_peer_raises_is_the_reason_that_its_row_shows(tmp_path):
    def build(folder):
        (folder / "vision.onnx").touch()
        return {"runtime": "ort", "files": ["vision.onnx"]}

    def fail(folder):
        raise KeyError("clip_vision_model is not supported yet")

    contestant.build_all(tmp_path, "key", {"good": build, "bad": fail})
    assert contestant.read(tmp_path / "good")["runtime"] == "ort"
    assert contestant.read(tmp_path / "bad")["unavailable"] == "KeyError: 'clip_vision_model is not supported yet'"


def test_a_peer_that_cannot_be_installed_keeps_all_its_rows_and_is_tried_again(checkpoint, tmp_path, monkeypatch):
    tries = []

    def refuse(home, peer):
        tries.append(peer)
        raise UnavailableError("ERROR: No matching distribution found for olive-ai==0.13.0")

    monkeypatch.setattr(environments, "install", refuse)
    (tmp_path / "calibration.npz").touch()
    for _ in range(2):
        output = environments.build(tmp_path, "olive", "tiny", checkpoint, tmp_path / "calibration.npz")
        for name in contestant.PEERS["olive"]:
            assert "No matching distribution" in contestant.read(output / name)["unavailable"]
    assert tries == ["olive", "olive"]


def test_no_peer_takes_the_name_of_a_target():
    targets = {*read_yaml(ROOT / "params.yaml")["targets"], *Settings().target_names}
    assert not targets & {name for names in contestant.PEERS.values() for name in names}


@pytest.mark.parametrize("peer", contestant.PEERS)
def test_every_peer_has_exact_pins_and_a_build_script_of_its_contestants(peer):
    lines = environments.requirements(peer).read_text().splitlines()
    assert all("==" in line for line in lines if not line.startswith("#"))
    script = (environments.HERE / f"build_{peer}.py").read_text()
    assert "clip_deploy" not in script  # the peer's environment has none of its libraries
    assert all(name.split("-")[0] in script for name in contestant.PEERS[peer])


def test_only_a_checkpoint_that_the_peer_has_classes_for_is_tried(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(SystemExit, match="Olive has no towers with their projection for 'siglip', only for 'clip'"):
        contestant.need_clip(tmp_path, "Olive")


def test_the_command_line_says_what_it_accepts():
    assert Settings(peers="olive").peer_names == ["olive"]
    with pytest.raises(ConfigError, match="peers names 'oliv': accepted are torch, optimum, olive, openvino"):
        Settings(peers="oliv")
    with pytest.raises(ConfigError, match="targets lacks ort-fp32, which every row is held against: add it"):
        Settings(targets="torch-fp32")


def test_our_targets_are_found_in_params():
    params = ROOT / "params.yaml"
    assert stage_of("torch-fp32", params) == "download"
    assert stage_of("onnx-fp32", params) == "export_onnx"
    assert stage_of("ort-int8-dynamic", params) == "quantize@ort-int8-dynamic"
    with pytest.raises(ConfigError, match="targets names 'ort-int3'"):
        stage_of("ort-int3", params)
