import ast
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email import message_from_bytes
from functools import partial
from io import BytesIO
from pathlib import Path

import grimp
import numpy as np
import onnxruntime
import pytest
from PIL import Image
from support.fast_feed import need_fast_feed
from support.project import ROOT
from support.targets import packed

from clip_deploy.__main__ import LIGHT
from clip_deploy.builders.processor_files import write_portable
from clip_deploy.checkpoint.load import load_model, load_processor
from clip_deploy.core import fast_preprocessing
from clip_deploy.core.errors import DataError, DeployError, UnavailableError
from clip_deploy.core.images import Encoded
from clip_deploy.data import scenes
from clip_deploy.inference.classifier import ZeroShotClassifier

SCENES = [scenes.render("classifier", index, 5 * index) for index in range(6)]
IMAGES = [image for image, _ in SCENES]
TEXTS = ["a photo of a red circle", "a photo of a yellow star", "a blue square"]
ALLOWED = {"numpy", "PIL", "tokenizers", "onnxruntime", "tqdm"}  # tokenizers brings tqdm
# For Parquet and object stores, for many machines, for HEIC, for JPEGs in a hurry, for an index, for HTTP.
ON_DEMAND = {"huggingface_hub", "pyarrow", "ray", "pillow_heif", "simplejpeg", "cykooz_resizer", "faiss"}
WEB = {"orjson", "prometheus_client", "starlette", "uvicorn"}
ON_DEMAND |= WEB


@pytest.fixture(scope="module")
def classifier(package):
    return ZeroShotClassifier.open(package, threads=2)


def expected_logits(checkpoint, images, texts, **options):
    """What transformers itself makes of images and texts."""
    batch = load_processor(checkpoint)(images=images, text=texts, return_tensors="pt", **options)
    if "max_length" in options:
        batch.pop("attention_mask", None)  # Gemma's tokenizer makes one; SigLIP was trained without
    return load_model(checkpoint)(**batch).logits_per_image.detach()


def test_probabilities_are_those_of_the_checkpoint_in_transformers_the_highest_first(classifier, checkpoint):
    expected = expected_logits(checkpoint, IMAGES[:1], TEXTS, padding=True).softmax(dim=1)[0].numpy()
    predictions = classifier.predict(IMAGES[0], TEXTS)
    assert [text for text, _ in predictions] == [TEXTS[row] for row in np.argsort(-expected)]
    assert np.allclose([probability for _, probability in predictions], sorted(expected, reverse=True), atol=1e-4)
    assert sum(prediction.probability for prediction in predictions) == pytest.approx(1)


def test_without_texts_the_packages_classes_answer_in_its_templates(classifier):
    answers = [classifier.predict(image)[0].text for image in IMAGES]
    assert len(classifier.predict(IMAGES[0])) == 48
    assert sum(answer == scene.label for answer, (_, scene) in zip(answers, SCENES, strict=True)) >= 5


def test_embeddings_are_the_checkpoints_of_unit_length_in_the_order_of_the_files(classifier, checkpoint, tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(6)]
    for path, image in zip(paths, IMAGES, strict=True):
        image.save(path)
    pixels = load_processor(checkpoint).image_processor(IMAGES, return_tensors="pt")["pixel_values"]
    expected = load_model(checkpoint).get_image_features(pixel_values=pixels).pooler_output.detach().numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = classifier.embed_images(paths[::-1], batch_size=4)
    assert found.dtype == np.float32
    assert (found * expected[::-1]).sum(axis=1).min() > 0.9999


def test_a_text_that_was_seen_is_not_encoded_again(package, tmp_path):
    calls = []
    classifier = ZeroShotClassifier.open(package, cache_folder=tmp_path)
    classifier.encode_texts = lambda texts, encode=classifier.encode_texts: calls.append(texts) or encode(texts)
    first = classifier.embed_texts([*TEXTS, TEXTS[0]])
    assert np.array_equal(classifier.embed_texts(TEXTS), first[:3])
    assert calls == [TEXTS]
    again = ZeroShotClassifier.open(package, cache_folder=tmp_path)
    again.encode_texts = None  # the disk has them
    assert np.array_equal(again.embed_texts(TEXTS), first[:3])


