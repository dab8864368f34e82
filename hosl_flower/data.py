"""Examples: where they come from, who holds which, and in which order they are visited.

A source has a training part, partitioned among the clients, and a held-out part. A node with
a `data-path` of its own trains on all of that file instead of a partition.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow.parquet
from datasets import Dataset
from flwr_datasets.partitioner import IidPartitioner

from hosl_flower import hub
from hosl_flower.errors import DataError, first_line
from hosl_flower.perturb import derive_seed, permutation
from hosl_flower.tasks import BUNDLED, Batch, Encoder, Task, parse_label

HELD_OUT_FRACTION = 0.2  # of a source that comes without a held-out part
_HELD_OUT_NAMES = ("validation", "val", "dev", "test")
_SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".arrow", ".txt")


def load_source(source: str, task: Task, seed: int) -> tuple[Dataset, Dataset]:
    """(training, held-out) examples: the columns of the prompt and an integer "label".

    source: "hub:<repository>/<configuration>", "bundled:<folder>", or a local path. Without a
    held-out part of its own, a fifth of the source, drawn with `seed`, is held out.
    """
    if source.startswith("hub:"):
        train, held_out = _from_hub(source.removeprefix("hub:"))
    else:
        bundled = source.startswith("bundled:")
        path = BUNDLED / source.removeprefix("bundled:") if bundled else Path(source).expanduser()
        train, held_out = _from_path(path)
    train = _normalise(train, task, f"{source} (train)")
    if held_out is not None:
        return train, _normalise(held_out, task, f"{source} (held-out)")
    order = permutation(len(train), derive_seed(seed, "held-out"))
    cut = max(1, round(len(train) * HELD_OUT_FRACTION))
    if cut >= len(train):
        raise DataError(f"{source} has {len(train)} example(s): too few to hold some out")
    return train.select(order[cut:]), train.select(order[:cut])


def _from_hub(name: str) -> tuple[Dataset, Dataset | None]:
    repository, _, configuration = name.rpartition("/")
    if not repository or not configuration:
        raise DataError(f"hub data set {name!r}: expected hub:<repository>/<configuration>")
    if not hub.is_reachable():
        datasets.config.HF_HUB_OFFLINE = True  # go straight to the cache, without retries
    try:
        loaded = datasets.load_dataset(repository, configuration)
    except Exception as error:  # datasets raises many kinds for one cause: it cannot be had
        raise DataError(
            f"data set {name!r} cannot be had from the hub or its cache "
            f"({first_line(error)}); set data-path to a local copy"
        ) from error
    return _parts(loaded, name)


def _parts(loaded: Any, name: str) -> tuple[Dataset, Dataset | None]:
    """Training and held-out part of a DatasetDict."""
    if "train" not in loaded:
        raise DataError(f"{name} has no 'train' part; it has {', '.join(loaded)}")
    held_out = next((loaded[part] for part in _HELD_OUT_NAMES if part in loaded), None)
    return loaded["train"], held_out


def _from_path(path: Path) -> tuple[Dataset, Dataset | None]:
    if path.is_file():
        return _read_file(path), None
    if not path.is_dir():
        raise DataError(f"data path {str(path)!r} does not exist")
    if (path / "dataset_dict.json").is_file():
        return _parts(_saved_dataset(path), str(path))
    if (path / "dataset_info.json").is_file():
        return _saved_dataset(path), None
    files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in _SUFFIXES}
    if "train" not in files:
        raise DataError(
            f"{path} has no train file; expected train and, optionally, validation, val, dev or "
            f"test, each one of {', '.join(_SUFFIXES)}"
        )
    held_out = next((files[name] for name in _HELD_OUT_NAMES if name in files), None)
    return _read_file(files["train"]), _read_file(held_out) if held_out else None


def _saved_dataset(path: Path) -> Any:
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds for a damaged directory
        raise DataError(f"{path} is a damaged saved data set: {first_line(error)}") from error


def _read_file(path: Path) -> Dataset:
    readers: dict[str, Callable[[Path], Dataset]] = {
        ".csv": lambda p: _table(p, ",", csv.QUOTE_MINIMAL),
        # GLUE and the SMS collection do not quote: a lone " is part of the text
        ".tsv": lambda p: _table(p, "\t", csv.QUOTE_NONE),
        ".txt": lambda p: _table(p, "\t", csv.QUOTE_NONE),
        ".jsonl": _json_lines,
        ".json": _json_lines,
        ".parquet": lambda p: Dataset(pyarrow.parquet.read_table(p)),
        ".arrow": lambda p: Dataset.from_file(str(p)),
    }
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown kind of file; expected one of {', '.join(readers)}")
    try:
        return readers[path.suffix](path)
    except DataError:
        raise
    except Exception as error:  # csv and pyarrow raise many kinds for a damaged file
        reason = first_line(error)
        raise DataError(f"{path} cannot be read as {path.suffix[1:]}: {reason}") from error


def _table(path: Path, delimiter: str, quoting: Literal[0, 3]) -> Dataset:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        header = next(rows, None)
        if not header:
            raise ValueError("it is empty, expected a header line with the column names")
        columns: list[list[str]] = [[] for _ in header]
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"line {rows.line_num} has {len(row)} fields, the header {len(header)}"
                )
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    return Dataset.from_dict(dict(zip(header, columns, strict=True)))


def _json_lines(path: Path) -> Dataset:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object, got {line[:40]!r}")
        rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)  # rows may lack some
    return Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns})


def _normalise(data: Dataset, task: Task, where: str) -> Dataset:
    """Keep the prompt's columns, parse the label; DataError names what is missing."""
    missing = [name for name in (*task.fields, task.label_column) if name not in data.column_names]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(map(repr, missing))}; task {task.name} needs "
            f"{', '.join((*task.fields, task.label_column))}, the data has "
            f"{', '.join(data.column_names)} (set prompt and label-column)"
        )
    if len(data) == 0:
        raise DataError(f"{where} has no examples")
    labels = [
        parse_label(value, task, f"{where}, row {row}")
        for row, value in enumerate(data[task.label_column], start=1)
    ]
    columns = {name: [str(text) for text in data[name]] for name in task.fields}
    for name in task.fields:
        empty = next((row for row, text in enumerate(data[name], start=1) if text is None), None)
        if empty is not None:
            raise DataError(f"{where}, row {empty}: {name} is missing")
    return Dataset.from_dict({**columns, "label": labels})


