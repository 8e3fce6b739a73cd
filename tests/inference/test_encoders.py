import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
from support.targets import advice, records

from clip_deploy.builders.package import Sources, write_package
from clip_deploy.builders.torchscript import export_torchscript
from clip_deploy.core.artifact import Target, build, read_target, write_target
from clip_deploy.core.config import GateLimits, GatesConfig, OpenVinoConfig, Precision
from clip_deploy.core.errors import DataError, DeployError, UnavailableError
from clip_deploy.core.manifest import Run
from clip_deploy.core.package import read_package
from clip_deploy.core.similarity import row_cosines
from clip_deploy.core.vectors import unit
from clip_deploy.data import scenes
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.inference import encoders
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.inference.embed import EmbedSettings, embed_folder, read_header
from clip_deploy.inference.encoders import PackageEncoder, other_versions
from clip_deploy.runtimes import open_encoder

GATES = GatesConfig(fp32=GateLimits(min_cosine=0.999, max_top1_drop=5, max_flips=5))
IMAGES = [scenes.render("encoders", index, 7 * index)[0] for index in range(3)]
TEXTS = ["a photo of a red circle", "a blue square"]


@pytest.fixture(scope="module")
def targets(checkpoint, onnx_target, sets, tmp_path_factory):
    """One target for each of the runtimes that a CPU has, in one folder."""
    pytest.importorskip("openvino")
    from clip_deploy.builders.openvino import export_openvino

    folder, calibration = tmp_path_factory.mktemp("targets"), load_prepared(sets / "calibration")
    shutil.copytree(checkpoint, folder / "torch-fp32")
    shutil.copytree(onnx_target, folder / "onnx-fp32")
    made = {
        "openvino-fp32": lambda output: export_openvino(onnx_target, OpenVinoConfig(), calibration, 0, output),
        "torchscript-fp32": lambda output: export_torchscript(checkpoint, Precision.fp32, output),
    }
    for name, make in made.items():
        build(folder / name, make, Target("none", "fp32"))
    return folder


@pytest.fixture
def pack(targets, sets, tmp_path):
    """Package two targets, or one for both towers."""

    def run(vision, text=None):
        towers = {"vision": vision, "text": text or vision}
        passed = {"towers": towers, "precision": "fp32", "status": "pass", "reasons": []}
        pairs = {f"{vision} with {text}": passed} if text else {}
        (tmp_path / "validate").mkdir()
        known = records(targets, tmp_path / "validate")
        sources = Sources(targets, known, sets / "portable", sets / "evaluation")
        run, folder = Run("tiny", 0, {"openvino": "2024.0.0"}), tmp_path / "package"
        folder.mkdir()
        write_package(advice(targets, ship=towers, pairs=pairs), "recommended", sources, GATES, run, folder)
        return folder

    return run


@pytest.mark.parametrize("name", ["torch-fp32", "torchscript-fp32", "openvino-fp32", "onnx-fp32"])
def test_a_package_of_any_runtime_gives_the_rows_own_embeddings(pack, targets, sets, name):
    package = ZeroShotClassifier.open(pack(name), threads=1)
    row, rows = open_encoder(targets / name, threads=1), load_prepared(sets / "evaluation")
    pixels, texts = rows.pixel_values[:5].copy(), rows.captions
    assert np.array_equal(package.encoder.encode_images(pixels), unit(row.encode_images(pixels)))
    given = texts.input_ids[:4].copy(), texts.attention_mask[:4].copy()
    assert np.array_equal(package.encoder.encode_texts(*given), unit(row.encode_texts(*given)))
    assert package.package.encoder.towers.vision.runtime == row.__class__.__module__.rpartition(".")[2]


def test_each_tower_of_a_pair_runs_by_its_own_runtime(pack, classifier):
    folder = pack("openvino-fp32", "torchscript-fp32")
    files = {path.relative_to(folder).as_posix() for path in folder.glob("*/*")}
    assert files == {
        *(f"openvino-fp32/{name}" for name in ("target.json", "vision.bin", "vision.xml")),
        *(f"torchscript-fp32/{name}" for name in ("target.json", "text.pt")),
    }
    package = ZeroShotClassifier.open(folder)
    assert read_package(folder).encoder.requires == ["openvino==2024.0.0", "torch"]
    assert row_cosines(package.embed_images(IMAGES), classifier.embed_images(IMAGES)).min() > 0.9999
    assert row_cosines(package.embed_texts(TEXTS), classifier.embed_texts(TEXTS)).min() > 0.9999


