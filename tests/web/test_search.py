"""The index that is searched over HTTP, and the pictures that are shown of it."""

import asyncio
import json
import os
import threading
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.web import encoded, serving

from clip_deploy.__main__ import main
from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.core.images import read_image
from clip_deploy.data import scenes
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.inference.embed import EmbedSettings, embed_folder
from clip_deploy.inference.index import build_index
from clip_deploy.inference.search import search
from clip_deploy.web import search as module
from clip_deploy.web.errors import RequestError
from clip_deploy.web.search import SIDE, Bounded, Searched, inside, small

TEXT = "a photo of a yellow star"
TURNED = 6  # EXIF: the camera was held upright


@pytest.fixture(scope="module")
def classifier(package):
    return ZeroShotClassifier.open(package, threads=2)


@pytest.fixture(scope="module")
def folder(classifier, tmp_path_factory):
    """Images, what `embed` made of them in `parts`, and an index of that in `index`."""
    base = tmp_path_factory.mktemp("searched")
    (base / "images/below").mkdir(parents=True)
    for number in range(30):
        scenes.render("search", number, number)[0].save(base / "images" / f"{number:02}.png")
    scenes.render("search", 99, 5)[0].save(base / "images/below/ein Stern ☆ & mehr.webp")
    photo().save(base / "images/photo.jpg", exif=exif(), comment=b"secret")
    embed_folder(classifier, base / "images", base / "parts", EmbedSettings(part_size=10))
    build_index(str(base / "parts"), str(base / "index"))
    return base


def photo():
    """Wide, and red on its left, as the sensor has it."""
    image = Image.new("RGB", (1600, 1200), "blue")
    image.paste("red", (0, 0, 800, 1200))
    return image


def exif():
    found = Image.Exif()
    found[0x0112], found[0x010E] = TURNED, "secret"
    return found


@pytest.fixture(scope="module", params=["parts", "index"])
def server(request, package, folder):
    with serving(package, "--index", folder / request.param, "--images", folder / "images") as running:
        yield running


def test_a_text_finds_what_the_search_command_finds(server, classifier, folder):
    assert "and a search of 32 images, at http" in server.said
    status, answer = server.post("/v1/search", {"text": TEXT, "count": 7})
    expected = search(classifier, folder / "parts", TEXT, 7).hits
    assert status == 200
    assert [found["name"] for found in answer["results"]] == [hit.path for hit in expected]
    assert [found["score"] for found in answer["results"]] == pytest.approx([hit.cosine for hit in expected], abs=1e-5)
    assert answer["model"] == server.get("/v1/models")[2]["data"][0]["id"]


def test_an_image_finds_itself_and_what_is_like_it(server, classifier, folder):
    content = (folder / "images/07.png").read_bytes()
    _, answer = server.post("/v1/search", {"image": encoded(Image.open(BytesIO(content)), "PNG"), "count": 32})
    names = [found["name"] for found in answer["results"]]
    assert (names[0], answer["results"][0]["score"]) == ("07.png", pytest.approx(1, abs=1e-4))
    assert sorted(names) == sorted(str(path.relative_to(folder / "images")) for path in walk(folder / "images"))
    images = classifier.embed_images([folder / "images" / name for name in names])
    assert [found["score"] for found in answer["results"]] == pytest.approx(images @ images[0], abs=1e-4)


