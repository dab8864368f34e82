"""What a page says in words and numbers: cards, the table of runs, configuration, environment."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hosl_flower.config.parse import parse_config
from hosl_flower.report.html import (
    Html,
    folded,
    html,
    join,
    mebibytes,
    megabytes,
    note,
    number,
    section,
    table,
    tag,
)
from hosl_flower.report.runs import Run
from hosl_flower.report.svg import colour

# that runs differ in these says nothing of them
_FREE = ("run-name", "output-dir", "threads", "resume")


def dot(place: int) -> Html:
    """The colour of a run in all figures."""
    return tag("span", class_="dot", style=f"background:{colour(place)}", aria_hidden="true")


def names(runs: Sequence[Run]) -> list[Html]:
    """Headings of the runs' columns."""
    return [join([dot(place), run.name]) for place, run in enumerate(runs)]


def status(run: Run) -> str:
    """How the run ended, in a word or two."""
    if run.diverged:
        return "diverged"
    if run.finished:
        return "finished"
    return f"not finished: {run.steps_done} of {run.settings.config.get('steps', '?')} steps"


def weights(run: Run) -> Html:
    """Where the weights came from: random ones are not to be missed."""
    if run.pretrained is None:
        return html(None)
    return html("pretrained") if run.pretrained else tag("strong", "RANDOM WEIGHTS", class_="bad")


def notices(runs: Sequence[Run]) -> Html:
    """What must be known before anything else is read."""
    lines = []
    for run in runs:
        said = [run.results.notice or run.settings.notice]
        if run.pretrained is False:
            said.insert(0, "RANDOM WEIGHTS: this run shows that everything works; it is no result.")
        if run.diverged:
            said.append(f"Diverged: {run.diverged}")
        elif not run.finished:
            said.append(f"{status(run).capitalize()}; figures are those so far.")
        # of a run that did not finish, that there are no results has been said
        said += [p for p in run.problems if run.finished or p != "There is no results.json."]
        text = " ".join(filter(None, said))
        if text:
            lines.append(tag("li", tag("strong", run.name), ": ", text))
    return tag("ul", *lines, class_="notices") if lines else html("")


def cards(runs: Sequence[Run]) -> Html:
    """The headline figures of each run."""
    return tag("div", *(_card(place, run) for place, run in enumerate(runs)), class_="cards")


def _card(place: int, run: Run) -> Html:
    results, last = run.results, run.evaluations[-1:]
    score = results.accuracy if results.f1 is None else results.f1
    score = score if score is not None or not last else last[0].score
    loss = results.loss if results.loss is not None or not last else last[0].loss
    over = run.over_forward
    figures = (
        (f"held-out {run.measure}", number(score, 4)),
        ("held-out loss", number(loss, 4)),
        ("sent up", megabytes(run.total(results.bytes_up))),
        ("sent down", megabytes(run.total(results.bytes_down))),
        ("client peak", f"{over:.2f} x its forward" if over else _over(run)),
        ("seconds per step", number(results.seconds_per_step.get("total"), 3)),
    )
    pairs = (tag("div", tag("dt", name), tag("dd", value)) for name, value in figures)
    state = status(run)
    badge = tag("span", state, class_="badge" if state == "finished" else "badge bad")
    kind = " on ".join(filter(None, (run.model, results.task or run.settings.task_used)))
    cut = run.settings.config.get("cut-layer")
    what = (run.method, kind, "" if cut is None else f"cut after block {cut}")
    return tag(
        "article",
        tag("h3", dot(place), run.name, " ", badge),
        tag("p", ", ".join(filter(None, what)), class_="what"),
        tag("dl", *pairs),
    )


def _over(run: Run) -> Html:
    if run.costs and run.over_forward is None:  # such as a client that holds the whole model
        return html("no pass without training")
    return number(run.over_forward, 2)


def side_by_side(runs: Sequence[Run]) -> Html:
    """One row per figure, one column per run."""

    def rows(lines: Iterable[tuple[str, Callable[[Run], object]]]) -> list[list[object]]:
        return [[name, *(of(run) for run in runs)] for name, of in lines]

    measures = {run.measure for run in runs}
    outcome = [row for row in _OUTCOME if _MEASURED.get(row[0], "") in ("", *measures)]
    if any(run.results.privacy for run in runs):
        outcome.append(("epsilon, per example", _epsilon))
    return section(
        "runs",
        "What was trained, and what came of it",
        tag(
            "div",
            table("What was trained", ["", *names(runs)], rows(_TRAINED)),
            table("Outcome", ["", *names(runs)], rows(outcome), "figures"),
            class_="panel" if len(runs) == 1 else "",
        ),
        note(
            "Bytes of a run are with evaluations, those of a step without. A backward pass counts "
            "as two forwards. Peak over forward is that of the client's tensors in a training "
            "step over that in a forward pass of the same run, with weights and, where the client "
            "holds any, optimizer state in both."
        ),
    )


def _epsilon(run: Run) -> object:
    cost = run.results.privacy
    if cost is None or not cost.epsilon:
        return None
    said = f"{number(max(cost.epsilon.values()), 2)} at delta {number(cost.delta, 6)}"
    return f"{said}, simulated" if cost.simulated else said


def _key(name: str) -> Callable[[Run], object]:
    return lambda run: run.settings.config.get(name)


