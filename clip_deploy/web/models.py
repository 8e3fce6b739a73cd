"""The packages that are served, by name and version, each with a batcher for either tower."""

import asyncio
import binascii
import re
import warnings
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_deploy.core.artifact import MANIFEST
from clip_deploy.core.environment import cores
from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.core.images import Encoded
from clip_deploy.core.manifest import INSIDE
from clip_deploy.core.package import DEFAULT_BATCH
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.web.api import IMAGE, Fetched, Item, Picture, Text
from clip_deploy.web.batcher import Batcher
from clip_deploy.web.errors import RequestError, bad
from clip_deploy.web.metrics import Metrics, TowerMetrics
from clip_deploy.web.settings import Settings

# No format that runs a program (EPS), and none that only a file's ending tells.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
VERSION = 12  # digits of a fingerprint
CACHED_TEXTS = 16_384
SHRINK = "shrink it; --max-megapixels of the server is the limit"
TITLE = re.compile(r"(?P<name>[^:\s]+)(:(?P<version>[^:\s]+))?")  # of NAME:VERSION=FOLDER


@dataclass(frozen=True)
class Embedded:
    """float32 [items, dimension] of unit length, and the tokens of all texts."""

    rows: np.ndarray
    tokens: int


class Served:
    """One package. Everything but the threads of its batchers runs on the event loop."""

    def __init__(
        self,
        name: str,
        version: str,
        created: int,
        classifier: ZeroShotClassifier,
        settings: Settings,
        metrics: Metrics,
    ):
        """`created` is when it was packaged, in seconds since 1970."""
        self.name, self.version, self.id, self.created = name, version, f"{name}:{version}", created
        self.classifier = classifier
        on_gpu, towers = classifier.device == "cuda", classifier.package.encoder.towers
        self.pictures = Batcher(
            self._seen,
            towers.vision.best_batch,
            settings.max_queue,
            TowerMetrics(metrics, self.id, "vision"),
            settings.max_wait_ms / 1e3,
            self._prepared,
            cores(),
            on_gpu,
            self._record_images,
        )
        self.texts = Batcher(
            self._encoded,
            max(towers.text.batch_sizes, default=DEFAULT_BATCH),
            settings.max_queue,
            TowerMetrics(metrics, self.id, "text"),
            on_gpu=on_gpu,
            warm_up=self._record_texts,
        )
        self.hits, self.misses = (metrics.cache.labels(self.id, result) for result in ("hit", "miss"))
        self.tokens: OrderedDict[str, int] = OrderedDict()  # of the texts in the cache
        self.classes: asyncio.Task[np.ndarray] | None = None
        metrics.models.labels(self.id, classifier.fingerprint).set(1)

    def warm_up(self) -> None:
        """Call both towers, so that what they refuse is said now, and no request pays for the first call."""
        self.classifier.encode_prepared([self._blank()])
        self.classifier.encode_texts(["a"])

    def _blank(self) -> Any:
        """Of a JPEG file, so that a GPU's decoder is warm too."""
        content = BytesIO()
        Image.new("RGB", (64, 64)).save(content, "jpeg")
        return self.classifier.prepare(Encoded(content.getvalue, "blank"))

    def _record_images(self) -> None:
        """On a GPU, each size of a batch."""
        for size in self.classifier.package.encoder.towers.vision.batch_sizes:
            self.classifier.encode_prepared([self._blank()] * size)

    def _record_texts(self) -> None:
        """On a GPU, each size of a batch of short texts and of long ones."""
        encoder = self.classifier.package.encoder
        for size in encoder.towers.text.batch_sizes:
            for text in ("a", "a " * encoder.context_length):
                self.classifier.encode_texts([text] * size)

    async def start(self) -> None:
        await self.pictures.start()
        await self.texts.start()

    def close(self) -> None:
        self.pictures.close()
        self.texts.close()

    async def embed(self, items: Sequence[Item]) -> Embedded:
        """Embeddings of texts and images, in their order.

        Raises RequestError where an image cannot be read or too much waits.
        """
        texts = {row: item.text for row, item in enumerate(items) if isinstance(item, Text)}
        pictures = {row: item for row, item in enumerate(items) if not isinstance(item, Text)}
        if not pictures:
            encoded, seen = await self.embed_texts(list(texts.values())), []
        elif not texts:
            encoded, seen = [], await self.pictures(list(pictures.values()))
        else:
            encoded, seen = await _both(self.embed_texts(list(texts.values())), self.pictures(list(pictures.values())))
        rows = np.empty((len(items), self.classifier.dimension), dtype=np.float32)
        for row, (embedding, _) in zip(texts, encoded, strict=True):
            rows[row] = embedding
        for row, embedding in zip(pictures, seen, strict=True):
            rows[row] = embedding
        return Embedded(rows, sum(tokens for _, tokens in encoded))

    async def embed_texts(self, texts: Sequence[str], is_bounded: bool = True) -> list[tuple[np.ndarray, int]]:
        """An embedding [dimension] of each text, and its tokens; what was seen before comes from the cache."""
        found = {text: self._cached(text) for text in texts}
        missing = [text for text, known in found.items() if known is None]
        self.hits.inc(len(found) - len(missing))
        self.misses.inc(len(missing))
        for text, (embedding, tokens) in zip(missing, await self.texts(missing, is_bounded), strict=True):
            self.classifier.cache.put(text, embedding)
            self.tokens[text] = tokens
            found[text] = embedding, tokens
        while len(self.tokens) > CACHED_TEXTS:
            self.tokens.popitem(last=False)
        return [found[text] for text in texts]  # type: ignore[misc]

    async def class_embeddings(self) -> np.ndarray:
        """[classes, dimension] of the package's own classes, encoded once, when they are first asked for."""
        if self.classes is None or (self.classes.done() and self.classes.exception()):
            self.classes = asyncio.get_running_loop().create_task(self._class_embeddings())
        return await asyncio.shield(self.classes)

    async def _class_embeddings(self) -> np.ndarray:
        encoded = await self.embed_texts(self.classifier.class_prompts(), is_bounded=False)
        return self.classifier.class_embeddings(np.stack([embedding for embedding, _ in encoded]))

    def _cached(self, text: str) -> tuple[np.ndarray, int] | None:
        embedding, tokens = self.classifier.cache.get(text), self.tokens.get(text)
        if embedding is None or tokens is None:
            return None
        self.tokens.move_to_end(text)
        return embedding, tokens

    def _encoded(self, texts: list[str]) -> list[tuple[np.ndarray, int]]:
        embeddings, tokens = self.classifier.encode_texts(texts)
        return list(zip(embeddings, tokens, strict=True))

    def _seen(self, prepared: list[Any]) -> list[Any]:
        """Embeddings. What a GPU left to the CPU may turn out to be no image here."""
        found = self.classifier.encode_prepared(prepared)
        return [
            _refused(answer, each.picture.name) if isinstance(answer, DataError) else answer
            for answer, each in zip(found, prepared, strict=True)
        ]

    def _prepared(self, picture: Picture | Fetched) -> Any:
        """Runs in a thread of the batcher."""
        try:
            content = picture.content if isinstance(picture, Fetched) else image_bytes(picture)
        except RequestError as refusal:
            return refusal
        image = self.classifier.prepare(Encoded(lambda: content, picture.param, None, FORMATS))
        return _refused(image, picture.param) if isinstance(image, DataError) else image


