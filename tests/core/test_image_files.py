import os
import time

import pytest

from clip_deploy.core.environment import fingerprint
from clip_deploy.core.errors import DataError
from clip_deploy.core.image_files import class_files, image_files, may_be_image, walk
from clip_deploy.data.dataset import _by_class
from clip_deploy.inference.storage import open_source
from stages.probe import identity


def put(folder, **contents):
    for name, content in contents.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def aged(folder):
    """As if the files had been written an hour ago, as far as anyone can set that."""
    for path in folder.rglob("*"):
        os.utime(path, ns=(time.time_ns(), time.time_ns() - 3_600_000_000_000))


def test_links_are_followed_hidden_files_are_not_and_loops_end(tmp_path):
    put(tmp_path / "pool", a="1", deep__b="2", deep__deeper__c="3")
    folder = put(tmp_path / "folder", own="4", **{".hidden": "5", ".cache__x": "6"})
    (folder / "one").symlink_to(tmp_path / "pool")
    (folder / "two").symlink_to("../pool/deep")
    (folder / "file").symlink_to(tmp_path / "pool" / "a")
    (tmp_path / "pool" / "deep" / "up").symlink_to(tmp_path)
    (folder / "self").symlink_to(".")
    found = walk(folder)
    up = [name for name in found.files if "/up/" in name]
    assert [name for name in found.files if name not in up] == [
        *("file", "one/a", "one/deep/b", "one/deep/deeper/c", "own", "two/b", "two/deeper/c")
    ]
    assert "one/deep/up/folder/own" not in up  # the folder itself, once more
    assert found.skipped == {}


def test_what_cannot_be_looked_at_is_named_with_why(tmp_path):
    folder = put(tmp_path / "folder", a="1")
    (folder / "nowhere").symlink_to(tmp_path / "none")
    (folder / "itself").symlink_to("itself")
    assert walk(folder).skipped == {
        "itself": f"{folder}/itself cannot be read (Too many levels of symbolic links): check its permissions, "
        "or remove it",
        "nowhere": f"{folder}/nowhere is a link to {tmp_path}/none, which does not exist: repair or remove it",
    }
    with pytest.raises(DataError, match=r"none cannot be listed \(No such file or directory\)"):
        walk(tmp_path / "none")


@pytest.mark.parametrize(
    "name", ["a.jpg", "A.JFIF", "a", "a.bin", "a.php", "sub.txt/a.b.c", "a.heic", "a.svg", "readme.jpg", "a.xyz"]
)
def test_the_content_decides_about_most_names(name):
    assert may_be_image(name)


@pytest.mark.parametrize(
    "name",
    [".DS_Store", ".git/a.jpg", "a/.b.png", "Thumbs.DB", "README", "sub/License", "a.TXT", "a.jpg.json", "v.mp4"],
)
def test_hidden_files_and_what_a_name_says_is_none_are_no_images(name):
    assert not may_be_image(name)


def test_the_readers_and_the_fingerprint_see_the_same_files(tmp_path):
    folder = put(tmp_path / "folder", cat__a="1", cat__notes__b="2", dog__c="3", loose="4", dog__x="5")
    (folder / "dog" / "x").rename(folder / "dog" / "x.txt")
    (folder / "bird").symlink_to(folder / "cat")
    names = ["bird/a", "bird/notes/b", "cat/a", "cat/notes/b", "dog/c"]
    assert [name for files in _by_class(folder).values() for name in files] == names
    assert list(class_files(folder).files) == names
    assert list(image_files(folder).files) == list(open_source(str(folder), 10).files) == [*names, "loose"]


def test_a_fingerprint_of_linked_classes_changes_with_what_is_read_and_with_nothing_else(tmp_path, monkeypatch, kinds):
    """As a subset is usually made."""
    put(tmp_path / "pool", cat__a="1", dog__b="2", bird__c="3")
    (tmp_path / "subset").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "subset" / name).symlink_to(f"../pool/{name}")
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "x.yaml").write_text(f"source: image-folder\npath: {tmp_path / 'subset'}\n")
    monkeypatch.setattr("stages.probe.CONF", tmp_path / "conf")
    first = identity("data", "x")
    put(tmp_path / "pool", **{"cat__notes.txt": "x", "dog__.DS_Store": "x"})
    put(tmp_path / "subset", loose="x")
    aged(tmp_path / "pool")
    same = identity("data", "x")
    put(tmp_path / "pool", cat__a="9")
    replaced = identity("data", "x")
    (tmp_path / "subset" / "bird").symlink_to("../pool/bird")
    grown = identity("data", "x")
    assert first == same
    assert len({first, replaced, grown}) == 3
    put(tmp_path / "real", cat__a="9", dog__b="2", bird__c="3")
    assert fingerprint(tmp_path / "real") == grown
    kinds(
        "22: an image folder of linked class folders",
        before="its fingerprint is the hash of nothing: a fourth class and six replaced images change nothing",
        now="a replaced image and one class more give another fingerprint; it is that of the same folders unlinked",
    )


def test_a_fingerprint_is_what_it_was_and_takes_the_names_that_it_is_given(tmp_path):
    folder = put(tmp_path / "folder", a="1", sub__b="2", **{"sub-c": "3"})
    assert fingerprint(folder) == "93b92dc8d52e98750f5c4bfe2665b85c4dea79840eea33f5c2026ed650a4022e"
    assert fingerprint(folder, ["a"]) == "b19e33612f1b07d551d1c1aef76b08a273b62060ffcd37c62187654cdc2147c6"
    assert fingerprint(folder / "a") == "f6ed5d453e0578f0a7292c79c054544a9d3f7f4e2726ff79fee040a141021e1a"
    assert fingerprint(folder, ["a", "none"]) != fingerprint(folder, ["a"])
