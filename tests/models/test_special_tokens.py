"""Tokenizers that lack special tokens, or put them where they do not belong."""

import shutil
import sys

import pytest
import torch
from conftest import TOKENIZER
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from hosl_flower.data.encoders.classifier_text import TextInputs
from hosl_flower.data.encoders.prompts import PromptEncoder
from hosl_flower.errors import ConfigError, DataError, ModelError
from hosl_flower.export.generate import _prompt_ids
from hosl_flower.models import special_tokens
from hosl_flower.models.processors import load_tokenizer
from hosl_flower.models.special_tokens import empty_text, padding, prefix
from hosl_flower.tasks.task import Task

OWN = Task("own", "{text} It was", ("bad", "good"))
BARE = Task("own", "{text}", ("bad", "good"))
CONFIG = {"vocab_size": 300, "max_position_embeddings": 64}


def bpe(begin="", end="", **named):
    """A tokenizer of bytes with these special tokens; begin, end: put around every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys([*named.values(), begin, end]))
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[token for token in special if token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["It was bad", "It was good"], trainer)
    around = [token for token in (begin, end) if token]
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}".strip(),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in set(around)],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


EOS = {"eos_token": "</s>"}
LLAMA = {"bos_token": "<s>", **EOS}


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [("", "", []), ("<s>", "", ["<s>"]), ("<s>", "</s>", ["<s>"]), ("", "</s>", [])],
)
def test_a_prompt_begins_with_what_stands_before_a_text_alone(begin, end, expected):
    tokenizer = bpe(begin, end, **LLAMA)
    assert tokenizer.convert_ids_to_tokens(prefix(tokenizer)) == expected
    encoder = PromptEncoder(OWN, tokenizer, 64)
    ids = encoder.encode({"text": "two goals"})
    assert tokenizer.decode(ids) == f"{begin}two goals It was"
    long = encoder.encode({"text": "two goals " * 30})
    assert (len(long), tokenizer.decode(long[: len(expected)])) == (64, begin)
    new = _prompt_ids(tokenizer, "two goals", 3, GPT2Config(n_positions=64, vocab_size=300))
    assert tokenizer.decode(new) == f"{begin}two goals"


@pytest.mark.parametrize("model", ["vocab", "llama"])
def test_the_prefix_of_ordinary_tokenizers_is_that_of_an_empty_text(model):
    tokenizer = load_tokenizer("random:any") if model == "vocab" else bpe("<s>", **LLAMA)
    assert prefix(tokenizer) == tokenizer("")["input_ids"] != []


@pytest.mark.parametrize("named", [{}, {"unk_token": "<unk>"}, EOS, LLAMA])
def test_padding_is_a_token_that_the_model_has_a_row_for(named):
    tokenizer = bpe(**named)
    encoder = PromptEncoder(OWN, tokenizer, 64)
    encoder.check(LlamaConfig(**CONFIG))
    batch = encoder.collate([{"text": "a", "label": 0}, {"text": "a longer text", "label": 1}])
    assert batch.attention_mask[0].tolist() == sorted(batch.attention_mask[0].tolist())
    assert int(batch.inputs[0, 0]) == (tokenizer.eos_token_id or 0)
    assert 0 <= int(batch.inputs.min()) <= int(batch.inputs.max()) < 300


@pytest.mark.parametrize("named", [{}, LLAMA])
def test_a_padding_token_without_a_row_is_not_used(named):
    tokenizer = bpe(**named)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    rows = len(tokenizer) - 1
    assert tokenizer.pad_token_id == rows
    assert padding(tokenizer, rows) == (tokenizer.eos_token_id or 0)
    assert padding(tokenizer, rows + 1) == rows
    encoder = PromptEncoder(OWN, tokenizer, 64)
    encoder.check(LlamaConfig(**{**CONFIG, "vocab_size": rows}))
    rows_of = [{"text": "a", "label": 0}, {"text": "a longer text", "label": 1}]
    assert int(encoder.collate(rows_of).inputs.max()) < rows
    with pytest.raises(DataError, match=r"the text '\[PAD\]', a special token that this model has"):
        encoder.encode({"text": "a [PAD]"})


def test_an_added_token_without_a_row_is_refused_where_a_text_has_it():
    tokenizer = bpe(**LLAMA)
    rows = len(tokenizer)
    tokenizer.add_tokens(["photosynthesis"])
    encoder = PromptEncoder(OWN, tokenizer, 64)
    encoder.check(LlamaConfig(**{**CONFIG, "vocab_size": rows}))
    assert encoder.encode({"text": "photo"})
    with pytest.raises(DataError, match=r"'photosynthesis', an added token that this model has no"):
        encoder.encode({"text": "of photosynthesis"})
    encoder = PromptEncoder(Task("own", "{text}", ("bad", "photosynthesis")), tokenizer, 64)
    with pytest.raises(ConfigError, match=r"verbalizers: an answer has 'photosynthesis', an added"):
        encoder.check_vocabulary(rows)
    told = PromptEncoder(Task("own", "{text}", target="answer"), tokenizer, 64, max_new_tokens=2)
    told.check_vocabulary(rows)
    with pytest.raises(DataError, match="'photosynthesis', an added token"):
        told.collate([{"text": "a", "answers": ["photosynthesis"]}])


def test_a_token_before_every_text_needs_a_row():
    tokenizer = bpe("<s>", **LLAMA)
    tokenizer._tokenizer.post_processor = None
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    rows = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", rows)]
    )
    with pytest.raises(ModelError, match="begins every text with '<begin>', a special token"):
        PromptEncoder(OWN, tokenizer, 64).check_vocabulary(rows)


@pytest.mark.parametrize("named", [EOS, {"pad_token": "<pad>"}, {**EOS, "pad_token": "<pad>"}])
def test_an_empty_text_is_one_token_where_nothing_stands_before_it(named):
    tokenizer = bpe(**named)
    encoder = PromptEncoder(BARE, tokenizer, 64)
    encoder.check(LlamaConfig(**CONFIG))
    batch = encoder.collate([{"text": "", "label": 0}, {"text": "a longer text", "label": 1}])
    expected = tokenizer.eos_token_id if "eos_token" in named else tokenizer.pad_token_id
    assert batch.inputs[0, -1] == expected
    assert batch.attention_mask.sum(1).tolist()[0] == 1
    assert encoder.prompts([{"text": ""}]).attention_mask.sum() == 1


def test_an_empty_text_that_nothing_stands_for_is_refused():
    encoder = PromptEncoder(BARE, bpe(), 64)
    encoder.check(LlamaConfig(**CONFIG))
    with pytest.raises(DataError, match=r"an example has no text, .* take the rows without text"):
        encoder.collate([{"text": "", "label": 0}])
    assert encoder.encode({"text": " "})
    beyond = bpe()
    beyond.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(DataError, match="an example has no text"):
        empty_text(beyond, beyond.pad_token_id)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film"]


@pytest.fixture
def wordpiece(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return BertTokenizer.from_pretrained(tmp_path)


def classified(tokenizer, **config):
    settings = {"vocab_size": len(WORDS), "max_position_embeddings": 16, **config}
    inputs = TextInputs(BARE, tokenizer, BertConfig(**settings), 16)
    inputs.check(BertConfig(**settings))
    return inputs


EXAMPLES = [
    {"text": "", "label": 0},
    {"text": " ", "label": 1},
    {"text": "a good film", "label": 0},
]


def test_a_classifier_sees_what_its_tokenizer_makes_of_an_empty_text(wordpiece):
    batch = classified(wordpiece).collate(EXAMPLES)
    tokens = [wordpiece.convert_ids_to_tokens(row) for row in batch.inputs[:, 0]]
    assert tokens[0] == tokens[1] == ["[PAD]"] * 3 + ["[CLS]", "[SEP]"]
    assert tokens[2] == ["[CLS]", "a", "good", "film", "[SEP]"]
    assert batch.attention_mask.sum(1).tolist() == [2, 2, 5]


@pytest.mark.parametrize("padding_token", ["none", "beyond"])
def test_a_classifier_needs_no_padding_token(wordpiece, padding_token):
    wordpiece.pad_token = None if padding_token == "none" else "[NEW]"
    if padding_token == "beyond":
        wordpiece.add_special_tokens({"pad_token": "[NEW]"})
    batch = classified(wordpiece).collate(EXAMPLES)
    assert int(batch.inputs.max()) < len(WORDS)
    assert batch.attention_mask.sum(1).tolist() == [2, 2, 5]


def test_a_classifier_whose_tokenizer_adds_nothing_gets_a_token_for_an_empty_text(wordpiece):
    wordpiece._tokenizer.post_processor = processors.Sequence([])
    batch = classified(wordpiece).collate(EXAMPLES)
    assert batch.attention_mask.sum(1).tolist() == [1, 1, 3]
    only = classified(wordpiece).collate(EXAMPLES[:2])
    assert torch.equal(only.attention_mask, torch.ones(2, 1, dtype=torch.int64))
    assert only.inputs.shape == (2, 2, 1)


@pytest.mark.parametrize("config", [BertConfig, LlamaConfig, GPT2Config])
def test_a_model_without_any_tokenizer_file_is_refused(tmp_path, config):
    config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{tmp_path} has no (usable tokenizer|tokenizer fil)"):
        load_tokenizer(str(tmp_path))


def test_what_only_sentencepiece_reads_names_the_extra(tmp_path, monkeypatch):
    LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x05")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    expected = r"tokenizer.model alone, .*: {}.* pip install 'hosl-flower\[sentencepiece\]'"
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModelError, match=expected.format("it is not installed")):
        load_tokenizer(str(tmp_path))

    def too_old(name):
        raise TypeError("protobuf 6 is too old")

    monkeypatch.setattr(special_tokens.importlib, "import_module", too_old)
    with pytest.raises(ModelError, match=expected.format("the .* of no use .protobuf 6 is")):
        special_tokens.check_sentencepiece(str(tmp_path))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_a_tokenizer_pads_on_changes_nothing(tmp_path, side):
    shutil.copytree(TOKENIZER, tmp_path / "opt")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "opt", padding_side=side)
    batch = PromptEncoder(OWN, tokenizer, 64).collate(
        [{"text": "a", "label": 0}, {"text": "a longer text", "label": 1}]
    )
    assert batch.attention_mask[0, 0] == 0
    assert batch.attention_mask[0, -1] == 1
