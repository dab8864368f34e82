"""What a run leaves behind and shows while it runs.

config.json     every key, package versions, the machine
metrics.jsonl   one line per training step and per evaluation
results.json    the outcome; its absence means that the run did not finish
curve.png       loss and accuracy against steps
partition.png   training examples per client and label
ledger.jsonl    the client submodel's history
log.txt         what was said while it ran (run_log.py)
checkpoint-N/   the run after step N, to go on from (checkpoint.py), if wanted
model/          the merged model, for transformers, or the LoRA adapters, for peft

A file that cannot be written, on a full disk say, loses nothing that was computed: training goes
on, lines are held until there is room, and in the end every other file is written all the same.
"""

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from hosl_flower.config.run_config import RunConfig
from hosl_flower.errors import ConfigError
from hosl_flower.methods.method import Method
from hosl_flower.run.checkpoint import Checkpoint, found, sync, write
from hosl_flower.run.ending import Ending
from hosl_flower.run.figures import draw_curve, draw_partition
from hosl_flower.run.headline import headline
from hosl_flower.run.lock import claim, lock, refuse_used
from hosl_flower.run.results import Results, RunFigures, results_of
from hosl_flower.run.resume import collect, run_directory
from hosl_flower.run.run_log import RunLog
from hosl_flower.run.summary import announcement, table
from hosl_flower.run.trackers import Trackers, check_trackers
from hosl_flower.server.scores import HeldOut
from hosl_flower.server.session import Session
from hosl_flower.server.traffic import Traffic
from hosl_flower.system.directories import check_writable
from hosl_flower.system.whole_files import Lines, put, remove

log = logging.getLogger("hosl_flower")

_PROGRESS_SECONDS = 5.0
_PACKAGES = ("hosl-flower", "flwr", "torch", "transformers", "datasets", "ray", "numpy")


