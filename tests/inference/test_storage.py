import io
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import fs, parquet
from support.project import ROOT

from clip_deploy.__main__ import main
from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.core.images import decode, read_image
from clip_deploy.data import scenes
from clip_deploy.inference import storage
from clip_deploy.inference.storage import Columns, Rows, list_files, list_parts, open_source, shown, write_part

LABELS = ("red circle", "blue square", "yellow star", "green triangle", "red square")


def encoded(index):
    image, _ = scenes.render("storage", index, scenes.CLASSES.index(LABELS[index]))
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()


@pytest.fixture(scope="module")
def pictures():
    return [encoded(index) for index in range(5)]


def read(source):
    """Names and RGB pictures of all parts; None where one cannot be read."""
    return [[(name, picture()) for name, picture in part.pictures()] for part in source.parts]


def write(path, ids, images, **columns):
    parquet.write_table(pyarrow.table({"id": ids, "image": images, **columns}), path, row_group_size=2)


def test_rows_keep_their_order_through_files_row_groups_and_parts(pictures, tmp_path):
    write(tmp_path / "b.parquet", [3, 4], pictures[3:])
    write(tmp_path / "a.parquet", [0, 1, 2], pictures[:3])
    source = open_source(str(tmp_path), part_size=2)
    a, b = (str(tmp_path / name) for name in ("a.parquet", "b.parquet"))
    assert [part.pieces for part in source.parts] == [[Rows(a, 0, 2)], [Rows(a, 2, 3), Rows(b, 0, 1)], [Rows(b, 1, 2)]]
    assert [part.images for part in source.parts] == [2, 2, 1]
    found = read(source)
    assert [[name for name, _ in part] for part in found] == [["0", "1"], ["2", "3"], ["4"]]
    for (_, picture), content in zip((pair for part in found for pair in part), pictures, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(decode(content, "")))


def test_one_file_with_images_as_hugging_face_writes_them_and_rows_without_id(pictures, tmp_path):
    path = tmp_path / "train.parquet"
    images = [{"bytes": content, "path": None} for content in pictures]
    parquet.write_table(pyarrow.table({"key": ["a", None, "c", "d", "e"], "picture": images}), path)
    found = read(open_source(str(path), 10, Columns("key", "picture")))
    assert [name for name, _ in found[0]] == ["a", "train.parquet:1", "c", "d", "e"]
    parquet.write_table(pyarrow.table({"id": ["a"], "image": ["photos/a.png"]}), tmp_path / "paths.parquet")
    with pytest.raises(DataError, match=r"its column 'image' holds string: give the bytes of image files"):
        open_source(str(tmp_path / "paths.parquet"), 3)
    with pytest.raises(DataError, match=r"has no column 'name': it has key, picture; name them by --id-column"):
        open_source(str(path), 10, Columns("name", "picture"))
    found = read(open_source(str(path), 10, Columns(image="picture")))
    assert [name for name, _ in found[0]] == [f"train.parquet:{row}" for row in range(5)]


