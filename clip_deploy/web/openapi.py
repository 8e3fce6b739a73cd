"""What can be asked, as OpenAPI says it, and as a page that loads nothing."""

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from html import escape
from typing import Any

import orjson

from clip_deploy.web.api import DEFAULT_FOUND, MAX_FOUND, MAX_TEXT
from clip_deploy.web.models import FORMATS
from clip_deploy.web.settings import Settings

IMAGE = {
    "type": "string",
    "description": "base64 of an image file, a data URI, or a https URL of an allowed host; formats: "
    + ", ".join(FORMATS),
}
ITEM = {
    "oneOf": [
        {"type": "string", "description": "a text", "maxLength": MAX_TEXT},
        {"type": "object", "properties": {"text": {"type": "string", "maxLength": MAX_TEXT}}, "required": ["text"]},
        {"type": "object", "properties": {"image": IMAGE}, "required": ["image"]},
    ]
}
ONE = 'a text, {"text": ...} or {"image": ...}'
MODEL = {"type": "string", "description": "NAME or NAME:VERSION of /v1/models; without it, the first of them"}
PHOTO = "/9j/4AAQSkZJRg..."
STATUS = {
    "400": "a mistake in the request, which the message names",
    "401": "no key or a wrong one",
    "404": "no such path, model or picture, or no index",
    "405": "another method than this path has; Allow names it",
    "408": "the request did not come in time",
    "413": "too large: too many bytes, texts or images",
    "415": "the content type is not application/json, or the body is compressed",
    "421": "the Host header is not a name of this server (--allow-host)",
    "429": "too much waits already: try again after Retry-After seconds",
    "503": "the answer took too long, or the server is about to stop",
}


def _post(
    summary: str, description: str, asked: Mapping[str, Any], required: list[str], example: Any
) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"model": MODEL, **asked}, "required": required}
    refusal = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "summary": summary,
        "description": description,
        "security": [{}, {"key": []}],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema, "example": example["request"]}},
        },
        "responses": {
            "200": {"description": "answered", "content": {"application/json": {"example": example["answer"]}}},
            **{status: {"description": said, "content": refusal} for status, said in STATUS.items()},
        },
    }


def _get(summary: str, kind: str = "application/json") -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": {"200": {"description": "answered", "content": {kind: {}}}}}}


def _embeddings(items: str) -> dict[str, Any]:
    return _post(
        "Embeddings of texts and images",
        "OpenAI's API, with images too. Jina's items ({image: ...}), infinity's modality and vLLM's messages with "
        "image_url work as well. Embeddings have unit length. A text beyond the context is cut.",
        {
            "input": {
                "anyOf": [ITEM, {"type": "array", "items": ITEM, "minItems": 1}],
                "description": f"{ONE}, or a list of these; {items}",
            },
            "modality": {"enum": ["text", "image"], "description": "what the strings of input are; text without it"},
            "messages": {"type": "array", "description": "in the place of input: one, with one text or image_url"},
            "encoding_format": {
                "enum": ["float", "base64"],
                "default": "float",
                "description": "base64 is of little-endian float32",
            },
            "embedding_type": {"enum": ["float", "base64"], "description": "Jina's name for encoding_format"},
            "normalized": {"enum": [True], "description": "as Jina's clients send it"},
            "dimensions": {
                "type": "integer",
                "minimum": 1,
                "description": "the first so many numbers, of unit length again; all without it",
            },
            "user": {"type": "string", "description": "ignored"},
        },
        [],
        {
            "request": {"input": ["a photo of a cat", {"image": PHOTO}]},
            "answer": {
                "object": "list",
                "data": [{"object": "embedding", "index": 0, "embedding": [0.1859, -0.0011]}],
                "model": "NAME:VERSION",
                "usage": {"prompt_tokens": 7, "total_tokens": 7},
            },
        },
    )


def _zero_shot(items: str) -> dict[str, Any]:
    return _post(
        "Which label describes an image",
        "Labels by probability, the highest first. Without labels, the package's own classes in its own templates.",
        {
            "image": IMAGE,
            "labels": {
                "type": "array",
                "items": {"type": "string", "maxLength": MAX_TEXT},
                "minItems": 1,
                "description": f"texts; {items}",
            },
            "template": {"type": "string", "description": "with {} in the place of a label"},
        },
        ["image"],
        {
            "request": {"image": PHOTO, "labels": ["cat", "dog"], "template": "a photo of a {}"},
            "answer": {"object": "list", "labels": [{"label": "cat", "probability": 0.98}], "model": "NAME:VERSION"},
        },
    )


def _rank(items: str) -> dict[str, Any]:
    return _post(
        "Texts and images by their likeness to one",
        "As Jina's and Cohere's clients ask for a rerank; /v1/rerank and /v2/rerank are the same. relevance_score is "
        "the cosine, the highest first. Do not mix texts and images in one list: cosines of a text with texts do not "
        "compare with its cosines with images.",
        {
            "query": ITEM | {"description": ONE},
            "documents": {"type": "array", "items": ITEM, "minItems": 1, "description": f"as query; {items}"},
            "top_n": {"type": "integer", "minimum": 1, "description": "all without it"},
            "return_documents": {
                "type": "boolean",
                "default": False,
                "description": "whether each result has its document",
            },
        },
        ["query", "documents"],
        {
            "request": {"query": "a photo of a cat", "documents": [{"image": PHOTO}, {"image": PHOTO}], "top_n": 1},
            "answer": {"object": "list", "results": [{"index": 0, "relevance_score": 0.31}], "model": "NAME:VERSION"},
        },
    )


