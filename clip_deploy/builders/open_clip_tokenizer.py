"""open_clip's tokenizers as `tokenizers` has them: its BPE, or one of transformers, behind its cleaning of texts.

ftfy, with which open_clip cleans, also guesses which encoding a text was garbled by; and html.unescape knows 2,231
names. `tokenizers` can do neither: of the first nothing is done, of the second the names of ENTITIES.
"""

import json
import string
from copy import deepcopy
from typing import Any

# What a text's own characters become in ftfy.fix_text: https://ftfy.readthedocs.io/en/latest/fixes.html
CONTROLS = r"\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufff9-\ufffc\ufeff"
TERMINAL = r"\x1b\[((?:\d|;)*)([a-zA-Z])"
LINE_BREAKS = r"\r\n|[\r\u2028\u2029]"  # and U+0085, which is taken for Windows' "…" before
SINGLE_QUOTES, DOUBLE_QUOTES = "\u02bc\u2018\u2019\u201a\u201b", "\u201c\u201d\u201e\u201f"
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&#x27;": "'", "&nbsp;": "\u00a0"}
BLANK = r"\s\x1c-\x1f"  # what Python's str.split takes for one, in `tokenizers`
LAST_SIGMA = r"(?<=\p{Cased}|\p{Cased}\p{Case_Ignorable})\u03a3(?!\p{Case_Ignorable}*\p{Cased})"
PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # open_clip's SimpleTokenizer.pat


def backend_of(tokenizer: Any) -> Any:
    """A `tokenizers.Tokenizer` for checkpoint.open_clip.OpenClipTokenizer."""
    from tokenizers import normalizers

    inner = tokenizer.inner
    made = _of_bpe(tokenizer.own) if inner is None else deepcopy(inner.backend_tokenizer)
    if tokenizer.cleaning == "canonicalize":
        made = _without_names(made)
    given = [] if made.normalizer is None else [made.normalizer]
    made.normalizer = normalizers.Sequence([*_cleaned(tokenizer.cleaning), *given])
    return made


def _without_names(made: Any) -> Any:
    """The same, finding no special token in a text by its name: cleaning leaves nothing of the name's signs."""
    content = json.loads(made.to_str())
    known = made.get_vocab(with_added_tokens=False)
    found = content["added_tokens"]
    content["added_tokens"] = [
        token for token in found if token["content"] not in known or not set(token["content"]) & set(string.punctuation)
    ]
    return type(made).from_str(json.dumps(content))


def _of_bpe(own: Any) -> Any:
    """open_clip's SimpleTokenizer, without its cleaning."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    merges = [pair for pair, _ in sorted(own.bpe_ranks.items(), key=lambda item: item[1]) if len(pair) == 2]
    made = Tokenizer(models.BPE(vocab=dict(own.encoder), merges=merges, end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start, end = ((own.decoder[token], token) for token in (own.sot_token_id, own.eot_token_id))
    made.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A {end[0]}", special_tokens=[start, end])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(own.decoder[token], normalized=False) for token in own.all_special_ids])
    return made


def _cleaned(kind: str) -> list[Any]:
    """open_clip's cleaning: "lower", "whitespace" or "canonicalize"."""
    from tokenizers import Regex
    from tokenizers.normalizers import Lowercase, Replace, Strip

    signs = "".join(f"\\{sign}" for sign in string.punctuation if sign != "_")
    canonical = [Replace("_", " "), Replace(Regex(f"[{signs}]"), "")] if kind == "canonicalize" else []
    lower = [] if kind == "whitespace" else [Replace(Regex(LAST_SIGMA), "\u03c2"), Lowercase()]
    blanks = [Replace(Regex(f"[{BLANK}]+"), " "), Strip()]
    return [*_fixed(), *canonical, *lower, *blanks]


def _fixed() -> list[Any]:
    """What ftfy.fix_text and html.unescape do to single characters, in their order."""
    from ftfy.chardata import LIGATURES, WIDTH_MAP
    from tokenizers import Regex
    from tokenizers.normalizers import NFC, Replace

    letters = {chr(code): text for code, text in {**LIGATURES, **WIDTH_MAP}.items()}
    letters |= {chr(code): text for code in range(0x80, 0xA0) if (text := _of_windows(code))}
    return [
        Replace(Regex(TERMINAL), ""),
        *(Replace(sign, text) for sign, text in letters.items()),
        Replace(Regex(f"[{SINGLE_QUOTES}]"), "'"),
        Replace(Regex(f"[{DOUBLE_QUOTES}]"), '"'),
        Replace(Regex(LINE_BREAKS), "\n"),
        Replace(Regex(f"[{CONTROLS}]"), ""),
        NFC(),
        *(Replace(entity, text) for entity, text in ENTITIES.items()),
    ]


def _of_windows(code: int) -> str:
    """What a control character of Latin-1 is in Windows-1252, and "" where that has none either."""
    return bytes([code]).decode("windows-1252", errors="ignore")