def pack(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_each_tar_file_is_a_part_with_its_images_alone(pictures, tmp_path):
    beside = {"0.json": b"{}", "0.txt": b"a red circle", "0.cls": b"1", ".hidden/1.png": b"", "folder/2.npy": b""}
    pack(tmp_path / "b.tar", {"3.png": pictures[3], "folder/4.PNG": pictures[4]})
    pack(tmp_path / "a.tar.gz", {**beside, "0.png": pictures[0], "1.seg.png": pictures[1]}, "w:gz")
    source = open_source(str(tmp_path), part_size=1)
    assert [part.images for part in source.parts] == [None, None]
    found = read(source)
    assert [[name for name, _ in part] for part in found] == [
        ["a.tar.gz/0.png", "a.tar.gz/1.seg.png"],
        ["b.tar/3.png", "b.tar/folder/4.PNG"],
    ]
    assert np.array_equal(np.asarray(found[1][0][1]), np.asarray(decode(pictures[3], "")))
    (one,) = read(open_source(str(tmp_path / "b.tar"), part_size=1))
    assert [name for name, _ in one] == ["b.tar/3.png", "b.tar/folder/4.PNG"]
    write(tmp_path / "c.parquet", [0], pictures[:1])
    with pytest.raises(DataError, match=r"holds Parquet files and tar files, for example c\.parquet: give a"):
        open_source(str(tmp_path), part_size=1)


def test_a_tar_file_that_ends_too_early_is_named_and_harms_no_other(package, pictures, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    pack(shards / "a.tar", {"0.png": pictures[0], "1.png": pictures[1], "2.png": pictures[2]})
    whole = (shards / "a.tar").read_bytes()
    (shards / "a.tar").write_bytes(whole[: whole.index(pictures[1]) + 100])
    pack(shards / "b.tar", {"3.png": pictures[3], "4.png": b"no image"})
    (shards / "c.tar").write_bytes(b"")
    words = ["--package", str(package), "--threads", "1"]

    def embed():
        code = main(["embed", str(shards), str(tmp_path / "out"), *words])
        return code, capsys.readouterr()

    code, printed = embed()
    assert code == 3
    assert "5 images, 0 embedded before, 2 now" in printed.out
    assert "a.tar is damaged after its first 1 images (unexpected end of data): write it again" in printed.err
    assert "c.tar is damaged after its first 0 images (empty file): write it again" in printed.err
    assert "b.tar/4.png is not a readable image" in printed.err
    assert "5 images, 2 embedded before, 0 now" in embed()[1].out
    (shards / "a.tar").write_bytes(whole)
    (shards / "c.tar").unlink()
    pack(shards / "d.tar", {"0.png": pictures[0]})
    assert "6 images, 1 embedded before, 4 now" in embed()[1].out
    (shards / "a.tar").unlink()
    assert "2 embedded before, 0 now, 3 gone, 1 unreadable" in embed()[1].out
    assert main(["search", str(tmp_path / "out"), "a red circle", "--top", "1", *words]) == 0
    assert capsys.readouterr().out.endswith("  d.tar/0.png\n")


def test_what_datasets_saves_to_disk_is_read_row_by_row(pictures, tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.open(io.BytesIO(content)) for content in pictures]
    whole = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2, 3, 4]})
    whole.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    shutil.copy(tmp_path / "saved" / "data-00000-of-00002.arrow", tmp_path / "saved" / "cache-0123.arrow")
    source = open_source(str(tmp_path / "saved"), part_size=2)
    assert [part.images for part in source.parts] == [2, 2, 1]
    found = [pair for part in read(source) for pair in part]
    names = [f"data-00000-of-00002.arrow:{row}" for row in range(3)]
    assert [name for name, _ in found] == [*names, *(f"data-00001-of-00002.arrow:{row}" for row in range(2))]
    for (_, picture), image in zip(found, images, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(image.convert("RGB")))
    table = pyarrow.table({"id": ["a", "b", "c"], "image": pictures[:3]})
    with pyarrow.OSFile(str(tmp_path / "one.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert [[name for name, _ in part] for part in read(open_source(str(tmp_path / "one.arrow"), 2))] == [
        ["a", "b"],
        ["c"],
    ]


def test_a_dataset_of_the_hub_is_read_through_its_library(pictures, tmp_path, monkeypatch):
    """In its place a folder: pyarrow asks both through fsspec."""
    import huggingface_hub
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    (tmp_path / "datasets" / "owner" / "scenes").mkdir(parents=True)
    write(tmp_path / "datasets" / "owner" / "scenes" / "train.parquet", [0, 1], pictures[:2])
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: DirFileSystem(str(tmp_path), LocalFileSystem()))
    storage.locate.cache_clear()
    found = read(open_source("hf://datasets/owner/scenes", part_size=1))
    storage.locate.cache_clear()
    assert [[name for name, _ in part] for part in found] == [["0"], ["1"]]


def test_a_table_is_embedded_and_found_and_equal_ids_stay_two_rows(package, pictures, tmp_path, capsys):
    write(tmp_path / "in.parquet", ["x", "x", "star", "none", "page"], [*pictures[:3], None, b"<html>"])
    words = ["--package", str(package), "--threads", "1"]
    assert main(["embed", str(tmp_path / "in.parquet"), f"file://{tmp_path}/out", *words]) == 3
    printed = capsys.readouterr()
    assert "5 images, 0 embedded before, 3 now" in printed.out
    assert printed.err.splitlines() == [
        "warning: none is empty: replace or remove it",
        "warning: page is not a readable image (of no format that Pillow knows): replace or remove it",
    ]
    assert parquet.read_table(tmp_path / "out")["path"].to_pylist() == ["x", "x", "star"]
    assert main(["search", f"file://{tmp_path}/out", "a photo of a yellow star", "--top", "1", *words]) == 0
    assert capsys.readouterr().out.endswith("  star\n")


