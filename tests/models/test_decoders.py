"""Every model family: what an adapter must satisfy to be split, trained and saved."""

import json

import pytest
import torch
from decoders import FULL, IDS, PADDED, TINY, halves, whole_logits
from decoders import saved as saved  # a fixture
from gradients import both
from peft import PeftModel
from runs import run_factory
from transformers import AutoModelForCausalLM, PhiConfig

from hosl_flower.errors import ConfigError
from hosl_flower.gradients.recompute import recomputed_gradients
from hosl_flower.gradients.residual import fed_back
from hosl_flower.models.architectures import ARCHITECTURES, architecture
from hosl_flower.models.base_model import open_base
from hosl_flower.models.batch import Batch
from hosl_flower.models.families.base import HEAD
from hosl_flower.models.families.decoders import FAMILIES
from hosl_flower.models.families.registry import embedding_name, family_of
from hosl_flower.models.lora import Lora, save_adapters
from hosl_flower.models.processors import load_tokenizer
from hosl_flower.models.save_merged import save_merged
from hosl_flower.models.split import client_skeleton, load_client, server_skeleton
from hosl_flower.models.submodels import count, trainable_parameters
from hosl_flower.tensors.cut_gradient import Cotangent
from strategies.ho_sfl import HoSfl


def test_every_family_has_a_tiny_model():
    assert {ARCHITECTURES[name]["model_type"] for name in TINY} == FAMILIES.keys()


