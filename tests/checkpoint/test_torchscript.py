"""TorchScript archives are read as torch.jit.load reads them, and nothing of them is run."""

import random
import struct
import zipfile

import pytest
import torch
from torch import nn

from clip_deploy.checkpoint.torchscript import is_torchscript, read_torchscript
from clip_deploy.core.errors import CheckpointError


class Small(nn.Module):
    """Weights in the ways in which they can lie in an archive: halves, views of one storage, transposed, buffers."""

    def __init__(self, activation):
        super().__init__()
        self.activation, rows = activation, torch.randn(6, 4)
        self.layers = nn.Sequential(nn.Linear(4, 4).half(), nn.BatchNorm1d(4))
        self.first, self.rest = nn.Parameter(rows[:1]), nn.Parameter(rows[1:])
        self.turned = nn.Parameter(torch.randn(4, 3).T)
        self.scale = nn.Parameter(torch.tensor(2.5, dtype=torch.bfloat16))
        self.register_buffer("sizes", torch.tensor([7, 8]))

    def forward(self, rows):
        made = self.activation(self.layers[1](self.layers[0](rows.half()).float()))
        return made * self.scale @ self.turned.T @ self.turned + self.first + self.rest.sum() + self.sizes[0]


def quick_gelu(rows):
    return rows * torch.sigmoid(1.702 * rows)


def save(path, activation=quick_gelu):
    torch.jit.save(torch.jit.trace(Small(activation).eval(), torch.ones(2, 4)), path)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("archive") / "small.pt")


def test_the_weights_are_those_that_torch_loads(archive):
    expected, (found, calls_gelu) = torch.jit.load(archive).state_dict(), read_torchscript(archive)
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight)
    assert not calls_gelu


def test_gelu_is_seen_in_the_code(tmp_path):
    assert read_torchscript(save(tmp_path / "gelu.pt", nn.GELU()))[1]


