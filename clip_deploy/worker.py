"""A process of its own that runs one target and times its calls: python -m clip_deploy.worker FOLDER THREADS

Reads one JSON request a line from standard input and answers with one JSON line on standard output:
    {"tower": "vision", "batch": 8}     take these inputs from now on
    {"calls": 5}                        run so often and answer the milliseconds of each call
    {"memory": true}                    peak memory above the empty interpreter, in bytes
"""

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_deploy.runtimes import Encoder


def peak_bytes() -> int:
    """Highest resident set of this process so far."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])  # ru_maxrss would count the parent's pages before exec
    except (OSError, IndexError):
        scale = 1 if sys.platform == "darwin" else 1024
        return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


EMPTY = peak_bytes()


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    from time import perf_counter

    from clip_deploy.errors import DeployError
    from clip_deploy.runtimes import open_encoder

    try:
        encoder = open_encoder(folder, threads)
    except DeployError as error:
        print(json.dumps({"error": str(error)}), file=answers)
        return
    print(json.dumps({"ready": True}), file=answers)
    call: Callable[[], object] = lambda: None  # noqa: E731
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, object]
        if "tower" in request:
            call = prepare_call(encoder, request)
            answer = {"ready": True}
        elif "calls" in request:
            answer = {"ms": [timed(call, perf_counter) for _ in range(request["calls"])]}
        else:
            answer = {"bytes": peak_bytes() - EMPTY}
        print(json.dumps(answer), file=answers)


def die_with_parent() -> None:
    """A stopped process would outlive a killed parent for ever. See prctl(2), PR_SET_PDEATHSIG."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def prepare_call(encoder: "Encoder", request: dict) -> Callable[[], object]:
    """A call without arguments on inputs of the asked shape; speed does not depend on their values."""
    import numpy as np

    rng = np.random.default_rng(0)
    if request["tower"] == "vision":
        pixels = rng.normal(size=(request["batch"], 3, *request["image_size"])).astype(np.float32)
        return lambda: encoder.encode_images(pixels)
    ids = np.full((request["batch"], request["tokens"]), 1, dtype=np.int64)
    mask = np.ones_like(ids)
    return lambda: encoder.encode_texts(ids, mask)


def timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return 1000 * (clock() - start)


if __name__ == "__main__":
    main()
