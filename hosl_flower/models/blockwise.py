"""A client submodel run one block at a time, as transformers runs it.

Masks and positions are transformers' own: the decoder is run with something in the place of each
block that notes what the block would be given.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from hosl_flower.models.batch import Batch
from hosl_flower.models.families.base import Absent
from hosl_flower.models.submodels import ClientSubmodel

_PIECE_TOKENS = 2048  # what a block makes of them is small beside the weights


class Arguments(NamedTuple):
    """What a block is given beside the hidden state."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class _Notes(Absent):
    """In the place of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments = Arguments((), {})

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.arguments = Arguments(args, kwargs)
        return hidden


def pieces(batch: Batch, micro_batch: int, tokens: int = _PIECE_TOKENS) -> list[slice]:
    """Rows of the sequences that are run at a time: micro_batch of them or, where that is 0, so
    many as have about this number of tokens. A block's gradient is summed over all of them before
    it is used, so that their size changes memory and nothing else."""
    return batch.slices(micro_batch or max(1, tokens // batch.attention_mask.shape[1]))


class Blocks(Sequence[nn.Module]):
    """The blocks a client holds, in order."""

    def __init__(self, submodel: ClientSubmodel):
        self.submodel = submodel
        self._list = submodel.family.blocks
        decoder: Any = submodel.decoder
        self._all = decoder.get_submodule(self._list)
        self._own: list[Any] = [block for block in self._all if not isinstance(block, Absent)]

    def __len__(self) -> int:
        return len(self._own)

    def __getitem__(self, index: Any) -> Any:
        return self._own[index]

    def parameters(self, index: int) -> Iterator[tuple[str, nn.Parameter]]:
        """A block's parameters, by canonical name."""
        for name, parameter in self._own[index].named_parameters():
            yield self.submodel.canonical(f"decoder.{self._list}.{index}.{name}"), parameter

    def enter(self, inputs: Tensor, mask: Tensor) -> tuple[Tensor, list[Arguments]]:
        """inputs, mask [b, S] -> embeddings [b, S, H], and each block's other arguments."""
        notes = [_Notes() for _ in self._all]
        self.submodel.decoder.set_submodule(self._list, nn.ModuleList(notes))
        try:
            hidden = self.submodel(inputs, mask)
        finally:
            self.submodel.decoder.set_submodule(self._list, self._all)
        return hidden, [note.arguments for note in notes]

    def run(self, index: int, hidden: Tensor, arguments: Sequence[Arguments]) -> Tensor:
        """The output [b, S, H] of one block."""
        positional, named = arguments[index]
        return self.submodel.family.run_block(self._own[index], hidden, positional, named)
