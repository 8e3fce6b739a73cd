"""What stages hand on in reports/. Where an entry is None or empty, it was not or could not be measured.

An embedding's closeness is a cosine; shares and recalls are in percent, drops in percentage points.
"""

from dataclasses import dataclass, field

from clip_deploy.core.parsing import FLAT

WIDE = 1.5  # an interval whose ends, or a p90 and a p50, that lie further apart, as a ratio, decide nothing

Scalar = str | int | float | bool | None
Fact = Scalar | list[str] | list[int] | dict[str, Scalar] | dict[str, dict[str, list[int]]]
Facts = dict[str, Fact]  # how a target was made, for the report
Metrics = dict[str, str | float | None]  # of one target in targets.json: None was measured and decides nothing


@dataclass(frozen=True)
class Parity:
    """Embeddings held against the reference's, row by row; `finite` is False where NaN or infinity was found."""

    cosine_min: float
    cosine_p1: float
    cosine_mean: float
    max_abs_diff: float
    finite: bool


@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot classes: top-1 and top-5 in percent, the drop from the reference in points with its 95 % interval."""

    top1: float
    top5: float
    reference_top1: float
    top1_drop: float
    top1_drop_low: float
    top1_drop_high: float
    mcnemar_p: float


@dataclass(frozen=True)
class Retrieval:
    """Recall at 1 and 5, in percent."""

    image_to_text_r1: float
    image_to_text_r5: float
    text_to_image_r1: float
    text_to_image_r5: float


@dataclass(frozen=True)
class HeadAgreement:
    """A zero-shot head beside the untouched model: how often both give one label, or why it was not compared."""

    labels: int | None = None
    agreement_percent: float | None = None
    unchecked: str | None = None


@dataclass(frozen=True)
class PixelParity:
    """Pixels of a graph's preprocessing beside the processor's, in 1/255 before normalisation."""

    max_diff: float
    mean_diff: float
    differing_percent: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found of a target's embeddings.

    Attributes:
        parity: by tower.
        shapes: lowest cosine at other batches and lengths, as "text, batch 3".
        length_error: how far a normalised embedding's length is off 1.
        flips: percent of the images whose answer is not the reference's.
        evaluation: which set it was.
    """

    parity: dict[str, Parity]
    shapes: dict[str, float]
    length_error: float | None = None
    classifier: HeadAgreement | None = None
    zero_shot: ZeroShot | None = None
    retrieval: Retrieval | None = None
    flips: float
    evaluation: str


@dataclass(frozen=True)
class Graph:
    """A tower's ONNX file: `fusion` counts fused operators (onnx_file.census)."""

    ir_version: int
    producer: str
    opsets: dict[str, int]
    inputs: dict[str, list[str | int]]
    outputs: dict[str, list[str | int]]
    nodes: int
    fusion: dict[str, int]


@dataclass(frozen=True)
class Placement:
    """How many nodes each provider runs, and whether as a CUDA graph."""

    nodes: dict[str, int]
    graph: bool


@dataclass(frozen=True)
class CurvePoint:
    """What INT8 costs with this share of the nodes quantised: top-1 in points, flips in percent, mean cosine."""

    share: float
    top1_drop: float
    flips: float
    cosine: float


@dataclass(frozen=True)
class Search:
    """What the search for an accuracy budget found.

    Attributes:
        left_in_float: names of nodes, "<tower>: <node>", the most sensitive first.
        nodes: how many can be quantised.
        top1_drop, flips: of the calibration set, in percentage points and percent, with these nodes left in float.
        cosine: mean over the calibration set of the cosine with FP32, both towers alike.
        sensitivity: 1 - mean cosine of the embeddings where one node alone is quantised, in descending order.
        curve: the least sensitive nodes are quantised first.
    """

    left_in_float: list[str]
    nodes: int
    top1_drop: float
    flips: float
    cosine: float
    sensitivity: dict[str, float]
    curve: list[CurvePoint]


@dataclass(frozen=True)
class Drop:
    """Where one tower's cosine with its FP32 graph falls.

    Attributes:
        layer: the part of a layer behind which it has fallen first, as transformers names its weights.
        node: the node there behind which it has fallen most.
        cosine_before, cosine_after: lowest of any row, in front of the layer's part and behind it.
        nodes: to keep in FP32, "<tower>: <node>", of all parts that have to be for the gate; an FP32 target has none.
    """

    tower: str
    layer: str
    node: str
    cosine_before: float
    cosine_after: float
    nodes: list[str]


@dataclass(frozen=True)
class Diagnosis:
    """Where a target that missed its gate leaves its FP32 graph, `reference`; `notes` say why a tower has no drop."""

    reference: str | None
    drops: list[Drop]
    notes: list[str]


@dataclass(frozen=True)
class Limit:
    """A limit of a gate with the worst value that was held against it, or why none was."""

    limit: float
    value: float | None = None
    unchecked: str | None = None


@dataclass(frozen=True)
class PairVerdict:
    """What was found of two targets as one: which for each tower, the gate that they were held to, and what it said."""

    towers: dict[str, str]
    precision: str
    status: str
    reasons: list[str]