def take(data: Dataset, limit: int, seed: int) -> Dataset:
    """At most `limit` examples (0 is all), drawn with `seed`."""
    if not 0 < limit < len(data):
        return data
    return data.select(permutation(len(data), seed)[:limit])


def partition(train: Dataset, number: int, of: int, seed: int) -> Dataset:
    """The IID share of client `number` among `of`."""
    if of > len(train):
        raise DataError(
            f"{of} clients but only {len(train)} training examples: lower num-clients or raise "
            "train-examples"
        )
    partitioner = IidPartitioner(num_partitions=of)
    partitioner.dataset = train.select(permutation(len(train), derive_seed(seed, "partition")))
    return partitioner.load_partition(number)


class ClientData:
    """What one client holds: its partition of the training data and the held-out part."""

    def __init__(self, train: Dataset, held_out: Dataset, encoder: Encoder, order_seed: int):
        if len(train) == 0:
            raise DataError("this client's partition is empty; lower num-clients")
        self.train = train
        # Like lengths together: fewer padding tokens to forward, the same metrics.
        lengths = [sum(len(row[name]) for name in encoder.task.fields) for row in held_out]
        self.held_out = held_out.select(sorted(range(len(lengths)), key=lengths.__getitem__))
        self.encoder = encoder
        self.order_seed = order_seed
        self._order: tuple[int, list[int]] = (-1, [])

    def train_batch(self, number: int, size: int) -> Batch:
        """Mini-batch `number` (0, 1, ...) of an endless sequence of shuffled epochs."""
        size = min(size, len(self.train))
        rows = [self.train[self._row(i)] for i in range(number * size, (number + 1) * size)]
        return self.encoder.collate(rows)

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.train))
        if self._order[0] != epoch:
            seed = derive_seed(self.order_seed, "epoch", epoch)
            self._order = (epoch, permutation(len(self.train), seed))
        return self._order[1][offset]

    def held_out_batch(self, number: int, size: int) -> Batch:
        """Held-out examples number * size onwards; DataError past the end."""
        rows = range(number * size, min((number + 1) * size, len(self.held_out)))
        if not rows:
            raise DataError(f"held-out batch {number} is past {len(self.held_out)} examples")
        return self.encoder.collate([self.held_out[row] for row in rows])

    def label_counts(self) -> list[int]:
        """Training examples per label."""
        counts = Counter(self.train["label"])
        return [counts[label] for label in range(len(self.encoder.task.verbalizers))]


def load_client_data(
    source: str,
    own: str,
    task: Task,
    encoder: Encoder,
    number: int,
    of: int,
    train_examples: int,
    eval_examples: int,
    seed: int,
) -> ClientData:
    """A client's data: its share of `source`, or everything in `own`, its node's data-path."""
    train, held_out = load_source(own or source, task, seed)
    train = take(train, train_examples, derive_seed(seed, "train-examples"))
    held_out = take(held_out, eval_examples, derive_seed(seed, "eval-examples"))
    if not own:
        train = partition(train, number, of, seed)
    return ClientData(train, held_out, encoder, derive_seed(seed, "order", number))
