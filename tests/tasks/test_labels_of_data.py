"""tasks/labels.py: labels as files write them."""

import pytest

from hosl_flower.config.parse import parse_config
from hosl_flower.config.task_from_config import task_from_config
from hosl_flower.errors import ConfigError, DataError
from hosl_flower.tasks.known import TASKS
from hosl_flower.tasks.labels import parse_label

SST2 = TASKS["sst2"]


def task(**keys):
    return task_from_config(parse_config({key.replace("_", "-"): v for key, v in keys.items()}))


def own_task(words="bad,good", **keys):
    return task(task="own", data_path="x.csv", prompt="{text} It was", verbalizers=words, **keys)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, 0), (1.0, 1), ("1", 1), (" 0 ", 0), ("1.0", 1), ("1.000", 1), (True, 1), (False, 0),
        ("TRUE", 1), ("Negative", 0), ("POSITIVE", 1), ("\u00a0positive ", 1),
        ("\uff50ositive", 1),
    ],
)  # fmt: skip
def test_labels(value, label):
    assert parse_label(value, SST2, "here") == label


@pytest.mark.parametrize("value", [-1, 2, 0.5, "", "neutral", "1e0", None, float("nan"), "\u00b2"])
def test_other_labels_are_refused_with_the_place(value):
    with pytest.raises(DataError, match=r"here, row 3: .* 0\.\.1 or negative, positive"):
        parse_label(value, SST2, "here, row 3")


@pytest.mark.parametrize("value", [None, float("nan"), "", " ", "nan", "NaN", "<NA>", -1, "-1.0"])
def test_a_missing_label_is_said_to_be_missing(value):
    for own in (SST2, own_task()):
        with pytest.raises(DataError, match=r"here: .*rows without a label cannot be used"):
            parse_label(value, own, "here")


@pytest.mark.parametrize("value", [[1], {"a": 1}, b"1"])
def test_several_labels_are_none(value):
    with pytest.raises(DataError, match="here: expected one label, a number or a word, got a "):
        parse_label(value, SST2, "here")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("caf\u00e9", "Cafe\u0301"),
        ("Cafe\u0301", "CAF\u00c9"),
        ("stra\u00dfe", "STRASSE"),
        ("New York", "new  york"),
        ("new york", "New\u00a0York "),
        ("none", "None"),
        ("\u2460", "1"),
    ],
)
def test_a_label_is_known_in_any_case_spacing_and_form_of_unicode(name, value):
    own = own_task(f"other=a,{name}=b")
    assert parse_label(value, own, "here") == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("a", "A"), ("caf\u00e9", "cafe\u0301"), ("a b", "a\u00a0b"), ("ss", "\u00df")],
)
def test_two_names_of_one_label_are_refused(one, other):
    with pytest.raises(ConfigError, match=r"are one label.* give each label once"):
        own_task(f"{one}=bad,{other}=good")
    with pytest.raises(ConfigError, match="are one label"):
        task(task="own", image_column="image", verbalizers=f"{one},{other}")


def test_many_labels_and_long_values_are_cut_in_messages():
    own = own_task(",".join(f"intent{n}=word{n}" for n in range(77)))
    with pytest.raises(DataError) as caught:
        parse_label("a" * 500, own, "here")
    assert "intent19, ... (77 in all)" in str(caught.value)
    assert "a" * 41 not in str(caught.value)


def test_labels_that_are_words_are_named_next_to_the_answers():
    own = own_task("Neg=bad, p=good")
    assert (own.label_names, own.verbalizers) == (("neg", "p"), ("bad", "good"))
    assert [parse_label(value, own, "here") for value in ("neg", "P", 1)] == [0, 1, 1]
    stars = own_task("1=bad,2=good")
    assert [parse_label(value, stars, "here") for value in (1, "2", 2.0)] == [0, 1, 1]
    with pytest.raises(DataError, match=r"here: label 0 is not one of .* 1, 2"):
        parse_label(0, stars, "here")
    with pytest.raises(DataError, match=r"here: label 'Sport' is a word: .* sport=<answer>,"):
        parse_label("Sport", own_task(), "here")
    signed = own_task("-1=bad,1=good")
    assert [parse_label(value, signed, "here") for value in (-1, "1", -1.0)] == [0, 1, 0]
    swapped = task(task="sst2", verbalizers="positive=great,negative=terrible")
    assert parse_label("negative", swapped, "here") == 1


def test_labels_of_images_are_named_next_to_the_classes():
    own = task(task="own", image_column="image", verbalizers="dog=Hund,cat=Katze")
    assert (own.label_names, own.verbalizers) == (("dog", "cat"), ("Hund", "Katze"))
    assert [parse_label(value, own, "here") for value in ("Dog", "cat", 1)] == [0, 1, 1]
    plain = task(task="own", image_column="image", verbalizers="Dog,cat")
    assert [parse_label(value, plain, "here") for value in ("dog", "cat")] == [0, 1]
    renamed = task(task="digits", verbalizers=",".join(f"{i}=no. {i}" for i in range(10)))
    assert (parse_label("7", renamed, "here"), renamed.verbalizers[7]) == (7, "no. 7")
