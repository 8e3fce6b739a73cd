"""What a folder of targets looks like to the stages behind: records, advice, a package."""

import tempfile
from pathlib import Path

from support.records import advised, checked, measured


def advice(built, **other):
    """reports/recommendation.json as if all targets of a folder had passed, and the first of `other` were chosen."""
    from clip_deploy.core.artifact import read_target
    from clip_deploy.core.files import sha256
    from clip_deploy.core.parsing import parse
    from clip_deploy.core.recommendation import Recommendation

    targets = {}
    for folder in sorted(path.parent for path in built.glob("*/target.json")):
        target = read_target(folder)
        targets[folder.name] = {
            "runtime": target.runtime,
            "precision": target.precision,
            "files": {name: sha256(folder / name) for name in target.files},
            "metrics": {"vision_p50_ms": 1.0},
        }
    return parse(Recommendation, advised(targets, **other), "the advice", null_is_nan=False)


def records(built, folder, **changes):
    """reports/validate of a folder's targets, as if all had passed; `changes` to all records."""
    from clip_deploy.core.artifact import read_target
    from clip_deploy.core.config import GateLimits
    from clip_deploy.core.files import sha256
    from clip_deploy.core.json_files import write_json
    from clip_deploy.core.parsing import plain
    from clip_deploy.evaluate.gates import limits

    for target in sorted(path.parent for path in built.glob("*/target.json")):
        known = read_target(target)
        files = {name: sha256(target / name) for name in known.files}
        record = {"precision": known.precision, "runtime": known.runtime, "files": files, **changes}
        within = limits(measured(), record.get("trained", True), GateLimits(min_cosine=0.999))
        write_json(folder / f"{target.name}.json", checked(**record, limits=plain(within)))
    return folder


def prepare(checkpoint, folder, evaluation_samples, calibration_samples, templates):
    """Fill `folder` as the stage `prepare` would, with rendered scenes."""
    from clip_deploy.builders.processor_files import write_portable
    from clip_deploy.checkpoint.load import load_processor
    from clip_deploy.core.artifact import read_target
    from clip_deploy.core.config import DataConfig
    from clip_deploy.data.dataset import load
    from clip_deploy.data.preprocessed import load_prepared, write_prepared
    from clip_deploy.evaluate.embeddings import encode_set, save_embeddings
    from clip_deploy.runtimes import open_encoder

    data = DataConfig(
        evaluation_samples=evaluation_samples, calibration_samples=calibration_samples, templates=templates
    )
    dataset, processor, model = load(data, 0), load_processor(checkpoint), read_target(checkpoint).model
    for name in ("evaluation", "calibration"):
        (folder / name).mkdir()
        write_prepared(name, dataset, templates, processor, model, folder / name)
    embeddings = encode_set(open_encoder(checkpoint), load_prepared(folder / "evaluation"))
    save_embeddings(embeddings, folder / "evaluation" / "reference.npz")
    (folder / "portable").mkdir()
    write_portable(checkpoint, folder / "portable")
    return folder


def packed(target, sets, folder):
    from clip_deploy.builders.package import Sources, write_package
    from clip_deploy.core.config import GatesConfig
    from clip_deploy.core.manifest import Run

    with tempfile.TemporaryDirectory() as validation:
        known = records(target.parent, Path(validation))
        sources = Sources(target.parent, known, sets / "portable", sets / "evaluation")
        write_package(advice(target.parent), target.name, sources, GatesConfig(), Run("tiny", 0, {}), folder)
    return folder
