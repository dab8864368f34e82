"""What a run leaves behind and shows while it runs.

config.json     every key, package versions, the machine
metrics.jsonl   one line per training step and per evaluation
results.json    the outcome; written last, so its absence means the run did not finish
curve.png       loss and accuracy against steps
partition.png   training examples per client and label
ledger.jsonl    the client submodel's history
log.txt         what was said while it ran (runlog.py)
checkpoint-N/   the run after step N, to go on from (checkpoint.py), if wanted
model/          the merged model, for transformers, or the LoRA adapters, for peft
"""

import json
import logging
import math
import os
import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hosl_flower.checkpoint import sync, write
from hosl_flower.config import RunConfig
from hosl_flower.directories import check_writable, claimed
from hosl_flower.errors import ConfigError, HoslError
from hosl_flower.link.base import Traffic
from hosl_flower.lock import lock, unlock
from hosl_flower.measures import headline
from hosl_flower.plot import draw_curve, draw_partition
from hosl_flower.results import Measured, Results, results_of
from hosl_flower.resume import Resumable, collect, run_directory
from hosl_flower.runlog import RunLog
from hosl_flower.session import Session
from hosl_flower.summary import plan, table
from hosl_flower.text_score import HeldOut
from hosl_flower.trackers import Trackers, check_trackers

log = logging.getLogger("hosl_flower")

_PROGRESS_SECONDS = 5.0
_PACKAGES = ("hosl-flower", "flwr", "torch", "transformers", "datasets", "ray", "numpy")


