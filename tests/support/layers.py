"""A module with every kind of layer."""

import torch
import torch.nn.functional as F
from torch import nn

from hosl_flower.zo.directions import Layout


class EveryUse(nn.Module):
    """Parameters used as a linear map, a lookup, a norm, a convolution, and by hand."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.linear = nn.Linear(12, 16)
        self.no_bias = nn.Linear(16, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.by_hand = nn.Parameter(torch.empty(6, 4))
        self.scale = nn.Parameter(torch.empty(4))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, ids):
        x = self.norm(self.no_bias(F.relu(self.linear(self.embed(ids)))))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return torch.cat([torch.matmul(x, self.by_hand), x[..., :4]], dim=-1)[..., :4] * self.scale


def named(module):
    return dict(module.named_parameters())


def layout_of(module, distribution):
    return Layout({n: p.shape for n, p in module.named_parameters()}, distribution)
