"""Whole runs on images, in process: the same loop, protocol and strategies as on text."""

import contextlib
import json
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_data import write_npz
from runs import metrics
from transformers import AutoImageProcessor, AutoModelForImageClassification
from typer.testing import CliRunner

from hosl_flower.cli import cli
from hosl_flower.client.client import Client
from hosl_flower.config.parse import parse_config
from hosl_flower.config.task_from_config import task_from_config
from hosl_flower.data.readers.images import decode
from hosl_flower.data.sources import load_source
from hosl_flower.errors import ConfigError
from hosl_flower.ledger.ledger import Ledger, fingerprint
from hosl_flower.models.architectures import IMAGE_ARCHITECTURES
from hosl_flower.models.base_model import open_base
from hosl_flower.protocol.messages.activations import Forward, Probe
from hosl_flower.protocol.messages.scalars import CutGradient
from hosl_flower.run.plan import plan
from hosl_flower.run.start import open_run, run_in_process
from strategies.heron import Heron
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl
from strategies.split_fo import SplitFo

MODELS = ["resnet-tiny", "vit-tiny"]
MANY = {"strategy": "strategies.ho_sfl:HoSfl", "num_clients": 3, "clients_per_step": 2}


@pytest.fixture
def run(tmp_path):
    """run(method, **config) -> (results, run directory, config)."""
    data = write_npz(tmp_path / "images.npz")
    defaults = {
        "model": "random:resnet-tiny", "data-path": str(data), "task": "brightness",
        "image-column": "image", "verbalizers": "dark,bright", "image-size": 16, "cut-layer": 2,
        "steps": 4, "eval-every": 2, "batch-size": 5, "eval-batch-size": 7,
        "client-learning-rate": 1e-3, "server-learning-rate": 1e-2, "threads": 1, "seed": 3,
        "output-dir": str(tmp_path / "runs"), "device": "cpu", "trackers": "",
    }  # fmt: skip

    def make(method=HoSfl, **changes):
        keys = {key.replace("_", "-"): value for key, value in changes.items()}
        name = f"run{len(list(tmp_path.glob('runs/*')))}"
        config = parse_config({**defaults, "run-name": name, **keys})
        if method is None:
            return config
        with contextlib.ExitStack() as without:
            for picture in ("draw_curve", "draw_partition"):
                without.enter_context(mock.patch(f"hosl_flower.run.recorder.{picture}"))
            results = run_in_process(method(config))
        return results, tmp_path / "runs" / name, config

    return make


@pytest.mark.parametrize("name", MODELS)
def test_ho_sfl_learns_and_its_ledger_replays_to_the_same_bits(run, name):
    results, directory, config = run(
        **MANY, model=f"random:{name}", steps=8, eval_every=8, directions=2,
        server_optimizer="adamw",
    )  # fmt: skip
    assert results.evaluations[-1]["loss"] < results.evaluations[0]["loss"]
    client = Client(open_run(HoSfl(config), "again")[0].spec)
    before = fingerprint(client.state.parameters)
    client.follower.apply(Ledger.read(directory / "ledger.jsonl").entries)
    assert fingerprint(client.state.parameters) == results.fingerprint != before


@pytest.mark.parametrize("name", MODELS)
def test_split_first_order_is_plain_training_of_the_whole_model(run, name, tmp_path):
    _, start, config = run(SplitFo, model=f"random:{name}", steps=1, client_learning_rate=0.0,
                           server_learning_rate=0.0)  # fmt: skip
    changes = {"model": str(start / "model"), "steps": 3, "server_learning_rate": 0.05}
    results, directory, config = run(SplitFo, **changes, client_learning_rate=0.05)
    model = AutoModelForImageClassification.from_pretrained(start / "model").eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pool = Client(open_run(SplitFo(config), "again")[0].spec).pool
    for number in range(3):
        batch = pool.client(0).train_batch(number, 5)
        optimizer.zero_grad()
        F.cross_entropy(model(batch.inputs).logits, batch.labels).backward()
        optimizer.step()
    trained = AutoModelForImageClassification.from_pretrained(directory / "model").state_dict()
    first = AutoModelForImageClassification.from_pretrained(start / "model").state_dict()
    assert results.evaluations[-1]["loss"] != results.evaluations[0]["loss"]
    moved = 0
    for key, expected in model.state_dict().items():
        assert torch.allclose(trained[key], expected, rtol=1e-4, atol=1e-6), key
        moved += not torch.equal(trained[key], first[key])
    assert moved == len(list(model.parameters()))  # all of them, and no statistic


