import json
from dataclasses import replace

import numpy as np
import pytest
from support.records import parity, zero_shot
from support.targets import advice, records

from clip_deploy.builders.package import LIBRARIES_OF, Sources, requirements, unpackable, write_package
from clip_deploy.builders.processor_files import write_portable
from clip_deploy.core.artifact import RUNTIMES, Target, read_target
from clip_deploy.core.config import GateLimits, GatesConfig
from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.core.files import sha256
from clip_deploy.core.manifest import Run
from clip_deploy.core.model import Model
from clip_deploy.core.package import EmptyPackage
from clip_deploy.core.parsing import plain
from clip_deploy.core.records import Limit, PairVerdict

RUN = Run("tiny", 0, {"onnxruntime": "1"})


@pytest.fixture
def sources(onnx_target, sets, tmp_path_factory):
    known = records(onnx_target.parent, tmp_path_factory.mktemp("validate"))
    return Sources(onnx_target.parent, known, sets / "portable", sets / "evaluation")


def test_the_manifest_says_what_is_in_the_folder(package, onnx_target):
    manifest = json.loads((package / "manifest.json").read_text())
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.*")} - {"manifest.json"}
    graphs = {f"onnx-fp32/{name}" for name in ("vision.onnx", "text.onnx", "target.json")}
    assert files == {*graphs, "tokenizer.json", "preprocessor.json", "labels.json"}
    assert {name: facts["sha256"] for name, facts in manifest["files"].items()} == {
        name: sha256(package / name) for name in files
    }
    assert manifest["towers"]["vision"] == {
        "target": "onnx-fp32",
        "precision": "fp32",
        "runtime": "ort",
        "files": ["onnx-fp32/vision.onnx"],
        "sha256": sha256(onnx_target / "vision.onnx"),
        "batch_sizes": [1, 2, 4],
        "image_input": "pixel_values",
    }
    assert (manifest["requires"], manifest["vocabulary"]) == (["onnxruntime"], 587)
    assert manifest["towers"]["text"]["inputs"] == ["input_ids", "attention_mask"]
    assert (manifest["dimension"], manifest["image_size"], manifest["context_length"]) == (64, [48, 48], 32)
    assert (manifest["activation"], manifest["logit_bias"], manifest["pad_token"]) == ("softmax", None, 586)
    assert manifest["checkpoint"] == plain(read_target(onnx_target).model.checkpoint)
    assert manifest["builds"]["onnx-fp32"]["opset"] == 18
    assert (manifest["model"], manifest["seed"], manifest["versions"]) == ("tiny", 0, {})
    assert manifest["metrics"] == {"onnx-fp32": {"vision_p50_ms": 1.0}}


def test_the_manifest_holds_what_was_measured_for_each_limit(package):
    assert json.loads((package / "manifest.json").read_text())["gates"] == {
        "onnx-fp32": {
            "status": "pass",
            "reasons": [],
            "precision": "fp32",
            "min_cosine": {"limit": 0.999, "value": 0.9999},
            "max_top1_drop": {"limit": 100.0, "value": 0.0},
            "max_flips": {"limit": 100.0, "value": 0.25},
        }
    }


def test_classes_and_templates_are_those_of_the_evaluation_set(package):
    labels = json.loads((package / "labels.json").read_text())
    assert labels["classes"][:2] == ["red circle", "red square"]
    assert labels["templates"] == ["a photo of a {}", "a {}"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "fail", "reasons": ["not timed: no GPU"]}, "onnx-fp32 is not fit to ship: not timed: no GPU; "),
    ],
)
def test_what_the_report_finds_not_fit_is_refused(sources, tmp_path, change, said):
    known = advice(sources.built)
    known.targets["onnx-fp32"] = replace(known.targets["onnx-fp32"], **change)
    with pytest.raises(DeployError, match=said):
        write_package(known, "onnx-fp32", sources, GatesConfig(), RUN, tmp_path)
    assert list(tmp_path.iterdir()) == []


