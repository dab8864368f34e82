"""The compare command: what is run, what is not run again, what the tables say."""

import csv
import json
import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from runs import PROMPT, write_reviews
from typer.testing import CliRunner

from hosl_flower.cli import cli
from hosl_flower.compare import outcome as outcome_module
from hosl_flower.compare import runner as cells_module
from hosl_flower.compare.experiment import cells, read_experiment, trials
from hosl_flower.compare.experiment_file import Cell
from hosl_flower.compare.figures import draw_frontier
from hosl_flower.compare.outcome import CellError, Outcome, is_diverged, outcome
from hosl_flower.compare.runner import choose, is_finished, run_all
from hosl_flower.compare.table import Row, _gap, markdown
from hosl_flower.compare.worker import main as cell_main
from hosl_flower.config.parse import parse_config
from hosl_flower.errors import ConfigError
from hosl_flower.methods.load import load_method
from hosl_flower.protocol.messages.registry import REQUESTS

SHIPPED = Path(__file__).parents[2] / "simulations" / "comparisons"

EXPERIMENT = """
seeds = [0, 1]
control = "frozen"
reference = "split-fo"
target-accuracy = 0.01

[config]
model = "{model}"
data-path = "{data}"
task = "reviews"
prompt = "{prompt}"
verbalizers = "terrible,great"
steps = 4
eval-every = 2
batch-size = 5
max-length = 100
device = "cpu"
threads = 1
client-trainable = "blocks"
server-learning-rate = 1e-2

[variants.cut1]
cut-layer = 1
[variants.cut2]
cut-layer = 2

[methods.frozen]
strategy = "strategies.frozen_client:FrozenClient"
[methods.ho-sfl]
strategy = "strategies.ho_sfl:HoSfl"
directions = 2
tune = {{ client-learning-rate = [1e-4, 1e-3] }}
[methods.split-fo]
strategy = "strategies.split_fo:SplitFo"
local-steps = 2
tune = {{ client-learning-rate = [1e-3, 1e-2] }}

[tuning]
seed = 9
steps = 2
"""


