"""Every class of the installed transformers that embeds images and texts apart, and what comes of it here.

Each is built small, with random weights, from its own configuration, with the tokenizer and the image processor that
transformers has for it, and goes the way of a checkpoint: fetched, linted, exported, fused.
"""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from support.models import SMALL_VISION, condition, gemma_vocabulary, sentencepiece_model, sentences
from support.project import TINY
from transformers.models.auto import image_processing_auto, tokenization_auto

from clip_deploy.builders.fused import optimize
from clip_deploy.builders.onnx_export import export_onnx
from clip_deploy.builders.processor_files import write_portable
from clip_deploy.checkpoint.fetch import fetch
from clip_deploy.checkpoint.lint import lint
from clip_deploy.checkpoint.load import load_processor
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import Exporter, ModelConfig, OnnxConfig, OptimizeConfig
from clip_deploy.core.errors import CheckpointError
from clip_deploy.core.fusions import missed
from clip_deploy.core.model import as_images, embeddings
from clip_deploy.core.similarity import row_cosines
from clip_deploy.data.preprocessed import SCORES, tokenize
from clip_deploy.runtimes import open_encoder

MODELS = Path(transformers.models.__file__).parent
SHAPES = [(64, 48), (30, 90), (40, 40)]  # width and height
TEXTS = ["a photo of a red circle", "red", "two blue squares, left of a star and of a small green triangle"]

WORKS = {  # what fusion misses of one layer in each tower
    "Aimv2Model": ["text: 0 of 1 early pooling fused"],
    "AlignModel": [],
    "AltCLIPModel": [],
    "BlipModel": [],
    "CLIPModel": [],
    "CLIPSegModel": [],
    "ChineseCLIPModel": [],
    "FlavaModel": ["vision: 0 of 1 early pooling fused", "text: 0 of 1 early pooling fused"],
    "GroupViTModel": ["vision: 3 of 4 attention fused"],  # the fourth assigns tokens to groups
    "MetaClip2Model": [],
    "OwlViTModel": [],
    "Owlv2Model": [],
    "Siglip2Model": [],  # NaFlex
    "SiglipModel": [],
    "Tipsv2Model": ["vision: 0 of 1 early pooling fused"],
    "VisionTextDualEncoderModel": [],
}
# By the TorchScript exporter, in a tenth of the time: tests/rewrites/test_fusion.py has the default's graphs,
# but of CLIPSeg and OWLv2, whose towers are those of CLIP and OWL-ViT.
QUICKLY = (
    "AlignModel",
    "CLIPModel",
    "CLIPSegModel",
    "ChineseCLIPModel",
    "GroupViTModel",
    "Owlv2Model",
    "SiglipModel",
    "VisionTextDualEncoderModel",
)
NOT_PACKAGED = {"Owlv2Model": {"preprocessor.json": "Owlv2ImageProcessorPil pads (do_pad)"}}
NO_DUAL_ENCODER = (
    "only dual encoders (CLIP, SigLIP, Chinese-CLIP, ALIGN...) have an image tower and a text tower to deploy"
)
REFUSED = {
    "Blip2Model": "is a Blip2Model, whose texts go through a language model. That gives a vector for each token and no "
    "embedding: only models with a text tower can be deployed (CLIP, SigLIP...)",
}
OF_NO_IMAGES = {  # get_text_features, and no get_image_features
    "ClapModel": f"holds a 'clap' model: {NO_DUAL_ENCODER}",
    "ClvpModelForConditionalGeneration": f"holds a 'clvp' model: {NO_DUAL_ENCODER}",
    "Sam3LiteTextModel": "is a Sam3LiteTextModel, which has no get_image_features: only models that embed images and "
    "texts apart can be deployed (CLIP, SigLIP...)",
    "Sam3Model": "is a Sam3Model, which has no get_image_features: only models that embed images and texts apart can "
    "be deployed (CLIP, SigLIP...)",
    "VideoPrismClipModel": "is a VideoPrismClipModel, which embeds videos: only towers for images can be deployed",
    "XCLIPModel": "is a XCLIPModel, which embeds videos: only towers for images can be deployed",
}


def classes(method):
    """The classes that have `method`, by name, in all of transformers' modules that speak of it."""
    modules = [path for path in MODELS.glob("*/modeling_*.py") if f"def {method}(" in path.read_text(encoding="utf-8")]
    names = [f"transformers.models.{path.parent.name}.{path.stem}" for path in sorted(modules)]
    found = [(name, kind) for name in names for kind in vars(importlib.import_module(name)).values()]
    return {
        kind.__name__: kind
        for name, kind in found
        if isinstance(kind, type) and kind.__module__ == name and hasattr(kind, method)
    }