def test_an_image_that_cannot_be_read_is_named(classifier, tmp_path):
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(DataError, match=r"page.png is not a readable image"):
        classifier.embed_images([IMAGES[0], tmp_path / "page.png"])
    good, bad = classifier.embed_each([IMAGES[0], tmp_path / "page.png"])
    assert good.shape == (64,)
    assert isinstance(bad, DataError)


@pytest.mark.parametrize("image", [b"\xff\xd8\xff", np.zeros((8, 8, 3), np.uint8), BytesIO(), 3])
def test_what_is_no_picture_is_told_how_it_becomes_one(classifier, image):
    with pytest.raises(DataError, match=rf"of type {type(image).__name__}: give a file's path or a picture of Pillow"):
        classifier.embed_images([image])


def test_a_picture_that_pillow_cannot_read_to_its_end_fails_alone(classifier):
    """Image.open reads no pixels: what is cut is met later."""
    content = BytesIO()
    Image.effect_noise((64, 64), 90).save(content, "png")
    bad, good = classifier.embed_each([Image.open(BytesIO(content.getvalue()[:-500])), IMAGES[0]])
    assert "a picture of Pillow cannot be read" in str(bad)
    assert good.shape == (64,)
    with pytest.raises(DataError, match="a picture in memory has pixels of mode F"):
        classifier.predict(Image.new("F", (8, 8)), ["a"])


def test_texts_may_come_as_an_array_or_one_by_one(classifier):
    expected = classifier.embed_texts(TEXTS)
    for texts in (np.array(TEXTS), iter(TEXTS), tuple(TEXTS), dict.fromkeys(TEXTS).keys()):
        assert np.array_equal(classifier.embed_texts(texts), expected)
    assert classifier.predict(IMAGES[0], iter(TEXTS)) == classifier.predict(IMAGES[0], TEXTS)
    with pytest.raises(DataError, match=r"images is <list_iterator .*: give a list, or take embed_each"):
        classifier.embed_images(iter(IMAGES))


@pytest.mark.parametrize(
    ("texts", "said"), [([], "there are no texts"), (["a", ""], "text 2 of 2 is ''"), (3, "texts is 3: give a list")]
)
def test_texts_that_say_nothing_are_refused(classifier, texts, said):
    with pytest.raises(DataError, match=said):
        classifier.predict(IMAGES[0], texts)


@pytest.mark.parametrize("batch_size", [0, -3, 1.5, "4"])
def test_a_batch_of_nothing_is_refused(classifier, batch_size):
    with pytest.raises(DataError, match=rf"batch_size is {batch_size!r}: give a whole number of 1 or more"):
        classifier.embed_texts(TEXTS, batch_size)
    with pytest.raises(DataError, match=rf"batch_size is {batch_size!r}: give a whole number of 1 or more"):
        classifier.embed_images(IMAGES, batch_size)


@pytest.mark.parametrize("image", ["a.png", Path("a.png"), IMAGES[0]])
def test_one_image_is_no_list_of_images(classifier, image):
    with pytest.raises(DataError, match=r"images is a single image, .*: give a list of images"):
        classifier.embed_images(image)
    with pytest.raises(DataError, match=r"images is a single image"):
        next(classifier.embed_each(image))


@pytest.fixture(scope="module")
def fast(package):
    need_fast_feed()
    return ZeroShotClassifier.open(package, threads=2, feed="fast")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs of four times the model's size, of which one lies on its side."""
    folder = tmp_path_factory.mktemp("photos")
    for index, image in enumerate(IMAGES):
        exif = Image.Exif()
        exif[0x0112] = 6 if index == 0 else 1
        image.resize((230, 200)).save(folder / f"{index}.jpg", quality=90, exif=exif)
    return sorted(folder.iterdir())


