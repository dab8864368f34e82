"""data/encoders/prompts.py, tasks/known.py: prompts, padding, truncation, answer words,
tokenizers."""

import re

import pytest
import torch
from conftest import TOKENIZER_SIZE, put_into_hub_cache
from transformers import AutoTokenizer

from hosl_flower.config.parse import parse_config
from hosl_flower.config.task_from_config import task_from_config
from hosl_flower.data.encoders.prompts import PromptEncoder, cut_longest
from hosl_flower.errors import ConfigError, DataError, ModelError
from hosl_flower.models.processors import load_tokenizer
from hosl_flower.system.bundled import BUNDLED
from hosl_flower.tasks.known import TASKS
from hosl_flower.tasks.task import Task

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
    encoder = PromptEncoder(SST2, tokenizer, 32)
    assert encoder.answers.tokens == [[6587], [372]]
    for text in ("a moving film .", "", "braces {sentence} {} stay", "caf\u00e9 \U0001f600"):
        ids = encoder.encode({"sentence": text})
        assert ids == tokenizer(f"{text} It was")["input_ids"]


def test_prompt_of_several_columns(tokenizer):
    pair = own_task("{premise} Question: {hypothesis} Answer:")
    assert pair.fields == ["premise", "hypothesis"]
    ids = PromptEncoder(pair, tokenizer, 32).encode({"premise": "Rain.", "hypothesis": "Wet?"})
    assert tokenizer.decode(ids) == "</s>Rain. Question: Wet? Answer:"


def test_batches_are_padded_on_the_left(tokenizer):
    rows = [{"sentence": "good", "label": 1}, {"sentence": "not good at all", "label": 0}]
    encoder = PromptEncoder(SST2, tokenizer, 32)
    batch = encoder.collate(rows)
    short, long = (encoder.encode(row) for row in rows)
    padding = len(long) - len(short)
    assert padding > 0
    assert batch.input_ids.tolist() == [[PAD] * padding + short, long]
    assert batch.attention_mask.tolist() == [[0] * padding + [1] * len(short), [1] * len(long)]
    assert batch.labels.tolist() == [1, 0]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.labels.dtype == torch.int64


def test_long_texts_are_cut_before_the_question(tokenizer):
    encoder = PromptEncoder(SST2, tokenizer, 8)
    ids = encoder.encode({"sentence": "one two three four five six seven eight"})
    assert tokenizer.decode(ids) == "</s>one two three four five It was"
    assert len(ids) == 8


def test_the_longest_field_is_cut_and_the_question_survives(tokenizer):
    boolq = PromptEncoder(TASKS["boolq"], tokenizer, 16)
    example = {"passage": "one two three four five six seven eight nine ten", "question": "is it"}
    ids = boolq.encode(example)
    assert tokenizer.decode(ids) == "</s>one two three four five six seven eight nine ten is it?\n"
    for length in (15, 14, 8):
        ids = PromptEncoder(TASKS["boolq"], tokenizer, length).encode(example)
        kept = " ".join(example["passage"].split()[: length - 5])
        assert tokenizer.decode(ids) == f"</s>{kept} is it?\n"
        assert len(ids) == length
    example = {"passage": "short", "question": "one two three four five six seven eight nine ten"}
    ids = PromptEncoder(TASKS["boolq"], tokenizer, 8).encode(example)
    assert tokenizer.decode(ids) == "</s>short one two three four?\n"


def test_both_fields_of_a_pair_are_cut_when_both_are_long(tokenizer):
    encoder = PromptEncoder(TASKS["rte"], tokenizer, 30)
    ids = encoder.encode({"premise": "very " * 50 + "wet", "hypothesis": "dry " * 50})
    text = tokenizer.decode(ids)
    assert len(ids) in (29, 30)
    assert text.startswith("</s>very very")
    assert '\nDoes this mean that "dry dry' in text
    assert text.endswith('dry" is true? Yes or No?\n')
    assert abs(text.count("very") - text.count("dry")) <= 1


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [
        ([3, 10], 20, [3, 10]),
        ([3, 10], 8, [3, 5]),
        ([10, 3], 8, [5, 3]),
        ([10, 9], 8, [4, 4]),
        ([10, 1, 9], 8, [3, 1, 3]),
        ([10], 4, [4]),
        ([5, 5], 1, [0, 0]),
    ],
)
def test_only_the_longest_is_cut(lengths, room, kept):
    assert cut_longest(lengths, room) == kept


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [1, 300])
def test_no_task_loses_its_question(tokenizer, name, length):
    task = TASKS[name]
    example = {field: " ".join(["word"] * length) for field in task.fields}
    for most in (64, 128):
        ids = PromptEncoder(task, tokenizer, most).encode(example)
        text = tokenizer.decode(ids[1:])
        assert len(ids) <= most
        place = 0
        for literal in re.split(r"\{\w+\}", task.prompt):
            place = text.index(literal, place) + len(literal)
        assert place == len(text)
        if length == 1:
            assert text == task.prompt.format(**example)


