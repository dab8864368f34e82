"""The client's part in writing answers to held-out prompts: it runs what the server has chosen so
far, and grades what comes out (server/evaluate.py has the other part)."""

from typing import Any

import torch
from torch import Tensor

from hosl_flower.client.forwards import put_together
from hosl_flower.client.work import Work
from hosl_flower.data.client_data import DataPool
from hosl_flower.errors import ProtocolError
from hosl_flower.models.decoding import Prompts, checked
from hosl_flower.protocol.messages.activations import Evaluate
from hosl_flower.protocol.messages.generation import Continue, Grade
from hosl_flower.tasks.squad_score import graded
from hosl_flower.tensors.activation_codec import encode_activations


class Writing:
    """What a client keeps of the prompts that are being answered."""

    def __init__(self, work: Work, pool: DataPool):
        self.work, self.spec, self.pool = work, work.spec, pool

    def continued(self, request: Continue) -> dict[str, Any]:
        """Activations of held-out prompts, or of the tokens after them. A process that does not
        have what came before runs it again."""
        key = (request.partition, request.batch)
        prompts = (
            self.work.prompts[1] if self.work.prompts and self.work.prompts[0] == key else None
        )
        if prompts is None or not prompts.follows(request.tokens):
            self.work.prompts = None  # never two caches
            batch = self.pool.text_encoder.prompts(self._examples(request))
            prompts = Prompts(
                self.work.submodel, batch, self.spec.client_micro_batch, self.work.device
            )
        count = len(prompts.batch.input_ids)
        tokens = checked(request.tokens, count, self.spec.max_new_tokens, self._vocabulary)
        with self.work.phase("evaluate", prompts.batch.input_ids.numel() + tokens.numel()):
            coded = (
                (first, encode_activations(piece, self.spec.codec))
                for first, piece in prompts.activations(tokens)
            )
            activations, scales = put_together(coded, count)
        self.work.prompts = (key, prompts)
        return {
            "activations": activations,
            "scales": scales,
            "attention_mask": prompts.mask(tokens),
        }

    def grades(self, request: Grade) -> Tensor:
        """Exact match and F1 of answers to held-out prompts: float32 [B, 2]."""
        self.work.prompts = None
        examples, longest = self._examples(request), self.spec.max_new_tokens
        answers = checked(request.tokens, len(examples), longest, self._vocabulary).tolist()
        text = self.pool.text_encoder.text
        pairs = zip(answers, examples, strict=True)
        return torch.tensor([graded(text(tokens), own["answers"]) for tokens, own in pairs])

    def _examples(self, request: Evaluate) -> list[dict[str, Any]]:
        if not self.spec.task.target:
            raise ProtocolError(f"task {self.spec.task.name} has no answers to write")
        data = self.pool.client(request.partition)
        return data.held_out_examples(request.batch, self.spec.eval_batch_size)

    @property
    def _vocabulary(self) -> int:
        """V, the tokens there are."""
        decoder: Any = self.work.submodel.decoder
        return decoder.config.vocab_size
