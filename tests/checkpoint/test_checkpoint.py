import http.server
import json
import shutil
import subprocess
import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
import transformers
from support.models import SMALL, SMALL_VISION, small_tokenizer
from support.project import TINY, warm_python
from transformers import BertConfig, BertModel, BertTokenizer
from transformers.utils import import_utils

from clip_deploy.builders.onnx_export import export_onnx
from clip_deploy.checkpoint.fetch import fetch
from clip_deploy.checkpoint.lint import lint
from clip_deploy.checkpoint.load import describe, load_model, load_processor
from clip_deploy.checkpoint.verify import verify
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import Exporter, ModelConfig, OnnxConfig
from clip_deploy.core.environment import fingerprint
from clip_deploy.core.errors import CheckpointError, ConfigError, UnavailableError, one_line
from clip_deploy.core.model import Origin, TowerShape
from clip_deploy.core.similarity import row_cosines
from clip_deploy.data.preprocessed import tokenize
from clip_deploy.runtimes import open_encoder


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "checkpoint")


def refuse(folder, message):
    """The folder is refused, before anything is copied."""
    output = folder.parent / "output"
    output.mkdir()
    with pytest.raises(CheckpointError, match=message):
        fetch(ModelConfig(path=str(folder)), output)
    assert not list(output.iterdir())


