"""LoRA adapters on one side of the split, through peft (Hu et al. 2021).

    W x  ->  W x + alpha / r * B A x,   A [r, in], B [out, r], only A and B are trained

Adapters are float32 whatever the dtype of the weights they adapt. They start the same on
every machine: A from its own generator, B zero, so at first nothing changes.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hosl_flower.errors import ConfigError, ModelError, first_line
from hosl_flower.system.whole_files import made_whole, put, save_tensors
from hosl_flower.tensors.seeds import derive_seed

_NAME = re.compile(r"\.(lora_[AB])\.default\.")
_ADAPTER = re.compile(r"\.lora_[AB]\.weight$")
_PEFT = "base_model.model."  # what peft's names in a file start with
_LINEAR = (nn.Linear, Conv1D)  # GPT-2's, which stores [in, out]


@dataclass(frozen=True)
class Lora:
    """rank: r. targets: names of the linear modules that get adapters. seed: of A."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int

    def start(self, name: str, shape: torch.Size) -> Tensor:
        """Fresh float32 values of an adapter, by canonical name: A uniform in +-1/sqrt(in), as
        peft draws it, B zero. numpy's uniform float32 is the same on every machine."""
        if ".lora_B." in name:
            return torch.zeros(shape)
        generator = numpy.random.default_rng(derive_seed(self.seed, "lora", name))
        uniform = torch.from_numpy(generator.random(tuple(shape), dtype=numpy.float32))
        return uniform.mul_(2).sub_(1).div_(math.sqrt(shape[1]))


def check_targets(decoder: nn.Module, lora: Lora) -> None:
    """ConfigError unless every target names linear modules, and only such, of the whole decoder.

    Before the decoder is cut, so that a module of one side only, such as OPT-350M's project_in,
    may be a target. peft itself ignores a misspelt target beside a good one, and adapts
    embeddings too, whose adapters have other names, shapes and merging than ours.
    """
    linear = _linear_names(decoder)
    for target in lora.targets:
        matches = [m for n, m in decoder.named_modules() if _matches(n, target)]
        if not matches or not all(isinstance(module, _LINEAR) for module in matches):
            raise ConfigError(
                f"lora-targets = {','.join(lora.targets)!r}: {target!r} matches no linear module "
                f"of this model; there are {', '.join(linear) or 'none'}"
            )


def attach(decoder: nn.Module, lora: Lora, side: str) -> None:
    """Put adapters beside the target modules of one side; all other parameters are frozen.

    decoder: cut, and on the meta device, where peft's own initialisation draws nothing. side:
    "client" or "server", for the ConfigError that is raised when no target is left there.
    """
    from peft import inject_adapter_in_model  # slow to import, and most runs need none

    names = [n for n, _ in decoder.named_modules()]
    if not any(_matches(name, target) for name in names for target in lora.targets):
        raise ConfigError(
            f"lora-targets = {','.join(lora.targets)!r} matches no module of the {side} submodel, "
            f"which at this cut-layer has {', '.join(_linear_names(decoder)) or 'no blocks'}; "
            f"choose another cut-layer or {side}-trainable"
        )
    transposed = any(isinstance(module, Conv1D) for module in decoder.modules())
    config = _peft_config(lora, transposed)
    inject_adapter_in_model(config, decoder, low_cpu_mem_usage=True)


def _matches(name: str, target: str) -> bool:
    """Whether a target means the module of this name: peft's rule."""
    return name == target or name.endswith(f".{target}")


def _linear_names(decoder: nn.Module) -> list[str]:
    """Last parts of the names of the linear modules, each once."""
    named = decoder.named_modules()
    return sorted({n.rpartition(".")[2] for n, m in named if isinstance(m, _LINEAR)})


def _peft_config(lora: Lora, transposed: bool, **more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed,
        **more,
    )


def canonical(name: str) -> str:
    """peft's name of a parameter -> that of the plain model, or of the adapter without the
    adapter's own name: `...q_proj.lora_A.weight`."""
    return _NAME.sub(r".\1.", name).replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether a canonical name is an adapter's."""
    return _ADAPTER.search(name) is not None


@torch.no_grad()
def merged(
    parameters: Mapping[str, Tensor], lora: Lora | None, transposed: bool = False
) -> dict[str, Tensor]:
    """Canonical parameters with the adapters folded in: W + alpha / r * B A, float32 where
    there is an adapter. Without adapters, the parameters as they are. transposed: W is stored
    [in, out]."""
    tensors = {name: t.detach() for name, t in parameters.items() if not is_adapter(name)}
    for name, a in parameters.items():
        if not name.endswith(".lora_A.weight") or lora is None:
            continue
        b = parameters[name.replace(".lora_A.", ".lora_B.")]
        weight = name.replace(".lora_A.", ".")
        change = (b @ a) * (lora.alpha / lora.rank)
        tensors[weight] = tensors[weight].float() + (change.T if transposed else change)
    return tensors


def save_adapters(
    directory: Path,
    model: str,
    lora: Lora,
    adapters: Mapping[str, Tensor],
    tokenizer: Any,
    transposed: bool = False,
) -> None:
    """Write both sides' adapters for `PeftModel.from_pretrained(base, directory)`.

    model: the base model they belong to. adapters: canonical name -> tensor. transposed: as in
    `merged`. Raises OSError when it cannot be written; nothing is left of it then.
    """
    tensors = {
        f"{_PEFT}{name}": tensor.detach().cpu().contiguous() for name, tensor in adapters.items()
    }
    config = _peft_config(lora, transposed, task_type="CAUSAL_LM", base_model_name_or_path=model)
    config.inference_mode = True
    with made_whole(directory) as part:
        config.save_pretrained(part)
        written = json.loads((part / "adapter_config.json").read_text(encoding="utf-8"))
        written["target_modules"] = sorted(written["target_modules"])  # a set has no order
        put(part / "adapter_config.json", json.dumps(written, indent=2) + "\n")
        tokenizer.save_pretrained(part)
        save_tensors(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def load_adapters(directory: Path, parameters: Mapping[str, Tensor]) -> None:
    """Fill one side's adapters, which are those of `parameters` by canonical name that are any,
    with what `save_adapters` wrote. Raises ModelError when they are not there or do not fit.
    """
    path = directory / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            for name in filter(is_adapter, parameters):
                stored = file.get_tensor(f"{_PEFT}{name}")
                parameters[name].copy_(stored.view(parameters[name].shape))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(
            f"{path} does not hold the adapters of this model: {first_line(error)}"
        ) from error
