"""Prompts as templates: what is between braces is a column of the data, under any name.

{Review Text} is a column. {{ and }} are braces as text where all other braces are columns. In a
prompt that has other single braces too, such as JSON, each of them stays as it is written.
"""

import re

_BRACES = re.compile(r"\{([^{}]*)\}")
_ESCAPED = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def is_name(text: str) -> bool:
    """Whether what is between braces can be a column: JSON, code and punctuation cannot."""
    has_word = any(char.isalnum() or not char.isascii() for char in text)
    return has_word and not set(text) & set('"\n\r') and not text.startswith("'")


def pieces(prompt: str) -> tuple[list[tuple[str, str]], str]:
    """(the text before each column and the column), and the text after the last."""
    escaped = _is_escaped(prompt)
    pairs, text, end = [], "", 0
    for found in (_ESCAPED if escaped else _BRACES).finditer(prompt):
        text += prompt[end : found.start()]
        end = found.end()
        if found[1] is not None and is_name(found[1]):
            pairs.append((text, found[1]))
            text = ""
        else:
            text += found[0][0] if escaped else found[0]
    return pairs, text + prompt[end:]


def _is_escaped(prompt: str) -> bool:
    """Whether braces that are text are written twice: every single one is around a column."""
    found = list(_ESCAPED.finditer(prompt))
    doubled = any(each[0] in ("{{", "}}") for each in found)
    return doubled and all(
        each[0] in ("{{", "}}") or (each[1] is not None and is_name(each[1])) for each in found
    )


def fields_of(prompt: str) -> dict[str, None]:
    """The columns a prompt needs, each once, in order."""
    return dict.fromkeys(name for _, name in pieces(prompt)[0])


def braces_as_text(prompt: str) -> list[str]:
    """What a prompt has between braces that are text."""
    literal = "".join(text for text, _ in pieces(prompt)[0]) + pieces(prompt)[1]
    return _BRACES.findall(literal)
