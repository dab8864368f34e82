"""Checkpoints in every layout."""

import json
from functools import partial

import torch
from safetensors.torch import save_file

from hosl_flower.models.base_model import open_base
from hosl_flower.models.split import load_client, load_server

SINGLE, BIN = "model.safetensors", "pytorch_model.bin"


INDEX = f"{SINGLE}.index.json"


def side_of(load, model, cut=1, seed=0):
    loaded = load(open_base(str(model), seed), cut, torch.float32, "cpu")
    return {name: p.detach() for name, p in loaded.canonical_parameters().items()}


client_of, server_of = partial(side_of, load_client), partial(side_of, load_server)


def assert_same(model, state):
    client, server = client_of(model), server_of(model)
    assert sorted([*client, *server]) == sorted(state)
    for name, value in {**client, **server}.items():
        assert torch.equal(value, state[name].float()), name


def store(directory, state):
    save_file({name: t.clone() for name, t in state.items()}, directory / SINGLE)


def store_bin(directory, state, zipped=True):
    (directory / SINGLE).unlink()
    torch.save(state, directory / BIN, _use_new_zipfile_serialization=zipped)


def configure(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
