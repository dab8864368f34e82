"""Text classifiers: what a family must satisfy to be split, trained and saved."""

import pytest
import torch
from encoders import (
    FULL,
    IDS,
    PADDED,
    TINY,
    TYPES,
    halves,
    left_padded,
    split_logits,
    whole_logits,
)
from encoders import saved as saved  # a fixture
from gradients import both
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
)

from hosl_flower.errors import ConfigError
from hosl_flower.gradients.recompute import recomputed_gradients
from hosl_flower.gradients.residual import fed_back
from hosl_flower.models.architectures import TEXT_ARCHITECTURES, architecture
from hosl_flower.models.base_model import open_base
from hosl_flower.models.batch import Batch
from hosl_flower.models.class_head import with_classes
from hosl_flower.models.families.encoders import TEXT_FAMILIES
from hosl_flower.models.lora import Lora
from hosl_flower.models.processors import load_tokenizer
from hosl_flower.models.save_merged import save_merged
from hosl_flower.models.split import client_skeleton, load_client, load_server, server_skeleton
from hosl_flower.models.submodels import count, trainable_parameters
from hosl_flower.tensors.cut_gradient import Cotangent
from hosl_flower.zo.directions import Layout
from hosl_flower.zo.perturbed import perturbed


def test_every_family_has_a_tiny_model():
    assert {TEXT_ARCHITECTURES[name]["model_type"] for name in TINY} == TEXT_FAMILIES.keys()


@pytest.mark.parametrize("name", TINY)
def test_split_equals_unsplit_at_every_cut(saved, name):
    directory, model = saved(name)
    for cut in range(model.config.num_hidden_layers + 1):
        client, server = halves(directory, cut)
        for mask in (FULL, PADDED):
            for typed in (False, True)[: 1 + (name == "bert-tiny")]:
                whole = whole_logits(model, mask, typed)
                own = split_logits(client, server, mask, typed)
                assert torch.allclose(own, whole, rtol=1e-4, atol=1e-4)
        rows = server.lm_head.weight[[4, 1]] + 0  # of two classes, with the biases of two
        server.lm_head.bias = torch.nn.Parameter(server.lm_head.bias[[4, 1]])
        with torch.no_grad():
            h = client(left_padded(PADDED), PADDED)
            answers = server.answer_logits(h, PADDED, rows)
        expected = whole_logits(model, PADDED)[:, [4, 1]]
        assert torch.allclose(answers, expected, rtol=1e-4, atol=1e-4)


def test_token_types_are_seen(saved):
    client, server = halves(saved("bert-tiny")[0], 2)
    plain, typed = (split_logits(client, server, FULL, given) for given in (False, True))
    assert (plain - typed).abs().max() > 1e-3