RAIN = {"premise": "It rains.", "hypothesis": "It is wet."}
MEZO = {
    "sst2": ({"sentence": "fine"}, "fine It was", ["terrible", "great"]),
    "rte": (
        RAIN,
        'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n',
        ["Yes", "No"],
    ),
    "cb": (
        RAIN,
        'Suppose It rains. Can we infer that "It is wet."? Yes, No, or Maybe?\n',
        ["Yes", "No", "Maybe"],
    ),
    "wsc": (
        {"text": "Ann saw Eve when she sang.", "span1_text": "Ann", "span2_text": "she"},
        "Ann saw Eve when she sang.\nIn the previous sentence, does the pronoun "
        '"she" refer to Ann? Yes or No?\n',
        ["No", "Yes"],
    ),
    "wic": (
        {"word": "bank", "sentence1": "A bank.", "sentence2": "The bank."},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "A bank.\nThe bank.\n",
        ["No", "Yes"],
    ),
    "boolq": (
        {"passage": "Cats purr.", "question": "do cats purr"},
        "Cats purr. do cats purr?\n",
        ["No", "Yes"],
    ),
}


@pytest.mark.parametrize("name", MEZO)
def test_prompts_and_words_are_those_of_mezo(tokenizer, name):
    """Prompt and word give the tokens of the text that has both: the answer of a prompt that ends
    in a newline follows it without a space."""
    example, prompt, words = MEZO[name]
    encoder = PromptEncoder(TASKS[name], tokenizer, 64)
    ids = encoder.encode(example)
    assert ids == tokenizer(prompt)["input_ids"]
    gap = "" if prompt.endswith("\n") else " "
    for tokens, word in zip(encoder.answers.tokens, words, strict=True):
        assert ids + tokens == tokenizer(prompt + gap + word)["input_ids"]
    assert len(words) == len(encoder.answers.tokens)


def test_every_task_has_one_token_words_for_opt(tokenizer):
    assert {PromptEncoder(task, tokenizer, 64).answers.sequences for task in TASKS.values()} == {1}


def test_the_answer_follows_a_space_that_the_prompt_ends_in(tokenizer):
    encoder = PromptEncoder(Task("own", "{text} So: ", ("bad", "good")), tokenizer, 32)
    assert tokenizer.decode(encoder.encode({"text": "x"})) == "</s>x So:"
    assert tokenizer.decode([t for word in encoder.answers.tokens for t in word]) == " bad good"


def test_words_of_several_tokens_make_a_row_per_label(tokenizer):
    encoder = PromptEncoder(Task("own", "{text} It was", ("bad", "not bad at")), tokenizer, 8)
    bad, (no, *more) = encoder.answers.tokens
    assert (encoder.answers.sequences, encoder.answers.longest) == (2, 3)
    rows = [{"text": "a b", "label": 1}, {"text": "one two three four five six", "label": 0}]
    batch = encoder.collate(rows)
    prompts = [encoder.encode(row) for row in rows]
    assert (bad, len(more)) == ([1099], 2)
    assert [len(prompt) for prompt in prompts] == [5, 6]
    assert batch.labels.tolist() == [1, 0]
    assert batch.input_ids.tolist() == [
        [PAD] * 3 + prompts[0],
        [PAD] + prompts[0] + [no, more[0]],
        [PAD] * 2 + prompts[1],
        prompts[1] + [no, more[0]],
    ]
    assert torch.equal(batch.attention_mask.bool(), batch.input_ids != PAD)


def test_a_tokenizer_without_padding_or_prefix_will_do(tokenizer):
    class Plain:
        pad_token_id, eos_token_id = None, 7

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    encoder = PromptEncoder(SST2, Plain(), 32)
    assert encoder.pad_id == 7
    assert tokenizer.decode(encoder.encode({"sentence": "fine"})) == "fine It was"


@pytest.mark.parametrize(
    ("words", "length", "message"),
    [
        (("good", "good"), 32, "labels 0 and 1 have the same tokens, 'good' and"),
        (("bad", "good"), 3, r"max-length = 3 .* own words .* take 3 tokens"),
        (("bad", "not bad"), 4, r"max-length = 4 .* own words .* take 4 tokens"),
    ],
)
def test_what_a_vocabulary_cannot_do_is_refused(tokenizer, words, length, message):
    with pytest.raises(ConfigError, match=message):
        PromptEncoder(Task("own", "{text} It was", words), tokenizer, length)


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


