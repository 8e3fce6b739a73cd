import ast
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from support.records import timing
from support.triton import ENVIRONMENT, MODEL_NAMES, accepted
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from clip_deploy.builders.processor_files import write_preprocessor
from clip_deploy.checkpoint.load import load_processor
from clip_deploy.core import images
from clip_deploy.core.config import TritonConfig
from clip_deploy.core.errors import ConfigError, DataError, DeployError
from clip_deploy.core.model import Model
from clip_deploy.core.package import read_package
from clip_deploy.core.parsing import plain
from clip_deploy.core.records import Benchmark
from clip_deploy.data.preprocessed import tokenize
from clip_deploy.inference.encoders import PackageEncoder
from clip_deploy.inference.text_cache import TextCache
from clip_deploy.serving.pbtxt import Word, mapped, pbtxt
from clip_deploy.serving.repository import (
    FLAGS,
    MODELS,
    NoRepository,
    preferred_sizes,
    tower_config,
    write_repository,
)
from clip_deploy.serving.server import command, find_environment

ALLOWED = {"numpy", "clip_deploy", "tokenizers", "PIL", "triton_python_backend_utils", *sys.stdlib_module_names}
IF_INSTALLED = {"pillow_heif"}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """The text tower's curve falls after 8."""
    folder = tmp_path_factory.mktemp("benchmark")
    curves = {"vision": {1: 100.0, 8: 300.0, 64: 400.0}, "text": {1: 1000.0, 8: 3000.0, 32: 2500.0}}
    towers = {
        tower: {batch: timing(throughput_per_s=rate) for batch, rate in curve.items()}
        for tower, curve in curves.items()
    }
    (folder / "onnx-fp32.json").write_text(json.dumps(plain(Benchmark(status="measured", towers=towers))))
    return folder


@pytest.fixture(scope="module")
def repository(package, benchmark):
    write_repository(package, benchmark, TritonConfig(), benchmark / "triton")
    return benchmark / "triton"


class Refusal(str):
    """Triton's error: a text and a code."""

    INVALID_ARG, INTERNAL = "INVALID_ARG", "INTERNAL"

    def __new__(cls, text, code):
        error = super().__new__(cls, text)
        error.code = code
        return error


def given(request, name):
    if name in request:
        return SimpleNamespace(name=lambda: name, as_numpy=lambda: request[name])
    return None


