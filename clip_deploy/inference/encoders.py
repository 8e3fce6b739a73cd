"""Both towers of a package, each opened by the runtime that judged it, as the table's row runs."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from clip_deploy.core.artifact import TOWERS, read_target
from clip_deploy.core.environment import has_vnni, instruction_sets
from clip_deploy.core.errors import DataError, DeployError, UnavailableError
from clip_deploy.core.package import DualEncoder
from clip_deploy.core.parsing import read_record
from clip_deploy.core.vectors import unit
from clip_deploy.runtimes import Encoder, open_encoder

if TYPE_CHECKING:
    from clip_deploy.runtimes import pytorch

STEP = 8  # tokens; on a GPU texts are filled up to a quarter of the context, rounded up to it, or to all of it


class PackageEncoder:
    """Embeddings are float32 [rows, dimension], as the towers give them or of unit length.

    Attributes:
        takes_device_tensors: whether encode_images also takes a PyTorch tensor that is on the GPU already.

    On a GPU each shape is prepared and recorded by itself. So batches are filled up there to one of the few sizes that
    the package names, by its last row again, and texts to one of two lengths; what is larger goes in several calls.
    """

    def __init__(
        self,
        folder: Path,
        package: DualEncoder,
        device: str,
        threads: int | None,
        towers: Sequence[str] = TOWERS,
        allow_spinning: bool = True,
        unit_length: bool = False,
    ) -> None:
        """Open towers of the package in `folder`; the rest is as open_encoder takes it.

        `unit_length` is that of embeddings: made by the device where that has them, which costs the host no pass.

        Raises:
            DeployError: a runtime refuses the files.
            UnavailableError: a library or the device is missing; what pip must install is named.
        """
        self.package, self.on_gpu = package, device == "cuda"
        shared: dict[str, list[str]] = {}
        for tower in towers:
            shared.setdefault(package.towers[tower].target, []).append(tower)
        self.towers: dict[str, Encoder] = {}
        self.finish: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        for target, names in shared.items():
            opened = _opened(folder / target, package, device, threads, names, allow_spinning)
            finish = unit if unit_length else _as_they_are
            if unit_length and self.on_gpu and (normalise := getattr(opened, "normalise", None)):
                normalise()
                finish = _as_they_are
            self.towers |= dict.fromkeys(names, opened)
            self.finish |= dict.fromkeys(names, finish)
        self.takes_device_tensors: bool = getattr(self.towers.get("vision"), "takes_device_tensors", False)

    def encode_images(self, images: Any) -> np.ndarray:
        """Encode [batch] as the tower takes them: pixel values, images of one size, or records of patches."""
        return self._in_sizes("vision", self.towers["vision"].encode_images, images)

    def begin_images(self, pixels: Any) -> Callable[[], np.ndarray]:
        """As encode_images of a tensor on the GPU. The GPU is asked at once; the call waits for what it gives."""
        begin = cast("pytorch.Encoder", self.towers["vision"]).begin_images
        begun = [(begin(*part), count) for part, count in self._parts("vision", pixels)]
        return lambda: self.finish["vision"](_joined([finish()[:count] for finish, count in begun]))

    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Encode int64 [batch, tokens] twice.

        Raises DataError where a token is unknown or a text too long: of that, some runtimes make a wrong vector.
        """
        package, (_, tokens) = self.package, input_ids.shape
        if not 1 <= tokens <= package.context_length:
            raise DataError(f"a text has {tokens} tokens: 1 to {package.context_length} are accepted")
        if input_ids.min() < 0 or input_ids.max() >= package.vocabulary:
            raise DataError(
                f"token ids run from {input_ids.min()} to {input_ids.max()}: accepted are 0 to {package.vocabulary - 1}"
            )
        if self.on_gpu and (longer := self._length(tokens) - tokens):
            input_ids = np.pad(input_ids, ((0, 0), (0, longer)), constant_values=package.pad_token)
            attention_mask = np.pad(attention_mask, ((0, 0), (0, longer)))
        return self._in_sizes("text", self.towers["text"].encode_texts, input_ids, attention_mask)

    def _length(self, tokens: int) -> int:
        """Behind a text's end nothing is attended to."""
        context = self.package.context_length
        short = -(-context // 4 // STEP) * STEP
        return short if tokens <= short < context and not self.package.pad_to_context else context

    def _in_sizes(self, tower: str, encode: Callable[..., np.ndarray], *rows: Any) -> np.ndarray:
        return self.finish[tower](_joined([encode(*part)[:count] for part, count in self._parts(tower, *rows)]))

    def _parts(self, tower: str, *rows: Any) -> Iterator[tuple[Sequence[Any], int]]:
        """What one call each takes, and how many rows of it count."""
        sizes = self.package.towers[tower].batch_sizes
        if not self.on_gpu or not sizes:
            yield rows, len(rows[0])
            return
        for start in range(0, len(rows[0]), sizes[-1]):
            part = [array[start : start + sizes[-1]] for array in rows]
            count = len(part[0])
            size = next(size for size in sizes if size >= count)
            if size > count:
                filled = np.minimum(np.arange(size), count - 1)
                part = [array[filled] for array in part]
            yield part, count


def _as_they_are(rows: np.ndarray) -> np.ndarray:
    return rows


def _joined(found: list[np.ndarray]) -> np.ndarray:
    return found[0] if len(found) == 1 else np.concatenate(found)


def read_encoder(path: Path) -> DualEncoder:
    """What a package's manifest says of its towers, from a file with that alone."""
    return read_record(DualEncoder, path)


def _opened(
    folder: Path,
    package: DualEncoder,
    device: str,
    threads: int | None,
    towers: Sequence[str],
    allow_spinning: bool,
) -> Encoder:
    if device == "cpu":
        _warn_of_saturation(folder)
    try:
        return open_encoder(folder, threads, device, towers, allow_spinning)
    except DeployError as error:
        if others := other_versions(package.requires):
            raise UnavailableError(
                f"{error}; the package was checked with other versions than are installed here: {others}"
            ) from error
        raise


def _warn_of_saturation(folder: Path) -> None:
    """Warn of an INT8 target with weights of 8 bits on an x86 CPU that adds their products in 16: it gives no error."""
    build = read_target(folder).build
    if build.get("reduce_range") is not False or build.get("method") == "weight_only":
        return
    here = instruction_sets()
    if "avx2" in here and not has_vnni(here):
        warnings.warn(
            f"{folder.name} was built for CPUs with VNNI, and this one has none: sums saturate, and embeddings may be "
            "wrong; build and check the package on such a CPU, or ship another target",
            stacklevel=2,
        )


def other_versions(requires: Sequence[str]) -> str | None:
    """The pip command for what of `requires` is missing or has another version, with what is installed; or None."""
    wrong = [(line, found) for line in requires if not _matches(line, found := _installed(line.partition("==")[0]))]
    if not wrong:
        return None
    here = ", ".join(f"{line.partition('==')[0]} {found or 'is not installed'}" for line, found in wrong)
    return f"pip install {' '.join(line for line, _ in wrong)} ({here})"


def _installed(name: str) -> str | None:
    for distribution in (name, f"{name}-gpu"):  # onnxruntime-gpu computes on CPUs too
        with suppress(PackageNotFoundError):
            return version(distribution)
    return None


def _matches(line: str, found: str | None) -> bool:
    wanted = line.partition("==")[2]
    return found is not None and (not wanted or found.partition("+")[0] == wanted)