class Recorder:
    """The run directory and the log of one run; a context that holds the directory's lock."""

    def __init__(self, config: RunConfig, kept: RunLog):
        self.config, self._kept = config, kept
        self._lock: FileLock | None = None
        if config.run.tracker_names != ("auto",):
            check_trackers(config.run.tracker_names)
        name = config.run.name or time.strftime("%Y%m%d-%H%M%S")
        self.directory = (Path(config.run.output_dir).expanduser() / name).absolute()
        if config.run.resume:
            self.directory = run_directory(config)
            check_writable(self.directory, "resume")
            if found(self.directory):  # locked before they are read: another run may go on
                self._lock = lock(self.directory)
        else:
            check_writable(self.directory, "output-dir")
            if config.run.name:
                refuse_used(self.directory)  # before loading; once more when it is claimed
        self.trackers: Trackers | None = None
        self.evaluations: list[dict[str, float | None]] = []
        self.final: HeldOut | None = None
        self._metrics = Lines(self.directory / "metrics.jsonl")
        self._behind = False  # metrics.jsonl lacks lines
        self.ending = Ending()
        self._seconds: dict[str, float] = defaultdict(float)
        self._started = self._last_line = time.perf_counter()
        self._last_loss = float("nan")
        self._earlier = 0.0  # seconds before the checkpoint this run goes on from

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def open(self, method: Method, session: Session, checkpoint: Checkpoint | None = None) -> None:
        """Everything checked: make the directory and log the plan. ConfigError when the directory
        cannot be written or holds a run."""
        try:
            if self._lock is None:
                self.directory, self._lock = claim(self.directory, bool(self.config.run.name))
            self._metrics = Lines(self.directory / "metrics.jsonl")
            self._start(session, checkpoint)
        except OSError as error:
            key = "resume" if self.config.run.resume else "output-dir"
            raise ConfigError(
                f"{key}: {self.directory} cannot be written ({error}); expected a directory with "
                "room that this user can write"
            ) from error
        clients = [client for _, client in sorted(session.participation.clients.items())]
        counts = [client.label_counts for client in clients]
        task = session.spec.task
        names = task.label_names or task.verbalizers or ("examples",)
        if not session.limits.label_counts:
            names, counts = ("any",), [(client.train_examples,) for client in clients]
        self.trackers = Trackers(
            self.config.run.tracker_names, self.directory, self.config.as_keys()
        )
        with self._warned("partition.png"):
            draw_partition(self.directory / "partition.png", counts, names)
        for line in announcement(method, session):
            log.info(line)
        log.info("run directory: %s", self.directory)
        self._started = self._last_line = time.perf_counter()

    def _start(self, session: Session, checkpoint: Checkpoint | None) -> None:
        """The files that a run begins with, or goes on with."""
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
            **({"resumed_after_step": session.done} if checkpoint else {}),
        }
        put(self.directory / "config.json", json.dumps(record, indent=2) + "\n")
        if checkpoint is not None:
            self._go_on(session, checkpoint.values["report"])
            return
        put(self._metrics.path, "")
        session.history.ledger.record(self.directory / "ledger.jsonl")

    def _go_on(self, session: Session, state: dict[str, Any]) -> None:
        """Take up the files where a checkpoint saw them; what came after it is made again."""
        if session.done < self.config.steps:  # else only files of the end are missing
            (self.directory / "results.json").unlink(missing_ok=True)
            behind = self._steps_after(state["sizes"]["metrics.jsonl"])
            session.participation.retaken += behind * session.config.pace.local_steps
        for left in ("model", ".model.part"):
            remove(self.directory / left)
        for step, path in found(self.directory):
            if step > session.done:  # damaged, or of steps that are taken again now
                remove(path)
        for name in ("metrics.jsonl", "ledger.jsonl"):
            os.truncate(self.directory / name, state["sizes"][name])
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
        return done + self.config.pace.steps_per_message

    def checkpoint(self, step: int, session: Session, method: Method, traffic: Traffic) -> None:
        """Write a checkpoint. One that cannot be written ends no run: the last is still there.
        Raises DivergedError when there are values in it that are not finite."""
        try:
            self.write_checkpoint(step, session, method, traffic)
        except OSError as error:
            log.warning(
                "the checkpoint of step %d cannot be written (%s); training goes on", step, error
            )

    def write_checkpoint(
        self, step: int, session: Session, method: Method, traffic: Traffic
    ) -> None:
        """As `checkpoint`; OSError when it cannot be written."""
        files = [self.directory / name for name in ("metrics.jsonl", "ledger.jsonl")]
        self._metrics.flush()
        session.history.ledger.seal()
        for file in files:
            sync(file)
        state = {
            "sizes": {file.name: file.stat().st_size for file in files},
            "metrics_sha256": hashlib.sha256(files[0].read_bytes()).hexdigest(),
            "evaluations": self.evaluations,
            "seconds": self._seconds,
            "wall_seconds": self._wall_seconds(),
        }
        checkpoint = collect(step, session, method, traffic, state)
        write(self.directory, checkpoint, self.config.run.checkpoints_kept)

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
        if dropped := session.participation.dropped_at.pop(step, None):
            row["dropped"] = dropped
        if clipped := session.participation.clipped_at.pop(step, None):
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

    def results(
        self, method: Any, session: Session, traffic: Traffic, checked: list[int]
    ) -> Results:
        """Write all that was measured; log the table. checked: clients whose fingerprint is the
        one in the results."""
        assert self.final is not None
        measured = RunFigures(self.final, self.evaluations, self._seconds, self._wall_seconds())
        results = results_of(method.name, session, traffic, measured, checked)
        text = json.dumps(asdict(results), indent=2)
        for line in table(results, traffic).splitlines():
            log.info(line)
        path = self.directory / "results.json"
        self.ending.attempt("metrics.jsonl", self._metrics.flush)
        self.ending.attempt("ledger.jsonl", session.history.ledger.flush)
        self.ending.attempt("results.json", lambda: put(path, text + "\n"))
        if "results.json" in self.ending.failures:
            one_line = json.dumps(asdict(results))
            log.error("results.json could not be written, it would be: %s", one_line)
        with self._warned("curve.png"):
            title = f"{method.name}: {session.spec.model}, {session.spec.task.name}"
            draw_curve(self.directory, title)
        if self.trackers is not None:
            self.trackers.finish({**dict([headline(asdict(results))]), "loss": results.loss})
        return results

    def close(self) -> None:
        """HoslError when something of the end could not be written."""
        log.info("run directory: %s", self.directory)
        self.ending.check(self.directory, self.config.steps)

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
        """Add a line to metrics.jsonl, at the latest when there is room again."""
        self._metrics.hold(json.dumps(row))
        try:
            self._metrics.flush()
            self._behind = False
        except OSError as error:
            if not self._behind:
                log.warning(
                    "%s cannot be written (%s): make room; training goes on, and its lines are "
                    "kept in memory until then",
                    self._metrics.path,
                    error,
                )
            self._behind = True

    @contextmanager
    def _warned(self, name: str) -> Iterator[None]:
        """A picture that cannot be written is no reason to end a run."""
        try:
            yield
        except OSError as error:
            log.warning("%s cannot be written (%s)", self.directory / name, error)


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "not installed"
