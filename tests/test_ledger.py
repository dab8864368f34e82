"""ledger.py: replay equals training bit for bit; damage is noticed."""

import json

import pytest
import torch

from hosl_flower.errors import CheckpointError, DriftError
from hosl_flower.ledger import Entry, Ledger, check_fingerprint, fingerprint, replay
from hosl_flower.perturb import DISTRIBUTIONS, Layout
from hosl_flower.zo import apply_update, to_float32

ENTRIES = [
    Entry(1, (11, 12), (0.5, -0.25), 1e-2),
    Entry(2, (13,), (to_float32(0.3),), 3e-3),
    Entry(5, (), (), 1e-2),
]


def weights(dtype):
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(8, 6, generator=generator).to(dtype),
        "b": torch.randn(8, generator=generator).to(dtype),
    }


def ledger_of(entries):
    ledger = Ledger("base")
    for entry in entries:
        ledger.append(entry)
    return ledger


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_is_training_bit_for_bit(distribution, dtype, tmp_path):
    trained = weights(dtype)
    layout = Layout({n: t.shape for n, t in trained.items()}, distribution)
    for e in ENTRIES:
        apply_update(trained, layout, e.seeds, e.scalars, e.learning_rate)
    ledger_of(ENTRIES).write(tmp_path / "ledger.jsonl")
    replayed = weights(dtype)
    replay(replayed, layout, Ledger.read(tmp_path / "ledger.jsonl").entries)
    assert all(torch.equal(trained[name], replayed[name]) for name in trained)
    assert fingerprint(trained) == fingerprint(replayed) != fingerprint(weights(dtype))


def test_relay_of_scalars_is_relay_of_weights():
    # two halves of a history, the second replayed on top of the first one's weights
    straight, relayed = weights(torch.float32), weights(torch.float32)
    layout = Layout({n: t.shape for n, t in straight.items()})
    replay(straight, layout, ENTRIES)
    replay(relayed, layout, ENTRIES[:1])
    replay(relayed, layout, ENTRIES[1:])
    assert fingerprint(straight) == fingerprint(relayed)


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
    ledger_of(ENTRIES).write(path)
    lines = list(damaged(path.read_text().splitlines()))[kind]
    path.write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl"):
        Ledger.read(path)


def test_a_different_fingerprint_is_drift():
    check_fingerprint("a" * 16, "a" * 16, "client 0", 3)
    with pytest.raises(DriftError, match=r"client 0.*position 3"):
        check_fingerprint("a" * 16, "b" * 16, "client 0", 3)


def test_a_fingerprint_covers_names_shapes_dtypes_and_bits():
    base = {"w": torch.zeros(2, 3)}
    others = [
        {"v": torch.zeros(2, 3)},
        {"w": torch.zeros(3, 2)},
        {"w": torch.zeros(2, 3, dtype=torch.bfloat16)},
        {"w": -torch.zeros(2, 3)},
    ]
    assert len({fingerprint(base), *map(fingerprint, others)}) == 5
