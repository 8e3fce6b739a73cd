"""The application: routes, and what is common to all requests. Any ASGI server runs it; server.py does."""

import asyncio
import hashlib
import logging
import multiprocessing
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from time import perf_counter
from types import FrameType
from typing import Any

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from clip_deploy.core.errors import DataError
from clip_deploy.core.vectors import check_width, cut
from clip_deploy.web.api import Text, parse_embeddings, parse_json, parse_rank, parse_search, parse_zero_shot
from clip_deploy.web.errors import RequestError, bad
from clip_deploy.web.fetch import Fetcher
from clip_deploy.web.guard import ClientLeftError, Guard
from clip_deploy.web.keys import Keys
from clip_deploy.web.metrics import CONTENT_TYPE, OTHER, Metrics, RouteMetrics
from clip_deploy.web.models import Models, Served, base64_of
from clip_deploy.web.openapi import HEADERS, docs, openapi
from clip_deploy.web.page import page
from clip_deploy.web.responses import JSON, answered, refused
from clip_deploy.web.search import ADDRESS, Searched
from clip_deploy.web.settings import Settings

logger = logging.getLogger(__name__)

RETRY_S = 1
PLAIN = "identity"  # HTTP's word for what is not compressed
LEFT = 499  # nginx's number for a client that did not wait for its answer
BODIES = 16  # of the largest size may be held at once
# Other origins may not show it, and it is no page; one address is always one picture.
PICTURE = {
    "cache-control": "private, max-age=3600",
    "content-security-policy": "default-src 'none'; sandbox",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
}
Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class Api:
    """What the routes call.

    Attributes:
        searched: the index, or None.
        is_draining: SIGTERM came: running and new requests are answered, and the server says that it is not ready.
        held: bytes of bodies of running requests.
    """

    def __init__(
        self, settings: Settings, models: Models, metrics: Metrics, keys: Keys, searched: Searched | None = None
    ) -> None:
        self.settings, self.models, self.metrics, self.keys = settings, models, metrics, keys
        self.searched = searched
        self.fetcher = Fetcher(settings.image_hosts, settings.max_body, BODIES * settings.max_body)
        self.is_draining, self.held = False, 0

    def identity(self) -> str:
        """A hash of all that answers depend on: the packages with their names, and the index."""
        opened = [(served.id, served.classifier) for served in self.models.served]
        parts = [(name, one.scoring, sorted(one.package.files.items())) for name, one in opened]
        return hashlib.sha256(repr((parts, self.searched and self.searched.version)).encode()).hexdigest()

    async def embeddings(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = parse_embeddings(body, self.settings.max_items)
        served = self.models[asked.model]
        try:
            width = check_width(asked.dimensions, served.classifier.dimension, "float32")
        except DataError as error:
            raise bad(str(error), "dimensions") from error
        async with self.fetcher.fetched(asked.items) as items:
            embedded = await served.embed(items)
        rows = cut(embedded.rows, width)
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64_of(row) if asked.encoding == "base64" else row,
            }
            for index, row in enumerate(rows)
        ]
        return {"object": "list", "data": data, "model": served.id, "usage": _usage(embedded.tokens)}

    async def zero_shot(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = parse_zero_shot(body, self.settings.max_items)
        served = self.models[asked.model]
        labels = served.classifier.labels.classes if asked.labels is None else asked.labels
        if not labels:
            raise bad("labels is missing, and the package has no classes of its own", "labels")
        async with self.fetcher.fetched([asked.image, *map(Text, asked.prompts)]) as items:
            rows = (await served.embed(items)).rows
        targets = await served.class_embeddings() if asked.labels is None else rows[1:]
        scores = served.classifier.probabilities(rows[:1] @ targets.T)[0]
        found = [{"label": labels[row], "probability": float(scores[row])} for row in _falling(scores)]
        return {"object": "list", "labels": found, "model": served.id}

    async def rank(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = parse_rank(body, self.settings.max_items)
        served = self.models[asked.model]
        async with self.fetcher.fetched([asked.query, *asked.documents]) as items:
            embedded = await served.embed(items)
        cosines = embedded.rows[1:] @ embedded.rows[0]
        found: list[dict[str, Any]] = [
            {"index": int(row), "relevance_score": float(cosines[row])} for row in _falling(cosines)[: asked.top]
        ]
        if asked.returned:
            for result in found:
                result["document"] = asked.returned[result["index"]]
        return {"object": "list", "results": found, "model": served.id, "usage": _usage(embedded.tokens)}

    async def search(self, body: dict[str, Any]) -> dict[str, Any]:
        asked, searched = parse_search(body), self.searched
        if searched is None:
            raise RequestError(404, "there is no index to search: start the server with --index", None, "no_index")
        if asked.model and self.models[asked.model] is not searched.served:
            raise bad(f"the index was made with {searched.served.id}: leave model out", "model")
        async with self.fetcher.fetched([asked.query]) as items:
            embedded = await searched.served.embed(items)
        found = await searched.nearest(embedded.rows[0], asked.count)
        return {"object": "list", "results": found, "model": searched.served.id, "usage": _usage(embedded.tokens)}

    async def picture(self, request: Request) -> Response:
        """One that a search found, small."""
        if self.searched is None:
            raise RequestError(404, "there is no index, and no picture of it", None, "no_index")
        content = await self.searched.picture(request.path_params["version"], request.path_params["row"])
        return Response(content, headers=PICTURE, media_type="image/jpeg")

    async def answered(self, headers: Headers, receive: Receive, post: "Post") -> Response:
        """To a POST, or why there is none."""
        body: bytes | None = None
        try:
            self.keys.check(headers)
            _check_type(headers)
            start = perf_counter()
            with Guard(receive) as guard:
                guard.allow(self.settings.timeout_s, _late_body)
                body = await self._read(headers, receive)
                post.metrics.read.observe(perf_counter() - start)
                guard.allow_watched(self.settings.timeout_s, _late_answer)
                return answered(await post.answer(parse_json(body)))
        except RequestError as refusal:
            return refused(refusal)
        except DataError as error:
            return refused(bad(str(error)))
        except ClientLeftError:
            return Response(status_code=LEFT)
        except Exception:
            logger.exception("%s failed", post.path)
            return refused(RequestError(500, "the server failed, and its log says why"))
        finally:
            self.held -= len(body or b"")

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """The body. Raises RequestError where it is too large, or too much is held."""
        most = self.settings.max_body
        if int(headers.get("content-length", 0)) > most:
            raise _too_large(most)
        chunks: list[bytes] = []
        size, is_whole = 0, False
        try:
            while not is_whole:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeftError
                chunk, is_whole = message.get("body", b""), not message.get("more_body", False)
                size += len(chunk)
                self.held += len(chunk)
                if size > most:
                    raise _too_large(most)
                if self.held > BODIES * most:
                    raise RequestError(429, "too many large requests at once: try again", retry_after_s=RETRY_S)
                chunks.append(chunk)
        except BaseException:
            self.held -= size
            raise
        return b"".join(chunks)

    async def list_models(self, request: Request) -> Response:
        return answered({"object": "list", "data": [self._told(served) for served in self.models.served]})

    async def model(self, request: Request) -> Response:
        """One of them, by NAME or NAME:VERSION."""
        return answered(self._told(self.models[request.path_params["model"]]))

    def _told(self, served: Served) -> dict[str, Any]:
        return {
            "id": served.id,
            "object": "model",
            "created": served.created,
            "owned_by": "clip-deploy",
            "dimensions": served.classifier.dimension,
            "fingerprint": served.classifier.fingerprint,
            "classes": len(served.classifier.labels.classes),
            "searched_images": self.searched.rows if self.searched and self.searched.served is served else None,
        }

    async def live(self, request: Request) -> Response:
        return answered({"status": "live"})

    async def ready(self, request: Request) -> Response:
        if self.is_draining:
            raise RequestError(503, "the server is about to stop", retry_after_s=RETRY_S)
        return answered({"status": "ready"})

    async def numbers(self, request: Request) -> Response:
        text = await asyncio.get_running_loop().run_in_executor(None, self.metrics.text)
        return Response(text, media_type=CONTENT_TYPE)


class Post:
    """A POST of JSON, as an ASGI application."""

    def __init__(self, api: Api, path: str, answer: Answer) -> None:
        self.api, self.path, self.answer = api, path, answer
        self.metrics = RouteMetrics(api.metrics, path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = perf_counter()
        response = await self.api.answered(Headers(scope=scope), receive, self)
        if self.api.is_draining:
            response.headers["connection"] = "close"
        self.metrics.observe(response.status_code, perf_counter() - start)
        await response(scope, receive, send)


class App(Starlette):
    """Its POSTs do without the router and its middleware, which would cost as much as all else on the event loop.

    Attributes:
        posts: by path; the routes have them too, for what is no POST.
        metrics: of the routes without a POST, by path.
    """

    posts: dict[str, Post]
    metrics: dict[str, RouteMetrics]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_http = scope["type"] == "http"
        post = self.posts.get(_path(scope)) if is_http and scope["method"] == "POST" else None
        await (post or super().__call__)(scope, receive, send if post or not is_http else self._counting(scope, send))

    def _counting(self, scope: Scope, send: Send) -> Send:
        start = perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.observe(self._route(scope), message["status"], perf_counter() - start)
            await send(message)

        return counted

    def _route(self, scope: Scope) -> str:
        """The path of the route that a request was led to, one of few whatever was asked."""
        endpoint = scope.get("endpoint")
        found = (route.path for route in self.routes if isinstance(route, Route) and route.endpoint is endpoint)
        return next(found, OTHER)

    def observe(self, route: str, status: int, seconds: float) -> None:
        """A request was answered that is no POST of this server's."""
        if route not in self.metrics:
            self.metrics[route] = RouteMetrics(self.state.api.metrics, route)
        self.metrics[route].observe(status, seconds)


def _path(scope: Scope) -> str:
    """A request's path without the prefix under which a proxy, or Ray, serves the application."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


def create_app(settings: Settings, keys: Keys | None = None) -> App:
    """Open the packages and make the application; `keys` are in the place of those in the settings' file.

    Raises DeployError as Models, Searched and Keys do.
    """
    keys, metrics = keys or Keys(settings.api_key_file), Metrics()
    models = Models(settings, metrics)
    searched = Searched(settings.index, settings.images, models) if settings.index else None
    api = Api(settings, models, metrics, keys, searched)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await api.models.start()
        with _drained(api):
            yield
        api.models.close()
        if searched:
            searched.close()

    posts = [
        Post(api, "/v1/embeddings", api.embeddings),
        Post(api, "/v1/zero-shot", api.zero_shot),
        *[Post(api, path, api.rank) for path in ("/v1/rank", "/v1/rerank", "/v2/rerank")],
        Post(api, "/v1/search", api.search),
    ]
    routes = [
        *[Route(post.path, post, methods=["POST"]) for post in posts],
        Route(ADDRESS, _locked(keys, api.picture)),
        Route("/v1/models", _locked(keys, api.list_models)),
        Route("/v1/models/{model:path}", _locked(keys, api.model)),
        Route("/", page),
        Route("/health/live", api.live),
        Route("/health/ready", api.ready),
        Route("/metrics", _locked(keys, api.numbers)),
        Route("/openapi.json", _fixed(orjson.dumps(openapi(settings)), JSON)),
        Route("/docs", _fixed(docs(settings).encode(), HTMLResponse.media_type, HEADERS)),
    ]
    handlers = {RequestError: _on_refusal, HTTPException: _on_http_error, Exception: _on_error}
    app = App(routes=routes, lifespan=lifespan, exception_handlers=handlers)  # type: ignore[arg-type]
    app.router.redirect_slashes = False  # what has one too many is told as any other unknown path is
    app.posts, app.metrics = {post.path: post for post in posts}, {}
    app.state.api = api
    return app


@contextmanager
def _drained(api: Api) -> Iterator[None]:
    """Put off what the server does at SIGTERM, so that a balancer sees that it is not ready before it is gone.

    A second SIGTERM ends that, but for a worker: systemd sends one to each process, and the parent another.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, stop = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)

    def drain(number: int, frame: FrameType | None) -> None:
        if not callable(stop):
            return
        if api.is_draining and multiprocessing.parent_process():
            return
        if api.is_draining or not api.settings.drain_s:
            stop(number, frame)
            return
        api.is_draining = True
        loop.call_soon_threadsafe(loop.call_later, api.settings.drain_s, stop, number, frame)

    if callable(stop):  # else it is no server that runs this
        signal.signal(signal.SIGTERM, drain)
    yield
    if callable(stop):
        signal.signal(signal.SIGTERM, stop)


async def _on_refusal(request: Request, refusal: RequestError) -> Response:
    return refused(refusal)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    """No such path, or not this method for it."""
    said = f"{request.method} {request.url.path}: {error.detail.lower()}; /docs lists what there is"
    response = refused(RequestError(error.status_code, said))
    response.headers.update(error.headers or {})
    return response


async def _on_error(request: Request, error: Exception) -> Response:
    return refused(RequestError(500, "the server failed, and its log says why"))


def _locked(keys: Keys, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    async def checked(request: Request) -> Response:
        keys.check(request.headers)
        return await endpoint(request)

    return checked


def _fixed(
    content: bytes, media_type: str | None, headers: Mapping[str, str] | None = None
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return endpoint


def _late_body() -> RequestError:
    return RequestError(408, "the body did not come in time")


def _late_answer() -> RequestError:
    return RequestError(503, "the answer took too long: try again", retry_after_s=RETRY_S)


def _check_type(headers: Headers) -> None:
    """A page of another origin can send a form or plain text without being asked, but no JSON."""
    given = headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != JSON:
        raise RequestError(415, f"content-type is {given!r:.80}: send {JSON}")
    if (encoding := headers.get("content-encoding", PLAIN)).strip().lower() != PLAIN:
        raise RequestError(415, f"content-encoding {encoding[:40]} is not accepted: send the body as it is")


def _too_large(most: int) -> RequestError:
    return RequestError(413, f"the body has more than {most:,} bytes, which is the most that is accepted")


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _falling(scores: np.ndarray) -> list[int]:
    """Rows, the highest score first."""
    rows: list[int] = np.argsort(-scores, kind="stable").tolist()
    return rows
