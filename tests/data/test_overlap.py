"""Held-out examples that repeat what is trained on."""

import csv
import logging
import re

import pytest
from runs import run_factory, write_reviews

from hosl_flower.data.overlap import Overlap, Split, find_overlap
from hosl_flower.data.sources import load_source, taken
from hosl_flower.tasks.task import Task
from hosl_flower.tensors.seeds import derive_seed, permutation
from strategies.hosl import Hosl

TASK = Task("own", "{text} It was", ("terrible", "great"), ("no", "yes"))
LONG = "the plot of this film is told twice and both times from the end"


def sentences(count, salt=0):
    """Texts of twelve words that have no run of words in common."""
    words = [f"w{number}" for number in permutation(12 * count, salt)]
    return [" ".join(words[at : at + 12]) for at in range(0, len(words), 12)]


def write(path, texts):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((text, number % 2) for number, text in enumerate(texts))
    return path


@pytest.mark.parametrize(
    ("train", "held_out", "shared"),
    [
        (LONG, LONG, True),
        (LONG, LONG.upper() + " !", True),
        (LONG, f"{LONG} of the first act", True),  # it goes on
        (LONG, "this film is told twice and both times", True),  # a piece of eight words
        (LONG, "told twice and both times", True),  # a whole text of five, in a longer one
        (LONG, "told twice and both days", False),
        (LONG, "this film is told twice and then it ends well enough", False),  # a run of six
        (LONG, f"{LONG[:40]} " + "but nothing that follows was seen before by anybody here", False),
        (LONG, "the end", False),  # two words of a longer text
        ("the end", "The end.", True),
        ("ok", "ok", True),
        ("", "", False),
    ],
)
def test_a_text_is_shared_when_most_of_it_lies_in_long_runs(train, held_out, shared):
    found = find_overlap(["something else", train, "more"], [held_out])
    assert found == Overlap(1, int(shared), (0, 1) if shared else (0, 0))


def test_a_run_does_not_go_from_one_text_into_the_next():
    first, second = LONG[:30].strip(), LONG[30:].strip()
    assert find_overlap([first, second], [LONG]).shared == 0


def test_rows_are_those_of_the_file_in_whatever_order(tmp_path):
    texts = sentences(60)
    texts[50] = texts[7]
    splits = []
    load_source(str(write(tmp_path / "a.csv", texts)), TASK, 3, on_split=splits.append)
    (split,) = splits
    assert sorted([*split.train_rows, *split.held_out_rows]) == list(range(60))
    together = Split(split.data, [*range(8), *range(20, 50)], [50, 51])
    assert together.overlap(["text"]) == Overlap(2, 1, (51, 8))
    assert not together.overlap(["text"]).matters  # one alone may be chance
    assert Split(split.data, range(7), [50, 51]).overlap(["text"]).shared == 0


def test_a_held_out_part_of_its_own_is_not_looked_at(tmp_path):
    splits = []
    write_reviews(tmp_path / "reviews")
    load_source(str(tmp_path / "reviews"), TASK, 0, on_split=splits.append)
    assert not splits


def run_on(make, tmp_path, texts, **keys):
    data = write(tmp_path / "texts.csv", texts)
    return make(data_path=str(data), num_clients=2, steps=2, eval_every=1, **keys)[0]


@pytest.fixture
def make(tiny_opt, tmp_path):
    return run_factory(Hosl, tiny_opt, tmp_path, **{"save-model": False})


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if "repeat text" in r.getMessage()]


def test_a_run_on_phrases_of_the_same_sentences_says_so_once(make, tmp_path, caplog):
    phrases = [
        " ".join(text.split()[first:last])
        for text in sentences(20)
        for first, last in ((0, 12), (0, 9), (2, 12), (4, 9))
    ]
    with caplog.at_level(logging.WARNING, "hosl_flower"):
        results = run_on(make, tmp_path, phrases, held_out_examples=20)
    (line,) = warnings_of(caplog)
    found = results.held_out_overlap
    assert found["examples"] == 20
    assert 17 <= found["shared"] <= 20
    assert line.startswith(f"{found['shared']} of 20 held-out examples")
    rows = re.search(r"row (\d+) for one that of row (\d+):", line)
    first, second = (phrases[int(row) - 1].split() for row in rows.groups())
    assert set(first) & set(second)
    assert "data-path=<directory with train.* and validation.*>" in line


def test_independent_texts_and_unused_rows_say_nothing(make, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hosl_flower"):
        results = run_on(make, tmp_path, sentences(60))
        assert results.held_out_overlap == {"examples": 12, "shared": 0}
    assert not warnings_of(caplog)


def test_what_is_not_trained_on_does_not_count(make, tmp_path):
    texts = sentences(40) * 2
    order = permutation(80, derive_seed(0, "held-out"))
    train = taken(order[20:], 5, derive_seed(0, "train-examples"))
    expected = sum(texts[row] in {texts[other] for other in train} for row in order[:20])
    keys = {"held_out_examples": 20, "train_examples": 5}
    found = run_on(make, tmp_path, texts, seed=0, **keys).held_out_overlap
    assert found == {"examples": 20, "shared": expected}


def test_with_labels_on_clients_the_server_is_told_nothing(make, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hosl_flower"):
        results = run_on(make, tmp_path, sentences(30) * 2, labels="client", verbalizers="a,b")
    assert results.held_out_overlap is None
    assert len(warnings_of(caplog)) == 1  # in the client's log, which is this one


def test_the_flat_form_has_an_inverse():
    overlap = Overlap(20, 3, (4, 5))
    assert Overlap.from_flat(overlap.flat()) == overlap
    assert Overlap.from_flat(()) is None
