"""Batches for a GPU, with a decoder on this CPU in the GPU's place."""

import shutil

import pytest
from PIL import Image
from support.gpu_decoder import opened_with_gpu_feed

from clip_deploy.core.errors import DataError, DeployError, UnavailableError
from clip_deploy.data import scenes
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.inference.embed import EmbedSettings, embed_folder
from clip_deploy.runtimes import open_gpu_preprocessing


@pytest.fixture
def classifier(package, monkeypatch):
    return opened_with_gpu_feed(package, monkeypatch)


@pytest.fixture
def pictures(tmp_path):
    """JPEGs, a PNG, two that are none, of which one is called a JPEG, and pictures that are open already."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(12):
        scenes.render("gpu feed", index, index)[0].save(folder / f"{index:02}.jpg", quality=95)
    scenes.render("gpu feed", 12, 12)[0].save(folder / "12.png")
    (folder / "13.jpg").write_bytes(b"\xff\xd8\xff no image")
    (folder / "14.png").write_bytes(b"")
    return sorted(folder.iterdir())


def test_what_the_gpu_does_not_decode_takes_its_place_in_the_order(classifier, package, pictures):
    given = [*pictures, Image.open(pictures[3])]
    found = list(classifier.embed_each(given, 4))
    expected = list(ZeroShotClassifier.open(package, threads=1).embed_each(given, 4))
    assert classifier.gpu.preprocessing.batches == [4, 4, 4, 4]
    for name, actual, exact in zip(given, found, expected, strict=True):
        if isinstance(exact, DataError):
            assert str(actual) == str(exact)
        else:
            assert actual @ exact > 0.99, name
    assert [isinstance(each, DataError) for each in found].count(True) == 2


def test_what_is_prepared_one_by_one_is_decoded_together(classifier, package, pictures):
    given = [*pictures, Image.open(pictures[3])]
    found = classifier.encode_prepared([classifier.prepare(each) for each in given])
    expected = list(classifier.embed_each(given, len(given)))
    assert classifier.gpu.preprocessing.batches == [16, 16]
    for actual, exact in zip(found, expected, strict=True):
        assert str(actual) == str(exact) if isinstance(exact, DataError) else actual @ exact > 0.9999


def test_parts_are_written_of_batches_that_are_read_ahead(classifier, pictures, tmp_path):
    folder, output = pictures[0].parent, tmp_path / "out"
    done = embed_folder(classifier, folder, output, EmbedSettings(batch_size=4, part_size=5))
    assert (done.images, done.embedded_now, len(done.unreadable)) == (15, 13, 2)
    assert sorted(path.name for path in output.iterdir()) == [f"part-0000{number}.parquet" for number in range(3)]
    sizes = sorted(size for size in classifier.gpu.preprocessing.batches if size)
    assert sizes == [1, 1, 1, 4, 4, 4]  # none holds images of two parts


def test_the_gpu_has_the_next_batch_before_the_embeddings_of_one_are_taken(classifier, pictures, monkeypatch):
    expected, order = list(classifier.embed_each(pictures, 4)), []

    def begin_images(pixels):
        number = len([word for word, _ in order if word == "asked"])
        order.append(("asked", number))

        def finish():
            order.append(("taken", number))
            return classifier.encoder.encode_images(pixels)

        return finish

    monkeypatch.setattr(classifier.encoder, "takes_device_tensors", True)
    monkeypatch.setattr(classifier.encoder, "begin_images", begin_images)
    found = list(classifier.embed_each(pictures, 4))
    for actual, exact in zip(found, expected, strict=True):
        assert str(actual) == str(exact) if isinstance(exact, DataError) else (actual == exact).all()
    assert order.index(("asked", 1)) < order.index(("taken", 0))
    assert [number for word, number in order if word == "taken"] == list(range(4))


def test_a_batch_of_nothing_but_damage_is_answered(classifier, pictures):
    assert all(isinstance(each, DataError) for each in classifier.embed_each(pictures[-2:], 2))


def test_the_feed_needs_the_gpu_and_its_libraries(package):
    with pytest.raises(DeployError, match="feed is 'gpu', and the package is opened on cpu: give the device cuda"):
        ZeroShotClassifier.open(package, feed="gpu")
    if not shutil.which("nvidia-smi"):
        with pytest.raises(UnavailableError, match="the feed gpu needs"):
            open_gpu_preprocessing(ZeroShotClassifier.open(package).preprocessor)
