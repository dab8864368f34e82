"""Answers that are text: SQuAD's rule and files, texts of one's own, prompts, tokens."""

import csv
import json

import pytest
import torch
from runs import question, squad_file

from hosl_flower.config.parse import parse_config
from hosl_flower.config.task_from_config import task_from_config
from hosl_flower.data.encoders.prompts import PromptEncoder
from hosl_flower.data.sources import load_source
from hosl_flower.errors import ConfigError, DataError
from hosl_flower.models.processors import load_tokenizer
from hosl_flower.tasks.generated_answers import IGNORED
from hosl_flower.tasks.known import TASKS
from hosl_flower.tasks.squad_score import graded, normalised

SQUAD = TASKS["squad"]


def test_texts_are_compared_without_case_punctuation_and_articles():
    assert normalised("The  U.S. Army's\nan-swer!") == "us armys answer"
    assert normalised("a an the") == ""
    assert normalised("theatre") == "theatre"


@pytest.mark.parametrize(
    ("text", "right", "exact", "f1"),
    [
        ("the Denver Broncos.", ["Denver Broncos"], 1, 1),
        ("Denver", ["Denver Broncos"], 0, 2 / 3),
        ("gold gold", ["gold", "gold colour"], 0, 2 / 3),  # 2/3 beside one, 1/2 beside the other
        ("in 1066", ["1066", "in the year 1066"], 0, 4 / 5),
        ("in 1066", ["x", "In 1066!"], 1, 1),
        ("blue", ["gold"], 0, 0),
        ("", ["gold"], 0, 0),
        ("", [], 1, 1),  # SQuAD 2.0: there is no answer
        ("The!", [], 1, 1),
        ("gold", [], 0, 0),
        ("", ["the"], 1, 1),
        ("", ["the", "gold"], 0, 0),  # only what has words counts where there is such
    ],
)
def test_exact_match_and_f1_by_hand(text, right, exact, f1):
    assert graded(text, right) == (exact, pytest.approx(f1))


def test_published_files_load_as_they_are(tmp_path):
    squad_file(
        tmp_path / "train-v1.1.json",
        ("Gold is 79.", [question("Which?", "79", "is 79"), question("What?", "Gold")]),
        ("Lead.", [question("So?", "Lead")]),
    )
    squad_file(tmp_path / "dev-v1.1.json", ("Tin is 50.", [question("Who?", "50", "50", "is 50")]))
    train, held_out = load_source(str(tmp_path), SQUAD, 0, "title")
    assert train[0] == {
        "title": "T0", "context": "Gold is 79.", "question": "Which?", "answers": ["79", "is 79"],
    }  # fmt: skip
    assert train["answers"][:] == [["79", "is 79"], ["Gold"], ["Lead"]]
    assert train["title"][:] == ["T0", "T0", "T1"]
    assert held_out["answers"][:] == [["50", "50", "is 50"]]


def test_questions_without_an_answer_are_those_of_squad_2(tmp_path):
    none = question("When?", is_impossible=True, plausible_answers=[{"text": "79"}])
    squad_file(tmp_path / "train-v2.0.json", ("Gold.", [none, question("What?", "Gold")]))
    squad_file(tmp_path / "dev-v2.0.json", ("Gold.", [none]))
    train, held_out = load_source(str(tmp_path), SQUAD, 0)
    assert (train["answers"][:], held_out["answers"][:]) == ([[], ["Gold"]], [[]])


@pytest.mark.parametrize(
    ("qas", "complaint"),
    [
        ([{"id": "1", "question": "What?"}], r"article 1: not as SQuAD's files are.*'answers'"),
        ([question("What?", None)], "article 1, question 1: the answer is no text"),
        (
            [question("What?", " ")],
            "article 1, question 1: the answer is empty; .* as in SQuAD 2.0",
        ),
    ],
)
def test_what_is_no_answer_is_one_line(tmp_path, qas, complaint):
    squad_file(tmp_path / "train.json", ("Gold.", qas))
    with pytest.raises(DataError, match=complaint):
        load_source(str(tmp_path / "train.json"), SQUAD, 0)


def write_table(path, rows, header=("article", "summary")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def own_task(**keys):
    return task_from_config(
        parse_config({"task": "own", "prompt": "{article}\nIn short:", "data-path": "x", **keys})
    )


def test_texts_of_ones_own_need_a_prompt_and_a_column(tmp_path):
    task = own_task(**{"target-column": "Summary"})
    write_table(tmp_path / "train.csv", [("long text", "short"), ("b", "7"), ("c", "d")])
    train, held_out = load_source(str(tmp_path), task, 0)
    rows = {row["article"]: row["answers"] for row in (*train, *held_out)}
    assert rows == {"long text": ["short"], "b": ["7"], "c": ["d"]}
    (tmp_path / "train.csv").unlink()
    lines = [{"article": "a", "summary": ["x", "y"]}, {"article": "b", "summary": "z"}]
    (tmp_path / "train.jsonl").write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[0]))
    assert load_source(str(tmp_path), task, 0)[1]["answers"][:] == [["x", "y"]]
    write_table(tmp_path / "bad.csv", [("a", "b"), ("c", "")])
    with pytest.raises(DataError, match=r"bad.csv, line 3: the answer is empty"):
        load_source(str(tmp_path / "bad.csv"), task, 0)
    write_table(tmp_path / "other.csv", [("a", "b")], header=("article", "label"))
    with pytest.raises(DataError, match=r"no column 'Summary'; .*\(set prompt and target-column"):
        load_source(str(tmp_path / "other.csv"), task, 0)


