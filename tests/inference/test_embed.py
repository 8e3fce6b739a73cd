import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from support.fast_feed import need_fast_feed
from support.project import ROOT

from clip_deploy.__main__ import main
from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.core.images import read_image
from clip_deploy.core.vectors import DTYPES
from clip_deploy.data import scenes as shapes
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.inference.embed import EmbedSettings, embed, embed_folder, make_here, make_part
from clip_deploy.inference.search import search
from clip_deploy.inference.storage import list_images, open_source

LABELS = [shapes.CLASSES[7 * index % len(shapes.CLASSES)] for index in range(25)]
SMALL = EmbedSettings(batch_size=4, part_size=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """25 images, of which two cannot be read, with a sub-folder and a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    for index, label in enumerate(LABELS):
        image, _ = shapes.render("embed", index, shapes.CLASSES.index(label))
        image.save(folder / ("sub" if index % 2 else "") / f"{index:02} {label}.png")
    next(folder.glob("04*")).write_bytes(b"")
    whole = next(folder.glob("sub/13*"))
    whole.write_bytes(whole.read_bytes()[:900])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def classifier(package):
    return ZeroShotClassifier.open(package)


def rows(output):
    tables = [parquet.read_table(path) for path in sorted(output.glob("part-*.parquet"))]
    return {path: vector for table in tables for path, vector in zip(*table.to_pydict().values(), strict=True)}


def test_every_readable_image_has_its_embedding_and_every_other_is_named(classifier, folder, tmp_path):
    done = embed_folder(classifier, folder, tmp_path, SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"part-0000{number}.parquet" for number in range(3)]
    assert (done.images, done.embedded_before, done.embedded_now) == (25, 0, 23)
    assert len(done.unreadable) == 2
    assert "is empty" in done.unreadable[0]
    assert "13 " in done.unreadable[1]
    assert "is not a readable image" in done.unreadable[1]
    found = rows(tmp_path)
    names = [name for name in list_images(folder).files if not name.startswith(("04", "sub/13"))]
    assert list(found) == names
    expected = classifier.embed_images([folder / name for name in names])
    assert np.allclose(list(found.values()), expected, atol=1e-6)


def test_an_image_too_thin_to_be_resized_is_named_and_left_out(classifier, tmp_path):
    (tmp_path / "images").mkdir()
    shapes.render("embed", 0, 0)[0].save(tmp_path / "images" / "whole.png")
    Image.new("1", (1, 1_000_000)).save(tmp_path / "images" / "thin.png")
    done = embed_folder(classifier, tmp_path / "images", tmp_path / "parts", SMALL)
    assert done.embedded_now == 1
    assert "thin.png is 1 x 1,000,000 pixels: a side may be at most 500 times the other" in done.unreadable[0]


def test_a_second_run_does_nothing_and_says_the_same(classifier, folder, tmp_path):
    first = embed_folder(classifier, folder, tmp_path, SMALL)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = embed_folder(classifier, folder, tmp_path, SMALL)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert (again.embedded_before, again.embedded_now) == (23, 0)
    assert again.unreadable == first.unreadable


def test_a_missing_part_alone_is_made_again_and_is_the_same(classifier, folder, tmp_path):
    embed_folder(classifier, folder, tmp_path, SMALL)
    part = tmp_path / "part-00001.parquet"
    content = part.read_bytes()
    part.unlink()
    assert embed_folder(classifier, folder, tmp_path, SMALL).embedded_now == 9
    assert part.read_bytes() == content


def test_a_killed_run_goes_on_where_it_stopped(package, folder, tmp_path):
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    source = next(folder.glob("00*")).read_bytes()
    for index in range(1000):
        (images / f"{index:05}.png").write_bytes(source)
    words = ["embed", str(images), str(output), "--package", str(package), "--part-size", "50", "--threads", "1"]
    process = subprocess.Popen([sys.executable, "-m", "clip_deploy", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(output.glob("part-*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = sorted(output.glob("part-*.parquet"))
    assert 2 <= len(kept) < 20
    stamps = {path: path.stat().st_mtime_ns for path in kept}
    done = subprocess.run(
        [sys.executable, "-m", "clip_deploy", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"1,000 images, {50 * len(kept):,} embedded before, {1000 - 50 * len(kept)} now" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == stamps
    assert len(rows(output)) == 1000
    assert [path.name for path in output.glob(".*")] == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (EmbedSettings(batch_size=8, part_size=10), "made with batch_size 4, and this run has 8"),
        (EmbedSettings(4, 10, "float16"), "made with dtype float32, and this run has float16"),
        (EmbedSettings(4, 10, dimensions=32), "made with dimensions 64, and this run has 32"),
        (EmbedSettings(batch_size=4, part_size=20), "made with part_size 10, and this run has 20"),
    ],
)
def test_other_settings_are_refused(classifier, folder, tmp_path, other, said):
    embed_folder(classifier, folder, tmp_path, SMALL)
    with pytest.raises(DeployError, match=said):
        embed_folder(classifier, folder, tmp_path, other)


def test_another_feed_is_refused(classifier, package, folder, tmp_path):
    need_fast_feed()
    embed_folder(classifier, folder, tmp_path, SMALL)
    with pytest.raises(DeployError, match="made with feed exact, and this run has fast: give another output folder"):
        embed_folder(ZeroShotClassifier.open(package, feed="fast"), folder, tmp_path, SMALL)


def test_the_command_embeds_photos_through_the_fast_feed(classifier, package, tmp_path, capsys):
    need_fast_feed()
    (tmp_path / "photos").mkdir()
    for index in range(3):
        shapes.render("embed", index, index)[0].resize((300, 200)).save(tmp_path / "photos" / f"{index}.jpg")
    given = ["embed", str(tmp_path / "photos"), "--package", str(package), "--threads", "1"]
    assert main([*given, str(tmp_path / "fast"), "--feed", "fast"]) == 0
    assert "3 images, 0 embedded before, 3 now" in capsys.readouterr().out
    found = np.array(list(rows(tmp_path / "fast").values()))
    expected = classifier.embed_images(sorted((tmp_path / "photos").iterdir()))
    cosines = (found * expected).sum(axis=1)
    assert 0.99 < cosines.min() < cosines.max() < 1


def test_another_package_other_files_and_damaged_parts_are_refused(classifier, folder, tmp_path, monkeypatch):
    embed_folder(classifier, folder, tmp_path, SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(classifier, "fingerprint", "another")
        with pytest.raises(DeployError, match="was made with another package: give another output folder"):
            embed_folder(classifier, folder, tmp_path, SMALL)
        with pytest.raises(DeployError, match="was made by another package: search with that one"):
            search(classifier, tmp_path, "a red circle", 1)
    (tmp_path / "other").mkdir()
    shapes.render("other", 0, 0)[0].save(tmp_path / "other" / f"00 {LABELS[0]}.png")
    with pytest.raises(DeployError, match="made with another list of files, or files that were changed since: give an"):
        embed_folder(classifier, tmp_path / "other", tmp_path, SMALL)
    (tmp_path / "part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        DeployError,
        match=r"part-00001.parquet is not a complete part of `embed`: remove it, and the same",
    ):
        embed_folder(classifier, folder, tmp_path, SMALL)


def test_a_file_that_was_replaced_by_one_of_its_size_keeps_no_stale_embedding(classifier, tmp_path):
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for index in range(2):
        shapes.render("replaced", index, 5 * index)[0].save(images / f"{index}.bmp")  # all of one size
    embed_folder(classifier, images, output, SMALL)
    shapes.render("replaced", 2, 20)[0].save(images / "1.bmp")
    done = embed_folder(classifier, images, output, SMALL)
    assert (done.images, done.embedded_before, done.embedded_now, done.gone) == (2, 1, 1, 0)
    expected = classifier.embed_images([images / "0.bmp", images / "1.bmp"])
    assert np.allclose(list(rows(output).values()), expected, atol=1e-6)


def scenes(folder, names):
    """Different pictures under these names."""
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shapes.render("scenes", index, index % len(shapes.CLASSES))[0].save(folder / name, "png")


def stamps(output):
    return {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}


def test_a_run_takes_up_what_is_new_changed_and_gone_and_embeds_nothing_else(classifier, tmp_path, kinds):
    images, output, names = tmp_path / "images", tmp_path / "out", [f"{index:02}.png" for index in range(30)]
    scenes(images, names)
    embed_folder(classifier, images, output, SMALL)
    first, parts = rows(output), stamps(output)
    (images / "25.png").unlink()
    shapes.render("other", 1, 40)[0].save(images / "03.png")
    shapes.render("other", 2, 41)[0].save(images / "10a.png")
    done = embed_folder(classifier, images, output, SMALL)
    assert (done.images, done.embedded_before, done.embedded_now, done.gone) == (30, 28, 2, 1)
    assert sorted(stamps(output)) == [f"part-0000{number}.parquet" for number in range(4)]
    assert stamps(output)["part-00001.parquet"] == parts["part-00001.parquet"]
    assert parquet.read_table(output / "part-00003.parquet")["path"].to_pylist() == ["03.png", "10a.png"]
    found = rows(output)
    assert sorted(found) == sorted([*(name for name in names if name != "25.png"), "10a.png"])
    kept = [name for name in names if name not in ("03.png", "25.png")]
    assert all(found[name] == first[name] for name in kept)
    fresh = classifier.embed_images([images / "03.png", images / "10a.png"])
    assert np.allclose([found["03.png"], found["10a.png"]], fresh, atol=1e-6)
    again = embed_folder(classifier, images, output, SMALL)
    assert (again.images, again.embedded_before, again.embedded_now, again.gone) == (30, 30, 0, 0)
    kinds(
        "23: one image more in a folder that is embedded",
        before="refused: `another list of files, or files that were changed since`; everything anew",
        now=f"of {done.images} images {done.embedded_before} kept, {done.embedded_now} embedded, {done.gone} gone",
    )


def test_a_part_whose_images_are_all_gone_goes_with_them(classifier, tmp_path):
    images, output, names = tmp_path / "images", tmp_path / "out", [f"{index:02}.png" for index in range(25)]
    scenes(images, names)
    embed_folder(classifier, images, output, SMALL)
    for name in names[10:20]:
        (images / name).unlink()
    done = embed_folder(classifier, images, output, SMALL)
    assert (done.images, done.embedded_before, done.embedded_now, done.gone) == (15, 15, 0, 10)
    assert sorted(stamps(output)) == ["part-00000.parquet", "part-00002.parquet"]
    scenes(images, ["new.png"])
    embed_folder(classifier, images, output, SMALL)
    assert parquet.read_table(output / "part-00001.parquet")["path"].to_pylist() == ["new.png"]


def test_a_run_that_is_killed_while_it_takes_up_changes_ends_as_one_that_was_not(classifier, tmp_path):
    images, names = tmp_path / "images", [f"{index:02}.png" for index in range(45)]
    scenes(images, names[:20])
    for output in ("whole", "killed"):
        embed_folder(classifier, images, tmp_path / output, SMALL)
    scenes(images, names[20:])
    shapes.render("other", 1, 40)[0].save(images / "03.png")
    embed_folder(classifier, images, tmp_path / "whole", SMALL)

    def killed(job, missing, advance):
        for number, part in reversed(list(missing.items())[1:]):
            yield make_part(classifier, job, number, part, advance)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(classifier, open_source(str(images), 10), str(tmp_path / "killed"), SMALL, killed)
    assert len(stamps(tmp_path / "killed")) == 4
    done = embed_folder(classifier, images, tmp_path / "killed", SMALL)
    assert (done.images, done.embedded_before, done.embedded_now) == (45, 35, 10)
    whole, mended = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "killed"))
    assert whole == mended


def test_an_image_that_two_runs_at_once_embedded_is_there_once_after_the_next(classifier, tmp_path):
    images, output = tmp_path / "images", tmp_path / "out"
    scenes(images, ["a.png", "b.png", "c.png"])
    embed_folder(classifier, images, output, EmbedSettings(4, 2))
    shutil.copy(output / "part-00000.parquet", output / "part-00002.parquet")
    done = embed_folder(classifier, images, output, EmbedSettings(4, 2))
    assert (done.images, done.embedded_now, done.gone) == (3, 0, 0)
    assert sorted(stamps(output)) == ["part-00000.parquet", "part-00001.parquet"]


def test_what_could_not_be_read_is_tried_again(classifier, tmp_path, monkeypatch):
    """As HEIC where its library is installed by now: the file is the same."""
    images, output = tmp_path / "images", tmp_path / "out"
    scenes(images, ["a.png", "b.png"])
    with monkeypatch.context() as patch:
        patch.setattr(
            "clip_deploy.inference.classifier.read_image",
            lambda path: fails(path) if "b" in path.name else read_image(path),
        )
        assert embed_folder(classifier, images, output, SMALL).unreadable == ["b.png fails"]
    done = embed_folder(classifier, images, output, SMALL)
    assert (done.images, done.embedded_before, done.embedded_now, done.unreadable) == (2, 1, 1, [])
    assert list(rows(output)) == ["a.png", "b.png"]


def fails(path):
    raise DataError(f"{path.name} fails")


def test_what_a_folder_held_that_cannot_be_looked_at_now_is_kept_and_named(classifier, tmp_path):
    """A disk that is not there for once costs no embeddings."""
    images, disk, output = tmp_path / "images", tmp_path / "disk", tmp_path / "out"
    scenes(images, ["a.png", "gone.png"])
    scenes(disk, ["b.png"])
    (images / "linked").symlink_to(disk)
    embed_folder(classifier, images, output, SMALL)
    disk.rename(tmp_path / "away")
    (images / "gone.png").unlink()
    done = embed_folder(classifier, images, output, SMALL)
    assert (done.images, done.embedded_before, done.embedded_now, done.gone) == (2, 2, 0, 1)
    assert list(rows(output)) == ["a.png", "linked/b.png"]
    assert [
        line.startswith(f"{images}/linked is a link to {disk}, which does not exist") for line in done.unreadable
    ] == [True]


def test_a_table_that_changed_is_refused_as_are_parts_of_an_earlier_version(classifier, tmp_path):
    images, output = tmp_path / "images", tmp_path / "out"
    scenes(images, ["a.png"])
    embed_folder(classifier, images, output, SMALL)
    part = output / "part-00000.parquet"
    table = parquet.read_table(part)
    header = json.loads(parquet.read_metadata(part).metadata[b"clip_deploy"])
    del header["source"]
    parquet.write_table(table.replace_schema_metadata({"clip_deploy": json.dumps(header)}), part)
    with pytest.raises(
        DeployError, match="was made with an earlier version of clip-deploy: give another output folder"
    ):
        embed_folder(classifier, images, output, SMALL)
    (output / "part-x.parquet").write_bytes(b"")
    with pytest.raises(DeployError, match=r"part-x.parquet was not written by `embed`"):
        embed_folder(classifier, images, output, SMALL)


def test_images_with_any_ending_or_none_are_embedded_and_the_rest_is_named(package, tmp_path, capsys, kinds):
    """As browsers, phones and crawlers write them."""
    images = tmp_path / "images"
    images.mkdir()
    for index, name in enumerate(["0.jpg", "1.JPG", "2.webp", "3.avif", "4.jp2", "5.tga", "6.ppm", "7.jfif", "8.jpe"]):
        shapes.render("endings", index, index)[0].save(images / name)
    shapes.render("endings", 9, 9)[0].save(images / "9", "jpeg")
    (images / "10.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(400))
    for name in (".DS_Store", ".hidden.jpg", "Thumbs.db", "notes.txt", "10.json", "clip.mp4", "README"):
        (images / name).write_bytes(b"no image")
    assert main(["embed", str(images), str(tmp_path / "out"), "--package", str(package), "--threads", "1"]) == 3
    printed = capsys.readouterr()
    assert "11 images, 0 embedded before, 10 now" in printed.out
    warned = [line for line in printed.err.splitlines() if line.startswith("warning: ")]
    assert [f"{images}/10.heic is" in line for line in warned] == [True]
    assert len(rows(tmp_path / "out")) == 10
    kinds(
        "07: images with other endings, embedded",
        before="of 11 files 3 images, 0 unreadable, exit 0",
        now="of 11 files 10 images, 1 named, exit 3",
    )


@pytest.fixture
def another_user():
    """Reads as somebody who may not read everything: root does."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_linked_folders_are_embedded_and_what_cannot_be_listed_is_named(classifier, request, kinds):
    with TemporaryDirectory() as folder:  # which anybody may enter
        root = Path(folder)
        root.chmod(0o777)
        scenes(root / "images", ["a.png", "closed/b.png"])
        scenes(root / "other", ["c.png", "deep/d.png"])
        (root / "images" / "linked").symlink_to("../other")
        (root / "other" / "deep" / "back").symlink_to("../../images")
        (root / "images" / "closed").chmod(0)
        request.getfixturevalue("another_user")
        source = open_source(str(root / "images"), 10)
        assert list(source.files) == ["a.png", "linked/c.png", "linked/deep/d.png"]
        assert list(source.skipped.values()) == [
            f"{root}/images/closed cannot be read (Permission denied): check its permissions, or remove it"
        ]
        if os.getuid() == 0:
            os.seteuid(0)
        done = embed(classifier, source, str(root / "out"), SMALL, partial(make_here, classifier))
        assert (done.images, done.embedded_now, len(done.unreadable)) == (3, 3, 1)
        kinds(
            "23: sub-folders that are links, or closed",
            before="left out without a word, exit 0: 10 of 20 images lost",
            now=f"{done.embedded_now} of 3 behind links embedded, {len(done.unreadable)} folder named, exit 3",
        )


def test_float16_halves_the_bytes_and_keeps_three_digits(classifier, folder, tmp_path):
    embed_folder(classifier, folder, tmp_path / "half", EmbedSettings(4, 10, "float16"))
    embed_folder(classifier, folder, tmp_path / "whole", SMALL)
    half, whole = (np.array(list(rows(tmp_path / name).values()), dtype=np.float32) for name in ("half", "whole"))
    assert 0 < np.abs(half - whole).max() < 1e-3
    schema = parquet.read_schema(tmp_path / "half" / "part-00000.parquet")
    assert str(schema.field("embedding").type) == "fixed_size_list<element: halffloat>[64]"


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_fewer_bits_and_dimensions_keep_what_vectors_say_of_them(classifier, folder, tmp_path, dtype):
    """Held against the whole embeddings, cut and rounded here."""
    embed_folder(classifier, folder, tmp_path / "small", EmbedSettings(4, 10, dtype, 32))
    embed_folder(classifier, folder, tmp_path / "whole", SMALL)
    small, whole = (rows(tmp_path / name) for name in ("small", "whole"))
    assert list(small) == list(whole)
    kept = np.array(list(whole.values()), dtype=np.float32)[:, :32]
    if dtype == "binary":
        assert [np.unpackbits(np.array(row, np.uint8)).tolist() for row in small.values()] == (kept > 0).tolist()
        assert parquet.read_schema(tmp_path / "small" / "part-00000.parquet").field("embedding").type.list_size == 4
    else:
        expected = np.rint(127 * kept / np.abs(kept).max(axis=1, keepdims=True))
        np.testing.assert_array_equal(np.array(list(small.values())), expected)


def test_a_cut_embedding_has_unit_length_again(classifier, folder, tmp_path):
    embed_folder(classifier, folder, tmp_path / "cut", EmbedSettings(4, 10, dimensions=16))
    embed_folder(classifier, folder, tmp_path / "whole", SMALL)
    cut, whole = (np.array(list(rows(tmp_path / name).values()), dtype=np.float32) for name in ("cut", "whole"))
    np.testing.assert_allclose(cut, whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dimensions": 65}, "dimensions is 65: the package's embeddings have 64, give 1 to 64"),
        ({"dimensions": 0}, "dimensions is 0: the package's embeddings have 64"),
        ({"dimensions": 20, "dtype": "binary"}, "dimensions is 20: binary keeps 8 in a byte, give a multiple of 8"),
        ({"dtype": "int4"}, "dtype is 'int4': accepted are float32, float16, int8, binary"),
    ],
)
def test_vectors_that_cannot_be_are_refused_before_the_work(classifier, folder, tmp_path, settings, said):
    with pytest.raises(DataError, match=said):
        embed_folder(classifier, folder, tmp_path, EmbedSettings(**settings))
    assert list(tmp_path.iterdir()) == []


