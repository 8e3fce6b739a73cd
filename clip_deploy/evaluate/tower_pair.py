"""Two targets measured as one: the image tower of one with the text tower of the other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_deploy.core.artifact import TOWERS, read_target
from clip_deploy.core.records import Measured
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.evaluate.embeddings import load_embeddings
from clip_deploy.evaluate.validation import measure
from clip_deploy.runtimes import open_encoder


class TowerPair:
    """The image tower of one encoder and the text tower of another."""

    def __init__(self, vision: Any, text: Any) -> None:
        self.image_input, self.encode_images = vision.image_input, vision.encode_images
        self.text_inputs, self.encode_texts = text.text_inputs, text.encode_texts


def measure_pair(folders: dict[str, Path], evaluation: Path) -> Measured:
    """As validation.measure does, on the prepared set in `evaluation`; `folders` has a target for each tower."""
    target = read_target(folders["vision"])
    headless = replace(target.model, classifier=None)  # a head answers from images alone, and was judged
    pair: Any = TowerPair(*(open_encoder(folders[tower], towers=[tower]) for tower in TOWERS))
    reference = load_embeddings(evaluation / "reference.npz")
    return measure(pair, load_prepared(evaluation), reference, replace(target, model=headless), seed=0)
