"""ledger/ledger.py: replay equals training bit for bit; damage is noticed."""

import json

import pytest
import torch

from hosl_flower.errors import CheckpointError
from hosl_flower.ledger.ledger import Entry, Ledger, chain_entries, fingerprint
from hosl_flower.tensors.rounding import to_float32

ENTRIES = [
    Entry(1, (11, 12), (0.5, -0.25), 1e-2),
    Entry(2, (13,), (to_float32(0.3),), 3e-3),
    Entry(5, (), (), 1e-2),
]


def ledger_of(entries):
    ledger = Ledger("base")
    for entry in entries:
        ledger.append(entry)
    return ledger


def recorded(entries, path):
    ledger = Ledger("base")
    ledger.record(path)
    for entry in entries:
        ledger.append(entry)
    ledger.seal()
    return ledger


def test_a_file_holds_the_whole_history(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = recorded(ENTRIES[:2], path)
    first = path.read_text()
    ledger.append(ENTRIES[2])
    assert path.read_text() == first, "written at the next seal"
    ledger.seal()
    assert path.read_text().startswith(first), "only ever added to"
    back = Ledger.read(path)
    assert back.entries == ENTRIES
    assert back.digest() == ledger.digest() == ledger_of(ENTRIES).digest()


def test_a_file_remembers_new_weights_by_their_fingerprint(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = recorded(ENTRIES[:1], path)
    ledger.jump(2, "f" * 16)
    ledger.append(ENTRIES[2])
    ledger.seal()
    back = Ledger.read(path)
    assert (len(back), back.start, back.digest()) == (3, 2, ledger.digest())


def test_compaction_lets_go_of_what_a_snapshot_would_say_shorter():
    ledger = ledger_of(ENTRIES)  # 44, 32 and 20 bytes
    whole = [ledger.digest(i) for i in range(4)]
    ledger.compact(96)
    assert ledger.start == 0
    ledger.compact(60)
    assert (ledger.start, len(ledger)) == (1, 3)
    assert [ledger.digest(i) for i in range(4)] == ["", *whole[1:]]
    assert ledger.since(1) == ENTRIES[1:]
    assert ledger.since(2, 3) == ENTRIES[2:]
    assert not ledger.knows(0, whole[0])
    assert ledger.knows(1, whole[1])
    assert not ledger.knows(2, whole[1])
    ledger.compact(0)
    assert ledger.digest() == whole[3]
    ledger.append(Entry(6, (1,), (0.5,), 1.0))
    assert len(ledger) == 4
    straight = ledger_of([*ENTRIES, Entry(6, (1,), (0.5,), 1.0)])
    assert ledger.digest() == straight.digest()


def test_digests_can_be_followed_without_a_ledger():
    ledger = ledger_of(ENTRIES)
    assert chain_entries(ledger.digest(1), ENTRIES[1:]) == [ledger.digest(i) for i in (1, 2, 3)]


def test_digests_name_histories():
    one, other = ledger_of(ENTRIES), ledger_of(ENTRIES)
    assert [one.digest(i) for i in range(4)] == [other.digest(i) for i in range(4)]
    assert len({one.digest(i) for i in range(4)}) == 4
    assert Ledger("other base").digest() != Ledger("base").digest()
    changed = [Entry(1, (11, 12), (0.5, -0.5), 1e-2), *ENTRIES[1:]]
    assert ledger_of(changed).digest() != one.digest()


@pytest.mark.parametrize(
    ("seeds", "scalars", "rate"),
    [((1,), (), 1e-3), ((1,), (float("nan"),), 1e-3), ((1,), (0.1,), 1e-3), ((), (), float("inf"))],
)
def test_entries_that_cannot_be_are_refused(seeds, scalars, rate):
    with pytest.raises(ValueError, match=r"seeds|finite|float32"):
        Entry(1, seeds, scalars, rate)


def damaged(lines):
    yield lines[:-1]  # cut short
    yield lines[:1] + lines[2:]  # an entry lost
    yield [lines[0], lines[1].replace("0.5", "0.75"), *lines[2:]]
    yield [*lines[:2], "{", *lines[2:]]
    yield []
    row = json.loads(lines[1])
    yield [lines[0], json.dumps({**row, "seeds": ["x", 2]}), *lines[2:]]


@pytest.mark.parametrize("kind", range(6))
def test_a_damaged_file_is_one_clear_error(tmp_path, kind):
    path = tmp_path / "ledger.jsonl"
    recorded(ENTRIES, path)
    lines = list(damaged(path.read_text().splitlines()))[kind]
    path.write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl"):
        Ledger.read(path)


def test_a_fingerprint_covers_names_shapes_dtypes_and_bits():
    base = {"w": torch.zeros(2, 3)}
    others = [
        {"v": torch.zeros(2, 3)},
        {"w": torch.zeros(3, 2)},
        {"w": torch.zeros(2, 3, dtype=torch.bfloat16)},
        {"w": -torch.zeros(2, 3)},
    ]
    assert len({fingerprint(base), *map(fingerprint, others)}) == 5
