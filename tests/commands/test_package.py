import json
import sys

import pytest

from clip_deploy.commands.package import by_hand, check_output
from clip_deploy.core.errors import ConfigError


def test_the_stages_own_words_stay_but_those_that_are_given():
    command = "python -m stages.package target=recommended model_name=tiny output=artifacts/package built=artifacts"
    assert by_hand(command, {"target": "ort-fp16", "output": 'a "b"'}) == [
        *(sys.executable, "-m", "stages.package", "model_name=tiny", "built=artifacts"),
        *('target="ort-fp16"', 'output="a \\"b\\""'),
    ]


def test_a_folder_that_is_no_package_is_not_replaced(tmp_path):
    check_output(tmp_path / "new")
    with pytest.raises(ConfigError, match="exists and is not a package: give a new folder"):
        check_output(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    check_output(tmp_path)


@pytest.mark.slow
def test_another_target_than_the_recommended_one_is_packaged_by_hand(built, tmp_path):
    project = built.copy(tmp_path / "project")
    command = [sys.executable, "-m", "clip_deploy", "package"]
    project.run(*command, "ort-fp16", "--output", "build/a package")
    manifest = json.loads((project.path / "build/a package/manifest.json").read_text())
    assert {tower: chosen["target"] for tower, chosen in manifest["towers"].items()} == dict.fromkeys(
        ("vision", "text"), "ort-fp16"
    )
    refused = project.run(*command, "ort-fp31", "--output", "build/none", check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert not (project.path / "build/none").exists()
