"""data/infer_task.py: the labels of one's own data, found in the data."""

import json
import logging

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from image_data import images, write_folder

from hosl_flower.config.parse import parse_config
from hosl_flower.config.task_from_config import task_from_config
from hosl_flower.data.infer_task import completed
from hosl_flower.data.sources import load_source
from hosl_flower.errors import ConfigError, DataError, HoslError
from hosl_flower.models.class_head import class_names

CLASSIFIER = {"model": "random:bert-tiny"}


def found(path, **keys):
    keys = {key.replace("_", "-"): value for key, value in keys.items()}
    return completed(parse_config({"task": "", "data-path": str(path), **keys}))


def table(path, labels):
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def counts(config):
    """Examples by label, in the labels' order."""
    task = task_from_config(config)
    parts = load_source(config.data.path, task, 0)
    labels = [label for part in parts for label in part["label"][:]]
    return [labels.count(n) for n in range(len(task.verbalizers))]


INTENTS = [f"intent {n}" for n in range(77)]


def test_a_classifier_takes_more_labels_than_one_would_type(tmp_path):
    path = table(tmp_path / "a.jsonl", INTENTS * 3)
    config = found(path, **CLASSIFIER)
    assert class_names(task_from_config(config)) == tuple(sorted(INTENTS))
    assert counts(config) == [3] * 77
    with pytest.raises(ConfigError, match=r"77 different labels .*set model to a classifier"):
        found(path, model="random:opt-tiny")
    assert len(found(path, model="random:opt-tiny", verbalizers="a,b").task.verbalizer_list) == 2
    with pytest.raises(DataError, match=r"'label' has 77 different .*that two rows each have"):
        found(table(tmp_path / "b.jsonl", INTENTS), **CLASSIFIER)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1, 10, 2], ("0", "1", "2", "10")),
        ([2.0, 1.0, 5.0, 1], ("1", "2", "5")),
        (["3", "1", "2.0"], ("1", "2", "3")),
    ],
)
def test_a_classifier_needs_no_words_for_labels_that_are_numbers(tmp_path, labels, names):
    path = table(tmp_path / "a.jsonl", labels * 2)
    config = found(path, **CLASSIFIER)
    assert class_names(task_from_config(config)) == names
    assert sum(counts(config)) == 2 * len(labels)
    with pytest.raises(DataError, match=r"has numbers .*: say in verbalizers"):
        found(path, model="random:opt-tiny")


@pytest.mark.parametrize("labels", [[0.5, 3.25], [-1, 1], [0, "many"], [1e12, 0]])
def test_numbers_that_are_no_labels_are_refused(tmp_path, labels):
    with pytest.raises(DataError, match="numbers"):
        found(table(tmp_path / "a.jsonl", labels * 3), **CLASSIFIER)


def test_labels_of_the_held_out_part_are_labels(tmp_path):
    table(tmp_path / "train.jsonl", ["a", "b", "a"])
    table(tmp_path / "val.jsonl", ["a", "c"])
    config = found(tmp_path)
    assert config.task.verbalizers == "a=a,b=b,c=c"
    assert counts(config) == [3, 1, 1]
    assert found(tmp_path, held_out_examples=1).task.verbalizers == "a=a,b=b", "the part has no use"
    (tmp_path / "val.jsonl").unlink()
    table(tmp_path / "test.jsonl", [None, -1])
    assert found(tmp_path).task.verbalizers == "a=a,b=b"


@pytest.mark.parametrize(
    ("labels", "verbalizers"),
    [
        (["Spam", "ham", "spam ", "HAM"], "ham=ham,spam=spam"),
        (["caf\u00e9", "cafe\u0301", "b"], "b=b,caf\u00e9=caf\u00e9"),
        (["new york", "new\u00a0york", "b"], "b=b,new york=new york"),
    ],
)
def test_spellings_of_one_label_are_one(tmp_path, labels, verbalizers, caplog):
    with caplog.at_level(logging.WARNING):
        config = found(table(tmp_path / "a.jsonl", labels))
    assert config.task.verbalizers == verbalizers
    assert ("are taken as one: 4 spellings of 2 labels" in caplog.text) == ("HAM" in labels)
    assert sum(counts(config)) == len(labels)


