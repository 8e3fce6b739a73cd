import io

import numpy as np
import pytest

from clip_deploy.inference.text_cache import TextCache, _sealed

A, B, C = (np.full(4, value, dtype=np.float32) for value in (1, 2, 3))


def test_the_least_recently_used_goes_first():
    cache = TextCache("tower", dimension=4, size=2)
    cache.put("a", A)
    cache.put("b", B)
    assert np.array_equal(cache.get("a"), A)
    cache.put("c", C)
    assert cache.get("b") is None
    assert np.array_equal(cache.get("a"), A)
    assert np.array_equal(cache.get("c"), C)


def test_a_batch_is_not_kept_for_one_of_its_rows():
    batch, cache = np.stack([A, B, C]), TextCache("tower", dimension=4, size=2)
    cache.put("b", batch[1])
    assert cache.get("b").base is None
    batch[1] = 0
    assert np.array_equal(cache.get("b"), B)


def test_another_tower_finds_nothing_of_the_first(tmp_path):
    TextCache("one", 4, 2, tmp_path).put("a", A)
    assert TextCache("two", 4, 2, tmp_path).get("a") is None
    assert np.array_equal(TextCache("one", 4, 2, tmp_path).get("a"), A)


def test_the_disk_keeps_what_memory_dropped(tmp_path):
    cache = TextCache("tower", 4, 1, tmp_path)
    cache.put("a", A)
    cache.put("b", B)
    assert np.array_equal(cache.get("a"), A)


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[:-5],
        lambda content: content + b"\0",
        lambda content: bytes([content[0] ^ 1]) + content[1:],  # one bit, and the number stays finite
        lambda content: _sealed(np.full(4, np.nan, np.float32).tobytes()),
        lambda content: _sealed(np.ones(5, np.float32).tobytes()),
        lambda content: b"PK\x03\x04" + content[4:],  # as a torn .npz
        lambda content: npy(A),  # another program's
    ],
    ids=["empty", "cut", "longer", "one bit", "NaN", "another dimension", "zip", "npy"],
)
def test_a_file_that_is_not_what_was_written_counts_as_missing_and_is_written_anew(tmp_path, spoil):
    TextCache("tower", 4, 1, tmp_path).put("a", A)
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    file.write_bytes(spoil(file.read_bytes()))
    fresh = TextCache("tower", 4, 1, tmp_path)
    assert fresh.get("a") is None
    fresh.put("a", B)
    assert np.array_equal(TextCache("tower", 4, 1, tmp_path).get("a"), B)
