"""The bodies of requests: JSON parsed into dataclasses, or refused with what is accepted.

`POST /v1/embeddings` takes what these clients send:

- OpenAI: {"model", "input": text or [texts], "encoding_format": "float" or "base64", "dimensions", "user"}
- Jina: {"input": [{"text": ...}, {"image": base64 or URL}, text], "embedding_type": "float" or "base64"}
- infinity: {"modality": "image", "input": data URI or [data URIs]}
- vLLM: {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data URI}}]}]}

An image is base64, a data URI, or a https URL of a host that the server allows. Unknown fields are refused: one that is
misspelt would silently change what is answered. So is an image where a text is expected.
"""

import binascii
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from clip_deploy.web.errors import RequestError, bad

MAX_TEXT = 32_768  # characters: several times the longest context, and not yet slow to cut
DEFAULT_FOUND, MAX_FOUND = 10, 1_000  # images of a search
FORMATS = ("float", "base64")
IMAGE = "base64, a data URI (data:image/jpeg;base64,...), or a https URL where the server allows its host"
MISTAKEN = 'is an image in the place of a text: give words, or the image as {"image": ...} (infinity: modality image)'
DATA_URI = re.compile(r"\s*data:(image/|[^,\s]{0,100};base64,)", re.IGNORECASE)
ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic")
HEAD = 32  # characters of base64, in which an image's first bytes tell its format
URL_SAFE = str.maketrans("-_", "+/")
MAGIC = re.compile(  # JPEG, PNG, GIF, WebP, BMP, TIFF, and AVIF or HEIC
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF.{4}WEBP|BM.{4}\0{4}|II\*\0|MM\0\*|.{4}ftyp(avi|hei|mif|hev|msf)",
    re.DOTALL,
)
TOKENS = "token arrays are not accepted: give texts, since another model's tokens mean nothing to this one"
DEEP = "nested too deeply"
JSON_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Text:
    """A text of a request, as it was sent."""

    text: str


@dataclass(frozen=True)
class Picture:
    """An image as it was sent, and the field that holds it."""

    source: str
    param: str


@dataclass(frozen=True)
class Fetched:
    """An image that came from a URL, and the field that named it."""

    content: bytes
    param: str


Item = Text | Picture | Fetched


@dataclass(frozen=True)
class Embeddings:
    """POST /v1/embeddings; `dimensions` None is all."""

    model: str | None
    items: list[Item]
    encoding: str
    dimensions: int | None


@dataclass(frozen=True)
class ZeroShot:
    """POST /v1/zero-shot; without labels, the package's own in its own templates."""

    model: str | None
    image: Picture
    labels: list[str] | None
    template: str | None

    @property
    def prompts(self) -> list[str]:
        """What stands for each label; the template is no format string, since it comes from outside."""
        return [(self.template or "{}").replace("{}", label) for label in self.labels or []]


@dataclass(frozen=True)
class Rank:
    """POST /v1/rank; `top` None is all; `returned` holds what is sent back of each document, None is nothing."""

    model: str | None
    query: Item
    documents: list[Item]
    top: int | None
    returned: list[dict[str, Any]] | None


@dataclass(frozen=True)
class Search:
    """POST /v1/search."""

    model: str | None
    query: Item
    count: int


