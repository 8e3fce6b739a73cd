"""Requests in the protocols of other servers, with what each deserves.

infinity and vLLM take OpenAI's embeddings, each with images in a shape of its own; Triton takes KServe's protocol.
Errors differ: any status from 400 to 499 refuses a mistake. One of 500 does not: it says that the server failed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from benchmarks.load_others.reference import Reference
from benchmarks.serve import triton_request
from clip_deploy.core.errors import DataError
from clip_deploy.core.images import decode
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.web.questions import (
    FILES,
    FORMATS,
    OWN,
    Kind,
    Pool,
    Question,
    SameVectors,
    WrongAnswerError,
    encoded,
    post,
    raw_post,
    saved,
)

MISTAKE = "mistake, "  # how the names of such kinds begin
MANY = 8  # texts in a request, at most
PIXEL_ERROR = 1e-3  # of pixel values, which go from about -2 to 2: a grey level is 0.015
SHARES = {kind: 10 for kind in FILES} | {"large": 1, OWN: 20}  # of image files
MISTAKES = 100  # of about 1,000 questions, all kinds of mistakes together
INFINITY_TOKENS = 20  # where infinity cuts texts
INFINITY_TEXT = 122_880  # characters of a text that it takes


@dataclass(frozen=True)
class Asked(Question):
    """A request to a server whose errors have a form of their own, and 503 says to come again.

    Attributes:
        may_refuse: whether a right request may be refused as well, where servers have bounds of their own.
    """

    may_refuse: bool = False
    again: ClassVar[tuple[int, ...]] = (429, 503)

    def is_refused(self, status: int, body: Any) -> bool:
        return 400 <= status < 500 and (self.check is None or self.may_refuse)


class Embeddings(Protocol):
    """A server of OpenAI's embeddings with images besides."""

    max_images: int

    def texts(self, texts: list[str], form: str = "float") -> bytes: ...
    def images(self, files: list[bytes], form: str = "float") -> bytes: ...
    def mistakes(self, good: bytes) -> Iterator[tuple[str, bytes]]: ...


