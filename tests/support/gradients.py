"""Client gradients by two ways, side by side."""

import torch

from hosl_flower.gradients.backprop import gradients
from hosl_flower.models.submodels import trainable_parameters


def both(compute, client, batch, cotangent, trainable="full", micro_batch=0):
    parameters = trainable_parameters(client, trainable)
    exact = dict(gradients(client, parameters, batch, cotangent))
    own = {}
    for name, gradient in compute(client, parameters, batch, cotangent, micro_batch):
        assert name not in own
        own[name] = gradient.to_dense() if gradient.is_sparse else gradient
        assert own[name].dtype == torch.float32
    return own, exact