def parse_json(body: bytes) -> dict[str, Any]:
    """Raises RequestError where it is no JSON object."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad(_no_json(body, error), None, "invalid_json") from error
    if not isinstance(found, dict):
        raise bad(f"the body is {_shown(found)}: give a JSON object", None, "invalid_json")
    return {name: value for name, value in found.items() if value is not None}


def parse_embeddings(body: Mapping[str, Any], max_items: int) -> Embeddings:
    """Raises RequestError as all of these do, naming the field."""
    known = {"model", "encoding_format", "embedding_type", "normalized", "dimensions", "user"}
    if "messages" in body and "input" in body:
        raise bad("input and messages are both given: give either", "messages")
    if "messages" in body:
        _check_fields(body, known | {"messages"})
        items = [_message_item(body["messages"])]
    else:
        _check_fields(body, known | {"input", "modality"})
        items = _items(_field(body, "input"), "input", max_items, _modality(body))
    if body.get("normalized") not in (None, True):
        raise bad("normalized: embeddings have unit length here; leave it out, or give true", "normalized")
    return Embeddings(_model(body), items, _encoding(body), _count(body, "dimensions"))


def parse_zero_shot(body: Mapping[str, Any], max_items: int) -> ZeroShot:
    """The body of /v1/zero-shot. Raises RequestError (400, 413) that names the field."""
    _check_fields(body, {"model", "image", "labels", "template"})
    labels, template = body.get("labels"), body.get("template")
    if labels is not None:
        _check_list(labels, "labels", max_items)
        labels = [_text(label, f"labels[{row}]").text for row, label in enumerate(labels)]
    if template is not None:
        if labels is None:
            raise bad("template is given without labels: the package's own labels have templates", "template")
        if not isinstance(template, str) or "{}" not in template or len(template) > MAX_TEXT:
            raise bad(
                f"template is {_shown(template)}: give a text with {{}} in the place of a label, for example 'a photo "
                "of a {}'",
                "template",
            )
    return ZeroShot(_model(body), _picture(_field(body, "image"), "image"), labels, template)


def parse_rank(body: Mapping[str, Any], max_items: int) -> Rank:
    """Jina's and Cohere's rerank, with images besides."""
    _check_fields(body, {"model", "query", "documents", "top_n", "return_documents"})
    documents = _field(body, "documents")
    _check_list(documents, "documents", max_items)
    is_returned = body.get("return_documents", False)
    if not isinstance(is_returned, bool):
        raise bad(f"return_documents is {_shown(is_returned)}: give true or false", "return_documents")
    returned = [{"text": given} if isinstance(given, str) else given for given in documents] if is_returned else None
    query = _item(_field(body, "query"), "query")
    items = [_item(document, f"documents[{row}]") for row, document in enumerate(documents)]
    if returned and _dumped(returned) is None:
        raise bad(f"documents are {DEEP}: they cannot be returned", "documents")
    return Rank(_model(body), query, items, _count(body, "top_n"), returned)


def parse_search(body: Mapping[str, Any]) -> Search:
    """The body of /v1/search. Raises RequestError (400) that names the field."""
    _check_fields(body, {"model", "text", "image", "count"})
    if ("text" in body) == ("image" in body):
        raise bad("give either text or image, to search by it", "text")
    query = _text(body["text"], "text") if "text" in body else _picture(body["image"], "image")
    count = _count(body, "count") or DEFAULT_FOUND
    if count > MAX_FOUND:
        raise bad(f"count is {count:,}: at most {MAX_FOUND:,} are found in one request", "count")
    return Search(_model(body), query, count)


def _items(given: Any, param: str, max_items: int, modality: str) -> list[Item]:
    if isinstance(given, str | dict):
        return [_picture(given, param) if modality == "image" else _item(given, param)]
    _check_list(given, param, max_items, "a text, or a list of one or more")
    if any(isinstance(item, int | list) for item in given):
        raise bad(f"{param}: {TOKENS}", param)
    if modality == "image":
        return [_picture(item, f"{param}[{row}]") for row, item in enumerate(given)]
    return [_item(item, f"{param}[{row}]") for row, item in enumerate(given)]


def _item(given: Any, param: str) -> Item:
    """A text, {"text": ...}, {"image": ...}, or a part of a message."""
    if isinstance(given, str):
        if _is_image_url(given):
            raise bad(
                f'{param} is the URL of an image: give {{"image": ...}}, or {{"text": ...}} for its letters', param
            )
        return _text(given, param)
    if not isinstance(given, dict):
        raise bad(f'{param} is {_shown(given)}: give a text, {{"text": ...}} or {{"image": ...}}', param)
    if "type" in given:
        return _part(given, param)
    if set(given) == {"text"}:
        return _text(given["text"], f"{param}.text")
    if set(given) == {"image"}:
        return _picture(given["image"], f"{param}.image")
    raise bad(f"{param} has the fields {', '.join(given) or 'of nothing'}: give either text or image", param)


def _part(given: Mapping[str, Any], param: str) -> Item:
    """A part of a message's content, as OpenAI and vLLM know them."""
    if {"text", "image_url"} <= set(given):
        raise bad(f"{param} has a text and an image_url: give either, each in a part of its own", param)
    if given["type"] == "text":
        return _text(given.get("text"), f"{param}.text")
    if given["type"] == "image_url":
        url = given.get("image_url")
        return _picture(url.get("url") if isinstance(url, dict) else url, f"{param}.image_url")
    raise bad(f"{param}.type is {_shown(given['type'])}: accepted are text and image_url", f"{param}.type")


