import numpy as np

from clip_deploy.text_cache import TextCache

A, B, C = (np.full(4, value, dtype=np.float32) for value in (1, 2, 3))


def test_the_least_recently_used_goes_first():
    cache = TextCache("tower", size=2)
    cache.put("a", A)
    cache.put("b", B)
    assert cache.get("a") is A
    cache.put("c", C)
    assert cache.get("b") is None
    assert cache.get("a") is A
    assert cache.get("c") is C


def test_another_tower_finds_nothing_of_the_first(tmp_path):
    TextCache("one", 2, tmp_path).put("a", A)
    assert TextCache("two", 2, tmp_path).get("a") is None
    assert np.array_equal(TextCache("one", 2, tmp_path).get("a"), A)


def test_the_disk_keeps_what_memory_dropped(tmp_path):
    cache = TextCache("tower", 1, tmp_path)
    cache.put("a", A)
    cache.put("b", B)
    assert np.array_equal(cache.get("a"), A)


def test_a_damaged_file_counts_as_missing_and_is_written_anew(tmp_path):
    cache = TextCache("tower", 1, tmp_path)
    cache.put("a", A)
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:100])
    fresh = TextCache("tower", 1, tmp_path)
    assert fresh.get("a") is None
    fresh.put("a", B)
    assert np.array_equal(TextCache("tower", 1, tmp_path).get("a"), B)