@pytest.fixture(scope="module")
def classifier(package):
    return ZeroShotClassifier.open(package)


def test_a_missing_library_is_named_with_what_pip_must_install(pack, monkeypatch):
    folder = pack("openvino-fp32")
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    monkeypatch.delitem(__import__("sys").modules, "clip_deploy.runtimes.openvino", raising=False)
    monkeypatch.setattr(encoders, "version", lambda name: "2020.1")
    with pytest.raises(UnavailableError, match=r"openvino is not installed; .*: pip install openvino==2024.0.0 \(open"):
        ZeroShotClassifier.open(folder)


def test_what_is_bound_to_a_cpu_is_not_opened_for_a_gpu(pack):
    with pytest.raises(UnavailableError, match="openvino-fp32 is made for cpu and cannot be opened on cuda"):
        ZeroShotClassifier.open(pack("openvino-fp32"), device="cuda")


def test_files_that_a_runtime_refuses_are_said_as_they_are(package, monkeypatch):
    def refuse(*_):
        raise DeployError("onnx-fp32 does not load: truncated")

    monkeypatch.setattr(encoders, "open_encoder", refuse)
    with pytest.raises(DeployError, match=r"^onnx-fp32 does not load: truncated$"):
        ZeroShotClassifier.open(package)


def test_versions_are_compared_with_those_that_were_judged(monkeypatch):
    monkeypatch.setattr(encoders, "_installed", {"torch": "2.13.0+cu130", "openvino": "2025.1"}.get)
    assert other_versions(["torch==2.13.0", "openvino"]) is None
    assert other_versions(["torch==2.12.0", "openvino==2025.1", "onnxruntime==1.31.1"]) == (
        "pip install torch==2.12.0 onnxruntime==1.31.1 (torch 2.13.0+cu130, onnxruntime is not installed)"
    )


class Recorder:
    """Gives each row its own number back, and remembers the shapes that it was called with."""

    def __init__(self):
        self.shapes = []

    def encode_images(self, images):
        self.shapes.append(images.shape)
        return images.reshape(len(images), -1)[:, :1]

    def encode_texts(self, ids, mask):
        self.shapes.append(ids.shape)
        self.words = mask.sum(axis=1).tolist()
        return ids[:, :1].astype(np.float32)


@pytest.fixture
def on_gpu(package, monkeypatch):
    recorder, described = Recorder(), read_package(package).encoder
    monkeypatch.setattr(encoders, "open_encoder", lambda *_, **__: recorder)
    return PackageEncoder(package, described, "cuda", None), recorder, described


def test_batches_are_filled_up_to_few_sizes_on_a_gpu_and_answers_keep_their_order(on_gpu):
    encoder, recorder, _ = on_gpu
    images = np.arange(11, dtype=np.float32).reshape(11, 1, 1, 1)
    assert encoder.encode_images(images)[:, 0].tolist() == list(range(11))
    assert [shape[0] for shape in recorder.shapes] == [4, 4, 4]  # sizes are 1, 2 and 4
    recorder.shapes.clear()
    assert encoder.encode_images(images[:5])[:, 0].tolist() == list(range(5))
    assert [shape[0] for shape in recorder.shapes] == [4, 1]


def test_texts_have_one_of_two_lengths_on_a_gpu(on_gpu):
    encoder, recorder, described = on_gpu
    for tokens in (3, 8, 9, 32):
        ids = np.full((1, tokens), 5)
        assert encoder.encode_texts(ids, np.ones_like(ids))[:, 0].tolist() == [5.0]
        assert recorder.words == [tokens]
    assert [shape[1] for shape in recorder.shapes] == [8, 8, 32, 32]
    encoder.package = replace(described, pad_to_context=True)
    encoder.encode_texts(np.full((1, 4), 5), np.ones((1, 4), dtype=np.int64))
    assert recorder.shapes[-1] == (1, 32)