def test_a_local_folder_is_kept_as_it_came(folder, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    target = fetch(ModelConfig(path=str(folder)), output)
    assert (output / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
    assert target.files == ["config.json", "model.safetensors"]


def test_the_description_holds_each_towers_own_shape():
    described = describe(TINY)
    assert described.towers["vision"] == TowerShape(4, 4, 128)
    assert described.towers["text"] == TowerShape(2, 3, 96)
    assert described.image_size == [48, 48]
    assert described.context_length == 32


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        fetch(ModelConfig(path=str(tmp_path / "nowhere")), tmp_path)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    refuse(folder, "has no weights: a file model.safetensors is needed")


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refuse(folder, r"only pickled weights \(pytorch_model.bin\)")


def test_truncated_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    refuse(folder, "truncated")


@pytest.fixture
def sharded(folder):
    """The weights in one shard, with an index that names two."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_missing_shard_is_refused(sharded):
    refuse(sharded, "lacks model-2.safetensors, which model.safetensors.index.json names")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("[", "model.safetensors.index.json is not JSON"),
        ("[]", "model.safetensors.index.json holds no configuration"),
        ('{"weight_map": ["a"]}', "model.safetensors.index.json is not an index of weights"),
        (
            '{"weight_map": {"a": "../secret.safetensors"}}',
            "names '../secret.safetensors', which is not a file beside it",
        ),
    ],
)
def test_an_index_that_is_none_is_refused(sharded, index, said):
    (sharded / "model.safetensors.index.json").write_text(index)
    refuse(sharded, said)


def test_a_config_with_more_layers_than_there_are_weights_is_refused_before_it_is_built(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1_000_000
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, r"text_config\.num_hidden_layers is 1000000, and the weights are \d+ tensors")


def test_another_architecture_is_refused(tmp_path):
    folder = tmp_path / "bert"
    small = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    BertModel(small).save_pretrained(folder)
    refuse(folder, "holds a 'bert' model: only dual encoders")


def test_a_configuration_that_names_no_architecture_is_refused(folder):
    (folder / "config.json").write_text("{}")
    refuse(folder, "has a config.json without model_type: only dual encoders")


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    refuse(folder, "no config.json")


def test_a_folder_without_its_processor_is_refused(folder):
    (folder / "preprocessor_config.json").unlink()
    refuse(folder, "has no preprocessor_config.json")


@pytest.mark.parametrize(
    ("files", "settings", "missing"),
    [
        (
            [],
            {},
            "CLIPTokenizer: tokenizer.json or vocab.json and merges.txt is missing, and without it all",
        ),
        (["vocab.json"], {}, "CLIPTokenizer: merges.txt is missing"),
        ([], {"tokenizer_class": "BertTokenizerFast"}, "BertTokenizer: tokenizer.json or vocab.txt is missing"),
        ([], {"tokenizer_class": "GemmaTokenizer"}, "GemmaTokenizer: tokenizer.json is missing"),
        (["tokenizer.json"], {"tokenizer_class": "SiglipTokenizer"}, "SiglipTokenizer: spiece.model is missing"),
        ([], None, "CLIPTokenizer: tokenizer.json or vocab.json and merges.txt is missing"),
    ],
)
def test_a_folder_without_its_vocabulary_is_refused_by_the_files_that_are_missing(folder, files, settings, missing):
    words = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").unlink()
    for name in files:
        (folder / name).write_text(words)
    stated = folder / "tokenizer_config.json"
    if settings is None:  # no file of a tokenizer at all
        stated.unlink()
        images = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": images}))
        (folder / "preprocessor_config.json").unlink()
    else:
        stated.write_text(json.dumps(json.loads(stated.read_text()) | settings))
    refuse(folder, f"lacks the vocabulary of its {missing}")


def test_no_allowance_leads_past_a_missing_vocabulary(folder, tmp_path, kinds):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(eos_token_id=2, bos_token_id=0, pad_token_id=1)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    output = tmp_path / "output"
    output.mkdir()
    with pytest.raises(CheckpointError, match="lacks the vocabulary") as refused:
        fetch(ModelConfig(path=str(folder), allow=["eos-token"]), output)
    kinds(
        "01: a checkpoint without its vocabulary",
        before="one embedding for all texts, top-1 2.1 % of 48 classes, all rows pass, a package ships",
        now=str(refused.value).replace(str(folder), "the folder"),
    )


def test_a_tokenizer_that_names_no_mask_gives_one_to_a_model_that_takes_it(folder, tmp_path):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_input_names": ["input_ids"]}))
    assert "attention_mask" not in load_processor(folder).tokenizer("red")
    output = tmp_path / "output"
    output.mkdir()
    model = ModelConfig(path=str(folder))
    described = fetch(model, output).model
    assert described.text_inputs == ["input_ids", "attention_mask"]
    assert described.example_texts == describe(TINY).example_texts
    assert lint(output, model, described) == []
    texts = ["red", "a photo of a yellow star"]
    found, expected = (tokenize(load_processor(each), described, texts) for each in (output, TINY))
    assert found.attention_mask.tolist() == expected.attention_mask.tolist()
    assert 0 in found.attention_mask


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", "{}", "holds no tokenizer (it has no added_tokens and no model): copy it from"),
        ("tokenizer.json", '{"model": {}}', "holds no tokenizer (it has no added_tokens): copy it from"),
        ("tokenizer.json", '{"added_tokens": [], "model": {}}', "holds no tokenizer (data did not match any variant"),
        ("tokenizer.json", "[]", "holds no configuration: [] where an object is expected"),
        ("tokenizer.json", "null", "holds no configuration: null where an object is expected"),
        ("tokenizer.json", "", "is not JSON: "),
        ("preprocessor_config.json", "[]", "holds no configuration: [] where an object is expected"),
        ("preprocessor_config.json", "null", "holds no configuration: null where an object is expected"),
        ("preprocessor_config.json", "", "is not JSON: "),
    ],
)
def test_a_file_of_the_processor_that_is_none_of_its_kind_is_named(folder, name, text, said):
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError) as refused:
        load_processor(folder)
    assert str(refused.value).startswith(f"{folder / name} {said}")


def test_a_vocabulary_without_words_is_refused(chinese_clip, tmp_path):
    folder = bare_chinese_clip(chinese_clip, tmp_path, "")
    with pytest.raises(CheckpointError, match="the vocabulary of its BertTokenizer is empty, so all texts look"):
        load_processor(folder)


def test_a_tokenizer_config_that_is_no_json_is_refused(folder):
    (folder / "tokenizer_config.json").write_text("[")
    refuse(folder, "tokenizer_config.json is not JSON")


def bare_chinese_clip(chinese_clip, tmp_path, vocabulary):
    """As the hub has Chinese-CLIP: vocab.txt alone, no tokenizer.json, no tokenizer_config.json; 512 positions."""
    folder = shutil.copytree(chinese_clip, tmp_path / "chinese-clip")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.txt").write_text(vocabulary)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_chinese_clip_as_the_hub_has_it_is_read_at_52_tokens_with_transformers_ids(chinese_clip, tmp_path, kinds):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    folder = bare_chinese_clip(
        chinese_clip, tmp_path, "\n".join([*special, *"一张红色圆形的照片", "red", "photo"]) + "\n"
    )
    verify(folder)
    assert describe(folder).context_length == 52
    texts = ["一张红色的照片", "A RED photo"]
    ids = load_processor(folder).tokenizer(texts)["input_ids"]
    assert ids == [[2, 5, 6, 7, 8, 11, 12, 13, 3], [2, 1, 14, 15, 3]]
    assert ids == BertTokenizer(str(folder / "vocab.txt"))(texts)["input_ids"]
    kinds(
        "28: Chinese-CLIP as the hub has it (vocab.txt, no tokenizer_config.json)",
        before="refused: has no tokenizer_config.json; with one, texts of 512 tokens",
        now=f"read with transformers' ids, texts of {describe(folder).context_length} tokens",
    )


def test_a_length_that_the_tokenizer_states_is_kept(chinese_clip, tmp_path):
    folder = bare_chinese_clip(chinese_clip, tmp_path, "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\n")
    stated = {"tokenizer_class": "BertTokenizer", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    assert describe(folder).context_length == 64


def test_weights_of_another_shape_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 6
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks the weight"):
        load_model(folder)


# Towers of other kinds, and settings that say how to run a model and not what it computes.

TEXT = {"vocab_size": 600, "max_position_embeddings": 32, "pad_token_id": 586, "eos_token_id": 586, **SMALL}
ROBERTA = {**TEXT, "model_type": "roberta", "max_position_embeddings": 34, "pad_token_id": 1}
SWIN = {"model_type": "swin", "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1]}


def dual(vision, text):
    config = transformers.VisionTextDualEncoderConfig(vision_config=vision, text_config=text, projection_dim=24)
    return transformers.VisionTextDualEncoderModel(config)


def saved(folder, model, images=None, length=None):
    """A checkpoint with CLIP's tokenizer; no `length`: its tokenizer states none."""
    torch.manual_seed(0)
    model.save_pretrained(folder)
    (images or transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})).save_pretrained(folder)
    tokenizer = small_tokenizer(length or int(1e30))
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return folder


