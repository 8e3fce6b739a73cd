"""Train the built-in CLIP from scratch: python -m assets.train_tiny_shapes [--device cuda]

Renders its own images (clip_deploy.data.scenes), trains a byte-pair tokenizer on the captions, then CLIPModel of
transformers with the contrastive loss, on pictures that are mirrored, moved and dimmed anew at each step. The same seed
gives the same weights on the same machine. training.json, beside the weights, says what was seen, for how long, and how
well it went.
"""

import argparse
import hashlib
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm, trange
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from clip_deploy.core.config import DataConfig
from clip_deploy.data import scenes
from clip_deploy.data.dataset import load, pixel_hash

SEED = 0
IMAGE_SIZE = 48  # pixels; 36 patches of 8 x 8 and the class token, close to B/32's 50 tokens
CONTEXT = 32  # tokens; the longest caption has 17
VOCABULARY = 600  # 512 byte symbols as in CLIP, the merges, two special tokens
IMAGES, HELD_OUT = 96_000, 960  # training and held-out images, each class equally often
SAMPLE = 47  # every 47th image, so of every class, has a digest of its own: quick to render again
BATCH, STEPS, WARMUP = 256, 8_000, 500
LEARNING_RATE, WEIGHT_DECAY = 1.5e-3, 0.1
SHIFT = 3  # pixels, at most, by which a training picture is moved
MAX_LOGIT_SCALE = math.log(100)  # as in the CLIP paper, section 2.5

MODEL = {
    "projection_dim": 64,
    "vision_config": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
    },
    "text_config": {
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": CONTEXT,
    },
}


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    torch.manual_seed(SEED)
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic sums on a GPU
    processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE)
    training, held_out = draw(processor, "training", arguments.images), draw(processor, "held-out", HELD_OUT)
    tokenizer = train_tokenizer(training["captions"])
    # "eager": the fused attention of a GPU has no deterministic backward pass
    model = CLIPModel._from_config(configuration(tokenizer), attn_implementation="eager").to(arguments.device)
    losses = train(model, tokenizer, training, arguments.steps)
    for part in (processor, tokenizer, model.cpu().eval()):
        part.save_pretrained(arguments.output)
    record = {
        "script": "assets/train_tiny_shapes.py",
        "seed": SEED,
        "threads": arguments.threads,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "images": {
            "training": {"count": arguments.images, **training["sha256"], "used_elsewhere": used_elsewhere(training)},
            "held_out": {"count": HELD_OUT, **held_out["sha256"]},
        },
        "classes": len(scenes.CLASSES),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": arguments.steps,
        "batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "loss": losses,
        "held_out_top1": round(top1(model, tokenizer, held_out), 4),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny-shapes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="part of the seed")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2, help="part of the seed: sums depend on it")
    return parser.parse_args()


def draw(processor: CLIPImageProcessorPil, split: str, count: int) -> dict:
    """Render a split and keep it as the processor sees it before rescaling: uint8 [count, 3, height, width]."""
    pixels = np.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    captions, hashes, digest, sampled = [], set(), hashlib.sha256(), hashlib.sha256()
    labels = [index % len(scenes.CLASSES) for index in range(count)]
    with ProcessPoolExecutor() as pool:
        rendered = pool.map(scenes.render, [split] * count, range(count), labels, chunksize=500)
        for index, (image, scene) in enumerate(tqdm(rendered, desc=f"render {split}", total=count, disable=None)):
            digest.update(image.tobytes())
            if index % SAMPLE == 0:
                sampled.update(image.tobytes())
            hashes.add(pixel_hash(image))
            seen = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
            pixels[index] = np.asarray(seen, dtype=np.uint8)
            captions.append((scene.caption, scene.label))
    digests = {"sha256": digest.hexdigest(), f"sha256_of_every_{SAMPLE}th": sampled.hexdigest()}
    return {"pixels": pixels, "captions": captions, "processor": processor, "sha256": digests, "hashes": hashes}


def used_elsewhere(training: dict) -> int:
    """How many pictures of the training set the pipeline evaluates or calibrates with."""
    sets = load(DataConfig(), 0).hashes
    return len(training["hashes"] & {*sets["evaluation"], *sets["calibration"]})


