"""The client half at ledger position 0, made the same way on both sides."""

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.gradients.exact import check_exact
from hosl_flower.gradients.residual import fed_back
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.models.auxiliary_head import attach_head
from hosl_flower.models.base_model import Base
from hosl_flower.models.split import load_client
from hosl_flower.models.submodels import ClientSubmodel, trainable_parameters
from hosl_flower.tasks.scoring import Scoring
from hosl_flower.tensors.device import torch_dtype


def load_client_half(
    base: Base, spec: ClientSpec, answers: Scoring, device: str = "cpu", quantization: str = "none"
) -> ClientSubmodel:
    """The client submodel with the base model's weights, and with a head where the run has one.

    Args:
        answers: how the task is scored: of which tokens an auxiliary head has rows.
        quantization: of frozen matrices; clients alone keep them in fewer bits.
    """
    dtype = torch_dtype(spec.dtype)
    submodel = load_client(base, spec.cut_layer, dtype, device, spec.lora, quantization)
    if spec.client_head:
        attach_head(submodel, base, answers, device)
    return submodel


def new_state(submodel: ClientSubmodel, spec: ClientSpec) -> ClientState:
    """The state of a freshly loaded client submodel: ledger position 0. ConfigError where its
    parameters cannot be trained as the run says."""
    parameters = trainable_parameters(submodel, spec.client_trainable)
    if spec.client_gradient == "residual":
        parameters = {name: parameters[name] for name in fed_back(submodel, parameters)}
    elif spec.client_gradient == "exact":
        check_exact(submodel, parameters)
    return ClientState(parameters, spec.perturbation, spec.client_optimizer, spec.genesis)
