"""Cutting a transformers model into a client submodel and a server submodel.

    client: token ids [B, S]        -> embeddings, blocks 1..cut  -> activations [B, S, H]
    server: activations [B, S, H]   -> blocks cut+1..n, norm, head -> logits

Of a classifier the head's rows are the classes, and there is one position left of the sequence. Of
images the inputs are pixels [B, C, height, width], and S is the number of positions of the feature
map (or of patches): image_families.py; text_families.py.

Each side reads only its own tensors. Many models tie the LM head to the token embedding;
a split breaks that tie: the SERVER OWNS ITS OWN COPY of the head, the client owns the
embedding, and once both train they differ. A merged model is saved untied (merge.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, PretrainedConfig

from hosl_flower.errors import CheckpointError, ConfigError, first_line
from hosl_flower.models.architectures import architecture
from hosl_flower.models.checkpoints import hub
from hosl_flower.models.checkpoints.adapters import AdaptedWeights, base_of, find_adapters
from hosl_flower.models.checkpoints.model_kind import (
    check_head,
    check_plain,
    not_a_config,
    without_config,
)
from hosl_flower.models.checkpoints.source import Checkpoint, RandomWeights, WeightSource
from hosl_flower.models.families.decoders import FAMILIES, HEAD, Absent, Family, family_of
from hosl_flower.models.lora import Lora, attach, check_targets, is_adapter, merged
from hosl_flower.models.lora import canonical as lora_canonical
from hosl_flower.models.materialise import materialise

_HEAD = "lm_head."  # what own names of the head start with
AUXILIARY = "head."  # what names of a client's auxiliary head start with (head.py)
RANDOM = "random:"


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

        With a cache (generate.py), which grows by the S tokens, the mask is of the P tokens in it
        too: [B, P + S].
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


@dataclass(frozen=True)
class Base:
    """The model before fine-tuning: its configuration and where its tensors come from."""

    model: str
    config: PretrainedConfig
    source: WeightSource
    pretrained: bool

    @property
    def blocks(self) -> int:
        """Number of blocks: the largest possible cut layer."""
        return self.family.count(self.config)

    @property
    def family(self) -> Family:
        """The adapter of the model's kind."""
        return family_of(self.config)


def open_base(model: str, seed: int = 0, partial: bool = False) -> Base:
    """Open a model: a directory, a hub id, of a model or of LoRA adapters, or
    `random:<architecture>`; reads headers only.

    seed: of the weights of `random:` models. partial: download no more of a hub model than the
    tensors that are then asked for. Raises CheckpointError or ConfigError.
    """
    config = model_config(model)
    family = family_of(config)
    if model.startswith(RANDOM):
        ones = family.starts_at_one
        # a language model's head is tied to its embedding
        source = RandomWeights(seed, family.init_std(config), ones, absent={HEAD})
        return Base(model, config, source, pretrained=False)
    whole, _, _ = _skeleton(config, 0)  # an impossible configuration is refused here, not midway
    names = family.heads, family.renames(whole)
    checkpoint = Checkpoint(base_of(model), family.base_prefix, family.blocks, partial, *names)
    if checkpoint.blocks() > family.count(config):
        raise CheckpointError(
            f"{model}: config.json says {family.count(config)} blocks, the weights have "
            f"{checkpoint.blocks()}; they do not belong together"
        )
    adapters = find_adapters(model)
    if adapters is None:
        return Base(model, config, checkpoint, pretrained=True)
    weights = AdaptedWeights(checkpoint, adapters, family.transposed)
    return Base(model, config, weights, pretrained=True)


def model_config(model: str) -> PretrainedConfig:
    """The configuration of a model as `open_base` takes it."""
    if model.startswith(RANDOM):
        return architecture(model.removeprefix(RANDOM))
    return load_model_config(model)


def load_model_config(model: str) -> PretrainedConfig:
    """config.json of a directory or hub id, or of the base model of adapters; CheckpointError when
    there is none."""
    model = base_of(model)
    path = hub.locate(model, "config.json")
    if path is None:
        raise CheckpointError(f"{model} has no config.json: {without_config(model)}")
    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a damaged configuration
        reason = not_a_config(path) or f"{path} cannot be used: {first_line(error)}"
        raise CheckpointError(reason) from error
    check_plain(config, model)
    if config.model_type in FAMILIES:
        check_head(config, model)
        _forget_padding(config)
    return config


def _forget_padding(config: PretrainedConfig) -> None:
    """Where the padding token has no row of the embedding, which torch would refuse, the model has
    none: what is padding, masks say."""
    padding = getattr(config, "pad_token_id", None)
    if padding is not None and not 0 <= padding < config.vocab_size:
        config.pad_token_id = None


def check_cut(config: PretrainedConfig, cut: int) -> None:
    """ConfigError unless 0 <= cut <= number of blocks."""
    blocks = family_of(config).count(config)
    if not 0 <= cut <= blocks:
        raise ConfigError(
            f"cut-layer = {cut} is outside 0..{blocks}, the number of blocks of this model"
        )


def _skeleton(
    config: PretrainedConfig, cut: int, lora: Lora | None = None
) -> tuple[nn.Module, nn.Module, Family]:
    """(whole model, its decoder, family) without memory: every tensor on the meta device."""
    check_cut(config, cut)
    family = family_of(config)
    try:
        with torch.device("meta"):
            model = family.auto.from_config(config, **family.attention)
    except (ValueError, RuntimeError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(
            f"{config.name_or_path}: config.json describes no possible {config.model_type} "
            f"model: {first_line(error)}"
        ) from error
    decoder = model.get_submodule(family.decoder_prefix.rstrip("."))
    if lora is not None:
        check_targets(decoder, lora)
    return model, decoder, family


def client_skeleton(config: PretrainedConfig, cut: int, lora: Lora | None = None) -> ClientSubmodel:
    """The client submodel on the meta device: names and shapes, no memory."""
    _, decoder, family = _skeleton(config, cut, lora)
    family.keep_client(decoder, cut)
    if lora is not None:
        attach(decoder, lora, "client")
    return ClientSubmodel(decoder, family, lora)


def server_skeleton(config: PretrainedConfig, cut: int, lora: Lora | None = None) -> ServerSubmodel:
    """The server submodel on the meta device, with a head of its own."""
    model, decoder, family = _skeleton(config, cut, lora)
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

    quantization: "int8" keeps the frozen matrices in 8 bits (quantize.py).
    """
    submodel = client_skeleton(base.config, cut, lora)
    materialise(submodel, base, dtype, device, quantization)
    return submodel


def load_server(
    base: Base, cut: int, dtype: torch.dtype, device: str, lora: Lora | None = None
) -> ServerSubmodel:
    """The server submodel with its tensors, and no other's, on `device`; fresh adapters."""
    submodel = server_skeleton(base.config, cut, lora)
    materialise(submodel, base, dtype, device)
    return submodel


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
