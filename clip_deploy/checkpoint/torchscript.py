"""TorchScript archives, whose weights are read without running anything of them.

Such an archive is a zip. data.pkl says which attributes each module has, data/0, data/1... are the bytes of its
tensors, and code/ is what torch.jit.load would compile. The instructions of data.pkl are followed here one by one, and
only those that TorchScript writes: a name in it stays a name and is never looked up in Python.

Format: https://github.com/pytorch/pytorch/blob/main/torch/csrc/jit/serialization/pickler.cpp
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from pickletools import genops
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch

from clip_deploy.core.errors import CheckpointError, one_line

ZIP = b"PK\3\4"  # how one begins
CONSTANTS, DATA = "/constants.pkl", "/data.pkl"
CLASSES = ("__torch__.", "__torch__ ")  # the modules' own
REBUILD = "torch._utils _rebuild_tensor_v2"
IGNORED = ("collections OrderedDict", "torch device", "torch.jit._pickle ")  # hooks, devices, lists: no weight is one
TYPES = {
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch BoolStorage": torch.bool,
}
PUSHED = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
# Bounds for files that are meant ill: data.pkl has some 100 bytes a tensor, and few modules share one.
PICKLE_BYTES, CODE_BYTES = 8 << 20, 64 << 20
ATTRIBUTES, NAME_LENGTH, AXES, SHARED = 1_000_000, 500, 8, 2


class ForeignError(Exception):
    """What no weights need: another name, another instruction."""


@dataclass(frozen=True)
class Global:
    """A name that stands for a class or a function, "torch._utils _rebuild_tensor_v2" say."""

    name: str


@dataclass
class Module:
    """A module of the archive, by its attributes: tensors, numbers and other modules. None of its code is run."""

    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """`length` numbers in data/`key`."""

    key: str
    dtype: torch.dtype
    length: int

    @property
    def bytes(self) -> int:
        return self.length * int(self.dtype.itemsize)


@dataclass(frozen=True)
class View:
    """A tensor in a storage; offset and strides count numbers."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or len(self.size) > AXES or not all(map(_is_count, numbers)):
            raise ValueError("a tensor's shape is none")
        last = self.offset + sum(max(count - 1, 0) * step for count, step in zip(self.size, self.stride, strict=True))
        if last >= self.storage.length or prod(self.size) > self.storage.length:
            raise ValueError("a tensor is larger than its storage")

    @property
    def bytes(self) -> int:
        return prod(self.size) * int(self.storage.dtype.itemsize)


def _is_count(number: object) -> bool:
    return type(number) is int and 0 <= number < 1 << 62


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive; CheckpointError where it is a torn zip, or cannot be opened."""
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP)) != ZIP:
                return False
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error}") from error
    with _opened(path) as archive:
        return bool(_roots(archive))


def read_torchscript(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """Parameters and buffers by name, as they are stored, and whether the modules' code calls GELU.

    Raises CheckpointError where the archive is torn, claims more than it holds, or needs more than tensors to be read.
    """
    with _opened(path) as archive:
        root = _roots(archive)[0]
        tensors = _tensors(Instructions().follow(_read(archive, f"{root}{DATA}", PICKLE_BYTES)))
        storages = {tensor.storage for tensor in tensors.values()}
        claimed = max(sum(tensor.bytes for tensor in tensors.values()), sum(storage.bytes for storage in storages))
        if claimed > SHARED * (size := path.stat().st_size):
            raise ValueError(f"it claims {claimed:,} bytes of weights, and has {size:,}")
        stored = {storage: _numbers(archive, root, storage) for storage in storages}
        weights = {
            name: stored[view.storage].as_strided(view.size, view.stride, view.offset).clone()
            for name, view in tensors.items()
        }
        return weights, _calls_gelu(archive, f"{root}/code/")


@contextmanager
def _opened(path: Path) -> Iterator[ZipFile]:
    """The zip; whatever is wrong with its content, in one line."""
    try:
        with ZipFile(path) as archive:
            yield archive
    except ForeignError as error:
        raise CheckpointError(
            f"{path} is a TorchScript archive that {error}. Weights need no such thing, so it is not read, and none of "
            "it was run: download OpenAI's own file, or, if you trust this one, give its state_dict: "
            "`torch.save(torch.jit.load(path).state_dict(), 'weights.pt')`"
        ) from error
    except Exception as error:  # whatever zipfile and torch meet in a damaged file
        raise CheckpointError(f"{path} is truncated or damaged ({one_line(error)}): download it again") from error


def _roots(archive: ZipFile) -> list[str]:
    """The folder in the zip that holds the modules, called after the file that the archive was first saved to."""
    names = set(archive.namelist())
    roots = [name.removesuffix(CONSTANTS) for name in names if name.endswith(CONSTANTS) and name.count("/") == 1]
    return [root for root in roots if f"{root}{DATA}" in names]


def _read(archive: ZipFile, name: str, most: int) -> bytes:
    if (size := archive.getinfo(name).file_size) > most:
        raise ValueError(f"{name} has {size:,} bytes, and at most {most:,} are read")
    return archive.read(name)


class Instructions:
    """Those of a pickle, as far as TorchScript writes them: https://docs.python.org/3/library/pickletools.html"""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def follow(self, pickle: bytes) -> Any:
        """What they make of Modules, Views and plain values."""
        for opcode, argument, _ in genops(pickle):
            self._step(opcode.name, argument)
        return self.stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_known(argument))
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._last(int(name[-1]))))
            case "APPENDS":
                _is(list, stack[self.marks[-1] - 1]).extend(self._since_mark())
            case "SETITEMS":
                items = self._since_mark()
                pairs = zip((_is(str, key) for key in items[::2]), items[1::2], strict=True)
                _is(dict, stack[-1]).update(pairs)
            case "BINPERSID":
                stack.append(_storage(*stack.pop()))
            case "REDUCE":
                function, arguments = self._last(2)
                stack.append(_called(_is(Global, function).name, arguments))
            case "NEWOBJ":
                kind, _ = self._last(2)
                if not _is(Global, kind).name.startswith(CLASSES):
                    raise ValueError(f"{kind.name} is no module")
                stack.append(Module())
            case "BUILD":
                state = stack.pop()
                if not isinstance(state, dict):
                    raise ForeignError("has a module that its own code would read (__setstate__)")
                _is(Module, stack[-1]).attributes = state
            case _ if name in PUSHED:
                stack.append(argument)
            case _ if name in MADE:
                stack.append(MADE[name]())
            case _:
                raise ForeignError(f"holds the instruction {name} in its data.pkl")

    def _since_mark(self) -> list[Any]:
        return self._last(len(self.stack) - self.marks.pop())

    def _last(self, count: int) -> list[Any]:
        at = len(self.stack) - count
        if not 0 <= at <= len(self.stack):
            raise ValueError("data.pkl takes more than it has made")
        found = self.stack[at:]
        del self.stack[at:]
        return found


