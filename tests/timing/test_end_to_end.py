import io
import sys
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.fast_feed import need_fast_feed
from support.open_clip import need_torchvision
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from clip_deploy.checkpoint.load import load_processor
from clip_deploy.core.artifact import Target, build
from clip_deploy.core.config import BenchmarkConfig, EndToEndConfig, GateLimits, GatesConfig
from clip_deploy.core.errors import ConfigError, UnavailableError
from clip_deploy.core.records import EndToEnd, FeedTiming, FlowBatch, Measured, Parity, ZeroShot
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.onnx_graph.preprocessing import read_preprocessing
from clip_deploy.timing import end_to_end, end_to_end_worker, input_pipelines
from clip_deploy.timing.end_to_end import make_photos, measure_feeds, photo_rows, reference_embeddings, run_feed
from clip_deploy.timing.end_to_end_worker import FeedJob, check_embeddings, judge, measure_feed, prefetched
from clip_deploy.timing.input_pipelines import (
    FastFeed,
    PilFeed,
    TorchFeed,
    check_feed,
    decode_rgb,
    open_feed,
    orientation,
    upright,
)

BENCHMARK = BenchmarkConfig(batch_sizes=[1, 4], threads=1, warmup=1, image_size=[120, 160])
OTHER = "the embeddings are not those of the checkpoint's own processor"
STRICT = GatesConfig(fp32=GateLimits(0.9999, 0.1, 0.2))
SETTINGS = EndToEndConfig(targets=["onnx-fp32"], images=6, workers=2, passes=3, seconds=0.02)


@pytest.fixture(scope="module")
def job(checkpoint, onnx_target, sets):
    """The built-in model, fed by Pillow."""
    processor = load_processor(checkpoint).image_processor
    settings = read_preprocessing(processor)
    jpegs = make_photos(load_prepared(sets / "evaluation").pixel_values, settings, [120, 160], 6, seed=0)
    prepared = load_prepared(sets / "evaluation")
    reference = reference_embeddings(onnx_target, processor, jpegs, prepared)
    labels = prepared.labels[photo_rows(len(prepared.pixel_values), 6, np.random.default_rng(0))]
    questions = replace(prepared, pixel_values=np.empty(0), images=None, labels=labels)
    gate = STRICT.fp32
    return FeedJob("pil", onnx_target, settings, jpegs, reference, questions, "fp32", gate, BENCHMARK, SETTINGS)


@pytest.mark.parametrize(
    ("decode", "preprocess", "encode", "expected"),
    [
        (1.6, 4.1, 0.44, "preprocess"),  # an image takes 1 ms of the flow, whatever its workers could do
        (4.1, 1.6, 0.44, "decode"),
        (1.6, 4.1, 0.56, "encode"),
    ],
)
def test_the_bottleneck_is_encoding_where_that_takes_half_of_an_images_time(decode, preprocess, encode, expected):
    found = FlowBatch(1000.0, 900.0, 1100.0, decode_ms=decode, preprocess_ms=preprocess, encode_ms=encode)
    assert found.bottleneck == expected


def test_photos_have_the_size_asked_for_and_come_from_the_seed(job, sets):
    pixels = load_prepared(sets / "evaluation").pixel_values
    again, other = (make_photos(pixels, job.preprocessing, [120, 160], 6, seed) for seed in (0, 1))
    assert again == job.jpegs
    assert other != job.jpegs
    assert len(set(job.jpegs)) == 6
    assert [decode_rgb(jpeg).size for jpeg in job.jpegs] == [(160, 120)] * 6


def test_a_photo_of_480_by_640_has_the_bytes_of_a_photograph(job, sets):
    (photo,) = make_photos(load_prepared(sets / "evaluation").pixel_values, job.preprocessing, [480, 640], 1, seed=0)
    assert 50_000 < len(photo) < 150_000


