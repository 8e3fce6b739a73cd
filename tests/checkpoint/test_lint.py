"""One broken checkpoint for each finding, made from the built-in one."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.project import ROOT, TINY, warm_python

from clip_deploy.checkpoint.fetch import fetch
from clip_deploy.checkpoint.lint import CODES, NEVER_ALLOWED, lint
from clip_deploy.checkpoint.load import describe
from clip_deploy.checkpoint.verify import verify
from clip_deploy.core.config import ModelConfig
from clip_deploy.core.errors import CheckpointError, ConfigError

TEXT = json.loads((TINY / "config.json").read_text())["text_config"]
TEXT_DICT = {key: value for key, value in TEXT.items() if key != "hidden_act"}
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


def tokenizer(edit):
    """Change tokenizer.json, and have it read as it stands: CLIPTokenizer takes its vocabulary alone from there."""

    def apply(folder):
        content = json.loads((folder / "tokenizer.json").read_text())
        edit(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        tokens(tokenizer_class="PreTrainedTokenizerFast")(folder)

    return apply


def without_the_beginning(content):
    end, words = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    known = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [586], "tokens": ["<|endoftext|>"]}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [words, end],
        "pair": [],
        "special_tokens": known,
    }


def with_capitals(content):
    content["normalizer"]["normalizers"].pop()


def all_alike(content):
    content["normalizer"]["normalizers"].append({"type": "Replace", "pattern": {"Regex": ".+"}, "content": "a"})


def of_few_words(content):
    content["model"]["merges"] = []
    content["model"]["vocab"] = {token: id for token, id in content["model"]["vocab"].items() if id < 5 or id > 584}


def halved(weights):
    for name in list(weights):
        weights[name] = weights[name].astype(np.float16)


def half_halved(weights):
    weights["visual_projection.weight"] = weights["visual_projection.weight"].astype(np.float16)


NAMED_OPENCLIP = change("config.json", _name_or_path="laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
CODE = {"AutoModel": "modeling_mean.MeanCLIP"}
ERRORS = [
    (change("config.json", auto_map=CODE), "own-code", "transformers' own CLIPModel answers in its place"),
    (tokens(auto_map={"AutoTokenizer": ["tokens.Mine", None]}), "own-code", "auto_map in tokenizer_config.json"),
    (
        both(text(hidden_act="gelu"), change("config.json", text_config_dict=TEXT_DICT)),
        "hidden-act",
        "hidden_act is quick_gelu, since text_config_dict overrules text_config, which says gelu",
    ),
    (
        reweigh(lambda w: [w.update({f"module.{name}": w.pop(name)}) for name in list(w)]),
        "missing-weights",
        "names of weights begin with 'module.', as DataParallel saves them; expected the architecture's own names.",
    ),
    (NAMED_OPENCLIP, "hidden-act", "expected gelu. Every layer would compute another function"),
    (
        both(vision(hidden_act="gelu"), change("config.json", _name_or_path="openai/clip-vit-base-patch32")),
        "hidden-act",
        "hidden_act is vision gelu, text quick_gelu; expected quick_gelu",
    ),
    (text(eos_token_id=585), "eos-token", "expected the tokenizer's 586. No text ends with it"),
    (text(eos_token_id=585), "alike", "three different texts get one and the same embedding"),
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
    (
        both(
            text(vocab_size=2000),
            reweigh(lambda w: w.update({EMBEDDING: np.resize(w[EMBEDDING], (2000, w[EMBEDDING].shape[1]))})),
        ),
        "vocabulary-size",
        "the tokenizer has 587 tokens; expected nearly vocab_size, 2000. It is not the tokenizer of this model",
    ),
    (tokenizer(of_few_words), "vocabulary-size", "the tokenizer has 7 tokens; expected nearly vocab_size, 587"),
    (tokenizer(of_few_words), "unknown-words", "of 8 texts in six languages are '<|endoftext|>'"),
    (tokenizer(all_alike), "alike", "get one and the same embedding, for the tokenizer gives them the same ids"),
    (tokenizer(without_the_beginning), "bos-missing", "texts begin with 'a</w>'; expected '<|startoftext|>', as every"),
    (tokenizer(with_capitals), "lower-case", "'A Photo of a RED Circle' and its lower case get other tokens"),
    (scale(100.0), "logit-scale", "the factor itself was stored instead of its logarithm"),
    (scale(np.nan), "logit-scale", "0, 1 or NaN"),
    (pictures(crop_size={"height": 32, "width": 32}), "image-size", "no positions for them"),
    (pictures(do_center_crop=False), "crop", "Images that are not square would not fit"),
    (pictures(do_rescale=False), "normalization", "a range that it was never trained on"),
    (pictures(do_normalize=False), "normalization", "a range that it was never trained on"),
    (pictures(**SIGLIP_MEAN), "normalization", "mean 0.5/0.5/0.5 and deviation 0.5/0.5/0.5; expected 0.481/0.458"),
    (pictures(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]), "normalization", "answers change"),
    (pictures(image_mean=[0.40821073, 0.4578275, 0.48145466]), "normalization", "answers change"),
    (pictures(rescale_factor=0.0078), "normalization", "a range that it was never trained on"),
    (pictures(do_resize=False), "crop", "only the middle is seen (do_resize is false)"),
    (pictures(size={"shortest_edge": 224}), "crop", "of a large image only the middle is seen; expected the image"),
    (reweigh(lambda w: w.pop(LAYER)), "missing-weights", f"{LAYER} is missing"),
    (reweigh(lambda w: w.update({LAYER: w[LAYER][:5]})), "missing-weights", "another shape than config.json says"),
    (text(num_hidden_layers=1), "unused-weights", "Layers or adapters that were trained would not be run"),
    (
        reweigh(lambda w: w.update({"text_model.lora_A.weight": np.zeros(3, np.float32)})),
        "unused-weights",
        "Layers or adapters that were trained would not be run",
    ),
]
PATCHES = "vision_model.embeddings.patch_embedding.weight"
EMBEDDING = "text_model.embeddings.token_embedding.weight"
WARNINGS = [
    (text(hidden_act=None), "hidden-act", "no hidden_act for text, so transformers takes quick_gelu"),
    (text(hidden_act="gelu"), "hidden-act", "in one of the towers"),
    (
        text(eos_token_id=2, bos_token_id=0, pad_token_id=1),
        "eos-token",
        "That is right here, as it ends every text",
    ),
    (text(pad_token_id=1), "pad-token", "A server that pads by config.json sends other ids"),
    (
        tokens(do_lower_case=False),
        "tokenizer-setting",
        "states do_lower_case: false, which transformers' CLIPTokenizer ignores; expected it to be followed. It is not",
    ),
    (
        tokens(add_eos_token=False),
        "tokenizer-setting",
        "states add_eos_token: false, which transformers' CLIP",
    ),
    (
        tokens(add_bos_token=False),
        "tokenizer-setting",
        "states add_bos_token: false, which transformers' CLIP",
    ),
    (tokens(strip_accents=True), "tokenizer-setting", "states strip_accents: true, which transformers' CLIPTokenizer"),
    (tokens(tokenize_chinese_chars=True), "tokenizer-setting", "states tokenize_chinese_chars: true, which"),
    (tokens(model_max_length=16), "context-length", "cut at 16 tokens, though the model reads 32"),
    (tokens(model_max_length=None), "context-length", "a server that asks the tokenizer alone fails on longer ones"),
    (scale(np.log(1 / 0.07)), "logit-scale", "it was never trained"),
    (scale(6.0), "logit-scale", "probabilities are too sharp or too flat"),
    (both(text(hidden_act="relu"), vision(hidden_act="relu")), "hidden-act", "quick_gelu or gelu, as every CLIP"),
    (both(NAMED_OPENCLIP, text(hidden_act="gelu_new"), vision(hidden_act="gelu")), "hidden-act", "nearly the same"),
    (pictures(size={"height": 48, "width": 48}, do_center_crop=False), "crop", "or their proportions, unlike in"),
    (pictures(resample=2), "interpolation", "images are resized bilinear; expected bicubic"),
    (reweigh(halved), "weights-dtype", "cosines do not show what rounding has cost"),
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


SHOWN = {  # of the table of kinds: what the finding is about, and what was said of it before
    "own-code": ("04: code of its own (auto_map)", "ignored without a word: text cosine 0.188"),
    "alike": ("01: texts that all get one embedding", "allowed by `allow: [eos-token]`, and packaged"),
}


@pytest.mark.parametrize(("spoil", "code"), [(ERRORS[0][0], "own-code"), (text(eos_token_id=585), "alike")])
def test_kinds_of_wrong_models_are_refused(folder, spoil, code, kinds):
    spoil(folder)
    with pytest.raises(CheckpointError) as refused:
        findings(folder)
    said = next(line for line in str(refused.value).splitlines() if line.startswith(f"  {code} "))
    kinds(*SHOWN[code], said)


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


def test_siglip_has_its_own_pixels_padding_scale_and_bias(siglip, tmp_path):
    found = {finding.code: finding for finding in findings(siglip)}
    assert set(found) <= {"logit-scale", "logit-bias"}  # random weights: scale and bias are noise
    assert findings(siglip, trained=False) == []
    folder = shutil.copytree(siglip, tmp_path / "broken")
    tokens(pad_token="<unk>")(folder)
    (padding,) = findings(folder, trained=False)
    assert (padding.code, padding.severity) == ("pad-token", "warning")
    assert "reads padding as text" in padding.consequence


def test_a_stated_setting_that_transformers_ignores_is_named_and_whether_it_is_applied(siglip2, kinds):
    (finding,) = [finding for finding in findings(siglip2, trained=False) if finding.code == "tokenizer-setting"]
    assert finding.severity == "warning"
    assert finding.found == (
        "tokenizer_config.json states do_lower_case: true, which transformers' GemmaTokenizer ignores"
    )
    assert finding.consequence.startswith("It is applied here, also in the package")
    kinds("06: a tokenizer's stated setting that does nothing", before="nothing was said", now=finding)


def test_capitals_of_a_clip_that_states_lower_case_are_no_error(folder):
    both(tokenizer(with_capitals), tokens(do_lower_case=True))(folder)
    (finding,) = findings(folder)
    assert finding.code == "tokenizer-setting"
    assert finding.consequence.startswith("It is applied here")


@pytest.mark.parametrize(
    ("spoil", "code", "before"),
    [
        (tokenizer(without_the_beginning), "bos-missing", "not seen"),
        (tokenizer(with_capitals), "lower-case", "not seen"),
    ],
)
def test_a_clip_tokenizer_that_leaves_out_what_clips_own_does_is_refused(folder, spoil, code, before, kinds):
    spoil(folder)
    with pytest.raises(CheckpointError) as refused:
        findings(folder)
    assert str(refused.value).count(" (error): ") == 1
    kinds(f"28: a CLIP tokenizer, {code}", before=before, now=str(refused.value).splitlines()[1])
    assert [finding.code for finding in findings(folder, allow=[code])] == [code]


def test_texts_that_are_read_alike_are_refused_whatever_else_is_allowed(folder, kinds):
    both(tokenizer(all_alike), text(eos_token_id=2, bos_token_id=0, pad_token_id=1))(folder)
    with pytest.raises(CheckpointError, match="alike") as refused:
        findings(folder, allow=["eos-token"])
    kinds(
        "01: a tokenizer that gives all texts the same ids",
        before="not seen: one embedding for all texts, and a package with `allow: [eos-token]`",
        now=str(refused.value).splitlines()[1],
    )


def test_a_vocabulary_that_is_rounded_up_is_no_finding(folder):
    rounded = 640  # the next multiple of 128
    text(vocab_size=rounded)(folder)
    reweigh(lambda w: w.update({EMBEDDING: np.resize(w[EMBEDDING], (rounded, w[EMBEDDING].shape[1]))}))(folder)
    assert findings(folder) == []


def test_random_weights_may_have_more_places_than_the_tokenizer_has_tokens(folder):
    text(vocab_size=2000)(folder)
    reweigh(lambda w: w.update({EMBEDDING: np.resize(w[EMBEDDING], (2000, w[EMBEDDING].shape[1]))}))(folder)
    assert findings(folder, trained=False) == []


def test_a_vocabulary_of_one_language_is_a_warning_where_it_is_not_english(chinese_clip, tmp_path):
    folder = shutil.copytree(chinese_clip, tmp_path / "chinese")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    signs = [chr(code) for code in range(0x4E00, 0x4E00 + 500)]
    listed = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"一张红色圆形的照片", *signs]
    (folder / "vocab.txt").write_text("\n".join(listed) + "\n")
    (finding,) = [finding for finding in findings(folder, trained=False) if finding.code == "unknown-words"]
    assert finding.severity == "warning"
    assert finding.found == "100% of the tokens of an English text are '[UNK]'"


def test_chinese_clip_is_clean_but_for_its_padding(chinese_clip):
    assert {finding.code for finding in findings(chinese_clip, trained=False)} == {"pad-token"}


@pytest.mark.parametrize(
    ("family", "spoil", "said"),
    [
        ("siglip", both(text(hidden_act="quick_gelu"), vision(hidden_act="quick_gelu")), "expected gelu_pytorch_tanh"),
        ("siglip", vision(hidden_act="quick_gelu"), "vision quick_gelu, text gelu_pytorch_tanh; expected gelu_pytorch"),
        ("chinese_clip", vision(hidden_act="gelu"), "vision gelu, text gelu; expected vision quick_gelu, text gelu"),
        ("chinese_clip", text(hidden_act="quick_gelu"), "vision quick_gelu, text quick_gelu; expected vision quick"),
    ],
)
def test_a_family_that_knows_one_activation_is_refused_with_another(family, spoil, said, tmp_path, request):
    folder = shutil.copytree(request.getfixturevalue(family), tmp_path / "broken")
    spoil(folder)
    with pytest.raises(CheckpointError, match=r"\n  hidden-act \(error\): ") as refused:
        findings(folder)
    assert said in str(refused.value)
    assert "hidden-act" in {finding.code for finding in findings(folder, allow=["hidden-act"]) if finding.allowed}
    assert "hidden-act" not in {finding.code for finding in findings(folder, trained=False)}


# What config.json and preprocessor_config.json of released checkpoints say, sizes and ids of other tokenizers aside.
OPENAI = {
    "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_resize": True, "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
GOOGLE = {"do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3, **SIGLIP_MEAN}
LEGACY = both(text(eos_token_id=2, bos_token_id=0, pad_token_id=1))
ORIGINAL = (
    "checkpoint",
    both(
        text(hidden_act="quick_gelu"), vision(hidden_act="quick_gelu"), LEGACY, pictures(size=48, crop_size=48),
        pictures(feature_extractor_type="CLIPFeatureExtractor", do_rescale=None, rescale_factor=None, **OPENAI),
    ),
    {"eos-token"},
)  # fmt: skip
RELEASED = {
    "openai/clip-vit-base-patch32": ORIGINAL,
    "openai/clip-vit-large-patch14-336": ORIGINAL,
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": (
        "checkpoint",
        both(text(hidden_act="gelu"), vision(hidden_act="gelu"), LEGACY, pictures(do_rescale=True, **OPENAI)),
        {"eos-token"},
    ),
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K": (
        "checkpoint",
        both(text(hidden_act="gelu"), vision(hidden_act="gelu"), LEGACY, pictures(**OPENAI), pictures(**SIGLIP_MEAN)),
        {"eos-token"},
    ),
    "facebook/metaclip-b32-400m": ("checkpoint", both(LEGACY, pictures(**OPENAI)), {"eos-token"}),
    # its config.json names the towers' kinds and leaves the rest to transformers' defaults
    "google/siglip-base-patch16-224": ("siglip", both(vision(hidden_act=None), text(hidden_act=None),
                                                      pictures(**GOOGLE)), set()),
    "google/siglip-so400m-patch14-384": (
        "siglip",
        both(vision(hidden_act=None), text(hidden_act=None), pictures(**GOOGLE, do_convert_rgb=None)),
        set(),
    ),
    "google/siglip2-base-patch16-224": ("siglip2", pictures(**{**GOOGLE, "resample": 2}),
                                        {"tokenizer-setting", "context-length"}),
    # as transformers' convert_siglip2_to_hf.py writes it
    "google/siglip2-base-patch16-naflex": ("naflex", pictures(**{**GOOGLE, "resample": 2}), {"context-length"}),
    "OFA-Sys/chinese-clip-vit-base-patch16": (
        "chinese_clip",
        both(
            text(hidden_act="gelu"), vision(hidden_act="quick_gelu"),
            pictures(feature_extractor_type="ChineseCLIPFeatureExtractor", **{**OPENAI, "do_center_crop": False}),
        ),
        {"pad-token"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoints_have_no_error(name, tmp_path, request):
    family, settings, expected = RELEASED[name]
    folder = shutil.copytree(request.getfixturevalue(family), tmp_path / "released")
    if (whole := folder / "processor_config.json").is_file():  # as today's transformers saves it; none of these has one
        own = json.loads(whole.read_text())["image_processor"]
        (folder / "preprocessor_config.json").write_text(json.dumps(own))
        whole.unlink()
    settings(folder)
    found = lint(folder, ModelConfig(repo_id=name, revision="main"), describe(folder))
    assert {finding.severity for finding in found} <= {"warning"}
    assert {finding.code for finding in found} - {"logit-scale", "logit-bias"} <= expected  # random weights have others


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image_mean": [0.5, 0.5, None]}, "makes NaN or infinity: correct image_mean and image_std"),
        ({"image_std": [0.5, 0.5, 0.0]}, "makes NaN or infinity: correct image_mean and image_std"),
        ({"crop_size": {"height": 0, "width": 48}}, r"makes pixel_values of shape \[3, 0, 48\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_pixels_that_are_no_numbers_are_refused(folder, values, said):
    pictures(**values)(folder)
    with pytest.raises(CheckpointError, match=said):
        findings(folder)


@pytest.mark.parametrize("value", ["bicubic", [3], 3.0, True, 9])
def test_a_filter_that_is_no_number_of_pillows_is_refused_by_name(folder, value):
    """transformers would resize bilinear, and say nothing."""
    pictures(resample=value)(folder)
    with pytest.raises(CheckpointError, match=r"resample is .*: accepted are Pillow's numbers, .*3 bicubic"):
        describe(folder)


def test_all_errors_come_at_once_and_each_can_be_allowed_by_name(folder):
    both(tokens(padding_side="left"), pictures(do_normalize=False))(folder)
    with pytest.raises(CheckpointError, match=r"(?s)normalization.*allow: \[normalization, padding-side\]"):
        findings(folder)
    with pytest.raises(CheckpointError) as refused:
        findings(folder, allow=["padding-side"])
    assert "padding-side" not in str(refused.value)
    allowed = findings(folder, allow=["padding-side", "normalization"])
    assert [(finding.code, finding.severity, finding.allowed) for finding in allowed] == [
        ("padding-side", "error", True),
        ("normalization", "error", True),
    ]


def test_a_checkpoint_whose_texts_are_all_alike_is_refused_whatever_is_allowed(folder):
    text(eos_token_id=585)(folder)
    with pytest.raises(CheckpointError) as refused:
        findings(folder, allow=["eos-token"])
    assert "\n  alike (error): three different texts get one and the same embedding" in str(refused.value)
    assert "allow:" not in str(refused.value)


def test_a_checkpoint_whose_images_are_all_alike_is_refused(folder):
    reweigh(lambda w: w.update({PATCHES: np.zeros_like(w[PATCHES])}))(folder)
    with pytest.raises(CheckpointError, match="three different images get one and the same embedding"):
        findings(folder)


def test_weights_that_are_missing_are_not_judged_by_what_memory_holds(folder):
    reweigh(lambda w: w.pop("logit_scale"))(folder)
    with pytest.raises(CheckpointError) as refused:
        findings(folder)
    assert "missing-weights (error): logit_scale is missing" in str(refused.value)
    assert "logit-scale" not in str(refused.value)


def test_a_prefix_of_all_weights_is_to_be_stripped_and_not_allowed(folder, kinds):
    reweigh(lambda w: [w.update({f"module.{name}": w.pop(name)}) for name in list(w)])(folder)
    with pytest.raises(CheckpointError) as refused:
        findings(folder)
    assert "name.removeprefix('module.')" in str(refused.value)
    assert "allow:" not in str(refused.value)
    kinds("17: weights under module.", "advice `allow: [unused-weights]`, refused again", refused.value)


def test_a_resize_edge_below_the_crop_is_no_other_normalisation(folder, kinds):
    pictures(size={"shortest_edge": 32})(folder)
    found = {finding.code for finding in findings(folder)}
    assert "normalization" not in found
    kinds(
        "14: a resize edge below the crop", "a false `normalization` error", f"findings: {', '.join(found) or 'none'}"
    )


def test_settings_under_their_old_names_alone_are_read(folder, kinds):
    def rename(folder):
        config = json.loads((folder / "config.json").read_text())
        for tower in ("text", "vision"):
            config[f"{tower}_config_dict"] = config.pop(f"{tower}_config")
        (folder / "config.json").write_text(json.dumps(config))

    rename(folder)
    verify(folder)
    assert findings(folder) == []
    kinds("15: text_config_dict alone", "refused as no dual encoder", "taken, no finding")


ACTIVATION = [
    ("/cache/models--openai--clip-vit-base-patch32/snapshots/0123", "error"),
    ("/models/openai/clip-vit-base-patch32", "warning"),
]


@pytest.mark.parametrize(("path", "severity"), ACTIVATION)
def test_the_hubs_cache_tells_an_origin_and_a_folders_name_hints_at_one(folder, path, severity, kinds):
    both(text(hidden_act="gelu"), vision(hidden_act="gelu"))(folder)
    settings = ModelConfig(path=path, allow=["hidden-act"])
    (finding,) = lint(folder, settings, describe(folder))
    assert (finding.code, finding.severity) == ("hidden-act", severity)
    assert "quick_gelu" in finding.expected
    before = {"error": "missed in the hub's cache", "warning": "an error wherever a folder is called so"}[severity]
    kinds(f"28: another activation, path {path.split('/')[2]}", before, finding)


def test_a_fine_tune_of_the_one_clip_with_another_mean_is_a_warning(tmp_path, kinds):
    """LAION's L/14, whose origin no file tells; another CLIP with that mean stays an error."""
    shape = {
        "image_size": 224,
        "patch_size": 14,
        "hidden_size": 1024,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
    }
    target = tmp_path / "torch-fp32"
    target.mkdir()
    towers = {"vision_config": {**shape, "hidden_act": "gelu"}, "text_config": {**TEXT, "hidden_act": "gelu"}}
    settings = ModelConfig(path=str(TINY), architecture={"model_type": "clip", **towers, "projection_dim": 64})
    described = fetch(settings, target).model
    pictures(**SIGLIP_MEAN)(target)
    found = {finding.code: finding for finding in lint(target, settings, described)}
    assert found["normalization"].severity == "warning"
    assert "laion/CLIP-ViT-L-14-laion2B-s32B-b82K" in found["normalization"].consequence
    kinds("28: a fine-tune of LAION's L/14, mean 0.5", "refused: normalization", found["normalization"])
    change("config.json", _name_or_path="openai/clip-vit-large-patch14")(target)
    with pytest.raises(CheckpointError, match=r"normalization \(error\)"):
        lint(target, settings, described)


