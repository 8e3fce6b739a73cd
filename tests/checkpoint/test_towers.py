import pytest
import torch
from transformers import (
    AlignConfig,
    AlignModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)

from clip_deploy.checkpoint.towers import example_inputs, split
from clip_deploy.core.model import Model

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 600, **SMALL}
VISION = {"image_size": 32, "patch_size": 8, **SMALL}
MODELS = {
    "clip": lambda: CLIPModel(CLIPConfig(text_config={"eos_token_id": 1, **TEXT}, vision_config=VISION)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)),
    "chinese-clip": lambda: ChineseCLIPModel(ChineseCLIPConfig(text_config=TEXT, vision_config=VISION)),
    "align": lambda: AlignModel(AlignConfig(text_config=TEXT, vision_config={"image_size": 32})),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_tower_gives_the_whole_models_embedding_and_owns_nothing_of_the_other(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    text_inputs = ["input_ids"] if name == "siglip" else ["input_ids", "attention_mask"]
    inputs = example_inputs(Model(image_size=[32, 32], context_length=16, text_inputs=text_inputs))
    inputs = {"vision": (torch.randn(2, 3, 32, 32),), "text": inputs["text"]}
    texts = dict(zip(text_inputs, inputs["text"], strict=True))
    with torch.inference_mode():
        expected = {
            "vision": model.get_image_features(*inputs["vision"]).pooler_output,
            "text": model.get_text_features(**texts).pooler_output,
        }
        towers = split(model, inputs)
        for tower, embedding in expected.items():
            torch.testing.assert_close(towers[tower](*inputs[tower]), embedding, rtol=1e-5, atol=1e-6)
    vision = {id(weight) for weight in towers["vision"].parameters()}
    text = {id(weight) for weight in towers["text"].parameters()}
    assert vision
    assert text
    assert not vision & text