def train_tokenizer(captions: list[tuple[str, str]]) -> CLIPTokenizer:
    """Learn CLIP's kind of byte-pair encoding (lower case, byte level, </w> at the end of a word)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(alphabet) - 2,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    texts = [text for caption, _ in captions[:5_000] for text in (caption, *scenes.TEMPLATES)]
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


def configuration(tokenizer: CLIPTokenizer) -> CLIPConfig:
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPConfig(**{**MODEL, "text_config": {**MODEL["text_config"], **special}})


def train(model: CLIPModel, tokenizer: CLIPTokenizer, data: dict, steps: int) -> list[dict]:
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    pictures = torch.from_numpy(data["pixels"]).to(model.device)
    words, choices = texts(tokenizer, data["captions"])
    words, choices = ({name: part.to(model.device) for name, part in words.items()}, choices.to(model.device))
    model.train()
    losses: list[dict] = []
    running = torch.zeros((), device=model.device)
    for step in trange(steps, desc="train", disable=None, mininterval=5):
        rows = torch.randint(len(pictures), (BATCH,), device=model.device)
        mirrored = torch.rand(BATCH, device=model.device) < 0.5
        pixels = normalised(data["processor"], augmented(pictures[rows], mirrored))
        chosen = choices[rows, 2 * torch.randint(len(scenes.TEMPLATES) * 2, rows.shape, device=model.device) + mirrored]
        loss = contrastive_loss(model, pixels, {name: part[chosen] for name, part in words.items()}, chosen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
            running = running.lerp(loss, 0.02 if step else 1.0)
        if (step + 1) % 500 == 0:
            losses.append({"step": step + 1, "loss": round(running.item(), 4)})
            print(f"step {step + 1}: loss {running.item():.4f}", flush=True)
    return losses


def texts(tokenizer: CLIPTokenizer, captions: list[tuple[str, str]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """All texts that can go with the pictures.

    Returns:
        The distinct texts' tokens, and for each picture the numbers of the texts to draw from, [pictures, 2 * 8]: half
        of them the whole caption and half the subject in one of the templates, each as seen and as seen in a mirror.
    """
    numbers: dict[str, int] = {}
    choices = [
        [
            numbers.setdefault(text, len(numbers))
            for template in scenes.TEMPLATES
            for pair in ((caption, mirror(caption)), (template.format(label), template.format(label)))
            for text in pair
        ]
        for caption, label in captions
    ]
    return dict(tokenizer(list(numbers), padding=True, return_tensors="pt")), torch.tensor(choices)


def mirror(caption: str) -> str:
    if "left of" in caption:
        return caption.replace("left of", "right of")
    return caption.replace("right of", "left of")


def augmented(pictures: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Mirror the pictures named, move and dim all of them; float [batch, 3, height, width] in 0..255."""
    pictures = torch.where(mirrored[:, None, None, None], pictures.flip(-1), pictures).float()
    padded = F.pad(pictures, (SHIFT,) * 4, mode="replicate")
    batch, device = len(pictures), pictures.device
    top, left = torch.randint(2 * SHIFT + 1, (2, batch, 1, 1, 1), device=device)
    span = torch.arange(IMAGE_SIZE, device=device)
    rows, channels = torch.arange(batch, device=device)[:, None, None, None], torch.arange(3, device=device)
    moved = padded[rows, channels[None, :, None, None], top + span[:, None], left + span]
    return (moved * torch.empty(batch, 1, 1, 1, device=device).uniform_(0.85, 1.1)).clamp(0, 255)


def contrastive_loss(model: CLIPModel, pixels: torch.Tensor, tokens: dict, chosen: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross entropy; rows with the same words are all right answers, not negatives."""
    logits = model(pixel_values=pixels, **tokens).logits_per_image
    same = (chosen[:, None] == chosen[None, :]).float()
    targets = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def normalised(processor: CLIPImageProcessorPil, pixels: torch.Tensor) -> torch.Tensor:
    """Rescale and normalise [images, 3, height, width] as the processor does."""
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None]
        for values in (processor.image_mean, processor.image_std)
    )
    return (pixels.float() / 255 - mean) / std


def parameter_groups(model: CLIPModel) -> list[dict]:
    """Decay matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    rest = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]


def learning_rate_factor(step: int, steps: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


@torch.inference_mode()
def top1(model: CLIPModel, tokenizer: CLIPTokenizer, data: dict) -> float:
    """Zero-shot top-1 with the mean of the templates' embeddings per class."""
    embeddings = []
    for name in scenes.CLASSES:
        tokens = tokenizer([template.format(name) for template in scenes.TEMPLATES], padding=True, return_tensors="pt")
        embeddings.append(F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1).mean(dim=0))
    weights = F.normalize(torch.stack(embeddings), dim=-1)
    images = model.get_image_features(
        pixel_values=normalised(data["processor"], torch.from_numpy(data["pixels"]))
    ).pooler_output
    labels = torch.tensor([scenes.CLASSES.index(label) for _, label in data["captions"]])
    return (images @ weights.T).argmax(dim=-1).eq(labels).float().mean().item()


if __name__ == "__main__":
    main()