def test_a_shared_folder_reads_the_same_pictures_with_the_same_complaints(pictures, tmp_path):
    for index, content in enumerate([*pictures[:2], pictures[2][:900], b"", b"<html>"]):
        (tmp_path / f"{index}.png").write_bytes(content)
    here, shared = (open_source(str(tmp_path), 10, shared=shared) for shared in (False, True))
    assert here.parts[0].origin == shared.parts[0].origin
    for (name, path), (same, read_shared) in zip(here.parts[0].pictures(), shared.parts[0].pictures(), strict=True):
        assert name == same
        if name < "2":
            assert np.array_equal(np.asarray(read_image(path)), np.asarray(read_shared()))
            continue
        with pytest.raises(DataError) as ours:
            read_image(path)
        with pytest.raises(DataError) as theirs:
            read_shared()
        assert str(ours.value) == str(theirs.value)


def test_a_table_that_was_replaced_by_one_of_its_size_is_another_source(pictures, tmp_path):
    path = tmp_path / "in.parquet"
    write(path, [0, 1], pictures[:2])
    before = open_source(str(path), 10).digest
    assert open_source(str(path), 10).digest == before
    path.write_bytes(path.read_bytes())
    assert open_source(str(path), 10).digest != before


def test_a_folder_of_tables_holds_no_image_files(pictures, tmp_path):
    write(tmp_path / "a.parquet", [0, 1], pictures[:2])
    (tmp_path / "_SUCCESS").write_bytes(b"")
    (tmp_path / "README.md").write_text("rows")
    assert [name for name, _ in read(open_source(str(tmp_path), 10))[0]] == ["0", "1"]
    (tmp_path / "2.jfif").write_bytes(pictures[2])
    with pytest.raises(DataError, match=r"holds image files and Parquet files, for example 2\.jfif: give"):
        open_source(str(tmp_path), 10)


def test_one_picture_beside_tar_files_leaves_none_of_them_out(pictures, tmp_path):
    for name in ("a.tar", "b.tar"):
        pack(tmp_path / name, {"0.png": pictures[0]})
    (tmp_path / "preview.png").write_bytes(pictures[1])
    with pytest.raises(DataError, match=r"holds image files and tar files, for example preview\.png: give"):
        open_source(str(tmp_path), 10)


def test_storage_that_fails_stops_the_run_and_is_no_unreadable_image(pictures, tmp_path):
    (tmp_path / "0.png").write_bytes(pictures[0])
    ((_, picture),) = open_source(str(tmp_path), 10, shared=True).parts[0].pictures()
    (tmp_path / "0.png").unlink()
    with pytest.raises(DeployError, match=r"0.png cannot be read or written here \(No such file") as raised:
        picture()
    assert not isinstance(raised.value, DataError)


def vectors(numbers, metadata=None):
    """A part's table of as many vectors."""
    columns = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(numbers.reshape(-1)), numbers.shape[1])
    names = [f"{index:04}" for index in range(len(numbers))]
    return pyarrow.table({"path": names, "embedding": columns}, metadata=metadata)


def test_small_whole_numbers_take_a_byte_each(tmp_path):
    """Parquet has no type of one byte."""
    numbers = np.random.default_rng(0).integers(-127, 128, (2000, 64)).astype(np.int8)
    write_part(str(tmp_path), "part-00000.parquet", vectors(numbers))
    assert (tmp_path / "part-00000.parquet").stat().st_size < 1.5 * numbers.size
    read = parquet.read_table(tmp_path / "part-00000.parquet").column("embedding").combine_chunks()
    assert np.array_equal(read.values.to_numpy(), numbers.reshape(-1))
    assert read.type == pyarrow.list_(pyarrow.int8(), 64)


def test_what_a_part_says_of_itself_is_in_it_once(tmp_path):
    numbers, said = np.zeros((4, 8), np.float32), "".join(map(str, range(5000)))
    write_part(str(tmp_path), "part-00000.parquet", vectors(numbers, {b"clip_deploy": said}))
    assert parquet.read_metadata(tmp_path / "part-00000.parquet").metadata[b"clip_deploy"].decode() == said
    assert (tmp_path / "part-00000.parquet").stat().st_size < 1.5 * len(said)


def test_a_part_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    table = vectors(np.zeros((1, 8), np.float32))
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(PermissionError(13, "no")))
    with pytest.raises(DeployError, match="cannot write"):
        write_part(str(tmp_path), "part-00000.parquet", table)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    write_part(str(tmp_path), "part-00000.parquet", table)
    assert list_parts(str(tmp_path)) == ["part-00000.parquet"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("ftp://host/images", "begins with ftp: accepted are a path, or a URI of file, s3"),
        ("none", "none does not exist: give a folder of images, of Parquet or of tar files, or one such file"),
    ],
)
def test_what_cannot_be_read_is_refused(given, said):
    with pytest.raises(DataError, match=said):
        list_files(given)


