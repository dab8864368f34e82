"""What a server can read off activations: the share of a client's tokens it recovers, by cut.

    python tests/benchmarks/leakage.py -c model=<a small OPT> -c data-path=<...> --out leakage.json

A simple attack by whoever has the base checkpoint, as a server does: run public text through the
base's first blocks, fit one linear map (ridge regression) from activations to the embeddings of
their own tokens, and read other activations as the nearest embedding. Public text is the training
part, the client's is the held-out part; padding and what every example has in common (the prompt's
own words) do not count. Noise is that of activation-noise (privacy/activation_noise.py), the
client's from a secret of its own, and the attacker's map is fitted to activations with such noise.
A better attack recovers more: these shares are what is lost at least.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from hosl_flower.config.app_config import key_value
from hosl_flower.config.parse import parse_config
from hosl_flower.data.client_data import DataPool
from hosl_flower.data.encoders.prompts import PromptEncoder
from hosl_flower.models.batch import Batch
from hosl_flower.models.families.registry import embedding_name
from hosl_flower.models.split import load_client
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.privacy.activation_noise import ActivationNoise
from hosl_flower.server.open_session import open_session
from hosl_flower.tensors.activation_codec import decode_activations, encode_activations

NOISES = (0.0, 0.3, 1.0, 3.0)
RIDGE = 1e-3  # of the mean square of an activation


def text_positions(batch: Batch, encoder: PromptEncoder) -> Tensor:
    """[B, S] of tokens that are an example's own."""
    own = batch.attention_mask.bool().clone()
    common = len(encoder._suffix)
    if common:
        own[:, -common:] = False
    first = batch.attention_mask.argmax(1)
    for offset in range(len(encoder._prefix)):
        own[torch.arange(len(own)), first + offset] = False
    return own


class Tokens:
    """Activations [n, H] and ids [n] of the own tokens of some batches."""

    def __init__(
        self,
        client: ClientSubmodel,
        batches: list[Batch],
        encoder: PromptEncoder,
        codec: str,
        veil: ActivationNoise | None,
    ):
        activations, ids = [], []
        with torch.no_grad():
            for batch in batches:
                z = client(batch.input_ids, batch.attention_mask)
                if veil is not None:
                    z = veil.over(z, batch.input_ids, batch.attention_mask, "base")
                z = decode_activations(*encode_activations(z, codec), torch.float32)
                own = text_positions(batch, encoder)
                activations.append(z[own])
                ids.append(batch.input_ids[own])
        self.activations, self.ids = torch.cat(activations), torch.cat(ids)


def recovered(public: Tokens, private: Tokens, embedding: Tensor) -> float:
    """Share of the private tokens that the attack names."""
    mean, spread = public.activations.mean(0), public.activations.std(0)
    x = (public.activations - mean) / spread
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    target = embedding[public.ids].double()
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(gram, x.T @ target).float()
    y = (private.activations - mean) / spread
    guess = torch.cat([y, torch.ones(len(y), 1)], 1) @ solution
    table = torch.nn.functional.normalize(embedding, dim=1)
    named = [(part @ table.T).argmax(1) for part in guess.split(512)]
    return float((torch.cat(named) == private.ids).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-c", dest="keys", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--examples", type=int, default=2000, help="of public text")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    given = dict(map(key_value, arguments.keys))
    config = parse_config({"device": "cpu", "eval-examples": 400, "batch-size": 50, **given})
    session = open_session(config, "leakage", 1)
    spec, base, encoder = session.spec, session.base, session.encoder
    data = DataPool(spec, encoder).client(0)
    public = [data.train_batch(n, 50) for n in range(arguments.examples // 50)]
    private = [data.held_out_batch(n, 50) for n in range(config.data.eval_examples // 50)]
    rows = []
    for cut in range(1, base.blocks + 1):
        client = load_client(base, cut, torch.float32, "cpu")
        embedding = client.canonical_parameters()[embedding_name(base.config)].detach()
        for codec in ("exact", "int8"):
            for noise in NOISES if codec == "exact" else NOISES[:1]:
                known, secret = (
                    Tokens(
                        client,
                        part,
                        encoder,
                        codec,
                        ActivationNoise(noise, whose) if noise else None,
                    )
                    for part, whose in ((public, b"the attacker's"), (private, b"the client's"))
                )
                share = recovered(known, secret, embedding)
                rows.append({"cut": cut, "codec": codec, "noise": noise, "recovered": share})
                print(json.dumps(rows[-1]), flush=True)
    commonest = Counter(known.ids.tolist()).most_common(1)[0][0]
    guess = float((secret.ids == commonest).float().mean())
    result = {
        "model": spec.model, "task": spec.task.name, "public_tokens": len(known.ids),
        "private_tokens": len(secret.ids), "commonest_token": guess, "rows": rows,
    }  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
