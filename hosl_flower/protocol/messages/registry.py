"""The protocol: what the server asks a client, what the client answers.

A message is a frozen dataclass. Its class says all that is true of it: its kind, the name on the
wire; of a request its reply, whether it can be answered at any ledger position and whether a client
with dp-noise answers it; of a reply how it is checked (messages/base.py). pydantic checks the
fields when a message is made, also from what arrived; protocol/wire.py turns it into bytes and
back.

    Describe       what data do you have?                              -> Described
    Forward        activations of a training batch at theta            -> Activations
    Probe          the same at theta + c * s(seed)                     -> Activations
    Evaluate       activations of a held-out batch                     -> Activations
    Continue       activations of held-out prompts, then of tokens     -> Continued
                   that follow them
    Grade          exact match and F1 of what was generated            -> Graded
    HiddenStates   the server's last hidden states, where labels are   -> HiddenGradient
                   the client's: their loss
    HeldOutStates  the same of held-out examples: how many are right   -> Scored
    Losses         the true losses of your probes: update theta        -> Applied
    CutGradient    the loss gradient at the cut: probe your half       -> Scalars
    LocalTrain     the same, but train on it and send the change       -> Change
    HeadProbe      probe the loss of your auxiliary head               -> Scalars
    Backward       the loss gradient at the cut: back-propagate it     -> Gradient
    LocalStep      the same, and take a step along it on your own      -> Stepped
    Fetch          your weights, after steps of your own               -> Weights
    Adopt          your weights are everybody's now                    -> Applied
    CatchUp        ledger entries you have missed                      -> Applied
    ApplyDeltas    changes of weights, of the steps you have missed    -> Applied
    Restore        the same as weights, where those are fewer bytes    -> Applied
    Fingerprint    hashes of your submodel                             -> Fingerprinted

Any request may be answered by Behind (the client's ledger is shorter or another one: send
CatchUp, ApplyDeltas or Restore) or Failure.
"""

# importing a file of messages registers them
from hosl_flower.protocol.messages import activations as activations
from hosl_flower.protocol.messages import describe as describe
from hosl_flower.protocol.messages import generation as generation
from hosl_flower.protocol.messages import gradients as gradients
from hosl_flower.protocol.messages import kept_labels as kept_labels
from hosl_flower.protocol.messages import ledger as ledger
from hosl_flower.protocol.messages import scalars as scalars
from hosl_flower.protocol.messages.base import REPLIES as REPLIES
from hosl_flower.protocol.messages.base import REQUESTS as REQUESTS
