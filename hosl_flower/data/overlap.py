"""Held-out examples that repeat text of training examples.

Examples that are drawn off a training file are independent of the rest only where its rows are.
Where rows are phrases of the same sentences, or are listed twice, both parts get them, and the
held-out score counts examples that the model has seen.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # heavy, and the server holds no data
    from datasets import Dataset
else:
    Dataset = Any

RUN = 8  # words: independent texts rarely share so many in a row
# Of the held-out examples, and at least two. Measured: 0.63 of SST-2, whose rows are phrases of the
# same sentences; 0.16 of SMS messages, many sent twice; 0.001 to 0.02 of independent texts.
_MUCH = 0.1
_SHORT = 4  # words: a shorter text lies in others by chance, so it counts only where it is all
# examples looked at, at most, and words of training examples, about: 0.2 seconds and 20 MB
HELD_OUT, TRAIN, WORDS = 1000, 100_000, 300_000
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)

Array = NDArray[np.uint64]


class Overlap(NamedTuple):
    """examples: held-out examples looked at. shared: those of whose words at least half lie in runs
    of RUN words that training examples have too; of a shorter text, all words in a row. pair: rows,
    from 1, of a held-out example and of a training example with such a run; (0, 0) without."""

    examples: int
    shared: int
    pair: tuple[int, int]

    @property
    def matters(self) -> bool:
        """Whether it says too much of the model for a held-out score."""
        return self.shared >= max(2, _MUCH * self.examples)

    def flat(self) -> tuple[int, ...]:
        """For the wire."""
        return self.examples, self.shared, *self.pair

    @classmethod
    def from_flat(cls, numbers: Sequence[int]) -> "Overlap | None":
        """The inverse, of four numbers or none."""
        if not numbers:
            return None
        examples, shared, *pair = numbers
        return cls(examples, shared, (pair[0], pair[1]))

    def __str__(self) -> str:
        first, second = self.pair
        return (
            f"{self.shared} of {self.examples} held-out examples "
            f"({self.shared / self.examples:.0%}) repeat text of training examples, row {first} "
            f"for one that of row {second}: held-out scores may be too good. They were drawn off "
            "the training part; give a data directory with its own validation file instead: "
            "data-path=<directory with train.* and validation.*>, without held-out-examples"
        )


class Split(NamedTuple):
    """Rows (from 0) of one table that are trained on, and rows that are held out."""

    data: Dataset
    train_rows: Sequence[int]
    held_out_rows: Sequence[int]

    def overlap(self, fields: Sequence[str]) -> Overlap:
        """Looked for in a sample of both parts, which are in an order that was drawn.

        Args:
            fields: The columns of text.
        """
        sample = self._replace(
            train_rows=self.train_rows[:TRAIN], held_out_rows=self.held_out_rows[:HELD_OUT]
        )
        found = find_overlap(*sample.texts(fields))
        if not found.shared:
            return found
        first, second = found.pair
        return found._replace(pair=(self.held_out_rows[first] + 1, self.train_rows[second] + 1))

    def texts(self, fields: Sequence[str]) -> tuple[list[str], list[str]]:
        """Training and held-out texts: of each row the columns, joined with spaces."""
        return self._texts(fields, self.train_rows), self._texts(fields, self.held_out_rows)

    def _texts(self, fields: Sequence[str], rows: Sequence[int]) -> list[str]:
        data = self.data.select(rows)
        return [" ".join(own) for own in zip(*(data[field][:] for field in fields), strict=True)]


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def find_overlap(train: Iterable[str], held_out: Sequence[str]) -> Overlap:
    """Which held-out texts repeat training texts; the pair as places, from 0. Texts are compared as
    lower-case words. Reads about WORDS words of the training texts, in their order."""
    ids: dict[str, int] = {}
    wanted = _Words.of(held_out, ids)
    given = _Words.of(train, ids)
    covered = np.zeros(len(wanted.ids), dtype=bool)
    source = np.full(len(wanted.ids), -1)
    for length in range(1, RUN + 1):
        own, at = wanted.runs(length, whole=length < RUN)
        other, there = given.runs(length, whole=length < _SHORT)
        if not len(own) or not len(other):
            continue
        other, first = np.unique(other, return_index=True)
        place = np.searchsorted(other, own).clip(max=len(other) - 1)
        same = other[place] == own
        source[at[same]] = given.text[there[first[place[same]]]]
        for offset in range(length):
            covered[at[same] + offset] = True
    words = np.bincount(wanted.text, minlength=len(held_out))
    repeated = np.bincount(wanted.text[covered], minlength=len(held_out))
    shared = np.flatnonzero((words > 0) & (2 * repeated >= words))
    if not len(shared):
        return Overlap(len(held_out), 0, (0, 0))
    first = shared[0]
    pair = (int(first), int(source[(wanted.text == first) & (source >= 0)][0]))
    return Overlap(len(held_out), len(shared), pair)


class _Words(NamedTuple):
    """Texts as one sequence of words. ids: numbers of the words; text: which text each is of;
    lengths: of all texts."""

    ids: Array
    text: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Iterable[str], known: dict[str, int]) -> "_Words":
        ids: list[int] = []
        lengths: list[int] = []
        for text in texts:
            words = words_of(text)[:WORDS]
            ids.extend(known.setdefault(word, len(known) + 1) for word in words)
            lengths.append(len(words))
            if len(ids) >= WORDS:
                break
        each = np.array(lengths, dtype=np.int64)
        return cls(np.array(ids, dtype=np.uint64), np.repeat(np.arange(len(each)), each), each)

    def runs(self, length: int, whole: bool) -> tuple[Array, NDArray[np.int64]]:
        """Hashes of the runs of so many words within one text, and where each begins. whole: of
        those that are a whole text only."""
        count = max(0, len(self.ids) - length + 1)
        hashes = np.zeros(count, dtype=np.uint64)
        for offset in range(length):  # arithmetic modulo 2^64
            hashes = (hashes + self.ids[offset : offset + count]) * _FACTOR
            hashes ^= hashes >> np.uint64(29)
        inside = self.text[:count] == self.text[length - 1 :]
        if whole:
            inside &= self.lengths[self.text[:count]] == length
        at = np.flatnonzero(inside)
        return hashes[at], at