def test_truth_values_are_words(tmp_path):
    config = found(table(tmp_path / "a.jsonl", [True, False, True]))
    assert config.task.verbalizers == "false=False,true=True"
    assert counts(config) == [1, 2]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "line 3: label is missing"),
        ("", "line 3: label is missing"),
        (" nan", "line 3: label is missing"),
        (float("nan"), "line 3: label is missing"),
        (["a"], "line 3, column 'label': expected one label, .* got a list"),
        ("\ud83d", "line 3: label has half a character"),
    ],
)
def test_what_is_no_label_is_named_with_its_line(tmp_path, label, message):
    with pytest.raises(DataError, match=rf"a\.jsonl, {message}"):
        found(table(tmp_path / "a.jsonl", ["a", "b", label]))


def test_a_word_for_none_is_a_label(tmp_path):
    assert found(table(tmp_path / "a.jsonl", ["none", "favor"])).task.verbalizers == (
        "favor=favor,none=none"
    )


def test_named_labels_of_any_count(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=INTENTS)})
    data = Dataset.from_dict({"text": ["t"] * 154, "label": list(range(77)) * 2}, features)
    DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        config = found(path, **CLASSIFIER)
        assert class_names(task_from_config(config)) == tuple(sorted(INTENTS))
        assert set(counts(config)) == {4 if path.is_dir() else 2}
    features["label"] = ClassLabel(names=["A", "a"])
    data = Dataset.from_dict({"text": ["t", "u"], "label": [0, 1]}, features)
    data.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="labels 'A' and 'a' differ only in case"):
        found(tmp_path / "b.parquet")


@pytest.mark.parametrize("content", ["ham\thi\nspam\twin\nham\tyo\nspam\tbuy\n"])
def test_a_file_without_header_whose_labels_are_evident(tmp_path, content):
    (tmp_path / "a.tsv").write_text(content)
    config = found(tmp_path / "a.tsv")
    assert config.task.verbalizers == "ham=ham,spam=spam"
    assert counts(config) == [2, 2]
    (tmp_path / "a.tsv").write_text("hi\tyo\nwin\tbuy\n")
    with pytest.raises(HoslError, match=r"no column 'label'; it has hi, yo.*add one if it is none"):
        found(tmp_path / "a.tsv")


def test_columns_by_their_names_in_the_file(tmp_path):
    (tmp_path / "a.csv").write_text("Review Text,Mood\nfine,good\npoor,bad\n")
    config = found(tmp_path / "a.csv", prompt="{Review Text} It was", label_column="mood")
    assert (config.task.verbalizers, counts(config)) == ("bad=bad,good=good", [1, 1])
    with pytest.raises(DataError, match=r"no column 'Modo'; .*did you mean 'Mood'\?"):
        found(tmp_path / "a.csv", prompt="{Review Text}", label_column="Modo")
    (tmp_path / "a.csv").write_text("Review Text,Mood\n")
    with pytest.raises(DataError, match="has no examples"):
        found(tmp_path / "a.csv", label_column="Mood")


def test_classes_of_images_are_found_too(tmp_path):
    write_folder(tmp_path / "folder", 6)
    config = found(tmp_path / "folder", image_column="image")
    assert class_names(task_from_config(config)) == ("bright", "dark")
    assert counts(config) == [3, 3]
    pixels, labels = images(12)
    with (tmp_path / "A.NPZ").open("wb") as file:
        np.savez(file, x_train=pixels, y_train=labels)
    config = found(tmp_path / "A.NPZ", image_column="image")
    assert class_names(task_from_config(config)) == ("0", "1")
    assert sum(counts(config)) == 12
