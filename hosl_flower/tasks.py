"""Tasks as prompts: a text classification becomes "which word comes next?".

As in MeZO (Malladi et al. 2023, Table 14): the example is rendered into a prompt, each label
has an answer word (verbalizer), and the loss is the cross-entropy over the answer words'
logits at the position after the prompt. Inputs are left-padded, so that position is the last.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hosl_flower import hub
from hosl_flower.config import RunConfig
from hosl_flower.errors import CheckpointError, ConfigError, DataError, first_line

_FIELD = re.compile(r"\{(\w+)\}")  # any other brace is text

BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Task:
    """One classification task.

    prompt: template; {fields} are columns of the data. verbalizers: answer words, by label.
    label_names: the strings a data file may use for the labels, by label.
    source: "hub:<repository>/<configuration>" or "bundled:<folder>".
    """

    name: str
    prompt: str
    verbalizers: tuple[str, ...]
    label_names: tuple[str, ...] = ()
    label_column: str = "label"
    source: str = ""

    @property
    def fields(self) -> list[str]:
        """The columns the prompt needs."""
        return _FIELD.findall(self.prompt)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="sst2",
            prompt="{sentence} It was",
            verbalizers=("terrible", "great"),
            label_names=("negative", "positive"),
            source="hub:nyu-mll/glue/sst2",
        ),
        Task(
            name="sms-spam",
            prompt="{SMS}\nThis message is",
            verbalizers=("real", "spam"),
            label_names=("ham", "spam"),
            label_column="Label",
            source="bundled:sms_spam",
        ),
    )
}


def task_from_config(config: RunConfig) -> Task:
    """The task a run asks for, with its overrides; ConfigError when it is incomplete."""
    base = TASKS.get(config.task)
    if base is None:
        if not (config.prompt and config.verbalizers):
            raise ConfigError(
                f"task = {config.task!r} is none of {', '.join(TASKS)}; a task of your own needs "
                "prompt, verbalizers and data-path (in the run config, or each node's own)"
            )
        base = Task(config.task, config.prompt, tuple(config.verbalizer_list))
    task = replace(
        base,
        prompt=config.prompt or base.prompt,
        verbalizers=tuple(config.verbalizer_list) or base.verbalizers,
        label_column=config.label_column or base.label_column,
    )
    if not task.fields:
        raise ConfigError(f"prompt = {task.prompt!r} names no column; write one like {{text}}")
    if task.label_names and len(task.label_names) != len(task.verbalizers):
        raise ConfigError(
            f"verbalizers: task {task.name} has {len(task.label_names)} labels "
            f"({', '.join(task.label_names)}), got {len(task.verbalizers)} words"
        )
    return task


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model; `random:` models use the bundled OPT tokenizer."""
    try:
        if model.startswith("random:"):
            return AutoTokenizer.from_pretrained(BUNDLED / "opt_tokenizer")
        directory = hub.local_directory(model)
        tokenizer = AutoTokenizer.from_pretrained(
            model if directory is None else directory,
            local_files_only=directory is None and not hub.is_reachable(),
            trust_remote_code=False,
        )
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        raise CheckpointError(f"{model} has no usable tokenizer: {first_line(error)}") from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise CheckpointError(f"{model} has no tokenizer files; copy tokenizer.json or the like")
    return tokenizer


@dataclass(frozen=True)
class Batch:
    """Left-padded inputs: input_ids, attention_mask [B, S] int64; labels [B] int64."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class Encoder:
    """Renders examples of a task into token ids."""

    def __init__(self, task: Task, tokenizer: Any, max_length: int):
        self.task, self.tokenizer, self.max_length = task, tokenizer, max_length
        # The literal text after the last field holds the question: it is never cut off.
        self._head, self._tail = _split_prompt(task.prompt)
        self._prefix = list(tokenizer("")["input_ids"])  # <s>-like tokens, if the model uses any
        self._suffix = self._tokens(self._tail)
        if len(self._prefix) + len(self._suffix) >= max_length:
            raise ConfigError(
                f"max-length = {max_length} leaves no room for text: the prompt's end "
                f"{self._tail!r} alone takes {len(self._suffix)} tokens"
            )
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else tokenizer.eos_token_id
        self.verbalizer_ids = [self._verbalizer_id(word) for word in task.verbalizers]
        if len(set(self.verbalizer_ids)) != len(self.verbalizer_ids):
            raise ConfigError(f"verbalizers {', '.join(task.verbalizers)} share a token")

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _verbalizer_id(self, word: str) -> int:
        ids = self._tokens(f" {word}")
        if len(ids) != 1:
            raise ConfigError(
                f"verbalizer {word!r} is {len(ids)} tokens in this model's vocabulary; "
                "each answer word must be a single token: choose another with `verbalizers`"
            )
        return ids[0]

    def encode(self, example: dict[str, Any]) -> list[int]:
        """Token ids of one example, at most max_length: the text is cut, never the question."""
        text = _FIELD.sub(lambda field: example[field.group(1)], self._head)
        room = self.max_length - len(self._prefix) - len(self._suffix)
        return self._prefix + self._tokens(text)[:room] + self._suffix

    def collate(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """Encode and left-pad examples that carry an integer "label"."""
        rows = [self.encode(example) for example in examples]
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), length), dtype=torch.int64)
        for i, row in enumerate(rows):
            input_ids[i, length - len(row) :] = torch.tensor(row)
            mask[i, length - len(row) :] = 1
        return Batch(input_ids, mask, torch.tensor([example["label"] for example in examples]))

    def check_vocabulary(self, vocabulary: int) -> None:
        """CheckpointError when the tokenizer can produce ids the model has no row for."""
        if len(self.tokenizer) > vocabulary:
            raise CheckpointError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model's embedding only "
                f"{vocabulary} rows; they do not belong together"
            )


def _split_prompt(prompt: str) -> tuple[str, str]:
    end = max(field.end() for field in _FIELD.finditer(prompt))
    return prompt[:end], prompt[end:]


def parse_label(value: Any, task: Task, where: str) -> int:
    """A label as data files write it (int, bool, numeric string, name) -> 0..C-1."""
    text = str(value).strip().lower()
    if text in task.label_names:
        return task.label_names.index(text)
    text = {"false": "0", "true": "1"}.get(text, text)
    number = int(float(text)) if re.fullmatch(r"\d+(\.0)?", text) else -1
    if not 0 <= number < len(task.verbalizers):
        names = f" or {', '.join(task.label_names)}" if task.label_names else ""
        raise DataError(
            f"{where}: label {value!r} is not one of 0..{len(task.verbalizers) - 1}{names}; "
            "rows without a label cannot be used"
        )
    return number
