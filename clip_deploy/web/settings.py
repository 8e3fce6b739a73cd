"""What a server is told, each with its default."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from clip_deploy.core.environment import MAX_THREADS
from clip_deploy.core.errors import DataError

LEAST = {
    "port": 0,
    "workers": 1,
    "max_wait_ms": 0,
    "max_queue": 1,
    "max_body_mb": 1,
    "max_megapixels": 1,
    "max_items": 1,
    "timeout_s": 1,
    "drain_s": 0,
}
DAY_S = 86_400
MOST = {  # the others have none
    "port": 65_535,
    "workers": MAX_THREADS,
    "max_wait_ms": 1_000 * DAY_S,
    "timeout_s": DAY_S,
    "drain_s": DAY_S,
}


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        packages: FOLDER, NAME=FOLDER or NAME:VERSION=FOLDER; the first answers where a request names none.
        device, threads, feed: as ZeroShotClassifier.open takes them.
        workers: processes on one port, each with all packages.
        max_wait_ms: how long a batch waits for images that are being read at that time.
        max_queue: texts, and images, of one package that may wait; what comes beyond is refused with 429.
        max_body_mb: of a request, and of an image that is fetched, in 10^6 bytes.
        max_megapixels: of an image, in 10^6.
        max_items: texts and images of one request.
        timeout_s: for a request's body to come (408), and for its answer to be computed (503).
        drain_s: after SIGTERM, how long new requests are still answered while /health/ready says 503.
        api_key_file: a key a line; without one, everyone may ask.
        allow_hosts: names besides localhost by which a server on a local address may be asked, as by a proxy.
        image_hosts: from which images may be fetched.
        index: what `embed` or `index` wrote, which is searched; None answers no search.
        images: the folder that was embedded, from which found pictures are shown; None shows their names.
    """

    packages: tuple[str, ...] = ("artifacts/package",)
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    device: str | None = None
    threads: int | None = None
    feed: str = "exact"
    max_wait_ms: float = 5
    max_queue: int = 1024
    max_body_mb: float = 16
    max_megapixels: float = 64
    max_items: int = 256
    timeout_s: float = 30
    drain_s: float = 2
    api_key_file: Path | None = None
    allow_hosts: tuple[str, ...] = ()
    image_hosts: tuple[str, ...] = ()
    index: Path | None = None
    images: Path | None = None

    def __post_init__(self) -> None:
        if self.images and not self.index:
            raise DataError(
                "--images is given without --index: give --index too, which is what `clip-deploy embed` wrote of that "
                "folder"
            )
        for name, least in LEAST.items():
            value, most = getattr(self, name), MOST.get(name)
            if not least <= value <= (most or sys.float_info.max):  # NaN is within no bounds
                finite = " and no infinity" if value == math.inf else ""
                accepted = f"{least} to {most:,}" if most else f"{least} or more{finite}"
                raise DataError(f"--{name.replace('_', '-')} is {value}: give {accepted}")

    @property
    def max_body(self) -> int:
        """Bytes."""
        return int(self.max_body_mb * 1e6)
