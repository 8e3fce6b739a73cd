import json
import os
import shutil
import sys

import faiss
import numpy as np
import pyarrow
import pytest

from clip_deploy.__main__ import main
from clip_deploy.core.errors import DataError, DeployError, DiskError
from clip_deploy.core.vectors import DTYPES, cut, encode, unit
from clip_deploy.data import scenes
from clip_deploy.inference import index as module
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.inference.embed import MADE_BY, PART, EmbedSettings, embed_folder, read_part
from clip_deploy.inference.index import build_index, open_embedded, search_index
from clip_deploy.inference.search import search
from clip_deploy.inference.storage import list_parts, write_part

CLOSE = {"float32": 1e-6, "float16": 1e-6, "int8": 5e-3, "binary": 1e-6}  # int8 is rounded twice


@pytest.fixture(scope="module")
def classifier(package):
    return ZeroShotClassifier.open(package)


def write(folder, number, rows, dtype="float32", first=0, **header):
    """A part with vectors of our own, as `embed` writes one."""
    header = {"package": "ours", "dtype": dtype, "dimensions": rows.shape[1], "unreadable": []} | header
    codes = encode(rows, dtype)
    columns = {
        "path": pyarrow.array([f"{row:05}.png" for row in range(first, first + len(rows))], pyarrow.string()),
        "embedding": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(codes.reshape(-1)), codes.shape[1]),
    }
    write_part(str(folder), PART.format(number), pyarrow.table(columns, metadata={MADE_BY: json.dumps(header)}))


def random(rows, width=32, seed=0):
    return unit(np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32))


def exact(parts, text, top):
    """Cosines and paths by all vectors of the parts."""
    read = [read_part(str(parts), name, len(text)) for name in list_parts(str(parts))]
    names, cosines = [path for paths, _ in read for path in paths], np.concatenate([rows @ text for _, rows in read])
    return [(float(cosines[row]), names[row]) for row in np.argsort(-cosines, kind="stable")[:top]]


