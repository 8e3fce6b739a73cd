import io

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from clip_deploy import shapes
from clip_deploy.__main__ import main
from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.images import read_image
from clip_deploy.storage import Columns, Rows, decode, list_files, list_parts, open_source, shown, write_part

LABELS = ("red circle", "blue square", "yellow star", "green triangle", "red square")


def encoded(index):
    image, _ = shapes.render("storage", index, shapes.CLASSES.index(LABELS[index]))
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
    assert source.images == 5
    found = read(source)
    assert [[name for name, _ in part] for part in found] == [["0", "1"], ["2", "3"], ["4"]]
    for (_, picture), content in zip((pair for part in found for pair in part), pictures, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(decode(content, "")))


def test_one_file_with_images_as_hugging_face_writes_them_and_rows_without_id(pictures, tmp_path):
    path = tmp_path / "train.parquet"
    images = [{"bytes": content, "path": None} for content in pictures]
    parquet.write_table(pyarrow.table({"key": ["a", None, "c", "d", "e"], "picture": images}), path)
    found = read(open_source(str(path), 10, Columns("key", "picture")))
    assert [name for name, _ in found[0]] == ["a", f"{path}:1", "c", "d", "e"]
    with pytest.raises(DataError, match=r"has no column 'id': it has key, picture; name them by --id-column"):
        open_source(str(path), 10)


def test_a_table_is_embedded_and_found_and_equal_ids_stay_two_rows(package, pictures, tmp_path, capsys):
    write(tmp_path / "in.parquet", ["x", "x", "star", "none", "page"], [*pictures[:3], None, b"<html>"])
    words = ["--package", str(package), "--threads", "1"]
    assert main(["embed", str(tmp_path / "in.parquet"), f"file://{tmp_path}/out", *words]) == 3
    printed = capsys.readouterr()
    assert "5 images, 0 embedded before, 3 now" in printed.out
    assert printed.err.splitlines() == [
        "warning: none is empty: replace or remove it",
        "warning: page is no readable image (cannot identify image file 'page'): replace or remove it",
    ]
    assert parquet.read_table(tmp_path / "out")["path"].to_pylist() == ["x", "x", "star"]
    assert main(["search", f"file://{tmp_path}/out", "a photo of a yellow star", "--top", "1", *words]) == 0
    assert capsys.readouterr().out.endswith("  star\n")


def test_a_shared_folder_reads_the_same_pictures_with_the_same_complaints(pictures, tmp_path):
    for index, content in enumerate([*pictures[:2], pictures[2][:900], b"", b"<html>"]):
        (tmp_path / f"{index}.png").write_bytes(content)
    here, shared = (open_source(str(tmp_path), 10, shared=shared) for shared in (False, True))
    assert here.digest == shared.digest
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


def test_storage_that_fails_stops_the_run_and_is_no_unreadable_image(pictures, tmp_path):
    (tmp_path / "0.png").write_bytes(pictures[0])
    ((_, picture),) = open_source(str(tmp_path), 10, shared=True).parts[0].pictures()
    (tmp_path / "0.png").unlink()
    with pytest.raises(DeployError, match=r"0.png cannot be read or written here \(No such file") as raised:
        picture()
    assert not isinstance(raised.value, DataError)


def test_a_part_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    table = pyarrow.table({"path": ["a"]})
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(PermissionError(13, "no")))
    with pytest.raises(DeployError, match="cannot write"):
        write_part(str(tmp_path), "part-00000.parquet", table)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    write_part(str(tmp_path), "part-00000.parquet", table)
    assert list_parts(str(tmp_path)) == ["part-00000.parquet"]


@pytest.mark.parametrize(
    ("given", "said"),
    [("ftp://host/images", "begins with ftp: accepted are a path, and file, s3"), ("none", "none is no folder")],
)
def test_what_cannot_be_read_is_refused(given, said):
    with pytest.raises(DataError, match=said):
        list_files(given)


def test_keys_and_options_of_a_uri_are_not_shown():
    assert shown("s3://key:secret@bucket/images/?region=eu") == "s3://bucket/images"
    assert shown("abfs://container@account/images") == "abfs://container@account/images"
    assert shown("what?/folder/") == "what?/folder"
