"""What the embeddings are used for: zero-shot classes and retrieval, and whether a target still answers the same."""

from dataclasses import dataclass
from math import comb

import numpy as np

from clip_deploy.core.config import AccuracyBudget
from clip_deploy.core.records import Retrieval, ZeroShot
from clip_deploy.core.similarity import normalized, row_cosines
from clip_deploy.data.preprocessed import Prepared
from clip_deploy.evaluate.embeddings import Embeddings

RESAMPLES = 2000  # of the paired bootstrap


@dataclass(frozen=True)
class Loss:
    """What a change costs: drop of top-1 in percentage points (0 without classes), flips in percent, mean cosine."""

    top1_drop: float
    flips: float
    cosine: float


def zero_shot(actual: Embeddings, reference: Embeddings, prepared: Prepared, seed: int) -> ZeroShot:
    """Classify each image by the nearest class (mean of its templates' embeddings: CLIP paper, section 3.1.4).

    The drop is the reference's top-1 minus the target's, with its 95 % paired bootstrap interval.
    """
    classes = len(prepared.contents.classes)
    scores, expected = class_scores(actual, classes), class_scores(reference, classes)
    labels = prepared.labels
    right, reference_right = scores.argmax(axis=1) == labels, expected.argmax(axis=1) == labels
    low, high = bootstrap_drop(reference_right, right, seed)
    return ZeroShot(
        top1=100 * float(right.mean()),
        top5=100 * float((top(scores, 5) == labels[:, None]).any(axis=1).mean()),
        reference_top1=100 * float(reference_right.mean()),
        top1_drop=100 * float(reference_right.mean() - right.mean()),
        top1_drop_low=low,
        top1_drop_high=high,
        mcnemar_p=mcnemar(reference_right, right),
    )


def class_scores(embeddings: Embeddings, classes: int) -> np.ndarray:
    """Cosine of each image with each class, [images, classes]."""
    prompts = normalized(embeddings.prompts).reshape(classes, -1, embeddings.prompts.shape[1])
    found: np.ndarray = normalized(embeddings.images) @ normalized(prompts.mean(axis=1)).T
    return found


def retrieval(embeddings: Embeddings, prepared: Prepared) -> Retrieval:
    """Recall at 1 and 5 in percent, image to text and text to image; captions of the same words count as one."""
    scores = caption_scores(embeddings)
    texts = [set(prepared.caption_text[prepared.caption_image == row]) for row in range(len(scores))]
    relevant = np.array([[text in own for text in prepared.caption_text] for own in texts])
    return Retrieval(
        image_to_text_r1=recall(scores, relevant, 1),
        image_to_text_r5=recall(scores, relevant, 5),
        text_to_image_r1=recall(scores.T, relevant.T, 1),
        text_to_image_r5=recall(scores.T, relevant.T, 5),
    )


def recall(scores: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """Percent of the rows with something relevant among the k highest scores."""
    return 100 * float(np.take_along_axis(relevant, top(scores, k), axis=1).any(axis=1).mean())


def caption_scores(embeddings: Embeddings) -> np.ndarray:
    """Cosine of each image with each caption, [images, captions]."""
    found: np.ndarray = normalized(embeddings.images) @ normalized(embeddings.captions).T
    return found


def flips(actual: Embeddings, reference: Embeddings, prepared: Prepared) -> float:
    """Percent of the images whose answer (class, or caption where there are no classes) is not the reference's."""
    classes = len(prepared.contents.classes)
    if classes:
        answers = [class_scores(side, classes).argmax(axis=1) for side in (actual, reference)]
    else:
        answers = [prepared.caption_text[caption_scores(side).argmax(axis=1)] for side in (actual, reference)]
    return 100 * float((answers[0] != answers[1]).mean())


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k highest scores of each row, [rows, k]."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def bootstrap_drop(before: np.ndarray, after: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of the drop in percentage points, resampling the images with both answers together.

    An image is lost, gained or neither: to draw how many of each is to draw images.
    """
    lost, gained = discordant(before, after)
    images = len(before)
    shares = np.array([lost, gained, images - lost - gained]) / images
    drawn = np.random.default_rng(seed).multinomial(images, shares, RESAMPLES)
    low, high = np.percentile(drawn[:, 0] - drawn[:, 1], [2.5, 97.5])
    return 100 * float(low) / images, 100 * float(high) / images


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test: are gains and losses equally likely?"""
    lost, gained = discordant(before, after)
    n = lost + gained
    tail = sum(comb(n, k) for k in range(min(lost, gained) + 1))
    found: float = min(1.0, 2 * tail / 2**n)
    return found


def discordant(before: np.ndarray, after: np.ndarray) -> tuple[int, int]:
    """How many answers were right before only, and after only."""
    return int((before & ~after).sum()), int((~before & after).sum())


def accuracy_cost(actual: Embeddings, reference: Embeddings, prepared: Prepared, seed: int) -> Loss:
    """What `actual` loses against the reference."""
    drop = zero_shot(actual, reference, prepared, seed).top1_drop if prepared.contents.classes else 0.0
    cosines = [
        float(row_cosines(ours, theirs).mean())
        for ours, theirs in ((actual.images, reference.images), (actual.texts, reference.texts))
    ]
    return Loss(drop, flips(actual, reference, prepared), float(np.mean(cosines)))


def within_budget(loss: Loss, budget: AccuracyBudget) -> bool:
    """Whether both the drop of top-1, in percentage points, and the flips, in percent, are within the budget."""
    return loss.top1_drop <= budget.max_top1_drop and loss.flips <= budget.max_flips