RERANK = {"summary": "The same as /v1/rank", "description": "By the name that Jina's and Cohere's clients know."}
SEARCH = _post(
    "The images of the index that are nearest to a text or an image",
    "Where the server was started with --index. score is the cosine, the highest first; image is the address of a "
    "small JPEG, or null where the server was started without --images.",
    {
        "text": {"type": "string", "maxLength": MAX_TEXT, "description": "what the images show"},
        "image": IMAGE | {"description": f"in the place of text: {IMAGE['description']}"},
        "count": {"type": "integer", "minimum": 1, "maximum": MAX_FOUND, "default": DEFAULT_FOUND},
    },
    [],
    {
        "request": {"text": "a photo of a cat", "count": 1},
        "answer": {
            "object": "list",
            "results": [{"name": "cats/1.jpg", "score": 0.31, "image": "/v1/pictures/0123456789ab/7"}],
            "model": "NAME:VERSION",
            "usage": {"prompt_tokens": 7, "total_tokens": 7},
        },
    },
)
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def openapi(settings: Settings) -> dict[str, Any]:
    """The document, with the limits of this server."""
    items = f"at most {settings.max_items:,}"
    rank = _rank(items)
    rerank = {"post": rank | RERANK}
    return {
        "openapi": "3.1.0",
        "info": {"title": "clip-deploy serve", "version": "1", "description": f"Limits: {_limits(settings)}"},
        "paths": {
            "/v1/embeddings": {"post": _embeddings(items)},
            "/v1/zero-shot": {"post": _zero_shot(items)},
            "/v1/rank": {"post": rank},
            "/v1/rerank": rerank,
            "/v2/rerank": rerank,
            "/v1/search": {"post": SEARCH},
            "/v1/pictures/{version}/{row}": _get("A picture that /v1/search found", "image/jpeg"),
            "/v1/models": _get("The packages that are served, by NAME:VERSION"),
            "/v1/models/{model}": _get("One of them, by NAME or NAME:VERSION"),
            "/health/live": _get("200 while the process runs"),
            "/health/ready": _get("200 while requests should be sent here, 503 once it is about to stop"),
            "/metrics": _get("Numbers for Prometheus", "text/plain"),
        },
        "components": {
            "schemas": {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _limits(settings: Settings) -> str:
    return (
        f"{settings.max_items:,} texts and images, {settings.max_body_mb:,g} MB and {settings.timeout_s:,g} s of a "
        f"request, {settings.max_megapixels:,g} million pixels of an image, {settings.max_queue:,} texts and "
        f"{settings.max_queue:,} images that wait, {MAX_TEXT:,} characters of a text."
    )


BOUNDS = {"at least": "minimum", "at most": "maximum"}


def _section(path: str, methods: Mapping[str, Any]) -> str:
    method, what = next(iter(methods.items()))
    lines = [f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(what['summary'])}.</p>"]
    if "description" in what:
        lines.append(f"<p>{escape(what['description'])}</p>")
    if (body := what.get("requestBody")) and what["summary"] != RERANK["summary"]:
        sent = body["content"]["application/json"]
        fields = sent["schema"]["properties"].items()
        rows = [f"<tr><td><code>{name}</code><td>{escape(_field(field))}" for name, field in fields]
        lines += ["<table>", *rows, "</table>", _example(sent["example"])]
        lines.append(_example(what["responses"]["200"]["content"]["application/json"]["example"]))
    return "\n".join(lines)


def _field(field: Mapping[str, Any]) -> str:
    """Its type or values, what it means, its bounds and its default, in words."""
    values = " or ".join(map(_plain, field.get("enum", [])))
    said = ": ".join(filter(None, [values or field.get("type"), field.get("description")]))
    bounds = [f"{word} {field[name]:,}" for word, name in BOUNDS.items() if name in field]
    if "default" in field:
        bounds.append(f"default {_plain(field['default'])}")
    return ", ".join([said, *bounds])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _example(content: Any) -> str:
    return f"<pre>{escape(orjson.dumps(content, option=orjson.OPT_INDENT_2).decode())}</pre>"


STYLE = """
:root { color-scheme: light dark; --wash: #f3f3f3 }
@media (prefers-color-scheme: dark) { :root { --wash: #2a2f36 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
h2, p, td { overflow-wrap: anywhere }
pre { background: var(--wash); padding: .7rem; overflow-x: auto }
td { padding: .2rem 1rem .2rem 0; vertical-align: top }
td:first-child { min-width: 6rem }
"""
STYLE_HASH = b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def docs(settings: Settings) -> str:
    """A page for people, with the same content."""
    sections = "".join(_section(path, methods) for path, methods in openapi(settings)["paths"].items())
    errors = "".join(f"<tr><td>{status}<td>{escape(said)}" for status, said in STATUS.items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>clip-deploy serve</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
<h1>clip-deploy serve</h1>
<p><a href="/openapi.json">/openapi.json</a> says the same for programs.</p>
<p>Limits: {_limits(settings)}</p>
{sections}
<h2>Errors</h2>
<pre>{{"error": {{"message": ..., "type": ..., "param": ..., "code": ...}}}}</pre>
<table>{errors}</table>
</html>
"""
