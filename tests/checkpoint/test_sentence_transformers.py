"""Folders that sentence-transformers saves, held against what it embeds itself."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from support.hub import COMMIT, served
from support.models import embedded
from support.project import ROOT, TINY, warm_python

from clip_deploy.builders.onnx_export import export_onnx
from clip_deploy.checkpoint.fetch import fetch
from clip_deploy.checkpoint.lint import lint
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import ModelConfig, OnnxConfig
from clip_deploy.core.errors import CheckpointError
from stages import probe

WORDS = ["a photo of a red circle", "Two BLUE squares", "x"]
PHOTOS = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)) for seed in range(3)]
CLIP = "sentence_transformers.models.CLIPModel"
DENSE, NORMALIZE = "sentence_transformers.models.Dense", "sentence_transformers.models.Normalize"


@pytest.fixture(scope="module")
def library(peft):
    return pytest.importorskip("sentence_transformers", reason="`make test` puts sentence-transformers into build/peft")


def saved(library, folder, *behind):
    """The built-in model with modules behind it, and its embeddings of PHOTOS and WORDS."""
    first = library.SentenceTransformer(str(TINY), device="cpu")
    model = library.SentenceTransformer(modules=[*first, *behind], device="cpu")
    model.save(str(folder))
    return model.encode(PHOTOS), model.encode(WORDS)


def dense(library, width=64, out=32, **settings):
    torch.manual_seed(width)
    from sentence_transformers.base.modules.dense import Dense

    return Dense(width, out, **{"bias": False, "activation_function": torch.nn.Identity(), **settings})


def put(folder, listed, inner="0_CLIPModel"):
    """A folder of the layout before version 5.4."""
    shutil.copytree(TINY, folder / inner)
    entries = [{"idx": row, "name": str(row), "path": path, "type": kind} for row, (kind, path) in enumerate(listed)]
    (folder / "modules.json").write_text(json.dumps(entries))
    return folder


def fetched(folder, output, **settings):
    build(output, lambda made: fetch(ModelConfig(path=str(folder), **settings), made), None)
    target = read_target(output)
    lint(output, ModelConfig(path=str(folder), **settings), target.model)
    return target


def refused(folder):
    output = folder.parent / "refused"
    with pytest.raises(CheckpointError) as error:
        build(output, lambda made: fetch(ModelConfig(path=str(folder)), made), None)
    assert not output.exists()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def lowest(ones, others):
    pairs = zip(ones, others, strict=True)
    return min(
        float(np.min(np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))) for a, b in pairs
    )


def change(path, **values):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | values))


@pytest.mark.parametrize("normalized", [False, True])
def test_a_saved_clip_embeds_as_sentence_transformers_does(normalized, library, tmp_path):
    from sentence_transformers.base.modules.normalize import Normalize

    expected = saved(library, tmp_path / "given", *([Normalize()] if normalized else []))
    fetched(tmp_path / "given", tmp_path / "torch-fp32")
    assert lowest(embedded(tmp_path / "torch-fp32", PHOTOS, WORDS), expected) > 0.99999


def test_dense_heads_become_part_of_both_projections(library, tmp_path, kinds):
    heads = dense(library), dense(library, 32, 24)
    expected = saved(library, tmp_path / "given", *heads)
    assert expected[0].shape[1] == 24
    target = fetched(tmp_path / "given", tmp_path / "torch-fp32")
    assert target.said("note") == "2 Dense in the projections, 24 values"
    assert set(target.model.checkpoint.parts) == {"1_Dense", "2_Dense"}
    exported = tmp_path / "onnx-fp32"
    build(exported, lambda made: export_onnx(tmp_path / "torch-fp32", OnnxConfig(), made), Target("ort", "fp32"))
    found = embedded(tmp_path / "torch-fp32", PHOTOS, WORDS)
    cosine = lowest(found, expected)
    assert cosine > 0.99999
    assert lowest(embedded(exported, PHOTOS, WORDS, tmp_path / "torch-fp32"), expected) > 0.9999
    kinds(
        "05: sentence-transformers with a Dense head",
        "the head dropped: 64 dimensions for 32",
        f"part of both projections: cosine {cosine:.5f}",
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"activation_function": torch.nn.Tanh()}, "the activation Tanh, and only a plain product"),
        ({"bias": True}, "a bias, and only"),
        ({"bias": True, "activation_function": torch.nn.Tanh()}, "the activation Tanh and a bias, and only"),
        ({"use_residual": True}, "a residual, and only"),
        ({"module_output_name": "other"}, "another input or output (other), and only"),
    ],
)
def test_a_dense_head_that_is_no_product_is_refused(settings, said, library, tmp_path):
    saved(library, tmp_path / "given", dense(library, **settings))
    assert f"{tmp_path / 'given' / '1_Dense'} is a Dense head with {said}" in refused(tmp_path / "given")


def test_a_dense_head_that_is_not_whole_is_refused(library, tmp_path):
    saved(library, tmp_path / "given", dense(library))
    (tmp_path / "given" / "1_Dense" / "model.safetensors").write_bytes(b"12")
    assert "is not a safetensors file" in refused(tmp_path / "given")
    (tmp_path / "given" / "1_Dense" / "model.safetensors").unlink()
    assert "lacks model.safetensors: load the model once with sentence-transformers" in refused(tmp_path / "given")
    (tmp_path / "given" / "1_Dense" / "config.json").unlink()
    assert "lacks config.json, and modules.json names it as a Dense head" in refused(tmp_path / "given")


def test_a_dense_head_of_another_width_is_refused(library, tmp_path):
    saved(library, tmp_path / "given", dense(library))
    saved_head = dense(library, 48, 24)
    saved_head.save(str(tmp_path / "given" / "1_Dense"))
    assert "1_Dense takes 48 values, and " in refused(tmp_path / "given")


def test_an_adapter_that_sentence_transformers_saved_is_merged(library, peft, tmp_path):
    model = library.SentenceTransformer(str(TINY), device="cpu")
    before = model.encode(PHOTOS), model.encode(WORDS)
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"], init_lora_weights=False))
    model.save(str(tmp_path / "given"))
    expected = model.encode(PHOTOS), model.encode(WORDS)
    fetched(tmp_path / "given", tmp_path / "torch-fp32")
    assert lowest(embedded(tmp_path / "torch-fp32", PHOTOS, WORDS), expected) > 0.99999
    assert lowest(before, expected) < 0.99


def test_a_siglip_is_taken_where_texts_are_padded_as_it_was_trained(library, siglip, tmp_path):
    model = library.SentenceTransformer(str(siglip.parent), device="cpu")
    model.save(str(tmp_path / "given"))
    path = tmp_path / "given" / "sentence_bert_config.json"
    assert f"{path} pads texts to the longest of a batch" in refused(tmp_path / "given")
    change(path, processing_kwargs={"text": {"padding": "max_length", "max_length": 8}})
    assert "states processing_kwargs text.max_length: only text.padding is known" in refused(tmp_path / "given")
    change(path, processing_kwargs={"text": {"padding": "max_length"}})
    model = library.SentenceTransformer(str(tmp_path / "given"), device="cpu")
    expected = model.encode(PHOTOS), model.encode(WORDS)
    fetched(tmp_path / "given", tmp_path / "torch-fp32", allow=["hidden-act"])
    assert lowest(embedded(tmp_path / "torch-fp32", PHOTOS, WORDS), expected) > 0.99999


def test_the_layout_before_5_4_is_taken_by_its_outer_folder(checkpoint, tmp_path, kinds):
    folder = put(tmp_path / "clip-ViT-B-32", [(CLIP, "0_CLIPModel")])
    target = fetched(folder, tmp_path / "torch-fp32")
    assert target.model.checkpoint == read_target(checkpoint).model.checkpoint
    inner = fetched(folder / "0_CLIPModel", tmp_path / "inner")
    assert inner.model.checkpoint == target.model.checkpoint
    kinds("16: a sentence-transformers folder", "has no config.json: give a folder in Hugging Face layout", "taken")


def test_the_layout_before_5_4_embeds_as_sentence_transformers_does(library, tmp_path):
    folder = put(tmp_path / "given", [(CLIP, "0_CLIPModel"), (NORMALIZE, "1_Normalize")])
    model = library.SentenceTransformer(str(folder), device="cpu")
    fetched(folder, tmp_path / "torch-fp32")
    expected = model.encode(PHOTOS), model.encode(WORDS)
    assert lowest(embedded(tmp_path / "torch-fp32", PHOTOS, WORDS), expected) > 0.99999


def test_two_models_in_one_folder_are_refused(tmp_path):
    folder = put(tmp_path / "given", [(CLIP, "0_CLIPModel")])
    shutil.copyfile(TINY / "config.json", folder / "config.json")
    assert "holds two models: one beside modules.json, and one in 0_CLIPModel/" in refused(folder)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("0_Other", "lacks 0_Other/, which modules.json names"),
        ("../x", "names '../x', which is no"),
        ("..", "names '..', which is no"),
    ],
)
def test_a_folder_that_is_not_there_is_named(path, said, tmp_path):
    assert said in refused(put(tmp_path / "given", [(CLIP, path)]))


def test_what_is_done_to_texts_and_embeddings_besides_is_refused(tmp_path):
    folder = put(tmp_path / "given", [(CLIP, "0_CLIPModel")])
    path = folder / "config_sentence_transformers.json"
    change(path, prompts={"query": "", "photo": "a photo of "}, default_prompt_name="query", truncate_dim=None)
    fetched(folder, tmp_path / "torch-fp32")
    change(path, default_prompt_name="photo")
    assert f"{path} puts 'a photo of ' before every text (default_prompt_name)" in refused(folder)
    change(path, default_prompt_name=None, truncate_dim=16)
    assert f"{path} cuts embeddings to their first 16 values (truncate_dim)" in refused(folder)
    path.unlink()
    inner = folder / "0_CLIPModel" / "sentence_bert_config.json"
    change(inner, max_seq_length=32, do_lower_case=False)
    fetched(folder, tmp_path / "torch-fp32")
    change(inner, max_seq_length=16)
    assert "states max_seq_length: 16, and tokenizer_config.json model_max_length: 32" in refused(folder)


def test_download_runs_again_where_a_part_of_the_folder_changes(tmp_path, monkeypatch):
    folder = put(tmp_path / "given", [(CLIP, "0_CLIPModel"), (DENSE, "1_Dense")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "CONF", tmp_path / "conf")
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "local.yaml").write_text(f"path: {folder}\n")
    seen = [probe.identity("model", "local")]
    (folder / "README.md").write_text("x")
    assert probe.identity("model", "local") == seen[0]
    (folder / "1_Dense").mkdir()
    for path in ("0_CLIPModel/config.json", "1_Dense/config.json", "config_sentence_transformers.json", "modules.json"):
        content = json.loads((folder / path).read_text()) if (folder / path).is_file() else {}
        (folder / path).write_text(json.dumps(content, indent=3))
        seen.append(probe.identity("model", "local"))
    assert len(set(seen)) == 5


def test_of_a_repository_the_model_in_it_is_fetched_and_no_pickle(tmp_path, kinds):
    folder = put(tmp_path / "given", [(CLIP, "0_CLIPModel")])
    (folder / "0_CLIPModel" / "pytorch_model.bin").write_bytes(b"1")
    (tmp_path / "output").mkdir()
    code = (
        "import sys; from pathlib import Path; from clip_deploy.checkpoint.fetch import fetch;"
        "from clip_deploy.core.config import ModelConfig;"
        "fetch(ModelConfig(repo_id='someone/st', revision=sys.argv[1]), Path(sys.argv[2]))"
    )
    with served({"someone/st": folder}) as (endpoint, asked):
        done = subprocess.run(
            [warm_python(), "-c", code, COMMIT, str(tmp_path / "output")],
            env={
                "PATH": os.environ["PATH"],
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_ENDPOINT": endpoint,
                "PYTHONPATH": str(ROOT),
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output" / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
    assert "someone/st/0_CLIPModel/model.safetensors" in asked
    assert not [name for name in asked if name.endswith(".bin")]
    kinds("28: sentence-transformers' repository", "downloaded whole, then refused without 0_CLIPModel/", "taken")
