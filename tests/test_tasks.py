"""tasks.py: prompts, padding, truncation, answer words, labels, tokenizers."""

import pytest
import torch
from conftest import TOKENIZER_SIZE, put_into_hub_cache

from hosl_flower.config import parse_config
from hosl_flower.errors import CheckpointError, ConfigError, DataError
from hosl_flower.tasks import TASKS, Encoder, Task, load_tokenizer, parse_label, task_from_config

SST2 = TASKS["sst2"]
PREFIX, PAD = 2, 1  # OPT's </s>, which starts every text, and <pad>


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("random:opt-125m")


def task(**keys):
    return task_from_config(parse_config({key.replace("_", "-"): v for key, v in keys.items()}))


def own_task(prompt="{text} It was", **keys):
    return task(task="own", data_path="x.csv", prompt=prompt, verbalizers="bad,good", **keys)


def test_bundled_tokenizer_is_that_of_opt(tokenizer):
    assert len(tokenizer) == TOKENIZER_SIZE
    assert tokenizer("")["input_ids"] == [PREFIX]
    assert tokenizer("Hello")["input_ids"] == [PREFIX, 31414]
    assert tokenizer(" great terrible", add_special_tokens=False)["input_ids"] == [372, 6587]
    assert tokenizer.pad_token_id == PAD


def test_prompt_is_rendered_and_tokenized_as_one_text(tokenizer):
    encoder = Encoder(SST2, tokenizer, 32)
    assert encoder.verbalizer_ids == [6587, 372]
    for text in ("a moving film .", "", "braces {sentence} {} stay", "caf\u00e9 \U0001f600"):
        ids = encoder.encode({"sentence": text})
        assert ids == tokenizer(f"{text} It was")["input_ids"]


def test_prompt_of_several_columns(tokenizer):
    pair = own_task("{premise} Question: {hypothesis} Answer:")
    assert pair.fields == ["premise", "hypothesis"]
    ids = Encoder(pair, tokenizer, 32).encode({"premise": "Rain.", "hypothesis": "Wet?"})
    assert tokenizer.decode(ids) == "</s>Rain. Question: Wet? Answer:"


def test_batches_are_padded_on_the_left(tokenizer):
    rows = [{"sentence": "good", "label": 1}, {"sentence": "not good at all", "label": 0}]
    encoder = Encoder(SST2, tokenizer, 32)
    batch = encoder.collate(rows)
    short, long = (encoder.encode(row) for row in rows)
    padding = len(long) - len(short)
    assert padding > 0
    assert batch.input_ids.tolist() == [[PAD] * padding + short, long]
    assert batch.attention_mask.tolist() == [[0] * padding + [1] * len(short), [1] * len(long)]
    assert batch.labels.tolist() == [1, 0]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.labels.dtype == torch.int64


def test_long_texts_are_cut_before_the_question(tokenizer):
    encoder = Encoder(SST2, tokenizer, 8)
    ids = encoder.encode({"sentence": "one two three four five six seven eight"})
    assert tokenizer.decode(ids) == "</s>one two three four five It was"
    assert len(ids) == 8


def test_a_tokenizer_without_padding_or_prefix_will_do(tokenizer):
    class Plain:
        pad_token_id, eos_token_id = None, 7

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    encoder = Encoder(SST2, Plain(), 32)
    assert encoder.pad_id == 7
    assert tokenizer.decode(encoder.encode({"sentence": "fine"})) == "fine It was"


@pytest.mark.parametrize(
    ("words", "length", "message"),
    [
        (("bad", "not bad"), 32, "'not bad' is 2 tokens.*`verbalizers`"),
        (("good", "good"), 32, "good, good share a token"),
        (("bad", "good"), 3, r"max-length = 3 .* ' It was' alone takes 2 tokens"),
    ],
)
def test_what_a_vocabulary_cannot_do_is_refused(tokenizer, words, length, message):
    with pytest.raises(ConfigError, match=message):
        Encoder(Task("own", "{text} It was", words), tokenizer, length)


