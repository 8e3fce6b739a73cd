"""OpenVINO IR, run by OpenVINO's CPU plugin. Needs neither torch nor transformers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino

from clip_deploy.core.artifact import TOWERS, Target
from clip_deploy.core.model import image_feed
from clip_deploy.runtimes import text_feed

HINTS = {"fp32": "f32", "bf16": "bf16"}  # left to itself the plugin takes bf16 where the CPU has it, as for INT8's rest


class Encoder:
    """Graphs of OpenVINO on a CPU. `threads` is of each tower; None leaves it to OpenVINO."""

    image_input = "pixel_values"

    def __init__(self, folder: Path, target: Target, threads: int | None, towers: Sequence[str] = TOWERS) -> None:
        properties: dict[str, str | int] = {"PERFORMANCE_HINT": "LATENCY"}
        if target.precision in HINTS:
            properties["INFERENCE_PRECISION_HINT"] = HINTS[target.precision]
        if threads:
            properties["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        self.requests = {
            tower: core.compile_model(folder / f"{tower}.xml", "CPU", properties).create_infer_request()
            for tower in towers
        }
        self.text_inputs = target.model.text_inputs

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.requests["vision"].infer(image_feed(images), share_inputs=True)[0].copy()
        return found

    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        feed = text_feed(self.text_inputs, input_ids, attention_mask)
        found: np.ndarray = self.requests["text"].infer(feed, share_inputs=True)[0].copy()
        return found
