import warnings

import numpy as np
import pytest

from clip_deploy.checkpoint import load_processor
from clip_deploy.core.artifact import read_target
from clip_deploy.core.errors import DataError, UnavailableError
from clip_deploy.portable import write_tokenizer
from clip_deploy.prepared import tokenize
from clip_deploy.tokens import Tokenizer, check_texts


@pytest.fixture
def tokens(package):
    return Tokenizer(package / "tokenizer.json", 32, False, 586)


def test_tokens_are_those_of_the_checkpoints_tokenizer(family, tmp_path):
    processor, model = load_processor(family), read_target(family).model
    pad = processor.tokenizer.pad_token_id or 0
    write_tokenizer(processor, model, tmp_path / "tokenizer.json")
    ours = Tokenizer(tmp_path / "tokenizer.json", model["context_length"], model["pad_to_context"], pad)
    texts = ["a photo of a red circle", "x", "a large blue star left of a pink hexagon"]
    expected = tokenize(processor, model, texts)
    with warnings.catch_warnings(action="ignore"):
        actual = ours(texts)
    for name in model["text_inputs"]:
        assert np.array_equal(actual[name], getattr(expected, name))


def test_a_tokenizer_that_changes_texts_in_python_is_refused(checkpoint, tmp_path):
    processor, model = load_processor(checkpoint), read_target(checkpoint).model
    original = processor.tokenizer

    class Shouting:
        backend_tokenizer = original.backend_tokenizer
        pad_token_id = original.pad_token_id

        def __call__(self, texts, **options):
            return original([text.replace("a", "b") for text in texts], **options)

    processor.tokenizer = Shouting()
    with pytest.raises(UnavailableError, match="Shouting changes texts before its tokenizer"):
        write_tokenizer(processor, model, tmp_path / "tokenizer.json")


def test_a_long_text_is_cut_with_a_warning_that_names_it(tokens):
    with pytest.warns(UserWarning, match="longer than 32 tokens and was cut: 'red red"):
        ids = tokens(["red " * 100])["input_ids"]
    assert ids.shape == (1, 32)
    assert ids[0, -1] == 586  # the end of the text is kept


def test_a_text_that_fits_is_no_warning(tokens):
    with warnings.catch_warnings(action="error"):
        assert tokens(["a red circle", "a"])["attention_mask"].sum(axis=1).tolist() == [6, 3]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "there are no texts: give one or more"),
        (["a", " "], r"text 2 of 2 is ' ': give words"),
        ("a red circle", "texts is one string, 'a red circle': give a list of strings"),
        ([None], "text 1 of 1 is None"),
        (["\udcff"], "text 1 of 1 is no valid Unicode"),
    ],
)
def test_texts_that_say_nothing_are_refused(texts, said):
    with pytest.raises(DataError, match=said):
        check_texts(texts)