def _is(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"data.pkl has a {type(value).__name__} in the place of a {kind.__name__}")
    return value


def _known(name: str) -> Global:
    """A name that TorchScript writes; ForeignError where it is another."""
    if name != REBUILD and name not in TYPES and not name.startswith((*CLASSES, *IGNORED)):
        raise ForeignError(f"names {name.replace(' ', '.')!r:.80} in its data.pkl")
    return Global(name)


def _storage(word: object, kind: Global, key: str, _: object, length: int) -> Storage:
    """Of a persistent id: "storage", type, name of its file, device and number of elements."""
    if word != "storage" or not _is_count(length):
        raise ValueError("data.pkl names a storage that is none")
    return Storage(_is(str, key), TYPES[_is(Global, kind).name], length)


def _called(name: str, arguments: tuple[Any, ...]) -> View | None:
    if name != REBUILD:
        return None
    storage, offset, size, stride, *_ = arguments
    return View(_is(Storage, storage), offset, _is(tuple, size), _is(tuple, stride))


def _tensors(root: Any) -> dict[str, View]:
    """Those of a module and of all below it, by their names in a state_dict."""
    found: dict[str, View] = {}
    waiting, seen, left = [("", _is(Module, root))], {id(root)}, ATTRIBUTES
    while waiting:
        prefix, module = waiting.pop()
        left -= len(module.attributes)
        if left < 0:
            raise ValueError(f"data.pkl has more than {ATTRIBUTES:,} attributes")
        for attribute, value in module.attributes.items():
            name = f"{prefix}{attribute[:NAME_LENGTH]}"
            if len(name) >= NAME_LENGTH:
                raise ValueError(f"data.pkl has a name of more than {NAME_LENGTH} letters")
            if isinstance(value, View):
                found[name] = value
            elif isinstance(value, Module) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{name}.", value))
    return found


def _numbers(archive: ZipFile, root: str, storage: Storage) -> torch.Tensor:
    """All of a storage, one axis."""
    order = f"{root}/byteorder"
    if order in archive.NameToInfo and _read(archive, order, len("little")) != b"little":
        raise ValueError("its numbers are not little-endian")
    name = f"{root}/data/{storage.key}"
    info = archive.getinfo(name)
    if info.compress_type != ZIP_STORED or info.file_size != storage.bytes:
        raise ValueError(f"{name!r:.80} has {info.file_size:,} bytes in the place of {storage.bytes:,}")
    return torch.frombuffer(bytearray(archive.read(name)), dtype=storage.dtype)


def _calls_gelu(archive: ZipFile, folder: str) -> bool:
    """Whether the code, which is not run, holds a call of GELU; QuickGELU is a product with a sigmoid."""
    names = [name for name in archive.namelist() if name.startswith(folder) and name.endswith(".py")]
    if (size := sum(archive.getinfo(name).file_size for name in names)) > CODE_BYTES:
        raise ValueError(f"{folder} has {size:,} bytes, and at most {CODE_BYTES:,} are read")
    return any(b"torch.gelu(" in archive.read(name) for name in names)
