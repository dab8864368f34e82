"""What a model family must say of its models, and stand-ins for the parts a half lacks."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

HEAD = "lm_head.weight"  # in every family of language models


class Absent(nn.Module):
    """Stands where a module of the other side was: passes its first argument through.

    Blocks keep their index, so parameter names stay those of the unsplit model.
    """

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


Rename = Callable[[str], str]


# of all matrices, or by canonical name and shape
InitStd = float | Callable[[str, torch.Size], float]


class Family(Protocol):
    """What models/split.py asks of a model family. Names are attributes of the causal LM and of its
    decoder, the module that maps input ids or embeddings to the last hidden state."""

    auto: Any  # transformers' class that makes the whole model from a configuration
    attention: ClassVar[dict[str, str]]  # how the model is to compute attention, where it has any
    modality: str  # what the inputs are: "text" or "image"
    classes: bool  # the head's rows are classes of examples, not tokens
    head: str  # canonical name of the head's matrix, [V, D]
    heads: tuple[str, ...]  # what names start with that a checkpoint of the base model may lack
    base_prefix: str  # of the causal LM: the base model
    decoder_prefix: str  # canonical name prefix of the decoder's parameters
    embedding: str  # of the decoder: the token embedding
    blocks: str  # of the decoder: the list of blocks
    transposed: bool  # matrices are stored [in, out]

    def keep_client(self, decoder: Any, cut: int) -> None:
        """Take out everything after block `cut`."""

    def keep_server(self, decoder: Any, cut: int) -> None:
        """Take out the embeddings and the first `cut` blocks."""

    def renames(self, model: Any) -> Rename:
        """Name in a checkpoint -> in the model, where published checkpoints have other names."""

    def count(self, config: PretrainedConfig) -> int:
        """Number of blocks: the largest cut."""

    def width(self, config: PretrainedConfig, cut: int) -> int:
        """H, the width of the activations at a cut."""

    def enter(
        self, decoder: Any, inputs: Tensor, mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        """Run a client's decoder: inputs, mask [B, S] -> activations [B, S, H]."""

    def proceed(
        self, decoder: Any, activations: Tensor, mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        """Run a server's decoder: activations [B, S, H], mask [B, S] -> what the head gets
        [B, S, D]; of classifiers [B, 1, D]."""

    def run_block(self, block: Any, hidden: Tensor, positional: Any, named: Any) -> Tensor:
        """One block alone: [B, S, H] and the other arguments it is given -> [B, S', H']."""

    def init_std(self, config: PretrainedConfig) -> InitStd:
        """Standard deviation of freshly initialised matrices."""

    def starts_at_one(self, name: str) -> bool:
        """Whether a freshly initialised vector, by canonical name, is ones, not zeros."""
