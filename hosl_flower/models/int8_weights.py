"""A frozen client base in 8 bits, through torchao; what is trained over it stays float32.

    W ~ diag(scale) Q,  Q int8 [out, in], one float32 scale per row, symmetric

Linear maps and token embeddings are quantised, a quarter of their float32 bytes; norms, biases and
position embeddings, which are small, are not. A linear map widens one matrix at a time while
it is used, an embedding the rows it looks up. Nothing here is written after loading, so adapters
train and replay over it bit for bit.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hosl_flower.errors import RefusedError

_ROWS_ELEMENTS = 1 << 20  # widened at a time while a matrix is quantised


class _Int8Embedding(nn.Module):
    """Looks up rows, then widens them; torchao's own lookup would widen the whole matrix."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> rows [..., columns] in the dtype of the client."""
        rows: Any = self.weight[ids.reshape(-1)]
        return rows.dequantize().view(*ids.shape, -1)


def is_quantised(module: nn.Module, attribute: str) -> bool:
    """Whether this parameter of a module is one of those kept in 8 bits."""
    return attribute == "weight" and (isinstance(module, nn.Linear) or type(module) is nn.Embedding)


def to_int8(value: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """A matrix [out, in] in 8 bits on `device`, acting as one of `dtype`; some rows at a time, so
    that it never exists in floating point there. RefusedError when torchao is not installed."""
    try:
        from torchao.quantization import Int8Tensor, PerRow  # optional, and slow to import
    except ImportError as error:
        raise RefusedError(
            "client-quantization = int8 needs torchao on the client; "
            "install it with: pip install 'hosl-flower[quant]'"
        ) from error
    codes = torch.empty(value.shape, dtype=torch.int8, device=device)
    scales = torch.empty((value.shape[0], 1), device=device)
    step = max(1, _ROWS_ELEMENTS // value.shape[1])
    for start in range(0, value.shape[0], step):
        rows = slice(start, start + step)
        piece = Int8Tensor.from_hp(value[rows].to(device, dtype), PerRow())
        codes[rows], scales[rows] = piece.qdata, piece.scale
    return Int8Tensor(codes, scales, [1, value.shape[1]], dtype)


def dequantised(weight: Tensor) -> Tensor:
    """A matrix as plain numbers: a new one where it is kept in 8 bits, else itself."""
    packed: Any = weight
    return packed.dequantize() if is_traceable_wrapper_subclass(weight) else weight


def place(submodel: nn.Module, owner: str, weight: nn.Parameter) -> None:
    """Make an 8-bit weight that of the module called `owner`."""
    module = submodel.get_submodule(owner)
    if isinstance(module, nn.Embedding):
        submodel.set_submodule(owner, _Int8Embedding(weight))
    else:
        module.weight = weight