def test_the_fast_feed_embeds_photos_nearly_as_the_checkpoints_processor(classifier, fast, photos):
    found, expected = fast.embed_images(photos), classifier.embed_images(photos)
    cosines = (found * expected).sum(axis=1)
    assert 0.99 < cosines.min() < cosines.max() < 1
    answers = [[opened.predict(photo)[0].text for photo in photos] for opened in (fast, classifier)]
    assert answers[0] == answers[1]


def test_the_fast_feed_reads_files_on_disk_and_in_memory_alike(fast, photos):
    held = [Encoded(photo.read_bytes, photo.name, ".jpg") for photo in photos]
    assert np.array_equal(fast.embed_images(held), fast.embed_images(photos))


def test_the_fast_feed_leaves_all_but_jpegs_to_the_exact_one(classifier, fast, tmp_path, photos):
    IMAGES[0].save(tmp_path / "a.png")
    IMAGES[1].convert("CMYK").save(tmp_path / "b.jpg")
    given = [tmp_path / "a.png", str(tmp_path / "b.jpg"), IMAGES[2], lambda: IMAGES[3]]
    given.append(Encoded((tmp_path / "a.png").read_bytes, "a.png", ".png"))
    assert np.array_equal(fast.embed_images(given), classifier.embed_images(given))


def test_through_the_fast_feed_what_cannot_be_read_is_named_in_the_same_words(classifier, fast, photos, tmp_path):
    whole = photos[1].read_bytes()
    broken = {"half": whole[: len(whole) // 2], "head": whole[:40], "empty": b"", "page": b"<html>"}
    for name, content in broken.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    Image.new("L", (2, 1001)).save(tmp_path / "thin.jpg")
    files = [*sorted(tmp_path.iterdir()), tmp_path / "nowhere.jpg"]
    files += [Encoded(partial(bytes, content), f"row {name}") for name, content in broken.items()]
    said = [[str(error) for error in opened.embed_each(files)] for opened in (fast, classifier)]
    assert said[0] == said[1]
    assert (
        "half.jpg is not a readable image (image file is truncated" in said[0][1 + files.index(tmp_path / "empty.jpg")]
    )
    assert len(said[0]) == 10


def test_an_image_in_memory_is_fetched_once(fast, tmp_path):
    IMAGES[0].save(tmp_path / "a.png")
    fetched = []
    image = Encoded(lambda: fetched.append(1) or (tmp_path / "a.png").read_bytes(), "a.png")
    fast.embed_images([image])
    assert fetched == [1]


def test_an_unknown_feed_and_a_missing_library_are_refused(package, monkeypatch):
    with pytest.raises(DeployError, match="feed is 'quick': accepted are exact, fast"):
        ZeroShotClassifier.open(package, feed="quick")
    monkeypatch.setattr(fast_preprocessing, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"needs simplejpeg and cykooz_resizer: pip install"):
        ZeroShotClassifier.open(package, feed="fast")


@pytest.mark.parametrize(("options", "entry"), [({}, "1"), ({"allow_spinning": False}, "0")])
def test_the_towers_threads_wait_busily_unless_told_otherwise(package, options, entry):
    sessions = ZeroShotClassifier.open(package, **options).encoder.towers["vision"].sessions
    found = [session.get_session_options() for session in sessions.values()]
    assert [each.get_session_config_entry("session.intra_op.allow_spinning") for each in found] == [entry, entry]


def test_an_unknown_device_is_refused(package):
    with pytest.raises(DeployError, match="device is 'tpu': accepted are cpu, cuda"):
        ZeroShotClassifier.open(package, device="tpu")


def test_a_missing_provider_is_refused_and_not_replaced(package, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UnavailableError, match=r"no CUDA provider: pip uninstall -y onnxruntime && pip install"):
        ZeroShotClassifier.open(package, device="cuda")


@pytest.fixture
def copy(package, tmp_path):
    return shutil.copytree(package, tmp_path / "package")


def test_a_file_that_is_not_the_one_that_was_judged_is_refused(copy):
    (copy / "labels.json").write_text("{}")
    with pytest.raises(DeployError, match=r"labels.json is not the file that was packaged"):
        ZeroShotClassifier.open(copy)
    (copy / "labels.json").unlink()
    with pytest.raises(DeployError, match=r"labels.json is missing"):
        ZeroShotClassifier.open(copy)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ('{"format": 2, "unavailable": "no target passes"}', "holds nothing to ship: no target passes"),
        ('{"format": 1}', "is not of format 2, which this version reads"),
        ("[]", "is not of format 2"),
        ("{", "is not a package"),
    ],
)
def test_what_is_no_package_is_refused(tmp_path, manifest, said):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(DeployError, match=said):
        ZeroShotClassifier.open(tmp_path)


