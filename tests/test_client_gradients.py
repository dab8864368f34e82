"""The ways a client comes by a gradient of its half: each against what it must equal."""

from contextlib import contextmanager

import pytest
import torch
from specs import client_spec

from hosl_flower.architectures import architecture
from hosl_flower.backprop import gradients
from hosl_flower.client import new_state
from hosl_flower.errors import ConfigError
from hosl_flower.feedback import residual_parts, trained_parts
from hosl_flower.lora import Lora
from hosl_flower.recompute import recomputed_gradients
from hosl_flower.residual import fed_back, residual_gradients
from hosl_flower.split import Base, client_skeleton, load_client, open_base, trainable_parameters
from hosl_flower.surrogate import Cotangent
from hosl_flower.tasks import Batch

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


def both(compute, client, batch, cotangent, trainable="full", micro_batch=0):
    parameters = trainable_parameters(client, trainable)
    exact = dict(gradients(client, parameters, batch, cotangent))
    own = {}
    for name, gradient in compute(client, parameters, batch, cotangent, micro_batch):
        assert name not in own
        own[name] = gradient.to_dense() if gradient.is_sparse else gradient
        assert own[name].dtype == torch.float32
    return own, exact


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


def only_fed_back(client, parameters, *rest):
    chosen = {name: parameters[name] for name in fed_back(client, parameters)}
    return residual_gradients(client, chosen, *rest)


@pytest.mark.parametrize("micro_batch", [0, 1, 4])
def test_residual_feedback_is_exact_where_nothing_comes_after(micro_batch):
    own, exact = both(only_fed_back, *problem(), micro_batch=micro_batch)
    for part in ("fc2", "fc1", "final_layer_norm", "self_attn.out_proj"):
        name = f"{part}.weight"
        assert torch.allclose(own[LAST + name], exact[LAST + name], rtol=1e-4, atol=1e-4)
    # with no block at all the embeddings are all there is
    own, exact = both(only_fed_back, *problem(cut=0), micro_batch=micro_batch)
    assert len(own) == 2
    for name, gradient in own.items():
        assert torch.allclose(gradient, exact[name], rtol=1e-4, atol=1e-4), name


def without_attention(client, index, batch, cotangent):
    """The gradient of <lambda, h''> over one block whose attention's output is a constant, and
    that of its h': by autograd, what the rule of a block says by hand."""
    block = client.decoder.layers[index]
    seen = []
    hooks = [
        block.self_attn.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        block.final_layer_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    with torch.no_grad():
        client(batch.input_ids, batch.attention_mask)
    for hook in hooks:
        hook.remove()
    o, h = seen[0].flatten(0, 1), seen[1]
    projected = block.self_attn.out_proj(o)
    stream = projected + (h - projected).detach()
    out = stream + block.fc2(torch.relu(block.fc1(block.final_layer_norm(stream))))
    names = [n for n, _ in block.named_parameters() if "q_proj" not in n and "k_proj" not in n]
    names = [n for n in names if "v_proj" not in n and "self_attn_layer_norm" not in n]
    wanted = [stream, *(block.get_parameter(n) for n in names)]
    before, *found = torch.autograd.grad(out, wanted, cotangent.payload.flatten(0, 1))
    return before, dict(zip(names, found, strict=True))


@pytest.mark.parametrize("model", ["gpt2-tiny", "llama-tiny", "qwen3-tiny"])
def test_the_rule_holds_for_other_activations_norms_and_gates(model):
    """As above, over transformers' own MLP: what comes after the attention, by autograd."""
    client, batch, cotangent = problem(cut=2, model=model)
    with torch.no_grad():  # norms and biases too must matter
        generator = torch.Generator().manual_seed(1)
        for parameter in client.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    own, exact = both(only_fed_back, client, batch, cotangent, micro_batch=4)
    parts, family = residual_parts(client), client.family
    blocks = client.decoder.get_submodule(family.blocks)
    for index in range(2):
        block, seen = blocks[index], []
        norm, attention = block.get_submodule(parts.norm), block.get_submodule(parts.attention)
        with hooked(seen, attention, norm), torch.no_grad():
            client(batch.input_ids, batch.attention_mask)
        o, h = seen
        stream = attention(o) + (h - attention(o)).detach()
        parameters = {f"{part}.{n}": p for part in trained_parts(parts)
                      for n, p in block.get_submodule(part).named_parameters()}  # fmt: skip
        found = torch.autograd.grad(
            stream + block.mlp(norm(stream)), list(parameters.values()), cotangent.payload
        )
        for name, gradient in zip(parameters, found, strict=True):
            name = client.canonical(f"decoder.{family.blocks}.{index}.{name}")
            scale = gradient.abs().max()
            assert (own[name] - gradient).abs().max() <= 1e-4 * scale, name
            if index == 1:  # nothing comes after: the whole gradient
                assert (own[name] - exact[name]).abs().max() <= 1e-3 * scale, name


@contextmanager
def hooked(seen, *modules):
    """The first argument of each module, once called."""
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_the_rule_of_a_block_sees_through_its_own_mlp_alone(micro_batch):
    client, batch, cotangent = problem(cut=2)
    own, _ = both(only_fed_back, client, batch, cotangent, micro_batch=micro_batch)
    for index in range(2):
        before, expected = without_attention(client, index, batch, cotangent)
        assert len(expected) == 8
        for name, gradient in expected.items():
            found = own[f"model.decoder.layers.{index}.{name}"]
            assert torch.allclose(found, gradient, rtol=1e-3, atol=1e-4), name
        if index == 0:
            before = before.view(6, 12, 64)
            token = int(batch.input_ids[5, 7])
            of_token = (batch.input_ids == token) & batch.attention_mask.bool()
            found = own["model.decoder.embed_tokens.weight"]
            assert torch.allclose(found[token], before[of_token].sum(0), rtol=1e-3, atol=1e-4)
            real = batch.input_ids[batch.attention_mask.bool()].unique()
            assert int((found.abs().sum(1) > 0).sum()) == len(real)


def test_residual_feedback_points_along_the_gradient():
    own, exact = both(only_fed_back, *problem())
    assert set(own) < set(exact)
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
    assert len(full) == 2 * 8 + 2
    assert len(blocks) == 2 * 8
    assert not any(f"{x}_proj" in name for name in blocks for x in "qkv")
    state = new_state(
        load_client(open_base("random:opt-tiny"), 2, torch.float32, "cpu"),
        client_spec(cut_layer=2, client_gradient="residual"),
    )
    assert list(state.parameters) == sorted(blocks)
    for cut, trainable in ((0, "blocks"), (1, "lora")):
        client = client_skeleton(
            architecture("opt-tiny"), cut, LORA if trainable == "lora" else None
        )
        with pytest.raises(ConfigError, match="client-trainable = full"):
            fed_back(client, trainable_parameters(client, trainable))


@pytest.mark.parametrize("compute", [recomputed_gradients, only_fed_back])
def test_16_bit_clients_sum_in_float32(compute):
    client, batch, cotangent = problem(dtype=torch.bfloat16)
    coarse, _ = both(compute, client, batch, cotangent, micro_batch=2)
    fine, _ = both(compute, *problem())
    for name, gradient in fine.items():
        error = (coarse[name] - gradient).norm() / gradient.norm()
        assert error < 0.1 or "k_proj.bias" in name, (name, float(error))
