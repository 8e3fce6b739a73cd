"""What /metrics tells Prometheus.

With several workers, each writes its numbers into files of one folder (prometheus_client's multiprocess mode), and any
worker answers for all: a scrape reaches whichever worker accepts it, and counters outlive a worker that was replaced.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client reads it when it is imported
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
OTHER = "other"  # in the place of a route, for requests of none
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class TowerMetrics:
    """Those of one tower of one package, with its labels."""

    def __init__(self, metrics: "Metrics", model: str, tower: str) -> None:
        self.held = metrics.held.labels(model, tower)
        self.prepare = metrics.stage.labels(model, tower, "prepare")
        self.queue = metrics.stage.labels(model, tower, "queue")
        self.encode = metrics.stage.labels(model, tower, "encode")
        self.batch = metrics.batch.labels(model, tower)

    def observe_batch(self, rows: int, queue_s: float, encode_s: float) -> None:
        self.batch.observe(rows)
        self.queue.observe(queue_s)
        self.encode.observe(encode_s)


class RouteMetrics:
    """Those of one route. Labels are looked up once: it would take as long as to count."""

    def __init__(self, metrics: "Metrics", route: str) -> None:
        self.route, self.requests = route, metrics.requests
        self.latency, self.read = metrics.latency.labels(route), metrics.read.labels(route)
        self.by_status: dict[int, Counter] = {}

    def observe(self, status: int, seconds: float) -> None:
        """A request was answered."""
        if status not in self.by_status:
            self.by_status[status] = self.requests.labels(self.route, str(status))
        self.by_status[status].inc()
        self.latency.observe(seconds)


class Metrics:
    """All that is counted, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        tower = ["model", "tower"]
        self.requests = Counter(
            "clip_requests", "Requests by route and HTTP status", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "clip_request_seconds",
            "From a request's headers to its answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.read = Histogram(
            "clip_read_seconds", "To receive a request's body", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.stage = Histogram(
            "clip_stage_seconds",
            "prepare: of each image; queue: the longest wait of a batch; encode: of each batch",
            [*tower, "stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "clip_batch_rows", "Texts or images of a batch", tower, buckets=BATCHES, registry=self.registry
        )
        self.held = Gauge(
            "clip_queue_rows",
            "Texts or images of requests that wait for an answer",
            tower,
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.cache = Counter(
            "clip_text_cache", "Texts looked up in the cache", ["model", "result"], registry=self.registry
        )
        self.models = Gauge(
            "clip_model_info",
            "Each package that is served, with its fingerprint",
            ["model", "fingerprint"],
            registry=self.registry,
            multiprocess_mode="livemax",
        )

    def text(self) -> bytes:
        """All numbers, of all workers, as Prometheus reads them."""
        folder = os.environ.get(FOLDER)
        if not folder:
            return generate_latest(self.registry)
        for process in _ended(Path(folder).glob("gauge_live*.db")):
            mark_process_dead(process, folder)  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def _ended(files: Iterable[Path]) -> set[int]:
    """Processes that left files of their gauges behind."""
    processes = {int(file.stem.rpartition("_")[2]) for file in files}
    running = set()
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, 0)
            running.add(process)
    return processes - running
