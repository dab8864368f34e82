"""models/lora.py: adapters on both sides equal peft on the whole model; same start everywhere."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hosl_flower.errors import ConfigError
from hosl_flower.models.architectures import architecture
from hosl_flower.models.base_model import open_base
from hosl_flower.models.lora import Lora, save_adapters
from hosl_flower.models.processors import load_tokenizer
from hosl_flower.models.save_merged import save_merged
from hosl_flower.models.split import client_skeleton, load_client, load_server
from hosl_flower.models.submodels import count, trainable_parameters
from hosl_flower.server.trainer import ServerTrainer
from hosl_flower.tasks.answer_words import AnswerWords
from hosl_flower.zo.directions import DISTRIBUTIONS, Layout
from hosl_flower.zo.perturbed import perturbed

LORA = Lora(rank=2, alpha=8.0, targets=("q_proj", "v_proj"), seed=5)
EVERYWHERE = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
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
@pytest.mark.parametrize("targets", [LORA.targets, EVERYWHERE, ("self_attn.k_proj",)])
def test_both_sides_together_are_peft_on_the_whole_model(tiny_opt, targets, cut):
    directory, model = tiny_opt()
    config = LoraConfig(r=2, lora_alpha=8, target_modules=list(targets))
    whole = get_peft_model(copy.deepcopy(model), config).eval()
    client, server = halves(directory, cut, lora=Lora(2, 8.0, targets, 5))
    adapters = fill(client, server)
    theirs = dict(whole.named_parameters())
    assert len(adapters) == 3 * len(targets) * 2
    for name, adapter in adapters.items():
        full = f"base_model.model.{name}".replace(".weight", ".default.weight")
        theirs[full].data.copy_(adapter)
    with torch.no_grad():
        expected = whole(IDS, attention_mask=MASK).logits
        assert torch.allclose(server(client(IDS, MASK), MASK), expected, atol=1e-5)
        assert not torch.allclose(expected, model(IDS, attention_mask=MASK).logits, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_change_nothing(tiny_opt, dtype):
    directory, _ = tiny_opt()
    plain, plain_server = halves(directory, dtype=dtype, lora=None)
    client, server = halves(directory, dtype=dtype)
    with torch.no_grad():
        activations = client(IDS, MASK)
        assert torch.equal(activations, plain(IDS, MASK))
        h = activations.float()
        assert torch.equal(server(h, MASK), plain_server(h, MASK))


def test_only_adapters_get_a_gradient(tiny_opt):
    directory, _ = tiny_opt()
    sides = halves(directory)
    fill(*sides)
    client, server = sides
    server(client(IDS, MASK), MASK).square().sum().backward()
    for side in sides:
        reached = {n for n, p in side.canonical_parameters().items() if p.grad is not None}
        assert reached == set(trainable_parameters(side, "lora"))
    plain, _ = halves(directory, lora=None)
    assert all(p.requires_grad for p in plain.parameters())


def test_peft_is_imported_only_where_adapters_are():
    code = "import sys, hosl_flower.models.split; sys.exit('peft' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


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
    with torch.no_grad():
        plain = client(IDS, MASK).float()
    with perturbed(adapters, direction, 0.05):
        probed = client(IDS, MASK).float()
    for name, adapter in adapters.items():
        adapter.data.add_(direction.dense(name), alpha=0.05)
    with torch.no_grad():
        written = client(IDS, MASK).float()
    tokens = MASK.bool()
    assert (written - plain)[tokens].abs().max() > 0.3
    # adapters are float32 also beside bfloat16 weights: at most a last bit (1/64 at 2..4) differs
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    assert (probed - written)[tokens].abs().max() <= tolerance


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
    server = ServerTrainer(submodel, AnswerWords([[5], [9]]), "sgd", 1e-2, trainable)
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


def test_a_merged_16_bit_client_is_saved_in_float32(tiny_opt, tmp_path):
    directory, _ = tiny_opt(vocab_size=50272)
    base = open_base(str(directory))
    client = load_client(base, 1, torch.bfloat16, "cpu", LORA)
    server = load_server(base, 1, torch.float32, "cpu")  # each side its own: no adapters here
    adapters = fill(client)
    tensors = client.merged_parameters(), server.merged_parameters()
    save_merged(tmp_path / "merged", base, *tensors, load_tokenizer(str(directory)))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == torch.float32
    name = "model.decoder.layers.0.self_attn.q_proj"
    a, b = (adapters[f"{name}.lora_{factor}.weight"] for factor in "AB")
    expected = client.canonical_parameters()[f"{name}.weight"].float() + 4.0 * (b @ a)
    assert torch.allclose(loaded.state_dict()[f"{name}.weight"], expected, atol=1e-6)
    assert set(loaded.state_dict()) == set(tensors[0]) | set(tensors[1])


def test_a_module_of_one_side_may_be_a_target(tiny_opt):
    directory, _ = tiny_opt(word_embed_proj_dim=8, do_layer_norm_before=False)
    client, server = halves(directory, lora=Lora(2, 8.0, ("q_proj", "project_in"), 0))
    assert "model.decoder.project_in.lora_A.weight" in trainable_parameters(client, "lora")
    assert len(trainable_parameters(server, "lora")) == 2 * 2


@pytest.mark.parametrize(
    ("targets", "cut", "complaint"),
    [
        (("query",), 1, r"lora-targets = 'query': 'query' matches no linear module.*k_proj"),
        (("q_proj", "vproj"), 1, r"'q_proj,vproj': 'vproj' matches no linear module"),
        (("q_proj", "embed_tokens"), 1, r"'embed_tokens' matches no linear module"),
        (("q_proj", "final_layer_norm"), 1, r"'final_layer_norm' matches no linear module"),
        (("q_proj",), 0, r"matches no module of the client .* no blocks; .* client-trainable"),
        (("q_proj",), 3, r"matches no module of the server .* no blocks; .* server-trainable"),
    ],
)
def test_targets_that_match_nothing_are_refused(tiny_opt, targets, cut, complaint):
    directory, _ = tiny_opt()
    with pytest.raises(ConfigError, match=complaint) as error:
        halves(directory, cut, lora=Lora(2, 8.0, targets, 0))
    assert "\n" not in str(error.value)
