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

from clip_deploy.checkpoint.fetch import called
from clip_deploy.checkpoint.layout import is_open_clip, own_code
from clip_deploy.checkpoint.load import CAPITALS, EXAMPLE_TEXTS, load_processor, load_with_report
from clip_deploy.checkpoint.verify import read_config, stated_settings, tower_settings
from clip_deploy.core.artifact import TOWERS
from clip_deploy.core.config import ModelConfig
from clip_deploy.core.errors import CheckpointError, ConfigError, one_line
from clip_deploy.core.model import Finding, Model, as_images, embeddings, image_feed
from clip_deploy.core.preprocessing import to_pixels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ERROR, WARNING = "error", "warning"
CODES = (
    "own-code",
    "other-weights",
    "hidden-act",
    "eos-token",
    "eos-missing",
    "pad-token",
    "padding-side",
    "vocabulary",
    "vocabulary-size",
    "unknown-words",
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
    "alike",
)
# Each load would draw other random weights; there is no answer to give; the vision tower fails.
NEVER_ALLOWED = {"missing-weights", "alike", "image-size"}

LEGACY_EOS = (
    2  # transformers' CLIP then pools at the highest id: https://github.com/huggingface/transformers/pull/24773
)
POOLED_AT_EOS = ("clip", "clipseg", "groupvit", "metaclip_2", "aimv2")
KNOWS_LEGACY = ("clip", "clipseg", "groupvit")
POOLED_AT_HIGHEST = ("owlvit", "owlv2")  # whatever config.json says
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
MAX_SCALE = 200.0  # training clips CLIP's at 100 (same section), fine-tuning may not; SigLIP's are 100 to 120
SIGMOID_LOSS = ("siglip", "siglip2")  # trained with a bias, and from another temperature
ALIKE = 1e-6  # 1 - cosine: rounding moves it by 1e-7, and other texts in a model with random weights by 1e-3
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
    "tipsv2": Family((0.0,) * 3, (1.0,) * 3, (BILINEAR,), crops=False),
}


INCEPTION = r"laion/clip-vit-l-14-laion2b-s32b-b82k"  # the one CLIP that OpenCLIP trained with SigLIP's mean...
INCEPTION_TOWER = {"patch_size": 14, "hidden_size": 1024, "image_size": 224}  # ...and its vision tower
STRETCHES = ("clipseg",)  # trained on images larger than its positions, which it stretches
SHORT_TEXTS = ("align", "altclip", "chinese_clip", "vision-text-dual-encoder")  # text towers made for longer ones
CACHED = re.compile(r"models--([^/]+?)--([^/]+)")  # a repository's folder in the hub's cache
# Prefixes of all weights' names, and what saves them so.
WRAPPERS = {"module.": "DataParallel", "_orig_mod.": "torch.compile", "base_model.model.": "PEFT"}


def lint(folder: Path, model: ModelConfig, described: Model) -> list[Finding]:
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
    with called(folder, model):
        findings = [
            Finding(**{**asdict(finding), "allowed": finding.severity == ERROR and finding.code in model.allow})
            for check in (OF_OPEN_CLIP if is_open_clip(folder) else CHECKS)
            for finding in check(opened)
        ]
    if wrong := [finding for finding in findings if finding.severity == ERROR and not finding.allowed]:
        raise CheckpointError(_refusal(wrong))
    return findings


def _refusal(wrong: Sequence[Finding]) -> str:
    codes = sorted({finding.code for finding in wrong} - NEVER_ALLOWED)
    way = f", or, if it is intended, put `allow: [{', '.join(codes)}]` into the model's file in conf/model/"
    lines = "".join(f"\n  {finding}" for finding in wrong)
    return f"the checkpoint would give wrong answers:{lines}\ncorrect the checkpoint{way if codes else ''}"


