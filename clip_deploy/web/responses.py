"""Answers as Starlette sends them."""

from typing import Any

import orjson
from starlette.responses import Response

from clip_deploy.web.errors import RequestError

JSON = "application/json"


def answered(content: Any) -> Response:
    """Of JSON, in which arrays of numpy may stand."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type=JSON)


def refused(error: RequestError) -> Response:
    """A refusal as OpenAI's clients read it: {"error": {message, type, param, code}}."""
    return Response(orjson.dumps(error.body), error.status, error.headers, JSON)
