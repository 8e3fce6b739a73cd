"""What makes a checkpoint's answers wrong, or surprises whoever deploys it, found before anything is built from it.

A file can be whole and load, and still be another model than the one that was trained: texts pooled at the wrong token,
another activation, other pixels. What the families expect is what their released checkpoints hold.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from safetensors import safe_open

from clip_deploy.checkpoint import (
    CAPITALS,
    EXAMPLE_TEXTS,
    first_line,
    load_as_is,
    load_processor,
    read_config,
    stated_settings,
)
from clip_deploy.core.config import ModelConfig
from clip_deploy.core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ERROR, WARNING = "error", "warning"
CODES = (
    "hidden-act",
    "eos-token",
    "eos-missing",
    "pad-token",
    "padding-side",
    "vocabulary",
    "vocabulary-size",
    "unknown-words",
    "same-texts",
    "bos-missing",
    "lower-case",
    "tokenizer-setting",
    "context-length",
    "logit-scale",
    "logit-bias",
    "normalization",
    "interpolation",
    "image-size",
    "crop",
    "weights-dtype",
    "missing-weights",
    "unused-weights",
)
NEVER_ALLOWED = {"missing-weights"}  # each load would draw other random weights

LEGACY_EOS = (
    2  # transformers' CLIP then pools at the highest id: https://github.com/huggingface/transformers/pull/24773
)
POOLED_AT_EOS = ("clip", "metaclip_2")
PAD_TOKENS = {"siglip": ("</s>", "<pad>"), "siglip2": ("<pad>",)}  # read as text; SigLIP 2 of one size is a siglip

# Which activation the weights were trained with: vision and text tower of all that a family has released...
SIGMOID, EXACT, TANH = "quick_gelu", "gelu", "gelu_pytorch_tanh"
ACTIVATIONS = {"siglip": (TANH, TANH), "siglip2": (TANH, TANH), "chinese_clip": (SIGMOID, EXACT)}
# ...and where it released both kinds, by name: the first pattern that fits decides.
# https://github.com/mlfoundations/open_clip/blob/main/src/open_clip/pretrained.py
LINEAGES = (
    (r"quick-?gelu", SIGMOID),
    (r"openai/clip-vit", SIGMOID),
    (r"apple/dfn.*39b", EXACT),
    (r"apple/dfn", SIGMOID),
    (r"facebook/metaclip-2", EXACT),
    (r"facebook/metaclip", SIGMOID),
    (r"laion/clip-vit", EXACT),
)
OF_BOTH_KINDS = ("clip", "metaclip_2")
SAME_FUNCTION = 1e-3  # the exact GELU and its tanh form differ by 5e-4 at most, QuickGELU by 2e-2

INITIAL_SCALE = float(np.log(1 / 0.07))  # CLIP's temperature before training (arXiv:2103.00020, section 2.3)
LARGEST_SCALE = {"siglip": 200.0, "siglip2": 200.0}  # exp(logit_scale) of the released ones is 100 to 120
CLIPPED_SCALE = 100.0  # training clips CLIP's there (same section)
TWICE = 1000.0  # beyond it lies what was stored after exp and goes through exp again

BILINEAR, BICUBIC = 2, 3  # Pillow's numbers


@dataclass(frozen=True)
class Family:
    """How a family's images are prepared: mean and deviation of each channel, Pillow's filters, cropped or squashed."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    filters: tuple[int, ...]
    crops: bool


OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FAMILIES = {
    "clip": Family(*OPENAI, (BICUBIC,), crops=True),
    "metaclip_2": Family(*OPENAI, (BICUBIC,), crops=True),
    "chinese_clip": Family(*OPENAI, (BICUBIC,), crops=False),
    "siglip": Family(*HALF, (BICUBIC, BILINEAR), crops=False),
    "siglip2": Family(*HALF, (BILINEAR,), crops=False),
}