def test_a_fine_tuned_scale_of_104_is_no_finding(folder):
    scale(np.log(104))(folder)
    assert findings(folder) == []


@pytest.mark.parametrize("code", ["eos", *sorted(NEVER_ALLOWED)])
def test_only_what_can_be_meant_so_can_be_allowed(folder, code):
    with pytest.raises(
        ConfigError, match=f"model.allow names {code}: accepted are own-code, other-weights, hidden-act, eos-token"
    ):
        findings(folder, allow=[code])


def test_every_code_has_a_test():
    tested = {code for _, code, _ in ERRORS + WARNINGS} | {
        "logit-bias",
        "other-weights",
    }  # random SigLIPs have the first or not
    assert tested == set(CODES)


TWICE = """
import os, runpy, sys
given = sys.argv[1:]
for words in ([], ["model.allow=[padding-side,logit-scale]"]):  # in one process: its imports take longest
    sys.argv = ["download", *given, *words]
    try:
        runpy.run_module("stages.download", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print("exit code", end.code, sorted(os.listdir(os.path.dirname(given[0].removeprefix("output=")))))
"""


def test_the_stage_says_all_errors_and_leaves_nothing_behind_and_records_what_was_allowed(tmp_path):
    broken = shutil.copytree(TINY, tmp_path / "broken")
    both(tokens(padding_side="left"), scale(100.0))(broken)
    command = [warm_python(), "-c", TWICE, f"output={tmp_path}/torch-fp32", f"model.path={broken}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "exit code 1 ['broken']" in done.stdout
    assert done.stderr.startswith("error: the checkpoint would give wrong answers:\n  padding-side (error): ")
    assert "\n  logit-scale (error): " in done.stderr
    assert "padding-side (error, allowed): the tokenizer pads on the left" in done.stdout
    kept = json.loads((tmp_path / "torch-fp32" / "target.json").read_text())["model"]["findings"]
    assert [(finding["code"], finding["allowed"]) for finding in kept] == [
        ("padding-side", True),
        ("logit-scale", True),
    ]
