"""From JPEG bytes to embeddings, as a server works: images per second of each way there, and which part limits it."""

import io
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tqdm import tqdm

from clip_deploy.checkpoint.load import load_processor
from clip_deploy.core.artifact import Target, failure, read_target
from clip_deploy.core.config import BenchmarkConfig, EndToEndConfig, GatesConfig
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.model import as_images
from clip_deploy.core.parsing import parse
from clip_deploy.core.preprocessing import Preprocessing, to_pixels
from clip_deploy.core.records import EndToEnd, FeedTiming, Photos
from clip_deploy.data.preprocessed import Prepared
from clip_deploy.evaluate.embeddings import Embeddings, encode_images, encode_texts
from clip_deploy.evaluate.gates import gate_of
from clip_deploy.onnx_graph.preprocessing import read_preprocessing
from clip_deploy.runtimes import open_encoder
from clip_deploy.timing.end_to_end_worker import FeedJob
from clip_deploy.timing.input_pipelines import FEEDS, check_feed, decode_rgb
from clip_deploy.timing.latency import ALLOCATOR, thread_variables

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

QUALITY = 90  # of the JPEGs; cameras and web sites take 75 to 95
TEXTURE = 14.0  # standard deviation in grey levels: at 480 x 640 a file then has the bytes of a photograph
OCTAVES = (2, 4, 8, 16)  # pixels; photographs hold about as much contrast in each octave (Field 1987)
PROGRAM = (sys.executable, "-m", "clip_deploy.timing.end_to_end_worker")


def measure_feeds(
    folder: Path,
    checkpoint: Path,
    prepared: Prepared,
    benchmark: BenchmarkConfig,
    settings: EndToEndConfig,
    gates: GatesConfig,
    seed: int,
) -> EndToEnd:
    """Time every feed that suits the target in `folder`, each in a process of its own, and hold it to its gate."""
    target = read_target(folder)
    names = FEEDS[target.image_input]
    try:
        job, photos = _first_job(folder, target, checkpoint, prepared, benchmark, settings, gates, seed)
    except Exception as error:  # whatever a library raises is this row's result
        reason = str(error) if isinstance(error, UnavailableError) else failure(error)
        return EndToEnd(dict.fromkeys(names, FeedTiming("unavailable", reason)))
    feeds = {}
    for name in tqdm(names, desc="end to end", disable=None):
        job.feed = name
        feeds[name] = run_feed(job)
    return EndToEnd(feeds, photos, benchmark.threads)


def _first_job(
    folder: Path,
    target: Target,
    checkpoint: Path,
    prepared: Prepared,
    benchmark: BenchmarkConfig,
    settings: EndToEndConfig,
    gates: GatesConfig,
    seed: int,
) -> tuple[FeedJob, Photos]:
    """The photos, and the embeddings that the checkpoint's processor makes of them, for the first feed."""
    if target.unavailable:
        raise UnavailableError(target.unavailable)
    processor = load_processor(checkpoint).image_processor
    preprocessing = read_preprocessing(processor)
    jpegs = make_photos(prepared.pixel_values, preprocessing, benchmark.image_size, settings.images, seed)
    encoder = folder if target.image_input == "pixel_values" else checkpoint  # the one that takes pixel_values
    reference = reference_embeddings(encoder, processor, jpegs, prepared)
    rows = photo_rows(len(prepared.pixel_values), settings.images, np.random.default_rng(seed))
    labels = prepared.labels[rows] if len(prepared.labels) else prepared.labels
    questions = replace(prepared, pixel_values=np.empty(0), images=None, labels=labels)
    height, width = benchmark.image_size
    kilobytes = sum(map(len, jpegs)) / len(jpegs) / 1e3
    photos = Photos(len(jpegs), height, width, QUALITY, kilobytes)
    job = FeedJob(
        FEEDS[target.image_input][0],
        folder,
        preprocessing,
        jpegs,
        reference,
        questions,
        target.precision,
        gate_of(gates, target.precision),
        benchmark,
        settings,
        target.model.trained,
        seed,
    )
    return job, photos


def make_photos(
    pixel_values: np.ndarray, preprocessing: Preprocessing, size: list[int], count: int, seed: int
) -> list[bytes]:
    """JPEG files with the content of evaluation images, drawn up to `size` and given the texture of photographs.

    Args:
        pixel_values: [images] in the model's image_dtype.
        preprocessing: what made them of grey levels.
        size: [height, width] of the files.
    """
    rng = np.random.default_rng(seed)
    rows = photo_rows(len(pixel_values), count, rng)
    return [_photo(pixel_values[row], preprocessing, size, rng) for row in rows]


def photo_rows(available: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Which images of the set the photos show: no one twice before all have had their turn."""
    return np.resize(rng.permutation(available), count)


def _photo(pixels: np.ndarray, preprocessing: Preprocessing, size: list[int], rng: np.random.Generator) -> bytes:
    levels = (to_pixels(pixels).transpose(1, 2, 0) - preprocessing.offset) / preprocessing.scale
    image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    large = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC)) + TEXTURE * texture(size, rng)
    content = io.BytesIO()
    Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(content, "jpeg", quality=QUALITY)
    return content.getvalue()


def texture(size: list[int], rng: np.random.Generator) -> np.ndarray:
    """Noise of standard deviation 1, with the same share from each of OCTAVES: float32 [height, width, 1]."""
    height, width = size
    layers = []
    for octave in OCTAVES:
        coarse = rng.standard_normal((max(1, height // octave), max(1, width // octave)), dtype=np.float32)
        layer = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        layers.append(layer / max(float(layer.std()), 1e-6))
    found: np.ndarray = (np.sum(layers, axis=0) / np.sqrt(len(layers)))[:, :, None]
    return found


def reference_embeddings(
    folder: Path, processor: "BaseImageProcessor", jpegs: list[bytes], prepared: Prepared
) -> Embeddings:
    """What the target in `folder`, which takes pixel_values, makes of texts, and of photos through the processor."""
    made = processor([decode_rgb(jpeg) for jpeg in jpegs], return_tensors="np")
    encoder = open_encoder(folder)
    images = encode_images(encoder, as_images(made, read_target(folder).model.image_dtype))
    return Embeddings(images, encode_texts(encoder, prepared.captions), encode_texts(encoder, prepared.prompts))


def run_feed(job: FeedJob) -> FeedTiming:
    """One feed in a process of its own: with a server's allocator, and nothing that another one left behind."""
    try:
        check_feed(job.feed, job.preprocessing)
    except UnavailableError as error:
        return FeedTiming("unavailable", str(error))
    variables = {**os.environ, **thread_variables(job.benchmark.threads), **ALLOCATOR}
    done = subprocess.run(PROGRAM, input=pickle.dumps(job), stdout=subprocess.PIPE, env=variables, check=False)
    if not done.stdout:
        return FeedTiming("unavailable", f"it stopped with exit code {done.returncode} while it was timed")
    return parse(FeedTiming, json.loads(done.stdout), job.feed)
