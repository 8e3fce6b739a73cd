import shutil

import numpy as np
import pytest

from clip_deploy.core.errors import DiskError
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.web import libraries, process, validation


@pytest.fixture(scope="module")
def prepared(sets):
    return load_prepared(sets / "evaluation")


def test_a_served_package_answers_as_itself_and_refuses_every_mistake(package, prepared):
    record = validation.check_http(package, prepared, 0)
    assert (record.status, record.reasons) == ("pass", [])
    found = {row.kind: row for row in record.answers.requests}
    assert found["mistake"].asked == found["mistake"].refused >= 30
    assert found["oversized"].asked == found["oversized"].refused > 0
    assert sum(row.answered for row in record.answers.requests) > 300
    assert found["a text"].cosine_min > 0.9999
    assert found["image, PNG"].cosine_min > 0.9999
    assert record.answers.min_cosine == 0.9999


def test_a_server_that_mixes_answers_up_fails(package, prepared, monkeypatch):
    monkeypatch.setattr(process, "PROGRAM", ("-m", "tests.support.broken_server", "one for all"))
    record = validation.check_http(package, prepared, 0)
    assert record.status == "fail"
    assert sum(row.wrong for row in record.answers.requests) > 0
    assert any("wrong" in reason for reason in record.reasons)


def test_a_server_that_does_not_start_fails_with_its_reason(package, prepared, monkeypatch):
    monkeypatch.setattr(process, "PROGRAM", ("-c", "raise SystemExit('no such thing')"))
    record = validation.check_http(package, prepared, 0)
    assert (record.status, record.answers) == ("fail", None)
    assert "no such thing" in record.reasons[0]


def test_without_the_extra_it_is_unavailable(package, prepared, monkeypatch):
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == "uvicorn" else name)
    record = validation.check_http(package, prepared, 0)
    assert (record.status, record.answers) == ("unavailable", None)
    assert record.reasons == ["serve needs uvicorn: pip install 'clip-deploy[serve]'"]


def test_a_package_that_was_changed_stops_the_run(package, prepared, tmp_path):
    copy = shutil.copytree(package, tmp_path / "package")
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(DiskError, match=r"tokenizer\.json is not the file that was packaged"):
        validation.check_http(copy, prepared, 0)


def test_the_evaluation_sets_pictures_and_the_packages_prompts_are_asked_about(package, prepared):
    classifier = ZeroShotClassifier.open(package, threads=2)
    pictures = validation.pictures(classifier, prepared)
    values = np.stack([classifier.preprocessor(picture) for picture in pictures])
    assert np.abs(values - prepared.pixel_values[: len(pictures)]).max() < 1e-5
    assert set(classifier.class_prompts()) <= set(validation.texts(classifier))
