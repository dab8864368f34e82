"""A message of every kind."""

import torch

from hosl_flower.ledger.ledger import Entry, Ledger
from hosl_flower.protocol.messages.activations import Activations, Evaluate, Forward, Probe
from hosl_flower.protocol.messages.base import Behind, Failure
from hosl_flower.protocol.messages.describe import Describe, Described
from hosl_flower.protocol.messages.generation import Continue, Continued, Grade, Graded
from hosl_flower.protocol.messages.gradients import (
    Adopt,
    Backward,
    Change,
    Fetch,
    Gradient,
    LocalStep,
    Stepped,
    Weights,
)
from hosl_flower.protocol.messages.kept_labels import (
    HeldOutStates,
    HiddenGradient,
    HiddenStates,
    Scored,
)
from hosl_flower.protocol.messages.ledger import (
    Applied,
    ApplyDeltas,
    CatchUp,
    Fingerprint,
    Fingerprinted,
    Losses,
    Restore,
)
from hosl_flower.protocol.messages.scalars import CutGradient, HeadProbe, LocalTrain, Scalars
from hosl_flower.protocol.reply_limits import ReplyLimits

D = "0123456789abcdef"


AT = {"step": 3, "partition": 1, "position": 2, "digest": D}


DONE = {"step": 3, "seconds": 0.25, "peak_bytes": 7}


UPDATE = {
    "present": torch.tensor([True]), "values": torch.arange(-2, 3, dtype=torch.int8),
    "scales": torch.rand(1),
}  # fmt: skip


def ledger():
    ledger = Ledger("base")
    ledger.append(Entry(1, (5, 2**62), (0.5, -0.25), 1e-3))
    ledger.append(Entry(2, (6,), (0.125,), 1e-4))
    return ledger


def activations(**changes):
    values = {
        "activations": torch.randn(2, 3, 4),
        "scales": torch.empty(0),
        "attention_mask": torch.ones(2, 3, dtype=torch.bool),
        "labels": torch.tensor([0, 1]),
    }
    return Activations(**DONE, **{**values, **changes})


def continued(**changes):
    own = vars(activations(**changes)).copy()
    del own["labels"]
    return Continued(**own)


CUT = {
    **AT, "batch": 4, "directions": 2, "seeds": (1, 2, 3, 4), "epsilon": 1e-3,
    "learning_rate": 1e-5, "gradient": torch.randn(2, 3, 4).bfloat16(),
    "scales": torch.empty(0), "scale": 0.5,
}  # fmt: skip


PROBE = (*AT, "batch", "directions", "seeds", "epsilon", "learning_rate")


BACKWARD = (*AT, "batch", "gradient", "scales", "scale")


ALL = [
    Describe(**AT),
    Forward(**AT, batch=4),
    Probe(**AT, batch=4, seed=2**62, coefficient=-1e-3),
    Evaluate(**AT, batch=0),
    Continue(**AT, batch=0, tokens=torch.empty((0, 0), dtype=torch.int64)),
    Grade(**AT, batch=0, tokens=torch.tensor([[5, 2], [7, 8]])),
    Losses(
        **AT, seeds=(1, 2), losses=(0.1, 0.2, 0.3, 0.4), epsilon=1e-3, learning_rate=1e-6,
        digest_after=D,
    ),
    CatchUp.of(ledger(), 0, 2, Forward(**AT, batch=4)),
    CutGradient(**CUT),
    LocalTrain(**CUT),
    HeadProbe(**{key: CUT[key] for key in PROBE}),
    Backward(**{key: CUT[key] for key in BACKWARD}, local=2),
    LocalStep(**{key: CUT[key] for key in (*BACKWARD, "learning_rate")}, local=2),
    Fetch(**AT, local=3, moments=True),
    Adopt(**AT, local=3, weights=D, digest_after=D),
    ApplyDeltas(
        **AT, steps=(1, 2), present=torch.tensor([[True], [True]]),
        values=torch.arange(10, dtype=torch.int8), scales=torch.rand(2), digests=(D, D),
    ),
    Restore(**AT, updates=2, weights=torch.randn(5).bfloat16(), moments=torch.randn(2, 5)),
    Fingerprint(**AT, since=1),
    HiddenStates(**AT, batch=4, first=1, states=torch.randn(2, 3, 4)),
    HiddenStates(**AT, batch=4, first=0, states=torch.randn(2, 3, 4), losses_only=True),
    HeldOutStates(**AT, first=40, states=torch.randn(2, 3, 4)),
    Described(
        **DONE, train_examples=5, held_out_examples=2, label_counts=(3, 2),
        memory_meter="live_storages",
    ),
    Described(
        **DONE, train_examples=5, held_out_examples=2, label_counts=(3, 2),
        memory_meter="live_storages", held_out_overlap=(2, 1, 4, 6),
    ),
    activations(),
    activations(activations=torch.randn(2, 3, 4).bfloat16()),
    continued(),
    Graded(**DONE, scores=torch.rand(2, 2)),
    Applied(**DONE, position=2, digest=D),
    Scalars(**DONE, scalars=torch.randn(2, 3)),
    Scalars(**DONE, scalars=torch.randn(2, 3), loss=0.5),
    Gradient(**DONE, **UPDATE),
    Gradient(**DONE, **{**UPDATE, "values": torch.randn(3), "scales": torch.empty(0)}),
    Stepped(**DONE, local=3),
    Weights(**DONE, updates=2, weights=torch.randn(5).bfloat16(), moments=torch.randn(2, 5)),
    Change(**DONE, **UPDATE),
    Fingerprinted(**DONE, positions=(1, 2), fingerprints=(D, D)),
    Behind(**DONE, position=0, digest=D),
    Failure(**DONE, error="DataError: no"),
    HiddenGradient(**DONE, loss=0.5, gradient=torch.randn(2, 3, 4)),
    Scored(**DONE, correct=1, loss_sum=1.5),
]  # fmt: skip


LIMITS = ReplyLimits(batch=8, length=16, hidden=4, dtype="float32", classes=2)
