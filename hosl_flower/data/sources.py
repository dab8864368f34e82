"""Examples and where they come from: the hub, the package, or a local file.

A source has a training part, which partition.py spreads over the clients, and a held-out part.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset

from hosl_flower.data.columns import find_column
from hosl_flower.data.examples import is_without_labels, normalised
from hosl_flower.data.overlap import Split
from hosl_flower.data.readers.files import SUFFIXES, is_table, read_file
from hosl_flower.data.readers.images import holds_images, read_images
from hosl_flower.data.tables import Arrow, Chosen, Joined, Table
from hosl_flower.errors import DataError, first_line
from hosl_flower.models.checkpoints import hub
from hosl_flower.system.bundled import BUNDLED
from hosl_flower.tasks.task import Task
from hosl_flower.tensors.seeds import derive_seed, permutation

log = logging.getLogger("hosl_flower")

HELD_OUT_FRACTION = 0.2  # of a source that comes without a held-out part
_HELD_OUT_NAMES = ("validation", "val", "dev", "test")
_OTHER_NAMES = {
    "train_5500": "train", "trec_10": "test",  # TREC's own
    "train-v1.1": "train", "train-v2.0": "train", "dev-v1.1": "dev", "dev-v2.0": "dev",  # SQuAD's
}  # fmt: skip
_SHARD = re.compile(r"-\d+-of-\d+$")  # the hub's train-00000-of-00001.parquet


_OR_IMAGES = "; or idx files, npz arrays, or a folder of images for each class"
_ARE_IMAGES = (
    "; it holds images: set image-column = image, and the names of its folders as verbalizers"
)


class Part(NamedTuple):
    """Some examples as they were read."""

    name: str
    data: Table


def load_source(
    source: str,
    task: Task,
    seed: int,
    partition_column: str = "",
    held_out_examples: int = 0,
    on_split: Callable[[Split], None] = lambda split: None,
    columns: Collection[str] = (),
) -> tuple[Dataset, Dataset]:
    """(training, held-out) examples: the columns of the prompt, an integer "label", or a list of
    texts "answers" where they are generated, and, for the training part, the partition column as
    text, if one is given.

    source: "hub:<repository>/<configuration>", "bundled:<folder>", or a local path. The held-out
    part is the source's own; or, with held_out_examples, so many training examples drawn with
    `seed`; or, without either, a fifth of them. A test part without labels is none. A partition
    column that is the label column too is the integer "label". on_split: told which rows are held
    out, where they are drawn. columns: the only ones that are used, by the names they have in the
    data; none given, all. Raises DataError.
    """
    if columns:  # a task may not name the columns of a file that has no header line
        task = replace(task, header=())
    parts = [_limited(part, columns) for part in _from_source(source, task)]
    train = normalised(parts[0].data, task, partition_column)
    for part in parts[1:]:
        if not held_out_examples and not _is_unlabelled_test(part, task):
            return train, normalised(part.data, task)
    order = permutation(len(train), derive_seed(seed, "held-out"))
    cut = held_out_examples or max(1, round(len(train) * HELD_OUT_FRACTION))
    if cut >= len(train):
        wanted = f"{held_out_examples} (held-out-examples)" if held_out_examples else "some"
        raise DataError(f"{source} has {len(train)} example(s): too few to hold {wanted} out")
    split = Split(train, order[cut:], order[:cut])
    on_split(split)
    return train.select(split.train_rows), train.select(split.held_out_rows)


def labelled_parts(source: str, task: Task) -> list[Table]:
    """The training and held-out examples of a source as they are there. Raises DataError."""
    train, *others = _from_source(source, task)
    return [train.data, *(part.data for part in others if not _is_unlabelled_test(part, task))]


def held_out_table(source: str, task: Task) -> Table:
    """Return a whole source, or its held-out part where it has one. Raises DataError."""
    return _from_source(source, task)[-1].data


def _limited(part: Part, columns: Collection[str]) -> Part:
    """A part with no columns but these; "answers" allows "answers.text" too."""
    if not columns:
        return part
    names = part.data.names
    kept = [name for name in names if name in columns or name.partition(".")[0] in columns]
    if not kept:
        raise DataError(
            f"{part.data.where} has none of the columns that this node lets a run use "
            f"({', '.join(columns)}, data-columns in --node-config); it has {part.data.listed}",
            public="the data has none of the columns of data-columns in this node's --node-config",
        )
    return part._replace(data=Chosen(part.data, kept))


def _from_source(source: str, task: Task) -> list[Part]:
    if source.startswith("hub:"):
        return _from_hub(source.removeprefix("hub:"))
    bundled = source.startswith("bundled:")
    path = BUNDLED / source.removeprefix("bundled:") if bundled else Path(source).expanduser()
    return _from_path(path, task)


def _from_hub(name: str) -> list[Part]:
    repository, _, configuration = name.rpartition("/")
    if not repository or not configuration:
        raise DataError(f"hub data set {name!r}: expected hub:<repository>/<configuration>")
    if not hub.is_reachable():
        datasets.config.HF_HUB_OFFLINE = True  # go straight to the cache, without retries
    try:
        try:
            loaded = _load(repository, configuration)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # TREC is still a script; the hub has its tables on a branch
            loaded = _load(repository, configuration, revision="refs/convert/parquet")
    except DataError:
        raise
    except Exception as error:  # datasets raises many kinds for one cause: it cannot be had
        raise DataError(
            f"data set {name!r} cannot be had from the hub or its cache "
            f"({first_line(error)}); set data-path to a local copy"
        ) from error
    return _parts(loaded, name)


def _load(repository: str, configuration: str, **revision: str) -> Any:
    """A data set of the hub. DataError where its own description refers to files of this machine,
    which the datasets library would read."""
    builder = datasets.load_dataset_builder(repository, configuration, **revision)
    parts = builder.config.data_files or {}
    for file in (str(file) for part in parts.values() for file in part):
        if not file.rpartition("::")[2].startswith(("hf://", "https://")):
            raise DataError(
                f"the data set {repository!r} of the hub refers to {file!r}, which is no file of "
                "the hub: do not use it"
            )
    return datasets.load_dataset(repository, configuration, **revision)


def _parts(loaded: Any, name: str) -> list[Part]:
    """Training and, if there is one, held-out part of a DatasetDict."""
    return [Part(n, Arrow.of(loaded[n], f"{name} ({n})")) for n in _used(loaded, name)]


def _used(names: Collection[str], where: str) -> list[str]:
    """The training part and the first held-out part there is."""
    if "train" not in names:
        raise DataError(f"{where} has no 'train' part; it has {', '.join(names)}")
    return ["train", *[name for name in _HELD_OUT_NAMES if name in names][:1]]


def _from_path(path: Path, task: Task) -> list[Part]:
    if path.is_file():
        images = read_images(path) if task.image else None
        if images is None:
            return [Part("train", read_file(path, task))]
        return _image_parts(images, path)
    if not path.is_dir():
        raise DataError(f"data path {str(path)!r} does not exist")
    if (path / "dataset_dict.json").is_file():
        return _parts(_saved_dataset(path), str(path))
    if (path / "dataset_info.json").is_file():
        return [Part("train", Arrow.of(_saved_dataset(path), str(path)))]
    files = _part_files(path)
    if "train" in files:
        return [_read_part(name, files[name], task) for name in _used(files, str(path))]
    # last: a table may have a folder beside it, and images are no part files
    if task.image and (images := read_images(path)):
        return _image_parts(images, path)
    raise DataError(
        f"{path} has no train file; expected train and, optionally, validation, val, dev or "
        f"test, each one of {', '.join(SUFFIXES)}{_OR_IMAGES if task.image else ''}"
        f"{'' if task.image or not holds_images(path) else _ARE_IMAGES}"
    )


def _image_parts(images: Mapping[str, Dataset], path: Path) -> list[Part]:
    used = _used(images, str(path))
    return [Part(name, Arrow.of(images[name], f"{path} ({name})")) for name in used]


def _part_files(path: Path) -> dict[str, list[Path]]:
    """The files of each part in a directory: one, or all shards."""
    files: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        if is_table(file):
            name = _SHARD.sub("", file.stem).lower()
            files.setdefault(_OTHER_NAMES.get(name, name), []).append(file)
    return files


def _read_part(name: str, files: Sequence[Path], task: Task) -> Part:
    if len(files) > 1 and not all(_SHARD.search(file.stem) for file in files):
        raise DataError(
            f"{files[0].parent} has {' and '.join(file.name for file in files)}; keep one of them"
        )
    data = [read_file(file, task) for file in files]
    return Part(name, data[0] if len(data) == 1 else Joined(f"{files[0].parent} ({name})", data))


def _saved_dataset(path: Path) -> Any:
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds for a damaged directory
        raise DataError(f"{path} is a damaged saved data set: {first_line(error)}") from error


def _is_unlabelled_test(part: Part, task: Task) -> bool:
    """Whether it is a test part as benchmarks publish it: its labels kept back."""
    if part.name != "test":
        return False
    label = find_column(part.data, task.answer_column, task)
    if label is not None and not is_without_labels(label[1]):
        return False
    log.info("%s has no labels: examples are held out of the training part", part.data.where)
    return True


def take(data: Dataset, limit: int, seed: int) -> Dataset:
    """At most `limit` examples (0 is all), drawn with `seed`."""
    rows = taken(range(len(data)), limit, seed)
    return data if len(rows) == len(data) else data.select(rows)


def taken(rows: Sequence[int], limit: int, seed: int) -> Sequence[int]:
    """The rows that `take` keeps of so many."""
    if not 0 < limit < len(rows):
        return rows
    return [rows[place] for place in permutation(len(rows), seed)[:limit]]
