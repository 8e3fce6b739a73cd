import shutil
from dataclasses import fields, is_dataclass
from typing import get_origin, get_type_hints

import pytest
import yaml
from omegaconf import OmegaConf
from support.project import ROOT

from clip_deploy.core import config
from clip_deploy.core.config import GROUPS, OnnxConfig, load_choice, load_params
from clip_deploy.core.errors import ConfigError

CONF = ROOT / "conf"
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
NEEDS_A_PATH = {
    ("model", "open-clip-training"),
    ("model", "local"),
    ("data", "image-folder"),
    ("data", "captions"),
    ("data", "hub"),
}


@pytest.fixture
def params(tmp_path):
    """Edit a copy of params.yaml, then load it."""
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)

    def load(old="", new=""):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return load_params(path, CONF)

    return load


def settings_of(schema):
    """Every setting of a group, with its type."""
    return [(item.name, get_type_hints(schema)[item.name]) for item in fields(schema)]


GROUPED = [value for value in vars(config).values() if isinstance(value, type) and is_dataclass(value)]
LISTS = [(schema, name) for schema in GROUPED for name, hint in settings_of(schema) if get_origin(hint) is list]


def refused(schema, name, value):
    """What is said of a setting by that name, in a file of the group `some`."""
    with pytest.raises(ConfigError) as error:
        config.typed(schema, OmegaConf.create({name: value}), "a.yaml", "some.")
    return str(error.value)


@pytest.mark.parametrize(("schema", "name"), LISTS, ids=lambda part: getattr(part, "__name__", part))
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("vision: a", """'vision: a': give a list, as ["vision: a"]"""),
        (8, "8: give a list, as [8]"),
        (None, "null: give a list, [] for an empty one"),
        ({"a": 1}, "{'a': 1}: give a list, as [a, b]"),
    ],
)
def test_one_value_in_the_place_of_a_list_is_shown_as_a_list(schema, name, value, said):
    assert refused(schema, name, value) == f"a.yaml: some.{name} is {said}"


def test_the_lists_of_all_groups_are_found():
    assert {(OnnxConfig, "classifier"), (config.ModelConfig, "allow"), (config.Params, "targets")} <= set(LISTS)


@pytest.mark.parametrize(
    ("schema", "name", "value", "said"),
    [
        (OnnxConfig, "opset", [18], "some.opset is [18]: give a single value"),
        (config.ModelConfig, "path", {"a": 1}, "some.path is {'a': 1}: give a single value"),
        (config.DataConfig, "templates", [["a {}"]], "some.templates[0] is ['a {}']: give a single value"),
        (config.GatesConfig, "int8", 0.9, "some.int8 is 0.9: give `key: value` lines of min_cosine, max_top1_drop, "),
        (config.QuantizeConfig, "accuracy_budget", 1, "some.accuracy_budget is 1: give `key: value` lines of max_top1"),
        (config.ModelConfig, "architecture", "clip", "some.architecture is 'clip': give `key: value` lines"),
        (config.Params, "optimize", ["a"], "some.optimize is ['a']: give `key: value` lines"),
        (config.Params, "optimize", {"a": "b"}, "some.optimize.a is 'b': give `key: value` lines of source, precision"),
    ],
)
def test_a_setting_of_another_shape_is_told_from_what_is_wanted(schema, name, value, said):
    assert refused(schema, name, value).startswith(f"a.yaml: {said}")


def test_a_reference_to_another_setting_stands_for_any_shape():
    content = OmegaConf.create({"batch_sizes": [32, 48], "image_size": "${batch_sizes}"})
    assert config.typed(config.BenchmarkConfig, content, "a.yaml").image_size == [32, 48]


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("${model}", "optimize.ort-fp32 is 'tiny-shapes': give `key: value` lines of source, precision"),
        ("${onnx}", "unknown key optimize.ort-fp32.classifier; accepted are source, precision"),
        ("${none}", "optimize.ort-fp32: Interpolation key 'none' not found"),
        ("???", "optimize.ort-fp32 is ???: give a value"),
    ],
)
def test_a_reference_is_held_to_what_stands_in_its_place(tmp_path, reference, said):
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["optimize"]["ort-fp32"] = reference
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        load_params(tmp_path / "params.yaml", CONF)
    assert said in str(caught.value)


