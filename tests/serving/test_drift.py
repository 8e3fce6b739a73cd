import numpy as np
import pytest
from PIL import Image

from clip_deploy.__main__ import main
from clip_deploy.commands.drift import read_embeddings
from clip_deploy.core.errors import DataError
from clip_deploy.data import scenes
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.inference.embed import EmbedSettings, embed_folder
from clip_deploy.inference.embedding_sample import ROWS, EmbeddingSample
from clip_deploy.serving.drift import MAX_ROWS, MIN_ROWS, measure_drift


def cloud(rows, seed, shift=0.0, spread=1.0):
    """Embeddings around a direction of 16 dimensions."""
    rng = np.random.default_rng(seed)
    return 2.0 + shift * np.eye(16)[0] + spread * rng.standard_normal((rows, 16))


def test_two_samples_of_one_distribution_have_not_drifted():
    found = [measure_drift(cloud(120, seed), cloud(200, seed + 100), seed) for seed in range(10)]
    assert not any(drift.drifted for drift in found)
    assert found[0].rows == (120, 200)


@pytest.mark.parametrize(
    "moved", [{"shift": 1.0}, {"spread": 1.3}], ids=["another mean", "the same mean, spread further"]
)
def test_a_planted_drift_is_found(moved):
    drift = measure_drift(cloud(200, 1, **moved), cloud(200, 2))
    assert drift.drifted
    assert drift.mmd2 > drift.threshold
    assert drift.p_value == 0.001


def test_length_is_no_drift_and_a_new_kind_of_image_is():
    golden, live = cloud(200, 1), cloud(200, 2)
    assert not measure_drift(10 * live, golden).drifted
    live[:60] = -live[:60]  # a third of the traffic is something else
    assert measure_drift(live, golden).drifted


def test_the_same_seed_gives_the_same_answer_and_large_logs_are_sampled():
    golden, live = cloud(300, 1), cloud(MAX_ROWS + 500, 2)
    assert measure_drift(live, golden, seed=3) == measure_drift(live, golden, seed=3)
    assert measure_drift(live, golden).rows == (MAX_ROWS, 300)


@pytest.mark.parametrize(
    ("live", "message"),
    [
        (np.ones((MIN_ROWS - 1, 16)), "at least 20 rows"),
        (np.ones(16), "at least 20 rows"),
        (np.full((50, 16), np.nan), "NaN or infinities"),
        (np.ones((50, 8)), "8 dimensions and golden ones 16"),
    ],
    ids=["few", "one", "nan", "other model"],
)
def test_what_cannot_be_compared_is_refused(live, message):
    with pytest.raises(DataError, match=message):
        measure_drift(live, cloud(50, 1))


def test_the_command_says_what_it_found_by_its_exit_code(tmp_path, capsys):
    golden, same, moved = (tmp_path / f"{name}.npy" for name in ("golden", "same", "moved"))
    np.save(golden, cloud(200, 1))
    np.save(same, cloud(200, 2))
    np.savez(tmp_path / "moved.npz", images=cloud(200, 2, shift=1.0))
    assert main(["drift", str(same), str(golden)]) == 0
    assert capsys.readouterr().out.startswith("no drift: ")
    assert main(["drift", str(moved.with_suffix(".npz")), str(golden)]) == 3
    assert capsys.readouterr().out.startswith("drift: ")


