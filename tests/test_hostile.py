"""Hostile input: nothing may crash without a message, hang, or be silently wrong. Every input is counted.

`make test` tries a few of each kind, the same ones each time; `make reliability` tries many more.
"""

import contextlib
import copy
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.hostile import ROWS
from support.project import ROOT, TINY
from support.stages import no_debugger
from support.targets import packed

from clip_deploy.checkpoint.load import load_model, load_processor
from clip_deploy.core.artifact import read_target
from clip_deploy.core.config import (
    BenchmarkConfig,
    DataConfig,
    GatesConfig,
    ModelConfig,
    OnnxConfig,
    OptimizeConfig,
    QuantizeConfig,
    TritonConfig,
    load_params,
)
from clip_deploy.core.errors import DeployError
from clip_deploy.data import scenes
from clip_deploy.data.dataset import load
from clip_deploy.data.preprocessed import tokenize
from clip_deploy.evaluate.embeddings import Embeddings, load_embeddings, save_embeddings
from clip_deploy.inference.classifier import ZeroShotClassifier
from stages import stage

SCENE = scenes.render("hostile", 0, 7)[0]
CONF = ROOT / "conf"

# Values that a setting or a field may be given by mistake or on purpose.
VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 10**30, -(2**63), 0.5, 1e308, float("nan"), float("inf"), "", " ", "0",
    "null", "..", "../../etc/passwd", "/", "a" * 5000, "\u0000", "\u202e\U0001f408", "${seed}", "${oc.env:HOME}", "${",
    "???", "fp32", "2026-11-25", [], [None], [[]], [0], ["a", "a"], {}, {"a": 1}, {"": None}, {"x": {"y": []}},
]  # fmt: skip


def counted(outcomes, kind, call, *arguments):
    """Call, and count the input of this kind as accepted, refused by a DeployError of one line, or wrong.

    Returns the error where it was refused.
    """
    try:
        call(*arguments)
    except DeployError as refusal:
        error: DeployError | None = refusal
    except BaseException:
        outcomes.tried(kind, "wrong")
        raise
    else:
        error = None
    whole = error is None or len(str(error).splitlines()) == 1
    outcomes.tried(kind, "wrong" if not whole else "refused" if error else "accepted")
    assert whole, str(error)
    return error


@pytest.fixture(scope="module")
def read(outcomes):
    """read(kind, reader, folder): let hostile.py read the folder, in a process that it may crash."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "support" / "hostile.py")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )

    def ask(kind, reader, folder):
        print(json.dumps([reader, str(folder)]), file=process.stdin, flush=True)
        outcome, said = json.loads(process.stdout.readline())
        outcomes.tried(kind, outcome)
        assert outcome != "wrong", said
        return outcome, said

    with process:
        yield ask
        process.stdin.close()


def mutated(tree):
    """Copies of a tree in which one to three entries were taken out, replaced, renamed or wrapped."""
    return st.lists(st.tuples(st.randoms(use_true_random=False), st.sampled_from(VALUES)), min_size=1, max_size=3).map(
        lambda steps: _mutated(copy.deepcopy(tree), steps)
    )


def _mutated(tree, steps):
    for random, value in steps:
        places = list(_places(tree))
        if not places:
            return tree
        holder, key = random.choice(places)
        change = random.choice(["replace", "replace", "replace", "delete", "rename", "wrap"])
        if change == "replace":
            holder[key] = copy.deepcopy(value)
        elif change == "wrap":
            holder[key] = [holder[key]]
        else:
            held = holder.pop(key)
            if change == "rename" and isinstance(holder, dict):
                holder[f"{key}_"] = held
    return tree


def _places(tree):
    for key, value in list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def damaged(content):
    """Copies of bytes with one to four bits flipped, a part cut out, doubled or the end missing."""
    position = st.integers(0, len(content) - 1)
    flips = st.lists(st.tuples(position, st.integers(0, 7)), min_size=1, max_size=4)
    cut = st.tuples(st.sampled_from(["end", "out", "double"]), position, st.integers(1, 64))
    return st.one_of(flips.map(lambda found: _flipped(content, found)), cut.map(lambda how: _cut(content, *how)))


def _flipped(content, flips):
    changed = bytearray(content)
    for position, bit in flips:
        changed[position] ^= 1 << bit
    return bytes(changed)


def _cut(content, how, at, length):
    if how == "end":
        return content[:at]
    return content[:at] + (content[at + length :] if how == "out" else content[at : at + length] + content[at:])


PARAMS = (ROOT / "params.yaml").read_text()


@dataclass
class Everything:
    """What some stage reads of params.yaml."""

    model: ModelConfig
    data: DataConfig
    benchmark: BenchmarkConfig
    gates: GatesConfig
    onnx: OnnxConfig
    triton: TritonConfig
    optimize: dict[str, OptimizeConfig] = field(default_factory=dict)
    quantize: dict[str, QuantizeConfig] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    seed: int = 0


@stage
def everything(settings: Everything) -> None:
    """Reads its settings, and does nothing."""


def run_stage():
    """What a stage's program makes of params.yaml: DeployError stands for its exit with one line."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), no_debugger():
        try:
            everything()
        except SystemExit as end:
            if end.code == 1 and "Traceback" not in said.getvalue():
                raise DeployError(said.getvalue().strip().splitlines()[0]) from None
            raise


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["everything"])
    return tmp_path


