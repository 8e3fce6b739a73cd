import numpy as np
import onnx
import onnx_ir as ir
import pytest

from clip_deploy.builders.onnx_export import export_onnx
from clip_deploy.core.config import Exporter, OnnxConfig
from clip_deploy.core.errors import DeployError
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.runtimes import open_encoder


@pytest.mark.parametrize("opset", [14, 17, 18, 21, 23])
def test_the_file_declares_the_opset_asked_for_and_takes_every_batch(checkpoint, onnx_of, opset):
    output = onnx_of(checkpoint, opset)
    rng = np.random.default_rng(0)
    encoder, reference = open_encoder(output), open_encoder(checkpoint)
    for tower in ("vision", "text"):
        onnx_file.check(output / f"{tower}.onnx")
        assert onnx_file.opset_of(output / f"{tower}.onnx") == opset
    for batch, tokens in ((1, 7), (3, 32)):
        pixels = rng.normal(size=(batch, 3, 48, 48)).astype(np.float32)
        assert np.abs(encoder.encode_images(pixels) - reference.encode_images(pixels)).max() < 1e-3
        ids = rng.integers(0, 580, (batch, tokens))
        ids[:, -2:] = 586
        mask = np.ones_like(ids)
        mask[:, -1] = 0
        assert np.abs(encoder.encode_texts(ids, mask) - reference.encode_texts(ids, mask)).max() < 1e-3


def test_inputs_and_outputs_have_the_documented_names_and_axes(onnx_target):
    vision, text = (onnx_file.describe(onnx_target / f"{tower}.onnx") for tower in ("vision", "text"))
    assert vision.inputs == {"pixel_values": ["batch", 3, 48, 48]}
    assert vision.outputs == {"image_embeds": ["batch", 64]}
    assert text.inputs == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    assert text.outputs == {"text_embeds": ["batch", 64]}


def test_a_file_holds_one_tower_and_no_path_of_this_machine(checkpoint, onnx_target):
    both = (checkpoint / "model.safetensors").stat().st_size
    sizes = [(onnx_target / f"{tower}.onnx").stat().st_size for tower in ("vision", "text")]
    assert sum(sizes) < 1.05 * both
    content = (onnx_target / "vision.onnx").read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


def test_an_exporter_that_ignores_the_opset_is_caught(checkpoint, tmp_path):
    """PyTorch's dynamo exporter, asked for 14, silently writes 18."""
    settings = OnnxConfig(opset=18, exporter=Exporter.dynamo)
    settings.opset = 16
    with pytest.raises(DeployError, match="holds opset 18, not the 16 asked for"):
        export_onnx(checkpoint, settings, tmp_path)


def test_siglip_takes_no_mask_and_whole_contexts(siglip, onnx_of):
    output = onnx_of(siglip)
    ids = np.random.default_rng(0).integers(0, 300, (3, 16))
    encoder, reference = open_encoder(output), open_encoder(siglip)
    difference = encoder.encode_texts(ids, np.ones_like(ids)) - reference.encode_texts(ids, np.ones_like(ids))
    assert np.abs(difference).max() < 1e-4
    assert onnx_file.describe(output / "text.onnx").inputs == {"input_ids": ["batch", 16]}


def test_weights_above_the_limit_go_to_a_file_of_their_own(onnx_target, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "EXTERNAL_BYTES", 1_000_000)
    names = onnx_file.save(ir.load(onnx_target / "vision.onnx"), tmp_path / "vision.onnx")
    assert names == ["vision.onnx", "vision.onnx.data"] == onnx_file.files_of(tmp_path)
    assert (tmp_path / "vision.onnx").stat().st_size < 500_000
    onnx_file.check(tmp_path / "vision.onnx")
    feeds = onnx_file.random_feeds(tmp_path / "vision.onnx", {})
    expected = onnx_file.run(onnx_target / "vision.onnx", feeds)
    assert np.array_equal(onnx_file.run(tmp_path / "vision.onnx", feeds), expected)


def test_a_broken_graph_is_refused_by_the_checker(onnx_target, tmp_path):
    model = onnx.load(onnx_target / "vision.onnx")
    model.graph.node[3].input[0] = "nowhere"
    onnx.save(model, tmp_path / "vision.onnx")
    with pytest.raises(DeployError, match=r"onnx\.checker refuses vision\.onnx"):
        onnx_file.check(tmp_path / "vision.onnx")
