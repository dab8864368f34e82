"""Predictions and evaluations of finished runs: those of the run itself, from the command line."""

import csv
import json

import pytest
import torch
from image_data import images, write_folder, write_npz
from PIL import Image
from runs import WORDS, run_factory, write_questions
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hosl_flower.cli import cli
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl
from strategies.split_fo import SplitFo

WORD = {"verbalizers": "negative=terrible,positive=great"}
LORA = {"client_trainable": "lora", "server_trainable": "lora", "lora_rank": 2}


@pytest.fixture
def make(tiny_opt, tmp_path):
    return run_factory(HoSfl, tiny_opt, tmp_path, steps=2)


def invoke(*arguments):
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    return done, " ".join(done.stderr.split())


def objects(*arguments):
    """The JSON objects that a command prints."""
    done, errors = invoke(*arguments, "--json")
    assert done.exit_code == 0, errors
    return [json.loads(line) for line in done.stdout.splitlines()]


CHANGES = [
    WORD,
    {"verbalizers": "bad=not great,good=great"},  # several tokens
    {**WORD, "model": "random:bert-tiny"},
    {**WORD, "codec": "int8", "dtype": "bfloat16"},
    {**WORD, "client_micro_batch": 3},
    {**WORD, "labels": "client"},
    {**WORD, **LORA, "save_format": "adapters"},
    {**WORD, **LORA},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes))
def test_an_evaluation_is_the_run_s_own_on_the_same_examples(make, tmp_path, changes):
    results, run, _ = make(**changes)
    (found,) = objects("evaluate", run, tmp_path / "reviews" / "validation.csv")
    assert found["examples"] == results.held_out_examples == 24
    assert found["accuracy"] == results.accuracy
    merged = changes.get("client_trainable") == "lora" and "save_format" not in changes
    assert found["loss"] == pytest.approx(results.loss, rel=1e-5 if merged else 1e-6)
    if "labels" not in changes:  # else the run does not know these two
        assert found["balanced_accuracy"] == results.balanced_accuracy
        assert found["majority_accuracy"] == results.majority_accuracy
    # a directory is evaluated on its held-out part
    (same,) = objects("evaluate", run, tmp_path / "reviews")
    assert (same["loss"], same["examples"]) == (found["loss"], 24)


@pytest.mark.parametrize("changes", CHANGES[:3], ids=["word", "words", "classifier"])
def test_predictions_give_the_loss_and_accuracy_of_the_evaluation(make, tmp_path, changes):
    results, run, _ = make(**changes)
    data = tmp_path / "reviews" / "validation.csv"
    predicted = objects("predict", run, "--file", data)
    with data.open(newline="") as file:
        right = [int(row["label"]) for row in csv.DictReader(file)]
    names = [item.partition("=")[0] for item in changes["verbalizers"].split(",")]
    pairs = list(zip(predicted, right, strict=True))
    hits = sum(row["label"] == names[label] for row, label in pairs)
    assert hits == round(results.accuracy * 24)
    losses = [-torch.tensor(row["probabilities"][names[label]]).log() for row, label in pairs]
    assert float(sum(losses) / 24) == pytest.approx(results.loss, rel=1e-4)
    for row in predicted:
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["probabilities"][row["label"]] == max(row["probabilities"].values())