INCEPTION = r"laion/clip-vit-l-14-laion2b-s32b-b82k"  # the one CLIP that OpenCLIP trained with SigLIP's mean


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the family's checkpoints have it.

    Attributes:
        code: one of CODES, by which an error can be allowed.
        severity: "error" where answers are wrong, "warning" where they may be or others will stumble.
        consequence: what happens if nothing is changed.
        allowed: an error that model.allow names.
    """

    code: str
    severity: str
    found: str
    expected: str
    consequence: str
    allowed: bool = False

    def __str__(self) -> str:
        mark = f"{self.severity}, allowed" if self.allowed else self.severity
        return f"{self.code} ({mark}): {self.found}; expected {self.expected}. {self.consequence}"


def lint(folder: Path, model: ModelConfig, described: dict[str, Any]) -> list[Finding]:
    """Hold the checkpoint in `folder` against its tokenizer, its processor, its weights and its family.

    Args:
        described: what checkpoint.describe says of it.

    Raises:
        ConfigError: model.allow names what cannot be allowed.
        CheckpointError: errors that model.allow does not name, all in one message.
    """
    if unknown := sorted(set(model.allow) - set(CODES) | set(model.allow) & NEVER_ALLOWED):
        accepted = ", ".join(code for code in CODES if code not in NEVER_ALLOWED)
        raise ConfigError(f"model.allow names {', '.join(unknown)}: accepted are {accepted}")
    opened = Opened(folder, model, described)
    findings = [
        Finding(**{**asdict(finding), "allowed": finding.severity == ERROR and finding.code in model.allow})
        for check in CHECKS
        for finding in check(opened)
    ]
    if wrong := [finding for finding in findings if finding.severity == ERROR and not finding.allowed]:
        raise CheckpointError(_refusal(wrong))
    return findings


def _refusal(wrong: Sequence[Finding]) -> str:
    codes = sorted({finding.code for finding in wrong} - NEVER_ALLOWED)
    way = f", or, where it is meant so, put `allow: [{', '.join(codes)}]` into the model's file in conf/model/"
    lines = "".join(f"\n  {finding}" for finding in wrong)
    return f"the checkpoint would give wrong answers:{lines}\nmend the checkpoint{way if codes else ''}"


@dataclass
class Opened:
    """A checkpoint's parts, each read when the first check asks for it."""

    folder: Path
    settings: ModelConfig
    described: dict[str, Any]

    @cached_property
    def written(self) -> dict[str, Any]:
        """config.json as it stands, without transformers' defaults."""
        return read_config(self.folder)

    @cached_property
    def processor(self) -> Any:
        return load_processor(self.folder)

    @cached_property
    def own_tokenizer(self) -> Any:
        """The tokenizer as transformers alone has it."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)

    @cached_property
    def loaded(self) -> tuple["PreTrainedModel", dict[str, Any]]:
        return load_as_is(self.folder)

    @property
    def config(self) -> Any:
        return self.loaded[0].config

    @property
    def kind(self) -> str:
        return self.described["model_type"]

    @property
    def family(self) -> Family | None:
        family = FAMILIES.get(self.kind)
        if family and self.kind == "clip" and re.search(INCEPTION, self.names):
            return replace(family, mean=HALF[0], std=HALF[1])
        return family

    @property
    def names(self) -> str:
        """Every name by which the checkpoint, or the one it was fine-tuned from, is known."""
        parts = [self.written, self.written["text_config"] or {}, self.written["vision_config"] or {}]
        known = [self.settings.repo_id, self.settings.path, *(part.get("_name_or_path") for part in parts)]
        return " ".join(str(name) for name in known if name).lower()

    def pixels(self, image: Image.Image) -> np.ndarray:
        """What the processor makes of one image, float32 [3, height, width]; CheckpointError where that is none."""
        what = f"{self.folder}: of an image of {image.width} x {image.height} pixels, its image processor"
        try:
            with np.errstate(all="ignore"):
                made = np.asarray(self.processor.image_processor(image, return_tensors="np")["pixel_values"])[0]
        except Exception as error:  # whatever transformers meets in preprocessor_config.json
            raise CheckpointError(f"{what} makes an error: {first_line(error)}") from error
        if made.ndim != 3 or len(made) != 3 or not made.size:
            raise CheckpointError(
                f"{what} makes pixel_values of shape {list(made.shape)}: [3, height, width] is needed"
            )
        if not np.isfinite(made).all():
            raise CheckpointError(f"{what} makes NaN or infinity: mend image_mean and image_std")
        return made


def activations(opened: Opened) -> Iterator[Finding]:
    """The towers' activation; nothing in the weights tells it, so family, names and what config.json leaves out do."""
    if not opened.settings.trained:
        return
    towers = ("vision", "text")
    expected = _trained_with(opened)
    if expected is None and opened.kind not in OF_BOTH_KINDS:
        return
    used = tuple(str(getattr(opened.config, f"{tower}_config").hidden_act) for tower in towers)
    if expected:
        yield from _other_activation(used, expected)
    else:
        omitted = [tower for tower in towers if "hidden_act" not in (opened.written[f"{tower}_config"] or {})]
        yield from _doubtful_activation(used, omitted)


