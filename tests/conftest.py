"""The built-in checkpoint, small sets and targets made once, and a temporary copy of the whole project."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, Phase, settings
from kinds import Kinds
from reliability import Outcomes

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-shapes"
COMMANDS = {"apply", "compare", "device", "drift", "gate", "publish", "verify", "why"}  # of stages/, run by hand

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
os.environ["DVC_NO_ANALYTICS"] = "1"
if not shutil.which("nvidia-smi"):
    os.environ["TRITON_INTERPRET"] = "1"  # GPU kernels run in Triton's interpreter; read when triton is imported
    sys.path.append(str(ROOT / "build" / "language"))  # `make test` puts triton there


MANY = 8  # times as many inputs in `make reliability` as in `make test`
REPORT = "--reliability"
KINDS = "--kinds"


def pytest_addoption(parser):
    parser.addoption(KINDS, type=Path, metavar="FILE", help="run the tests that show a kind, and write their table")
    parser.addoption(REPORT, type=Path, metavar="FILE", help="run all faults, many more inputs, and write counts")


def pytest_collection_modifyitems(config, items):
    """Begin with what runs longest; skip, visibly, what needs a GPU where there is none, and what takes too long.

    One worker begins with a file that needs the built project and makes it; the others, meanwhile, with what does not.
    """
    first = next((item.path for item in items if "built" in item.fixturenames), None)

    def turn(item):
        return 0 if item.path == first else 2 if "built" in item.fixturenames else 1

    items.sort(key=lambda item: ("slow" not in item.keywords, turn(item)))
    if config.getoption(KINDS):
        items[:] = [item for item in items if "kinds" in item.fixturenames]
    if not config.getoption(REPORT):
        for item in items:
            if "reliability" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="`make reliability` runs it"))
    if shutil.which("nvidia-smi"):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(scope="session")
def outcomes(pytestconfig):
    """Where faults and hostile inputs are counted; `make reliability` writes them down."""
    found = Outcomes()
    yield found
    if path := pytestconfig.getoption(REPORT):
        found.write(path)


@pytest.fixture(scope="session")
def kinds(pytestconfig):
    """Where a test notes what comes of a kind of input; `make kinds` writes the table."""
    found = Kinds()
    yield found
    if path := pytestconfig.getoption(KINDS):
        found.write(path)


@pytest.fixture(scope="session")
def fuzz(pytestconfig):
    """Settings of a test by Hypothesis that tries `count` inputs, the same ones each time."""

    def tries(count):
        times = MANY if pytestconfig.getoption(REPORT) else 1
        return settings(
            max_examples=times * count,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # an input is shown as it was found
        )

    return tries


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The built-in model as the target torch-fp32."""
    from clip_deploy.checkpoint import fetch
    from clip_deploy.core.artifact import Target, build
    from clip_deploy.core.config import ModelConfig

    folder = tmp_path_factory.mktemp("artifacts") / "torch-fp32"
    build(folder, lambda output: fetch(ModelConfig(path=str(TINY)), output), Target("eager", "fp32"))
    return folder


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_VISION = {"image_size": 32, "patch_size": 8, **SMALL}


@pytest.fixture(scope="session")
def siglip(tmp_path_factory):
    """A small SigLIP with random weights in Hugging Face layout, its tokenizer a spiece.model, as torch-fp32."""
    from transformers import SiglipImageProcessorPil, SiglipProcessor, SiglipTokenizer

    folder = tmp_path_factory.mktemp("siglip")
    (folder / "spiece.model").write_bytes(sentencepiece_model())
    settings = {"model_max_length": 16, "model_input_names": ["input_ids"]}
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), **settings)
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return reference(small_siglip(len(tokenizer)), SiglipProcessor(images, tokenizer), folder)


@pytest.fixture(scope="session")
def siglip2(tmp_path_factory):
    """A small SigLIP 2 of one size, with Gemma's kind of tokenizer, which states do_lower_case and does not do it."""
    from transformers import GemmaTokenizer, SiglipImageProcessorPil, SiglipProcessor

    vocabulary, merges = gemma_vocabulary()
    settings = {"add_bos_token": False, "add_eos_token": True, "do_lower_case": True, "padding_side": "right"}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, **settings)
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=2)
    processor = SiglipProcessor(images, tokenizer)
    return reference(small_siglip(len(tokenizer)), processor, tmp_path_factory.mktemp("siglip2"))


