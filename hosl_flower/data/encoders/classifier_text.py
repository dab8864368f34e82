"""Text as the inputs of a classifier: what a tokenizer makes of one column, or of a pair of two.

There is no prompt: which columns, and in which order, are those of the task's, whose own words are
not used. Longer texts are cut as transformers does it, the longer of a pair first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hosl_flower.data.encoders.base import by_length
from hosl_flower.data.encoders.prompts import left_padded
from hosl_flower.errors import ConfigError, ModelError
from hosl_flower.models.batch import Batch
from hosl_flower.models.families.encoders import TEXT_FAMILIES
from hosl_flower.models.special_tokens import Unknown, empty_text, padding
from hosl_flower.tasks.answer_words import AnswerWords
from hosl_flower.tasks.task import Task


class TextInputs:
    """Texts of a task as token ids [B, S], left-padded, or as ids and token types [B, 2, S] where
    tokenizer and model have such; see tasks.Inputs.

    config: the model's. max_length: tokens, special ones among them. answers: a class is what an
    answer word is in a language model.
    """

    shortest = 1

    def __init__(self, task: Task, tokenizer: Any, config: PretrainedConfig, max_length: int):
        if len(task.fields) > 2:
            raise ConfigError(
                f"a classifier takes one column of text or a pair, task {task.name} has "
                f"{', '.join(task.fields)}: choose with prompt, such as "
                f"'{{{task.fields[0]}}} {{{task.fields[1]}}}'"
            )
        self.task, self.tokenizer, self.length = task, tokenizer, max_length
        self.answers = AnswerWords([[label] for label in range(len(task.verbalizers))])
        types = getattr(config, "type_vocab_size", 1) > 1
        self._typed = types and "token_type_ids" in tokenizer.model_input_names
        self._vocabulary: int = config.vocab_size
        self._unknown: Unknown | None = None  # until `check` is called

    @property
    def processor(self) -> Any:
        """The tokenizer, made to forget how it was last asked to cut: it would be saved so."""
        self.tokenizer("")
        return self.tokenizer

    def collate(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """Encode and left-pad examples that carry an integer "label"."""
        columns = [[example[name] for example in examples] for name in self.task.fields]
        # padded here: tokenizers need a token for it that they may lack, or that has no row
        made = self.tokenizer(*columns, truncation=True, max_length=self.length)
        rows = [ids or empty_text(self.tokenizer, self._vocabulary) for ids in made["input_ids"]]
        for row in rows:
            if self._unknown is not None:
                self._unknown.check_text(row)
        ids = left_padded(rows, padding(self.tokenizer, self._vocabulary))
        mask = left_padded([[1] * len(row) for row in rows], 0)
        labels = torch.tensor([example["label"] for example in examples])
        return Batch(self._with(made.get("token_type_ids"), ids), mask, labels)

    def _with(self, types: Sequence[Sequence[int]] | None, ids: Tensor) -> Tensor:
        """Ids [B, S], with token types where the model has such."""
        if not self._typed or types is None:
            return ids
        given = [own or [0] for own in types]  # a text without tokens has one: empty_text
        return torch.stack([ids, left_padded(given, self.tokenizer.pad_token_type_id)], 1)

    def largest(self, examples: int) -> Batch:
        """All tokens differ, none is padding."""
        ids = torch.arange(examples * self.length).view(examples, self.length)
        labels = torch.zeros(examples, dtype=torch.int64)
        inputs = torch.stack([ids, torch.zeros_like(ids)], 1) if self._typed else ids
        return Batch(inputs, torch.ones_like(ids), labels)

    def by_length(self, data: Any) -> Any:
        """Like lengths together."""
        return by_length(data, self.task.fields)

    def check(self, config: PretrainedConfig) -> None:
        """ModelError when the model has too few positions or too small a vocabulary."""
        first = TEXT_FAMILIES[config.model_type].first_position(config)
        positions = config.max_position_embeddings - first
        if self.length > positions:
            raise ModelError(f"max-length = {self.length}, but the model has {positions} positions")
        self._unknown = Unknown(self.tokenizer, config.vocab_size)
        found = self._unknown.first(self.tokenizer("a")["input_ids"])
        if found:
            raise ModelError(f"the tokenizer gives every text {found}; they do not belong together")
