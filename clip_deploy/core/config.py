"""The settings of params.yaml and conf/ as dataclasses: types, ranges, and one clear message for whatever is wrong."""

import json
import re
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from math import isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import Node, YAMLError

from clip_deploy.core.artifact import RUNTIMES
from clip_deploy.core.environment import MAX_THREADS
from clip_deploy.core.errors import ConfigError

REFERENCE = "torch-fp32"  # the untouched checkpoint: the first row, and what every other row is held against
EXPORTED = "onnx-fp32"  # the target that export_onnx builds
BUILDERS = (  # sections of params.yaml with a target a key
    "export_torch",
    "export_torchscript",
    "export_aoti",
    "export_openvino",
    "optimize",
    "quantize",
    "build_engine",
)
GROUPS = ("model", "data", "benchmark", "gates")  # folders under conf/
OPSETS = {"torchscript": (14, 20), "dynamo": (18, 23)}  # what each exporter really writes (torch 2.13)
ANTIALIAS_OPSET = 18  # ONNX's Resize has `antialias` from here on
ALIAS = re.compile(r"(?:^|[\s\[{,:-])\*[^\s*]", re.MULTILINE)  # in YAML
MAX_NODES = 100_000  # of a settings file with its aliases written out
MAX_CLIENTS, MAX_WINDOW_S = 256, 60  # of a load test, which shares its machine with the server
TARGET = re.compile(r"[a-z0-9][a-z0-9-]{0,99}")
CHOICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # a file in conf/, whose name is a word of commands too
KEPT = ("data", "package", "triton")  # folders of artifacts/ that hold no target; DVC empties what a stage is to fill
WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}

T = TypeVar("T")


class Exporter(Enum):
    """Who writes the ONNX graph."""

    auto = "auto"  # dynamo where it can write the opset, torchscript below
    dynamo = "dynamo"  # by torch.export: opset 18 to 23
    torchscript = "torchscript"  # by torch.jit.trace: opset 14 to 20


class Precision(Enum):
    """The numbers in which a target computes."""

    fp32 = "fp32"  # float32
    fp16 = "fp16"  # float16, which overflows above 65,504
    bf16 = "bf16"  # bfloat16: the range of float32, with 8 bits of precision
    fp8 = "fp8"  # E4M3 matmuls, the rest in fp16
    int8 = "int8"  # integers of 8 bits, and float32 between them


class Device(Enum):
    """What targets run on."""

    cpu = "cpu"  # this machine's cores
    cuda = "cuda"  # an NVIDIA GPU


class Provider(Enum):
    """What runs an optimized graph."""

    own = "own"  # ONNX Runtime's own kernels, for the CPU or CUDA
    tensorrt = "tensorrt"  # TensorRT inside ONNX Runtime
    torch = "torch"  # PyTorch with our kernels, on a GPU


class Quantization(Enum):
    """How INT8 treats activations; weights are quantised in each case."""

    dynamic = "dynamic"  # their scale is found in each call
    static = "static"  # their scale is found once, on the calibration set
    weight_only = "weight_only"  # they stay in float32


class Calibration(Enum):
    """How static INT8 finds the range of an activation."""

    minmax = "minmax"  # all that occurs on the calibration set
    entropy = "entropy"  # the range that loses least information (Kullback-Leibler divergence)
    percentile = "percentile"  # nearly all that occurs, without outliers


class ReduceRange(Enum):
    """Whether weights get 7 bits: 8 bits saturate on CPUs without VNNI."""

    auto = "auto"  # where the CPU lacks VNNI
    always = "always"  # everywhere
    never = "never"  # nowhere


@dataclass
class ModelConfig:
    """One checkpoint: a hub id, a local folder or file, or an architecture with seeded random weights."""

    repo_id: str | None = None  # an id of the Hugging Face hub, owner/name; give it or `path`
    revision: str | None = None  # of `repo_id`: a commit, so that the same name stays the same weights
    path: str | None = None  # a folder or a file on this disk; give it or `repo_id`
    base: str | None = None  # of an adapter: a folder or an id; null: the one that adapter_config.json names
    base_revision: str | None = None  # of a base on the hub: a commit
    processor: str | None = None  # a folder or an id that lends processor and tokenizer; null: the model has its own
    processor_revision: str | None = None  # of a processor on the hub: a commit
    # if `path` is a file of weights: the name of its architecture in open_clip, or "openai"
    open_clip: str | None = None
    # a config.json of transformers, for random weights; tokenizer and processor come from `path`
    architecture: dict[str, Any] | None = None
    seed: int = 0  # of random weights
    trained: bool = True  # false for random weights: they are timed and compared, not judged by their accuracy
    # codes of findings that are intended and stop no run (reference page Errors)
    allow: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.open_clip and (self.repo_id or not self.path):
            raise ConfigError(
                "model.open_clip names the architecture of a file of weights (epoch_*.pt): set that file as path, "
                "in conf/model/open-clip-training.yaml"
            )
        if bool(self.repo_id) == bool(self.path):
            raise ConfigError(
                "model: give either repo_id (a Hugging Face id) or path (a local folder or file); "
                "for `model: local` set path in conf/model/local.yaml, for `model: open-clip-training` in its own file"
            )
        if self.path and self.revision:
            raise ConfigError("model.revision is set beside model.path, and what lies on this disk has none: remove it")
        if self.repo_id and not self.revision:
            raise ConfigError(f"model.revision is missing for {self.repo_id}: pin a commit of the repository")
        if self.processor_revision and not self.processor:
            raise ConfigError("model.processor_revision is set without model.processor: set both, or neither")
        others = [name for name in ("base", "base_revision", "processor") if getattr(self, name)]
        if self.architecture and others:
            raise ConfigError(
                f"model.{others[0]} is set beside model.architecture, which has random weights: remove it"
            )
        if self.open_clip and others:
            raise ConfigError(f"model.{others[0]} is set beside model.open_clip, which needs none: remove it")


