"""Models that cannot be read or trained: one error says which kind it is and what to do."""

from functools import partial

import pytest
import torch
from checkpoints import BIN, INDEX, SINGLE, assert_same, configure, store, store_bin
from conftest import store_shards
from safetensors.torch import load_file

from hosl_flower.errors import ModelError
from hosl_flower.models.base_model import load_model_config, open_base
from hosl_flower.models.processors import load_tokenizer
from hosl_flower.models.split import load_client

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 250540281\n"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOSL_CACHE", str(tmp_path / "cache"))


def both(model):
    load_client(open_base(str(model)), 3, torch.float32, "cpu")
    load_tokenizer(str(model))


def in_parts(directory, suffix):
    store_shards(directory, load_file(directory / SINGLE), suffix)


def pointer(directory, file, before=lambda directory: None):
    before(directory)
    (directory / file).write_bytes(POINTER)


LAYOUTS = {
    SINGLE: lambda d: None,
    BIN: lambda d: store_bin(d, load_file(d / SINGLE)),
    "block1.safetensors": partial(in_parts, suffix="safetensors"),
    INDEX: partial(in_parts, suffix="safetensors"),
    "block2.bin": partial(in_parts, suffix="bin"),
    f"{BIN}.index.json": partial(in_parts, suffix="bin"),
    "config.json": lambda d: None,
    "vocab.json": lambda d: None,
    "merges.txt": lambda d: None,
}


@pytest.mark.parametrize("file", LAYOUTS)
def test_a_pointer_of_git_lfs_is_called_one(tiny_opt, file):
    directory, _ = tiny_opt(vocab_size=50272)
    pointer(directory, file, LAYOUTS[file])
    with pytest.raises(ModelError, match=rf"{directory / file} is a Git LFS .*`git lfs pull`"):
        both(directory)


@pytest.mark.parametrize("file", LAYOUTS)
def test_a_link_to_nothing_is_called_one(tiny_opt, file):
    directory, _ = tiny_opt(vocab_size=50272)
    LAYOUTS[file](directory)
    (directory / file).unlink()
    (directory / file).symlink_to(directory / "gone")
    expected = rf"{directory / file} cannot be read: it is a link to a file that does not exist"
    with pytest.raises(ModelError, match=expected):
        both(directory)


@pytest.mark.parametrize("file", [".", *LAYOUTS])
def test_a_file_of_somebody_else_is_called_unreadable(tiny_opt, file, monkeypatch):
    directory, _ = tiny_opt(vocab_size=50272)
    LAYOUTS.get(file, lambda d: None)(directory)
    method = "stat" if file == "." else "open"  # root may read everything
    real = getattr(type(directory), method)

    def denied(path, *arguments, **options):
        if path == directory / file:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(f"pathlib.Path.{method}", denied)
    with pytest.raises(ModelError, match=rf"{directory}.* cannot be read: permission denied"):
        both(directory)


def quantised(directory, **settings):
    configure(directory, quantization_config=settings)


def with_keys(directory, *keys, before=""):
    state = {f"{before}{key}": tensor for key, tensor in load_file(directory / SINGLE).items()}
    store(directory, {**state, **{key: torch.zeros(1) for key in keys}})


def emptied(directory, *files):
    for path in directory.iterdir():
        path.unlink()
    for file in files:
        (directory / file).write_bytes(b"")


def renamed(directory, name):
    (directory / SINGLE).rename(directory / name)


QUERY = "model.decoder.layers.0.self_attn.q_proj"
KINDS = {
    "bitsandbytes": (
        partial(quantised, quant_method="bitsandbytes", load_in_4bit=True),
        r"is a quantised model \(bitsandbytes, 4 bits\), .*: use the model that it was made from",
    ),
    "gptq": (partial(quantised, quant_method="gptq", bits=4), r"quantised model \(gptq, 4 bits\)"),
    "awq": (partial(quantised, quant_method="awq", bits=4), r"quantised model \(awq, 4 bits\)"),
    "fp8": (partial(quantised, quant_method="fp8"), r"quantised model \(fp8\)"),
    "gptq by its tensors": (
        lambda d: with_keys(d, f"{QUERY}.qweight"),
        rf"quantised model \(GPTQ or AWQ: it has {QUERY}.qweight\)",
    ),
    "fp8 by a tensor": (
        lambda d: store(
            d, {k: t.to(torch.float8_e4m3fn) for k, t in load_file(d / SINGLE).items()}
        ),
        r"quantised model \(.*embed_tokens.weight is F8_E4M3\)",
    ),
    "adapters inside": (
        lambda d: with_keys(d, f"{QUERY}.lora_A.default.weight"),
        r"adapters among its weights .*lora_A.* merge_and_unload",
    ),
    "classifier": (
        partial(configure, architectures=["OPTForSequenceClassification"]),
        r"is a OPTForSequenceClassification, a classifier; a opt model .* use the language model",
    ),
    "empty": (emptied, r"has no config.json: the directory is empty; expected"),
    "gguf": (lambda d: emptied(d, "x.Q4.gguf"), r"no config.json: x.Q4.gguf is GGUF, .*llama.cpp"),
    "tensorflow": (
        partial(renamed, name="tf_model.h5"),
        r"tf_model.h5 is TensorFlow, which cannot",
    ),
    "no index": (
        partial(renamed, name="model-00001-of-00002.safetensors"),
        r"it has model-00001-of-00002.safetensors, but not the index",
    ),
    "run": (
        lambda d: (d / "config.json").write_text('{"config": {"task": "sst2"}}'),
        r"is the directory of a run, not a model: its model is .*/model",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_named_with_what_to_use_instead(tiny_opt, kind):
    directory, _ = tiny_opt()
    change, expected = KINDS[kind]
    change(directory)
    with pytest.raises(ModelError, match=expected):
        load_client(open_base(str(directory)), 3, torch.float32, "cpu")


def test_a_file_is_no_model_directory(tiny_opt):
    directory, _ = tiny_opt()
    with pytest.raises(ModelError, match=r"is a file, expected the directory of a Hugging"):
        open_base(str(directory / SINGLE))


BEFORE = (
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "base_model.model.",
    "model.",
    "model.module.",
)


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("layout", ["safetensors", "bin", "parts"])
def test_what_wrappers_put_before_names_is_taken_off(tiny_opt, before, layout):
    directory, model = tiny_opt(tie_word_embeddings=False)
    with_keys(directory, before=before)
    if layout == "bin":
        store_bin(directory, load_file(directory / SINGLE))
    if layout == "parts":
        in_parts(directory, "safetensors")
    assert_same(directory, model.state_dict())


def test_what_wrappers_put_between_parts_of_names_is_taken_out(tiny_opt):
    directory, model = tiny_opt()
    state = {k.replace(".fc1.", "._orig_mod.fc1."): t for k, t in model.state_dict().items()}
    store(directory, {f"_fsdp_wrapped_module.{k}": t for k, t in state.items()})
    assert_same(directory, model.state_dict())


def test_a_padding_token_beyond_the_embedding_is_forgotten(tiny_opt):
    directory, model = tiny_opt()
    for padding in (64, 1000, -1):
        configure(directory, pad_token_id=padding)
        assert load_model_config(str(directory)).pad_token_id is None
        assert_same(directory, model.state_dict())
    configure(directory, pad_token_id=63)
    assert load_model_config(str(directory)).pad_token_id == 63