@dataclass
class Opened:
    """A checkpoint's parts, each read when the first check asks for it."""

    folder: Path
    settings: ModelConfig
    described: Model

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
        return load_with_report(self.folder)

    @property
    def config(self) -> Any:
        return self.loaded[0].config

    @property
    def vocabulary_size(self) -> int:
        """How many tokens the text tower has embeddings for."""
        model = self.loaded[0]
        return int(model.text.vocab_size if is_open_clip(self.folder) else model.config.text_config.vocab_size)

    @property
    def kind(self) -> str:
        found: str = self.described.model_type
        return found

    @property
    def family(self) -> Family | None:
        family = FAMILIES.get(self.kind)
        if family and self.kind == "clip" and re.search(INCEPTION, self.names):
            return replace(family, mean=HALF[0], std=HALF[1])
        return family

    @property
    def origins(self) -> str:
        """Ids of the repositories that it, or what it was fine-tuned from, came from, as far as files say so."""
        parts = [self.written, *(tower_settings(self.written, tower) for tower in TOWERS)]
        folders = [name for name in (self.settings.path, self.settings.base) if name]
        cached = [CACHED.search(str(Path(name).expanduser().resolve())) for name in folders]
        known = [self.settings.repo_id, *("/".join(found.groups()) for found in cached if found), *self._merged]
        return " ".join(str(name) for name in (*known, *(part.get("_name_or_path") for part in parts)) if name).lower()

    @property
    def _merged(self) -> list[str | None]:
        """The id of the base that an adapter was merged into, where it has one."""
        checkpoint = self.described.checkpoint
        return [checkpoint.parts["base"].repo_id] if checkpoint and "base" in checkpoint.parts else []

    @property
    def names(self) -> str:
        """The same with the folder's own name, which anyone may have given it."""
        return f"{self.origins} {self.settings.path or ''}".lower()

    def takes(self, size: list[int]) -> bool:
        """Whether the vision tower runs on images of height and width `size`."""
        import torch

        model = self.loaded[0]
        try:
            with torch.inference_mode():
                model.get_image_features(pixel_values=torch.zeros(1, 3, *size, device=model.device))
        except (ValueError, RuntimeError, IndexError):
            return False
        return True

    def pixels(self, image: Image.Image) -> np.ndarray:
        """What the processor makes of one image, float32 [3, height, width]; CheckpointError where that is none."""
        return to_pixels(self.prepared(image))

    def prepared(self, image: Image.Image) -> np.ndarray:
        """The same in the model's image_dtype."""
        what = f"{self.folder}: given an image of {image.width} x {image.height} pixels, its image processor"
        dtype = self.described.image_dtype
        try:
            with np.errstate(all="ignore"):
                processed = self.processor.image_processor(image, return_tensors="np")
                made = as_images(processed, dtype)[0]
        except Exception as error:  # whatever transformers meets in preprocessor_config.json
            raise CheckpointError(f"{what} fails: {one_line(error)}") from error
        values = made if dtype.names is None else made["pixel_values"]
        if dtype.names is None and (made.ndim != 3 or len(made) != 3 or not made.size):
            raise CheckpointError(
                f"{what} makes pixel_values of shape {list(made.shape)}: [3, height, width] is needed"
            )
        if not np.isfinite(values).all():
            raise CheckpointError(f"{what} makes NaN or infinity: correct image_mean and image_std")
        found: np.ndarray = made
        return found


def code_of_its_own(opened: Opened) -> Iterator[Finding]:
    """Code beside the weights that would compute something else than transformers' own class."""
    if files := own_code(opened.folder):
        found = f"the checkpoint has code of its own (auto_map in {' and '.join(files)})"
        consequence = (
            f"It is never run. transformers' own {type(opened.loaded[0]).__name__} answers in its place, and its "
            "embeddings may be others"
        )
        yield Finding("own-code", ERROR, found, "a model of transformers alone", consequence)


def left_out(opened: Opened) -> Iterator[Finding]:
    """A second set of weights in the folder."""
    if names := opened.described.left_out:
        found = f"{_some(names)} {'lie' if len(names) > 1 else 'lies'} beside the weights"
        consequence = "It is not read: it is neither deployed nor counted"
        yield Finding("other-weights", WARNING, found, "one set of weights", consequence)


