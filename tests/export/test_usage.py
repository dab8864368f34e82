"""The code in the card of an exported model: plain transformers, and the run's own predictions."""

import json
import re

import numpy as np
import pytest
from image_data import write_npz
from PIL import Image
from runs import run_factory, write_questions
from typer.testing import CliRunner

from hosl_flower.cli import cli
from strategies.hosl import Hosl
from strategies.split_fo import SplitFo

ADAPTERS = {
    "client_trainable": "lora", "server_trainable": "lora", "lora_rank": 2,
    "save_format": "adapters",
}  # fmt: skip


@pytest.fixture
def make(tiny_opt, tmp_path):
    return run_factory(SplitFo, tiny_opt, tmp_path, steps=2, directions=1)


@pytest.fixture
def card_code(tmp_path, monkeypatch):
    """card_code(run, ...) -> the names that the code of an export's card defines."""

    def executed(run, *options, files=(), links=()):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        done = CliRunner().invoke(cli, ["export", str(run), str(out), *options])
        assert done.exit_code == 0, done.stderr
        for name, image in dict(files).items():
            image.save(out / name)
        for name, target in dict(links).items():
            (out / name).symlink_to(target)
        (code,) = re.findall(r"^```python\n(.*?)^```", (out / "README.md").read_text(), re.M | re.S)
        assert "hosl_flower" not in code
        assert max(map(len, code.splitlines())) <= 100
        monkeypatch.chdir(out)
        names = {}
        exec(code, names)
        return names

    return executed


def predicted(run, *arguments):
    done = CliRunner().invoke(cli, ["predict", str(run), *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


LONG = f"a film, {'very ' * 200}dull"


@pytest.mark.parametrize(
    "changes",
    [
        {"verbalizers": "negative=terrible,positive=great"},
        {"verbalizers": "bad=not great,good=great"},  # several tokens
        {"verbalizers": "no=No,yes=Yes", "prompt": 'A {{"review"}}: {text}\nGood?\n'},
        {"verbalizers": "no=terrible,yes=great", **ADAPTERS},
        {"model": "random:bert-tiny", "verbalizers": "bad=terrible,good=great"},
        {"model": "random:roberta-tiny", "verbalizers": "bad=terrible,good=great"},
    ],
    ids=["word", "words", "newline", "adapters", "bert", "roberta"],
)
def test_the_code_predicts_as_the_command_does(make, card_code, changes, capsys):
    _, run, _ = make(**changes)
    code = card_code(run)
    assert capsys.readouterr().out.startswith("{")  # it prints an example
    texts = ["a lovely film", "", LONG]
    for text, row in zip(texts, predicted(run, *texts), strict=True):
        assert code["predict"]({"text": text}) == pytest.approx(row["probabilities"], rel=1e-4)


def test_the_code_for_adapters_predicts_as_the_command_does(make, card_code, tmp_path):
    _, run, _ = make(verbalizers="no=terrible,yes=great", **ADAPTERS)
    base = tmp_path / "opt0"  # found by its bare name from where the code runs
    code = card_code(run, "--what", "adapters", links={base.name: base})
    (row,) = predicted(run, "a lovely film")
    found = code["predict"]({"text": "a lovely film"})
    assert found == pytest.approx(row["probabilities"], rel=1e-4)


def test_the_code_for_several_columns_predicts_as_the_command_does(make, card_code, tmp_path):
    data = tmp_path / "pairs.csv"
    rows = "".join(f"it rains {i} times,it pours,{i % 2}\n" for i in range(20))
    data.write_text("premise,The Hypothesis,label\n" + rows)
    for model in ({}, {"model": "random:bert-tiny"}):
        _, run, _ = make(
            **model, data_path=str(data), prompt="{premise} so {The Hypothesis}?", task="pairs",
            verbalizers="no=No,yes=Yes",
        )  # fmt: skip
        code = card_code(run)
        example = {"premise": "it snows", "The Hypothesis": "it is cold"}
        (tmp_path / "new.csv").write_text("premise,The Hypothesis\nit snows,it is cold\n")
        (row,) = predicted(run, "--file", tmp_path / "new.csv")
        assert code["predict"](example) == pytest.approx(row["probabilities"], rel=1e-4)


def test_the_code_generates_the_answers_of_the_command(make, card_code, tmp_path):
    data = write_questions(tmp_path / "squad")
    _, run, _ = make(
        Hosl, task="squad", prompt="", verbalizers="", data_path=str(data), max_new_tokens=4,
        server_learning_rate=0.1, steps=6,
    )  # fmt: skip
    code = card_code(run)
    for row in predicted(run, "--file", data / "dev-v1.1.json"):
        assert code["predict"](row["inputs"]) == row["answer"]


@pytest.mark.parametrize("model", ["resnet-tiny", "vit-tiny"])
def test_the_code_classifies_images_as_the_command_does(make, card_code, tmp_path, model):
    data = write_npz(tmp_path / "images.npz")
    _, run, _ = make(
        model=f"random:{model}", data_path=str(data), task="brightness", prompt="",
        image_column="image", verbalizers="dark,bright", image_size=16, max_length=128,
    )  # fmt: skip
    noise = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    code = card_code(run, files={"image.png": image})
    image.save(tmp_path / "own.png")
    (row,) = predicted(run, tmp_path / "own.png")
    assert code["predict"](tmp_path / "own.png") == pytest.approx(row["probabilities"], rel=1e-4)
