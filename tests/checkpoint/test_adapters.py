"""Adapters of PEFT, merged on `download`, held against PEFT's own model."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hub import COMMIT, cached, served
from support.models import SMALL_VISION
from support.project import ROOT, TINY
from transformers import AutoModel, CLIPConfig, CLIPModel

from clip_deploy.checkpoint.fetch import fetch
from clip_deploy.checkpoint.layout import model_files
from clip_deploy.checkpoint.lint import lint
from clip_deploy.checkpoint.load import load_model
from clip_deploy.core.artifact import build, read_target
from clip_deploy.core.config import ModelConfig
from clip_deploy.core.environment import fingerprint
from clip_deploy.core.errors import CheckpointError, ConfigError
from clip_deploy.core.model import Origin
from clip_deploy.core.parsing import plain
from stages import probe

QV = ["q_proj", "v_proj"]
VISION = r"vision_model\..*(q_proj|v_proj)"
PROCESSOR = ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
LORA = {"r": 4, "lora_alpha": 32, "target_modules": QV, "init_lora_weights": False}
KINDS = {
    "LoRA": ("LoraConfig", LORA),
    "DoRA": ("LoraConfig", {**LORA, "use_dora": True}),
    "LoRA of one tower": ("LoraConfig", {**LORA, "target_modules": VISION}),
    "LoRA of all layers, rank-stabilised": ("LoraConfig", {**LORA, "target_modules": "all-linear", "use_rslora": True}),
    "LoRA with biases": ("LoraConfig", {**LORA, "bias": "lora_only"}),
    "LoRA with whole modules": ("LoraConfig", {**LORA, "modules_to_save": ["visual_projection", "text_projection"]}),
    "LoRA of several ranks": ("LoraConfig", {**LORA, "rank_pattern": {"layers.0.self_attn.q_proj": 2}}),
    "LoHa": ("LoHaConfig", {"r": 4, "alpha": 64, "target_modules": QV, "init_weights": False}),
    "IA3": ("IA3Config", {"target_modules": QV, "feedforward_modules": [], "init_ia3_weights": False}),
}


def adapter(peft, folder, base=TINY, kind="LoraConfig", **settings):
    """An adapter with random weights, and what base and adapter embed side by side."""
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    before = embeds(model)
    adapted = peft.get_peft_model(model, getattr(peft, kind)(**(settings or LORA)))
    with torch.no_grad():  # as training leaves them
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name or (weight.requires_grad and name.endswith("bias")):
                weight.add_(torch.randn_like(weight) * 0.1)
    adapted.eval().save_pretrained(folder)
    return before, embeds(adapted)


def embeds(model):
    size, length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(3 * length).reshape(3, length) % 300 + 3
    with torch.inference_mode():
        found = model.get_image_features(pixel_values=pixels), model.get_text_features(input_ids=ids)
    return [one.pooler_output.numpy() for one in found]


def lowest(ones, others):
    return [
        float(np.min(np.sum(one * other, 1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)))
        for one, other in zip(ones, others, strict=True)
    ]


def merged(folder, output, **settings):
    build(output, lambda made: fetch(ModelConfig(path=str(folder), **settings), made), None)
    return read_target(output)


def refused(folder, **settings):
    """What is said, in one line, before anything is written."""
    output = folder.parent / "refused"
    with pytest.raises(CheckpointError) as error:
        build(output, lambda made: fetch(ModelConfig(path=str(folder), **settings), made), None)
    assert not output.exists()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def change(folder, **values):
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | values))


@pytest.fixture
def lora(peft, tmp_path):
    """An adapter of the built-in model, named by its path."""
    adapter(peft, tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", KINDS)
def test_a_merged_adapter_embeds_as_peft_does(name, peft, tmp_path, kinds):
    kind, settings = KINDS[name]
    before, expected = adapter(peft, tmp_path / "given", kind=kind, **settings)
    target = merged(tmp_path / "given", tmp_path / "torch-fp32")
    found = embeds(load_model(tmp_path / "torch-fp32"))
    assert min(lowest(found, expected)) > 0.99999
    changed = lowest(before, expected)
    assert changed[0] < 0.9999
    assert (changed[1] > 0.99999) == (name == "LoRA of one tower")
    assert target.said("note").split(" ")[0] == kind.removesuffix("Config").upper()
    lint(tmp_path / "torch-fp32", ModelConfig(path=str(tmp_path / "given")), target.model)
    if name == "LoRA":
        before = "has no config.json: give a folder in Hugging Face layout"
        image, text = lowest(found, expected)
        kinds("16: an adapter alone", before, f"merged into its base: cosine {image:.5f} image, {text:.5f} text")


def test_a_siglip_is_merged_too(peft, siglip, tmp_path):
    before, expected = adapter(peft, tmp_path / "given", base=siglip.parent)
    merged(tmp_path / "given", tmp_path / "torch-fp32")
    assert min(lowest(embeds(load_model(tmp_path / "torch-fp32")), expected)) > 0.99999
    assert max(lowest(before, expected)) < 0.999


def test_the_manifest_names_adapter_and_base(lora, tmp_path):
    target = merged(lora, tmp_path / "torch-fp32")
    base, own = (
        Origin(None, None, fingerprint(TINY, model_files(TINY))),
        Origin(None, None, fingerprint(lora, ["adapter_config.json", "adapter_model.safetensors"])),
    )
    assert target.model.checkpoint.parts == {"adapter": own, "base": base}
    assert plain(target)["model"]["checkpoint"]["parts"]["base"]["sha256"] == base.sha256
    assert target.said("note") == "LORA of rank 4 merged into 12 weights (text_model, vision_model)"
    names = {"config.json", "model.safetensors", "target.json", *PROCESSOR}
    assert {path.name for path in (tmp_path / "torch-fp32").iterdir()} == names
    assert (tmp_path / "torch-fp32" / "config.json").read_bytes() == (TINY / "config.json").read_bytes()
    merged(lora, tmp_path / "again")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("torch-fp32", "again")]
    assert weights[0] == weights[1]


def test_the_processor_is_the_adapters_own_where_it_has_one(lora, tmp_path):
    for name in PROCESSOR:
        shutil.copyfile(TINY / name, lora / name)
    settings = json.loads((lora / "tokenizer_config.json").read_text())
    (lora / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 16}))
    assert merged(lora, tmp_path / "torch-fp32").model.context_length == 16
    (lora / "preprocessor_config.json").unlink()
    assert merged(lora, tmp_path / "again").model.context_length == 16


def test_a_base_by_id_comes_from_the_hubs_cache_at_its_revision(lora, hub_cache, tmp_path):
    change(lora, base_model_name_or_path="someone/clip")
    cached(hub_cache, "someone/clip", TINY)
    assert "is 'someone/clip': there is no such folder here, and as an id it is not pinned to a commit" in refused(lora)
    target = merged(lora, tmp_path / "torch-fp32", base_revision=COMMIT)
    assert target.model.checkpoint.parts["base"].repo_id == "someone/clip"
    assert target.model.checkpoint.parts["base"].revision == COMMIT
    change(lora, revision=COMMIT)
    again = merged(lora, tmp_path / "again").model.checkpoint
    assert (again.sha256, again.parts["base"]) == (
        target.model.checkpoint.sha256,
        target.model.checkpoint.parts["base"],
    )
    change(lora, base_model_name_or_path="/home/someone/clip", revision=None)
    said = refused(lora)
    expected = "there is no such folder here, and it is not an id of the hub; set `base:`"
    assert f"the adapter's base is '/home/someone/clip': {expected}" in said
    settings = {"base": "someone/clip", "base_revision": COMMIT}
    assert merged(lora, tmp_path / "named", **settings).model.checkpoint.parts["base"] == again.parts["base"]


def test_an_adapter_of_the_hub_brings_its_base_and_no_other_file(peft, tmp_path):
    adapter(peft, tmp_path / "adapter")
    change(tmp_path / "adapter", base_model_name_or_path="someone/clip")
    base = shutil.copytree(TINY, tmp_path / "clip")
    for folder, name in ((base, "pytorch_model.bin"), (tmp_path / "adapter", "optimizer.pt")):
        (folder / name).write_bytes(b"1")
    code = (
        "import sys; from pathlib import Path; from clip_deploy.checkpoint.fetch import fetch;"
        "from clip_deploy.core.config import ModelConfig;"
        "print(fetch(ModelConfig(repo_id='someone/lora', revision=sys.argv[1], base_revision=sys.argv[1]),"
        "Path(sys.argv[2])).model.checkpoint)"
    )
    (tmp_path / "output").mkdir()
    with served({"someone/lora": tmp_path / "adapter", "someone/clip": base}) as (endpoint, asked):
        done = subprocess.run(
            [sys.executable, "-c", code, COMMIT, str(tmp_path / "output")],
            env={
                "PATH": "/usr/bin:/bin",
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_ENDPOINT": endpoint,
                "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert f"Origin(repo_id='someone/lora', revision='{COMMIT}'" in done.stdout
    assert f"'base': Origin(repo_id='someone/clip', revision='{COMMIT}'" in done.stdout
    assert {"someone/lora/adapter_model.safetensors", "someone/clip/model.safetensors"} <= set(asked)
    assert not [name for name in asked if name.endswith((".bin", ".pt"))]


def test_without_peft_nothing_is_fetched_and_the_way_out_is_told(tmp_path, monkeypatch, kinds):
    monkeypatch.setitem(sys.modules, "peft", None)
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "base_model_name_or_path": "x"})
    )
    said = refused(folder)
    assert "The library peft merges it into its base: install peft with `.venv/bin/pip install '.[peft]'`" in said
    kinds("16: an adapter, and no peft", "has no config.json: give a folder in Hugging Face layout", said)


def test_rank_0_is_refused(lora):
    change(lora, r=0)
    assert "holds an adapter of rank 0 (r in adapter_config.json), which changes nothing" in refused(lora)


def test_an_adapter_that_was_not_trained_is_refused(peft, tmp_path, kinds):
    adapter(peft, tmp_path / "given", **{**LORA, "init_lora_weights": True})
    said = refused(tmp_path / "given")
    assert "changes nothing in its base. All that it adds is zero, as before training" in said
    kinds("16: an adapter as before training", "has no config.json: give a folder in Hugging Face layout", said)


def test_an_adapter_without_weights_is_refused(lora):
    save_file({}, lora / "adapter_model.safetensors")
    assert "holds no weights" in refused(lora)
    (lora / "adapter_model.safetensors").write_bytes(b"12")
    assert "is truncated, or not a safetensors file" in refused(lora)
    (lora / "adapter_model.safetensors").unlink()
    assert "belong in adapter_model.safetensors, and it is missing" in refused(lora)
    (lora / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin alone is there, a pickle, which can run code when loaded" in refused(lora)


def test_an_adapter_whose_weights_are_empty_is_refused(lora):
    weights = load_file(lora / "adapter_model.safetensors")
    save_file({name: weight[:0] for name, weight in weights.items()}, lora / "adapter_model.safetensors")
    assert "is empty, of shape [0, " in refused(lora)


def test_a_base_that_is_nowhere_is_refused(lora):
    change(lora, base_model_name_or_path=None)
    assert "names no base (base_model_name_or_path is None): set `base:` in the model's file" in refused(lora)
    assert "model.base is 'no where': there is no such folder here, and it is not an id of the hub" in refused(
        lora, base="no where"
    )


@pytest.mark.parametrize("name", ["a" * 300, "~nobody-of-this-name/clip", "../" * 2000, "a\x00b"])
def test_odd_names_of_a_base_are_refused_in_one_line(name, lora):
    change(lora, base_model_name_or_path=name)
    assert "the adapter's base is " in refused(lora)


@pytest.mark.parametrize("values", [{"peft_type": ["LORA"]}, {"peft_type": None}, {"r": "4"}, {"target_modules": 3}])
def test_odd_settings_of_an_adapter_are_refused_in_one_line(values, lora):
    change(lora, **values)
    assert "cannot be merged into its base" in refused(lora)


def test_an_adapter_of_another_base_is_refused(peft, lora, siglip, tmp_path, kinds):
    wide = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**wide, "vocab_size": 587, "max_position_embeddings": 32, "eos_token_id": 586}
    other = shutil.copytree(TINY, tmp_path / "other")
    (other / "model.safetensors").unlink()
    CLIPModel(CLIPConfig(text_config=text, vision_config={**SMALL_VISION, **wide})).save_pretrained(other)
    said = refused(lora, base=str(other))
    assert "cannot be merged into its base. Perhaps it was trained on another base" in said
    assert "size mismatch" in said
    kinds("16: an adapter of another base", "has no config.json: give a folder in Hugging Face layout", said)
    assert "does not fit its base: no place for " in refused(lora, base=str(shallow(other)))


def shallow(other):
    """The built-in model with one layer of each tower."""
    weights = load_file(TINY / "model.safetensors")
    deep = [f"layers.{number}." for number in (1, 2, 3)]
    save_file(
        {name: weight for name, weight in weights.items() if not any(part in name for part in deep)},
        other / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((TINY / "config.json").read_text())
    for tower in ("vision_config", "text_config"):
        config[tower]["num_hidden_layers"] = 1
    (other / "config.json").write_text(json.dumps(config))
    return other


def test_an_adapter_that_leaves_places_empty_is_refused(lora):
    weights = load_file(lora / "adapter_model.safetensors")
    vision = {name: weight for name, weight in weights.items() if "vision_model" in name}
    save_file(vision, lora / "adapter_model.safetensors")
    said = refused(lora)
    assert "does not fit its base: nothing for base_model.model.text_model" in said
    assert (
        "trained on one tower alone, let target_modules in adapter_config.json name the modules of that tower" in said
    )


def test_target_modules_that_hit_nothing_are_refused(lora):
    change(lora, target_modules=["query", "value"])
    said = refused(lora)
    assert "cannot be merged into its base" in said
    assert "not found in the base model" in said


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "XLORA"])
def test_what_cannot_be_merged_is_refused(kind, lora):
    change(lora, peft_type=kind)
    assert f"an adapter of the kind {kind}, which changes no weights of its base" in refused(lora)


def test_an_adapter_of_no_known_kind_is_refused(lora):
    change(lora, peft_type="NEW")
    assert "cannot be merged into its base" in refused(lora)


def test_repeated_layers_are_refused(lora):
    change(lora, layer_replication=[[0, 2], [1, 2]])
    assert "repeats layers of its base (layer_replication" in refused(lora)


def test_a_layer_that_peft_wraps_and_its_module_does_not_call_is_never_merged_wrongly(peft, siglip, tmp_path):
    """SigLIP pools with PyTorch's own attention, which takes the weights of its out_proj and does not call it."""
    adapter(peft, tmp_path / "given", base=siglip.parent, **{**LORA, "target_modules": ["out_proj"]})
    assert "gives other embeddings once it is merged (1 - cosine is " in refused(tmp_path / "given")


