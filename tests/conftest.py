"""Shared fixtures: tiny OPT checkpoints and a closed hub."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as in flower/server_app.py

import filecmp
import itertools
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from hosl_flower.models import processors
from hosl_flower.models.checkpoints import hub
from hosl_flower.system.bundled import BUNDLED

torch.set_num_threads(1)  # a process per core runs them (pytest-xdist): threads would fight

TOKENIZER = BUNDLED / "opt_tokenizer"
TOKENIZER_SIZE = 50265
TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


class SharedTokenizer:
    """AutoTokenizer for hosl_flower, to which the bundled tokenizer is always the same object:
    a run reads it twice, and parsing its 50,000 tokens is a quarter of a tiny run. Any other
    tokenizer is read as ever."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}  # by config.json: a model's type may choose the class

    def from_pretrained(self, model: Any, **options: Any) -> Any:
        names = [path.name for path in TOKENIZER.iterdir()]
        if filecmp.cmpfiles(model, TOKENIZER, names, shallow=False)[0] != names:
            return AutoTokenizer.from_pretrained(model, **options)
        config = Path(model) / "config.json"
        kind = json.loads(config.read_text())["model_type"] if config.is_file() else ""
        if kind not in self._known:
            tokenizer = AutoTokenizer.from_pretrained(model, **options)
            tokenizer.get_vocab = cache(tokenizer.get_vocab)  # a new dict of them all, each time
            self._known[kind] = tokenizer
        return self._known[kind]


processors.AutoTokenizer = SharedTokenizer()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Whatever a run has set, the next test starts with one thread."""
    yield
    torch.set_num_threads(1)


TinyOpt = Callable[..., tuple[Path, OPTForCausalLM]]


@pytest.fixture
def heeded_signals() -> Iterator[None]:
    """Signals that end a process have the handlers of a process in the foreground: a job in the
    background, as tests may be, ignores SIGINT, and so would the processes it starts."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def tiny_opt(tmp_path: Path) -> TinyOpt:
    """Factory: `tiny_opt(**config)` saves a random OPT and returns (directory, model).

    Every parameter, norms and biases too, is normal with std 0.3. Models whose vocabulary is
    large enough come with the bundled OPT tokenizer.
    """
    numbers = itertools.count()

    def make(**overrides: Any) -> tuple[Path, OPTForCausalLM]:
        model = OPTForCausalLM(OPTConfig(**{**TINY, **overrides})).eval()
        generator = torch.Generator().manual_seed(1234)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.3, generator=generator)
        directory = tmp_path / f"opt{next(numbers)}"
        model.save_pretrained(directory)
        if model.config.vocab_size >= TOKENIZER_SIZE:
            for file in TOKENIZER.iterdir():
                shutil.copy(file, directory)
        return directory, model

    return make


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unreachable hub and an empty Hugging Face cache."""
    cache = tmp_path / "hf"
    cache.mkdir()
    monkeypatch.setattr(hub, "is_reachable", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache / "datasets")
    return cache


def put_into_hub_cache(cache: Path, repository: str, directory: Path) -> None:
    """Make a model directory look like a finished download."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    shutil.copytree(directory, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)


def store_shards(directory: Path, state: dict[str, Tensor], suffix: str) -> None:
    """Save as embed, block0, block1, ..., head .safetensors or .bin, with an index."""

    def shard(name: str) -> str:
        block = re.search(r"layers\.(\d+)\.", name)
        stem = f"block{block[1]}" if block else ("embed" if "embed" in name else "head")
        return f"{stem}.{suffix}"

    (directory / "model.safetensors").unlink()
    weight_map = {name: shard(name) for name in state}
    for file in set(weight_map.values()):
        own = {name: t.clone() for name, t in state.items() if weight_map[name] == file}
        torch.save(own, directory / file) if suffix == "bin" else save_file(own, directory / file)
    single = "pytorch_model.bin" if suffix == "bin" else "model.safetensors"
    (directory / f"{single}.index.json").write_text(json.dumps({"weight_map": weight_map}))
