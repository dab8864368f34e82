"""Which run-config values contradict each other, or would change nothing."""

from collections.abc import Iterator

from hosl_flower.config.run_config import KEYS, RunConfig
from hosl_flower.config.text_values import split_words


def contradictions(config: RunConfig) -> Iterator[str]:
    """One line for each thing that is wrong with the values together."""
    yield from _data(config)
    yield from _idle(config)
    yield from _clients(config)
    yield from _derivative(config)
    yield from _adapters(config)
    yield from _privacy(config)


def _data(config: RunConfig) -> Iterator[str]:
    if config.task.verbalizers and len(config.task.verbalizer_list) < 2:
        yield "verbalizers: needs at least two comma-separated words"
    if config.task.target_column and (config.task.verbalizers or config.task.label_column):
        yield (
            "target-column is for text that is generated, verbalizers and label-column for a "
            "choice among words: leave one of them out"
        )
    if config.clients.count > config.data.train_examples > 0:
        yield (
            f"num-clients = {config.clients.count} is more than train-examples = "
            f"{config.data.train_examples}: some clients would have no data"
        )
    if config.clients.partitioner == "natural-id" and not config.clients.partition_column:
        yield "partitioner = natural-id needs partition-column"
    if (warmup := config.learning_rate.warmup_steps) >= config.steps:
        yield f"warmup-steps = {warmup} leaves none of the {config.steps} steps"


def _idle(config: RunConfig) -> Iterator[str]:
    """A value that would change nothing is a mistake."""
    lora = "lora" in (config.client.trainable, config.server.trainable)
    dirichlet = ("partitioner = dirichlet", config.clients.partitioner == "dirichlet")
    natural = ("partitioner = natural-id", config.clients.partitioner == "natural-id")
    noise = ("dp-noise", bool(config.privacy.dp_noise))
    needs = {
        "trim-fraction": ("aggregation = trimmed-mean", config.aggregation.rule == "trimmed-mean"),
        "dirichlet-alpha": dirichlet,
        "min-partition-size": dirichlet,
        "partition-column": natural,
        "dp-clip": noise,
        "dp-delta": noise,
        **{
            f"lora-{name}": ("client-trainable or server-trainable = lora", lora)
            for name in ("rank", "alpha", "targets")
        },
    }
    values = config.as_keys()
    for key, (setting, used) in needs.items():
        if not used and values[key] != KEYS[key].field.default:
            yield f"{key} has no use without {setting}"


def _clients(config: RunConfig) -> Iterator[str]:
    if config.clients.per_step > config.clients.count:
        yield (
            f"clients-per-step = {config.clients.per_step} is more than num-clients = "
            f"{config.clients.count}"
        )
    elif config.clients.minimum > config.clients.sampled:
        yield (
            f"min-clients = {config.clients.minimum} is more than the {config.clients.sampled} "
            "clients of a step"
        )
    if config.deadlines.step >= config.deadlines.reply:
        yield (
            f"step-deadline = {config.deadlines.step:g} has no use: it is not below reply-deadline "
            f"= {config.deadlines.reply:g}"
        )
    rule = config.aggregation.rule
    if config.zo.client_seeds == "per-client" and rule in ("median", "trimmed-mean"):
        yield (
            f"aggregation = {rule} compares the clients' scalars along the same "
            "directions; it needs client-seeds = shared"
        )


def _derivative(config: RunConfig) -> Iterator[str]:
    if config.zo.derivative == "differences":
        return
    if config.zo.epsilon != RunConfig.from_keys({"dtype": config.dtype}).zo.epsilon:
        yield "epsilon has no use without derivative = differences"
    if config.client.quantization != "none":
        yield "derivative = forward-mode knows no 8-bit weights: no client-quantization"


def _adapters(config: RunConfig) -> Iterator[str]:
    if config.client.quantization != "none" and config.client.trainable != "lora":
        yield (
            f"client-quantization = {config.client.quantization} freezes the client's weights; "
            "it needs client-trainable = lora"
        )
    lora = "lora" in (config.client.trainable, config.server.trainable)
    if lora and not split_words(config.lora.targets):
        yield "lora-targets: names no module"
    both = config.client.trainable == config.server.trainable == "lora"
    if config.run.save_format == "adapters" and not both:
        yield (
            "save-format = adapters needs client-trainable = server-trainable = lora: "
            "adapters cannot hold other changes"
        )


def _privacy(config: RunConfig) -> Iterator[str]:
    if not config.privacy.dp_noise:
        return
    if not config.privacy.dp_clip:
        yield (
            "dp-noise needs dp-clip, since noise hides what is bounded: set it to a norm of one "
            "example's projected gradients that few of public data have"
        )
    if config.evaluation.mode == "split":
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
    "stream-certificate", "stream-key", "stream-authority", "stream-insecure",
}  # fmt: skip