@pytest.fixture(scope="module")
def found():
    return classes("get_text_features")


def test_every_class_is_in_a_table(found):
    """A new version of transformers may bring others: docs/guides/own-checkpoint.md lists them too."""
    apart = {name for name, kind in found.items() if hasattr(kind, "get_image_features")}
    assert sorted(apart) == sorted([*WORKS, *REFUSED])
    assert sorted(set(found) - apart) == sorted(OF_NO_IMAGES)


# A small model of any class, and what belongs to it.

LENGTH = 32
SIZES = {**SMALL_VISION, "num_hidden_layers": 1, "max_position_embeddings": LENGTH, "project_dim": 32}
BLOCKS = {  # two of EfficientNet's
    "kernel_sizes": [3, 3],
    "in_channels": [32, 8],
    "out_channels": [8, 16],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 6],
    "depthwise_padding": [],
}
OTHERWISE = {  # where a configuration calls its sizes by other names, or has more of them
    "align": {"vision_config": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 32, **BLOCKS}},
    "altclip": {"text_config": {"max_position_embeddings": LENGTH + 2}},
    "blip": {"vision_config": {"initializer_range": 0.02}},  # all images are alike with its own, 1e-10
    "flava": {"image_codebook_config": {"hidden_size": 8, "num_blocks_per_group": 1}},
    "groupvit": {"vision_config": {"depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 0]}},
    "siglip": {"text_config": {"num_hidden_layers": 2}},  # early pooling needs a layer before the last
    "siglip2": {"vision_config": {"num_patches": 16}, "text_config": {"num_hidden_layers": 2}},
    "vision-text-dual-encoder": {
        "vision_config": {"model_type": "vit", **SIZES},
        "text_config": {"model_type": "bert", **SIZES},
    },
}
WIDTHS = {"flava": {"hidden_size": 32}}


def configuration(kind, tokenizer):
    """Its own configuration with small sizes and the tokenizer's ids."""
    config, name = kind.config_class, kind.config_class.model_type
    special = {role: getattr(tokenizer, role) for role in ("pad_token_id", "bos_token_id", "eos_token_id")}
    words = {"vocab_size": len(tokenizer), **{role: number for role, number in special.items() if number is not None}}
    given = OTHERWISE.get(name, {})
    whole = None if name == "vision-text-dual-encoder" else config()
    parts = {}
    for part in config.sub_configs if whole else given:
        known = getattr(whole, part, None)
        sizes = {**SIZES, **(words if part == "text_config" else {})}
        parts[part] = {key: value for key, value in sizes.items() if known is None or hasattr(known, key)}
        parts[part] |= given.get(part, {})
    return config(**parts, **{"projection_dim": 32, **WIDTHS.get(name, {})})


def clip_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TINY)


def bert_tokenizer():
    words = sorted({word for text in sentences() for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    parts = sorted({part for word in words for character in word for part in (character, f"##{character}")})
    vocabulary = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *parts])
    return transformers.BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})


def roberta_tokenizer():
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    learned = [(pieces.id_to_piece(number), pieces.get_score(number)) for number in range(3, pieces.get_piece_size())]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    return transformers.XLMRobertaTokenizer(vocab=[*special, *learned])


def siglip_tokenizer(folder):
    path = folder / "spiece.model"
    path.write_bytes(sentencepiece_model())
    return transformers.SiglipTokenizer(str(path), model_input_names=["input_ids"])


def gemmas(kind, **settings):
    vocabulary, merges = gemma_vocabulary()
    return kind(vocab=vocabulary, merges=merges, **settings)


RELEASED = {"padding_side": "right", "model_input_names": ["input_ids"]}  # as SigLIP 2's tokenizers state it


TOKENIZERS = {
    "CLIPTokenizer": lambda _: clip_tokenizer(),
    "GPT2Tokenizer": lambda _: clip_tokenizer(),  # of BLIP-2, which is refused before
    "BertTokenizer": lambda _: bert_tokenizer(),
    "XLMRobertaTokenizer": lambda _: roberta_tokenizer(),
    "SiglipTokenizer": siglip_tokenizer,
    "Siglip2Tokenizer": lambda _: gemmas(transformers.Siglip2Tokenizer, **RELEASED),
    "Tipsv2Tokenizer": lambda _: gemmas(transformers.Tipsv2Tokenizer),
}
ITS_TOKENIZER = {"altclip": "XLMRobertaTokenizer", "vision-text-dual-encoder": "BertTokenizer"}  # transformers has none