def _trained_with(opened: Opened) -> tuple[str, str] | None:
    """Activations of the vision and the text tower, where they are known."""
    if opened.kind not in OF_BOTH_KINDS:
        return ACTIVATIONS.get(opened.kind)
    known = next((name for pattern, name in LINEAGES if re.search(pattern, opened.names)), None)
    return (known, known) if known else None


OTHER_FUNCTION = "Every layer would compute another function than the weights were trained with"


def _other_activation(used: Sequence[str], expected: tuple[str, str]) -> Iterator[Finding]:
    apart = max(_distance(*pair) for pair in zip(used, expected, strict=True))
    named = expected[0] if len(set(expected)) == 1 else _towers(expected)
    if apart > SAME_FUNCTION:
        yield Finding("hidden-act", ERROR, f"hidden_act is {_towers(used)}", named, OTHER_FUNCTION)
    elif apart > 1e-6:
        consequence = "It is nearly the same function: embeddings move by less than FP16 moves them"
        yield Finding("hidden-act", WARNING, f"hidden_act is {_towers(used)}", named, consequence)


def _distance(one: str, other: str) -> float:
    """The largest difference between two of transformers' activations."""
    import torch
    from transformers.activations import ACT2FN

    values = torch.linspace(-8, 8, 4001)
    return float((ACT2FN[one](values) - ACT2FN[other](values)).abs().max())


def _doubtful_activation(used: Sequence[str], omitted: list[str]) -> Iterator[Finding]:
    """A checkpoint whose origin is not known."""
    if strange := sorted(set(used) - {SIGMOID, EXACT}):
        expected = f"{SIGMOID} or {EXACT}, as every CLIP was trained"
        yield Finding("hidden-act", WARNING, f"hidden_act is {' and '.join(strange)}", expected, OTHER_FUNCTION)
    elif len(set(used)) > 1:
        expected = "the same in both towers, as every CLIP was trained"
        consequence = f"{OTHER_FUNCTION} in one of the towers"
        yield Finding("hidden-act", WARNING, f"hidden_act is {_towers(used)}", expected, consequence)
    elif omitted:
        said = f"config.json has no hidden_act for {' and '.join(omitted)}, so transformers takes quick_gelu"
        yield Finding("hidden-act", WARNING, said, "it to be stated", f"{OTHER_FUNCTION}, if that was OpenCLIP's gelu")


def _towers(names: Sequence[str]) -> str:
    return f"vision {names[0]}, text {names[1]}"


def end_of_text(opened: Opened) -> Iterator[Finding]:
    """Whether the text tower pools where the tokenizer puts the end of the text."""
    if opened.kind not in POOLED_AT_EOS:
        return
    tokenizer, told = opened.processor.tokenizer, opened.config.text_config.eos_token_id
    real, highest = tokenizer.eos_token_id, max(tokenizer.get_vocab().values())
    if real is None or any(real not in ids for ids in opened.described["example_texts"]["input_ids"]):
        consequence = "The text tower would pool at another token, most often the first, which is the same in all texts"
        yield Finding(
            "eos-missing", ERROR, "tokenised texts hold no end-of-text token", f"one at their end ({real})", consequence
        )
    elif opened.kind == "clip" and told == LEGACY_EOS:
        yield _legacy(tokenizer, real, highest)
    elif told != real:
        found = f"text_config.eos_token_id is {told}"
        consequence = (
            "No text ends with it: the text tower would pool at the first token, and all texts would look the same"
        )
        yield Finding("eos-token", ERROR, found, f"the tokenizer's {real}", consequence)