def _refused(error: DataError, param: str) -> RequestError:
    return bad(_told(error), param, "invalid_image")


def _told(error: DataError) -> str:
    """What is wrong with an image, as a client is told: the most pixels, and the formats, are the server's."""
    if isinstance(error.__cause__, Image.DecompressionBombError):
        return f"{str(error).partition(' ')[0]} has more than {Image.MAX_IMAGE_PIXELS:,} pixels: {SHRINK}"
    said = str(error).replace("shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS", SHRINK)
    return said.replace("of no format that Pillow knows", f"accepted are {', '.join(FORMATS)}")


async def _both(first: Any, second: Any) -> Any:
    """Both results; where one fails, the other stops."""
    tasks = [asyncio.ensure_future(first), asyncio.ensure_future(second)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def image_bytes(picture: Picture) -> bytes:
    """Of base64 or a data URI. Raises RequestError where it is neither."""
    source, param = picture.source, picture.param
    if source.startswith("data:"):
        head, _, source = source.partition(",")
        if not head.endswith(";base64"):
            raise bad(f"{param} is a data URI without ;base64: give an image as {IMAGE}", param, "invalid_image")
    try:
        return binascii.a2b_base64(source, strict_mode=True)
    except ValueError:  # letters of no ASCII too
        pass
    try:
        return binascii.a2b_base64("".join(source.split()), strict_mode=True)  # in lines, as mail has it
    except ValueError as error:
        raise bad(f"{param} is not base64 ({error}): give an image as {IMAGE}", param, "invalid_image") from error


def base64_of(row: np.ndarray) -> str:
    """As OpenAI's clients read it: little-endian float32."""
    return b64encode(row.astype("<f4").tobytes()).decode()


class Models:
    """All packages, the first one for requests that name none."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Open and warm up each package.

        Raises DeployError as ZeroShotClassifier.open does, where two have one name and version, and DataError where a
        name will not do.
        """
        # Of an image between one and two times of it Pillow warns; clip_deploy.core.images refuses it.
        Image.MAX_IMAGE_PIXELS = int(settings.max_megapixels * 1e6)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", "a text is longer than")  # one a request, with what a client wrote
        self.by_name: dict[str, Served] = {}
        self.served: list[Served] = []
        for given in [parsed(each) for each in settings.packages]:
            self._add(_open(*given, settings, metrics))

    def _add(self, served: Served) -> None:
        if served.id in self.by_name:
            raise DeployError(f"{served.id} is given twice: give each its own name, as in NAME:VERSION=FOLDER")
        self.served.append(served)
        self.by_name[served.id] = served
        self.by_name.setdefault(served.name, served)

    def __getitem__(self, name: str | None) -> Served:
        """By NAME, which is the first of that name, or NAME:VERSION; None is the first of all.

        Raises RequestError where there is none such.
        """
        if name is None:
            return self.served[0]
        if name not in self.by_name:
            known = ", ".join(served.id for served in self.served)
            raise RequestError(404, f"model {name[:100]!r} is not served: there is {known}", "model", "model_not_found")
        return self.by_name[name]

    async def start(self) -> None:
        for served in self.served:
            await served.start()

    def close(self) -> None:
        for served in self.served:
            served.close()


def parsed(given: str) -> tuple[str, str, str]:
    """NAME, VERSION and FOLDER of a package, the first two empty where they are not given."""
    title, separator, folder = given.partition("=")
    if not separator or Path(given).exists():
        return "", "", given
    if not (found := TITLE.fullmatch(title)) or not folder:
        raise DataError(f"{given!r} names no package: give FOLDER, NAME=FOLDER or NAME:VERSION=FOLDER")
    return found["name"], found["version"] or "", folder


def _open(name: str, version: str, folder: str, settings: Settings, metrics: Metrics) -> Served:
    """Raises DeployError as check_folder and ZeroShotClassifier.open do."""
    check_folder(folder)
    classifier = ZeroShotClassifier.open(
        folder,
        device=settings.device,
        threads=settings.threads,
        cache_size=CACHED_TEXTS,
        feed=settings.feed,
        allow_spinning=False,  # the threads that read images need the cores
    )
    served = Served(
        name or classifier.package.origin.run.model,
        version or classifier.fingerprint[:VERSION],
        int((Path(folder) / INSIDE).stat().st_mtime),
        classifier,
        settings,
        metrics,
    )
    served.warm_up()
    return served


def check_folder(folder: str) -> None:
    """Raises DeployError with the way out for folders that often stand for a package."""
    if reason := _no_package(Path(folder)):
        raise DeployError(f"{folder} is not a package: {reason}")


def _no_package(folder: Path) -> str | None:
    """What a folder of the pipeline is that is no package, and what to give in its place."""
    if (folder / MANIFEST).is_file():
        return f"it is a target, which `clip-deploy package {folder.resolve().name} --output FOLDER` packages"
    if any((folder / models / "clip_vision" / "config.pbtxt").is_file() for models in (".", "python", "onnxruntime")):
        return "it is a model repository for Triton: give the package that it was made of, as artifacts/package"
    return None
