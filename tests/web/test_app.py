import asyncio
import base64
import gzip
import json
from io import BytesIO

import numpy as np
import openai
import pytest
from PIL import Image
from support.web import encoded, serving, vectors

from clip_deploy.core.vectors import cut
from clip_deploy.data import scenes
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.web.app import create_app
from clip_deploy.web.settings import Settings

IMAGES = [scenes.render("web", index, 5 * index)[0] for index in range(5)]
PNGS = [encoded(image, "PNG") for image in IMAGES]
TEXTS = ["a photo of a red circle", "a photo of a yellow star", "a blue square"]
LIMITS = ["--max-body-mb", 1, "--max-megapixels", 1, "--max-items", 8]


@pytest.fixture(scope="module")
def classifier(package):
    return ZeroShotClassifier.open(package, threads=2)


@pytest.fixture(scope="module")
def server(package):
    with serving(package, *LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def model(server):
    return server.get("/v1/models")[2]["data"][0]["id"]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def close(found, expected):
    """Whether embeddings are the same but for the last bits, which depend on what else is in a batch."""
    return found.shape == expected.shape and np.abs(found - expected).max() < 1e-3


def test_texts_and_images_get_the_packages_own_embeddings_in_their_order(server, classifier):
    items = [TEXTS[0], {"image": PNGS[0]}, {"text": TEXTS[1]}, {"image": PNGS[1]}]
    found = server.embed(input=items)
    assert close(found[[0, 2]], classifier.embed_texts(TEXTS[:2]))
    assert close(found[[1, 3]], classifier.embed_images(IMAGES[:2]))


def test_one_text_or_image_needs_no_list(server, classifier):
    assert close(server.embed(input={"text": TEXTS[0]}), classifier.embed_texts(TEXTS[:1]))
    assert close(server.embed(input={"image": PNGS[0]}), classifier.embed_images(IMAGES[:1]))


@pytest.mark.parametrize("asked", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_openais_client_reads_floats_and_base64(client, model, classifier, asked):
    answer = client.embeddings.create(model=model, input=TEXTS, **asked)
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert close(vectors([item.embedding for item in answer.data]), classifier.embed_texts(TEXTS))
    assert answer.model == model
    tokens = classifier.tokenizer(TEXTS)["attention_mask"].sum()
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens


def test_openais_client_embeds_one_text_and_cuts_dimensions(client, model, classifier):
    answer = client.embeddings.create(model=model, input=TEXTS[2], dimensions=16, user="somebody")
    assert close(vectors([answer.data[0].embedding]), cut(classifier.embed_texts(TEXTS[2:]), 16))


def test_openais_client_raises_its_own_errors(client, model):
    with pytest.raises(openai.NotFoundError, match="is not served"):
        client.embeddings.create(model="another", input="a")
    with pytest.raises(openai.BadRequestError, match="token arrays are not accepted") as caught:
        client.embeddings.create(model=model, input=[1, 2, 3])
    assert caught.value.param == "input"


def test_openais_client_retrieves_a_model(client, model):
    name = model.partition(":")[0]
    assert client.models.retrieve(model).id == client.models.retrieve(name).id == model
    with pytest.raises(openai.NotFoundError, match="model 'another' is not served"):
        client.models.retrieve("another")


DATA_URI = f"data:image/png;base64,{PNGS[0]}"
PART = {"type": "image_url", "image_url": {"url": DATA_URI}}
SHAPES = {
    "Jina's base64": {"input": [{"image": PNGS[0]}]},
    "Jina's data URI": {"input": [{"image": DATA_URI}], "normalized": True, "embedding_type": "base64"},
    "infinity's text": {"input": DATA_URI, "modality": "image"},
    "infinity's list": {"input": [DATA_URI], "modality": "image", "encoding_format": "float"},
    "vLLM's messages": {"messages": [{"role": "user", "content": [PART]}], "encoding_format": "float"},
    "vLLM's empty text": {"messages": [{"role": "user", "content": [PART, {"type": "text", "text": ""}]}]},
    "parts as items": {"input": [PART]},
    "base64 in lines": {"input": [{"image": base64.encodebytes(base64.b64decode(PNGS[0])).decode()}]},
    "null for nothing": {"input": [{"image": PNGS[0]}], "dimensions": None, "user": None, "model": None},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_may_come_in_every_shape_that_clients_know(server, classifier, shape):
    assert close(server.embed(**SHAPES[shape]), classifier.embed_images(IMAGES[:1]))


@pytest.mark.parametrize("content", [TEXTS[0], [{"type": "text", "text": TEXTS[0]}]])
def test_a_message_may_be_a_text(server, classifier, content):
    assert close(server.embed(messages=[{"role": "user", "content": content}]), classifier.embed_texts(TEXTS[:1]))


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {})])
def test_formats_of_images_are_read_as_the_package_reads_them(server, classifier, tmp_path, kind, options):
    content = encoded(IMAGES[1], kind, **options)
    (tmp_path / f"image.{kind.lower()}").write_bytes(base64.b64decode(content))
    expected = classifier.embed_images([tmp_path / f"image.{kind.lower()}"])
    assert close(server.embed(input=[{"image": content}]), expected)


