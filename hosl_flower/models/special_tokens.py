"""Tokens of a tokenizer that are not those of a text: which it puts before a text, which can stand
for padding or for an empty text, and which of all the model has no embedding row for. Tokenizers
lack any of them, and put others where they do not belong.
"""

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hosl_flower.errors import DataError, ModelError, first_line
from hosl_flower.models.checkpoints import hub

_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", *_SENTENCEPIECE,
)  # fmt: skip


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a tokenizer in a directory, links to nothing among them."""
    paths = [directory / name for name in _FILES]
    return [path for path in paths if path.exists() or path.is_symlink()]


def check_has_vocabulary(tokenizer: Any, model: str) -> None:
    """ModelError when there is none: without its files transformers makes a tokenizer of
    special tokens alone."""
    special = set(tokenizer.all_special_tokens)
    own = any(token not in special for token in tokenizer.get_vocab())
    if not own or not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ModelError(
            f"{model} has no tokenizer files; copy tokenizer.json, or what else the tokenizer of "
            "this model consists of, into its directory"
        )


def check_sentencepiece(model: str) -> None:
    """ModelError for a tokenizer that needs sentencepiece where that cannot be used."""
    directory = hub.local_directory(model)

    def has(name: str) -> bool:
        return bool(hub.cached(model, name) if directory is None else (directory / name).is_file())

    name = next(filter(has, _SENTENCEPIECE), None)
    reason = _no_sentencepiece() if name and not has("tokenizer.json") else ""
    if reason:
        raise ModelError(
            f"{model} has its tokenizer as {name} alone, which needs sentencepiece: {reason}. "
            "Install it with pip install 'hosl-flower[sentencepiece]', or add the model's "
            "tokenizer.json"
        )


def _no_sentencepiece() -> str:
    """Why it cannot be used, "" where it can."""
    try:
        importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError:
        return "it is not installed"
    except Exception as error:  # of protobuf, for one made for a newer one
        return f"the installed one is of no use ({first_line(error)})"
    return ""


def prefix(tokenizer: Any) -> list[int]:
    """What it puts before a text, such as <s>; not what it puts behind one."""
    whole, own = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(own) + 1)
    return list(whole[: next((i for i in starts if whole[i : i + len(own)] == own), 0)])


def padding(tokenizer: Any, vocabulary: int) -> int:
    """The token to pad with: masks leave it out, so any will do that the model has a row for."""
    named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in named if _is_row(token, vocabulary)), 0)


def empty_text(tokenizer: Any, vocabulary: int) -> list[int]:
    """What stands for a text without tokens: attention needs at least one. DataError when there is
    no token that means nothing."""
    named = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for token in named:
        if _is_row(token, vocabulary):
            return [token]
    raise DataError(
        "an example has no text, and this tokenizer no token for the end of one or for padding "
        "that could stand for it: take the rows without text, which the log names, out of the data"
    )


def _is_row(token: int | None, vocabulary: int) -> bool:
    return token is not None and 0 <= token < vocabulary


class Unknown:
    """Tokens, by id, that a model has no embedding row for, though its tokenizer has them."""

    def __init__(self, tokenizer: Any, vocabulary: int):
        """ModelError when there are others than special and added ones, which no text means
        that does not spell them out (Gemma 3 has one for images, its text models no row for it)."""
        beyond = {t: i for t, i in tokenizer.get_vocab().items() if i >= vocabulary}
        self._added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        if not all(i in self._added for i in beyond.values()):
            raise ModelError(
                f"the tokenizer has {len(tokenizer)} tokens, the model's embedding only "
                f"{vocabulary} rows; they do not belong together"
            )
        self._tokens = {i: token for token, i in beyond.items()}

    def first(self, ids: Iterable[int]) -> str:
        """The first of them there is, in words; "" without any."""
        if not self._tokens:
            return ""
        found = next((i for i in ids if i in self._tokens), None)
        if found is None:
            return ""
        kind = "a special" if self._added[found].special else "an added"
        return f"{self._tokens[found]!r}, {kind} token that this model has no embedding for"

    def check_text(self, ids: Iterable[int]) -> None:
        """DataError for a text that has one of them."""
        if found := self.first(ids):
            raise DataError(f"an example has the text {found}; take it out of the data")
