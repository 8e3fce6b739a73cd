"""A package, opened: zero-shot answers and embeddings with numpy, Pillow, tokenizers and its runtime alone."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm  # tokenizers brings it along, through huggingface_hub

from clip_deploy.core.environment import MAX_THREADS, cores
from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.core.fast_preprocessing import FastPreprocessing
from clip_deploy.core.images import jpeg_of, read_image, rgb
from clip_deploy.core.jpeg import Jpeg, whole_jpeg
from clip_deploy.core.package import DEFAULT_BATCH, Package, read_labels, read_package, read_preprocessing
from clip_deploy.core.preprocessing import Preprocessing
from clip_deploy.core.vectors import unit
from clip_deploy.inference.embedding_sample import EmbeddingSample
from clip_deploy.inference.encoders import PackageEncoder
from clip_deploy.inference.gpu_feed import Batch, GpuFeed
from clip_deploy.inference.scores import Scoring
from clip_deploy.inference.text_cache import TextCache
from clip_deploy.inference.tokenizer import Tokenizer, check_texts

DEVICES = ("cpu", "cuda")
CPU_FEEDS = ("exact", "fast")  # ways from a file to pixel values: the checkpoint's own, by Pillow, or FastPreprocessing
FEEDS = (*CPU_FEEDS, "gpu")  # the last one is GpuPreprocessing
AHEAD = 2  # batches that are read and preprocessed while one is encoded
AHEAD_ON_GPU = 4  # two decoders have one each, and one is ready

T = TypeVar("T")
Picture = Path | str | Image.Image | Callable[[], Image.Image]  # a call reads one as RGB, or raises DataError


class Undecoded(NamedTuple):
    """A JPEG file for the GPU, and its picture, in case that it does not decode it."""

    jpeg: Jpeg
    picture: Picture

    @property
    def nbytes(self) -> int:
        return len(self.jpeg.content)


Prepared = np.ndarray | Undecoded | DataError


class Prediction(NamedTuple):
    """A text and its probability, 0 to 1."""

    text: str
    probability: float


class ZeroShotClassifier:
    """Both towers of a package. Embeddings are float32 of unit length: their products are cosines.

    Where INT8 measures activations as they come (ort-int8-dynamic), an embedding depends a little on what else is in
    its batch; the gates hold for batches of 1, 3 and 8.

    Attributes:
        package: what manifest.json says.
        labels: the classes and templates that the package came with.
        fingerprint: a hash of all that makes an embedding of an image or a text.
        sample: what keeps some of the images' embeddings, or None.
        batch_size: of images, that gave most per second in the benchmark.
        feed: one of FEEDS.
    """

    def __init__(
        self,
        folder: Path,
        package: Package,
        device: str,
        threads: int | None,
        cache_size: int,
        cache_folder: Path | None,
        sample: EmbeddingSample | None,
        feed: str = "exact",
        allow_spinning: bool = True,
    ) -> None:
        self.package, self.device, self.sample, self.feed = package, device, sample, feed
        encoder = package.encoder
        self.dimension, self.batch_size = encoder.dimension, encoder.towers.vision.best_batch
        self.labels = read_labels(folder)
        self.scoring = Scoring(encoder.logit_scale, encoder.logit_bias, encoder.activation)
        self.fingerprint = package.fingerprint()
        self.preprocessor = read_preprocessing(folder)
        self.fast = FastPreprocessing(self._settings()) if feed == "fast" else None
        self.tokenizer = Tokenizer(
            folder / "tokenizer.json", encoder.context_length, encoder.pad_to_context, encoder.pad_token
        )
        of_texts = package.fingerprint("text")
        self.cache = TextCache(of_texts, encoder.dimension, cache_size, cache_folder)
        self.encoder = PackageEncoder(folder, encoder, device, threads, allow_spinning=allow_spinning, unit_length=True)
        self.gpu = GpuFeed(self._settings(), self._read) if feed == "gpu" else None

    @classmethod
    def open(
        cls,
        package: Path | str,
        device: str | None = None,
        threads: int | None = None,
        cache_size: int = 4096,
        cache_folder: Path | str | None = None,
        sample_folder: Path | str | None = None,
        sample_share: float = 0.01,
        feed: str = "exact",
        allow_spinning: bool = True,
    ) -> "ZeroShotClassifier":
        """Open a package after checking that its files are those that were judged.

        Args:
            package: the folder that the stage `package` wrote.
            device: "cpu" or "cuda"; None for the one it was made for.
            threads: of each tower's pool; None leaves the runtime's default.
            cache_size: texts whose embeddings are kept in memory.
            cache_folder: where they are kept on disk besides, or None.
            sample_folder: where a sample of the images' embeddings is kept for `clip-deploy drift`, or None.
            sample_share: of the images whose embeddings go there, above 0 and at most 1.
            feed: "exact" gives the pixels of the checkpoint's own processor; "fast" reads JPEG files several times as
                fast, with pixels about a grey level off (the extra `fast`), and everything else as "exact" does;
                "gpu" decodes and resizes JPEG files on the GPU (the extra `fast-gpu`).
            allow_spinning: whether a tower's threads wait busily for work: quick for one image at a time, and a waste
                where many are embedded, since those that read images need the cores meanwhile.

        Raises:
            DeployError: it is no package, nothing in it was fit to ship, a file is not the one that was judged, device
                or feed is unknown or they do not go together, the graph resizes images itself and the feed is not
                "exact", or the runtime refuses a file.
            UnavailableError: a library of the runtime or the feed is missing or too old, or the device is; the message
                says what pip must install.
        """
        folder = Path(package)
        found = read_package(folder)
        chosen = device or found.encoder.device
        if chosen not in DEVICES:
            raise DeployError(f"device is {chosen!r}: accepted are {', '.join(DEVICES)}")
        if feed not in FEEDS:
            raise DeployError(f"feed is {feed!r}: accepted are {', '.join(FEEDS)}")
        if feed == "gpu" and chosen != "cuda":
            raise DeployError(
                "feed is 'gpu', and the package is opened on cpu: give the device cuda (--device cuda), or another feed"
            )
        if threads is not None and (not isinstance(threads, Integral) or not 1 <= threads <= MAX_THREADS):
            raise DeployError(f"threads is {threads!r}: give 1 to {MAX_THREADS}, or nothing for the runtime's default")
        sample = EmbeddingSample(Path(sample_folder), sample_share) if sample_folder else None
        cache = Path(cache_folder) if cache_folder else None
        return cls(folder, found, chosen, threads, cache_size, cache, sample, feed, allow_spinning)

    def predict(self, image: Picture, texts: Iterable[str] | None = None) -> list[Prediction]:
        """The probability of each text for one image, the highest first.

        Args:
            image: a file, which is turned upright as EXIF says, or a picture of Pillow, which is taken as it lies.
            texts: as a person would describe the image; None takes the package's classes, in its templates.

        CLIP's probabilities are a softmax over the texts and add up to 1; SigLIP's are those of each text by itself.

        Raises DataError where the image cannot be read, there are no texts, or one is empty.
        """
        names = self.labels.classes if texts is None else _listed(texts)
        if texts is None and not names:
            raise DataError("the package has no classes of its own: give the texts to choose from")
        prompts = self.embed_texts(self.class_prompts() if texts is None else names)
        targets = self.class_embeddings(prompts) if texts is None else prompts
        scores = self.probabilities(self.embed_images([image]) @ targets.T)[0]
        order = np.argsort(-scores, kind="stable")
        return [Prediction(names[row], float(scores[row])) for row in order]

    def probabilities(self, cosines: np.ndarray) -> np.ndarray:
        """Probabilities [images, texts], 0 to 1, of cosines [images, texts], as the model itself scores them."""
        return self.scoring.probabilities(cosines)

    def embed_images(self, images: Sequence[Picture], batch_size: int | None = None) -> np.ndarray:
        """Embeddings [images, dimension], in their order. Without a batch size it is the package's best.

        Raises DataError where one cannot be read, or `images` is a single one and no list.
        """
        _check_list(images)
        if not isinstance(images, Sized):
            raise DataError(f"images is {images!r:.80}: give a list, or take embed_each, which needs no length")
        rows = np.empty((len(images), self.dimension), dtype=np.float32)
        steps = tqdm(self.embed_each(images, batch_size), total=len(images), desc="embed images", disable=None)
        for row, embedding in enumerate(steps):
            if isinstance(embedding, DataError):
                raise embedding
            rows[row] = embedding
        return rows

    def embed_each(self, images: Iterable[Picture], batch_size: int | None = None) -> Iterator[np.ndarray | DataError]:
        """One embedding [dimension] after the other, and in its place the error where an image cannot be read.

        Images are read and preprocessed by threads while the batch before is encoded.
        """
        _check_list(images)
        size = self.batch_size if batch_size is None else batch_size
        check_count("batch_size", size)
        for answers in self.embed_batches(batched(images, size)):
            yield from answers

    def embed_batches(self, batches: Iterable[Sequence[Picture]]) -> Iterator[list[np.ndarray | DataError]]:
        """As embed_each, of batches that the caller makes: some batches are begun before the first is given."""
        with ThreadPoolExecutor(cores()) as pool:
            try:
                yield from self._embedded_on_gpu(self.gpu, pool, batches) if self.gpu else self._embedded(pool, batches)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _embedded(
        self, pool: ThreadPoolExecutor, batches: Iterable[Sequence[Picture]]
    ) -> Iterator[list[np.ndarray | DataError]]:
        begun = ([pool.submit(self.prepare, image) for image in batch] for batch in batches)
        for futures in ahead(begun, AHEAD):
            yield self.encode_prepared([future.result() for future in futures])

    def _embedded_on_gpu(
        self, feed: GpuFeed, pool: ThreadPoolExecutor, batches: Iterable[Sequence[Picture]]
    ) -> Iterator[list[np.ndarray | DataError]]:
        fed = (feed.begin(pool, batch) for batch in batches)
        asked = (self._begin_batch(future.result()) for future in ahead(fed, AHEAD_ON_GPU))
        for finish in ahead(asked, 1):  # the GPU has the next batch while this one's embeddings are taken
            yield finish()

    def embed_texts(self, texts: Iterable[str], batch_size: int = DEFAULT_BATCH) -> np.ndarray:
        """Embeddings [texts, dimension], in their order; known texts come from the cache.

        Raises DataError where there are no texts, or one is empty.
        """
        texts = _listed(texts)
        check_count("batch_size", batch_size)
        found = {text: self.cache.get(text) for text in texts}
        missing = [text for text, embedding in found.items() if embedding is None]
        for start in tqdm(range(0, len(missing), batch_size), desc="embed texts", disable=_few(missing, batch_size)):
            batch = missing[start : start + batch_size]
            for text, embedding in zip(batch, self.encode_texts(batch)[0], strict=True):
                self.cache.put(text, embedding)
                found[text] = embedding
        return np.stack([found[text] for text in texts])  # type: ignore[misc]

    def class_prompts(self) -> list[str]:
        """The package's classes in its templates: those of the first class, then those of the next one."""
        return [template.format(name) for name in self.labels.classes for template in self.labels.templates]

    def class_embeddings(self, prompts: np.ndarray) -> np.ndarray:
        """Embeddings [classes, dimension] of the package's classes, from those of class_prompts.

        Each is the mean over its templates, of unit length.
        """
        return unit(prompts.reshape(len(self.labels.classes), len(self.labels.templates), -1).mean(axis=1))

    def prepare(self, image: Picture) -> "Prepared":
        """Read and preprocess one image for encode_prepared; the error where that fails. Threads may share it.

        With the feed "gpu" a JPEG file stays as it is: encode_prepared decodes those of a batch together.
        """
        try:
            if self.fast or self.gpu:
                jpeg, image = jpeg_of(image)
                if self.gpu and (whole := whole_jpeg(jpeg)):
                    return Undecoded(whole, image)
                if self.fast and jpeg and (pixels := self.fast(jpeg)) is not None:
                    return pixels
        except DataError as error:
            return error
        return self._read(image)

    def _read(self, image: Picture) -> np.ndarray | DataError:
        """As the checkpoint's own processor does, on the CPU."""
        try:
            picture = _read(image)
        except DataError as error:
            return error
        return np.asarray(picture) if self.preprocessor is None else self.preprocessor(picture)

    def encode_prepared(self, prepared: Sequence["Prepared"]) -> list[np.ndarray | DataError]:
        """Embeddings [dimension] of what `prepare` gave, in its order, and its errors. Images of one size go together.

        One thread at a time may call it.
        """
        if self.gpu:
            return self._encode_undecoded(self.gpu, prepared)
        answers: list[Any] = list(prepared)
        sizes: dict[tuple[int, ...], dict[int, np.ndarray]] = {}
        for row, image in enumerate(prepared):
            if isinstance(image, np.ndarray):
                sizes.setdefault(image.shape, {})[row] = image
        for alike in sizes.values():
            embeddings = self._finished(self.encoder.encode_images(np.stack(list(alike.values()))))
            for row, embedding in zip(alike, embeddings, strict=True):
                answers[row] = embedding
        return answers

    def _encode_undecoded(self, feed: GpuFeed, prepared: Sequence["Prepared"]) -> list[np.ndarray | DataError]:
        found = feed.fill([each if isinstance(each, Undecoded) else (None, each) for each in prepared], self._found)
        return self._begin_batch(found)()

    def _found(self, image: Any) -> np.ndarray | DataError:
        """Of a picture that is not decoded on the GPU, or of what was made of it before."""
        return image if isinstance(image, np.ndarray | DataError) else self._read(image)

    def _begin_batch(self, batch: Batch) -> Callable[[], list[np.ndarray | DataError]]:
        """Ask for a batch's embeddings; the call waits for them."""
        pixels, unreadable = batch
        rows = [row for row in range(len(pixels)) if row not in unreadable]
        begun = self._begin_pixels(pixels[rows] if unreadable else pixels) if rows else None

        def finish() -> list[np.ndarray | DataError]:
            embeddings = iter(self._finished(begun()) if begun else ())
            return [unreadable[row] if row in unreadable else next(embeddings) for row in range(len(pixels))]

        return finish

    def _begin_pixels(self, pixels: Any) -> Callable[[], np.ndarray]:
        """Args: pixels: a tensor on the GPU."""
        if self.encoder.takes_device_tensors:
            return self.encoder.begin_images(pixels)
        held = pixels if isinstance(pixels, np.ndarray) else pixels.cpu().numpy()
        return partial(self.encoder.encode_images, held)

    def _finished(self, embeddings: np.ndarray) -> np.ndarray:
        if self.sample:
            self.sample.add(embeddings)
        return embeddings

    def _settings(self) -> Preprocessing:
        if self.preprocessor is None:
            raise DeployError(f"feed is {self.feed!r}, and this package's graph resizes images itself: take 'exact'")
        return self.preprocessor

    def encode_texts(self, texts: list[str]) -> tuple[np.ndarray, list[int]]:
        """Embeddings [texts, dimension], past the cache, and each text's tokens. One thread at a time may call it."""
        tokens = self.tokenizer(texts)
        embeddings = self.encoder.encode_texts(tokens["input_ids"], tokens["attention_mask"])
        return embeddings, tokens["attention_mask"].sum(axis=1).tolist()