def activations(opened: Opened) -> Iterator[Finding]:
    """The towers' activation; nothing in the weights tells it, so family, names and what config.json leaves out do."""
    settings = [getattr(opened.config, f"{tower}_config") for tower in TOWERS]
    used = tuple(str(getattr(one, "hidden_act", None)) for one in settings)
    overridden = list(_overridden(opened, used))
    yield from overridden
    if overridden or not opened.settings.trained:
        return
    expected, is_certain = _trained_with(opened)
    if expected:
        yield from _other_activation(used, expected, is_certain)
    elif opened.kind in OF_BOTH_KINDS:
        omitted = [tower for tower in TOWERS if "hidden_act" not in tower_settings(opened.written, tower)]
        yield from _doubtful_activation(used, omitted)


def _overridden(opened: Opened, used: Sequence[str]) -> Iterator[Finding]:
    """transformers takes the settings in text_config_dict, and its defaults for what these leave out."""
    for tower, name in zip(TOWERS, used, strict=True):
        stated = (opened.written.get(f"{tower}_config") or {}).get("hidden_act")
        if stated is not None and stated != name:
            found = f"hidden_act is {name}, since {tower}_config_dict overrules {tower}_config, which says {stated}"
            way = f"one of them: take {tower}_config_dict out of config.json"
            yield Finding("hidden-act", ERROR, found, way, OTHER_FUNCTION)


def _trained_with(opened: Opened) -> tuple[tuple[str, str] | None, bool]:
    """Activations of the vision and the text tower, where they are known, and whether more than a folder says so."""
    if opened.kind not in OF_BOTH_KINDS:
        return ACTIVATIONS.get(opened.kind), True
    for names in (opened.origins, opened.names):
        if known := next((name for pattern, name in LINEAGES if re.search(pattern, names)), None):
            return (known, known), names == opened.origins
    return None, True


OTHER_FUNCTION = "Every layer would compute another function than the weights were trained with"


def _other_activation(used: Sequence[str], expected: tuple[str, str], is_certain: bool) -> Iterator[Finding]:
    apart = max(_distance(*pair) for pair in zip(used, expected, strict=True))
    named = expected[0] if len(set(expected)) == 1 else _towers(expected)
    if apart > SAME_FUNCTION and not is_certain:
        consequence = f"{OTHER_FUNCTION}, if the folder's name is right"
        yield Finding("hidden-act", WARNING, f"hidden_act is {_towers(used)}", f"{named}, by the folder", consequence)
    elif apart > SAME_FUNCTION:
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
    if opened.kind not in (*POOLED_AT_EOS, *POOLED_AT_HIGHEST):
        return
    tokenizer, told = opened.processor.tokenizer, opened.config.text_config.eos_token_id
    real, highest = tokenizer.eos_token_id, max(tokenizer.get_vocab().values())
    if real is None or any(real not in ids for ids in opened.described.example_texts["input_ids"]):
        consequence = "The text tower would pool at another token, most often the first, which is the same in all texts"
        yield Finding(
            "eos-missing", ERROR, "tokenised texts hold no end-of-text token", f"one at their end ({real})", consequence
        )
    elif opened.kind in POOLED_AT_HIGHEST:
        if real != highest:
            yield _pooled_at_highest(tokenizer, f"{opened.kind} pools at the highest id of a text", real, highest)
    elif opened.kind in KNOWS_LEGACY and told == LEGACY_EOS:
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
            "That is right here, as it ends every text. If a token is added to the tokenizer, texts would be pooled "
            "there"
        )
        return Finding("eos-token", WARNING, found, f"the tokenizer's {real}", consequence)
    return _pooled_at_highest(tokenizer, found, real, highest)


