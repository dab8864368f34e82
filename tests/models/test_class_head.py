"""The rows of a classifier's head are matched with the labels of the data by name."""

import json
import logging

import image_models
import pytest
import torch
from encoders import PADDED, TINY, halves, split_logits, whole_logits
from encoders import saved as saved  # a fixture
from runs import write_reviews
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertForTokenClassification,
)

from hosl_flower.config.parse import parse_config
from hosl_flower.errors import ConfigError
from hosl_flower.models.base_model import open_base
from hosl_flower.models.class_head import with_classes
from hosl_flower.models.image_processors import load_image_processor
from hosl_flower.models.processors import load_tokenizer
from hosl_flower.models.save_merged import save_merged
from hosl_flower.models.split import load_client, load_server
from hosl_flower.server.open_session import open_session
from hosl_flower.tasks.known_images import image_task
from hosl_flower.tasks.task import Task

saved_images = image_models.saved  # a fixture
OWN = ["positive", "negative", "neutral", "mixed", "none"]  # of the checkpoint, by row
DATA = ["mixed", "negative", "neutral", "none", "positive"]  # of the data, by label
ORDER = [3, 1, 2, 4, 0]


def called(directory, names):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = {str(row): name for row, name in enumerate(names)}
    config["label2id"] = {name: row for row, name in enumerate(names)}
    path.write_text(json.dumps(config))
    return open_base(str(directory))


