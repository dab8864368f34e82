"""Tasks as prompts: "which word comes next?", or "which text?".

As in MeZO (Malladi et al. 2023, Table 14): the example is rendered into a prompt. In a
classification each label has an answer word (verbalizer), and the loss is the cross-entropy over
the answer words' scores (tasks/answer_words.py); else the answer is text of its own
(tasks/generated_answers.py). The tasks themselves are in tasks/known.py.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hosl_flower.data.encoders.base import by_length
from hosl_flower.errors import ConfigError, ModelError
from hosl_flower.models.batch import Batch
from hosl_flower.models.special_tokens import (
    Unknown,
    empty_text,
    padding,
    prefix,
)
from hosl_flower.tasks.answer_words import AnswerWords
from hosl_flower.tasks.generated_answers import Completion
from hosl_flower.tasks.prompt_template import pieces
from hosl_flower.tasks.scoring import Scoring
from hosl_flower.tasks.task import Task


class PromptEncoder:
    """Renders examples of a task into token ids; generated ones into text.

    max_length: tokens of prompt and answer together. max_new_tokens: of an answer that is text.
    """

    def __init__(self, task: Task, tokenizer: Any, max_length: int, max_new_tokens: int = 16):
        self.task, self.tokenizer, self.max_length = task, tokenizer, max_length
        self.length = max_length
        # no space at the end: it belongs to the answer word (" great" is one token)
        self._pairs, self._tail = pieces(task.prompt.rstrip(" "))  # (text, field after it), text
        self._prefix = prefix(tokenizer)
        self._suffix = self._tokens(self._tail)
        self.answers: Scoring = (
            self._completion(max_new_tokens) if task.target else self._choice(task.verbalizers)
        )
        self._literal = [len(self._tokens(text)) for text, _ in self._pairs]
        fixed = len(self._prefix) + sum(self._literal) + len(self._suffix)
        fixed += self.answers.longest - 1
        self._room = max_length - fixed  # for the fields
        if self._room <= 0:
            raise ConfigError(
                f"max-length = {max_length} leaves no room for text: the prompt's own words "
                f"({task.prompt!r}) and the answer take {fixed} tokens"
                + " (max-new-tokens)"
                * bool(task.target)
            )
        self._vocabulary = sys.maxsize  # until `check` is called, as is:
        self._unknown: Unknown | None = None

    @property
    def pad_id(self) -> int:
        """The token that rows are padded with."""
        return padding(self.tokenizer, self._vocabulary)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _word_tokens(self, word: str) -> list[int]:
        """An answer word as it follows the prompt: after a space, or right after a newline."""
        word = word if self._tail[-1:].isspace() else f" {word}"
        both, length = self._tokens(self._tail + word), len(self._suffix)
        if both[:length] == self._suffix and len(both) > length:
            return both[length:]
        return self._tokens(word)

    def _choice(self, words: Sequence[str]) -> AnswerWords:
        answers = AnswerWords([self._word_tokens(word) for word in words])
        for place, tokens in enumerate(answers.tokens):
            if (first := answers.tokens.index(tokens)) < place:
                names = self.task.label_names or range(len(words))
                raise ConfigError(
                    f"verbalizers: labels {names[first]} and {names[place]} have the same tokens, "
                    f"{words[first]!r} and {words[place]!r}; give each an answer of its own"
                )
        return answers

    def _completion(self, longest: int) -> Completion:
        newline = self._tokens("\n")[-1]
        eos = self.tokenizer.eos_token_id
        ends = {newline} if eos is None else {newline, eos}
        return Completion(self._word_tokens, newline, frozenset(ends), longest)

    def encode(self, example: dict[str, Any]) -> list[int]:
        """Token ids of an example's prompt, at most max_length with any answer but its last
        token: where that is too long the longest field is cut, never the prompt's own words."""
        texts = [text + example[name] for text, name in self._pairs]
        ids = self._prefix + self._tokens("".join(texts) + self._tail)
        ids = ids or empty_text(self.tokenizer, self._vocabulary)
        self._check_known(ids)
        if len(ids) + self.answers.longest - 1 <= self.max_length:
            return ids
        parts = [self._tokens(text) for text in texts]
        lengths = [len(p) - n for p, n in zip(parts, self._literal, strict=True)]
        kept = self._kept(lengths)
        ids = [
            token
            for part, own, more in zip(parts, self._literal, kept, strict=True)
            for token in part[: own + more]
        ]
        return self._prefix + ids + self._suffix

    def _kept(self, lengths: Sequence[int]) -> list[int]:
        """What is kept of each field: of the one that the task cuts, what the others leave."""
        places = [i for i, (_, name) in enumerate(self._pairs) if name == self.task.cut]
        own = [lengths[i] for i in places]
        left = self._room - (sum(lengths) - sum(own))
        if not places or left < 0:
            return cut_longest(lengths, self._room)
        kept = list(lengths)
        for i, length in zip(places, cut_longest(own, left), strict=True):
            kept[i] = length
        return kept

    def _check_known(self, ids: Sequence[int]) -> None:
        if self._unknown is not None:
            self._unknown.check_text(ids)

    def collate(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """Encode and left-pad examples that carry an integer "label", or texts "answers"."""
        rows = [row for e in examples for row in self.answers.inputs(self.encode(e), e)]
        labels = self.answers.labels(examples)
        if self.task.target:
            self._check_known(labels.flatten().tolist())  # the last token is in no row
        return self._padded(rows, labels)

    def filled(self, batch: Batch) -> Batch:
        """The same, padded to one more than max_length: its shape tells nothing of the examples,
        and no example's rounding depends on another's length. One more, since attention is computed
        in another way where nothing is padding."""
        missing = self.max_length + 1 - batch.inputs.shape[1]
        ids = F.pad(batch.inputs, (missing, 0), value=self.pad_id)
        return Batch(ids, F.pad(batch.attention_mask, (missing, 0)), batch.labels)

    def prompts(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """Encode and left-pad the prompts of examples alone."""
        return self._padded(list(map(self.encode, examples)), torch.empty(0, dtype=torch.int64))

    def text(self, tokens: Sequence[int]) -> str:
        """Generated tokens of an answer, as text: one line."""
        assert isinstance(self.answers, Completion)
        text = self.tokenizer.decode(self.answers.cut(tokens), skip_special_tokens=True)
        return text.lstrip().partition("\n")[0].strip()

    def _padded(self, rows: Sequence[Sequence[int]], labels: Tensor) -> Batch:
        for row in rows:
            self._check_known(row)
        mask = left_padded([[1] * len(row) for row in rows], 0)
        return Batch(left_padded(rows, self.pad_id), mask, labels)

    @property
    def shortest(self) -> int:
        """Fewest tokens of a sequence: an answer has its place."""
        return 1 if self.task.target else self.answers.longest

    @property
    def processor(self) -> Any:
        """The tokenizer."""
        return self.tokenizer

    def largest(self, examples: int) -> Batch:
        """All tokens differ, none is padding."""
        rows = examples * self.answers.sequences
        ids = torch.arange(rows * self.max_length).view(rows, self.max_length)
        shape = (examples, self.answers.longest) if self.task.target else (examples,)
        return Batch(ids, torch.ones_like(ids), torch.zeros(shape, dtype=torch.int64))

    def by_length(self, data: Any) -> Any:
        """Like lengths together."""
        return by_length(data, self.task.fields)

    def check(self, config: Any) -> None:
        """ModelError when the model has too few positions or too small a vocabulary."""
        positions = config.max_position_embeddings
        if self.max_length > positions:
            raise ModelError(
                f"max-length = {self.max_length}, but the model has {positions} positions"
            )
        self.check_vocabulary(config.vocab_size)

    def check_vocabulary(self, vocabulary: int) -> None:
        """ModelError when the tokenizer makes tokens that the model has no embedding row for,
        ConfigError when an answer has one; a text that has one is refused by `encode`."""
        self._vocabulary, self._unknown = vocabulary, Unknown(self.tokenizer, vocabulary)
        if found := self._unknown.first(self._prefix):
            raise ModelError(
                f"the tokenizer begins every text with {found}; they do not belong together"
            )
        if isinstance(self.answers, AnswerWords) and (
            found := self._unknown.first(self.answers.flat)
        ):
            raise ConfigError(f"verbalizers: an answer has {found}; choose another")


def left_padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths, int64 [R, S], with a value before the shorter ones."""
    length = max(map(len, rows))
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    for own, row in zip(padded, rows, strict=True):
        own[length - len(row) :] = torch.tensor(row)
    return padded


def cut_longest(lengths: Sequence[int], room: int) -> list[int]:
    """The lengths with the longest cut to as much as is needed for a sum of at most `room`."""
    most = max(lengths)
    for done, length in enumerate(sorted(lengths)):
        share = room // (len(lengths) - done)  # of each that is not shorter
        if length > share:
            most = max(0, share)
            break
        room -= length
    return [min(length, most) for length in lengths]
