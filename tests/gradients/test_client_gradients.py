"""The ways a client comes by a gradient of its half: each against what it must equal."""

import pytest
import torch
from gradients import both
from specs import client_spec

from hosl_flower.errors import ConfigError
from hosl_flower.gradients.exact import check_exact, exact_gradients
from hosl_flower.gradients.recompute import recomputed_gradients
from hosl_flower.gradients.residual import fed_back, residual_gradients
from hosl_flower.gradients.rules.attention import listening, through_attention
from hosl_flower.ledger.new_state import new_state
from hosl_flower.models.architectures import architecture
from hosl_flower.models.base_model import Base, open_base
from hosl_flower.models.batch import Batch
from hosl_flower.models.blockwise import Blocks
from hosl_flower.models.lora import Lora
from hosl_flower.models.split import client_skeleton, load_client
from hosl_flower.models.submodels import trainable_parameters
from hosl_flower.tensors.cut_gradient import Cotangent

LORA = Lora(4, 8.0, ("q_proj", "v_proj"), 0)
LAST = "model.decoder.layers.2."


def problem(cut=3, lora=None, dtype=torch.float32, model="opt-tiny"):
    client = load_client(open_base(f"random:{model}"), cut, dtype, "cpu", lora)
    generator = torch.Generator().manual_seed(0)
    if lora is not None:  # else the gradient of A is zero
        for name, parameter in client.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(generator=generator)
    ids = torch.randint(5, 40, (6, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[:3, :5] = 0
    gradient = torch.randn((6, 12, 64), generator=generator) * mask.unsqueeze(2)
    cotangent = Cotangent(gradient.to(dtype), torch.empty(6, 0), 1.0)
    return client, Batch(ids, mask, torch.zeros(6, dtype=torch.int64)), cotangent


@pytest.mark.parametrize("micro_batch", [0, 1, 4])
@pytest.mark.parametrize("trainable", ["full", "blocks", "lora"])
def test_recomputing_gives_the_gradient_of_back_propagation(trainable, micro_batch):
    problem_ = problem(lora=LORA if trainable == "lora" else None)
    own, exact = both(recomputed_gradients, *problem_, trainable, micro_batch)
    assert own.keys() == exact.keys()
    for name, gradient in exact.items():
        assert torch.allclose(own[name], gradient, rtol=1e-4, atol=1e-4), name
    assert all(p.grad is None for p in problem_[0].parameters())


def test_recomputing_works_for_post_norm_models_with_projected_embeddings():
    config = architecture("opt-tiny")
    config.do_layer_norm_before, config.word_embed_proj_dim = False, 32
    base = Base("x", config, open_base("random:opt-tiny").source, pretrained=False)
    client = load_client(base, 2, torch.float32, "cpu")
    _, batch, cotangent = problem()
    own, exact = both(recomputed_gradients, client, batch, cotangent)
    assert "model.decoder.project_in.weight" in own
    for name, gradient in exact.items():
        assert torch.allclose(own[name], gradient, rtol=1e-4, atol=1e-4), name
    with pytest.raises(ConfigError, match="pre-norm"):
        fed_back(client, trainable_parameters(client, "full"))
    with pytest.raises(ConfigError, match="pre-norm"):
        check_exact(client, trainable_parameters(client, "full"))


def only_fed_back(client, parameters, *rest):
    chosen = {name: parameters[name] for name in fed_back(client, parameters)}
    return residual_gradients(client, chosen, *rest)


ADAPTED = {"opt": ("q_proj", "v_proj", "fc1", "fc2"), "gpt2": ("c_attn", "c_proj", "c_fc")}
GATED = ("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = [f"{name}-tiny" for name in ("opt", "gpt2", "llama", "mistral", "qwen2", "qwen3")]


def shaken(model, cut, lora=None):
    """A problem of sequences longer than mistral-tiny's window, where norms and biases matter."""
    client, _, _ = problem(cut, model=model, lora=lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in client.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    ids = torch.randint(5, 40, (6, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[:3, :5] = 0
    gradient = torch.randn((6, 24, 64), generator=generator) * mask.unsqueeze(2)
    batch = Batch(ids, mask, torch.zeros(6, dtype=torch.int64))
    return client, batch, Cotangent(gradient, torch.empty(6, 0), 1.0)


def assert_same(own, exact):
    """But for OPT's key biases: softmax makes their gradient zero, so that both are rounding."""
    for name, gradient in exact.items():
        if name.endswith("k_proj.bias"):
            gradient = exact[name.replace("bias", "weight")]
            assert own[name].abs().max() <= gradient.abs().max()
            continue
        assert (own[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


@pytest.mark.parametrize("micro_batch", [0, 1, 4])
@pytest.mark.parametrize("model", FAMILIES)
def test_residual_feedback_is_exact_where_nothing_comes_after(model, micro_batch):
    own, exact = both(only_fed_back, *shaken(model, 1), micro_batch=micro_batch)
    assert own.keys() == exact.keys()
    assert_same(own, exact)
    if micro_batch == 0:  # with no block at all the embeddings are all there is
        own, exact = both(only_fed_back, *shaken(model, 0))
        assert len(own) == (2 if model in ("opt-tiny", "gpt2-tiny") else 1)
        assert_same(own, {name: exact[name] for name in own})


@pytest.mark.parametrize("model", FAMILIES)
def test_residual_feedback_of_adapters_is_exact_where_nothing_comes_after(model):
    lora = Lora(4, 8.0, ADAPTED.get(model.removesuffix("-tiny"), GATED), 0)
    own, exact = both(only_fed_back, *shaken(model, 1, lora), "lora", 4)
    assert own.keys() == exact.keys()
    for name, gradient in exact.items():
        assert (own[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_residual_feedback_of_adapters_over_8_bits():
    pytest.importorskip("torchao")
    client = load_client(open_base("random:opt-tiny"), 1, torch.float32, "cpu", LORA, "int8")
    _, batch, cotangent = problem()
    own, exact = both(only_fed_back, client, batch, cotangent, "lora")
    assert any(float(gradient.abs().max()) > 0 for gradient in exact.values())
    for name, gradient in exact.items():
        # in the forward pass torchao may quantise what it multiplies, too
        assert (own[name] - gradient).abs().max() <= 2e-2 * gradient.abs().max(), name


@pytest.mark.parametrize("model", FAMILIES)
def test_every_block_takes_the_gradient_at_the_cut_for_its_own(model):
    """Against autograd of each block by itself."""
    client, batch, cotangent = shaken(model, 2)
    own, _ = both(only_fed_back, client, batch, cotangent, micro_batch=4)
    blocks = Blocks(client)
    hidden, arguments = blocks.enter(batch.inputs, batch.attention_mask)
    for index in range(2):
        parameters = dict(blocks.parameters(index))
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            output = blocks.run(index, hidden, arguments)
        wanted = [hidden, *parameters.values()]
        before, *found = torch.autograd.grad(output, wanted, cotangent.payload)
        assert_same(own, dict(zip(parameters, found, strict=True)))
        if index == 0:
            token = int(batch.input_ids[5, 7])
            of_token = (batch.input_ids == token) & batch.attention_mask.bool()
            name = client.canonical(f"decoder.{client.family.embedding}.weight")
            assert torch.allclose(own[name][token], before[of_token].sum(0), rtol=1e-3, atol=1e-4)
            real = batch.input_ids[batch.attention_mask.bool()].unique()
            assert int((own[name].abs().sum(1) > 0).sum()) == len(real)
        hidden = output


@pytest.mark.parametrize("most", [1, 300, 2**19])
@pytest.mark.parametrize("masked", ["causal", "boolean", "added"])
def test_attention_back_by_hand(monkeypatch, most, masked):
    """Against autograd of torch's own, however few sequences and heads are in work at a time."""
    monkeypatch.setattr("hosl_flower.gradients.rules.attention._SCORES", most)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, 7, 4, generator=generator).requires_grad_()
    key, value = (torch.randn(3, 2, 7, 4, generator=generator).requires_grad_() for _ in "kv")
    seen = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
    seen[0, :, :, :2] = False  # padding, which itself sees nothing
    d = torch.randn(3, 6, 7, 4, generator=generator)
    if masked == "causal":
        mask = None
    elif masked == "boolean":
        mask = seen
        d[0, :, :2] = 0.0
    else:
        mask = torch.randn(3, 6, 7, 7, generator=generator)
    repeated = [t.repeat_interleave(3, 1) for t in (key, value)]
    with listening(2 * 4) as heard:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, *repeated, attn_mask=mask, is_causal=mask is None, scale=0.3
        )
    assert heard[0].key.shape == key.shape
    assert torch.equal(heard[0].value, value)
    expected = torch.autograd.grad(out, (query, key, value), d)
    for found, gradient in zip(through_attention(heard[0], d), expected, strict=True):
        assert torch.allclose(found, gradient.nan_to_num(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [0, 1, 4])
@pytest.mark.parametrize("model", FAMILIES)
def test_the_rules_give_the_gradient_of_back_propagation(model, micro_batch):
    own, exact = both(exact_gradients, *shaken(model, 3), micro_batch=micro_batch)
    assert own.keys() == exact.keys()
    assert_same(own, exact)


@pytest.mark.parametrize("model", FAMILIES)
def test_the_rules_give_the_gradient_of_adapters(model):
    lora = Lora(4, 8.0, ADAPTED.get(model.removesuffix("-tiny"), GATED), 0)
    own, exact = both(exact_gradients, *shaken(model, 3, lora), "lora", 4)
    assert own.keys() == exact.keys()
    for name, gradient in exact.items():
        assert (own[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_the_rules_give_the_gradient_of_adapters_over_8_bits():
    pytest.importorskip("torchao")
    client = load_client(open_base("random:opt-tiny"), 3, torch.float32, "cpu", LORA, "int8")
    _, batch, cotangent = problem()
    own, exact = both(exact_gradients, client, batch, cotangent, "lora")
    for name, gradient in exact.items():
        assert (own[name] - gradient).abs().max() <= 5e-2 * gradient.abs().max(), name


def test_a_stage_runs_a_block_only_as_far_as_it_must(monkeypatch):
    """Weights that a stage has handed out may have changed before the next stage runs."""
    client, batch, cotangent = shaken("llama-tiny", 2)
    parameters = trainable_parameters(client, "full")
    exact = dict(exact_gradients(client, parameters, batch, cotangent))
    exact = {n: g.to_dense() if g.is_sparse else g for n, g in exact.items()}
    with torch.no_grad():
        for name, gradient in exact_gradients(client, parameters, batch, cotangent):
            assert torch.equal(gradient.to_dense() if gradient.is_sparse else gradient, exact[name])
            parameters[name].fill_(float("nan"))


def test_the_rules_refuse_what_they_do_not_know():
    client = load_client(open_base("random:opt-tiny"), 2, torch.float32, "cpu")
    check_exact(client, trainable_parameters(client, "full"))
    client.decoder.layers[1].register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ConfigError, match=r"no rule for .*layers\.1\.extra; use client-gradient"):
        check_exact(client, trainable_parameters(client, "full"))


def test_residual_feedback_points_along_the_gradient():
    own, exact = both(only_fed_back, *problem())
    assert own.keys() == exact.keys()
    similar = {
        name: float(torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0))
        for name, gradient in own.items()
    }
    # chance would give cosines of 0.01; embeddings have all blocks behind them
    assert min(v for name, v in similar.items() if "weight" in name) > 0.25, similar
    assert sum(similar.values()) / len(similar) > 0.7, similar


def test_the_parameters_residual_feedback_trains():
    client = client_skeleton(architecture("opt-tiny"), 2)
    full = fed_back(client, trainable_parameters(client, "full"))
    blocks = fed_back(client, trainable_parameters(client, "blocks"))
    assert len(full) == 2 * 16 + 2
    assert len(blocks) == 2 * 16
    state = new_state(
        load_client(open_base("random:opt-tiny"), 2, torch.float32, "cpu"),
        client_spec(cut_layer=2, client_gradient="residual"),
    )
    assert list(state.parameters) == sorted(blocks)
    client = client_skeleton(architecture("opt-tiny"), 2, LORA)
    assert len(fed_back(client, trainable_parameters(client, "lora"))) == 2 * 2 * 2
    client = client_skeleton(architecture("opt-tiny"), 0)
    with pytest.raises(ConfigError, match="client-trainable = full"):
        fed_back(client, trainable_parameters(client, "blocks"))


@pytest.mark.parametrize("compute", [recomputed_gradients, exact_gradients, only_fed_back])
def test_16_bit_clients_sum_in_float32(compute):
    client, batch, cotangent = problem(dtype=torch.bfloat16)
    coarse, _ = both(compute, client, batch, cotangent, micro_batch=2)
    fine, _ = both(compute, *problem())
    for name, gradient in fine.items():
        error = (coarse[name] - gradient).norm() / gradient.norm()
        assert error < 0.1 or "k_proj.bias" in name, (name, float(error))
