"""The errors that a user can meet. Each message says what was given, what is accepted and the way out."""

import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

UNREAD = 141  # what shells report of SIGPIPE


class DeployError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(DeployError):
    """A setting is unknown, out of range or at odds with another."""


class CheckpointError(DeployError):
    """A checkpoint cannot be fetched, or is not one that this project can deploy."""


class DataError(DeployError):
    """Images or captions are missing, unreadable or too few."""


class DiskError(DeployError):
    """A file cannot be written, or is not what was written: no other stage would fare better."""


class UnavailableError(DeployError):
    """This target cannot be built or run here. Its row stays in the table with this reason."""


EVERY_ROW = (ConfigError, CheckpointError, DataError, DiskError)  # what concerns more than one target
MAX_MESSAGE = 400  # characters of another library's message in one of ours


def one_line(error: Exception) -> str:
    """What an exception says, in one line and in whole sentences; its class where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= MAX_MESSAGE:
        return text
    end = max(text.rfind(mark, 0, MAX_MESSAGE) for mark in (". ", "; ", ": "))
    return text[:end] if end > MAX_MESSAGE // 4 else f"{text[:MAX_MESSAGE]}..."


def first_line(error: object) -> str:
    """The first line of what an exception says; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def listed(lines: Sequence[str], most: int = 10) -> str:
    """What several faults have to say, as one line of bounded length."""
    more = f"; and {len(lines) - most:,} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more


@contextmanager
def quiet_if_unread() -> Iterator[None]:
    """End without a word where what reads the output has gone (`... | head`), as Unix tools do."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, 0)
        if not output.poll(0):  # nothing is wrong with it: it was another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        raise SystemExit(UNREAD) from None
