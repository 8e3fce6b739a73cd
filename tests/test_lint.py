"""One broken checkpoint for each finding, made from the built-in one."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY
from safetensors.numpy import load_file, save_file

from clip_deploy.checkpoint import describe
from clip_deploy.core.config import ModelConfig
from clip_deploy.core.errors import CheckpointError, ConfigError
from clip_deploy.lint import CODES, NEVER_ALLOWED, lint

SIGLIP_MEAN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
LAYER = "text_model.encoder.layers.1.mlp.fc1.bias"


def change(name, *keys, **values):
    """Set values in a JSON file of the checkpoint, under `keys`; None takes one away."""

    def edit(folder):
        content = json.loads((folder / name).read_text())
        place = content
        for key in keys:
            place = place[key]
        for key, value in values.items():
            place.pop(key, None)
            if value is not None:
                place[key] = value
        (folder / name).write_text(json.dumps(content))

    return edit


def reweigh(edit):
    """Change the weights, a dictionary of arrays."""

    def apply(folder):
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return apply


def both(*edits):
    return lambda folder: [edit(folder) for edit in edits]


def text(**values):
    return change("config.json", "text_config", **values)


def vision(**values):
    return change("config.json", "vision_config", **values)


def tokens(**values):
    return change("tokenizer_config.json", **values)


def pictures(**values):
    return change("preprocessor_config.json", **values)


def scale(value):
    return reweigh(lambda weights: weights.update(logit_scale=np.array(value, np.float32)))


def without_the_end(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokens(tokenizer_class="PreTrainedTokenizerFast")(folder)


def halved(weights):
    for name in list(weights):
        weights[name] = weights[name].astype(np.float16)


def half_halved(weights):
    weights["visual_projection.weight"] = weights["visual_projection.weight"].astype(np.float16)


LEARNED = change("config.json", _name_or_path="laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
ERRORS = [
    (LEARNED, "hidden-act", "expected gelu. Every layer would compute another function"),
    (
        both(vision(hidden_act="gelu"), change("config.json", _name_or_path="openai/clip-vit-base-patch32")),
        "hidden-act",
        "hidden_act is vision gelu, text quick_gelu; expected quick_gelu",
    ),
    (text(eos_token_id=585), "eos-token", "expected the tokenizer's 586. No text ends with it"),
    (text(eos_token_id=49407), "eos-token", "all texts would look the same"),
    (without_the_end, "eos-missing", "most often the first, which is the same in all texts"),
    (tokens(padding_side="left"), "padding-side", "padding may be taken for the text's end"),
    (
        both(
            text(vocab_size=580),
            reweigh(lambda w: w.update({EMBEDDING: w[EMBEDDING][:580]})),
        ),
        "vocabulary",
        "reads beyond the embedding table",
    ),
    (scale(100.0), "logit-scale", "the factor itself was stored instead of its logarithm"),
    (scale(np.nan), "logit-scale", "0, 1 or NaN"),
    (pictures(crop_size={"height": 32, "width": 32}), "image-size", "no positions for them"),
    (pictures(do_center_crop=False), "crop", "Images that are not square would not fit"),
    (pictures(do_rescale=False), "normalization", "a range that it was never trained on"),
    (pictures(do_normalize=False), "normalization", "a range that it was never trained on"),
    (reweigh(lambda w: w.pop(LAYER)), "missing-weights", f"{LAYER} are missing"),
    (reweigh(lambda w: w.update({LAYER: w[LAYER][:5]})), "missing-weights", "another shape than config.json says"),
    (text(num_hidden_layers=1), "unused-weights", "Layers or adapters that were trained would not be run"),
    (
        reweigh(lambda w: w.update({"text_model.lora_A.weight": np.zeros(3, np.float32)})),
        "unused-weights",
        "Layers or adapters that were trained would not be run",
    ),
]
EMBEDDING = "text_model.embeddings.token_embedding.weight"
WARNINGS = [
    (text(hidden_act=None), "hidden-act", "no hidden_act for text, so transformers takes quick_gelu"),
    (text(hidden_act="gelu"), "hidden-act", "in one of the towers"),
    (
        text(eos_token_id=2, bos_token_id=0, pad_token_id=1),
        "eos-token",
        "Right here, where that ends every text",
    ),
    (text(pad_token_id=1), "pad-token", "a server that pads by config.json sends other ids"),
    (tokens(model_max_length=16), "context-length", "cut at 16 tokens, though the model reads 32"),
    (tokens(model_max_length=None), "context-length", "a server that asks the tokenizer alone fails on longer ones"),
    (scale(np.log(1 / 0.07)), "logit-scale", "it was never trained"),
    (scale(6.0), "logit-scale", "probabilities are too sharp or too flat"),
    (pictures(**SIGLIP_MEAN), "normalization", "Embeddings shift a little"),
    (pictures(size={"height": 48, "width": 48}, do_center_crop=False), "crop", "or their proportions, unlike in"),
    (pictures(resample=2), "interpolation", "images are resized bilinear; expected bicubic"),
    (reweigh(halved), "weights-dtype", "cosines say nothing of what rounding has cost"),
    (reweigh(half_halved), "weights-dtype", "stored in F16 and F32"),
    (reweigh(lambda w: w.update({"head.weight": np.zeros(3, np.float32)})), "unused-weights", "is left out"),
]


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "broken")


def findings(folder, **settings):
    return lint(folder, ModelConfig(path="broken", **settings), describe(folder))


def test_the_built_in_checkpoint_is_clean(folder):
    assert findings(folder) == []


@pytest.mark.parametrize(("spoil", "code", "said"), ERRORS)
def test_what_makes_answers_wrong_is_refused_with_its_consequence(folder, spoil, code, said):
    spoil(folder)
    with pytest.raises(CheckpointError) as refused:
        findings(folder)
    assert f"\n  {code} (error): " in str(refused.value)
    assert said in str(refused.value)


@pytest.mark.parametrize(("spoil", "code", "said"), WARNINGS)
def test_what_may_surprise_is_a_warning_with_its_consequence(folder, spoil, code, said):
    spoil(folder)
    (finding,) = findings(folder)
    assert (finding.code, finding.severity) == (code, "warning")
    assert said in str(finding)


def test_a_token_above_the_end_of_text_makes_the_legacy_id_wrong(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<my-cat>"])
    tokenizer.save_pretrained(folder)
    both(
        text(eos_token_id=2, vocab_size=588),
        reweigh(lambda w: w.update({EMBEDDING: np.concatenate([w[EMBEDDING], w[EMBEDDING][:1]])})),
    )(folder)
    with pytest.raises(CheckpointError, match=r"up to '<my-cat>' \(587\), would be pooled there"):
        findings(folder)


def test_siglip_has_its_own_pixels_padding_scale_and_bias(siglip):
    found = {finding.code: finding for finding in findings(siglip)}
    assert set(found) <= {"pad-token", "logit-scale", "logit-bias"}  # random weights: scale and bias are noise
    assert "reads padding as text" in found["pad-token"].consequence
    assert {finding.code for finding in findings(siglip, trained=False)} == {"pad-token"}


def test_chinese_clip_is_clean_but_for_its_padding(chinese_clip):
    assert {finding.code for finding in findings(chinese_clip, trained=False)} == {"pad-token"}


def test_all_errors_come_at_once_and_each_can_be_allowed_by_name(folder):
    both(text(eos_token_id=585), pictures(do_normalize=False))(folder)
    with pytest.raises(CheckpointError, match=r"(?s)eos-token.*normalization.*allow: \[eos-token, normalization\]"):
        findings(folder)
    with pytest.raises(CheckpointError) as refused:
        findings(folder, allow=["eos-token"])
    assert "eos-token" not in str(refused.value)
    allowed = findings(folder, allow=["eos-token", "normalization"])
    assert [(finding.code, finding.severity, finding.allowed) for finding in allowed] == [
        ("eos-token", "error", True),
        ("normalization", "error", True),
    ]


@pytest.mark.parametrize("code", ["eos", *NEVER_ALLOWED])
def test_only_what_can_be_meant_so_can_be_allowed(folder, code):
    with pytest.raises(ConfigError, match=f"model.allow names {code}: accepted are hidden-act, eos-token"):
        findings(folder, allow=[code])


def test_every_code_has_a_test():
    tested = {code for _, code, _ in ERRORS + WARNINGS} | {"logit-bias"}  # random SigLIPs have it or not
    assert tested == set(CODES)


TWICE = """
import os, runpy, sys
given = sys.argv[1:]
for words in ([], ["model.allow=[eos-token,logit-scale]"]):  # in one process: its imports take longest
    sys.argv = ["download", *given, *words]
    try:
        runpy.run_module("stages.download", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print("exit code", end.code, sorted(os.listdir(os.path.dirname(given[0].removeprefix("output=")))))
"""


def test_the_stage_says_all_errors_and_leaves_nothing_behind_and_records_what_was_allowed(tmp_path):
    broken = shutil.copytree(TINY, tmp_path / "broken")
    both(text(eos_token_id=585), scale(100.0))(broken)
    command = [sys.executable, "-c", TWICE, f"output={tmp_path}/torch-fp32", f"model.path={broken}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "exit code 1 ['broken']" in done.stdout
    assert done.stderr.startswith("error: the checkpoint would give wrong answers:\n  eos-token (error): ")
    assert "\n  logit-scale (error): " in done.stderr
    assert "eos-token (error, allowed): text_config.eos_token_id is 585" in done.stdout
    kept = json.loads((tmp_path / "torch-fp32" / "target.json").read_text())["model"]["findings"]
    assert [(finding["code"], finding["allowed"]) for finding in kept] == [("eos-token", True), ("logit-scale", True)]
