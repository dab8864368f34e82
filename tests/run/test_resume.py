"""A run that is stopped and resumed gives the same bits as one that is not."""

import dataclasses
import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from runs import metrics, run_factory

from hosl_flower.errors import CheckpointError, ClientError, ConfigError
from hosl_flower.run.checkpoint import Checkpoint, _digest, read, write
from hosl_flower.server.participation import Participation
from strategies.fedavg_zo import FedAvgZo
from strategies.heron import Heron
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl
from strategies.split_fo import SplitFo
from strategies.split_zo import SplitZo


class Killed(BaseException):
    """As sudden as a signal: nobody catches it."""


@pytest.fixture
def make(tiny_opt, tmp_path):
    own = {"steps": 6, "eval-every": 3, "checkpoint-every": 2, "client-trainable": "blocks"}
    return run_factory(Hosl, tiny_opt, tmp_path, **own)


def stopped_before(step, strategy):
    """A strategy that dies when it is to take this step."""

    class Dying(strategy):
        def steps(self, session, link, steps):
            if step in steps:
                raise Killed
            return super().steps(session, link, steps)

    return Dying


MANY = {"num_clients": 3, "clients_per_step": 2}
RUNS = {
    "hosl": (Hosl, {}),
    "hosl-bf16": (Hosl, {"dtype": "bfloat16", "client_optimizer": "adamw"}),
    "ho-sfl": (
        HoSfl, {**MANY, "server_optimizer": "adamw", "learning_rate_schedule": "linear"}
    ),
    "ho-sfl-labels": (HoSfl, {**MANY, "labels": "client", "server_optimizer": "adamw"}),
    "fedavg-zo": (FedAvgZo, {**MANY, "local_steps": 2}),
    "fedavg-zo-int8": (FedAvgZo, {**MANY, "client_optimizer": "adamw", "update_codec": "int8"}),
    "heron": (Heron, {**MANY, "client_optimizer": "adamw", "upload_every": 2}),
    "split-zo": (SplitZo, {"server_optimizer": "adamw", "server_learning_rate": 1e-4}),
    "split-fo": (SplitFo, {**MANY, "client_optimizer": "adamw", "directions": 1}),
    "split-fo-int8": (
        SplitFo,
        {**MANY, "client_optimizer": "adamw", "directions": 1, "update_codec": "int8"},
    ),
    "residual": (
        SplitFo,
        {
            "client_gradient": "residual", "client_optimizer": "adafactor", "local_steps": 2,
            "eval_every": 2, "client_trainable": "full", "directions": 1,
        },
    ),
    "split-fo-local": (
        SplitFo,
        {**MANY, "client_optimizer": "adamw", "local_steps": 3, "directions": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_gives_the_same_bits(make, name):
    strategy, changes = RUNS[name]
    changes = {"save_model": name == "hosl", **changes}
    whole, whole_directory, _ = make(strategy, **changes)
    with pytest.raises(Killed):
        make(stopped_before(6, strategy), **changes)
    directory = whole_directory.with_name("run1")
    resumed, _, _ = make(strategy, resume=str(directory), **changes)
    assert metrics(directory) == metrics(whole_directory)
    assert resumed.fingerprint == whole.fingerprint
    assert resumed.ledger_digest == whole.ledger_digest
    assert resumed.evaluations == whole.evaluations
    assert resumed.clients["steps_taken_part"] == whole.clients["steps_taken_part"]
    for path in (whole_directory / "ledger.jsonl", *whole_directory.glob("model/*.safetensors")):
        assert (directory / path.relative_to(whole_directory)).read_bytes() == path.read_bytes()


def test_as_many_checkpoints_are_kept_as_wanted_and_none_is_made_of_the_end(make):
    _, directory, _ = make(steps=6, checkpoints_kept=1)
    assert [p.name for p in directory.glob("*checkpoint*")] == ["checkpoint-4"]
    assert read(directory).step == 4


def test_a_run_can_be_made_longer(make):
    _, short, _ = make(steps=6)
    (short / ".model.part").mkdir()  # as if it had been stopped while it saved
    longer, _, _ = make(steps=8, resume=str(short))
    _, whole, _ = make(steps=8)
    assert longer.steps == 8
    assert metrics(short) == metrics(whole)
    models = [run / "model" / "model.safetensors" for run in (short, whole)]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_what_was_sent_before_counts(make):
    whole, directory, _ = make(save_model=False)
    with pytest.raises(Killed):
        make(stopped_before(5, Hosl), save_model=False)
    resumed, _, _ = make(resume=str(directory.with_name("run1")), save_model=False)
    assert resumed.bytes_up["probe"]["messages"] == whole.bytes_up["probe"]["messages"]
    assert resumed.bytes_down["restore"]["messages"] == 1


@pytest.mark.parametrize(("name", "moved"), [("ho-sfl", False), ("hosl", False), ("ho-sfl", True)])
def test_a_step_that_fails_before_it_changes_anything_loses_no_other(make, name, moved):
    strategy, changes = RUNS[name]
    changes = {"save_model": False, "checkpoint_every": 4, **changes}

    class Failing(strategy):
        def steps(self, session, link, steps):
            if 6 in steps:
                session.next_batch(0)
                session.participation.drop(6, 0, "gone")
                if moved:
                    with torch.no_grad():
                        next(iter(session.server.trained.values())).add_(1.0)
                raise ClientError("nobody is left")
            return super().steps(session, link, steps)

    _, whole, _ = make(strategy, **changes)
    with pytest.raises(ClientError):
        make(Failing, **changes)
    directory = whole.with_name("run1")
    assert read(directory).step == (4 if moved else 5)
    make(strategy, resume=str(directory), **changes)
    assert metrics(directory) == metrics(whole)


@pytest.fixture
def stopped(make, tmp_path):
    """The directory of a run that was stopped after its checkpoint of step 4."""
    with pytest.raises(Killed):
        make(stopped_before(5, Hosl), save_model=False)
    return tmp_path / "runs" / "run0"


def test_another_configuration_is_refused(make, stopped):
    with pytest.raises(ConfigError, match=r"seed = 3, here 4; only what does not change"):
        make(resume=str(stopped), seed=4)
    assert read(stopped).step == 4


def test_a_key_newer_than_the_run_was_what_it_is_by_default(make, stopped):
    path = stopped / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["evaluation"]
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"a run with evaluation = 'split', here 'central'"):
        make(resume=str(stopped), evaluation="central")
    make(resume=str(stopped))


def test_nothing_left_to_do_is_said(make, stopped):
    with pytest.raises(ConfigError, match="checkpoint of step 4, and steps = 4: nothing is left"):
        make(resume=str(stopped), steps=4)


def test_a_run_without_checkpoints_is_refused(make):
    _, directory, _ = make(checkpoint_every=0, save_model=False)
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        make(resume=str(directory))


def test_a_directory_that_is_not_there_is_named(make, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no run directory .*/nowhere"):
        make(resume=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("part", ["tensors.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_not_used(make, stopped, part, damage):
    shutil.rmtree(stopped / "checkpoint-2")  # else the run goes on from there
    path = stopped / "checkpoint-4" / part
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        at = content.find(b'"position"') + 12 if part == "checkpoint.json" else 300
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(CheckpointError, match="checkpoint"):
        make(resume=str(stopped))


def test_another_format_is_named(make, stopped):
    shutil.rmtree(stopped / "checkpoint-2")
    path = stopped / "checkpoint-4" / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match=r"has format 99, this version .* reads 1"):
        make(resume=str(stopped))


def test_files_shorter_than_the_checkpoint_saw_are_refused(make, stopped):
    (stopped / "metrics.jsonl").write_text("")
    (stopped / "results.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is shorter"):
        make(resume=str(stopped))
    assert (stopped / "results.json").is_file()  # nothing is lost


def test_a_run_that_still_goes_on_is_not_resumed(make, stopped):
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True)"
    command = [sys.executable, "-c", script + "; input()", str(stopped / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError, match="is being written by another process"):
            make(resume=str(stopped))
        other.communicate(b"\n")
    make(resume=str(stopped), save_model=False)


def test_a_checkpoint_on_other_data_is_refused(make, stopped):
    path = stopped / "checkpoint-4" / "checkpoint.json"
    record = json.loads(path.read_text())
    record["values"]["task"] = "m, task sst2 of hub:x"
    record["values_sha256"] = _digest(record["values"])
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"is of a run on m, task sst2 of hub:x, this one"):
        make(resume=str(stopped))


def test_a_checkpoint_half_written_is_not_seen(make, stopped):
    shutil.copytree(stopped / "checkpoint-4", stopped / ".checkpoint-6.part")
    make(resume=str(stopped), save_model=False, steps=7)
    assert read(stopped).step == 6


def test_a_disk_that_is_full_costs_a_checkpoint_and_not_the_run(make, caplog):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # a write beyond fails
    try:
        _, directory, _ = make(save_model=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the checkpoint of step 2 cannot be written" in caplog.text
    assert "training goes on" in caplog.text
    assert not list(directory.glob("*checkpoint*"))
    assert metrics(directory)[-1]["step"] == 6


def test_what_is_written_is_what_is_read(tmp_path):
    import torch

    tensors = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.zeros(0, 0)}
    write(tmp_path, Checkpoint(3, {"x": [1, 2.5, None]}, tensors))
    found = read(tmp_path)
    assert (found.step, found.values) == (3, {"x": [1, 2.5, None]})
    assert torch.equal(found.tensors["a"], tensors["a"])
    assert found.tensors["b"].shape == (0, 0)


def test_participation_is_restored_from_json():
    before = Participation(evaluator=1, retaken=2, checked_at=7, train_examples={0: 5, 1: 6})
    before.next_batch(1)
    before.took_part.update([0, 1])
    before.drop(3, 0, "gone")
    after = Participation.from_json(json.loads(json.dumps(before.as_json())))
    assert after == dataclasses.replace(before, dropped_at={}), "reported before"