def _legacy(tokenizer: Any, real: int, highest: int) -> Finding:
    found = "text_config.eos_token_id is 2, as before transformers 4.31, which pools at the highest id of a text"
    if real == highest:
        consequence = (
            "Right here, where that ends every text; with a token added to the tokenizer, texts would be pooled there"
        )
        return Finding("eos-token", WARNING, found, f"the tokenizer's {real}", consequence)
    name = tokenizer.convert_ids_to_tokens(highest)
    consequence = f"Texts with a token above {real}, up to {name!r} ({highest}), would be pooled there"
    return Finding("eos-token", ERROR, found, f"the tokenizer's {real}", consequence)


def padding(opened: Opened) -> Iterator[Finding]:
    """What texts are padded with, and on which side."""
    tokenizer, told = opened.processor.tokenizer, opened.config.text_config.pad_token_id
    if tokenizer.padding_side != "right":
        consequence = (
            "Words would stand at other positions than in training, and padding may be taken for the text's end"
        )
        yield Finding(
            "padding-side", ERROR, f"the tokenizer pads on the {tokenizer.padding_side}", "right", consequence
        )
    if opened.kind in PAD_TOKENS:
        expected = PAD_TOKENS[opened.kind]
        if tokenizer.pad_token not in expected:
            consequence = "The text tower reads padding as text, and was trained with another"
            found = f"the tokenizer pads with {tokenizer.pad_token!r}"
            yield Finding("pad-token", WARNING, found, " or ".join(map(repr, expected)), consequence)
    elif opened.config.text_config.eos_token_id != LEGACY_EOS and told != tokenizer.pad_token_id:
        consequence = (
            "Nothing changes here, where the tokenizer pads; a server that pads by config.json sends other ids"
        )
        found = f"text_config.pad_token_id is {told}"
        yield Finding("pad-token", WARNING, found, f"the tokenizer's {tokenizer.pad_token_id}", consequence)


def vocabulary(opened: Opened) -> Iterator[Finding]:
    """Ids that the embedding table does not have."""
    size = opened.config.text_config.vocab_size
    highest = max(opened.processor.tokenizer.get_vocab().values())
    if highest >= size:
        consequence = "A text with such a token reads beyond the embedding table: it fails, or gives noise"
        found = f"the tokenizer's ids go up to {highest}"
        yield Finding("vocabulary", ERROR, found, f"less than vocab_size, {size}", consequence)
    words = len(opened.processor.tokenizer)
    if opened.settings.trained and words < FILLED * size and size - words >= ROUNDING:
        consequence = "It is not the tokenizer of this model: its ids stand for other words than in training"
        found = f"the tokenizer has {words} tokens"
        yield Finding("vocabulary-size", ERROR, found, f"nearly vocab_size, {size}", consequence)


# A tokenizer fills its embedding table, but for rounding up to a multiple of 64 or 128 and for a few reserved ids.
# Another family's (21,128 to 30,522 tokens for 49,408; 256,000 for 901,629) fills less than three quarters of it.
FILLED, ROUNDING = 0.75, 128

SENTENCES = (  # one after another says the same; a vocabulary of one language knows one of them
    *EXAMPLE_TEXTS,
    "一张红色圆形的照片",
    "赤い円の写真",
    "빨간 원의 사진",
    "фотография красного круга",
    "صورة لدائرة حمراء",
)


