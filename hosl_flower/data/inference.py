"""Examples for a trained model: texts and images to predict, or labeled data to evaluate on.

Nothing here imports torch: a wrong path or a missing column is reported at once.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hosl_flower.data.columns import find_column
from hosl_flower.data.examples import normalised
from hosl_flower.data.readers.files import is_table
from hosl_flower.data.readers.images import holds_images, image_files, is_image
from hosl_flower.data.sources import held_out_table
from hosl_flower.data.tables import Records, Table
from hosl_flower.errors import ConfigError, DataError
from hosl_flower.tasks.task import Task

_RENAME = "; the run is finished, so rename or add the column in the file"


def given_inputs(inputs: Sequence[str], task: Task) -> Dataset:
    """Return examples from the command line: texts, or paths of image files.

    Raises:
        ConfigError: for the name of a file of texts, or texts where the prompt needs several
            columns.
        DataError: for a path that is not an image file.
    """
    if task.image:
        paths = [Path(given).expanduser() for given in inputs]
        for path in paths:
            if not path.is_file():
                raise DataError(
                    f"{str(path)!r} is not a file: the run classifies images, so pass paths of "
                    "image files, or a folder or a table of images with --file"
                )
        return image_files(paths, task.image)
    if file := next(filter(os.path.isfile, inputs), None):
        raise ConfigError(f"{file!r} is a file: pass it with --file")
    if len(task.fields) > 1:
        raise ConfigError(
            f"the prompt of this run has the columns {', '.join(task.fields)}: pass a file that "
            "has them, with --file data.csv"
        )
    return Dataset.from_dict({task.fields[0]: list(inputs)})


def file_inputs(source: str, task: Task) -> Dataset:
    """Return the examples of a file or directory, whose labels are ignored.

    If the data have a held-out part, that part is returned.

    Args:
        source: a file or directory as `data-path` takes it; of images also a single image, a
            folder of images without classes, or a table with a column of paths, which are
            relative to the table.
        task: the task of the run.

    Raises:
        DataError: for data that cannot be read or lack a column.
    """
    path = Path(source).expanduser()
    if task.image and path.is_file() and is_image(path):
        return image_files([path], task.image)
    if task.image and path.is_dir() and not _has_parts(path):
        return image_files(sorted(filter(is_image, path.iterdir())), task.image)
    data = held_out_table(source, task)
    if task.image and isinstance(data, Records):
        return image_files(_listed_files(data, path, task), task.image)
    return normalised(data, task, labelled=False, advice=_RENAME)


def labeled_examples(source: str, task: Task) -> tuple[str, Dataset]:
    """Return the name and the examples of labeled data, or of their held-out part.

    Args:
        source: a file, directory or hub data set as `data-path` takes it.
        task: the task of the run.

    Raises:
        DataError: for data that cannot be read, or lack a column or a label.
    """
    data = held_out_table(source, task)
    return data.where, normalised(data, task, advice=_RENAME)


def _has_parts(path: Path) -> bool:
    """Whether a directory is a data set and not just a folder of images."""
    entries = list(path.iterdir())
    plain = any(map(is_image, entries))
    return not plain or any(
        holds_images(entry) if entry.is_dir() else is_table(entry) for entry in entries
    )


def _listed_files(data: Table, path: Path, task: Task) -> list[Path]:
    """The image files that a table names."""
    found = find_column(data, task.image, task)
    if found is None:
        raise DataError(
            f"{data.where} has no column {task.image!r} with paths of images; the data has "
            f"{data.listed}{_RENAME}"
        )
    files: list[Any] = [path.parent / str(value) for value in found[1]]
    for row, file in enumerate(files):
        if not file.is_file():
            raise DataError(f"{data.place(row)}: {str(file)!r} is not a file")
    return files