@pytest.fixture
def experiment(tiny_opt, tmp_path):
    """A file, and a function that changes it."""
    model, _ = tiny_opt(vocab_size=50272, max_position_embeddings=128)
    data = write_reviews(tmp_path / "reviews")
    text = EXPERIMENT.format(model=model, data=data, prompt=PROMPT)
    path = tmp_path / "tiny.toml"

    def write(old="", new=""):
        assert old in text
        path.write_text(text.replace(old, new))
        return path

    write()
    return write


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells are run here, not in processes of their own: seconds per start are spared."""
    started = []

    class Here:
        returncode = 0

        def __init__(self, command, **_):
            assert command[1:] == ["-m", "hosl_flower.compare.worker"]

        def communicate(self, request):
            started.append(json.loads(request)["keys"]["run-name"])
            monkeypatch.setattr("sys.stdin", type("In", (), {"read": lambda self: request})())
            cell_main()
            return "", ""

    monkeypatch.setattr(cells_module.subprocess, "Popen", Here)
    monkeypatch.setattr("hosl_flower.run.recorder.draw_curve", lambda *_: None)
    monkeypatch.setattr("hosl_flower.run.recorder.draw_partition", lambda *_: None)
    return started


def test_one_command_tunes_runs_and_tabulates_and_runs_nothing_twice(
    experiment, in_this_process, tmp_path
):
    path, out = experiment("[variants.cut1]\ncut-layer = 1\n"), tmp_path / "out"
    done = CliRunner().invoke(cli, ["compare", str(path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert len(in_this_process) == 2 * 2 + 2 * 3, "trials and runs"
    assert (out / "results.md").read_text() in done.output
    assert "curves-cut2.png" in {p.name for p in out.glob("*.png")}
    lines = list(csv.DictReader((out / "results.csv").open()))
    assert len(lines) == 6
    results = json.loads((out / "cut2-ho-sfl-seed1" / "results.json").read_text())
    (line,) = [
        r for r in lines if (r["variant"], r["method"], r["seed"]) == ("cut2", "ho-sfl", "1")
    ]
    assert float(line["loss"]) == results["loss"]
    kinds = ("forward", "cut-gradient", "catch-up")
    down = sum(results["bytes_down"][k]["bytes"] for k in kinds if k in results["bytes_down"])
    assert float(line["bytes_down"]) == down / 4
    assert float(line["forwards"]) == 1 + 2

    tuned = json.loads((out / "tuned.json").read_text())
    assert [(t["variant"], t["method"]) for t in tuned] == [
        ("cut2", "ho-sfl"), ("cut2", "split-fo"),
    ]  # fmt: skip
    for one in tuned:
        best = min(one["trials"], key=lambda trial: trial["loss"])
        assert one["chosen"]["client-learning-rate"] == best["client-learning-rate"]
        config = out / f"{one['variant']}-{one['method']}-seed0" / "config.json"
        used = json.loads(config.read_text())["config"]
        assert used["client-learning-rate"] == best["client-learning-rate"]

    in_this_process.clear()
    again = CliRunner().invoke(cli, ["compare", str(path), "--out", str(out)])
    assert again.exit_code == 0
    assert in_this_process == []
    assert (out / "results.md").read_text() in again.output


def test_a_run_whose_task_was_read_from_its_data_is_known_again(tmp_path):
    data = tmp_path / "mine.csv"
    data.write_text("text,label\na goal,sport\na soup,food\n")
    cell = Cell("", "hosl", 0, {"data-path": str(data), "task": ""})
    directory = tmp_path / cell.name
    directory.mkdir()
    config = load_method(parse_config(dict(cell.keys))).config
    assert config.task.verbalizers == "food=food,sport=sport"
    (directory / "config.json").write_text(json.dumps({"config": config.as_keys()}))
    (directory / "results.json").write_text("{}")
    assert is_finished(cell, tmp_path)


def test_runs_end_with_the_process_that_runs_them(experiment, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid-$$\nexec sleep 600\n")
    python.chmod(0o755)
    monkeypatch.setattr(cells_module.sys, "executable", str(python))

    def end():
        while len(list(tmp_path.glob("pid-*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end).start()
    with pytest.raises(SystemExit, match="143"):
        run_all(cells(read_experiment(experiment()), {})[:3], tmp_path / "out", 2, "", "runs")
    begun = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
    assert len(begun) == 2, "the third was not begun"
    give_up = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in begun):
        assert time.monotonic() < give_up, "a run was left"
        time.sleep(0.05)


def test_a_run_that_stopped_halfway_is_run_again(experiment, in_this_process, tmp_path):
    found, out = read_experiment(experiment()), tmp_path / "out"
    (first, *_) = cells(found, {})
    (out / first.name).mkdir(parents=True)
    (out / first.name / "metrics.jsonl").write_text("{}\n")
    run_all([first], out, 1, "", "runs")
    assert is_finished(first, out)
    assert (out / f"{first.name}.failed0" / "metrics.jsonl").is_file()


def test_a_setting_that_diverges_is_the_worst_and_not_run_again(
    experiment, in_this_process, tmp_path, monkeypatch
):
    found, out = read_experiment(experiment()), tmp_path / "out"
    own = [c for c in trials(found) if c.variant == "cut2" and "split-fo" in c.method]
    wild = {**own[1].keys, "server-learning-rate": 1e3, "steps": 40, "eval-every": 40}
    own[1] = Cell("cut2", own[1].method, own[1].seed, wild)
    run_all(own, out, 1, "", "tuning")
    assert [is_diverged(out / cell.name) for cell in own] == [False, True]
    assert all(is_finished(cell, out) for cell in own)
    with pytest.raises(CellError, match="diverged"):
        outcome(out / own[1].name, 0)
    monkeypatch.setattr(cells_module, "trials", lambda _: own)
    (((_, method), best, table),) = choose(found, out)
    assert (method, best) == ("split-fo", {"client-learning-rate": 1e-3})
    assert [trial["loss"] == "diverged" for trial in table] == [False, True]


def test_results_of_another_configuration_are_not_mixed_in(experiment, in_this_process, tmp_path):
    out = tmp_path / "out"
    (first, *_) = cells(read_experiment(experiment()), {})
    run_all([first], out, 1, "", "runs")
    (other, *_) = cells(read_experiment(experiment("batch-size = 5", "batch-size = 6")), {})
    with pytest.raises(ConfigError, match="holds a run with another batch-size"):
        is_finished(other, out)
    elsewhere = cells(read_experiment(experiment(), {"device": "cuda"}), {})[0]
    assert elsewhere.keys["device"] == "cuda"
    assert is_finished(elsewhere, out), "the numbers are those of any device, to rounding"


def test_a_run_that_fails_ends_the_comparison_with_its_last_words(experiment, tmp_path):
    found = read_experiment(experiment("cut-layer = 1", "cut-layer = 9"))
    with pytest.raises(CellError, match=r"cut1-frozen-seed0 failed(?s:.*)cut-layer = 9 is outside"):
        run_all(cells(found, {})[:1], tmp_path / "out", 1, "", "runs")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("batch-size = 5", "batch-siz = 5", "no such key; did you mean 'batch-size'"),
        ("seeds = [0, 1]", "seeds = []", "seeds"),
        ("seeds = [0, 1]", "", "seeds: field required"),
        ('control = "frozen"', 'control = "frosen"', "'frosen' is none of the methods frozen, ho"),
        ("[1e-4, 1e-3]", "[1e-4]", "as many settings: ho-sfl 1, split-fo 2"),
        ("[1e-4, 1e-3]", "1e-4", "methods.ho-sfl.tune: expected lists of values"),
        ("seed = 9", "seed = 1", "tuning.seed must be none of the seeds"),
        ("seed = 9\n", 'seed = 9\nvariant = "cut3"\n', "'cut3' is none of the variants cut1, cut2"),
        ("[tuning]\nseed = 9\nsteps = 2\n", "", "ho-sfl, split-fo have a tune grid"),
        ("local-steps = 2", "local-steps = 3", "cut1-split-fo-seed0|no multiple of local-steps"),
        ("directions = 2", "turn-steps = 2", "ho-sfl does not use turn-steps"),
        ("seeds = [0, 1]", "seeds = [0, 1]\nmethod = 3", "method: extra inputs are not permitted"),
        ("seeds = [0, 1]", "seeds = [0, 1", "is no TOML"),
    ],
)
def test_a_bad_file_is_refused_before_anything_is_run(experiment, old, new, match):
    with pytest.raises(ConfigError, match=match):
        read_experiment(experiment(old, new))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("**/*.toml")), ids=lambda path: path.stem)
def test_shipped_experiments_are_sound(path):
    found = read_experiment(path, {"model": "random:opt-tiny"})
    assert len(found.seeds) >= 3
    assert {cell.keys["model"] for cell in cells(found, {})} == {"random:opt-tiny"}


def test_trials_take_a_seed_and_steps_of_their_own(experiment):
    found = read_experiment(experiment())
    assert {cell.seed for cell in trials(found)} == {9}
    assert {cell.keys["steps"] for cell in trials(found)} == {2}
    assert not any(cell.method.startswith("frozen") for cell in trials(found))
    own = "seed = 9\nsteps = 2\n"
    found = read_experiment(
        experiment(own, own + "config = { eval-examples = 5, epsilon = 1e-2 }\n")
    )
    assert {cell.keys.get("epsilon") for cell in trials(found)} == {1e-2, None}, "not of split FO"
    assert {cell.keys["eval-examples"] for cell in trials(found)} == {5}
    assert not any("eval-examples" in cell.keys for cell in cells(found, {}))


def run(loss, accuracy=0.5, curve=((0, 1.0, 0.5),), **changes):
    values = dict.fromkeys(Outcome.__dataclass_fields__, 0.0)
    return Outcome(
        **{
            **values,
            "loss": loss,
            "accuracy": accuracy,
            "to_target": None,
            "curve": curve,
            **changes,
        }
    )


def test_the_gap_by_hand():
    # frozen loses 0.6, 0.8; first order 0.2, 0.4; the method 0.5, 0.5: differences over 0.4
    zero, one = [run(0.6), run(0.8)], [run(0.2), run(0.4)]
    mean, error = _gap([run(0.5), run(0.5)], zero, one, "loss")
    assert mean == pytest.approx((0.1 + 0.3) / 2 / 0.4)
    assert error == pytest.approx((0.5 / math.sqrt(2)) / math.sqrt(2))
    assert _gap(zero, zero, one, "loss") == (0.0, 0.0)
    assert _gap(one, zero, one, "loss") == pytest.approx((1.0, 0.0))


def test_there_is_no_gap_where_the_two_ends_do_not_differ_enough():
    zero, one = [run(0.6), run(0.4)], [run(0.5), run(0.45)]
    assert _gap([run(0.5), run(0.5)], zero, one, "loss") is None
    assert _gap([run(0.5)], None, [run(0.1)], "loss") is None


def test_a_row_says_when_the_target_was_reached(experiment):
    found = read_experiment(experiment("target-accuracy = 0.01", "target-accuracy = 0.9"))
    there = run(0.5, to_target=10, bytes_up=1e6, bytes_down=1e6, step_seconds=0.5)
    table = [
        Row(v, m, [there, run(0.5)], None, None, 1.5, 2.5)
        for v in found.variants
        for m in found.methods
    ]
    text = markdown(found, table)
    assert "| steps to 0.9 | MB to 0.9 | s to 0.9 |" in text
    assert "| 10 (1 of 2) | 20.0 | 5.0 |" in text


def test_tasks_whose_answers_are_generated_have_f1_and_exact_match(experiment):
    found = read_experiment(experiment())
    written = run(0.5, accuracy=None, f1=0.75, exact_match=0.25)
    table = [
        Row(v, m, [written, written] if v == "cut1" else [run(0.5)], None, (0.5, 0.1), 1.5, 2.5)
        for v in found.variants
        for m in found.methods
    ]
    cut1, _, cut2 = markdown(found, table).partition("### cut2")
    assert "| method | F1 | exact match | loss | gap closed (loss) | gap closed (F1) |" in cut1
    assert "| 0.7500 +- 0.0000 | 0.2500 +- 0.0000 | 0.5000 +- 0.0000 |  | 0.50 +- 0.10 |" in cut1
    assert "| method | accuracy | loss | gap closed (loss) | gap closed (accuracy) |" in cut2


def test_forwards_and_bytes_of_every_kind(experiment, in_this_process, tmp_path):
    path = experiment('"strategies.ho_sfl:HoSfl"\ndirections = 2', '"strategies.heron:Heron"\n'
                      "directions = 3\nlocal-steps = 2")  # fmt: skip
    found, out = read_experiment(path), tmp_path / "out"
    wanted = [cell for cell in cells(found, {}) if cell.seed == 0 and cell.variant == "cut1"]
    run_all(wanted, out, 1, "", "runs")
    forwards = {cell.method: outcome(out / cell.name, 0).forwards for cell in wanted}
    # HERON: 2 local steps of 1 + 3, and the upload; first order: forward, forward, backward
    assert forwards == {"frozen": 1, "ho-sfl": 2 * 4 + 1, "split-fo": 4}
    fo = json.loads((out / "cut1-split-fo-seed0" / "results.json").read_text())
    fetched = fo["bytes_up"]["fetch"]["bytes"]
    found_fo = outcome(out / "cut1-split-fo-seed0", 0)
    assert found_fo.bytes_up * 4 > fetched > 0
    exchange = fo["client_peak_memory"]["tensor_bytes"]["exchange"]
    assert found_fo.exchange_peak_bytes == max(found_fo.peak_bytes, exchange)


@pytest.mark.parametrize(
    ("derivative", "micro_batch", "forwards"),
    [("differences", 0, 1 + 2 * 4 - 1), ("differences", 2, 1 + 2 * 4), ("forward-mode", 2, 1 + 12)],
)
def test_forwards_of_two_local_steps_along_three_directions(
    tmp_path, derivative, micro_batch, forwards
):
    """Each step has a clean pass and 3 probes, or 3 passes with a tangent, of twice a pass; the
    first clean one is the forward's where it is kept."""
    (tmp_path / "results.json").write_text(json.dumps({
        "steps": 1, "loss": 0.5, "evaluations": [], "wall_seconds": 1.0,
        "bytes_up": {kind: {"messages": 1, "bytes": 1} for kind in ("forward", "cut-gradient")},
        "bytes_down": {}, "seconds_per_step": {"server": 0.0, "client": 0.0, "total": 0.0},
        "client_peak_memory": {"tensor_bytes": {"probe": 1}},
    }))  # fmt: skip
    keys = {"local-steps": 2, "directions": 3, "client-micro-batch": micro_batch}
    written = json.dumps({"config": {**keys, "derivative": derivative}})
    (tmp_path / "config.json").write_text(written)
    assert outcome(tmp_path, 0).forwards == forwards


