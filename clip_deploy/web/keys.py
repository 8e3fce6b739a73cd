"""Keys of clients, from a file with one a line."""

import hashlib
import hmac
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path

from clip_deploy.core.errors import DataError
from clip_deploy.web.errors import RequestError

OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Keys:
    """Without a file, no key is asked for."""

    def __init__(self, path: Path | None) -> None:
        """Raises DataError where the file cannot be read or holds no key."""
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
    """Warn of a file of keys that other users may read."""
    if path.is_file() and path.stat().st_mode & OTHERS:
        warnings.warn(f"{path} holds keys, and others may read it: chmod 600 {path}", stacklevel=2)


def _read(path: Path) -> list[str]:
    try:
        keys = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise DataError(
            f"--api-key-file {path} cannot be read ({error}): give a text file with a key a line"
        ) from error
    if not keys:
        raise DataError(f"--api-key-file {path} holds no key: write one a line")
    return keys


def _digest(key: str) -> bytes:
    """Of one length, whatever the key's."""
    return hashlib.sha256(key.encode()).digest()
