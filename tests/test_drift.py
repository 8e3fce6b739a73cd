import numpy as np
import pytest

from clip_deploy.core.errors import DataError
from clip_deploy.serving.drift import LEAST_ROWS, MOST_ROWS, compare
from stages.drift import main


def cloud(rows, seed, shift=0.0, spread=1.0):
    """Embeddings around a direction of 16 dimensions."""
    rng = np.random.default_rng(seed)
    return 2.0 + shift * np.eye(16)[0] + spread * rng.standard_normal((rows, 16))


def test_two_samples_of_one_distribution_have_not_drifted():
    found = [compare(cloud(120, seed), cloud(200, seed + 100), seed) for seed in range(10)]
    assert not any(drift.drifted for drift in found)
    assert found[0].rows == (120, 200)


@pytest.mark.parametrize(
    "moved", [{"shift": 1.0}, {"spread": 1.3}], ids=["another mean", "the same mean, spread further"]
)
def test_a_planted_drift_is_found(moved):
    drift = compare(cloud(200, 1, **moved), cloud(200, 2))
    assert drift.drifted
    assert drift.mmd2 > drift.threshold
    assert drift.p_value == 0.001


def test_length_is_no_drift_and_a_new_kind_of_image_is():
    golden, live = cloud(200, 1), cloud(200, 2)
    assert not compare(10 * live, golden).drifted
    live[:60] = -live[:60]  # a third of the traffic is something else
    assert compare(live, golden).drifted


def test_the_same_seed_gives_the_same_answer_and_large_logs_are_sampled():
    golden, live = cloud(300, 1), cloud(MOST_ROWS + 500, 2)
    assert compare(live, golden, seed=3) == compare(live, golden, seed=3)
    assert compare(live, golden).rows == (MOST_ROWS, 300)


@pytest.mark.parametrize(
    ("live", "message"),
    [
        (np.ones((LEAST_ROWS - 1, 16)), "at least 20 rows"),
        (np.ones(16), "at least 20 rows"),
        (np.full((50, 16), np.nan), "NaN or infinities"),
        (np.ones((50, 8)), "8 dimensions and golden ones 16"),
    ],
    ids=["few", "one", "nan", "other model"],
)
def test_what_cannot_be_compared_is_refused(live, message):
    with pytest.raises(DataError, match=message):
        compare(live, cloud(50, 1))


def test_the_command_says_what_it_found_by_its_exit_code(tmp_path, capsys):
    golden, same, moved = (tmp_path / f"{name}.npy" for name in ("golden", "same", "moved"))
    np.save(golden, cloud(200, 1))
    np.save(same, cloud(200, 2))
    np.savez(tmp_path / "moved.npz", images=cloud(200, 2, shift=1.0))
    assert main([str(same), str(golden)]) == 0
    assert capsys.readouterr().out.startswith("no drift: ")
    assert main([str(moved.with_suffix(".npz")), str(golden)]) == 3
    assert capsys.readouterr().out.startswith("drift: ")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, ""),
        ([], 2, "two files are needed, 0 given"),
        (["none.npy", "none.npy"], 1, "error: cannot read none.npy"),
        (["{text}", "{text}"], 1, "error: cannot read"),
    ],
)
def test_the_command_explains_itself(tmp_path, capsys, arguments, code, said):
    text = tmp_path / "text.npy"
    text.write_text("no array")
    assert main([argument.format(text=text) for argument in arguments]) == code
    assert said in capsys.readouterr().err