def _pooled_at_highest(tokenizer: Any, found: str, real: int, highest: int) -> Finding:
    name = tokenizer.convert_ids_to_tokens(highest)
    consequence = f"Texts with a token above {real}, up to {name!r} ({highest}), would be pooled there"
    return Finding("eos-token", ERROR, found, f"the tokenizer's {real}", consequence)


def padding(opened: Opened) -> Iterator[Finding]:
    """What texts are padded with, and on which side."""
    tokenizer, text = opened.processor.tokenizer, opened.config.text_config
    told = getattr(text, "pad_token_id", None)
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
            consequence = "The text tower reads padding as text, and was trained with another padding token"
            found = f"the tokenizer pads with {tokenizer.pad_token!r}"
            yield Finding("pad-token", WARNING, found, " or ".join(map(repr, expected)), consequence)
    elif told is not None and getattr(text, "eos_token_id", None) != LEGACY_EOS and told != tokenizer.pad_token_id:
        consequence = "Nothing changes here, as the tokenizer pads. A server that pads by config.json sends other ids"
        found = f"text_config.pad_token_id is {told}"
        yield Finding("pad-token", WARNING, found, f"the tokenizer's {tokenizer.pad_token_id}", consequence)


def vocabulary(opened: Opened) -> Iterator[Finding]:
    """Ids that the embedding table does not have."""
    size = opened.vocabulary_size
    highest = max(opened.processor.tokenizer.get_vocab().values())
    if highest >= size:
        consequence = "A text with such a token reads beyond the embedding table: it fails, or gives noise"
        found = f"the tokenizer's ids go up to {highest}"
        yield Finding("vocabulary", ERROR, found, f"less than vocab_size, {size}", consequence)
    tokens = len(opened.processor.tokenizer.get_vocab())
    if opened.settings.trained and tokens < FILLED * size and size - tokens >= ROUNDING:
        consequence = "It is not the tokenizer of this model: its ids stand for other words than in training"
        found = f"the tokenizer has {tokens} tokens"
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


def unknown_words(opened: Opened) -> Iterator[Finding]:
    """Whether the tokenizer knows the words of texts."""
    tokenizer = opened.processor.tokenizer
    shares = [_unknown(tokenizer, text) for text in SENTENCES]
    if min(shares) > 0.5:
        found = f"more than half of the tokens of {len(SENTENCES)} texts in six languages are {tokenizer.unk_token!r}"
        consequence = "All unknown words look the same to the model"
        yield Finding("unknown-words", ERROR, found, "a vocabulary that knows one of them", consequence)
    elif max(english := shares[: len(EXAMPLE_TEXTS)]) > 0.5:
        found = f"{max(english):.0%} of the tokens of an English text are {tokenizer.unk_token!r}"
        consequence = "All unknown words look the same to the model: give classes and templates in the model's language"
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
        consequence = "It is not applied here either. If the model was trained with it, texts are read in another way"
        if effect(opened.processor.tokenizer) == said:
            consequence = "It is applied here, also in the package. Code that uses transformers alone gets other tokens"
        found = f"tokenizer_config.json states {setting}: {str(said).lower()}, which transformers' {name} ignores"
        yield Finding("tokenizer-setting", WARNING, found, "it to be followed", consequence)


def context(opened: Opened) -> Iterator[Finding]:
    """The tokenizer's length against the model's positions."""
    positions, length = opened.described.positions, opened.processor.tokenizer.model_max_length
    expected = f"the text tower's {positions} positions"
    cut = opened.described.context_length
    if length > positions:
        found = f"the tokenizer's model_max_length is {length if length < 1e9 else 'not set'}"
        consequence = f"Texts are cut at {cut} here; a server that asks the tokenizer alone fails on longer ones"
        yield Finding("context-length", WARNING, found, expected, consequence)
    elif length < positions and opened.kind not in SHORT_TEXTS:
        consequence = f"Texts are cut at {cut} tokens, though the model reads {positions}"
        found = f"the tokenizer's model_max_length is {length}"
        yield Finding("context-length", WARNING, found, expected, consequence)


