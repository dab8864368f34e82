"""The page of runs: the numbers of their files, nothing unescaped, nothing fetched, no crash."""

import json
import re

import pytest
from pages import Checker, checked, write_run
from pages import undrawn as undrawn  # a fixture
from runs import run_factory
from typer.testing import CliRunner

from hosl_flower.cli import cli
from hosl_flower.report.bars import shares
from hosl_flower.report.curves import AXES, smoothed, spreads, thinned
from hosl_flower.report.page import page, write_page
from hosl_flower.report.participation import participation
from hosl_flower.report.runs import PageError, read_runs
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl


def test_the_numbers_are_those_of_the_files(tmp_path, undrawn):
    seen = checked(write_run(tmp_path / "one"))
    for figure in (
        "0.8125", "0.4321", "0.7001", "0.7500", "1.20 x its forward", "32.0 MB", "1.2 kB",
        "500.0 MiB", "12.0 MiB", "0.3111", "2.5", "2,000,000 held, 1,000,000 trained", "9.8.7",
        "f" * 16, "d" * 16, "one client, which took part in 4 of 4 steps",
    ):  # fmt: skip
        assert figure in seen.text, figure
    assert seen.text.count("0.50 MB") == 1, "2 MB in 4 steps, without the evaluations"
    assert "not recorded" not in seen.text.split("Configuration")[1].split("Environment")[0]


def test_bytes_of_very_different_runs_have_readable_ticks(tmp_path):
    much = {"forward": {"messages": 4, "bytes": 10**11}}
    first, second = (write_run(tmp_path / "a"), write_run(tmp_path / "b", bytes_up=much))
    text = checked(first, second).text
    assert "mathdefault" not in text
    assert "10,000" in text


def test_it_fetches_nothing_and_runs_nothing(tmp_path):
    for name in ("one", "two"):
        (write_run(tmp_path / name) / "partition.png").write_bytes(b"\x89PNG " + name.encode())
    text = page(read_runs([tmp_path / "one", tmp_path / "two"]))
    seen = Checker(text)
    assert not seen.fetched
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(seen.tags)
    assert "default-src &#x27;none&#x27;" in text
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert seen.tags.count("svg") == 2 * len(AXES) + 2 + 2, "curves, bars, scalars"
    assert text.count("data:image/png;base64,") == 2


def test_all_text_is_escaped(tmp_path):
    evil = "<script>alert('&\"')</script>$\\frac{"
    dropped = [{"step": 2, "partition": 1, "reason": evil}]
    clients = {"number": 3, "steps_taken_part": {"0": 4}, "dropped": dropped}
    directory = write_run(
        tmp_path / "a <b> & $x^{",
        {"prompt": evil, evil: evil},
        **dict.fromkeys(("method", "model", "task", "notice", "fingerprint"), evil),
        clients=clients,
        bytes_up={evil: {"messages": 1, "bytes": 1}},
    )
    (directory / "diverged.txt").write_text(evil)
    seen = checked(directory, write_run(tmp_path / "two"))
    assert "script" not in seen.tags
    assert "b" not in seen.tags
    assert seen.text.count(evil) > 6
    assert "a <b> & $x^{" in seen.text


def test_several_runs_stand_side_by_side_and_what_differs_is_marked(tmp_path, undrawn):
    first = write_run(tmp_path / "x" / "run")
    second = write_run(tmp_path / "y" / "run", {"cut-layer": 7}, accuracy=0.625, method="hosl")
    text = page(read_runs([first, second, first]))
    seen = Checker(text)
    assert "2 runs side by side" in seen.text
    assert "x/run" in seen.text, "named apart"
    assert "y/run" in seen.text
    assert "0.8125 0.6250" in seen.text
    differ = Checker(re.search(r'<table class="differ">.*?</table>', text)[0]).text
    assert "cut-layer 5 7 5" in differ
    assert "batch-size" not in differ


def test_a_single_run_shows_what_is_not_default(tmp_path, undrawn):
    text = page(read_runs([write_run(tmp_path / "one", {"cut-layer": 7})]))
    differ = Checker(re.search(r'<table class="differ">.*?</table>', text)[0]).text
    assert "cut-layer 7 5" in differ
    assert "batch-size" not in differ


