"""HOSL on one page, with nothing of ours: transformers, numpy and the published formats.

tests/strategies/test_hosl.py holds the library to this slow, obvious version: it writes W + eps s
into the weights (from a saved copy), keeps two whole models, trains the whole untied head,
and never uses autograd on the client. Only csv data with a held-out file.
"""

import copy
import csv
import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

MASK = 0xFFFFFFFF


def derived(seed, *labels):
    text = "/".join(map(str, (seed, *labels)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def words(seed, label, blocks):
    """Philox4x32-10, see docs/reference/perturbations.md."""
    stream = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
    zero = np.zeros(blocks, dtype=np.uint64)
    x = [np.arange(blocks, dtype=np.uint64), zero, zero + (stream & MASK), zero + (stream >> 32)]
    k0, k1, low = seed & MASK, seed >> 32, np.uint64(MASK)
    for _ in range(10):
        p, q = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        hi_p, hi_q = p >> np.uint64(32), q >> np.uint64(32)
        x = [hi_q ^ x[1] ^ np.uint64(k0), q & low, hi_p ^ x[3] ^ np.uint64(k1), p & low]
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return np.stack(x, axis=1)


def signs(seed, label, count):
    bits = words(seed, label, count // 128 + 1)[:, :, None] >> np.arange(32, dtype=np.uint64)
    return torch.tensor(1.0 - 2.0 * (bits & np.uint64(1)).reshape(-1)[:count]).float()


def shuffled(count, seed):
    pairs = words(seed, "permutation", (count + 1) // 2).reshape(-1, 2)[:count]
    return np.argsort((pairs[:, 0] << np.uint64(31)) ^ pairs[:, 1], kind="stable").tolist()


def direction(name, weight, seed, kind):
    if kind == "rank1" and weight.dim() == 2:
        a, b = (
            signs(seed, f"{name}#out", weight.shape[0]),
            signs(seed, f"{name}#in", weight.shape[1]),
        )
        return torch.outer(a, b)
    return signs(seed, name, weight.numel()).view_as(weight)


def hosl(model_directory, data, cut, prompt, answers, config):
    """Training losses [steps], projected gradients [steps][Q], held-out accuracy, both models.

    data: directory with train.csv and validation.csv, columns text,label.
    config: steps, batch, directions, epsilon, client_lr, server_lr, seed, kind.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    client = AutoModelForCausalLM.from_pretrained(model_directory).eval()
    server = copy.deepcopy(client)
    server.lm_head.weight = torch.nn.Parameter(server.lm_head.weight.detach().clone())
    answer_ids = [tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in answers]
    trained = [server.lm_head.weight, *server.model.decoder.final_layer_norm.parameters()]
    trained += list(server.model.decoder.layers[cut:].parameters())
    layers = {f"model.decoder.layers.{i}." for i in range(cut)}
    first = ("model.decoder.embed", *layers)
    theta_c = {n: p.data for n, p in client.named_parameters() if n.startswith(tuple(first))}

    def read(name):
        with (data / name).open() as file:
            return [(row["text"], int(row["label"])) for row in csv.DictReader(file)]

    def batch_of(rows):
        tokens = [tokenizer(prompt.format(text=text))["input_ids"] for text, _ in rows]
        width = max(map(len, tokens))
        ids = torch.tensor([[1] * (width - len(t)) + t for t in tokens])
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in tokens])
        return ids, mask, torch.tensor([label for _, label in rows])

    def forward(ids, mask):
        """Hidden state after block `cut`, taken out of the whole client model."""
        with torch.no_grad():
            return client(ids, attention_mask=mask, output_hidden_states=True).hidden_states[cut]

    def logits(h, ids, mask):
        """The whole server model, with the input of block cut+1 replaced by h."""
        block = server.model.decoder.layers[cut]
        hook = block.register_forward_pre_hook(lambda _, args: (h, *args[1:]))
        try:
            return server(ids, attention_mask=mask).logits[:, -1, answer_ids]
        finally:
            hook.remove()

    rows, held_out = read("train.csv"), read("validation.csv")
    rows = [rows[i] for i in shuffled(len(rows), derived(config["seed"], "partition"))]
    order_seed, position = derived(config["seed"], "order", 0), 0
    losses, gradients = [], []
    for step in range(1, config["steps"] + 1):
        chosen = []
        for _ in range(config["batch"]):
            epoch, offset = divmod(position, len(rows))
            chosen.append(rows[shuffled(len(rows), derived(order_seed, "epoch", epoch))[offset]])
            position += 1
        ids, mask, labels = batch_of(chosen)
        # Phase 1: two-sided probes of the true loss, server frozen
        scalars, seeds = (
            [],
            [derived(config["seed"], "direction", step, q) for q in range(config["directions"])],
        )
        for seed in seeds:
            pair = []
            for sign in (1, -1):
                saved = {n: w.clone() for n, w in theta_c.items()}
                for n, w in theta_c.items():
                    w.add_(direction(n, w, seed, config["kind"]) * (sign * config["epsilon"]))
                h = forward(ids, mask)
                for n, w in theta_c.items():
                    w.copy_(saved[n])
                with torch.no_grad():
                    pair.append(float(F.cross_entropy(logits(h, ids, mask), labels)))
            scalars.append((pair[0] - pair[1]) / (2 * config["epsilon"] * config["directions"]))
        # Phase 2: clean activations, one SGD step of the server
        loss = F.cross_entropy(logits(forward(ids, mask), ids, mask), labels)
        for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            parameter.data -= config["server_lr"] * gradient
        # Phase 3: the client regenerates its directions
        for seed, scalar in zip(seeds, scalars, strict=True):
            for n, w in theta_c.items():
                w -= np.float32(config["client_lr"] * np.float32(scalar)) * direction(
                    n, w, seed, config["kind"]
                )
        losses.append(float(loss.detach()))
        gradients.append(scalars)
    right = 0
    for row in held_out:
        ids, mask, labels = batch_of([row])
        with torch.no_grad():
            right += int(logits(forward(ids, mask), ids, mask).argmax(1) == labels)
    return losses, gradients, right / len(held_out), client, server
