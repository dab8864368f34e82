"""Run directories and the page about them."""

import json
from html.parser import HTMLParser

import pytest

from hosl_flower.config.parse import parse_config
from hosl_flower.report.html import tag
from hosl_flower.report.page import page
from hosl_flower.report.runs import read_runs

VOID = {"meta", "input", "img"}


LOADS = {"src", "href", "xlink:href", "srcset", "action", "data"}


class Checker(HTMLParser):
    """Text of the page; fails on elements that do not nest, ids twice, and all that is fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.words, self.tags, self.fetched = [], [], [], [], []
        self.feed(text)
        assert not self.open
        assert len(self.ids) == len(set(self.ids))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        loads = [value for key, value in attrs if key in LOADS]
        self.fetched += [value for value in loads if not value.startswith(("#", "data:image/"))]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def results(**changes):
    return {
        "method": "ho-sfl", "model": "tiny", "task": "reviews", "pretrained": True, "seed": 3,
        "steps": 4, "accuracy": 0.8125, "balanced_accuracy": 0.75, "loss": 0.4321,
        "wall_seconds": 2.5, "notice": "", "majority_accuracy": 0.5, "held_out_examples": 24,
        "evaluations": [
            {"step": 0, "loss": 0.7001, "accuracy": 0.4375},
            {"step": 4, "loss": 0.4321, "accuracy": 0.8125},
        ],
        "seconds_per_step": {"client": 0.2, "server": 0.1, "transport": 0.01, "total": 0.3111},
        "bytes_up": {
            "forward": {"messages": 4, "bytes": 2_000_000},
            "evaluate": {"messages": 8, "bytes": 30_000_000},
        },
        "bytes_down": {"forward": {"messages": 4, "bytes": 1234}},
        "client_peak_memory": {
            "bytes": 500 * 2**20,
            "tensor_bytes": {"load": 5 * 2**20, "forward": 10 * 2**20, "probe": 12 * 2**20},
        },
        "client_parameters": {"held": 2_000_000, "trained": 1_000_000},
        "clients": {"number": 1, "steps_taken_part": {"0": 4}, "dropped": []},
        "fingerprint": "f" * 16, "ledger_digest": "d" * 16, **changes,
    }  # fmt: skip


def write_run(directory, keys=None, **changes):
    """A finished run; changes: of results.json."""
    directory.mkdir(parents=True)
    config = {**parse_config({}).as_keys(), "steps": 4, "seed": 3, **(keys or {})}
    settings = {"config": config, "pretrained": True, "versions": {"torch": "9.8.7"}}
    (directory / "config.json").write_text(json.dumps(settings))
    rows = [{"step": s, "train_loss": 1.0 / s, "seconds": {"total": 0.25}} for s in range(1, 5)]
    rows.append({"step": 4, "held_out": {"loss": 0.4321, "accuracy": 0.8125}})
    entries = [{"genesis": "g"}, *({"step": s, "scalars": [-1.0, s]} for s in range(1, 5))]
    for name, lines in (("metrics", rows), ("ledger", entries)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text)
    (directory / "results.json").write_text(json.dumps(results(**changes)))
    return directory


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, but not drawn, which takes nearly all the time of a page."""

    def to_svg(drawn, name, description):
        return tag("svg", description)

    for module in ("curves", "bars"):
        monkeypatch.setattr(f"hosl_flower.report.{module}.to_svg", to_svg)


def checked(*directories):
    return Checker(page(read_runs(directories)))
