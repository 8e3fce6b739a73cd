"""Every layout of a checkpoint through the forms of a CPU, held against the library that wrote it.

python -m support.layouts reports/layouts.md
"""

import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from support import models, open_clip
from support.project import ROOT, TINY
from tqdm import tqdm

from clip_deploy.builders.fused import optimize
from clip_deploy.builders.onnx_export import export_onnx
from clip_deploy.builders.openvino import export_openvino
from clip_deploy.builders.quantize import quantize
from clip_deploy.builders.torchscript import export_torchscript
from clip_deploy.checkpoint.fetch import fetch
from clip_deploy.checkpoint.load import load_processor
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import (
    DataConfig,
    ModelConfig,
    OnnxConfig,
    OpenVinoConfig,
    OptimizeConfig,
    Precision,
    QuantizeConfig,
)
from clip_deploy.core.environment import software
from clip_deploy.core.similarity import row_cosines
from clip_deploy.data.dataset import load
from clip_deploy.data.preprocessed import load_prepared, write_prepared

HEAD = """# Checkpoints, layout by layout

Written by `make layouts`. Each is a small model, written by the library that is named, with random weights where none
is said to be trained. Three photographs and three texts go through that library and through each form; *lowest
cosine* is of both towers. The forms: torch-fp32, torchscript-fp32, torch-int8, onnx-fp32, ort-fp32, ort-fp16,
ort-int8-dynamic (without an accuracy budget) and openvino-fp32. *Fused* counts attentions, found of expected. INT8 of
random weights says little of trained ones.

| Layout | Written by | Forms | Lowest cosine FP32 | FP16 | INT8 | Fused, image / text |
| --- | --- | ---: | ---: | ---: | ---: | --- |
"""

Embeddings = tuple[np.ndarray, np.ndarray]  # of PHOTOS and of WORDS

WORDS = ["a photo of a red circle", "Two BLUE squares", "x"]
SIZES = ((48, 64), (64, 30), (20, 70))  # height and width
PHOTOS = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))
    for seed, size in enumerate(SIZES)
]
LORA = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
LIBRARIES = ("torch", "transformers", "open_clip", "timm", "peft", "onnxruntime", "openvino")
FORMS = {  # each is built from another one, which stands before it
    "torchscript-fp32": ("torch-fp32", lambda source, _, out: export_torchscript(source, Precision.fp32, out)),
    "torch-int8": ("torch-fp32", lambda source, _, out: export_torchscript(source, Precision.int8, out)),
    "onnx-fp32": ("torch-fp32", lambda source, _, out: export_onnx(source, OnnxConfig(), out)),
    "ort-fp32": ("onnx-fp32", lambda source, calibration, out: optimize(source, OptimizeConfig(), calibration, out)),
    "ort-fp16": (
        "onnx-fp32",
        lambda source, calibration, out: optimize(source, OptimizeConfig(precision=Precision.fp16), calibration, out),
    ),
    "ort-int8-dynamic": (
        "ort-fp32",
        lambda source, calibration, out: quantize(source, QuantizeConfig(), calibration, [], 0, out),
    ),
    "openvino-fp32": (
        "onnx-fp32",
        lambda source, calibration, out: export_openvino(source, OpenVinoConfig(), calibration, 0, out),
    ),
}


@dataclass
class Given:
    """A checkpoint, and what its own library makes of PHOTOS and WORDS."""

    settings: ModelConfig
    expected: Embeddings


def of_transformers(folder: Path, words: list[str] = WORDS) -> Embeddings:
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder, backend="pil")
    return with_transformers(model, processor, words)


def with_transformers(model, processor, words: list[str] = WORDS) -> Embeddings:
    siglip = model.config.model_type.startswith("siglip")
    texts = {"padding": "max_length" if siglip else True, "truncation": True}
    texts |= {"max_length": model.config.text_config.max_position_embeddings}
    texts |= {"return_attention_mask": not siglip}  # SigLIP is trained without a mask
    with torch.inference_mode():
        images = model.eval().get_image_features(**processor.image_processor(PHOTOS, return_tensors="pt"))
        found = model.get_text_features(**processor(text=words, return_tensors="pt", **texts))
    return images.pooler_output.numpy(), found.pooler_output.numpy()