def test_other_files_are_none(archive, tmp_path):
    assert is_torchscript(archive)
    for name, content in {"state.pt": {"weight": torch.ones(2)}, "list.pt": [1]}.items():
        torch.save(content, tmp_path / name)
        assert not is_torchscript(tmp_path / name)
    torch.save({}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert not is_torchscript(tmp_path / "legacy.pt")


def rewritten(path, output, **files):
    """The archive with files of other content: `data_pkl` is its data.pkl."""
    with zipfile.ZipFile(path) as given, zipfile.ZipFile(output, "w") as made:
        for name in given.namelist():
            made.writestr(name, files.get(name.split("/")[-1].replace(".", "_"), given.read(name)))
    return output


def text(string):
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def one_tensor(size=(4,), stride=(1,), offset=0, length=4, kind="FloatStorage", key="0"):
    """A pickle of a module with one tensor."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(length) + b"tQ"
    shape = b"".join(b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (size, stride))
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + shape + b"\x89NtR"
    return b"\x80\x02c__torch__\nM\n)\x81}(" + text("weight") + tensor + b"ub."


NESTED = b")q\0" + b"".join(b"h%ch%c\x86q%c" % (turn, turn, turn + 1) for turn in range(60))
MEANT_ILL = {
    "a system call": (b"cposix\nsystem\n(" + text("touch ran") + b"tR.", "names 'posix.system' in its data.pkl"),
    "a call by INST": (b"(" + text("touch ran") + b"iposix\nsystem\n.", "holds the instruction INST"),
    "a call by STACK_GLOBAL": (b"\x80\x04\x8c\5posix\x8c\6system\x93.", "holds the instruction SHORT_BINUNICODE"),
    "getattr": (b"cbuiltins\ngetattr\n.", "names 'builtins.getattr'"),
    "a name below torch": (b"ctorch.hub\nload\n.", "names 'torch.hub.load'"),
    "a quantised tensor": (one_tensor(kind="QInt8Storage"), "names 'torch.QInt8Storage'"),
    "a key that takes ages to hash": (NESTED + b"}(h\x3cNu.", "has a tuple in the place of a str"),
    "a memo of 32 GB": (b"Nr\xff\xff\xff\xff.", "has a NoneType in the place of a Module"),
    "a tensor beyond its storage": (one_tensor(size=(5,)), "a tensor is larger than its storage"),
    "an offset beyond it": (one_tensor(offset=1), "a tensor is larger than its storage"),
    "a negative step": (one_tensor(stride=(-1,)), "a tensor's shape is none"),
    "one number for a terabyte": (one_tensor(size=(1 << 40,), stride=(0,)), "a tensor is larger than its storage"),
    "a storage of a terabyte": (one_tensor(size=(1 << 40,), length=1 << 40), "it claims 4,398,046,511,104 bytes"),
    "a storage elsewhere": (one_tensor(key="../../../etc/passwd"), "There is no item named"),
    "another length than the file's": (one_tensor(), "bytes in the place of 16"),
    "no storage": (one_tensor().replace(text("storage"), text("storages")), "names a storage that is none"),
    "an empty stack": (b"\x80\x02R.", "takes more than it has made"),
    "a pickle that ends early": (one_tensor()[:-9], "damaged"),
    "a pickle of 9 MB": (b"N" * (9 << 20) + b".", "at most 8,388,608 are read"),
}


def refused(path):
    with pytest.raises(CheckpointError) as error:
        read_torchscript(path)
    said = str(error.value)
    assert len(said.splitlines()) == 1
    assert said.startswith(str(path))
    assert "download" in said
    return said


@pytest.mark.parametrize("kind", MEANT_ILL)
def test_what_is_meant_ill_is_refused_and_runs_nothing(kind, archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle, why = MEANT_ILL[kind]
    assert why in refused(rewritten(archive, tmp_path / "ill.pt", data_pkl=pickle))
    assert [file.name for file in tmp_path.iterdir()] == ["ill.pt"]


def doubled(times):
    """A module that holds the one below it twice, and so on: few bytes, and 2 ** times ways down."""
    module = b"c__torch__\nM\n)\x81"
    layers = (
        module + b"}(" + text("a") + b"h%c" % turn + text("b") + b"h%c" % turn + b"ubq%c" % (turn + 1)
        for turn in range(times)
    )
    return b"\x80\x02" + module + b"q\0" + b"".join(layers) + b"."


def test_a_module_is_visited_once(archive, tmp_path):
    path = rewritten(archive, tmp_path / "doubled.pt", data_pkl=doubled(100))
    assert read_torchscript(path)[0] == {}


def test_changed_at_random_a_pickle_is_read_or_refused(archive, tmp_path):
    with zipfile.ZipFile(archive) as given:
        data = given.read("small/data.pkl")
    chance, refusals = random.Random(0), []
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 3, 30))):
            changed[chance.randrange(len(data))] = chance.randrange(256)
        path = rewritten(archive, tmp_path / "changed.pt", data_pkl=bytes(changed))
        try:
            read_torchscript(path)
        except CheckpointError as error:
            refusals.append(str(error))
    assert 100 < len(refusals) < 300
    assert all(len(said.splitlines()) == 1 for said in refusals)


class WritesWhenLoaded(torch.nn.Module):
    """A module whose own code is run by torch.jit.load."""

    def __init__(self, path):
        super().__init__()
        self.path, self.weight = path, torch.nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self):
        return (self.path, self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.path, self.weight, self.training = state[0], state[1], state[2]
        torch.save(self.weight, self.path)

    def forward(self):
        return self.weight


def test_code_in_an_archive_is_not_run(tmp_path):
    path, written = tmp_path / "code.pt", tmp_path / "written"
    torch.jit.save(torch.jit.script(WritesWhenLoaded(str(written))), path)
    torch.jit.load(path)
    assert written.exists()  # so it is meant ill
    written.unlink()
    assert "has a module that its own code would read (__setstate__)" in refused(path)
    assert not written.exists()


def test_a_file_that_is_torn_damaged_or_compressed_is_refused(archive, tmp_path):
    path, whole = tmp_path / "given.pt", archive.read_bytes()
    for left in (4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:left])
        assert "is truncated or damaged (File is not a zip file)" in refused(path)
        with pytest.raises(CheckpointError, match="is truncated or damaged"):
            is_torchscript(path)
    with zipfile.ZipFile(archive) as given:
        info = given.getinfo("small/data/0")
        numbers = given.read(info)
    changed = bytearray(whole)
    changed[whole.index(numbers, info.header_offset)] ^= 1
    path.write_bytes(changed)
    assert "Bad CRC-32 for file 'small/data/0'" in refused(path)
    with zipfile.ZipFile(archive) as given, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name in given.namelist():
            made.writestr(name, given.read(name))
    assert "bytes in the place of" in refused(path)
    assert "its numbers are not little-endian" in refused(rewritten(archive, path, byteorder=b"big"))
