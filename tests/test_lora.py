"""lora.py: adapters on both sides equal peft on the whole model; same start everywhere."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hosl_flower.errors import ConfigError
from hosl_flower.families import architecture
from hosl_flower.lora import Lora, save_adapters
from hosl_flower.merge import save_merged
from hosl_flower.perturb import DISTRIBUTIONS, Layout
from hosl_flower.probe import perturbed
from hosl_flower.server import Server
from hosl_flower.split import (
    client_skeleton,
    count,
    load_client,
    load_server,
    open_base,
    trainable_parameters,
)
from hosl_flower.tasks import load_tokenizer

LORA = Lora(rank=2, alpha=8.0, targets=("q_proj", "v_proj"), seed=5)
IDS = torch.randint(3, 64, (3, 10), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0


def halves(directory, cut=1, dtype=torch.float32, lora=LORA):
    base = open_base(str(directory))
    client = load_client(base, cut, dtype, "cpu", lora)
    return client, load_server(base, cut, torch.float32, "cpu", lora)


def fill(*sides):
    """Adapters as after training: every element normal."""
    generator = torch.Generator().manual_seed(1)
    adapters = {n: p for side in sides for n, p in trainable_parameters(side, "lora").items()}
    for _, p in sorted(adapters.items()):
        p.data.normal_(0.0, 0.3, generator=generator)
    return adapters


@pytest.mark.parametrize("cut", [1, 2])
def test_both_sides_together_are_peft_on_the_whole_model(tiny_opt, cut):
    directory, model = tiny_opt()
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    whole = get_peft_model(copy.deepcopy(model), config).eval()
    client, server = halves(directory, cut)
    adapters = fill(client, server)
    theirs = dict(whole.named_parameters())
    assert len(adapters) == 3 * 2 * 2
    for name, adapter in adapters.items():
        full = f"base_model.model.{name}".replace(".weight", ".default.weight")
        theirs[full].data.copy_(adapter)
    with torch.no_grad():
        expected = whole(IDS, attention_mask=MASK).logits
        assert torch.allclose(server(client(IDS, MASK), MASK), expected, atol=1e-5)
        assert not torch.allclose(expected, model(IDS, attention_mask=MASK).logits, atol=1e-2)


def test_fresh_adapters_change_nothing(tiny_opt):
    directory, _ = tiny_opt()
    plain, _ = halves(directory, lora=None)
    client, _ = halves(directory)
    with torch.no_grad():
        assert torch.equal(client(IDS, MASK), plain(IDS, MASK))


def test_adapters_start_the_same_everywhere(tiny_opt):
    directory, _ = tiny_opt()
    state = torch.random.get_rng_state()
    (one, _), (other, _) = halves(directory, 1), halves(directory, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    mine, theirs = (trainable_parameters(side, "lora") for side in (one, other))
    assert set(mine) < set(theirs)
    for name, adapter in mine.items():
        assert torch.equal(adapter, theirs[name])
        bound = 1 / 16**0.5
        assert adapter.abs().max() <= bound
        assert bool(adapter.abs().max() > bound / 2) is (".lora_A." in name)
    changed, _ = halves(directory, 1, lora=Lora(2, 8.0, LORA.targets, 6))
    name = next(iter(mine))
    assert not torch.equal(mine[name], trainable_parameters(changed, "lora")[name])


def test_names_are_those_of_the_plain_model(tiny_opt):
    directory, model = tiny_opt()
    client, server = halves(directory)
    names = {**client.canonical_parameters(), **server.canonical_parameters()}
    base = {n for n in names if "lora_" not in n}
    assert base == {*dict(model.named_parameters()), "lm_head.weight"}
    assert sorted(set(names) - base)[:2] == [
        "model.decoder.layers.0.self_attn.q_proj.lora_A.weight",
        "model.decoder.layers.0.self_attn.q_proj.lora_B.weight",
    ]
    assert list(client.canonical_parameters()) == sorted(client.canonical_parameters())


@pytest.mark.parametrize(("cut", "elements"), [(3, 73_728), (5, 122_880)])
def test_counts_are_those_of_the_papers(cut, elements):
    skeleton = client_skeleton(architecture("opt-125m"), cut, Lora(8, 16.0, LORA.targets, 0))
    assert count(trainable_parameters(skeleton, "lora")) == elements


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_float32_beside_16_bit_weights(tiny_opt, dtype):
    directory, _ = tiny_opt()
    client, _ = halves(directory, dtype=dtype)
    assert {p.dtype for p in fill(client).values()} == {torch.float32}
    with torch.no_grad():
        assert client(IDS, MASK).dtype == dtype


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_probe_of_adapters_is_a_forward_with_moved_adapters(tiny_opt, distribution, dtype):
    directory, _ = tiny_opt()
    client, _ = halves(directory, dtype=dtype)
    adapters = fill(client)
    layout = Layout({n: p.shape for n, p in adapters.items()}, distribution)
    direction = layout.draw(3)
    with torch.no_grad(), perturbed(adapters, direction, 0.05):
        probed = client(IDS, MASK)
    for name, adapter in adapters.items():
        adapter.data.add_(direction.dense(name), alpha=0.05)
    with torch.no_grad():
        written = client(IDS, MASK)
    assert torch.allclose(
        probed.float(), written.float(), atol=1e-5 if dtype.itemsize == 4 else 0.1
    )


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("lora", lambda n: "lora_" in n),
        ("blocks", lambda n: ".layers." in n),
        ("full", lambda n: 1),
    ],
)
def test_the_server_trains_what_it_is_told(tiny_opt, trainable, expected):
    directory, _ = tiny_opt()
    _, submodel = halves(directory, lora=LORA if trainable == "lora" else None)
    server = Server(submodel, [5, 9], "sgd", 1e-2, trainable)
    names = {n for n, p in submodel.canonical_parameters().items() if p.requires_grad}
    assert names == {n for n in submodel.canonical_parameters() if expected(n)} - {"lm_head.weight"}
    assert server.answer_rows.requires_grad is (trainable == "full")


def test_merged_and_saved_adapters_are_the_split_model(tiny_opt, tmp_path):
    directory, _ = tiny_opt(vocab_size=50272)
    client, server = halves(directory)
    adapters = fill(client, server)
    tokenizer = load_tokenizer(str(directory))
    tensors = client.merged_parameters(), server.merged_parameters()
    save_merged(tmp_path / "merged", open_base(str(directory)), *tensors, tokenizer)
    save_adapters(tmp_path / "adapters", str(directory), LORA, adapters, tokenizer)
    with torch.no_grad():
        expected = server(client(IDS, MASK), MASK)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.allclose(plain(IDS, attention_mask=MASK).logits, expected, atol=1e-5)
        base = AutoModelForCausalLM.from_pretrained(directory)
        peft = PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
        assert torch.allclose(peft(IDS, attention_mask=MASK).logits, expected, atol=1e-5)
    saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["target_modules"]) == (
        2,
        8.0,
        ["q_proj", "v_proj"],
    )
    assert saved["base_model_name_or_path"] == str(directory)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("targets", "cut", "complaint"),
    [
        (("query",), 1, r"lora-targets = 'query' matches no module of the client submodel.*q_proj"),
        (("q_proj",), 0, r"of the client submodel; it holds no blocks at this cut"),
        (("q_proj",), 3, r"of the server submodel; it holds no blocks at this cut"),
    ],
)
def test_targets_that_match_nothing_are_refused(tiny_opt, targets, cut, complaint):
    directory, _ = tiny_opt()
    with pytest.raises(ConfigError, match=complaint):
        halves(directory, cut, lora=Lora(2, 8.0, targets, 0))
