"""Folders of other tools, and folders that hold more than the model."""

import json
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.project import TINY

from clip_deploy.checkpoint.fetch import fetch
from clip_deploy.checkpoint.layout import looked_at, model_files, other_weights
from clip_deploy.core.config import ModelConfig
from clip_deploy.core.environment import fingerprint_input
from clip_deploy.core.errors import CheckpointError

FILES = ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
DENSE = "sentence_transformers.base.modules.dense.Dense"
NORMALIZE = "sentence_transformers.models.Normalize"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "checkpoint")


def put(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def keep(folder, names):
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def adapter(folder):
    """As peft.PeftModel.save_pretrained leaves it."""
    put(folder, "adapter_config.json", {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "someone/clip"})
    weights = {"base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": np.ones((4, 96), "f4")}
    save_file(weights, folder / "adapter_model.safetensors")


def modules(folder, *kinds, path=""):
    """As SentenceTransformer.save leaves it."""
    listed = [{"idx": row, "name": str(row), "type": kind} for row, kind in enumerate(kinds)]
    put(
        folder,
        "modules.json",
        [{**module, "path": path if row == 0 else f"{row}_x"} for row, module in enumerate(listed)],
    )


def fetched(folder):
    output = folder.parent / "output"
    output.mkdir()
    return fetch(ModelConfig(path=str(folder)), output), output


def refused(folder):
    """What is said, before anything is copied."""
    output = folder.parent / "refused"
    output.mkdir()
    with pytest.raises(CheckpointError) as error:
        fetch(ModelConfig(path=str(folder)), output)
    assert not list(output.iterdir())
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_an_adapter_beside_its_base_is_refused_whatever_is_installed(folder, kinds):
    adapter(folder)
    said = refused(folder)
    assert "an adapter (adapter_config.json and adapter_model.safetensors) beside a whole model. Nothing shows" in said
    assert f"move these files to a folder of their own, and set `path` to that folder and `base: {folder}`" in said
    kinds(
        "03: an adapter beside its base", "the base deployed, the adapter ignored: cosine 0.247 image, 0.781 text", said
    )


def test_adapter_weights_without_their_settings_are_refused_too(folder):
    (folder / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin" in refused(folder)


def test_what_stands_behind_a_sentence_transformers_model_is_not_dropped(folder):
    modules(folder, TRANSFORMER, "sentence_transformers.models.LSTM")
    assert "is of a sentence-transformers model with LSTM (modules.json). They would be left out" in refused(folder)


def test_a_sentence_transformers_model_without_a_head_is_taken(folder):
    modules(folder, TRANSFORMER, NORMALIZE)
    features = {"text": {"method": "get_text_features"}, "image": {"method": "get_image_features"}}
    put(folder, "sentence_bert_config.json", {"modality_config": features})
    target, output = fetched(folder)
    assert target.files == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in output.iterdir()) == FILES


def test_a_sentence_transformers_model_of_other_outputs_is_refused(folder):
    modules(folder, TRANSFORMER)
    put(folder, "sentence_bert_config.json", {"modality_config": {"text": {"method": "forward"}}})
    assert "sentence_bert_config.json takes forward for texts: only get_text_features can be deployed" in refused(
        folder
    )


@pytest.mark.parametrize("content", ["[", "{}", "[1]"])
def test_modules_that_are_none_are_refused(folder, content):
    (folder / "modules.json").write_text(content)
    assert "modules.json" in refused(folder)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model_index.json": {}, "text_encoder/config.json": {}}, "is a diffusers pipeline"),
        ({"checkpoint-1000/config.json": {}}, "has no config.json, but checkpoint-1000 below it has one"),
        ({"snapshots/0123/config.json": {}}, "has no config.json, but snapshots/0123 below it has one"),
        ({"epoch_32.pt": {}}, "has no config.json, and epoch_32.pt: a training checkpoint or a state_dict"),
        ({"notes.md": {}}, "has no config.json, and holds notes.md: give a folder that transformers' save_pretrained"),
        ({}, "has no config.json, and holds nothing: give a folder"),
    ],
)
def test_a_folder_without_config_is_called_what_it_is(tmp_path, files, said):
    folder = tmp_path / "given"
    folder.mkdir()
    for name, content in files.items():
        put(folder, name, content)
    assert f"{folder} {said}" in refused(folder)


def test_an_open_clip_folder_without_its_library_is_one_message(tmp_path, monkeypatch):
    folder = tmp_path / "given"
    put(folder, "open_clip_config.json", {"model_cfg": {"vision_cfg": {}, "text_cfg": {}}})
    put(folder, "open_clip_model.safetensors", {})
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "needs the library open_clip_torch, which cannot be imported" in (said := refused(folder))
    assert "pip install 'clip-deploy[open-clip]'" in said


def test_a_relative_path_is_named_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    with pytest.raises(CheckpointError, match=r"^clip has no config\.json"):
        fetch(ModelConfig(path="./clip"), tmp_path)


def test_a_file_in_the_place_of_a_folder_is_called_a_file(folder):
    assert "model.safetensors: a file, and no folder" in refused(folder / "model.safetensors")


def test_only_what_transformers_reads_is_copied_counted_and_hashed(folder, kinds):
    before = fetched(folder)[0]
    for name in ("open_clip_model.safetensors", "model.fp16.safetensors"):
        shutil.copyfile(folder / "model.safetensors", folder / name)
    put(folder, "open_clip_config.json", {})
    put(folder, "trainer_state.json", {})
    (folder / "requirements.txt").write_text("torch")
    again = folder.parent / "again"
    again.mkdir()
    target = fetch(ModelConfig(path=str(folder)), again)
    assert sorted(path.name for path in again.iterdir()) == FILES
    assert target.files == ["config.json", "model.safetensors"]
    assert target.model.checkpoint == before.model.checkpoint
    assert target.model.left_out == ["model.fp16.safetensors", "open_clip_model.safetensors"]
    size = sum((again / name).stat().st_size for name in target.files)
    kinds(
        "08: a second set of weights", "downloaded, counted (7.64 for 3.82 MB), hashed, linted", f"{size / 1e6:.2f} MB"
    )


def test_of_one_file_and_shards_the_file_is_read_as_transformers_does(folder):
    weights = load_file(folder / "model.safetensors")
    shards = {"a.safetensors": dict(list(weights.items())[:50]), "b.safetensors": dict(list(weights.items())[50:])}
    for name, part in shards.items():
        save_file(part, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, part in shards.items() for key in part}}
    put(folder, "model.safetensors.index.json", index)
    assert {name for name in model_files(folder) if "safetensors" in name} == {"model.safetensors"}
    assert other_weights(folder) == ["a.safetensors", "b.safetensors"]
    (folder / "model.safetensors").unlink()
    target, output = fetched(folder)
    assert target.files == ["config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors"]
    assert all((output / name).is_file() for name in target.files)
    assert target.model.left_out == []


def test_a_checkpoint_is_another_where_a_file_changes_that_decides_and_no_other(folder):
    def seen():
        return fingerprint_input(folder, ModelConfig(path=str(folder)), looked_at(folder))

    before = seen()
    put(folder, "trainer_state.json", {})
    put(folder, "checkpoint-1000/config.json", {})
    (folder / "optimizer.pt").write_bytes(b"1")
    assert seen() == before
    modules(folder, TRANSFORMER)
    with_modules = seen()
    assert with_modules != before
    adapter(folder)
    assert seen() not in (before, with_modules)