def scale(opened: Opened) -> Iterator[Finding]:
    """exp(logit_scale), and SigLIP's bias: they make cosines probabilities."""
    model, loading = opened.loaded
    if not opened.settings.trained or not hasattr(model, "logit_scale") or "logit_scale" in loading["missing_keys"]:
        return
    stored = float(model.logit_scale.detach())
    factor = float(np.exp(np.float64(stored)))
    found = f"logit_scale is {stored:.4g}, so cosines are multiplied by {factor:.4g}"
    expected = f"a factor from 1 to {MAX_SCALE:g}"
    if not np.isfinite(factor) or factor > TWICE:
        consequence = "Probabilities would be 0, 1 or NaN: the factor itself was stored instead of its logarithm"
        yield Finding("logit-scale", ERROR, found, expected, consequence)
    elif not 1 <= factor <= MAX_SCALE:
        consequence = "Ranks are right, probabilities are too sharp or too flat"
        yield Finding("logit-scale", WARNING, found, expected, consequence)
    elif opened.kind not in SIGMOID_LOSS and abs(stored - INITIAL_SCALE) < 1e-3:
        consequence = (
            "Ranks are right, probabilities are flat: it was never trained, or left out when weights were saved"
        )
        yield Finding("logit-scale", WARNING, found, "another than before training", consequence)
    bias = None if "logit_bias" in loading["missing_keys"] else getattr(model, "logit_bias", None)
    if bias is not None and not float(bias.detach()) < 0:
        consequence = "Images and texts that have nothing in common would get probabilities of 0.5 and more"
        yield Finding("logit-bias", WARNING, f"logit_bias is {float(bias.detach()):.4g}", "below 0", consequence)


def images(opened: Opened) -> Iterator[Finding]:
    """Size, crop, normalisation and filter, as the processor's own pixels show them."""
    squared = False  # patches are of the whole image in its proportions
    if made := opened.described.image_size:
        yield from _sizes(opened, getattr(opened.config.vision_config, "image_size", None), made)
        wide = list(opened.pixels(Image.new("RGB", (96, 64))).shape[-2:])
        squared = wide == made
        if not squared:
            found = f"an image of 96 x 64 pixels becomes {wide[1]} x {wide[0]}"
            consequence = "Images that are not square would not fit the vision tower"
            yield Finding("crop", ERROR, found, f"{made[1]} x {made[0]}", consequence)
    if opened.family is not None:
        yield from _pictures(opened, opened.family, squared)


def _sizes(opened: Opened, wanted: Any, made: list[int]) -> Iterator[Finding]:
    """Whether the vision tower has positions for the images that the processor makes."""
    fits = made == (list(wanted) if isinstance(wanted, list | tuple) else [wanted, wanted])
    if fits or not hasattr(opened.config.vision_config, "patch_size") or opened.kind in STRETCHES:
        return
    found = f"the processor makes {made[0]} x {made[1]} pixels"
    expected = f"vision_config.image_size, {wanted}"
    if opened.takes(made):
        consequence = "The vision tower takes them, with positions that it was not trained with"
        yield Finding("image-size", WARNING, found, expected, consequence)
    else:
        yield Finding("image-size", ERROR, found, expected, "The vision tower has no positions for them: it fails")


def _pictures(opened: Opened, family: Family, squared: bool) -> Iterator[Finding]:
    processor = opened.processor.image_processor
    resizes = bool(getattr(processor, "do_resize", True))
    yield from _normalization(opened, family)
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