def taken(folder):
    """Fetch a checkpoint; its findings by code, its description, and an open encoder."""
    target, model = folder.parent / "torch-fp32", ModelConfig(path=str(folder))
    build(target, lambda output: fetch(model, output), Target("eager", "fp32"))
    described = read_target(target).model
    return {finding.code: finding for finding in lint(target, model, described)}, described, open_encoder(target)


def test_a_robertas_context_leaves_out_the_padding_and_runs_to_its_end(tmp_path, kinds):
    vit = {"model_type": "vit", **SMALL_VISION}
    _, described, encoder = taken(saved(tmp_path / "roberta", dual(vit, ROBERTA)))
    assert described.context_length == 32
    ids = np.full((1, 32), 7)
    assert np.isfinite(encoder.encode_texts(ids, np.ones_like(ids))).all()
    kinds("11: RoBERTa's context", "34 tokens, two too many: an index error", f"{described.context_length} tokens")


def test_altclips_context_is_its_tokenizers(tmp_path, kinds):
    text = {**ROBERTA, "project_dim": 32, "max_position_embeddings": 514}
    config = transformers.AltCLIPConfig(text_config=text, vision_config=SMALL_VISION)
    crop = {"height": 32, "width": 32}
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop)
    found, described, _ = taken(saved(tmp_path / "altclip", transformers.AltCLIPModel(config), images, 512))
    assert described.context_length == 512
    assert "context-length" not in found
    kinds("28: AltCLIP reads 512 of 514 positions", "a `context-length` warning", "no finding")