def test_the_frontier_is_drawn_where_there_is_a_gap(tmp_path, monkeypatch):
    marks = []
    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", lambda _, *at, **__: marks.append(at))
    rows = [
        Row("", "frozen", [run(0.5)], (0.0, 0.0), None, 1.0, 1.0),
        Row("", "residual", [run(0.5)], (0.8, 0.1), None, 1.07, 1.4),
        Row("", "no-gap", [run(0.5)], None, None, 1.0, 1.0),
    ]
    draw_frontier(tmp_path / "frontier.png", "a title", rows)
    assert marks == [(1.0, 0.0), (1.07, 0.8)], "memory over inference, gap closed"
    assert (tmp_path / "frontier.png").is_file()
    draw_frontier(tmp_path / "none.png", "a title", rows[2:])
    assert not (tmp_path / "none.png").exists()


def test_one_variant_may_be_tuned_for_all(experiment):
    found = read_experiment(experiment("seed = 9\n", 'seed = 9\nvariant = "cut2"\n'))
    assert {trial.variant for trial in trials(found)} == {"cut2"}
    rate = {"client-learning-rate": 0.5}
    run = cells(found, {("cut2", "ho-sfl"): rate})
    rates = {c.variant: c.keys["client-learning-rate"] for c in run if c.method == "ho-sfl"}
    assert rates == {"cut1": 0.5, "cut2": 0.5}


def test_every_request_has_its_cost_in_a_step_or_is_none_of_training():
    """A new message has to say so: bytes and forward passes of a step are sums over these."""
    computing, moving = set(outcome_module._FORWARDS), set(outcome_module._UPDATES)
    others = {"describe", "evaluate", "continue", "grade", "held-out-states", "fingerprint"}
    assert not computing & moving
    assert computing | moving | others == REQUESTS.keys()