def test_a_newline_at_the_end_of_a_prompt_is_kept():
    assert own_task("{text}\nGood or bad?\n").prompt.endswith("?\n")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"task": "own"},
            r"task = 'own' is none of sst2, rte, .*; .* data-path, .* prompt and verbalizers",
        ),
        ({"task": "own", "prompt": "{a}", "data_path": "x"}, "verbalizers"),
        ({"prompt": "It was"}, "'It was' names no column"),
        ({"verbalizers": "a,b,c"}, r"sst2 has 2 labels \(negative, positive\), got 3 words"),
        ({"verbalizers": "neg=bad,good"}, "expected a word for every label, or label=word"),
        ({"verbalizers": "neg=bad,pos="}, "expected a word for every label, or label=word"),
        ({"verbalizers": "a=bad,A=good"}, "'a' and 'A' are one label.* each label once"),
        ({"image_size": 64}, "image-size has no use: task sst2 is not about images"),
        ({"max_new_tokens": 7}, "max-new-tokens has no use: task sst2 generates no answers"),
        ({"task": "squad", "image_size": 64}, "image-size has no use: task squad is not about"),
        ({"task": "digits", "max_new_tokens": 7}, "is about images: it has no max-new-tokens"),
    ],
)
def test_incomplete_tasks_and_idle_keys_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        task(**keys)


@pytest.mark.parametrize(
    ("prompt", "rendered"),
    [
        ("{ {text} It was", "{ so {dull} It was"),
        ("{text} is }", "so {dull} is }"),
        ("{} {text}:", "{} so {dull}:"),
        ('{"a": {"b": "{text}"}} is', '{"a": {"b": "so {dull}"}} is'),
        ('{{"a": "{text}"}} is', '{"a": "so {dull}"} is'),
        ("\\frac{{a}}{{b}} {text}", "\\frac{a}{b} so {dull}"),
        ("f() {\n  return\n} {text} is", "f() {\n  return\n} so {dull} is"),
        ("{{{text}}} is", "{so {dull}} is"),
    ],
)
def test_braces_that_name_no_column_are_text(prompt, rendered, tokenizer):
    encoder = PromptEncoder(own_task(prompt), tokenizer, 32)
    ids = encoder.encode({"text": "so {dull}"})
    assert tokenizer.decode(ids[1:]) == rendered


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        ("{Title}: {Review Text}", ["Title", "Review Text"]),
        ("{a.b} {a:b} {0} {x!r} {gr\u00f6\u00dfe (cm)} {a-b}",
         ["a.b", "a:b", "0", "x!r", "gr\u00f6\u00dfe (cm)", "a-b"]),
        ('{text} {"label": 1} {\'a\': 1} {...}', ["text"]),
        ("{text} {{text}} {{other}}", ["text"]),
    ],
)  # fmt: skip
def test_a_column_has_any_name(prompt, fields):
    assert own_task(prompt).fields == fields


@pytest.mark.parametrize("prompt", ["{{text}} It was", "{{ text }} It was", "{} It was"])
def test_a_prompt_without_a_column_says_how_to_write_one(prompt):
    with pytest.raises(ConfigError, match=r"names no column; write one like \{text\}, in single"):
        own_task(prompt)


def test_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer):
    encoder = PromptEncoder(SST2, tokenizer, 32)
    encoder.check_vocabulary(TOKENIZER_SIZE)
    with pytest.raises(ModelError, match=f"{TOKENIZER_SIZE} tokens.* only 64 rows"):
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
        ModelError, match=f"{directory} has no (usable tokenizer: .+|tokenizer files)"
    ):
        load_tokenizer(str(directory))


def test_damaged_tokenizer_is_refused(tiny_opt):
    directory, _ = tiny_opt(vocab_size=50272)
    (directory / "vocab.json").write_text("{")
    with pytest.raises(
        ModelError, match=f"{directory} has no (usable tokenizer: .+|tokenizer files)"
    ):
        load_tokenizer(str(directory))


def test_tokenizer_of_a_model_that_cannot_be_had_is_refused(hub_cache):
    with pytest.raises(ModelError, match="org/tiny has no usable tokenizer"):
        load_tokenizer("org/tiny")


def test_a_special_token_without_an_embedding_is_refused_only_where_it_is_used():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "opt_tokenizer")  # not the shared one
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    encoder = PromptEncoder(SST2, tokenizer, 32)
    encoder.check_vocabulary(TOKENIZER_SIZE)  # one row fewer than there are tokens
    assert encoder.encode({"sentence": "an image"})
    with pytest.raises(DataError, match=r"the text '<image>', a special token that this model"):
        encoder.encode({"sentence": "an <image>"})
