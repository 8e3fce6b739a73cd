"""Hold `clip-deploy serve` against the package that it serves, on images of the evaluation set and texts."""

import random
from pathlib import Path

import numpy as np
from PIL import Image

from clip_deploy.core.artifact import failure
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.served import HttpAnswers, HttpServed
from clip_deploy.data import scenes
from clip_deploy.data.preprocessed import Prepared, grey_levels
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.web.libraries import check_libraries
from clip_deploy.web.process import running

PICTURES = 64
CAPTIONS = 64
PROMPTS = 256
REQUESTS = 400  # beside every mistake and the first requests of each kind
CLIENTS = (1, 4, 16)


def check_http(package: Path, prepared: Prepared, seed: int) -> HttpServed:
    """What a server of the package answers."""
    try:
        check_libraries()
        classifier = ZeroShotClassifier.open(package, allow_spinning=False)  # the server computes beside it
        answers, reasons = _ask(package, classifier, prepared, seed)
    except UnavailableError as error:
        return HttpServed("unavailable", [str(error)])
    except Exception as error:  # whatever the server and its clients do is this check's result
        return HttpServed("fail", [failure(error)])
    return HttpServed("fail" if reasons else "pass", reasons, answers)


def _ask(package: Path, classifier: ZeroShotClassifier, prepared: Prepared, seed: int) -> tuple[HttpAnswers, list[str]]:
    from clip_deploy.web.load_test import load_test  # the extra's libraries, which are there
    from clip_deploy.web.questions import Pool

    pool = Pool(classifier, pictures(classifier, prepared), texts(classifier), seed)
    questions = [*pool.each(), *pool.draw(REQUESTS, seed)]
    random.Random(seed).shuffle(questions)
    with running(package) as server:
        found = load_test(server, questions, len(questions), clients=CLIENTS)
    return HttpAnswers(list(CLIENTS), pool.min_cosine, found.requests), found.reasons


def pictures(classifier: ZeroShotClassifier, prepared: Prepared) -> list[Image.Image]:
    """Of the set, in the size that the image tower takes.

    Patches do not become pictures again: where the tower takes them, and the images were not kept, scenes are rendered.
    """
    if prepared.images:
        count = min(PICTURES, len(prepared.images))
        return [Image.fromarray(prepared.images[row]) for row in range(count)]
    if classifier.preprocessor is None or prepared.pixel_values.dtype.names:
        return [scenes.render("serving", row, row % len(scenes.CLASSES))[0] for row in range(PICTURES)]
    levels = grey_levels(np.asarray(prepared.pixel_values[:PICTURES]), classifier.preprocessor)
    return [Image.fromarray(image) for image in levels]


def texts(classifier: ZeroShotClassifier) -> list[str]:
    """The package's own prompts, and captions of rendered scenes: a set keeps its captions as tokens alone."""
    captions = [scenes.render("serving", row, row % len(scenes.CLASSES))[1].caption for row in range(CAPTIONS)]
    return [*captions, *classifier.class_prompts()[:PROMPTS]]