class Infinity:
    """POST /embeddings; what the texts are, `modality` says."""

    path = "/embeddings"
    max_images = 5

    def texts(self, texts: list[str], form: str = "float") -> bytes:
        return post(self.path, {"input": texts, "encoding_format": form})

    def images(self, files: list[bytes], form: str = "float") -> bytes:
        return post(self.path, {"input": list(map(data_uri, files)), "modality": "image", "encoding_format": form})

    def mistakes(self, good: bytes) -> Iterator[tuple[str, bytes]]:
        yield from broken_images(good, lambda file: self.images([file]))
        yield "a JPEG cut off among others", self.images([good, good[: len(good) // 2], good])
        yield from broken_bodies(self.path)
        yield "an image that is no data URI", post(self.path, {"input": ["no URI"], "modality": "image"})
        yield "another modality", post(self.path, {"input": ["a"], "modality": "smell"})
        yield "a text too long", self.texts(["x" * (INFINITY_TEXT + 1)])
        yield "too many dimensions", post(self.path, {"input": ["a"], "dimensions": 100_000})


class Vllm:
    """POST /v1/embeddings; an image is a message of a chat, one a request."""

    path = "/v1/embeddings"
    max_images = 1

    def texts(self, texts: list[str], form: str = "float") -> bytes:
        return post(self.path, {"input": texts, "encoding_format": form})

    def images(self, files: list[bytes], form: str = "float") -> bytes:
        parts = [{"type": "image_url", "image_url": {"url": data_uri(file)}} for file in files]
        return post(self.path, {"messages": [{"role": "user", "content": parts}], "encoding_format": form})

    def mistakes(self, good: bytes) -> Iterator[tuple[str, bytes]]:
        yield from broken_images(good, lambda file: self.images([file]))
        yield "two images", self.images([good, good])
        yield from broken_bodies(self.path)
        part = {"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}
        yield "a file of the server", post(self.path, {"messages": [{"role": "user", "content": [part]}]})
        yield "a text too long", self.texts(["red " * 100])
        yield "another model", post(self.path, {"input": ["a"], "model": "none"})


def data_uri(file: bytes) -> str:
    """Whatever the file's format, it says PNG: servers tell formats by their content."""
    return f"data:image/png;base64,{encoded(file)}"


def broken_images(good: bytes, ask: Callable[[bytes], bytes]) -> Iterator[tuple[str, bytes]]:
    """`good` is a JPEG."""
    picture = saved(decode(good, "a file of ours"), "PNG")
    yield "no image", ask(b"no image")
    yield "an empty file", ask(b"")
    yield "a JPEG cut off", ask(good[: len(good) // 2])
    yield "a PNG cut off", ask(picture[: len(picture) // 2])


def broken_bodies(path: str) -> Iterator[tuple[str, bytes]]:
    yield "broken JSON", raw_post(path, b"{")
    yield "no input", post(path, {})
    yield "no text in a list", post(path, {"input": []})
    yield "a number for a text", post(path, {"input": 7})


def embedding_kinds(server: Embeddings, reference: Reference, cut: int, seed: int = 0) -> dict[str, Kind]:
    """Kinds of questions for a server of embeddings.

    Args:
        cut: tokens to which the server cuts texts; longer ones, of which it drops a part, are a kind of their own.
    """
    random = np.random.default_rng(seed)
    rows = np.arange(len(reference.texts))
    long = np.array(reference.tokens) > cut
    kinds = {
        "a text": Kind([_text(server, reference, "a text", [row]) for row in rows[~long]], 300),
        "texts": Kind([_text(server, reference, "texts", group) for group in _groups(rows[~long], random)], 200),
        "aborted": Kind(list(_aborted(server, reference)), 30),
    }
    if long.any():
        name = f"a text of more than {cut} tokens"
        kinds[name] = Kind([_text(server, reference, name, [row]) for row in rows[long]], 40)
    for kind, share in SHARES.items():
        kinds[f"image, {kind}"] = Kind(list(_image(server, reference, kind)), share)
    if server.max_images > 1:
        kinds["images"] = Kind(list(_images(server, reference, random)), 40)
    return kinds | mistakes(server.mistakes(reference.own[0]))


def mistakes(named: Iterator[tuple[str, bytes]]) -> dict[str, Kind]:
    """Each is a kind by itself: what follows upon it is seen so."""
    kinds = {MISTAKE + name: content for name, content in named}
    share = max(1, MISTAKES // len(kinds))
    return {kind: Kind([Asked(kind, content, 400)], share) for kind, content in kinds.items()}


def _text(server: Embeddings, reference: Reference, kind: str, rows: Sequence[int]) -> Question:
    content = server.texts([reference.texts[row] for row in rows], FORMATS[sum(rows) % 2])
    return Asked(kind, content, check=SameVectors(reference.text_vectors[list(rows)], reference.min_cosine))


def _groups(rows: np.ndarray, random: np.random.Generator) -> Iterator[list[int]]:
    """Two to MANY of them, one of them twice."""
    for _ in range(max(20, len(rows) // MANY)):
        group = random.choice(rows, random.integers(2, MANY + 1)).tolist()
        yield [*group[:-1], group[0]]


def _image(server: Embeddings, reference: Reference, kind: str) -> Iterator[Question]:
    """A server may have a bound of its own for tiny ones."""
    for row, file in enumerate(reference.files[kind]):
        check = SameVectors(reference.vectors[kind][row : row + 1], reference.min_cosine)
        content = server.images([file], FORMATS[row % 2])
        yield Asked(f"image, {kind}", content, check=check, may_refuse=kind == "tiny")


def _images(server: Embeddings, reference: Reference, random: np.random.Generator) -> Iterator[Question]:
    """Of several kinds and sizes together."""
    kinds = [kind for kind in reference.files if kind not in ("large", "tiny")]
    for number in range(100):
        chosen = random.choice(kinds, random.integers(2, server.max_images + 1))
        places = [(kind, int(random.integers(0, len(reference.files[kind])))) for kind in chosen]
        expected = np.stack([reference.vectors[kind][row] for kind, row in places])
        content = server.images([reference.files[kind][row] for kind, row in places], FORMATS[number % 2])
        yield Asked("images", content, check=SameVectors(expected, reference.min_cosine))


def _aborted(server: Embeddings, reference: Reference) -> Iterator[Question]:
    """Clients that leave after half a head, half a body, or the whole of it."""
    whole = [server.images(reference.own[: server.max_images]), server.texts(reference.texts[:32])]
    return _left(whole)


def _left(whole: Sequence[bytes]) -> Iterator[Question]:
    for content in whole:
        for length in (20, len(content) // 2, len(content)):
            yield Asked("aborted", content[:length], leaves=True)


def triton_kinds(pool: Pool, seed: int = 0) -> dict[str, Kind]:
    """Every model of a repository by itself, and the ensemble, held against the package's own."""
    random = np.random.default_rng(seed)
    rows = np.arange(len(pool.texts))
    groups = list(_groups(rows, random))
    files = [(kind, row) for kind, group in pool.files.items() for row in range(len(group))]
    kinds = {
        "clip_text": Kind(
            [_clip_text(pool, [row]) for row in rows.tolist()] + [_clip_text(pool, group) for group in groups], 300
        ),
        "clip_tokenize": Kind([_clip_tokenize(pool, group) for group in groups], 150),
        "clip_vision": Kind([_clip_vision(pool, group) for group in _picture_groups(files, random)], 200),
        "clip_preprocess": Kind([_clip_preprocess(pool, kind, row) for kind, row in files], 50),
        "aborted": Kind(
            list(_left([_clip_tokenize(pool, groups[0]).content, _zero_shot(pool, OWN, 0, random).content])), 30
        ),
    }
    for kind, share in SHARES.items():
        questions = [_zero_shot(pool, kind, row, random) for row in range(len(pool.files[kind])) for _ in range(3)]
        kinds[f"clip_zero_shot, {kind}"] = Kind(questions, share)
    return kinds | mistakes(_triton_mistakes(pool))


def strings(items: Sequence[bytes]) -> np.ndarray:
    """[items, 1], as the models in Python take texts and files."""
    return np.array([[item] for item in items], dtype=object)


def _tensors(kind: str, inputs: dict[str, np.ndarray], check: "Tensors", model: str | None = None) -> Question:
    return Asked(kind, triton_request(model or kind, inputs, binary=False), check=check)


def _clip_text(pool: Pool, rows: Sequence[int]) -> Question:
    tokens = pool.classifier.tokenizer([pool.texts[row] for row in rows])
    inputs = {name: tokens[name] for name in pool.classifier.package.encoder.towers.text.inputs}
    return _tensors("clip_text", inputs, Rows("text_embeds", pool.text_vectors[list(rows)], pool.min_cosine))


def _clip_vision(pool: Pool, places: Sequence[tuple[str, int]]) -> Question:
    pixels = np.stack([prepared(pool.classifier, pool.files[kind][row]) for kind, row in places])
    expected = np.stack([pool.vectors[kind][row] for kind, row in places])
    name = pool.classifier.package.encoder.towers.vision.image_input
    return _tensors("clip_vision", {name: pixels}, Rows("image_embeds", expected, pool.min_cosine))


def _picture_groups(files: list[tuple[str, int]], random: np.random.Generator) -> Iterator[list[tuple[str, int]]]:
    for number in range(200):
        yield [files[row] for row in random.choice(len(files), 1 + number % 4)]


def _clip_tokenize(pool: Pool, rows: Sequence[int]) -> Question:
    texts = [pool.texts[row] for row in rows]
    tokens = pool.classifier.tokenizer(texts)
    given = strings([text.encode() for text in texts])
    return _tensors("clip_tokenize", {"texts": given}, Tokens(tokens["input_ids"], tokens["attention_mask"]))


def _clip_preprocess(pool: Pool, kind: str, row: int) -> Question:
    file = pool.files[kind][row]
    name = pool.classifier.package.encoder.towers.vision.image_input
    check = Close(name, prepared(pool.classifier, file)[None], PIXEL_ERROR)
    return _tensors("clip_preprocess", {"encoded": strings([file])}, check)


def _zero_shot(pool: Pool, kind: str, row: int, random: np.random.Generator) -> Question:
    texts = random.choice(len(pool.texts), min(5, len(pool.texts)), replace=False)
    scores = pool.classifier.probabilities(pool.vectors[kind][row : row + 1] @ pool.text_vectors[texts].T)
    inputs = {
        "encoded": strings([pool.files[kind][row]]),
        "texts": strings([pool.texts[text].encode() for text in texts]),
    }
    check = Close("probabilities", scores, pool.max_error)
    return _tensors(f"clip_zero_shot, {kind}", inputs, check, "clip_zero_shot")


def prepared(classifier: ZeroShotClassifier, file: bytes) -> np.ndarray:
    found = classifier.prepare(decode(file, "a file of the pool"))
    if isinstance(found, DataError):
        raise found
    assert isinstance(found, np.ndarray)  # of the feed exact
    return found


def _triton_mistakes(pool: Pool) -> Iterator[tuple[str, bytes]]:
    good, text = pool.own[0], strings([b"a red circle"])
    encoder = pool.classifier.package.encoder
    yield from broken_images(
        good, lambda file: triton_request("clip_zero_shot", {"encoded": strings([file]), "texts": text})
    )
    yield (
        "a JPEG cut off among others",
        triton_request("clip_zero_shot", {"encoded": strings([good, good[: len(good) // 2]]), "texts": text}),
    )
    yield "an empty text", triton_request("clip_zero_shot", {"encoded": strings([good]), "texts": strings([b" "])})
    yield "a text that is not UTF-8", triton_request("clip_tokenize", {"texts": strings([b"\xff\xfe"])})
    yield "too many images", triton_request("clip_preprocess", {"encoded": strings([good] * 100)})
    yield "too many texts", triton_request("clip_tokenize", {"texts": strings([b"a"] * 1000)})
    beyond = {name: np.ones((1, 8), dtype=np.int64) for name in encoder.towers.text.inputs}
    beyond["input_ids"] *= 10**6
    yield "tokens beyond the vocabulary", triton_request("clip_text", beyond)
    yield (
        "an image of another size",
        triton_request("clip_vision", {encoder.towers.vision.image_input: np.zeros((1, 3, 5, 5), dtype=np.float32)}),
    )
    yield "another input", triton_request("clip_tokenize", {"words": text})
    yield "another model", triton_request("clip_none", {"texts": text})
    yield "broken JSON", raw_post("/v2/models/clip_tokenize/infer", b"{")


class Tensors(ABC):
    """Whether an answer of KServe's protocol, as JSON, holds what is due."""

    def __call__(self, body: Any) -> float | None:
        outputs = {
            output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in body.get("outputs", ())
        }
        return self.compare(outputs)

    @abstractmethod
    def compare(self, outputs: dict[str, np.ndarray]) -> float | None:
        """The lowest cosine, where rows are due. Raises WrongAnswerError where something else came."""


class Rows(Tensors):
    """These vectors, by their cosine."""

    def __init__(self, name: str, expected: np.ndarray, min_cosine: float) -> None:
        self.name, self.check = name, SameVectors(expected, min_cosine)

    def compare(self, outputs: dict[str, np.ndarray]) -> float:
        return self.check.hold(outputs[self.name].astype(np.float32))


class Close(Tensors):
    """These numbers, each within a distance."""

    def __init__(self, name: str, expected: np.ndarray, most: float) -> None:
        self.name, self.expected, self.most = name, expected, most

    def compare(self, outputs: dict[str, np.ndarray]) -> None:
        found = outputs[self.name]
        if found.shape != self.expected.shape:
            raise WrongAnswerError(f"{self.name} of shape {found.shape} came, and {self.expected.shape} was due")
        error = float(np.abs(found - self.expected).max())
        if not error <= self.most:  # NaN too
            raise WrongAnswerError(f"{self.name} is {error:.4f} off the package's own")


class Tokens(Tensors):
    """These tokens; how far they are padded is the server's business."""

    def __init__(self, ids: np.ndarray, mask: np.ndarray) -> None:
        self.texts = [row[kept == 1].tolist() for row, kept in zip(ids, mask, strict=True)]

    def compare(self, outputs: dict[str, np.ndarray]) -> None:
        pairs = zip(outputs["input_ids"], outputs["attention_mask"], strict=True)
        if [row[kept == 1].tolist() for row, kept in pairs] != self.texts:
            raise WrongAnswerError("tokens are not the package's own")
