import io

import numpy as np
import pytest
from datasets import Dataset as HubDataset
from datasets import Features, Value
from datasets import Image as HubImage
from PIL import Image

from clip_deploy.core.config import DataConfig
from clip_deploy.core.errors import ConfigError, DataError
from clip_deploy.data.dataset import check_prompts, load

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


def test_empty_classes_are_refused_all_at_once(folder):
    for name in ("shoe", "hat"):
        (folder / name).mkdir()
    (folder / "hat" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"images/hat; \S*images/shoe holds no images"):
        load(DataConfig(source="image-folder", path=str(folder)), 0)


def test_images_count_by_their_content_whatever_their_names(folder, kinds):
    """Beside them lies what is no image and is not named; what looks like none of both is."""
    for number, kind in enumerate(("jfif", "jpe", "avif", "jp2", "ppm", "tga")):
        picture(folder / "shoe" / f"{number}.{kind}", 30 + number)
    picture(folder / "shoe" / "6.png", 36)
    (folder / "shoe" / "6.png").rename(folder / "shoe" / "no ending")
    for name in ("notes.txt", "Thumbs.db", ".DS_Store", "README", "data.json", ".cache/7.png"):
        (folder / "shoe" / name).parent.mkdir(exist_ok=True)
        (folder / "shoe" / name).write_bytes(b"no image")
    data = DataConfig(source="image-folder", path=str(folder), evaluation_samples=100, calibration_samples=4)
    dataset = load(data, 0)
    labels = [sample.label for sample in dataset.evaluation + dataset.calibration]
    assert {name: labels.count(name) for name in dataset.classes} == {"ankle boot": 10, "shoe": 7, "t-shirt": 10}
    kinds(
        "07: images with other endings, in an image folder",
        before="a class loses .jfif, .jpe, .avif, .jp2, .ppm, .tga and what has no ending: 6 of 8 dogs, without a word",
        now=f"{len(labels)} images, none lost",
    )
    (folder / "shoe" / "page").write_text("<html>")
    with pytest.raises(DataError, match=r"1 of 28 images cannot be read: \S*shoe/page is not a readable image"):
        load(data, 0)


def test_linked_classes_and_images_are_read_and_a_loop_ends(folder, tmp_path):
    subset = tmp_path / "subset"
    subset.mkdir()
    (subset / "boot").symlink_to(folder / "ankle_boot")
    (subset / "shirt").mkdir()
    (subset / "shirt" / "all").symlink_to("../../images/t-shirt")
    (subset / "shirt" / "loop").symlink_to(subset)
    dataset = load(DataConfig(source="image-folder", path=str(subset), **COUNTS), 0)
    assert dataset.classes == ["boot", "shirt"]
    assert len(dataset.evaluation) + len(dataset.calibration) == 20
    (subset / "gone").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"cannot be read whole: \S*subset/gone is a link to \S*gone, which does not"):
        load(DataConfig(source="image-folder", path=str(subset), **COUNTS), 0)


def test_an_empty_image_is_named(folder):
    (folder / "t-shirt" / "empty.png").touch()
    with pytest.raises(DataError, match=r"empty\.png is empty: replace or remove it"):
        load(DataConfig(source="image-folder", path=str(folder)), 0)


def test_all_unreadable_images_are_named_at_once_with_their_count(folder, kinds):
    for number in range(0, 6, 2):
        broken = folder / "t-shirt" / f"{number}.png"
        broken.write_bytes(broken.read_bytes()[:200])
    data = DataConfig(source="image-folder", path=str(folder), evaluation_samples=8, calibration_samples=2)
    with pytest.raises(DataError) as caught:
        load(data, 0)
    said = str(caught.value)
    assert said.startswith("3 of 20 images cannot be read: ")
    assert [f"t-shirt/{number}.png is not a readable image" in said for number in (0, 2, 4, 6)] == [True] * 3 + [False]
    assert "\n" not in said
    for number in range(12):
        (folder / "t-shirt" / f"page{number:02}.jpg").write_text("<html>")
    with pytest.raises(DataError, match=r"^15 of 32 images cannot be read: .*; and 5 more$"):
        load(data, 0)
    kinds(
        "19: truncated images in a data set",
        before="the first that is drawn is named, one a run",
        now="3 of 20 images cannot be read, all named; of 15 the first 10 and `and 5 more`",
    )


