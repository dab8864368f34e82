"""Images of two classes, bright and dark, as files of every kind."""

import gzip
import struct

import numpy as np
from PIL import Image

BRIGHT_AND_DARK = ("dark", "bright")


def images(count, salt=0, channels=1):
    """uint8 [count, 6, 6(, 3)] and labels [count]: the odd ones are bright."""
    labels = np.arange(count, dtype=np.uint8) % 2
    shape = (count, 6, 6) if channels == 1 else (count, 6, 6, 3)
    noise = np.random.default_rng(salt).integers(0, 60, shape)
    pixels = noise + 180 * labels.reshape(-1, *[1] * (len(shape) - 1))
    return pixels.astype(np.uint8), labels


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write_idx(directory, part="train", count=12, compressed=False, salt=0):
    directory.mkdir(exist_ok=True)
    for kind, array in zip(("images", "labels"), images(count, salt), strict=True):
        name = f"{part}-{kind}-idx{array.ndim}-ubyte"
        if compressed:
            (directory / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (directory / name).write_bytes(idx_bytes(array))


def write_folder(directory, count=6, salt=0):
    """directory/dark/0.png, directory/bright/1.png, ..."""
    for number, (pixels, label) in enumerate(zip(*images(count, salt, 3), strict=True)):
        of_class = directory / BRIGHT_AND_DARK[label]
        of_class.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(of_class / f"{number}.png")


def write_npz(file, train=40, held_out=24):
    x, y = images(train)
    x_test, y_test = images(held_out, 1)
    np.savez(file, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return file
