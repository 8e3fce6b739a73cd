"""Whether the reference itself is in doubt: at chance, or blind to what it is given."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import CLIPProcessor

from clip_deploy.core.artifact import read_target
from clip_deploy.core.config import DataConfig, GatesConfig
from clip_deploy.data.dataset import load
from clip_deploy.data.preprocessed import Contents, load_prepared, write_prepared
from clip_deploy.evaluate.chance import chance, closeness, doubts, most_by_chance
from clip_deploy.evaluate.embeddings import Embeddings, encode_set, load_embeddings, save_embeddings
from clip_deploy.evaluate.gates import failures_now
from clip_deploy.evaluate.validation import validate
from clip_deploy.runtimes import open_encoder

NONE = Contents(0, 0, [], [], 0, [])


def test_the_built_in_model_is_in_no_doubt(sets):
    prepared, reference = load_prepared(sets / "evaluation"), load_embeddings(sets / "evaluation" / "reference.npz")
    assert doubts(reference, prepared) == []
    prepared.contents.classes = []  # by its captions
    assert doubts(reference, prepared) == []


@pytest.mark.parametrize(
    ("count", "rate", "most"),
    [(10, 0.5, 8), (960, 1 / 48, 29), (8, 1 / 48, 1), (4, 0.5, 4), (100_000, 0.001, 120), (5, 1.0, 5), (5, 0.0, 0)],
)
def test_chances_upper_end_is_that_of_the_exact_binomial(count, rate, most):
    """P(X > most) <= 0.025 < P(X >= most): 0.011 and 0.055 for 10 tosses of a coin."""
    assert most_by_chance(count, rate) == most


def test_who_always_names_the_commonest_class_answers_by_chance():
    relevant = np.eye(2, dtype=bool)[[0] * 9 + [1]]
    assert chance(np.zeros(10, dtype=int), relevant) == pytest.approx(0.9)
    assert chance(np.array([0] * 9 + [1]), relevant) == pytest.approx(0.82)  # and is right ten times of ten
    assert chance(np.array([1] * 10), relevant) == 0.5


def test_closeness_is_1_where_all_have_one_embedding():
    one = np.tile(np.random.default_rng(0).normal(size=64), (20, 1))
    assert closeness(one * np.arange(1, 21)[:, None]) == pytest.approx(1, abs=1e-12)
    assert closeness(np.eye(4)) == pytest.approx(0.5)


def test_texts_that_share_one_embedding_are_named_even_where_no_class_is_asked():
    rng = np.random.default_rng(0)
    reference = Embeddings(rng.normal(size=(6, 8)), np.ones((6, 8)) + 1e-4 * rng.normal(size=(6, 8)), np.empty((0, 8)))
    prepared = SimpleNamespace(contents=NONE, caption_image=np.arange(6), caption_text=np.arange(6))
    found = doubts(reference, prepared)
    assert "torch-fp32 gives all texts nearly one embedding: their median cosine with the mean is 1.00000" in found[-1]
    same = SimpleNamespace(contents=NONE, caption_image=np.arange(6), caption_text=np.zeros(6, dtype=int))
    assert doubts(reference, same) == []  # all images have one caption: there is nothing to tell apart


@pytest.fixture(scope="module")
def blind(checkpoint, tmp_path_factory):
    """The built-in model, and an evaluation set whose texts a tokenizer without its vocabulary read.

    transformers makes an empty one. `download` may refuse that very checkpoint: this stands for what no one looks for.
    """
    folder = tmp_path_factory.mktemp("blind")
    shutil.copytree(checkpoint, folder / "torch-fp32")
    shutil.copytree(checkpoint, folder / "lost")
    (folder / "lost" / "tokenizer.json").unlink()
    processor, model = CLIPProcessor.from_pretrained(folder / "lost"), read_target(checkpoint).model
    data = DataConfig(evaluation_samples=96, calibration_samples=16, templates=["a photo of a {}"])
    (folder / "evaluation").mkdir()
    write_prepared("evaluation", load(data, 0), data.templates, processor, model, folder / "evaluation")
    embeddings = encode_set(open_encoder(checkpoint), load_prepared(folder / "evaluation"))
    save_embeddings(embeddings, folder / "evaluation" / "reference.npz")
    return folder


def check(folder, gates, trained=True):
    """What validate says of the blind target."""
    described = json.loads((folder / "torch-fp32" / "target.json").read_text())
    described["model"]["trained"] = trained
    (folder / "torch-fp32" / "target.json").write_text(json.dumps(described))
    evaluation = folder / "evaluation"
    return validate(folder / "torch-fp32", load_prepared(evaluation), evaluation / "reference.npz", gates, 0)


def test_a_reference_at_chance_is_said_and_fails_every_target_where_the_gates_ask_for_more(blind, kinds):
    record = check(blind, GatesConfig())
    assert record.status == "pass"  # against itself it is as good as ever
    at_chance, one_embedding = record.doubts
    assert at_chance.startswith(
        "torch-fp32 itself answers no better than chance: 2 of 96 images right (2.1 %, 48 classes), where chance "
        "gives 2.1 %, and up to 5 images in 97.5 % of cases. Look at its tokenizer"
    )
    assert one_embedding.startswith("torch-fp32 gives all texts nearly one embedding: their median cosine")
    refused = check(blind, GatesConfig(above_chance=True))
    assert (refused.status, refused.reasons) == (
        "fail",
        [f"{at_chance} (gates.above_chance)", f"{one_embedding} (gates.above_chance)"],
    )
    assert refused.diagnosis is None  # no layer is to blame
    assert [miss.quantity for miss in failures_now(record, GatesConfig(above_chance=True))] == [
        at_chance,
        one_embedding,
    ]
    kinds(
        "02: a reference at chance",
        before='top-1 2.1 % of 48 classes, all rows pass, "Ship ort-fp32"',
        now=f"{at_chance}. {one_embedding}. With gates.above_chance every target fails",
    )


def test_random_weights_are_in_no_doubt_as_nothing_is_asked_of_them(blind):
    record = check(blind, GatesConfig(above_chance=True), trained=False)
    assert (record.status, record.doubts) == ("pass", [])