@pytest.mark.parametrize("name", TINY)
def test_split_equals_unsplit(saved, name):
    directory, model = saved(name)
    for cut in range(model.config.num_hidden_layers + 1):
        client, server = halves(directory, cut)
        for mask in (FULL, PADDED):
            whole = whole_logits(model, mask)
            with torch.no_grad():
                logits = server(client(IDS, mask), mask.bool())
            tokens = mask.bool()
            assert torch.allclose(logits[tokens], whole[tokens], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_padding_shifts_nothing(saved, name):
    directory, _ = saved(name)
    client, server = halves(directory, 2)
    with torch.no_grad():
        padded = server(client(IDS, PADDED), PADDED)[2, 21:]
        alone = server(client(IDS[2:, 21:], FULL[2:, 21:]), FULL[2:, 21:])[0]
    assert torch.allclose(padded, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_sides_share_nothing_and_merge_into_what_transformers_loads(saved, name, tmp_path):
    directory, model = saved(name)
    base = open_base(str(directory))
    client, server = halves(directory, 2)
    names = [set(side.canonical_parameters()) for side in (client, server)]
    assert names[0] | names[1] == {*dict(model.named_parameters()), HEAD}
    assert not names[0] & names[1]
    with torch.no_grad():  # as training does, which unties the head from the embedding
        client.canonical_parameters()[embedding_name(model.config)].add_(0.1)
    with torch.no_grad():
        expected = server(client(IDS, PADDED), PADDED)
    tensors = client.merged_parameters(), server.merged_parameters()
    save_merged(tmp_path / "merged", base, *tensors, load_tokenizer("random:any"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    logits = whole_logits(loaded, PADDED)
    tokens = PADDED.bool()
    assert torch.allclose(logits[tokens], expected[tokens], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", TINY)
def test_blocks_one_by_one_have_the_gradient_of_back_propagation(saved, name):
    client, _ = halves(saved(name)[0], 3)
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn((3, 24, 64), generator=generator) * PADDED.unsqueeze(2)
    cotangent = Cotangent(gradient, torch.empty(3, 0), 1.0)
    batch = Batch(IDS, PADDED, torch.zeros(3, dtype=torch.int64))
    own, exact = both(recomputed_gradients, client, batch, cotangent)
    assert own.keys() == exact.keys()
    for key, expected in exact.items():
        scale = expected.abs().max()
        assert (own[key] - expected).abs().max() <= 1e-4 * scale, key


@pytest.mark.parametrize(("name", "targets"), [("gpt2-tiny", "c_attn"), ("qwen3-tiny", "q_proj")])
def test_adapters_merge_and_load_in_peft(saved, name, targets, tmp_path):
    directory, model = saved(name)
    lora = Lora(2, 8.0, (targets,), seed=5)
    client, server = halves(directory, 2, lora)
    adapters = {**trainable_parameters(client, "lora"), **trainable_parameters(server, "lora")}
    assert len(adapters) == 2 * 4
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(0, 0.3, generator=generator)
        expected = server(client(IDS, FULL), FULL)
    tokenizer = load_tokenizer("random:any")
    transposed = family_of(model.config).transposed
    save_adapters(tmp_path / "a", str(directory), lora, adapters, tokenizer, transposed)
    tensors = client.merged_parameters(), server.merged_parameters()
    save_merged(tmp_path / "merged", open_base(str(directory)), *tensors, tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    plain = AutoModelForCausalLM.from_pretrained(directory).eval()
    for loaded in (merged, PeftModel.from_pretrained(plain, tmp_path / "a").eval()):
        with torch.no_grad():
            logits = loaded(input_ids=IDS, attention_mask=FULL).logits
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-3)


def test_a_checkpoint_of_the_bare_gpt2_has_other_names_and_the_same_weights(saved):
    directory, model = saved("gpt2-tiny")
    model.transformer.save_pretrained(directory)  # as GPT-2's own checkpoint on the hub
    client, server = halves(directory, 1)
    assert open_base(str(directory)).source.blocks() == 4
    with torch.no_grad():
        logits = server(client(IDS, FULL), FULL)
    assert torch.allclose(logits, whole_logits(model, FULL), rtol=1e-4, atol=1e-4)


# parameters as published, the tied head counted once
PUBLISHED = [  # model, cut (HO-SFL's where it has one), parameters
    ("llama-3.2-1b", 8, 1_235_814_400),
    ("qwen2.5-0.5b", 5, 494_032_768),
    ("qwen3-0.6b", 5, 596_049_920),
    ("gemma-3-270m", 5, 268_098_176),
    ("gemma-3-1b-pt", 5, 999_885_952),
]


@pytest.mark.parametrize(("name", "cut", "size"), PUBLISHED)
def test_published_sizes(name, cut, size):
    config = architecture(name)
    sides = client_skeleton(config, cut), server_skeleton(config, cut)
    total = sum(count(side.canonical_parameters()) for side in sides)
    assert total == size + config.vocab_size * config.hidden_size
    blocks = [name for name in sides[0].canonical_parameters() if ".layers." in name]
    assert len({name.split(".layers.")[1].split(".")[0] for name in blocks}) == cut


@pytest.mark.parametrize("name", ["gpt2-tiny", "gemma3-tiny"])
def test_runs_train_and_replay(tiny_opt, tmp_path, name):
    run = run_factory(HoSfl, tiny_opt, tmp_path, model=f"random:{name}")
    keys = {"num_clients": 3, "clients_per_step": 2, "steps": 8, "eval_every": 8}
    results, directory, _ = run(**keys, server_learning_rate=1e-3, server_optimizer="adamw")
    first, last = results.evaluations[0], results.evaluations[-1]
    assert last["loss"] < first["loss"]
    assert json.loads((directory / "results.json").read_text())["fingerprint"]  # as the clients'
    AutoModelForCausalLM.from_pretrained(directory / "model")


def test_what_does_not_fit_a_family_is_said_in_a_line(saved):
    with pytest.raises(ConfigError, match=r"'phi' is not supported; supported: gemma3_text, gpt2"):
        family_of(PhiConfig())
    capped = architecture("gemma3-tiny")
    capped.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="caps its logits"):
        family_of(capped)
    client, _ = halves(saved("gemma3-tiny")[0], 1)
    with pytest.raises(ConfigError, match="use recompute"):
        fed_back(client, trainable_parameters(client, "full"))
    base = open_base(str(saved("gpt2-tiny")[0]))
    with pytest.raises(ConfigError, match="client-quantization = int8 is not for gpt2"):
        load_client(base, 1, torch.float32, "cpu", Lora(2, 8.0, ("c_attn",), 0), "int8")
    with pytest.raises(ConfigError, match=r"'q_proj' matches no linear module .* c_attn, c_fc"):
        halves(base.model, 1, Lora(2, 8.0, ("q_proj",), 0))