def small_siglip(words):
    from transformers import SiglipConfig, SiglipModel

    text = {"vocab_size": words, "max_position_embeddings": 16, "bos_token_id": None, "eos_token_id": 1, **SMALL}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=SMALL_VISION))


def sentences():
    """What the small tokenizers are trained on: English as the tests use it, and a little of other scripts."""
    from clip_deploy.lint import SENTENCES
    from clip_deploy.portable import probe_texts
    from clip_deploy.shapes import CLASSES

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


@pytest.fixture(scope="session")
def chinese_clip(tmp_path_factory):
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
    return reference(model, ChineseCLIPProcessor(images, small_tokenizer(32)), tmp_path_factory.mktemp("chinese-clip"))


def small_tokenizer(length):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(TINY / "tokenizer.json"), pad_token="<|endoftext|>", model_max_length=length
    )


def reference(model, processor, source):
    """Save a checkpoint to `source` and fetch it as a target."""
    from clip_deploy.checkpoint import fetch
    from clip_deploy.core.artifact import Target, build
    from clip_deploy.core.config import ModelConfig

    model.save_pretrained(source)
    processor.save_pretrained(source)
    folder = source / "torch-fp32"
    build(folder, lambda output: fetch(ModelConfig(path=str(source)), output), Target("eager", "fp32"))
    return folder


@pytest.fixture(scope="module", params=["checkpoint", "siglip", "chinese_clip"])
def family(request):
    """A checkpoint of each family: CLIP, SigLIP with its pooling head, and one with a BERT text tower."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def sets(checkpoint, tmp_path_factory):
    """A folder with small evaluation and calibration sets and the reference's embeddings."""
    from clip_deploy.checkpoint import load_processor
    from clip_deploy.core.artifact import read_target
    from clip_deploy.core.config import DataConfig
    from clip_deploy.dataset import load
    from clip_deploy.encode import encode_set, save_embeddings
    from clip_deploy.portable import write_portable
    from clip_deploy.prepared import load_prepared, write_prepared
    from clip_deploy.runtimes import open_encoder

    folder = tmp_path_factory.mktemp("data")
    data = DataConfig(evaluation_samples=96, calibration_samples=16, templates=["a photo of a {}", "a {}"])
    dataset, processor, model = load(data, 0), load_processor(checkpoint), read_target(checkpoint).model
    for name in ("evaluation", "calibration"):
        (folder / name).mkdir()
        write_prepared(name, dataset, data.templates, processor, model, folder / name)
    embeddings = encode_set(open_encoder(checkpoint), load_prepared(folder / "evaluation"))
    save_embeddings(embeddings, folder / "evaluation" / "reference.npz")
    (folder / "portable").mkdir()
    write_portable(checkpoint, folder / "portable")
    return folder


@pytest.fixture(scope="session")
def onnx_target(checkpoint):
    """The built-in model exported at opset 18."""
    from clip_deploy.core.artifact import Target, build
    from clip_deploy.core.config import OnnxConfig
    from clip_deploy.onnx_export import export_onnx

    folder = checkpoint.parent / "onnx-fp32"
    build(folder, lambda output: export_onnx(checkpoint, OnnxConfig(), output), Target("ort", "fp32"))
    return folder


@pytest.fixture(scope="session")
def fused(onnx_target, sets):
    """A second target beside the exported one."""
    from clip_deploy.core.artifact import Target, build
    from clip_deploy.core.config import OptimizeConfig
    from clip_deploy.fusion import optimize
    from clip_deploy.prepared import load_prepared

    folder, calibration = onnx_target.parent / "ort-fp32", load_prepared(sets / "calibration")
    build(folder, lambda output: optimize(onnx_target, OptimizeConfig(), calibration, output), Target("ort", "fp32"))
    return folder


def advice(built, **other):
    """reports/recommendation.json as if all targets of a folder had passed, and the first of `other` were chosen."""
    from clip_deploy.core.artifact import read_target
    from clip_deploy.core.files import sha256

    targets = {}
    for folder in sorted(path.parent for path in built.glob("*/target.json")):
        target = read_target(folder)
        targets[folder.name] = {
            "status": "pass",
            "reasons": [],
            "runtime": target.runtime,
            "precision": target.precision,
            "device": "cpu",
            "files": {name: sha256(folder / name) for name in target.files},
            "metrics": {"vision_p50_ms": 1.0},
        }
    return {"package": {}, "pairs": {}, "note": "as asked", "doubts": [], "targets": targets, **other}