@pytest.mark.parametrize(("device", "by_device"), [("cuda", True), ("cuda", False), ("cpu", True)])
def test_embeddings_get_unit_length_once_by_a_gpu_that_makes_them_so(package, monkeypatch, device, by_device):
    recorder, asked = Recorder(), []
    if by_device:
        recorder.normalise = lambda: asked.append(True)
    monkeypatch.setattr(encoders, "open_encoder", lambda *_, **__: recorder)
    encoder = PackageEncoder(package, read_package(package).encoder, device, None, unit_length=True)
    on_device = device == "cuda" and by_device
    assert len(asked) == on_device
    expected = [[7.0]] if on_device else [[1.0]]  # the recorder leaves them as they are
    assert encoder.encode_images(np.full((1, 1, 1, 1), 7, dtype=np.float32)).tolist() == expected
    assert encoder.encode_texts(np.full((1, 8), 7), np.ones((1, 8), dtype=np.int64)).tolist() == expected


def test_pytorchs_towers_give_unit_length_when_they_are_asked_for_it(targets, sets):
    encoder, pixels = (
        open_encoder(targets / "torchscript-fp32", threads=1),
        load_prepared(sets / "evaluation").pixel_values,
    )
    expected = unit(encoder.encode_images(pixels[:3].copy()))
    encoder.normalise()
    np.testing.assert_allclose(encoder.encode_images(pixels[:3].copy()), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("facts", "cpu", "warned"),
    [
        ({"method": "static", "reduce_range": False}, ["avx2", "avx512f"], True),
        ({"method": "static", "reduce_range": False}, ["avx2", "avx512_vnni"], False),
        ({"method": "static", "reduce_range": True}, ["avx2"], False),
        ({"method": "weight_only", "reduce_range": False}, ["avx2"], False),
        ({"method": "dynamic", "reduce_range": False}, [], False),  # no x86, or a system that does not say
        ({}, ["avx2"], False),
    ],
)
def test_int8_of_a_cpu_with_vnni_is_told_on_one_without(package, tmp_path, monkeypatch, facts, cpu, warned):
    folder, manifest = shutil.copytree(package, tmp_path / "package"), read_package(package).encoder
    target = folder / manifest.towers.vision.target
    write_target(target, replace(read_target(target), build=facts))
    monkeypatch.setattr(encoders, "open_encoder", lambda *_, **__: Recorder())
    monkeypatch.setattr(encoders, "instruction_sets", lambda: cpu)
    with warnings.catch_warnings(record=True, action="always") as found:
        PackageEncoder(folder, manifest, "cpu", None)
    assert [f"{target.name} was built for CPUs with VNNI" in str(item.message) for item in found] == [True] * warned


def test_on_a_cpu_batches_stay_as_they_are(package, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(encoders, "open_encoder", lambda *_, **__: recorder)
    encoder = PackageEncoder(package, read_package(package).encoder, "cpu", None)
    encoder.encode_images(np.zeros((11, 1, 1, 1), dtype=np.float32))
    assert recorder.shapes == [(11, 1, 1, 1)]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([[1, 587]], "token ids run from 1 to 587: accepted are 0 to 586"),
        ([[-1, 2]], "token ids run from -1 to 2"),
        ([[1] * 33], "a text has 33 tokens: 1 to 32 are accepted"),
        (np.empty((2, 0), dtype=np.int64), "a text has 0 tokens: 1 to 32 are accepted"),
    ],
)
def test_tokens_that_a_runtime_might_take_for_others_are_refused(classifier, ids, said):
    with pytest.raises(DataError, match=said):
        classifier.encoder.encode_texts(np.array(ids), np.ones_like(ids))


def test_images_are_embedded_in_the_batches_that_were_fastest_in_the_benchmark(package, tmp_path):
    opened, recorder = ZeroShotClassifier.open(package), Recorder()
    opened.encoder = recorder
    assert opened.batch_size == 4
    list(opened.embed_each(IMAGES[:1] * 9))
    list(opened.embed_each(IMAGES[:1] * 9, batch_size=8))
    assert [shape[0] for shape in recorder.shapes] == [4, 4, 1, 8, 1]
    (tmp_path / "images").mkdir()
    IMAGES[0].save(tmp_path / "images" / "one.png")
    embed_folder(opened, tmp_path / "images", tmp_path / "out", EmbedSettings(dimensions=1))
    assert read_header(str(tmp_path / "out"), "part-00000.parquet")["batch_size"] == 4