LOW = plain({"vision": parity(0.5), "text": {**plain(parity()), "cosine_min": None}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "fail", "reasons": ["crashed"]}, "onnx-fp32 is not fit to ship: gate fail crashed; "),
        ({"status": "unavailable", "reasons": ["no GPU"]}, "onnx-fp32 is not fit to ship: gate unavailable no GPU; "),
        ({"parity": LOW}, r"not fit to ship: vision: cosine 0.5\d* < 0.99 \(gates.fp32.min_cosine\), and 1 more"),
        ({"zero_shot": plain(zero_shot(top1_drop=3.0))}, r"top-1 drop 3.00 points > 1.0 \(gates.fp32.max_top1_drop\)"),
        ({"flips": None}, r"flips nan % > 1.0 \(gates.fp32.max_flips\)"),
        ({"shapes": {}, "parity": {}}, "gate pass, and not all was measured"),
        ({"files": {"vision.onnx": "0"}}, r"vision.onnx is not the file that was checked .*: run `dvc repro`"),
        ({"files": {}}, r"text.onnx is not the file that was checked .*: run `dvc repro`"),
    ],
)
def test_what_did_not_pass_its_gate_as_it_is_now_is_refused_whatever_was_recommended(sources, tmp_path, change, said):
    """As where the check ran again by itself, or its limits were raised, and `recommend` has not seen it."""
    path = sources.validation / "onnx-fp32.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    gates = GatesConfig(fp32=GateLimits(min_cosine=0.99, max_top1_drop=1.0, max_flips=1.0))
    known = advice(sources.built, ship=dict.fromkeys(("vision", "text"), "onnx-fp32"))
    for wanted in ("onnx-fp32", "recommended"):
        with pytest.raises(DeployError, match=said):
            write_package(known, wanted, sources, gates, RUN, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_limit_is_said_to_be_kept_that_was_not_checked(sources, tmp_path):
    records(sources.built, sources.validation, trained=False)
    manifest = write_package(advice(sources.built), "onnx-fp32", sources, GatesConfig(), RUN, tmp_path)
    gate = manifest.origin.gates["onnx-fp32"]
    assert gate.min_cosine == Limit(0.999, value=0.9999)
    assert gate.max_top1_drop == gate.max_flips == Limit(100.0, unchecked="the weights are random")


def test_an_unknown_target_is_named_with_the_known_ones(sources, tmp_path):
    with pytest.raises(DeployError, match=r"target is .ort-fp31.: accepted are .*onnx-fp32"):
        write_package(advice(sources.built), "ort-fp31", sources, GatesConfig(), RUN, tmp_path)


def test_nothing_to_ship_leaves_a_manifest_with_the_reason_and_no_graph(sources, tmp_path):
    known = advice(sources.built, note="no target passes its gate")
    manifest = write_package(known, "recommended", sources, GatesConfig(), RUN, tmp_path)
    assert manifest == EmptyPackage(2, RUN, "no target passes its gate")
    written = {"format": 2, **plain(RUN), "unavailable": "no target passes its gate"}
    assert json.loads((tmp_path / "manifest.json").read_text()) == written
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_tokenizer_that_needs_transformers_is_no_package_and_no_failure_of_the_pipeline(
    sources, checkpoint, tmp_path, monkeypatch
):
    def refuse(*_):
        raise UnavailableError("no fast tokenizer")

    monkeypatch.setattr("clip_deploy.builders.processor_files.write_tokenizer", refuse)
    (tmp_path / "portable").mkdir()
    write_portable(checkpoint, tmp_path / "portable")
    assert not (tmp_path / "portable" / "tokenizer.json").exists()
    sources, folder = replace(sources, portable=tmp_path / "portable"), tmp_path / "package"
    folder.mkdir()
    known = advice(sources.built, ship={"vision": "onnx-fp32", "text": "onnx-fp32"})
    assert write_package(known, "recommended", sources, GatesConfig(), RUN, folder).unavailable == "no fast tokenizer"
    assert unpackable(sources.built / "onnx-fp32", sources.portable) == "no fast tokenizer"  # as the advice says before
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    with pytest.raises(UnavailableError, match="no fast tokenizer"):
        write_package(known, "onnx-fp32", sources, GatesConfig(), RUN, folder)


def test_a_target_of_any_runtime_can_be_packaged_with_all_portable_parts(sources):
    assert [unpackable(sources.built / name, sources.portable) for name in ("onnx-fp32", "torch-fp32")] == [None, None]


OPEN_CLIP = ["open_clip_torch", "timm"]
VERSIONS = {"torch": "2.13.0+cpu", "onnxruntime": "1.31.1", "tensorrt": "1.6.1.120", "openvino": None}


@pytest.mark.parametrize(
    ("target", "lines"),
    [
        (Target("ort", "fp32"), ["onnxruntime==1.31.1"]),
        (Target("ort", "fp16", device="cuda"), ["onnxruntime-gpu==1.31.1"]),
        (Target("openvino", "fp32"), ["openvino"]),
        (Target("torchscript", "fp32"), ["torch==2.13.0"]),
        (
            Target("eager", "fp32", model=Model("open_clip")),
            ["torch==2.13.0", "transformers", *OPEN_CLIP],
        ),
        (
            Target("tensorrt", "fp16", build={"library": "TensorRT-RTX 1.6.1"}),
            ["torch==2.13.0", "tensorrt-rtx-cu13-bindings==1.6.1.120", "tensorrt-rtx-cu13-libs==1.6.1.120"],
        ),
        (Target("tensorrt", "fp16", build={"library": "TensorRT 10.9"}), ["torch==2.13.0", "tensorrt==1.6.1.120"]),
    ],
)
def test_what_pip_must_install_is_the_runtimes_library_as_it_was_judged(target, lines):
    assert requirements(target, Run("tiny", 0, VERSIONS)) == lines
    assert set(LIBRARIES_OF) == set(RUNTIMES)


def test_a_package_carries_what_speaks_against_the_reference(sources, tmp_path):
    known = advice(sources.built, ship=dict.fromkeys(("vision", "text"), "onnx-fp32"), doubts=["at chance"])
    assert write_package(known, "recommended", sources, GatesConfig(), RUN, tmp_path).note == "at chance; as asked"


def test_two_targets_are_packaged_tower_by_tower_with_what_was_found_of_the_pair(fused, sources, tmp_path):
    towers = {"vision": "ort-fp32", "text": "onnx-fp32"}
    found = {"towers": towers, "precision": "fp32", "status": "pass", "reasons": []}
    known = advice(sources.built, ship=towers, pairs={"ort-fp32 with onnx-fp32": found})
    gates = GatesConfig(fp32=GateLimits(min_cosine=0.999, max_top1_drop=5, max_flips=5))
    manifest = write_package(known, "recommended", sources, gates, RUN, tmp_path)
    assert {tower: manifest.encoder.towers[tower].target for tower in towers} == towers
    for tower, name in towers.items():
        assert sha256(tmp_path / name / f"{tower}.onnx") == known.targets[name].files[f"{tower}.onnx"]
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["target.json", f"{tower}.onnx"]
    assert manifest.origin.gates["ort-fp32 with onnx-fp32"] == PairVerdict(**found)
    assert list(manifest.origin.builds) == ["ort-fp32", "onnx-fp32"]


def test_a_pair_that_did_not_pass_together_is_refused(fused, sources, tmp_path):
    towers = {"vision": "ort-fp32", "text": "onnx-fp32"}
    failed = {"towers": towers, "precision": "fp32", "status": "fail", "reasons": ["flips"]}
    for pairs in ({}, {"ort-fp32 with onnx-fp32": failed}):
        known = advice(sources.built, ship=towers, pairs=pairs)
        with pytest.raises(DeployError, match="ort-fp32 with onnx-fp32 failed their gate together"):
            write_package(known, "recommended", sources, GatesConfig(), RUN, tmp_path)


def test_the_processors_numbers_survive_as_they_are_written(package):
    record = json.loads((package / "preprocessor.json").read_text())
    assert record["size"] == {"shortest_edge": 48}
    assert record["crop"] == [48, 48]
    assert np.allclose(record["image_mean"], [0.48145466, 0.4578275, 0.40821073], atol=1e-7)
    assert np.allclose(record["image_std"], [0.26862954, 0.26130258, 0.27577711], atol=1e-7)
