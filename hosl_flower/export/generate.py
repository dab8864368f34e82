"""Text from a split model, a token at a time (models/decoding.py). Both halves run in this
process."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hosl_flower.errors import ConfigError
from hosl_flower.export.trained_model import open_trained
from hosl_flower.models.decoding import Half
from hosl_flower.models.processors import load_tokenizer
from hosl_flower.models.special_tokens import Unknown, prefix
from hosl_flower.models.submodels import ClientSubmodel, ServerSubmodel
from hosl_flower.tensors.device import pick_device

Choose = Callable[[Tensor], int]  # logits [V] -> a token id


def continuation(
    source: str,
    prompt: str,
    new_tokens: int,
    choose: "Choose | None" = None,
    cut: int | None = None,
) -> str:
    """The prompt as a trained model continues it, to the end of the text or for `new_tokens`.

    source: a run directory; or a model directory, hub id or `random:<architecture>`, and where to
    cut it. choose: of the logits, see `chooser`; the likeliest token where it is not given.
    Raises ConfigError, CheckpointError or ModelError.
    """
    trained = open_trained(source, cut)
    if (family := trained.base.family).classes:
        raise ConfigError(
            f"{source} is a classifier of {family.modality}s, which writes no text; generate needs "
            "a language model"
        )
    config, tokenizer = trained.base.config, load_tokenizer(trained.tokenizer)
    ids = _prompt_ids(tokenizer, prompt, new_tokens, config)
    device = pick_device("auto")
    sides = trained.client(device), trained.server(device)
    ends = _ends(config.eos_token_id, tokenizer.eos_token_id)
    new = generate(*sides, ids, new_tokens, choose or chooser(), ends)
    return tokenizer.decode([*ids, *new], skip_special_tokens=True)


def _prompt_ids(tokenizer: Any, prompt: str, new_tokens: int, config: Any) -> list[int]:
    # without what a tokenizer puts behind a text: nothing follows its end
    ids = prefix(tokenizer) + list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ConfigError("the prompt has no token; give at least a word to go on from")
    if found := Unknown(tokenizer, config.vocab_size).first(ids):
        raise ConfigError(f"the prompt has {found}; leave it out")
    room = config.max_position_embeddings - len(ids)
    if new_tokens > room:
        raise ConfigError(
            f"--max-new-tokens = {new_tokens}: the model has {config.max_position_embeddings} "
            f"positions and the prompt takes {len(ids)}; expected at most {max(room, 0)}"
        )
    return ids


def _ends(of_model: Any, of_tokenizer: Any) -> set[int]:
    """The tokens that end a text, where the model names none the tokenizer's: a list, one, None."""
    ends = of_tokenizer if of_model is None else of_model
    return set(ends) if isinstance(ends, list) else {ends} - {None}


@torch.no_grad()
def generate(
    client: ClientSubmodel,
    server: ServerSubmodel,
    prompt: Sequence[int],
    new_tokens: int,
    choose: Choose,
    ends: Collection[int] = (),
) -> Iterator[int]:
    """Token ids that follow those of the prompt: `new_tokens`, or up to one of `ends`, which is
    the last then. The server's half computes in its own dtype."""
    first, second = Half(client), Half(server)
    head, device = server.lm_head.weight, next(client.parameters()).device
    new = list(prompt)
    for _ in range(new_tokens):
        ids = torch.tensor([new], device=device)
        mask = torch.ones_like(ids)
        activations = first(ids, mask).to(head.device, head.dtype)
        hidden = second(activations, mask.to(head.device))
        token = choose(server.lm_head(hidden[0, -1]))
        yield token
        if token in ends:
            return
        new = [token]


def chooser(temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> Choose:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from
    softmax(logits / temperature), cut down to the fewest tokens that have `top_p` of it together.

    Draws are from a generator of its own. Raises ConfigError for values out of range.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            f"--temperature = {temperature}, --top-p = {top_p}: expected a temperature of at "
            "least 0, and a top-p above 0 and at most 1"
        )
    if not temperature:
        if top_p < 1:
            raise ConfigError("--top-p has no use at --temperature 0, which takes the likeliest")
        return lambda logits: int(logits.argmax())
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: Tensor) -> int:
        probabilities = (logits.float().cpu() / temperature).softmax(0)
        shares, tokens = probabilities.sort(descending=True)
        before = shares.cumsum(0) - shares  # of each: what the likelier ones have together
        shares = shares.masked_fill(before >= top_p, 0.0)
        return int(tokens[torch.multinomial(shares, 1, generator=generator)])

    return draw