def read_apart(opened: Opened) -> Iterator[Finding]:
    """Whether the tokenizer tells texts apart, and knows their words."""
    tokenizer = opened.processor.tokenizer
    if len({tuple(tokenizer(text)["input_ids"]) for text in SENTENCES}) == 1:
        consequence = "All texts would have one embedding, and every answer would be chance"
        yield Finding("same-texts", ERROR, f"{len(SENTENCES)} texts get the same ids", "ids for each", consequence)
        return
    shares = [_unknown(tokenizer, text) for text in SENTENCES]
    if min(shares) > 0.5:
        found = f"of the tokens of {len(SENTENCES)} texts in six languages more than half are {tokenizer.unk_token!r}"
        consequence = "Words that are unknown are all read alike"
        yield Finding("unknown-words", ERROR, found, "a vocabulary that knows one of them", consequence)
    elif max(english := shares[: len(EXAMPLE_TEXTS)]) > 0.5:
        found = f"of the tokens of an English text {max(english):.0%} are {tokenizer.unk_token!r}"
        consequence = "Words that are unknown are all read alike: give classes and templates in the model's language"
        yield Finding("unknown-words", WARNING, found, "a vocabulary that knows them", consequence)


def _unknown(tokenizer: Any, text: str) -> float:
    """The share of unknown tokens; those around the text aside, for CLIP's unknown token is its end of text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids.count(tokenizer.unk_token_id) / len(ids) if ids else 1.0


def clip_texts(opened: Opened) -> Iterator[Finding]:
    """What CLIP's own tokenizer does to every text: lower-case it, and begin it with <|startoftext|>."""
    if opened.kind != "clip":
        return
    tokenizer = opened.processor.tokenizer
    first = tokenizer(EXAMPLE_TEXTS[0])["input_ids"][0]
    if first not in tokenizer.all_special_ids or first == tokenizer.eos_token_id:
        consequence = "All words stand at other positions than in training: embeddings and answers change"
        found = f"texts begin with {tokenizer.convert_ids_to_tokens(first)!r}"
        yield Finding("bos-missing", ERROR, found, "'<|startoftext|>', as every CLIP was trained", consequence)
    if tokenizer(CAPITALS)["input_ids"] != tokenizer(CAPITALS.lower())["input_ids"]:
        consequence = "Capitals get tokens that CLIP's training never held: texts with them get other embeddings"
        expected = "the same, as every CLIP was trained (`do_lower_case: true` in tokenizer_config.json does it)"
        yield Finding("lower-case", ERROR, f"{CAPITALS!r} and its lower case get other tokens", expected, consequence)


def _alike(tokenizer: Any, one: str, other: str) -> bool | None:
    """Whether two texts get the same tokens; None where that shows nothing, for they are unknown ones."""
    same = tokenizer(one)["input_ids"] == tokenizer(other)["input_ids"]
    return None if same and _unknown(tokenizer, one) else same


def _lower_cases(tokenizer: Any) -> bool | None:
    return _alike(tokenizer, CAPITALS, CAPITALS.lower())


