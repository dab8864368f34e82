"""Matplotlib figures as SVG inside HTML: in the page's own font and colours, light or dark."""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape

import matplotlib
from matplotlib.figure import Figure

from hosl_flower.report.html import Html

# Okabe and Ito's colours less black and yellow, which can be told apart with any eyes and on light
# and dark ground, and some greys' neighbours for more than six runs.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
    "#8c564b", "#7f7f7f", "#8a6fd1", "#a3b300",
)  # fmt: skip
BAD = "#d62728"
_INK = "#010203"  # stands for the colour of the text around the figure
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "hosl-flower",  # the same run, the same page
    "text.parse_math": False,  # a name with dollars is a name
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    **dict.fromkeys(
        (
            "text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color",
            "ytick.color", "grid.color",
        ),
        _INK,
    ),
}  # fmt: skip
_PROLOG = re.compile(r"^.*?(?=<svg)|<metadata>.*?</metadata>", re.DOTALL)
_SIZE = re.compile(r'(<svg\b[^>]*?)\swidth="[^"]*"|(<svg\b[^>]*?)\sheight="[^"]*"')


def colour(place: int) -> str:
    """Of the run at this place on the page."""
    return COLOURS[place % len(COLOURS)]


def dashes(place: int) -> str:
    """Line style of the run at this place: colours are used again after ten."""
    return "-" if place < len(COLOURS) else "--"


@contextmanager
def figure(
    width: float, height: float, margins: Mapping[str, float] | None = None
) -> Iterator[Figure]:
    """A new figure, in inches, in the page's style. margins: left, right, bottom, top; without them
    matplotlib makes room for what is drawn, which takes as long as drawing."""
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height), layout=None if margins else "constrained")
        if margins:
            drawn.subplots_adjust(**margins)
        yield drawn


def to_svg(drawn: Figure, name: str, description: str) -> Html:
    """name: of this figure on the page, which keeps its ids apart from others'. description: for
    those who do not see it."""
    text = io.StringIO()
    drawn.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = _PROLOG.sub("", text.getvalue())
    for _ in range(2):  # width, then height: the page's style says how large it is
        svg = _SIZE.sub(r"\1\2", svg, count=1)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # which HTML knows
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(_INK, "currentColor")
    width = round(drawn.get_figwidth() * 96)
    label = f'<svg role="img" aria-label="{escape(description)}" style="max-width:{width}px"'
    return Html(svg.replace("<svg", label, 1).strip())
