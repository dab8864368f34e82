"""Running the cells of an experiment: several processes, none twice."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Eta

from hosl_flower.compare.experiment import grid, trials
from hosl_flower.compare.experiment_file import Cell, Experiment, Keys
from hosl_flower.compare.outcome import CellError, is_diverged
from hosl_flower.config.parse import parse_config
from hosl_flower.data.infer_task import completed
from hosl_flower.errors import ConfigError
from hosl_flower.run.headline import headline
from hosl_flower.system.signals import exiting_when_told


def run_all(cells: Sequence[Cell], out: Path, processes: int, flower_app: str, what: str) -> None:
    """Run what is not finished, `processes` at a time. Raises CellError with the last lines of the
    first run that failed; the others that had begun are finished. When this process is interrupted
    or told to end they are ended."""
    todo = [cell for cell in cells if not is_finished(cell, out)]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Eta(),
    )
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ThreadPoolExecutor(processes) as pool,
    ):
        task = progress.add_task(what, total=len(cells), completed=len(cells) - len(todo))
        running: list[subprocess.Popen[str]] = []

        def work(cell: Cell) -> None:
            _run(cell, out, processes, flower_app, running)
            progress.advance(task)
            progress.console.print(f"{cell.name}: {_summary(out / cell.name)}")

        futures = [pool.submit(work, cell) for cell in todo]
        try:
            with exiting_when_told():
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            progress.console.print("stopped: the same command keeps the finished runs and goes on")
            raise
        pool.shutdown(wait=False, cancel_futures=True)  # nothing more is begun
        for future in done:
            try:
                future.result()
            except OSError as error:
                raise CellError(f"{out} cannot be written: {error}; make room there") from error


def is_finished(cell: Cell, out: Path) -> bool:
    """Whether the cell's results are there. ConfigError when they are of another configuration."""
    directory = out / cell.name
    if not (directory / "results.json").is_file() and not is_diverged(directory):
        return False
    found = json.loads((directory / "config.json").read_text(encoding="utf-8"))["config"]
    wanted = completed(parse_config(dict(cell.keys))).as_keys()
    free = ("run-name", "output-dir", "threads", "device")  # of the machine, not the experiment
    differ = [k for k, v in wanted.items() if k not in free and found.get(k, v) != v]
    if differ:
        raise ConfigError(
            f"{directory} holds a run with another {', '.join(differ)}; choose another output "
            "directory, or remove that one"
        )
    return True


def _run(
    cell: Cell, out: Path, processes: int, flower_app: str, running: list[subprocess.Popen[str]]
) -> None:
    """One cell in a process of its own, which is among `running` while it runs; an unfinished
    attempt is put out of the way."""
    directory = out / cell.name
    if directory.exists():
        stale = next(p for i in range(1000) if not (p := out / f"{cell.name}.failed{i}").exists())
        directory.rename(stale)
    out.mkdir(parents=True, exist_ok=True)
    own: Keys = {"run-name": cell.name, "output-dir": str(out)}
    if "threads" not in cell.keys:
        own["threads"] = max(1, (os.cpu_count() or 1) // processes)
    # all keys, so that a Flower app's own values do not come in between
    keys = parse_config({**cell.keys, **own}).as_keys()
    request = json.dumps({"keys": keys, "flower_app": flower_app})
    process = subprocess.Popen(
        [sys.executable, "-m", "hosl_flower.compare.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    running.append(process)
    _, said = process.communicate(request)
    running.remove(process)
    (out / f"{cell.name}.log").write_text(said, encoding="utf-8")
    if is_diverged(directory):
        return
    if process.returncode or not (directory / "results.json").is_file():
        last = "\n  ".join(said.strip().splitlines()[-5:])
        raise CellError(f"{cell.name} failed; the end of {out / cell.name}.log:\n  {last}")


def _summary(directory: Path) -> str:
    if is_diverged(directory):
        return "diverged"
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    name, value = headline(results)
    return f"{name} {value:.4f}, loss {results['loss']:.4f}, {results['wall_seconds']:.0f} s"


def choose(experiment: Experiment, out: Path) -> Iterator[tuple[tuple[str, str], Keys, list[Any]]]:
    """((variant, method), best setting, [setting and held-out loss of every trial]) of what was
    tuned; best is the lowest final held-out loss."""
    losses: dict[tuple[str, str], list[float]] = {}
    for cell in trials(experiment):
        method = cell.method.rpartition("-tune")[0]
        diverged = is_diverged(out / cell.name)
        loss = math.inf if diverged else _loss(out / cell.name)
        losses.setdefault((cell.variant, method), []).append(loss)
    for (variant, method), found in losses.items():
        if min(found) == math.inf:
            raise CellError(f"{variant} {method}: every setting of its tune grid diverged")
        settings = list(grid(experiment, method))
        best = settings[min(range(len(found)), key=found.__getitem__)]
        known = [loss if loss < math.inf else "diverged" for loss in found]
        table = [{**s, "loss": loss} for s, loss in zip(settings, known, strict=True)]
        yield (variant, method), best, table


def _loss(directory: Path) -> float:
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))["loss"]
