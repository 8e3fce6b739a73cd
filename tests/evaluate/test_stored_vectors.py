import numpy as np
import pytest

from clip_deploy.core.records import Recall
from clip_deploy.data.preprocessed import Contents, Prepared, Texts
from clip_deploy.evaluate.embeddings import Embeddings
from clip_deploy.evaluate.stored_vectors import share_found, stored_vectors

NONE = np.empty((0, 1), dtype=np.float32)


def prepared(caption_text=()):
    ids = np.zeros((len(caption_text), 1), dtype=np.int64)
    return Prepared(
        pixel_values=np.empty((0, 3, 1, 1)),
        captions=Texts(ids, ids),
        caption_image=np.arange(len(caption_text)),
        caption_text=np.array(caption_text, dtype=np.int64),
        prompts=Texts(ids, ids),
        labels=np.empty(0, dtype=np.int64),
        contents=Contents(0, 0, [], [], 0, []),
    )


def random(rows, dimension, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)


def measured(images, texts):
    found = stored_vectors(Embeddings(images, texts, NONE), prepared(range(len(texts))), seed=0)
    return found, {(cost.dimensions, cost.dtype): cost for cost in found.costs}


def test_a_share_counts_those_of_the_k_nearest_that_are_found():
    expected = np.array([[0.9, 0.8, 0.7, 0.1]])
    found = np.array([[0.8, 0.1, 0.7, 0.9]])
    assert share_found(expected, expected, 2) == [1.0]
    assert share_found(found, expected, 1) == [0.0]
    assert share_found(found, expected, 2) == [0.5]
    assert share_found(found, expected, 3) == [2 / 3]


def test_what_ties_for_the_last_places_shares_them():
    expected = np.array([[0.9, 0.8, 0.7, 0.1]])
    assert share_found(np.array([[0.5, 0.5, 0.5, 0.5]]), expected, 1) == [0.25]
    assert share_found(np.array([[0.9, 0.5, 0.5, 0.4]]), expected, 2) == [0.75]
    assert share_found(np.array([[0.4, 0.5, 0.9, 0.5]]), expected, 2) == [0.25]


def test_an_image_that_ties_with_the_kth_at_full_width_is_as_right():
    expected = np.array([[0.9, 0.8, 0.8, 0.1]])
    assert share_found(np.array([[0.9, 0.1, 0.8, 0.2]]), expected, 2) == [1.0]
    assert share_found(np.array([[0.9, 0.8, 0.8, 0.1]]), expected, 2) == [1.0]


def test_every_width_and_type_has_its_bytes_and_its_recall():
    found, costs = measured(random(300, 64), random(100, 64, seed=1))
    assert {name: cost.bytes for name, cost in costs.items()} == {
        (64, "float32"): 256, (64, "float16"): 128, (64, "int8"): 64, (64, "binary"): 8,
        (32, "float32"): 128, (32, "float16"): 64, (32, "int8"): 32, (32, "binary"): 4,
        (16, "float32"): 64, (16, "float16"): 32, (16, "int8"): 16, (16, "binary"): 2,
        (8, "float32"): 32, (8, "float16"): 16, (8, "int8"): 8, (8, "binary"): 1,
    }  # fmt: skip
    assert costs[64, "float32"].recall == dict.fromkeys((1, 5, 10), Recall(100.0, 100.0, 100.0))
    assert 97 < costs[64, "int8"].recall[10].percent < 100
    for k in (1, 5, 10):
        ranked = [costs[name].recall[k].percent for name in ((64, "int8"), (32, "int8"), (16, "int8"), (8, "int8"))]
        assert ranked == sorted(ranked, reverse=True)
        assert costs[64, "binary"].recall[k].percent < costs[64, "int8"].recall[k].percent
    half = costs[32, "float32"].recall[1]
    assert half.low < half.percent < half.high
    assert half.high - half.low == pytest.approx(2 * 1.96 * np.sqrt(half.percent * (100 - half.percent) / 100), rel=0.2)
    assert (found.queries, found.of, found.images, found.dimension, found.left_out) == (100, "captions", 300, 64, [])


def test_numbers_that_only_the_second_half_tells_apart_are_lost_with_it():
    """Four images agree in their first half: cut there, each is found with a chance of one in four."""
    images = np.concatenate([np.ones((4, 8)), 4 * np.eye(4, 8)], axis=1).astype(np.float32)
    _, costs = measured(images, images)
    assert costs[16, "float32"].recall == {1: Recall(100.0, 100.0, 100.0)}  # all five of four images are always found
    assert costs[8, "float32"].recall == {1: Recall(25.0, 25.0, 25.0)}


def test_images_may_be_the_same_and_none_is_at_fault():
    images = np.repeat(random(20, 16), 3, axis=0)
    _, costs = measured(images, images[:10])
    assert costs[16, "float32"].recall == dict.fromkeys((1, 5, 10), Recall(100.0, 100.0, 100.0))
    assert costs[16, "int8"].recall[1].percent == 100


def test_what_cannot_be_stored_is_left_out_with_the_reason():
    found, costs = measured(random(30, 12), random(5, 12, seed=1))
    assert list(costs) == [
        *((12, dtype) for dtype in ("float32", "float16", "int8")),
        *((6, dtype) for dtype in ("float32", "float16", "int8")),
        *((3, dtype) for dtype in ("float32", "float16", "int8")),
    ]
    assert found.left_out == [
        "1/8 of 12 dimensions is not a whole number",
        "binary at 12 dimensions: signs fill bytes, 8 in each",
        "binary at 6 dimensions: signs fill bytes, 8 in each",
        "binary at 3 dimensions: signs fill bytes, 8 in each",
    ]


def test_a_wording_asks_once_and_without_captions_the_prompts_ask():
    images, captions, prompts = random(30, 16), random(4, 16, seed=1), random(6, 16, seed=2)
    found = stored_vectors(Embeddings(images, captions, prompts), prepared([0, 1, 0, 1]), seed=0)
    assert (found.queries, found.of) == (2, "captions")
    found = stored_vectors(Embeddings(images, NONE, prompts), prepared(), seed=0)
    assert (found.queries, found.of) == (6, "prompts")
