"""A run directory: whom it belongs to, and files in it that no run wrote."""

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock
from runs import metrics, run_factory

from hosl_flower.config.parse import parse_config
from hosl_flower.errors import CheckpointError, ConfigError, HoslError
from hosl_flower.export import finished_run as finished
from hosl_flower.export.export import export_run
from hosl_flower.ledger.ledger import Entry, Ledger
from hosl_flower.run import recorder as report
from hosl_flower.run import resumable
from hosl_flower.run.checkpoint import _digest
from hosl_flower.run.figures import draw_curve, draw_partition
from hosl_flower.run.lock import claim, lock
from hosl_flower.run.recorder import Recorder
from hosl_flower.run.resume import find
from hosl_flower.run.run_log import RunLog
from hosl_flower.system.untrusted_files import check_file, check_tree, parse_json, read_regular
from strategies.hosl import Hosl


@pytest.fixture
def make(tiny_opt, tmp_path):
    own = {"steps": 4, "eval-every": 2, "checkpoint-every": 3, "directions": 1}
    return run_factory(Hosl, tiny_opt, tmp_path, **own)


def test_a_directory_belongs_to_one_run_in_this_process_too(tmp_path):
    first = lock(tmp_path)
    with pytest.raises(ConfigError, match="is being written by another process or run"):
        lock(tmp_path)
    first.release()
    assert (tmp_path / ".lock").is_file(), "removing it would let two runs in"
    lock(tmp_path).release()


def test_a_lock_that_is_a_link_is_refused_and_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("here")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(precious)
    with pytest.raises(ConfigError, match="no link of that name"):
        lock(run)
    assert precious.read_text() == "here"


def test_a_default_name_that_is_taken_gets_a_number(tmp_path):
    taken = [claim(tmp_path / "runs" / "20260101-000000", named=False) for _ in range(3)]
    names = [path.name for path, _ in taken]
    assert names == ["20260101-000000", "20260101-000000-2", "20260101-000000-3"]


def test_of_two_runs_of_one_name_the_second_is_refused_when_it_begins(make, tmp_path):
    """Both saw an empty directory before they loaded their models."""
    config = parse_config({"output-dir": str(tmp_path / "runs"), "run-name": "run0"})
    with RunLog() as kept, Recorder(config, kept) as late:
        _, run, _ = make(save_model=False)
        before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
        with pytest.raises(ConfigError, match="already holds a run"):
            late.open(None, None)
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


def test_a_run_that_fails_gives_its_directory_back(make, tmp_path):
    class Failing(Hosl):
        def steps(self, session, link, steps):
            with pytest.raises(ConfigError, match="another process or run"):
                lock(tmp_path / "runs" / "run0")
            raise HoslError("it fails")

    with pytest.raises(HoslError, match="it fails"):
        make(Failing)
    lock(tmp_path / "runs" / "run0").release()


# What others may have put in a run directory


@pytest.fixture
def stopped(make):
    """A run directory with a checkpoint of step 3 of 4, and the config to go on from it."""
    _, run, config = make(save_model=False)
    return run, config.with_keys({"resume": str(run)})


def rewrite(run, change):
    """Change the values of the checkpoint and make its checksum fit."""
    path = run / "checkpoint-3" / "checkpoint.json"
    record = json.loads(path.read_text())
    change(record["values"])
    record["values_sha256"] = _digest(record["values"])
    path.write_text(json.dumps(record))


def test_only_the_files_of_a_run_are_ever_cut(make, stopped, tmp_path):
    run, _ = stopped
    precious = tmp_path / "precious"
    precious.write_text("here")
    rewrite(run, lambda values: values["report"]["sizes"].update({str(precious): 0}))
    with pytest.raises(CheckpointError, match=r"report\.sizes\.\S*precious: Extra inputs"):
        make(resume=str(run), save_model=False)
    assert precious.read_text() == "here"


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("report", {}),
        ("report.sizes", {"metrics.jsonl": 1}),
        ("report.evaluations", [{"step": 1}]),
        ("report.evaluations", [3]),
        ("report.wall_seconds", "long"),
        ("client.position", -1),
        ("client.position", 1e30),
        ("session.batches", [[0, "many"]]),
        ("session.dropped", [[1, 2]]),
        ("traffic.tensor_peaks", [1]),
        ("traffic.peak_bytes", 2**62),
        ("traffic", []),
    ],
)
def test_values_that_no_run_wrote_are_refused_by_their_key(stopped, where, value):
    run, config = stopped

    def change(values):
        *parts, last = where.split(".")
        for part in parts:
            values = values[part]
        values[last] = value

    rewrite(run, change)
    with pytest.raises(CheckpointError, match=rf"checkpoint-3, {where}"):
        find(config)