@dataclass
class DataConfig:
    """Where evaluation and calibration samples come from, and how many of each."""

    source: str = "shapes"  # `shapes`, `image-folder`, `captions` or `hub`
    evaluation_samples: int = 960  # images on which targets are judged; 8 or more
    calibration_samples: int = 96  # other images, on which ranges of INT8 and FP16 are found; 1 or more
    # prompts, each with one {} for the class; a class is the mean over all of them
    templates: list[str] = field(default_factory=list)
    path: str | None = None  # image-folder: a folder with a sub-folder for each class; captions: a CSV file
    image_column: str = "image"  # captions: the column with paths of images; hub: with images
    caption_column: str | None = None  # captions, hub: the column with captions; null: none, and no retrieval
    label_column: str | None = None  # captions, hub: the column with class names; null: none, and no zero-shot accuracy
    dataset_id: str | None = None  # hub: an id of the Hugging Face hub, or a local folder that `datasets` can load
    revision: str | None = None  # hub: a commit of the data set; null: the newest
    split: str = "test"  # hub: the split of the data set

    SOURCES = ("shapes", "image-folder", "captions", "hub")

    def __post_init__(self) -> None:
        if self.source not in self.SOURCES:
            raise ConfigError(f"data.source is {self.source!r}: accepted are {', '.join(self.SOURCES)}")
        if self.source in ("image-folder", "captions") and not self.path:
            raise ConfigError(f"data.path is missing: set it in conf/data/{self.source}.yaml")
        if self.source == "hub" and not self.dataset_id:
            raise ConfigError("data.dataset_id is missing: set it in conf/data/hub.yaml")
        for name, least in (("evaluation_samples", 8), ("calibration_samples", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name} is {getattr(self, name)}: at least {least} are needed")
        if bad := [template for template in self.templates if template.count("{}") != 1]:
            raise ConfigError(f"data.templates holds {bad[0]!r}: each template names the class once, as {{}}")


@dataclass
class BenchmarkConfig:
    """How long and at which sizes a target is timed."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32])  # images, or texts, in one call; each 1 or more
    threads: int = 2  # of each process, for every library
    warmup: int = 5  # calls thrown away: allocators and thread pools settle
    iterations: int = 500  # timed calls for each tower and batch size, at most
    seconds: float = 0.4  # seconds of timed calls for each tower, batch size and side, unless 8 turns take longer
    power_s: float = 1.0  # seconds in which a GPU encodes while its power is measured
    sequence_length: int | None = None  # tokens of a text; null: the model's whole context
    # height and width in pixels, for graphs that preprocess
    image_size: list[int] = field(default_factory=lambda: [480, 640])
    timeout_s: float = 1800  # seconds; a timed process that is silent for longer is ended: opening and compiling count

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"benchmark.batch_sizes is {self.batch_sizes}: give one or more sizes of at least 1")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ConfigError(
                f"benchmark.image_size is {self.image_size}: give height and width in pixels, for example [480, 640]"
            )
        if len(set(self.batch_sizes)) < len(self.batch_sizes):
            raise ConfigError(f"benchmark.batch_sizes is {self.batch_sizes}: give each size once")
        for name in ("iterations", "seconds", "power_s", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"benchmark.{name} is {getattr(self, name)}: it must be above 0")
        _check_threads("benchmark", self, "threads")
        if self.warmup < 0:
            raise ConfigError(f"benchmark.warmup is {self.warmup}: give 0 or more calls")
        if self.sequence_length is not None and self.sequence_length < 1:
            raise ConfigError(
                f"benchmark.sequence_length is {self.sequence_length}: give 1 or more tokens, or null for the model's "
                "whole context"
            )


@dataclass
class EndToEndConfig:
    """Which targets are timed from JPEG bytes, and how long; sizes, threads and warm-up are those of the benchmark."""

    targets: list[str] = field(default_factory=list)  # names of targets, for example [ort-fp32]; empty: none
    images: int = 32  # distinct JPEGs, of benchmark.image_size
    workers: int | None = None  # threads that decode and preprocess; null: benchmark.threads
    passes: int = 3  # over the JPEGs; the median is reported, with the slowest and the fastest
    seconds: float = 0.2  # seconds of one pass at one batch size

    def __post_init__(self) -> None:
        if len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"end_to_end.targets lists a name twice: {', '.join(self.targets)}")
        for name in ("images", "passes", "seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"end_to_end.{name} is {getattr(self, name)}: it must be above 0")
        if self.workers is not None:
            _check_threads("end_to_end", self, "workers", ", or null for benchmark.threads")


@dataclass
class TritonConfig:
    """How Triton batches and how many copies of each model it runs."""

    max_batch: int = 32  # images in one call
    max_texts: int = 256  # texts in one call, which are the labels of one question
    queue_delay_us: int = 200  # microseconds that a request may wait for others to join it
    instances: int = 1  # copies of each tower
    threads: int = 2  # of each copy
    workers: int = 2  # processes that decode and preprocess images

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_texts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"triton.{name} is {getattr(self, name)}: give 1 or more")
        for name in ("instances", "threads", "workers"):
            _check_threads("triton", self, name)
        if self.queue_delay_us < 0:
            raise ConfigError(f"triton.queue_delay_us is {self.queue_delay_us}: give 0 or more microseconds")


@dataclass
class TritonCheckConfig:
    """Which server the repository is held against, and how it is loaded."""

    environment: str = "build/triton-venv"  # the folder that `make triton-env` makes
    # numbers of clients that ask at the same time, each 1 to 256
    concurrency: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    seconds: float = 0.2  # seconds of one window at one concurrency, up to 60; at least three windows are measured

    def __post_init__(self) -> None:
        if not self.concurrency or not all(1 <= clients <= MAX_CLIENTS for clients in self.concurrency):
            raise ConfigError(
                f"triton_check.concurrency is {self.concurrency}: give one or more numbers from 1 to {MAX_CLIENTS}"
            )
        if not 0 < self.seconds <= MAX_WINDOW_S:
            raise ConfigError(f"triton_check.seconds is {self.seconds}: give a number above 0 and up to {MAX_WINDOW_S}")


@dataclass
class GateLimits:
    """What a target of one precision class must reach to be fit for use."""

    min_cosine: float = 0.0  # lowest cosine of any row with torch-fp32's embedding, for each tower
    max_top1_drop: float = 100.0  # percentage points of top-1
    max_flips: float = 100.0  # percent of the images whose answer changed

    def __post_init__(self) -> None:
        for name, low, high in (("min_cosine", -1, 1), ("max_top1_drop", 0, 100), ("max_flips", 0, 100)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"gates: {name} is {getattr(self, name)}: accepted are {low} to {high}")


@dataclass
class GatesConfig:
    """What targets must reach, by their precision."""

    fp32: GateLimits = field(default_factory=GateLimits)  # limits of targets in fp32
    fp16: GateLimits = field(default_factory=GateLimits)  # limits of targets in fp16
    bf16: GateLimits = field(default_factory=GateLimits)  # limits of targets in bf16
    fp8: GateLimits = field(default_factory=GateLimits)  # limits of targets in fp8
    int8: GateLimits = field(default_factory=GateLimits)  # limits of targets in int8
    above_chance: bool = False  # true: all targets fail if torch-fp32 itself is in doubt (no better than chance)
    fusions: bool = False  # true: a target fails if its fusions missed an operation of the model
    timeout_s: float = 1800  # seconds; a target whose check takes longer fails

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise ConfigError(f"gates.timeout_s is {self.timeout_s}: it must be above 0")


@dataclass
class CiConfig:
    """Which targets `make gate` insists on, and what they may lose against another revision."""

    required: list[str] = field(default_factory=list)  # names of targets; each must pass
    max_top1_drop: float = 0.5  # percentage points of top-1
    max_cosine_drop: float = 0.001  # of the lowest cosine, for each tower
    # percent between the 95 % intervals; of unchanged files timed twice, a fifth lies below
    max_slow_down: float = 10.0
    max_size_growth: float = 5.0  # percent of the files' size

    def __post_init__(self) -> None:
        for name in ("max_top1_drop", "max_cosine_drop", "max_slow_down", "max_size_growth"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"ci.{name} is {getattr(self, name)}: give 0 or more")
        if len(set(self.required)) < len(self.required):
            raise ConfigError(f"ci.required lists a name twice: {', '.join(self.required)}")


@dataclass
class RecommendConfig:
    """What a target must keep to be recommended, besides its gate; None: no limit."""

    batch: int = 1  # images, or texts, in the call that counts; one of benchmark.batch_sizes
    max_top1_drop: float | None = 1.0  # percentage points on the evaluation set, 0 to 100
    max_p95_ms: float | None = None  # ms of a call, for each tower at that batch; a p95 needs 100 timed calls
    max_memory_mb: float | None = None  # MB above an empty process; on a GPU, of its memory
    max_size_mb: float | None = None  # MB of both towers' files
    device: Device | None = None  # cpu or cuda; null: either
    runtimes: list[str] | None = None  # those that may win, for example [ort, openvino]; null: all

    def __post_init__(self) -> None:
        if unknown := sorted({*(self.runtimes or [])} - {*RUNTIMES}):
            raise ConfigError(
                f"recommend.runtimes holds {', '.join(unknown)}: accepted are {', '.join(RUNTIMES)}, or null"
            )
        if self.runtimes == []:
            raise ConfigError("recommend.runtimes is empty: name at least one, or null for any")
        if self.batch < 1:
            raise ConfigError(f"recommend.batch is {self.batch}: give one of benchmark.batch_sizes")
        for name in ("max_p95_ms", "max_memory_mb", "max_size_mb"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ConfigError(f"recommend.{name} is {getattr(self, name)}: give more than 0, or null for no limit")
        if self.max_top1_drop is not None and not 0 <= self.max_top1_drop <= 100:
            raise ConfigError(f"recommend.max_top1_drop is {self.max_top1_drop}: accepted are 0 to 100, and null")


@dataclass
class OnnxConfig:
    """How both towers are exported to ONNX."""

    opset: int = 18  # 14 to 23, as far as the exporter writes it
    exporter: Exporter = Exporter.auto  # auto, dynamo (opset 18 to 23) or torchscript (14 to 20)
    # true: vision.onnx takes uint8 RGB images [batch, height, width, 3] of any size; opset 18 and up
    preprocess: bool = False
    normalize: bool = False  # true: embeddings of unit length
    # labels of a zero-shot head: vision.onnx also gives their probabilities
    classifier: list[str] = field(default_factory=list)
    template: str = "a photo of a {}"  # what these labels are put into, in the place of {}

    def __post_init__(self) -> None:
        low, high = OPSETS[self.writer]
        if not low <= self.opset <= high:
            others = ", ".join(f"{name} writes {first} to {last}" for name, (first, last) in OPSETS.items())
            raise ConfigError(
                f"onnx.opset is {self.opset} with onnx.exporter {self.exporter.value}: {others}; "
                "change the opset or the exporter"
            )
        if len(set(self.classifier)) < len(self.classifier) or "" in self.classifier:
            raise ConfigError(f"onnx.classifier holds an empty label or one twice: {self.classifier}")
        if self.template.count("{}") != 1:
            raise ConfigError(f"onnx.template is {self.template!r}: it must hold one {{}} for the label")
        if self.preprocess and self.opset < ANTIALIAS_OPSET:
            raise ConfigError(
                f"onnx.opset is {self.opset} with onnx.preprocess: resizing with antialias needs opset "
                f"{ANTIALIAS_OPSET} or more; raise the opset or set onnx.preprocess: false"
            )

    @property
    def writer(self) -> str:
        """The exporter to use: "dynamo" or "torchscript"."""
        if self.exporter is not Exporter.auto:
            found: str = self.exporter.value
            return found
        return "dynamo" if self.opset >= OPSETS["dynamo"][0] else "torchscript"


@dataclass
class TorchConfig:
    """The checkpoint itself, run by PyTorch in a precision."""

    precision: Precision = Precision.fp32  # fp32, fp16 or bf16, of weights and computation
    compile: bool = False  # true: torch.compile, and a CUDA graph for each shape

    def __post_init__(self) -> None:
        _check_precision("export_torch", self.precision, "fp32", "fp16", "bf16")


@dataclass
class TorchScriptConfig:
    """One target of torch.jit.trace."""

    precision: Precision = Precision.fp32  # of weights and computation; int8 is dynamic INT8 of every Linear

    def __post_init__(self) -> None:
        _check_precision("export_torchscript", self.precision, "fp32", "fp16", "bf16", "int8")


@dataclass
class AccuracyBudget:
    """What INT8 or FP8 may cost on the calibration set."""

    max_top1_drop: float = 100.0  # percentage points of top-1, 0 to 100
    max_flips: float = 100.0  # percent of the images whose answer changes, 0 to 100

    def __post_init__(self) -> None:
        for name in ("max_top1_drop", "max_flips"):
            if not 0 <= getattr(self, name) <= 100:
                raise ConfigError(f"accuracy_budget.{name} is {getattr(self, name)}: accepted are 0 to 100")


@dataclass
class OptimizeConfig:
    """One target with a fused graph."""

    source: str = EXPORTED  # the target that it is made from: `onnx-fp32`, or one of `optimize` in fp32
    precision: Precision = Precision.fp32  # fp32, fp16, bf16 or fp8, of weights and computation
    skip_layer_norm: bool = False  # true: fuse it with the addition before it; on the CPU that takes four times as long
    # what runs the graph; with tensorrt it is left as exported, since TensorRT fuses by itself
    provider: Provider = Provider.own
    # nodes that stay in FP32, such as "vision: MatMul_7"; `clip-deploy apply` writes them
    keep_fp32: list[str] = field(default_factory=list)
    accuracy_budget: AccuracyBudget | None = None  # fp8 only: what breaks it stays in fp16

    def __post_init__(self) -> None:
        _check_nodes("optimize", self.keep_fp32)
        if self.keep_fp32 and self.precision is Precision.fp32:
            raise ConfigError("optimize: keep_fp32 is for precision fp16, bf16 and fp8: remove it, or change it")
        _check_precision("optimize", self.precision, "fp32", "fp16", "bf16", "fp8")
        if self.precision is Precision.bf16 and self.provider is Provider.tensorrt:
            raise ConfigError("optimize: precision bf16 is not for provider tensorrt; accepted are fp32, fp16")
        if self.precision is Precision.fp8 and self.provider is not Provider.torch:
            raise ConfigError(f"optimize: precision fp8 is for provider torch alone, not {self.provider.value}")
        if self.accuracy_budget is not None and self.precision is not Precision.fp8:
            raise ConfigError(f"optimize: accuracy_budget belongs to fp8, not to {self.precision.value}")


@dataclass
class QuantizeConfig:
    """One INT8 target of ONNX Runtime."""

    source: str = EXPORTED  # the target that it is made from: `onnx-fp32`, or one of `optimize` in fp32
    method: Quantization = Quantization.dynamic  # how activations are quantised
    per_channel: bool = True  # true: a scale for each output channel of a weight; false: one for all
    reduce_range: ReduceRange = ReduceRange.auto  # whether weights get 7 bits
    calibration: Calibration = Calibration.minmax  # static only: how the range of an activation is found
    symmetric: bool = False  # static only: activations s8 around zero instead of u8 with a zero point
    # static only: share of the activations' range that moves into weights, above 0 and below 1
    smooth_quant: float | None = None
    accuracy_budget: AccuracyBudget | None = None  # not with weight_only: nodes stay in float until the budget is kept
    # nodes that stay in FP32, such as "vision: MatMul_7"; `clip-deploy apply` writes them
    keep_fp32: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_nodes("quantize", self.keep_fp32)
        if self.smooth_quant is not None and not 0 < self.smooth_quant < 1:
            raise ConfigError(
                f"quantize: smooth_quant is {self.smooth_quant}: accepted are null and 0 to 1, for example 0.5"
            )
        if self.method is not Quantization.static and (self.symmetric or self.smooth_quant is not None):
            raise ConfigError(f"quantize: symmetric and smooth_quant belong to method static, not {self.method.value}")
        if self.method is Quantization.weight_only and self.accuracy_budget is not None:
            raise ConfigError(
                "quantize: accuracy_budget is for method dynamic and static, not for weight_only: remove it"
            )


def _check_threads(section: str, settings: Any, name: str, instead: str = "") -> None:
    if not 1 <= getattr(settings, name) <= MAX_THREADS:
        raise ConfigError(f"{section}.{name} is {getattr(settings, name)}: give 1 to {MAX_THREADS}{instead}")


def _check_precision(section: str, precision: Precision, *accepted: str) -> None:
    if precision.value not in accepted:
        elsewhere = {"export_torch": "export_torchscript", "optimize": "quantize"}.get(section)
        hint = f"; {elsewhere} makes int8" if elsewhere and precision is Precision.int8 else ""
        raise ConfigError(f"{section}: precision is {precision.value}; accepted are {', '.join(accepted)}{hint}")


def _check_nodes(section: str, names: list[str]) -> None:
    if bad := [name for name in names if not re.fullmatch(r"(vision|text): \S+", name)]:
        raise ConfigError(
            f"{section}: keep_fp32 holds {bad[0]!r}: accepted are nodes of a tower, for example 'vision: MatMul_7'"
        )


@dataclass
class OpenVinoConfig:
    """One target of OpenVINO, for CPUs."""

    precision: Precision = Precision.fp32  # fp32, bf16 or int8, of weights and computation
    accuracy_budget: AccuracyBudget | None = None  # int8 only, for each tower by itself

    def __post_init__(self) -> None:
        if self.precision is Precision.fp16:
            raise ConfigError("export_openvino: precision fp16 has no matmuls on a CPU; accepted are fp32, bf16, int8")
        _check_precision("export_openvino", self.precision, "fp32", "bf16", "int8")
        if self.accuracy_budget is not None and self.precision is not Precision.int8:
            raise ConfigError(f"export_openvino: accuracy_budget belongs to int8, not to {self.precision.value}")


@dataclass
class AotiConfig:
    """One target of AOTInductor, compiled by a C++ compiler in half a minute and more."""

    precision: Precision = Precision.fp32  # fp32, fp16 or bf16, of weights and computation

    def __post_init__(self) -> None:
        _check_precision("export_aoti", self.precision, "fp32", "fp16", "bf16")


@dataclass
class BuildEngineConfig:
    """One TensorRT engine, for a GPU."""

    precision: Precision = Precision.fp32  # fp32 or fp16, of weights and computation
    min_batch: int = 1  # the smallest batch that it takes
    opt_batch: int = 8  # the batch that kernels are chosen for
    max_batch: int = 256  # the largest batch that it takes, and holds memory for

    def __post_init__(self) -> None:
        _check_precision("build_engine", self.precision, "fp32", "fp16")
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            raise ConfigError(
                f"build_engine: min_batch, opt_batch, max_batch are {self.min_batch}, {self.opt_batch}, "
                f"{self.max_batch}: accepted are numbers of 1 or more, none below the one before it, for example 1, 8, "
                "256"
            )


@dataclass
class Params:
    """All of params.yaml."""

    model: str  # the checkpoint
    data: str  # the images and captions
    benchmark: str  # how long targets are timed
    gates: str  # what targets must reach
    onnx: OnnxConfig  # the export to ONNX
    device: Device  # what targets run on; change it by `clip-deploy device`, with all that goes with it
    export_torch: dict[str, TorchConfig]  # by name: the checkpoint itself in another precision
    export_torchscript: dict[str, TorchScriptConfig]  # by name: targets of torch.jit.trace
    export_aoti: dict[str, AotiConfig]  # by name: targets of AOTInductor
    export_openvino: dict[str, OpenVinoConfig]  # by name: targets of OpenVINO
    optimize: dict[str, OptimizeConfig]  # by name: fused graphs
    quantize: dict[str, QuantizeConfig]  # by name: INT8 graphs of ONNX Runtime
    build_engine: dict[str, BuildEngineConfig]  # by name: TensorRT engines
    targets: list[str]  # names of the rows of the table, in its order; the first is torch-fp32
    end_to_end: EndToEndConfig  # timing from JPEG bytes to embeddings
    triton: TritonConfig  # the model repository
    triton_check: TritonCheckConfig  # the check of that repository by a real server
    seed: int = 0  # of every shuffle and resampling
    # what must be kept to be recommended and packaged
    recommend: RecommendConfig = field(default_factory=RecommendConfig)
    ci: CiConfig = field(default_factory=CiConfig)  # what `make gate` checks

    def __post_init__(self) -> None:
        built = [getattr(self, section) for section in BUILDERS]
        names = [REFERENCE, EXPORTED, *(name for section in built for name in section)]
        for name in names:
            if not TARGET.fullmatch(name):
                raise ConfigError(
                    f"target {name!r:.80}: names are made of a-z, 0-9 and -, up to 100, the first not - (they become "
                    "paths)"
                )
            if name in (*KEPT, *(f"triton-{engine}" for engine in self.build_engine)):
                raise ConfigError(f"target {name!r}: artifacts/{name} holds something else; give it another name")
            if names.count(name) > 1:
                raise ConfigError(f"target {name!r} is built twice: give each target of params.yaml its own name")
        for key, listed in (("targets", self.targets), ("end_to_end.targets", self.end_to_end.targets)):
            for target in listed:
                if target not in names:
                    raise ConfigError(f"{key} lists {target!r}, which nothing builds: known are {', '.join(names)}")
        if not self.targets or self.targets[0] != REFERENCE:
            raise ConfigError(f"targets must begin with {REFERENCE}: every other row is measured against it")
        if len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"targets lists a name twice: {', '.join(self.targets)}")
        self._check_device()
        whole = [name for name, settings in self.optimize.items() if settings.precision is Precision.fp32]
        for section in ("optimize", "quantize"):
            for name, settings in getattr(self, section).items():
                accepted = [source for source in (EXPORTED, *whole) if source != name]
                if settings.source not in accepted:
                    raise ConfigError(
                        f"{section}.{name}.source is {settings.source!r}: accepted are {', '.join(accepted)} (in fp32)"
                    )

    def _check_device(self) -> None:
        """Refuse what cannot run on the chosen device at all, whatever the machine."""
        for section in BUILDERS:
            for name, settings in getattr(self, section).items():
                if reason := _misplaced(section, settings, self.device):
                    other = Device.cpu if self.device is Device.cuda else Device.cuda
                    raise ConfigError(
                        f"device is {self.device.value} and {section}.{name} {reason}: remove the target, or change "
                        f"the device with `clip-deploy device {other.value}`"
                    )


def _misplaced(section: str, settings: Any, device: Device) -> str | None:
    """Why a target has no place on the device."""
    if device is Device.cpu and section == "build_engine":
        return "is made for a GPU"
    simulated = section == "optimize" and settings.precision is Precision.fp8  # so that a CPU can judge it
    if device is Device.cpu and section == "optimize" and settings.provider is not Provider.own and not simulated:
        return f"has provider {settings.provider.value}, which runs on a GPU"
    if device is Device.cpu and section == "optimize" and settings.precision is Precision.bf16:
        return "is bf16, in which ONNX Runtime has matmuls on a GPU only (accepted are fp32 and fp16)"
    if device is Device.cuda and section in ("export_openvino", "quantize"):
        return "is made for a CPU"
    if device is Device.cuda and settings.precision is Precision.int8:
        return "is int8, which PyTorch computes on a CPU only"
    if (
        device is Device.cpu
        and section.startswith(("export_torch", "export_aoti"))
        and settings.precision is Precision.fp16
    ):
        return "is fp16, which PyTorch computes slowly on a CPU"
    return None


SCHEMAS = {"model": ModelConfig, "data": DataConfig, "benchmark": BenchmarkConfig, "gates": GatesConfig}


def load_params(path: Path, conf: Path) -> Params:
    """Read params.yaml and check it whole, with the conf/ files that it selects.

    Raises ConfigError naming the key, what it holds and what is accepted.
    """
    params = typed(Params, read_yaml(path), str(path))
    choices = {group: load_choice(conf, group, getattr(params, group)) for group in GROUPS}
    timed = choices["benchmark"].batch_sizes
    if params.recommend.batch not in timed:
        raise ConfigError(
            f"{path}: recommend.batch is {params.recommend.batch}, and benchmark {params.benchmark} times "
            f"{', '.join(map(str, timed))}: give one of these, or add it to conf/benchmark/{params.benchmark}.yaml"
        )
    return params


def load_choice(conf: Path, group: str, name: str) -> Any:
    """Read conf/<group>/<name>.yaml into the group's dataclass."""
    path = find_choice(conf, group, name)
    return typed(SCHEMAS[group], read_yaml(path), str(path), prefix=f"{group}.")


def find_choice(conf: Path, group: str, name: str) -> Path:
    """Raises ConfigError where there is no conf/<group>/<name>.yaml."""
    known = sorted(choice.stem for choice in (conf / group).glob("*.yaml"))
    if name not in known:
        raise ConfigError(
            f"{group} is {name!r:.80}: accepted are {', '.join(known)}; a new one is a new file in conf/{group}/"
        )
    if not CHOICE.fullmatch(name) or name.lower() in ("null", "true", "false") or _as_float(name) is not None:
        raise ConfigError(
            f"{group} is {name!r:.80}: rename that file of conf/{group}/. Names are made of a-z, A-Z, 0-9, dots, - and "
            "_ (they become words of commands), are no number, and none of null, true, false"
        )
    return conf / group / f"{name}.yaml"


def read_yaml(path: Path) -> DictConfig:
    """A file of settings. Raises ConfigError where it cannot be read, is not YAML, or holds no `key: value` lines."""
    try:
        _refuse_bomb(path)
        content = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply, or holds itself: write it without aliases") from error
    except (YAMLError, OmegaConfBaseException, ValueError) as error:  # ValueError: not UTF-8, or a number without end
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path} must hold `key: value` lines")
    return content


