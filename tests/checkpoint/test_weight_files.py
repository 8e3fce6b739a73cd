"""Single files of weights: OpenAI's TorchScript archives, and state_dicts in their layout, held against open_clip."""

import hashlib
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.models import embedded
from support.open_clip import OPENAI, need_library, save_archive

from clip_deploy.checkpoint.fetch import fetch
from clip_deploy.checkpoint.lint import lint
from clip_deploy.checkpoint.load import describe, load_processor
from clip_deploy.core.artifact import build, read_target
from clip_deploy.core.config import ModelConfig
from clip_deploy.core.errors import CheckpointError

WORDS = ["a photo of a red circle", "Two BLUE squares, caf\u00e9", "x &amp; y"]


@pytest.fixture(scope="module", autouse=True)
def library():
    need_library()


@pytest.fixture(scope="module")
def archives(tmp_path_factory, library):
    """By architecture: an archive as OpenAI's, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("archives")

    def archive(name):
        path = folder / f"{name}.pt"
        if not path.exists():
            save_archive(OPENAI[name], path)
        return path

    return archive


def photos(count=3):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)) for _ in range(count)]


def own_embeddings(model):
    """What a model of open_clip makes of photos and WORDS with open_clip's own preprocessing and tokenizer."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    size = model.visual.image_size
    cfg = PreprocessCfg(size=size if isinstance(size, int) else tuple(size))
    preprocess = image_transform_v2(cfg, is_train=False)
    with torch.inference_mode():
        images = model.encode_image(torch.stack([preprocess(photo) for photo in photos()]))
        texts = model.encode_text(open_clip.get_tokenizer("ViT-B-32", context_length=16)(WORDS))
    return images.numpy(), texts.numpy()


def farthest(target, model):
    """The largest difference of unit embeddings from open_clip's own, of both towers."""

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    pairs = zip(embedded(target, photos(), WORDS), own_embeddings(model), strict=True)
    return max(float(np.abs(unit(ours) - unit(own)).max()) for ours, own in pairs)


def taken(path, output, **settings):
    """The target that `download` makes of a file."""
    model = ModelConfig(path=str(path), trained=False, **settings)
    build(output, lambda folder: fetch(model, folder), None)
    assert lint(output, model, describe(output)) == []
    return output


def refused(path, output, **settings):
    with pytest.raises(CheckpointError) as error:
        fetch(ModelConfig(path=str(path), **settings), output)
    said = str(error.value)
    assert len(said.splitlines()) == 1
    assert str(path) in said
    return said


@pytest.mark.parametrize("name", OPENAI)
def test_an_archive_of_openais_gives_open_clips_own_embeddings(name, archives, tmp_path):
    import open_clip

    path = archives(name)
    target = taken(path, tmp_path / "torch-fp32")
    own = open_clip.load_openai_model(str(path), device="cpu")
    assert farthest(target, own) < 1e-5
    for tower in (own.visual, own.transformer):  # the measure would tell a wrong activation
        for block in tower.modules():
            if hasattr(block, "gelu"):
                block.gelu = torch.nn.GELU()
    assert farthest(target, own) > 1e-3
    settings = json.loads((target / "open_clip_config.json").read_text())
    assert settings["model_cfg"] == {**OPENAI[name], "quick_gelu": True}
    weights = load_file(target / "open_clip_model.safetensors")
    assert {weight.dtype for weight in weights.values()} <= {torch.float32, torch.int64}
    known = read_target(target)
    part = known.model.checkpoint.parts[path.name]
    assert part.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    said = "a TorchScript archive: QuickGELU, as its code says; weights in FP32"
    assert known.build["note"] == f"made from {name}.pt, {said}"


def test_weights_tell_the_architecture_of_every_model_of_openais():
    import open_clip

    from clip_deploy.checkpoint.weight_files import architecture_of

    names = open_clip.list_openai_models()
    assert {"RN50", "RN50x64", "ViT-B-32", "ViT-L-14-336"} <= set(names)
    for name in names:
        known = open_clip.get_model_config(name)
        with torch.device("meta"):
            state = open_clip.CLIP(**known).state_dict()
        told = architecture_of({key: tuple(weight.shape) for key, weight in state.items()}, quick_gelu=True)
        assert told == {**known, "quick_gelu": True}


def test_an_archives_code_tells_gelu_from_quick_gelu(tmp_path):
    import open_clip

    save_archive(OPENAI["vit"], tmp_path / "gelu.pt", quick_gelu=False)
    target = taken(tmp_path / "gelu.pt", tmp_path / "torch-fp32")
    state = torch.jit.load(tmp_path / "gelu.pt").state_dict()
    own = open_clip.CLIP(**OPENAI["vit"]).eval()
    own.load_state_dict({key: weight for key, weight in state.items() if key in own.state_dict()})
    assert farthest(target, own) < 1e-5


