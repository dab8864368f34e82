"""The two halves of a model, and what of them is trained."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from hosl_flower.models.families.base import Absent, Family
from hosl_flower.models.lora import Lora, is_adapter, merged
from hosl_flower.models.lora import canonical as lora_canonical

_HEAD = "lm_head."  # what own names of the head start with


AUXILIARY = "head."  # what names of a client's auxiliary head start with (auxiliary_head.py)


class Submodel(nn.Module):
    """One side of the split. Dropout is off on both sides, always: the probes of one step and
    the server's gradient must see the same function."""

    def __init__(self, decoder: nn.Module, family: Family, lora: Lora | None = None):
        super().__init__()
        self.decoder = decoder
        self.lora = lora
        self.family = family
        self.eval()

    def canonical(self, name: str) -> str:
        """Own parameter name -> name in the unsplit model's state dict, or of an adapter."""
        name = lora_canonical(name)
        if name.startswith(_HEAD):
            return f"{self.family.head.rpartition('.')[0]}.{name[len(_HEAD) :]}"
        return f"{self.family.decoder_prefix}{name[8:]}" if name.startswith("decoder.") else name

    def canonical_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter of this side by its name in the unsplit model, sorted by name."""
        return dict(sorted((self.canonical(n), p) for n, p in self.named_parameters()))

    def merged_parameters(self) -> dict[str, Tensor]:
        """As canonical_parameters, with LoRA adapters folded into the weights they adapt, and with
        the buffers that a checkpoint holds (batch norm's statistics, which nothing updates)."""
        tensors = merged(self.canonical_parameters(), self.lora, self.family.transposed)
        return {**tensors, **self.stored_buffers()}

    def stored_buffers(self) -> dict[str, Tensor]:
        """Buffers that are part of the model's state dict, by canonical name."""
        stored = self.state_dict().keys()
        return {self.canonical(n): b for n, b in self.named_buffers() if n in stored}


class ClientSubmodel(Submodel):
    """Embeddings and the first `cut` blocks; an auxiliary head where the method has one."""

    def __init__(self, decoder: nn.Module, family: Family, lora: Lora | None = None):
        super().__init__(decoder, family, lora)
        self.head: nn.Module | None = None

    @property
    def hidden_size(self) -> int:
        """H, the width of the activations."""
        decoder: Any = self.decoder
        blocks: Any = decoder.get_submodule(self.family.blocks)
        return self.family.width(decoder.config, sum(type(b) is not Absent for b in blocks))

    def merged_parameters(self) -> dict[str, Tensor]:
        """As the base's; the auxiliary head is no part of the model."""
        tensors = super().merged_parameters()
        return {name: t for name, t in tensors.items() if not name.startswith(AUXILIARY)}

    def forward(
        self, inputs: Tensor, attention_mask: Tensor, cache: DynamicCache | None = None
    ) -> Tensor:
        """ids [B, S] int64 or pixels [B, C, height, width], mask [B, S] (1 = token) -> activations
        [B, S, H].

        With a cache (export/generate.py), which grows by the S tokens, the mask is of the P tokens
        in it too: [B, P + S].
        """
        return self.family.enter(self.decoder, inputs, attention_mask, cache)


class ServerSubmodel(Submodel):
    """The blocks after the cut, final norm and LM head."""

    def __init__(
        self, decoder: nn.Module, head: nn.Linear, family: Family, lora: Lora | None = None
    ):
        super().__init__(decoder, family, lora)
        self.lm_head = head

    def hidden(
        self, activations: Tensor, attention_mask: Tensor, cache: DynamicCache | None = None
    ) -> Tensor:
        """activations [B, S, H], mask [B, S] -> last hidden state [B, S, D], of images [B, 1, D]; a
        cache as above."""
        return self.family.proceed(self.decoder, activations, attention_mask, cache)

    def forward(self, activations: Tensor, attention_mask: Tensor) -> Tensor:
        """activations [B, S, H], mask [B, S] -> logits [B, S, V], of images [B, 1, V]."""
        return self.lm_head(self.hidden(activations, attention_mask))

    def answer_logits(self, activations: Tensor, attention_mask: Tensor, rows: Tensor) -> Tensor:
        """Logits [B, C] of C head rows [C, D] at the last position only.

        Inputs are left-padded, so the last position is where the answer starts. Nothing of
        the size of the vocabulary is computed.
        """
        return F.linear(self.hidden(activations, attention_mask)[:, -1], rows, self.lm_head.bias)


def trainable_parameters(submodel: Submodel, trainable: str) -> dict[str, nn.Parameter]:
    """The parameters of a side that are trained, by canonical name, in name order.

    trainable: "full" (all of it, as in HOSL), "blocks" (embeddings, final norm and head
    frozen, which on a client of OPT-125M cut at 5 leaves half the dimensions to estimate) or
    "lora" (adapters only). A client's auxiliary head is always trained.
    """
    parameters = submodel.canonical_parameters()
    if trainable == "full":
        return parameters
    if trainable == "lora":
        return {n: p for n, p in parameters.items() if is_adapter(n) or n.startswith(AUXILIARY)}
    kept = (f"{submodel.family.decoder_prefix}{submodel.family.blocks}.", AUXILIARY)
    return {n: p for n, p in parameters.items() if n.startswith(kept)}


def count(parameters: Mapping[str, Tensor]) -> int:
    """Number of elements."""
    return sum(parameter.numel() for parameter in parameters.values())