def test_a_convolutional_clients_scalars_are_directional_derivatives(run):
    client = Client(open_run(HoSfl(run(None, **MANY)), "x")[0].spec)
    at = {"step": 1, "partition": 0, "position": 0, "digest": client.state.digest, "batch": 0}
    (clean,) = client.answer([Forward(**at)])
    assert clean.activations.shape == (5, 4, 16)
    assert clean.attention_mask.all()
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(clean.activations.shape, generator=generator)
    request = CutGradient(
        **at, gradient=gradient, scales=torch.empty(0), scale=1.0, directions=3, seeds=(1, 2, 3),
        epsilon=1e-5, learning_rate=0.0,
    )  # fmt: skip
    (reply,) = client.answer([request])
    batch = client.pool.client(0).train_batch(0, 5)
    h = client.submodel(batch.inputs, batch.attention_mask)
    exact = torch.autograd.grad(h, list(client.state.parameters.values()), gradient)
    for seed, scalar in zip((1, 2, 3), reply.scalars[0], strict=True):
        direction = client.state.layout.draw(seed)
        along = sum(
            (g * direction.dense(n)).sum()
            for n, g in zip(client.state.parameters, exact, strict=True)
        )
        # ReLU has kinks
        assert float(scalar) * 3 == pytest.approx(float(along), rel=0.02, abs=0.05)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [("resnet-18", "float32"), ("resnet-18", "bfloat16"), ("vit-wide", "float32")],
)
def test_probes_need_little_more_memory_than_inference(run, model, dtype, monkeypatch):
    wide = {**IMAGE_ARCHITECTURES["vit-tiny"], "hidden_size": 128, "intermediate_size": 512}
    monkeypatch.setitem(IMAGE_ARCHITECTURES, "vit-wide", wide)
    changes = {"model": f"random:{model}", "batch_size": 16, "cut_layer": 1, "dtype": dtype}
    spec = open_run(Hosl(run(None, **changes)), "x")[0].spec
    client = Client(spec)
    at = {"step": 1, "partition": 0, "position": 0, "digest": client.state.digest, "batch": 0}
    before = fingerprint(client.state.parameters)
    list(client.answer([Forward(**at), Probe(**at, seed=1, coefficient=1e-3)]))
    assert client.meter.peaks["probe"] <= 1.10 * client.meter.peaks["forward"], client.meter.peaks
    assert fingerprint(client.state.parameters) == before