def _message_item(messages: Any) -> Item:
    """The one text or image of vLLM's messages; an empty text beside an image says nothing."""
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise bad('messages: give one, as {"role": "user", "content": [...]}', "messages")
    content = messages[0].get("content")
    if isinstance(content, str):
        return _text(content, "messages[0].content")
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        raise bad("messages[0].content: give a text, or parts with a type each", "messages")
    parts = [part for part in content if part.get("text") != ""]
    if len(parts) != 1:
        raise bad(f"messages[0].content has {len(parts)} parts: give one text or one image", "messages")
    return _part(parts[0], "messages[0].content[0]")


def _text(given: Any, param: str) -> Text:
    if not isinstance(given, str) or not given.strip():
        raise bad(f"{param} is {_shown(given)}: give words", param)
    if DATA_URI.match(given) or _is_encoded_image(given):
        raise bad(f"{param} {MISTAKEN}", param)
    if len(given) > MAX_TEXT:
        raise bad(f"{param} has {len(given):,} characters: at most {MAX_TEXT:,} are accepted", param)
    return Text(given)


def _is_image_url(text: str) -> bool:
    """Whether a text is nothing but the http(s) URL of a file with an image's ending."""
    url = text.strip().lower()
    if not url.startswith(("http://", "https://")) or len(url.split()) > 1:
        return False
    return re.split("[?#]", url)[0].endswith(ENDINGS)


def _is_encoded_image(text: str) -> bool:
    """Whether a text begins as base64 of an image's file does, which no words do."""
    head = "".join(text.lstrip()[:200].split())[:HEAD]  # mail has it in lines
    try:
        content = binascii.a2b_base64(head.translate(URL_SAFE), strict_mode=True)
    except ValueError:
        return False
    return len(head) == HEAD and MAGIC.match(content) is not None


def _picture(given: Any, param: str) -> Picture:
    if not isinstance(given, str) or not given:
        raise bad(f"{param} is {_shown(given)}: give an image as {IMAGE}", param)
    return Picture(given, param)


def _model(body: Mapping[str, Any]) -> str | None:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise bad(f"model is {_shown(model)}: give a name of /v1/models", "model")
    return model


def _modality(body: Mapping[str, Any]) -> str:
    modality = body.get("modality", "text")
    if modality not in ("text", "image"):
        raise bad(f"modality is {_shown(modality)}: accepted are text and image", "modality")
    return str(modality)


def _encoding(body: Mapping[str, Any]) -> str:
    name = "embedding_type" if "embedding_type" in body else "encoding_format"
    encoding = body.get(name, "float")
    if encoding not in FORMATS:
        raise bad(f"{name} is {_shown(encoding)}: accepted are {' and '.join(FORMATS)}", name)
    return str(encoding)


def _count(body: Mapping[str, Any], name: str) -> int | None:
    count = body.get(name)
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise bad(f"{name} is {_shown(count)}: give a whole number of 1 or more", name)
    return count


def _field(body: Mapping[str, Any], name: str) -> Any:
    if name not in body:
        raise bad(f"{name} is missing", name)
    return body[name]


def _check_fields(body: Mapping[str, Any], known: Iterable[str]) -> None:
    if unknown := sorted(set(body) - set(known)):
        raise bad(f"{unknown[0]} is not a field of this request: accepted are {', '.join(sorted(known))}", unknown[0])


def _check_list(given: Any, param: str, most: int, accepted: str = "a list of one or more") -> None:
    if not isinstance(given, list) or not given:
        raise bad(f"{param} is {_shown(given)}: give {accepted}", param)
    if len(given) > most:
        raise RequestError(413, f"{param} has {len(given):,}: at most {most:,} are accepted in one request", param)


def _no_json(body: bytes, error: Exception) -> str:
    try:
        body.decode()
    except UnicodeDecodeError as wrong:
        return f"the body is not UTF-8 (byte {wrong.start:,}): JSON is sent as UTF-8"
    return f"the body is not JSON ({error})"


def _shown(value: Any) -> str:
    text = _dumped(value) or DEEP
    return text if len(text) <= JSON_SHOWN else f"{text[:JSON_SHOWN]}..."


def _dumped(value: Any) -> str | None:
    """As JSON; None where it is nested deeper than orjson writes, which reads four times as deep."""
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        return None