@pytest.mark.parametrize("dimensions", [None, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_index_finds_in_embeddings_of_images_what_a_search_of_all_finds(classifier, tmp_path, dtype, dimensions):
    (tmp_path / "images").mkdir()
    for number in range(24):
        scenes.render("index", number, 2 * number)[0].save(tmp_path / "images" / f"{number:02}.png")
    parts, made = tmp_path / "parts", tmp_path / "index"
    embed_folder(classifier, tmp_path / "images", parts, EmbedSettings(8, 10, dtype, dimensions))
    record = build_index(str(parts), str(made))
    assert (record.rows, record.cells, record.dtype, record.dimensions) == (24, 1, dtype, dimensions or 64)
    assert sorted(path.name for path in made.iterdir()) == ["paths.parquet", "vectors.faiss", "vectors.json"]
    for text in ("a photo of a yellow star", "a blue circle"):
        found, expected = (search(classifier, source, text, 5).hits for source in (made, parts))
        assert [hit.cosine for hit in found] == pytest.approx([hit.cosine for hit in expected], abs=CLOSE[dtype])
        if dtype != "int8":  # whose hits may change places
            assert [hit.path for hit in found] == [hit.path for hit in expected]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_index_is_exact(tmp_path, dtype):
    rows = random(1500)
    for number in range(3):
        write(tmp_path / "parts", number, rows[500 * number : 500 * number + 500], dtype, first=500 * number)
    build_index(str(tmp_path / "parts"), str(tmp_path / "index"))
    for text in random(5, seed=1):
        found, expected = search_index(tmp_path / "index", "ours", text, 10), exact(tmp_path / "parts", text, 10)
        assert [cosine for cosine, _ in found] == pytest.approx([cosine for cosine, _ in expected], abs=CLOSE[dtype])
        assert len({path for _, path in found} & {path for _, path in expected}) >= (9 if dtype == "int8" else 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_index_finds_95_of_100_though_it_looks_into_an_eighth_of_its_cells(tmp_path, monkeypatch, dtype):
    """Images in clusters around one direction, texts in the same clusters around another, as in CLIP models."""
    monkeypatch.setattr(module, "MIN_ROWS", 2000)
    generator = np.random.default_rng(0)
    centres, images, texts = (generator.standard_normal((count, 64)) for count in (40, 1, 1))
    near = generator.integers(0, 40, 4030)
    rows = centres[near] + 2 * np.where(np.arange(4030)[:, None] < 4000, images, texts)
    rows = unit((rows + 0.5 * generator.standard_normal(rows.shape)).astype(np.float32))
    for number in range(4):
        write(tmp_path / "parts", number, rows[1000 * number : 1000 * number + 1000], dtype, first=1000 * number)
    record = build_index(str(tmp_path / "parts"), str(tmp_path / "index"))
    assert (record.rows, record.cells) == (4000, 63)
    right = 0
    for text in rows[4000:]:
        found, expected = search_index(tmp_path / "index", "ours", text, 10), exact(tmp_path / "parts", text, 10)
        right += len({path for _, path in found} & {path for _, path in expected})
    assert right >= 0.95 * 300


def test_a_vector_is_kept_in_as_many_bytes_as_in_a_part(tmp_path):
    sizes = {}
    for dtype in DTYPES:
        write(tmp_path / dtype, 0, random(4000, 64), dtype)
        sizes[dtype] = build_index(str(tmp_path / dtype), str(tmp_path / f"{dtype}-index")).sizes["vectors.faiss"]
    fixed = 8 * 4000  # its row's number
    assert {dtype: round((size - fixed) / 4000) for dtype, size in sizes.items()} == {
        "float32": 256,
        "float16": 128,
        "int8": 64,
        "binary": 8,
    }


def test_more_than_the_searched_cells_hold_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MIN_ROWS", 100)
    write(tmp_path / "parts", 0, random(400))
    assert build_index(str(tmp_path / "parts"), str(tmp_path / "index")).cells == 20
    text = random(1, seed=1)[0]
    assert len(search_index(tmp_path / "index", "ours", text, 10)) == 10
    found = search_index(tmp_path / "index", "ours", text, 1000)
    assert [path for _, path in found] == [path for _, path in exact(tmp_path / "parts", text, 400)]


def test_a_text_is_cut_like_the_images(tmp_path):
    write(tmp_path / "parts", 0, cut(random(50, 64), 32))
    build_index(str(tmp_path / "parts"), str(tmp_path / "index"))
    text = random(1, 64, seed=1)[0]
    ((cosine, path),) = search_index(tmp_path / "index", "ours", text, 1)
    ((expected, name),) = exact(tmp_path / "parts", cut(text, 32), 1)
    assert (path, cosine) == (name, pytest.approx(expected, abs=1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_opened_like_an_index_and_searched_whole(tmp_path, dtype):
    rows = cut(random(50, 64), 32)
    for number, first in enumerate((0, 30)):
        write(tmp_path / "parts", number, rows[first : first + 30], dtype, first=first)
    opened, text = open_embedded(tmp_path / "parts", {"theirs", "ours"}), random(1, 64, seed=1)[0]
    assert (opened.package, opened.rows, list(opened.stamps)) == ("ours", 50, list_parts(str(tmp_path / "parts")))
    expected = exact(tmp_path / "parts", cut(text, 32), 50)
    for top in (1, 7, 50, 1000):
        cosines, found = opened.nearest(text, top)
        assert cosines == pytest.approx([cosine for cosine, _ in expected[:top]], abs=1e-6)
        own = {name: cosine for cosine, name in expected}
        assert [own[name] for name in opened.paths(found)] == pytest.approx(cosines, abs=1e-6)
        assert len(set(found.tolist())) == min(top, 50)
    with pytest.raises(DeployError, match="parts was made by another package: search with that one"):
        open_embedded(tmp_path / "parts", {"theirs"})


def test_an_index_that_is_older_than_its_parts_says_so(tmp_path):
    rows = random(40)
    write(tmp_path / "parts", 0, rows[:20])
    build_index(str(tmp_path / "parts"), str(tmp_path / "index"))
    shutil.move(tmp_path / "index", tmp_path / "moved")  # beside them still
    search_index(tmp_path / "moved", "ours", rows[0], 1)
    write(tmp_path / "parts", 1, rows[20:], first=20)
    with pytest.warns(UserWarning, match="moved is older than its parts, which changed since: make it again with"):
        assert search_index(tmp_path / "moved", "ours", rows[30], 1)[0][1] != "00030.png"
    build_index(str(tmp_path / "parts"), str(tmp_path / "moved"))
    assert search_index(tmp_path / "moved", "ours", rows[30], 1)[0][1] == "00030.png"
    os.utime(tmp_path / "parts/part-00000.parquet", ns=(0, 0))
    with pytest.warns(UserWarning, match="older than its parts"):
        search_index(tmp_path / "moved", "ours", rows[0], 1)
    shutil.rmtree(tmp_path / "parts")  # where they lie elsewhere, nobody knows
    assert search_index(tmp_path / "moved", "ours", rows[30], 1)[0][1] == "00030.png"


def test_an_index_of_another_packages_embeddings_is_refused(classifier, tmp_path):
    write(tmp_path / "parts", 0, random(20, 64))
    build_index(str(tmp_path / "parts"), str(tmp_path / "index"))
    with pytest.raises(DeployError, match="index was made by another package: search with that one, or embed"):
        search(classifier, tmp_path / "index", "a red circle", 1)


def test_parts_that_do_not_belong_together_and_nothing_are_refused(tmp_path):
    rows = random(10)
    with pytest.raises(DataError, match="parts is not a folder: give one that `clip-deploy embed` wrote"):
        build_index(str(tmp_path / "parts"), str(tmp_path / "index"))
    write(tmp_path / "parts", 0, rows[:0])
    with pytest.raises(DataError, match="parts holds no embeddings"):
        build_index(str(tmp_path / "parts"), str(tmp_path / "index"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no embeddings"):
        build_index(str(tmp_path / "empty"), str(tmp_path / "index"))
    write(tmp_path / "parts", 1, rows, package="theirs")
    with pytest.raises(DeployError, match=r"two packages or types, as part-00001.parquet: embed again"):
        build_index(str(tmp_path / "parts"), str(tmp_path / "index"))
    write(tmp_path / "parts", 1, rows, dimensions=None)
    with pytest.raises(DeployError, match=r"part-00001.parquet was made with an earlier version"):
        build_index(str(tmp_path / "parts"), str(tmp_path / "index"))
    assert not (tmp_path / "index").exists()


def test_nothing_but_an_index_is_replaced(tmp_path):
    write(tmp_path / "parts", 0, random(10))
    with pytest.raises(DataError, match="parts exists and is not an index: give another folder"):
        build_index(str(tmp_path / "parts"), str(tmp_path / "parts"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="file exists and is not an index"):
        build_index(str(tmp_path / "parts"), str(tmp_path / "file"))
    with pytest.raises(DataError, match="s3://bucket/index is on an object store: an index is mapped into memory"):
        build_index(str(tmp_path / "parts"), "s3://bucket/index")
    (tmp_path / "free").mkdir()
    build_index(str(tmp_path / "parts"), str(tmp_path / "free"))
    build_index(str(tmp_path / "parts"), str(tmp_path / "free"))
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["part-00000.parquet"]


def test_an_index_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    rows = random(10)
    write(tmp_path / "parts", 0, rows)
    build_index(str(tmp_path / "parts"), str(tmp_path / "index"))

    def full(*_):
        raise RuntimeError("Error in write(): No space left on device")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(DiskError, match=r"cannot write .*index: No space left on device; free some space"):
        build_index(str(tmp_path / "parts"), str(tmp_path / "index"))
    assert search_index(tmp_path / "index", "ours", rows[3], 1)[0][1] == "00003.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "parts"]


@pytest.mark.parametrize("name", ["vectors.faiss", "paths.parquet", "vectors.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_a_damaged_index_is_one_message(tmp_path, name, damage):
    rows = random(200)
    write(tmp_path / "parts", 0, rows)
    build_index(str(tmp_path / "parts"), str(tmp_path / "index"))
    path = tmp_path / "index" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else os.urandom(len(whole)))
    if damage == "gone":
        path.unlink()
    with pytest.raises(
        DeployError, match=r"index is not a complete index \(.*\): make it again with `clip-deploy index`$"
    ):
        search_index(tmp_path / "index", "ours", rows[0], 1)


def test_vectors_that_are_damaged_somewhere_end_no_process(tmp_path):
    """FAISS reads a file of C++ that says its own sizes."""
    rows = random(200)
    write(tmp_path / "parts", 0, rows, "int8")
    build_index(str(tmp_path / "parts"), str(tmp_path / "index"))
    path, generator, refused = tmp_path / "index/vectors.faiss", np.random.default_rng(0), 0
    whole = path.read_bytes()
    for _ in range(100):
        changed = bytearray(whole)
        changed[generator.integers(400)] = generator.integers(256)
        path.write_bytes(changed)
        try:
            search_index(tmp_path / "index", "ours", rows[0], 3)
        except DeployError:
            refused += 1
    assert refused > 10


def test_an_index_of_another_version_is_named(tmp_path):
    write(tmp_path / "parts", 0, random(10))
    build_index(str(tmp_path / "parts"), str(tmp_path / "index"))
    path = tmp_path / "index/vectors.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": "graph"}))
    with pytest.raises(DeployError, match=r"of another version .*unknown entry kind\): make it again with"):
        search_index(tmp_path / "index", "ours", random(1)[0], 1)


def test_the_commands_make_an_index_and_search_it(package, classifier, tmp_path, capsys, monkeypatch):
    (tmp_path / "images").mkdir()
    for number, label in enumerate(("red circle", "yellow star", "blue square")):
        scenes.render("index", number, scenes.CLASSES.index(label))[0].save(tmp_path / "images" / f"{label}.png")
    embed_folder(classifier, tmp_path / "images", tmp_path / "parts", EmbedSettings(dtype="binary"))
    assert main(["index", str(tmp_path / "parts"), str(tmp_path / "index")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path}/index: 3 vectors of 64 dimensions, binary, 0.0 MB, searched whole\n")
    words = ["search", str(tmp_path / "index"), "a yellow star", "--top", "1", "--package", str(package)]
    assert main(words) == 0
    assert capsys.readouterr().out.endswith("  yellow star.png\n")
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert main(words) == 1
    assert "error: an index needs FAISS: pip install 'clip-deploy[index]'\n" in capsys.readouterr().err
