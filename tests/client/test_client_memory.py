"""What a client needs beyond inference, and that micro-batches change memory, not results."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from specs import client_spec

from hosl_flower.client.client import Client
from hosl_flower.client.forwards import put_together
from hosl_flower.ledger.ledger import Entry
from hosl_flower.protocol.messages.activations import Forward, Probe
from hosl_flower.protocol.messages.gradients import LocalStep
from hosl_flower.protocol.messages.ledger import CatchUp
from hosl_flower.protocol.messages.scalars import CutGradient, LocalTrain
from hosl_flower.tensors.cut_gradient import Cotangent
from hosl_flower.tensors.memory import Meter
from hosl_flower.tensors.update_codec import decode_update

SPEC = client_spec(
    model="random:opt-tiny", cut_layer=2, batch_size=32, max_length=64, client_trainable="full"
)
CHUNK = 1 << 20  # bytes of 2^18 float32: what an update works on at a time


@cache
def loaded() -> Client:
    """One client for all tests: its tokenizer and data take longer than they do."""
    return Client(SPEC)


def make(**changes) -> tuple[Client, dict]:
    """A client that has answered nothing yet, and the fields of a first request."""
    client = loaded()
    client.spec, client.meter = replace(SPEC, **changes), Meter("cpu")
    client.reset()
    return client, {"step": 1, "partition": 0, "position": 0, "digest": client.state.digest}


def probe_request(client, at, kind=CutGradient, **changes):
    """A cut gradient of the activations' shape, seeded."""
    (clean,) = client.answer([Forward(**at, batch=0)])
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(clean.activations.shape, generator=generator) / 1000
    dtype = clean.activations.dtype
    values = {"directions": 2, "seeds": (11, 12), "epsilon": 1e-3, "learning_rate": 0.01}
    return kind(
        **at, batch=0, gradient=gradient.to(dtype), scales=torch.empty(0), scale=1.0,
        **{**values, **changes},
    )  # fmt: skip


def peaks_of(**changes) -> dict[str, int]:
    """Peak tensor bytes of inference, and of what HOSL and HO-SFL ask in a step."""
    client, at = make(**changes)
    list(client.answer([Forward(**at, batch=0)]))
    peaks = {"inference": client.meter.peaks["forward"]}
    client, at = make(**changes)
    probes = [Probe(**at, batch=0, seed=11, coefficient=c) for c in (1e-3, -1e-3)]
    list(client.answer([*probes, Forward(**at, batch=0)]))
    peaks["hosl"] = max(client.meter.peaks[p] for p in ("forward", "probe"))
    client, at = make(**changes)
    list(client.answer([probe_request(client, at)]))
    peaks["ho_sfl"] = max(client.meter.peaks[p] for p in ("forward", "probe"))
    return peaks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batch", [0, 4])
def test_training_needs_little_more_than_inference(dtype, micro_batch):
    peaks = peaks_of(dtype=dtype, client_micro_batch=micro_batch)
    assert peaks["hosl"] <= 1.10 * peaks["inference"], peaks
    assert peaks["ho_sfl"] <= 1.10 * peaks["inference"], peaks


@pytest.mark.parametrize(("kind", "most"), [("exact", 1.15), ("residual", 1.1), ("recompute", 1.5)])
def test_gradients_without_a_whole_graph_need_little_more_than_inference(kind, most):
    # optimizer, its state and the cut gradient included; the embedding's rows are most of it
    changes = {"client_gradient": kind, "client_optimizer": "adafactor"}
    client, at = make(**changes)
    request = probe_request(client, at)
    step = LocalStep(
        **at, batch=0, gradient=request.gradient, scales=request.scales, scale=1.0,
        learning_rate=1e-3,
    )  # fmt: skip
    (stepped,) = client.answer([step])
    assert stepped.local == 1
    peaks = client.meter.peaks
    assert max(peaks["update"], peaks["backward"]) <= most * peaks["forward"], peaks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("perturbation", ["rank1", "signs"])
