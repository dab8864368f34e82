"""Reading images as data sets publish them: columns "image" and "label" come out.

    idx      train-images-idx3-ubyte(.gz) and train-labels-idx1-ubyte(.gz), t10k-...: MNIST's own
    npz      arrays x_train, y_train, x_test, y_test; or train_images, train_labels, ...; or images,
             labels: uint8 [N, height, width] or [N, height, width, 1 or 3]
    folder   train/<class>/*.png, test/<class>/*.png, or <class>/*.png alone

Tables (parquet, Arrow, saved data sets) are read as those of text are. An image is kept as
{"bytes", "path"}, as in the hub's own tables: the bytes of an image file or of an npy array, or
else where the file is. It is decoded when it is used.
"""

import gzip
import io
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from PIL import Image

from hosl_flower.errors import DataError, first_line
from hosl_flower.tasks.task import Task

Array = NDArray[Any]

_STRUCT = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
_IDX = re.compile(r"(train|t10k|test|validation)-(images|labels)[-.]idx\d-ubyte(\.gz)?", re.I)
_IDX_UNSIGNED_BYTE = 0x08
# of arrays in an npz: (images, labels) of each part
_ARRAYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "validation": (("x_val", "y_val"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}
_ALONE = (("images", "labels"), ("image", "label"), ("x", "y"), ("X", "y"), ("data", "target"))


def read_images(path: Path) -> dict[str, Dataset] | None:
    """The parts of a file or directory of images; None where it is neither idx, npz nor a folder of
    images. Raises DataError with the place."""
    if path.suffix.lower() == ".npz":
        return _npz(path)
    if not path.is_dir():
        return None
    found = {m: file for file in sorted(path.iterdir()) if (m := _IDX.fullmatch(file.name))}
    if found:
        return _idx(path, {(m[1].lower(), m[2].lower()): file for m, file in found.items()})
    files = sorted(path.iterdir())
    arrays = {file.stem.lower(): file for file in files if file.suffix.lower() == ".npz"}
    if arrays:
        return {name: _npz(file)["train"] for name, file in arrays.items()}
    if any(holds_images(child) for child in path.iterdir() if child.is_dir()):
        return _folder(path)
    return None


def holds_images(directory: Path) -> bool:
    """Whether there is an image in it or further down. A hidden directory is somebody's cache."""
    hidden = directory.name.startswith(".")
    return not hidden and any(map(is_image, directory.rglob("*")))


def image_columns(data: Dataset, task: Task, where: str) -> Dataset:
    """The images of a table, not decoded, as its only column, which has the task's name for it."""
    names = (task.image, *task.columns.get("image", ()), "image")
    for name in names:
        if f"{name}.bytes" in data.column_names:  # a struct, flattened, that says no more
            # all of it is there: nothing is decoded
            parts = [
                data[f"{name}.{key}"][:] for key in _STRUCT if f"{name}.{key}" in data.features
            ]
            rows = [dict(zip(_STRUCT, row, strict=False)) for row in zip(*parts, strict=True)]
            features = datasets.Features({task.image: _STRUCT})
            return Dataset.from_dict({task.image: [{"path": None, **r} for r in rows]}, features)
        if name in data.column_names:
            if isinstance(data.features[name], datasets.Image):
                data = data.cast_column(name, datasets.Image(decode=False))
            elif not isinstance(data.features[name], dict):
                raise DataError(f"{where}: column {name!r} holds {data.features[name]}, no images")
            data = data.select_columns([name])
            return data if name == task.image else data.rename_column(name, task.image)
    raise DataError(
        f"{where} has no column {task.image!r}; the data has {', '.join(data.column_names)} (set "
        "image-column)"
    )


def decode(image: Mapping[str, Any], channels: int) -> Array:
    """An image as kept in a table -> uint8 [height, width, channels]. Raises DataError."""
    content, path = image["bytes"], image["path"]
    where = path or "an image in the data"
    try:
        if content is not None and content[:6] == b"\x93NUMPY":
            pixels = np.load(io.BytesIO(content), allow_pickle=False)
            opened = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        else:
            opened = Image.open(path if content is None else io.BytesIO(content))
        found = np.asarray(opened.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise DataError(f"{where} cannot be read as an image: {first_line(error)}") from error
    return found[..., None] if channels == 1 else found


def image_files(paths: Sequence[Path], column: str) -> Dataset:
    """Return a table of image files, not decoded."""
    rows = [{"bytes": None, "path": str(path)} for path in paths]
    return Dataset.from_dict({column: rows}, datasets.Features({column: _STRUCT}))


def is_image(path: Path) -> bool:
    """Return whether a file is an image, by its name."""
    return path.suffix.lower() in Image.registered_extensions()


def _table(images: Array, labels: Array, where: str) -> Dataset:
    """uint8 [N, height, width(, channels)] and N labels as a table."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"{where}: expected images uint8 [N, height, width] or [N, height, width, channels], "
            f"got {images.dtype} {list(images.shape)}"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[3] not in (1, 3):
        raise DataError(f"{where}: expected 1 or 3 channels, the last axis, got {images.shape[3]}")
    labels = labels.reshape(-1) if labels.size == len(images) else labels
    if labels.shape != (len(images),):
        raise DataError(f"{where}: {len(images)} images, but labels {list(labels.shape)}")
    rows = [{"bytes": _bytes(image), "path": None} for image in images]
    features = datasets.Features({"image": _STRUCT})
    return Dataset.from_dict({"image": rows}, features).add_column("label", labels.tolist())


def _bytes(image: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, image, allow_pickle=False)
    return file.getvalue()


def _npz(path: Path) -> dict[str, Dataset]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = dict(_npz_parts(arrays, path))
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many kinds for a damaged file
        raise DataError(f"{path} cannot be read as npz: {first_line(error)}") from error
    if "train" not in found:
        raise DataError(
            f"{path} has arrays {', '.join(arrays.files) or 'none'}; expected x_train and y_train, "
            "train_images and train_labels, or images and labels"
        )
    return found


def _npz_parts(arrays: Any, path: Path) -> Iterator[tuple[str, Dataset]]:
    for part, names in {**_ARRAYS, "train": (*_ARRAYS["train"], *_ALONE)}.items():
        for images, labels in names:
            if images in arrays.files and labels in arrays.files:
                where = f"{path} ({images}, {labels})"
                yield part, _table(arrays[images], arrays[labels], where)
                break


def _idx(directory: Path, files: Mapping[tuple[str, str], Path]) -> dict[str, Dataset]:
    found = {}
    for part in ("train", "validation", "test", "t10k"):
        images, labels = files.get((part, "images")), files.get((part, "labels"))
        if images is None and labels is None:
            continue
        if images is None or labels is None:
            raise DataError(f"{directory} has {part}'s {'labels' if labels else 'images'} alone")
        name = "test" if part == "t10k" else part
        found[name] = _table(_read_idx(images, 3), _read_idx(labels, 1), str(images))
    return found


def _read_idx(path: Path, dimensions: int) -> Array:
    """An idx file (http://yann.lecun.com/exdb/mnist): two zero bytes, type, number of dimensions,
    each big-endian in four bytes, then the values."""
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    header = bytes([0, 0, _IDX_UNSIGNED_BYTE, dimensions])
    size = 4 + 4 * dimensions
    if content[:4] != header or len(content) < size:
        raise DataError(
            f"{path} is no idx file of unsigned bytes in {dimensions} dimension(s): expected it to "
            f"begin with {header.hex()}, got {content[:4].hex() or 'nothing'}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:size])
    values = np.frombuffer(content, np.uint8, offset=size)
    if values.size != np.prod(shape, dtype=np.int64):
        raise DataError(f"{path} says {list(shape)} values and has {values.size}: it is cut short")
    return values.reshape(shape)


def _folder(path: Path) -> dict[str, Dataset]:
    """Of images in a folder per class; datasets finds parts and classes."""
    try:
        loaded = datasets.load_dataset("imagefolder", data_dir=str(path), drop_labels=False)
    except Exception as error:  # datasets raises many kinds for what it cannot use
        raise DataError(f"{path} is no folder of images by class: {first_line(error)}") from error
    return {str(name): data for name, data in loaded.items()}