def tokenizer_of(name, folder):
    kind = ITS_TOKENIZER.get(name) or tokenization_auto.TOKENIZER_MAPPING_NAMES[name]
    tokenizer = TOKENIZERS[kind](folder)
    tokenizer.model_max_length = LENGTH
    return tokenizer


def images_of(name):
    kinds = image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(name, {"pil": "ViTImageProcessorPil"})
    if name == "siglip2":
        return transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    square = {"height": 32, "width": 32}
    if "pil" not in kinds:  # TIPSv2's is for torchvision alone
        return transformers.ViTImageProcessorPil(size=square, do_normalize=False)
    kind = getattr(transformers, kinds["pil"])
    size = {"shortest_edge": 32} if "shortest_edge" in (kind().size or {}) else square
    return kind(size=size, **({"crop_size": square} if getattr(kind(), "crop_size", None) else {}))


def saved(kind, folder, **settings):
    """Save a small model of a class, and return it."""
    name = kind.config_class.model_type
    folder.mkdir()
    tokenizer = tokenizer_of(name, folder)
    config = configuration(kind, tokenizer)
    config.update(settings)
    torch.manual_seed(0)
    model = condition(kind(config))
    for part in (model, images_of(name), tokenizer):
        part.save_pretrained(folder)
    if name == "tipsv2":
        settings = folder / "preprocessor_config.json"
        settings.write_text(settings.read_text().replace("ViTImageProcessor", "Tipsv2ImageProcessor"))
    return model


def taken(folder):
    """Fetch and lint a checkpoint; the target torch-fp32, and the linter's findings."""
    target, model = folder.parent / "torch-fp32", ModelConfig(path=str(folder))
    build(target, lambda output: fetch(model, output), Target("eager", "fp32"))
    return target, lint(target, model, read_target(target).model)


def made(folder, write):
    build(folder, write, None)
    return read_target(folder)


def pooled(output):
    """A vector each, of FLAVA the first token's, as FlavaForPreTraining has it."""
    rows = output.pooler_output
    return (rows if rows.dim() == 2 else rows[:, 0]).numpy()


@pytest.mark.parametrize("name", WORKS)
def test_a_class_embeds_as_transformers_does_in_every_form(name, found, tmp_path):
    model = saved(found[name], tmp_path / "checkpoint")
    checkpoint, _ = taken(tmp_path / "checkpoint")
    exported, fused = tmp_path / "onnx-fp32", tmp_path / "ort-fp32"
    settings = OnnxConfig(exporter=Exporter.torchscript if name in QUICKLY else Exporter.auto)
    made(exported, lambda output: export_onnx(checkpoint, settings, output))
    facts = made(fused, lambda output: optimize(exported, OptimizeConfig(skip_layer_norm=True), None, output)).build
    assert "rewrites_undone" not in facts
    assert facts["fusions"]["text"]["attention"][1] >= 1
    assert [str(miss) for miss in missed(facts)] == WORKS[name]

    processor, described = load_processor(checkpoint), read_target(checkpoint).model
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    images = [Image.fromarray(image).resize(size) for image, size in zip(noise, SHAPES, strict=True)]
    made_of_images = processor.image_processor(images, return_tensors="pt")
    padding = {"padding": "max_length", "max_length": LENGTH} if described.pad_to_context else {}
    with torch.inference_mode():
        expected = pooled(model.get_image_features(**made_of_images))
        alone = [processor.tokenizer(text, return_tensors="pt", **padding) for text in TEXTS]  # each without the others
        texts = np.concatenate([pooled(model.get_text_features(**tokens)) for tokens in alone])
    pixels, tokens = as_images(made_of_images, described.image_dtype), tokenize(processor, described, TEXTS)
    for target in (checkpoint, exported, fused):
        encoder = open_encoder(target)
        assert row_cosines(encoder.encode_images(pixels), expected).min() > 0.99999
        assert row_cosines(encoder.encode_texts(tokens.input_ids, tokens.attention_mask), texts).min() > 0.99999

    (tmp_path / "portable").mkdir()
    write_portable(checkpoint, tmp_path / "portable")
    unavailable = json.loads((tmp_path / "portable" / SCORES).read_text())["unavailable"]
    assert unavailable == NOT_PACKAGED.get(name, {})


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_without_an_embedding_of_each_image_and_text_is_refused(name, found, tmp_path):
    saved(found[name], tmp_path / "checkpoint")
    with pytest.raises(CheckpointError) as refused:
        taken(tmp_path / "checkpoint")
    assert str(refused.value) == f"{tmp_path / 'checkpoint'} {REFUSED[name]}"


