import numpy as np
import pytest
from support.web import encoded, serving

from clip_deploy.data import scenes
from clip_deploy.inference.classifier import ZeroShotClassifier

IMAGES = [scenes.render("web", index, 5 * index)[0] for index in range(5)]
TEXTS = ["a photo of a red circle", "a photo of a yellow star", "a blue square"]


@pytest.fixture(scope="module")
def classifier(package):
    return ZeroShotClassifier.open(package, threads=2)


@pytest.fixture(scope="module")
def server(package):
    with serving(package) as running:
        yield running


def close(found, expected):
    """Whether embeddings are the same but for the last bits, which depend on what else is in a batch."""
    return found.shape == expected.shape and np.abs(found - expected).max() < 1e-5


def test_texts_and_images_get_the_packages_own_embeddings_in_their_order(server, classifier):
    items = [TEXTS[0], {"image": encoded(IMAGES[0], "PNG")}, {"text": TEXTS[1]}, {"image": encoded(IMAGES[1], "PNG")}]
    found = server.embed(input=items)
    assert close(found[[0, 2]], classifier.embed_texts(TEXTS[:2]))
    assert close(found[[1, 3]], classifier.embed_images(IMAGES[:2]))


def test_one_text_is_one_embedding(server, classifier):
    assert close(server.embed(input=TEXTS[2]), classifier.embed_texts(TEXTS[2:]))


def test_models_and_health_are_told(server):
    status, _, found = server.get("/v1/models")
    assert status == 200
    assert [model["id"].partition(":")[0] for model in found["data"]] == ["tiny"]
    assert server.get("/health/live")[2] == {"status": "live"}
    assert server.get("/health/ready")[2] == {"status": "ready"}
