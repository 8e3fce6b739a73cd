import numpy as np
import pytest

from clip_deploy.core.similarity import normalized, similarity


def test_equal_embeddings_have_cosine_one_whatever_their_length():
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    result = similarity(rows * 3, rows)
    assert result["cosine_min"] == pytest.approx(1)
    assert result["finite"]


def test_one_bad_row_shows():
    """A cosine over the flattened batch would hide it."""
    rows = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    turned = rows.copy()
    turned[17] = -turned[17]
    result = similarity(turned, rows)
    assert result["cosine_min"] == pytest.approx(-1)
    assert result["cosine_mean"] == pytest.approx(1 - 2 / 200)


def test_nan_and_infinity_are_found():
    rows = np.ones((3, 2), dtype=np.float32)
    broken = rows.copy()
    broken[1, 0] = np.nan
    broken[2] = np.inf
    result = similarity(broken, rows)
    assert not result["finite"]
    assert result["cosine_min"] == pytest.approx(0)


def test_a_row_of_zeros_stays_zero():
    assert not normalized(np.zeros((1, 4))).any()
