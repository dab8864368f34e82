"""SQuAD's exact match and F1 of an answer."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLE = re.compile(r"\b(a|an|the)\b")


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """A text as it is compared: "The  U.S. Army!" -> "us army"."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def graded(text: str, right: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1), each 0 to 1. right: the right answers, none where there is no answer."""
    wanted = [answer for answer in map(normalised, right) if answer] or [""]
    own = normalised(text)
    return float(own in wanted), max(_f1(own.split(), answer.split()) for answer in wanted)


def _f1(own: Sequence[str], wanted: Sequence[str]) -> float:
    if not own or not wanted:
        return float(own == wanted)
    common = (Counter(own) & Counter(wanted)).total()
    # 2 p r / (p + r) with p = common / own, r = common / wanted
    return 2 * common / (len(own) + len(wanted))