def test_random_weights_are_not_to_be_missed(tmp_path, undrawn):
    assert "RANDOM WEIGHTS" not in checked(write_run(tmp_path / "real")).text
    random = write_run(tmp_path / "random", pretrained=False, notice="no hub")
    text = checked(random).text
    assert text.index("RANDOM WEIGHTS") < text.index("held-out accuracy")
    assert "no hub" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_a_run_that_left_the_finite_numbers_has_a_page(tmp_path, value):
    directory = write_run(
        tmp_path / "one",
        loss=value,
        accuracy=value,
        evaluations=[{"step": s, "loss": value, "accuracy": value} for s in (0, 4)],
    )
    rows = [{"step": 1, "train_loss": value}, {"step": 2, "train_loss": value}]
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "ledger.jsonl").write_text(json.dumps({"step": 1, "scalars": [value]}))
    assert ("not finite" in checked(directory, write_run(tmp_path / "two")).text) == (
        value != 1e300
    )


def test_a_diverged_and_an_unfinished_run_show_how_far_they_came(tmp_path):
    unfinished, diverged = (write_run(tmp_path / name) for name in ("early", "wild"))
    for directory in (unfinished, diverged):
        (directory / "results.json").unlink()
    (diverged / "diverged.txt").write_text("step 4: the loss is not finite")
    with (unfinished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train_lo')
    text = checked(unfinished, diverged).text
    assert "Not finished: 4 of 4 steps" in text
    assert "metrics.jsonl is read up to line 5 only" in text
    assert "Diverged: step 4: the loss is not finite" in text
    assert "0.8125" in text, "the last evaluation"
    assert "No bytes are recorded" in text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("results.json", "{", "results.json cannot be read"),
        ("results.json", '{"steps": "many"}', "results.json cannot be read: steps: input should"),
        ("results.json", "[]", "results.json cannot be read"),
        ("results.json", "{}", "No phase was measured"),
        ("config.json", "\xff", "config.json cannot be read"),
        ("config.json", None, "There is no config.json"),
        ("ledger.jsonl", None, "No scalars in the ledger"),
        ("ledger.jsonl", '{"step": 1, "weights": "ab"}', "No scalars in the ledger"),
        ("metrics.jsonl", None, "There is no metrics.jsonl"),
        ("metrics.jsonl", "nonsense", "metrics.jsonl is read up to line 0 only"),
    ],
)
def test_what_a_run_lacks_is_said(tmp_path, undrawn, name, content, said):
    directory = write_run(tmp_path / "one")
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content.encode("latin-1"))
    text = checked(directory).text
    assert said in text
    assert "No partition.png: one." in text


def test_costs_an_old_run_does_not_tell_leave_out_their_axes(tmp_path, undrawn):
    directory = write_run(tmp_path / "one", bytes_up={}, bytes_down={})
    (directory / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.0}')
    text = checked(directory).text
    assert "Not recorded: MB up and down, client forwards, seconds of training." in text


def test_what_is_no_run_is_refused_with_what_to_do(tmp_path):
    write_run(tmp_path / "runs" / "one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs" / "one" / "model").mkdir()
    (tmp_path / "runs" / "one" / "model" / "config.json").write_text('{"model_type": "opt"}')
    for path, said in (
        ("runs/one/model", f"name the run it is in, {tmp_path / 'runs' / 'one'}"),
        ("runs", f"found one; name the runs in it, e.g. {tmp_path / 'runs' / 'one'}"),
        ("empty", "found nothing; name the directory that a run names at its end"),
        ("runs/one/config.json", "found a file; name the directory it is in"),
        ("nope", "no such directory"),
    ):
        with pytest.raises(PageError, match="is no run directory") as raised:
            read_runs([tmp_path / path])
        assert said in str(raised.value)


def test_the_command_writes_one_file(tmp_path, undrawn):
    directory, out = write_run(tmp_path / "one"), tmp_path / "new" / "page.html"
    done = CliRunner().invoke(cli, ["report", str(directory), "--out", str(out)])
    assert done.exit_code == 0, done.stderr
    assert str(out) in done.stdout
    assert Checker(out.read_text()).text.count("0.8125")
    done = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert done.exit_code == 1
    assert "is no run directory" in " ".join(done.stderr.split())
    with pytest.raises(PageError, match="cannot be written"):
        write_page([directory], tmp_path)


def test_curves_are_smoothed_and_thinned_by_hand():
    points = [(step, float(step)) for step in range(1, 601)]
    assert smoothed(points)[2] == (3, 2.0)  # (1 + 2 + 3) / 3
    assert smoothed(points)[-1] == (600, 590.5)  # 581 to 600
    thin = thinned(points)
    assert len(thin) <= 251
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    assert thinned([]) == []


