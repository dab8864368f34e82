"""Back-propagation on the client: what split learning with first-order clients does (SplitFed,
Thapa et al. 2022), and what the zeroth-order clients are compared with."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hosl_flower.split import ClientSubmodel
from hosl_flower.surrogate import Cotangent
from hosl_flower.tasks import Batch


def gradients(
    submodel: ClientSubmodel,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    cotangent: Cotangent,
    micro_batch: int = 0,
) -> dict[str, Tensor]:
    """Gradients of <lambda, f_c(x)>, lambda the loss gradient at the cut: the chain rule.

    By parameter name, float32, in the parameter's shape, summed over `micro_batch` sequences at a
    time (0: the whole batch). The forward pass is run again, with its graph.
    """
    wanted = list(parameters.values())
    sums: list[Tensor] | None = None
    size = micro_batch or len(batch.input_ids)
    for first in range(0, len(batch.input_ids), size):
        rows = slice(first, first + size)
        device = cotangent.payload.device
        with torch.enable_grad():
            h = submodel(batch.input_ids[rows].to(device), batch.attention_mask[rows].to(device))
        own = torch.autograd.grad(
            h, wanted, cotangent.dense(rows).to(h.dtype), allow_unused=True, materialize_grads=True
        )
        del h
        if sums is None:
            sums = [gradient.float() for gradient in own]
        else:
            for total, gradient in zip(sums, own, strict=True):
                total.add_(gradient)
    return dict(zip(parameters, sums or [], strict=True))


def flat(gradients: Mapping[str, Tensor], names: Mapping[str, nn.Parameter]) -> Tensor:
    """One vector [n] on the CPU, in the order of `names`."""
    return torch.cat([gradients[name].reshape(-1).cpu() for name in names])


def unflat(vector: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The inverse of `flat`."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    parts = vector.split(sizes)
    return {
        name: part.view(parameter.shape)
        for (name, parameter), part in zip(parameters.items(), parts, strict=True)
    }
