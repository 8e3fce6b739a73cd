import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.fast_feed import need_fast_feed

from clip_deploy.core import fast_preprocessing
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.fast_preprocessing import FastPreprocessing, check
from clip_deploy.core.preprocessing import Preprocessing

need_fast_feed()
LEVELS = {
    "rescale_factor": 1 / 255,
    "image_mean": [0.0] * 3,
    "image_std": [1 / 255] * 3,
}  # pixel values = grey levels
CROP = Preprocessing({"shortest_edge": 48}, [48, 48], 3, **LEVELS)
SETTINGS = {
    "crop": CROP,
    "crop that pads": Preprocessing({"shortest_edge": 40}, [50, 63], 3, **LEVELS),
    "crop that pads with grey": Preprocessing(
        {"longest_edge": 48}, [48, 48], 3, fill=9, crop_rounding="even", **LEVELS
    ),
    "both sides": Preprocessing({"height": 60, "width": 41}, None, 2, **LEVELS),
    "no crop": Preprocessing({"shortest_edge": 48}, None, 1, **LEVELS),
    "no resize": Preprocessing(None, [50, 51], None, **LEVELS),
}
SIZES = [(400, 301), (300, 401), (193, 195), (131, 99), (96, 96), (48, 48), (50, 47), (29, 30), (8, 131), (1, 3)]


def smooth(height, width):
    """A picture without fine detail: what differs is the arithmetic, and not the filters."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(columns / 9), np.cos(rows / 11), np.sin((rows + columns) / 13)]
    return (128 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def jpeg(pixels, **options):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "jpeg", **{"quality": 95, **options})
    return content.getvalue()


def exact(settings, content):
    with Image.open(io.BytesIO(content)) as image:
        return settings(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pixels_are_about_a_grey_level_off_the_exact_ones(settings, height, width):
    content = jpeg(smooth(height, width), subsampling=0)
    found, expected = FastPreprocessing(settings)(content), exact(settings, content)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 1.5
    assert np.abs(found - expected).max() <= 8


def test_what_is_not_scaled_within_libjpeg_is_nearly_exact_even_where_it_is_noise():
    content = jpeg(np.random.default_rng(0).integers(0, 256, (95, 94, 3), dtype=np.uint8), subsampling=0)
    difference = np.abs(FastPreprocessing(CROP)(content) - exact(CROP, content))
    assert difference.max() <= 3
    assert difference.mean() < 0.3


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(96, 96, 1), (97, 97, 2), (97, 96, 1), (192, 500, 2), (193, 500, 4), (4000, 3000, 4)]
)
def test_a_photo_is_decoded_smaller_where_more_than_the_wanted_pixels_are_left(height, width, scale):
    assert FastPreprocessing(CROP).plan(height, width, 1).scale == scale


@pytest.mark.parametrize("lies", range(1, 9))
@pytest.mark.parametrize(("height", "width"), [(70, 91), (201, 299)])
def test_a_photograph_is_turned_upright(lies, height, width):
    exif = Image.Exif()
    exif[0x0112] = lies
    content = jpeg(smooth(height, width), subsampling=0, exif=exif)
    assert np.abs(FastPreprocessing(CROP)(content) - exact(CROP, content)).mean() < 1


def test_grey_progressive_and_subsampled_files_are_read_too():
    pixels = smooth(160, 120)
    grey = jpeg(pixels[..., 0])
    for content in (grey, jpeg(pixels, progressive=True), jpeg(pixels, subsampling=2), jpeg(pixels, subsampling=1)):
        assert np.abs(FastPreprocessing(CROP)(content) - exact(CROP, content)).mean() < 1.5
    red, green, blue = FastPreprocessing(CROP)(grey)
    assert np.array_equal(red, green)
    assert np.array_equal(red, blue)


def test_patches_of_images_in_their_proportions_are_cut_too():
    settings = Preprocessing(None, None, 2, patch_size=8, max_patches=20, **LEVELS)
    content = jpeg(smooth(100, 170), subsampling=0)
    found, expected = FastPreprocessing(settings)(content), exact(settings, content)
    assert found["spatial_shapes"].tolist() == expected["spatial_shapes"].tolist() == [3, 6]
    assert np.array_equal(found["pixel_attention_mask"], expected["pixel_attention_mask"])
    assert np.abs(found["pixel_values"] - expected["pixel_values"]).mean() < 1


@pytest.mark.parametrize("colours", ["CMYK", "RGB"])
def test_files_of_rare_colours_are_left_to_pillow(colours):
    content = io.BytesIO()
    image = Image.fromarray(smooth(60, 60))
    image.convert("CMYK").save(content, "jpeg") if colours == "CMYK" else image.save(content, "jpeg", keep_rgb=True)
    assert FastPreprocessing(CROP)(content.getvalue()) is None


def test_damaged_files_are_left_to_pillow_which_says_what_is_wrong():
    content = jpeg(smooth(160, 120))
    for broken in (
        content[: len(content) // 2],
        content[:20],
        content[:300] + bytes(40) + content[300:],
        b"\xff\xd8\xff",
    ):
        assert FastPreprocessing(CROP)(broken) is None


def test_what_is_too_large_or_too_thin_is_left_to_pillow(monkeypatch):
    content = jpeg(smooth(60, 60))
    assert FastPreprocessing(CROP)(content) is not None
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 3599)
    assert FastPreprocessing(CROP)(content) is None
    monkeypatch.undo()
    assert FastPreprocessing(CROP)(jpeg(smooth(2, 1000))) is not None
    assert FastPreprocessing(CROP)(jpeg(smooth(2, 1001))) is None


def test_no_crop_is_enlarged_by_the_resizer():
    """fast_image_resize 6.1 reads behind its buffer there: 24 pixels out of the middle of 8 x 131 ended the process."""
    settings = Preprocessing({"shortest_edge": 24}, [24, 24], 3, **LEVELS)
    plan = FastPreprocessing(settings).plan(8, 131, 1)
    assert (plan.made, plan.cut, plan.kept) == ((24, 393), (0, 184), (24, 24))
    assert plan.options.crop_box is None


def test_a_missing_library_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(fast_preprocessing, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError) as error:
        check(CROP)
    assert str(error.value) == ("the fast feed needs simplejpeg and cykooz_resizer: pip install 'clip-deploy[fast]'")


def test_a_filter_that_the_resizer_lacks_is_refused():
    with pytest.raises(UnavailableError, match="this checkpoint resizes with the filter hamming"):
        check(Preprocessing({"shortest_edge": 48}, None, 5, **LEVELS))
