"""The head of a classifier for the classes of a task: a checkpoint's, its rows in the order of the
data's labels, or a fresh one.
"""

import logging
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from hosl_flower.errors import ConfigError
from hosl_flower.models.base_model import Base
from hosl_flower.models.checkpoints.source import RandomWeights, WeightSource
from hosl_flower.models.families.base import Family, InitStd
from hosl_flower.models.families.registry import family_of
from hosl_flower.tasks.task import Task

log = logging.getLogger("hosl_flower")

# heads of as many rows that mean something else, by the end of the class name
_OTHER_HEADS = ("ForTokenClassification", "ForMultipleChoice", "ForQuestionAnswering")
_NUMBER = re.compile(r"(?:label )?(\d+)")  # as transformers calls a class that has no name


class _FreshHead:
    """A checkpoint but for its head, which is made, as is what else of its heads is missing."""

    def __init__(self, source: WeightSource, family: Family, seed: int, std: InitStd):
        self.source, self.origin = source, source.origin
        self._names, self._heads = _names(family), family.heads
        self._made = RandomWeights(seed, std)

    def __contains__(self, name: str) -> bool:
        return name.startswith(self._heads) or name in self.source

    def _of(self, name: str) -> WeightSource:
        missing = name.startswith(self._heads) and name not in self.source
        return self._made if missing or name.startswith(self._names) else self.source

    def fill(self, name: str, out: Tensor) -> None:
        self._of(name).fill(name, out)

    def rows(self, name: str, shape: tuple[int, int], rows: Sequence[int]) -> Tensor:
        return self._of(name).rows(name, shape, rows)


class _OrderedHead:
    """A checkpoint whose head's rows come in another order. order: of each row its place there."""

    def __init__(self, source: WeightSource, family: Family, order: Sequence[int]):
        self.source, self.origin = source, source.origin
        self._names, self._order = _names(family), list(order)

    def __contains__(self, name: str) -> bool:
        return name in self.source

    def fill(self, name: str, out: Tensor) -> None:
        self.source.fill(name, out)
        if name.startswith(self._names):
            out.copy_(out[self._order])

    def rows(self, name: str, shape: tuple[int, int], rows: Sequence[int]) -> Tensor:
        if name.startswith(self._names):
            rows = [self._order[row] for row in rows]
        return self.source.rows(name, shape, rows)


def _names(family: Family) -> str:
    """What names of the head's own tensors start with: its matrix and bias."""
    return f"{family.head.rpartition('.')[0]}."


def class_names(task: Task) -> tuple[str, ...]:
    """What the classes are called, by label: as in the data, not by the words that a language model
    answers with."""
    return task.verbalizers if task.image else task.label_names or task.verbalizers


def with_classes(
    base: Base, names: Sequence[str], seed: int, task: Task | None = None, fresh: bool = False
) -> tuple[Base, bool]:
    """A base whose head has a row for each class, and whether that is a fresh one, which the seed
    draws. A language model stays as it is.

    The head is the checkpoint's where that has one for as many classes: its rows are matched by its
    id2label with `names`, or what else the task calls its labels. fresh: whether there is to be a
    fresh one in any case. Raises ConfigError where names do not match.
    """
    family = family_of(base.config)
    if not family.classes:
        if fresh:
            kind = f"{base.model} is a language model ({base.config.model_type})"
            raise ConfigError(f"fresh-head has no use: {kind}")
        return base, False
    source: WeightSource = base.source
    reason = "as fresh-head says" if fresh else _why_fresh(base, family, names)
    order = [] if reason else _order(base, names, task)
    if order != sorted(order):
        log.info("the rows of the head are put into the order of the labels: %s", ", ".join(names))
        source = _OrderedHead(source, family, order)
    config = type(base.config).from_dict(base.config.to_dict())
    config.id2label = dict(enumerate(names))
    config.problem_type = None  # a head of classes, whatever the checkpoint's was
    config.label2id = {name: label for label, name in enumerate(names)}
    if reason:
        source = _FreshHead(source, family, seed, family.init_std(config))
        if base.pretrained:
            log.info("the head is a fresh one, for %d classes: %s", len(names), reason)
    return replace(base, config=config, source=source), bool(reason)


def _why_fresh(base: Base, family: Family, names: Sequence[str]) -> str:
    """Why a checkpoint's head cannot be that of so many classes, "" where it can."""
    if family.head not in base.source:
        return f"{base.model} has none"
    others = [name for name in base.config.architectures or () if name.endswith(_OTHER_HEADS)]
    if others:
        return f"that of {base.model}, a {others[0]}, is for something else"
    if base.config.num_labels != len(names):
        own = ", ".join(_own_names(base.config)[:10])
        return f"that of {base.model} is for {base.config.num_labels} others ({own})"
    return ""


def _own_names(config: Any) -> list[str]:
    """What a checkpoint calls its classes, by row of the head."""
    return [str(config.id2label.get(row, row)) for row in range(config.num_labels)]


def _order(base: Base, names: Sequence[str], task: Task | None) -> list[int]:
    """Of each class the row of the checkpoint's head: by name, by number where the checkpoint has
    no names. ConfigError where its names are others."""
    own = _own_names(base.config)
    numbered = not base.pretrained or all(_is_number(name, row) for row, name in enumerate(own))
    known = [str(row) for row in range(len(own))] if numbered else own
    labels, words = (task.label_names, task.verbalizers) if task else ((), ())
    for wanted in (names, labels, words):
        for plain in (str, _plain):
            rows = {plain(name): row for row, name in enumerate(known)}
            classes = [plain(name) for name in wanted]
            if len(rows) == len(own) and rows.keys() == set(classes):
                return [rows[name] for name in classes]
    if numbered:
        return list(range(len(own)))
    pairs = [f"{label}={name}" for label, name in zip(labels, own, strict=False)] or own
    raise ConfigError(
        f"the head of {base.model} has the classes {', '.join(own)} (id2label in its config.json), "
        f"the data have the labels {', '.join(labels or names)}: say in verbalizers which class "
        f"each label is, as in verbalizers = {','.join(pairs)!r} if they correspond in this order; "
        "or set fresh-head = true for a head that is trained from the start"
    )


def _is_number(name: str, row: int) -> bool:
    """Whether a class is called by the number of its row: LABEL_2 or 2."""
    found = _NUMBER.fullmatch(_plain(name))
    return found is not None and int(found[1]) == row


def _plain(name: str) -> str:
    """A name without differences of case, of Unicode forms, and of what is between its words."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", folded.replace("_", " ").strip())
