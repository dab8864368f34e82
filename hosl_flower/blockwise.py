"""A client submodel run one block at a time, as transformers runs it.

Masks and positions are transformers' own: the decoder is entered, and left again when it calls
its first block, whose arguments are then used for every block.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hosl_flower.families import Absent
from hosl_flower.split import ClientSubmodel
from hosl_flower.tasks import Batch

_PIECE_TOKENS = 2048  # what a block makes of them is small beside the weights


class _Entered(Exception):
    """The first block is about to be called; not an error."""


def pieces(batch: Batch, micro_batch: int) -> list[slice]:
    """Rows of the sequences that are run at a time: micro_batch of them or, where that is 0, some
    thousand tokens. A block's gradient is summed over all of them before it is used, so that their
    size changes memory and nothing else."""
    return batch.slices(micro_batch or max(1, _PIECE_TOKENS // batch.input_ids.shape[1]))


class Blocks(Sequence[nn.Module]):
    """The blocks a client holds, in order."""

    def __init__(self, submodel: ClientSubmodel):
        self.submodel = submodel
        decoder: Any = submodel.decoder
        self._decoder = decoder
        self._own = [block for block in decoder.layers if not isinstance(block, Absent)]

    def __len__(self) -> int:
        return len(self._own)

    def __getitem__(self, index: Any) -> Any:
        return self._own[index]

    def parameters(self, index: int) -> Iterator[tuple[str, nn.Parameter]]:
        """A block's parameters, by canonical name."""
        for name, parameter in self._own[index].named_parameters():
            yield self.submodel.canonical(f"decoder.layers.{index}.{name}"), parameter

    def enter(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """ids, mask [b, S] -> what the first block is given: embeddings [b, S, H], and the other
        arguments, which are every block's."""

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Entered(args[0], kwargs)

        hook = self._decoder.layers[0].register_forward_pre_hook(leave, with_kwargs=True)
        try:
            self._decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        except _Entered as entered:
            hidden, arguments = entered.args
            return hidden, arguments
        finally:
            hook.remove()
        raise RuntimeError("the decoder has not called its first block")

    def run(self, index: int, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """The output [b, S, H] of one block."""
        output = self._own[index](hidden, **arguments)
        return output[0] if isinstance(output, tuple) else output