def test_a_value_that_is_left_open_is_no_default():
    assert refused(config.OnnxConfig, "opset", "???") == "a.yaml: some.opset is ???: give a value"


def test_the_shipped_params_are_valid(params):
    assert params().targets[0] == "torch-fp32"


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_in_conf_is_valid_or_says_what_it_lacks(group, name):
    if (group, name) in NEEDS_A_PATH:
        with pytest.raises(
            ConfigError, match=r"local\.yaml|open-clip-training\.yaml|image-folder\.yaml|captions\.yaml|hub\.yaml"
        ):
            load_choice(CONF, group, name)
    else:
        load_choice(CONF, group, name)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: tiny-shapes", "model: tiny-shape", r"model is 'tiny-shape': accepted are .*tiny-shapes"),
        ("data: shapes", "data: shape", r"data is 'shape': accepted are captions, hub, image-folder, shapes"),
        ("gates: standard", "gates: strict", r"gates is 'strict': accepted are"),
        ("\n- ort-fp16\n", "\n- ort-fp12\n", r"targets lists 'ort-fp12', which nothing builds: known are .*ort-fp16"),
        ("precision: fp16}", "precision: fp12}", r"optimize\.ort-fp16\.precision.*fp12.*fp16"),
        ("method: dynamic\n", "method: magic\n", r"quantize\.ort-int8-dynamic\.method.*magic.*static"),
        (
            "method: dynamic\n",
            "method: dynamic\n    symmetric: true\n",
            r"symmetric and smooth_quant belong to method static",
        ),
        ("method: dynamic\n", "method: weight_only\n", r"accuracy_budget is for method dynamic and static"),
        (
            "method: static ",
            "method: static\n    smooth_quant: 2 ",
            r"smooth_quant is 2\.0: accepted are null and 0",
        ),
        (
            "{max_top1_drop: 1.0",
            "{max_top1_drop: -1",
            r"accuracy_budget\.max_top1_drop is -1\.0: accepted are 0 to 100",
        ),
        ("max_slow_down: 10", "max_slow_down: -1", r"ci\.max_slow_down is -1\.0: give 0 or more"),
        ("max_slow_down: 10", "max_slow_dow: 10", r"unknown key ci\.max_slow_dow; accepted are required, max_top1"),
        ("  - ort-fp32\n", "  - onnx-fp32\n", r"ci\.required lists a name twice: torch-fp32"),
        ("  batch: 1 ", "  batch: 4 ", r"recommend\.batch is 4, and benchmark standard times 1, 8, 32: give one"),
        ("max_size_mb:\n", "max_size_mb: 0\n", r"recommend\.max_size_mb is 0\.0: give more than 0, or null"),
        (
            "precision: fp16}",
            "precision: int8}",
            r"precision is int8; accepted are fp32, fp16, bf16, fp8; quantize makes int8",
        ),
        ("precision: fp16}", "precision: bf16}", r"ort-fp16 is bf16, in which ONNX Runtime has matmuls on a GPU only"),
        (
            "precision: fp16}",
            "precision: bf16, provider: tensorrt}",
            r"bf16 is not for provider tensorrt; accepted are fp32, fp16",
        ),
        (
            "torchscript-bf16: {precision: bf16}",
            "torchscript-bf16: {precision: fp16}",
            r"is fp16, which PyTorch computes slowly",
        ),
        (
            "device: cpu",
            "device: cuda",
            r"device is cuda and export_torchscript.torch-int8 is int8, .*`clip-deploy device",
        ),
        ("device: cpu", "device: tpu", r"device is 'tpu': accepted are cpu, cuda"),
        (
            "export_aoti: {}",
            "export_aoti: {a: {precision: int8}}",
            r"export_aoti\.a: precision is int8; accepted are fp32",
        ),
        ("build_engine: {}", "build_engine: {a: {precision: bf16}}", r"precision is bf16; accepted are fp32, fp16"),
        ("build_engine: {}", "build_engine: {a: {max_batch: 4}}", r"max_batch are 1, 8, 4: accepted are"),
        ("build_engine: {}", "build_engine: {a: {min_batch: 0}}", r"max_batch are 0, 8, 256: accepted are"),
        ("build_engine: {}", "build_engine: {ort-fp16: {}}", r"target 'ort-fp16' is built twice"),
        ("  openvino-fp32: {precision: fp32}", "  openvino-fp32: {precision: fp16}", r"accepted are fp32, bf16, int8"),
        ("  opset: 18", "  opsets: 18", r"unknown key onnx\.opsets; accepted are opset, exporter"),
        ("seed: 0", "sede: 0", r"unknown key sede; accepted are model, data"),
        ("  opset: 18", "  opset: eighteen", r"onnx\.opset is 'eighteen': give a whole number"),
        ("  opset: 18", "  opset: 99", r"onnx\.opset is 99 with onnx\.exporter auto: .*dynamo writes 18 to"),
        ("exporter: auto", "exporter: fancy", r"onnx\.exporter is 'fancy': accepted are auto, dynamo"),
        ("source: onnx-fp32, precision: fp16", "source: nothing, precision: fp16", r"optimize\.ort-fp16\.source is"),
        ("\n- torch-fp32\n", "\n", r"targets must begin with torch-fp32"),
        ("ort-fp16: {", "ort.fp16: {", r"names are made of a-z, 0-9 and -"),
        ("ort-fp16: {", "-x: {", r"target '-x': names are made of .*the first not -"),
        ("ort-fp16: {", f"{'a' * 101}: {{", r"names are made of a-z, 0-9 and -, up to 100"),
        ("ort-fp16: {", "16: {", r"optimize has a key 16, as YAML reads it: put it in quotes"),
        ("ort-fp16: {", "on: {", r"optimize has a key True, as YAML reads it: put it in quotes"),
        ("model: tiny-shapes", "", r"params\.yaml: model is missing: `git diff` shows what it was"),
        ("model: tiny-shapes", "model:", r"model is null: give text"),
        ("model: tiny-shapes", "model: 5", r"model is 5, as YAML reads it: put text in quotes"),
        ("  opset: 18", "  opset:", r"onnx\.opset is null: give a whole number"),
        ("  opset: 18", "  opset: 18.0", r"onnx\.opset is 18\.0: give a whole number"),
        ("  opset: 18", "  opset: true", r"onnx\.opset is True: give a whole number"),
        ("preprocess: false", "preprocess:", r"onnx\.preprocess is null: give true or false"),
        (
            "classifier: []",
            "classifier: [yes, no]",
            r"onnx\.classifier\[0\] is True, as YAML reads it: put text in quotes",
        ),
        (
            "classifier: []",
            "classifier: [cat, 010]",
            r"onnx\.classifier\[1\] is 8, as YAML reads it: put text in quotes",
        ),
        ("max_slow_down: 10", "max_slow_down: 10%", r"ci\.max_slow_down is '10%': give a number"),
        ("max_slow_down: 10", "max_slow_down: .inf", r"ci\.max_slow_down is inf: give a number"),
        ("max_p95_ms:", "max_p95_ms: .nan", r"recommend\.max_p95_ms is nan: give a number"),
        ("\n- ort-fp16\n", "\n-\n", r"targets\[9\] is null: give text"),
        ("method: static ", "method: static\n    smooth_quant: 2 ", r"quantize\.ort-int8-static: smooth_quant is 2\.0"),
        ("  threads: 2 ", "  threads: 99999 ", r"triton\.threads is 99999: give 1 to 1024"),
        ("  workers:  ", "  workers: 0  ", r"end_to_end\.workers is 0: give 1 to 1024, or null for benchmark\.threads"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_accepted(params, old, new, message):
    with pytest.raises(ConfigError, match=message):
        params(old, new)


@pytest.mark.parametrize("name", ["data", "package", "triton", "triton-trt-fp16"])
def test_a_target_named_as_another_folder_of_artifacts_is_refused(name, params):
    engine = "trt-fp16: {}, " if name.startswith("triton-") else ""
    with pytest.raises(ConfigError, match=f"target '{name}': artifacts/{name} holds something else"):
        params("build_engine: {}", f"build_engine: {{{engine}{name}: {{}}}}")


def test_every_folder_of_artifacts_that_is_no_target_is_known():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    outs = [out for stage in stages for out in stage.get("do", stage)["outs"] if isinstance(out, str)]
    folders = {out.removeprefix("artifacts/").split("/")[0] for out in outs if out.startswith("artifacts/")}
    named = {name for name in folders if "$" not in name}
    assert named == {config.REFERENCE, config.EXPORTED, *config.KEPT}
    assert {name for name in folders if "$" in name and not name.startswith("${")} == {"triton-${key}"}


@pytest.mark.parametrize("name", ["my model", "a,b", "it's", "a=b", "2024", "1e3", "null", "True", "-x", "mod\u00e8le"])
def test_a_choice_whose_name_commands_would_read_otherwise_is_refused(name, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / f"{name}.yaml").write_text("path: /somewhere\n")
    with pytest.raises(ConfigError, match=r"rename that file of conf/model/\. Names are made of"):
        load_choice(tmp_path, "model", name)


@pytest.mark.parametrize("name", ["clip-2024.05_b", "2024-05-clip", "B32"])
def test_a_choice_may_have_dots_digits_and_capitals(name, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / f"{name}.yaml").write_text("path: /somewhere\n")
    assert load_choice(tmp_path, "model", name).path == "/somewhere"


@pytest.mark.parametrize(
    ("group", "text", "message"),
    [
        ("gates", "fp16: {min_cosine: 99.9}", r"gates\.fp16: min_cosine is 99\.9: accepted are -1 to 1"),
        ("gates", "int8: {min_cosine: .nan}", r"gates\.int8\.min_cosine is nan: give a number"),
        ("gates", "int8: {max_flips: -1}", r"gates\.int8: max_flips is -1\.0: accepted are 0 to 100"),
        ("gates", "timeout_s: .inf", r"gates\.timeout_s is inf: give a number"),
        ("benchmark", "warmup: -1", r"benchmark\.warmup is -1: give 0 or more"),
        ("benchmark", "sequence_length: -5", r"benchmark\.sequence_length is -5: give 1 or more tokens, or null"),
        ("benchmark", "sequence_length: 0", r"benchmark\.sequence_length is 0: give 1 or more tokens, or null"),
        ("benchmark", "seconds: .nan", r"benchmark\.seconds is nan: give a number"),
        ("benchmark", "threads: 99999", r"benchmark\.threads is 99999: give 1 to 1024"),
        ("benchmark", "batch_sizes: [1, 1]", r"benchmark\.batch_sizes is \[1, 1\]: give each size once"),
        ("benchmark", "batch_sizes: [1, null]", r"benchmark\.batch_sizes\[1\] is null: give a whole number"),
        ("model", "path: a\nrevision: b", r"model\.revision is set beside model\.path"),
    ],
)
def test_a_wrong_setting_of_a_group_is_named_with_what_is_accepted(group, text, message, tmp_path):
    (tmp_path / group).mkdir()
    (tmp_path / group / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_choice(tmp_path, group, "mine")


def test_params_that_are_no_yaml_are_refused(tmp_path):
    (tmp_path / "params.yaml").write_text("model: [tiny")
    with pytest.raises(ConfigError, match=r"params\.yaml is not valid YAML"):
        load_params(tmp_path / "params.yaml", CONF)


@pytest.mark.parametrize(
    ("opset", "writer"), [(14, "torchscript"), (17, "torchscript"), (18, "dynamo"), (21, "dynamo")]
)
def test_the_exporter_follows_the_opset(opset, writer):
    assert OnnxConfig(opset=opset).writer == writer
