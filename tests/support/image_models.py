"""Tiny models of images."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from hosl_flower.models.architectures import IMAGE_ARCHITECTURES

SIZE = 16


PIXELS = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


VARIANTS = {
    "vit": IMAGE_ARCHITECTURES["vit-tiny"],
    "resnet": IMAGE_ARCHITECTURES["resnet-tiny"],
    "resnet-bottleneck": {**IMAGE_ARCHITECTURES["resnet-tiny"], "layer_type": "bottleneck"},
    "resnet-early": {**IMAGE_ARCHITECTURES["resnet-tiny"], "downsample_in_first_stage": True},
}


@pytest.fixture
def saved(tmp_path):
    """saved(variant) -> directory and model with 5 classes; no norm, bias or running statistic is
    without effect."""

    def make(name):
        config = AutoConfig.for_model(**{**VARIANTS[name], "num_labels": 5})
        model = AutoModelForImageClassification.from_config(config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.add_(torch.rand(buffer.shape, generator=generator))
        directory = tmp_path / name
        model.save_pretrained(directory)
        return directory, model

    return make
