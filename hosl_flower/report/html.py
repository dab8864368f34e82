"""HTML that is escaped unless it says that it is HTML, and the few elements a page is made of."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hosl_flower.errors import printable

CSS = Path(__file__).with_name("page.css")

# Nothing is fetched, and nothing runs: there is no script to allow.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """Text that is HTML already."""


def html(value: object) -> Html:
    """Any other text, escaped; None is something a run does not record."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html('<span class="missing">not recorded</span>')
    return Html(escape(str(value)))


def join(parts: Iterable[object]) -> Html:
    """One after the other."""
    return Html("".join(map(html, parts)))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """<name ...>children</name>. An attribute's underscores are hyphens, but for one at its end,
    which keeps it from being a Python keyword: class_, for_."""
    own = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value != ""
    )
    if name in ("input", "img"):
        return Html(f"<{name}{own}>")
    return Html(f"<{name}{own}>{join(children)}</{name}>")


def note(*text: object) -> Html:
    """A line of small print, or what is said in place of something that is not there."""
    return tag("p", *text, class_="note")


def section(identity: str, title: str, *parts: object) -> Html:
    """A part of the page that can be linked to."""
    return tag("section", tag("h2", title), *parts, id=identity)


def table(
    caption: str, columns: Sequence[object], rows: Iterable[Sequence[object]], class_: str = ""
) -> Html:
    """The first cell of each row is its header. Wide tables scroll on their own."""
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = (
        tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in cells))
        for first, *cells in rows
    )
    whole = tag(
        "table", tag("caption", caption), tag("thead", head), tag("tbody", *body), class_=class_
    )
    # a region that scrolls must be reachable by keyboard
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def folded(title: str, *parts: object) -> Html:
    """Closed until it is wanted."""
    return tag("details", tag("summary", title), *parts)


def number(value: float | None, digits: int, unit: str = "") -> Html:
    """A figure with its unit, or that there is none."""
    if value is None:
        return html(None)
    if not math.isfinite(value):
        return tag("span", "not finite", class_="bad")
    return html(f"{value:,.{digits}f}{' ' if unit else ''}{unit}")


def megabytes(size: float | None) -> Html:
    """Bytes that were sent, in MB of 10^6; few of them in kB, many in GB."""
    if size is not None and size < 1e5:
        return number(size / 1e3, 1, "kB")
    if size is not None and size >= 1e9:
        return number(size / 1e9, 2, "GB")
    return number(None if size is None else size / 1e6, 1 if (size or 0) >= 1e7 else 2, "MB")


def mebibytes(size: float | None) -> Html:
    """Bytes of memory, in MiB."""
    return number(None if size is None else size / 2**20, 1, "MiB")


def document(title: str, *parts: Any) -> Html:
    """The page: one file that needs no other."""
    style = Html(CSS.read_text(encoding="utf-8"))
    head = Html(
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
    )
    page = tag(
        "html",
        tag("head", head, tag("title", title), tag("style", style)),
        tag("body", *parts),
        lang="en",
    )
    # whatever the files of a run held: nothing that a terminal or an editor would obey
    lines = f"<!DOCTYPE html>\n{page}\n".expandtabs(1).split("\n")
    return Html("\n".join(map(printable, lines)))