def _clients(run: Run) -> object:
    count = run.results.clients.number or run.settings.config.get("num-clients")
    sampled = run.settings.config.get("clients-per-step") or count
    return count if count is None or count == 1 else f"{sampled} of {count} in a step"


def _parameters(run: Run) -> object:
    own = run.results.client_parameters
    if not {"held", "trained"} <= own.keys():
        return None
    return f"{own['held']:,} held, {own['trained']:,} trained"


def _cost(field: str, show: Callable[[float | None], Html]) -> Callable[[Run], object]:
    return lambda run: show(getattr(run.costs, field) if run.costs else None)


def _seconds(part: str) -> Callable[[Run], object]:
    return lambda run: number(run.results.seconds_per_step.get(part), 4)


_TRAINED: tuple[tuple[str, Callable[[Run], object]], ...] = (
    ("method", lambda run: run.method or None),
    ("model", lambda run: run.model or None),
    ("weights", weights),
    ("task", lambda run: run.results.task or run.settings.task_used or None),
    ("cut layer", _key("cut-layer")),
    ("client parameters", _parameters),
    ("clients", _clients),
    ("steps", lambda run: run.results.steps or run.settings.config.get("steps")),
    ("batch size", _key("batch-size")),
    ("seed", lambda run: run.settings.config.get("seed", run.results.seed)),
    ("state", status),
)
_OUTCOME: tuple[tuple[str, Callable[[Run], object]], ...] = (
    ("held-out accuracy", lambda run: number(run.results.accuracy, 4)),
    ("of the majority class", lambda run: number(run.results.majority_accuracy, 4)),
    ("balanced accuracy", lambda run: number(run.results.balanced_accuracy, 4)),
    ("held-out F1", lambda run: number(run.results.f1, 4)),
    ("exact match", lambda run: number(run.results.exact_match, 4)),
    ("held-out loss", lambda run: number(run.results.loss, 4)),
    ("before training", lambda run: number(_before(run), 4)),
    ("held-out examples", lambda run: number(run.results.held_out_examples, 0)),
    ("up, whole run", lambda run: megabytes(run.total(run.results.bytes_up))),
    ("down, whole run", lambda run: megabytes(run.total(run.results.bytes_down))),
    ("up per step", _cost("bytes_up", megabytes)),
    ("down per step", _cost("bytes_down", megabytes)),
    ("client forwards per step", _cost("forwards", lambda value: number(value, 2))),
    ("client peak, tensors in a step", _cost("peak_bytes", mebibytes)),
    ("over its forward pass", _over),
    ("client peak, process", lambda run: mebibytes(run.results.client_peak_memory.bytes)),
    ("seconds per step", _seconds("total")),
    ("of them client", _seconds("client")),
    ("server", _seconds("server")),
    ("transport", _seconds("transport")),
    ("seconds in all", lambda run: number(run.results.wall_seconds, 1)),
)

# rows that are only about runs of such a measure
_MEASURED = {
    "held-out accuracy": "accuracy",
    "of the majority class": "accuracy",
    "balanced accuracy": "accuracy",
    "held-out F1": "F1",
    "exact match": "F1",
}


def _before(run: Run) -> float | None:
    return run.evaluations[0].loss if run.evaluations else None


def configuration(runs: Sequence[Run]) -> Html:
    """Keys that set runs apart first: from each other, or a single one from the defaults."""
    if not any(run.settings.config for run in runs):
        return section("configuration", "Configuration", note("No config.json says how it was."))
    defaults: dict[str, Any] = parse_config({}).as_keys()
    keys = list(dict.fromkeys([*defaults, *(key for run in runs for key in run.settings.config)]))
    if len(runs) > 1:
        apart = [k for k in keys if k not in _FREE and len({_value(run, k) for run in runs}) > 1]
        title, rest = "Keys that differ between the runs", "Keys that are the same, or say nothing"
    else:
        apart = [k for k in keys if k not in _FREE and _value(runs[0], k) != _json(defaults.get(k))]
        title, rest = "Keys that are not at their default", "All other keys"

    def rows(wanted: Iterable[str]) -> list[list[object]]:
        return [
            [tag("code", key), *(_shown(run, key) for run in runs), _json(defaults.get(key))]
            for key in wanted
        ]

    columns = ["key", *names(runs), "default"]
    differing = table(title, columns, rows(apart), "differ")
    others = folded(rest, table(rest, columns, rows(k for k in keys if k not in apart)))
    return section("configuration", "Configuration", differing if apart else note("None."), others)


def _json(value: object) -> str:
    return json.dumps(value)


def _value(run: Run, key: str) -> str:
    return _json(run.settings.config[key]) if key in run.settings.config else ""


def _shown(run: Run, key: str) -> object:
    return _value(run, key) or None


def environment(runs: Sequence[Run]) -> Html:
    """What the runs ran on, and what identifies them."""
    packages = list(dict.fromkeys(name for run in runs for name in run.settings.versions))
    rows: list[list[object]] = [
        [name, *(run.settings.versions.get(name) for run in runs)] for name in packages
    ]
    for label, of in (
        ("Python", lambda run: run.settings.python),
        ("machine", lambda run: run.settings.machine),
        ("client weights", lambda run: run.results.fingerprint),
        ("ledger", lambda run: run.results.ledger_digest),
    ):
        rows.append([label, *(of(run) or None for run in runs)])
    return section(
        "environment", "Environment", table("Versions and digests", ["", *names(runs)], rows)
    )
