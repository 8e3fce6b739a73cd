"""What a folder of targets looks like to the stages behind: records, advice, a package."""

import tempfile
from pathlib import Path


def advice(built, **other):
    """reports/recommendation.json as if all targets of a folder had passed, and the first of `other` were chosen."""
    from clip_deploy.core.artifact import read_target
    from clip_deploy.core.files import sha256

    targets = {}
    for folder in sorted(path.parent for path in built.glob("*/target.json")):
        target = read_target(folder)
        targets[folder.name] = {
            "status": "pass",
            "reasons": [],
            "runtime": target.runtime,
            "precision": target.precision,
            "device": "cpu",
            "files": {name: sha256(folder / name) for name in target.files},
            "metrics": {"vision_p50_ms": 1.0},
        }
    return {"package": {}, "pairs": {}, "note": "as asked", "doubts": [], "targets": targets, **other}


def records(built, folder, **changes):
    """reports/validate of a folder's targets, as if all had passed; `changes` to all records."""
    from clip_deploy.core.artifact import read_target
    from clip_deploy.core.config import GateLimits
    from clip_deploy.core.files import sha256
    from clip_deploy.core.json_files import write_json
    from clip_deploy.evaluate.gates import limits

    sound = {"cosine_min": 1.0, "finite": True}
    for target in sorted(path.parent for path in built.glob("*/target.json")):
        known = read_target(target)
        record = {
            "status": "pass",
            "reasons": [],
            "precision": known.precision,
            "trained": True,
            "files": {name: sha256(target / name) for name in known.files},
            "parity": {"vision": sound, "text": sound},
            "shapes": {"vision, batch 3": 0.9999},
            "zero_shot": {"top1_drop": 0.0},
            "flips": 0.25,
            "doubts": [],
            **changes,
        }
        write_json(folder / f"{target.name}.json", record | {"limits": limits(record, GateLimits(min_cosine=0.999))})
    return folder


def packed(target, sets, folder):
    from clip_deploy.builders.package import Sources, write_package
    from clip_deploy.core.config import GatesConfig

    facts = {"model": "tiny", "seed": 0, "versions": {}}
    with tempfile.TemporaryDirectory() as validation:
        known = records(target.parent, Path(validation))
        sources = Sources(target.parent, known, sets / "portable", sets / "evaluation")
        write_package(advice(target.parent), target.name, sources, GatesConfig(), facts, folder)
    return folder
