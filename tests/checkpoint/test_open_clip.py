"""open_clip's checkpoints, held against open_clip itself."""

import json
import re
import shutil
import sys
import warnings
from dataclasses import asdict
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.hub import COMMIT, cached
from support.models import small_tokenizer
from support.open_clip import (
    ARCHITECTURES,
    SMALL,
    SMALL_IMAGES,
    SMALL_TEXTS,
    TEXT_TOWERS,
    WORDS,
    need_library,
    save,
    save_with_text_tower,
)
from support.project import ROOT, TINY
from support.targets import packed, prepare

from clip_deploy.builders.aoti import export_aoti
from clip_deploy.builders.fused import optimize
from clip_deploy.builders.onnx_export import export_onnx
from clip_deploy.builders.processor_files import probe_texts, write_preprocessor, write_tokenizer
from clip_deploy.builders.quantize import quantize
from clip_deploy.builders.torch_checkpoint import export_torch
from clip_deploy.builders.torchscript import export_torchscript
from clip_deploy.checkpoint.fetch import fetch
from clip_deploy.checkpoint.lint import lint
from clip_deploy.checkpoint.load import describe, load_model, load_processor
from clip_deploy.checkpoint.open_clip_files import read_settings
from clip_deploy.core.artifact import build, read_target
from clip_deploy.core.config import (
    DataConfig,
    Device,
    Exporter,
    ModelConfig,
    OnnxConfig,
    OptimizeConfig,
    Precision,
    Quantization,
    QuantizeConfig,
    TorchConfig,
)
from clip_deploy.core.errors import CheckpointError
from clip_deploy.core.fusions import missed
from clip_deploy.core.images import rgb
from clip_deploy.core.model import Model
from clip_deploy.core.preprocessing import Preprocessing
from clip_deploy.data import scenes
from clip_deploy.data.dataset import load as load_data
from clip_deploy.data.preprocessed import load_prepared, write_prepared
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.inference.tokenizer import Tokenizer
from clip_deploy.onnx_graph.preprocessing import preprocessing_nodes
from clip_deploy.onnx_graph.torch_module import GraphModule
from clip_deploy.runtimes import open_encoder
from clip_deploy.timing.input_pipelines import TorchFeed

# Architectures of timm, whose whole depth shows nothing that two layers do not; `make layouts` runs all of it.
SHALLOW = {
    "test_vit3": {"depth": 2},
    "fastvit_mci0": {"layers": (1, 1, 1, 2)},
    "eva02_tiny_patch14_224": {"depth": 2},
    "vit_pe_core_tiny_patch16_384": {"depth": 2},
}


@pytest.fixture(scope="module", autouse=True)
def library():
    need_library()
    from timm.models import _registry

    with pytest.MonkeyPatch.context() as patch:
        for name, fewer in SHALLOW.items():
            whole = _registry._model_entrypoints[name]
            patch.setitem(_registry._model_entrypoints, name, partial(whole, **fewer))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory, library):
    """By architecture: the checkpoint as open_clip saves it, made when it is first asked for, and open_clip's model."""
    made = {}

    def folder(name):
        if name not in made:
            path = tmp_path_factory.mktemp(name) / "checkpoint"
            made[name] = path, save(json.loads(json.dumps(ARCHITECTURES[name])), path)
        return made[name]

    return folder


@pytest.fixture(scope="module")
def targets(folders):
    """By architecture: the target torch-fp32, made when it is first asked for, and open_clip's own model."""

    def target(name):
        path, own = folders(name)
        output = path.parent / "torch-fp32"
        if not output.exists():
            build(output, lambda folder: fetch(ModelConfig(path=str(path), trained=False), folder), None)
        return output, own

    return target


def inputs_of(own, count=3):
    """Random images, and texts of different length as open_clip pads them."""
    torch.manual_seed(1)
    size = own.visual.image_size
    ids = torch.zeros(count, own.context_length, dtype=torch.int64)
    for row in range(count):
        ids[row, : 5 + row] = torch.tensor([49406, *torch.randint(1, 49000, (3 + row,)).tolist(), 49407])
    return torch.randn(count, 3, *(size if isinstance(size, tuple) else (size, size))), ids


