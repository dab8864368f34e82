"""A disk without room for one file or another, and the modes of the files that are written."""

import json
import os
import re
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
from runs import metrics, run_factory
from safetensors import SafetensorError

from hosl_flower.errors import CheckpointError, ConfigError, HoslError
from hosl_flower.export.export import export_run
from hosl_flower.export.finished_run import read_run
from hosl_flower.run import checkpoint
from hosl_flower.run import recorder as report
from hosl_flower.run.checkpoint import steps
from hosl_flower.system.whole_files import Lines, made_whole, put, save_tensors
from strategies.hosl import Hosl

FULL = "No space left on device (os error 28)"


@pytest.fixture
def make(tiny_opt, tmp_path):
    own = {"steps": 4, "eval-every": 2, "checkpoint-every": 3, "directions": 1}
    return run_factory(Hosl, tiny_opt, tmp_path, **own)


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(directory):
    return {
        str(path.relative_to(directory)): stat.S_IMODE(path.stat().st_mode)
        for path in (directory, *directory.rglob("*"))
    }


@pytest.fixture
def full(monkeypatch):
    """full(module, name, when): from now on this function fails where there is no room, that is
    where `when` is in the path it writes to. Returns a function that makes room again."""

    def at(module, name, when, error=OSError):
        real = getattr(module, name)

        def write(*arguments, **options):
            if any(when in str(a) for a in arguments if isinstance(a, str | Path)):
                raise error(FULL)
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, write)
        return lambda: monkeypatch.setattr(module, name, real)

    return at


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_files_have_the_modes_that_the_umask_asks_for(make, tmp_path, mask):
    with umask(mask):
        _, run, _ = make(trackers="tensorboard", pictures=mask == 0o007)
        out = export_run(run, tmp_path / "out")
        half = export_run(run, tmp_path / "half", "client")
    found = {}
    for directory in (run, out, half):
        found = modes(directory)
        for name, mode in found.items():
            wanted = 0o777 if (directory / name).is_dir() else 0o666
            assert mode == wanted & ~mask, (name, oct(mode))
    assert "model.safetensors" in found
    assert "checkpoint-3/tensors.safetensors" in modes(run)


def test_an_export_does_not_take_over_the_modes_of_the_files_it_copies(make, tmp_path):
    _, run, _ = make()
    for path in run.glob("model/*"):
        path.chmod(0o600)
    with umask(0o022):
        out = export_run(run, tmp_path / "out")
    assert set(modes(out).values()) == {0o755, 0o644}


def test_a_model_without_room_costs_nothing_but_itself(make, full):
    whole_results, undisturbed, _ = make()
    room = full(safetensors.torch, "save_file", "model.safetensors", SafetensorError)
    with pytest.raises(HoslError, match=r"model, 6\.\d MB \(No space left") as raised:
        make()
    run = undisturbed.with_name("run1")
    said = str(raised.value)
    assert "results.json is there; make room there" in said
    assert f"then resume={run} writes what is missing, without training" in said
    assert not [p for p in run.iterdir() if "model" in p.name]
    with pytest.raises(CheckpointError, match="not saved to the end"):
        read_run(run)
    assert json.loads((run / "results.json").read_text())["loss"] == whole_results.loss

    again = (run / "results.json").read_bytes()
    with pytest.raises(HoslError, match="without training"):
        make(resume=str(run))  # there is still no room
    room()
    assert json.loads(again)["fingerprint"] == whole_results.fingerprint
    resumed, _, _ = make(resume=str(run))
    assert resumed.evaluations == whole_results.evaluations
    assert metrics(run) == metrics(undisturbed)
    models = [d / "model" / "model.safetensors" for d in (run, undisturbed)]
    assert models[0].read_bytes() == models[1].read_bytes()
    with pytest.raises(ConfigError, match="nothing is left to do"):
        make(resume=str(run))


def test_without_room_for_a_checkpoint_either_the_steps_after_the_last_are_taken_again(make, full):
    _, undisturbed, _ = make(steps=5)
    full(safetensors.torch, "save_file", "model.safetensors", SafetensorError)
    full(checkpoint, "save_tensors", "checkpoint-5")
    with pytest.raises(HoslError, match="after it has taken the steps from 3") as raised:
        make(steps=5)
    assert "checkpoint (No space left" in str(raised.value)
    assert steps(undisturbed.with_name("run1"))[0] == 3
    full(checkpoint, "save_tensors", "checkpoint-")
    with pytest.raises(HoslError, match="there is no checkpoint to make it from"):
        make()


