"""Who holds which data, and who took part in which step."""

import base64
import hashlib
from collections.abc import Sequence

from hosl_flower.report.bars import draw_participation
from hosl_flower.report.html import Html, html, note, section, table, tag
from hosl_flower.report.participation import MOST_CLIENTS, Participation, participation
from hosl_flower.report.runs import Run

_DROPS_SHOWN = 50


def data(runs: Sequence[Run]) -> Html:
    """The partition picture of each run; once where several have the same."""
    same: dict[str, list[Run]] = {}
    for run in runs:
        if run.partition is not None:
            same.setdefault(hashlib.sha256(run.partition).hexdigest(), []).append(run)
    pictures = []
    for group in same.values():
        who = ", ".join(run.name for run in group)
        content = base64.b64encode(group[0].partition or b"").decode()
        alt = f"Training examples of each client, stacked by label: {who}"
        image = tag("img", src=f"data:image/png;base64,{content}", alt=alt)
        pictures.append(tag("figure", image, tag("figcaption", who)))
    lacking = ", ".join(run.name for run in runs if run.partition is None)
    return section(
        "data",
        "Who holds which data",
        *pictures,
        note("No partition.png: ", lacking, ".") if lacking else "",
    )


def clients(runs: Sequence[Run]) -> Html:
    """Runs with the same clients in the same steps share a figure."""
    groups: list[tuple[Participation, list[int]]] = []
    lines = []
    for place, run in enumerate(runs):
        found = participation(run)
        if found is None:
            lines.append(note(run.name, ": who took part is not recorded."))
            continue
        lines += _in_words(run, found)
        same = next((places for known, places in groups if known == found), None)
        if same is not None:
            same.append(place)
        elif found.number > MOST_CLIENTS:
            lines.append(note(run.name, f": {found.number:,} clients, too many to be drawn."))
        elif found.number > 1:
            groups.append((found, [place]))
    figures = []
    for found, places in groups:
        who = ", ".join(runs[place].name for place in places)
        drawn = draw_participation(who, places[0], found)
        figures.append(tag("figure", drawn, tag("figcaption", who)))
    return section("clients", "Who took part", tag("div", *figures, class_="panel"), *lines)


def _in_words(run: Run, found: Participation) -> list[Html]:
    """What the figure rests on, who was left out and why, who was brought up to date."""
    if found.number == 1 and not found.drops:
        taken = found.totals.get(0, "an unrecorded number")
        return [note(run.name, f": one client, which took part in {taken} of {found.steps} steps.")]
    said: list[Html] = []
    if found.number > 1 and found.drawn is None:
        said.append(note(run.name, ": which client took part in which step cannot be told."))
    kinds = {
        "catch-up": "ledger entries", "move": "changes of weights", "restore": "whole weights"
    }  # fmt: skip
    sent = {k: s for k, s in run.results.bytes_down.items() if k in kinds and s.messages}
    if sent:
        times = (f"{s.messages} times by {kinds[k]} ({s.bytes:,} bytes)" for k, s in sent.items())
        said.append(note(run.name, ": clients were brought up to date ", ", ".join(times), "."))
    if found.drops:
        rows = [[d.step, d.partition, d.reason] for d in found.drops[:_DROPS_SHOWN]]
        more = found.times - len(rows)
        columns = ["step", "client", "reason"]
        said.append(table(f"Left out of a step: {run.name}", columns, rows))
        said.append(note(f"And {more} more.") if more else html(""))
    return said
