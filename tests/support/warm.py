"""`python`, `dvc` and `clip-deploy` that have their libraries: each command is a fork of a process that imported them.

    warm.py serve SOCKET                  import them, and fork for whoever asks, until standard input ends
    warm.py ask SOCKET PYTHONPATH python -m stages...   be that fork to the caller: its streams, folder, variables, end

A stage imports PyTorch and transformers for four seconds and works for one. Stages, commands, dvc, the workers that are
timed and programs in -c are forked; everything else, and what has libraries of its own on PYTHONPATH, becomes the
command itself.
A folder with a sitecustomize.py, which a test puts there to change one thing, is no such library: the fork runs it.
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

FORKED = ("stages.", "clip_deploy", "dvc", "submitit.core")
LIBRARIES = (
    "dvc.cli.parser",
    "dvc.lock",
    "dvc.repo.artifacts",
    "dvc.repo.datasets",
    "dvc.repo.index",
    "dvc.repo.metrics",
    "dvc.repo.params",
    "dvc.repo.plots",
    "dvc.repo.reproduce",
    "dvc.repo.stage",
    "dvc.scm",
    "dvc.utils.strictyaml",
    "hydra.main",
    "onnxruntime.quantization",
    "onnxscript",
    "ruamel.yaml",
    "torch._dynamo",
    "torch.export",
    "torch.onnx._internal.exporter._compat",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.processing_clip",
)


def serve(address: str) -> None:
    import gc
    import importlib

    sys.path.pop(0)  # this folder, where triton.py is another
    for name in LIBRARIES:
        importlib.import_module(name)
    quicken_locks()
    quicken_exports()
    gc.freeze()  # a collection would copy the pages that the forks share
    gc.set_threshold(10_000)
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


def quicken_locks() -> None:
    """Let dvc read and write dvc.lock by libyaml: by ruamel's Python, which keeps comments, it is half of a stage."""
    import yaml
    from dvc import dvcfile
    from dvc.utils.serialize import _common, _yaml

    class Dumper(yaml.CSafeDumper):
        """Of dvc's ordered mappings, and with nothing in the place of null, as dvc writes it."""

    Dumper.add_multi_representer(dict, Dumper.represent_dict)
    Dumper.add_representer(type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", ""))
    with_comments = dvcfile.modify_yaml

    def modify(path: str, fs: object = None) -> contextlib.AbstractContextManager[dict]:
        if not path.endswith(".lock"):
            return with_comments(path, fs)
        return _common._modify_data(
            path, _yaml.parse_yaml, lambda data, file: yaml.dump(data, file, Dumper, sort_keys=False), fs
        )

    dvcfile.modify_yaml = modify


def quicken_exports() -> None:
    """Let PyTorch's ONNX exporter list what it can translate once, not at each export, which that takes a fifth of."""
    from functools import cache

    from torch.onnx._internal.exporter._registration import ONNXRegistry

    ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))


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
    import importlib.util
    import runpy

    from huggingface_hub import constants

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    flag, program, *sys.argv[1:] = words
    sys.argv[0] = flag
    sys.path[:0] = [folder, *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]
    sys.executable = python  # the workers that a stage times are forks too
    # What a project's stages import is compiled once, and not into its folder, which DVC watches.
    sys.dont_write_bytecode, sys.pycache_prefix = False, f"{os.path.dirname(python)}/bytecode"
    sys.orig_argv = [python, *words]
    importlib.reload(constants)  # which took its settings from the server's variables
    if importlib.util.find_spec("sitecustomize"):
        importlib.import_module("sitecustomize")  # as Python does before a program
    if flag == "-c":
        exec(program, {"__name__": "__main__"})
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def is_warm(path: str, server_path: str, folder: str) -> bool:
    """Whether a process with this PYTHONPATH, in this folder, has the libraries of the server, and only those."""
    others = set(path.split(os.pathsep)) - {"", folder, *server_path.split(os.pathsep)}
    return all(os.path.isfile(f"{other}/sitecustomize.py") for other in others)


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
    words = list(given[given[:1] == ("-u",) :]) if name == "python" else ["-m", name.replace("-", "_"), *given]
    is_ours = words[:1] == ["-m"] and words[1].startswith(FORKED) and words[2:3] != ["serve"]  # which heeds signals
    forked = is_ours or words[:1] == ["-c"]
    if not forked or not is_warm(os.environ.get("PYTHONPATH", ""), server_path, os.getcwd()):
        os.execv(sys.executable, [sys.executable, *words])
    python = f"{os.path.dirname(address)}/python"
    request = {"words": words, "folder": os.getcwd(), "variables": dict(os.environ), "python": python}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        code = int(server.recv(16) or -signal.SIGKILL)
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    {"serve": serve, "ask": ask}[sys.argv[1]](*sys.argv[2:])
