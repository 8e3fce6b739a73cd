"""Whole records, as validate, benchmark and recommend write them, where a test says only what matters to it."""

from clip_deploy.core.records import Measured, Parity, Retrieval, Timing, ZeroShot
from clip_deploy.core.served import Answers, Asked, Drift, Served
from clip_deploy.report.decisive import Judged

HARDWARE = {
    "system": "Linux x86_64",
    "cpu": "EPYC",
    "cores": 2,
    "instruction_sets": ["avx2"],
    "memory_gb": 8,
    "gpus": [],
    "machine": None,
}


def parity(cosine_min=1.0, finite=True):
    return Parity(cosine_min, cosine_p1=1.0, cosine_mean=1.0, max_abs_diff=0.0, finite=finite)


def zero_shot(**changes):
    sound = {"top1": 90.0, "top5": 99.0, "reference_top1": 90.0, "top1_drop": 0.0, "mcnemar_p": 1.0}
    return ZeroShot(**{**sound, "top1_drop_low": 0.0, "top1_drop_high": 0.0, **changes})


def retrieval(**changes):
    recalls = {f"{way}_r{k}": 90.0 for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    return Retrieval(**{**recalls, **changes})


def measured(**changes):
    sound = {
        "parity": {"vision": parity(), "text": parity()},
        "shapes": {"vision, batch 3": 0.9999},
        "zero_shot": zero_shot(),
        "flips": 0.25,
        "evaluation": "0" * 64,
    }
    return Measured(**{**sound, **changes})


def timing(**changes):
    """As far from the reference as `changes` say, else three times as fast; p50 is what they lead to."""
    known = {"reference_p50_ms": 6.0, "speedup": 3.0, **changes}
    p50_ms = known["reference_p50_ms"] / known["speedup"]
    sound = {
        "p50_ms": p50_ms,
        "p50_low_ms": 0.95 * p50_ms,
        "p50_high_ms": 1.05 * p50_ms,
        "calls": 20,
        "throughput_per_s": 500.0,
        "speedup": 3.0,
        "speedup_low": 2.9,
        "speedup_high": 3.1,
        "reference_p50_ms": 6.0,
    }
    return Timing(**{**sound, **changes})


def judged(unstable=False, undecided=False, **changes):
    return Judged(**vars(timing(**changes)), unstable=unstable, undecided=undecided)


def checked(**changes):
    """What stands in reports/validate/ of a target that passed, but for `changes`."""
    from clip_deploy.core.parsing import plain

    sound = {"status": "pass", "reasons": [], "precision": "fp32", "runtime": "ort", "device": "cpu", "build": {}}
    return {**sound, "trained": True, "doubts": [], **plain(measured()), **changes}


def advised(targets, **changes):
    """What stands in reports/recommendation.json; `targets` says what matters of each."""
    sound = {"status": "pass", "reasons": [], "runtime": "ort", "precision": "fp32", "device": "cpu", "files": {}}
    sound["batch_sizes"] = {"vision": [1, 2, 4], "text": [1, 2]}
    known = {name: {**sound, "metrics": {}, **target} for name, target in targets.items()}
    empty = {name: {} for name in ("limits", "ship", "pairs", "alike", "summary", "losers")}
    return {**empty, "note": "as asked", "doubts": [], "front": [], "targets": known, **changes}


def drift(drifted):
    return Drift(0.035, threshold=0.0021, p_value=0.001, mean_cosine=0.91, rows=(480, 480), drifted=drifted)


def served(status="pass", reasons=(), versions=(), faults=(), health=None, **changes):
    """Of a server that answered as the package does, but for `changes`."""
    sound = {
        "server": {"numpy": "1.26.4", "nvidia_pytriton": "0.7.0"},
        "backend": "python",
        "threads": 2,
        "asked": Asked(list(versions), list(faults), health or {"/v2/health/live": 200}),
        "load": [],
        "metrics": [],
        "parity": {"images, grpc": parity()},
        "drift": {"same": drift(False), "dark": drift(True)},
    }
    return Served(status, list(reasons), Answers(**{**sound, **changes}))