def _normalization(opened: Opened, family: Family) -> Iterator[Finding]:
    black, white = (_middle(opened.pixels(Image.new("RGB", (64, 64), shade))) for shade in ("black", "white"))
    std = 1 / np.maximum(white - black, 1e-9)
    mean = -black * std
    if max(np.abs(mean - family.mean).max(), np.abs(std - family.std).max()) <= 1e-3:
        return
    found = f"pixels are normalised by mean {_listed(mean)} and deviation {_listed(std)}"
    expected = f"{_listed(family.mean)} and {_listed(family.std)}, as {opened.kind} was trained"
    if _may_be_inception(opened) and max(np.abs(mean - HALF[0]).max(), np.abs(std - HALF[1]).max()) <= 1e-3:
        consequence = (
            "That is right for what was fine-tuned from laion/CLIP-ViT-L-14-laion2B-s32B-b82K, and no other CLIP"
        )
        yield Finding("normalization", WARNING, found, expected, consequence)
    else:
        consequence = "The vision tower sees a range that it was never trained on: embeddings and answers change"
        yield Finding("normalization", ERROR, found, expected, consequence)


def _middle(pixels: np.ndarray) -> np.ndarray:
    """The middle pixel, [3]: what is smaller than the crop has a black rim."""
    return pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2].astype(np.float64)


def _may_be_inception(opened: Opened) -> bool:
    """Whether a CLIP of unknown origin has the vision tower of the one that was trained with another mean."""
    vision = opened.config.vision_config
    alike = all(getattr(vision, key, None) == value for key, value in INCEPTION_TOWER.items())
    return opened.kind == "clip" and alike and not any(re.search(pattern, opened.origins) for pattern, _ in LINEAGES)