def test_grey_jpegs_are_decoded_as_rgb():
    content = io.BytesIO()
    Image.new("L", (20, 10), 77).save(content, "jpeg")
    image = decode_rgb(content.getvalue())
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.parametrize("lies", range(1, 9))
def test_photographs_are_turned_upright_by_pillow_and_on_a_gpu(lies):
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = lies
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
        content, "jpeg", exif=exif
    )
    with Image.open(content) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
        raw = torch.tensor(np.asarray(stored)).permute(2, 0, 1)
    assert orientation(content.getvalue()) == lies
    assert np.array_equal(upright(raw, lies).permute(1, 2, 0), expected)
    assert np.array_equal(decode_rgb(content.getvalue()), expected)


@pytest.mark.gpu
def test_nvjpeg_gives_the_pictures_that_pillow_gives_upright(job):
    """A smooth picture: decoders differ by a few grey levels in their rounding and colour of pixels."""
    need_torchvision()
    rows, columns = np.mgrid[0:40, 0:60]
    picture = np.stack([rows * 4, columns * 3, rows + columns], axis=-1).astype(np.uint8)
    photos = []
    for lies in range(1, 9):
        exif, content = Image.Exif(), io.BytesIO()
        exif[0x0112] = lies
        Image.fromarray(picture).save(content, "jpeg", exif=exif, quality=95)
        photos.append(content.getvalue())
    decoded = open_feed("nvjpeg", job.preprocessing, device_tensors=True).decode(photos)
    for photo, image in zip(photos, decoded, strict=True):
        expected = np.asarray(decode_rgb(photo)).astype(int)
        assert np.abs(image.permute(1, 2, 0).cpu().numpy() - expected).mean() < 2


def test_a_photograph_that_says_nothing_is_upright():
    content = io.BytesIO()
    Image.new("RGB", (20, 10)).save(content, "jpeg")
    assert orientation(content.getvalue()) == 1


PROCESSORS = [
    CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
    CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 49, "width": 64}),
    CLIPImageProcessorPil(do_resize=False, crop_size={"height": 50, "width": 51}),
    SiglipImageProcessorPil(size={"height": 130, "width": 90}, resample=2),
]


@pytest.mark.parametrize("processor", PROCESSORS, ids=["crop", "crop that pads", "no resize", "both sides"])
@pytest.mark.parametrize("size", [(120, 160), (161, 120), (47, 48)])
def test_the_pil_feed_gives_the_pixels_of_the_processor(processor, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    expected = processor([image], return_tensors="np")["pixel_values"]
    actual = PilFeed(read_preprocessing(processor)).preprocess([image])
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("processor", PROCESSORS, ids=["crop", "crop that pads", "no resize", "both sides"])
def test_the_torchvision_feed_is_close_to_the_processor(processor):
    need_torchvision()
    settings = read_preprocessing(processor)
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 161, 3), dtype=np.uint8)).save(content, "jpeg")
    feed = TorchFeed(settings, "cpu", False)
    actual = feed.preprocess(feed.decode([content.getvalue()]))
    expected = processor([decode_rgb(content.getvalue())], return_tensors="np")["pixel_values"]
    assert actual.shape == expected.shape
    assert (np.abs(actual - expected) / settings.scale.reshape(3, 1, 1)).mean() < 0.5  # grey levels


def test_batches_come_in_the_order_of_the_photos_and_without_end(job):
    feed = PilFeed(job.preprocessing)
    expected = feed.preprocess(feed.decode(job.jpegs))
    first, second = islice(prefetched(feed, job.jpegs, 4, workers=2), 2)
    np.testing.assert_array_equal(first, expected[:4])
    np.testing.assert_array_equal(second, expected[[4, 5, 0, 1]])


def test_the_next_batch_is_made_while_the_encoder_works(job):
    """Each side takes 0.05 s a batch; one after the other, the 4 batches would begin 0.35 s after the first job."""
    made = []

    class Slow(PilFeed):
        def preprocess(self, images):
            time.sleep(0.05)
            made.append(len(images))
            return super().preprocess(images)

    inputs = prefetched(Slow(job.preprocessing), job.jpegs, 1, workers=1)
    next(inputs)
    before = len(made)
    time.sleep(0.3)  # the encoder
    assert len(made) > before
    inputs.close()


