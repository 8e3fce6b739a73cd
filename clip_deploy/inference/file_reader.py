"""Processes that read JPEG files for a decoder on a GPU: python -m clip_deploy.inference.file_reader SOCKET

The decoder's calls take Python's lock for every picture, and so does each call of the system that opens, reads or
closes a file: side by side in one process they wait for each other. A process hands over many files in one call.
"""

import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from clip_deploy.core.environment import cores
from clip_deploy.core.images import jpeg_of
from clip_deploy.core.jpeg import Header, Jpeg, whole_jpeg

LENGTH = struct.Struct("<Q")  # of what follows, in bytes
MOST = 4  # processes
ROOT = Path(__file__).parents[2]

Told = list[tuple[int, Header] | None]  # of each file its bytes and header, or None where it is no whole JPEG


class FileReaders:
    """As many processes as a few cores feed. Threads may share them."""

    def __init__(self) -> None:
        self.idle: SimpleQueue[FileReader] = SimpleQueue()
        for _ in range(max(1, min(MOST, cores() // 4))):
            self.idle.put(FileReader())

    def __call__(self, paths: Sequence[Path | str]) -> list[Jpeg | None]:
        """Each file, or None where it is no whole JPEG."""
        reader = self.idle.get()
        try:
            return reader([os.fspath(path) for path in paths])
        finally:
            self.idle.put(reader)


class FileReader:
    """One process, begun with the first files. It ends when this end of its socket is closed, as by this process's end.

    Attributes:
        socket: to the process; None before it is begun.
        is_gone: whether it has ended on its own, and files are read here.
    """

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.is_gone = False

    def __call__(self, paths: list[str]) -> list[Jpeg | None]:
        if not self.is_gone:
            try:
                return self._asked(self.socket or self._begin(), paths)
            except OSError:
                self.is_gone = True
        return _read(paths)

    def _begin(self) -> socket.socket:
        here, there = socket.socketpair()
        places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            with there:
                process = subprocess.Popen(
                    [sys.executable, "-m", "clip_deploy.inference.file_reader", str(there.fileno())],
                    pass_fds=[there.fileno()],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
                )
        except OSError:
            here.close()
            raise
        weakref.finalize(self, _end, here, process)
        self.socket = here
        return here

    @staticmethod
    def _asked(process: socket.socket, paths: list[str]) -> list[Jpeg | None]:
        _send(process, pickle.dumps(paths))
        told: Told = pickle.loads(_received(process).data)
        contents, start, found = _received(process), 0, []
        for each in told:
            found.append(each and Jpeg(contents[start : start + each[0]], each[1]))
            start += each[0] if each else 0
        return found


def _read(paths: list[str]) -> list[Jpeg | None]:
    return [whole_jpeg(jpeg_of(path)[0]) for path in paths]


def _end(here: socket.socket, process: subprocess.Popen[bytes]) -> None:
    here.close()
    process.wait()


def _send(there: socket.socket, content: bytes) -> None:
    there.sendall(LENGTH.pack(len(content)) + content)


def _received(there: socket.socket) -> np.ndarray:
    """Raises ConnectionError where the other process has ended."""
    (length,) = LENGTH.unpack(_exactly(there, LENGTH.size).data)
    return _exactly(there, length)


def _exactly(there: socket.socket, length: int) -> np.ndarray:
    """So many bytes, uint8 [length], by one call of the system where all goes well."""
    found, done = np.empty(length, np.uint8), 0
    while done < length:
        got = there.recv_into(found.data[done:], length - done, socket.MSG_WAITALL)
        if not got:
            raise ConnectionError("the process that reads files has ended")
        done += got
    return found


def serve(there: socket.socket) -> None:
    """Answer until the other end is closed."""
    while True:
        try:
            paths = pickle.loads(_received(there).data)
        except ConnectionError:
            return
        found = _read(paths)
        told: Told = [each and (len(each.content), each.header) for each in found]
        _send(there, pickle.dumps(told))
        _send(there, b"".join(each.content for each in found if each))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who began this one stops it
    with socket.socket(fileno=int(sys.argv[1])) as opened, suppress(BrokenPipeError, ConnectionResetError):
        serve(opened)