def test_a_swin_with_a_bert_is_taken(tmp_path, kinds):
    """Its heads are another number in each stage."""
    vision = {**SWIN, "num_heads": [2, 4], "window_size": 4}
    _, described, encoder = taken(saved(tmp_path / "swin", dual(vision, {**TEXT, "model_type": "bert"}), length=32))
    assert described.towers["vision"] == TowerShape(2, 0, 32)
    assert encoder.encode_images(np.zeros((2, 3, 32, 32), np.float32)).shape == (2, 24)
    target, exported = tmp_path / "torch-fp32", tmp_path / "onnx-fp32"
    exported.mkdir()
    with pytest.raises(UnavailableError) as failed:  # of PyTorch 2.13
        export_onnx(target, OnnxConfig(), exported)
    assert "the dynamo exporter failed on the vision tower: Cannot view a tensor with shape" in str(failed.value)
    assert str(failed.value).endswith("; `onnx.exporter: torchscript` may write it (opset 14 to 20)")
    build(exported, lambda out: export_onnx(target, OnnxConfig(exporter=Exporter.torchscript), out), None)
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    assert row_cosines(open_encoder(exported).encode_images(images), encoder.encode_images(images)).min() > 0.9999
    before = "refused: configuration, tokenizer and image processor do not work together"
    kinds("13: Swin with BERT", before, "taken; ONNX by `onnx.exporter: torchscript`")


def test_a_clipseg_sees_images_larger_than_its_positions(tmp_path, kinds):
    config = transformers.CLIPSegConfig(text_config=TEXT, vision_config=SMALL_VISION)
    images = transformers.ViTImageProcessorPil(size={"height": 48, "width": 48})
    found, described, _ = taken(saved(tmp_path / "clipseg", transformers.CLIPSegModel(config), images, 32))
    assert described.image_size == [48, 48]
    assert "image-size" not in found
    kinds("28: CLIPSeg's larger images", "refused: image-size", "no finding")


def test_a_model_of_videos_is_called_one(tmp_path, kinds):
    frames = {"num_frames": 4, "mit_hidden_size": 32, "mit_intermediate_size": 64, "mit_num_hidden_layers": 1}
    config = transformers.XCLIPConfig(text_config=TEXT, vision_config={**SMALL_VISION, **frames})
    with pytest.raises(CheckpointError, match="is a XCLIPModel, which embeds videos") as refused:
        taken(saved(tmp_path / "xclip", transformers.XCLIPModel(config), length=32))
    kinds("28: X-CLIP, a video model", "called NaFlex", refused.value)


def test_a_library_that_is_missing_is_named_in_whole_sentences(tmp_path, kinds, monkeypatch):
    config = transformers.Owlv2Config(text_config=TEXT, vision_config=SMALL_VISION)
    folder = saved(tmp_path / "owlv2", transformers.Owlv2Model(config), length=32)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Owlv2ImageProcessor"}))
    monkeypatch.setattr(import_utils, "is_scipy_available", lambda: False)
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "scipy", (lambda: False, import_utils.SCIPY_IMPORT_ERROR))
    with pytest.raises(CheckpointError, match="requires the scipy library but it was not found") as refused:
        taken(folder)
    assert "You can install it with pip: `pip install scipy`" in str(refused.value)
    kinds("28: OWLv2 without scipy", "the message is cut", refused.value)