def records(built, folder, **changes):
    """reports/validate of a folder's targets, as if all had passed; `changes` to all records."""
    from clip_deploy.core.artifact import read_target
    from clip_deploy.core.config import Gate
    from clip_deploy.core.files import sha256
    from clip_deploy.core.results import write_json
    from clip_deploy.verdict import limits

    sound = {"cosine_min": 1.0, "finite": True}
    for target in sorted(path.parent for path in built.glob("*/target.json")):
        known = read_target(target)
        record = {
            "status": "pass",
            "reasons": [],
            "precision": known.precision,
            "trained": True,
            "files": {name: sha256(target / name) for name in known.files},
            "parity": {"vision": sound, "text": sound},
            "shapes": {"vision, batch 3": 0.9999},
            "zero_shot": {"top1_drop": 0.0},
            "flips": 0.25,
            "doubts": [],
            **changes,
        }
        write_json(folder / f"{target.name}.json", record | {"limits": limits(record, Gate(min_cosine=0.999))})
    return folder


@pytest.fixture(scope="session")
def package(onnx_target, sets, tmp_path_factory):
    """The exported built-in model as the stage `package` would pack it."""
    return packed(onnx_target, sets, tmp_path_factory.mktemp("package"))


def packed(target, sets, folder):
    from clip_deploy.core.config import GatesConfig
    from clip_deploy.package import Sources, write_package

    facts = {"model": "tiny", "seed": 0, "versions": {}}
    with tempfile.TemporaryDirectory() as validation:
        known = records(target.parent, Path(validation))
        sources = Sources(target.parent, known, sets / "portable", sets / "evaluation")
        write_package(advice(target.parent), target.name, sources, GatesConfig(), facts, folder)
    return folder


@dataclass
class Project:
    """A copy of this repository with its own git and DVC, two rows less, small sets and short timings."""

    path: Path

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        bin_folder = str(Path(sys.executable).parent)
        environment = {
            **os.environ,
            "PATH": bin_folder + os.pathsep + os.environ["PATH"],
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@example.com",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@example.com",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(command, cwd=self.path, capture_output=True, text=True, env=environment, check=False)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
        return done

    def repro(self, *arguments: str) -> set[str]:
        """Run `dvc repro` and return the stages that ran, without probe, which always does."""
        ran = re.findall(r"Running stage '([^']+)'", self.run("dvc", "repro", *arguments).stdout)
        return set(ran) - {"probe"}

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.path / name).read_text()
        assert old in text, f"{name} has no {old!r}"
        (self.path / name).write_text(text.replace(old, new))

    def drop(self, target: str) -> None:
        """Take a target out of params.yaml."""
        path = self.path / "params.yaml"
        lines = [line for line in path.read_text().splitlines() if not re.match(rf"  (- )?{target}(:|$)", line)]
        path.write_text("\n".join(lines).replace(f"{target}, ", "") + "\n")

    def copy(self, path: Path) -> "Project":
        shutil.copytree(self.path, path, symlinks=True)
        return Project(path)


def new_project(path: Path) -> Project:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path / name)
    shutil.rmtree(path / "reports", ignore_errors=True)
    (path / "dvc.lock").unlink(missing_ok=True)
    project = Project(path)
    for left_out in ("torchscript-bf16", "openvino-bf16"):
        project.drop(left_out)
    project.edit("conf/data/shapes.yaml", "evaluation_samples: 960", "evaluation_samples: 96")
    project.edit("conf/data/shapes.yaml", "calibration_samples: 96", "calibration_samples: 16")
    project.edit("params.yaml", "benchmark: standard", "benchmark: quick")
    project.edit("conf/benchmark/quick.yaml", "batch_sizes: [1, 8]", "batch_sizes: [1]")
    project.run("git", "init", "-q", "-b", "main")
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "Start")
    return project


@pytest.fixture
def project(tmp_path):
    """A fresh copy in which nothing has been built."""
    return new_project(tmp_path / "project")


@pytest.fixture(scope="session")
def built(tmp_path_factory, worker_id):
    """A copy in which the whole pipeline has run once and been committed. Tests take their own copy of it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "built"  # one for all of pytest-xdist's workers
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            project = new_project(tmp_path_factory.mktemp("building") / "project")
            project.repro()
            project.run("git", "add", "-A")
            project.run("git", "commit", "-q", "-m", "Reproduce")
            project.path.rename(folder)
    return Project(folder)
