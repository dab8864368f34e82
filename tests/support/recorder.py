"""Small runs of every method in process, and their figures to the last bit.

    python tests/support/recorder.py tests/recorded/runs.json             # write them
    python tests/support/recorder.py --compare tests/recorded/runs.json   # 1 where they differ

A change of structure must change none of them. Bits of sums depend on the CPU's vector units, so
a comparison with a file that another kind of CPU wrote is one of bytes, counts and rounded losses.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from image_data import write_npz
from runs import write_questions

from hosl_flower.config.parse import parse_config
from hosl_flower.methods.load import load_method
from hosl_flower.run.start import run_in_process

RECORDED = Path(__file__).parents[1] / "recorded" / "runs.json"
_MANY = {"num-clients": 3, "clients-per-step": 2}
_TEXT = {
    "model": "random:opt-tiny", "task": "sms-spam", "cut-layer": 1, "steps": 3, "eval-every": 2,
    "batch-size": 4, "eval-batch-size": 8, "eval-examples": 16, "train-examples": 60,
    "max-length": 32, "directions": 2, "client-learning-rate": 1e-3,
    "server-learning-rate": 1e-2, "threads": 1, "seed": 5, "device": "cpu", "trackers": "",
    "save-model": False, "offline-fallback": False,
}  # fmt: skip
_ADAPTERS = {"client-trainable": "lora", "server-trainable": "lora", "lora-rank": 2}
_HOSL, _HO_SFL = "strategies.hosl:Hosl", "strategies.ho_sfl:HoSfl"
_SPLIT_FO, _FULL_ZO = "strategies.split_fo:SplitFo", "strategies.full_zo:FullZo"
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "hosl": (_HOSL, {}),
    "hosl-relay": (_HOSL, {"num-clients": 2, "turn-steps": 1, "server-optimizer": "adamw"}),
    "hosl-bfloat16": (_HOSL, {"dtype": "bfloat16", "client-optimizer": "adamw"}),
    "ho-sfl": (_HO_SFL, {**_MANY, "server-optimizer": "adamw", "codec": "int8"}),
    "ho-sfl-seeds": (_HO_SFL, {**_MANY, "client-seeds": "per-client"}),
    "ho-sfl-median": (_HO_SFL, {**_MANY, "aggregation": "median", "scalar-clip": 1.0}),
    "ho-sfl-local": (_HO_SFL, {**_MANY, "local-steps": 2, "client-micro-batch": 2}),
    "ho-sfl-lora": (_HO_SFL, {**_MANY, **_ADAPTERS}),
    "ho-sfl-labels": (_HO_SFL, {**_MANY, "labels": "client"}),
    "ho-sfl-noise": (_HO_SFL, {**_MANY, "activation-noise": 0.5}),
    "ho-sfl-forward-mode": (_HO_SFL, {"derivative": "forward-mode"}),
    "sign-vote": ("strategies.sign_vote:SignVote", _MANY),
    "fedavg-zo": ("strategies.fedavg_zo:FedAvgZo", {**_MANY, "update-codec": "int8"}),
    "heron": ("strategies.heron:Heron", {**_MANY, "upload-every": 2}),
    "split-zo": ("strategies.split_zo:SplitZo", {"server-steps": 2, "server-learning-rate": 1e-4}),
    "full-zo": (_FULL_ZO, {**_MANY, "cut-layer": 4, "server-learning-rate": 1e-3}),
    "full-zo-private": (
        _FULL_ZO,
        {
            **_MANY, "cut-layer": 4, "server-learning-rate": 1e-3, "dp-noise": 0.5, "dp-clip": 4.0,
            "evaluation": "central",
        },
    ),
    "frozen": (
        "strategies.frozen_client:FrozenClient",
        {**_MANY, "directions": 1, "client-learning-rate": 1e-6},
    ),
    "split-fo": (_SPLIT_FO, {**_MANY, "directions": 1, "client-optimizer": "adamw"}),
    "split-fo-local": (_SPLIT_FO, {**_MANY, "directions": 1, "local-steps": 3, "eval-every": 3}),
    "split-fo-labels": (_SPLIT_FO, {**_MANY, "directions": 1, "labels": "client"}),
    "residual": (
        _SPLIT_FO,
        {**_MANY, "directions": 1, "client-gradient": "residual", "client-optimizer": "adafactor"},
    ),
    "residual-lora": (_SPLIT_FO, {**_ADAPTERS, "directions": 1, "client-gradient": "residual"}),
    "residual-int8": (
        _SPLIT_FO,
        {**_MANY, "directions": 1, "client-gradient": "residual", "update-codec": "int8"},
    ),
    "recompute": (
        _SPLIT_FO,
        {
            **_MANY, "directions": 1, "client-gradient": "recompute",
            "client-optimizer": "adafactor-momentum",
        },
    ),
    "gpt2": (_HO_SFL, {"model": "random:gpt2-tiny", **_MANY}),
    "qwen3": (_HO_SFL, {"model": "random:qwen3-tiny", **_MANY}),
    "bert": (_HO_SFL, {"model": "random:bert-tiny", **_MANY}),
    "resnet": (
        _HO_SFL,
        {
            **_MANY, "model": "random:resnet-tiny", "cut-layer": 2, "task": "brightness",
            "data-path": "images.npz", "image-column": "image", "verbalizers": "dark,bright",
            "image-size": 16, "max-length": 128,
        },
    ),
    "generated-answers": (
        _HO_SFL,
        {"task": "squad", "data-path": "questions", "max-length": 48, "max-new-tokens": 4},
    ),
}  # fmt: skip


def record(name: str, directory: Path) -> dict[str, Any]:
    """Figures of one run: losses as hexadecimal floats, digests, and bytes by message kind.

    Args:
        name: a key of RUNS.
        directory: where its data and its run directory are written.
    """
    strategy, own = RUNS[name]
    keys = {**_TEXT, **own, "strategy": strategy, "output-dir": str(directory), "run-name": name}
    if keys.get("data-path") == "images.npz":
        keys["data-path"] = str(write_npz(directory / "images.npz"))
    elif keys.get("data-path"):
        keys["data-path"] = str(write_questions(directory / "questions"))
    config = parse_config(keys)
    results = run_in_process(load_method(config))
    lines = (directory / name / "metrics.jsonl").read_text().splitlines()
    return {
        "ledger_digest": results.ledger_digest,
        "fingerprint": results.fingerprint,
        "losses": [
            _exact(row["train_loss"]) for row in map(json.loads, lines) if "train_loss" in row
        ],
        "evaluations": [
            {key: _exact(value) for key, value in row.items()} for row in results.evaluations
        ],
        "bytes_up": results.bytes_up,
        "bytes_down": results.bytes_down,
    }


def _exact(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value


def machine() -> dict[str, str]:
    """What the last bits of a run depend on besides the code."""
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def differences(was: dict[str, Any], now: dict[str, Any], same_machine: bool) -> list[str]:
    """Names of the figures that differ.

    Args:
        was: a record.
        now: a record of the same run.
        same_machine: compare every bit; else losses to 2 %, and no digests of weights.
    """
    wrong = [key for key in ("bytes_up", "bytes_down") if not _same_traffic(was[key], now[key])]
    if same_machine:
        exact = ("ledger_digest", "fingerprint", "losses", "evaluations")
        return wrong + [key for key in exact if was[key] != now[key]]
    pairs = zip(was["losses"], now["losses"], strict=True)
    return wrong + ["losses"] * any(abs(_float(a) / _float(b) - 1) > 0.02 for a, b in pairs)


def _same_traffic(was: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> bool:
    """Equal kinds and numbers of messages, and sizes equal but for the digits of the seconds and
    bytes of memory that replies tell."""
    return was.keys() == now.keys() and all(
        was[kind]["messages"] == now[kind]["messages"]
        and abs(was[kind]["bytes"] - now[kind]["bytes"]) <= 40 * was[kind]["messages"]
        for kind in was
    )


def _float(text: str) -> float:
    return float.fromhex(text)


def main(arguments: list[str]) -> int:
    """Write or compare a file of records; the exit code."""
    path = Path(arguments[-1])
    with tempfile.TemporaryDirectory() as directory:
        now = {}
        for name in RUNS:
            folder = Path(directory) / name
            folder.mkdir()
            now[name] = record(name, folder)
    if "--compare" not in arguments:
        path.write_text(json.dumps({"machine": machine(), "runs": now}, indent=1) + "\n")
        return 0
    was = json.loads(path.read_text())
    same = was["machine"] == machine()
    wrong = {n: d for n in RUNS if (d := differences(was["runs"][n], now[n], same))}
    print(f"{len(RUNS) - len(wrong)} of {len(RUNS)} runs equal, every bit compared: {same}")
    for name, figures in wrong.items():
        print(f"{name}: {', '.join(figures)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
