"""Whole runs of text classifiers, in process: the same loop, protocol and strategies as ever."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from runs import run_factory
from specs import client_spec
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
)
from typer.testing import CliRunner

from hosl_flower.cli import cli
from hosl_flower.client.client import Client
from hosl_flower.config.parse import parse_config
from hosl_flower.config.resolve import resolve
from hosl_flower.config.task_from_config import task_from_config
from hosl_flower.data.encoders.classifier_text import TextInputs
from hosl_flower.data.encoders.make import make_inputs
from hosl_flower.data.sources import load_source
from hosl_flower.errors import ConfigError, DataError, ModelError
from hosl_flower.ledger.ledger import Ledger, fingerprint
from hosl_flower.models.architectures import TEXT_ARCHITECTURES
from hosl_flower.models.base_model import model_config, open_base
from hosl_flower.protocol.messages.activations import Forward, Probe
from hosl_flower.run.plan import plan
from hosl_flower.run.start import open_run
from hosl_flower.tasks.known import TASKS
from strategies.heron import Heron
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl
from strategies.split_fo import SplitFo

MODELS = ["bert-tiny", "roberta-tiny"]
MANY = {"strategy": "strategies.ho_sfl:HoSfl", "num_clients": 3, "clients_per_step": 2}


@pytest.fixture
def run(tiny_opt, tmp_path):
    return run_factory(
        HoSfl,
        tiny_opt,
        tmp_path,
        model="random:bert-tiny",
        directions=1,
        verbalizers="bad=terrible,good=great",
    )


# the bundled messages, some of them
MESSAGES = {
    "task": "sms-spam", "data_path": "", "prompt": "", "verbalizers": "", "max_length": 48,
    "train_examples": 200, "eval_examples": 60, "eval_batch_size": 20, "batch_size": 8,
    "server_optimizer": "adamw", "server_learning_rate": 1e-3, "client_learning_rate": 1e-4,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_ho_sfl_learns_and_its_ledger_replays_to_the_same_bits(run, name):
    results, directory, config = run(
        **MANY, **MESSAGES, model=f"random:{name}", steps=12, eval_every=12
    )
    assert results.evaluations[-1]["loss"] < results.evaluations[0]["loss"]
    client = Client(open_run(HoSfl(config), "again")[0].spec)
    before = fingerprint(client.state.parameters)
    client.follower.apply(Ledger.read(directory / "ledger.jsonl").entries)
    assert fingerprint(client.state.parameters) == results.fingerprint != before


def test_hosl_trains_a_classifier(run):
    results, directory, _ = run(Hosl, **MESSAGES, steps=30, eval_every=30)
    first, last = results.evaluations[0], results.evaluations[-1]
    assert last["loss"] < 0.8 * first["loss"]
    model = AutoModelForSequenceClassification.from_pretrained(directory / "model")
    assert model.config.id2label == {0: "ham", 1: "spam"}  # not the words of the prompt
    saved = json.loads((directory / "model" / "tokenizer.json").read_text())
    assert saved["padding"] is None
    assert saved["truncation"] is None


@pytest.mark.parametrize("name", MODELS)
def test_split_first_order_is_plain_training_of_the_whole_model(run, name):
    """As a user of transformers would train: its own tokenizing, right-padded, its own loss."""
    still = {"client_learning_rate": 0.0, "server_learning_rate": 0.0}
    _, start, _ = run(SplitFo, model=f"random:{name}", steps=1, **still)
    moving = {"client_learning_rate": 0.05, "server_learning_rate": 0.05}
    _, directory, config = run(SplitFo, model=str(start / "model"), steps=3, **moving)
    model = AutoModelForSequenceClassification.from_pretrained(start / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(start / "model")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = Client(open_run(SplitFo(config), "again")[0].spec).pool.client(0)
    for number in range(3):
        batch = data.train_batch(number, 5)
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in batch.input_ids]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        assert inputs["attention_mask"].sum() == batch.attention_mask.sum()
        optimizer.zero_grad()
        model(**inputs, labels=batch.labels).loss.backward()
        optimizer.step()
    trained = AutoModelForSequenceClassification.from_pretrained(directory / "model").state_dict()
    for key, expected in model.state_dict().items():
        assert torch.allclose(trained[key], expected, rtol=1e-4, atol=1e-6), key


def test_exact_derivatives_are_what_probes_estimate(run):
    changes = {**MANY, "steps": 3, "eval_every": 3, "client_learning_rate": 1e-4}
    exact, _, _ = run(**changes, derivative="forward-mode")
    probed, _, _ = run(**changes)
    assert exact.loss == pytest.approx(probed.loss, rel=1e-3)
    assert exact.fingerprint != probed.fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"client_gradient": "recompute", "client_optimizer": "adafactor"},
        {"client_trainable": "lora", "lora_targets": "query,value"},
        {"client_trainable": "lora", "lora_targets": "query", "client_quantization": "int8"},
    ],
)
def test_other_ways_to_train_the_client(run, changes):
    results, directory, _ = run(SplitFo, **changes)
    assert results.client_parameters["trained"]
    AutoModelForSequenceClassification.from_pretrained(directory / "model")


@torch.no_grad()
def held_out_score(directory, config):
    """(accuracy, loss) of an exported model on a run's held-out data, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    _, examples = load_source(config.data.path, task_from_config(config), config.seed)
    right, losses = 0, []
    for example in examples:
        logits = model(**tokenizer(example["text"], return_tensors="pt")).logits[0]
        right += int(logits.argmax()) == example["label"]
        losses.append(F.cross_entropy(logits, torch.tensor(example["label"])))
    return right / len(examples), float(sum(losses)) / len(losses)