def test_a_base_that_is_not_whole_or_holds_more_is_refused(lora, tmp_path):
    base = shutil.copytree(TINY, tmp_path / "base")
    weights = load_file(TINY / "model.safetensors")
    save_file({**weights, "extra.layers.0.weight": torch.ones(2)}, base / "model.safetensors", {"format": "pt"})
    said = refused(lora, base=str(base))
    assert f"{base} has without a place extra.layers.0.weight" in said
    weights.pop("text_projection.weight")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert "lacks text_projection.weight" in refused(lora, base=str(base))


def test_a_base_that_is_an_adapter_itself_is_refused(lora):
    assert "holds an adapter (adapter_config.json and adapter_model.safetensors) and no model" in refused(
        lora, base=str(lora)
    )


def test_messages_name_the_users_folder(lora):
    (lora / "tokenizer.json").write_text("{")
    (lora / "tokenizer_config.json").write_text("{}")
    assert refused(lora).startswith(f"{lora / 'tokenizer.json'} is not JSON: ")


def test_a_base_for_a_model_that_is_no_adapter_is_refused(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "clip")
    assert "holds no adapter (adapter_config.json): remove `base`" in refused(folder, base=str(TINY))


def test_random_weights_take_no_base():
    with pytest.raises(ConfigError, match=r"model\.base is set beside model\.architecture"):
        ModelConfig(path=str(TINY), base=str(TINY), architecture={"model_type": "clip"})


def test_download_runs_again_where_the_base_changes(lora, tmp_path, monkeypatch):
    base = shutil.copytree(TINY, tmp_path / "base")
    change(lora, base_model_name_or_path=str(base))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "CONF", tmp_path / "conf")
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "local.yaml").write_text(f"path: {lora}\n")
    first = probe.identity("model", "local")
    assert first.count("base ") == 1
    (base / "notes.md").write_text("not read")
    assert probe.identity("model", "local") == first
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    second = probe.identity("model", "local")
    assert second != first
    change(lora, lora_alpha=1)
    assert probe.identity("model", "local") not in (first, second)
    settings = f"repo_id: someone/lora\nrevision: {COMMIT}\nbase: {base}\n"
    (tmp_path / "conf" / "model" / "local.yaml").write_text(settings)
    assert probe.identity("model", "local").startswith("not local, base ")
