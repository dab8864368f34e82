"""A checkpoint with numbers that are not finite is refused by the name of the tensor."""

import math
import re

import pytest
import torch
from conftest import store_shards
from safetensors.torch import load_file, save_file

from hosl_flower.config.parse import parse_config
from hosl_flower.errors import ModelError
from hosl_flower.models.base_model import open_base
from hosl_flower.models.split import load_client, load_server
from hosl_flower.server.open_session import open_session

MATRIX = "model.decoder.layers.{}.fc1.weight"
NORM = "model.decoder.final_layer_norm.bias"


def damage(directory, name, value, dtype=torch.float32):
    file = directory / "model.safetensors"
    state = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    state[name].view(-1)[-1] = value
    save_file(state, file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_tensor_is_named_on_the_side_that_has_it(tiny_opt, dtype, value):
    directory, _ = tiny_opt()
    damage(directory, MATRIX.format(2), value, dtype)
    base = open_base(str(directory))
    load_client(base, 2, torch.float32, "cpu")  # has none of it
    expected = rf"model.safetensors: {re.escape(MATRIX.format(2))} holds NaN or infinity"
    for wanted in (torch.float32, torch.bfloat16):
        with pytest.raises(ModelError, match=expected):
            load_client(base, 3, wanted, "cpu")
    with pytest.raises(ModelError, match=expected):
        load_server(base, 2, torch.float32, "cpu")


def test_of_a_legacy_file_too(tiny_opt, tmp_path, monkeypatch):
    monkeypatch.setenv("HOSL_CACHE", str(tmp_path / "cache"))
    directory, model = tiny_opt()
    model.model.decoder.final_layer_norm.bias.data[3] = math.nan
    store_shards(directory, model.state_dict(), "bin")
    with pytest.raises(ModelError, match=rf"head.bin: {re.escape(NORM)} holds NaN or inf"):
        load_server(open_base(str(directory)), 2, torch.float32, "cpu")


def test_numbers_beyond_16_bits_are_refused_in_them_alone(tiny_opt):
    directory, _ = tiny_opt()
    damage(directory, MATRIX.format(0), -1e6)
    base = open_base(str(directory))
    for dtype in (torch.float32, torch.bfloat16):
        load_client(base, 1, dtype, "cpu")
    with pytest.raises(ModelError, match=r"fc1.weight holds 1e\+06, .* beyond torch.float16"):
        load_client(base, 1, torch.float16, "cpu")


@pytest.mark.parametrize("block", [0, 2])
def test_a_run_does_not_start_from_them(tiny_opt, tmp_path, block):
    directory, _ = tiny_opt(vocab_size=50272)
    damage(directory, MATRIX.format(block), math.nan)
    keys = {"model": str(directory), "task": "sms-spam", "cut-layer": 1, "max-length": 32}
    config = parse_config({**keys, "output-dir": str(tmp_path), "device": "cpu", "threads": 1})
    with pytest.raises(ModelError, match=rf"layers.{block}.fc1.weight holds NaN"):
        open_session(config, "x", 1)
