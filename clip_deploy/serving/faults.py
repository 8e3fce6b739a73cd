"""Requests that no server should have to meet, and whether it still answers after each. Runs beside `client`.

A client's own mistake must be refused as such, also when it is sent again: HTTP's 400 or 404, or gRPC's
INVALID_ARGUMENT. Two of Triton 2.51's own answers to a body that is no JSON are 500; the models' answers are ours.
"""

import io
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache, partial

import numpy as np
from tritonclient.utils import InferenceServerException

from clip_deploy.core.served import Fault
from clip_deploy.serving.job import ClientJob
from clip_deploy.serving.triton_client import (
    SAME,
    SAME_ANSWER,
    TIMEOUT_S,
    Client,
    cosine,
    embed_images,
    question,
    short,
    together,
)

LARGE_BYTES = 64_000_000  # a body that is far too large
BOMB_SIDE = 30_000  # pixels: 900 million in a file of a few hundred kilobytes
THIN_LENGTH = 1_000_000  # pixels of an image one pixel wide, in a file of 4 kB
KILLED_AFTER_S = 0.5
TWICE = 2  # a mistake is sent: what caches errors refuses the first time alone
MISTAKES_EACH = 25  # requests of one of eight clients
IDLE = 100  # connections that are opened and never used

HAMMER = """
import sys, threading
import numpy as np
import tritonclient.http as http
def send():
    client = http.InferenceServerClient(sys.argv[1], network_timeout=60)
    array = np.load(sys.argv[3])
    given = http.InferInput(sys.argv[2], array.shape, sys.argv[4])
    given.set_data_from_numpy(array)
    while True:
        client.infer("clip_vision", [given])
threads = [threading.Thread(target=send) for _ in range(4)]
for thread in threads:
    thread.start()
print("sending", flush=True)
for thread in threads:
    thread.join()
"""


def provoke(job: ClientJob) -> list[Fault]:
    """Each fault, and what came of it; the server survived where it then answers an image and a question as before."""
    expected = asked(job)
    record = []
    for name, fault in FAULTS.items():
        answers = [answer_to(fault, job) for _ in range(TWICE if fault in MISTAKES else 1)]
        answer, code = next((each for each in answers if each[1] not in REFUSED), answers[-1])
        refused = code in REFUSED if fault in MISTAKES else None
        record.append(Fault(name, answer, refused, answers_as_before(job, expected)))
    return record


def answer_to(fault: Callable[[ClientJob], str], job: ClientJob) -> tuple[str, str]:
    """What was answered, and the code of an error."""
    try:
        return fault(job), ""
    except InferenceServerException as error:
        return short(error), str(error.status())
    except OSError as error:  # the connection was closed
        return short(error), ""


def asked(job: ClientJob) -> tuple[np.ndarray, np.ndarray | None]:
    """An embedding, and what all models together make of a file and texts."""
    client = Client(job, "http")
    return embed_images(client, job, job.batches("images")[0][:1]), question(client, job)


def answers_as_before(job: ClientJob, expected: tuple[np.ndarray, np.ndarray | None]) -> bool:
    """Whether the server is ready, and answers an image and a question as it did before the fault."""
    try:
        ready = Client(job, "http").inner.is_model_ready("clip_zero_shot")
        (image, answer), (image_before, before) = asked(job), expected
    except (InferenceServerException, OSError):
        return False
    alike = cosine(image[0], image_before[0]) > SAME
    return ready and alike and (answer is None or before is None or bool(np.abs(answer - before).max() < SAME_ANSWER))


def post(job: ClientJob, path: str, body: bytes, headers: dict[str, str] | None = None) -> str:
    """Status and body's beginning of a request that no client library would send."""
    lines = {"Host": "127.0.0.1", "Content-Length": str(len(body)), "Connection": "close", **(headers or {})}
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    with socket.create_connection(("127.0.0.1", job.ports["http"]), timeout=TIMEOUT_S) as connection:
        connection.sendall(head.encode() + b"\r\n" + body)
        received = connection.recv(4096)
        while received and b"\r\n\r\n" not in received:
            received += connection.recv(4096)
    status, _, rest = received.decode(errors="replace").partition("\r\n")
    said = rest.partition("\r\n\r\n")[2].strip()
    return " ".join((status.partition(" ")[2] + ": " + said).split())[:160]


