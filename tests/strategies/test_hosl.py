"""HOSL in process: equal to the one-page reference, and its promises kept."""

import csv
import json

import pytest
import torch
from reference_hosl import hosl as reference
from runs import PROMPT, metrics, run_factory
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hosl_flower.errors import ConfigError, DivergedError, DriftError
from hosl_flower.ledger.ledger import Ledger, fingerprint
from hosl_flower.protocol.messages.activations import Evaluate
from hosl_flower.run import start
from hosl_flower.server.in_process import InProcessLink
from strategies.hosl import Hosl


@pytest.fixture
def make(tiny_opt, tmp_path):
    """Factory of finished runs: make(**config) -> (results, run directory, config)."""
    return run_factory(Hosl, tiny_opt, tmp_path, **{"save-model": False})


@pytest.mark.parametrize("kind", ["signs", "rank1"])
def test_a_run_equals_the_reference_loop(make, kind):
    results, directory, config = make(perturbation=kind, save_model=True)
    losses, gradients, accuracy, client, server = reference(
        config.model,
        directory.parent.parent / "reviews",
        config.cut_layer,
        PROMPT,
        config.task.verbalizer_list,
        {
            "steps": 4, "batch": 5, "directions": 2, "epsilon": config.zo.epsilon, "seed": 3,
            "client_lr": 1e-3, "server_lr": 1e-2, "kind": kind,
        },
    )  # fmt: skip
    ours = [row["train_loss"] for row in metrics(directory) if "train_loss" in row]
    scalars = [list(e.scalars) for e in Ledger.read(directory / "ledger.jsonl").entries]
    assert ours == pytest.approx(losses, rel=1e-5)
    for mine, theirs in zip(scalars, gradients, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=2e-3)  # losses differ by rounding / eps
    assert results.accuracy == accuracy
    merged = load_file(directory / "model" / "model.safetensors")
    for n in dict(client.named_parameters()):
        side = client if ".embed" in n or ".layers.0." in n or ".layers.1." in n else server
        expected = dict(side.named_parameters())[n].detach()
        assert torch.allclose(merged[n], expected, atol=2e-5), n
    assert torch.allclose(merged["lm_head.weight"], server.lm_head.weight, atol=2e-5)


def test_held_out_batches_are_asked_for_in_groups(make, monkeypatch):
    """24 examples in batches of 7 are 4 batches."""
    _, together, _ = make()
    asked, original = [], InProcessLink.exchange

    def exchange(self, requests):
        asked.extend(sum(type(r) is Evaluate for r in own) for own in requests.values())
        return original(self, requests)

    monkeypatch.setattr(InProcessLink, "exchange", exchange)
    monkeypatch.setattr("hosl_flower.server.evaluate._TOGETHER", 3)
    _, grouped, _ = make()
    assert [count for count in asked if count] == [3, 1] * 3, "at steps 0, 2 and 4"
    assert metrics(grouped) == metrics(together)


def test_the_same_seed_gives_the_same_curve_and_another_seed_another(make):
    first, a, _ = make()
    again, b, _ = make()
    other, c, _ = make(seed=4)
    assert metrics(a) == metrics(b) != metrics(c)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.ledger_digest == again.ledger_digest


def test_the_merged_model_scores_the_last_evaluation_in_plain_transformers(make):
    results, directory, _ = make(steps=6, save_model=True)
    model = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    answers = [
        tokenizer(f" {w}", add_special_tokens=False).input_ids[0] for w in ("terrible", "great")
    ]
    right = total = 0
    with (directory.parent.parent / "reviews" / "validation.csv").open() as file:
        for row in csv.DictReader(file):
            inputs = tokenizer(f"{row['text']} It was", return_tensors="pt")
            with torch.no_grad():
                logits = model(**inputs).logits[0, -1, answers]
            right += int(logits.argmax()) == int(row["label"])
            total += 1
    assert results.accuracy == right / total


def test_central_evaluation_equals_split_evaluation(make):
    split, a, _ = make(evaluation="split")
    central, b, _ = make(evaluation="central")
    assert metrics(a) == metrics(b)
    assert split.bytes_up["evaluate"]["messages"] > 0
    assert "evaluate" not in central.bytes_up


def test_relay_trains_one_model_over_all_clients(make):
    results, directory, _ = make(num_clients=3, turn_steps=2, steps=7)
    ledger = Ledger.read(directory / "ledger.jsonl")
    assert [entry.step for entry in ledger.entries] == list(range(1, 8))
    assert results.bytes_up["forward"]["messages"] == 7


def test_a_client_with_another_base_is_found_before_training(make, monkeypatch, tmp_path):
    opened = start.InProcessLink

    class OtherBase(opened):
        def __init__(self, answer, *rest):
            super().__init__(answer, *rest)
            with torch.no_grad():
                next(iter(answer.__self__.state.parameters.values())).add_(0.01)

    monkeypatch.setattr(start, "InProcessLink", OtherBase)
    with pytest.raises(DriftError, match=r"client 0.*before the first step.*base checkpoint"):
        make(num_clients=2)
    assert not (tmp_path / "runs").exists()