def test_a_graph_that_preprocesses_takes_images_of_any_size(checkpoint, sets, onnx_of, tmp_path):
    target = onnx_of(checkpoint, preprocess=True, normalize=True)
    (tmp_path / "package").mkdir()
    folder = packed(target, sets, tmp_path / "package")
    assert not (folder / "preprocessor.json").exists()
    sizes = [IMAGES[0], IMAGES[1].resize((90, 70)), IMAGES[2]]
    found = ZeroShotClassifier.open(folder).embed_images(sizes)
    pixels = load_processor(checkpoint).image_processor(sizes, return_tensors="pt")["pixel_values"]
    expected = load_model(checkpoint).get_image_features(pixel_values=pixels).pooler_output.detach().numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert (found * expected).sum(axis=1).min() > 0.999
    with pytest.raises(DeployError, match="this package's graph resizes images itself: take 'exact'"):
        ZeroShotClassifier.open(folder, feed="fast")


def packed_siglip(name, siglip, target, folder):
    """A package of a SigLIP without classes."""
    evaluation = folder / "evaluation"
    evaluation.mkdir()
    pad = {"siglip": 1, "siglip2": 0}[name]  # </s> and <pad>
    (evaluation / "manifest.json").write_text(json.dumps({"classes": [], "templates": [], "pad_token": pad}))
    nothing = np.empty((0, 32), dtype=np.float32)
    np.savez(evaluation / "reference.npz", images=nothing, captions=nothing, prompts=nothing)
    for name in ("portable", "package"):
        (folder / name).mkdir()
    write_portable(siglip, folder / "portable")
    return packed(target, folder, folder / "package")


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_siglip_gives_each_text_a_probability_of_its_own_and_reads_capitals_as_small_letters(
    name, onnx_of, tmp_path, request
):
    siglip = request.getfixturevalue(name)
    classifier = ZeroShotClassifier.open(packed_siglip(name, siglip, onnx_of(siglip), tmp_path))
    texts = ["A photo of a RED circle", "a star"]
    lower = [text.lower() for text in texts]
    expected = expected_logits(siglip, IMAGES[:1], lower, padding="max_length", max_length=16).sigmoid()[0].numpy()
    found = dict(classifier.predict(IMAGES[0], texts))
    assert np.allclose([found[text] for text in texts], expected, atol=1e-5)
    with pytest.raises(DataError, match="no classes of its own: give the texts"):
        classifier.predict(IMAGES[0])


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
def test_the_program_of_the_guide_answers_as_the_package_without_this_library(
    name, onnx_of, tmp_path, request, monkeypatch
):
    """docs/guides/own-program.md, run where the guide's commands would leave the package and the image."""
    (tmp_path / "build" / "scenes").mkdir(parents=True)
    image = IMAGES[0].resize((93, 61))  # of an odd rest, and no square
    image.save(tmp_path / "build/scenes/020.png")
    if name == "clip":
        made = request.getfixturevalue("package")
    else:
        (tmp_path / name).mkdir()
        siglip = request.getfixturevalue(name)
        made = packed_siglip(name, siglip, onnx_of(siglip), tmp_path / name)
    shutil.copytree(made, tmp_path / "build/package")
    guide = (ROOT / "docs/guides/own-program.md").read_text(encoding="utf-8")
    program = re.search(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)[1]
    assert "clip_deploy" not in program
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(program, names)
    expected = dict(ZeroShotClassifier.open(made).predict(image, names["texts"]))
    found = dict(zip(names["texts"], names["probabilities"][0], strict=True))
    assert found == {text: pytest.approx(probability, abs=1e-4) for text, probability in expected.items()}


