"""`processor:`, for folders in which training left the weights alone."""

import json
import shutil

import pytest
from support.hub import COMMIT, cached
from support.project import TINY

from clip_deploy.checkpoint.fetch import fetch
from clip_deploy.checkpoint.lint import lint
from clip_deploy.core.artifact import build, read_target
from clip_deploy.core.config import ModelConfig
from clip_deploy.core.environment import fingerprint
from clip_deploy.core.errors import CheckpointError, ConfigError
from clip_deploy.core.model import Origin
from stages import probe

IMAGES = ["preprocessor_config.json"]
WORDS = ["tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def bare(tmp_path):
    """A checkpoint as a Trainer leaves it."""
    folder = shutil.copytree(TINY, tmp_path / "bare")
    for name in IMAGES + WORDS:
        (folder / name).unlink()
    return folder


def fetched(folder, output, **settings):
    model = ModelConfig(path=str(folder), **settings)
    build(output, lambda made: fetch(model, made), None)
    target = read_target(output)
    lint(output, model, target.model)
    return target


def refused(folder, **settings):
    output = folder.parent / "refused"
    with pytest.raises(CheckpointError) as error:
        build(output, lambda made: fetch(ModelConfig(path=str(folder), **settings), made), None)
    assert not output.exists()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def origin(names):
    return {"processor": Origin(None, None, fingerprint(TINY, names))}


def test_a_folder_without_processor_is_told_of_it(bare, kinds):
    said = refused(bare)
    assert (
        "has no preprocessor_config.json: save the processor with `processor.save_pretrained(folder)`, or name" in said
    )
    assert "`processor:` in the model's file in conf/model/ (a folder or an id)" in said
    shutil.copyfile(TINY / IMAGES[0], bare / IMAGES[0])
    assert "lacks the vocabulary of its CLIPTokenizer" in refused(bare)
    assert "or name the model that has it with `processor:`" in refused(bare)
    kinds("01: a fine-tuned folder without processor", "refused: save the processor", said)


def test_the_processor_comes_from_the_folder_that_is_named(bare, checkpoint, tmp_path):
    target = fetched(bare, tmp_path / "torch-fp32", processor=str(TINY))
    assert target.model.checkpoint.parts == origin(IMAGES + WORDS)
    assert target.model.checkpoint.sha256 == read_target(checkpoint).model.checkpoint.sha256
    assert (tmp_path / "torch-fp32" / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


def test_what_the_folder_has_itself_stays(bare, tmp_path):
    for name in WORDS:
        shutil.copyfile(TINY / name, bare / name)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 16}))
    target = fetched(bare, tmp_path / "torch-fp32", processor=str(TINY))
    assert target.model.checkpoint.parts == origin(IMAGES)
    assert target.model.context_length == 16


def test_a_tokenizer_without_vocabulary_gives_way_as_a_whole(bare, tmp_path):
    shutil.copyfile(TINY / IMAGES[0], bare / IMAGES[0])
    (bare / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": "!"}))
    target = fetched(bare, tmp_path / "torch-fp32", processor=str(TINY))
    assert target.model.checkpoint.parts == origin(WORDS)
    settings = [(folder / "tokenizer_config.json").read_text() for folder in (tmp_path / "torch-fp32", TINY)]
    assert settings[0] == settings[1]


def test_a_processor_by_id_is_of_a_pinned_revision(bare, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cached(tmp_path / "cache", "someone/clip", TINY)
    said = refused(bare, processor="someone/clip")
    assert (
        "model.processor is 'someone/clip': there is no such folder here, and as an id it is not pinned to a commit"
        in said
    )
    target = fetched(bare, tmp_path / "torch-fp32", processor="someone/clip", processor_revision=COMMIT)
    found = target.model.checkpoint.parts["processor"]
    assert (found.repo_id, found.revision) == ("someone/clip", COMMIT)
    assert (tmp_path / "torch-fp32" / "model.safetensors").read_bytes() == (bare / "model.safetensors").read_bytes()


def test_a_processor_that_is_not_needed_is_refused(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "whole")
    said = refused(folder, processor=str(TINY))
    assert f"model.processor is {TINY}, but the model has a processor and a tokenizer of its own: remove the" in said


def test_a_processor_that_is_not_there_is_named(bare, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    assert f"{other} has no preprocessor_config.json" in refused(bare, processor=str(other))
    shutil.copyfile(TINY / IMAGES[0], other / IMAGES[0])
    assert f"{other} lacks the vocabulary of its CLIPTokenizer" in refused(bare, processor=str(other))
    assert "there is no such folder here, and it is not an id of the hub" in refused(bare, processor="/no/where")


def test_a_tokenizer_of_another_model_is_found_by_the_linter(bare, siglip, tmp_path):
    with pytest.raises(CheckpointError):
        fetched(bare, tmp_path / "torch-fp32", processor=str(siglip.parent))


def test_a_processor_at_a_revision_that_can_move_is_refused(bare, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cached(tmp_path / "cache", "someone/clip", TINY)
    (tmp_path / "cache" / "models--someone--clip" / "refs").mkdir()
    (tmp_path / "cache" / "models--someone--clip" / "refs" / "main").write_text(COMMIT)
    said = refused(bare, processor="someone/clip", processor_revision="main")
    assert said.startswith(
        "model.processor_revision is main, a name that can move to other weights. someone/clip is now at "
    )
    assert said.endswith(f"set `processor_revision: {COMMIT}` in the model's file in conf/model/")


def test_a_revision_alone_is_refused():
    with pytest.raises(ConfigError, match=r"model\.processor_revision is set without model\.processor"):
        ModelConfig(path=str(TINY), processor_revision=COMMIT)


def test_download_runs_again_where_the_processor_changes(bare, tmp_path, monkeypatch):
    lent = shutil.copytree(TINY, tmp_path / "lent")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "CONF", tmp_path / "conf")
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "local.yaml").write_text(f"path: {bare}\nprocessor: {lent}\n")
    first = probe.identity("model", "local")
    assert ", processor " in first
    (lent / "preprocessor_config.json").write_text("{}")
    assert probe.identity("model", "local") != first