def walk(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def thumb(image):
    return np.asarray(image.resize((32, 32)), np.float32)


def test_every_picture_is_the_one_of_its_name(server, folder):
    originals = {str(path.relative_to(folder / "images")): thumb(read_image(path)) for path in walk(folder / "images")}
    _, answer = server.post("/v1/search", {"text": TEXT, "count": 32})
    assert len(answer["results"]) == len(originals)
    for found in answer["results"]:
        _, headers, content = server.fetch("GET", found["image"])
        assert headers["content-type"] == "image/jpeg"
        picture = Image.open(BytesIO(content))
        assert max(picture.size) <= SIDE
        shown = thumb(picture)
        assert min(originals, key=lambda name: np.abs(originals[name] - shown).mean()) == found["name"]


def test_a_picture_is_upright_and_holds_nothing_of_its_file_but_pixels(server):
    _, answer = server.post("/v1/search", {"text": TEXT, "count": 32})
    (found,) = [found for found in answer["results"] if found["name"] == "photo.jpg"]
    _, headers, content = server.fetch("GET", found["image"])
    assert b"secret" not in content
    picture = Image.open(BytesIO(content))
    assert picture.size == (SIDE * 3 // 4, SIDE)
    assert not picture.getexif()
    assert picture.getpixel((144, 40))[0] > 200  # what was on the left is on top
    assert headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    "path", ["32", "999999999999999999999", "-1", "1.png", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "", "0/../0x"]
)
def test_no_other_picture_can_be_asked_for(server, path):
    _, answer = server.post("/v1/search", {"text": TEXT, "count": 1})
    known = answer["results"][0]["image"].rpartition("/")[0]
    assert server.get(f"{known}/{path}")[0] == 404
    assert server.get(f"/v1/pictures/{path}")[0] == 404
    assert server.get("/v1/pictures/000000000000/0")[0] == 404  # of another index


def test_a_page_of_another_name_reads_neither_names_nor_pictures(server):
    """Its name may resolve to this machine: then the browser takes it for the server's own."""
    _, answer = server.post("/v1/search", {"text": TEXT, "count": 1})
    address = answer["results"][0]["image"]
    assert server.fetch("GET", address)[0] == 200
    assert server.get(address, host="pictures.example")[0] == 421
    assert server.post("/v1/search", {"text": TEXT}, host="pictures.example")[0] == 421


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "give either text or image, to search by it"),
        ({"text": "a", "image": "b"}, "give either text or image, to search by it"),
        ({"text": " "}, 'text is " ": give words'),
        ({"text": "a", "count": 0}, "count is 0: give a whole number of 1 or more"),
        ({"text": "a", "count": 1001}, "count is 1,001: at most 1,000 are found in one request"),
        ({"image": "no base64!"}, "image is not base64"),
        ({"text": "a", "folder": "/etc"}, "folder is not a field of this request"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(server, body, said):
    status, answer = server.post("/v1/search", body)
    assert (status, answer["error"]["message"][: len(said)]) == (400, said)


def test_an_index_answers_for_the_package_that_made_it(package, folder):
    with serving(f"one={package}", f"two:2={package}", "--index", folder / "index") as server:
        assert server.post("/v1/search", {"text": TEXT, "model": "one"})[0] == 200
        status, answer = server.post("/v1/search", {"text": TEXT, "model": "two"})
        assert (status, answer["error"]["param"]) == (400, "model")
        _, answer = server.post("/v1/search", {"text": TEXT})
        assert [found["image"] for found in answer["results"]] == [None] * 10  # no --images
        models = server.get("/v1/models")[2]["data"]
        assert [model["searched_images"] for model in models] == [32, None]
        assert [model["classes"] for model in models] == [len(scenes.CLASSES)] * 2


def test_without_an_index_there_is_no_search_and_the_page_is_there(package):
    with serving(package) as server:
        status, answer = server.post("/v1/search", {"text": TEXT})
        assert (status, answer["error"]["code"]) == (404, "no_index")
        assert server.get("/v1/pictures/000000000000/0")[0] == 404
        assert server.get("/")[0] == 200


def test_a_search_and_its_pictures_need_the_key(package, folder, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("right-key")
    keys.chmod(0o600)
    given = {"authorization": "Bearer right-key"}
    with serving(package, "--index", folder / "parts", "--images", folder / "images", "--api-key-file", keys) as server:
        assert server.post("/v1/search", {"text": TEXT})[0] == 401
        _, answer = server.post("/v1/search", {"text": TEXT}, **given)
        address = answer["results"][0]["image"]
        assert server.get(address)[0] == 401
        assert server.fetch("GET", address, headers=given)[0] == 200


def served(fingerprint):
    return SimpleNamespace(served=[SimpleNamespace(classifier=SimpleNamespace(fingerprint=fingerprint))])


def test_what_is_no_index_of_these_packages_is_refused(classifier, folder, tmp_path):
    ours, made = served(classifier.fingerprint), classifier.fingerprint[:12]
    for name in ("parts", "index"):
        with pytest.raises(
            DeployError,
            match=rf"{name} was made by another package, {made}, than those .*\(theirs\)",
        ):
            Searched(folder / name, None, served("theirs"))
        Searched(folder / name, folder / "images", ours).close()
    with pytest.raises(DataError, match=r"images holds no embeddings: give a folder that `clip-deploy embed` wrote"):
        Searched(folder / "images", None, ours)
    with pytest.raises(DataError, match=r"nothing is not a folder|nothing does not exist"):
        Searched(tmp_path / "nothing", None, ours)
    (tmp_path / "00.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"--images .* has no file 00.png, as .*index calls it: .* leave --images out"):
        Searched(folder / "index", tmp_path, ours)
    with pytest.raises(DataError, match=r"--images .*photo.jpg .*: give the folder that was embedded"):
        Searched(folder / "index", folder / "images/photo.jpg", ours)


def test_the_command_says_what_is_wrong_with_an_index(package, folder, tmp_path, capsys):
    assert main(["serve", str(package), "--images", str(tmp_path)]) == 1
    assert "--images is given without --index: give --index too" in capsys.readouterr().err
    assert main(["serve", str(package), "--index", "s3://bucket/index"]) == 1
    assert "s3://bucket/index is an address" in capsys.readouterr().err


def test_nothing_outside_of_the_folder_is_shown(tmp_path):
    root = tmp_path / "root"
    (root / "below").mkdir(parents=True)
    for place in (root, tmp_path):
        Image.new("RGB", (20, 10), "red").save(place / "a.png")
    (root / "inside.png").symlink_to(root / "a.png")
    (root / "outside.png").symlink_to(tmp_path / "a.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "circle.png").symlink_to(root / "circle.png")
    (root / "text.png").write_text("<script>alert(1)</script>")
    (root / "vector.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (root / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n")
    os.mkfifo(root / "pipe.png")
    shown = ["a.png", "inside.png", "below/../a.png"]
    assert all(Image.open(BytesIO(small(root, name))).size == (20, 10) for name in shown)
    hidden = ["../a.png", str(tmp_path / "a.png"), "outside.png", "folder/a.png", "below/../../a.png"]
    hidden += ["circle.png", "pipe.png", "below", "gone.png", "", "a.png\0", "x" * 5000]
    assert not any(inside(root, name) for name in hidden)
    for name in [*hidden, "text.png", "vector.svg", "program.eps"]:
        with pytest.raises(RequestError, match="cannot be shown"):
            small(root, name)


def test_a_picture_that_has_gone_or_changed_its_kind_is_told(package, classifier, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        scenes.render("gone", number, number)[0].save(images / f"{number}.png")
    embed_folder(classifier, images, tmp_path / "parts", EmbedSettings())
    (images / "1.png").unlink()
    (images / "2.png").write_text("no image")
    with serving(package, "--index", tmp_path / "parts", "--images", images) as server:
        _, answer = server.post("/v1/search", {"text": TEXT})
        told = {found["name"]: server.fetch("GET", found["image"]) for found in answer["results"]}
    assert {name: status for name, (status, _, _) in told.items()} == {"0.png": 200, "1.png": 404, "2.png": 404}
    assert "1.png cannot be shown" in json.loads(told["1.png"][2])["error"]["message"]


def test_what_waits_is_bounded_and_who_leaves_makes_room(monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", 2)

    async def ask():
        bounded, open_, begun = Bounded(1), threading.Event(), threading.Event()
        calls = [lambda: (begun.set(), open_.wait(30)), lambda: "never"]
        running, waiting = (asyncio.ensure_future(bounded(call)) for call in calls)
        await asyncio.to_thread(begun.wait, 30)
        with pytest.raises(RequestError, match="2 wait already") as refused:
            await bounded(lambda: "too much")
        waiting.cancel()
        await asyncio.wait([waiting])
        again = asyncio.ensure_future(bounded(lambda: "answer"))
        open_.set()
        assert (await running)[1]
        assert await again == "answer"
        assert waiting.cancelled()
        bounded.close()
        return refused.value

    refusal = asyncio.run(ask())
    assert (refusal.status, refusal.headers["retry-after"], refusal.kind) == (429, "1", "rate_limit_error")