@pytest.mark.parametrize("name", ["checkpoint-3/checkpoint.json", "config.json"])
def test_json_nested_too_deeply_is_refused(stopped, name):
    run, config = stopped
    (run / name).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        find(config)


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "ledger.jsonl", "log.txt", "checkpoint-3"]
)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_run_with_files_that_are_not_its_own_is_not_resumed(stopped, tmp_path, name, kind):
    run, config = stopped
    (run / "log.txt").touch()
    (run / name).rename(tmp_path / "elsewhere")
    if kind == "link":
        (run / name).symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(run / name)
    told = f"{name} is a link that leads out of" if kind == "link" else f"{name} is no regular file"
    with pytest.raises(CheckpointError, match=told):
        find(config)


@pytest.mark.parametrize("name", ["log.txt", "checkpoint-3", "tensorboard", "wandb"])
def test_a_link_that_leads_nowhere_is_refused_too(stopped, tmp_path, name):
    run, config = stopped
    if (run / name).exists():
        (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: .*No such file"):
        find(config)


def test_links_of_the_users_own_beside_the_files_of_a_run_are_left_alone(stopped, tmp_path):
    run, config = stopped
    (tmp_path / "own").mkdir()
    (run / "model").symlink_to(tmp_path / "own")
    for name, target in (("data", "own"), ("checkpoint-best", "own"), ("notes.txt", "nowhere")):
        (run / name).symlink_to(tmp_path / target)
    assert find(config).step == 3
    (run / "tensorboard").symlink_to(tmp_path / "own")
    with pytest.raises(CheckpointError, match="tensorboard is a link that leads out of"):
        find(config)


def test_a_link_within_the_directory_is_as_good_as_the_file(stopped):
    run, config = stopped
    (run / "config.json").rename(run / "keys.json")
    (run / "config.json").symlink_to("keys.json")
    assert find(config).step == 3


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("metrics.jsonl", lambda lines: [lines[0], "{", *lines[2:]], r"metrics\.jsonl, line 2: "),
        ("metrics.jsonl", lambda lines: [lines[0], "[]", *lines[2:]], r"metrics\.jsonl, line 2: "),
        (
            "metrics.jsonl",
            lambda lines: [lines[0].replace("0.", "1.", 1), *lines[1:]],
            r"metrics\.jsonl: its first \d+ bytes are not those",
        ),
        ("ledger.jsonl", lambda lines: [*lines[:2], *lines[3:]], r"ledger\.jsonl, line 4"),
        ("ledger.jsonl", lambda lines: [*lines[:2], "{", *lines[3:]], r"ledger\.jsonl, line 3"),
        ("ledger.jsonl", lambda lines: ["7", *lines[1:]], r"ledger\.jsonl, line 1"),
    ],
)
def test_a_damaged_file_of_lines_is_refused_with_its_line(stopped, name, damage, told):
    run, config = stopped
    path = run / name
    lines = damage(path.read_text().splitlines())
    path.write_text("\n".join([*lines, " " * 10_000]) + "\n")  # as long as it was
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=told):
        find(config)
    assert path.read_bytes() == before


def test_a_ledger_of_another_run_is_refused(stopped, tmp_path):
    run, config = stopped
    ledger = Ledger("another")
    ledger.record(run / "ledger.jsonl")
    for step in range(1, 4):
        ledger.append(Entry(step, (step,), (0.5,), 1e-3))
    ledger.seal()
    rewrite(run, lambda values: values["report"]["sizes"].update(_sizes(run)))
    with pytest.raises(CheckpointError, match="position 3 of another ledger"):
        find(config)


def _sizes(run):
    return {"ledger.jsonl": (run / "ledger.jsonl").stat().st_size}


