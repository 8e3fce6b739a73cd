"""Small models of open_clip with random weights, and its library where PyTorch has no torchvision made for it."""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.project import ROOT

FOLDER = ROOT / "build" / "open-clip"  # `make test` puts it there, with timm, ftfy and torchvision

SMALL_IMAGES = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 2}
SMALL_TEXTS = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
SMALL = {"embed_dim": 16, "vision_cfg": SMALL_IMAGES, "text_cfg": SMALL_TEXTS}
SIGLIP_TEXTS = {**SMALL_TEXTS, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
COCA_TEXTS = {**SMALL_TEXTS, "context_length": 15, "embed_cls": True, "output_tokens": True}
COCA_POOL = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 8, "output_tokens": True}


def timm(name, size, **settings):
    return {**SMALL, "vision_cfg": {"image_size": size, "timm_model_name": name, "timm_pool": "", **settings}}


ARCHITECTURES = {
    "vit": SMALL,
    "vit-quickgelu": {**SMALL, "quick_gelu": True},
    "siglip": {
        **timm("test_vit3", 160, timm_pool="map", timm_proj="none"),
        "embed_dim": 96,
        "init_logit_bias": -10,
        "custom_text": True,
        "text_cfg": SIGLIP_TEXTS,
    },
    "resnet": {**SMALL, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}},
    "convnext": timm("test_convnext", 160),
    "coca": {
        **SMALL,
        "custom_text": True,
        "vision_cfg": {**SMALL_IMAGES, **COCA_POOL},
        "text_cfg": COCA_TEXTS,
        "multimodal_cfg": {"context_length": 15, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1},
    },
    "eva": timm("eva02_tiny_patch14_224", 224, timm_pool="token"),
    "mobileclip": timm("fastvit_mci0", 256, timm_pool="avg"),
    "pe-core": timm("vit_pe_core_tiny_patch16_384", 384, timm_pool="map", timm_proj="none") | {"embed_dim": 192},
}

BERTS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NLLBS = {
    "d_model": 32,
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
}
TEXT_TOWERS = {"bert": BERTS, "m2m_100": NLLBS, "roberta": BERTS, "xlm-roberta": BERTS}  # of transformers
WORDS = "someone/words"  # the repository whose configuration and tokenizer they have

OPENAI_TEXTS = {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}
OPENAI = {  # by the shapes that tell an architecture there
    "vit": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8},
        "text_cfg": OPENAI_TEXTS,
    },
    "resnet": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": OPENAI_TEXTS,
    },
}


def need_library():
    """Make open_clip importable; skip, visibly, where it is not installed.

    torchvision comes from PyPI with a CUDA build, whose operators a CPU build of PyTorch cannot load: they are never
    called, and importing asks only for their names.
    """
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # once asked, it stays with its answer: other tests run without torchvision
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if find_spec("open_clip") is None:
        pytest.skip("no open_clip: `make test` installs it into build/open-clip")
    if "torchvision" not in sys.modules:
        define_operators()


def need_torchvision():
    """Skip, visibly, where no torchvision is installed whose operators load."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    if Path(torchvision.__file__).is_relative_to(FOLDER):
        pytest.skip("torchvision is open_clip's, imported for its names alone")


def define_operators():
    """The names of torchvision's operators, where its library does not load."""
    import torch

    folder = Path(find_spec("torchvision").origin).parent
    text = (folder / "_meta_registrations.py").read_text()
    for name in sorted(set(re.findall(r'register_meta\("(\w+)"', text)) | set(re.findall(r"torchvision::(\w+)", text))):
        torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")


def save(model_cfg, folder, preprocess_cfg=None, seed=0):
    """Write a model of open_clip with random weights into `folder`, as open_clip saves one, and return it."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim and not weight.any():
                weight.normal_(std=0.02)  # biases and gates, of which zeros would hide a mistake
    weights = {name: weight.clone().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", {"format": "pt"})
    return model


def save_with_text_tower(kind, folder, context=16, **settings):
    """The same with a text tower of transformers, whose configuration and tokenizer lie beside."""
    from support.models import small_tokenizer
    from transformers import AutoConfig

    tokenizer, path = small_tokenizer(context), folder / "text_config.json"
    tokenizer.save_pretrained(folder)
    words = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 2048}
    AutoConfig.for_model(kind, **TEXT_TOWERS.get(kind, {}), **words, **settings).to_json_file(path, use_diff=False)
    texts = {"hf_tokenizer_name": WORDS, "hf_proj_type": "linear", "context_length": context}
    model = save({**SMALL, "text_cfg": {**texts, "hf_model_name": str(path)}}, folder)
    config = {"model_cfg": {**SMALL, "text_cfg": {**texts, "hf_model_name": WORDS}}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return model


def save_archive(model_cfg, path, quick_gelu=True, seed=0):
    """Trace a model with random weights in half precision into a TorchScript archive, as OpenAI's are made.

    As there, the numbers that describe the model lie among the weights, and the text tower's mask is no buffer.
    """
    import torch
    from open_clip import CLIP
    from open_clip.model import convert_weights_to_fp16

    torch.manual_seed(seed)
    model = CLIP(**model_cfg, quick_gelu=quick_gelu, cast_dtype=torch.float16).eval()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name.endswith("c_fc.weight"):
                weight.mul_(3)  # so that activations differ where they should
            elif name.endswith("bn3.weight"):
                weight.fill_(1)
            elif weight.is_floating_point() and not weight.any():
                weight.normal_(std=0.02)  # biases, of which zeros would hide a mistake
    convert_weights_to_fp16(model)
    mask, size, context = model.attn_mask, model_cfg["vision_cfg"]["image_size"], model.context_length
    for place in (model, *model.transformer.resblocks):
        if hasattr(place, "attn_mask"):
            del place.attn_mask
        place.attn_mask = mask
    images, texts = torch.ones(2, 3, size, size).half(), torch.zeros(2, context, dtype=torch.int)
    for name, number in {"input_resolution": size, "context_length": context, "vocab_size": model.vocab_size}.items():
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(number))
    inputs = {"forward": (images, texts), "encode_image": (images,), "encode_text": (texts,)}
    torch.jit.save(torch.jit.trace_module(model, inputs, check_trace=False), path)