class Report:
    """The run directory and the log of one run."""

    def __init__(self, config: RunConfig, kept: RunLog):
        self.config, self._kept = config, kept
        name = config.run_name or time.strftime("%Y%m%d-%H%M%S")
        self.directory = (Path(config.output_dir).expanduser() / name).absolute()
        if config.resume:
            self.directory = run_directory(config)
        check_writable(self.directory, "resume" if config.resume else "output-dir")
        taken = self.directory.exists() and any(self.directory.iterdir())
        if taken and config.run_name and not config.resume:
            raise ConfigError(f"{self.directory} already holds a run; choose another run-name")
        self.trackers: Trackers | None = None
        if config.tracker_names != ("auto",):
            check_trackers(config.tracker_names)
        self.evaluations: list[dict[str, float | None]] = []
        self.final: HeldOut | None = None
        self._seconds: dict[str, float] = defaultdict(float)
        self._started = self._last_line = time.perf_counter()
        self._last_loss = float("nan")
        self._earlier = 0.0  # seconds before the checkpoint this run goes on from

    def open(self, method: Any, session: Session) -> None:
        """Everything checked: make the directory and log the plan."""
        try:
            if self.config.resume or self.config.run_name:
                self.directory.mkdir(parents=True, exist_ok=True)
            else:
                self.directory = claimed(self.directory)
        except OSError as error:
            raise ConfigError(f"output-dir: cannot make {self.directory}: {error}") from error
        self._lock = lock(self.directory)
        self._kept.keep(self.directory)
        record = {
            "config": self.config.as_keys(),
            "model_used": session.spec.model,
            "task_used": session.spec.task.name,
            "pretrained": session.base.pretrained,
            "notice": session.notice,
            "versions": {p: _version(p) for p in _PACKAGES},
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            **({"resumed_after_step": session.done} if session.resumed else {}),
        }
        if session.resumed is not None:
            self._go_on(session, session.resumed.values["report"])
        self._write("config.json", json.dumps(record, indent=2))
        if session.resumed is None:
            (self.directory / "metrics.jsonl").write_text("", encoding="utf-8")
            session.history.ledger.record(self.directory / "ledger.jsonl")
        clients = [client for _, client in sorted(session.clients.items())]
        counts = [client.label_counts for client in clients]
        task = session.spec.task
        names = task.label_names or task.verbalizers or ("examples",)
        if not session.limits.label_counts:
            names, counts = ("any",), [(client.train_examples,) for client in clients]
        self.trackers = Trackers(self.config.tracker_names, self.directory, self.config.as_keys())
        draw_partition(self.directory / "partition.png", counts, names)
        for line in plan(method, session):
            log.info(line)
        log.info("run directory: %s", self.directory)
        self._started = self._last_line = time.perf_counter()

    def _go_on(self, session: Session, state: dict[str, Any]) -> None:
        """Take up the files where a checkpoint saw them; what came after it is made again."""
        (self.directory / "results.json").unlink(missing_ok=True)
        for left in ("model", ".model.part"):
            shutil.rmtree(self.directory / left, ignore_errors=True)
        session.retaken += self._steps_after(state["sizes"]["metrics.jsonl"]) * (
            session.config.local_steps
        )
        for name, size in state["sizes"].items():
            os.truncate(self.directory / name, size)
        session.history.ledger.go_on(self.directory / "ledger.jsonl")
        self.evaluations = state["evaluations"]
        self._seconds.update(state["seconds"])
        self._earlier = state["wall_seconds"]
        log.info("resumed after step %d", session.done)

    def _steps_after(self, size: int) -> int:
        """Steps that a run has begun after a checkpoint, at most: those that metrics.jsonl has
        beyond this size, and those that were asked for at once when it ended."""
        with (self.directory / "metrics.jsonl").open("rb") as file:
            file.seek(size)
            done = sum(b'"seconds"' in line for line in file)
        return done + self.config.steps_per_message

    def checkpoint(self, step: int, session: Session, method: Resumable, traffic: Traffic) -> None:
        """Write a checkpoint. One that cannot be written ends no run: the last is still there.
        Raises DivergedError when there are values in it that are not finite."""
        files = [self.directory / name for name in ("metrics.jsonl", "ledger.jsonl")]
        try:
            session.history.ledger.seal()
            for file in files:
                sync(file)
            state = {
                "sizes": {file.name: file.stat().st_size for file in files},
                "evaluations": self.evaluations,
                "seconds": self._seconds,
                "wall_seconds": self._wall_seconds(),
            }
            checkpoint = collect(step, session, method, traffic, state)
            write(self.directory, checkpoint, self.config.checkpoints_kept)
        except OSError as error:
            log.warning(
                "the checkpoint of step %d cannot be written (%s); training goes on", step, error
            )

    def _wall_seconds(self) -> float:
        return self._earlier + time.perf_counter() - self._started

    def stepped(
        self,
        step: int,
        loss: float,
        session: Session,
        wall: float,
        waited: float,
        client: float,
    ) -> None:
        """Record one training step. loss: not a number where nobody tells it. seconds: transport is
        what neither side computed."""
        seconds = {
            "client": client,
            "server": max(0.0, wall - waited),
            "transport": max(0.0, waited - client),
            "total": wall,
        }
        for part, value in seconds.items():
            self._seconds[part] += value
        self._last_loss = loss
        told = {} if math.isnan(loss) else {"train_loss": loss}
        row: dict[str, Any] = {"step": step, **told}
        dropped = {d.partition: d.reason for d in session.dropped if d.step == step}
        if dropped:
            row["dropped"] = dropped
        if clipped := session.clipped_at.pop(step, None):
            row["clipped"] = dict(clipped)
        self._append({**row, "seconds": seconds})
        tracked = {name.replace("_", "/"): value for name, value in told.items()}
        self._track(step, tracked, "seconds", seconds)
        if time.perf_counter() - self._last_line > _PROGRESS_SECONDS:
            self._progress(step)

    def evaluated(self, step: int, score: HeldOut, session: Session) -> None:
        """Record one evaluation, and the client submodel's history up to it."""
        try:
            session.history.ledger.seal()
        except OSError as error:  # its entries are kept, and written when there is room
            log.warning("ledger.jsonl cannot be written (%s)", error)
        row = score.metrics()
        self.evaluations.append({"step": step, **row})
        self.final = score
        self._append({"step": step, "held_out": row})
        self._track(step, {}, "held_out", row)
        log.info("step %d/%d: held-out %s", step, self.config.steps, score)
        self._last_line = time.perf_counter()

    def close(self, method: Any, session: Session, traffic: Traffic, checked: list[int]) -> Results:
        """Write curve and, last, results; log the table. checked: clients whose fingerprint is
        the one in the results."""
        assert self.final is not None
        draw_curve(self.directory, f"{method.name}: {session.spec.model}, {session.spec.task.name}")
        measured = Measured(self.final, self.evaluations, self._seconds, self._wall_seconds())
        results = results_of(method.name, session, traffic, measured, checked)
        self._write("results.json", json.dumps(asdict(results), indent=2))
        if self.trackers is not None:
            self.trackers.finish({**dict([headline(asdict(results))]), "loss": results.loss})
        unlock(self._lock)
        for line in table(results, traffic).splitlines():
            log.info(line)
        log.info("run directory: %s", self.directory)
        return results

    def _track(
        self,
        step: int,
        values: dict[str, float],
        group: str,
        more: Mapping[str, float | None],
    ) -> None:
        if self.trackers is not None:
            known = {f"{group}/{k}": v for k, v in more.items() if v is not None}
            self.trackers.log(step, {**values, **known})

    def _progress(self, step: int) -> None:
        self._last_line = time.perf_counter()
        rate = step / self._seconds["total"]
        last = self.evaluations[-1]
        log.info(
            "step %d/%d: %sheld-out %s %.3f (step %d), %.2f steps/s, %s left",
            step,
            self.config.steps,
            "" if math.isnan(self._last_loss) else f"train loss {self._last_loss:.4f}, ",
            *headline(last),
            last["step"],
            rate,
            time.strftime("%H:%M:%S", time.gmtime((self.config.steps - step) / rate)),
        )

    def _append(self, row: dict[str, Any]) -> None:
        path = self.directory / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise HoslError(
                f"{path} cannot be written ({error}): make room, then go on from the last "
                "checkpoint with resume"
            ) from error

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all."""
        part = self.directory / f".{name}.part"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(self.directory / name)


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "not installed"