def test_a_picture_that_lies_on_its_side_is_turned(server, classifier, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    IMAGES[2].save(tmp_path / "a.jpg", exif=exif)
    content = base64.b64encode((tmp_path / "a.jpg").read_bytes()).decode()
    assert close(server.embed(input=[{"image": content}]), classifier.embed_images([tmp_path / "a.jpg"]))


def test_labels_come_by_probability_in_the_template(server, classifier, model):
    labels, template = ["red circle", "yellow star", "blue square"], "a photo of a {}"
    status, found = server.post("/v1/zero-shot", {"image": PNGS[0], "labels": labels, "template": template})
    assert status == 200
    assert found["model"] == model
    expected = classifier.predict(IMAGES[0], [template.replace("{}", label) for label in labels])
    assert [template.replace("{}", item["label"]) for item in found["labels"]] == [text for text, _ in expected]
    assert np.allclose([item["probability"] for item in found["labels"]], [share for _, share in expected], atol=1e-3)


def test_without_labels_the_packages_own_are_asked(server, classifier):
    status, found = server.post("/v1/zero-shot", {"image": PNGS[3]})
    expected = classifier.predict(IMAGES[3])
    assert status == 200
    assert [item["label"] for item in found["labels"][:3]] == [text for text, _ in expected[:3]]
    assert len(found["labels"]) == len(expected)
    assert np.allclose([item["probability"] for item in found["labels"]], [share for _, share in expected], atol=1e-3)


def test_a_template_is_no_format_string(server, classifier):
    template = "{0.__class__} {} {}"
    status, found = server.post("/v1/zero-shot", {"image": PNGS[0], "labels": ["a", "b"], "template": template})
    expected = classifier.predict(IMAGES[0], [template.replace("{}", label) for label in "ab"])
    assert status == 200
    assert np.allclose([item["probability"] for item in found["labels"]], [share for _, share in expected], atol=1e-3)


@pytest.mark.parametrize("query", [TEXTS[0], {"text": TEXTS[0]}, {"image": PNGS[4]}])
def test_documents_are_ranked_by_their_cosine(server, classifier, query):
    documents = [{"image": PNGS[0]}, TEXTS[1], {"image": PNGS[1]}, {"text": TEXTS[2]}]
    status, found = server.post("/v1/rank", {"query": query, "documents": documents})
    images, texts = classifier.embed_images(IMAGES), classifier.embed_texts(TEXTS)
    asked = images[4] if query == {"image": PNGS[4]} else texts[0]
    expected = np.stack([images[0], texts[1], images[1], texts[2]]) @ asked
    assert status == 200
    assert [item["index"] for item in found["results"]] == np.argsort(-expected).tolist()
    assert np.allclose([item["relevance_score"] for item in found["results"]], sorted(expected)[::-1], atol=1e-3)
    few = server.post("/v1/rank", {"query": query, "documents": documents, "top_n": 2})[1]
    assert few["results"] == found["results"][:2]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_rerank_is_rank_by_the_name_that_clients_know(server, path):
    given = [TEXTS[1], {"text": TEXTS[2]}, {"image": PNGS[0]}]
    body = {"query": TEXTS[0], "documents": given, "model": None}
    plain = server.post("/v1/rank", body)[1]["results"]
    status, found = server.post(path, {**body, "top_n": 2, "return_documents": True})
    assert status == 200
    assert found["results"] == [
        {**result, "document": {"text": TEXTS[1]} if result["index"] == 0 else given[result["index"]]}
        for result in plain[:2]
    ]
    assert server.post(path, {**body, "return_documents": False})[1]["results"] == plain
    assert not any("document" in result for result in plain)


def test_models_health_and_documentation_are_told(server, classifier):
    status, _, found = server.get("/v1/models")
    assert status == 200
    (model,) = found["data"]
    assert model["id"] == f"{classifier.package.origin.run.model}:{classifier.fingerprint[:12]}"
    assert (model["dimensions"], model["fingerprint"]) == (64, classifier.fingerprint)
    assert server.get("/health/live")[2] == {"status": "live"}
    assert server.get("/health/ready")[2] == {"status": "ready"}
    paths = server.get("/openapi.json")[2]["paths"]
    assert {"/v1/embeddings", "/v1/zero-shot", "/v1/rank"} < set(paths)
    _, headers, page = server.ask("GET", "/docs")
    assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    for field in (
        "embedding_type",
        "normalized",
        "return_documents",
        "at most 1,000, default 10",
        "list of these; at most 8",
    ):
        assert field in page
    limits = "8 texts and images, 1 MB and 30 s of a request, 1 million pixels of an image"
    assert limits in page
    assert limits in server.get("/openapi.json")[2]["info"]["description"]
    assert "text or list" not in page
    assert all(f"<td>{status}<td>" in page for status in (405, 421))
    assert all(path in page for path in paths)
    assert "src=" not in page
    assert "http" not in page.replace("https URL", "")


def test_what_happens_is_counted(server, model):
    requests = 'clip_requests_total{route="/v1/embeddings",status="%d"}'
    cache = f'clip_text_cache_total{{model="{model}",result="%s"}}'
    names = [requests % 200, requests % 400, cache % "hit", cache % "miss"]
    before = [server.metric(name) for name in names]
    server.embed(input=["a text that was never seen", "another such text"])
    server.embed(input="another such text")
    server.post("/v1/embeddings", {"input": ""})
    assert [server.metric(name) - count for name, count in zip(names, before, strict=True)] == [2, 1, 1, 2]
    for stage in ("prepare", "queue", "encode"):
        assert server.metric(f'clip_stage_seconds_count{{model="{model}",stage="{stage}",tower="vision"}}') > 0
    assert server.metric(f'clip_queue_rows{{model="{model}",tower="text"}}') == 0
    assert 'clip_model_info{fingerprint="' in server.get("/metrics")[2]


@pytest.mark.parametrize(
    ("method", "path", "host", "route", "status"),
    [
        ("GET", "/v1/models", "localhost", "/v1/models", 200),
        ("GET", "/v1/models/none", "localhost", "/v1/models/{model:path}", 404),
        ("GET", "/v1/pictures/0/1", "localhost", "/v1/pictures/{version}/{row:int}", 404),
        ("GET", "/metrics", "localhost", "/metrics", 200),
        ("GET", "/v1/rank", "localhost", "/v1/rank", 405),
        ("POST", "/v1/models", "localhost", "/v1/models", 405),
        ("GET", "/nowhere/1", "localhost", "other", 404),
        ("POST", "/nowhere/2", "localhost", "other", 404),
        ("GET", "/v1/models", "a.example.com", "other", 421),
    ],
)
def test_requests_of_every_kind_are_counted_by_their_route(server, method, path, host, route, status):
    name = f'clip_requests_total{{route="{route}",status="{status}"}}'
    before = server.metric(name)
    assert server.ask(method, path, headers={"host": host})[0] == status
    assert server.metric(name) - before == (2 if path == "/metrics" else 1)
    assert "nowhere" not in server.get("/metrics")[2]


@pytest.mark.parametrize(("path", "root"), [("/v1/rank", ""), ("/clip/v1/rank", "/clip"), ("/clip/v1/rank", "/clip/")])
def test_a_post_under_a_prefix_is_counted_once(package, path, root):
    app, statuses = create_app(Settings(packages=(str(package),), threads=1)), []

    async def receive():
        return {"type": "http.request", "body": b"{", "more_body": False}

    async def send(message):
        statuses.append(message.get("status"))

    scope = {"type": "http", "method": "POST", "path": path, "root_path": root, "query_string": b""}
    asyncio.run(app(scope | {"headers": [(b"content-type", b"application/json")]}, receive, send))
    assert statuses[0] == 400
    lines = [line for line in app.state.api.metrics.text().decode().splitlines() if "requests_total{" in line]
    assert lines == ['clip_requests_total{route="/v1/rank",status="400"} 1.0']


def bomb(side):
    """A small PNG of many pixels."""
    return encoded(Image.new("L", (side, side)), "PNG")


def nested(levels):
    """An item whose text is an item, and so on."""
    return {"text": nested(levels - 1) if levels else "a"}


REFUSED = {
    "no JSON": (b"{", 400, "is not JSON"),
    "a list": ([], 400, "give a JSON object"),
    "deep JSON": (b"[" * 100_000, 400, "is not JSON"),
    "a deep item": ({"input": nested(900)}, 400, r"input\.text is nested too deeply: give words"),
    "a deep field": ({"input": "a", "dimensions": [nested(900)]}, 400, "dimensions is nested too deeply"),
    "a part of both kinds": ({"input": [PART | {"text": "a"}]}, 400, r"input\[0\] has a text and an image_url"),
    "half a letter": (b'{"input": "\xff"}', 400, r"is not UTF-8 \(byte 11\): JSON is sent as UTF-8"),
    "no input": ({}, 400, "input is missing"),
    "a number": ({"input": 3}, 400, "input is 3: give a text, or a list of one or more"),
    "an empty list": ({"input": []}, 400, r"input is \[\]: give a text, or a list"),
    "input and messages": ({"input": "a", "messages": []}, 400, "input and messages are both given: give either"),
    "base64 for a text": ({"input": [PNGS[0]]}, 400, "is an image in the place of a text"),
    "base64 as a text": ({"input": [{"text": PNGS[0]}]}, 400, "is an image in the place of a text"),
    "a URL for a text": ({"input": "https://example.com/a.JPG?b"}, 400, "input is the URL of an image: give {"),
    "an empty text": ({"input": ["a", " "]}, 400, r"input\[1\] is \" \": give words"),
    "tokens": ({"input": [1, 2]}, 400, "token arrays are not accepted"),
    "lists of tokens": ({"input": [[1], [2]]}, 400, "token arrays are not accepted"),
    "a long text": ({"input": "a " * 20_000}, 400, "has 40,000 characters: at most 32,768"),
    "a misspelt field": ({"input": "a", "dimension": 3}, 400, "dimension is not a field"),
    "a model that is no text": ({"input": "a", "model": 3}, 400, "model is 3"),
    "another model": ({"input": "a", "model": "gpt"}, 404, "model 'gpt' is not served"),
    "another format": ({"input": "a", "encoding_format": "int8"}, 400, 'encoding_format is "int8": accepted are float'),
    "too many dimensions": ({"input": "a", "dimensions": 65}, 400, "dimensions is 65: the package's .* have 64"),
    "no dimensions": ({"input": "a", "dimensions": 0}, 400, "dimensions is 0"),
    "true dimensions": ({"input": "a", "dimensions": True}, 400, "dimensions is true"),
    "another length": ({"input": "a", "normalized": False}, 400, "have unit length here"),
    "another modality": ({"input": "a", "modality": "audio"}, 400, 'modality is "audio"'),
    "too many items": ({"input": ["a"] * 9}, 413, "input has 9: at most 8"),
    "an image as a text": ({"input": DATA_URI}, 400, "is an image in the place of a text"),
    "both": ({"input": [{"text": "a", "image": PNGS[0]}]}, 400, "give either text or image"),
    "two parts": ({"messages": [{"content": [PART, PART]}]}, 400, "has 2 parts: give one text or one image"),
    "two messages": ({"messages": [{"content": "a"}] * 2}, 400, "messages: give one"),
    "another part": ({"input": [{"type": "video"}]}, 400, 'type is "video": accepted are text and image_url'),
    "not base64": ({"input": [{"image": "*"}]}, 400, r"input\[0\].image is not base64"),
    "cut base64": ({"input": [{"image": PNGS[0][:-1]}]}, 400, "is not base64"),
    "letters of no ASCII": ({"input": [{"image": "é" * 8}]}, 400, "is not base64"),
    "a data URI of text": ({"input": [{"image": "data:image/svg+xml,<svg/>"}]}, 400, "without ;base64"),
    "no image": ({"input": [{"image": "aGVsbG8="}]}, 400, r"is not a readable image \(accepted are JPEG, PNG,"),
    "JPEG 2000": ({"input": [{"image": encoded(IMAGES[0], "JPEG2000")}]}, 400, "accepted are JPEG, PNG,"),
    "nothing": ({"input": [{"image": "data:image/png;base64,"}]}, 400, "is empty"),
    "a cut JPEG": ({"input": [{"image": encoded(IMAGES[0])[:400]}]}, 400, "is not a readable image"),
    "a bomb": (
        {"input": [{"image": bomb(9_000)}]},
        400,
        "image has more than 1,000,000 pixels: shrink it; --max-megap",
    ),
    "a large image": (
        {"input": [{"image": bomb(1_200)}]},
        400,
        "has 1,440,000 pixels, more than 1,000,000: shrink it; --max-",
    ),
    "a thin image": ({"input": [{"image": encoded(Image.new("L", (9_000, 1)), "PNG")}]}, 400, "a side may be at most"),
    "PostScript": ({"input": [{"image": encoded(IMAGES[0], "EPS")}]}, 400, "is not a readable image"),
    "a path": ({"input": [{"image": "/etc/hostname"}]}, 400, "is not base64"),
    "a file": ({"input": [{"image": "file:///etc/hostname"}]}, 400, "URLs of images are not fetched"),
    "a URL": ({"input": [{"image": "https://example.com/a.png"}]}, 400, "URLs of images are not fetched"),
    "infinity's URL": ({"input": "https://example.com/a.png", "modality": "image"}, 400, "are not fetched"),
    "a large body": (b" " * 1_000_001, 413, "more than 1,000,000 bytes"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_mistakes_are_refused_in_openais_shape(server, kind):
    body, expected, said = REFUSED[kind]
    status, found = server.post("/v1/embeddings", body)
    assert status == expected, found
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert found["error"]["type"] == "invalid_request_error"
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(found["error"]["message"])
    assert "Traceback" not in json.dumps(found)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/zero-shot", {"labels": ["a"]}, "image is missing"),
        ("/v1/zero-shot", {"image": PNGS[0], "labels": []}, "labels is []: give a list"),
        ("/v1/zero-shot", {"image": PNGS[0], "labels": [PNGS[0]]}, "labels[0] is an image in the place of a text"),
        ("/v1/zero-shot", {"image": PNGS[0], "labels": "a"}, 'labels is "a": give a list'),
        ("/v1/zero-shot", {"image": PNGS[0], "labels": ["a", 3]}, "labels[1] is 3: give words"),
        (
            "/v1/zero-shot",
            {"image": PNGS[0], "labels": ["a"], "template": "a photo"},
            "with {} in the place of a label",
        ),
        ("/v1/zero-shot", {"image": PNGS[0], "template": "a {}"}, "template is given without labels"),
        ("/v1/zero-shot", {"image": {"a": 1}, "labels": ["a"]}, "or a https URL where the server allows its host"),
        ("/v1/rank", {"query": "a"}, "documents is missing"),
        ("/v1/rank", {"query": 3, "documents": ["a"]}, "query is 3: give a text"),
        ("/v1/rank", {"query": "a", "documents": [None]}, "documents[0] is null"),
        ("/v1/rank", {"query": "a", "documents": ["a"], "top_n": 0}, "top_n is 0"),
        (
            "/v1/rank",
            {"query": "a", "documents": [{"type": "text", "text": "a", "x": nested(900)}], "return_documents": True},
            "documents are nested too deeply",
        ),
    ],
)
def test_mistakes_in_other_requests_are_refused(server, path, body, said):
    status, found = server.post(path, body)
    assert status == 400
    assert said in found["error"]["message"]


def test_one_bad_image_fails_its_own_request_alone(server, classifier):
    status, found = server.post("/v1/embeddings", {"input": [{"image": PNGS[0]}, {"image": "aGVsbG8="}]})
    assert status == 400
    assert found["error"]["param"] == "input[1].image"
    assert close(server.embed(input=[{"image": PNGS[0]}]), classifier.embed_images(IMAGES[:1]))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types_are_refused_since_any_page_may_send_them(server, kind):
    status, found = server.post("/v1/embeddings", {"input": "a"}, **{"content-type": kind})
    assert (status, found["error"]["code"]) == (415, "unsupported_media_type")


def test_a_compressed_body_is_refused(server):
    body = gzip.compress(b'{"input": "a"}')
    status, found = server.post("/v1/embeddings", body, **{"content-encoding": "gzip"})
    assert (status, found["error"]["message"][:39]) == (415, "content-encoding gzip is not accepted: ")
    assert server.post("/v1/embeddings", {"input": "a"}, **{"content-encoding": "identity"})[0] == 200


@pytest.mark.parametrize("host", ["evil.example.com", "localhost.evil.com", "127.0.0.1.evil.com:80", "[", "a b"])
def test_a_page_whose_name_leads_here_is_refused(server, host):
    """DNS rebinding: for the browser such a page is of one origin with the server."""
    status, found = server.post("/v1/embeddings", {"input": "a"}, host=host)
    assert (status, found["error"]["code"]) == (421, "unknown_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "a.localhost", "127.0.0.1:1", "[::1]:80", "10.1.2.3"])
def test_addresses_and_localhost_are_names_of_this_machine(server, host):
    assert server.get("/health/live", host=host)[0] == 200


def test_other_paths_and_methods_are_refused(server):
    assert server.post("/v1/nothing", {})[0] == 404
    for path in ("/v1/models/", "/health/live/", "/v1/rank/"):
        status, _, found = server.get(path)
        assert (status, found["error"]["type"]) == (404, "invalid_request_error")
    status, headers, found = server.get("/v1/embeddings")
    assert (status, headers["allow"]) == (405, "POST")
    assert found["error"]["message"].startswith("GET /v1/embeddings: method not allowed")
    assert server.post("/v1/models", {})[0] == 405
    assert server.ask("OPTIONS", "/v1/rank")[0] == 405


def test_a_chunked_body_is_read_and_bounded(server, classifier):
    def chunked(*parts):
        return server.ask("POST", "/v1/embeddings", iter(parts), {"content-type": "application/json"})

    body = json.dumps({"input": TEXTS[0]}).encode()
    status, _, found = chunked(body[:5], body[5:])
    assert status == 200
    assert close(vectors([found["data"][0]["embedding"]]), classifier.embed_texts(TEXTS[:1]))
    assert chunked(*[b" " * 65_536] * 16)[0] == 413


def test_what_pillow_writes_as_a_comment_is_no_way_in(server):
    """Large metadata neither fill the memory nor count as pixels."""
    buffer = BytesIO()
    IMAGES[0].save(buffer, "JPEG", comment=b"x" * 60_000)
    assert server.embed(input=[{"image": base64.b64encode(buffer.getvalue()).decode()}]).shape == (1, 64)
