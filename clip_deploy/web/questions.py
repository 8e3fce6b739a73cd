"""Requests of every kind with what each deserves: the package's own vectors, or the status of its mistake."""

import base64
import binascii
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar

import numpy as np
import orjson
from PIL import Image

from clip_deploy.core.images import decode
from clip_deploy.core.similarity import normalized, row_cosines
from clip_deploy.core.vectors import cut
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.web.api import MAX_TEXT
from clip_deploy.web.settings import Settings

MIN_COSINE = 0.9999  # of a vector with the package's own
MIN_TOGETHER = 0.99  # where a vector depends on its batch: dynamic INT8 takes its scale from the whole batch
MAX_SCORE_ERROR = 0.01  # of a probability, or of a document's score
SAMPLE = 32  # images, and texts, that are encoded alone and together, to see whether the batch matters
IN_EACH = 6  # pictures that are sent in files of every kind...
LARGE = 2  # ...and in large ones
FIRST = 4  # questions of a kind
OWN_PROMPTS = 1_024  # beyond it, a server on a CPU needs longer for the package's own classes than it may
BLOCK = 1024  # texts whose likeness is computed at a time
DEFAULT = Settings()
OWN = "as it is"  # the kind of file in which every picture is sent
EMBEDDINGS, ZERO_SHOT, RANK = "/v1/embeddings", "/v1/zero-shot", "/v1/rank"
FIELDS = {"message", "type", "param", "code"}  # of an error

Check = Callable[[Any], float | None]  # of a body: the lowest cosine, or None for a right answer without vectors


class WrongAnswerError(Exception):
    """An answer of status 200 that is not the package's."""


@dataclass(frozen=True)
class Question:
    """A request, and what it deserves.

    Attributes:
        content: all bytes that are sent.
        status: of the answer.
        check: of the body of a right answer: the lowest cosine of its vectors with the package's own, None where it
            has none; raises WrongAnswerError. Of mistakes it is None.
        leaves: whether the client hangs up without waiting for an answer.
        closes: whether it hangs up after the answer, since what it announced was not all sent.
        again: statuses that tell the client to come again.
    """

    again: ClassVar[tuple[int, ...]] = (429,)

    kind: str
    content: bytes
    status: int = 200
    check: Check | None = None
    leaves: bool = False
    closes: bool = False

    def is_refused(self, status: int, body: Any) -> bool:
        """Whether an answer is the error that is due, as OpenAI's clients read it."""
        return status == self.status and set(body.get("error", ())) == FIELDS


@dataclass(frozen=True)
class Kind:
    """Questions of one kind, and how many of 1,000 are of it."""

    questions: Sequence[Question]
    weight: int


def draw(kinds: dict[str, Kind], number: int, seed: int = 0) -> Iterator[Question]:
    """So many questions, of all kinds by their weights."""
    random = np.random.default_rng(seed)
    weights = np.array([kind.weight for kind in kinds.values()], dtype=float)
    chosen = random.choice(len(kinds), number, p=weights / weights.sum())
    every = [kind.questions for kind in kinds.values()]
    for kind, place in zip(chosen.tolist(), random.random(number).tolist(), strict=True):
        yield every[kind][int(place * len(every[kind]))]


def distinct(vectors: np.ndarray, min_cosine: float) -> list[int]:
    """Rows of vectors of unit length [rows, dimension] of which no two are as close as `min_cosine`."""
    kept: list[int] = []
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        alike = (block @ vectors[kept].T >= min_cosine).any(axis=1) if kept else np.zeros(len(block), bool)
        inside = np.tril(block @ block.T >= min_cosine, -1).any(axis=1)
        kept += [start + row for row in np.flatnonzero(~(alike | inside)).tolist()]
    return kept