def test_an_update_needs_no_second_copy(dtype, perturbation):
    client, at = make(dtype=dtype, perturbation=perturbation)
    weights = sum(p.nbytes for p in client.submodel.parameters())
    entry = Entry(1, (11, 12), (0.5, -0.5), 1e-3)
    catch_up = CatchUp(
        **at, steps=(1,), counts=(2,), learning_rates=(1e-3,),
        seeds=torch.tensor(entry.seeds), scalars=torch.tensor(entry.scalars),
    )  # fmt: skip
    (applied,) = client.answer([catch_up])
    assert applied.position == 1
    assert client.meter.peaks["update"] <= weights + 12 * CHUNK


def test_micro_batches_need_less():
    whole, micro = (peaks_of(client_micro_batch=size) for size in (0, 2))
    client, _ = make()
    activations = 32 * 64 * 64 * 4
    weights = sum(p.nbytes for p in client.submodel.parameters())
    for kind in whole:
        assert micro[kind] < weights + 3 * activations < whole[kind], kind


@pytest.mark.parametrize("codec", ["exact", "fp16", "int8"])
def test_micro_batches_give_the_same_activations(codec):
    replies = []
    for micro_batch in (0, 5, 64):
        client, at = make(codec=codec, client_micro_batch=micro_batch)
        probe = Probe(**at, batch=0, seed=7, coefficient=0.1)
        replies.append(list(client.answer([Forward(**at, batch=0), probe])))
    for other in replies[1:]:
        for a, b in zip(replies[0], other, strict=True):
            assert a.activations.dtype == b.activations.dtype
            close = {"atol": 1.01 if codec == "int8" else 1e-3, "rtol": 1e-3}
            assert torch.allclose(a.activations.float(), b.activations.float(), **close)
            assert torch.allclose(a.scales, b.scales)
            assert torch.equal(a.labels, b.labels)


def test_micro_batches_give_the_same_scalars_and_the_same_change():
    results = []
    for micro_batch in (0, 5):
        client, at = make(client_micro_batch=micro_batch, client_trainable="blocks")
        before = client.state.weights()
        requests = [probe_request(client, at), probe_request(client, at, LocalTrain)]
        scalars, change = (next(client.answer([r])) for r in requests)
        assert torch.equal(client.state.weights(), before)
        results.append((scalars.scalars, decode_update(client.state.rows, change)))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-3)
    assert results[0][1].abs().max() > 0
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-3, atol=1e-7)


def test_a_forgotten_anchor_is_computed_again():
    client, at = make()
    request = probe_request(client, at)
    (first,) = client.answer([request])
    (again,) = client.answer([request])  # the anchor went with the first answer
    assert torch.equal(first.scalars, again.scalars)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("perturbation", ["rank1", "signs", "gaussian"])
def test_probing_leaves_every_bit_of_the_weights(dtype, perturbation):
    client, at = make(dtype=dtype, perturbation=perturbation, batch_size=2, max_length=16)
    before = {name: p.clone() for name, p in client.state.parameters.items()}
    list(client.answer([Probe(**at, batch=0, seed=3, coefficient=0.1), probe_request(client, at)]))
    for name, parameter in client.state.parameters.items():
        assert torch.equal(parameter, before[name]), name


def test_the_inner_product_does_not_cancel():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(4, 8, 768, generator=generator) * 10
    shifted = h + 1e-4 * torch.randn(h.shape, generator=generator)
    gradient = torch.randn(h.shape, generator=generator)
    cut = Cotangent(gradient, torch.empty(0), 1.0)
    expected = float(((shifted.double() - h.double()) * gradient.double()).sum())
    assert cut.inner([(0, shifted)]) - cut.inner([(0, h)]) == pytest.approx(expected, rel=1e-9)
    assert cut.inner((i, shifted[i : i + 1]) for i in range(4)) == pytest.approx(
        cut.inner([(0, shifted)]), rel=1e-12
    )
    scaled = Cotangent((gradient / 2).bfloat16(), torch.empty(0), 2.0)
    rounded = (gradient / 2).bfloat16().float() * 2
    assert scaled.inner([(0, h)]) == pytest.approx(
        float((h.double() * rounded.double()).sum()), rel=1e-12
    )


def test_parts_are_put_together_without_a_copy_of_a_single_one():
    one = torch.arange(6.0).view(3, 2)
    (whole,) = put_together([(0, [one])], 3)
    assert whole.data_ptr() == one.data_ptr()
    whole, empty = put_together([(0, [one[:2], one[:0]]), (2, [one[2:], one[:0]])], 3)
    assert torch.equal(whole, one)
    assert empty.numel() == 0
