"""Every layout an OPT checkpoint comes in loads into both halves bit for bit, or says why not."""

import math
import os
import pickle
import shutil
from functools import partial

import numpy
import pytest
import torch
from checkpoints import (
    BIN,
    INDEX,
    SINGLE,
    assert_same,
    client_of,
    configure,
    server_of,
    side_of,
    store,
    store_bin,
)
from conftest import put_into_hub_cache, store_shards
from safetensors.torch import load_file, save_file

from hosl_flower.errors import ModelError
from hosl_flower.models.architectures import architecture
from hosl_flower.models.base_model import open_base
from hosl_flower.models.checkpoints.source import RandomWeights
from hosl_flower.models.families.base import HEAD
from hosl_flower.models.split import client_skeleton, load_client, load_server
from hosl_flower.tensors.memory import Meter
from hosl_flower.tensors.seeds import derive_seed

EMBEDDING = "model.decoder.embed_tokens.weight"
UNTIED = {"tie_word_embeddings": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def without_tied_head(state):
    tied = {HEAD} if torch.equal(state[HEAD], state[EMBEDDING]) else set()
    return {name: t for name, t in state.items() if name not in tied}


def bare(state):
    return {name.removeprefix("model."): t for name, t in without_tied_head(state).items()}


LAYOUTS = {
    "safetensors": lambda d, state: store(d, without_tied_head(state)),
    "safetensors, head stored": store,
    "safetensors, bare names": lambda d, state: store(d, bare(state)),
    "safetensors shards": partial(store_shards, suffix="safetensors"),
    "bin": lambda d, state: store_bin(d, without_tied_head(state)),
    "bin, head stored": store_bin,
    "bin, bare names": lambda d, state: store_bin(d, bare(state)),
    "bin before torch 1.6": partial(store_bin, zipped=False),
    "bin shards": partial(store_shards, suffix="bin"),
}


MODELS = {
    "tied": ({}, torch.float32),
    "fp16": ({}, torch.float16),
    "untied-bf16": (UNTIED, torch.bfloat16),
    "350m": ({"word_embed_proj_dim": 8, "do_layer_norm_before": False}, torch.float32),
    "galactica": ({"enable_bias": False, "layer_norm_elementwise_affine": False}, torch.float32),
}
# whether there is a head of its own matters to every layout, the rest to a kind of file
CASES = [
    (layout, model)
    for layout in LAYOUTS
    for model in MODELS
    if model in ("tied", "untied-bf16") or layout in ("safetensors", "bin", "bin before torch 1.6")
]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_halves_equal_the_whole(tiny_opt, layout, name):
    config, dtype = MODELS[name]
    directory, model = tiny_opt(**config)
    state = model.to(dtype).state_dict()
    LAYOUTS[layout](directory, state)
    assert_same(directory, state)


@pytest.mark.parametrize("config", [{}, UNTIED])
def test_shards_of_save_pretrained(tiny_opt, config):
    directory, model = tiny_opt(**config)
    assert (HEAD in load_file(directory / SINGLE)) == (config == UNTIED)
    (directory / SINGLE).unlink()
    model.save_pretrained(directory, max_shard_size="8KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    assert_same(directory, model.state_dict())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("load", "needed"),
    [(load_client, ["embed", "block0"]), (load_server, ["block1", "block2", "head"])],
)
def test_shards_of_the_other_side_may_be_missing(tiny_opt, load, needed, suffix):
    directory, model = tiny_opt(**UNTIED)
    store_shards(directory, model.state_dict(), suffix)
    for shard in directory.glob(f"*.{suffix}"):
        if shard.stem not in needed:
            shard.unlink()
    state = model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in side_of(load, directory).items())
    missing = f"{needed[0]}.{suffix}"
    (directory / missing).unlink()
    with pytest.raises(ModelError, match=f"{directory}.*{missing}"):
        side_of(load, directory)


def test_bin_converts_only_what_a_side_needs(tiny_opt, cache):
    directory, model = tiny_opt()
    store_bin(directory, without_tied_head(model.state_dict()))
    client_of(directory)
    converted = {path.stem for path in cache.rglob("*.safetensors")}
    positions = "model.decoder.embed_positions.weight"
    assert converted == {EMBEDDING, positions, "model.decoder.layers.0"}
    server_of(directory, cut=2)
    assert list(cache.rglob("*layers.2.safetensors"))
    assert not list(cache.rglob("*layers.1.safetensors"))


