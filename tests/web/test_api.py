"""Whatever a client sends is parsed or refused: nothing else comes of it."""

import base64

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.web import encoded

from clip_deploy.web.api import Picture, Text, parse_embeddings, parse_json, parse_rank, parse_zero_shot
from clip_deploy.web.errors import RequestError

PARSERS = (parse_embeddings, parse_zero_shot, parse_rank)
WORDS = (
    *(
        "model",
        "input",
        "messages",
        "modality",
        "encoding_format",
        "embedding_type",
        "normalized",
        "dimensions",
        "user",
    ),
    *("image", "labels", "template", "query", "documents", "top_n", "text", "type", "image_url", "url", "content"),
)
VALUES = ("text", "image", "image_url", "float", "base64", "data:image/png;base64,AAAA", "https://a.b/c", "{}", "", " ")
SCALARS = st.none() | st.booleans() | st.integers(-2, 70) | st.floats() | st.text(max_size=5) | st.sampled_from(VALUES)
KEYS = st.sampled_from(WORDS) | st.text(max_size=3)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=4))
BODIES = st.dictionaries(KEYS, JSON, max_size=5)


# The same inputs each time, however busy the machine is.
SAME = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


def tried(call, *given):
    """What it returns, or the refusal; any other error is one of the test."""
    try:
        return call(*given)
    except RequestError as refused:
        return refused


@SAME
@given(BODIES, st.sampled_from(PARSERS))
def test_every_body_is_parsed_or_refused(body, parse):
    found = tried(lambda: parse(parse_json(orjson.dumps(body)), 4))
    if isinstance(found, RequestError):
        assert found.status in (400, 413)
        assert found.message
        assert orjson.dumps(found.body)
    for item in getattr(found, "items", []) + getattr(found, "documents", []):
        assert isinstance(item, Text | Picture)
        assert item.text.strip() if isinstance(item, Text) else item.source


@SAME
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_every_content_is_a_json_object_or_refused(content):
    found = tried(parse_json, content)
    assert found.status == 400 if isinstance(found, RequestError) else isinstance(found, dict)


IMAGE = Image.effect_noise((40, 30), 50).convert("RGB")
LOWEST = Image.new("L", (1, 1))


def lines(content):
    return base64.encodebytes(base64.b64decode(content)).decode()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize(
    "form", [str, lines, lambda content: f"\n {content}", lambda content: f"DATA:;base64,{content}"]
)
@pytest.mark.parametrize("image", [IMAGE, LOWEST])
def test_an_encoded_image_is_never_taken_for_a_text(kind, form, image):
    content = form(encoded(image, kind))
    for text in (content, content.translate(str.maketrans("+/", "-_"))):
        for body in ({"input": text}, {"input": [{"text": text}]}, {"messages": [{"content": text}]}):
            with pytest.raises(RequestError, match="is an image in the place of a text"):
                parse_embeddings(body, 4)


@SAME
@given(st.binary(min_size=24, max_size=60))
def test_base64_of_other_things_is_a_text(content):
    text = base64.b64encode(b"\x01" + content).decode()
    assert parse_embeddings({"input": text}, 4).items == [Text(text)]


@pytest.mark.parametrize("url", ["https://example.com/a.jpg", "HTTP://x/a.PNG?width=3", " https://x/a.webp#b\n"])
def test_the_url_of_an_image_is_a_text_where_that_is_said(url):
    for body in ({"input": url}, {"input": ["a", url]}):
        with pytest.raises(RequestError, match="is the URL of an image"):
            parse_embeddings(body, 4)
    assert parse_embeddings({"input": [{"text": url}]}, 4).items == [Text(url)]


@pytest.mark.parametrize(
    "text", ["https://example.com/", "a picture at https://x/a.jpg", "https://x/a.jpg is mine", "a.jpg"]
)
def test_other_words_with_a_url_are_a_text(text):
    assert parse_embeddings({"input": text}, 4).items == [Text(text)]


@pytest.mark.parametrize("name", ["image", "messages"])
def test_a_field_of_another_request_is_refused(name):
    with pytest.raises(RequestError, match=f"{name} is not a field of this request"):
        parse_rank({"query": "a", "documents": ["b"], name: "c"}, 4)
