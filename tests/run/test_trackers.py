"""Trackers: what reaches TensorBoard, and that none of them can end a run."""

import logging

import pytest
from runs import metrics, run_factory
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hosl_flower.errors import ConfigError
from hosl_flower.run import trackers
from strategies.hosl import Hosl


@pytest.fixture
def run(tiny_opt, tmp_path):
    return run_factory(Hosl, tiny_opt, tmp_path, **{"save-model": False})


def test_tensorboard_has_the_curves_of_the_run_directory(run):
    results, directory, config = run(trackers="tensorboard")
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    rows = metrics(directory)
    for tag, wanted in {
        "train/loss": [(r["step"], r["train_loss"]) for r in rows if "train_loss" in r],
        "held_out/loss": [(r["step"], r["held_out"]["loss"]) for r in rows if "held_out" in r],
        "final/accuracy": [(0, results.accuracy)],
    }.items():
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [v for _, v in found] == pytest.approx([v for _, v in wanted], rel=1e-6), tag
    assert {"seconds/client", "seconds/total"} <= set(events.Tags()["scalars"])
    (text,) = events.Tensors("config/text_summary")
    assert f"| seed | {config.seed} |".encode() in text.tensor_proto.string_val[0]


def test_auto_is_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    assert list(trackers.Trackers(("auto",), tmp_path, {})._open) == ["tensorboard"]
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert not trackers.Trackers(("auto",), tmp_path, {})._open


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(run, monkeypatch, caplog):
    class Fails:
        def __init__(self, directory, keys):
            pass

        def log(self, step, values):
            if step == 2:
                raise ConnectionError("the service is gone\nand more")

    monkeypatch.setitem(trackers.TRACKERS, "fails", ("json", Fails))
    with caplog.at_level(logging.WARNING, "hosl_flower"):
        with_it, directory, _ = run(trackers="fails")
    lines = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert lines == ["fails is left out from here on: the service is gone"]
    without, other, _ = run()
    assert metrics(directory) == metrics(other)
    assert with_it.fingerprint == without.fingerprint


def test_unknown_and_missing_trackers_are_refused_before_anything_is_run(
    run, tmp_path, monkeypatch
):
    with pytest.raises(ConfigError, match="no 'tensorbord'; there are tensorboard, wandb, mlflow"):
        run(trackers="tensorbord")
    find = trackers.importlib.util.find_spec
    monkeypatch.setattr(
        trackers.importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name)
    )
    with pytest.raises(ConfigError, match=r"trackers = mlflow .* 'hosl-flower\[mlflow\]'"):
        run(trackers="tensorboard,mlflow")
    assert not list((tmp_path / "runs").glob("*"))