@dataclass(frozen=True, kw_only=True)
class Validation:
    """reports/validate/<target>.json.

    Attributes:
        status: "pass", "fail" (for `reasons`) or "unavailable" (for one).
        files: SHA-256 of each file that was judged.
        graphs: by tower, of an ONNX target.
        doubts: what speaks against the reference itself (chance.doubts).
        measured: None where it could not be opened or run.
        placement: by tower, on a GPU.
        limits: by the gate's setting.
    """

    status: str
    reasons: list[str]
    precision: str
    runtime: str
    device: str
    build: Facts
    trained: bool
    search: Search | None = None
    size_mb: float | None = None
    files: dict[str, str] = field(default_factory=dict)
    graphs: dict[str, Graph] = field(default_factory=dict)
    pixels: PixelParity | None = None
    doubts: list[str] | None = None
    measured: Measured | None = field(default=None, metadata=FLAT)
    placement: dict[str, Placement] = field(default_factory=dict)
    diagnosis: Diagnosis | None = None
    limits: dict[str, Limit] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One tower at one batch size.

    Attributes:
        p50_ms: of a call, with its 95 % interval; p90, p95 and p99 where the number of calls supports them.
        throughput_per_s: images or texts.
        speedup: over the reference, with its 95 % interval.
        gflop: the reference's work in a call.
        queued_ms: of a call where the next is asked for before this one has ended; on a GPU only.
    """

    p50_ms: float
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    p50_low_ms: float
    p50_high_ms: float
    calls: int
    throughput_per_s: float
    speedup: float
    speedup_low: float
    speedup_high: float
    reference_p50_ms: float
    gflop: float | None = None
    queued_ms: float | None = None

    @property
    def is_wide(self) -> bool:
        """Whether the interval of the speed-up decides nothing: the machine was busy. So is NaN."""
        return not self.speedup_high <= WIDE * self.speedup_low


@dataclass(frozen=True)
class Power:
    """The whole GPU while images are encoded without a pause; its clock before the benchmark and after it."""

    batch: int
    mean_w: float
    j_per_1000_images: float
    clock_mhz: list[int | None]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """reports/benchmark/<target>.json.

    Attributes:
        status: "measured", or "unavailable" for `reason`.
        preprocessed_size: of the images that it was timed with where it preprocesses them, [height, width] in pixels.
        towers: by tower and batch size.
        memory_mb: peak resident memory above the empty interpreter at the smallest batch; gpu_memory_mb of the process.
        matrix_tflops: what FP16 matmuls reach on that GPU.
    """

    status: str
    reason: str | None = None
    threads: int | None = None
    preprocessed_size: list[int] = field(default_factory=list)
    towers: dict[str, dict[int, Timing]] = field(default_factory=dict)
    memory_mb: float | None = None
    gpu_memory_mb: float | None = None
    power: Power | None = None
    matrix_tflops: float | None = None
    size_mb: float | None = None


@dataclass(frozen=True)
class FlowBatch:
    """A feed and an encoder at one batch size: images per second of the median pass, milliseconds of one image."""

    images_per_s: float
    images_per_s_low: float
    images_per_s_high: float
    decode_ms: float
    preprocess_ms: float
    encode_ms: float

    @property
    def bottleneck(self) -> str:
        """What holds the flow up: "encode" where it takes half of an image's time or more, else what it waits for.

        How many workers there are does not tell: they may share cores, or Python's lock.
        """
        if self.encode_ms >= 1000 / self.images_per_s / 2:
            return "encode"
        return "decode" if self.decode_ms >= self.preprocess_ms else "preprocess"


@dataclass(frozen=True)
class FeedTiming:
    """reports/benchmark/end_to_end/<target>.json: one feed into the target.

    Attributes:
        status: "measured", "fail" where it misses the gate of its target's precision, "wrong" where its pixels give
            other embeddings, or "unavailable".
        cosine_min: lowest cosine with the embeddings of what the checkpoint's own processor makes of the photos.
        top1_drop, flips: percentage points, and percent of the photos with another answer, against that processor.
        workers: threads that decode and preprocess.
        through_host: whether pixels leave the GPU before the encoder takes them.
        batches: by batch size; `best_batch` has most images per second.
    """

    status: str
    reason: str | None = None
    cosine_min: float | None = None
    top1_drop: float | None = None
    flips: float | None = None
    workers: int | None = None
    through_host: bool | None = None
    best_batch: int | None = None
    batches: dict[int, FlowBatch] = field(default_factory=dict)

    @property
    def best(self) -> FlowBatch | None:
        return None if self.best_batch is None else self.batches[self.best_batch]


@dataclass(frozen=True)
class Photos:
    """The JPEG files that are fed: pixels of a side, JPEG quality, mean kilobytes of a file."""

    count: int
    height: int
    width: int
    quality: int
    kilobytes: float


@dataclass(frozen=True)
class EndToEnd:
    """From JPEG bytes to embeddings, by the name of the feed; nothing but reasons where none could be fed."""

    feeds: dict[str, FeedTiming]
    photos: Photos | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Recall:
    """Recall in percent, with its 95 % bootstrap interval over the queries."""

    percent: float
    low: float
    high: float


@dataclass(frozen=True)
class VectorCost:
    """What vectors of one width and type cost a search: bytes of a vector, recall by how many nearest are asked for."""

    dimensions: int
    dtype: str
    bytes: int
    recall: dict[int, Recall]


@dataclass(frozen=True)
class StoredVectors:
    """reports/vectors.json: recall against float32 at full width (evaluate/stored_vectors.py).

    Attributes:
        queries: how many; `of` says whether they are captions or prompts.
        images: how many are searched.
        dimension: the full width.
        left_out: widths and types that cannot be stored, with the reason.
    """

    queries: int
    of: str
    images: int
    dimension: int
    costs: list[VectorCost]
    left_out: list[str]
