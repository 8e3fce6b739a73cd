import json
import pickle
import shutil

import pytest

from clip_deploy.core.errors import DeployError, DiskError
from clip_deploy.core.manifest import save_manifest
from clip_deploy.core.package import EmptyPackageError, Labels, read_labels, read_package


@pytest.fixture
def copy(package, tmp_path):
    return shutil.copytree(package, tmp_path / "package")


@pytest.fixture
def change(copy):
    """Give entries of the manifest, by their paths, other values; ... takes one away."""

    def run(**values):
        content = json.loads((copy / "manifest.json").read_text())
        for path, value in values.items():
            *above, last = path.split("__")
            inner = content
            for name in above:
                inner = inner[name]
            inner |= {last: value}
            if value is ...:
                del inner[last]
        (copy / "manifest.json").write_text(json.dumps(content))

    return run


def test_a_manifest_is_read_and_written_as_it_stands(package, tmp_path):
    save_manifest(tmp_path / "manifest.json", read_package(package), indent=1, ensure_ascii=False)
    assert (tmp_path / "manifest.json").read_bytes() == (package / "manifest.json").read_bytes()


def test_a_package_says_what_its_towers_take_and_whose_they_are(package):
    encoder = read_package(package).encoder
    assert (encoder.towers["vision"].inputs, encoder.towers["vision"].target) == (["pixel_values"], "onnx-fp32")
    assert encoder.towers["text"].inputs == ["input_ids", "attention_mask"]
    assert (encoder.dimension, encoder.image_size, encoder.logit_bias) == (64, [48, 48], None)
    assert isinstance(read_labels(package), Labels)


def test_a_fingerprint_is_of_the_files_that_make_embeddings(package, copy, change):
    whole, texts = (read_package(package).fingerprint(*parts) for parts in ((), ("text",)))
    assert len({whole, texts, read_package(package).fingerprint("vision")}) == 3
    content = json.loads((copy / "manifest.json").read_text())
    (copy / "labels.json").write_text("{}")
    files = {name: facts for name, facts in content["files"].items() if name != "labels.json"}
    change(files=files, note="another")
    assert read_package(copy).fingerprint() == whole


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"dimension": ...},
            r"of another version of clip-deploy \(it lacks dimension\): package it again",
        ),
        ({"towers__vision__image_input": ...}, "it lacks towers.vision.image_input"),
        ({"activation": 3}, "activation is 3, not str"),
        ({"colour": "red"}, "it has an unknown entry colour"),
        ({"files__tokenizer.json": "hash"}, "not a dictionary"),
        (
            {"files__../text.onnx": {"sha256": "0", "bytes": 1}},
            "names '../text.onnx', which lies outside of",
        ),
        ({"files__/etc/passwd": {"sha256": "0", "bytes": 1}}, "names '/etc/passwd', which lies outside of"),
        (
            {"towers__text__files": ["../text.onnx"]},
            r"names \.\./text\.onnx for a tower, but has no such file with its hash",
        ),
        ({"towers__text__sha256": "0"}, "names onnx-fp32/text.onnx for a tower, but has no such file with its hash"),
        ({"files__onnx-fp32/text.onnx": ...}, "names onnx-fp32/text.onnx for a tower, but has no such file with its"),
        ({"towers__text__files": []}, "names no file for a tower"),
        ({"format": 1}, "is not of format 2, which this version reads"),
    ],
)
def test_a_manifest_that_is_none_of_ours_is_refused_by_what_is_wrong(copy, change, changed, said):
    change(**changed)
    with pytest.raises(DeployError, match=said):
        read_package(copy)


def test_a_manifest_of_brackets_alone_is_no_package(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DeployError, match="is not a package"):
        read_package(tmp_path)


def test_damage_concerns_the_disk_and_not_one_reader(copy):
    (copy / "onnx-fp32" / "text.onnx").write_bytes(b"damaged")
    with pytest.raises(DiskError, match=r"text\.onnx is not the file that was packaged"):
        read_package(copy)


def test_where_nothing_was_packaged_the_reason_is_at_hand(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 2, "unavailable": "no target passes"}')
    with pytest.raises(EmptyPackageError, match="holds nothing to ship: no target passes") as caught:
        read_package(tmp_path)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):  # a worker's goes to another process
        assert error.reason == "no target passes"
