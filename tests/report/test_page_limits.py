"""The page of runs whose files were made to hurt: links, control characters, figures beyond all."""

import json
import os

import pytest
from pages import Checker, checked, undrawn, write_run

from hosl_flower.report.page import page, write_page
from hosl_flower.report.participation import MOST_CLIENTS
from hosl_flower.report.runs import PageError, read_runs
from hosl_flower.system import whole_files as whole

__all__ = ["undrawn"]  # a fixture

CONTROL = "\x1b[31mred\r\n\x00\x9b1m\u202egnp.\u2028\ud800"


@pytest.mark.parametrize(
    "name", ["results.json", "config.json", "metrics.jsonl", "ledger.jsonl", "partition.png"]
)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_file_that_is_not_the_runs_own_is_not_shown(tmp_path, undrawn, name, kind):
    run = write_run(tmp_path / "one")
    (tmp_path / "key").write_text('{"model": "SECRET", "notice": "SECRET"}')
    (run / name).unlink(missing_ok=True)
    if kind == "link":
        (run / name).symlink_to(tmp_path / "key")
    else:
        os.mkfifo(run / name)
    text = page(read_runs([run]))
    assert "SECRET" not in text
    told = "is a link that leads out of" if kind == "link" else "is no regular file"
    assert f"{name} cannot be read: {run / name} {told}" in Checker(text).text


def test_what_diverged_txt_links_to_is_not_shown(tmp_path, undrawn):
    run = write_run(tmp_path / "one")
    (tmp_path / "key").write_text("SECRET")
    (run / "diverged.txt").symlink_to(tmp_path / "key")
    text = page(read_runs([run]))
    assert "SECRET" not in text
    assert "diverged.txt cannot be read" in text


def test_a_page_has_no_control_characters(tmp_path):
    dropped = [{"step": 2, "partition": 1, "reason": CONTROL}]
    run = write_run(
        tmp_path / "one\x1b[31m\u202e",
        {"prompt": CONTROL, CONTROL: 1},
        **dict.fromkeys(("method", "model", "task", "notice", "fingerprint"), CONTROL),
        clients={"number": 3, "steps_taken_part": {"0": 4}, "dropped": dropped},
        bytes_up={CONTROL: {"messages": 1, "bytes": 1}},
    )
    (run / "diverged.txt").write_bytes(b"\x1b[31m\xff")
    out = tmp_path / "page.html"
    write_page([run, write_run(tmp_path / "two")], out)
    text = out.read_text("utf-8")
    assert all(line.isprintable() for line in text.split("\n"))
    assert "\\x1b[31mred" in text
    Checker(text)


@pytest.mark.parametrize("number", [10**9, MOST_CLIENTS + 1])
@pytest.mark.parametrize("steps", [0, 4, 2**62])
def test_a_billion_clients_are_said_and_not_drawn(tmp_path, undrawn, number, steps):
    clients = {"number": number, "steps_taken_part": {"0": 4}, "dropped": []}
    keys = {"num-clients": number, "clients-per-step": 0, "local-steps": 2, "turn-steps": 1}
    run = write_run(tmp_path / "one", keys, clients=clients, steps=steps)
    assert f"{number:,} clients, too many to be drawn" in checked(run).text


@pytest.mark.parametrize("huge", [2**63, 10**400, -(10**400)])
@pytest.mark.parametrize(
    "where",
    [
        "steps",
        "clients.number",
        "client_peak_memory.bytes",
        "client_peak_memory.tensor_bytes.probe",
    ],
)
def test_a_number_beyond_all_counts_is_said(tmp_path, undrawn, huge, where):
    run = write_run(tmp_path / "one")
    results = json.loads((run / "results.json").read_text())
    *parts, last = where.split(".")
    inner = results
    for part in parts:
        inner = inner[part]
    inner[last] = huge
    (run / "results.json").write_text(json.dumps(results))
    assert f"results.json cannot be read: {where}: input should be" in checked(run).text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", "[" * 100_000),
        ("config.json", '{"config": ' + "[" * 100_000),
        ("metrics.jsonl", '{"a":' * 100_000),
        ("config.json", json.dumps({"config": {"steps": [[[1]]]}})),
        ("results.json", "9" * 10_000),
        ("results.json", json.dumps({"privacy": {"epsilon": {"0": 1.0}}})),
        ("results.json", json.dumps({"client_peak_memory": {"tensor_bytes": {"forward": "7"}}})),
        ("metrics.jsonl", '{"step": 1e400}'),
    ],
)
def test_nonsense_has_a_page(tmp_path, undrawn, name, content):
    run = write_run(tmp_path / "one")
    (run / name).write_text(content)
    checked(run)


def test_the_largest_numbers_that_can_be_written_have_a_page(tmp_path):
    run = write_run(tmp_path / "one", loss=1.7e308)
    scalars = {"step": 1, "scalars": [1.7e308, 1.7e308, -1e308]}
    (run / "ledger.jsonl").write_text(json.dumps(scalars))
    losses = ({"step": step, "train_loss": 1.7e308} for step in (1, 2))
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, losses)))
    assert "not finite" in checked(run).text


def test_numbers_written_as_text_have_a_page(tmp_path, undrawn):
    run = write_run(tmp_path / "one")
    results = json.loads((run / "results.json").read_text(), parse_int=str)
    (run / "results.json").write_text(json.dumps(results))
    checked(run)


def test_kinds_of_message_without_end_are_not_all_drawn(tmp_path, undrawn):
    kinds = {f"kind{n}": {"messages": 1, "bytes": n} for n in range(5000)}
    text = checked(write_run(tmp_path / "one", bytes_up=kinds)).text
    assert "kind4999" in text
    assert "kind99 " not in text


def test_a_page_without_room_leaves_the_one_that_was_there(tmp_path, undrawn, monkeypatch):
    run, out = write_run(tmp_path / "one"), tmp_path / "page.html"
    out.write_text("before")

    def replace(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(whole.Path, "replace", replace)
    with pytest.raises(PageError, match="cannot be written: No space left"):
        write_page([run], out)
    assert out.read_text() == "before"
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]