@pytest.mark.parametrize("name", MODELS)
def test_plain_transformers_score_an_export_as_the_run_does(run, name, tmp_path):
    results, directory, config = run(**MANY, model=f"random:{name}")
    done = CliRunner().invoke(cli, ["export", str(directory), str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "dark", 1: "bright"}
    _, held_out = load_source(config.data.path, task_from_config(config), config.seed)
    images = [decode(row["image"], 3) for row in held_out]
    pixels = processor(images, input_data_format="channels_last", return_tensors="pt")
    with torch.no_grad():
        logits = model(**pixels).logits
    labels = torch.tensor(held_out["label"][:])
    assert float((logits.argmax(1) == labels).float().mean()) == pytest.approx(results.accuracy)
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(results.loss, abs=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForImageClassification" in card
    assert "pipeline_tag: image-classification" in card
    assert "- Classes, by label: `dark`, `bright`." in card
    for side in ("client", "server"):
        done = CliRunner().invoke(
            cli, ["export", str(directory), str(tmp_path / side), "--what", side]
        )
        assert done.exit_code == 0, done.stderr
        assert open_base(str(tmp_path / side)).config.num_labels == 2


def test_a_run_is_stopped_and_resumed(run, tmp_path):
    whole, one, _ = run(**MANY, server_optimizer="adamw", checkpoint_every=2)
    run(**MANY, server_optimizer="adamw", checkpoint_every=2, steps=3)
    stopped = tmp_path / "runs" / "run1"
    resumed, _, _ = run(**MANY, server_optimizer="adamw", checkpoint_every=2, steps=4,
                        resume=str(stopped))  # fmt: skip
    assert resumed.fingerprint == whole.fingerprint
    assert metrics(stopped)[-1] == metrics(one)[-1]


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_is_what_the_run_then_needs(run, name, monkeypatch):
    monkeypatch.setattr("hosl_flower.run.plan._SECONDS", 0.0)
    results, _, config = run(**MANY, model=f"random:{name}")
    planned = plan(config)
    assert planned.client_parameters == results.client_parameters["held"]
    others = {"describe", "fingerprint", "evaluate"}
    sent = sum(n["bytes"] for k, n in results.bytes_up.items() if k not in others)
    assert planned.up_bytes == pytest.approx(sent / config.steps, rel=0.05)
    for phase, peak in results.client_peak_memory["tensor_bytes"].items():
        if phase != "evaluate":
            assert peak <= 1.01 * planned.peak_bytes.get(phase, 0), phase


def test_the_page_and_the_command_line(run, tmp_path):
    _, directory, _ = run(**MANY)
    page = tmp_path / "page.html"
    done = CliRunner().invoke(cli, ["report", str(directory), "--out", str(page)])
    assert done.exit_code == 0, done.stderr
    assert "brightness" in page.read_text()
    done = CliRunner().invoke(cli, ["generate", str(directory), "a cat"])
    assert done.exit_code == 1
    assert f"use `hosl-flower predict {directory}` for labels" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "random:opt-tiny"}, "brightness is about images, random:opt-tiny is a model of"),
        ({"task": "sms-spam", "image_column": "", "verbalizers": "", "data_path": "",
          "image_size": 0},
         "sms-spam is about text, random:resnet-tiny is a model of image"),
        ({"model": "random:vit-tiny", "image_size": 32}, "for images of 16 pixels, not 32"),
        ({"image_size": 10**6}, "image-size = 1000000: expected at most 4096"),
        ({"max_length": 64}, "is about images: it has no max-length"),
        ({"prompt": "{image} shows"}, "is about images: it has no prompt"),
        ({"verbalizers": ""}, "it needs verbalizers too, the names of the classes"),
        ({"task": "cifar10"}, "task cifar10 has 10 classes, got 2"),
        ({"cut_layer": 4}, r"cut-layer = 4 is outside 0..3"),
        ({"save_format": "adapters", "client_trainable": "lora", "server_trainable": "lora",
          "model": "random:vit-tiny"}, "adapters cannot hold the head of a classifier"),
        ({"labels": "client"}, "task brightness is about images; use labels = server"),
        ({"client_trainable": "lora"}, "matches no linear module of this model; there are none"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_line(run, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(Hosl, **changes)


def test_methods_with_heads_on_clients_are_refused(run):
    with pytest.raises(ConfigError, match="needs a language model; for classifiers use another"):
        run(Heron)


def test_without_a_hub_resnet18_falls_back_to_bundled_digits(run, hub_cache):
    changes = {"data_path": "", "image_column": "", "verbalizers": ""}
    config = run(None, model="microsoft/resnet-18", task="cifar10", **changes, **MANY)
    session = open_run(HoSfl(config), "x")[0]
    assert "microsoft/resnet-18 -> the same architecture with RANDOM weights" in session.notice
    assert "task cifar10 -> digits, the bundled images of digits" in session.notice
    assert session.base.model == "random:resnet-18"
    assert session.server.submodel.lm_head.weight.shape == (10, 512)
    assert json.loads(session.spec.to_json())["task"]["image"] == "image"


def test_the_same_image_is_the_same_pixels(run):
    """Mean and deviation are the processor's; nothing is drawn."""
    spec = open_run(HoSfl(run(None, **MANY, image_size=6)), "x")[0].spec
    held_out = Client(spec).pool.client(0)
    one, again = held_out.held_out_batch(0, 4), held_out.held_out_batch(0, 4)
    assert torch.equal(one.inputs, again.inputs)
    with np.load(spec.source) as arrays:
        expected = arrays["x_test"][0].astype(np.float32) / 255 * 2 - 1
    assert torch.allclose(one.inputs[0, 1], torch.from_numpy(expected), atol=1e-6)