def test_any_params_are_valid_or_refused_in_one_line(in_folder, outcomes, fuzz):
    path = in_folder / "params.yaml"

    @fuzz(150)
    @given(mutated(yaml.safe_load(PARAMS)))
    def read(tree):
        path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
        counted(outcomes, "params.yaml, settings changed", load_params, path, CONF)

    read()


def test_any_text_in_params_is_valid_or_refused_in_one_line(in_folder, outcomes, fuzz):
    path = in_folder / "params.yaml"

    @fuzz(60)
    @given(damaged(PARAMS.encode()))
    def read(content):
        path.write_bytes(content)
        counted(outcomes, "params.yaml, bytes changed", load_params, path, CONF)

    read()


def test_a_stage_refuses_params_in_one_line_too(in_folder, outcomes, fuzz):
    path = in_folder / "params.yaml"

    @fuzz(25)
    @given(mutated(yaml.safe_load(PARAMS)))
    def read(tree):
        path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
        counted(outcomes, "params.yaml, through a stage's program", run_stage)

    read()


BOMBS = {
    "aliases of aliases": "a0: &a0 [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)),
    "ten thousand brackets": "targets: " + "[" * 10_000,
    "a list that holds itself": "targets: &t [*t]\n",
    "a million digits": f"seed: {'9' * 1_000_000}\n",
    "nothing": "",
    "a byte order mark alone": "\ufeff",
    "a Python object": "seed: !!python/object/apply:os.system [true]\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_yaml_that_explodes_is_refused_in_one_line(in_folder, outcomes, bomb):
    path = in_folder / "params.yaml"
    path.write_text(BOMBS[bomb])
    assert counted(outcomes, "params.yaml, bombs", load_params, path, CONF)


@pytest.fixture
def hostile_checkpoint(tmp_path):
    """A copy of the built-in checkpoint, in which a test puts one file after the other."""
    return Path(shutil.copytree(TINY, tmp_path / "checkpoint"))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_any_json_of_a_checkpoint_is_read_or_refused_in_one_line(name, hostile_checkpoint, read, fuzz):
    path = hostile_checkpoint / name
    tree = json.loads(path.read_text())

    @fuzz(8)
    @given(st.one_of(mutated(tree).map(lambda changed: json.dumps(changed).encode()), damaged(path.read_bytes())))
    def try_one(content):
        path.write_bytes(content)
        read(f"a checkpoint's {name}", "checkpoint", hostile_checkpoint.parent)

    try_one()


def test_any_files_of_a_checkpoint_are_enough_or_their_lack_is_said(hostile_checkpoint, read, fuzz):
    """Files left behind, and files of another tool beside the model."""
    names = sorted(path.name for path in hostile_checkpoint.iterdir())

    @fuzz(8)
    @given(st.sets(st.sampled_from(names)), st.sets(st.sampled_from(sorted(FOREIGN))))
    def try_some(left_behind, added):
        shutil.rmtree(hostile_checkpoint)
        shutil.copytree(TINY, hostile_checkpoint)
        for name in left_behind:
            (hostile_checkpoint / name).unlink()
        for name in added:
            (hostile_checkpoint / name).write_text(FOREIGN[name])
        read("a checkpoint's files, some left behind", "checkpoint", hostile_checkpoint.parent)

    try_some()


FOREIGN = {
    "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 4, "base_model_name_or_path": "someone/clip"}),
    "modules.json": json.dumps([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.CLIPModel"}]),
    "open_clip_config.json": "{}",
    "open_clip_model.safetensors": "",
    "special_tokens_map.json": json.dumps({"eos_token": "<|endoftext|>"}),
    "vocab.json": "{}",
    "merges.txt": "",
}


def header_of(weights):
    """The JSON header of a safetensors file, and its tensors' bytes."""
    length = int.from_bytes(weights[:8], "little")
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def weights_of(header, content, length=None):
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


def one_weight(name, place, value):
    def change(header, content):
        begin, end = header[name]["data_offsets"]
        values = np.frombuffer(content[begin:end], np.float32).copy()
        values[place] = value
        return weights_of(header, content[:begin] + values.tobytes() + content[end:])

    return change


def changed(**fields):
    def change(header, content):
        name = "vision_model.embeddings.class_embedding"
        return weights_of({**header, name: {**header[name], **fields}}, content)

    return change


WEIGHTS = {
    "a header as long as 2^63": lambda header, content: weights_of(header, content, 2**63),
    "a header longer than the file": lambda header, content: weights_of(header, content, len(content) * 2),
    "a header of no bytes": lambda header, content: weights_of(header, content, 0),
    "overlapping offsets": changed(data_offsets=[0, 4]),
    "offsets beyond the file": changed(data_offsets=[2**40, 2**41]),
    "offsets that run back": changed(data_offsets=[8, 0]),
    "an unknown type": changed(dtype="F128"),
    "another type of the same size": changed(dtype="I32"),
    "a shape that no memory holds": changed(shape=[2**40, 2**40]),
    "a weight that is not a number": one_weight("vision_model.embeddings.class_embedding", 0, np.nan),
    "a weight that overflows for some texts": one_weight("text_model.encoder.layers.1.mlp.fc1.weight", 1881, -1.48e37),
    "no tensors": lambda header, content: weights_of({}, b""),
    "a JSON bomb": lambda header, content: b"".join([(100_000).to_bytes(8, "little"), b"[" * 100_000]),
}
# Whole numbers are legal, if odd, weights; what overflows does so in transformers too.
REFUSED_WEIGHTS = set(WEIGHTS) - {"another type of the same size", "a weight that overflows for some texts"}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_lie_are_refused_in_one_line(name, hostile_checkpoint, read):
    path = hostile_checkpoint / "model.safetensors"
    path.write_bytes(WEIGHTS[name](*header_of(path.read_bytes())))
    outcome, said = read("safetensors, made by hand", "checkpoint", hostile_checkpoint.parent)
    assert outcome == ("refused" if name in REFUSED_WEIGHTS else "accepted"), said


def test_damaged_weights_are_read_or_refused_in_one_line(hostile_checkpoint, read, fuzz):
    path = hostile_checkpoint / "model.safetensors"
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")

    @fuzz(8)
    @given(st.one_of(damaged(whole[:head]).map(lambda start: start + whole[head:]), damaged(whole)))
    def try_one(content):
        path.write_bytes(content)
        read("safetensors, bytes changed", "checkpoint", hostile_checkpoint.parent)

    try_one()


@pytest.fixture
def hostile_target(onnx_target, sets, tmp_path):
    """An exported target beside a few prepared rows; a test puts one graph after the other into it."""
    shutil.copytree(onnx_target, tmp_path / "target")
    shutil.copytree(sets / "evaluation", tmp_path / "set")
    whole = load_embeddings(sets / "evaluation" / "reference.npz")
    save_embeddings(Embeddings(whole.images[:ROWS], whole.captions[:ROWS], whole.prompts[:0]), tmp_path / "few.npz")
    return tmp_path


def test_a_damaged_graph_passes_its_gate_or_fails_in_one_line(hostile_target, read, fuzz):
    path = hostile_target / "target" / "text.onnx"
    whole = path.read_bytes()

    @fuzz(12)
    @given(st.one_of(damaged(whole), damaged(whole[:4000]).map(lambda start: start + whole[4000:])))
    def try_one(content):
        path.write_bytes(content)
        read("ONNX, bytes changed", "graph", hostile_target)

    try_one()


def outside(location):
    def change(model):
        weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        size = len(weights.raw_data)
        weights.ClearField("raw_data")
        weights.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
            weights.external_data.add(key=key, value=value)

    return change


def absurd_dims(model):
    model.graph.initializer[0].dims[:] = [2**40, 2**22]


def negative_dims(model):
    model.graph.initializer[0].dims[:] = [-1]


def cycle(model):
    first, last = model.graph.node[0], model.graph.node[-1]
    first.input[0] = last.output[0]


def unknown_operator(model):
    model.graph.node[5].op_type = "EraseTheDisk"


def unknown_domain(model):
    model.graph.node[5].domain = "com.evil"


def no_output(model):
    del model.graph.output[:]


def another_opset(model):
    model.opset_import[0].version = 10**6


def no_opset(model):
    del model.opset_import[:]


def twice_the_same_name(model):
    model.graph.node[-1].output[0] = model.graph.node[0].output[0]


def deep_branches(model):
    inner = onnx.helper.make_graph([], "leaf", [], [])
    for depth in range(20):
        node = onnx.helper.make_node(
            "If", ["condition"], [], then_branch=inner, else_branch=inner if depth < 8 else None
        )
        inner = onnx.helper.make_graph([node], f"branch{depth}", [], [])
    model.graph.node.extend(inner.node)


GRAPHS = {
    "weights in /etc/passwd": outside("../../../../../../../../etc/passwd"),
    "weights in /etc/passwd, absolute": outside("/etc/passwd"),
    "weights in the graph itself": outside("text.onnx"),
    "weights in a device": outside("/dev/zero"),
    "weights in a file that is missing": outside("gone.data"),
    "dimensions that no memory holds": absurd_dims,
    "a dimension below zero": negative_dims,
    "a cycle": cycle,
    "an unknown operator": unknown_operator,
    "an unknown domain": unknown_domain,
    "no output": no_output,
    "an opset from the future": another_opset,
    "no opset": no_opset,
    "one name for two results": twice_the_same_name,
    "branches in each other, twenty deep": deep_branches,
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_is_meant_ill_fails_in_one_line(name, hostile_target, read):
    path = hostile_target / "target" / "text.onnx"
    model = onnx.load(path)
    GRAPHS[name](model)
    onnx.save(model, path)
    outcome, said = read("ONNX, made by hand", "graph", hostile_target)
    assert outcome == "refused", said
    assert "root:" not in said


def saved(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def turned(orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def wide_png(width, height):
    """A PNG whose header says so large a size, and holds one pixel's data."""
    chunk = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + chunk))
    small = saved(Image.new("RGB", (1, 1)), "png")
    return small[:16] + chunk + crc + small[33:]


FRAMES = {"save_all": True, "append_images": [SCENE.rotate(90)]}
PICTURES = {
    "png": saved(SCENE, "png"),
    "jpeg": saved(SCENE, "jpeg"),
    "progressive jpeg": saved(SCENE, "jpeg", progressive=True),
    "CMYK jpeg": saved(SCENE.convert("CMYK"), "jpeg"),
    "jpeg turned by EXIF": saved(SCENE.resize((64, 40)), "jpeg", exif=turned()),
    "jpeg mirrored by EXIF": saved(SCENE.resize((40, 64)), "jpeg", exif=turned(5)),
    "png turned by EXIF": saved(SCENE.resize((64, 40)), "png", exif=turned(8)),
    "webp with alpha, turned by EXIF": saved(SCENE.convert("RGBA").resize((64, 40)), "webp", exif=turned(3)),
    "tiff turned by EXIF": saved(SCENE.resize((64, 40)), "tiff", exif=turned(7)),
    "avif turned by EXIF": saved(SCENE.resize((64, 40)), "avif", exif=turned(6)),
    "jpeg 2000": saved(SCENE, "jpeg2000"),
    "ppm": saved(SCENE, "ppm"),
    "16-bit png": saved(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16), "png"),
    "palette png": saved(SCENE.quantize(16), "png"),
    "palette png with transparency": saved(SCENE.quantize(16), "png", transparency=bytes(range(16))),
    "grey png with alpha": saved(SCENE.convert("LA"), "png"),
    "animated gif": saved(SCENE, "gif", **FRAMES),
    "animated webp": saved(SCENE, "webp", **FRAMES),
    "animated png": saved(SCENE, "png", **FRAMES),
    "webp with alpha": saved(SCENE.convert("RGBA"), "webp", lossless=True),
    "bmp": saved(SCENE, "bmp"),
    "tiff, compressed": saved(SCENE, "tiff", compression="tiff_lzw"),
    "one pixel": saved(Image.new("RGB", (1, 1), "red"), "png"),
    "one line": saved(SCENE.resize((500, 1)), "png"),
    "one column": saved(SCENE.resize((1, 500)), "png"),
}
BAD_PICTURES = {
    "no bytes": b"",
    "a web page": b"<html>not found</html>",
    "half a jpeg": saved(SCENE.resize((300, 300)), "jpeg")[:2000],
    "a bomb of 900 million pixels": wide_png(30_000, 30_000),
    "a bomb of 100 million pixels": wide_png(10_000, 10_000),
    "a line of a million pixels": saved(Image.new("1", (1_000_000, 1)), "png"),
    "a column of a million pixels": saved(Image.new("1", (1, 1_000_000)), "png"),
    "a column of 1,001 pixels, two wide": saved(SCENE.resize((2, 1001)), "png"),
    "a png with no width": wide_png(0, 10),
    "a png of 2^31 columns": wide_png(2**31 - 1, 1),
    "floats without a range": saved(SCENE.convert("F"), "tiff"),
    "32-bit whole numbers": saved(SCENE.convert("I"), "tiff"),
}


@pytest.fixture
def pictures(checkpoint, package, tmp_path):
    shutil.copy(package / "preprocessor.json", tmp_path)
    (tmp_path / "checkpoint").symlink_to(checkpoint)
    return tmp_path


@pytest.mark.parametrize("kind", PICTURES)
def test_odd_pictures_are_what_the_checkpoints_processor_sees(kind, pictures, read):
    (pictures / "image").write_bytes(PICTURES[kind])  # without a suffix, as with a wrong one: the content counts
    outcome, said = read("images, made by hand", "picture", pictures)
    assert outcome == "accepted", said


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_pictures_that_are_none_or_bombs_are_refused_in_one_line(kind, pictures, read):
    (pictures / "image").write_bytes(BAD_PICTURES[kind])
    outcome, said = read("images, made by hand", "picture", pictures)
    assert outcome == "refused", said


def test_damaged_pictures_are_read_as_the_processor_reads_them_or_refused(pictures, read, fuzz):
    @fuzz(60)
    @given(st.sampled_from(sorted(PICTURES)).flatmap(lambda kind: damaged(PICTURES[kind])))
    def try_one(content):
        (pictures / "image").write_bytes(content)
        read("images, bytes changed", "picture", pictures)

    try_one()


def test_a_folder_with_one_bad_picture_is_refused_with_its_name(tmp_path, outcomes):
    (tmp_path / "cat").mkdir()
    for index in range(20):
        scenes.render("folder", index, index)[0].save(tmp_path / "cat" / f"{index:02}.png")
    for name, content in BAD_PICTURES.items():
        (tmp_path / "cat" / "bad.png").write_bytes(content)
        data = DataConfig(source="image-folder", path=str(tmp_path), evaluation_samples=16, calibration_samples=4)
        error = counted(outcomes, "image folders with one bad file", load, data, 0)
        assert "cat/bad.png" in str(error), name


TEXTS = [
    "a", "A PHOTO OF A RED CIRCLE", "red " * 300, "a" * 5000, "\u6771\u4eac", "\u05e9\u05dc\u05d5\u05dd",
    "\u202ea red circle\u202c", "\U0001f408\u200d\u2b1b", "\U0001f1e9\U0001f1ea" * 50, "e\u0301" * 20,
    "Z\u0351\u036b\u0343",
    "\u0000", "a\u0000b", "\ufeffa", "\ufffd", "\t\n\r", "\u00a0", "\u200b", "\U000e0041", "\ud800", "", " ", "</w>",
    "<|endoftext|>", "a red <|endoftext|> circle", "<|startoftext|>", "<|startoftext|> a <|endoftext|>",
    "<|endoftext|>" * 100,
]  # fmt: skip


@pytest.fixture(scope="module")
def encoders(package, fused, sets, tmp_path_factory):
    """The package as exported, and one of the fused graph."""
    folders = {"onnx-fp32": package, "ort-fp32": packed(fused, sets, tmp_path_factory.mktemp("package"))}
    return {name: ZeroShotClassifier.open(folder, threads=1, cache_size=0) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def own_embedding(checkpoint):
    """What transformers makes of one text with the checkpoint, of unit length."""
    model, processor, described = load_model(checkpoint), load_processor(checkpoint), read_target(checkpoint).model

    def embed(text):
        tokens = tokenize(processor, described, [text])
        given = {"input_ids": torch.tensor(tokens.input_ids), "attention_mask": torch.tensor(tokens.attention_mask)}
        with torch.inference_mode():
            found = model.get_text_features(**given).pooler_output[0].numpy()
        return found / np.linalg.norm(found)

    return embed


def embed_as_the_checkpoint_does(encoders, own_embedding, text):
    with warnings.catch_warnings(action="ignore"):  # a long text is cut
        found = {name: encoder.embed_texts([text])[0] for name, encoder in encoders.items()}
    expected = own_embedding(text)
    cosines = {name: float(embedding @ expected) for name, embedding in found.items()}
    assert min(cosines.values()) > 0.9999, (text, cosines)


@pytest.mark.parametrize("text", TEXTS)
def test_odd_texts_are_embedded_as_the_checkpoint_does_or_refused(text, encoders, own_embedding, outcomes):
    counted(outcomes, "texts, made by hand", embed_as_the_checkpoint_does, encoders, own_embedding, text)


def test_any_text_is_embedded_as_the_checkpoint_does_or_refused(encoders, own_embedding, outcomes, fuzz):
    special = st.sampled_from(["<|endoftext|>", "<|startoftext|>", "</w>", " ", "a", "red circle", "\u0301", "\u200d"])
    anything = st.characters(codec=None)  # lone surrogates too

    @fuzz(80)
    @given(st.lists(st.one_of(special, anything), max_size=60).map("".join))
    def try_one(text):
        counted(outcomes, "texts", embed_as_the_checkpoint_does, encoders, own_embedding, text)

    try_one()


@pytest.mark.parametrize("name", ["a\ud800b", "a\udcff"])
def test_a_class_that_is_no_unicode_is_refused_by_name(name, checkpoint, outcomes):
    processor, model = load_processor(checkpoint), read_target(checkpoint).model
    error = counted(outcomes, "texts, made by hand", tokenize, processor, model, ["cat", name])
    assert "text 2 of 2 is not valid Unicode" in str(error)
