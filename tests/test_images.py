import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_deploy import shapes
from clip_deploy.checkpoint import load_processor
from clip_deploy.core.artifact import read_target
from clip_deploy.core.errors import DataError
from clip_deploy.images import Preprocessor, read_image
from clip_deploy.portable import write_preprocessor

SCENE = shapes.render("test", 0, 7)[0]


def pixels(processor, image):
    return processor.image_processor([image], return_tensors="np")["pixel_values"][0]


@pytest.fixture(scope="module")
def both(family, tmp_path_factory):
    """A checkpoint's own processor, and ours as its package holds it."""
    path = tmp_path_factory.mktemp("preprocessor") / "preprocessor.json"
    processor = load_processor(family)
    write_preprocessor(processor.image_processor, read_target(family).model["image_size"], path)
    return processor, Preprocessor(**json.loads(path.read_text()))


@pytest.mark.parametrize("size", [(64, 64), (301, 97), (97, 302), (640, 480), (20, 31), (1, 1), (3, 500)])
def test_pixels_are_those_of_the_checkpoints_processor(both, size):
    processor, ours = both
    image = SCENE.resize(size)
    expected = pixels(processor, image)
    assert ours(image).dtype == np.float32
    assert np.abs(ours(image) - expected).max() < 1e-5


def saved(tmp_path, image, kind="png", **options):
    path = tmp_path / f"image.{kind}"
    image.save(path, **options)
    return path


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    return exif


ODD = {
    "grey": lambda: (SCENE.convert("L"), "png", {}),
    "grey with alpha": lambda: (SCENE.convert("LA"), "png", {}),
    "CMYK": lambda: (SCENE.convert("CMYK"), "jpg", {}),
    "palette": lambda: (SCENE.quantize(16), "png", {}),
    "palette with transparency": lambda: (SCENE.quantize(16), "png", {"transparency": bytes(range(16))}),
    "one bit": lambda: (SCENE.convert("1"), "png", {}),
    "transparent": lambda: (SCENE.convert("RGBA"), "webp", {"lossless": True}),
    "turned by EXIF": lambda: (SCENE.resize((64, 48)), "jpg", {"exif": rotated()}),
    "animated": lambda: (SCENE, "gif", {"save_all": True, "append_images": [SCENE.rotate(90)]}),
}


@pytest.mark.filterwarnings("ignore:Palette images")  # of the checkpoint's processor
@pytest.mark.parametrize("kind", ODD)
def test_odd_images_become_what_the_checkpoints_processor_makes_of_them(checkpoint, package, tmp_path, kind):
    image, suffix, options = ODD[kind]()
    path = saved(tmp_path, image, suffix, **options)
    ours = Preprocessor(**json.loads((package / "preprocessor.json").read_text()))
    with Image.open(path) as given:
        assert np.abs(ours(read_image(path)) - pixels(load_processor(checkpoint), given)).max() < 1e-5


def test_sixteen_bits_of_grey_keep_their_upper_eight(tmp_path):
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = read_image(saved(tmp_path, Image.fromarray(levels)))
    assert np.array_equal(np.asarray(image)[..., 0], levels >> 8)


def damaged(tmp_path):
    path = saved(tmp_path, SCENE.resize((300, 300)), "jpg")
    path.write_bytes(path.read_bytes()[:2000])
    return path


def written(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    return path


REFUSED = {
    "is no readable image (image file is truncated": damaged,
    "is empty: replace or remove it": lambda folder: written(folder, b""),
    "is no readable image (cannot identify image file": lambda folder: written(folder, b"<html>not found</html>"),
    "is 1 x 1,000,000 pixels: a side may be at most 500 times the other; crop it": lambda folder: saved(
        folder, Image.new("1", (1, 1_000_000))
    ),
    "does not exist: check the path": lambda folder: folder / "missing.png",
    "has pixels of mode F, whose range is unknown": lambda folder: saved(folder, SCENE.convert("F"), "tiff"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_no_image_is_named(tmp_path, said):
    path = REFUSED[said](tmp_path)
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert f"{path} {said}" in str(caught.value)


@pytest.mark.parametrize("most", [4000, 1000])  # Pillow itself warns of the first and refuses the second
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, most):
    content = io.BytesIO()
    SCENE.save(content, "png")
    path = written(tmp_path, content.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    with pytest.raises(DataError, match=r"4,?096 pixels"):
        read_image(Path(path))
