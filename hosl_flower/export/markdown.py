"""Text of others in Markdown, as text: none of it becomes a heading, a link, HTML or a new line."""

import re

from hosl_flower.errors import printable

_MEANS = re.compile(r"([\\`*_{}\[\]<>#|~$&])")
_MOST = 300  # characters


def plain(value: object) -> str:
    """Text in a line or a cell of a table."""
    return _MEANS.sub(r"\\\1", printable(str(value), _MOST))


def code(value: object) -> str:
    """Text in a line, in the type of code."""
    shown = printable(str(value))
    ticks = "`" * (_longest(shown) + 1)
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{ticks}{space}{shown}{space}{ticks}"


def block(value: str, language: str = "") -> str:
    """Lines of text as a block of code."""
    lines = "\n".join(map(printable, value.split("\n")))
    fence = "`" * max(3, _longest(lines) + 1)
    return f"{fence}{language}\n{lines}\n{fence}"


def _longest(text: str) -> int:
    """The longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