def test_what_embed_writes_is_a_sample(package, tmp_path, capsys):
    """From pictures to the answer: 40 like the golden ones and 40 of noise."""
    classifier = ZeroShotClassifier.open(package, threads=1)
    rng = np.random.default_rng(0)
    for index in range(120):
        image = scenes.render("drift", index, index % len(scenes.CLASSES))[0]
        name = f"golden/{index}.png" if index < 60 else f"{'live' if index < 100 else 'noise'}/{index}.png"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if index >= 100:
            image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
        image.save(tmp_path / name)
    for name in ("golden", "live", "noise"):
        embed_folder(
            classifier,
            tmp_path / name,
            tmp_path / f"{name}-out",
            EmbedSettings(8, 16, "int8" if name == "live" else "float32"),
        )
    golden = str(tmp_path / "golden-out")
    assert main(["drift", str(tmp_path / "live-out"), golden]) == 0
    assert "40 live rows, 60 golden" in capsys.readouterr().out
    assert main(["drift", f"file://{tmp_path}/noise-out", golden]) == 3
    embed_folder(classifier, tmp_path / "live", tmp_path / "signs", EmbedSettings(8, 40, "binary"))
    assert main(["drift", str(tmp_path / "signs"), golden]) == 1
    assert "it holds only signs (`embed --dtype binary`)" in capsys.readouterr().err
    assert main(["drift", str(tmp_path / "noise-out" / "part-00000.parquet"), golden]) == 1
    assert "live embeddings have shape [16, 64]: give at least 20 rows" in capsys.readouterr().err


def test_a_classifier_keeps_a_sample_of_what_it_embeds(package, tmp_path, capsys):
    images = [scenes.render("sample", index, index % len(scenes.CLASSES))[0] for index in range(120)]
    classifier = ZeroShotClassifier.open(package, threads=1, sample_folder=tmp_path / "live", sample_share=1)
    made = classifier.embed_images(images)
    assert np.array_equal(read_embeddings(str(tmp_path / "live")), np.concatenate(_by_file(tmp_path / "live")))
    kept = {row.tobytes() for row in read_embeddings(str(tmp_path / "live"))}
    assert kept == {row.tobytes() for row in made[: 120 // ROWS * ROWS]}
    np.save(tmp_path / "golden.npy", made)
    assert main(["drift", str(tmp_path / "live"), str(tmp_path / "golden.npy")]) == 0
    assert "100 live rows" in capsys.readouterr().out


def _by_file(folder):
    return [np.load(path) for path in sorted(folder.iterdir())]


def test_a_sample_is_as_large_as_asked_for(tmp_path):
    sample = EmbeddingSample(tmp_path, 0.1)
    sample.random = np.random.default_rng(0)
    for _ in range(20):
        sample.add(np.ones((500, 4), np.float32))
    assert sum(map(len, _by_file(tmp_path))) == pytest.approx(1000, abs=100)


def test_a_disk_that_fails_ends_the_sampling_and_not_the_service(package, tmp_path):
    (tmp_path / "file").write_text("no folder")
    classifier = ZeroShotClassifier.open(package, threads=1, sample_folder=tmp_path / "file", sample_share=1)
    images = [scenes.render("sample", 0, 0)[0]] * ROWS
    with pytest.warns(UserWarning, match="no more embeddings are sampled: "):
        assert classifier.embed_images(images).shape == (ROWS, 64)
    assert len(classifier.embed_images(images)) == ROWS  # no second warning: none is caught here
    assert classifier.sample.held == []


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(package, tmp_path, share):
    with pytest.raises(DataError, match=r"sample_share is .*: give more than 0 and at most 1"):
        ZeroShotClassifier.open(package, sample_folder=tmp_path, sample_share=share)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "(it holds no embeddings): give a .npy"),
        ({"a.npy": b"PK\x03\x04torn"}, "cannot read"),
        ({"a.parquet": b"PAR1"}, "a.parquet cannot be read"),
    ],
)
def test_a_folder_without_embeddings_is_named(tmp_path, capsys, content, said):
    for name, written in content.items():
        (tmp_path / name).write_bytes(written)
    assert main(["drift", str(tmp_path), str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ("none.npy", "error: cannot read none.npy"),
        ("none", "error: cannot read none (no such file or folder): give a .npy"),
        ("text.npy", "error: cannot read text.npy"),
        ("text.txt", "error: cannot read text.txt (a file of another kind): give a .npy"),
    ],
)
def test_a_sample_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys, sample, said):
    monkeypatch.chdir(tmp_path)
    for ending in ("npy", "txt"):
        (tmp_path / f"text.{ending}").write_text("no array")
    assert main(["drift", sample, sample]) == 1
    assert capsys.readouterr().err.startswith(said)
