"""The GPU feed gives what the checkpoint's own processor does: its kernels everywhere, its decoder where a GPU is."""

import io
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.fast_feed import need_fast_feed

from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.jpeg import Header, Jpeg, whole_jpeg
from clip_deploy.core.preprocessing import Preprocessing

feed = pytest.importorskip("clip_deploy.runtimes.gpu_preprocessing", exc_type=ModuleNotFoundError)

DEVICE = torch.device("cuda" if shutil.which("nvidia-smi") else "cpu")
if DEVICE.type == "cpu":
    feed.ROWS = 32  # fewer programs: the interpreter runs one after the other
LEVEL = 1.0001  # what two ways of rounding differ by, in grey levels


def settings(**changed):
    given = {
        "size": {"shortest_edge": 12},
        "crop": [12, 12],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    return Preprocessing(**given | changed)


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 6), max(2, width // 6), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR), dtype=np.int16)
    return (smooth + rng.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)


def placed(stored, lies=1, pitch=None):
    """A picture as it lies in its file, in the device's memory, its rows `pitch` bytes apart."""
    height, width, _ = stored.shape
    pitch = pitch or 3 * width
    memory = torch.zeros(height * pitch, dtype=torch.uint8)
    for row in range(height):
        memory[row * pitch : row * pitch + 3 * width] = torch.from_numpy(stored[row].reshape(-1))
    memory = memory.to(DEVICE)
    upright = (width, height) if lies in feed.LYING else (height, width)
    return feed.DeviceImage(memory, memory.data_ptr(), pitch, Header(lies, *upright))


def resized(given, images):
    """Pixel values [images, 3, height, width], zeros of those that are None."""
    resizer = feed.Resizer(given, DEVICE)
    pixels = resizer.empty(len(images)).zero_()
    resizer({row: image for row, image in enumerate(images) if image is not None}, pixels)
    return pixels.cpu().numpy()


def jpeg(stored, mode="RGB", **options):
    content = io.BytesIO()
    Image.fromarray(stored).convert(mode).save(content, "jpeg", **{"quality": 92} | options)
    return content.getvalue()


def jpegs_of(files):
    return [whole_jpeg(content) for content in files]


def grey_levels(pixels, given):
    return (pixels - given.offset.reshape(3, 1, 1)) / given.scale.reshape(3, 1, 1)


def assert_alike(actual, expected, given, share=0.03):
    """Within a grey level; and all but a share, which falls on the other side where it is rounded, the same."""
    difference = np.abs(grey_levels(actual, given) - grey_levels(expected, given))
    assert difference.max() <= LEVEL
    assert (difference > 0.01).mean() <= share


@pytest.mark.parametrize(
    "given",
    [
        settings(),
        settings(resample=2),
        settings(resample=1),
        settings(size={"height": 10, "width": 14}, crop=None),
        settings(size={"shortest_edge": 14}, crop=[12, 10]),
        settings(size={"shortest_edge": 8}, crop=[12, 12], fill=127),
        settings(size={"longest_edge": 12}, crop=[12, 12], crop_rounding="even", fill=9),
        settings(size=None, resample=None, crop=[12, 12]),
    ],
    ids=["bicubic", "bilinear", "lanczos", "squash", "crop", "pad", "longest edge", "no resize"],
)
def test_images_of_many_sizes_are_resized_in_one_batch_as_pillow_does(given):
    sizes = [(12, 12), (17, 25), (9, 7), (16, 30)]
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    pixels = resized(given, [placed(each) for each in pictures])
    for actual, each in zip(pixels, pictures, strict=True):
        assert_alike(actual, given(Image.fromarray(each)), given)


@pytest.mark.parametrize("size", [{"shortest_edge": 12}, {"height": 10, "width": 12}])
def test_a_tall_image_is_resized_in_the_order_that_pillow_takes(size):
    given, each = settings(size=size, crop=[10, 12]), picture(40, 13)
    pixels = resized(given, [placed(each), placed(picture(13, 13))])
    assert_alike(pixels[0], given(Image.fromarray(each)), given)


@pytest.mark.parametrize("lies", range(1, 9))
def test_a_picture_is_turned_upright_by_its_strides(lies):
    given, stored = settings(), picture(17, 26)
    image = Image.fromarray(stored)
    image.getexif()[0x0112] = lies
    content = io.BytesIO()
    image.save(content, "png", exif=image.getexif())
    expected = given(ImageOps.exif_transpose(Image.open(content)))
    actual = resized(given, [placed(stored, lies, pitch=80)])[0]
    assert_alike(actual, expected, given)


def test_rows_without_a_picture_are_left_to_the_caller():
    given, each = settings(), picture(15, 23)
    pixels = resized(given, [None, placed(each), None])
    assert_alike(pixels[1], given(Image.fromarray(each)), given)
    assert not pixels[[0, 2]].any()
    assert resized(given, [None, None]).shape == (2, 3, 12, 12)
    assert resized(given, []).shape == (0, 3, 12, 12)


def test_large_pictures_are_decoded_in_calls_that_fit_the_memory():
    side = int(feed.MAX_PIXELS**0.5)
    headers = [(64, 64), (side, side), (side // 2, side), (side // 2, side), (2 * side, side), (8, 8)]
    groups = feed._groups({row: Jpeg(b"", Header(1, *size)) for row, size in enumerate(headers)})
    assert groups == [[0, 5], [1], [2, 3], [4]]


class Picture:
    """What nvImageCodec gives, on the CPU."""

    def __init__(self, pixels):
        self.write(pixels)

    def write(self, pixels):
        self.pixels = pixels
        memory = {"data": (pixels.ctypes.data, False), "shape": pixels.shape, "strides": pixels.strides}
        self.__cuda_array_interface__ = memory


class Decoder:
    """nvImageCodec's verb with simplejpeg; it refuses what `refuses` says."""

    def __init__(self, refuses):
        self.refuses, self.sizes, self.reused = refuses, [], 0

    def decode(self, jpegs, params, cuda_stream, images=None):
        import simplejpeg

        self.sizes.append(len(jpegs))
        found = []
        for row, content in enumerate(jpegs):
            if self.refuses(content):
                found.append(None)
            elif images:
                self.reused += 1
                images[row].write(simplejpeg.decode_jpeg(content))
                found.append(images[row])
            else:
                found.append(Picture(simplejpeg.decode_jpeg(content)))
        return found


@pytest.fixture
def played(monkeypatch):
    """The feed with decoders on the CPU; its engines refuse progressive files, and all refuse some."""
    need_fast_feed()
    monkeypatch.setattr(feed, "MIN_SIDE", 8)
    made = object.__new__(feed.GpuPreprocessing)
    made.resizer = feed.Resizer(settings(), torch.device("cpu"))
    thread = object.__new__(feed.DecoderThread)
    thread.stream, thread.options = SimpleNamespace(synchronize=lambda: None, cuda_stream=0), None
    thread.engines = feed.Buffered(Decoder(lambda content: b"\xff\xc2" in content or b"never" in content))
    thread.rest = feed.Buffered(Decoder(lambda content: b"never" in content))
    thread.turn = nullcontext
    made.local = SimpleNamespace(thread=thread)
    return made


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernels run on the GPU here")
def test_what_the_engines_refuse_others_decode_and_the_rest_is_left(played):
    whole, never = jpeg(picture(17, 21)), jpeg(picture(15, 15), comment=b"never")
    progressive = jpeg(picture(19, 23), progressive=True)
    files = [whole, never, None, progressive, b"none", whole, progressive, whole[:200], whole]
    for _ in range(3):  # the second and third time into the buffers of the time before
        pixels, left = played(jpegs_of(files))
        assert left == [1, 2, 4, 7]
        for row in (0, 3, 5, 6, 8):
            expected = played.resizer.settings(Image.open(io.BytesIO(files[row])))
            assert_alike(pixels[row].numpy(), expected, played.resizer.settings, share=0.1)
    thread = played.local.thread
    assert thread.engines.decoder.sizes == [6, 3, 3, 3, 3]  # of the refused ones no buffers are left
    assert thread.engines.decoder.reused == 2
    played.fill(pixels, 1, np.ones((3, 12, 12), np.float32))
    assert pixels[1].eq(1).all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernels run on the GPU here")
def test_large_pictures_take_no_buffers_and_harm_no_neighbour(played, monkeypatch):
    monkeypatch.setattr(feed, "SMALL", 20 * 20)
    monkeypatch.setattr(feed, "MAX_PIXELS", 40 * 40)
    files = [jpeg(picture(*size, seed)) for seed, size in enumerate([(18, 18), (30, 40), (16, 20), (40, 40), (20, 20)])]
    for _ in range(2):
        pixels = played.preprocess(played.decode(jpegs_of(files))).numpy()
        for row, content in enumerate(files):
            expected = played.resizer.settings(Image.open(io.BytesIO(content)))
            assert_alike(pixels[row], expected, played.resizer.settings, share=0.1)
    assert played.local.thread.engines.decoder.sizes == [3, 1, 1, 3, 1, 1]
    assert played.local.thread.engines.decoder.reused == 3
    assert played([])[0].shape == (0, 3, 12, 12)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (settings(crop=None), "images of one size"),
        (settings(size=None, crop=None, patch_size=16, max_patches=64), "images of one size"),
        (settings(resample=0), "lacks the filter"),
    ],
)
def test_settings_that_the_kernels_lack_are_refused(given, said, monkeypatch):
    monkeypatch.setattr(feed, "is_available", lambda device: True)
    monkeypatch.setattr(feed, "_is_installed", lambda name: True)
    with pytest.raises(UnavailableError, match=said):
        feed.check(given)


def test_a_missing_gpu_or_library_is_named(monkeypatch):
    monkeypatch.setattr(feed, "is_available", lambda device: False)
    with pytest.raises(UnavailableError, match="CUDA GPU"):
        feed.check(settings())
    monkeypatch.setattr(feed, "is_available", lambda device: True)
    monkeypatch.setattr(feed, "LIBRARY", "no_such_place.codec")
    with pytest.raises(UnavailableError, match=r"needs no_such_place.codec: pip install 'clip-deploy\[fast-gpu\]'"):
        feed.check(settings())


def turned(stored, lies):
    exif = Image.Exif()
    exif[0x0112] = lies
    return jpeg(stored, exif=exif)


PHOTO = picture(120, 160)
BIG = picture(1200, 1600)
WHOLE = jpeg(PHOTO)
KINDS = {
    "4:4:4": jpeg(PHOTO, subsampling=0),
    "4:2:2": jpeg(PHOTO, subsampling=1),
    "4:2:0": jpeg(PHOTO, subsampling=2),
    "grey": jpeg(PHOTO, "L"),
    "cmyk": jpeg(PHOTO, "CMYK"),
    "rgb": jpeg(PHOTO, keep_rgb=True),
    "progressive": jpeg(PHOTO, progressive=True),
    "restarts": jpeg(PHOTO, restart_marker_blocks=3),
    "optimised": jpeg(PHOTO, optimize=True),
    "coarse": jpeg(PHOTO, quality=20),
    "odd": jpeg(picture(61, 83)),
    "tiny": jpeg(picture(3, 2)),
    "one pixel": jpeg(np.full((1, 1, 3), 90, np.uint8)),
    "tall": jpeg(picture(400, 60)),
    "big": jpeg(BIG),
    "trailing bytes": WHOLE + bytes(100),
    **{f"lies {lies}": turned(PHOTO, lies) for lies in range(1, 9)},
}
BROKEN = {
    "none": None,
    "no image": b"no image",
    "empty": b"",
    "truncated": WHOLE[: len(WHOLE) // 2],
    "header alone": WHOLE[:300],
    "png": b"\x89PNG\r\n\x1a\n" + bytes(64),
}
LEFT = {"cmyk", "rgb", "tiny", "one pixel", *BROKEN}  # to the CPU, whichever of them it can read


@pytest.fixture(scope="module")
def on_gpu():
    pytest.importorskip("nvidia.nvimgcodec")
    return feed.GpuPreprocessing(settings(size={"shortest_edge": 48}, crop=[48, 48]))


@pytest.mark.gpu
def test_every_kind_of_jpeg_is_decoded_as_pillow_does_or_left_to_the_cpu(on_gpu):
    given, files = on_gpu.resizer.settings, {**KINDS, **BROKEN}
    pixels, left = on_gpu(jpegs_of(files.values()))
    names = list(files)
    assert {names[row] for row in left} == LEFT
    for row, name in enumerate(names):
        if row not in left:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(files[name]))).convert("RGB")
            difference = np.abs(grey_levels(pixels[row].cpu().numpy(), given) - grey_levels(given(image), given))
            assert (difference.max(), difference.mean()) <= (8, 0.5), name