def test_adapters_without_room_leave_nothing_half_written(make, full):
    lora = {"client_trainable": "lora", "server_trainable": "lora", "lora_rank": 2}
    full(safetensors.torch, "save_file", "adapter_model.safetensors", SafetensorError)
    with pytest.raises(HoslError, match=r"model, 0\.0 MB"):
        make(save_format="adapters", **lora)


def test_results_without_room_are_in_the_log_and_are_written_later(make, full, caplog):
    room = full(report, "put", "results.json")
    with pytest.raises(
        HoslError, match=r"could not be written: results\.json \(No space"
    ) as raised:
        make(save_model=False)
    assert "results.json is there" not in str(raised.value)
    (told,) = [r.getMessage() for r in caplog.records if "it would be: " in r.getMessage()]
    results = json.loads(told.partition("it would be: ")[2])
    run = Path(re.search(r"resume=(\S+)", str(raised.value))[1])
    room()
    resumed, _, _ = make(resume=str(run), save_model=False)
    assert resumed.evaluations == results["evaluations"]
    assert (run / "results.json").is_file()


def test_lines_without_room_are_written_when_there_is_some(make, monkeypatch, caplog):
    _, undisturbed, _ = make(save_model=False)
    real, calls = Lines.flush, []

    def flush(self):
        calls.append(self.path.name)
        if 2 <= len(calls) < 7:
            raise OSError(FULL)
        real(self)

    monkeypatch.setattr(Lines, "flush", flush)
    _, run, _ = make(save_model=False)
    assert metrics(run) == metrics(undisturbed)
    assert (run / "ledger.jsonl").read_bytes() == (undisturbed / "ledger.jsonl").read_bytes()
    said = [r.getMessage() for r in caplog.records]
    assert sum("metrics.jsonl cannot be written" in line for line in said) == 1


def test_pictures_without_room_are_left_out(make, full, caplog):
    full(report, "draw_partition", "partition.png")
    full(report, "draw_curve", "run0")
    results, _, _ = make(pictures=True, save_model=False)
    assert results.steps == 4
    assert "partition.png cannot be written" in caplog.text
    assert "curve.png cannot be written" in caplog.text


def test_a_run_without_room_to_begin_is_refused(make, full):
    full(report, "put", "config.json")
    with pytest.raises(ConfigError, match=r"output-dir: .* cannot be written \(No space left"):
        make()


def test_little_room_is_said_before_training(make, monkeypatch, caplog):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    make()
    assert "0.0 MB free and the model will need about 6." in caplog.text


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    put(path, "one")
    (tmp_path / ".file.part").symlink_to(tmp_path / "elsewhere")
    put(path, b"two")
    assert path.read_text() == "two"
    assert not (tmp_path / "elsewhere").exists(), "a link is not followed"

    def replace(self, target):
        raise OSError(FULL)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="No space"):
        put(path, "three")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "two"


def test_lines_that_do_not_fit_leave_the_file_as_it_was(tmp_path):
    path = tmp_path / "lines"
    path.write_text("")
    lines = Lines(path)
    lines.hold("one")
    lines.flush()
    lines.hold("two")
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space|Invalid"):
        lines.flush()
    path.unlink()
    path.write_text("one\n")
    lines.hold("three")
    lines.flush()
    assert path.read_text() == "one\ntwo\nthree\n"


@pytest.mark.parametrize("error", [OSError(FULL), SafetensorError(FULL), Exception(FULL)])
def test_a_directory_appears_whole_or_not_at_all(tmp_path, error):
    (tmp_path / ".made.part").mkdir()  # of a process that was killed

    def make(*errors):
        with made_whole(tmp_path / "made") as part:
            (part / "file").touch()
            for each in errors:
                raise each

    with pytest.raises(OSError, match="No space"):
        make(error)
    assert not list(tmp_path.iterdir())
    make()
    assert [p.name for p in tmp_path.rglob("*")] == ["made", "file"]


def test_tensors_that_do_not_fit_are_an_os_error(tmp_path, full):
    full(safetensors.torch, "save_file", "x", SafetensorError)
    with pytest.raises(OSError, match="No space"):
        save_tensors({}, tmp_path / "x")