def check_count(name: str, value: int) -> None:
    """Raise DataError where a number of things to do is none."""
    if not isinstance(value, Integral) or value < 1:
        raise DataError(f"{name} is {value!r}: give a whole number of 1 or more")


def _check_list(images: object) -> None:
    """A string is a sequence too, of its letters."""
    if isinstance(images, str | bytes | Path | Image.Image):
        raise DataError(f"images is a single image, {images!r:.80}: give a list of images")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` items, in their order, each made when it is asked for."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def ahead(begun: Iterable[T], count: int) -> Iterator[T]:
    """What was begun, in its order; so many more are begun before the first is given."""
    waiting: deque[T] = deque()
    for each in begun:
        waiting.append(each)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _listed(texts: Iterable[str]) -> list[str]:
    """Those of an array, a column or a generator too. Raises DataError as check_texts does."""
    listed: Any = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str) else texts
    check_texts(listed)
    return list(listed)


def _read(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return _read_picture(image)
    if callable(image):
        return image()
    if not isinstance(image, str | os.PathLike):
        raise DataError(
            f"an image is of type {type(image).__name__}: give a file's path or a picture of Pillow, which makes one "
            "of bytes by Image.open(BytesIO(content)), and of an array by Image.fromarray(array)"
        )
    return read_image(Path(image))


def _read_picture(image: Image.Image) -> Image.Image:
    """Pillow reads a file when its pixels are first asked for, which may be here."""
    try:
        return rgb(image)
    except DataError as error:
        raise DataError(f"a picture in memory {error}") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers meet
        raise DataError(f"a picture of Pillow cannot be read ({error}): replace or remove it") from error


def _few(texts: list[str], batch_size: int) -> bool | None:
    """No bar for one batch; else wherever there is a terminal."""
    return True if len(texts) <= batch_size else None
