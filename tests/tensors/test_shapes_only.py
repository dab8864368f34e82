"""Peaks found on shapes alone are those of the real thing."""

from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from specs import client_spec

from hosl_flower.client.client import Client
from hosl_flower.client.mini_batches import OneMiniBatch
from hosl_flower.ledger.ledger import Entry
from hosl_flower.models.batch import Batch
from hosl_flower.protocol.messages.activations import Forward, Probe
from hosl_flower.protocol.messages.gradients import LocalStep
from hosl_flower.protocol.messages.scalars import CutGradient
from hosl_flower.tensors.memory import Meter
from hosl_flower.tensors.shapes_only import shapes_only

BATCH, LENGTH = 8, 32


@cache
def loaded() -> Client:
    """One client for all tests: its tokenizer and data take longer than they do."""
    spec = client_spec(model="random:opt-tiny", cut_layer=2, batch_size=BATCH, max_length=LENGTH)
    return Client(spec, mini_batches=lambda pool, own: OneMiniBatch(pool, own, batch_of_shapes()))


def batch_of_shapes() -> Batch:
    """A mini-batch in which all tokens differ, two positions of each sequence padded."""
    batch = Batch(
        torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) + 5,
        torch.ones(BATCH, LENGTH, dtype=torch.int64),
        torch.zeros(BATCH, dtype=torch.int64),
    )
    batch.attention_mask[:, :2] = 0
    return batch


def peaks_of(traced: bool, **changes) -> dict[str, int]:
    """Peak tensor bytes by phase of all that a client may be asked to do in a step."""
    client = loaded()
    client.spec, client.meter = replace(client.spec, **changes), Meter("cpu")
    with shapes_only() if traced else nullcontext():
        client.reset()
        width, dtype = client.submodel.hidden_size, next(client.submodel.parameters()).dtype
        back = {
            "batch": 0, "gradient": torch.full((BATCH, LENGTH, width), 0.1, dtype=dtype),
            "scales": torch.empty(0), "scale": 1.0, "learning_rate": 1e-3,
        }  # fmt: skip
        at = {"step": 1, "partition": 0, "position": 0, "digest": client.state.digest}
        requests = [Probe(**at, batch=0, seed=11, coefficient=1e-3), Forward(**at, batch=0)]
        if client.spec.client_gradient == "backprop":
            more = {"directions": 2, "seeds": (11, 12), "epsilon": 1e-3}
            requests.append(CutGradient(**at, **back, **more))
        else:
            requests.append(LocalStep(**at, **back))
        for request in requests:
            list(client.answer([request]))
        if client.spec.client_gradient == "backprop":
            client.follower.apply([Entry(1, (11, 12), (0.5, -0.5), 1e-3)])
        return dict(client.meter.peaks)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"client_trainable": "full", "dtype": "bfloat16", "client_micro_batch": 3},
        {"client_trainable": "lora"},
        {"client_gradient": "residual", "client_trainable": "full"},
        {"client_gradient": "recompute", "client_trainable": "full"},
        {"client_gradient": "exact", "client_trainable": "full"},
    ],
    ids=["zo", "zo-bf16-micro", "zo-lora", "residual", "recompute", "exact"],
)
def test_traced_peaks_are_the_measured_ones(changes):
    defaults = {"client_trainable": "blocks", "dtype": "float32", "client_micro_batch": 0,
                "client_gradient": "backprop"}  # fmt: skip
    changes = {**defaults, **changes}
    changes["client_optimizer"] = "sgd" if changes["client_gradient"] == "backprop" else "adafactor"
    measured, traced = peaks_of(False, **changes), peaks_of(True, **changes)
    assert measured["forward"] > 0
    assert max(measured["probe"], measured["update"], measured["backward"]) > 0
    for phase, peak in measured.items():
        assert traced[phase] == pytest.approx(peak, rel=0.002), (phase, measured, traced)


def test_nothing_is_computed_or_allocated():
    with shapes_only():
        huge = torch.ones(1 << 30, 1 << 10)  # 4 TiB
        assert huge.matmul(huge.new_empty(1 << 10, 4)).shape == (1 << 30, 4)
        assert huge[:2, :3].unique().shape == (6,)
        assert bool((huge > 2).any())  # a scalar is 1, whatever it would be


def test_masks_select_all_there_is():
    with shapes_only():
        x = torch.zeros(3, 4)
        assert x[x > 1].shape == (12,)
        assert x.nonzero().shape == (12, 2)


def test_arrays_are_zeros():
    with shapes_only():
        assert torch.ones(2, 3).numpy().tolist() == [[0.0] * 3] * 2


def test_it_ends_with_its_context():
    with shapes_only():
        pass
    assert torch.ones(2).sum().item() == 2.0
