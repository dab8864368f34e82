"""Which run-config values contradict each other, or would change nothing."""

from collections.abc import Iterator

from hosl_flower.config.run_config import RunConfig, split_words


def contradictions(config: RunConfig) -> Iterator[str]:
    """One line for each thing that is wrong with the values together."""
    yield from _data(config)
    yield from _idle(config)
    yield from _clients(config)
    yield from _derivative(config)
    yield from _adapters(config)
    yield from _privacy(config)


def _data(config: RunConfig) -> Iterator[str]:
    if config.verbalizers and len(config.verbalizer_list) < 2:
        yield "verbalizers: needs at least two comma-separated words"
    if config.target_column and (config.verbalizers or config.label_column):
        yield (
            "target-column is for text that is generated, verbalizers and label-column for a "
            "choice among words: leave one of them out"
        )
    if config.num_clients > config.train_examples > 0:
        yield (
            f"num-clients = {config.num_clients} is more than train-examples = "
            f"{config.train_examples}: some clients would have no data"
        )
    if config.partitioner == "natural-id" and not config.partition_column:
        yield "partitioner = natural-id needs partition-column"
    if config.warmup_steps >= config.steps:
        yield f"warmup-steps = {config.warmup_steps} leaves none of the {config.steps} steps"


def _idle(config: RunConfig) -> Iterator[str]:
    """A value that would change nothing is a mistake."""
    lora = "lora" in (config.client_trainable, config.server_trainable)
    needs = {
        "trim_fraction": ("aggregation = trimmed-mean", config.aggregation == "trimmed-mean"),
        "dirichlet_alpha": ("partitioner = dirichlet", config.partitioner == "dirichlet"),
        "min_partition_size": ("partitioner = dirichlet", config.partitioner == "dirichlet"),
        "partition_column": ("partitioner = natural-id", config.partitioner == "natural-id"),
        "dp_clip": ("dp-noise", bool(config.dp_noise)),
        "dp_delta": ("dp-noise", bool(config.dp_noise)),
        **{
            f"lora_{name}": ("client-trainable or server-trainable = lora", lora)
            for name in ("rank", "alpha", "targets")
        },
    }
    for name, (setting, used) in needs.items():
        field = type(config).model_fields[name]
        if not used and getattr(config, name) != field.default:
            yield f"{field.alias} has no use without {setting}"


def _clients(config: RunConfig) -> Iterator[str]:
    if config.clients_per_step > config.num_clients:
        yield (
            f"clients-per-step = {config.clients_per_step} is more than num-clients = "
            f"{config.num_clients}"
        )
    elif config.min_clients > config.sampled_clients:
        yield (
            f"min-clients = {config.min_clients} is more than the {config.sampled_clients} "
            "clients of a step"
        )
    if config.step_deadline >= config.reply_deadline:
        yield (
            f"step-deadline = {config.step_deadline:g} has no use: it is not below reply-deadline "
            f"= {config.reply_deadline:g}"
        )
    if config.client_seeds == "per-client" and config.aggregation in ("median", "trimmed-mean"):
        yield (
            f"aggregation = {config.aggregation} compares the clients' scalars along the same "
            "directions; it needs client-seeds = shared"
        )


def _derivative(config: RunConfig) -> Iterator[str]:
    if config.derivative == "differences":
        return
    if config.epsilon != type(config).model_validate({"dtype": config.dtype}).epsilon:
        yield "epsilon has no use without derivative = differences"
    if config.client_quantization != "none":
        yield "derivative = forward-mode knows no 8-bit weights: no client-quantization"


def _adapters(config: RunConfig) -> Iterator[str]:
    if config.client_quantization != "none" and config.client_trainable != "lora":
        yield (
            f"client-quantization = {config.client_quantization} freezes the client's weights; "
            "it needs client-trainable = lora"
        )
    lora = "lora" in (config.client_trainable, config.server_trainable)
    if lora and not split_words(config.lora_targets):
        yield "lora-targets: names no module"
    both = config.client_trainable == config.server_trainable == "lora"
    if config.save_format == "adapters" and not both:
        yield (
            "save-format = adapters needs client-trainable = server-trainable = lora: "
            "adapters cannot hold other changes"
        )


def _privacy(config: RunConfig) -> Iterator[str]:
    if not config.dp_noise:
        return
    if not config.dp_clip:
        yield (
            "dp-noise needs dp-clip, since noise hides what is bounded: set it to a norm of one "
            "example's projected gradients that few of public data have"
        )
    if config.evaluation == "split":
        yield (
            "dp-noise needs evaluation = central: through the split, clients send activations of "
            "their held-out examples"
        )


# keys that may differ: they change how a run goes on, not what it computes (another device or
# number of threads may round differently, as between any two machines)
KEYS_FREE_TO_CHANGE = {
    "steps", "resume", "checkpoint-every", "checkpoints-kept", "output-dir", "run-name",
    "save-model", "save-format", "trackers",
    "threads", "device", "link", "min-clients", "clients-per-node", "nodes-deadline",
    "reply-deadline", "step-deadline", "max-session-seconds", "stream-endpoint", "stream-bind",
    "stream-certificate", "stream-key", "stream-authority", "stream-insecure", "stream-lifetime",
}  # fmt: skip