def cosines(one, other):
    return torch.nn.functional.cosine_similarity(torch.as_tensor(one).double(), torch.as_tensor(other).double())


def lowest_cosines(target, own):
    """By tower, of a target's embeddings and open_clip's own."""
    encoder, (images, texts) = open_encoder(target), inputs_of(own)
    with torch.inference_mode():
        expected = {"vision": own.encode_image(images), "text": own.encode_text(texts)}
    actual = {
        "vision": encoder.encode_images(images.numpy()),
        "text": encoder.encode_texts(texts.numpy(), np.ones_like(texts.numpy())),
    }
    return {tower: float(cosines(actual[tower], expected[tower]).min()) for tower in expected}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_towers_give_open_clips_own_embeddings(name, targets):
    target, own = targets(name)
    assert min(lowest_cosines(target, own).values()) > 0.99999


def test_an_open_clip_folder_comes_in(targets, kinds):
    lowest = min(lowest_cosines(*targets("vit")).values())
    now = f"it comes in: lowest cosine with open_clip's own embeddings {lowest:.6f}"
    kinds("16: an open_clip folder", "has no config.json: give a folder in Hugging Face layout", now)
    assert lowest > 0.99999


ATTENTIONS = {"siglip": 3, "resnet": 1, "coca": 3, "eva": 2, "pe-core": 3}  # of image towers
CONVOLUTIONS = ("resnet", "mobileclip")  # which torch-fused does not run
QUICKLY = ("eva", "pe-core")  # by the TorchScript exporter; test_plain_modules.py has the default's graphs


@pytest.mark.parametrize("name", ["vit-quickgelu", "siglip", "resnet", "coca", "mobileclip", "eva", "pe-core"])
def test_a_graph_of_open_clips_towers_has_all_operations_fused(name, targets, onnx_of, tmp_path):
    target, own = targets(name)
    onnx = onnx_of(target, exporter=Exporter.torchscript if name in QUICKLY else Exporter.auto)
    fused = tmp_path / "ort-fp32"
    build(fused, lambda output: optimize(onnx, OptimizeConfig(), None, output), None)
    built = read_target(fused).build
    left = {"coca": {"early_pooling"}}.get(name, set())  # it pools by attention, and its own token stands behind texts
    assert {found.kind for found in missed(built)} == left
    assert ("rewrites_undone" in built) == (name == "coca")  # its texts' mask is of another form
    assert {tower: kinds["attention"][1] for tower, kinds in built["fusions"].items()} == {
        "vision": ATTENTIONS.get(name, 2),
        "text": 2,
    }
    for graph in (onnx, fused):
        assert min(lowest_cosines(graph, own).values()) > 0.999999
    if name not in CONVOLUTIONS:
        images, module = inputs_of(own)[0], GraphModule(ir.load(fused / "vision.onnx"))  # as torch-fused runs it
        with torch.inference_mode():
            assert float(cosines(module.eval()(images), own.encode_image(images)).min()) > 0.999999


@pytest.mark.parametrize("name", ["vit", "coca", "siglip", "eva"])
def test_torchscript_gives_open_clips_own_embeddings(name, targets, tmp_path):
    target, own = targets(name)
    for precision, least in ((Precision.fp32, 0.99999), (Precision.int8, 0.9)):
        traced = tmp_path / precision.value
        build(traced, partial(export_torchscript, target, precision), None)
        assert min(lowest_cosines(traced, own).values()) > least


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_static_int8_gives_open_clips_own_embeddings(name, targets, onnx_of, tmp_path):
    target, own = targets(name)
    fused, calibration = tmp_path / "ort-fp32", tmp_path / "calibration"
    build(fused, lambda output: optimize(onnx_of(target), OptimizeConfig(), None, output), None)
    calibration.mkdir()
    data = load_data(DataConfig(evaluation_samples=8, calibration_samples=8), 0)
    write_prepared("calibration", data, ["a {}"], load_processor(target), read_target(target).model, calibration)
    prepared, static = load_prepared(calibration), QuantizeConfig(method=Quantization.static)
    build(tmp_path / "int8", lambda output: quantize(fused, static, prepared, [], 0, output), None)
    assert min(lowest_cosines(tmp_path / "int8", own).values()) > 0.9


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler on this machine")
def test_a_compiled_package_gives_open_clips_own_embeddings(targets, onnx_of, tmp_path):
    """Of a tower of timm; its CLIP has the operations of the built-in model, which test_aoti.py compiles."""
    from torch._inductor import config

    target, own = targets("siglip")
    with config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # half of the time
        build(tmp_path / "aoti", lambda output: export_aoti(onnx_of(target), Precision.fp32, None, output), None)
    assert min(lowest_cosines(tmp_path / "aoti", own).values()) > 0.999999


