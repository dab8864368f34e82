"""One HTML page of one or several run directories: opens from disk, needs no network, no script.

    python -m hosl_flower report runs/a runs/b --out report.html

Whatever a run lacks, its section says in a line.
"""

from collections.abc import Sequence
from pathlib import Path

from hosl_flower.report.bars import (
    draw_bytes,
    draw_memory,
    memory_phases,
    message_kinds,
)
from hosl_flower.report.clients import clients, data
from hosl_flower.report.curves import (
    AXES,
    Axis,
    draw_losses,
    draw_scalars,
    draw_scores,
    measured,
    missing,
    spreads,
)
from hosl_flower.report.html import (
    Html,
    document,
    folded,
    html,
    join,
    megabytes,
    note,
    section,
    table,
    tag,
)
from hosl_flower.report.runs import PageError, Run, read_runs
from hosl_flower.report.svg import dashes
from hosl_flower.report.tables import (
    cards,
    configuration,
    dot,
    environment,
    names,
    notices,
    side_by_side,
)
from hosl_flower.system.whole_files import put


def write_page(directories: Sequence[Path], out: Path) -> str:
    """Write the page; a line that says where it is. PageError where a directory is no run, or
    where the page cannot be written."""
    text = page(read_runs(directories))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        put(out, text)
    except OSError as error:
        raise PageError(f"--out {out} cannot be written: {error}") from error
    return f"{out} ({len(text.encode()) / 1000:.0f} kB), opens in any browser"


def page(runs: Sequence[Run]) -> str:
    """The whole page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    parts = [
        _curves(runs),
        tag("div", _memory(runs), _bytes(runs), class_="pair"),
        side_by_side(runs),
        data(runs),
        clients(runs),
        _scalars(runs),
        configuration(runs),
        environment(runs),
    ]
    links = (
        ("curves", "Curves"), ("memory", "Memory"), ("bytes", "Bytes"), ("runs", "Outcome"),
        ("data", "Data"), ("clients", "Clients"), ("scalars", "Projected gradients"),
        ("configuration", "Configuration"), ("environment", "Environment"),
    )  # fmt: skip
    menu = tag("nav", *(tag("a", text, href=f"#{to}") for to, text in links), aria_label="Sections")
    head = tag("header", tag("p", "hosl-flower", class_="brand"), tag("h1", title), menu)
    return document(title, head, tag("main", notices(runs), cards(runs), *parts))


def _legend(runs: Sequence[Run]) -> Html:
    if len(runs) == 1:
        return html("")
    items = (
        tag("li", dot(place), run.name, " (dashed)" if dashes(place) == "--" else "")
        for place, run in enumerate(runs)
    )
    return tag("ul", *items, class_="legend")


def _figure(*parts: object) -> Html:
    return tag("figure", *parts)


def _curves(runs: Sequence[Run]) -> Html:
    """One panel per axis; which is seen is for CSS to say, by the radio button that is on."""
    title = "Learning curves"
    if not any(run.evaluations or run.losses for run in runs):
        return section("curves", title, note("No step or evaluation is recorded."))
    shown = [axis for axis in AXES if len(missing(runs, axis)) < len(runs)]
    buttons: list[Html] = []
    for axis in shown:
        identity = f"axis-{axis.key}"
        on = {"checked": "checked"} if axis is AXES[0] else {}
        buttons.append(tag("input", type="radio", name="axis", id=identity, **on))
        buttons.append(tag("label", axis.label, for_=identity))
    panels = (_panel(runs, axis) for axis in shown)
    chooser = tag("fieldset", tag("legend", "against"), *buttons, *panels, class_="axes")
    untold = [axis.label for axis in AXES if axis not in shown]
    return section(
        "curves",
        title,
        _legend(runs),
        chooser,
        note(
            "Marks are evaluations on held-out examples; the pale line is the training loss, a "
            "mean of 20 steps; the dotted line is the accuracy of always saying the commonest "
            "label. Bytes, forwards and seconds are of training, without evaluations."
        ),
        note("Not recorded: ", ", ".join(untold), ".") if untold else "",
        _numbers(runs),
    )


def _panel(runs: Sequence[Run], axis: Axis) -> Html:
    absent = missing(runs, axis)
    return tag(
        "div",
        _figure(draw_losses(runs, axis)),
        _figure(draw_scores(runs, axis)),
        note("Not drawn, nothing to count: ", ", ".join(absent), ".") if absent else "",
        class_=f"panel panel-{axis.key}",
    )


def _numbers(runs: Sequence[Run]) -> Html:
    steps = sorted({e.step for run in runs for e in run.evaluations})
    scores = [{e.step: f"{e.loss:.4f} / {e.score:.4f}" for e in run.evaluations} for run in runs]
    rows = ([step, *(own.get(step, "") for own in scores)] for step in steps)
    caption = f"Held-out loss / {measured(runs)} after a step"
    return folded("The numbers", table(caption, ["step", *names(runs)], rows, "figures"))


def _memory(runs: Sequence[Run]) -> Html:
    title = "Client memory by phase"
    phases = memory_phases(runs)
    if not phases:
        return section("memory", title, note("No phase was measured."))
    return section(
        "memory",
        title,
        _legend(runs),
        _figure(draw_memory(runs, phases)),
        note(
            "Peak of the live tensors of the client that needed most, weights included. Evaluation "
            "has batches of its own size, and exchange copies whole weights: neither is part of a "
            "training step."
        ),
    )


def _bytes(runs: Sequence[Run]) -> Html:
    title = "Bytes by kind of message"
    kinds = message_kinds(runs)
    if not kinds:
        return section("bytes", title, note("No bytes are recorded."))

    def cell(run: Run, kind: str) -> object:
        up, down = (way.get(kind) for way in (run.results.bytes_up, run.results.bytes_down))
        if not up and not down:
            return ""
        sizes = [megabytes(sent.bytes if sent else 0) for sent in (up, down)]
        return join([up.messages if up else 0, " up: ", sizes[0], ", down: ", sizes[1]])

    rows = ([kind, *(cell(run, kind) for run in runs)] for kind in kinds)
    caption = "Messages and bytes of the whole run"
    return section(
        "bytes",
        title,
        _legend(runs),
        _figure(draw_bytes(runs, kinds)),
        note("Of the whole run, evaluations included: up in full colour, down paler."),
        folded("The numbers", table(caption, ["kind", *names(runs)], rows)),
    )


def _scalars(runs: Sequence[Run]) -> Html:
    title = "Projected gradients"
    figures, lacking = [], []
    for place, run in enumerate(runs):
        found = spreads(run)
        if found:
            drawn = draw_scalars(run, place, found)
            figures.append(_figure(drawn, tag("figcaption", dot(place), run.name)))
        else:
            lacking.append(run.name)
    told = note(
        "The scalars of the ledger: half of them lie in the darker band, nine in ten in the paler; "
        "the line is the median."
    )
    return section(
        "scalars",
        title,
        tag("div", *figures, class_="panel") if figures else "",
        told if figures else "",
        note("No scalars in the ledger: ", ", ".join(lacking), ".") if lacking else "",
    )
