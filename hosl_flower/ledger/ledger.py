"""The ledger: the history of a client submodel as (seed, scalar, learning rate).

A zeroth-order update is fully described by the seeds of its directions, their projected
gradients and the learning rate, 12 bytes per direction. So

    client submodel = base checkpoint + ledger

and a client is brought up to date, resumed or audited by replay, bit for bit. A position is a
number of entries; its digest, a running hash, names the history up to there.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hosl_flower.errors import CheckpointError
from hosl_flower.system.untrusted_files import parse_json
from hosl_flower.system.whole_files import Lines, put
from hosl_flower.tensors.raw_bytes import raw_bytes
from hosl_flower.tensors.rounding import to_float32


@dataclass(frozen=True)
class Entry:
    """One update by the gradient estimate sum_q scalars[q] * s(seeds[q]).

    scalars are exact float32 values, so every medium carries them unchanged.
    """

    step: int
    seeds: tuple[int, ...]
    scalars: tuple[float, ...]
    learning_rate: float

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.scalars):
            raise ValueError(f"{len(self.seeds)} seeds but {len(self.scalars)} scalars")
        if not all(map(math.isfinite, (*self.scalars, self.learning_rate))):
            raise ValueError(f"scalars and learning rate must be finite, got {self}")
        if any(to_float32(scalar) != scalar for scalar in self.scalars):
            raise ValueError("scalars must be float32 values")

    def pack(self) -> bytes:
        """Canonical bytes, little endian, that digests are taken of."""
        count = len(self.seeds)
        head = struct.pack("<QdI", self.step, self.learning_rate, count)
        return head + struct.pack(f"<{count}Q{count}f", *self.seeds, *self.scalars)


def chain(digest: str, content: bytes) -> str:
    """The digest (16 hex digits) of a history with one more update at its end."""
    return hashlib.sha256(digest.encode() + content).hexdigest()[:16]


def chain_entries(digest: str, entries: Iterable[Entry]) -> list[str]:
    """Digests after each of the entries, the given one first."""
    digests = [digest]
    for entry in entries:
        digests.append(chain(digests[-1], entry.pack()))
    return digests


def first_digest(genesis: str) -> str:
    """The digest of a history without updates."""
    return hashlib.sha256(genesis.encode()).hexdigest()[:16]


class Ledger:
    """An append-only history with a running digest, of which old entries may be let go.

    genesis: names what the history starts from (base model, cut, distribution ...), so that
    ledgers of different runs never look alike. A position counts updates from the beginning;
    entries and digests are held from position `start` on. Whoever is further back than that
    gets a snapshot (server/history.py).
    """

    def __init__(self, genesis: str):
        self.genesis = genesis
        self.start = 0
        self.entries: list[Entry] = []
        self._digests = [first_digest(genesis)]
        self._bytes = 0
        self._file: Lines | None = None

    def __len__(self) -> int:
        return self.start + len(self.entries)

    def append(self, entry: Entry) -> None:
        """Add one update at the end."""
        content = entry.pack()
        self._digests.append(chain(self._digests[-1], content))
        self.entries.append(entry)
        self._bytes += len(content)
        self._write(asdict(entry))

    def jump(self, step: int, weights: str) -> None:
        """Add an update that is no entry: new weights, known by their fingerprint. Nobody can
        replay it, so nothing before it is held any longer."""
        digest = chain(self._digests[-1], f"{step}|{weights}".encode())
        self.start = len(self) + 1
        self.entries, self._digests, self._bytes = [], [digest], 0
        self._write({"step": step, "weights": weights})

    def skip(self, position: int, digest: str) -> None:
        """Become a history of so many updates of which none is held: that of a checkpoint."""
        self.start, self.entries, self._digests, self._bytes = position, [], [digest], 0

    def compact(self, limit: int) -> None:
        """Let go of the oldest entries until the rest is at most `limit` bytes."""
        dropped = 0
        while self._bytes > limit:
            self._bytes -= len(self.entries[dropped].pack())
            dropped += 1
        if dropped:
            self.start += dropped
            del self.entries[:dropped], self._digests[:dropped]

    def knows(self, position: int, digest: str) -> bool:
        """Whether `digest` is this history's at `position`, and all since is held."""
        return self.start <= position <= len(self) and self.digest(position) == digest

    def digest(self, position: int | None = None) -> str:
        """Digest (16 hex digits) at a position, the end by default; "" where it is let go."""
        index = (len(self) if position is None else position) - self.start
        return self._digests[index] if 0 <= index < len(self._digests) else ""

    def since(self, position: int, stop: int | None = None) -> list[Entry]:
        """Entries from a position that is held on."""
        return self.entries[position - self.start : None if stop is None else stop - self.start]

    def record(self, path: Path) -> None:
        """Keep the whole history in a file too: JSON lines, added to at every `seal`."""
        put(path, json.dumps({"genesis": self.genesis}) + "\n")
        self._file = Lines(path)
        for entry in self.entries:
            self._write(asdict(entry))

    def go_on(self, path: Path) -> None:
        """As `record`, with a file that has been sealed here already."""
        self._file = Lines(path)

    def seal(self) -> None:
        """Write new updates to the file, and a line with the digest up to here. OSError when they
        cannot be written; the file is as it was then, and the next attempt writes them again."""
        if self._file is not None:
            self._write({"position": len(self), "digest": self.digest()})
            self.flush()

    def flush(self) -> None:
        """Write to the file what a `seal` could not. Raises OSError as that does."""
        if self._file is not None:
            self._file.flush()

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.hold(json.dumps(row))

    @classmethod
    def read(cls, path: Path, content: bytes | None = None) -> "Ledger":
        """The ledger of a run directory, or of the content of its file. CheckpointError with the
        line when it is damaged or does not end with a digest; that nothing is missing after it
        shows in the `ledger_digest` of results.json."""
        number, intact = 1, False
        try:
            head, *rows = (path.read_bytes() if content is None else content).splitlines() or [b""]
            ledger = cls(parse_json(head)["genesis"])
            for row in rows:
                number += 1
                intact = ledger._take(parse_json(row))
        except (
            OSError, ValueError, KeyError, TypeError, AttributeError, struct.error
        ) as error:  # fmt: skip
            raise CheckpointError(
                f"{path}, line {number}: not a complete ledger ({error!r})"
            ) from error
        if not intact:
            raise CheckpointError(
                f"{path}, line {number}: not a complete ledger, its end is missing"
            )
        return ledger

    def _take(self, row: dict[str, Any]) -> bool:
        """One line of a file; whether it seals what came before. ValueError if it does not fit."""
        if "digest" in row:
            if (row["position"], row["digest"]) != (len(self), self.digest()):
                raise ValueError(f"digest at position {row['position']} does not fit the entries")
            return True
        if "weights" in row:
            self.jump(row["step"], row["weights"])
        else:
            seeds, scalars = tuple(row["seeds"]), tuple(row["scalars"])
            self.append(Entry(row["step"], seeds, scalars, row["learning_rate"]))
        return False


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """16 hex digits over names, shapes, dtypes and bits of the parameters, in name order."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        digest.update(f"{name}|{list(parameter.shape)}|{parameter.dtype}|".encode())
        digest.update(raw_bytes(parameter))
    return digest.hexdigest()[:16]


def entries_from_columns(
    steps: Sequence[int],
    counts: Sequence[int],
    seeds: Sequence[int],
    scalars: Sequence[float],
    learning_rates: Sequence[float],
) -> list[Entry]:
    """Entries from flat columns, as messages carry them; ValueError when they do not fit."""
    if not len(steps) == len(counts) == len(learning_rates):
        raise ValueError("columns of different length")
    if sum(counts) != len(seeds) or len(seeds) != len(scalars):
        raise ValueError("counts do not add up to the number of seeds and scalars")
    entries, start = [], 0
    for step, count, rate in zip(steps, counts, learning_rates, strict=True):
        stop = start + count
        entries.append(Entry(step, tuple(seeds[start:stop]), tuple(scalars[start:stop]), rate))
        start = stop
    return entries