@pytest.mark.parametrize("name", OF_NO_IMAGES)
def test_a_class_of_other_things_than_images_is_refused_by_its_configuration(name, found, tmp_path):
    folder = tmp_path / "checkpoint"
    found[name].config_class().save_pretrained(folder)
    save_file({f"weight.{number}": torch.zeros(1) for number in range(64)}, folder / "model.safetensors")
    clip_tokenizer().save_pretrained(folder)
    images_of("clip").save_pretrained(folder)
    with pytest.raises(CheckpointError) as refused:
        taken(folder)
    assert str(refused.value) == f"{folder} {OF_NO_IMAGES[name]}"


# What people have of a family: more often than the two towers alone, a model with a head behind them.

SEGMENTS = {"extract_layers": [0], "reduce_dim": 8, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
HEADS = {
    "CLIPSegForImageSegmentation": SEGMENTS,
    "FlavaForPreTraining": {},
    "OwlViTForObjectDetection": {},
    "Owlv2ForObjectDetection": {},
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_behind_the_towers_is_left_out_and_named(name, tmp_path):
    model = saved(getattr(transformers, name), tmp_path / "checkpoint", **HEADS[name])
    checkpoint, findings = taken(tmp_path / "checkpoint")
    (unused,) = [finding for finding in findings if finding.code == "unused-weights"]
    assert re.fullmatch(rf"\S+ and \d+ more belong to {name}'s head", unused.found)
    assert unused.severity == "warning"
    towers = getattr(model, model.base_model_prefix)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = pooled(towers.get_image_features(pixel_values=pixels))
    assert row_cosines(open_encoder(checkpoint).encode_images(pixels.numpy()), expected).min() > 0.99999


@pytest.mark.parametrize(
    ("name", "towers"), [("BlipForImageTextRetrieval", "BlipModel"), ("CLIPForImageClassification", "CLIPModel")]
)
def test_a_model_without_the_two_towers_is_refused_by_its_name(name, towers, tmp_path):
    """BLIP's for retrieval has other projections than BlipModel, whose are in no file that was released."""
    saved(getattr(transformers, name), tmp_path / "checkpoint")
    with pytest.raises(
        CheckpointError, match=rf"more are missing: {name} was saved, which holds no {towers}; expected"
    ):
        taken(tmp_path / "checkpoint")


def test_a_text_tower_without_pooling_is_refused_in_one_line(tmp_path, found, monkeypatch):
    """transformers' VisionTextDualEncoderModel takes it, and fails when it is called."""
    sizes = {"model_type": "distilbert", "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64}
    words = {"vocab_size": len(bert_tokenizer()), "max_position_embeddings": LENGTH}
    towers = {**OTHERWISE["vision-text-dual-encoder"], "text_config": {**sizes, **words}}
    monkeypatch.setitem(OTHERWISE, "vision-text-dual-encoder", towers)
    saved(found["VisionTextDualEncoderModel"], tmp_path / "checkpoint")
    said = "get_text_features of VisionTextDualEncoderModel fails in transformers itself: .*; give a model whose tow"
    with pytest.raises(CheckpointError, match=said):
        taken(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("rows", "made"), [(None, "no pooler_output"), (torch.ones(2, 5, 8), r"a pooler_output of shape \[2, 5, 8\]")]
)
def test_what_is_no_embedding_is_refused(rows, made):
    config = SimpleNamespace(model_type="new")
    model = SimpleNamespace(config=config, get_text_features=lambda: SimpleNamespace(pooler_output=rows))
    with pytest.raises(CheckpointError, match=f"get_text_features of SimpleNamespace gives {made}: one embedding"):
        embeddings(model, "get_text_features")


def test_a_token_above_the_end_of_text_is_refused_where_texts_are_pooled_at_the_highest_id(tmp_path, found):
    """OWL-ViT pools so whatever config.json says."""
    folder = tmp_path / "checkpoint"
    saved(found["OwlViTModel"], folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        CheckpointError,
        match=r"owlvit pools at the highest id of a text; .* up to '<new>' \(587\), would be pooled there",
    ):
        taken(folder)


def test_tipsv2s_pixels_by_pillow_are_torchvisions_within_a_grey_level(tmp_path, found):
    saved(found["Tipsv2Model"], tmp_path / "checkpoint")
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    made = load_processor(tmp_path / "checkpoint").image_processor(Image.fromarray(image), return_tensors="pt")
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(planes, (32, 32), mode="bilinear", antialias=True)  # as torchvision does
    assert (made["pixel_values"] * 255 - resized.round()).abs().max() < 1.001
