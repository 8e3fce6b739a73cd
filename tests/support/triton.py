"""Triton's environment, where `make triton-env` made it, and what a repository for it holds."""

import subprocess

from support.project import ROOT

ENVIRONMENT = ROOT / "build" / "triton-venv"
MODEL_NAMES = ["clip_preprocess", "clip_score", "clip_text", "clip_tokenize", "clip_vision", "clip_zero_shot"]
CHECK = """
import sys
from pathlib import Path
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
for path in sys.argv[1:]:
    text_format.Parse(Path(path).read_text(), model_config_pb2.ModelConfig())
"""


def accepted(python, *configs):
    """The process that reads configurations by Triton's own schema; tritonclient pins a protobuf of its own."""
    return subprocess.run([python, "-c", CHECK, *configs], capture_output=True, text=True, check=False)
