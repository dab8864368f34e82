"""A ClientSpec for tests: a tiny random model on the bundled data."""

from typing import Any

import torch

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.ledger.new_state import new_state
from hosl_flower.models.base_model import open_base
from hosl_flower.models.split import load_client
from hosl_flower.server.history import History
from hosl_flower.tasks.known import TASKS

_DEFAULTS: dict[str, Any] = {
    "run": "r", "model": "random:opt-tiny", "cut_layer": 1, "dtype": "float32", "device": "cpu",
    "codec": "exact", "update_codec": "exact", "labels": "server", "threads": 1,
    "client_trainable": "blocks", "client_gradient": "backprop", "client_optimizer": "sgd",
    "client_quantization": "none", "client_head": False, "lora_rank": 4,
    "lora_alpha": 16.0, "lora_targets": "q_proj,v_proj", "perturbation": "rank1",
    "task": TASKS["sms-spam"], "source": "bundled:sms_spam", "num_clients": 2,
    "partitioner": "iid", "dirichlet_alpha": 0.5, "partition_column": "", "min_partition_size": 1,
    "train_examples": 50, "held_out_examples": 0, "eval_examples": 20, "batch_size": 3,
    "eval_batch_size": 8, "client_micro_batch": 0,
    "image_size": 0, "max_length": 32, "max_new_tokens": 8, "seed": 0,
    "activation_noise": 0.0, "dp_noise": 0.0, "dp_clip": 0.0,
}  # fmt: skip


def client_spec(**changes: Any) -> ClientSpec:
    """The defaults above with some fields changed."""
    return ClientSpec(**{**_DEFAULTS, **changes})


def history_for(spec: ClientSpec) -> History:
    """The server's record of a run that has not started."""
    base = open_base(spec.model, spec.seed)
    submodel = load_client(base, spec.cut_layer, torch.float32, "cpu", spec.lora)
    return History(new_state(submodel, spec), spec.genesis)
