import json
import shutil
import warnings

import numpy as np
import pytest
import tokenizers
from support.models import sentencepiece_model
from transformers import AutoTokenizer, Siglip2Tokenizer, SiglipTokenizer

from clip_deploy.builders.processor_files import probe_texts, write_tokenizer
from clip_deploy.checkpoint.load import load_processor
from clip_deploy.checkpoint.verify import verify
from clip_deploy.core.artifact import read_target
from clip_deploy.core.errors import CheckpointError, DataError, UnavailableError
from clip_deploy.data.preprocessed import tokenize
from clip_deploy.inference.tokenizer import Tokenizer, check_texts


@pytest.fixture
def tokens(package):
    return Tokenizer(package / "tokenizer.json", 32, False, 586)


def whole(path):
    """A tokenizer.json whose texts are neither cut nor padded."""
    packed = tokenizers.Tokenizer.from_file(str(path))
    packed.no_truncation()
    packed.no_padding()
    return packed


@pytest.mark.parametrize("name", ["checkpoint", "siglip", "siglip2", "chinese_clip"])
def test_tokens_are_those_of_the_checkpoints_tokenizer(name, tmp_path, request):
    family = request.getfixturevalue(name)
    processor, model = load_processor(family), read_target(family).model
    pad = processor.tokenizer.pad_token_id or 0
    write_tokenizer(processor, model, tmp_path / "tokenizer.json")
    ours = Tokenizer(tmp_path / "tokenizer.json", model.context_length, model.pad_to_context, pad)
    texts = ["a photo of a red circle", "x", "A large BLUE star left of a hexagon!", " 東京\u3000Straße\n", "</s> b"]
    expected = tokenize(processor, model, texts)
    with warnings.catch_warnings(action="ignore"):
        actual = ours(texts)
    for name in model.text_inputs:
        assert np.array_equal(actual[name], getattr(expected, name))


@pytest.mark.parametrize("name", ["checkpoint", "siglip", "siglip2", "chinese_clip"])
def test_a_program_that_has_tokenizers_alone_gets_texts_cut_and_padded(name, tmp_path, request):
    family = request.getfixturevalue(name)
    processor, model = load_processor(family), read_target(family).model
    write_tokenizer(processor, model, tmp_path / "tokenizer.json")
    texts = ["a photo of a red circle", "x", "red " * 300]
    encoded = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode_batch(texts)
    expected = tokenize(processor, model, texts)
    assert [row.ids for row in encoded] == expected.input_ids.tolist()
    if "attention_mask" in model.text_inputs:
        assert [row.attention_mask for row in encoded] == expected.attention_mask.tolist()


def test_siglips_tokens_are_those_of_sentencepiece_without_it(siglip, tmp_path, kinds):
    """Case, signs, blanks, composed letters, a sigma that ends a word: as SiglipTokenizer reads them."""
    processor, model = load_processor(siglip), read_target(siglip).model
    write_tokenizer(processor, model, tmp_path / "tokenizer.json")
    packed = whole(tmp_path / "tokenizer.json")
    texts = probe_texts()
    own = [ids[:-1] for ids in processor.tokenizer(texts)["input_ids"]]  # the last ends the text
    assert [encoded.ids[:-1] for encoded in packed.encode_batch(texts)] == own
    assert packed.encode(" A photo:\tof a RED circle!").ids == packed.encode("a photo of a red circle").ids
    unknown = sum(ids.count(2) for ids in own) / sum(map(len, own))
    assert unknown < 0.2  # the texts are not all unknown words
    kinds(
        "09: SigLIP 1, whose tokenizer is a spiece.model",
        before="refused: sentencepiece was not in the lock; with it, no package (no fast tokenizer)",
        now=f"packaged; {len(texts):,} texts get SiglipTokenizer's tokens",
    )


def test_a_sentencepiece_model_of_another_kind_is_not_packaged(siglip, tmp_path):
    processor, model = load_processor(siglip), read_target(siglip).model
    (tmp_path / "spiece.model").write_bytes(sentencepiece_model("bpe"))
    processor.tokenizer = SiglipTokenizer(str(tmp_path / "spiece.model"), model_max_length=16)
    with pytest.raises(UnavailableError, match="is not a Unigram model, and cannot be packaged"):
        write_tokenizer(processor, model, tmp_path / "tokenizer.json")


def test_siglip_is_read_from_its_tokenizer_json_where_that_is_asked_for(siglip, tmp_path):
    processor, model = load_processor(siglip), read_target(siglip).model
    folder = shutil.copytree(siglip, tmp_path / "siglip")
    write_tokenizer(processor, model, folder / "tokenizer.json")
    (folder / "spiece.model").unlink()
    with pytest.raises(CheckpointError, match=r'spiece\.model is missing, .*"tokenizer_class": "PreTrainedTok'):
        verify(folder)
    stated = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    verify(folder)
    texts = ["A photo of a RED circle!", "x"]
    assert tokenize(load_processor(folder), model, texts).input_ids.tolist() == (
        tokenize(processor, model, texts).input_ids.tolist()
    )
    write_tokenizer(load_processor(folder), model, tmp_path / "tokenizer.json")


def test_siglip_2_reads_capitals_as_small_letters_in_the_pipeline_and_in_the_package(siglip2, tmp_path, kinds):
    processor, model = load_processor(siglip2), read_target(siglip2).model
    given = ["A Photo of a RED Circle", "a photo of a red circle"]
    alone = AutoTokenizer.from_pretrained(siglip2)(given)["input_ids"]
    assert alone[0] != alone[1]
    own = Siglip2Tokenizer(vocab=processor.tokenizer._vocab, merges=processor.tokenizer._merges)
    expected = [[*own(text, add_special_tokens=False)["input_ids"], 1] for text in probe_texts()]
    assert processor.tokenizer(probe_texts())["input_ids"] == expected
    write_tokenizer(processor, model, tmp_path / "tokenizer.json")
    packed = whole(tmp_path / "tokenizer.json")
    assert [encoded.ids for encoded in packed.encode_batch(probe_texts())] == expected
    kinds(
        "06: SigLIP 2, which states do_lower_case",
        before="ignored: 'A Photo of a RED Circle' got other tokens than in lower case, in pipeline and package",
        now=f"{len(expected):,} texts get Siglip2Tokenizer's tokens, in pipeline and package",
    )


def test_a_tokenizer_that_changes_texts_in_python_is_refused(checkpoint, tmp_path):
    processor, model = load_processor(checkpoint), read_target(checkpoint).model
    original = processor.tokenizer

    class Shouting:
        backend_tokenizer = original.backend_tokenizer
        pad_token_id = original.pad_token_id
        all_special_tokens = original.all_special_tokens

        def __call__(self, texts, **options):
            return original([text.replace("a", "b") for text in texts], **options)

    processor.tokenizer = Shouting()
    with pytest.raises(UnavailableError, match=r"Shouting changes .* \(\d+ of 1010 get other tokens, such as 'a photo"):
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
        (["\udcff"], "text 1 of 1 is not valid Unicode"),
    ],
)
def test_texts_that_say_nothing_are_refused(texts, said):
    with pytest.raises(DataError, match=said):
        check_texts(texts)