def test_parts_of_an_earlier_version_are_refused(classifier, folder, tmp_path):
    embed_folder(classifier, folder, tmp_path, SMALL)
    part = tmp_path / "part-00000.parquet"
    table = parquet.read_table(part)
    header = json.loads(parquet.read_metadata(part).metadata[b"clip_deploy"])
    del header["dtype"], header["dimensions"]
    parquet.write_table(table.replace_schema_metadata({b"clip_deploy": json.dumps(header)}), part)
    with pytest.raises(DeployError, match="made with an earlier version of clip-deploy: give another output folder"):
        embed_folder(classifier, folder, tmp_path, SMALL)
    with pytest.raises(DeployError, match="made with an earlier version of clip-deploy: embed the images again"):
        search(classifier, tmp_path, "a red circle", 1)


@pytest.mark.parametrize("dimensions", [None, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_search_finds_what_the_text_describes_in_images_and_in_their_embeddings(
    classifier, folder, tmp_path, dtype, dimensions
):
    embed_folder(classifier, folder, tmp_path, EmbedSettings(4, 10, dtype, dimensions))
    text = f"a photo of a {LABELS[6]}"
    hits = search(classifier, tmp_path, text, 3).hits
    assert hits[0].path == f"06 {LABELS[6]}.png"
    assert hits[0].cosine > hits[1].cosine > hits[2].cosine


def test_a_folder_of_images_is_searched_as_it_is(classifier, tmp_path):
    for index, label in enumerate(("red circle", "blue square")):
        shapes.render("search", index, shapes.CLASSES.index(label))[0].save(tmp_path / f"{label}.png")
    found = search(classifier, tmp_path, "a blue square", 5)
    assert [hit.path for hit in found.hits] == ["blue square.png", "red circle.png"]
    assert found.unreadable == []


def test_a_search_leaves_out_what_cannot_be_read_and_names_it(package, classifier, tmp_path, capsys):
    (tmp_path / "away").symlink_to(tmp_path / "none")
    shapes.render("search", 0, 0)[0].save(tmp_path / "good.png")
    os.rename(tmp_path / "good.png", os.fsencode(tmp_path) + b"/good\xff.png")
    (tmp_path / "page.png").write_text("<html>")
    assert main(["search", str(tmp_path), "a red circle", "--package", str(package)]) == 3
    printed = capsys.readouterr()
    assert printed.out.endswith("  good?.png\n")
    assert printed.out.count("\n") == 1
    linked, said = [line for line in printed.err.splitlines() if line.startswith("warning: ")]
    assert "away is a link to" in linked
    assert "page.png is not a readable image" in said


def beside(folder):
    """A folder for the output: it may not lie within the source."""
    return folder.with_name(f"{folder.name}-out")


def test_a_search_of_nothing_but_unreadable_images_finds_nothing_and_says_so(package, classifier, tmp_path, capsys):
    (tmp_path / "page.png").write_text("<html>")
    embed_folder(classifier, tmp_path, beside(tmp_path), SMALL)
    for source in (tmp_path, beside(tmp_path)):
        assert search(classifier, source, "a red circle", 5).hits == []
        assert main(["search", str(source), "a red circle", "--package", str(package)]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert f"error: {source} holds no image that could be read: give a folder of images, or what" in printed.err


def test_an_empty_folder_and_a_missing_one_are_named(classifier, tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        embed_folder(classifier, tmp_path, beside(tmp_path), SMALL)
    with pytest.raises(DataError, match="none does not exist: give a folder of images"):
        embed_folder(classifier, tmp_path / "none", beside(tmp_path), SMALL)


def test_the_order_is_that_of_the_names_bytes(tmp_path):
    for name in ("b.png", "B.PNG", "a.jpg", "\u00e4.webp", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    assert list(list_images(tmp_path).files) == ["B.PNG", "a.jpg", "b.png", "\u00e4.webp"]


def test_a_name_that_is_no_text_is_reported_and_not_fatal(classifier, tmp_path):
    image, _ = shapes.render("embed", 0, 0)
    image.save(tmp_path / "good.png")
    os.rename(tmp_path / "good.png", os.fsencode(tmp_path) + b"/bad\xff.png")
    image.save(tmp_path / "good.png")
    done = embed_folder(classifier, tmp_path, beside(tmp_path), SMALL)
    assert done.unreadable == ["bad?.png has a name that is not UTF-8: rename it"]
    assert list(rows(beside(tmp_path))) == ["good.png"]


def test_the_commands_print_what_they_found(package, folder, tmp_path, capsys):
    options = ["--package", str(package), "--threads", "1"]
    image = str(folder / f"00 {LABELS[0]}.png")
    assert main(["predict", image, "a red circle", "a blue square", *options]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("  a red circle")
    assert main(["embed", str(folder), str(tmp_path), "--dtype", "float16", *options]) == 3
    printed = capsys.readouterr()
    assert "25 images, 0 embedded before, 23 now" in printed.out
    assert printed.out.endswith(", 2 unreadable\n")
    assert sum(line.startswith("warning: ") for line in printed.err.splitlines()) == 2
    assert main(["search", str(tmp_path), f"a photo of a {LABELS[6]}", "--top", "2", *options]) == 0
    assert f"06 {LABELS[6]}.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["predict", "none.png", "a cat"], 1, "error: none.png does not exist"),
        (["predict", "none.png", ""], 1, "error: text 1 of 1 is ''"),
        (["predict", "empty", "a cat"], 1, "error: empty is a folder: give an image file"),
        (["predict", "https://a.b/c.jpg", "a cat"], 1, "error: https://a.b/c.jpg is an address: give a path"),
        (["predict", "none.png", "--cache", "note.txt"], 1, "error: --cache is note.txt, a file: give a folder"),
        (["search", "none", "a cat"], 1, "error: none does not exist: give a folder of images, or what `embed` ("),
        (["search", "note.txt", "a cat"], 1, "error: note.txt is a file: give a folder of images, or what"),
        (["search", "empty", "a cat"], 1, "error: empty holds no images: give a folder with image files"),
        (
            ["search", "other.parquet", "a cat"],
            1,
            "error: ./other.parquet is not a complete part of `embed`: give a folder of",
        ),
        (["embed", "none", "out"], 1, "error: none does not exist: give a folder of images, of Parquet or of tar"),
        (["embed", "note.txt", "out"], 1, "error: note.txt is a file: give a folder of images, of Parquet or of tar"),
        (["embed", "images", "note.txt"], 1, "error: note.txt cannot be the output folder, because note.txt is a file"),
        (
            ["embed", "images", "note.txt/a"],
            1,
            "error: note.txt/a cannot be the output folder, because note.txt is a file",
        ),
        (["embed", "images", "images"], 1, "error: the output images lies within the source images, which would"),
        (["embed", ".", "images/../new"], 1, "error: the output images/../new lies within the source ., which"),
        (["embed", "s3://a/b/", "s3://a/b/c"], 1, "error: the output s3://a/b/c lies within the source s3://a/b"),
        (["search", "none", "a cat", "--top", "0"], 1, "error: top is 0"),
        (["predict", "none.png", "--top", "0"], 1, "error: top is 0: give a whole number of 1 or more"),
        (["predict", "none.png", "a cat", "--top", "-1"], 1, "error: top is -1: give a whole number of 1 or more"),
        (["embed", "none", "out", "--part-size", "0"], 1, "error: part_size is 0"),
        (["embed", "none", "out", "--ray", "local"], 1, "error: none does not exist"),
        (["predict", "none.png", "--device", "tpu"], 1, "error: device is 'tpu'"),
        (["predict", "none.png", "--threads", "0"], 1, "error: threads is 0"),
        (["predict", "none.png", "--threads", "1025"], 1, "error: threads is 1025: give 1 to 1024"),
    ],
)
def test_the_commands_fail_in_one_line(package, tmp_path, monkeypatch, capsys, words, code, said):
    for name in ("empty", "images"):
        (tmp_path / name).mkdir()
    shapes.render("embed", 0, 0)[0].save(tmp_path / "images" / "a.png")
    (tmp_path / "note.txt").write_text("no image")
    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "other.parquet")
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--package", str(package)]) == code
    errors = capsys.readouterr().err
    assert errors.startswith(said)
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("folder", "fault"),
    [("note.txt", "it is a file"), ("empty", "it has no manifest.json")],
)
def test_what_is_no_package_is_named_with_what_is_one(folder, fault, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("no package")
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "a.png", "a cat", "--package", folder]) == 1
    assert capsys.readouterr().err == (
        f"error: {folder} is not a package ({fault}): give the folder that `dvc repro` or `clip-deploy package` wrote, "
        "as artifacts/package\n"
    )


def test_a_package_that_is_not_there_is_named_with_the_option_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = "give the folder that `dvc repro` or `clip-deploy package` wrote, with --package\n"
    for given, folder in (([], "artifacts/package"), (["--package", "none"], "none")):
        assert main(["predict", "a.png", "a cat", *given]) == 1
        assert capsys.readouterr().err == f"error: there is no package {folder}: {said}"


def test_a_parts_metadata_is_json(classifier, folder, tmp_path):
    embed_folder(classifier, folder, tmp_path, SMALL)
    header = json.loads(parquet.read_metadata(tmp_path / "part-00000.parquet").metadata[b"clip_deploy"])
    assert header["package"] == classifier.fingerprint
