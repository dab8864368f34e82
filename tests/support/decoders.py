"""Tiny decoders of every family, whole and in two halves."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hosl_flower.models.architectures import ARCHITECTURES
from hosl_flower.models.base_model import open_base
from hosl_flower.models.families.registry import family_of
from hosl_flower.models.split import load_client, load_server

TINY = [name for name in ARCHITECTURES if name.endswith("-tiny")]


IDS = torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(0))


FULL = torch.ones_like(IDS)


PADDED = FULL.clone()


PADDED[0, :4] = 0


PADDED[2, :21] = 0


@pytest.fixture
def saved(tmp_path):
    """saved(architecture) -> directory and model, every tensor normal with std 0.3
    beside its start, so that no norm and no bias is without effect."""

    def make(name):
        settings = {**ARCHITECTURES[name], "vocab_size": 64}
        with torch.random.fork_rng():  # transformers draws from torch's own generator
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        directory = tmp_path / name
        model.save_pretrained(directory)
        return directory, model

    return make


def halves(directory, cut, lora=None):
    base = open_base(str(directory))
    client = load_client(base, cut, torch.float32, "cpu", lora)
    return client, load_server(base, cut, torch.float32, "cpu", lora)


def whole_logits(model, mask):
    positions = family_of(model.config).positions(mask)
    with torch.no_grad():
        return model(IDS, attention_mask=mask, **positions).logits
