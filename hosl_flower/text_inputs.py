"""Text as the inputs of a classifier: what a tokenizer makes of one column, or of a pair of two.

There is no prompt: which columns, and in which order, are those of the task's, whose own words are
not used. Longer texts are cut as transformers does it, the longer of a pair first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hosl_flower.answers import Answers
from hosl_flower.errors import CheckpointError, ConfigError, DataError
from hosl_flower.task_table import Task
from hosl_flower.tasks import Batch, by_length, tokens_beyond
from hosl_flower.text_families import TEXT_FAMILIES


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
        self.answers = Answers([[label] for label in range(len(task.verbalizers))])
        types = getattr(config, "type_vocab_size", 1) > 1
        self._typed = types and "token_type_ids" in tokenizer.model_input_names
        self._vocabulary: int = config.vocab_size

    @property
    def processor(self) -> Any:
        """The tokenizer, made to forget how it was last asked to pad and cut: it would be saved so,
        and pad on the left wherever it is loaded."""
        self.tokenizer("")
        return self.tokenizer

    def collate(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """Encode and left-pad examples that carry an integer "label"."""
        columns = [[example[name] for example in examples] for name in self.task.fields]
        made = self.tokenizer(
            *columns, truncation=True, max_length=self.length, padding=True, padding_side="left",
            return_tensors="pt",
        )  # fmt: skip
        ids = made["input_ids"]
        if int(ids.max()) >= self._vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(int(ids.max()))
            raise DataError(
                f"an example has the text {token!r}, a special token that this model has no "
                "embedding for; take it out of the data"
            )
        labels = torch.tensor([example["label"] for example in examples])
        return Batch(self._with(made.get("token_type_ids"), ids), made["attention_mask"], labels)

    def _with(self, types: Tensor | None, ids: Tensor) -> Tensor:
        """Ids [B, S], with token types where the model has such."""
        return torch.stack([ids, types], 1) if self._typed and types is not None else ids

    def largest(self, examples: int) -> Batch:
        """All tokens differ, none is padding."""
        ids = torch.arange(examples * self.length).view(examples, self.length)
        labels = torch.zeros(examples, dtype=torch.int64)
        return Batch(self._with(torch.zeros_like(ids), ids), torch.ones_like(ids), labels)

    def by_length(self, data: Any) -> Any:
        """Like lengths together."""
        return by_length(data, self.task.fields)

    def check(self, config: PretrainedConfig) -> None:
        """CheckpointError when the model has too few positions or too small a vocabulary, or the
        tokenizer cannot pad."""
        first = TEXT_FAMILIES[config.model_type].first_position(config)
        positions = config.max_position_embeddings - first
        if self.length > positions:
            raise CheckpointError(
                f"max-length = {self.length}, but the model has {positions} positions"
            )
        tokens_beyond(self.tokenizer, config.vocab_size)
        if self.tokenizer.pad_token_id is None:
            raise CheckpointError("the tokenizer has no padding token, which a classifier needs")