def test_bin_is_opened_again_only_when_it_has_changed(tiny_opt, monkeypatch):
    directory, model = tiny_opt()
    store_bin(directory, model.state_dict())
    assert_same(directory, model.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened again"))
        assert_same(directory, model.state_dict())
    changed = {name: t + 1 for name, t in model.state_dict().items()}
    torch.save(changed, directory / BIN)
    os.utime(directory / BIN, ns=(1, 1))
    assert_same(directory, changed)


class Hostile:
    """Unpickling it makes the file `executed` in the working directory."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def binary(content, **options):
    return lambda directory: store_bin(directory, content, **options)


def raw(file, content):
    return lambda directory: (directory / SINGLE).rename(directory / file).write_bytes(content)


BAD, AGAIN = "cannot be read as model weights", "copy it again"
DAMAGES = {
    "no directory": (shutil.rmtree, ["does not exist"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["no config.json", "expected"]),
    "config not json": (lambda d: (d / "config.json").write_text("{"), ["config.json", "JSON"]),
    "config null": (lambda d: (d / "config.json").write_text("null"), ["config.json"]),
    "config of a wrong type": (
        partial(configure, hidden_size="wide"),
        ["config.json", "hidden_size"],
    ),
    "config impossible": (partial(configure, num_attention_heads=3), ["num_heads"]),
    "wrong shape": (
        partial(configure, ffn_dim=40),
        [SINGLE, "[32, 16]", "[40, 16]", "config.json"],
    ),
    "no weights": (lambda d: (d / SINGLE).unlink(), [SINGLE, BIN, "expected"]),
    "empty": (lambda d: os.truncate(d / SINGLE, 0), [SINGLE, BAD, AGAIN]),
    "cut in the header": (lambda d: os.truncate(d / SINGLE, 100), [SINGLE, BAD, AGAIN]),
    "cut in the data": (lambda d: os.truncate(d / SINGLE, 20_000), [SINGLE, BAD, AGAIN]),
    "foreign": (lambda d: store(d, {"a.b": torch.ones(1)}), [EMBEDDING, "another model"]),
    "bin empty": (raw(BIN, b""), [BIN, BAD, AGAIN]),
    "bin of text": (raw(BIN, b"no weights"), [BIN, BAD, AGAIN]),
    "bin hostile": (binary(Hostile()), [BIN, BAD]),
    "old bin hostile": (binary({EMBEDDING: Hostile()}, zipped=False), [BIN, BAD]),
    "pickle hostile": (raw(BIN, pickle.dumps(Hostile(), protocol=2)), [BIN, BAD]),
    "bin nested": (binary({"model": {EMBEDDING: torch.ones(1)}}), [BIN, BAD, "state dict"]),
    "bin of numbered tensors": (binary({0: torch.ones(1)}), [BIN, BAD, "state dict"]),
    "index not json": (raw(INDEX, b"{"), [INDEX, "not a sharded-checkpoint index"]),
    "index empty": (raw(INDEX, b'{"weight_map": null}'), [INDEX, "not a sharded"]),
    "index escapes": (raw(INDEX, b'{"weight_map": {"a": "../x"}}'), ["plain file names", "../x"]),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_one_checkpoint_error(tiny_opt, monkeypatch, tmp_path, case):
    damage, fragments = DAMAGES[case]
    directory, _ = tiny_opt()
    damage(directory)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        client_of(directory)
    assert [p for p in [str(directory), *fragments] if p not in str(caught.value)] == []
    assert not (tmp_path / "executed").exists()


def test_unreachable_hub_names_the_model(hub_cache):
    with pytest.raises(ModelError, match=r"'facebook/opt-125m' .* local model directory"):
        open_base("facebook/opt-125m")


def test_cached_hub_model_loads_offline(tiny_opt, hub_cache):
    directory, model = tiny_opt()
    put_into_hub_cache(hub_cache, "org/tiny", directory)
    assert_same("org/tiny", model.state_dict())


def test_random_weights_depend_on_seed_and_name_but_not_on_the_cut():
    whole = client_of("random:opt-tiny", cut=4)
    halves = {**server_of("random:opt-tiny"), **client_of("random:opt-tiny")}
    assert all(torch.equal(value, halves[name]) for name, value in whole.items())
    assert torch.equal(halves[HEAD], whole[EMBEDDING])
    query, key = (f"model.decoder.layers.0.self_attn.{x}_proj.weight" for x in "qk")
    assert not torch.equal(whole[query], whole[key])
    assert not torch.equal(whole[query], client_of("random:opt-tiny", seed=1)[query])
    assert whole[EMBEDDING].std().item() == pytest.approx(0.06, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_loading_needs_the_weights_and_little_more(tmp_path, dtype, stored):
    config = architecture("opt-tiny")
    config.update({"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024})
    skeleton = client_skeleton(config, 4)
    state = {
        name: torch.full(p.shape, 0.1, dtype=stored)
        for name, p in skeleton.canonical_parameters().items()
    }
    save_file(state, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    meter = Meter("cpu")
    with meter.phase("load", 0):
        client = load_client(open_base(str(tmp_path)), 4, dtype, "cpu")
    weights = sum(p.nbytes for p in client.parameters())
    buffers = (6 << 20) if stored != dtype else 0
    assert weights > 25 << 20
    assert weights <= meter.peaks["load"] <= weights + buffers
    expected = torch.tensor(0.1, dtype=stored).to(dtype)
    assert all(bool((p == expected).all()) for p in client.parameters())


def test_random_weights_do_not_depend_on_how_many_are_drawn_at_a_time(monkeypatch):
    shape = (331, 17)
    whole = numpy.random.default_rng(derive_seed(3, "init", "a")).random(shape, dtype=numpy.float32)
    expected = torch.from_numpy(whole).sub_(0.5).mul_(math.sqrt(12) * 0.02)
    for chunk in (7, 1000, 1 << 20):
        monkeypatch.setattr("hosl_flower.models.checkpoints.source.CHUNK_ELEMENTS", chunk)
        out = torch.empty(shape)
        RandomWeights(3, 0.02).fill("a", out)
        assert torch.equal(out, expected)
