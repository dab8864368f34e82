"""Cutting a transformers model into a client submodel and a server submodel.

    client: token ids [B, S]        -> embeddings, blocks 1..cut  -> activations [B, S, H]
    server: activations [B, S, H]   -> blocks cut+1..n, norm, head -> logits

Of a classifier the head's rows are the classes, and there is one position left of the sequence. Of
images the inputs are pixels [B, C, height, width], and S is the number of positions of the feature
map (or of patches): models/families/images.py; models/families/encoders.py.

Each side reads only its own tensors. Many models tie the LM head to the token embedding;
a split breaks that tie: the SERVER OWNS ITS OWN COPY of the head, the client owns the
embedding, and once both train they differ. A merged model is saved untied (save_merged.py).
"""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from hosl_flower.errors import ConfigError
from hosl_flower.models.base_model import Base, model_skeleton
from hosl_flower.models.families.base import HEAD
from hosl_flower.models.families.registry import embedding_name
from hosl_flower.models.int8_weights import is_quantised, place, to_int8
from hosl_flower.models.lora import Lora, attach, is_adapter
from hosl_flower.models.submodels import ClientSubmodel, ServerSubmodel, Submodel


def client_skeleton(config: PretrainedConfig, cut: int, lora: Lora | None = None) -> ClientSubmodel:
    """The client submodel on the meta device: names and shapes, no memory."""
    _, decoder, family = model_skeleton(config, cut, lora)
    family.keep_client(decoder, cut)
    if lora is not None:
        attach(decoder, lora, "client")
    return ClientSubmodel(decoder, family, lora)


def server_skeleton(config: PretrainedConfig, cut: int, lora: Lora | None = None) -> ServerSubmodel:
    """The server submodel on the meta device, with a head of its own."""
    model, decoder, family = model_skeleton(config, cut, lora)
    head: Any = model.get_submodule(family.head.rpartition(".")[0])
    family.keep_server(decoder, cut)
    if lora is not None:
        attach(decoder, lora, "server")
    with torch.device("meta"):  # a fresh parameter: the old one may be the embedding's
        own = torch.empty(head.weight.shape)
        head.weight = nn.Parameter(own, requires_grad=lora is None)
    return ServerSubmodel(decoder, head, family, lora)


def load_client(
    base: Base,
    cut: int,
    dtype: torch.dtype,
    device: str,
    lora: Lora | None = None,
    quantization: str = "none",
) -> ClientSubmodel:
    """The client submodel with its tensors, and no other's, on `device`; fresh adapters.

    quantization: "int8" keeps the frozen matrices in 8 bits (int8_weights.py).
    """
    submodel = client_skeleton(base.config, cut, lora)
    fill(submodel, base, dtype, device, quantization)
    return submodel


def load_server(
    base: Base, cut: int, dtype: torch.dtype, device: str, lora: Lora | None = None
) -> ServerSubmodel:
    """The server submodel with its tensors, and no other's, on `device`; fresh adapters."""
    submodel = server_skeleton(base.config, cut, lora)
    fill(submodel, base, dtype, device)
    return submodel


def fill(
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
