"""Back-propagation on the client: what split learning with first-order clients does (SplitFed,
Thapa et al. 2022), and what the zeroth-order clients are compared with."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hosl_flower.models.batch import Batch
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.tensors.cut_gradient import Cotangent


def gradients(
    submodel: ClientSubmodel,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    cotangent: Cotangent,
    micro_batch: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """(name, gradient) of <lambda, f_c(x)>, lambda the loss gradient at the cut: the chain rule.

    float32, in the parameter's shape, summed over `micro_batch` sequences at a time (0: the whole
    batch). The forward pass is run again, with its graph.
    """
    wanted = list(parameters.values())
    sums: list[Tensor] | None = None
    for rows in batch.slices(micro_batch):
        device = cotangent.payload.device
        with torch.enable_grad():
            h = submodel(batch.inputs[rows].to(device), batch.attention_mask[rows].to(device))
        own = torch.autograd.grad(
            h, wanted, cotangent.dense(rows).to(h.dtype), allow_unused=True, materialize_grads=True
        )
        del h
        if sums is None:
            sums = [gradient.float() for gradient in own]
        else:
            for total, gradient in zip(sums, own, strict=True):
                total.add_(gradient)
    yield from zip(parameters, sums or [], strict=True)