@pytest.mark.parametrize("name", MODELS)
def test_plain_transformers_score_an_export_as_the_run_does(run, name, tmp_path):
    results, directory, config = run(**MANY, model=f"random:{name}")
    done = CliRunner().invoke(cli, ["export", str(directory), str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    accuracy, loss = held_out_score(tmp_path / "out", config)
    assert accuracy == results.accuracy
    assert loss == pytest.approx(results.loss, abs=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "pipeline_tag: text-classification" in card
    assert "- Text: `text` of the data, without a prompt." in card
    assert "- Classes, by label: `bad`, `good`." in card
    for side in ("client", "server"):
        done = CliRunner().invoke(
            cli, ["export", str(directory), str(tmp_path / side), "--what", side]
        )
        assert done.exit_code == 0, done.stderr
        assert open_base(str(tmp_path / side)).config.id2label == {0: "bad", 1: "good"}
    done = CliRunner().invoke(cli, ["generate", str(directory), "a film"])
    assert done.exit_code == 1
    assert f"use `hosl-flower predict {directory}` for labels" in " ".join(done.stderr.split())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_probes_need_little_more_memory_than_inference(run, dtype, monkeypatch):
    wide = {**TEXT_ARCHITECTURES["bert-tiny"], "hidden_size": 128, "intermediate_size": 512}
    monkeypatch.setitem(TEXT_ARCHITECTURES, "bert-wide", wide)
    changes = {"model": "random:bert-wide", "batch_size": 32, "dtype": dtype}
    spec = open_run(Hosl(run(None, **changes)[2]), "x")[0].spec
    client = Client(spec)
    at = {"step": 1, "partition": 0, "position": 0, "digest": client.state.digest, "batch": 0}
    before = fingerprint(client.state.parameters)
    list(client.answer([Forward(**at), Probe(**at, seed=1, coefficient=1e-3)]))
    assert client.meter.peaks["probe"] <= 1.10 * client.meter.peaks["forward"], client.meter.peaks
    assert fingerprint(client.state.parameters) == before


def test_a_plan_is_what_the_run_then_needs(run, monkeypatch):
    monkeypatch.setattr("hosl_flower.run.plan._SECONDS", 0.0)
    results, _, config = run(**MANY, max_length=48)
    planned = plan(config)
    assert planned.client_parameters == results.client_parameters["held"]
    others = {"describe", "fingerprint", "evaluate"}
    sent = sum(n["bytes"] for k, n in results.bytes_up.items() if k not in others)
    assert planned.up_bytes == pytest.approx(sent / config.steps, rel=0.35)
    for phase, peak in results.client_peak_memory["tensor_bytes"].items():
        if phase != "evaluate":
            assert peak <= 1.01 * planned.peak_bytes.get(phase, 0), phase


@pytest.fixture
def wordpiece(tmp_path):
    """A tokenizer of BERT's own kind, which makes token types, and a model's configuration."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(vocab_size=len(words), max_position_embeddings=16)
    return BertTokenizer(vocab=str(tmp_path / "vocab.txt")), config


def test_a_pair_is_what_the_tokenizer_makes_of_two_columns(wordpiece):
    tokenizer, config = wordpiece
    inputs = TextInputs(TASKS["rte"], tokenizer, config, 8)
    inputs.check(config)
    examples = [
        {"premise": "a b", "hypothesis": "c", "label": 1},
        {"premise": "a b c d e f", "hypothesis": "a", "label": 0},
    ]
    batch = inputs.collate(examples)
    assert batch.labels.tolist() == [1, 0]
    (ids, types), (longer, its_types) = batch.inputs.tolist()
    assert ids == [0, 0, 2, 5, 6, 3, 7, 3]
    assert types == [0, 0, 0, 0, 0, 0, 1, 1]
    assert longer == [2, 5, 6, 7, 8, 3, 5, 3]  # the longer text has lost its end
    assert its_types == [0, 0, 0, 0, 0, 0, 1, 1]
    assert batch.attention_mask[0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    largest = inputs.largest(3)
    assert largest.inputs.shape == (3, 2, 8)
    single = TextInputs(TASKS["sst2"], tokenizer, config, 8).collate(
        [{"sentence": "a", "label": 0}]
    )
    assert single.inputs[:, 0].tolist() == [[2, 5, 3]]
    config.type_vocab_size = 1  # a model without token types
    assert TextInputs(TASKS["rte"], tokenizer, config, 8).collate(examples).inputs.dim() == 2


def test_a_tokenizer_that_does_not_fit_is_said_in_a_line(wordpiece):
    tokenizer, config = wordpiece
    inputs = TextInputs(TASKS["sst2"], tokenizer, config, 17)
    with pytest.raises(ModelError, match="max-length = 17, but the model has 16 positions"):
        inputs.check(config)
    inputs = TextInputs(TASKS["sst2"], tokenizer, config, 16)
    config.vocab_size = 10
    with pytest.raises(ModelError, match="has 11 tokens, the model's embedding only 10 rows"):
        inputs.check(config)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[X]"]})
    config.vocab_size = 11
    inputs = TextInputs(TASKS["sst2"], tokenizer, config, 16)
    inputs.check(config)
    with pytest.raises(
        DataError, match=r"the text '\[X\]', a special token that this model has no"
    ):
        inputs.collate([{"sentence": "a [X]", "label": 0}])


def test_a_run_on_pairs_of_sentences(run, tmp_path):
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["premise", "hypothesis", "label"])
        for i in range(30):
            word = ("rains", "snows")[i % 2]
            writer.writerow([f"it {word}, {i} times", "it rains", ("yes", "no")[i % 2]])
    changes = {"prompt": "{premise} {hypothesis}", "verbalizers": "yes=Yes,no=No"}
    results, directory, _ = run(data_path=str(tmp_path / "pairs.csv"), task="pairs", **changes)
    assert results.evaluations[-1]["loss"] != results.evaluations[0]["loss"]
    model = AutoModelForSequenceClassification.from_pretrained(directory / "model")
    assert model.config.label2id == {"yes": 0, "no": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": "client"}, "answer words, random:bert-tiny is a classifier .bert.; use labels"),
        ({"prompt": "{a} {b} {c}"}, "takes one column of text or a pair, task reviews has a, b, c"),
        ({"task": "digits", "prompt": "", "verbalizers": "", "data_path": "", "max_length": 128},
         "digits is about images, random:bert-tiny is a model of text"),
        ({"task": "squad", "prompt": "", "verbalizers": ""},
         "answers of task squad are generated, random:bert-tiny is a classifier .bert."),
        ({"save_format": "adapters", "client_trainable": "lora", "server_trainable": "lora",
          "lora_targets": "query"}, "adapters cannot hold the head of a classifier"),
        ({"client_trainable": "lora"}, r"'q_proj' matches no linear module .* query, value"),
        ({"cut_layer": 5}, r"cut-layer = 5 is outside 0..4"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_line(run, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(Hosl, **changes)


def test_residual_feedback_and_heads_on_clients_are_refused(run):
    with pytest.raises(ConfigError, match=r"need a pre-norm model .* use recompute"):
        run(SplitFo, client_gradient="residual", client_optimizer="adafactor")
    with pytest.raises(ConfigError, match="needs a language model; for classifiers use another"):
        run(Heron)


def test_positions_of_roberta_begin_after_the_padding(run):
    spec = client_spec(model="random:roberta-tiny", max_length=255)
    config = model_config(spec.model)
    with pytest.raises(ModelError, match="max-length = 255, but the model has 254 positions"):
        make_inputs(spec, spec.model, config).check(config)


def test_without_a_hub_roberta_falls_back_to_random_weights(hub_cache):
    config = parse_config({"model": "FacebookAI/roberta-base", "task": "sst2"})
    resolved = resolve(config, "x")
    assert resolved.spec.model == "random:roberta-base"
    assert "same architecture with RANDOM weights" in resolved.notice