class Pool:
    """Questions about pictures and texts, with answers computed beforehand.

    Attributes:
        kinds: by name.
        min_cosine: below it a vector is wrong.
        texts: with vectors of which no two are as close as `min_cosine`, so that one in the place of another is found.
    """

    def __init__(
        self, classifier: ZeroShotClassifier, pictures: Sequence[Image.Image], texts: Sequence[str], seed: int = 0
    ) -> None:
        self.classifier, self.random = classifier, np.random.default_rng(seed)
        self.own = _own_files(pictures)
        depends = _depends_on_batch(classifier, pictures[:SAMPLE], list(texts[:SAMPLE]))
        self.min_cosine = MIN_TOGETHER if depends else MIN_COSINE
        self.max_error = 1.0 if depends else MAX_SCORE_ERROR
        self.texts, self.text_vectors = self._distinct_texts(list(dict.fromkeys(texts)))
        self.files = {kind: list(files) for kind, files in self._files(pictures).items()}
        self.vectors = {kind: self._embedded(files) for kind, files in self.files.items()}
        self.kinds = self._kinds()

    def each(self) -> Iterator[Question]:
        """Every mistake, and of any other kind the first questions."""
        for name, kind in self.kinds.items():
            yield from kind.questions if name == "mistake" else kind.questions[:FIRST]

    def draw(self, number: int, seed: int = 0) -> Iterator[Question]:
        """So many questions, of all kinds by their weights."""
        return draw(self.kinds, number, seed)

    def _distinct_texts(self, texts: list[str]) -> tuple[list[str], np.ndarray]:
        vectors = self.classifier.embed_texts(texts)
        kept = distinct(vectors, self.min_cosine)
        return [texts[row] for row in kept], vectors[kept]

    def _files(self, pictures: Sequence[Image.Image]) -> dict[str, Iterator[bytes]]:
        counts = {kind: LARGE if kind == "large" else IN_EACH for kind in FILES}
        files = {kind: map(write, pictures[: counts[kind]]) for kind, write in FILES.items()}
        return files | {OWN: iter(self.own)}

    def _embedded(self, files: list[bytes]) -> np.ndarray:
        return self.classifier.embed_images([decode(file, "a file of the pool") for file in files])

    def _kinds(self) -> dict[str, Kind]:
        kinds = {
            "a text": Kind(list(self._one_text()), 300),
            "texts": Kind(list(self._lists()), 200),
            "texts and images": Kind(list(self._mixed()), 40),
            "fewer dimensions": Kind(list(self._narrow()), 40),
            "zero-shot": Kind(list(self._zero_shot()), 40),
            "rank": Kind(list(self._rank()), 40),
            "mistake": Kind([Question("mistake", *mistake) for mistake in self._mistakes()], 150),
            "oversized": Kind(list(self._oversized()), 10),
            "aborted": Kind(list(self._aborted()), 30),
        }
        shares = {kind: 10 for kind in FILES} | {"large": 1, OWN: 20}
        pictures = {f"image, {kind}": Kind(list(self._images(kind)), share) for kind, share in shares.items()}
        return kinds | pictures

    def _one_text(self) -> Iterator[Question]:
        for row, text in enumerate(self.texts):
            given = {"input": text} if row % 3 else {"input": [text], "encoding_format": "base64"}
            yield self._vectors("a text", given, self.text_vectors[row : row + 1])

    def _lists(self) -> Iterator[Question]:
        """One to eight, some of them twice."""
        for _ in range(max(200, len(self.texts) // 8)):
            rows = self.random.integers(0, len(self.texts), self.random.integers(1, 9))
            rows[self.random.integers(0, len(rows))] = rows[0]
            body = {"input": [self.texts[row] for row in rows], "encoding_format": FORMATS[len(rows) % 2]}
            yield self._vectors("texts", body, self.text_vectors[rows])

    def _narrow(self) -> Iterator[Question]:
        for row, width in zip(range(len(self.texts)), cycle([1, self.classifier.dimension // 2]), strict=False):
            vectors = cut(self.text_vectors[row : row + 1], width)
            yield self._vectors("fewer dimensions", {"input": self.texts[row], "dimensions": width}, vectors)

    def _images(self, kind: str) -> Iterator[Question]:
        """Each in the forms that clients of OpenAI, Jina, infinity and vLLM send."""
        for row, file in enumerate(self.files[kind]):
            for form in range(3 if kind != "large" else 1):
                body = IMAGE_FORMS[(row + form) % len(IMAGE_FORMS)](encoded(file))
                yield self._vectors(f"image, {kind}", body, self.vectors[kind][row : row + 1])

    def _mixed(self) -> Iterator[Question]:
        kinds = [kind for kind in self.files if kind != "large"]
        for number in range(100):
            items: list[Any] = []
            vectors = []
            for place in range(2 + number % 5):
                if place % 2:
                    row = int(self.random.integers(0, len(self.texts)))
                    items.append(self.texts[row] if number % 2 else {"text": self.texts[row]})
                    vectors.append(self.text_vectors[row])
                else:
                    kind = kinds[self.random.integers(0, len(kinds))]
                    row = int(self.random.integers(0, len(self.files[kind])))
                    items.append({"image": encoded(self.files[kind][row])})
                    vectors.append(self.vectors[kind][row])
            body = {"input": items, "encoding_format": FORMATS[number % 2]}
            yield self._vectors("texts and images", body, np.stack(vectors))

    def _vectors(self, kind: str, body: dict[str, Any], expected: np.ndarray) -> Question:
        return Question(kind, post(EMBEDDINGS, body), check=SameVectors(expected, self.min_cosine))

    def _zero_shot(self) -> Iterator[Question]:
        labels, files = self.classifier.labels, self.own
        images = self.vectors[OWN]
        classes = None
        if 0 < len(labels.classes) * len(labels.templates) <= OWN_PROMPTS:
            classes = self.classifier.class_embeddings(self.classifier.embed_texts(self.classifier.class_prompts()))
        for row, file in enumerate(files):
            body: dict[str, Any] = {"image": encoded(file)}
            if classes is not None and row % 4 == 0:
                names, targets = labels.classes, classes
            else:
                rows = self.random.choice(len(self.texts), min(5, len(self.texts)), replace=False)
                names, targets = [self.texts[place] for place in rows], self.text_vectors[rows]
                body["labels"] = names
            scores = self.classifier.probabilities(images[row : row + 1] @ targets.T)[0]
            expected = dict(zip(names, scores.tolist(), strict=True))
            check = SameScores(expected, "labels", "label", "probability", self.max_error)
            yield Question("zero-shot", post(ZERO_SHOT, body), check=check)

    def _rank(self) -> Iterator[Question]:
        images = self.vectors[OWN]
        for row, file in enumerate(self.own):
            rows = self.random.choice(len(self.texts), min(4, len(self.texts)), replace=False)
            body = {"query": {"image": encoded(file)}, "documents": [self.texts[place] for place in rows]}
            scores = self.text_vectors[rows] @ images[row]
            expected = dict(enumerate(scores.tolist()))
            check = SameScores(expected, "results", "index", "relevance_score", self.max_error)
            yield Question("rank", post(RANK, body), check=check)

    def _mistakes(self) -> Iterator[tuple[bytes, int]]:
        good = encoded(self.own[0])
        cut_off = encoded(self.own[0][: len(self.own[0]) // 2])
        bad: list[dict[str, Any]] = [
            {},
            {"input": None},
            {"input": ""},
            {"input": " \n"},
            {"input": []},
            {"input": 7},
            {"input": [1, 2, 3]},
            {"input": [[1, 2], [3]]},
            {"input": ["a", ""]},
            {"input": "x" * (MAX_TEXT + 1)},
            {"input": "a", "encoding_format": "hex"},
            {"input": "a", "dimensions": 0},
            {"input": "a", "dimensions": self.classifier.dimension + 1},
            {"input": "a", "dimensons": 8},
            {"input": "a", "model": 1},
            {"input": "a", "modality": "sound"},
            {"input": [{"image": good, "text": "a"}]},
            {"input": [{"image": ""}]},
            {"input": [{"image": "not base64!"}]},
            {"input": [{"image": "data:image/png,plain"}]},
            {"input": [{"image": encoded(b"no image")}]},
            {"input": [{"image": cut_off}]},
            {"input": [{"image": good}, {"image": cut_off}, "a"]},
            {"input": [{"image": encoded(_white(1, 100_000))}]},
            {"input": [{"image": encoded(_white(9_000, 9_000))}]},
            {"input": [{"image": "file:///etc/passwd"}]},
            {"input": [{"image": "https://127.0.0.1/a.png"}]},
            {"messages": []},
        ]
        for body in bad:
            yield post(EMBEDDINGS, body), 400
        yield raw_post(EMBEDDINGS, b"{"), 400
        yield raw_post(EMBEDDINGS, b"[]"), 400
        yield raw_post(EMBEDDINGS, b'{"input": "\xff\xfe"}'), 400
        yield raw_post(EMBEDDINGS, b'{"input": "a"}', "text/plain"), 415
        yield post(EMBEDDINGS, {"input": "a", "model": "none"}), 404
        yield post("/v1/none", {"input": "a"}), 404
        yield b"DELETE /v1/embeddings HTTP/1.1\r\nhost: localhost\r\n\r\n", 405
        yield post(EMBEDDINGS, {"input": "a"}).replace(b"localhost", b"a.example"), 421
        yield post(ZERO_SHOT, {"image": good, "labels": ["a"], "template": "no place"}), 400
        yield post(ZERO_SHOT, {"labels": ["a"]}), 400
        yield post(RANK, {"query": "a", "documents": []}), 400

    def _oversized(self) -> Iterator[Question]:
        """A body that announces too much, sent in part and whole; too many items; too long a header."""
        head, body = _head(EMBEDDINGS, DEFAULT.max_body + 1), b" " * (DEFAULT.max_body + 1)
        yield Question("oversized", head + body[:16_384], 413, closes=True)
        yield Question("oversized", head + body, 413)
        yield Question("oversized", post(EMBEDDINGS, {"input": ["a"] * (DEFAULT.max_items + 1)}), 413)
        long = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"x" * 40_000 + b"\r\n\r\n"
        yield Question("oversized", long, 431, closes=True)

    def _aborted(self) -> Iterator[Question]:
        """Clients that leave after half a head, half a body, or the whole of it."""
        whole = [
            post(EMBEDDINGS, {"input": [{"image": encoded(file)} for file in self.own[:8]]}),
            post(EMBEDDINGS, {"input": self.texts[:32]}),
        ]
        for content in whole:
            for length in (20, len(content) // 2, len(content)):
                yield Question("aborted", content[:length], leaves=True)


class SameVectors:
    """Whether an answer holds these vectors [items, dimension], in this order."""

    def __init__(self, expected: np.ndarray, min_cosine: float) -> None:
        self.expected, self.min_cosine = normalized(expected), min_cosine

    def __call__(self, body: Any) -> float:
        data = body["data"]
        if [item["index"] for item in data] != list(range(len(self.expected))):
            raise WrongAnswerError(f"{len(self.expected)} items were sent, and {len(data)} vectors came")
        rows = [item["embedding"] for item in data]
        if isinstance(rows[0], str):
            found = np.frombuffer(b"".join(map(binascii.a2b_base64, rows)), "<f4").reshape(len(rows), -1)
        else:
            found = np.array(rows, dtype=np.float32)
        return self.hold(found)

    def hold(self, found: np.ndarray) -> float:
        """The lowest cosine of vectors [items, dimension] with those that are due."""
        if found.shape != self.expected.shape:
            raise WrongAnswerError(f"vectors of shape {found.shape} came, and {self.expected.shape} were due")
        cosine = float(np.einsum("ij,ij->i", normalized(found), self.expected).min())
        if not cosine >= self.min_cosine:  # NaN too
            raise WrongAnswerError(f"a vector's cosine with the one that is due is {cosine:.6f}")
        return cosine


class SameScores:
    """Whether an answer holds these scores, by label or index, the highest first."""

    def __init__(self, expected: dict[Any, float], field: str, name: str, score: str, most: float) -> None:
        self.expected, self.field, self.name, self.score, self.most = expected, field, name, score, most

    def __call__(self, body: Any) -> None:
        rows = body[self.field]
        scores = [row[self.score] for row in rows]
        if {row[self.name] for row in rows} != set(self.expected) or scores != sorted(scores, reverse=True):
            raise WrongAnswerError(f"{self.field} are not those that were sent, or out of order")
        error = max(abs(row[self.score] - self.expected[row[self.name]]) for row in rows)
        if not error <= self.most:
            raise WrongAnswerError(f"a {self.score} is {error:.3f} off the package's own")


FORMATS = ("float", "base64")
IMAGE_FORMS: tuple[Callable[[str], dict[str, Any]], ...] = (
    lambda image: {"input": [{"image": image}]},
    lambda image: {"input": [{"image": f"data:image/png;base64,{image}"}], "encoding_format": "base64"},
    lambda image: {"input": f"data:image/png;base64,{image}", "modality": "image"},
    lambda image: {"messages": [{"role": "user", "content": [_image_part(image)]}], "encoding_format": "base64"},
)


def _image_part(image: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}


def _depends_on_batch(classifier: ZeroShotClassifier, pictures: Sequence[Image.Image], texts: list[str]) -> bool:
    """Whether a vector is another one where others are encoded with it."""
    prepared = [classifier.prepare(picture) for picture in pictures]
    alone: list[Any] = [classifier.encode_prepared([image])[0] for image in prepared]
    alone += [classifier.encode_texts([text])[0][0] for text in texts]
    together = [*classifier.encode_prepared(prepared), *classifier.encode_texts(texts)[0]]
    return float(row_cosines(np.stack(alone), np.stack(together)).min()) < MIN_COSINE


def post(path: str, body: dict[str, Any]) -> bytes:
    """A request's bytes."""
    return raw_post(path, orjson.dumps(body))


def raw_post(path: str, body: bytes, kind: str = "application/json") -> bytes:
    """A whole POST as its bytes."""
    return _head(path, len(body), kind) + body


def _head(path: str, length: int, kind: str = "application/json") -> bytes:
    fields = f"host: localhost\r\ncontent-type: {kind}\r\ncontent-length: {length}"
    return f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode()


def encoded(content: bytes) -> str:
    """In base64."""
    return base64.b64encode(content).decode()


def _own_files(pictures: Sequence[Image.Image]) -> list[bytes]:
    return [saved(picture, "JPEG", quality=90) for picture in pictures]


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """A file of one of Pillow's formats."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _alpha(picture: Image.Image) -> Image.Image:
    """Fading out to the right."""
    picture = picture.copy()
    picture.putalpha(Image.linear_gradient("L").rotate(90).resize(picture.size))
    return picture


def _deep_grey(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


def _turned(picture: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    return saved(picture, "JPEG", exif=exif, quality=90)


FILES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG": lambda picture: saved(picture.resize((96, 80)), "JPEG"),
    "progressive JPEG": lambda picture: saved(picture, "JPEG", progressive=True),
    "CMYK JPEG": lambda picture: saved(picture.convert("CMYK"), "JPEG"),
    "JPEG turned by EXIF": _turned,
    "grey JPEG": lambda picture: saved(picture.convert("L"), "JPEG"),
    "PNG": lambda picture: saved(picture, "PNG"),
    "PNG with alpha": lambda picture: saved(_alpha(picture), "PNG"),
    "PNG with palette": lambda picture: saved(picture.quantize(16), "PNG"),
    "PNG of 16 bits of grey": lambda picture: saved(_deep_grey(picture), "PNG"),
    "WebP": lambda picture: saved(picture, "WEBP"),
    "GIF": lambda picture: saved(picture, "GIF"),
    "BMP": lambda picture: saved(picture, "BMP"),
    "TIFF": lambda picture: saved(picture, "TIFF", compression="tiff_lzw"),
    "tiny": lambda picture: saved(picture.resize((3, 2)), "PNG"),
    "large": lambda picture: saved(picture.resize((2400, 1800)), "JPEG"),
}


def _white(width: int, height: int) -> bytes:
    return saved(Image.new("1", (width, height), 1), "PNG")


def made_up_texts(words: Sequence[str], number: int, seed: int = 0) -> list[str]:
    """So many distinct texts of two to ten of these words."""
    random = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < number:
        chosen = random.integers(0, len(words), random.integers(2, 11))
        found[" ".join(words[row] for row in chosen)] = None
    return list(found)