def test_of_several_checkpoints_the_latest_whole_one_is_taken(make, caplog):
    caplog.set_level("INFO", "hosl_flower")
    with pytest.raises(ConfigError, match="stop here"):
        make(_dies_at(6), steps=8, checkpoint_every=2, save_model=False)
    _, undisturbed, _ = make(steps=8, checkpoint_every=2, save_model=False)
    run = undisturbed.with_name("run0")
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    tensors = run / "checkpoint-4" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    make(resume=str(run), steps=8, checkpoint_every=0, save_model=False)
    assert "the checkpoint of step 4 cannot be used" in caplog.text
    assert "resumed after step 2" in caplog.text
    assert metrics(run) == metrics(undisturbed)
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-2"], "the damaged one is gone"


def _dies_at(step):
    class Dying(Hosl):
        def steps(self, session, link, steps):
            if step in steps:
                raise ConfigError("stop here")
            return super().steps(session, link, steps)

        def may_pause(self, done):
            return done < step - 1  # no checkpoint because of the error

    return Dying


def test_a_directory_that_cannot_be_written_is_one_error(make, stopped, monkeypatch):
    run, _ = stopped

    def refuse(*_, **__):
        raise PermissionError(13, "Read-only file system")

    monkeypatch.setattr(report.os, "truncate", refuse)
    with pytest.raises(ConfigError, match=rf"resume: {run} cannot be written .*Read-only"):
        make(resume=str(run), steps=9, save_model=False)
    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(ConfigError, match=r"\.lock cannot be locked .*this user can write"):
        lock(run)


def test_what_leads_out_of_a_model_is_not_exported(make, tmp_path):
    _, run, _ = make()
    key = tmp_path / "key"
    key.write_text("secret")
    linked = run / "model" / "notes.txt"
    for target in (key, tmp_path, "../../../key"):
        linked.symlink_to(target)
        with pytest.raises(CheckpointError, match=r"notes\.txt is a link that leads out of"):
            export_run(run, tmp_path / "out")
        linked.unlink()
    os.mkfifo(linked)
    with pytest.raises(CheckpointError, match=r"notes\.txt is no regular file"):
        export_run(run, tmp_path / "out")
    linked.unlink()
    (run / "model").rename(tmp_path / "model")
    (run / "model").symlink_to(tmp_path / "model")
    with pytest.raises(CheckpointError, match="model is a link that leads out of"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_that_lead_to_each_other_and_files_that_never_end(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises((CheckpointError, OSError), match=r"[Ll]oop|[Tt]oo many"):
        check_file(tmp_path, tmp_path / "a")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "back").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match=r"no regular file|leads out"):
        check_tree(tmp_path, tmp_path / "own")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_regular(Path("/dev/zero"))
    (tmp_path / "long").write_text("long")
    with pytest.raises(CheckpointError, match="has 4 bytes; expected at most 3"):
        read_regular(tmp_path / "long", 3)
    assert parse_json(b'{"a": [1]}') == {"a": [1]}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("results.json", {"loss": "low"}, r"results\.json, loss: "),
        ("results.json", {"seed": 10**30}, r"results\.json, seed: "),
        ("results.json", [], r"results\.json, the whole: "),
        ("results.json", {"evaluations": []}, "no evaluations for the card"),
        ("config.json", {"config": {}, "model_used": 3}, r"config\.json, model_used: "),
        ("config.json", {"config": {}, "task_used": "none"}, "no task 'none'; expected"),
    ],
)
def test_files_that_no_run_wrote_are_refused_by_their_key(make, tmp_path, name, content, told):
    _, run, _ = make()
    (run / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=told):
        export_run(run, tmp_path / "out")


def test_a_model_directory_whose_config_is_a_link_is_no_run(tmp_path):
    (tmp_path / "blob").write_text('{"model_type": "opt"}')
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").symlink_to(tmp_path / "blob")  # as in the hub's cache
    assert not finished.is_run(str(model))


def test_resumable_says_its_keys():
    with pytest.raises(CheckpointError, match="somewhere, task: Field required"):
        resumable.check_values(Path("somewhere"), {})


def test_names_that_are_no_text_for_a_picture_are_drawn(tmp_path):
    names = ["$\\frac{", "\ud800", "_hidden", "a\nb\x1b[31m" * 100]
    draw_partition(tmp_path / "partition.png", [(1, 2, 3, 4)], names)
    (tmp_path / "metrics.jsonl").write_text("")
    draw_curve(tmp_path, "$\\frac{ \ud800\x00")
    pictures = [path.read_bytes()[:4] for path in tmp_path.glob("*.png")]
    assert pictures == [b"\x89PNG"] * 2
