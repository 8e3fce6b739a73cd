import shutil

import pytest
from support.project import ROOT


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder of a project without reports, in which the commands are run."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    return tmp_path
