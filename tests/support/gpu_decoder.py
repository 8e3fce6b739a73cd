"""What decodes for the feed `gpu` where there is no GPU."""

import numpy as np
from support.fast_feed import need_fast_feed

from clip_deploy.core.fast_preprocessing import FastPreprocessing
from clip_deploy.inference import gpu_feed
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.inference.gpu_feed import GpuFeed


class Decoder:
    """FastPreprocessing, behind the verbs of the GPU's."""

    workers = 2

    def __init__(self, settings):
        self.fast = FastPreprocessing(settings)
        self.batches = []

    def __call__(self, jpegs):
        self.batches.append(len(jpegs))
        made = [self.fast(bytes(jpeg.content)) if jpeg else None for jpeg in jpegs]
        pixels = np.zeros((len(jpegs), 3, 48, 48), np.float32)
        for row, found in enumerate(made):
            if found is not None:
                pixels[row] = found
        return pixels, [row for row, found in enumerate(made) if found is None]

    def fill(self, pixels, row, found):
        pixels[row] = found


def opened_with_gpu_feed(package, monkeypatch):
    """A package with the feed `gpu`, on the CPU."""
    need_fast_feed()
    monkeypatch.setattr(gpu_feed, "open_gpu_preprocessing", Decoder)
    opened = ZeroShotClassifier.open(package, threads=1)
    opened.gpu = GpuFeed(opened.preprocessor, opened._read)
    return opened