def test_spreads_of_the_ledgers_scalars(tmp_path):
    directory = write_run(tmp_path / "one")
    rows = [
        {"genesis": "g"},
        {"step": 1, "scalars": [0.0, 10.0, 20.0]},
        {"step": 2, "scalars": [5]},
    ]
    (directory / "ledger.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, last = spreads(read_runs([directory])[0])
    assert (first.step, first.quarter, first.median, first.three_quarters) == (1, 5.0, 10.0, 15.0)
    assert (last.low, last.high) == (5.0, 5.0)


def test_who_took_part_is_drawn_again_only_where_it_adds_up(tmp_path, tiny_opt, undrawn):
    keys = {"num-clients": 5, "clients-per-step": 2}
    run = run_factory(HoSfl, tiny_opt, tmp_path, **keys)
    _, directory, _ = run(save_model=False)
    (real,) = read_runs([directory])
    found = participation(real)
    assert [len(clients) for clients in found.drawn] == [2] * 4
    assert [sum(row) for row in shares(found)] == [found.totals.get(p, 0) for p in range(5)]
    assert "brought up to date" in Checker(page([real])).text

    content = json.loads((directory / "results.json").read_text())
    content["clients"]["steps_taken_part"]["0"] = 99
    (directory / "results.json").write_text(json.dumps(content))
    (other,) = read_runs([directory])
    assert participation(other).drawn is None
    assert "which client took part in which step cannot be told" in Checker(page([other])).text


def test_clients_that_take_turns_and_one_that_was_left_out(tmp_path, undrawn):
    keys = {"num-clients": 2, "turn-steps": 1, "strategy": f"{Hosl.__module__}:Hosl"}
    dropped = [{"step": 4, "partition": 1, "reason": "did not answer in time"}]
    clients = {"number": 2, "steps_taken_part": {"0": 2, "1": 1}, "dropped": dropped}
    directory = write_run(tmp_path / "one", keys, clients=clients)
    (run,) = read_runs([directory])
    assert participation(run).drawn == [[0], [1], [0], []]
    assert "4 1 did not answer in time" in checked(directory).text


def test_clients_left_out_more_often_than_the_results_tell_reasons(tmp_path, undrawn):
    """results.json has the first 100 of a client, metrics.jsonl has all; both may be there."""
    keys = {"num-clients": 2, "strategy": f"{Hosl.__module__}:Hosl"}
    dropped = [{"step": step, "partition": 1, "reason": "late"} for step in (1, 2)]
    taken = {"0": 4}
    clients = {"number": 2, "steps_taken_part": taken, "dropped": dropped}
    clients["times_dropped"] = {"1": 60}
    directory = write_run(tmp_path / "one", keys, clients=clients)
    assert participation(read_runs([directory])[0]).drawn is None
    seen = checked(directory).text
    assert "And 58 more." in seen
    assert "60 times one was left out" in seen

    clients["times_dropped"] = {"1": 4}
    directory = write_run(tmp_path / "two", keys, clients=clients)
    rows = [{"step": step, "dropped": {"1": "late"}} for step in range(1, 5)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text)
    found = participation(read_runs([directory])[0])
    assert [drop.step for drop in found.drops] == [1, 2, 3, 4]
    assert found.drawn == [[0]] * 4
    seen = checked(directory).text
    assert "4 1 late" in seen
    assert "more." not in seen


def test_generated_answers_are_shown_by_f1(tmp_path, undrawn):
    evaluations = [
        {"step": 0, "loss": 3.0, "exact_match": 0.0, "f1": 0.0625},
        {"step": 4, "loss": 2.0, "exact_match": 0.5, "f1": 0.6875},
    ]
    figures = {"accuracy": None, "balanced_accuracy": None, "majority_accuracy": None}
    written = write_run(
        tmp_path / "one", evaluations=evaluations, exact_match=0.5, f1=0.6875, **figures
    )
    seen = checked(written)
    assert "held-out F1 0.6875" in seen.text
    assert "held-out accuracy" not in seen.text
    assert "exact match 0.5000" in seen.text
    assert "2.0000 / 0.6875" in seen.text
    assert "Held-out F1 against steps: one 0.0625 to 0.688" in seen.text
    assert "exact match" not in checked(write_run(tmp_path / "two")).text
    both = checked(written, tmp_path / "two")
    assert "held-out accuracy" in both.text
    assert "exact match" in both.text
    assert "Held-out accuracy or F1 against steps" in both.text
