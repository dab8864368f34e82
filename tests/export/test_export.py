"""Taking a trained model away: what is exported is what was evaluated, whole or in halves."""

import base64
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torch.nn.functional as F
import yaml
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from peft import PeftModel
from runs import run_factory
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hosl_flower.cli import cli
from hosl_flower.config.task_from_config import task_from_config
from hosl_flower.data.sources import load_source
from hosl_flower.errors import ModelError
from hosl_flower.export.export import export_run
from hosl_flower.models.base_model import open_base
from hosl_flower.models.families.base import HEAD
from hosl_flower.models.split import load_client, load_server
from strategies.ho_sfl import HoSfl

LORA = {
    "client_trainable": "lora",
    "server_trainable": "lora",
    "lora_rank": 2,
    "client_learning_rate": 1e-2,
    "server_learning_rate": 0.1,
}


@pytest.fixture
def make(tiny_opt, tmp_path):
    return run_factory(HoSfl, tiny_opt, tmp_path, steps=2)


def invoke(*arguments):
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    return done, " ".join(done.stderr.split())


def held_out_score(model, tokenizer, config):
    """(accuracy, loss) of a transformers model on a run's held-out data, one text at a time."""
    task = task_from_config(config)
    words = [tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in task.verbalizers]
    _, examples = load_source(config.data.path, task, config.seed)
    right, losses = 0, []
    for example in examples:
        inputs = tokenizer(f"{example['text']} It was", return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(**inputs).logits[0, -1, [word for (word,) in words]]
        right += int(logits.argmax()) == example["label"]
        losses.append(F.cross_entropy(logits, torch.tensor(example["label"])))
    return right / len(examples), float(sum(losses)) / len(losses)


@pytest.mark.parametrize("changes", [{}, {**LORA, "save_format": "adapters"}])
def test_plain_transformers_score_and_write_as_the_run_does(make, tmp_path, changes):
    results, run, config = make(**changes)
    done, errors = invoke("export", run, tmp_path / "out")
    assert done.exit_code == 0, errors
    assert done.stdout == f"exported: {tmp_path / 'out'}\n"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    accuracy, loss = held_out_score(model, tokenizer, config)
    assert accuracy == results.accuracy
    assert loss == pytest.approx(results.loss, abs=1e-4)
    assert loss != pytest.approx(results.evaluations[0]["loss"], abs=1e-3)  # it has learned
    if changes:
        base = AutoModelForCausalLM.from_pretrained(config.model)
        adapted = PeftModel.from_pretrained(
            base, export_run(run, tmp_path / "adapters", "adapters")
        )
        assert held_out_score(adapted, tokenizer, config) == pytest.approx((accuracy, loss))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    inputs = tokenizer("a lovely film", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    done, errors = invoke("generate", run, "a lovely film", "--max-new-tokens", 8)
    assert done.exit_code == 0, errors
    assert done.stdout[:-1] == tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("changes", [{}, LORA])
def test_each_half_holds_its_own_tensors_and_loads_without_the_rest(make, tmp_path, changes):
    _, run, _ = make(dtype="bfloat16", **changes)
    whole = load_file(run / "model" / "model.safetensors")
    parts, stored = {}, {}
    for side, load in (("client", load_client), ("server", load_server)):
        directory = export_run(run, tmp_path / side, side)
        split = json.loads((directory / "split.json").read_text())
        assert split == {"side": side, "cut_layer": 2, "blocks": 3}
        stored[side] = load_file(directory / "model.safetensors")
        half = load(open_base(str(directory)), 2, torch.float32, "cpu")
        parts.update(half.canonical_parameters())
        assert stored[side].keys() == half.canonical_parameters().keys()
    assert not stored["client"].keys() & stored["server"].keys()
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert HEAD in stored["server"]
    kinds = {tensor.dtype for tensor in stored["client"].values()}
    assert kinds == {torch.float32 if changes else torch.bfloat16}  # merged adapters are float32
    with pytest.raises(ModelError, match=r"has no tensor 'model.decoder.final_layer"):
        load_server(open_base(str(tmp_path / "client")), 2, torch.float32, "cpu")
    with pytest.raises(ModelError, match=r"has no tensor 'model.decoder.layers.2"):
        load_client(open_base(str(tmp_path / "client")), 3, torch.float32, "cpu")


def test_the_card_says_what_how_and_how_well_and_no_paths(make, tmp_path):
    results, run, config = make(codec="bf16")
    base = tmp_path / "opt0"
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: opt-175b\n---\n# OPT\n")
    card = ModelCard.load(export_run(run, tmp_path / "out") / "README.md")
    header = card.data.to_dict()
    assert header["license"] == "other"
    assert header["license_name"] == "opt-175b"
    assert "base_model" not in header  # a directory is nothing the hub could link to
    assert header["tags"][-1] == "ho-sfl"
    assert (
        f"| accuracy | {results.evaluations[0]['accuracy']:.4f} | {results.accuracy:.4f}"
        in card.text
    )
    for said in (
        "opt0 (a local directory)", "Method: ho-sfl (`", "Cut layer: 2", "steps = 2",
        "24 held-out", "by label: `terrible`, `great`", "`reviews`, a local file",
        'prompt = "{text} It was"', "client-learning-rate = 0.001", "activations travelled as bf16",
        "python -m hosl_flower run APP", "transformers 5.",
        "in place of the bare names (model, data-path)",
    ):  # fmt: skip
        assert said in card.text, said
    assert str(tmp_path) not in card.content
    (base / "README.md").write_text("---\n[\n---\n")
    half = ModelCard.load(export_run(run, tmp_path / "half", "client") / "README.md")
    assert "license" not in half.data.to_dict()
    assert "License: not given here, the base model's card was not found" in half.text
    assert "HALF a model: embeddings and the first 2 blocks" in half.text
    assert config.data.path not in half.content


def test_a_card_of_random_weights_says_so_and_one_of_a_hub_model_names_it(make, tmp_path):
    _, run, _ = make(model="random:opt-tiny", max_length=64)
    record, results = (
        json.loads((run / name).read_text()) for name in ("config.json", "results.json")
    )
    card = ModelCard.load(export_run(run, tmp_path / "random") / "README.md")
    assert "what is measured here is no result" in card.text
    assert "license" not in card.data.to_dict()
    record.update(model_used="facebook/opt-125m", task_used="sst2")
    record["config"].update({"data-path": "", "task": "sst2"})
    results["pretrained"] = True
    (run / "config.json").write_text(json.dumps(record))
    (run / "results.json").write_text(json.dumps(results))
    header = ModelCard.load(export_run(run, tmp_path / "hub") / "README.md").data.to_dict()
    assert header["base_model"] == "facebook/opt-125m"
    assert header["base_model_relation"] == "finetune"
    assert header["datasets"] == ["nyu-mll/glue"]


EVIL = "\n---\n# Heading\n[here](https://evil.example) <img src=x> ```\x1b[31m\u202e`|*b*"


def test_text_of_others_stays_text_in_a_card(make, tmp_path):
    """Of the files of a run directory, and of the base model's card."""
    _, run, _ = make()
    record, results = (
        json.loads((run / name).read_text()) for name in ("config.json", "results.json")
    )
    base = tmp_path / f"base{EVIL[:20].replace('/', '')}"
    base.mkdir()
    readme = {"license": "mit", "license_name": EVIL, "license_link": "javascript: x\n---\n"}
    (base / "README.md").write_text(f"---\n{yaml.safe_dump(readme)}---\n")
    record.update(model_used=str(base), python=EVIL, machine=EVIL, versions={EVIL: EVIL})
    prompt = "{text}" + EVIL.replace("\ud800", "")  # which the configuration refuses
    record["config"].update(prompt=prompt, verbalizers=f"a```{EVIL[10:30]},b`c")
    results.update(method=EVIL, notice=EVIL)
    (run / "config.json").write_text(json.dumps(record))
    (run / "results.json").write_text(json.dumps(results))
    text = (export_run(run, tmp_path / "out") / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert card.data.to_dict().keys().isdisjoint({"license_name", "license_link"})
    assert card.data.tags[-1].startswith("\\n---\\n# Heading")
    assert all(line.isprintable() for line in text.splitlines())
    html = MarkdownIt().enable("table").render(card.text)
    assert html.count("<h1>") == 1
    assert not re.search("<a |<img|<em>|<strong>b", html.replace("<strong>The base", ""))
    assert html.count("<pre>") == 4, "notice, code, keys, command"


@pytest.mark.parametrize("terms", [{"license": ["mit", EVIL]}, {"license": EVIL}, {"license": 3}])
def test_a_license_that_is_none_is_not_passed_on(make, tmp_path, terms):
    _, run, _ = make()
    (tmp_path / "opt0" / "README.md").write_text(f"---\n{yaml.safe_dump(terms)}---\n")
    card = ModelCard.load(export_run(run, tmp_path / "out") / "README.md")
    assert "license" not in card.data.to_dict()
    assert "License: not given here" in card.text
    (tmp_path / "opt0" / "README.md").unlink()
    os.mkfifo(tmp_path / "opt0" / "README.md")  # which would be read for ever
    export_run(run, tmp_path / "two")


def test_mistakes_are_one_line_and_leave_nothing(make, tmp_path):
    _, run, _ = make()
    _, folded, _ = make(**LORA)
    _, unsaved, _ = make(save_model=False)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for arguments, complaint in (
        ([run, full], "is there already and not empty; name another"),
        ([run, full / "file"], "is there already and not empty; name another"),
        (
            [run, out, "--what", "half"],
            "--what = 'half' is none of model, adapters, client, server",
        ),
        ([run, out, "--what", "adapters"], "has no adapters to export: they need client-trainable"),
        ([folded, out, "--what", "adapters"], "train with save-format = adapters"),
        ([unsaved, out], "train with save-model = true (here it was false)"),
        ([tmp_path / "empty", out], "is no run directory"),
        ([tmp_path / "none", out], "is no run directory"),
        ([run / "model", out], "is no run directory"),
        ([run, full / "file" / "out"], "cannot be written"),
        ([run, out, "--private"], "--private has no use without --push"),
        ([run, out, "--push", "a/b/c"], "--push = 'a/b/c'"),
    ):
        done, errors = invoke("export", *arguments)
        assert done.exit_code == 1, arguments
        assert complaint in errors
        assert isinstance(done.exception, SystemExit), "no traceback"
    (run / "model" / "model.safetensors").write_bytes(b"\0" * 100)
    for what in ("model", "client"):
        done, errors = invoke("export", run, out, "--what", what)
        assert "cannot be read as model weights" in errors
    (run / "results.json").unlink()
    assert "no finished run" in invoke("export", run, out)[1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "empty", "full", "opt0", "reviews", "runs",
    ]  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """The calls that an upload of small files makes, as huggingface.co answers them."""

    created: list
    files: dict

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_ours":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self._answer(200, {"url": f"{constants.ENDPOINT}/me/tuned"})
        elif self.path == "/api/validate-yaml":  # of the card
            self._answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/models/me/tuned/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer(200, {"files": [{"path": name, **plain} for name in names]})
        elif self.path == "/api/models/me/tuned/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    data = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = data
            url = f"{constants.ENDPOINT}/me/tuned/commit/{'0' * 40}"
            self._answer(200, {"commitUrl": url, "commitOid": "0" * 40, "success": True})
        else:
            self._answer(404, {"error": self.path})

    def do_GET(self):
        self._answer(404, {"error": self.path})

    def _answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (("Content-Type", "application/json"), ("Content-Length", len(body))):
            self.send_header(name, str(text))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("TestHub", (Hub,), {"created": [], "files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_push_uploads_every_file_or_says_why_not_and_keeps_the_directory(
    make, hub, tmp_path, monkeypatch
):
    _, run, _ = make()
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    arguments = ["export", run, tmp_path / "out", "--push", "me/tuned", "--private"]
    done, errors = invoke(*arguments)
    assert done.exit_code == 0, errors
    assert done.stdout.endswith(f"pushed: {constants.ENDPOINT}/me/tuned\n")
    assert hub.created[0]["name"] == "tuned"
    assert hub.created[0]["organization"] == "me"
    assert hub.created[0]["visibility"] == "private"
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} <= local.keys()
    assert hub.files == local

    monkeypatch.setenv("HF_TOKEN", "hf_anothers")
    done, errors = invoke("export", run, tmp_path / "two", "--push", "me/tuned")
    assert done.exit_code == 1
    assert f"error: {constants.ENDPOINT} does not take {tmp_path / 'two'} as 'me/tuned'" in errors
    assert "401" in errors
    assert "HF_TOKEN" in errors
    assert isinstance(done.exception, SystemExit), "no traceback"
    assert (tmp_path / "two" / "model.safetensors").is_file()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    done, errors = invoke("export", run, tmp_path / "three", "--push", "me/tuned")
    assert "error: http://127.0.0.1:9 does not take" in errors
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done, errors = invoke("export", run, tmp_path / "four", "--push", "me/tuned")
    assert "does not take" in errors