def test_a_named_architecture_must_be_the_archives_and_its_activation_is_the_archives(archives, tmp_path):
    import open_clip

    for name, model in OPENAI.items():
        architecture = tmp_path / f"{name}-of-openai.json"
        architecture.write_text(json.dumps(model))
        open_clip.add_model_config(architecture)
    target = taken(archives("vit"), tmp_path / "torch-fp32", open_clip="vit-of-openai")
    assert json.loads((target / "open_clip_config.json").read_text())["model_cfg"]["quick_gelu"] is True
    said = refused(archives("vit"), tmp_path, open_clip="resnet-of-openai")
    assert "holds another architecture (a width of 128 and 128, layers 2 and 2): set `open_clip: openai`" in said


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("name", OPENAI)
def test_a_state_dict_in_openais_layout_gives_open_clips_own_embeddings(name, precision, archives, tmp_path):
    import open_clip

    architecture = tmp_path / f"{name}-state.json"
    architecture.write_text(json.dumps(OPENAI[name]))
    open_clip.add_model_config(architecture)
    state = torch.jit.load(archives(name)).state_dict()
    if precision == "fp32":  # fine-tuned: what half precision would lose
        state = {key: value.float() * 1.0001 if value.ndim else value for key, value in state.items()}
    path, plain = tmp_path / "finetuned.pt", tmp_path / "plain.pt"
    torch.save({"epoch": 3, "model_state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    target = taken(path, tmp_path / "torch-fp32", open_clip="openai")
    numbers = ("input_resolution", "context_length", "vocab_size")
    torch.save({key: value for key, value in state.items() if key not in numbers}, plain)
    own = open_clip.create_model(architecture.stem, pretrained=str(plain), force_quick_gelu=True).eval()
    assert farthest(target, own) < 1e-5
    assert farthest(taken(plain, tmp_path / "again", open_clip="openai"), own) < 1e-5
    said = refused(plain, tmp_path)
    assert "uses QuickGELU or GELU. In the model's file in conf/model/, set `open_clip: openai`" in said


def test_the_tokens_are_open_clips_own(archives, tmp_path):
    import open_clip

    tokenizer = load_processor(taken(archives("vit"), tmp_path / "torch-fp32")).tokenizer
    own = open_clip.get_tokenizer("ViT-B-32", context_length=16)(WORDS).numpy()
    np.testing.assert_array_equal(tokenizer(WORDS, return_tensors="np")["input_ids"], own)


def test_an_archive_that_would_run_code_is_refused_and_runs_nothing(archives, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ill.pt"
    with zipfile.ZipFile(archives("vit")) as given, zipfile.ZipFile(path, "w") as made:
        for name in given.namelist():
            made.writestr(
                name, b"cposix\nsystem\n(X\t\0\0\0touch rantR." if name == "vit/data.pkl" else given.read(name)
            )
    said = refused(path, tmp_path)
    assert "that names 'posix.system' in its data.pkl. Weights need no such thing, so it is not read" in said
    assert "none of it was run: download OpenAI's own file, or, if you trust this one" in said
    assert [file.name for file in tmp_path.iterdir()] == ["ill.pt"]


@pytest.mark.parametrize("left", [0.05, 0.999])
def test_a_torn_archive_is_refused(left, archives, tmp_path):
    path, whole = tmp_path / "torn.pt", archives("vit").read_bytes()
    path.write_bytes(whole[: int(len(whole) * left)])
    assert "is truncated or damaged (File is not a zip file): download it again" in refused(path, tmp_path)


def test_what_is_no_file_of_weights_is_refused_with_the_way_out(archives, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    said = refused(path, tmp_path, open_clip="openai")
    assert "cannot be read without running code from it (its pickle names torch.nn.modules.linear.Linear)" in said
    assert "`torch.save(model.state_dict(), path)`" in said
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    assert "it has no weight 'ln_final.weight'" in refused(path, tmp_path, open_clip="openai")
    torch.save([1], path)
    assert "holds no state_dict: accepted are OpenAI's archives" in refused(path, tmp_path)
    path.write_bytes(b"hello" * 100)
    assert "is damaged, or torch.save did not write it" in refused(path, tmp_path)
    state = torch.jit.load(archives("vit")).state_dict()
    layer = "transformer.resblocks.0.mlp.c_fc.weight"
    torch.save({**state, layer: torch.zeros(256, 128)}, path)
    assert f"of {layer!r} it has (256, 128), and needs (512, 128)" in refused(path, tmp_path, open_clip="openai")
    torch.save({**state, "head.weight": torch.zeros(2)}, path)
    assert "of 'head.weight' it has (2,), and needs none" in refused(path, tmp_path, open_clip="openai")
    said = refused(archives("vit"), tmp_path, processor="someone/else", processor_revision="0" * 40)
    assert "model.processor is set" in said
    assert "is one file of weights and needs none: remove it" in said