def test_keys_and_options_of_a_uri_are_not_shown():
    assert shown("s3://key:secret@bucket/images/?region=eu") == "s3://bucket/images"
    assert shown("abfs://container@account/images") == "abfs://container@account/images"
    assert shown("what?/folder/") == "what?/folder"


def put(bucket, name, content):
    with bucket.open_output_stream(name) as stream:
        stream.write(content)


def table_of(bucket, folder):
    """All parts of a folder, in their order."""
    found = bucket.get_file_info(fs.FileSelector(folder))
    return pyarrow.concat_tables(
        parquet.read_table(bucket.open_input_file(path)).replace_schema_metadata()
        for path in sorted(file.path for file in found)
    )


@pytest.mark.parametrize("kind", ["images", "table"])
def test_an_object_store_gives_what_a_folder_gives_and_is_searched(package, pictures, bucket, tmp_path, capsys, kind):
    names = [f"{index}.png" for index in range(5)]
    if kind == "images":
        for name, content in zip(names, pictures, strict=True):
            put(bucket, f"in/sub folder/{name}", content)
            (tmp_path / "in" / "sub folder").mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / "sub folder" / name).write_bytes(content)
    else:
        (tmp_path / "in").mkdir()
        write(tmp_path / "in" / "a.parquet", names, pictures)
        put(bucket, "in/a.parquet", (tmp_path / "in" / "a.parquet").read_bytes())
    settings = ["--package", str(package), "--threads", "1"]
    parted = [*settings, "--part-size", "2"]
    uri = f"s3://{bucket.base_path.rstrip('/')}"
    assert main(["embed", str(tmp_path / "in"), str(tmp_path / "out"), *parted]) == 0
    assert main(["embed", f"{uri}/in", f"{uri}/out", *parted]) == 0
    here = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    assert table_of(bucket, "out").equals(table_of(here, "out"))
    capsys.readouterr()
    assert main(["embed", f"{uri}/in", f"{uri}/out", *parted]) == 0
    assert "5 images, 5 embedded before, 0 now" in capsys.readouterr().out
    assert main(["index", f"{uri}/out", str(tmp_path / "index")]) == 0
    for searched in (f"{uri}/out", str(tmp_path / "index")):
        assert main(["search", searched, "a photo of a yellow star", "--top", "1", *settings]) == 0
        assert capsys.readouterr().out.endswith("2.png\n")


def test_a_killed_run_on_an_object_store_goes_on_and_takes_up_what_changed(package, pictures, bucket, tmp_path):
    for index in range(80):
        put(bucket, f"in/{index:02}.png", pictures[index % 5])
    uri = f"s3://{bucket.base_path.rstrip('/')}"
    words = ["embed", f"{uri}/in", f"{uri}/out", "--package", str(package), "--threads", "1", "--part-size", "4"]
    command = [sys.executable, "-m", "clip_deploy", *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list_parts(f"{uri}/out")) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = len(list_parts(f"{uri}/out"))
    assert 2 <= kept < 20
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"80 images, {4 * kept} embedded before, {80 - 4 * kept} now" in again.stdout
    assert table_of(bucket, "out")["path"].to_pylist() == [f"{index:02}.png" for index in range(80)]
    time.sleep(1.1)  # S3 keeps whole seconds
    put(bucket, "in/07.png", pictures[2])
    put(bucket, "in/99.jfif", pictures[3])
    bucket.delete_file("in/08.png")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "80 images, 78 embedded before, 2 now" in again.stdout
    assert ", 1 gone, 0 unreadable" in again.stdout
    rows = table_of(bucket, "out")["path"].to_pylist()
    assert sorted(rows) == [*(f"{index:02}.png" for index in range(80) if index != 8), "99.jfif"]


def test_an_unreachable_store_and_a_missing_bucket_are_named_in_one_line(package, pictures, bucket, tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"s3://{bucket.base_path.rstrip('/')}"
    put(bucket, "in/0.png", pictures[0])
    away = f"s3://gone/in?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    for source, output, said in (
        (away, str(tmp_path / "out"), "error: s3://gone/in cannot be read or written here"),
        ("s3://no-such-bucket/in", str(tmp_path / "out"), "error: s3://no-such-bucket/in: there is no bucket no-such"),
        (f"{uri}/in", "s3://no-such-bucket/out", "error: s3://no-such-bucket/out: there is no bucket no-such-bucket"),
        (f"{uri}/none", str(tmp_path / "out"), f"error: {uri}/none holds no images"),
    ):
        assert main(["embed", source, output, "--package", str(package)]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith(said)
        assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
