import numpy as np
import pytest
from PIL import Image

from clip_deploy.core.config import DataConfig
from clip_deploy.core.errors import ConfigError, DataError
from clip_deploy.dataset import load

COUNTS = {"evaluation_samples": 16, "calibration_samples": 4}


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes with ten pictures each."""
    for seed in range(20):
        picture(tmp_path / "images" / ("t-shirt", "ankle_boot")[seed % 2] / f"{seed}.png", seed)
    return tmp_path / "images"


def test_an_image_folder_gives_classes_and_disjoint_sets(folder):
    dataset = load(DataConfig(source="image-folder", path=str(folder), **COUNTS), 0)
    assert dataset.classes == ["ankle boot", "t-shirt"]
    assert len(dataset.evaluation) == 16
    assert len(dataset.calibration) == 4
    assert not set(dataset.hashes["evaluation"]) & set(dataset.hashes["calibration"])


def test_the_same_picture_twice_counts_once(folder):
    for number in range(5):
        picture(folder / "t-shirt" / f"copy{number}.png", 0)
    hashes = load(DataConfig(source="image-folder", path=str(folder), **COUNTS), 0).hashes
    assert len(hashes["evaluation"] + hashes["calibration"]) == len(set(hashes["evaluation"] + hashes["calibration"]))


def test_the_seed_decides_the_draw(folder):
    data = DataConfig(source="image-folder", path=str(folder), evaluation_samples=8, calibration_samples=4)
    first, again, other = (load(data, seed).hashes["evaluation"] for seed in (1, 1, 2))
    assert first == again != other


def test_a_folder_without_classes_is_refused(tmp_path):
    picture(tmp_path / "loose.png", 0)
    with pytest.raises(DataError, match="has no classes: put the images of each class into a sub-folder"):
        load(DataConfig(source="image-folder", path=str(tmp_path)), 0)


def test_an_empty_class_is_refused(folder):
    (folder / "shoe").mkdir()
    with pytest.raises(DataError, match="shoe holds no images"):
        load(DataConfig(source="image-folder", path=str(folder)), 0)


def test_an_empty_image_is_named(folder):
    (folder / "t-shirt" / "empty.png").touch()
    with pytest.raises(DataError, match=r"empty\.png is empty: replace or remove it"):
        load(DataConfig(source="image-folder", path=str(folder)), 0)


def test_an_unreadable_image_is_named(folder):
    broken = folder / "t-shirt" / "0.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"0\.png is no readable image"):
        load(DataConfig(source="image-folder", path=str(folder)), 0)


def test_too_few_images_are_refused(tmp_path):
    for seed in range(5):
        picture(tmp_path / "cat" / f"{seed}.png", seed)
    with pytest.raises(DataError, match="yields 5 different images: at least 11 are needed"):
        load(DataConfig(source="image-folder", path=str(tmp_path)), 0)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load(DataConfig(source="image-folder", path=str(tmp_path / "nowhere")), 0)


def captions(folder, lines):
    table = folder.parent / "captions.csv"
    table.write_text("\n".join(["image,caption,kind", *lines]) + "\n")
    return DataConfig(source="captions", path=str(table), caption_column="caption", **COUNTS)


def test_captions_may_be_several_for_an_image_and_have_labels(folder):
    names = sorted(str(path.relative_to(folder.parent)) for path in folder.rglob("*.png"))
    lines = [f"{name},caption {number} of {name},{name.split('/')[1]}" for name in names for number in (1, 2)]
    data = captions(folder, lines)
    data.label_column = "kind"
    dataset = load(data, 0)
    assert dataset.classes == ["ankle_boot", "t-shirt"]
    assert all(len(sample.captions) == 2 for sample in dataset.evaluation)


def test_a_caption_table_with_missing_files_is_refused(folder):
    with pytest.raises(DataError, match=r"nowhere\.png, which does not exist \(1 of 1 missing\)"):
        load(captions(folder, ["nowhere.png,a cat,cat"]), 0)


def test_a_caption_table_without_its_column_is_refused(folder):
    data = captions(folder, ["images/t-shirt/0.png,a shirt,shirt"])
    data.caption_column = "text"
    with pytest.raises(DataError, match="no column 'text': it has image, caption, kind"):
        load(data, 0)


def test_a_dataset_in_the_hubs_layout_is_read_by_datasets(folder):
    """`datasets` reads a local folder with the code that reads the hub; the class names come from it."""
    data = DataConfig(source="hub", dataset_id=str(folder), split="train", label_column="label", **COUNTS)
    dataset = load(data, 0)
    assert dataset.classes == ["ankle boot", "t-shirt"]
    assert dataset.evaluation[0].open().mode == "RGB"


def test_a_dataset_that_cannot_be_had_is_named(tmp_path):
    data = DataConfig(source="hub", dataset_id="someone/nothing", split="test", label_column="label")
    with pytest.raises(DataError, match=r"data\.dataset_id someone/nothing, split 'test' cannot be loaded"):
        load(data, 0)


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match=r"data\.source is 'web': accepted are shapes, image-folder, captions, hub"):
        DataConfig(source="web")
    with pytest.raises(ConfigError, match="names the class once"):
        DataConfig(templates=["a photo"])
