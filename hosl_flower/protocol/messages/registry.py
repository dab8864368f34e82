"""The protocol: what the server asks a client, what the client answers.

Messages are frozen dataclasses whose fields pydantic checks when they are made, also when
they are made from what arrived; wire.py turns them into bytes and back.

    Describe     what data do you have?                             -> Described
    Forward      activations of a training batch at theta           -> Activations
    Probe        the same at theta + c * s(seed)                    -> Activations
    Evaluate     activations of a held-out batch                    -> Activations
    Continue     activations of held-out prompts, then of tokens    -> Continued
                 that follow them
    Grade        exact match and F1 of what was generated           -> Graded
    HiddenStates   the server's last hidden states, where labels are the client's: their loss
                                                                    -> HiddenGradient
    HeldOutStates  the same of held-out examples: how many are right -> Scored
    Losses       the true losses of your probes: update theta       -> Applied
    CutGradient  the loss gradient at the cut: probe your half      -> Scalars
    LocalTrain   the same, but train on it and send the change      -> Change
    HeadProbe    probe the loss of your auxiliary head              -> Scalars
    Backward     the loss gradient at the cut: back-propagate it    -> Gradient
    LocalStep    the same, and take a step along it on your own     -> Stepped
    Fetch        your weights, after steps of your own              -> Weights
    Adopt        your weights are everybody's now                   -> Applied
    CatchUp      ledger entries you have missed                     -> Applied
    ApplyDeltas         changes of weights, of the steps you have missed   -> Applied
    Restore      the same as weights, where those are fewer bytes   -> Applied
    Fingerprint  hashes of your submodel                            -> Fingerprinted

Any request may be answered by Behind (the client's ledger is shorter or another one: send
CatchUp, ApplyDeltas or Restore) or Failure.
"""

from hosl_flower.protocol.messages.ledger import ApplyDeltas, CatchUp, Restore
from hosl_flower.protocol.messages.replies import (
    Activations,
    Applied,
    Behind,
    Change,
    Continued,
    Described,
    Failure,
    Fingerprinted,
    Graded,
    Gradient,
    HiddenGradient,
    Reply,
    Scalars,
    Scored,
    Stepped,
    Update,
    Weights,
)
from hosl_flower.protocol.messages.requests import (
    Adopt,
    Backward,
    Continue,
    CutGradient,
    Describe,
    Evaluate,
    Fetch,
    Fingerprint,
    Forward,
    Grade,
    HeadProbe,
    HeldOutStates,
    HiddenStates,
    LocalProbe,
    LocalStep,
    LocalTrain,
    Losses,
    Probe,
    Request,
)

Message = Request | Reply
REQUESTS: dict[str, type[Request]] = {
    cls.kind: cls
    for cls in (
        Describe,
        Forward,
        Probe,
        Evaluate,
        Continue,
        Grade,
        HiddenStates,
        HeldOutStates,
        Losses,
        CutGradient,
        LocalTrain,
        HeadProbe,
        Backward,
        LocalStep,
        Fetch,
        Adopt,
        CatchUp,
        ApplyDeltas,
        Restore,
        Fingerprint,
    )
}
REPLIES: dict[str, type[Reply]] = {
    cls.kind: cls
    for cls in (
        Described,
        Activations,
        Continued,
        Graded,
        HiddenGradient,
        Scored,
        Applied,
        Scalars,
        Change,
        Gradient,
        Stepped,
        Weights,
        Fingerprinted,
        Behind,
        Failure,
    )
}

__all__ = [
    "REPLIES",
    "REQUESTS",
    "Activations",
    "Adopt",
    "Applied",
    "ApplyDeltas",
    "Backward",
    "Behind",
    "CatchUp",
    "Change",
    "Continue",
    "Continued",
    "CutGradient",
    "Describe",
    "Described",
    "Evaluate",
    "Failure",
    "Fetch",
    "Fingerprint",
    "Fingerprinted",
    "Forward",
    "Grade",
    "Graded",
    "Gradient",
    "HeadProbe",
    "HeldOutStates",
    "HiddenGradient",
    "HiddenStates",
    "LocalProbe",
    "LocalStep",
    "LocalTrain",
    "Losses",
    "Message",
    "Probe",
    "Reply",
    "Request",
    "Restore",
    "Scalars",
    "Scored",
    "Stepped",
    "Update",
    "Weights",
]
