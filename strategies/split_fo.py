"""Split first-order learning: clients compute a gradient of their half, as the server does.

SplitFed (Thapa et al. 2022, arXiv 2004.12088, Algorithms 1 and 2) with one server model, and with
client-trainable = server-trainable = lora SplitLoRA (Lin et al. 2024, arXiv 2407.00952). Phases 1
and 2 are those of strategies/ho_sfl.py: activations up, lambda_m down. Then, by local-steps:

    E = 1   synchronised every step, the fair rival of HO-SFL. Client m uploads the gradient
            g_m = (d z_m / d theta_c)^T lambda_m, as update-codec writes it, and one optimizer, the
            run's, takes a step along sum_m w_m g_m. New weights go down.
    E > 1   the published algorithm: client m takes E steps of its own, each on a mini-batch and
            lambda_m of its own, with an optimizer that starts afresh; then weights are averaged,
            theta_c <- sum_m w_m theta_c,m. The clients of those E steps stay the same.

With one client its weights, and its optimizer's state, are simply the run's every E steps, so E
changes what travels and not what is learnt, to rounding; that is how one device would train.

How a client comes by g_m is client-gradient:

    backprop    the chain rule with the whole graph: memory is that of training, which is what the
                zeroth-order methods spare
    recompute   the same gradient, one block at a time (hosl_flower/gradients/recompute.py)
    exact       the same gradient by hand-written rules, without a block's graph, for the models
                whose blocks the rules know (hosl_flower/gradients/exact.py)
    residual    an approximation in forward order, without a backward pass between blocks, of what
                is added to the residual stream (hosl_flower/gradients/residual.py)

With the last three and E > 1 a client updates each parameter as soon as its gradient is there, and
client-optimizer = adafactor has almost no state: a step then takes about the memory of inference;
adafactor-momentum has a quarter of float32 weights' size, half of embeddings'.
An averaging takes a copy of the trained weights besides.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hosl_flower.config.run_config import RunConfig
from hosl_flower.errors import ConfigError
from hosl_flower.optim.gradient import Dense
from hosl_flower.protocol.messages.base import Request
from hosl_flower.protocol.messages.gradients import Adopt, Backward, Fetch, LocalStep, Weights
from hosl_flower.server.aggregate import check_is_mean
from hosl_flower.server.cohort import Cohort, Question, absent
from hosl_flower.server.link import Link
from hosl_flower.server.schedule import client_rate
from hosl_flower.server.session import Session
from hosl_flower.tensors.rows import unflat
from hosl_flower.tensors.seeds import derive_seed
from hosl_flower.tensors.update_codec import decode_update
from strategies.ho_sfl import HoSfl


class SplitFo(HoSfl):
    """Per step and client: activations up, their gradient down; trainable weights up and down
    every local-steps.

    Run-config keys: num-clients, clients-per-step, min-clients, local-steps (E), client-gradient,
    client-optimizer, update-codec, aggregation (weighted-mean or mean) and the server's. eval-every
    and steps must be multiples of E.
    """

    name = "split-fo"
    keys = frozenset({
        "clients-per-step", "min-clients", "step-deadline", "local-steps", "aggregation",
        "activation-noise", "client-gradient", "client-optimizer", "client-learning-rate",
        "update-codec", "server-trainable", "server-optimizer", "server-learning-rate",
        "server-gradient-clip", "server-micro-batch",
    })  # fmt: skip
    anchors = False  # the forward pass is run again
    client_optimizers = ("sgd", "adamw", "adafactor", "adafactor-momentum")

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.members: list[int] = []  # the clients between two averagings
        check_is_mean(config.aggregation.rule, self.name, "gradients or weights")
        if config.pace.local_steps > 1 and (
            config.link == "grid" or config.stream.max_session_seconds
        ):
            raise ConfigError(
                f"local-steps = {config.pace.local_steps} keeps weights on the clients between two "
                "averagings: it needs a stream that stays open, so no link = grid and no "
                "max-session-seconds"
            )
        if config.pace.local_steps > 1 and config.update_codec != "exact":
            raise ConfigError(
                f"update-codec = {config.update_codec} is of gradients: with local-steps = "
                f"{config.pace.local_steps} weights travel, which it would round by more than a "
                "few steps change them; set local-steps = 1 or update-codec = exact"
            )
        for key, value in (("eval-every", config.evaluation.every), ("steps", config.steps)):
            if value % config.pace.local_steps:
                raise ConfigError(
                    f"{key} = {value} is no multiple of local-steps = {config.pace.local_steps}: "
                    "weights are only averaged every so many steps"
                )

    @property
    def needs_stream(self) -> bool:
        """Weights live on the clients between two averagings."""
        return self.config.pace.local_steps > 1

    def may_pause(self, step: int) -> bool:
        """After an averaging."""
        return not self.local(step + 1)

    def local(self, step: int) -> int:
        """Steps a client has taken on its own before this one."""
        return (step - 1) % self.config.pace.local_steps

    def steps(self, session: Session, link: Link, steps: Sequence[int]) -> list[float]:
        """These steps; the weighted losses before each."""
        if self.config.pace.local_steps == 1:
            return super().steps(session, link, steps)
        losses = []
        for step in steps:
            if not self.local(step):
                self.members = session.sample(step, absent(session, link))
            cohort = Cohort(session, step, self.members)
            own, stepped = self.probe(session, link, [cohort])
            stepped.answers(cohort)
            losses += own
            if self.may_pause(step):
                self.average(session, link, cohort)
            self.members = cohort.partitions
            cohort.done()
        return losses

    def at(self, session: Session, step: int, partition: int) -> dict[str, Any]:
        """Where a client must be to answer."""
        return {**session.at(step, partition), "local": self.local(step)}

    def ask(
        self, session: Session, step: int, partition: int, batch: int, gradient: Tensor
    ) -> Request:
        """Back-propagate; with E > 1 take a step too."""
        values = {
            **self.at(session, step, partition),
            "batch": batch,
            **session.for_wire(gradient),
        }
        if self.config.pace.local_steps == 1:
            return Backward(**values)
        return LocalStep(**values, learning_rate=client_rate(self.config, step))

    def merge(self, session: Session, cohort: Cohort, replies: dict[int, Any]) -> Dense:
        """E = 1: the weighted mean of the clients' gradients."""
        rows = session.history.state.rows
        total = torch.zeros(session.history.state.elements, dtype=torch.float64)
        for m, share in zip(cohort.partitions, cohort.weights, strict=True):
            total.add_(decode_update(rows, replies.pop(m)), alpha=share)
        seed = derive_seed(session.config.seed, "descend", cohort.step)
        return Dense(unflat(total.float(), session.history.state.parameters), seed)

    def commit(self, session: Session, cohort: Cohort, update: Dense) -> None:
        """E = 1: new weights for everybody."""
        rate, codec = client_rate(self.config, cohort.step), self.config.update_codec
        session.history.descend(cohort.step, update, rate, codec)

    def average(self, session: Session, link: Link, cohort: Cohort) -> None:
        """E > 1: the clients' weights become the run's."""
        local = self.config.pace.local_steps
        question = Question(session, link)
        for m in cohort.partitions:
            at = session.at(cohort.step, m)
            question.add(Fetch(**at, local=local, moments=session.config.clients.count == 1))
        replies: dict[int, Weights] = question.answers(cohort)
        history, members = session.history, cohort.partitions
        if session.config.clients.count > 1:
            total = torch.zeros(history.state.elements, dtype=torch.float64)
            for m, share in zip(members, cohort.weights, strict=True):
                total.add_(replies.pop(m).weights, alpha=share)
            history.jump(cohort.step, total)
            return
        (alone,) = members
        before, own = session.at(cohort.step, alone), replies[alone]
        history.jump(cohort.step, own.weights, own.moments, own.updates)
        now = history.state.mark().fingerprint
        after = history.ledger.digest()
        link.post(Adopt(**before, local=local, weights=now, digest_after=after))
