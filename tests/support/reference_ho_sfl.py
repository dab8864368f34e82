"""HO-SFL on one page, with nothing of ours: transformers, peft, numpy and the published formats.

tests/strategies/test_ho_sfl.py holds the library to this slow, obvious version: two whole models, W
+ eps s written into the weights, every client forwarded and back-propagated on its own, torch's
optimizers on reconstructed gradients. Only csv data with a held-out file. The generator, the
directions and the shuffles are those of reference_hosl.py.
"""

import copy
import csv

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from reference_hosl import derived, direction, shuffled
from transformers import AutoModelForCausalLM, AutoTokenizer


def unsplit_name(name):
    """peft's parameter name -> the name in the plain model, or of the adapter."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return name.replace(".default", "")


def with_lora(model, config):
    model = get_peft_model(
        model,
        LoraConfig(
            r=config["rank"], lora_alpha=config["alpha"], target_modules=["q_proj", "v_proj"]
        ),
    )
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            own = np.random.default_rng(derived(config["seed"], "lora", unsplit_name(name)))
            uniform = torch.from_numpy(own.random(tuple(parameter.shape), dtype=np.float32))
            parameter.data.copy_((uniform * 2 - 1) / parameter.shape[1] ** 0.5)
    return model


def ho_sfl(model_directory, data, cut, prompt, answers, config):
    """Training losses [steps], aggregated scalars [steps][P], held-out accuracy, client, server.

    config: steps, batch, clients, sampled, directions, epsilon, lr, optimizer, lora, seed, kind.
    first_order: clients back-propagate their cut gradients instead of probing (SplitFed).
    """
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    client = AutoModelForCausalLM.from_pretrained(model_directory)
    server = copy.deepcopy(client)
    server.lm_head.weight = torch.nn.Parameter(server.lm_head.weight.detach().clone())
    if config["lora"]:
        client, server = with_lora(client, config), with_lora(server, config)
    client.eval(), server.eval()
    answer_ids = [tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in answers]
    ours = tuple(f"model.decoder.layers.{i}." for i in range(cut))
    marker = "lora_" if config["lora"] else ".layers."
    theta_c = {
        unsplit_name(n): p
        for n, p in sorted(client.named_parameters(), key=lambda item: unsplit_name(item[0]))
        if unsplit_name(n).startswith(ours) and marker in n
    }
    theta_s = [
        p
        for n, p in server.named_parameters()
        if not unsplit_name(n).startswith((*ours, "model.decoder.embed"))
        and (marker in n if config["lora"] else True)
    ]
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[config["optimizer"]]
    extra = {"weight_decay": 0.0} if config["optimizer"] == "adamw" else {}
    client_step = make(theta_c.values(), lr=config["lr"], **extra)
    server_step = make(theta_s, lr=config["lr"], **extra)
    layers = server.get_submodule(
        "base_model.model.model.decoder.layers" if config["lora"] else "model.decoder.layers"
    )

    def read(name):
        with (data / name).open() as file:
            return [(row["text"], int(row["label"])) for row in csv.DictReader(file)]

    def batch_of(rows):
        tokens = [tokenizer(prompt.format(text=text))["input_ids"] for text, _ in rows]
        width = max(map(len, tokens))
        ids = torch.tensor([[1] * (width - len(t)) + t for t in tokens])
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in tokens])
        return ids, mask, torch.tensor([label for _, label in rows])

    def forward(ids, mask, graph=False):
        with torch.set_grad_enabled(graph):
            return client(ids, attention_mask=mask, output_hidden_states=True).hidden_states[cut]

    def logits(h, ids, mask):
        hook = layers[cut].register_forward_pre_hook(lambda _, args: (h, *args[1:]))
        try:
            return server(ids, attention_mask=mask).logits[:, -1, answer_ids]
        finally:
            hook.remove()

    rows, held_out = read("train.csv"), read("validation.csv")
    rows = [rows[i] for i in shuffled(len(rows), derived(config["seed"], "partition"))]
    base, extra_rows = divmod(len(rows), config["clients"])
    ends = np.cumsum([base + (m < extra_rows) for m in range(config["clients"])]).tolist()
    parts = [rows[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    positions = [0] * config["clients"]

    def next_batch(m):
        order_seed, own, chosen = derived(config["seed"], "order", m), parts[m], []
        for _ in range(config["batch"]):
            epoch, offset = divmod(positions[m], len(own))
            chosen.append(own[shuffled(len(own), derived(order_seed, "epoch", epoch))[offset]])
            positions[m] += 1
        return batch_of(chosen)

    losses, scalars = [], []
    for step in range(1, config["steps"] + 1):
        # 0: K of N clients, weighted by their examples
        order = shuffled(config["clients"], derived(config["seed"], "clients", step))
        sampled = sorted(order[: config["sampled"]])
        total = sum(len(parts[m]) for m in sampled)
        weights = {m: len(parts[m]) / total for m in sampled}
        batches = {m: next_batch(m) for m in sampled}
        # 1 and 2: clean activations, one server step, cut gradients of each client's own loss
        loss, anchors, cuts = 0.0, {}, {}
        server_step.zero_grad()
        for m, (ids, mask, labels) in batches.items():
            anchors[m] = forward(ids, mask).requires_grad_()
            own = F.cross_entropy(logits(anchors[m], ids, mask), labels)
            (weights[m] * own).backward()
            cuts[m] = anchors[m].grad / weights[m]
            loss += weights[m] * own.item()
        # 3: one-sided probes of <lambda, f_c>, the same directions on every client
        P, eps = config["directions"], config["epsilon"]
        seeds = [derived(config["seed"], "direction", step, 0, p) for p in range(P)]
        means = []
        for seed in seeds:
            mean = 0.0
            for m, (ids, mask, _) in batches.items():
                saved = {n: w.detach().clone() for n, w in theta_c.items()}
                for n, w in theta_c.items():
                    w.data.add_(direction(n, w, seed, config["kind"]) * eps)
                moved = forward(ids, mask)
                for n, w in theta_c.items():
                    w.data.copy_(saved[n])
                value = ((moved - anchors[m].detach()).double() * cuts[m].double()).sum().item()
                mean += weights[m] * value / (eps * P)
            means.append(mean)
        server_step.step()
        # 4: every client takes the same optimizer step
        exact = [torch.zeros_like(w) for w in theta_c.values()]
        for m, (ids, mask, _) in batches.items() if config.get("first_order") else ():
            own = torch.autograd.grad(
                forward(ids, mask, graph=True), list(theta_c.values()), cuts[m]
            )
            exact = [g + weights[m] * o for g, o in zip(exact, own, strict=True)]
        for w, g in zip(theta_c.values(), exact, strict=True):
            w.grad = g
        for n, w in () if config.get("first_order") else theta_c.items():
            parts_ = [
                v * direction(n, w, s, config["kind"]) for v, s in zip(means, seeds, strict=True)
            ]
            w.grad = sum(parts_)
        client_step.step()
        losses.append(loss)
        scalars.append(means)
    right = 0
    for row in held_out:
        ids, mask, labels = batch_of([row])
        with torch.no_grad():
            right += int(logits(forward(ids, mask), ids, mask).argmax(1) == labels)
    return losses, scalars, right / len(held_out), client, server