def test_texts_files_and_formats_give_the_same_predictions(make, tmp_path):
    _, run, _ = make(**WORD)
    texts = ["a lovely film", 'a "dull" film,\nnumber 2', "[bold]x[/]"]
    whole = objects("predict", run, *texts)
    assert [row["inputs"] for row in whole] == [{"text": text} for text in texts]
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["Text", "other"], *([text, "x"] for text in texts)])
    assert objects("predict", run, "--file", tmp_path / "new.csv") == whole
    done, _ = invoke("predict", run, *texts)
    table = list(csv.DictReader(done.stdout.splitlines(keepends=True)))
    assert list(table[0]) == ["text", "label", "p(negative)", "p(positive)"]
    assert [row["text"] for row in table] == texts
    assert [row["label"] for row in table] == [row["label"] for row in whole]
    out = tmp_path / "out.csv"
    assert invoke("predict", run, *texts, "--out", out)[0].stdout == f"predictions: {out}\n"
    assert out.read_text() == done.stdout
    invoke("predict", run, *texts, "--out", tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole


def test_on_a_terminal_predictions_are_a_table(make, monkeypatch):
    _, run, _ = make(**WORD)
    monkeypatch.setattr("hosl_flower.cli.predictions.on_terminal", lambda: True)
    done, _ = invoke("predict", run, "a [bold]film[/]")
    assert "a [bold]film[/] │" in done.stdout
    assert "p(negative)" in done.stdout


def test_columns_of_a_prompt_come_from_a_file(make, tmp_path):
    data = tmp_path / "pairs.csv"
    rows = [[f"it {WORDS[i % 2][i % 4]}, {i} times", "it rains", i % 2] for i in range(40)]
    with data.open("w", newline="") as file:
        csv.writer(file).writerows([["premise", "hypothesis", "label"], *rows])
    _, run, _ = make(**WORD, data_path=str(data), prompt="{premise} so {hypothesis}?", task="pairs")
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["hypothesis", "premise"], ["it rains", "it pours"]])
    (row,) = objects("predict", run, "--file", tmp_path / "new.csv")
    assert row["inputs"] == {"premise": "it pours", "hypothesis": "it rains"}
    assert "has the columns premise, hypothesis: pass a file" in invoke("predict", run, "a")[1]
    with (tmp_path / "one.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["premise", "hypothesi"], ["it pours", "it rains"]])
    done, errors = invoke("predict", run, "--file", tmp_path / "one.csv")
    assert done.exit_code == 1
    assert "has no column 'hypothesis'" in errors
    assert "did you mean 'hypothesi'?" in errors


def test_generated_answers_are_predicted_and_evaluated(make, tmp_path):
    data = write_questions(tmp_path / "squad")
    results, run, _ = make(
        Hosl, task="squad", prompt="", verbalizers="", data_path=str(data), max_new_tokens=4,
        steps=6, eval_every=6, server_learning_rate=0.1,
    )  # fmt: skip
    (found,) = objects("evaluate", run, data / "dev-v1.1.json")
    assert found["examples"] == results.held_out_examples
    assert (found["exact_match"], found["f1"]) == (results.exact_match, results.f1)
    assert found["loss"] == pytest.approx(results.loss, rel=1e-6)
    predicted = objects("predict", run, "--file", data / "dev-v1.1.json")
    assert len(predicted) == 4
    assert predicted[0]["inputs"].keys() == {"title", "context", "question"}
    assert all(isinstance(row["answer"], str) for row in predicted)


def test_images_are_predicted_from_files_folders_and_tables(make, tmp_path):
    data = write_npz(tmp_path / "images.npz")
    results, run, _ = make(
        SplitFo, model="random:resnet-tiny", data_path=str(data), task="brightness", prompt="",
        image_column="image", verbalizers="dark,bright", image_size=16, max_length=128,
        directions=1,
    )  # fmt: skip
    (found,) = objects("evaluate", run, data)
    assert (found["accuracy"], found["examples"]) == (results.accuracy, 24)
    assert found["loss"] == pytest.approx(results.loss, rel=1e-6)
    assert len(objects("predict", run, "--file", data)) == 24  # its test part

    write_folder(tmp_path / "classes")
    (tmp_path / "flat").mkdir()
    for number, pixels in enumerate(images(6, 0, 3)[0]):
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{number}.png")
    flat = objects("predict", run, "--file", tmp_path / "flat")
    paths = [str(tmp_path / "flat" / f"{number}.png") for number in range(6)]
    assert [row["inputs"]["image"] for row in flat] == paths
    assert objects("predict", run, *paths) == flat
    (tmp_path / "flat" / "list.csv").write_text(
        "image,x\n" + "".join(f"{number}.png,1\n" for number in range(6))
    )
    assert objects("predict", run, "--file", tmp_path / "flat" / "list.csv") == flat
    by_class = objects("predict", run, "--file", tmp_path / "classes")
    key = lambda row: row["probabilities"]["dark"]  # noqa: E731
    assert sorted(map(key, by_class)) == pytest.approx(sorted(map(key, flat)))
    (found,) = objects("evaluate", run, tmp_path / "classes")
    assert found["examples"] == 6
    (tmp_path / "flat" / "list.csv").write_text("image,x\nnope.png,1\n")
    done, errors = invoke("predict", run, "--file", tmp_path / "flat" / "list.csv")
    assert (done.exit_code, "nope.png' is not a file" in errors) == (1, True)
    done, errors = invoke("predict", run, "a cat")
    assert "'a cat' is not a file: the run classifies images" in errors


def test_mistakes_are_one_line(make, tmp_path):
    _, run, _ = make(**WORD)
    data = tmp_path / "reviews" / "validation.csv"
    (tmp_path / "bare.csv").write_text("text,stars\na film,1\n")
    for arguments, complaint in (
        (["predict", run], "but neither were given"),
        (["predict", run, "a", "--file", data], "but both were given"),
        (["predict", run, data], "is a file: pass it with --file"),
        (["predict", run, "a", "--out", "a.txt"], "--out = 'a.txt': expected a name that ends in"),
        (["predict", run, "a", "--out", tmp_path / "no" / "a.csv"], "cannot be written"),
        (["predict", tmp_path, "a"], "is no run directory"),
        (["predict", run, "--file", tmp_path / "nope.csv"], "nope.csv' does not exist"),
        (["evaluate", run, tmp_path / "bare.csv"], "has no column 'label'"),
        (["evaluate", run, tmp_path / "bare.csv"], "rename or add the column in the file"),
    ):
        done, errors = invoke(*arguments)
        assert done.exit_code == 1, arguments
        assert complaint in errors
        assert isinstance(done.exception, SystemExit), "no traceback"
    weights = run / "model" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: t for name, t in tensors.items() if "layers.2" not in name}, weights)
    done, errors = invoke("predict", run, "a")
    assert done.exit_code == 1
    assert "layers.2" in errors