def test_a_checkpoint_in_half_precision_is_one_that_open_clip_opens_too(targets, tmp_path):
    import open_clip

    target, own = targets("vit")
    output = tmp_path / "torch-bf16"
    build(output, partial(export_torch, target, TorchConfig(precision=Precision.bf16), Device.cpu), None)
    assert read_target(output).files == ["open_clip_config.json", "open_clip_model.safetensors"]
    again, (images, texts) = open_clip.create_model(f"local-dir:{output}").eval(), inputs_of(own)
    with torch.inference_mode():
        assert float(cosines(again.encode_image(images), own.encode_image(images)).min()) > 0.999
        assert float(cosines(again.encode_text(texts), own.encode_text(texts)).min()) > 0.999


PREPROCESSING = {
    "shortest": {"resize_mode": "shortest", "interpolation": "bicubic"},
    "squash": {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
    "longest": {"resize_mode": "longest", "fill_color": 114, "mean": [0.4, 0.5, 0.6]},
}
SIZES = ((83, 61), (97, 130), (32, 32), (33, 32), (32, 47), (31, 90), (500, 40), (20, 17), (1, 1))


@pytest.fixture
def served(monkeypatch):
    """Pixels as Triton's model makes them."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace())
    spec = spec_from_file_location("served_preprocess", ROOT / "clip_deploy/serving/models/preprocess.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pixel_values


@pytest.mark.parametrize("mode", PREPROCESSING)
def test_torchvisions_pixels_are_close_to_open_clips_own(mode, tmp_path):
    """Their filters differ from Pillow's in rounding; padding must be the same to the last digit."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    own = save(SMALL, tmp_path, PREPROCESSING[mode])
    theirs = image_transform_v2(PreprocessCfg(**own.visual.preprocess_cfg), is_train=False)
    settings = load_processor(tmp_path).image_processor.preprocessing
    feed, rng = TorchFeed(settings, "cpu", False), np.random.default_rng(0)
    for width, height in SIZES:
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        actual = feed.preprocess([torch.from_numpy(image).permute(2, 0, 1)])[0]
        levels = np.abs(actual - theirs(Image.fromarray(image)).numpy()) / settings.scale.reshape(3, 1, 1)
        assert levels.max() < 1.01, (width, height)


@pytest.mark.parametrize("mode", PREPROCESSING)
@pytest.mark.parametrize("side", [32, 33])
def test_pixels_are_open_clips_own_for_every_mode_and_size_of_image(mode, side, served, tmp_path):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    images = {**SMALL_IMAGES, "image_size": side, "patch_size": 8 if side == 32 else 11}
    own = save({**SMALL, "vision_cfg": images}, tmp_path, PREPROCESSING[mode])
    theirs = image_transform_v2(PreprocessCfg(**own.visual.preprocess_cfg), is_train=False)
    processor = load_processor(tmp_path).image_processor
    write_preprocessor(processor, Model(image_size=[side, side]), tmp_path / "preprocessor.json")
    packaged = Preprocessing(**json.loads((tmp_path / "preprocessor.json").read_text()))
    rng = np.random.default_rng(0)
    for width, height in SIZES:
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
        for kind in ("RGB", "L", "1", "P", "CMYK", "LA", "RGBA", "YCbCr"):
            picture = rgb(noise.convert("RGB").convert(kind))
            expected = theirs(picture).numpy()
            np.testing.assert_array_equal(processor(picture)["pixel_values"][0], expected)
            np.testing.assert_allclose(packaged(picture), expected, atol=1e-5)
            np.testing.assert_allclose(served(picture, asdict(packaged)), expected, atol=1e-5)
        grey = noise.convert("L")  # open_clip resizes before it converts: the same where a picture has no palette
        np.testing.assert_array_equal(theirs(rgb(grey)), theirs(grey))
    preprocessing_nodes(processor, [side, side])  # holds them against the processor


@pytest.mark.parametrize("clean", [None, "canonicalize", "whitespace"])
def test_the_packages_tokens_are_open_clips_own(clean, tmp_path):
    import open_clip

    texts = {**SMALL_TEXTS, "context_length": 77} | ({"tokenizer_kwargs": {"clean": clean}} if clean else {})
    save({**SMALL, "text_cfg": texts}, tmp_path)
    processor, model = load_processor(tmp_path), describe(tmp_path)
    write_tokenizer(processor, model, tmp_path / "tokenizer.json")
    packaged = Tokenizer(tmp_path / "tokenizer.json", 77, pad_to_context=True, pad_token=0)
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    given = [*probe_texts(), "fish &amp; chips &lt;3", "\ufb03 \x93quoted\x94", "ALL CAPS'S"]
    expected = theirs(given).numpy()
    np.testing.assert_array_equal(processor.tokenizer(given, return_tensors="np")["input_ids"], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(packaged(given)["input_ids"], expected)


@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
def test_tokens_of_a_tokenizer_of_transformers_are_open_clips_own(clean, tmp_path):
    import open_clip

    settings = {"hf_tokenizer_name": "someone/tokenizer", "tokenizer_kwargs": {"clean": clean}, "vocab_size": 600}
    save({**SMALL, "text_cfg": {**SMALL_TEXTS, **settings}}, tmp_path)
    small_tokenizer(16).save_pretrained(tmp_path)
    processor, model = load_processor(tmp_path), describe(tmp_path)
    write_tokenizer(processor, model, tmp_path / "packaged.json")  # holds it against all probe texts
    given = probe_texts()[:300]
    expected = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(given).numpy()
    np.testing.assert_array_equal(processor.tokenizer(given, return_tensors="np")["input_ids"], expected)


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_a_packages_probabilities_are_open_clips_own(name, targets, onnx_of, tmp_path):
    """A softmax, and where the model has a bias a sigmoid; pictures and texts go in as a user has them."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    target, own = targets(name)
    sets = tmp_path / "sets"
    sets.mkdir()
    prepare(target, sets, evaluation_samples=8, calibration_samples=1, templates=["a {}"])
    (tmp_path / "package").mkdir()
    classifier = ZeroShotClassifier.open(packed(onnx_of(target), sets, tmp_path / "package"), device="cpu")
    texts = ["a red circle", "TWO blue Squares", "\u201ccaf\u00e9\u201d"]
    picture, _ = scenes.render("test", 0, 0)
    given = {found.text: found.probability for found in classifier.predict(picture, texts)}
    preprocess = image_transform_v2(PreprocessCfg(**own.visual.preprocess_cfg), is_train=False)
    with torch.inference_mode():
        tokens = open_clip.get_tokenizer(f"local-dir:{target}")(texts)
        logits = own.get_logits(preprocess(picture)[None], tokens)[0][0]
    expected = logits.sigmoid() if own.logit_bias is not None else logits.softmax(dim=-1)
    np.testing.assert_allclose([given[text] for text in texts], expected.numpy(), rtol=1e-4)


def test_a_training_checkpoint_is_read_without_its_code(folders, tmp_path):
    import open_clip

    architecture = tmp_path / "tiny-for-test.json"
    architecture.write_text(json.dumps(SMALL))
    open_clip.add_model_config(architecture)
    own = folders("vit")[1]
    state = {f"module.{name}": weight for name, weight in own.state_dict().items()}
    path, output = tmp_path / "epoch_1.pt", tmp_path / "output"
    torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": {"param_groups": [{"lr": 0.1}]}}, path)
    settings = ModelConfig(path=str(path), open_clip="tiny-for-test", trained=False)
    build(output, lambda folder: fetch(settings, folder), None)
    assert min(lowest_cosines(output, own).values()) > 0.99999
    with pytest.raises(CheckpointError, match="open_clip has no architecture of that name"):
        fetch(ModelConfig(path=str(path), open_clip="nonsense"), tmp_path)
    torch.save({"state_dict": state, "args": Path()}, path)
    with pytest.raises(CheckpointError, match="cannot be read without running code from it"):
        fetch(settings, tmp_path)


def test_the_linter_runs_what_makes_sense_and_finds_what_is_missing(folders, tmp_path):
    path, _ = folders("vit")
    settings = ModelConfig(path=str(path), trained=False)
    assert lint(path, settings, describe(path)) == []
    broken = shutil.copytree(path, tmp_path / "broken")
    weights = load_file(broken / "open_clip_model.safetensors")
    weights["transformer.resblocks.7.ln_1.weight"] = weights.pop("transformer.resblocks.1.ln_1.weight")
    save_file(weights, broken / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match="missing-weights"):
        lint(broken, settings, describe(path))
    with pytest.raises(CheckpointError, match=r"lacks the weight text\.transformer\.resblocks\.1\.ln_1\.weight"):
        load_model(broken)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_cfg": {"timm_model_name": "hf-hub:a/b"}}, "only architectures of timm can be built"),
        ({"text_cfg": {"tokenizer_mode": "clips"}}, "its tokenizer works in mode 'clips'"),
        ({"text_cfg": {"hf_tokenizer_name": "a/b"}}, "lacks its tokenizer, 'a/b' (hf_tokenizer_name)"),
        ({"text_cfg": None}, "lacks model_cfg with vision_cfg and text_cfg"),
        ({"vision_cfg": {**SMALL_IMAGES, "colour": 1}}, "open_clip cannot build the model of open_clip_config.json"),
    ],
)
def test_what_cannot_be_deployed_is_refused_with_the_way_out(change, said, folders, tmp_path):
    path = shutil.copytree(folders("vit")[0], tmp_path / "given")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**SMALL, **change}}))
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        fetch(ModelConfig(path=str(path)), tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_none_of_the_librarys_own_architectures_is_refused_by_its_settings(tmp_path):
    """What released checkpoints state under model_cfg; a text tower of transformers has its own configuration."""
    import open_clip

    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        assert read_settings(tmp_path)["model_cfg"] == config
    assert len(open_clip.list_models()) > 50


@pytest.mark.parametrize("kind", TEXT_TOWERS)
def test_a_text_tower_of_transformers_gives_open_clips_own_embeddings(kind, tmp_path):
    path = tmp_path / "checkpoint"
    own = save_with_text_tower(kind, path)
    target, onnx, fused, small = (tmp_path / name for name in ("torch-fp32", "onnx-fp32", "ort-fp32", "torch-int8"))
    settings = ModelConfig(path=str(path), trained=False)
    build(target, lambda output: fetch(settings, output), None)
    assert lint(target, settings, read_target(target).model) == []
    exported = OnnxConfig(exporter=Exporter.torchscript)  # `make layouts` has the default's graphs
    build(onnx, lambda output: export_onnx(target, exported, output), None)
    build(fused, lambda output: optimize(onnx, OptimizeConfig(), None, output), None)
    build(small, partial(export_torchscript, target, Precision.int8), None)
    build(tmp_path / "torch-bf16", partial(export_torch, target, TorchConfig(Precision.bf16), Device.cpu), None)
    assert {found.kind for found in missed(read_target(fused).build)} <= {"early_pooling"}
    tokenizer = load_processor(target).tokenizer
    texts = np.array(tokenizer(["a red circle", "x", "two blue squares and a star " * 9])["input_ids"])
    assert [(row == tokenizer.pad_token_id).sum() > 1 for row in texts] == [True, True, False]  # which is masked
    with torch.inference_mode():
        expected = own.encode_text(torch.from_numpy(texts))
    module = GraphModule(ir.load(fused / "text.onnx")).eval()  # as torch-fused runs it
    with torch.inference_mode():
        assert float(cosines(module(torch.from_numpy(texts)), expected).min()) > 0.999999
    for built, least in {target: 0.999999, onnx: 0.999999, fused: 0.999999, small: 0.99, "torch-bf16": 0.999}.items():
        actual = open_encoder(tmp_path / built).encode_texts(texts, np.ones_like(texts))
        assert float(cosines(actual, expected).min()) > least, built


def test_its_configuration_is_taken_from_the_hub_and_kept(tmp_path, monkeypatch):
    from huggingface_hub import constants

    path, cache, given = tmp_path / "checkpoint", tmp_path / "cache", tmp_path / "given"
    own = save_with_text_tower("roberta", path)
    given.mkdir()
    (path / "text_config.json").rename(given / "config.json")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    settings = ModelConfig(path=str(path), trained=False)
    said = (
        f"lacks the configuration of its text tower, '{WORDS}' of transformers (hf_model_name), and neither the hub "
        "nor its cache has it"
    )
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        fetch(settings, tmp_path)
    assert str(error.value).endswith("or copy that model's config.json into the folder as text_config.json")
    cached(cache, WORDS, given)
    (cache / "models--someone--words" / "refs").mkdir()
    (cache / "models--someone--words" / "refs" / "main").write_text(COMMIT)
    build(tmp_path / "torch-fp32", lambda output: fetch(settings, output), None)
    shutil.rmtree(cache)
    texts = torch.tensor(load_processor(tmp_path / "torch-fp32").tokenizer(["a red circle"])["input_ids"])
    with torch.inference_mode():
        expected = own.encode_text(texts)
    actual = open_encoder(tmp_path / "torch-fp32").encode_texts(texts.numpy(), np.ones((1, 16)))
    assert float(cosines(actual, expected).min()) > 0.999999


def test_a_training_checkpoint_takes_it_from_beside(tmp_path):
    import open_clip

    path, architecture = tmp_path / "checkpoint", tmp_path / "tiny-roberta.json"
    own = save_with_text_tower("roberta", path)
    architecture.write_text(json.dumps(json.loads((path / "open_clip_config.json").read_text())["model_cfg"]))
    open_clip.add_model_config(architecture)
    torch.save({"state_dict": own.state_dict()}, path / "epoch_1.pt")
    settings = ModelConfig(path=str(path / "epoch_1.pt"), open_clip="tiny-roberta", trained=False)
    build(tmp_path / "torch-fp32", lambda output: fetch(settings, output), None)
    texts = np.array(load_processor(tmp_path / "torch-fp32").tokenizer(["a red circle"])["input_ids"])
    with torch.inference_mode():
        expected = own.encode_text(torch.from_numpy(texts))
    actual = open_encoder(tmp_path / "torch-fp32").encode_texts(texts, np.ones_like(texts))
    assert float(cosines(actual, expected).min()) > 0.999999


def test_a_text_tower_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "checkpoint"
    save_with_text_tower("roberta", path)
    (path / "text_config.json").write_text('{"model_type": "mt5"}')
    said = f"its text tower, '{WORDS}' (hf_model_name), is a 'mt5' of transformers: accepted are bert, m2m_100"
    with pytest.raises(CheckpointError, match=re.escape(said)):
        fetch(ModelConfig(path=str(path)), tmp_path)


def test_a_hub_repository_comes_in_by_its_id(folders, tmp_path, monkeypatch):
    from huggingface_hub import constants

    path, own = folders("vit")
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--vit"
    shutil.copytree(path, repository / "snapshots" / revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    settings = ModelConfig(repo_id="someone/vit", revision=revision, trained=False)
    build(tmp_path / "torch-fp32", lambda folder: fetch(settings, folder), None)
    assert min(lowest_cosines(tmp_path / "torch-fp32", own).values()) > 0.99999


def test_where_transformers_form_lies_beside_it_is_taken(folders, tmp_path):
    both = shutil.copytree(TINY, tmp_path / "both")
    shutil.copytree(folders("vit")[0], both, dirs_exist_ok=True)
    build(tmp_path / "torch-fp32", lambda folder: fetch(ModelConfig(path=str(both)), folder), None)
    known = read_target(tmp_path / "torch-fp32")
    assert known.files == ["config.json", "model.safetensors"]
    assert (known.model.model_type, known.model.left_out) == ("clip", ["open_clip_model.safetensors"])


def test_pickled_weights_are_refused(folders, tmp_path):
    path = shutil.copytree(folders("vit")[0], tmp_path / "given")
    (path / "open_clip_model.safetensors").rename(path / "open_clip_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has only pickled weights \(open_clip_pytorch_model.bin\)"):
        fetch(ModelConfig(path=str(path)), tmp_path)
