"""PyTorch itself, eager and compiled: python -m benchmarks.peers.build_torch CHECKPOINT OUTPUT CALIBRATION KEY

https://docs.pytorch.org/docs/stable/generated/torch.compile.html. It compiles in the worker, before each input shape is
timed; on disk there is only the checkpoint.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.contestant import build_all


def main() -> None:
    checkpoint, output = Path(sys.argv[1]), Path(sys.argv[2])
    build_all(
        output,
        sys.argv[4],
        {
            "torch-eager": partial(link, checkpoint, "eager"),
            "torch-compile": partial(link, checkpoint, "compile"),
        },
    )


def link(checkpoint: Path, runtime: str, folder: Path) -> dict[str, Any]:
    names = ["config.json", *sorted(path.name for path in checkpoint.glob("*.safetensors"))]
    for name in names:
        (folder / name).symlink_to((checkpoint / name).resolve())
    return {"runtime": runtime, "precision": "fp32", "files": names, "build": {}}


if __name__ == "__main__":
    main()