@pytest.mark.gpu
def test_the_same_batch_gives_the_same_bytes(on_gpu):
    files = [content for name, content in KINDS.items() if name not in LEFT] * 4
    first, _ = on_gpu(jpegs_of(files))
    for _ in range(10):
        assert torch.equal(on_gpu(jpegs_of(files))[0], first)


@pytest.mark.gpu
def test_a_damaged_neighbour_changes_nothing(on_gpu):
    alone, _ = on_gpu(jpegs_of([WHOLE] * 8))
    inside = bytearray(WHOLE)
    inside[len(WHOLE) // 2 : len(WHOLE) // 2 + 40] = bytes(40)
    among, left = on_gpu(
        jpegs_of([WHOLE, BROKEN["truncated"], WHOLE, b"", bytes(inside), WHOLE, BROKEN["header alone"], WHOLE])
    )
    assert set(left) >= {1, 3, 6}
    for row in (0, 2, 5, 7):
        assert (among[row] - alone[row]).abs().max() * 255 < 8


@pytest.mark.gpu
def test_two_threads_decode_at_once(on_gpu):
    files = jpegs_of([KINDS["4:2:0"], KINDS["grey"], KINDS["big"]] * 20)
    expected, _ = on_gpu(files)
    with ThreadPoolExecutor(2) as pool:
        for pixels, left in pool.map(on_gpu, [files] * 12):
            assert not left
            assert torch.equal(pixels, expected)