def built_in(folder: Path) -> Given:
    return Given(ModelConfig(path=str(TINY)), of_transformers(TINY))


def family(make: Callable[[Path], Path], words: list[str], folder: Path) -> Given:
    folder.mkdir()
    made = make(folder).parent
    return Given(ModelConfig(path=str(made), trained=False), of_transformers(made, words))


def lent(folder: Path) -> Given:
    """A fine-tuned folder without processor and tokenizer."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(TINY / name, folder / name)
    return Given(ModelConfig(path=str(folder), processor=str(TINY)), of_transformers(TINY))


def lora(folder: Path) -> Given:
    import peft
    from transformers import AutoModel, AutoProcessor

    torch.manual_seed(0)
    adapted = peft.get_peft_model(AutoModel.from_pretrained(TINY), peft.LoraConfig(**LORA)).eval()
    adapted.save_pretrained(folder)
    expected = with_transformers(adapted, AutoProcessor.from_pretrained(TINY, backend="pil"))
    return Given(ModelConfig(path=str(folder)), expected)


def sentence_transformers(heads: int, folder: Path) -> Given:
    """As version 5.4 and later saves one, with Dense heads behind the model."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.dense import Dense

    torch.manual_seed(0)
    behind = [Dense(64, 64, bias=False, activation_function=torch.nn.Identity()) for _ in range(heads)]
    model = SentenceTransformer(modules=[*SentenceTransformer(str(TINY), device="cpu"), *behind], device="cpu")
    model.save(str(folder))
    return Given(ModelConfig(path=str(folder)), (model.encode(PHOTOS), model.encode(WORDS)))


def sentence_transformers_before(folder: Path) -> Given:
    from sentence_transformers import SentenceTransformer

    shutil.copytree(TINY, folder / "0_CLIPModel")
    entry = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    (folder / "modules.json").write_text(json.dumps([entry]))
    model = SentenceTransformer(str(folder), device="cpu")
    return Given(ModelConfig(path=str(folder)), (model.encode(PHOTOS), model.encode(WORDS)))


def of_open_clip(name: str, folder: Path) -> Given:
    own = open_clip.save(json.loads(json.dumps(open_clip.ARCHITECTURES[name])), folder)
    return Given(ModelConfig(path=str(folder), trained=False), with_open_clip(own, f"local-dir:{folder}"))


def with_text_tower(kind: str, folder: Path) -> Given:
    own = open_clip.save_with_text_tower(kind, folder)
    return Given(ModelConfig(path=str(folder), trained=False), with_open_clip(own, f"local-dir:{folder}"))


def with_open_clip(own, tokenizer: str) -> Embeddings:
    import open_clip as library
    from open_clip.transform import PreprocessCfg, image_transform_v2

    stated = getattr(own.visual, "preprocess_cfg", {"size": own.visual.image_size})  # an archive of OpenAI's has none
    preprocess = image_transform_v2(PreprocessCfg(**stated), is_train=False)
    with torch.inference_mode():
        images = own.encode_image(torch.stack([preprocess(photo) for photo in PHOTOS]))
        texts = own.encode_text(library.get_tokenizer(tokenizer)(WORDS))
    return images.numpy(), texts.numpy()


