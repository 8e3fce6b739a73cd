import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from clip_deploy.builders.processor_files import write_preprocessor
from clip_deploy.checkpoint.load import load_processor
from clip_deploy.core.artifact import read_target
from clip_deploy.core.errors import DataError
from clip_deploy.core.images import decode, read_image, rgb
from clip_deploy.core.package import read_preprocessing
from clip_deploy.data import scenes

SCENE = scenes.render("test", 0, 7)[0]


def pixels(processor, image):
    return processor.image_processor([image], return_tensors="np")["pixel_values"][0]


@pytest.fixture(scope="module")
def both(family, tmp_path_factory):
    """A checkpoint's own processor, and ours as its package holds it."""
    path = tmp_path_factory.mktemp("preprocessor") / "preprocessor.json"
    processor = load_processor(family)
    write_preprocessor(processor.image_processor, read_target(family).model, path)
    return processor, read_preprocessing(path.parent)


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


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation  # 6: turn by 90 degrees to see it upright
    return exif


ODD = {
    "grey": lambda: (SCENE.convert("L"), "png", {}),
    "grey with alpha": lambda: (SCENE.convert("LA"), "png", {}),
    "CMYK": lambda: (SCENE.convert("CMYK"), "jpg", {}),
    "palette": lambda: (SCENE.quantize(16), "png", {}),
    "palette with transparency": lambda: (SCENE.quantize(16), "png", {"transparency": bytes(range(16))}),
    "one bit": lambda: (SCENE.convert("1"), "png", {}),
    "transparent": lambda: (SCENE.convert("RGBA"), "webp", {"lossless": True}),
    "turned by EXIF": lambda: (SCENE.resize((64, 48)), "jpg", {"exif": turned(6)}),
    "transparent and turned": lambda: (SCENE.convert("RGBA").resize((64, 48)), "webp", {"exif": turned(8)}),
    "animated": lambda: (SCENE, "gif", {"save_all": True, "append_images": [SCENE.rotate(90)]}),
}


@pytest.mark.filterwarnings("ignore:Palette images")  # of the checkpoint's processor
@pytest.mark.parametrize("kind", ODD)
def test_odd_images_become_what_the_checkpoints_processor_makes_of_them(checkpoint, package, tmp_path, kind):
    image, suffix, options = ODD[kind]()
    path = saved(tmp_path, image, suffix, **options)
    ours = read_preprocessing(package)
    with Image.open(path) as given:
        upright = ImageOps.exif_transpose(given)
        assert np.abs(ours(read_image(path)) - pixels(load_processor(checkpoint), upright)).max() < 1e-5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_a_photograph_is_turned_as_the_processor_turns_what_it_opens(checkpoint, package, tmp_path, kind, orientation):
    path = saved(tmp_path, SCENE.resize((64, 48)), kind, exif=turned(orientation))
    ours = read_preprocessing(package)
    expected = pixels(load_processor(checkpoint), str(path))
    assert np.abs(ours(read_image(path)) - expected).max() < 1e-5
    assert np.abs(ours(decode(path.read_bytes(), "")) - expected).max() < 1e-5


def test_a_picture_in_memory_is_taken_as_it_is_as_the_processor_takes_it(checkpoint, package, tmp_path, kinds):
    path = saved(tmp_path, SCENE.resize((64, 48)), "jpg", exif=turned(6))
    ours, processor = (
        read_preprocessing(package),
        load_processor(checkpoint),
    )
    with Image.open(path) as given:
        assert np.abs(ours(rgb(given)) - pixels(processor, given)).max() < 1e-5
    assert (rgb(given).size, read_image(path).size) == ((64, 48), (48, 64))
    off = np.abs(ours(read_image(path)) - pixels(processor, str(path))).max()
    kinds(
        "28: a photograph that EXIF turns",
        before="64 x 48 pixels stay so where transformers, given the path, sees 48 x 64: values differ by up to 3.6",
        now=f"48 x 64 pixels, as transformers' own within {1e-5 if off < 1e-5 else off}",
    )


def test_exif_that_is_damaged_turns_nothing(tmp_path):
    path = saved(tmp_path, SCENE.resize((64, 48)), "jpg", exif=turned(6))
    whole, start = path.read_bytes(), path.read_bytes().index(b"Exif")
    path.write_bytes(whole[: start + 6] + b"\xff" * 8 + whole[start + 14 :])
    assert read_image(path).size == (64, 48)


FORMATS = {  # by the ending under which Pillow writes each
    "jpg": b"\xff\xd8\xff", "webp": b"RIFF", "avif": b"\0\0\0", "jp2": b"\0\0\0\x0cjP", "ppm": b"P6", "png": b"\x89PNG",
    "gif": b"GIF8", "bmp": b"BM", "tiff": b"II*\0", "ico": b"\0\0\1\0", "qoi": b"qoif",
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["picture", "picture.jfif", "picture.jpe", "picture.bin", "picture.png", "a.b.C"])
def test_what_pillow_opens_is_read_by_its_content_under_any_name(tmp_path, kind, name):
    written = saved(tmp_path, SCENE, kind)
    assert written.read_bytes().startswith(FORMATS[kind])
    with Image.open(written) as image:
        expected = np.asarray(image.convert("RGB"))
    (tmp_path / name).write_bytes(written.read_bytes())
    assert np.array_equal(np.asarray(read_image(tmp_path / name)), expected)


def test_a_format_that_no_first_bytes_tell_goes_by_its_ending(tmp_path):
    """Pillow takes for TGA what happens to look like it."""
    path = saved(tmp_path, SCENE, "tga")
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(SCENE))
    assert np.array_equal(np.asarray(read_image(path.rename(tmp_path / "image.TGA"))), np.asarray(SCENE))
    other = (tmp_path / "image.TGA").rename(tmp_path / "image.dat")
    with pytest.raises(
        DataError, match=r"image\.dat is not a readable image \(it may be TGA, and its name does not end so\)"
    ):
        read_image(other)
    assert np.array_equal(
        np.asarray(decode(other.read_bytes(), "row 1")), np.asarray(SCENE)
    )  # of a table, all are images


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)


def test_heic_without_its_library_is_named_with_the_way_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_deploy.core.images.find_spec", lambda name: None)
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(HEIC)
    for read in (lambda: read_image(path), lambda: decode(HEIC, str(path))):
        with pytest.raises(DataError, match=r"IMG_0001\.HEIC is HEIC, .* pillow-heif: pip install pillow-heif$"):
            read()


def test_heic_is_read_where_its_library_is_installed(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: pip install 'clip-deploy[heic]'")
    smooth = Image.linear_gradient("L").convert("RGB").resize((64, 48))
    heif.from_pillow(smooth).save(tmp_path / "photo", quality=95)
    assert np.abs(np.asarray(read_image(tmp_path / "photo"), int) - np.asarray(smooth, int)).max() < 8


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
    "is not a readable image (image file is truncated": damaged,
    "is empty: replace or remove it": lambda folder: written(folder, b""),
    "is not a readable image (of no format that Pillow knows): replace or remove it": lambda folder: written(
        folder, b"<html>not found</html>"
    ),
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
    assert str(caught.value).count(path.name) == 1


@pytest.mark.parametrize("most", [4000, 1000])  # Pillow itself warns of the first and refuses the second
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, most):
    content = io.BytesIO()
    SCENE.save(content, "png")
    path = written(tmp_path, content.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    with pytest.raises(DataError, match=r"4,?096 pixels"):
        read_image(Path(path))
