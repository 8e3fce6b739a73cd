"""Keys of clients, from a file with one a line; blank lines and lines that begin with # are skipped."""

import hashlib
import hmac
import os
import re
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path

from clip_deploy.core.errors import DataError
from clip_deploy.web.errors import RequestError

KEY = re.compile(r"[!-~]{8,}")  # as a header carries it, and too long to be tried out


class Keys:
    """Without a file, no key is asked for."""

    def __init__(self, path: Path | None) -> None:
        """Raises DataError where the file cannot be read, holds no key, or has a line that is none."""
        self.digests = [_digest(key) for key in _read(path)] if path else []

    def check(self, headers: Mapping[str, str]) -> None:
        """Raise RequestError unless a request brings one of the keys, in a time that tells nothing of them."""
        if not self.digests:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        if not any([hmac.compare_digest(digest, known) for known in self.digests]) or scheme.lower() != "bearer":
            raise RequestError(401, "no key or a wrong one: send Authorization: Bearer KEY", None, "invalid_api_key")


def warn_if_readable(path: Path) -> None:
    """Warn of a file of keys that users outside of this process's own groups may read or change."""
    if not path.is_file():
        return
    status = path.stat()
    is_ours = status.st_gid in {os.getegid(), *os.getgroups()}  # as with a secret that Kubernetes mounts
    if status.st_mode & (stat.S_IRWXO | (0 if is_ours else stat.S_IRWXG)):
        warnings.warn(f"{path} holds keys, and others may read it: chmod 600 {path}", stacklevel=2)


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            f"--api-key-file {path} cannot be read ({error}): give a text file with a key a line"
        ) from error
    keys = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip() and line.lstrip()[0] != "#"}
    for number, key in keys.items():
        if not KEY.fullmatch(key):
            raise DataError(
                f"--api-key-file {path}: line {number} is not a key: write one key a line, of 8 or more ASCII letters, "
                "digits and signs without spaces (`openssl rand -hex 32` makes one); lines that begin with # are "
                "comments"
            )
    if not keys:
        raise DataError(f"--api-key-file {path} holds no key: write one a line")
    return list(keys.values())


def _digest(key: str) -> bytes:
    """Of one length, whatever the key's."""
    return hashlib.sha256(key.encode()).digest()
