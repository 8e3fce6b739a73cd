"""A process of its own that runs one target and times its calls.

    python -m clip_deploy.timing.latency_worker FOLDER THREADS

Reads one JSON request a line from standard input and answers with one JSON line on standard output:
    {"tower": "vision", "batch": 8...}  take inputs of this shape from now on (latency.shape_request says what else)
    {"calls": 5}                        run so often and answer the milliseconds of each call
    {"queued": 50}                      ask for so many without a wait and answer the milliseconds of one; GPUs only
    {"rows": true}                      run once and answer the embeddings
    {"seconds": 1.0}                    run for so long and answer the number of calls
    {"flop": true}                      count the call's floating-point operations; PyTorch only
    {"matrix_rate": true}               time matmuls on the GPU and answer TFLOP/s; PyTorch only
    {"memory": true}                    peak memory above the empty interpreter and this process's on the GPU, in bytes
What fails is answered as {"error": reason}.
"""

import gc
import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TextIO, cast

from clip_deploy.core.errors import DeployError
from clip_deploy.core.model import image_dtype, image_feed, random_images
from clip_deploy.core.subprocesses import die_with_parent
from clip_deploy.runtimes import text_feed
from clip_deploy.timing import nvml

if TYPE_CHECKING:
    from clip_deploy.runtimes import DeviceEncoder, Encoder


def peak_bytes() -> int:
    """Highest resident set of this process so far."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])  # ru_maxrss would count the parent's pages before exec
    except (OSError, IndexError):
        scale = 1 if sys.platform == "darwin" else 1024
        return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


EMPTY = peak_bytes()
MANY = 100_000  # objects: libraries make a million that stay, and none is looked at so often while they are imported


def main() -> None:
    """Open the target that the command line names, and answer requests on stdin until it ends."""
    from clip_deploy.runtimes import open_encoder

    serve(open_encoder, prepare_call)


def serve(
    open_target: Callable[[Path, int], "Encoder"], prepare: Callable[["Encoder", dict[str, Any]], Callable[..., Any]]
) -> None:
    """Open the target that the command line names and answer requests; needs the standard library only.

    Args:
        open_target: from a folder and a number of threads.
        prepare: from the encoder and a request with "tower" to the call that is timed from then on.
    """
    die_with_parent()
    answers = answer_stream()
    call: Callable[[], Any] = lambda: None  # noqa: E731

    def answer(request: dict[str, Any]) -> dict[str, object]:
        nonlocal call
        if "tower" in request:
            call = prepare(encoder, request)
            return {"ready": True}
        if "calls" in request:
            return {"ms": [timed(call, perf_counter) for _ in range(request["calls"])]}
        if "queued" in request:
            return {"ms": cast("DeviceCall", call).queued_ms(request["queued"], perf_counter)}
        if "rows" in request:
            return {"rows": call().tolist()}
        if "seconds" in request:
            return {"calls": repeated(call, request["seconds"])}
        if "flop" in request or "matrix_rate" in request:
            from clip_deploy.timing.flops import count_flop, matrix_tflops

            return {"flop": count_flop(call)} if "flop" in request else {"tflops": matrix_tflops()}
        return {"bytes": peak_bytes() - EMPTY, "gpu_bytes": nvml.process_bytes(os.getpid())}

    try:
        usual = gc.get_threshold()
        gc.set_threshold(MANY)
        encoder = open_target(Path(sys.argv[1]), int(sys.argv[2]))
        gc.freeze()
        gc.set_threshold(*usual)
        print(json.dumps({"ready": True}), file=answers)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=answers)
    except Exception as error:
        print(json.dumps({"error": reason(error)}), file=answers)
        if not isinstance(error, DeployError):
            raise


def reason(error: Exception) -> str:
    """The message that a table can show: one line."""
    lines = str(error).strip().splitlines()
    if isinstance(error, DeployError):
        return str(error)
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def answer_stream() -> TextIO:
    """Standard output for the answers alone: what libraries print there goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def prepare_call(encoder: "Encoder", request: dict[str, Any]) -> Callable[[], object]:
    """A call without arguments on random inputs of the asked shape.

    On a GPU the inputs lie there already, and the call ends when the GPU has done its work.
    """
    import numpy as np

    encode: Callable[[], object]
    rng = np.random.default_rng(0)
    if request["tower"] == "vision":
        if encoder.image_input == "images":
            images: np.ndarray = rng.integers(0, 256, (request["batch"], *request["photo_size"], 3), dtype=np.uint8)
        else:
            images = random_images(request["batch"], image_dtype(request["image_size"], request["patches"]))
        arrays, encode = list(image_feed(images).values()), partial(encoder.encode_images, images)
    else:
        ids = rng.choice(np.array(request["words"], dtype=np.int64), (request["batch"], request["tokens"]))
        texts = ids, np.ones_like(ids)
        arrays, encode = list(text_feed(encoder.text_inputs, *texts).values()), partial(encoder.encode_texts, *texts)
    if request.get("device", "cpu") == "cuda":
        device_encoder = cast("DeviceEncoder", encoder)
        return DeviceCall(device_encoder.bind(request["tower"], arrays), device_encoder.wait)
    return encode


@dataclass
class DeviceCall:
    """A call on inputs that lie on the GPU already; it ends when the GPU has done its work."""

    ask: Callable[[], object]
    wait: Callable[[], None]

    def __call__(self) -> None:
        self.ask()
        self.wait()

    def queued_ms(self, calls: int, clock: Callable[[], float]) -> float:
        """Milliseconds of one of `calls` that are asked for one after the other, with one wait behind the last."""
        start = clock()
        for _ in range(calls):
            self.ask()
        self.wait()
        return 1000 * (clock() - start) / calls


def repeated(call: Callable[[], object], seconds: float) -> int:
    """Calls done in about `seconds`."""
    calls, end = 0, perf_counter() + seconds
    while perf_counter() < end:
        call()
        calls += 1
    return calls


def timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """How long a call takes, in ms; `clock` is in seconds."""
    start = clock()
    call()
    return 1000 * (clock() - start)


if __name__ == "__main__":
    main()