def test_the_pil_feed_is_measured_and_agrees_with_the_processor(job):
    row = measure_feed(job)
    assert row.status == "measured"
    assert row.cosine_min == pytest.approx(1, abs=1e-6)
    assert row.top1_drop == row.flips == 0
    assert row.workers == 2
    assert list(row.batches) == [1, 4]
    assert row.best_batch in (1, 4)
    for found in row.batches.values():
        assert 0 < found.images_per_s_low <= found.images_per_s <= found.images_per_s_high
        assert min([found.decode_ms, found.preprocess_ms, found.encode_ms]) > 0
        assert found.bottleneck in ("decode", "preprocess", "encode")


def test_the_fast_feed_is_measured_and_judged_like_a_target(job):
    """At 120 x 160 the built-in model's photos are decoded at half their size."""
    need_fast_feed()
    row = measure_feed(replace(job, feed="fast", gate=GateLimits(0.99, 100, 100)))
    assert row.status == "measured"
    assert 0.99 < row.cosine_min < 0.9999
    strict = measure_feed(replace(job, feed="fast"))
    assert strict.status == "fail"
    assert strict.reason.startswith("vision: cosine 0.99")
    assert "gates.fp32.min_cosine" in strict.reason
    assert strict.best.images_per_s > 0


def test_the_fast_feed_leaves_other_files_to_pillow(job):
    need_fast_feed()
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(content, "png")
    fast, exact = FastFeed(job.preprocessing), PilFeed(job.preprocessing)
    files = [job.jpegs[0], content.getvalue()]
    found, expected = (feed.preprocess(feed.decode(files)) for feed in (fast, exact))
    assert np.array_equal(found[1], expected[1])
    assert 0 < np.abs((found[0] - expected[0]) / job.preprocessing.scale.reshape(3, 1, 1)).mean() < 2


def test_a_feed_with_other_pixels_is_marked_as_wrong(job):
    negative = replace(job.preprocessing, image_std=[-value for value in job.preprocessing.image_std])
    row = measure_feed(replace(job, preprocessing=negative))
    assert row.status == "wrong"
    assert row.reason.endswith(f"< 0.99: {OTHER}")
    assert row.cosine_min < 0.99


def found(cosine, drop=0.0, flips=0.0):
    return Measured(
        parity={"vision": Parity(cosine, cosine, cosine, 0.0, True)},
        shapes={},
        zero_shot=ZeroShot(90.0, 99.0, 90.0 + drop, drop, drop, drop, 1.0),
        flips=flips,
        evaluation="",
    )


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (found(0.9999), ("measured", None)),
        (found(0.995), ("fail", "vision: cosine 0.995000 < 0.9999 (gates.fp32.min_cosine)")),
        (found(1.0, drop=1.5), ("fail", "top-1 drop 1.50 points > 0.1 (gates.fp32.max_top1_drop)")),
        (found(1.0, flips=3.125), ("fail", "flips 3.12 % > 0.2 (gates.fp32.max_flips)")),
        (
            found(0.98),
            ("wrong", "cosine 0.9800 < 0.99: the embeddings are not those of the checkpoint's own processor"),
        ),
    ],
)
def test_a_feed_is_held_to_the_gate_of_its_target(job, measured, expected):
    assert check_embeddings(measured, job) == expected


def test_answers_through_a_feed_are_held_against_those_of_the_processor(job):
    """Embeddings of other photos have other answers: each photo's label is that of the image that it shows."""
    same, other = job.reference.images, np.roll(job.reference.images, 1, axis=0)
    assert judge(same, job).flips == judge(same, job).zero_shot.top1_drop == 0
    assert judge(same, job).zero_shot.top1 > judge(other, job).zero_shot.top1
    assert judge(other, job).flips == 100


def test_a_missing_library_keeps_the_rows(checkpoint, onnx_target, sets, monkeypatch):
    monkeypatch.setattr(input_pipelines, "find_spec", lambda name: None)
    prepared = load_prepared(sets / "evaluation")
    record = measure_feeds(onnx_target, checkpoint, prepared, BENCHMARK, SETTINGS, STRICT, seed=0)
    assert list(record.feeds) == ["pil", "fast", "torchvision", "nvjpeg", "gpu"]
    assert record.feeds["pil"].status == "measured"
    missing = FeedTiming("unavailable", "torchvision is not installed (pip install torchvision)")
    assert record.feeds["torchvision"] == record.feeds["nvjpeg"] == missing
    assert record.feeds["gpu"].status == "unavailable"
    assert record.photos.count == 6
    assert record.photos.height == 120