def test_the_runtime_imports_nothing_but_its_four_packages():
    graph = grimp.build_graph(
        "clip_deploy", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )
    doors = {"clip_deploy.__main__", "clip_deploy.runtimes.ort", *(f"clip_deploy.commands.{name}" for name in LIGHT)}
    modules = doors.union(*map(graph.find_upstream_modules, doors))
    outside = {module for module in modules if not module.startswith("clip_deploy")}
    assert outside - set(sys.stdlib_module_names) == ALLOWED | ON_DEMAND
    for module in modules - outside - {"clip_deploy"}:
        path = ROOT.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        top = {
            alias.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        late = ON_DEMAND - WEB if module.startswith("clip_deploy.web.") else ON_DEMAND
        assert not top & late, f"{module} needs {top & late} to be imported"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this code, built beside it: setuptools would take what an earlier build left in build/."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "clip_deploy", source / "clip_deploy", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(build, check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_four_libraries_are_all_that_the_wheel_asks_for(wheel):
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        required = message_from_bytes(file.read(metadata)).get_all("Requires-Dist")
    direct = {re.match(r"[\w-]+", need)[0] for need in required if "extra ==" not in need}
    assert direct == {"numpy", "onnxruntime", "pillow", "tokenizers"}


def test_the_wheel_holds_every_file_of_the_library_and_the_licence(wheel):
    library = ROOT / "clip_deploy"
    files = {path.relative_to(ROOT).as_posix() for path in library.rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("/licenses/LICENSE") for name in file.namelist())
    assert held == {name for name in files if "/__pycache__/" not in name}


@pytest.mark.slow
def test_the_wheel_alone_opens_a_package_where_torch_and_transformers_never_were(package, wheel, tmp_path):
    venv.create(tmp_path / "venv")
    install = [sys.executable, "-m", "pip", "--python", tmp_path / "venv" / "bin" / "python", "install", "-q", wheel]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    IMAGES[0].save(pictures / "scene.png")

    def run(*arguments, program="clip-deploy"):
        path = tmp_path / "venv" / "bin" / program
        return subprocess.run([path, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, check=False)

    for missing in ("torch", "transformers", "omegaconf", "onnx", "pyarrow"):
        assert "ModuleNotFoundError" in run("-c", f"import {missing}", program="python").stderr
    predicted = run("predict", pictures / "scene.png", "--package", package, "--top", 1)
    assert predicted.stdout.endswith(f"  {SCENES[0][1].label}\n"), predicted.stderr
    embedded = run("embed", pictures, tmp_path / "out", "--package", package)
    assert embedded.stderr == "error: Parquet and object stores need pyarrow: pip install 'clip-deploy[parquet]'\n"
    found = run("search", pictures, "a red circle", "--package", package)
    assert found.stdout.endswith("  scene.png\n")
    assert run("verify", package).returncode == 0
    assert run("why").stderr == "error: why needs dvc, which is not installed: pip install 'clip-deploy[pipeline]'\n"


@pytest.mark.parametrize("version", ["1.20.1", "1.9.0", "0.99.0"])
def test_a_runtime_that_computes_other_texts_is_refused(monkeypatch, package, version):
    monkeypatch.setattr("onnxruntime.__version__", version)
    with pytest.raises(
        DeployError, match=rf"onnxruntime is {version}: from 1\.21 on .* pip install 'onnxruntime>=1\.21'"
    ):
        ZeroShotClassifier.open(package)