def test_unreadable_images_of_captions_are_named_at_once(folder):
    names = sorted(str(path.relative_to(folder.parent)) for path in folder.rglob("*.png"))
    for name in names[:2]:
        (folder.parent / name).write_bytes((folder.parent / name).read_bytes()[:200])
    with pytest.raises(DataError, match=r"^2 of 20 images cannot be read: "):
        load(captions(folder, [f"{name},caption,kind" for name in names]), 0)


def test_unreadable_images_of_a_hub_dataset_are_named_by_their_rows(folder):
    for number in (1, 3):
        broken = folder / "ankle_boot" / f"{number}.png"
        broken.write_bytes(broken.read_bytes()[:200])
    data = DataConfig(source="hub", dataset_id=str(folder), split="train", label_column="label", **COUNTS)
    with pytest.raises(DataError, match=r"^2 of 20 images cannot be read: .*ankle_boot/1\.png is not a readable image"):
        load(data, 0)


def test_a_hub_dataset_of_parquet_is_read_upright_and_its_bad_rows_are_named(tmp_path):
    """As most of the hub's are: the bytes are in the table."""
    exif, rows = Image.Exif(), []
    exif[0x0112] = 6
    for seed in range(20):
        content = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(content, "jpeg", exif=exif)
        rows.append({"bytes": content.getvalue(), "path": None})
    features = Features({"image": HubImage(), "caption": Value("string")})
    captions = [f"caption {row}" for row in range(20)]

    def written(name):
        table = HubDataset.from_dict({"image": rows, "caption": captions}, features=features)
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "train.parquet")
        return DataConfig(
            source="hub", dataset_id=str(tmp_path / name), split="train", caption_column="caption", **COUNTS
        )

    assert load(written("good"), 0).evaluation[0].open().size == (20, 30)
    rows[7]["bytes"] = rows[7]["bytes"][:300]
    with pytest.raises(DataError, match=r"^1 of 20 images cannot be read: the image in row 7 is not a readable image"):
        load(written("bad"), 0)


def test_an_unreadable_image_is_named(folder):
    broken = folder / "t-shirt" / "0.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"0\.png is not a readable image"):
        load(DataConfig(source="image-folder", path=str(folder)), 0)


def test_too_few_images_are_refused(tmp_path):
    for seed in range(5):
        picture(tmp_path / "cat" / f"{seed}.png", seed)
    with pytest.raises(DataError, match="yields 5 different images: at least 10 are needed"):
        load(DataConfig(source="image-folder", path=str(tmp_path)), 0)


def test_one_class_is_refused(tmp_path):
    """No answer could be wrong, and no gate fail."""
    for seed in range(10):
        picture(tmp_path / "pets" / "cat" / f"{seed}.png", seed)
    with pytest.raises(DataError, match="has one class, 'pets', and zero-shot answers need two: give the folder that"):
        load(DataConfig(source="image-folder", path=str(tmp_path)), 0)


@pytest.mark.parametrize("splits", [("train", "val"), ("Train",)])
def test_a_folder_of_splits_is_no_folder_of_classes(tmp_path, splits):
    for seed in range(20):
        picture(tmp_path / splits[seed % len(splits)] / ("cat", "dog")[seed // 2 % 2] / f"{seed}.png", seed)
    with pytest.raises(DataError, match=rf"in which are sub-folders alone: .* path=\S+/{splits[0]}$"):
        load(DataConfig(source="image-folder", path=str(tmp_path)), 0)
    assert load(DataConfig(source="image-folder", path=str(tmp_path / splits[0]), **COUNTS), 0).classes == [
        "cat",
        "dog",
    ]


def test_a_class_may_be_called_train(tmp_path):
    for seed in range(20):
        picture(tmp_path / ("train", "test")[seed % 2] / f"{seed}.png", seed)
    assert load(DataConfig(source="image-folder", path=str(tmp_path), **COUNTS), 0).classes == ["test", "train"]


@pytest.mark.parametrize("given", [{"source": "shapes"}, {"source": "captions", "path": "a.csv", "label_column": "b"}])
def test_classes_without_a_prompt_are_refused(given):
    with pytest.raises(ConfigError, match=r"data\.templates is empty: give at least one prompt for the classes"):
        check_prompts(DataConfig(**given))
    check_prompts(DataConfig(**given, templates=["a {}"]))
    check_prompts(DataConfig(source="captions", path="a.csv", caption_column="b"))


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
    lines = [f"nowhere{row:02}.png,a cat,cat" for row in range(12)]
    with pytest.raises(DataError, match=r"12 of 13 images do not exist: \S*nowhere00\.png; .*09\.png; and 2 more$"):
        load(captions(folder, [*lines, "images/t-shirt/0.png,a shirt,shirt"]), 0)


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