KERNELS = {
    "return_dict": {"return_dict": False},
    "attn_implementation": {"attn_implementation": "flash_attention_2"},
    "_attn_implementation": {"_attn_implementation": "flash_attention_3"},
    "output_attentions": {"output_attentions": True},
}


@pytest.mark.parametrize("name", KERNELS)
def test_settings_of_how_to_run_a_model_change_nothing(name, folder, checkpoint, kinds):
    """transformers gives tuples, or asks for a library, where config.json says so."""
    change_config(folder, **KERNELS[name])
    _, _, encoder = taken(folder)
    ids = np.array(read_target(checkpoint).model.example_texts["input_ids"])
    given = ids, np.ones_like(ids)
    assert np.array_equal(encoder.encode_texts(*given), open_encoder(checkpoint).encode_texts(*given))
    if name in ("return_dict", "attn_implementation"):
        number = {"return_dict": "12", "attn_implementation": "20"}[name]
        before = {
            "return_dict": "a traceback in prepare",
            "attn_implementation": "transformers' words on FlashAttention2",
        }
        kinds(f"{number}: {name} in config.json", before[name], "taken, the same embeddings")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_quantised_weights_are_called_so(method, folder, kinds):
    change_config(folder, quantization_config={"quant_method": method, "load_in_4bit": True})
    refuse(
        folder, rf"quantised already \(quantization_config: {method}\): give the checkpoint that they were made from"
    )
    if method == "bitsandbytes":
        kinds("20: quantised weights", "Using `bitsandbytes` 4-bit quantization requires accelerate", "refused by name")


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_messages_name_the_users_folder(folder, kinds):
    """It is copied first, to a folder that is gone when the message is read."""
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError) as refused:
        taken(folder)
    assert str(refused.value).startswith(f"{folder / 'tokenizer.json'} is not JSON: ")
    assert "partial" not in str(refused.value)
    kinds("18: whose folder a message names", "artifacts/.torch-fp32.new.partial", "the path that was given")


def test_long_messages_of_libraries_end_with_a_sentence():
    assert one_line(ValueError("One.\n\n  Two.")) == "One. Two."
    assert one_line(ValueError()) == "ValueError"
    assert one_line(ValueError("A sentence. " * 60)) == "A sentence. " * 32 + "A sentence"
    assert one_line(ValueError("a" * 500)) == "a" * 400 + "..."


def test_a_model_needs_a_path_or_an_id():
    with pytest.raises(ConfigError, match=r"set path in conf/model/local\.yaml"):
        ModelConfig()
    with pytest.raises(ConfigError, match="revision is missing"):
        ModelConfig(repo_id="openai/clip-vit-base-patch32")


def test_an_untrained_model_has_seeded_weights(tmp_path):
    vision = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 586, "vocab_size": 600}
    model = ModelConfig(
        path=str(TINY),
        architecture={"model_type": "clip", "vision_config": vision, "text_config": text},
        trained=False,
    )
    weights = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        target = fetch(model, tmp_path / name)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert target.model.image_size == [32, 32]
    assert target.model.trained is False


# The hub: the real client, against its cache and against a server on this machine.

REVISION = "0123456789abcdef0123456789abcdef01234567"
FETCH = """
import sys, time
from pathlib import Path
time.sleep = lambda seconds: None  # the client tries again after 1, 2, 4... seconds
from clip_deploy.checkpoint.fetch import fetch
from clip_deploy.core.config import Exporter, ModelConfig, OnnxConfig
from clip_deploy.core.errors import CheckpointError
try:
    fetch(ModelConfig(repo_id="someone/tiny-clip", revision=sys.argv[1]), Path(sys.argv[2]))
except CheckpointError as error:
    raise SystemExit(str(error))
"""


