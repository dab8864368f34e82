"""Giving a skeleton, whose tensors are all on the meta device, its values."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hosl_flower.errors import ConfigError
from hosl_flower.models.families.decoders import HEAD, embedding_name
from hosl_flower.models.int8_weights import is_quantised, place, to_int8
from hosl_flower.models.lora import is_adapter

if TYPE_CHECKING:
    from hosl_flower.models.split import Base, Submodel
else:
    Base = Submodel = Any


def materialise(
    submodel: Submodel, base: Base, dtype: torch.dtype, device: str, quantization: str = "none"
) -> None:
    """Fill a skeleton tensor by tensor, straight into the final dtype and device.

    ConfigError for 8 bits in a family without linear modules.
    """
    if quantization != "none" and submodel.family.transposed:
        raise ConfigError(
            f"client-quantization = {quantization} is not for {base.config.model_type}, whose "
            "matrices are no linear modules"
        )
    fill_buffers(submodel.decoder, device)
    stored = submodel.stored_buffers().keys()
    for name, buffer in list(submodel.named_buffers()):
        wanted = submodel.canonical(name)
        if wanted in stored and buffer.is_floating_point():  # no count of batches seen
            owner, _, attribute = name.rpartition(".")
            value = torch.empty(buffer.shape, dtype=dtype, device=device)
            base.source.fill(wanted, value)
            setattr(submodel.get_submodule(owner), attribute, value)
    for name, empty in list(submodel.named_parameters()):
        wanted = submodel.canonical(name)
        owner, _, attribute = name.rpartition(".")
        module = submodel.get_submodule(owner)
        if submodel.lora is not None and is_adapter(wanted):
            value = submodel.lora.start(wanted, empty.shape).to(device)
        else:
            # A tied head is usually not stored: it is the embedding.
            tied = wanted == HEAD and HEAD not in base.source and base.config.tie_word_embeddings
            source = embedding_name(base.config) if tied else wanted
            if quantization == "int8" and is_quantised(module, attribute):
                whole = torch.empty(empty.shape, dtype=dtype)  # one matrix, on the CPU
                base.source.fill(source, whole)
                codes = to_int8(whole, dtype, device)
                place(submodel, owner, nn.Parameter(codes, requires_grad=False))
                continue
            value = torch.empty(empty.shape, dtype=dtype, device=device)
            base.source.fill(source, value)
        parameter = nn.Parameter(value, requires_grad=empty.requires_grad)  # frozen under LoRA
        setattr(module, attribute, parameter)


def fill_buffers(decoder: nn.Module, device: str) -> None:
    """What no checkpoint holds, such as the frequencies of rotary positions, in float32. It is
    transformers that computes it, as when it loads a model itself, so the parameters must
    still be on the meta device, where its initial values for them go nowhere."""
    whole: Any = decoder
    for module in decoder.modules():
        buffers = {n: b for n, b in module.named_buffers(recurse=False) if b.is_meta}
        if not buffers:
            continue
        for name, buffer in buffers.items():  # computed on the CPU: the same bits everywhere
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        whole._init_weights(module)
        for name in buffers:
            setattr(module, name, getattr(module, name).to(device))