@pytest.mark.parametrize("name", TINY)
def test_padding_shifts_nothing(saved, name):
    client, server = halves(saved(name)[0], 2)
    padded = split_logits(client, server, PADDED)[2]
    with torch.no_grad():
        alone = server(client(IDS[2:, 21:], FULL[2:, 21:]), FULL[2:, 21:])[0, 0]
    assert torch.allclose(padded, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_sides_share_nothing_and_merge_into_what_transformers_loads(saved, name, tmp_path):
    directory, model = saved(name)
    client, server = halves(directory, 2)
    sides = [side.canonical_parameters() for side in (client, server)]
    assert sides[0].keys() | sides[1].keys() == dict(model.named_parameters()).keys()
    assert not sides[0].keys() & sides[1].keys()
    with torch.no_grad():
        for parameter in (*client.parameters(), *server.parameters()):
            parameter.add_(0.01)
    tensors = client.merged_parameters(), server.merged_parameters()
    base, tokenizer = open_base(str(directory)), load_tokenizer("random:any")
    save_merged(tmp_path / "merged", base, *tensors, tokenizer)
    loaded, told = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    found = whole_logits(loaded.eval(), PADDED)
    assert torch.allclose(found, split_logits(client, server, PADDED), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_a_head_for_other_classes_is_a_fresh_one(saved, name):
    directory, model = saved(name)
    base = open_base(str(directory))
    base.config.problem_type = "regression"
    same, fresh = with_classes(base, list("abcde"), 0)
    assert not fresh
    assert same.config.id2label == dict(enumerate("abcde"))
    assert same.config.problem_type is None
    seven, fresh = with_classes(base, list("abcdefg"), 0)
    assert fresh
    server = load_server(seven, 1, torch.float32, "cpu")
    assert server.lm_head.weight.shape == (7, 64)
    assert base.config.num_labels == 5
    given, own = dict(model.named_parameters()), server.canonical_parameters()
    for key in own.keys() - {server.family.head, server.canonical("lm_head.bias")}:
        assert torch.equal(own[key], given[key]), key  # the layer before it is the checkpoint's


@pytest.mark.parametrize("name", TINY)
def test_a_base_checkpoint_gets_a_head_drawn_by_the_seed_alone(saved, name, tmp_path):
    _, model = saved(name)
    with torch.random.fork_rng():
        published = AutoModelForMaskedLM.from_config(model.config)  # what the base models are
    published.base_model.load_state_dict(model.base_model.state_dict(), strict=False)
    published.save_pretrained(tmp_path / "base")
    base = open_base(str(tmp_path / "base"))
    assert base.source.blocks() == 4
    before = torch.get_rng_state()
    servers = []
    for seed, cut in ((4, 1), (4, 1), (5, 1)):
        headed, fresh = with_classes(base, ["a", "b", "c", "d", "e"], seed)  # as many as before
        assert fresh
        servers.append(load_server(headed, cut, torch.float32, "cpu").canonical_parameters())
    assert torch.equal(torch.get_rng_state(), before)
    family = TEXT_FAMILIES[model.config.model_type]
    heads = [key for key in servers[0] if key.startswith(family.heads)]
    assert len(heads) == 4  # weights and biases of two layers
    for key, first in servers[0].items():
        assert torch.equal(first, servers[1][key]), key
        drawn = key in heads and first.dim() == 2
        assert torch.equal(first, servers[2][key]) != drawn, key
        if drawn:
            assert float(first.detach().std()) == pytest.approx(0.06, rel=0.2), key


def test_old_names_and_those_of_a_bare_bert_are_read(saved, tmp_path):
    directory, model = saved("bert-tiny")
    bare = BertModel(model.config)
    bare.load_state_dict(model.bert.state_dict())
    bare.save_pretrained(directory)
    stored = load_file(directory / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        stored = {key.replace(new, name): tensor for key, tensor in stored.items()}
    stored["embeddings.position_ids"] = torch.arange(256).unsqueeze(0)  # as older versions saved
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    base, fresh = with_classes(open_base(str(directory)), list("abcde"), 0)
    assert fresh
    client, server = (f(base, 1, torch.float32, "cpu") for f in (load_client, load_server))
    given = dict(model.named_parameters())
    both_sides = {**client.canonical_parameters(), **server.canonical_parameters()}
    for key, tensor in both_sides.items():
        if not key.startswith("classifier."):  # the pooler is there
            assert torch.equal(tensor, given[key]), key


# parameters with two classes
PUBLISHED = {
    "bert-base-uncased": (BertConfig(), 109_483_778),
    "distilbert-base-uncased": (DistilBertConfig(), 66_955_010),
    "roberta-base": (architecture("roberta-base"), 124_647_170),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_on_the_meta_device(name):
    config, expected = PUBLISHED[name]
    for cut in (0, 5, config.num_hidden_layers):
        sides = client_skeleton(config, cut), server_skeleton(config, cut)
        assert all(p.is_meta for side in sides for p in side.parameters())
        assert sum(count(side.canonical_parameters()) for side in sides) == expected
    assert sides[0].hidden_size == 768
    assert not trainable_parameters(sides[1], "blocks")


def test_what_is_trained():
    client = client_skeleton(architecture("bert-tiny"), 1)
    full, blocks = (trainable_parameters(client, kind) for kind in ("full", "blocks"))
    assert all(name.startswith("bert.embeddings.") for name in full.keys() - blocks.keys())
    assert len(blocks) == 16
    assert len(full) == 16 + 5


@pytest.mark.parametrize("name", TINY)
def test_blocks_one_by_one_have_the_gradient_of_back_propagation(saved, name):
    client, _ = halves(saved(name)[0], 3)
    gradient = torch.randn((3, 24, 64), generator=torch.Generator().manual_seed(2))
    cotangent = Cotangent(gradient * PADDED.unsqueeze(2), torch.empty(3, 0), 1.0)
    inputs = left_padded(PADDED)
    if name == "bert-tiny":
        inputs = torch.stack([inputs, TYPES], 1)
    batch = Batch(inputs, PADDED, torch.zeros(3, dtype=torch.int64))
    own, exact = both(recomputed_gradients, client, batch, cotangent)
    assert own.keys() == exact.keys()
    for key, expected in exact.items():
        assert (own[key] - expected).abs().max() <= 1e-4 * expected.abs().max(), key


@pytest.mark.parametrize("name", TINY)
def test_a_probe_is_the_model_at_the_shifted_weights(saved, name):
    client, _ = halves(saved(name)[0], 2)
    parameters = client.canonical_parameters()
    direction = Layout({n: p.shape for n, p in parameters.items()}).draw(7)
    inputs = left_padded(PADDED)
    with perturbed(parameters, direction, 0.01):
        probed = client(inputs, PADDED)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.add_(direction.dense(key), alpha=0.01)
        shifted = client(inputs, PADDED)
    tokens = PADDED.bool()
    assert torch.allclose(probed[tokens], shifted[tokens], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "target"),
    [("bert-tiny", "query"), ("roberta-tiny", "query"), ("distilbert-tiny", "q_lin")],
)
def test_adapters_of_the_attention_merge(saved, name, target, tmp_path):
    directory, _ = saved(name)
    client, server = halves(directory, 2, Lora(2, 8.0, (target,), seed=5))
    adapters = {**trainable_parameters(client, "lora"), **trainable_parameters(server, "lora")}
    assert len(adapters) == 2 * 4
    before = split_logits(client, server, PADDED)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(0, 0.3, generator=generator)
    expected = split_logits(client, server, PADDED)
    assert not torch.allclose(before, expected, atol=1e-2)
    tensors = client.merged_parameters(), server.merged_parameters()
    base, tokenizer = open_base(str(directory)), load_tokenizer("random:any")
    save_merged(tmp_path / "merged", base, *tensors, tokenizer)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(whole_logits(merged, PADDED), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", TINY)
def test_a_client_in_16_bits(saved, name):
    directory, model = saved(name)
    client, server = halves(directory, 2, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in client.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        h = client(left_padded(PADDED), PADDED)
        logits = server(h.float(), PADDED)[:, 0]
    whole = whole_logits(model, PADDED)
    assert (logits - whole).abs().max() <= 0.1 * whole.abs().max()


def test_what_does_not_fit_a_classifier_is_said_in_a_line(saved):
    base = open_base(str(saved("bert-tiny")[0]))
    client, _ = halves(base.model, 1)
    with pytest.raises(ConfigError, match=r"need a pre-norm model .* use recompute"):
        fed_back(client, trainable_parameters(client, "full"))
    with pytest.raises(ConfigError, match=r"'q_proj' matches no linear module .* query, value"):
        halves(base.model, 1, Lora(2, 8.0, ("q_proj",), 0))