def fetch_in_a_process(tmp_path, revision=REVISION, **variables):
    """huggingface_hub reads its settings once, when it is imported."""
    output = tmp_path / "output"
    output.mkdir()
    done = subprocess.run(
        [warm_python(), "-c", FETCH, revision, str(output)],
        env={"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", **variables},
        cwd=TINY.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, output


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a snapshot needs: the list of files at a revision, and the files."""

    files = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
    others = ("pytorch_model.bin", "evil.py", "model.fp16.safetensors", "open_clip_model.safetensors", "notes.json")
    written: ClassVar[dict[str, bytes]] = {}  # besides the files of the built-in checkpoint
    asked: ClassVar[list[str]] = []
    broken = False
    cut = False  # the connection breaks in the middle of the weights

    def do_GET(self):
        if self.broken:
            return self.answer(503, b"")
        if self.path.startswith("/api/models/someone/tiny-clip"):
            names = (*self.files, *self.others, *self.written)
            siblings = [{"rfilename": name} for name in names]
            record = {"id": "someone/tiny-clip", "sha": REVISION, "siblings": siblings, "tags": [], "downloads": 0}
            if "/tree/" in self.path:
                record = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
            return self.answer(200, json.dumps(record).encode(), "application/json")
        name = self.path.partition(f"/{REVISION}/")[2]
        if name:
            self.asked.append(name)
        if name in self.files or name in self.written:
            body = self.written[name] if name in self.written else (TINY / name).read_bytes()
            short = body[: len(body) // 2] if self.cut and name == "model.safetensors" else body
            return self.answer(200, short, length=len(body))
        return self.answer(404, b"")

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def answer(self, status, body, kind="application/octet-stream", length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        self.send_header("Content-Type", kind)
        self.send_header("ETag", f'"{length or len(body)}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_hub_checkpoint_is_downloaded_without_pickles_or_code(tmp_path, hub):
    done, output = fetch_in_a_process(tmp_path, HF_ENDPOINT=hub)
    assert done.returncode == 0, done.stderr
    assert (output / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
    assert sorted(path.name for path in output.iterdir()) == sorted(Hub.files)
    assert not set(Hub.others) & set(Hub.asked)
    verify(output)
    again = tmp_path / "again"
    again.mkdir()
    offline, _ = fetch_in_a_process(again, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    assert offline.returncode == 0, offline.stderr


@pytest.mark.parametrize("name", ["main", "v1.0", REVISION[:7]])
def test_a_revision_that_can_move_is_refused_with_the_commit_that_it_is_now(tmp_path, hub, monkeypatch, name):
    monkeypatch.setattr(Hub, "asked", [])
    done, output = fetch_in_a_process(tmp_path, name, HF_ENDPOINT=hub)
    said = (
        f"model.revision is {name}, a name that can move to other weights. someone/tiny-clip is now at "
        f"{REVISION}: set `revision: {REVISION}` in the model's file in conf/model/"
    )
    assert done.stderr.strip().splitlines()[-1] == said
    assert "model.safetensors" not in Hub.asked
    assert not list(output.iterdir())
    again = tmp_path / "again"
    again.mkdir()
    offline, _ = fetch_in_a_process(again, name, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    assert offline.stderr.strip().splitlines()[-1] == said


def test_a_repository_with_pickles_alone_is_told_so(tmp_path, hub, monkeypatch, kinds):
    monkeypatch.setattr(Hub, "files", tuple(name for name in Hub.files if name != "model.safetensors"))
    monkeypatch.setattr(Hub, "others", ("pytorch_model.bin",))
    done, output = fetch_in_a_process(tmp_path, HF_ENDPOINT=hub)
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith(
        f"someone/tiny-clip at {REVISION} has only pickled weights (pytorch_model.bin), which can run"
    )
    assert not list(output.iterdir())
    kinds("28: a hub repository with .bin weights alone", "has no weights: a file model.safetensors is needed", said)
    (tmp_path / "again").mkdir()
    done, _ = fetch_in_a_process(tmp_path / "again", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    assert "is not in the local cache" in done.stderr  # what else the repository holds, only the hub knows


def test_what_a_repositorys_settings_show_is_refused_before_its_weights_are_fetched(tmp_path, hub, monkeypatch, kinds):
    kind = "sentence_transformers.models."
    listed = [{"path": "0_CLIPModel", "type": f"{kind}CLIPModel"}, {"path": "1_LSTM", "type": f"{kind}LSTM"}]
    inner = {f"0_CLIPModel/{name}": b"{}" for name in Hub.files}
    monkeypatch.setattr(Hub, "files", ())
    monkeypatch.setattr(Hub, "written", {"modules.json": json.dumps(listed).encode(), **inner})
    monkeypatch.setattr(Hub, "asked", [])
    done, _ = fetch_in_a_process(tmp_path, HF_ENDPOINT=hub)
    said = done.stderr.strip().splitlines()[-1]
    assert f"someone/tiny-clip at {REVISION} is of a sentence-transformers model with LSTM (modules.json)" in said
    assert not [name for name in Hub.asked if name.endswith("model.safetensors")]
    kinds("28: what a repository's settings rule out", "downloaded whole, then refused", said)


def test_the_shards_of_a_repository_are_those_of_its_index(tmp_path, hub, monkeypatch):
    weights = (TINY / "model.safetensors").read_bytes()
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    written = {"model.safetensors.index.json": json.dumps(index).encode(), "model-00001-of-00001.safetensors": weights}
    monkeypatch.setattr(Hub, "files", tuple(name for name in Hub.files if name != "model.safetensors"))
    monkeypatch.setattr(Hub, "written", written)
    done, output = fetch_in_a_process(tmp_path, HF_ENDPOINT=hub)
    assert done.returncode == 0, done.stderr
    assert (output / "model-00001-of-00001.safetensors").read_bytes() == weights
    assert not (output / "model.safetensors").exists()


def test_no_network_is_said_in_one_line(tmp_path):
    done, output = fetch_in_a_process(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "cannot reach the hub and someone/tiny-clip" in done.stderr.strip().splitlines()[-1]
    assert not list(output.iterdir())


def test_an_offline_machine_without_the_checkpoint_is_told_the_way_out(tmp_path):
    done, _ = fetch_in_a_process(tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "model: local" in done.stderr


def test_a_hub_that_fails_is_named(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(Hub, "broken", True)
    done, _ = fetch_in_a_process(tmp_path, HF_ENDPOINT=hub)
    assert done.returncode == 1
    assert "someone/tiny-clip" in done.stderr.strip().splitlines()[-1]


def test_a_download_that_breaks_off_is_said_in_one_line_and_goes_on_next_time(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(Hub, "cut", True)
    done, output = fetch_in_a_process(tmp_path, HF_ENDPOINT=hub)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("downloading someone/tiny-clip")
    assert not list(output.iterdir())
    monkeypatch.setattr(Hub, "cut", False)
    again = tmp_path / "again"
    again.mkdir()
    done, output = fetch_in_a_process(again, HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    assert (output / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()


def test_the_fetched_target_says_what_it_is(checkpoint, tmp_path):
    copied = shutil.copytree(checkpoint, tmp_path / "copied")
    (copied / "target.json").unlink()
    target = read_target(checkpoint)
    assert (target.runtime, target.precision, target.model.model_type) == ("eager", "fp32", "clip")
    assert target.model.checkpoint == Origin(None, None, fingerprint(copied))


@pytest.mark.parametrize("name", ["https://huggingface.co/openai/clip-vit-base-patch32", "not an id", "a/b/c"])
def test_what_is_no_id_of_the_hub_is_refused_before_it_is_asked(name, tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.repo_id is '.*': give an id of the hub, owner/name"):
        fetch(ModelConfig(repo_id=name, revision="0" * 40), tmp_path)