def _sees_rims(opened: Opened) -> bool:
    """Whether the rims of a square image, an eighth of its width, leave a trace; the image is large."""
    side = 4 * max(opened.described.image_size)
    framed = Image.new("RGB", (side, side), "black")
    framed.paste("white", (side // 8, side // 8, side - side // 8, side - side // 8))
    return bool(np.ptp(opened.pixels(framed)[0]) > 0)


def _listed(values: Sequence[float] | np.ndarray) -> str:
    return "/".join(f"{value:.3g}" for value in values)


def stored_types(opened: Opened) -> Iterator[Finding]:
    """Half precision in the files."""
    types = {kind for path in opened.folder.glob("*.safetensors") for kind in _float_types(path)}
    if len(types) > 1:
        consequence = "The reference holds what is stored. So cosines do not show what rounding has cost already"
        yield Finding(
            "weights-dtype", WARNING, f"weights are stored in {' and '.join(sorted(types))}", "F32", consequence
        )
    elif types and types != {"F32"}:
        consequence = "The reference is these rounded weights. So cosines do not show what rounding has cost already"
        yield Finding("weights-dtype", WARNING, f"weights are stored in {types.pop()}", "F32", consequence)


def _float_types(path: Path) -> Iterator[str]:
    with safe_open(path, framework="numpy") as content:
        for name in content.keys():  # noqa: SIM118 - it is no dictionary
            kind = content.get_slice(name).get_dtype()
            if kind.startswith(("F", "BF")):
                yield kind


def weights(opened: Opened) -> Iterator[Finding]:
    """Those that the architecture needs and the files lack, have in another shape, or have besides."""
    model, loading = opened.loaded
    lacking = sorted(loading["missing_keys"])
    misshapen = sorted(entry[0] for entry in loading["mismatched_keys"])
    unused = sorted(name for name in loading["unexpected_keys"] if not name.endswith("position_ids"))
    if prefix := _prefix(lacking, unused):
        yield _prefixed(prefix, WRAPPERS.get(prefix, "a wrapper around the model"))
        return
    saved = _saved_model(opened) if lacking or unused else None
    behind = saved is not None and any(isinstance(part, type(model)) for part in saved.children())
    other = f": {type(saved).__name__} was saved, which holds no {type(model).__name__}" if saved and not behind else ""
    for names, what in ((lacking, f"missing{other}"), (misshapen, "of another shape than config.json says")):
        if names:
            found = f"{_some(names)} {'are' if len(names) > 1 else 'is'} {what}"
            consequence = "They would be random, and different in each run"
            yield Finding("missing-weights", ERROR, found, "all of the architecture's", consequence)
    head = sorted(set(unused) & set(saved.state_dict())) if saved and behind else []
    if head:
        found = f"{_some(head)} {'belong' if len(head) > 1 else 'belongs'} to {type(saved).__name__}'s head"
        yield Finding("unused-weights", WARNING, found, "the towers alone", "Layers behind the embeddings are left out")
    yield from _without_place([name for name in unused if name not in head])


def _without_place(names: list[str]) -> Iterator[Finding]:
    """Weights that no part of the model takes."""
    inner = [name for name in names if re.search(r"lora_|adapter|layers?\.\d+\.", name)]
    if names:
        consequence = "Layers or adapters that were trained would not be run" if inner else "What they hold is left out"
        found = f"{_some(inner or names)} {'fit' if len(inner or names) > 1 else 'fits'} nothing in the architecture"
        yield Finding("unused-weights", ERROR if inner else WARNING, found, "a place for each weight", consequence)


def _saved_model(opened: Opened) -> "PreTrainedModel | None":
    """The model that config.json names, without weights, where that is another class than the one that was loaded."""
    import torch
    import transformers

    names = None if is_open_clip(opened.folder) else opened.written.get("architectures")
    if not isinstance(names, list) or not names:
        return None
    try:
        kind = getattr(transformers, str(names[0]), None)
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            return None
        with torch.device("meta"):
            return None if isinstance(opened.loaded[0], kind) else kind(opened.config)
    except Exception:  # whatever transformers meets in settings that the towers do not need
        return None


def _prefix(lacking: list[str], unused: list[str]) -> str | None:
    """What stands before the names of weights that would fit without it, "module." say."""
    wanted = set(lacking)
    for name in unused:
        ends = (name.split(".", parts)[-1] for parts in range(1, name.count(".") + 1))
        if end := next((end for end in ends if end in wanted), None):
            return name.removesuffix(end)
    return None


def _prefixed(prefix: str, wrapper: str) -> Finding:
    way = f"{{name.removeprefix({prefix!r}): weight for name, weight in load_file(path).items()}}"
    save = f"save_file({way}, path, {{'format': 'pt'}})"
    consequence = f"No weight would be found. Remove the prefix with safetensors.torch: {save}"
    found = f"names of weights begin with {prefix!r}, as {wrapper} saves them"
    return Finding("missing-weights", ERROR, found, "the architecture's own names", consequence)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def alike(opened: Opened) -> Iterator[Finding]:
    """Whether different texts, and different images, get different embeddings, whatever the reason."""
    import torch

    model, given = opened.loaded[0], opened.described.example_texts
    levels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    pictures = np.stack([opened.prepared(Image.fromarray(image).resize((64, 64))) for image in levels])
    pixels = {name: torch.from_numpy(values) for name, values in image_feed(pictures).items()}
    inputs = {
        "texts": ("get_text_features", {name: torch.tensor(ids) for name, ids in given.items()}),
        "images": ("get_image_features", pixels),
    }
    for what, (method, values) in inputs.items():
        try:
            with torch.inference_mode():
                rows = torch.nn.functional.normalize(embeddings(model, method, **values).double(), dim=-1)
        except (ValueError, RuntimeError, IndexError):
            continue  # what does not fit is told by the other checks
        if bool(((rows @ rows.T) > 1 - ALIKE).all()):
            same_ids = what == "texts" and len({tuple(ids) for ids in given["input_ids"]}) == 1
            why = ", for the tokenizer gives them the same ids" if same_ids else ""
            found = f"three different {what} get one and the same embedding{why}"
            yield Finding("alike", ERROR, found, "three embeddings", f"Every answer about {what} would be chance")


CHECKS: tuple[Callable[[Opened], Iterator[Finding]], ...] = (
    code_of_its_own,
    left_out,
    activations,
    end_of_text,
    padding,
    vocabulary,
    unknown_words,
    clip_texts,
    stated,
    context,
    scale,
    images,
    stored_types,
    weights,
    alike,
)

# open_clip's configuration states activation, pooling and pixels itself, and its own code follows it.
OF_OPEN_CLIP = (left_out, vocabulary, context, scale, stored_types, weights, alike)
