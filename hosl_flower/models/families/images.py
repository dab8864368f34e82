"""Families of image classifiers: what splitting one needs to know (see decoders.py).

A feature map [B, C, height, width] is cut as the sequence of its positions, [B, height * width, C],
and a vision transformer's is one already, so that the rest of the library (protocol, ledger,
probes, strategies) has activations [B, S, H] and need not know. All images are square.

Batch norm is frozen: all is run in evaluation mode, with the statistics of the checkpoint, which
nothing updates; its scales and shifts are parameters like others.
"""

import math
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, DynamicCache, PretrainedConfig

from hosl_flower.errors import ConfigError
from hosl_flower.models.families.base import Absent, Family, InitStd, Rename
from hosl_flower.models.families.renames import published_renames


class ImageFamily(Family, Protocol):
    """What data/encoders/images.py asks besides."""

    def image_size(self, config: PretrainedConfig) -> int:
        """Height and width the model is made for, 0 for any. ConfigError where they differ."""

    def sequence(self, config: PretrainedConfig, cut: int, size: int) -> int:
        """S, the positions of the activations at a cut, of images of this height and width."""


class _Classifier:
    auto: Any = AutoModelForImageClassification
    modality = "image"
    classes = True
    heads: tuple[str, ...] = ("classifier.",)
    transposed = False
    embedding = ""  # there are no tokens

    def renames(self, model: Any) -> Rename:
        return str


class _Entered(nn.Module):
    """Server-side stand-in for a vision transformer's embeddings, which is asked its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = self._Projection()

    class _Projection(nn.Module):
        weight = torch.empty(0)  # servers compute in float32

    def forward(self, activations: Tensor, *_: Any, **__: Any) -> Tensor:
        return activations


class Vit(_Classifier):
    """Vision transformers (Dosovitskiy et al. 2021). S is the patches and the class token."""

    attention: ClassVar[dict[str, str]] = {"attn_implementation": "sdpa"}
    head = "classifier.weight"
    base_prefix = "vit"
    decoder_prefix = "vit."
    blocks = "layers"

    def renames(self, model: Any) -> Rename:
        return published_renames(model)

    def count(self, config: PretrainedConfig) -> int:
        return config.num_hidden_layers

    def width(self, config: PretrainedConfig, cut: int) -> int:
        return config.hidden_size

    def image_size(self, config: PretrainedConfig) -> int:
        return _square(config.image_size)

    def sequence(self, config: PretrainedConfig, cut: int, size: int) -> int:
        return (size // _square(config.patch_size)) ** 2 + 1

    def keep_client(self, decoder: Any, cut: int) -> None:
        for index in range(cut, len(decoder.layers)):
            decoder.layers[index] = Absent()
        decoder.layernorm = Absent()

    def keep_server(self, decoder: Any, cut: int) -> None:
        for index in range(cut):
            decoder.layers[index] = Absent()
        decoder.embeddings = _Entered()

    def enter(
        self, decoder: Any, inputs: Tensor, mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        return decoder(pixel_values=inputs).last_hidden_state

    def proceed(
        self, decoder: Any, activations: Tensor, mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        return decoder(pixel_values=activations).last_hidden_state[:, :1]  # the class token's

    def run_block(self, block: Any, hidden: Tensor, positional: Any, named: Any) -> Tensor:
        return block(hidden, *positional, **named)

    def init_std(self, config: PretrainedConfig) -> InitStd:
        return config.initializer_range

    def starts_at_one(self, name: str) -> bool:
        return ".layernorm" in name and name.endswith("weight")


class ResNet(_Classifier):
    """Residual networks (He et al. 2016), cut by stage: a block is a stage, the embeddings are the
    stem. S is the positions of the feature map."""

    attention: ClassVar[dict[str, str]] = {}  # has none
    head = "classifier.1.weight"
    base_prefix = "resnet"
    decoder_prefix = "resnet."
    blocks = "encoder.stages"

    def count(self, config: PretrainedConfig) -> int:
        return len(config.depths)

    def width(self, config: PretrainedConfig, cut: int) -> int:
        return config.hidden_sizes[cut - 1] if cut else config.embedding_size

    def image_size(self, config: PretrainedConfig) -> int:
        return 0

    def sequence(self, config: PretrainedConfig, cut: int, size: int) -> int:
        halved = 2 + max(0, cut - 1) + bool(cut and config.downsample_in_first_stage)
        for _ in range(halved):
            size = -(-size // 2)
        return size**2

    def keep_client(self, decoder: Any, cut: int) -> None:
        for index in range(cut, len(decoder.encoder.stages)):
            decoder.encoder.stages[index] = Absent()
        decoder.pooler = Absent()
        for module in decoder.modules():
            if isinstance(module, nn.ReLU):  # a whole feature map, once and not twice
                module.inplace = True

    def keep_server(self, decoder: Any, cut: int) -> None:
        for index in range(cut):
            decoder.encoder.stages[index] = Absent()
        decoder.embedder = Absent()

    def enter(
        self, decoder: Any, inputs: Tensor, mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        dtype = decoder.embedder.embedder.convolution.weight.dtype
        return _as_sequence(decoder(inputs.to(dtype)).last_hidden_state)

    def proceed(
        self, decoder: Any, activations: Tensor, mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        return decoder(_as_map(activations)).pooler_output.flatten(1).unsqueeze(1)

    def run_block(self, block: Any, hidden: Tensor, positional: Any, named: Any) -> Tensor:
        return _as_sequence(block(_as_map(hidden), *positional, **named))

    def init_std(self, config: PretrainedConfig) -> InitStd:
        """transformers' own: for convolutions that of He et al. 2015."""

        def std(name: str, shape: torch.Size) -> float:
            if len(shape) == 2:
                return 1 / math.sqrt(3 * shape[1])
            return math.sqrt(2 / (shape[0] * math.prod(shape[2:])))

        return std

    def starts_at_one(self, name: str) -> bool:
        return name.endswith(("normalization.weight", "normalization.running_var"))


IMAGE_FAMILIES: dict[str, ImageFamily] = {"resnet": ResNet(), "vit": Vit()}


def _square(size: Any) -> int:
    """The one number of a size that is one number, or the same two."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise ConfigError(f"images and patches must be square, this model's are {list(size)}")
    return sides.pop()


def _as_sequence(features: Tensor) -> Tensor:
    """[B, C, height, width] -> [B, height * width, C]."""
    return features.flatten(2).transpose(1, 2).contiguous()


def _as_map(sequence: Tensor) -> Tensor:
    """[B, S, C] -> [B, C, sqrt(S), sqrt(S)]."""
    side = math.isqrt(sequence.shape[1])
    return sequence.transpose(1, 2).contiguous().unflatten(2, (side, side))