VISION = "/v2/models/clip_vision/infer"


def no_json(job: ClientJob) -> str:
    """Send a body that is not JSON."""
    return post(job, VISION, b"{")


def lying_header(job: ClientJob) -> str:
    """Announce a gigabyte of JSON in a header, and send two bytes."""
    return post(job, VISION, b"{}", {"Inference-Header-Content-Length": "1000000000"})


def unknown_model(job: ClientJob) -> str:
    """Ask a model that is not there."""
    return post(job, "/v2/models/none/infer", b"{}")


def wrong_type(job: ClientJob) -> str:
    """Send images in float64."""
    return vision(job, job.batches("images")[0][:1].astype(np.float64))


def wrong_shape(job: ClientJob) -> str:
    """Send images of one channel."""
    return vision(job, job.batches("images")[0][:1, :1])


def wide_batch(job: ClientJob) -> str:
    """Send one image more than the largest batch."""
    image = job.batches("images")[0][:1]
    return vision(job, np.repeat(image, job.max_batch + 1, axis=0))


def vision(job: ClientJob, images: np.ndarray) -> str:
    """Ask the image tower, and say what shape came."""
    found = embed_images(Client(job, "http"), job, images)
    return f"answered: {list(found.shape)}"


def large_body(job: ClientJob) -> str:
    """Send LARGE_BYTES of JSON that does not end."""
    return post(job, VISION, b'{"inputs": "' + b"x" * LARGE_BYTES)


def unknown_token(job: ClientJob) -> str:
    """Send token ids beyond the vocabulary."""
    return text_of(job, 10**9)


def negative_token(job: ClientJob) -> str:
    """Send negative token ids."""
    return text_of(job, -1)


def text_of(job: ClientJob, token: int) -> str:
    """Ask the text tower about a text of one token id alone, and say what shape came."""
    inputs = {name: job.batches(name)[0][:1].copy() for name in job.text_inputs}
    inputs["input_ids"][:] = token
    found = Client(job, "grpc").infer("clip_text", inputs).as_numpy("text_embeds")
    return f"answered: {'nothing' if found is None else list(found.shape)}"


def long_text(job: ClientJob) -> str:
    """Send a text of a megabyte."""
    return zero_shot(job, file(job), [b"red " * 250_000, b"blue"])


def no_text(job: ClientJob) -> str:
    """Ask a question without texts."""
    return zero_shot(job, file(job), [])


def empty_text(job: ClientJob) -> str:
    """Send a text of one blank."""
    return zero_shot(job, file(job), [b"red", b" "])


def not_utf8(job: ClientJob) -> str:
    """Send a text that is not UTF-8."""
    return zero_shot(job, file(job), [b"\xff\xfe"])


def no_image(job: ClientJob) -> str:
    """Send a file that is no image."""
    return zero_shot(job, b"no image", [b"red"])


def truncated_image(job: ClientJob) -> str:
    """Send a file without its end."""
    return zero_shot(job, file(job)[:-200], [b"red"])


def many_mistakes(job: ClientJob) -> str:
    """Files that are none beside good ones: a step of the ensemble fails while others begin."""
    outcomes: Counter[str] = Counter()

    def send(content: bytes) -> None:
        for _ in range(MISTAKES_EACH):
            try:
                zero_shot(job, content, [b"red"])
                outcomes["answered"] += 1
            except InferenceServerException as error:
                outcomes[f"status {error.status()}"] += 1

    together([partial(send, content) for content in [b"no image", file(job)] * 4])
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))


def large_file(job: ClientJob) -> str:
    """Send a file of 25 MB."""
    return zero_shot(job, file(job) + bytes(25_000_000), [b"red"])


def bomb(job: ClientJob) -> str:
    """Send a small file of BOMB_SIDE x BOMB_SIDE pixels."""
    return zero_shot(job, png(BOMB_SIDE, BOMB_SIDE), [b"red"])


