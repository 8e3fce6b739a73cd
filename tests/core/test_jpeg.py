"""What is read of a JPEG's header is what libjpeg and Pillow read of it."""

import io

import numpy as np
import pytest
from PIL import Image
from support.fast_feed import need_fast_feed

from clip_deploy.core.jpeg import Header, orientation, read_header, whole_jpeg

need_fast_feed()
PHOTO = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
XMP = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'


def saved(pixels=PHOTO, mode="RGB", **options):
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, "jpeg", **options)
    return content.getvalue()


def segment(marker, content):
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def with_first(content, *segments):
    """With segments behind the marker of the file's begin."""
    return content[:2] + b"".join(segments) + content[2:]


def exif(lies):
    told = Image.Exif()
    told[0x0112] = lies
    return told


def adobe(transform):
    return segment(0xEE, b"Adobe" + bytes(6) + bytes([transform]))


def numbered(content, numbers):
    """With other numbers of the channels, in the frame and in the scans."""
    frame, scan = content.index(b"\xff\xc0"), content.index(b"\xff\xda")
    changed = bytearray(content)
    for index, number in enumerate(numbers):
        changed[frame + 10 + 3 * index] = changed[scan + 5 + 2 * index] = number
    return bytes(changed)


PLAIN = saved().replace(JFIF, b"")
FILES = {
    "as Pillow saves it": saved(),
    "grey": saved(mode="L"),
    "cmyk": saved(mode="CMYK"),
    "rgb, as Adobe says": saved(keep_rgb=True),
    "rgb, as its channels are called": numbered(PLAIN, b"RGB"),
    "channels of other names": numbered(PLAIN, (1, 34, 35)),
    "channels of RGB's names in JFIF": numbered(saved(), b"RGB"),
    "neither JFIF nor Adobe": PLAIN,
    "YCbCr, as Adobe says": with_first(PLAIN, adobe(1)),
    "RGB, as Adobe says, beside JFIF": with_first(saved(), adobe(0)),
    "a short word of Adobe's": with_first(PLAIN, segment(0xEE, b"Adobe\0\0")),
    "progressive": saved(progressive=True),
    "4:2:0": saved(subsampling=2),
    "restarts": saved(restart_marker_blocks=2),
    "a comment that looks like a frame": saved(comment=b"\xff\xc0\x00\x11\x08\x00\x01\x00\x01"),
    "a preview in EXIF": saved(exif=exif(1).tobytes() + saved(PHOTO[:8, :8])),
    "fill bytes": saved().replace(b"\xff\xdb", b"\xff\xff\xff\xdb"),
    "more behind the end": saved() + bytes(100),
    "1 x 1": saved(PHOTO[:1, :1]),
    **{f"lies {lies}": saved(exif=exif(lies)) for lies in range(1, 9)},
}


def told_by_libraries(content):
    """Simplejpeg's colours and size, and how Pillow says that the picture lies."""
    import simplejpeg

    height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    with Image.open(io.BytesIO(content)) as image:
        lies = image.getexif().get(0x0112, 1)
    return colours, Header(lies, *((width, height) if lies >= 5 else (height, width)))


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_header_is_read_as_libraries_read_it(content):
    colours, expected = told_by_libraries(content)
    assert read_header(content) == (expected if colours in ("YCbCr", "Gray") else None)
    assert orientation(content) == expected.lies


def test_both_kinds_of_colours_are_among_the_files():
    left = {name for name, content in FILES.items() if read_header(content) is None}
    assert left == {"cmyk", "rgb, as Adobe says", "rgb, as its channels are called"}


def test_xmp_says_how_a_picture_lies_where_exif_does_not():
    content = with_first(saved(), segment(0xE1, XMP))
    assert read_header(content) == told_by_libraries(content)[1] == Header(6, 64, 40)


NO_FRAME = saved().replace(b"\xff\xc0", b"\xff\xed")
BROKEN = {
    "no image": b"no image",
    "empty": b"",
    "its begin alone": b"\xff\xd8\xff",
    "no pixels": saved()[:300],
    "no frame": NO_FRAME,
    "two frames": with_first(saved(), segment(0xC0, saved()[saved().index(b"\xff\xc0") + 4 :][:15])),
    "a frame that is cut": saved().replace(b"\xff\xc0\x00\x11", b"\xff\xc0\x00\x04"),
    "a short frame": with_first(NO_FRAME, segment(0xC0, b"\x08\0")),
    "a frame of more channels than it has": with_first(NO_FRAME, segment(0xC0, b"\x08\0\x28\0\x40\3" + bytes(6))),
    "no height": saved().replace(b"\xff\xc0\x00\x11\x08\x00\x28", b"\xff\xc0\x00\x11\x08\x00\x00"),
    "12 bits": saved().replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c"),
    "arithmetic code": saved().replace(b"\xff\xc0", b"\xff\xc9"),
    "a segment of no length": with_first(saved(), b"\xff\xe2\x00\x00"),
    "a transform that Adobe lacks": with_first(PLAIN, adobe(7)),
    "a short JFIF": with_first(numbered(PLAIN, b"RGB"), segment(0xE0, b"JFIF\0\1")),
    "bytes between segments": with_first(saved(), b"\0\0\0"),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_is_damaged_or_rare_is_left_to_pillow(content):
    assert read_header(content) is None


def test_a_file_without_its_end_is_left_to_pillow():
    assert whole_jpeg(saved()) == (saved(), Header(1, 40, 64))
    assert whole_jpeg(saved() + bytes(1000)) is not None
    assert whole_jpeg(saved() + bytes(2000)) is None
    assert whole_jpeg(saved()[:-2]) is None
    assert whole_jpeg(None) is None


def test_whatever_bytes_are_damaged_the_size_is_that_of_the_picture():
    import simplejpeg

    rng, content, decoded = np.random.default_rng(0), saved(exif=exif(6)), 0
    for _ in range(3000):
        damaged = bytearray(content)
        for place in rng.integers(2, content.index(b"\xff\xda") + 4, rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        header = read_header(bytes(damaged))
        try:
            pixels = simplejpeg.decode_jpeg(bytes(damaged))
        except Exception:  # whatever the library says
            continue
        if header:
            decoded += 1
            assert pixels.shape[:2] == header.as_stored(header.height, header.width)
    assert decoded > 500
