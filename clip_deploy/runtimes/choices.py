"""Which way of an operator is taken for a shape, kept on the disk: all processes of a machine take the same one.

Ways differ in the last bits of what they give, and by less than a timing tells. So two processes that chose by
themselves would make other embeddings of the same images. Whoever is first decides, for a GPU, its software and our
kernels.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

FOLDER = "CLIP_DEPLOY_CACHE"  # environment variable; default: where the system keeps such things


class Choices:
    """Numbers by keys, one file each, for one combination of what they hold for.

    Attributes:
        folder: theirs; where it cannot be written, nothing is kept.
    """

    def __init__(self, *valid_for: str) -> None:
        """Args: valid_for: all that another choice could be right for."""
        self.folder = _cache() / "choices" / _digest(*valid_for)

    def get(self, key: str) -> int | None:
        with suppress(OSError, ValueError):
            return int((self.folder / _digest(key)).read_text())
        return None

    def settle(self, key: str, choice: int) -> int:
        """Keep a choice, unless there is one by now; returns the one that holds."""
        path = self.folder / _digest(key)
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile("w", dir=self.folder, suffix=".unfinished") as file:
                file.write(str(choice))
                file.flush()
                with suppress(FileExistsError):
                    os.link(file.name, path)
        held = self.get(key)
        return choice if held is None else held


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(os.environ.get(FOLDER) or (Path(home) if home else Path.home() / ".cache") / "clip-deploy")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