def thin_image(job: ClientJob) -> str:
    """Send an image one pixel wide and THIN_LENGTH long."""
    return zero_shot(job, png(1, THIN_LENGTH), [b"red"])


def file(job: ClientJob) -> bytes:
    """A JPEG file that the server can read."""
    found: bytes = job.inputs["files"][0][: job.inputs["lengths"][0]].tobytes()
    return found


def zero_shot(job: ClientJob, content: bytes, texts: list[bytes]) -> str:
    """Ask which text describes a file best, and say what probabilities came."""
    inputs = {
        "encoded": np.array([[content]], dtype=object),
        "texts": np.array(texts, dtype=object).reshape(-1, 1),
    }
    found = Client(job, "http").infer("clip_zero_shot", inputs).as_numpy("probabilities")
    return f"answered: {np.round(found, 3).tolist()}"


@cache
def png(width: int, height: int) -> bytes:
    """A white PNG with one bit a pixel, written in rows so that it takes no memory here."""
    packer, row = zlib.compressobj(9), bytes(1) + b"\xff" * ((width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    content = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    content.seek(0, io.SEEK_END)
    for kind, body in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        content.write(len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big"))
    return content.getvalue()


def killed_client(job: ClientJob) -> str:
    """A process with four requests under way ends without a farewell."""
    images = np.repeat(job.batches("images")[0][:1], job.max_batch, axis=0)
    with tempfile.NamedTemporaryFile(suffix=".npy") as held:
        np.save(held, images)
        held.flush()
        kind = "FP32" if images.dtype == np.float32 else "UINT8"
        command = [sys.executable, "-c", HAMMER, f"127.0.0.1:{job.ports['http']}", job.image_input, held.name, kind]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None  # it is piped
            process.stdout.readline()
            time.sleep(KILLED_AFTER_S)
            process.send_signal(signal.SIGKILL)
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the client ended with code {process.returncode} before it was killed")
    return "killed"


def half_a_request(job: ClientJob) -> str:
    """The connection ends in the middle of the body that the header announced."""
    head = f"POST {VISION} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", job.ports["http"]), timeout=TIMEOUT_S) as connection:
        connection.sendall(head.encode() + b"x" * 1000)
    return "connection closed"


def idle_connections(job: ClientJob) -> str:
    """Open IDLE connections and close them without a word."""
    held = [socket.create_connection(("127.0.0.1", job.ports["http"]), timeout=TIMEOUT_S) for _ in range(IDLE)]
    for connection in held:
        connection.close()
    return f"{IDLE} opened and closed"


def noise_on_grpc(job: ClientJob) -> str:
    """Send random bytes to the gRPC port."""
    with socket.create_connection(("127.0.0.1", job.ports["grpc"]), timeout=TIMEOUT_S) as connection:
        connection.sendall(np.random.default_rng(0).bytes(4096))
        connection.recv(4096)
    return "connection closed"


FAULTS: dict[str, Callable[[ClientJob], str]] = {
    "a body that is no JSON": no_json,
    "a header that announces 1 GB of JSON": lying_header,
    "a body of 64 MB": large_body,
    "noise on the gRPC port": noise_on_grpc,
    "a model that is not there": unknown_model,
    "images of another type": wrong_type,
    "images of another shape": wrong_shape,
    "a batch of one more than accepted": wide_batch,
    "token ids beyond the vocabulary": unknown_token,
    "negative token ids": negative_token,
    "a text of 1 MB": long_text,
    "no text": no_text,
    "a text of one blank": empty_text,
    "a text that is not UTF-8": not_utf8,
    "a file that is no image": no_image,
    "a truncated image": truncated_image,
    "200 files from eight clients, half of them no images": many_mistakes,
    "an image file of 25 MB": large_file,
    "an image of 900 million pixels": bomb,
    "an image of 1 x 1 million pixels": thin_image,
    "a client killed while four requests run": killed_client,
    "half a request": half_a_request,
    "a hundred idle connections": idle_connections,
}
MISTAKES = {
    wrong_type, wrong_shape, wide_batch, unknown_token, negative_token, no_text, empty_text, not_utf8, no_image,
    truncated_image, large_file, bomb, thin_image,
}  # fmt: skip
REFUSED = ("400", "404", "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")
