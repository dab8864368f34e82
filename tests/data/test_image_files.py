"""Image data as it is published: what is read, and what is said of files that are damaged."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from image_data import BRIGHT_AND_DARK, idx_bytes, images, write_folder, write_idx, write_npz

from hosl_flower.data.readers.images import decode
from hosl_flower.data.sources import load_source
from hosl_flower.errors import DataError
from hosl_flower.tasks.known_images import IMAGE_TASKS, image_task

TASK = image_task("mine", BRIGHT_AND_DARK, "image")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def load(path, task=TASK, **more):
    return load_source(str(path), task, 0, **more)


def pixels_and_labels(data, channels=1):
    found = [decode(row["image"], channels) for row in data]
    return np.stack(found), [row["label"] for row in data]


def assert_is(data, count, salt=0):
    expected, labels = images(count, salt)
    found, found_labels = pixels_and_labels(data)
    assert np.array_equal(found[..., 0], expected)
    assert found_labels == labels.tolist()


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_as_mnist_is_published(tmp_path, compressed):
    write_idx(tmp_path, compressed=compressed)
    write_idx(tmp_path, "t10k", 8, compressed, salt=1)
    train, held_out = load(tmp_path)
    assert_is(train, 12)
    assert_is(held_out, 8, salt=1)


def test_npz_as_keras_and_medmnist_publish_it(tmp_path):
    train, held_out = load(write_npz(tmp_path / "mnist.npz"))
    assert_is(train, 40)
    assert_is(held_out, 24, salt=1)
    x, y = images(10, channels=3)
    np.savez(tmp_path / "med.npz", train_images=x, train_labels=y[:, None], val_images=x[:4],
             val_labels=y[:4, None])  # fmt: skip
    train, held_out = load(tmp_path / "med.npz")
    assert np.array_equal(pixels_and_labels(train, 3)[0], x)
    assert len(held_out) == 4


def test_without_a_test_part_a_fifth_is_held_out(tmp_path):
    np.savez(tmp_path / "train.npz", images=images(20)[0], labels=images(20)[1])
    for path in (tmp_path, tmp_path / "train.npz"):
        train, held_out = load(path)
        assert (len(train), len(held_out)) == (16, 4)
    assert len(load(tmp_path, held_out_examples=7)[1]) == 7


def test_folders_of_images_by_class(tmp_path):
    write_folder(tmp_path / "train", 8)
    write_folder(tmp_path / "test", 4, salt=1)
    train, held_out = load(tmp_path)
    found, labels = pixels_and_labels(train, 3)
    assert sorted(labels) == [0] * 4 + [1] * 4
    assert [int(image.mean() > 120) for image in found] == labels  # not the folders' order
    assert len(held_out) == 4
    one = load(tmp_path / "train")
    assert len(one[0]) + len(one[1]) == 8


@pytest.mark.parametrize("plain", [False, True])
def test_parquet_as_the_hub_has_it(tmp_path, plain):
    write_folder(tmp_path / "files", 8)
    made = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "files"))["train"]
    made = made.rename_column("image", "img")
    (tmp_path / "data").mkdir()
    made.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    if plain:  # the same table without the hub's own remarks on what is an image
        path = tmp_path / "data" / "train-00000-of-00001.parquet"
        table = pa.parquet.read_table(path).replace_schema_metadata(None)
        names = ["bright", "dark"]
        named = pa.array([names[i] for i in table["label"].to_pylist()])
        pa.parquet.write_table(table.set_column(1, "label", named), path)
    train, held_out = load(tmp_path / "data")
    assert (len(train), len(held_out)) == (6, 2)
    found, labels = pixels_and_labels(train, 3)
    assert [int(image.mean() > 120) for image in found] == labels


def test_saved_parts_and_tables_with_a_folder_beside_them(tmp_path):
    write_folder(tmp_path / "files", 8)
    made = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "files"))["train"]
    parts = datasets.DatasetDict({"train": made, "test": made.select(range(6))})
    parts.save_to_disk(tmp_path / "saved")
    for hidden in (".cache", "notes"):
        (tmp_path / "tables" / hidden).mkdir(parents=True)
    (tmp_path / "tables" / ".cache" / "thumbnail.png").write_bytes(b"no image")
    (tmp_path / "tables" / "notes" / "read.me").write_text("no image either")
    for name, data in parts.items():
        data.to_parquet(tmp_path / "tables" / f"{name}.parquet")
    for kind in ("saved", "tables"):
        train, held_out = load(tmp_path / kind)
        assert (len(train), len(held_out)) == (8, 6), kind
        found, labels = pixels_and_labels(train, 3)
        assert [int(image.mean() > 120) for image in found] == labels


def test_colours_become_grey_and_grey_three_channels():
    (grey,), (colour,) = images(1)[0], images(1, channels=3)[0]
    as_kept = load_source("bundled:digits", IMAGE_TASKS["digits"], 0)[0][0]["image"]
    assert decode(as_kept, 1).shape == (8, 8, 1)
    three = decode(as_kept, 3)
    assert np.array_equal(three[..., 0], three[..., 2])
    assert (*grey.shape, 3) == colour.shape


def test_the_bundled_digits():
    train, held_out = load_source("bundled:digits", IMAGE_TASKS["digits"], 0)
    assert (len(train), len(held_out)) == (1438, 359)
    found, labels = pixels_and_labels(held_out)
    assert found.max() == 255
    zeros = found[np.array(labels) == 0].mean(0)[..., 0]
    assert zeros[3:5, 3:5].mean() < 40 < zeros[3:5, 2].mean()  # a hole, and ink beside it


def test_natural_ids_stay(tmp_path):
    write_folder(tmp_path / "files", 4)
    made = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "files"))["train"]
    made.add_column("writer", ["x", "y", "x", "y"]).save_to_disk(tmp_path / "saved")
    train, _ = load(tmp_path / "saved", partition_column="writer", held_out_examples=1)
    assert set(train["writer"]) <= {"x", "y"}
    assert train.column_names == ["image", "writer", "label"]


def damaged(tmp_path, name, content):
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"<html>", r"begin with 00000803, got 3c68746d"),
        ("train-images-idx3-ubyte", b"", "begin with 00000803, got nothing"),
        ("train-images-idx3-ubyte", idx_bytes(images(12)[0])[:-5], r"\[12, 6, 6\] values and has"),
        ("train-labels-idx1-ubyte", idx_bytes(images(9)[1]), r"12 images, but labels \[9\]"),
        ("train-labels-idx1-ubyte", idx_bytes(images(12)[1] + 7), "label 7 is not one of 0..1 or"),
        ("t10k-images-idx3-ubyte", idx_bytes(images(3)[0]), "has t10k's images alone"),
        ("t10k-images-idx3-ubyte.gz", b"no gzip at all", "cannot be read|images alone"),
    ],
)
def test_damaged_idx_files(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        load(damaged(tmp_path, name, content))


def test_a_cut_gz_file(tmp_path):
    write_idx(tmp_path, compressed=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"ubyte.gz cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "has arrays a; expected x_train and y_train"),
        ({"images": np.zeros((2, 3, 3)), "labels": np.zeros(2)}, r"got float64 \[2, 3, 3\]"),
        (
            {"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": np.zeros(2)},
            "1 or 3 channels, the last axis, got 4",
        ),
        (
            {"images": np.zeros((2, 3, 3), np.uint8), "labels": np.array([0, {}])},
            "cannot be read as npz.*pickle",
        ),
    ],
)
def test_npz_files_that_are_none(tmp_path, arrays, message):
    np.savez(tmp_path / "train.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "train.npz")


def test_other_things_that_are_no_images(tmp_path):
    (tmp_path / "cut.npz").write_bytes(b"PK\3\4")
    with pytest.raises(DataError, match="cannot be read as npz"):
        load(tmp_path / "cut.npz")
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no train file; .* or a folder of images for each class"):
        load(tmp_path / "empty")
    table = pa.table({"image": ["a", "b"], "label": [0, 1]})
    pa.parquet.write_table(table, tmp_path / "words.parquet")
    with pytest.raises(DataError, match=r"column 'image' holds .*string.*, no images"):
        load(tmp_path / "words.parquet")
    pa.parquet.write_table(table.rename_columns(["photo", "label"]), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="no column 'image'; the data has photo, label"):
        load(tmp_path / "other.parquet")
    (tmp_path / "tables" / ".cache").mkdir(parents=True)
    with pytest.raises(DataError, match="tables has no train file"):
        load(tmp_path / "tables")
    (tmp_path / "arrays").mkdir()
    write_npz(tmp_path / "arrays" / "mnist.npz")
    with pytest.raises(DataError, match="arrays has no 'train' part; it has mnist"):
        load(tmp_path / "arrays")
    write_folder(tmp_path / "classes" / "train")
    (tmp_path / "classes" / "train" / "third").mkdir()
    (tmp_path / "classes" / "train" / "third" / "x.png").write_bytes(b"no image")
    with pytest.raises(
        DataError, match="labels are bright, dark, third, and the task's dark, bright"
    ):
        load(tmp_path / "classes")


def test_a_damaged_image_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "dark" / "0.png").write_bytes(b"no image")
    train, held_out = load(tmp_path)
    with pytest.raises(DataError, match=r"dark/0.png cannot be read as an image"):
        [decode(row["image"], 3) for data in (train, held_out) for row in data]
