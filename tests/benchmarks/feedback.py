"""How well residual feedback points: its cosine with the gradient, part by part, block by block.

    python tests/benchmarks/feedback.py -c model=<a small OPT> -c data-path=<...> -c cut-layer=5 ...

Before training, mean over --batches mini-batches. Prints a Markdown table: residual feedback as it
is, and plain, without seeing through a block's own MLP (what a matrix adds to the stream gets
lambda itself). Run-config keys as in a run; the server's loss gives lambda.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hosl_flower.client.client import Client
from hosl_flower.config.app_config import key_value
from hosl_flower.config.parse import parse_config
from hosl_flower.gradients.backprop import gradients
from hosl_flower.gradients.residual import fed_back, residual_gradients
from hosl_flower.models.batch import Batch
from hosl_flower.models.submodels import trainable_parameters
from hosl_flower.protocol.messages.activations import Activations, Forward
from hosl_flower.server.open_session import open_session
from hosl_flower.tensors.cut_gradient import Cotangent


def plain(client: Any, batch: Batch, gradient: Tensor) -> dict[str, Tensor]:
    """g = lambda at everything that is added to the stream: dL/dW = sum_tokens lambda x^T."""
    found: dict[str, Tensor] = {}
    lam = gradient.flatten(0, 1)

    def learn(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Tensor, ...], __: Tensor) -> None:
            found[name] = lam.T @ args[0].flatten(0, -2)

        return hook

    hooks = []
    for index, block in enumerate(client.decoder.layers):
        for part in ("self_attn.out_proj", "fc2"):
            if hasattr(block, "fc2"):
                name = client.canonical(f"decoder.layers.{index}.{part}.weight")
                hooks.append(block.get_submodule(part).register_forward_hook(learn(name)))
    with torch.no_grad():
        client(batch.input_ids, batch.attention_mask)
    for hook in hooks:
        hook.remove()
    embedding = client.decoder.embed_tokens.weight
    rows = batch.input_ids.where(batch.attention_mask.bool(), 1).flatten()  # 1 is padding
    found[client.canonical("decoder.embed_tokens.weight")] = torch.zeros_like(embedding).index_add_(
        0, rows, lam
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-c", dest="keys", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batches", type=int, default=4)
    arguments = parser.parse_args()
    config = parse_config(
        {"device": "cpu", "strategy": "strategies.split_fo:SplitFo"}
        | dict(map(key_value, arguments.keys))
    )
    session = open_session(config, "feedback", 1)
    client = Client(session.spec)
    full = trainable_parameters(client.submodel, "full")
    trained = {name: full[name] for name in fed_back(client.submodel, full)}
    cosines: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(arguments.batches):
        batch = client.pool.client(0).train_batch(number, config.batch_size)
        (clean,) = client.answer([Forward(**session.at(1, 0), batch=number)])
        assert isinstance(clean, Activations)
        ((_, _, lam),) = session.server.propagate([clean], [1.0])  # not applied: nobody learns
        cotangent = Cotangent(lam, torch.empty(len(lam), 0), 1.0)
        exact = dict(gradients(client.submodel, full, batch, cotangent))
        for name, own in residual_gradients(client.submodel, trained, batch, cotangent):
            cosines["residual", name].append(_cosine(own, exact[name]))
        for name, own in plain(client.submodel, batch, lam).items():
            cosines["plain", name].append(_cosine(own, exact[name]))
    print("| parameter | residual feedback | plain |\n|---|---|---|")
    for name in trained:
        if name.endswith("weight"):
            short = name.split("decoder.")[-1].removesuffix(".weight")
            cells = [cosines.get((kind, name), []) for kind in ("residual", "plain")]
            texts = [f"{sum(c) / len(c):.2f}" if c else "" for c in cells]
            print(f"| {short} | {texts[0]} | {texts[1]} |")


def _cosine(own: Tensor, exact: Tensor) -> float:
    dense = own.to_dense() if own.is_sparse else own
    return float(torch.cosine_similarity(dense.flatten(), exact.flatten(), dim=0))


if __name__ == "__main__":
    main()