def test_nvjpeg_needs_a_gpu(job, monkeypatch):
    monkeypatch.setattr(input_pipelines, "find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UnavailableError, match="PyTorch sees no CUDA GPU"):
        check_feed("nvjpeg", job.preprocessing)
    check_feed("torchvision", job.preprocessing)


def test_a_target_that_could_not_be_built_keeps_its_rows(checkpoint, sets, tmp_path):
    def refuse(folder):
        raise UnavailableError("no such library")

    build(tmp_path / "target", refuse, Target("ort", "fp16"))
    record = measure_feeds(
        tmp_path / "target", checkpoint, load_prepared(sets / "evaluation"), BENCHMARK, SETTINGS, STRICT, seed=0
    )
    unavailable = FeedTiming("unavailable", "no such library")
    assert record == EndToEnd(dict.fromkeys(("pil", "fast", "torchvision", "nvjpeg", "gpu"), unavailable))


def test_a_target_that_fails_in_front_of_its_feeds_keeps_its_rows(checkpoint, onnx_target, sets, monkeypatch):
    def wrong(*_):
        raise RuntimeError("of a library")

    monkeypatch.setattr(end_to_end, "reference_embeddings", wrong)
    record = measure_feeds(
        onnx_target, checkpoint, load_prepared(sets / "evaluation"), BENCHMARK, SETTINGS, STRICT, seed=0
    )
    assert {row.status for row in record.feeds.values()} == {"unavailable"}
    assert record.feeds["pil"].reason.startswith("RuntimeError: of a library (its traceback is in the terminal)")


def test_a_process_that_fails_or_dies_is_reported_with_its_reason(job, monkeypatch, tmp_path):
    row = run_feed(replace(job, folder=tmp_path / "nowhere"))
    assert row.status == "unavailable"
    assert "nowhere is not a built target" in row.reason
    monkeypatch.setattr(end_to_end, "PROGRAM", (sys.executable, "-c", "import os; os.abort()"))
    dead = FeedTiming("unavailable", "it stopped with exit code -6 while it was timed")
    assert run_feed(job) == dead


def test_a_graph_that_preprocesses_is_fed_with_decoded_images(checkpoint, onnx_of, sets):
    folder = onnx_of(checkpoint, preprocess=True)
    record = measure_feeds(folder, checkpoint, load_prepared(sets / "evaluation"), BENCHMARK, SETTINGS, STRICT, seed=0)
    assert list(record.feeds) == ["graph"]
    assert record.feeds["graph"].status == "measured"
    assert record.feeds["graph"].cosine_min > 0.999


def test_an_encoder_that_takes_gpu_tensors_says_so_by_an_attribute(job, monkeypatch):
    """Played on the CPU: what the feed is told, and what the row says."""
    told = []

    def opened(name, settings, device_tensors):
        told.append(device_tensors)
        feed = PilFeed(settings)
        feed.batch_workers = 1
        return feed

    monkeypatch.setattr(end_to_end_worker, "open_feed", opened)
    through_host = measure_feed(job)
    original = end_to_end_worker.open_encoder

    def takes_tensors(folder, threads):
        encoder = original(folder, threads)
        encoder.takes_device_tensors = True
        return encoder

    monkeypatch.setattr(end_to_end_worker, "open_encoder", takes_tensors)
    straight = measure_feed(job)
    assert told == [False, True]
    assert (through_host.through_host, straight.through_host) == (True, False)
    assert through_host.workers == straight.workers == 1  # one job is a whole batch


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match=r"end_to_end\.workers is 0: give 1 to 1024, or null"):
        EndToEndConfig(workers=0)
    with pytest.raises(ConfigError, match=r"end_to_end\.seconds is -1: it must be above 0"):
        EndToEndConfig(seconds=-1)
    with pytest.raises(ConfigError, match=r"end_to_end\.targets lists a name twice: a, a"):
        EndToEndConfig(targets=["a", "a"])
