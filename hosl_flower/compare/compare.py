"""`python -m hosl_flower compare`: tune, run, tabulate and draw an experiment."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hosl_flower.compare.experiment import cells, read_experiment, trials
from hosl_flower.compare.experiment_file import Keys
from hosl_flower.compare.figures import draw_comparison, draw_frontier
from hosl_flower.compare.outcome import CellError
from hosl_flower.compare.runner import choose, is_finished, run_all
from hosl_flower.compare.table import csv_text, markdown, rows
from hosl_flower.system.directories import check_writable
from hosl_flower.system.whole_files import put


def compare(path: Path, out: Path, processes: int, overrides: Mapping[str, Any]) -> str:
    """Everything the experiment asks for that is not in `out` yet; the table, as Markdown.
    overrides: of keys of its [config].

    Writes tuned.json, results.md, results.csv, curves-<variant>.png and, where there is a gap,
    frontier-<variant>.png beside the run directories. Raises ConfigError before anything is run,
    CellError when a run fails.
    """
    experiment = read_experiment(path, overrides)
    app, out = experiment.flower_app, out.absolute()
    check_writable(out, "--out")
    for cell in trials(experiment):
        is_finished(cell, out)  # refused now rather than hours later
    if trials(experiment):
        run_all(trials(experiment), out, processes, app, "tuning")
    chosen: dict[tuple[str, str], Keys] = {}
    record = []
    for (variant, method), best, table in choose(experiment, out):
        chosen[variant, method] = best
        record.append({"variant": variant, "method": method, "chosen": best, "trials": table})
    own = cells(experiment, chosen)
    run_all(own, out, processes, app, "runs")
    table = rows(experiment, own, out)
    text = markdown(experiment, table)
    try:
        if record:
            put(out / "tuned.json", json.dumps(record, indent=1) + "\n")
        put(out / "results.md", text)
        put(out / "results.csv", csv_text(experiment, own, out))
        for variant in experiment.variants:
            suffix = f"-{variant}.png" if variant else ".png"
            title = f"{path.stem} {variant}".strip()
            own_rows = [row for row in table if row.variant == variant]
            draw_comparison(out / f"curves{suffix}", title, own_rows)
            draw_frontier(out / f"frontier{suffix}", title, own_rows)
    except OSError as error:
        raise CellError(
            f"{out} cannot be written ({error}): all runs are done; make room and give the same "
            "command again, which takes none of them again"
        ) from error
    return text
