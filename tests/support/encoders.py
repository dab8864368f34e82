"""Tiny encoders of every family, whole and in two halves."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from hosl_flower.models.architectures import TEXT_ARCHITECTURES
from hosl_flower.models.base_model import open_base
from hosl_flower.models.split import load_client, load_server

TINY = [name for name in TEXT_ARCHITECTURES if name.endswith("-tiny")]


PAD = 1


FULL = torch.ones(3, 24, dtype=torch.int64)


PADDED = FULL.clone()


PADDED[0, :4] = 0


PADDED[2, :21] = 0


IDS = torch.randint(3, 64, FULL.shape, generator=torch.Generator().manual_seed(0))


TYPES = (torch.arange(24) > 22).long().expand(3, -1)


def left_padded(mask):
    return torch.where(mask.bool(), IDS, PAD)


def right_padded(rows, mask, fill=0):
    """The same rows as transformers' tokenizers pad them."""
    out = torch.full_like(rows, fill)
    for own, row, used in zip(out, rows, mask.bool(), strict=True):
        own[: int(used.sum())] = row[used]
    return out


@torch.no_grad()
def whole_logits(model, mask, typed=False):
    types = {"token_type_ids": right_padded(TYPES, mask)} if typed else {}
    ids = right_padded(IDS, mask, PAD)
    return model(ids, attention_mask=right_padded(mask, mask), **types).logits


@torch.no_grad()
def split_logits(client, server, mask, typed=False):
    inputs = torch.stack([left_padded(mask), TYPES], 1) if typed else left_padded(mask)
    return server(client(inputs, mask), mask.bool())[:, 0]


@pytest.fixture
def saved(tmp_path):
    """saved(architecture) -> directory and model with 5 classes; no norm and no bias is without
    effect."""

    def make(name):
        settings = {**TEXT_ARCHITECTURES[name], "vocab_size": 64, "num_labels": 5}
        with torch.random.fork_rng():  # transformers draws from torch's own generator
            torch.manual_seed(0)
            config = AutoConfig.for_model(**settings)
            model = AutoModelForSequenceClassification.from_config(config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        directory = tmp_path / name
        model.save_pretrained(directory)
        return directory, model

    return make


def halves(directory, cut, lora=None, dtype=torch.float32):
    base = open_base(str(directory))
    client = load_client(base, cut, dtype, "cpu", lora)
    return client, load_server(base, cut, torch.float32, "cpu", lora)