def of_training(folder: Path) -> Given:
    """What open_clip's training saves, on several GPUs."""
    import open_clip as library

    own = open_clip.save(json.loads(json.dumps(open_clip.SMALL)), folder)
    (folder / "tiny-layout.json").write_text(json.dumps(open_clip.SMALL))
    library.add_model_config(folder / "tiny-layout.json")
    state = {f"module.{name}": weight for name, weight in own.state_dict().items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": state}, folder / "epoch_1.pt")
    settings = ModelConfig(path=str(folder / "epoch_1.pt"), open_clip="tiny-layout", trained=False)
    return Given(settings, with_open_clip(own, "tiny-layout"))


def of_openai(name: str, folder: Path) -> Given:
    """A TorchScript archive as OpenAI gives them."""
    import open_clip as library

    folder.mkdir()
    path = folder / "archive.pt"
    open_clip.save_archive(open_clip.OPENAI[name], path)
    (folder / "openai-layout.json").write_text(json.dumps(open_clip.OPENAI[name]))
    library.add_model_config(folder / "openai-layout.json")
    own = library.load_openai_model(str(path), device="cpu")
    return Given(ModelConfig(path=str(path), trained=False), with_open_clip(own, "openai-layout"))


LAYOUTS: dict[str, tuple[str, Callable[[Path], Given]]] = {
    "CLIP, trained (tiny-shapes)": ("transformers", built_in),
    "SigLIP, spiece.model": ("transformers", partial(family, models.siglip, WORDS)),
    # do_lower_case: true is stated, and ignored by GemmaTokenizer
    "SigLIP 2, one size": ("transformers", partial(family, models.siglip2, [word.lower() for word in WORDS])),
    "SigLIP 2 NaFlex": ("transformers", partial(family, models.naflex, [word.lower() for word in WORDS])),
    "Chinese-CLIP": ("transformers", partial(family, models.chinese_clip, WORDS)),
    "CLIP without processor, `processor:`, trained": ("transformers", lent),
    "LoRA adapter of tiny-shapes": ("peft", lora),
    "CLIP, trained, version 5.4's layout": ("sentence-transformers", partial(sentence_transformers, 0)),
    "CLIP with two Dense heads": ("sentence-transformers", partial(sentence_transformers, 2)),
    "CLIP, trained, the layout before 5.4": ("sentence-transformers", sentence_transformers_before),
    **{f"{name}, folder": ("open_clip", partial(of_open_clip, name)) for name in open_clip.ARCHITECTURES},
    **{f"vit with {kind}, folder": ("open_clip", partial(with_text_tower, kind)) for kind in open_clip.TEXT_TOWERS},
    "vit, epoch_1.pt": ("open_clip", of_training),
    **{f"{name}, OpenAI's archive": ("open_clip", partial(of_openai, name)) for name in open_clip.OPENAI},
}


def row(layout: str, library: str, given: Given, folder: Path) -> tuple[str, list[str]]:
    """A line of the table, and what could not be made, with the reason."""
    reference = folder / "torch-fp32"
    build(reference, partial(fetch, given.settings), Target("eager", "fp32"))
    model = read_target(reference).model
    calibration = folder / "calibration"
    calibration.mkdir()
    data = load(DataConfig(evaluation_samples=8, calibration_samples=8), 0)
    write_prepared("calibration", data, ["a {}"], load_processor(reference), model, calibration)
    lowest, missing = {}, []
    for name in ("torch-fp32", *FORMS):
        target = folder / name
        if name in FORMS:
            source, make = FORMS[name]
            precision = name.split("-")[1]
            build(target, partial(make, folder / source, load_prepared(calibration)), Target("none", precision))
        if reason := read_target(target).unavailable:
            missing.append(f"{layout}: {name}: {reason}")
        else:
            found = models.embedded(target, PHOTOS, WORDS, reference)
            lowest[name] = min(float(row_cosines(*pair).min()) for pair in zip(found, given.expected, strict=True))
    cells = [f"{len(lowest)} of {len(FORMS) + 1}"]
    for precision in ("fp32", "fp16", "int8"):
        values = [value for name, value in lowest.items() if name.split("-")[1] == precision]
        cells.append(f"{min(values):.6f}" if values else "-")
    fusions = read_target(folder / "ort-fp32").build.get("fusions", {})
    counts = ["{} of {}".format(*kinds["attention"]) for kinds in fusions.values()]
    cells.append(" / ".join(counts) if counts else "-")
    return f"| {layout} | {library} | {' | '.join(cells)} |", missing


def main(path: Path) -> None:
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT / "build" / "peft"))
    open_clip.need_library()
    lines, missing = [], []
    for layout, (library, make) in tqdm(LAYOUTS.items(), disable=None):
        with tempfile.TemporaryDirectory() as folder:
            line, left = row(layout, library, make(Path(folder) / "given"), Path(folder))
        print(line, flush=True)
        lines.append(line)
        missing += left
    if missing:
        lines += ["", "Not made:", "", *(f"- {line}" for line in missing)]
    used = software()
    lines += ["", "With " + ", ".join(f"{name} {used[name]}" for name in LIBRARIES) + "."]
    path.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
