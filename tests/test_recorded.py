"""Runs give the figures that were recorded, and runs of earlier versions go on and export."""

import json
import shutil

import pytest
from recorder import RECORDED, RUNS, differences, machine, record
from transformers import AutoModelForCausalLM

from hosl_flower.config.parse import parse_recorded
from hosl_flower.export.export import export_run
from hosl_flower.methods.load import load_method
from hosl_flower.run.start import run_in_process

WAS = json.loads(RECORDED.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_figures_recorded_before_the_packages(name, tmp_path):
    now = record(name, tmp_path)
    assert differences(WAS["runs"][name], now, WAS["machine"] == machine()) == []


@pytest.mark.parametrize("name", ["hosl", "split-fo"])
def test_an_old_checkpoint_is_resumed_and_exported(name, tmp_path):
    """Run directories of three steps with a checkpoint of the second."""
    directory = shutil.copytree(RECORDED.parent / name, tmp_path / name)
    keys = json.loads((directory / "config.json").read_text())["config"]
    before = (directory / "ledger.jsonl").read_text().splitlines()
    config = parse_recorded(
        {**keys, "resume": str(directory), "steps": 4, "save-model": True}, "an old run"
    )
    results = run_in_process(load_method(config))
    after = (directory / "ledger.jsonl").read_text().splitlines()
    assert after[:5] == before[:5]  # genesis, start, two steps and the checkpoint's seal
    assert [row["step"] for row in results.evaluations] == [0, 2, 4]
    export_run(directory, tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.model_type == "opt"
