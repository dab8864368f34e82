"""probe.py: running at theta + c * s equals writing theta + c * s, and writes nothing."""

import copy

import pytest
import torch
from layers import EveryUse, layout_of, named
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hosl_flower.optim.gradient import Seeded
from hosl_flower.optim.optimizer import Sgd
from hosl_flower.zo.directions import DISTRIBUTIONS, Layout
from hosl_flower.zo.perturbed import perturbed

C = 1e-2


IDS = torch.tensor([[1, 5, 5, 19], [0, 2, 3, 4]])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_probe_sees_what_written_weights_would_give(distribution):
    model = EveryUse()
    layout = layout_of(model, distribution)
    written = copy.deepcopy(model)
    Sgd().step(named(written), Seeded(layout, [5], [-1.0]), C)
    with perturbed(named(model), layout.draw(5), C):
        probed = model(IDS)
    with torch.no_grad():
        assert torch.allclose(probed, written(IDS), atol=1e-4, rtol=1e-4)
        assert (probed - model(IDS)).abs().max() > 0.01


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_bit_identical_after_probes(distribution, dtype):
    model = EveryUse().to(dtype)
    before = copy.deepcopy(model.state_dict())
    layout = layout_of(model, distribution)
    for seed, coefficient in ((1, C), (1, -C), (2, 0.37)):
        with perturbed(named(model), layout.draw(seed), coefficient):
            assert torch.isfinite(model(IDS)).all()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_direction_can_be_used_again(distribution):
    model = EveryUse()
    direction = layout_of(model, distribution).draw(5)
    with perturbed(named(model), direction, C):
        first = model(IDS)
        assert torch.equal(model(IDS), first)
    with perturbed(named(model), direction, 2 * C):
        assert not torch.equal(model(IDS), first)
    with perturbed(named(model), direction, C):
        assert torch.equal(model(IDS), first)


def test_only_listed_parameters_are_perturbed():
    model = EveryUse()
    some = {n: p for n, p in model.named_parameters() if n.startswith("norm")}
    layout = Layout({n: p.shape for n, p in some.items()})
    written = copy.deepcopy(model)
    Sgd().step(
        {n: p for n, p in written.named_parameters() if n in some}, Seeded(layout, [5], [-1.0]), C
    )
    with perturbed(some, layout.draw(5), C):
        probed = model(IDS)
    with torch.no_grad():
        assert torch.allclose(probed, written(IDS), atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest floating point tensor made, the parameters themselves aside."""

    def __init__(self, model):
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                storage = value.untyped_storage()
                if storage.data_ptr() not in self.weights:
                    self.largest = max(self.largest, storage.nbytes() // value.itemsize)
        return result


def test_a_rank1_probe_never_makes_a_matrix():
    model = nn.Sequential(nn.Embedding(5000, 64), nn.Linear(64, 512), nn.Linear(512, 64))
    layout = layout_of(model, "rank1")
    # 3 tokens: activations of at most 3 * 512; weights of 32,768 and 320,000 elements
    with LargestTensor(model) as meter, perturbed(named(model), layout.draw(1), C):
        model(torch.tensor([[1, 2, 3]]))
    drawn = 5000 + 64 + 2 * (64 + 512) + 512 + 64  # the direction itself: out + in signs
    assert drawn <= meter.largest < 2 * drawn < 32_768


def test_a_probe_of_a_convolution_by_hand():
    """One channel in, two out, kernels of 1 x 2 pixels, 0.5 along s = a b^T."""
    conv = nn.Conv2d(1, 2, (1, 2), bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]).view(2, 1, 1, 2))
    image = torch.tensor([[10.0, 1.0, 2.0]]).view(1, 1, 1, 3)
    assert conv(image).flatten().tolist() == [12.0, 5.0, 29.0, 1.0]
    direction = layout_of(conv, "rank1").draw(1)
    a, b = direction.factors("weight")
    assert (a.tolist(), b.tolist()) == ([1.0, -1.0], [-1.0, 1.0])  # b * x = -9, 1
    with perturbed(named(conv), direction, 0.5):
        assert conv(image).flatten().tolist() == [12 - 4.5, 5 + 0.5, 29 + 4.5, 1 - 0.5]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "settings",
    [{"stride": 2, "padding": 1}, {"groups": 2}, {"dilation": 2, "bias": False}],
    ids=str,
)
def test_convolutions_of_all_kinds(distribution, settings):
    conv = nn.Conv2d(4, 6, 3, **settings)
    written = copy.deepcopy(conv)
    layout = layout_of(conv, distribution)
    Sgd().step(named(written), Seeded(layout, [5], [-1.0]), C)
    images = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    with perturbed(named(conv), layout.draw(5), C):
        probed = conv(images)
    with torch.no_grad():
        assert torch.allclose(probed, written(images), atol=1e-5)
        assert (probed - conv(images)).abs().max() > 0.01


def test_a_rank1_probe_never_makes_a_convolutions_weights():
    model = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Conv2d(128, 16, 3))
    layout = layout_of(model, "rank1")
    # weights of 73,728 and 18,432 elements; feature maps of at most 64 * 25
    with LargestTensor(model) as meter, perturbed(named(model), layout.draw(1), C):
        model(torch.ones(1, 64, 5, 5))
    drawn = 128 + 9 * 64 + 128 + 16 + 9 * 128 + 16
    assert drawn <= meter.largest < 2 * drawn < 18_432
