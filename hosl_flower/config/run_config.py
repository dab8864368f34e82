"""Every run-config key: type, default, allowed values and one line of help.

Keys are flat kebab-case TOML scalars, as Flower's `[tool.flwr.app.config]` wants them. They
are validated once, here, before anything is loaded; inside, a RunConfig is trusted.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from hosl_flower.config.text_values import text_problem

Scalar = bool | int | float | str
Dtype = Literal["float32", "bfloat16", "float16"]
Perturbation = Literal["rank1", "signs", "gaussian"]
Trainable = Literal["full", "blocks", "lora"]
Optimizer = Literal["sgd", "adamw"]
Derivative = Literal["differences", "forward-mode"]
Schedule = Literal["constant", "linear", "cosine"]
ClientOptimizer = Literal["sgd", "adamw", "adafactor", "adafactor-momentum"]
ClientGradient = Literal["backprop", "recompute", "residual"]
Labels = Literal["server", "client"]
Quantization = Literal["none", "int8"]
Codec = Literal["exact", "bf16", "fp16", "int8"]  # see codec.py, which needs torch
UpdateCodec = Literal["exact", "int8"]  # see update_codec.py
Partitioner = Literal["iid", "dirichlet", "natural-id"]
Aggregation = Literal["weighted-mean", "mean", "median", "trimmed-mean"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")]
Natural = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Threads = Annotated[int, Field(ge=0, le=1024)]
Alpha = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Length = Annotated[int, Field(ge=8, lt=2**31)]

DEFAULT_LENGTH = 128  # of texts, in tokens

# Where rounding and curvature weigh alike (docs/results/precision.json); elsewhere 1e-3.
_EPSILONS = {"bfloat16": 3e-3}


class RunConfig(BaseModel):
    """A validated run configuration. Field `cut_layer` is key `cut-layer`, and so on."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,  # TOML has types: true is no number, "5" neither
        alias_generator=lambda name: name.replace("_", "-"),
        allow_inf_nan=False,
        str_strip_whitespace=True,
        protected_namespaces=(),
    )

    strategy: str = Field(
        "hosl",
        pattern=r"^([\w.]+:\w+|[A-Za-z0-9_-]+)$",
        description="the method: hosl, ho-sfl, sign-vote, fedavg-zo, heron-sfl, split-zo, full-zo, "
        "frozen-client, split-fo, a name that another package registers, or 'module:class'",
    )
    model: str = Field(
        "facebook/opt-125m",
        min_length=1,
        description="hub id, local directory, or `random:<architecture>` for fresh weights",
    )
    cut_layer: Natural = Field(5, description="number of blocks the client holds")
    dtype: Dtype = Field(
        "float32",
        description="of client weights and activations; the server computes in float32. "
        "Updates of 16-bit weights are rounded at random, right on average",
    )
    device: Device = Field(
        "auto",
        description="auto takes a GPU where there is one; a node's own `device` overrides it",
    )
    threads: Threads = Field(
        0, description="CPU threads per process; 0 is all cores of the machine"
    )

    task: str = Field(
        "sst2",
        description="sst2, rte, cb, wsc, wic, boolq, ag-news, trec, sms-spam, squad, drop, of "
        "images cifar10, cifar100, mnist, fashion-mnist, digits, or a name of your own, for which "
        "a data-path with columns text and label, of words, is enough; empty is what data-path "
        "holds, or without one sms-spam, which is bundled",
    )
    data_path: str = Field(
        "", description="local file or directory instead of the task's own data set"
    )
    # a newline at its end is part of a prompt
    prompt: Annotated[str, StringConstraints(strip_whitespace=False)] = Field(
        "",
        description="overrides the task's prompt, e.g. '{sentence} It was'; a column of the data "
        "is in braces, {{ and }} are braces as text",
    )
    verbalizers: str = Field(
        "",
        description="overrides the answer words, comma separated, in label order, or as "
        "label=word where labels are no numbers",
    )
    label_column: str = Field("", description="overrides the name of the label column")
    target_column: str = Field(
        "",
        description="instead of verbalizers: the column of the text that is to follow the prompt, "
        "which is generated, and scored by exact match and F1",
    )
    image_column: str = Field(
        "",
        description="of your own task about images: the column of the images, `image` in a folder "
        "of them; the classes are the verbalizers",
    )
    image_size: Natural = Field(
        0,
        description="height and width images are resized to, with the model's own mean and "
        "deviation; 0 leaves all to the model's own image processor",
    )
    fresh_head: bool = Field(
        False,
        description="of a classifier: start with a head by the seed, even where the checkpoint has "
        "one for as many classes, whose rows are otherwise matched by the names in its id2label",
    )
    labels: Labels = Field(
        "server",
        description="client: labels are not sent; the server sends its last hidden states, and "
        "each client, with the answer words' rows of the head, the loss gradient there",
    )
    max_length: Length = Field(
        DEFAULT_LENGTH,
        description="tokens per example, the answer's among them; longer texts are cut",
    )
    max_new_tokens: Positive = Field(
        50, description="tokens of a generated answer, at most; taken off max-length"
    )
    train_examples: Natural = Field(0, description="use at most so many; 0 is all")
    held_out_examples: Natural = Field(
        0,
        description="hold out so many training examples, drawn by seed; 0 takes the source's own "
        "held-out part, or a fifth",
    )
    eval_examples: Natural = Field(0, description="held-out examples, at most; 0 is all")
    offline_fallback: bool = Field(
        True,
        description="without hub and cache: random weights and the bundled SMS data, with a banner",
    )

    num_clients: int = Field(1, ge=1, le=100_000, description="N, data partitions, each one client")
    clients_per_step: Natural = Field(
        0, description="K, clients drawn for each step (HO-SFL, FedAvg); 0 is all"
    )
    min_clients: Positive = Field(
        1, description="a step goes on without failing clients as long as so many remain"
    )
    clients_per_node: Natural = Field(
        0, description="clients one SuperNode serves; 0 spreads them over the nodes there are"
    )
    partitioner: Partitioner = Field(
        "iid", description="how training examples are spread over the clients"
    )
    dirichlet_alpha: Alpha = Field(0.5, description="of dirichlet: smaller is more uneven labels")
    partition_column: str = Field(
        "", description="of natural-id: the column that says whose example it is"
    )
    min_partition_size: Positive = Field(
        1, description="of dirichlet: fewest examples a client may get"
    )
    turn_steps: Positive = Field(
        1, description="steps a client takes before the next one's turn (HOSL relay)"
    )
    steps: Positive = Field(200, description="training steps in all")
    batch_size: Positive = Field(8, description="examples per step")
    eval_batch_size: Positive = Field(32, description="examples per evaluation request")
    eval_every: Positive = Field(50, description="evaluate every so many steps, and at the end")
    evaluation: Literal["split", "central"] = Field(
        "split", description="through the client, or on the server from base weights and ledger"
    )

    directions: int = Field(
        1, ge=1, le=10_000, description="Q (HOSL, two-sided) or P (HO-SFL, one-sided) per step"
    )
    epsilon: float = Field(
        0.0,
        ge=0,
        lt=1,
        validate_default=True,
        description="probe distance; 0 is what suits dtype: 0.003 for bfloat16, else 0.001",
    )
    derivative: Derivative = Field(
        "differences",
        description="how HO-SFL's clients find their scalars: by probes at epsilon, or exactly by "
        "forward-mode differentiation, in twice a probe's time and memory of activations",
    )
    perturbation: Perturbation = Field("rank1", description="distribution of the directions")
    client_seeds: Literal["shared", "per-client"] = Field(
        "shared", description="per-client: K * P different directions per step (HO-SFL)"
    )
    local_steps: int = Field(
        1,
        ge=1,
        le=10_000,
        description="E, client updates between aggregations (HO-SFL, FedAvg, split FO, HERON)",
    )
    server_steps: int = Field(
        1, ge=1, le=10_000, description="tau, zeroth-order steps of the server per step (split ZO)"
    )
    upload_every: Positive = Field(1, description="k, steps between uploads of activations (HERON)")
    steps_per_message: Positive = Field(
        1,
        description="S, steps whose client work is asked at once: more spare Flower messages, but "
        "all S use the client weights before the first; 1 is exact",
    )
    aggregation: Aggregation = Field(
        "weighted-mean", description="of the clients' scalars; weights are numbers of examples"
    )
    trim_fraction: float = Field(
        0.2, ge=0, lt=0.5, description="of trimmed-mean: share of clients left out at each end"
    )
    scalar_clip: float = Field(
        0.0,
        ge=0,
        le=1e12,
        description="C: each of a client's scalars is bounded to +-C before it counts, so that one "
        "client moves the model at most so far; 0 is off",
    )
    activation_noise: NotNegative = Field(
        0.0,
        description="each client adds Gaussian noise to the activations it sends, of so many times "
        "a token's root mean square; what that hides is measured, not promised. 0 is off",
    )
    dp_noise: NotNegative = Field(
        0.0,
        description="z, for full ZO: each client adds Gaussian noise of z * dp-clip to the sum "
        "over its mini-batch before a scalar leaves it; the run says what epsilon that is. 0 is "
        "off",
    )
    dp_clip: NotNegative = Field(
        0.0,
        description="C: one example's projected gradients along a step's directions are bounded to "
        "an L2 norm of C",
    )
    dp_delta: float = Field(
        1e-5, gt=0, lt=0.1, description="delta that epsilon is for; below 1 / examples of a client"
    )
    client_trainable: Trainable = Field(
        "full",
        description="full trains embeddings too (as HOSL), blocks freezes them, "
        "lora trains adapters only",
    )
    client_quantization: Quantization = Field(
        "none",
        description="int8 keeps the client's frozen matrices in 8 bits, adapters in float32; "
        "needs client-trainable = lora and hosl-flower[quant]",
    )
    client_gradient: ClientGradient = Field(
        "backprop",
        description="split FO: back-propagation, the same block by block (recompute), or residual "
        "feedback: in a forward pass, each block by itself",
    )
    client_optimizer: ClientOptimizer = Field(
        "sgd",
        description="of the client's gradient; adamw without weight decay; for split FO adafactor, "
        "with almost no state, and adafactor-momentum, with an eighth of adamw's, a quarter where "
        "embeddings are trained",
    )
    client_learning_rate: float = Field(1e-6, ge=0, le=1e3, description="of the client's optimizer")
    server_trainable: Trainable = Field(
        "full",
        description="full trains final norm and answer words too (not these with labels = client), "
        "blocks or lora as above",
    )
    server_optimizer: Optimizer = Field("sgd", description="adamw without weight decay")
    server_learning_rate: float = Field(1e-3, ge=0, le=1e3, description="of the server's optimizer")
    learning_rate_schedule: Schedule = Field(
        "constant",
        description="of both sides' learning rates: linear and cosine fall to zero over the steps",
    )
    warmup_steps: Natural = Field(
        0, description="steps over which both learning rates rise from zero first"
    )
    server_gradient_clip: NotNegative = Field(
        0.0,
        description="most that the norm of the server's gradient may be in a step: a larger one is "
        "scaled down to it; 0 is off",
    )
    server_micro_batch: Natural = Field(
        0, description="sequences the server back-propagates at a time; 0 is all of a step"
    )
    client_micro_batch: Natural = Field(
        0,
        description="sequences the client runs at a time, with less memory; 0 is a whole batch, "
        "for recompute some 2,000 tokens, for residual 128. HO-SFL then takes one forward more per "
        "step",
    )
    lora_rank: int = Field(8, ge=1, le=4096, description="r of the adapters, on either side")
    lora_alpha: float = Field(16.0, gt=0, le=1e6, description="adapters act as alpha / r * B A x")
    lora_targets: str = Field(
        "q_proj,v_proj", description="modules that get adapters, comma separated"
    )
    seed: Natural = Field(0, description="of data order, directions and fresh weights")

    output_dir: str = Field("runs", min_length=1, description="where run directories are made")
    run_name: str = Field(
        "",
        description="the run directory's name; default: a time stamp",
    )
    checkpoint_every: Natural = Field(
        0, description="write a checkpoint every so many steps, to go on from; 0 never does"
    )
    checkpoints_kept: Positive = Field(
        2, description="how many of the latest checkpoints are kept; each is as large as the rest"
    )
    resume: str = Field(
        "",
        description="a run directory with a checkpoint: go on from it, in it; what decides the "
        "numbers must be as it was",
    )
    save_model: bool = Field(True, description="write the trained model at the end")
    save_format: Literal["merged", "adapters"] = Field(
        "merged", description="plain weights, or LoRA adapters in peft's format"
    )
    trackers: str = Field(
        "auto",
        description="where curves go besides the run directory: tensorboard, wandb, mlflow, "
        "several with commas; auto is tensorboard if it is installed, empty is none",
    )
    nodes_deadline: float = Field(
        60.0,
        gt=0,
        description="seconds to wait for enough SuperNodes at the start, and for each of them to "
        "load, its data too; for that reply-deadline if it is longer",
    )
    reply_deadline: float = Field(
        600.0, gt=0, description="seconds a client may take for one exchange"
    )
    step_deadline: float = Field(
        0.0,
        ge=0,
        description="seconds a step waits for answers of its clients before it goes on with those "
        "it has, if they are min-clients; 0 is reply-deadline. Not for methods with one client at "
        "a time",
    )

    link: Literal["auto", "stream", "grid"] = Field(
        "auto",
        description="how requests travel: auto streams in simulation and where there is a "
        "stream-endpoint, else Flower messages (grid)",
    )
    codec: Codec = Field(
        "exact",
        description="of activations and cut gradients on the wire: exact, bf16, fp16, or int8 with "
        "a scale per token",
    )
    update_codec: UpdateCodec = Field(
        "exact",
        description="of the gradients or changes of weights that clients send (split FO with "
        "local-steps = 1, FedAvg-ZO): int8 with a scale per row, rounded at random, and "
        "changes of weights down in the same. Rows of zeros never travel",
    )
    stream_endpoint: str = Field(
        "", description="host:port of the ServerApp that SuperNodes dial; not for simulation"
    )
    stream_bind: str = Field(
        "", description="host:port the ServerApp listens on; default: the endpoint's port"
    )
    stream_certificate: str = Field(
        "", description="PEM file: certificate chain of the ServerApp's stream"
    )
    stream_key: str = Field("", description="PEM file: its private key")
    stream_authority: str = Field(
        "", description="PEM file: the CA clients trust; default: the certificate itself"
    )
    stream_insecure: bool = Field(
        False, description="allow a stream without TLS beyond this machine"
    )
    max_session_seconds: float = Field(
        0.0,
        ge=0,
        description="a stream that has been open so long is closed between two exchanges, and its "
        "ClientApp called anew; 0 keeps it for the run",
    )
    stream_lifetime: float = Field(
        604800.0,
        gt=0,
        description="seconds Flower keeps the message that opens a stream; longer than the run",
    )

    @field_validator("*", mode="after")
    @classmethod
    def _check_text(cls, value: Any, info: ValidationInfo) -> Any:
        problem = text_problem(str(info.field_name), value) if isinstance(value, str) else ""
        if problem:
            raise ValueError(problem)
        return value

    @field_validator("epsilon", mode="after")
    @classmethod
    def _settle_epsilon(cls, value: float, info: ValidationInfo) -> float:
        if 0 < value < 1e-6:
            raise ValueError("input should be 0, or greater than or equal to 1e-06")
        return value or _EPSILONS.get(info.data.get("dtype", ""), 1e-3)

    @property
    def probe_distance(self) -> float:
        """epsilon, or 0 where the derivative is taken itself."""
        return self.epsilon if self.derivative == "differences" else 0.0

    @property
    def sampled_clients(self) -> int:
        """K, the clients of a step."""
        return self.clients_per_step or self.num_clients

    @property
    def verbalizer_list(self) -> list[str]:
        """The overriding answer words; empty when the task's own are used."""
        return list(split_words(self.verbalizers))

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """Of `trackers`."""
        return split_words(self.trackers)

    def as_keys(self) -> dict[str, Scalar]:
        """All keys with their values, as a run-config."""
        return self.model_dump(by_alias=True)


def split_words(text: str) -> tuple[str, ...]:
    """The words of a comma-separated list."""
    return tuple(word.strip() for word in text.split(",") if word.strip())
