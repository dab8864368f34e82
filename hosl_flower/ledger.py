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

from torch import Tensor

from hosl_flower.errors import CheckpointError, DriftError
from hosl_flower.perturb import Layout
from hosl_flower.tensors import raw_bytes
from hosl_flower.zo import apply_update, to_float32


@dataclass(frozen=True)
class Entry:
    """One update: theta -= learning_rate * sum_q scalars[q] * s(seeds[q]).

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


class Ledger:
    """An append-only list of entries with a running digest.

    genesis: names what the history starts from (base model, cut, distribution ...), so that
    ledgers of different runs never look alike.
    """

    def __init__(self, genesis: str):
        self.genesis = genesis
        self.entries: list[Entry] = []
        self._digests = [hashlib.sha256(genesis.encode()).hexdigest()[:16]]

    def __len__(self) -> int:
        return len(self.entries)

    def append(self, entry: Entry) -> None:
        """Add one update at the end."""
        chained = self._digests[-1].encode() + entry.pack()
        self._digests.append(hashlib.sha256(chained).hexdigest()[:16])
        self.entries.append(entry)

    def digest(self, position: int | None = None) -> str:
        """Digest (16 hex digits) of the first `position` entries; all of them by default."""
        return self._digests[len(self) if position is None else position]

    def write(self, path: Path) -> None:
        """One JSON line for the genesis, one per entry, one with the final digest."""
        lines = [{"genesis": self.genesis}, *map(asdict, self.entries), {"digest": self.digest()}]
        part = path.with_name(f".{path.name}.part")
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """The ledger of a run directory; CheckpointError when it is damaged or cut short."""
        try:
            head, *rows, tail = map(json.loads, path.read_text().splitlines())
            ledger = cls(head["genesis"])
            for row in rows:
                seeds, scalars = tuple(row["seeds"]), tuple(row["scalars"])
                ledger.append(Entry(row["step"], seeds, scalars, row["learning_rate"]))
            intact = tail["digest"] == ledger.digest()
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise CheckpointError(f"{path} is not a complete ledger ({error!r})") from error
        if not intact:
            raise CheckpointError(f"{path} is damaged: its digest does not fit its entries")
        return ledger


def replay(parameters: Mapping[str, Tensor], layout: Layout, entries: Iterable[Entry]) -> None:
    """Apply entries in order, in place: the same arithmetic as in training, bit for bit."""
    for entry in entries:
        apply_update(parameters, layout, entry.seeds, entry.scalars, entry.learning_rate)


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """16 hex digits over names, shapes, dtypes and bits of the parameters, in name order."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        digest.update(f"{name}|{list(parameter.shape)}|{parameter.dtype}|".encode())
        digest.update(raw_bytes(parameter))
    return digest.hexdigest()[:16]


def check_fingerprint(expected: str, found: str, who: str, position: int) -> None:
    """DriftError unless the two fingerprints agree."""
    if expected != found:
        raise DriftError(
            f"{who}: the client submodel at ledger position {position} has fingerprint {found}, "
            f"the ledger gives {expected}; its base checkpoint or arithmetic differs"
        )


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
