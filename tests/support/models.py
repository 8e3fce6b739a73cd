"""Small models with random weights, and their tokenizers."""

from support.project import TINY

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_VISION = {"image_size": 32, "patch_size": 8, **SMALL}


def small_siglip(words):
    from transformers import SiglipConfig, SiglipModel

    text = {"vocab_size": words, "max_position_embeddings": 16, "bos_token_id": None, "eos_token_id": 1, **SMALL}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=SMALL_VISION))


def sentences():
    """What the small tokenizers are trained on: English as the tests use it, and a little of other scripts."""
    from clip_deploy.builders.processor_files import probe_texts
    from clip_deploy.checkpoint.lint import SENTENCES
    from clip_deploy.data.scenes import CLASSES

    templates = ("a photo of a {}", "A Photo of a RED {}, large or small", "a drawing of two {}s left of a star")
    return [*(template.format(name) for name in CLASSES for template in templates), *SENTENCES, *probe_texts()[:200]]


def sentencepiece_model(kind="unigram"):
    """The bytes of a spiece.model with SigLIP's special tokens."""
    import io

    import sentencepiece

    texts = [text.lower() for text in sentences()]  # it was trained on what SiglipTokenizer hands it
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    model = io.BytesIO()
    settings = {"model_type": kind, "vocab_size": 350, "num_threads": 1, "minloglevel": 2, **ids}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **settings)
    return model.getvalue()


def gemma_vocabulary():
    """Tokens with their ids, and merges: BPE with bytes to fall back on, as Gemma's."""
    import json

    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(sentences(), trainers.BpeTrainer(vocab_size=900, special_tokens=special))
    model = json.loads(made.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def small_tokenizer(length):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(TINY / "tokenizer.json"), pad_token="<|endoftext|>", model_max_length=length
    )


def condition(model):
    """Give batch norms the statistics of what they see: with random ones, values vanish layer by layer."""
    import torch

    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean of all batches
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        for _ in range(4 if norms else 0):
            model.get_image_features(torch.randn(32, 3, 32, 32))
    return model.eval()


def reference(model, processor, source):
    """Save a checkpoint to `source` and fetch it as a target."""
    from clip_deploy.checkpoint.fetch import fetch
    from clip_deploy.core.artifact import Target, build
    from clip_deploy.core.config import ModelConfig

    model.save_pretrained(source)
    processor.save_pretrained(source)
    folder = source / "torch-fp32"
    build(folder, lambda output: fetch(ModelConfig(path=str(source)), output), Target("eager", "fp32"))
    return folder


def siglip(source):
    """A small SigLIP with random weights in Hugging Face layout, its tokenizer a spiece.model, as torch-fp32."""
    from transformers import SiglipImageProcessorPil, SiglipProcessor, SiglipTokenizer

    (source / "spiece.model").write_bytes(sentencepiece_model())
    settings = {"model_max_length": 16, "model_input_names": ["input_ids"]}
    tokenizer = SiglipTokenizer(str(source / "spiece.model"), **settings)
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return reference(small_siglip(len(tokenizer)), SiglipProcessor(images, tokenizer), source)


def gemma_tokenizer(**settings):
    """As SigLIP 2 has it: it states do_lower_case and does not do it."""
    from transformers import GemmaTokenizer

    vocabulary, merges = gemma_vocabulary()
    settings |= {"add_bos_token": False, "add_eos_token": True, "do_lower_case": True, "padding_side": "right"}
    return GemmaTokenizer(vocab=vocabulary, merges=merges, **settings)


def naflex_config(words):
    from transformers import Siglip2Config

    text = {"vocab_size": words, "max_position_embeddings": 16, "projection_size": 32, "bos_token_id": None, **SMALL}
    return Siglip2Config(text_config={"eos_token_id": 1, **text}, vision_config={**SMALL_VISION, "num_patches": 16})


def naflex(source):
    """A small SigLIP 2 of images in their proportions, in at most 16 patches."""
    from transformers import Siglip2ImageProcessorPil, Siglip2Model, Siglip2Processor

    tokenizer = gemma_tokenizer(model_input_names=["input_ids"])
    images = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    model = Siglip2Model(naflex_config(len(tokenizer)))
    return reference(model, Siglip2Processor(images, tokenizer), source)


def siglip2(source):
    """A small SigLIP 2 of one size."""
    from transformers import SiglipImageProcessorPil, SiglipProcessor

    tokenizer = gemma_tokenizer()
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=2)
    return reference(small_siglip(len(tokenizer)), SiglipProcessor(images, tokenizer), source)


def chinese_clip(source):
    """A small Chinese-CLIP, whose text tower is a BERT."""
    from transformers import (
        ChineseCLIPConfig,
        ChineseCLIPImageProcessorPil,
        ChineseCLIPModel,
        ChineseCLIPProcessor,
    )

    text = {"vocab_size": 600, "max_position_embeddings": 32, **SMALL}
    model = ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=SMALL_VISION))
    images = ChineseCLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    return reference(model, ChineseCLIPProcessor(images, small_tokenizer(32)), source)


def embedded(target, photos, words, checkpoint=None):
    """What a target makes of images and texts, prepared as its checkpoint says."""
    from clip_deploy.checkpoint.load import load_processor
    from clip_deploy.core.artifact import read_target
    from clip_deploy.core.model import as_images
    from clip_deploy.data.preprocessed import tokenize
    from clip_deploy.runtimes import open_encoder

    processor, encoder = load_processor(checkpoint or target), open_encoder(target)
    tokens = tokenize(processor, read_target(target).model, words)
    images = as_images(processor.image_processor(photos, return_tensors="np"), read_target(target).model.image_dtype)
    return encoder.encode_images(images), encoder.encode_texts(tokens.input_ids, tokens.attention_mask)
