import numpy as np
import pytest

from clip_deploy.data.preprocessed import Contents, Prepared, Texts
from clip_deploy.evaluate.accuracy import bootstrap_drop, flips, mcnemar, retrieval, zero_shot
from clip_deploy.evaluate.embeddings import Embeddings

AXES = np.eye(4, dtype=np.float32)


def prepared(labels, caption_text, classes=4):
    empty = Texts(np.empty((0, 1), dtype=np.int64), np.empty((0, 1), dtype=np.int64))
    captions = np.zeros((len(caption_text), 1), dtype=np.int64)
    return Prepared(
        pixel_values=np.empty((len(labels), 3, 1, 1)),
        captions=Texts(captions, captions),
        caption_image=np.arange(len(caption_text)),
        caption_text=np.array(caption_text),
        prompts=empty,
        labels=np.array(labels),
        contents=Contents(0, 0, [f"class {index}" for index in range(classes)], [], 0, []),
    )


def embeddings(images, captions=AXES):
    """Each class is an axis, named by two templates of different lengths."""
    return Embeddings(
        np.array(images, dtype=np.float32), captions, np.repeat(AXES, 2, axis=0) * np.tile([[1], [5]], (4, 1))
    )


def test_zero_shot_counts_right_answers_and_the_drop():
    reference = embeddings(AXES)
    worse = embeddings([AXES[0], AXES[1], AXES[2], AXES[0] * 2 + AXES[3]])
    result = zero_shot(worse, reference, prepared([0, 1, 2, 3], [0, 1, 2, 3]), 0)
    assert result.top1 == 75
    assert result.reference_top1 == 100
    assert result.top1_drop == 25
    assert result.top5 == 100
    assert result.mcnemar_p == 1  # one loss and no gain prove nothing
    assert flips(worse, reference, prepared([0, 1, 2, 3], [0, 1, 2, 3])) == 25


def test_retrieval_takes_captions_of_the_same_words_as_one():
    result = retrieval(embeddings(AXES, AXES[[1, 0, 2, 3]]), prepared([0, 1, 2, 3], [7, 7, 8, 9]))
    assert result.image_to_text_r1 == 100
    result = retrieval(embeddings(AXES, AXES[[1, 0, 2, 3]]), prepared([0, 1, 2, 3], [6, 7, 8, 9]))
    assert result.image_to_text_r1 == 50
    assert result.text_to_image_r5 == 100


def test_without_classes_a_flip_is_another_caption():
    moved = embeddings([AXES[0], AXES[1], AXES[2], AXES[0]])
    assert flips(moved, embeddings(AXES), prepared([], [0, 1, 2, 3], classes=0)) == 25


def test_mcnemar_is_the_exact_binomial():
    before = np.array([True] * 8 + [False] * 2)
    after = np.array([False] * 8 + [True] * 2)
    assert mcnemar(before, after) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar(before, before) == 1


def test_the_drops_interval_holds_the_drop():
    before, after = np.ones(400, dtype=bool), np.ones(400, dtype=bool)
    after[:20] = False
    low, high = bootstrap_drop(before, after, seed=0)
    assert low < 5 < high
    assert low > 2
    assert high < 8


def answers(losses, gains, images):
    """Right or wrong before and after; the rest is right both times."""
    before, after = np.ones(images, dtype=bool), np.ones(images, dtype=bool)
    after[:losses] = before[losses : losses + gains] = False
    return before, after


@pytest.mark.parametrize(
    ("losses", "gains", "p"),
    [  # scipy 1.17.1: binomtest(losses, losses + gains).pvalue
        (1, 0, 1.0),
        (3, 1, 0.625),
        (8, 2, 0.109375),
        (10, 10, 1.0),
        (21, 9, 0.0427739452571),
        (60, 40, 0.056887933641),
        (400, 300, 0.000178476314486),
    ],
)
def test_mcnemars_p_is_scipys(losses, gains, p):
    before, after = answers(losses, gains, 960)
    assert mcnemar(before, after) == pytest.approx(p, rel=1e-11)
    assert mcnemar(after, before) == pytest.approx(p, rel=1e-11)


@pytest.mark.parametrize(
    ("losses", "gains", "images", "low", "high"),
    [  # scipy 1.17.1: bootstrap((change,), np.mean, n_resamples=100_000, method="percentile", rng=0), in points
        (20, 0, 400, 3.0, 7.25),
        (15, 5, 200, 1.0, 9.5),
        (30, 24, 960, -0.8333, 2.0833),
    ],
)
def test_the_bootstrap_agrees_with_scipys_within_its_monte_carlo_error(losses, gains, images, low, high):
    """Which is up to two images: three standard deviations of an end, over seeds, with our 2,000 resamples."""
    found = [bootstrap_drop(*answers(losses, gains, images), seed) for seed in range(3)]
    assert found == [pytest.approx((low, high), abs=2.01 * 100 / images)] * 3


def test_the_drops_interval_covers_the_true_drop():
    """1,000 planted drops of 2 points: 3.5 % of 960 images lost and 1.5 % gained."""
    changes = np.random.default_rng(0).choice(3, p=[0.95, 0.035, 0.015], size=(1000, 960))
    ends = np.array([bootstrap_drop(row != 2, row != 1, seed) for seed, row in enumerate(changes)])
    assert 0.93 <= np.mean((ends[:, 0] <= 2) & (ends[:, 1] >= 2)) <= 0.97
