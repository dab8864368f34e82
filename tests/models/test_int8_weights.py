"""models/int8_weights.py: an 8-bit base is close to float, a quarter of its bytes, and trains
exactly."""

import sys
from dataclasses import replace

import pytest
import torch
from specs import client_spec

from hosl_flower.client.client import Client
from hosl_flower.config.parse import parse_config
from hosl_flower.errors import ConfigError
from hosl_flower.ledger.ledger import Entry
from hosl_flower.ledger.new_state import new_state
from hosl_flower.models.base_model import open_base
from hosl_flower.models.int8_weights import to_int8
from hosl_flower.models.lora import Lora, is_adapter
from hosl_flower.models.split import load_client
from hosl_flower.models.submodels import trainable_parameters
from hosl_flower.tensors.memory import LiveTensors
from hosl_flower.zo.perturbed import perturbed

LORA = Lora(rank=4, alpha=16.0, targets=("q_proj", "v_proj"), seed=0)
SPEC = client_spec(client_trainable="lora", client_quantization="int8")
IDS = torch.randint(3, 5000, (3, 10), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)


def load(quantization, dtype=torch.float32):
    pytest.importorskip("torchao")
    return load_client(open_base("random:opt-tiny"), 2, dtype, "cpu", LORA, quantization)


def stored_bytes(tensor):
    if hasattr(tensor, "qdata"):
        return tensor.qdata.nbytes + tensor.scale.nbytes
    return tensor.nbytes


def test_a_matrix_is_near_in_every_row_whatever_the_chunks(monkeypatch):
    pytest.importorskip("torchao")
    weight = torch.randn(50, 33, generator=torch.Generator().manual_seed(0))
    whole = to_int8(weight, torch.float32, "cpu")
    # one of 255 levels over +-max: never further than half a level
    level = weight.abs().amax(1, keepdim=True) / 127
    assert ((whole.dequantize() - weight).abs() <= 0.51 * level).all()
    monkeypatch.setattr("hosl_flower.models.int8_weights._ROWS_ELEMENTS", 70)
    chunked = to_int8(weight, torch.float32, "cpu")
    assert torch.equal(chunked.dequantize(), whole.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_is_close_and_the_base_a_quarter(dtype):
    plain, small = load("none"), load("int8", dtype)
    with torch.no_grad():
        expected, activations = plain(IDS, MASK), small(IDS, MASK)
    assert activations.dtype == dtype
    error = (activations.float() - expected).norm() / expected.norm()
    assert 0 < error < (0.02 if dtype == torch.float32 else 0.03)
    assert list(small.canonical_parameters()) == list(plain.canonical_parameters())
    matrices = [n for n, p in small.canonical_parameters().items() if hasattr(p, "qdata")]
    assert len(matrices) == 2 * 6 + 1  # two blocks, the token embedding
    held, full = (
        sum(stored_bytes(side.canonical_parameters()[n]) for n in matrices)
        for side in (small, plain)
    )
    assert held / full == pytest.approx(0.25, abs=0.02)
    adapters = {p.dtype for n, p in small.canonical_parameters().items() if is_adapter(n)}
    assert adapters == {torch.float32}


def test_the_meter_counts_codes_and_scales_not_the_floats_they_stand_for():
    submodel, live = load("int8"), LiveTensors()
    live.hold(submodel.parameters())
    assert live.live_bytes == sum(stored_bytes(p.data) for p in submodel.parameters())


def test_a_lookup_widens_its_own_rows_only():
    embedding = load("int8").decoder.embed_tokens
    assert torch.equal(embedding(IDS), embedding.weight.dequantize()[IDS])


def test_a_probe_of_adapters_is_a_forward_with_moved_adapters():
    submodel = load("int8")
    state = new_state(submodel, SPEC)
    for n, p in state.parameters.items():
        p.data.add_(state.layout.draw(1).dense(n), alpha=0.1)
    direction = state.layout.draw(3)
    with perturbed(state.parameters, direction, 0.05):
        probed = submodel(IDS, MASK)
    for n, p in state.parameters.items():
        p.data.add_(direction.dense(n), alpha=0.05)
    with torch.no_grad():
        assert torch.allclose(probed, submodel(IDS, MASK), atol=1e-5)


def test_adapters_train_and_replay_bit_for_bit():
    entries = [Entry(t, (2 * t, 2 * t + 1), (0.5, -1.75), 1e-2) for t in range(1, 4)]
    activations = []
    for _ in range(2):
        submodel = load("int8")
        before = {n: p.clone() for n, p in trainable_parameters(submodel, "lora").items()}
        state = new_state(submodel, SPEC)
        state.apply(entries)
        assert set(state.parameters) == set(before)
        assert all((p != before[n]).any() for n, p in state.parameters.items())
        with torch.no_grad():
            activations.append((submodel(IDS, MASK), state.mark().fingerprint))
    assert torch.equal(activations[0][0], activations[1][0])
    assert activations[0][1] == activations[1][1]


def test_the_key_needs_adapters_and_is_part_of_the_run():
    with pytest.raises(ConfigError, match="client-trainable = lora"):
        parse_config({"client-quantization": "int8"})
    parse_config({"client-quantization": "int8", "client-trainable": "lora"})
    assert SPEC.genesis != replace(SPEC, client_quantization="none").genesis


def test_a_client_without_torchao_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match=r"pip install 'hosl-flower\[quant\]'"):
        Client(SPEC)
