"""A server whose images are decoded on a GPU, with a decoder on this CPU in its place."""

import asyncio
import base64
import io

import numpy as np
import pytest
from PIL import Image
from support.gpu_decoder import opened_with_gpu_feed

from clip_deploy.data import scenes
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.web.api import Picture
from clip_deploy.web.errors import RequestError
from clip_deploy.web.metrics import Metrics
from clip_deploy.web.models import Served
from clip_deploy.web.settings import Settings


def written(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


IMAGES = [scenes.render("gpu server", index, index)[0] for index in range(6)]
FILES = [written(image, "jpeg", quality=95) for image in IMAGES[:4]] + [written(image, "png") for image in IMAGES[4:]]


@pytest.fixture
def served(package, monkeypatch):
    return Served("clip", "1", 0, opened_with_gpu_feed(package, monkeypatch), Settings(), Metrics())


def asked(served, files):
    """What the server answers to a request for each file, all at once."""

    async def ask():
        await served.start()
        try:
            items = [Picture(base64.b64encode(content).decode(), f"input[{row}]") for row, content in enumerate(files)]
            return await asyncio.gather(*(served.embed([item]) for item in items), return_exceptions=True)
        finally:
            await asyncio.to_thread(served.close)

    return asyncio.run(ask())


def test_every_image_gets_its_own_embedding_whoever_decodes_it(served, package):
    served.warm_up()
    exact = ZeroShotClassifier.open(package, threads=1).embed_images([Image.open(io.BytesIO(each)) for each in FILES])
    found = np.concatenate([answer.rows for answer in asked(served, FILES * 5)])
    assert (found * np.tile(exact, (5, 1))).sum(axis=1).min() > 0.99
    assert (found @ exact.T).argmax(axis=1).tolist() == list(range(6)) * 5
    assert max(served.classifier.gpu.preprocessing.batches) > 1


def test_what_the_gpu_leaves_and_nobody_reads_is_refused_alone(served):
    torn = FILES[0][: FILES[0].index(b"\xff\xda")] + b"\xff\xd9"  # a header and an end, and nothing between
    found = asked(served, [FILES[0], torn, b"\xff\xd8\xff none", FILES[1]])
    assert [isinstance(answer, RequestError) for answer in found] == [False, True, True, False]
    assert (found[1].status, found[1].param, found[1].code) == (400, "input[1]", "invalid_image")
    assert str(found[1]).startswith("input[1] is not a readable image")
