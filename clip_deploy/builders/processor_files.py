"""What a deployment needs of a checkpoint besides its towers, as files that need neither torch nor transformers.

tokenizer.json for `tokenizers`, preprocessor.json for Pillow and numpy, scores.json for what turns cosines into
probabilities: each held to the checkpoint's own answer before it is kept.
"""

import json
import random
import string
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from clip_deploy.builders.open_clip_tokenizer import backend_of
from clip_deploy.checkpoint.load import load_model, load_processor
from clip_deploy.core.artifact import read_target
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.files import write_text
from clip_deploy.core.model import Model, as_images, image_feed
from clip_deploy.core.package import PREPROCESSOR, TOKENIZER
from clip_deploy.data.preprocessed import SCORES, pad_token_of, tokenize
from clip_deploy.inference.tokenizer import Tokenizer, shown
from clip_deploy.onnx_graph.postprocessing import logit_bias, logit_scale
from clip_deploy.onnx_graph.preprocessing import PROBES, read_preprocessing

if TYPE_CHECKING:
    from transformers import ProcessorMixin
    from transformers.image_processing_utils import BaseImageProcessor

CLOSE = 1e-4  # largest difference of pixel_values: float32's rounding gives 1e-6, a grey level 1e-2
ODD_TEXTS = (
    "a photo of a red circle",
    "A Photo of two CATS, isn't it?",
    "caf\u00e9 \u2014 \u6771\u4eac \U0001f408",
    "  one   two\nthree ",
    "red " * 300,
    "",
    " ",
    "! ?",
)
WORDS = """
a photo of two red circles that run along the beach at night small GREEN Square Cats isn't I'm we'll 2024 3.14 1,000
100% #1 naïve café résumé e\u0301 n\u0303 Straße GRÖSSE Москва ΔΡΟΜΟΣ İstanbul \u0131\u015f\u0131k 東京の夜景 红色 빨간
صورة תמונה लाल ภาพสีแดง \ufb01ne
\uff11\uff12\uff13 \uff21\uff42\uff43 ½ ™ \u2167 \ufdfa 🐈 \u2764\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467
"""
BETWEEN = [*" " * 10, *"\n\t\x1c\x85\xa0\xad\u200b\u200d\u2581\u3000\ufeff\uff01_-@\u2026"]
BETWEEN += ["", "  ", "\r\n", ", ", ". ", "!?", " & ", " / ", "'s ", "\u2019s ", " <", "> ", ' "', '" ', "://"]


def probe_texts() -> list[str]:
    """About 1,000 texts, always the same ones: many scripts, capitals, digits, signs, blanks, emoji, long ones."""
    draw, words = random.Random(0), WORDS.split()
    lengths = [draw.randrange(1, 30) for _ in range(1000)]
    drawn = ["".join(draw.choice(words) + draw.choice(BETWEEN) for _ in range(length)) for length in lengths]
    return [*ODD_TEXTS, *drawn[::2], *(draw.choice(BETWEEN) + text for text in drawn[1::2])]


def write_portable(checkpoint: Path, folder: Path) -> None:
    """Write tokenizer.json, preprocessor.json and scores.json of the target torch-fp32 into `folder`.

    What cannot be had so is left out, and scores.json says why: {"unavailable": {file: reason}, "logit_scale": float,
    "logit_bias": float or null, "activation": "softmax" or "sigmoid"}.
    """
    processor, model = load_processor(checkpoint), read_target(checkpoint).model
    unavailable: dict[str, str] = {}

    def attempt(name: str, write: Callable[[Path], Any]) -> Any:
        try:
            return write(folder / name)
        except UnavailableError as error:
            (folder / name).unlink(missing_ok=True)
            unavailable[name] = str(error)
        return {}

    attempt(TOKENIZER, lambda path: write_tokenizer(processor, model, path))
    attempt(PREPROCESSOR, lambda path: write_preprocessor(processor.image_processor, model, path))
    scores = attempt(SCORES, lambda path: _scores(checkpoint))
    write_text(folder / SCORES, json.dumps({**scores, "unavailable": unavailable}, indent=1) + "\n")


def _scores(checkpoint: Path) -> dict[str, Any]:
    """How the model turns cosines into probabilities."""
    model = load_model(checkpoint)
    bias = logit_bias(model)
    return {
        "logit_scale": logit_scale(model),
        "logit_bias": bias,
        "activation": "softmax" if bias is None else "sigmoid",
    }


