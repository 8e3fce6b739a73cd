"""`python` and `dvc` whose libraries are imported once: each command is a fork of a process that has them.

    warm.py serve SOCKET                  import them, and fork for whoever asks, until standard input ends
    warm.py ask SOCKET PYTHONPATH python -m stages...   be that fork to the caller: its streams, folder, variables, end

A stage imports PyTorch and transformers for four seconds and works for one. Stages, commands, dvc and the workers that
are timed are forked; everything else, and what has another PYTHONPATH than the server, becomes the command itself.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

FORKED = ("stages.", "clip_deploy", "dvc")
LIBRARIES = (
    "dvc.cli.parser",
    "dvc.repo.reproduce",
    "hydra.main",
    "onnxruntime.quantization",
    "onnxscript",
    "torch._dynamo",
    "torch.export",
    "torch.onnx",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.processing_clip",
)


def serve(address: str) -> None:
    import gc
    import importlib

    sys.path.pop(0)  # this folder, where triton.py is another
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # a collection would copy the pages that the forks share
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(16)
    print("ready", flush=True)
    guards = 0
    while 0 not in select.select([0, listener], [], [])[0]:
        caller, _ = listener.accept()
        guards += 1
        if os.fork() == 0:
            listener.close()
            guard(caller)
        caller.close()
        while guards and os.waitpid(-1, os.WNOHANG)[0]:
            guards -= 1


def guard(caller: socket.socket) -> NoReturn:
    """Fork the command, tell its caller how it ended, and kill it where the caller is killed."""
    message, streams, *_ = socket.recv_fds(caller, 1 << 20, 3)
    command = os.fork()
    if command == 0:
        caller.close()
        end(lambda: run(streams, **json.loads(message)))
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(command)
    if ended not in select.select([ended, caller], [], [])[0]:
        os.kill(command, signal.SIGKILL)
    _, status = os.waitpid(command, 0)
    with contextlib.suppress(BrokenPipeError):
        caller.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def run(streams: list[int], words: list[str], folder: str, variables: dict[str, str], python: str) -> None:
    import runpy

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    module, *sys.argv[1:] = words
    sys.path.insert(0, folder)
    sys.executable = python  # the workers that a stage times are forks too
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def end(program: Callable[[], None]) -> NoReturn:
    """As Python does after `program`, but for what libraries do then: they wait for threads that a fork lacks."""
    code: object = 0
    try:
        program()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def ask(address: str, server_path: str, name: str, *given: str) -> NoReturn:
    words = ["-m", "dvc", *given] if name == "dvc" else list(given)
    forked = words[:1] == ["-m"] and words[1].startswith(FORKED) and words[2:3] != ["serve"]  # which heeds signals
    if not forked or os.environ.get("PYTHONPATH", "") != server_path:
        os.execv(sys.executable, [sys.executable, *words])
    python = f"{os.path.dirname(address)}/python"
    request = {"words": words[1:], "folder": os.getcwd(), "variables": dict(os.environ), "python": python}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        code = int(server.recv(16) or -signal.SIGKILL)
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    {"serve": serve, "ask": ask}[sys.argv[1]](*sys.argv[2:])
