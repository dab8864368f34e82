"""Compare perturbations with a numpy implementation of docs/reference/perturbations.md."""

import hashlib
from statistics import NormalDist

import numpy as np
import pytest
import torch

from hosl_flower.tensors.philox import NORMALS, SIGNS, philox
from hosl_flower.tensors.seeds import derive_seed, permutation
from hosl_flower.zo.directions import DISTRIBUTIONS, Layout

MASK = 0xFFFFFFFF
NAME = "model.decoder.layers.0.fc1.weight"


def philox_numpy(counters: np.ndarray, seed: int) -> np.ndarray:
    x = [counters[:, i].astype(np.uint64) for i in range(4)]
    key = [seed & MASK, seed >> 32]
    for _ in range(10):
        high, low = [], []
        for word, multiplier in ((x[0], 0xD2511F53), (x[2], 0xCD9E8D57)):
            product = word * np.uint64(multiplier)
            high.append(product >> np.uint64(32))
            low.append(product & np.uint64(MASK))
        x = [high[1] ^ x[1] ^ np.uint64(key[0]), low[1], high[0] ^ x[3] ^ np.uint64(key[1]), low[0]]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return np.stack(x, axis=1)


def words_numpy(seed: int, label: str, blocks: int) -> np.ndarray:
    stream = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
    counters = np.zeros((blocks, 4), dtype=np.uint64)
    counters[:, 0] = np.arange(blocks)
    counters[:, 2], counters[:, 3] = stream & MASK, stream >> 32
    return philox_numpy(counters, seed)


def signs_numpy(seed: int, label: str, count: int) -> np.ndarray:
    words = words_numpy(seed, label, count // 128 + 1)
    bits = (words[:, :, None] >> np.arange(32, dtype=np.uint64)) & np.uint64(1)
    return 1.0 - 2.0 * bits.reshape(-1)[:count].astype(np.float32)


def normals_numpy(seed: int, label: str, count: int) -> list[float]:
    words = words_numpy(seed, label, count // 8 + 1)
    numbers = []
    for word in words.reshape(-1):
        for half in (int(word) & 0xFFFF, int(word) >> 16):
            p = 0.5 + ((half & 0x7FFF) + 0.5) / 65536
            size = round(4096 * NormalDist().inv_cdf(p)) / 4096
            numbers.append(-size if half >= 0x8000 else size)
    return numbers[:count]


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ([0, 0, 0, 0], 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([MASK] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, seed, words):
    out = philox(torch.tensor([counter]), seed)[0]
    assert " ".join(f"{int(word):08x}" for word in out) == words


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1])
def test_signs_and_normals_equal_the_numpy_implementation(seed):
    assert SIGNS.span(seed, NAME, 0, 1000).tolist() == signs_numpy(seed, NAME, 1000).tolist()
    assert NORMALS.span(seed, NAME, 0, 100).tolist() == normals_numpy(seed, NAME, 100)


def test_published_vectors():
    def show(signs):
        return "".join("+" if sign > 0 else "-" for sign in signs)

    assert show(SIGNS.span(42, NAME, 0, 16)) == "++++---+-+++-++-"
    assert show(SIGNS.span(42, f"{NAME}#out", 1000, 1016)) == "----++-++-+++-++"
    vector = (NORMALS.span(42, NAME, 0, 6) * 4096).tolist()
    assert vector == [-703, -263, -5287, -1812, 137, -598]
    assert derive_seed(0, "direction", 1, 0) == 709570383393912318


@pytest.mark.parametrize("stream", [SIGNS, NORMALS])
def test_a_stream_does_not_depend_on_how_it_is_cut(stream):
    whole = stream.span(7, "w", 0, 3000)
    for start, stop in ((0, 1), (5, 128), (127, 129), (777, 2999)):
        assert torch.equal(stream.span(7, "w", start, stop), whole[start:stop])
    ids = torch.tensor([3, 0, 29, 3])
    assert torch.equal(stream.rows(7, "w", ids, 77), whole[: 77 * 38].view(38, 77)[ids])


@pytest.mark.parametrize("stream", [SIGNS, NORMALS])
@pytest.mark.parametrize(("drawn", "piece"), [(1, 1), (3, 256), (1 << 14, 1 << 18)])
def test_pieces_are_the_sequence_scaled(stream, drawn, piece, monkeypatch):
    whole = stream.span(7, "w", 0, 3000)
    monkeypatch.setattr("hosl_flower.tensors.philox._DRAWN_BLOCKS", drawn)
    monkeypatch.setattr("hosl_flower.tensors.philox._PIECE_ELEMENTS", piece)
    pieces = list(stream.pieces(7, "w", 77, 2999, scale=0.3))
    assert torch.equal(torch.cat([numbers for _, numbers in pieces]), whole[77:2999] * 0.3)
    begins = [begin for begin, _ in pieces]
    assert begins == [sum(n.numel() for _, n in pieces[:i]) for i in range(len(pieces))]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifted_and_subtract_are_one_float32_operation(distribution, dtype):
    weight = torch.randn(70, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    direction = Layout({"w": weight.shape}, distribution).draw(3)
    product = direction.dense("w") * 0.3
    assert torch.equal(direction.shifted("w", weight, 0.3), (weight.float() + product).to(dtype))
    block = weight[10:60].float().clone()
    direction.subtract_(block, "w", 10, 0.3)
    assert torch.equal(block, weight[10:60].float() - product[10:60])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_directions_have_identity_covariance(distribution):
    shapes = {"w": torch.Size([4, 3]), "b": torch.Size([2])}
    layout = Layout(shapes, distribution)
    draws = [layout.draw(seed) for seed in range(1500)]
    s = torch.stack([torch.cat([d.dense(n).flatten() for n in shapes]) for d in draws])
    assert s.mean(0).abs().max() < 0.12
    assert (s.T @ s / len(s) - torch.eye(14)).abs().max() < 0.15


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_parameters_perturbation_depends_on_its_name_alone(distribution):
    a, b = torch.Size([5, 7]), torch.Size([300])
    one = Layout({"a": a, "b": b}, distribution).draw(3)
    other = Layout({"b": b, "z": a, "a": a}, distribution).draw(3)
    assert torch.equal(one.dense("a"), other.dense("a"))
    assert torch.equal(one.dense("b"), other.dense("b"))
    assert not torch.equal(other.dense("a"), other.dense("z"))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_rows_gather_and_dense_agree(distribution):
    direction = Layout({"w": torch.Size([9, 5, 2])}, distribution).draw(11)
    dense = direction.dense("w").view(9, 10)
    assert torch.equal(direction.rows("w", 2, 7), dense[2:7])
    ids = torch.tensor([[8, 0], [3, 3]])
    assert torch.equal(direction.gather("w", ids), dense[ids])


def test_rank1_is_the_outer_product_of_two_sign_streams():
    direction = Layout({"w": torch.Size([4, 6])}).draw(42)
    a, b = signs_numpy(42, "w#out", 4), signs_numpy(42, "w#in", 6)
    assert direction.dense("w").tolist() == np.outer(a, b).tolist()


def test_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="rank1"):
        Layout({}, "uniform")


@pytest.mark.parametrize("count", [0, 1, 2, 1001])
def test_permutation_is_one_and_depends_on_the_seed(count):
    assert sorted(permutation(count, 1)) == list(range(count))
    assert permutation(count, 1) == permutation(count, 1)
    if count > 2:
        assert permutation(count, 1) != permutation(count, 2)
