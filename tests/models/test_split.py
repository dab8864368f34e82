"""models/split.py: two halves equal the whole, any OPT, any cut, with and without padding."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hosl_flower.errors import ConfigError
from hosl_flower.models.architectures import ARCHITECTURES, architecture
from hosl_flower.models.base_model import open_base
from hosl_flower.models.families.base import HEAD
from hosl_flower.models.processors import load_tokenizer
from hosl_flower.models.save_merged import save_merged
from hosl_flower.models.split import client_skeleton, load_client, load_server, server_skeleton
from hosl_flower.models.submodels import count, trainable_parameters

VARIANTS = {
    "opt-125m-like": {},
    "opt-350m-like": {"word_embed_proj_dim": 8, "do_layer_norm_before": False},
    "untied": {"tie_word_embeddings": False},
    "no-final-norm": {"_remove_final_layer_norm": True},
}


def halves(directory, cut):
    base = open_base(str(directory))
    return (
        load_client(base, cut, torch.float32, "cpu"),
        load_server(base, cut, torch.float32, "cpu"),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_split_equals_unsplit(tiny_opt, variant, cut):
    directory, model = tiny_opt(**VARIANTS[variant])
    client, server = halves(directory, cut)
    ids = torch.randint(3, 64, (3, 10), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    padded[2, :9] = 0
    for mask in (torch.ones_like(ids), padded):
        with torch.no_grad():
            whole = model(ids, attention_mask=mask).logits
            activations = client(ids, mask)
            logits = server(activations, mask)
            rows = server.lm_head.weight[[5, 9]]
            answers = server.answer_logits(activations, mask, rows)
        assert activations.shape == (3, 10, model.config.hidden_size)
        assert (logits - whole).abs().max() <= 1e-5
        assert (answers - whole[:, -1, [5, 9]]).abs().max() <= 1e-5


def test_the_halves_share_nothing_and_make_the_whole(tiny_opt):
    directory, model = tiny_opt()
    client, server = halves(directory, 2)
    names = set(client.canonical_parameters()) | set(server.canonical_parameters())
    assert names == {*dict(model.named_parameters()), HEAD}
    assert not set(client.canonical_parameters()) & set(server.canonical_parameters())
    embedding = client.canonical_parameters()["model.decoder.embed_tokens.weight"]
    head = server.canonical_parameters()[HEAD]
    assert torch.equal(embedding, head), "the server's own copy of the tied head"
    assert embedding.data_ptr() != head.data_ptr()


def test_dropout_is_off_on_both_sides(tiny_opt):
    directory, _ = tiny_opt(dropout=0.5, attention_dropout=0.5)
    client, server = halves(directory, 1)
    ids = torch.arange(3, 11).unsqueeze(0)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        assert torch.equal(server(client(ids, mask), mask), server(client(ids, mask), mask))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.startswith("opt")])
def test_published_sizes_split_on_the_meta_device(name):
    config = architecture(name)
    blocks = config.num_hidden_layers
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in whole.parameters())
    head = config.vocab_size * config.word_embed_proj_dim
    for cut in (0, min(5, blocks), blocks):
        client, server = client_skeleton(config, cut), server_skeleton(config, cut)
        assert all(p.is_meta for p in (*client.parameters(), *server.parameters()))
        sides = count(client.canonical_parameters()) + count(server.canonical_parameters())
        assert sides == total + head


def test_client_sizes_the_papers_give():
    # OPT-125M cut at 5: 75.6 M, of which embeddings 40.2 M; OPT-1.3B cut at 5: 359 M
    client = client_skeleton(architecture("opt-125m"), 5)
    assert count(client.canonical_parameters()) == 75_622_656
    assert count(trainable_parameters(client, "blocks")) == 75_622_656 - 40_183_296
    assert count(trainable_parameters(client, "full")) == 75_622_656
    large = client_skeleton(architecture("opt-1.3b"), 5)
    assert round(count(large.canonical_parameters()) / 1e6) == 359


@pytest.mark.parametrize("cut", [-1, 4])
def test_a_cut_beyond_the_model_is_refused(tiny_opt, cut):
    base = open_base(str(tiny_opt()[0]))
    with pytest.raises(ConfigError, match=r"cut-layer = -?\d is outside 0\.\.3"):
        load_client(base, cut, torch.float32, "cpu")


def test_unknown_architecture_lists_the_known():
    with pytest.raises(ConfigError, match="opt-125m"):
        open_base("random:opt-1b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_model_is_what_plain_transformers_loads(tiny_opt, tmp_path, variant, dtype):
    directory, _ = tiny_opt(vocab_size=50272, **VARIANTS[variant])
    base = open_base(str(directory))
    client = load_client(base, 2, dtype, "cpu")
    server = load_server(base, 2, dtype, "cpu")
    with torch.no_grad():
        server.lm_head.weight[7] += 1  # the server's head has moved away from the embedding
    tokenizer = load_tokenizer(str(directory))
    merged = tmp_path / "merged"
    save_merged(
        merged, base, client.canonical_parameters(), server.canonical_parameters(), tokenizer
    )
    loaded = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert loaded.dtype == dtype
    ids = torch.tensor([[2, 31414, 24, 21]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        assert torch.equal(loaded(ids, attention_mask=mask).logits, server(client(ids, mask), mask))
    assert load_tokenizer(str(merged))("Hello")["input_ids"] == [2, 31414]
