"""Whatever a client sends is parsed or refused: nothing else comes of it."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def tried(call, *given):
    """What it returns, or the refusal; any other error is one of the test."""
    try:
        return call(*given)
    except RequestError as refused:
        return refused


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


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_every_content_is_a_json_object_or_refused(content):
    found = tried(parse_json, content)
    assert found.status == 400 if isinstance(found, RequestError) else isinstance(found, dict)


@pytest.mark.parametrize("name", ["image", "messages"])
def test_a_field_of_another_request_is_refused(name):
    with pytest.raises(RequestError, match=f"{name} is no field of this request"):
        parse_rank({"query": "a", "documents": ["b"], name: "c"}, 4)
