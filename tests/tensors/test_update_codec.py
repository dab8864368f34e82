"""tensors/update_codec.py: what is lost, that it is nothing on average, and what it costs in
bytes."""

import pytest
import torch

from hosl_flower.optim.gradient import sparse_rows
from hosl_flower.tensors.memory import Meter
from hosl_flower.tensors.update_codec import RowLayout, decode_update, encode_update

SHAPES = {"a": torch.Size([3, 4]), "b": torch.Size([5]), "c": torch.Size([2, 2, 2])}
ROWS = RowLayout(SHAPES)


def drawn(seed=0):
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=source) for name, shape in SHAPES.items()}


def flat(parts):
    return torch.cat([parts[name].flatten() for name in SHAPES])


def test_rows_are_those_of_matrices_and_whole_vectors():
    assert ROWS.count == 3 + 1 + 2
    assert ROWS.widths().tolist() == [4, 4, 4, 5, 4, 4]


def test_exact_is_exact_in_whatever_order_parts_come():
    parts = drawn()
    coded = encode_update(ROWS, reversed(parts.items()), "exact", seed=1)
    assert coded.present.all()
    assert torch.equal(decode_update(ROWS, coded), flat(parts))


def test_what_does_not_come_and_what_is_zero_does_not_travel():
    parts = drawn()
    parts["a"][1] = 0
    coded = encode_update(ROWS, [("a", parts["a"]), ("c", parts["c"])], "exact", seed=1)
    assert coded.present.tolist() == [True, False, True, False, True, True]
    assert coded.values.numel() == 2 * 4 + 2 * 4
    parts["b"].zero_()
    assert torch.equal(decode_update(ROWS, coded), flat(parts))


@pytest.mark.parametrize("codec", ["exact", "int8"])
def test_sparse_rows_are_what_they_are_when_dense(codec):
    rows, values = torch.tensor([0, 2]), torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    sparse = sparse_rows(rows, values, SHAPES["a"])
    a, b = (
        encode_update(ROWS, [("a", part)], codec, seed=3) for part in (sparse, sparse.to_dense())
    )
    assert a.present.tolist() == [True, False, True, False, False, False]
    assert torch.equal(decode_update(ROWS, a), decode_update(ROWS, b))


def test_int8_is_within_a_step_and_right_on_average():
    """The step is a row's largest magnitude over 127; each of 400 roundings is off by less, and
    their mean by less than four standard errors, half a step over the root of 400 each."""
    parts = drawn()
    whole = flat(parts)
    step = torch.cat(
        [
            part.reshape(*shape).abs().amax(1, keepdim=True).expand(*shape).flatten() / 127
            for part, shape in zip(parts.values(), ROWS.shapes.values(), strict=True)
        ]
    )
    found = torch.stack(
        [
            decode_update(ROWS, encode_update(ROWS, parts.items(), "int8", seed))
            for seed in range(400)
        ]
    )
    assert ((found - whole).abs() <= step * 1.001).all()
    assert (found.std(0) > 0).sum() > 10
    assert ((found.mean(0) - whole).abs() <= 4 * step * 0.5 / 20).all()


def test_the_same_seed_rounds_alike_and_another_does_not():
    parts = drawn().items()
    once, again, other = (encode_update(ROWS, parts, "int8", seed).values for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_int8_takes_a_byte_per_number_and_a_scale_per_row():
    coded = encode_update(ROWS, drawn().items(), "int8", seed=1)
    assert (coded.values.dtype, coded.values.numel()) == (torch.int8, 25)
    assert (coded.scales.dtype, coded.scales.numel()) == (torch.float32, 6)


@pytest.mark.parametrize(("codec", "itemsize"), [("exact", 4), ("int8", 1)])
def test_an_update_is_held_once_while_it_is_put_together(codec, itemsize):
    """Beside it one part at a time, and what an encoding of that part takes."""
    rows = RowLayout({f"w{n}": torch.Size([256, 256]) for n in range(16)})
    part = 4 * 256 * 256

    def parts():
        for name in rows.shapes:
            made = torch.ones(256, 256)
            made[100:] = 0 if name == "w3" else 1  # a gap to close
            yield name, made

    meter = Meter("cpu")
    with meter.phase("exchange", 0):
        coded = encode_update(rows, parts(), codec, seed=1)
    assert coded.present.sum() == 16 * 256 - 156
    assert meter.peaks["exchange"] <= 16 * 256 * 256 * itemsize + 6 * part
    expected = torch.ones(16, 256, 256)
    expected[3, 100:] = 0
    assert torch.equal(decode_update(rows, coded), expected.flatten())


def test_nothing_at_all():
    for codec in ("exact", "int8"):
        assert not decode_update(ROWS, encode_update(ROWS, [], codec, seed=1)).any()
    none = RowLayout({})
    assert decode_update(none, encode_update(none, [], "int8", seed=1)).numel() == 0