def _begins(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id in tokenizer("red")["input_ids"][:1]


def _ends(tokenizer: Any) -> bool:
    return tokenizer.eos_token_id in tokenizer("red")["input_ids"][-1:]


# Settings of tokenizer_config.json that change tokens, each with a look whether they do.
EFFECTS: dict[str, Callable[[Any], bool | None]] = {
    "do_lower_case": _lower_cases,
    "strip_accents": lambda tokenizer: _alike(tokenizer, "caf\u00e9", "cafe"),
    "tokenize_chinese_chars": lambda tokenizer: _alike(tokenizer, "\u7ea2\u8272", "\u7ea2 \u8272"),
    "add_bos_token": _begins,
    "add_eos_token": _ends,
}


def stated(opened: Opened) -> Iterator[Finding]:
    """Settings that the tokenizer states, and that transformers' own does not follow."""
    name, settings = type(opened.processor.tokenizer).__name__, stated_settings(opened.folder)
    for setting, effect in EFFECTS.items():
        said = settings.get(setting)
        if said is None or effect(opened.own_tokenizer) in (None, bool(said)):
            continue
        consequence = "It is not applied here either: where the model was trained so, texts are read in another way"
        if effect(opened.processor.tokenizer) == said:
            consequence = "It is applied here, also in the package; whoever asks transformers alone gets other tokens"
        found = f"tokenizer_config.json states {setting}: {str(said).lower()}, which transformers' {name} ignores"
        yield Finding("tokenizer-setting", WARNING, found, "it to be followed", consequence)


def context(opened: Opened) -> Iterator[Finding]:
    """The tokenizer's length against the model's positions."""
    positions, length = opened.config.text_config.max_position_embeddings, opened.processor.tokenizer.model_max_length
    cut = opened.described["context_length"]
    if length > positions:
        found = f"the tokenizer's model_max_length is {length if length < 1e9 else 'not set'}"
        consequence = f"Texts are cut at {cut} here; a server that asks the tokenizer alone fails on longer ones"
        yield Finding("context-length", WARNING, found, f"max_position_embeddings, {positions}", consequence)
    elif length < positions:
        consequence = f"Texts are cut at {length} tokens, though the model reads {positions}"
        found = f"the tokenizer's model_max_length is {length}"
        yield Finding("context-length", WARNING, found, f"max_position_embeddings, {positions}", consequence)


def scale(opened: Opened) -> Iterator[Finding]:
    """exp(logit_scale), and SigLIP's bias: they make cosines probabilities."""
    model = opened.loaded[0]
    if not opened.settings.trained or not hasattr(model, "logit_scale"):
        return
    stored = float(model.logit_scale.detach())
    factor, most = float(np.exp(np.float64(stored))), LARGEST_SCALE.get(opened.kind, CLIPPED_SCALE)
    found = f"logit_scale is {stored:.4g}, so cosines are multiplied by {factor:.4g}"
    expected = f"a factor from 1 to {most:g}"
    if not np.isfinite(factor) or factor > TWICE:
        consequence = "Probabilities would be 0, 1 or NaN: the factor itself was stored instead of its logarithm"
        yield Finding("logit-scale", ERROR, found, expected, consequence)
    elif not 1 <= factor <= most * 1.01:  # rounding of stored half precision
        consequence = "Ranks are right, probabilities are too sharp or too flat"
        yield Finding("logit-scale", WARNING, found, expected, consequence)
    elif most == CLIPPED_SCALE and abs(stored - INITIAL_SCALE) < 1e-3:
        consequence = (
            "Ranks are right, probabilities are flat: it was never trained, or left out when weights were saved"
        )
        yield Finding("logit-scale", WARNING, found, "another than before training", consequence)
    bias = getattr(model, "logit_bias", None)
    if bias is not None and not float(bias.detach()) < 0:
        consequence = "Images and texts that have nothing in common would get probabilities of 0.5 and more"
        yield Finding("logit-bias", WARNING, f"logit_bias is {float(bias.detach()):.4g}", "below 0", consequence)


def images(opened: Opened) -> Iterator[Finding]:
    """Size, crop, normalisation and filter, as the processor's own pixels show them."""
    wanted, made = getattr(opened.config.vision_config, "image_size", None), opened.described["image_size"]
    if hasattr(opened.config.vision_config, "patch_size") and made != [wanted, wanted]:
        found = f"the processor makes {made[0]} x {made[1]} pixels"
        consequence = "The vision tower has no positions for them: it fails, or stretches those that it has"
        yield Finding("image-size", ERROR, found, f"vision_config.image_size, {wanted} x {wanted}", consequence)
    wide = list(opened.pixels(Image.new("RGB", (96, 64))).shape[-2:])
    if wide != made:
        found = f"an image of 96 x 64 pixels becomes {wide[1]} x {wide[0]}"
        consequence = "Images that are not square would not fit the vision tower"
        yield Finding("crop", ERROR, found, f"{made[1]} x {made[0]}", consequence)
    if opened.family is not None:
        yield from _pictures(opened, opened.family, squared=wide == made)


def _pictures(opened: Opened, family: Family, squared: bool) -> Iterator[Finding]:
    processor = opened.processor.image_processor
    resizes = bool(getattr(processor, "do_resize", True))
    black, white = (opened.pixels(Image.new("RGB", (64, 64), shade)).mean((1, 2)) for shade in ("black", "white"))
    std = 1 / np.maximum(white - black, 1e-9)
    mean = -black * std
    if max(np.abs(mean - family.mean).max(), np.abs(std - family.std).max()) > 1e-3:
        found = f"pixels are normalised by mean {_listed(mean)} and deviation {_listed(std)}"
        expected = f"{_listed(family.mean)} and {_listed(family.std)}, as {opened.kind} was trained"
        consequence = "The vision tower sees a range that it was never trained on: embeddings and answers change"
        yield Finding("normalization", ERROR, found, expected, consequence)
    crops = bool(getattr(processor, "do_center_crop", False))
    if squared and not _sees_rims(opened):
        found = "of a large image only the middle is seen" + ("" if resizes else " (do_resize is false)")
        consequence = "What lies outside is left out, the more the larger an image is"
        yield Finding("crop", ERROR, found, "the image to be resized before its middle is taken", consequence)
    elif squared and crops != family.crops:
        ways = {True: "crops images to a square", False: "squashes images into a square"}
        consequence = "Images that are not square lose their rims, or their proportions, unlike in training"
        yield Finding("crop", WARNING, f"the processor {ways[crops]}", f"it {ways[family.crops]}", consequence)
    used = processor.resample if resizes else None
    if used is not None and used not in family.filters:
        names = [Image.Resampling(number).name.lower() for number in (used, *family.filters)]
        consequence = "Embeddings shift a little, most for images much larger than the model's"
        yield Finding("interpolation", WARNING, f"images are resized {names[0]}", " or ".join(names[1:]), consequence)


def _sees_rims(opened: Opened) -> bool:
    """Whether the rims of a square image, an eighth of its width, leave a trace; the image is large."""
    side = 4 * max(opened.described["image_size"])
    framed = Image.new("RGB", (side, side), "black")
    framed.paste("white", (side // 8, side // 8, side - side // 8, side - side // 8))
    return bool(np.ptp(opened.pixels(framed)[0]) > 0)


def _listed(values: Sequence[float] | np.ndarray) -> str:
    return "/".join(f"{value:.3g}" for value in values)


def stored_types(opened: Opened) -> Iterator[Finding]:
    """Half precision in the files."""
    types = {kind for path in opened.folder.glob("*.safetensors") for kind in _float_types(path)}
    if len(types) > 1:
        consequence = "The reference holds what is stored, so cosines say nothing of what rounding has cost already"
        yield Finding(
            "weights-dtype", WARNING, f"weights are stored in {' and '.join(sorted(types))}", "F32", consequence
        )
    elif types and types != {"F32"}:
        consequence = "The reference is these rounded weights: cosines say nothing of what rounding has cost already"
        yield Finding("weights-dtype", WARNING, f"weights are stored in {types.pop()}", "F32", consequence)


def _float_types(path: Path) -> Iterator[str]:
    with safe_open(path, framework="numpy") as content:
        for name in content.keys():  # noqa: SIM118 - it is no dictionary
            kind = content.get_slice(name).get_dtype()
            if kind.startswith(("F", "BF")):
                yield kind


def weights(opened: Opened) -> Iterator[Finding]:
    """Those that the architecture needs and the files lack, have in another shape, or have besides."""
    _, loading = opened.loaded
    lacking = sorted(loading["missing_keys"])
    misshapen = sorted(entry[0] for entry in loading["mismatched_keys"])
    unused = sorted(name for name in loading["unexpected_keys"] if not name.endswith("position_ids"))
    for names, what in ((lacking, "are missing"), (misshapen, "have another shape than config.json says")):
        if names:
            consequence = "They would be random, and others each time"
            yield Finding("missing-weights", ERROR, f"{_some(names)} {what}", "all of the architecture's", consequence)
    if unused:
        inner = [name for name in unused if re.search(r"lora_|adapter|layers?\.\d+\.", name)]
        consequence = "Layers or adapters that were trained would not be run" if inner else "What they hold is left out"
        found = f"{_some(inner or unused)} {'fit' if len(inner or unused) > 1 else 'fits'} nothing in the architecture"
        yield Finding("unused-weights", ERROR if inner else WARNING, found, "a place for each weight", consequence)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


CHECKS: tuple[Callable[[Opened], Iterator[Finding]], ...] = (
    activations,
    end_of_text,
    padding,
    vocabulary,
    read_apart,
    clip_texts,
    stated,
    context,
    scale,
    images,
    stored_types,
    weights,
)