def test_a_frozen_client_stays_at_its_base(make):
    frozen, directory, config = make(client_learning_rate=0.0, save_model=True)
    merged = load_file(directory / "model" / "model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(config.model).state_dict()
    own = {n: t for n, t in merged.items() if ".embed" in n or ".layers.0" in n or ".layers.1" in n}
    assert fingerprint(own) == fingerprint({n: base[n] for n in own})
    assert fingerprint(own) == frozen.fingerprint


def test_blocks_only_leaves_the_embeddings_alone(make):
    results, directory, config = make(client_trainable="blocks", save_model=True)
    name = "model.decoder.embed_tokens.weight"
    merged = load_file(directory / "model" / "model.safetensors")
    assert torch.equal(
        merged[name], AutoModelForCausalLM.from_pretrained(config.model).state_dict()[name]
    )
    held, trained = results.client_parameters["held"], results.client_parameters["trained"]
    assert held - trained == (50272 + 130) * 16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_saves(make, dtype):
    _, directory, config = make(
        dtype=dtype, perturbation="gaussian", server_optimizer="adamw", save_model=True
    )
    merged = load_file(directory / "model" / "model.safetensors")
    name = "model.decoder.layers.0.fc1.weight"
    base = AutoModelForCausalLM.from_pretrained(config.model).state_dict()[name]
    own = getattr(torch, dtype)
    assert torch.equal(merged[name], merged[name].to(own).float())
    assert not torch.equal(merged[name], base.to(own).float())


@pytest.mark.parametrize("cut", [0, 3])
def test_the_extreme_cuts_train(make, cut):
    results, _, _ = make(cut_layer=cut, steps=2)
    assert len(results.evaluations) == 2


def test_bytes_are_two_q_plus_one_activations_up(make):
    results, _, _ = make(directions=3, steps=5)
    up = results.bytes_up
    assert up["probe"]["messages"] == 2 * 3 * 5
    assert up["forward"]["messages"] == 5
    assert up["probe"]["bytes"] / up["forward"]["bytes"] == pytest.approx(6, rel=0.01)


def test_the_run_directory_is_complete(make):
    results, directory, config = make(pictures=True, save_model=True)
    saved = json.loads((directory / "results.json").read_text())
    top = ("method", "model", "task", "pretrained", "seed", "steps", "accuracy")
    assert list(saved)[:10] == [*top, "balanced_accuracy", "loss", "wall_seconds"]
    assert saved["method"] == "hosl"
    assert saved["pretrained"] is True
    assert saved["accuracy"] == saved["evaluations"][-1]["accuracy"] == results.accuracy
    assert [row["step"] for row in saved["evaluations"]] == [0, 2, 4]
    assert set(saved["seconds_per_step"]) == {"client", "server", "transport", "total"}
    assert saved["client_peak_memory"]["bytes"] > 2**20
    peaks = saved["client_peak_memory"]["tensor_bytes"]
    assert peaks.pop("backward") == peaks.pop("exchange") == 0, "no such thing on this client"
    assert all(n > 2**14 for n in peaks.values())
    for picture in ("curve.png", "partition.png"):
        assert (directory / picture).read_bytes().startswith(b"\x89PNG")
    record = json.loads((directory / "config.json").read_text())
    assert record["config"] == config.as_keys()
    assert record["versions"]["torch"].startswith("2.")
    assert [path.name for path in directory.glob(".*")] == [".lock"]


def test_divergence_is_one_clear_error(make):
    with pytest.raises(DivergedError, match="lower server-learning-rate"):
        make(server_learning_rate=1e3, steps=40)


def test_a_directory_that_holds_a_run_is_not_overwritten(make):
    make(run_name="taken")
    with pytest.raises(ConfigError, match="already holds a run"):
        make(run_name="taken")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"cut_layer": 4}, r"cut-layer = 4 is outside 0\.\.3"),
        ({"max_length": 4000}, "max-length = 4000"),
        ({"num_clients": 41}, "41 clients but only 40 training examples"),
        ({"model": "/no/such/model"}, "'/no/such/model' does not exist"),
        ({"data_path": "/no/such/data"}, "'/no/such/data' does not exist"),
        ({"prompt": "{review} It was"}, "no column 'review'"),
        ({"device": "cuda:7"}, "cuda:7"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(make, tmp_path, changes, complaint):
    if torch.cuda.is_available() and "device" in changes:
        changes = {"device": "mps"}
        complaint = "mps"
    with pytest.raises(Exception, match=complaint):
        make(**changes)
    assert not (tmp_path / "runs").exists()