def test_a_test_part_whose_answers_are_kept_back_is_none(tmp_path):
    squad_file(tmp_path / "train.json", ("A.", [question(str(n), "A") for n in range(10)]))
    squad_file(tmp_path / "test.json", ("A.", [question("x"), question("y")]))
    train, held_out = load_source(str(tmp_path), SQUAD, 0)
    assert (len(train), len(held_out)) == (8, 2)
    assert set(map(tuple, held_out["answers"][:])) == {("A",)}


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"task": "own", "prompt": "{a}", "data-path": "x"}, "target-column instead of verbal"),
        ({"task": "squad", "verbalizers": "a,b"}, "squad generates its answers"),
        ({"task": "squad", "label-column": "a"}, "squad generates its answers"),
        ({"task": "sst2", "target-column": "a", "verbalizers": "a,b"}, "leave one of them out"),
    ],
)
def test_a_task_is_scored_in_one_way(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        task_from_config(parse_config(keys))


def test_any_task_can_be_made_to_generate():
    task = task_from_config(parse_config({"task": "sst2", "target-column": "review"}))
    assert (task.target, task.verbalizers, task.fields) == ("review", (), ["sentence"])
    assert task.answer_column == "review"


EXAMPLE = {
    "title": "Metals",
    "context": "Gold is heavy. Lead is too.",
    "question": "What is heavy?",
    "answers": ["Gold\n and  lead", "Gold"],
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("random:opt-tiny")


def test_prompt_and_answer_are_those_of_mezo(tokenizer):
    batch = PromptEncoder(SQUAD, tokenizer, 128).collate([EXAMPLE, {**EXAMPLE, "answers": []}])
    prompt = (
        "Title: Metals\nContext: Gold is heavy. Lead is too.\nQuestion: What is heavy?\nAnswer:"
    )
    whole = tokenizer(prompt + " Gold and lead\n")["input_ids"]
    assert batch.input_ids[0].tolist() == whole[:-1]
    assert batch.labels.tolist() == [whole[-4:], [IGNORED] * 3 + whole[-1:]]
    row, mask = batch.input_ids[1], batch.attention_mask[1]
    assert row[mask.bool()].tolist() == tokenizer(prompt)["input_ids"], "no answer: a newline"
    assert mask.tolist() == [0] * 3 + [1] * (len(whole) - 4)


def test_prompts_alone_are_what_is_answered(tokenizer):
    encoder = PromptEncoder(SQUAD, tokenizer, 128)
    batch = encoder.prompts([EXAMPLE])
    assert batch.input_ids[0].tolist() == encoder.encode(EXAMPLE)
    assert batch.labels.numel() == 0


def test_a_long_example_loses_the_end_of_its_context(tokenizer):
    long = {**EXAMPLE, "question": " ".join(["why"] * 20), "context": " ".join(["gold"] * 300)}
    encoder = PromptEncoder(SQUAD, tokenizer, 64, max_new_tokens=5)
    ids = encoder.encode(long)
    text = tokenizer.decode(ids)
    assert len(ids) == 64 - 5 + 1
    assert text.count("why") == 20, "not a word of the question, though it is long too"
    rest = tokenizer("Title: Metals\nContext:\nQuestion:\nAnswer:")["input_ids"]
    assert text.count("gold") == 60 - 20 - len(rest)
    assert len(encoder.collate([long]).input_ids[0]) <= 64
    longest = {**long, "question": " ".join(["why"] * 200)}
    assert len(encoder.encode(longest)) == 60
    with pytest.raises(ConfigError, match=r"no room .* \(max-new-tokens\)"):
        PromptEncoder(SQUAD, tokenizer, 64, max_new_tokens=60)


def test_a_long_answer_is_cut_and_has_no_end(tokenizer):
    answers = PromptEncoder(SQUAD, tokenizer, 128, max_new_tokens=4).answers
    assert answers.tokens("one two three") == tokenizer(" one two three\n")["input_ids"][1:]
    assert answers.tokens("one two three four five") == answers.tokens("one two three four")[:4]
    labels = answers.labels([{"answers": ["one two three four five"]}, {"answers": ["one"]}])
    assert labels.shape == (2, 4)
    assert (labels == IGNORED).tolist() == [[False] * 4, [True, True, False, False]]


def test_what_is_generated_ends_with_its_line(tokenizer):
    encoder = PromptEncoder(SQUAD, tokenizer, 128)
    ids = tokenizer(" Gold and lead\n more", add_special_tokens=False)["input_ids"]
    assert encoder.text(ids) == "Gold and lead"
    eos = tokenizer.eos_token_id
    assert encoder.text([*ids[:1], eos, *ids]) == "Gold"
    assert encoder.text(ids[:2]) == "Gold and"
    assert encoder.text([]) == ""
    assert torch.equal(encoder.answers.labels([EXAMPLE])[0], torch.tensor(ids[:4]))