def write_tokenizer(processor: "ProcessorMixin", model: Model, path: Path) -> None:
    """Write tokenizer.json, which cuts and pads as the model takes texts: whoever opens it need not know how.

    Raises UnavailableError where `tokenizers` alone gives other tokens than the checkpoint's own tokenizer.
    """
    name = type(processor.tokenizer).__name__
    write_text(path, _backend(processor.tokenizer).to_str())
    own = Tokenizer(path, model.context_length, model.pad_to_context, pad_token_of(processor))
    write_text(path, own.inner.to_str())
    texts = [*probe_texts(), *(f"a cat {token} or two" for token in processor.tokenizer.all_special_tokens)]
    expected = tokenize(processor, model, texts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a probe is meant to be cut
        actual = own(texts)
    for key in model.text_inputs:
        rows = zip(texts, actual[key].tolist(), getattr(expected, key).tolist(), strict=True)
        if other := [text for text, ours, wanted in rows if ours != wanted]:
            raise UnavailableError(
                f"{name} changes texts before its tokenizer.json sees them ({len(other)} of {len(texts)} get other "
                f"tokens, such as {shown(other[0])}): it cannot be packaged"
            )


def _backend(tokenizer: Any) -> Any:
    """The tokenizer as `tokenizers` has it, made anew where it is SigLIP's, which is SentencePiece behind Python."""
    name = type(tokenizer).__name__
    if name == "OpenClipTokenizer":
        return backend_of(tokenizer)
    if name == "SiglipTokenizer":
        return _of_sentencepiece(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnavailableError(f"{name} has no fast tokenizer: save the checkpoint with one (tokenizer.json)")
    return backend


def _of_sentencepiece(tokenizer: Any) -> Any:
    """SiglipTokenizer's vocabulary and what it does to texts, in its order (its tokenize and canonicalize_text).

    Raises UnavailableError where its model is no Unigram model.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.sp_model.serialized_model_proto())
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        raise UnavailableError(
            "the SentencePiece model of this SiglipTokenizer is not a Unigram model, and cannot be packaged: save a "
            'tokenizer.json, and set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json'
        )
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    made = Backend(models.Unigram(pieces, tokenizer.unk_token_id, model.trainer_spec.byte_fallback))
    made.normalizer = normalizers.Sequence(_canonical(tokenizer.do_lower_case, model.normalizer_spec))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    made.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    marks = {"lstrip": True, "rstrip": True, "normalized": False, "special": True}
    made.add_special_tokens([AddedToken(token, **marks) for token in tokenizer.all_special_tokens])
    return made


# Python lower-cases a sigma by its place in a word, `tokenizers` does not.
LAST_SIGMA = r"(?<=\p{Cased}|\p{Cased}\p{Case_Ignorable})\u03a3(?!\p{Case_Ignorable}*\p{Cased})"
BLANK = r"\s\x1c-\x1f"  # what Python's \s is, in `tokenizers`


def _canonical(lower: bool, spec: Any) -> list[Any]:
    from tokenizers import Regex
    from tokenizers.normalizers import NFKC, Lowercase, Precompiled, Replace, Strip

    signs = "".join(f"\\{sign}" for sign in string.punctuation)
    # Precompiled looks at a letter and its accents at once, and then misses what SentencePiece finds: compose first.
    composed = [NFKC()] if "nfkc" in spec.name else []
    return [
        Replace("\u2581", " "),
        Replace(Regex(rf"\A[{BLANK}\p{{Cc}}{signs}]+"), " "),  # not "": Metaspace looks where a text began
        *([Replace(Regex(LAST_SIGMA), "\u03c2"), Lowercase()] if lower else []),
        Replace(Regex(f"[{signs}]"), ""),
        Replace(Regex(f"[{BLANK}]+"), " "),
        *([*composed, Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []),
        Replace(Regex(" +"), " "),
        Strip(left=False, right=True),
    ]


def write_preprocessor(processor: "BaseImageProcessor", model: Model, path: Path) -> None:
    """Raises UnavailableError where Pillow and numpy alone give other pixels than the checkpoint's own processor."""
    record = read_preprocessing(processor, range(6))  # all of Pillow's filters
    write_text(path, json.dumps(asdict(record), indent=1) + "\n")
    rng = np.random.default_rng(0)
    for height, width in PROBES if record.resample is not None else [model.image_size]:
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        made = processor(noise, return_tensors="np", input_data_format="channels_last")
        expected, actual = (
            image_feed(as_images(made, model.image_dtype)),
            image_feed(record(Image.fromarray(noise))[None]),
        )
        if any(
            actual[name].shape != rows.shape or not np.abs(actual[name] - rows).max() < CLOSE
            for name, rows in expected.items()
        ):
            raise UnavailableError(
                f"{type(processor).__name__} prepares images in a way that Pillow and numpy alone cannot repeat: no "
                "package can be made"
            )
