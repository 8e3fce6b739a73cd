"""Whether the reference can be the model that was meant: does it answer better than chance, and tell its inputs apart?

Every target is held against the reference, and none of these comparisons asks about the reference itself.
"""

from collections.abc import Iterator
from math import lgamma, log

import numpy as np

from clip_deploy.core.similarity import normalized
from clip_deploy.data.preprocessed import Prepared
from clip_deploy.evaluate.accuracy import caption_scores, class_scores
from clip_deploy.evaluate.embeddings import Embeddings

CONFIDENCE = 0.95
# Median cosine of embeddings with their mean direction. A contrastive loss drives apart what is not alike: the built-in
# model's captions have 0.43, its images 0.47, its prompts 0.75; random weights of its shape 0.92, 0.87, 0.88. Above the
# limit inputs differ less from one another than the gate of FP16 lets a target differ from the reference.
ONE_EMBEDDING = 0.999


def doubts(reference: Embeddings, prepared: Prepared) -> list[str]:
    """What speaks against the reference, in words; for weights that were trained."""
    return [*_at_chance(reference, prepared), *_alike(reference, prepared)]


def _at_chance(reference: Embeddings, prepared: Prepared) -> Iterator[str]:
    """By zero-shot top-1; where there are no classes, by the caption that each image is nearest to."""
    answers, relevant = answered(reference, prepared)
    images, choices = relevant.shape
    rate = chance(answers, relevant)
    right, most = int(relevant[np.arange(images), answers].sum()), most_by_chance(images, rate)
    if choices > 1 and right <= most:
        what = "classes" if prepared.contents.classes else "captions"
        yield (
            f"torch-fp32 itself answers no better than chance: {right} of {images} images right "
            f"({100 * right / images:.1f} %, {choices} {what}), where chance gives {100 * rate:.1f} %, and up to "
            f"{most} images in 97.5 % of cases. Look at its tokenizer, its weights and the {what} before it is shipped"
        )


def answered(reference: Embeddings, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """What each image is nearest to, [images], and which answers are right for it, [images, choices]."""
    if classes := len(prepared.contents.classes):
        return class_scores(reference, classes).argmax(axis=1), np.eye(classes, dtype=bool)[prepared.labels]
    relevant = np.zeros((len(reference.images), int(prepared.caption_text.max()) + 1), dtype=bool)
    relevant[prepared.caption_image, prepared.caption_text] = True
    return prepared.caption_text[caption_scores(reference).argmax(axis=1)], relevant


def chance(answers: np.ndarray, relevant: np.ndarray) -> float:
    """Share of right answers that owes nothing to the images.

    That of guessing all choices alike, 1 / classes, or of these very answers given to other images, whichever is
    more: who always names the commonest class is right as often as it is common.
    """
    given = np.bincount(answers, minlength=relevant.shape[1]) / len(answers)
    return max(float(relevant.mean()), float(relevant.mean(axis=0) @ given))


def most_by_chance(count: int, rate: float) -> int:
    """The upper end of the 95 % interval of a binomial count: more are right by chance in at most 2.5 % of cases."""
    if not 0 < rate < 1:
        return round(count * rate)
    ways = [lgamma(count + 1) - lgamma(k + 1) - lgamma(count - k + 1) for k in range(count + 1)]
    shares = np.exp([way + k * log(rate) + (count - k) * log(1 - rate) for k, way in enumerate(ways)])
    return int(np.searchsorted(shares.cumsum(), 1 - (1 - CONFIDENCE) / 2))


def _alike(reference: Embeddings, prepared: Prepared) -> Iterator[str]:
    """Captions of the same words count once; one input alone says nothing."""
    _, distinct = np.unique(prepared.caption_text, return_index=True)
    texts = reference.captions[distinct] if len(distinct) else reference.prompts
    for name, rows in (("images", reference.images), ("texts", texts)):
        cosine = closeness(rows)
        if len(rows) > 1 and not cosine < ONE_EMBEDDING:
            yield (
                f"torch-fp32 gives all {name} nearly one embedding: their median cosine with the mean is {cosine:.5f}, "
                f"and below {ONE_EMBEDDING} in a trained model"
            )


def closeness(rows: np.ndarray) -> float:
    """Median cosine of embeddings, [rows, dimension], with their mean direction: 1 where all are one."""
    units = normalized(rows)
    return float(np.median(units @ normalized(units.mean(axis=0))))