def _refuse_bomb(path: Path) -> None:
    """Raise ConfigError where aliases (*name) write out to more than MAX_NODES: nine lines can stand for billions."""
    text = path.read_text(encoding="utf-8")
    if not ALIAS.search(text):
        return
    sizes: dict[int, int] = {}

    def size(node: Node) -> int:
        if id(node) not in sizes:
            children = node.value if isinstance(node.value, list) else []
            pairs = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
            sizes[id(node)] = 1 + sum(size(part) for part in pairs)
        return sizes[id(node)]

    if size(yaml.compose(text, yaml.SafeLoader)) > MAX_NODES:
        raise ConfigError(f"{path} has aliases that write out to more than {MAX_NODES:,} entries: write them out")


def typed(schema: type[T], content: DictConfig, where: str, prefix: str = "") -> T:
    """Turn a DictConfig into `schema`, with its checks; ConfigError names the key and what is accepted."""
    try:
        plain = OmegaConf.to_container(content, resolve=True)  # a reference may lead to settings of another kind
        _check_shape(schema, plain, prefix.removesuffix("."))
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(plain))
        _check_each(merged)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise ConfigError(f"{where}: {prefix}{error.full_key} is missing: `git diff` shows what it was") from error
    except OmegaConfBaseException as error:
        key = prefix + (error.full_key or "")
        if isinstance(error, ConfigKeyError):
            known = ", ".join(_keys(error.object_type) or _keys(schema))
            raise ConfigError(f"{where}: unknown key {key}; accepted are {known}") from error
        raise ConfigError(f"{where}: {key}: {(error.msg or str(error)).splitlines()[0]}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_each(settings: Any) -> None:
    """Raise ConfigError where settings of one target, or limits of one precision, are at odds: it says of which."""
    parts = [(section, settings[section]) for section in BUILDERS if section in settings]
    parts += [("gates", settings)] if OmegaConf.get_type(settings) is GatesConfig else []
    for section, group in parts:
        for name in group:
            try:
                if isinstance(group[name], DictConfig):
                    OmegaConf.to_object(group[name])
            except ConfigError as error:
                raise ConfigError(f"{section}.{name}: {str(error).removeprefix(f'{section}: ')}") from error


def _check_shape(kind: Any, value: Any, key: str) -> None:
    """Raise ConfigError where a list, a group of settings or a single value stands in the place of another of these.

    OmegaConf refuses them too, in words of its own classes. It takes ??? for "as the default is".
    """
    if value == "???":
        raise ConfigError(f"{key} is ???: give a value")
    kinds = [each for each in get_args(kind) if each is not NoneType] if get_origin(kind) in (Union, UnionType) else []
    if kinds and (value is None or len(kinds) > 1):
        return
    kind = kinds[0] if kinds else kind
    if get_origin(kind) is list:
        if not isinstance(value, list):
            example = "as [a, b]" if isinstance(value, dict) else f"as {json.dumps([value], ensure_ascii=False)}"
            way = "[] for an empty one" if value is None else example
            raise ConfigError(f"{key} is {_shown(value)}: give a list, {way}")
        for place, item in enumerate(value):
            _check_shape(get_args(kind)[0], item, f"{key}[{place}]")
    elif get_origin(kind) is dict or is_dataclass(kind):
        if not isinstance(value, dict):
            known = f" of {', '.join(_keys(kind))}" if _keys(kind) else ""
            raise ConfigError(f"{key} is {_shown(value)}: give `key: value` lines{known}")
        hints = get_type_hints(kind) if is_dataclass(kind) else {}
        inner = Any if hints else get_args(kind)[1]
        for name, item in value.items():
            if not hints and not isinstance(name, str):
                raise ConfigError(f"{key} has a key {name!r:.80}, as YAML reads it: put it in quotes")
            _check_shape(hints.get(name, inner), item, f"{key}.{name}" if key else str(name))
    elif kind is not Any and isinstance(value, list | dict):
        raise ConfigError(f"{key} is {_shown(value)}: give a single value")
    elif kind is not Any:
        _check_value(kind, value, key)


def _check_value(kind: Any, value: Any, key: str) -> None:
    """Raise ConfigError where a single value is of another kind.

    YAML reads `no` as false, 010 as 8 and 4:30 as 270: where text is asked for, each would be another text without a
    word. NaN is no number here: it is neither below nor above any limit.
    """
    if issubclass(kind, Enum):
        if not isinstance(value, kind) and value not in kind.__members__:
            raise ConfigError(f"{key} is {_shown(value)}: accepted are {', '.join(kind.__members__)}")
    elif kind is str and isinstance(value, bool | int | float):
        raise ConfigError(f"{key} is {_shown(value)}, as YAML reads it: put text in quotes")
    elif value is None or (kind is int and _as_int(value) is None) or (kind is float and _as_float(value) is None):
        raise ConfigError(f"{key} is {_shown(value)}: give {WANTED[kind]}")


def _as_int(value: Any) -> int | None:
    """What stands for a whole number; a text may."""
    text = isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+", value)
    return int(value) if text or type(value) is int else None


def _as_float(value: Any) -> float | None:
    """What stands for a finite number; a text may."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is not None and isfinite(number) else None


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r:.80}"


def _keys(schema: Any) -> list[str]:
    return [item.name for item in fields(schema)] if is_dataclass(schema) else []


def read_sections(path: Path, names: list[str]) -> tuple[DictConfig, dict[str, Any]]:
    """params.yaml as it stands, and those of these sections that it has. Raises ConfigError as _check_shape does."""
    content = read_yaml(path)
    hints = get_type_hints(Params)
    taken = {name: content.get(name) for name in names if name in content}
    try:
        plain: Any = OmegaConf.to_container(content, resolve=True)  # a reference may lead to another section
        for name in taken:
            _check_shape(hints[name], plain[name], name)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {(error.msg or str(error)).splitlines()[0]}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return content, taken


def check_key(schema: type, key: str, taken: dict[str, Any]) -> None:
    """Raise ConfigError where `schema` has no such setting, as `benchmark.seconds`.

    Args:
        taken: its sections of params.yaml, which say what targets there are.
    """
    kind: Any = schema
    parts = key.split(".")
    for part in parts:
        if is_dataclass(kind):
            hints = get_type_hints(kind)
            known = _keys(kind)
        elif get_origin(kind) is dict and is_dataclass(get_args(kind)[1]):
            known = [str(name) for name in taken.get(parts[0], ())]
            hints = dict.fromkeys(known, get_args(kind)[1])
        else:
            return
        if part not in known:
            raise ConfigError(f"unknown key {key:.80}: {part!r:.80} is none of {', '.join(known) or 'any'}")
        kind = hints[part]
        if get_origin(kind) in (Union, UnionType):
            kind = get_args(kind)[0]


def sections(schema: type) -> list[str]:
    """Names of the settings that a stage takes from params.yaml: its fields that Params has too."""
    known = {item.name for item in fields(Params)}
    return [name for name in get_type_hints(schema) if name in known]


def is_per_target(name: str) -> bool:
    """Whether a section of params.yaml maps target names to settings."""
    hint = get_type_hints(Params)[name]
    return get_origin(hint) is dict and is_dataclass(get_args(hint)[1])