@pytest.mark.parametrize("name", TINY)
def test_the_rows_are_those_of_the_same_names_and_so_is_what_is_saved(saved, name, tmp_path):
    directory, model = saved(name)
    base, fresh = with_classes(called(directory, OWN), DATA, 0)
    assert not fresh
    client, server = (f(base, 1, torch.float32, "cpu") for f in (load_client, load_server))
    expected = whole_logits(model, PADDED)[:, ORDER]
    assert torch.allclose(split_logits(client, server, PADDED), expected, rtol=1e-4, atol=1e-4)
    tensors = client.merged_parameters(), server.merged_parameters()
    save_merged(tmp_path / "merged", base, *tensors, load_tokenizer("random:any"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == dict(enumerate(DATA))
    assert merged.config.label2id == {name: label for label, name in enumerate(DATA)}
    before = [OWN[row] for row in whole_logits(model, PADDED).argmax(1)]
    after = [merged.config.id2label[int(row)] for row in whole_logits(merged, PADDED).argmax(1)]
    assert after == before
    again, _ = with_classes(open_base(str(tmp_path / "merged")), DATA, 0)
    assert torch.equal(
        load_server(again, 1, torch.float32, "cpu").lm_head.weight, server.lm_head.weight
    )


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_so_are_those_of_images(saved_images, name, tmp_path):
    directory, model = saved_images(name)
    base, fresh = with_classes(
        called(directory, OWN), DATA, 0, image_task("own", tuple(DATA), "image")
    )
    assert not fresh
    sides = [f(base, 1, torch.float32, "cpu") for f in (load_client, load_server)]
    processor = load_image_processor(str(directory), base.config, 16)
    save_merged(tmp_path / "merged", base, *(s.merged_parameters() for s in sides), processor)
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected, found = (
            model(image_models.PIXELS).logits,
            merged(image_models.PIXELS).logits,
        )
    assert torch.allclose(found, expected[:, ORDER], rtol=1e-5, atol=1e-5)
    assert merged.config.id2label == dict(enumerate(DATA))


def rows_of(base, names, task=None):
    """By label the row of the checkpoint's head that it gets; None for a fresh head."""
    headed, fresh = with_classes(base, names, 0, task)
    if fresh:
        return None
    own, new = torch.empty(5, 64), torch.empty(5, 64)
    base.source.fill("classifier.weight", own)
    headed.source.fill("classifier.weight", new)
    found = [own.eq(row).all(1).nonzero().item() for row in new]
    assert torch.equal(headed.source.rows("classifier.weight", (5, 64), [4, 1]), new[[4, 1]])
    bias, ordered = torch.empty(5), torch.empty(5)
    base.source.fill("classifier.bias", bias)
    headed.source.fill("classifier.bias", ordered)
    assert torch.equal(ordered, bias[found])
    return found


SAME = [
    (["A", "B", "C", "D", "E"], list("edcba"), [4, 3, 2, 1, 0]),
    (["NOT_ENTAILMENT", "Yes ", "x-y", "x", "y"], ["x y", "y", "x", "not entailment", "yes"],
     [2, 4, 3, 0, 1]),
    (["cafe\u0301", "stra\u00dfe", "\uff21", "b", "c"], ["a", "b", "c", "caf\u00e9", "STRASSE"],
     [2, 3, 4, 0, 1]),
    (["a", "A", "b", "c", "d"], ["A", "a", "b", "c", "d"], [1, 0, 2, 3, 4]),
    ([f"LABEL_{i}" for i in range(5)], list("edcba"), [0, 1, 2, 3, 4]),
    ([f"LABEL_{i}" for i in range(5)], list("43210"), [4, 3, 2, 1, 0]),
    (list("01234"), list("edcba"), [0, 1, 2, 3, 4]),
    (list("12345"), list("54321"), [4, 3, 2, 1, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("own", "names", "expected"), SAME)
def test_names_are_the_same_but_for_case_unicode_and_spaces(saved, own, names, expected):
    assert rows_of(called(saved("bert-tiny")[0], own), names) == expected


def test_the_words_of_a_task_are_names_too(saved):
    base = called(saved("bert-tiny")[0], OWN)
    task = Task(
        "own", "{text}", ("Negative", "Positive", "Mixed", "None", "Neutral"), tuple("npmxu")
    )
    assert rows_of(base, task.label_names, task) == [1, 0, 3, 4, 2]


OTHERS = [
    (
        ("n", "p", "m", "x", "u"),
        r"labels n, p, m, x, u: .* verbalizers = 'n=positive,p=negative,m=",
    ),
    ((), r"labels bad, a, b, c, d: .* verbalizers = 'positive,negative,neutral,mixed,none'"),
]


@pytest.mark.parametrize(("labels", "message"), OTHERS)
def test_other_names_are_refused_with_both_lists(saved, labels, message):
    base = called(saved("bert-tiny")[0], OWN)
    task = Task("own", "{text}", ("bad", "a", "b", "c", "d"), labels)
    names = task.label_names or task.verbalizers
    with pytest.raises(ConfigError, match=rf"classes positive, negative, .*none .*{message}"):
        with_classes(base, names, 0, task)
    _, fresh = with_classes(base, names, 0, task, fresh=True)
    assert fresh


def test_a_fresh_head_says_why(saved, caplog):
    caplog.set_level(logging.INFO, "hosl_flower")
    directory, model = saved("bert-tiny")
    assert with_classes(called(directory, OWN), ["a", "b"], 0)[1]
    assert "fresh one, for 2 classes: that of" in caplog.text
    assert "for 5 others (positive, negative, neutral, mixed, none)" in caplog.text
    BertForTokenClassification(model.config).save_pretrained(directory)
    base, fresh = with_classes(open_base(str(directory)), list("abcde"), 0)
    assert fresh
    assert "a BertForTokenClassification, is for something else" in caplog.text
    load_server(base, 1, torch.float32, "cpu")


def test_a_language_model_has_no_fresh_head(tiny_opt):
    with pytest.raises(ConfigError, match=r"fresh-head has no use: .* is a language model .opt"):
        with_classes(open_base(str(tiny_opt()[0])), ["a", "b"], 0, fresh=True)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_goes_by_the_names(saved, tmp_path, fresh):
    directory, model = saved("bert-tiny")
    model.resize_token_embeddings(50272)
    model.config.num_labels = 5
    model.save_pretrained(directory)
    load_tokenizer("random:any").save_pretrained(directory)
    called(directory, OWN)
    words = ",".join(f"{name}=answer{i}" for i, name in enumerate(DATA))
    keys = {
        "model": str(directory), "data-path": str(write_reviews(tmp_path / "d")), "task": "own",
        "prompt": "{text}", "verbalizers": words, "cut-layer": 1, "max-length": 32, "threads": 1,
        "device": "cpu", "output-dir": str(tmp_path), "fresh-head": fresh,
    }  # fmt: skip
    session = open_session(parse_config(keys), "x", 1)
    rows = session.server.submodel.lm_head.weight
    assert torch.equal(rows.detach(), model.classifier.weight[ORDER].detach()) != fresh
    assert session.base.config.id2label == dict(enumerate(DATA))


def test_halves_of_a_base_that_was_never_given_classes_are_as_they_were(saved):
    directory, model = saved("bert-tiny")
    called(directory, OWN)
    client, server = halves(directory, 1)
    expected = whole_logits(model, PADDED)
    assert torch.allclose(split_logits(client, server, PADDED), expected, rtol=1e-4, atol=1e-4)