def test_overrides_of_a_known_task():
    changed = task(task="sst2", verbalizers="bad, good", prompt="{text} So:", label_column="y")
    assert (changed.verbalizers, changed.fields) == (("bad", "good"), ["text"])
    assert (changed.label_column, changed.source) == ("y", SST2.source)
    assert changed.label_names == SST2.label_names
    assert task(task="sst2") == SST2


def test_task_of_ones_own():
    own = own_task()
    assert (own.name, own.verbalizers, own.label_column) == ("own", ("bad", "good"), "label")
    assert own_task(label_column="y").label_column == "y"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"task": "own"},
            r"task = 'own' is none of sst2, sms-spam; .* prompt, verbalizers and data-path",
        ),
        ({"task": "own", "prompt": "{a}", "data_path": "x"}, "verbalizers"),
        ({"prompt": "It was"}, "'It was' names no column"),
        ({"verbalizers": "a,b,c"}, r"sst2 has 2 labels \(negative, positive\), got 3 words"),
    ],
)
def test_incomplete_tasks_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        task(**keys)


@pytest.mark.parametrize("prompt", ["{ {text} It was", "{text} is }", "{} {text}:", "{{text}} is"])
def test_braces_that_name_no_column_are_text(prompt, tokenizer):
    encoder = Encoder(own_task(prompt), tokenizer, 32)
    ids = encoder.encode({"text": "so {dull}"})
    assert tokenizer.decode(ids[1:]) == prompt.replace("{text}", "so {dull}")


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, 0), (1.0, 1), ("1", 1), (" 0 ", 0), ("1.0", 1), (True, 1), (False, 0), ("Negative", 0)],
)
def test_labels(value, label):
    assert parse_label(value, SST2, "here") == label


@pytest.mark.parametrize("value", [-1, 2, 0.5, "", "neutral", "1e0", None, float("nan"), "\u00b2"])
def test_other_labels_are_refused_with_the_place(value):
    with pytest.raises(DataError, match=r"here, row 3: .* 0\.\.1 or negative, positive"):
        parse_label(value, SST2, "here, row 3")


def test_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer):
    encoder = Encoder(SST2, tokenizer, 32)
    encoder.check_vocabulary(TOKENIZER_SIZE)
    with pytest.raises(CheckpointError, match=f"{TOKENIZER_SIZE} tokens.* only 64 rows"):
        encoder.check_vocabulary(64)


def test_tokenizer_comes_with_the_model(tiny_opt, hub_cache, tokenizer):
    directory, _ = tiny_opt(vocab_size=50272)
    put_into_hub_cache(hub_cache, "org/tiny", directory)
    for model in (str(directory), "org/tiny"):
        assert load_tokenizer(model)("Hello")["input_ids"] == [PREFIX, 31414]


@pytest.mark.parametrize("missing", [["vocab.json", "merges.txt"], ["merges.txt"]])
def test_model_without_tokenizer_files_is_refused(tiny_opt, missing):
    directory, _ = tiny_opt(vocab_size=50272)
    for file in missing:
        (directory / file).unlink()
    with pytest.raises(
        CheckpointError, match=f"{directory} has no (usable tokenizer: .+|tokenizer files)"
    ):
        load_tokenizer(str(directory))


def test_damaged_tokenizer_is_refused(tiny_opt):
    directory, _ = tiny_opt(vocab_size=50272)
    (directory / "vocab.json").write_text("{")
    with pytest.raises(
        CheckpointError, match=f"{directory} has no (usable tokenizer: .+|tokenizer files)"
    ):
        load_tokenizer(str(directory))


def test_tokenizer_of_a_model_that_cannot_be_had_is_refused(hub_cache):
    with pytest.raises(CheckpointError, match="org/tiny has no usable tokenizer"):
        load_tokenizer("org/tiny")