@pytest.fixture
def program(monkeypatch):
    """Import one of the served models as Triton does, with a stand-in for the module that only the server has."""
    stand_in = SimpleNamespace(
        Tensor=lambda name, array: SimpleNamespace(name=name, array=array),
        TritonError=Refusal,
        InferenceResponse=lambda tensors=(), error=None: SimpleNamespace(tensors=list(tensors), error=error),
        get_input_tensor_by_name=given,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"served_{name}", MODELS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def started(program, repository, name):
    """The program of one model of the repository, initialised as Triton does."""
    folder = repository / "python" / f"clip_{name}"
    model = program(name).TritonPythonModel()
    text = (folder / "config.pbtxt").read_text()
    found = re.findall(r'key: "(\w+)"\s+value \{\s+string_value: "([^"]*)"', text)
    parameters = {key: {"string_value": value} for key, value in found}
    outputs = re.findall(r'^output \{\n  name: "(\w+)"', text, re.MULTILINE)
    config = {"parameters": parameters, "output": [{"name": output} for output in outputs]}
    model.initialize(
        {"model_config": json.dumps(config), "model_repository": str(folder), "model_version": "1"},
    )
    return model


def test_messages_lists_and_enums_are_written_as_text():
    message = {"name": "a", "kind": Word("KIND_CPU"), "dims": [-1, 3], "on": True, "of": mapped({"x": {"y": 1}})}
    assert pbtxt(message) == (
        'name: "a"\nkind: KIND_CPU\ndims: [-1, 3]\non: true\nof {\n  key: "x"\n  value {\n    y: 1\n  }\n}\n'
    )


def test_every_backend_gets_all_models_in_numbered_versions(repository):
    for backend in ("onnxruntime", "python"):
        assert sorted(path.name for path in (repository / backend).iterdir()) == MODEL_NAMES
        assert all((repository / backend / name / "1").is_dir() for name in MODEL_NAMES)
    files = {path.name for path in (repository / "onnxruntime" / "clip_vision" / "1").iterdir()}
    assert files == {"model.onnx"}
    version = repository / "python" / "clip_vision" / "1"
    assert {path.name for path in version.iterdir()} == {"onnx-fp32", "model.py", "settings.json", "clip_deploy"}
    assert {path.name for path in (version / "onnx-fp32").iterdir()} == {"vision.onnx", "target.json"}
    assert {path.name for path in (version / "clip_deploy").iterdir()} == {
        *("__init__.py", "core", "inference", "runtimes"),
    }


def test_what_onnx_runtime_does_not_run_is_served_by_the_python_backend_alone(package, benchmark, tmp_path):
    copy = Path(shutil.copytree(package, tmp_path / "package"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["towers"]["text"]["runtime"] = "torchscript"
    manifest["requires"] = ["onnxruntime==1.31.1", "torch==2.13.0"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    found = write_repository(copy, benchmark, TritonConfig(), tmp_path / "triton")
    assert found.backends == ["python"]
    assert {path.name for path in (tmp_path / "triton").iterdir()} == {"python", "deploy", "manifest.json"}
    deploy = {path.name: path.read_text() for path in (tmp_path / "triton" / "deploy").iterdir()}
    assert "COPY python /models/python\nUSER" in deploy["Dockerfile"]
    assert all("--model-repository=/models/python" in deploy[name] for name in ("Dockerfile", "kubernetes.yaml"))
    assert "pvc://clip-models/python" in deploy["kserve.yaml"]
    assert deploy["requirements.txt"].endswith("\nonnxruntime==1.31.1\ntorch==2.13.0\n")


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_served_tower_answers_as_the_package_without_our_library_installed(package, repository, tower, tmp_path):
    """In a process whose only clip_deploy is the one that lies beside the model."""
    encoder = read_package(package).encoder
    given = {"vision": {"pixel_values": [3, 48, 48]}, "text": {"input_ids": [7], "attention_mask": [7]}}[tower]
    arrays = {
        name: np.ones((2, *shape), np.float32 if tower == "vision" else np.int64) for name, shape in given.items()
    }
    np.savez(tmp_path / "given.npz", **arrays)
    model = {"input": [{"name": name} for name in given], "output": [{"name": f"{IMAGE_OR_TEXT[tower]}_embeds"}]}
    model["parameters"] = {name: {"string_value": "1"} for name in ("intra_op_thread_count", "cache_bytes")}
    folder = repository / "python" / f"clip_{tower}"
    arguments = {"model_config": json.dumps(model), "model_repository": str(folder), "model_version": "1"}
    program = tmp_path / "program.py"
    program.write_text(
        "import json, sys, types, numpy as np, runpy\n"
        "sys.modules['triton_python_backend_utils'] = types.ModuleType('triton_python_backend_utils')\n"
        f"model = runpy.run_path({str(folder / '1' / 'model.py')!r})['TritonPythonModel']()\n"
        f"model.initialize({ {**arguments, 'model_instance_kind': 'CPU'}!r})\n"
        f"np.save({str(tmp_path / 'found.npy')!r}, model.encode(dict(np.load({str(tmp_path / 'given.npz')!r}))))\n"
        "import clip_deploy; print(clip_deploy.__file__)\n"
    )
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(folder)
    towers = PackageEncoder(package, encoder, "cpu", 1)
    expected = towers.encode_images(*arrays.values()) if tower == "vision" else towers.encode_texts(*arrays.values())
    assert np.array_equal(np.load(tmp_path / "found.npy"), expected)


IMAGE_OR_TEXT = {"vision": "image", "text": "text"}


def test_the_manifest_says_where_the_package_came_from(package, repository):
    described, packaged = (json.loads((path / "manifest.json").read_text()) for path in (repository, package))
    origin = plain(read_package(package).origin)
    assert list(origin) == ["model", "seed", "versions", "checkpoint", "builds", "gates"]
    assert {name: described[name] for name in origin} == {name: packaged[name] for name in origin} == origin


def test_preferred_sizes_are_those_up_to_which_the_curve_rises(benchmark):
    assert preferred_sizes("onnx-fp32", "vision", benchmark, most=32) == [8]
    assert preferred_sizes("onnx-fp32", "vision", benchmark, most=64) == [8, 64]
    assert preferred_sizes("onnx-fp32", "text", benchmark, most=32) == [8]


def test_without_a_curve_the_batcher_prefers_no_size(package, tmp_path):
    assert preferred_sizes("onnx-fp32", "vision", tmp_path, most=32) == []
    batching = tower_config("vision", "python", read_package(package).encoder, [], TritonConfig())["dynamic_batching"]
    assert "preferred_batch_size" not in batching


def test_a_tower_for_the_gpu_gets_instances_there(package):
    encoder = replace(read_package(package).encoder, device="cuda")
    config = tower_config("vision", "onnxruntime", encoder, [8], TritonConfig(instances=2))
    assert config["instance_group"] == [{"count": 2, "kind": "KIND_GPU"}]


def test_a_tower_that_preprocesses_takes_images_of_any_size(package):
    encoder = read_package(package).encoder
    towers = replace(encoder.towers, vision=replace(encoder.towers.vision, image_input="images"))
    config = tower_config("vision", "onnxruntime", replace(encoder, towers=towers), [], TritonConfig())
    assert config["input"] == [{"name": "images", "data_type": "TYPE_UINT8", "dims": [-1, -1, 3]}]


def test_a_package_that_was_changed_is_refused(package, tmp_path):
    folder = Path(shutil.copytree(package, tmp_path / "package"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DeployError, match=r"tokenizer\.json is not the file that was packaged"):
        write_repository(folder, tmp_path, TritonConfig(), tmp_path / "triton")
    assert not (tmp_path / "triton").exists()


def test_where_nothing_was_packaged_the_repository_says_so(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "manifest.json").write_text('{"format": 2, "unavailable": "no target passed"}')
    found = write_repository(tmp_path / "package", tmp_path, TritonConfig(), tmp_path / "triton")
    assert found == NoRepository("nothing was packaged: no target passed")
    assert json.loads((tmp_path / "triton" / "manifest.json").read_text()) == plain(found)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"triton\.max_batch is 0: give 1 or more"):
        TritonConfig(max_batch=0)
    with pytest.raises(ConfigError, match="queue_delay_us is -1"):
        TritonConfig(queue_delay_us=-1)


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.py")), ids=lambda path: path.stem)
def test_a_served_model_imports_only_what_a_server_has(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported <= ALLOWED | IF_INSTALLED


PROCESSORS = [
    CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
    CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 49, "width": 64}),
    SiglipImageProcessorPil(size={"height": 130, "width": 90}, resample=2),
]


@pytest.mark.parametrize("processor", PROCESSORS, ids=["crop", "crop that pads", "both sides"])
@pytest.mark.parametrize("size", [(120, 160), (161, 120), (47, 48)])
def test_served_preprocessing_gives_the_processors_pixels(program, processor, size, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    write_preprocessor(processor, Model(image_size=list(size)), tmp_path / "preprocessor.json")
    pixels = program("preprocess").pixel_values(image, json.loads((tmp_path / "preprocessor.json").read_text()))
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    assert pixels.dtype == np.float32
    assert np.abs(pixels - expected).max() < 1e-5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_kind_of_image_is_read_as_what_opens_packages_reads_it(program, mode):
    levels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    image = Image.fromarray(levels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(levels)
    image, preprocess = image if mode == "I;16" else image.convert(mode), program("preprocess")
    if mode == "P":
        image.info["transparency"] = 3
    try:
        expected = images.rgb(image)
    except DataError:
        with pytest.raises(preprocess.RefusedError, match=f"mode {mode}"):
            preprocess.rgb(image)
    else:
        assert np.array_equal(preprocess.rgb(image), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_what_opens_packages_turns_it(program, orientation):
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
        content, "jpeg", exif=exif
    )
    found = program("preprocess").decoded(content.getvalue())
    assert found.size == ((20, 30) if orientation > 4 else (30, 20))
    assert np.array_equal(found, images.decode(content.getvalue(), ""))


def picture(size, kind="png", mode="RGB"):
    content = io.BytesIO()
    Image.new(mode, size).save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an image", "not an image that can be decoded"),
        (b"", "not an image that can be decoded"),
        (picture((64, 64), "jpeg")[:-300], "not an image that can be decoded"),
        (picture((10_000, 10_000), mode="1"), "10000 x 10000 pixels: at most 50000000"),
        (b"\xff\xd8" + bytes(20_000_000), "20000002 bytes: at most 20000000"),
        (picture((1, 1_000_000), mode="1"), "1 x 1000000 pixels: a side may be at most 500 times the other"),
    ],
    ids=["text", "empty", "truncated", "bomb", "large", "thin"],
)
def test_a_bad_image_gets_an_error_and_its_neighbour_an_answer(program, repository, content, message):
    model = started(program, repository, "preprocess")
    bad, good = (np.array([[file]], dtype=object) for file in (content, picture((60, 50), "jpeg")))
    refused, answered = model.execute([{"encoded": bad}, {"encoded": good}])
    assert message in refused.error
    assert refused.error.code == "INVALID_ARG"
    assert answered.tensors[0].array.shape == (1, 3, 48, 48)


def test_a_server_refuses_the_same_thin_images_as_what_opens_packages(program):
    assert program("preprocess").MAX_ASPECT == images.MAX_ASPECT


def test_the_images_of_a_request_are_decoded_and_shrunk_one_by_one(program, repository, monkeypatch):
    model, preprocess, steps = started(program, repository, "preprocess"), program("preprocess"), []
    module = model.stacked.__func__.__globals__

    def noted(name):
        def run(*arguments):
            steps.append(name)
            return getattr(preprocess, name)(*arguments)

        return run

    for name in ("decoded", "pixel_values"):
        monkeypatch.setitem(module, name, noted(name))
    assert model.stacked([picture((60, 50))] * 3).shape == (3, 3, 48, 48)
    assert steps == ["decoded", "pixel_values"] * 3


def test_a_tower_that_preprocesses_gets_whole_images_of_one_size_up_to_a_bound(program, repository, monkeypatch):
    model = started(program, repository, "preprocess")
    model.settings, module = None, model.stacked.__func__.__globals__
    monkeypatch.setitem(module, "MAX_PIXELS", 6000)
    assert model.stacked([picture((60, 50))] * 2).shape == (2, 50, 60, 3)
    with pytest.raises(module["RefusedError"], match="one request must have one size"):
        model.stacked([picture((60, 50)), picture((50, 60))])
    with pytest.raises(module["RefusedError"], match="more than 6000 pixels in all: send fewer"):
        model.stacked([picture((60, 50))] * 3)


def test_served_tokens_are_those_of_the_checkpoints_tokenizer(program, repository, checkpoint):
    texts = ["a photo of a red circle", "blue", "x" * 500, "naïve 日本"]
    model = started(program, repository, "tokenize")
    ids, mask = model.tokens(texts)
    expected = tokenize(load_processor(checkpoint), Model(pad_to_context=False, context_length=32), texts)
    assert np.array_equal(ids, expected.input_ids)
    assert np.array_equal(mask, expected.attention_mask)
    assert model.tokens(["red"])[0].shape == (1, 8)  # a multiple of 8, so that more requests share a length


@pytest.mark.parametrize(
    ("text", "message"), [(b"\xff", "not UTF-8"), (b"", "text 2 of 2 is empty"), (b" \n", "text 2 of 2 is empty")]
)
def test_a_text_that_is_not_utf8_or_says_nothing_is_refused(program, repository, text, message):
    texts = np.array([[b"red"], [text]], dtype=object)
    (answer,) = started(program, repository, "tokenize").execute([{"texts": texts}])
    assert message in answer.error
    assert answer.error.code == "INVALID_ARG"


def test_scores_are_scaled_as_the_version_says(program, repository, package):
    score, encoder = started(program, repository, "score"), read_package(package).encoder
    assert (score.scale, score.bias) == (encoder.logit_scale, 0.0)
    assert score.activation.__name__ == encoder.activation


@pytest.mark.parametrize(("images", "texts"), [(0, 2), (2, 0), (0, 0)])
def test_scores_of_nothing_are_refused_as_the_clients_mistake(program, repository, images, texts):
    score, width = started(program, repository, "score"), 64
    embeddings = {"image_embeds": np.ones((images, width)), "text_embeds": np.ones((texts, width))}
    (answer,) = score.execute([{name: rows.astype(np.float32) for name, rows in embeddings.items()}])
    assert answer.error == f"the request has {images} images and {texts} texts: give one of each or more"
    assert answer.error.code == "INVALID_ARG"


@pytest.mark.parametrize("count", [0, 33])
def test_a_request_of_no_image_or_too_many_is_refused(program, repository, count):
    model = started(program, repository, "preprocess")
    (refused,) = model.execute([{"encoded": np.array([[picture((60, 50))]] * count, dtype=object)}])
    assert refused.error == f"the request has {count} images: give 1 to 32"
    assert refused.error.code == "INVALID_ARG"


def test_tokens_that_come_with_images_pass_through(program, repository):
    tokens = {name: np.array([[row, 2, 3]]) for row, name in enumerate(("input_ids", "attention_mask"))}
    encoded = np.array([[picture((60, 50))]], dtype=object)
    (answer,) = started(program, repository, "preprocess").execute([{"encoded": encoded, **tokens}])
    assert [tensor.name for tensor in answer.tensors] == ["pixel_values", *tokens]
    assert [tensor.array.tolist() for tensor in answer.tensors[1:]] == [array.tolist() for array in tokens.values()]


def test_no_step_of_the_ensemble_that_can_refuse_runs_beside_another(repository):
    """Triton 2.51 crashes where a step fails while the ensemble starts another."""
    text = (repository / "python" / "clip_zero_shot" / "config.pbtxt").read_text()
    known, waves = set(re.findall(r'^input \{\n  name: "(\w+)"', text, re.MULTILINE)), []
    steps = {}
    for step in text.split("  step {")[1:]:
        inputs, outputs = step.split("output_map")[0], "".join(step.split("output_map")[1:])
        name = re.search(r'model_name: "(\w+)"', step)[1]
        steps[name] = [set(re.findall(r'value: "(\w+)"', part)) for part in (inputs, outputs)]
    while steps:
        ready = sorted(name for name, (inputs, _) in steps.items() if inputs <= known)
        known |= {tensor for name in ready for tensor in steps.pop(name)[1]}
        waves.append(ready)
    assert waves == [["clip_tokenize"], ["clip_preprocess"], ["clip_text", "clip_vision"], ["clip_score"]]


def test_scores_are_a_softmax_over_texts_or_a_sigmoid_of_each_pair(program):
    score = program("score")
    assert np.allclose(score.softmax(np.array([[0.0, np.log(3)]])), [[0.25, 0.75]])
    assert np.allclose(score.sigmoid(np.array([[0.0, np.log(3)]])), [[0.5, 0.75]])
    assert np.allclose(score.normalized(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])


def text_tower(program, encode_texts, size=8):
    """The program of a text tower of one dimension with a stand-in for what encodes."""
    model = program("encoder").TritonPythonModel()
    model.inputs, model.output = ["input_ids", "attention_mask"], "text_embeds"
    model.encoder, model.cache = SimpleNamespace(encode_texts=encode_texts), TextCache("tower", 1, size)
    return model


def asked(*tokens):
    """A request of one-token texts."""
    ids = np.array(tokens)[:, None]
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def test_one_bad_request_does_not_fail_those_that_were_batched_with_it(program):
    def encode_texts(ids, mask):
        assert ids.shape == mask.shape
        if ids.max() > 700:
            raise MemoryError("no memory")
        if ids.max() > 600:
            raise DataError("token ids run from 601 to 601")
        return ids.astype(np.float32)

    model = text_tower(program, encode_texts)
    for _ in range(2):  # the second time the good ones come from the cache, and no error does
        one, two, three, four = model.execute([asked(number) for number in (1, 601, 3, 701)])
        assert "token ids run from 601" in two.error
        assert [two.error.code, four.error.code] == ["INVALID_ARG", "INTERNAL"]
        assert [answer.tensors[0].array.tolist() for answer in (one, three)] == [[[1.0]], [[3.0]]]


def test_a_passing_error_is_not_kept(program):
    errors = [MemoryError("no memory")] * 2  # of the batch, and of the request by itself

    def encode_texts(ids, mask):
        if errors:
            raise errors.pop()
        return ids.astype(np.float32)

    model = text_tower(program, encode_texts)
    (refused,), (answered,) = model.execute([asked(5)]), model.execute([asked(5)])
    assert refused.error.code == "INTERNAL"
    assert answered.tensors[0].array.tolist() == [[5.0]]


def test_only_texts_that_are_not_in_the_cache_are_encoded_and_the_others_stay_what_they_were(program):
    encoded = []

    def encode_texts(ids, mask):
        """Another embedding at every call, as where neighbours change it."""
        encoded.append(ids[:, 0].tolist())
        return (1000 * len(encoded) + ids).astype(np.float32)

    model = text_tower(program, encode_texts, size=3)
    assert model.encode(asked(1, 2, 1)).tolist() == [[1001], [1002], [1001]]
    assert model.encode(asked(3, 2)).tolist() == [[2003], [1002]]
    assert model.encode(asked(1, 3)).tolist() == [[1001], [2003]]
    assert [sorted(rows) for rows in encoded] == [[1, 2], [3]]
    assert model.encode(asked(4, 2)).tolist() == [[3004], [1002]]
    assert model.encode(asked(1)).tolist() == [[4001]]  # the least recently used went
    assert model.encode({**asked(2), "attention_mask": np.zeros((1, 1), int)}).tolist() == [[5002]]


def test_a_kept_embedding_keeps_no_batch_in_memory(program):
    model = text_tower(program, lambda ids, mask: ids.astype(np.float32))
    model.encode(asked(*range(8)))
    assert all(embedding.base is None for embedding in model.cache.held.values())


def started_text_tower(program, repository, **config):
    """As Triton starts the text tower of the repository, with a part of its configuration."""
    parameters = {"cache_bytes": "16777216", "intra_op_thread_count": "1"}
    texts = {"input": [{"name": "input_ids"}], "output": [{"name": "text_embeds"}], **config}
    texts["parameters"] = {name: {"string_value": value} for name, value in parameters.items()}
    model = program("encoder").TritonPythonModel()
    arguments = {"model_repository": str(repository / "python" / "clip_text"), "model_version": "1"}
    model.initialize({"model_config": json.dumps(texts), "model_instance_kind": "CPU", **arguments})
    return model


def test_a_warm_up_reaches_the_tower_in_its_whole_size(program, repository, monkeypatch):
    encoded, encode_texts = [], PackageEncoder.encode_texts

    def noted(self, ids, mask):
        encoded.append(ids.shape)
        return encode_texts(self, ids, mask)

    monkeypatch.setattr(PackageEncoder, "encode_texts", noted)
    started_text_tower(program, repository, model_warmup=[{"batch_size": 1}, {"batch_size": 8}])
    assert encoded == [(1, 32), (8, 32)]


def test_triton_caches_no_response_and_the_python_backend_keeps_16_mb_of_embeddings(program, repository, package):
    assert not [path for path in repository.glob("*/*/config.pbtxt") if "response_cache" in path.read_text()]
    assert not [flag for flag in FLAGS if "cache" in flag]
    config = (repository / "onnxruntime" / "clip_text" / "config.pbtxt").read_text()
    assert "cache_bytes" not in config
    config = (repository / "python" / "clip_text" / "config.pbtxt").read_text()
    assert re.search(r'key: "cache_bytes"\s+value \{\s+string_value: "16777216"', config)
    numbers = started_text_tower(program, repository).cache.size * 4 * read_package(package).encoder.dimension
    assert 0.3 * 16_777_216 < numbers < 16_777_216


def documents(repository):
    for path in sorted((repository / "deploy").glob("*.y*ml")):
        yield from yaml.safe_load_all(path.read_text())


def test_every_path_that_a_container_is_given_is_in_the_repository(repository):
    kinds = {document.get("kind") for document in documents(repository)}
    assert kinds == {"Deployment", "Service", "ServingRuntime", "InferenceService", None}
    text = "\n".join(path.read_text() for path in (repository / "deploy").iterdir())
    given = set(re.findall(r"(?:(?<!v2)/models/|pvc://[\w-]+/)(\w+)", text))
    assert given == {"onnxruntime", "python"}
    assert all((repository / name).is_dir() for name in given)
    dockerfile = (repository / "deploy" / "Dockerfile").read_text()
    assert all((repository / source).exists() for source in re.findall(r"^COPY (\S+)", dockerfile, re.MULTILINE))


def test_every_server_runs_with_the_flags_of_the_one_that_was_checked(repository):
    lists = [container["args"] for document in documents(repository) for container in find(document, "containers")]
    lists.append(
        json.loads(re.search("^CMD (.*)", (repository / "deploy" / "Dockerfile").read_text(), re.MULTILINE)[1])
    )
    lists.append(command(Path("models"), SimpleNamespace(triton=Path("triton")), {"http": 1, "grpc": 2, "metrics": 3}))
    assert len(lists) == 4
    for flags in lists:
        assert [flag for flag in flags if flag in FLAGS] == list(FLAGS)
        assert not [flag for flag in flags if "control" in flag and flag not in FLAGS]


def test_containers_ask_for_a_gpu_only_where_the_package_needs_one(repository, package, benchmark, tmp_path):
    assert "nvidia.com/gpu" not in (repository / "deploy" / "kubernetes.yaml").read_text()
    manifest = json.loads((package / "manifest.json").read_text())
    copy = Path(shutil.copytree(package, tmp_path / "package"))
    (copy / "manifest.json").write_text(json.dumps({**manifest, "device": "cuda"}))
    write_repository(copy, benchmark, TritonConfig(), tmp_path / "triton")
    limits = [
        container["resources"]["limits"]
        for document in documents(tmp_path / "triton")
        for container in find(document, "containers")
    ]
    assert limits == [{"memory": "8Gi", "nvidia.com/gpu": 1}] * 2


def find(document, key):
    """Items of every list under `key`, at any depth."""
    if not isinstance(document, dict):
        return []
    return [*document.get(key, []), *(item for value in document.values() for item in find(value, key))]


def test_tritons_own_schema_accepts_every_config(repository, tmp_path):
    """tritonclient pins a protobuf of its own, so that it lives in the server's environment."""
    try:
        python = find_environment(ENVIRONMENT).python
    except DeployError as error:
        pytest.skip(str(error))
    wrong = tmp_path / "config.pbtxt"
    wrong.write_text((repository / "python" / "clip_text" / "config.pbtxt").read_text() + 'colour: "red"\n')
    configs = sorted(repository.glob("*/*/config.pbtxt"))
    assert len(configs) == 12
    assert accepted(python, *configs).returncode == 0
    assert '"colour"' in accepted(python, wrong).stderr
