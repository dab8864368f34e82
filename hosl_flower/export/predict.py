"""Predictions and evaluations of a finished run's model.

Prompts, label words, labels and scores are those of the run's own evaluation: the same encoder,
both halves of the model at the run's cut, and the codec of the activations. Two things differ
from it. Frozen weights are not quantized, and no noise is added to activations.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hosl_flower.config.client_spec import client_spec
from hosl_flower.data.encoders.make import make_inputs
from hosl_flower.data.encoders.prompts import PromptEncoder
from hosl_flower.export.finished_run import Finished
from hosl_flower.export.trained_model import trained_model
from hosl_flower.models.batch import Batch
from hosl_flower.models.class_head import class_names
from hosl_flower.models.decoding import Prompts, Writer, checked, greedy
from hosl_flower.server.scores import Score, TextScore, new_score
from hosl_flower.tasks.generated_answers import Completion
from hosl_flower.tasks.squad_score import graded
from hosl_flower.tensors.activation_codec import decode_activations, encode_activations
from hosl_flower.tensors.device import pick_device, use_threads

Example = dict[str, Any]


class Predictor:
    """A finished run's model with the encoder of its task.

    Args:
        run: the finished run.

    Attributes:
        labels: the labels in the order of the scores; empty where answers are generated.

    Raises:
        ConfigError, ModelError: for a model that cannot be loaded.
    """

    def __init__(self, run: Finished):
        config, task, trained = run.config, run.task, trained_model(run)
        use_threads(config.threads)
        self._spec = client_spec(config, str(run.directory), trained.tokenizer, task, "")
        self._encoder = make_inputs(self._spec, trained.tokenizer, trained.base.config)
        self._encoder.check(trained.base.config)
        self._device = pick_device("auto")
        self._client, self._server = trained.client(self._device), trained.server(self._device)
        self.task = task
        self.labels = class_names(task)

    def probabilities(self, examples: Iterable[Example]) -> Iterator[list[float]]:
        """Yield the probabilities of the labels, in the order of `labels`, for each example."""
        for batch in self._batches(examples):
            inputs = self._encoder.collate([{**example, "label": 0} for example in batch])
            yield from self._scores(inputs).softmax(1).tolist()

    def answers(self, examples: Iterable[Example]) -> Iterator[str]:
        """Yield the answer that the model generates for each example."""
        for batch in self._batches(examples):
            yield from self._written(batch)

    def evaluate(self, data: Any) -> Score | TextScore:
        """Score labeled examples as the run scores its held-out examples.

        Args:
            data: a data set with the columns of the prompt, and "label" or "answers".
        """
        score = new_score(self.task)
        for batch in self._batches(self._encoder.by_length(data)):
            inputs = self._encoder.collate(batch)
            width = inputs.labels.shape[1] if inputs.labels.dim() == 2 else 1
            score.add(self._scores(inputs, width), inputs.labels.to(self._device))
            if isinstance(score, TextScore):
                pairs = zip(self._written(batch), batch, strict=True)
                score.add_grades(torch.tensor([graded(text, e["answers"]) for text, e in pairs]))
        return score

    def _batches(self, examples: Iterable[Example]) -> Iterator[list[Example]]:
        size, batch = self._spec.eval_batch_size, []
        for example in examples:
            batch.append(example)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch

    @torch.no_grad()
    def _scores(self, batch: Batch, width: int = 1) -> Tensor:
        """Scores float32 [B, C], or [B, V, width] of generated answers."""
        inputs, mask = batch.inputs.to(self._device), batch.attention_mask.to(self._device)
        slices = batch.slices(self._spec.client_micro_batch)
        activations = self._sent(self._client(inputs[rows], mask[rows]) for rows in slices)
        head, scoring = self._server.lm_head, self._encoder.answers
        states = scoring.states(self._server.hidden(activations.float(), mask), width)
        return scoring.scores_of(states, head.weight, head.weight[scoring.ids], head.bias)

    def _sent(self, pieces: Iterable[Tensor]) -> Tensor:
        """Activations [b, S, H] as the server gets them, together [B, S, H]."""
        codec = self._spec.codec
        return torch.cat(
            [decode_activations(*encode_activations(h, codec), h.dtype) for h in pieces]
        )

    def _written(self, examples: Sequence[Example]) -> Iterator[str]:
        encoder, count = self._encoder, len(examples)
        assert isinstance(encoder, PromptEncoder)
        assert isinstance(encoder.answers, Completion)
        longest, rows = encoder.answers.longest, self._server.lm_head.weight
        batch = encoder.prompts(examples)
        prompts = Prompts(self._client, batch, self._spec.client_micro_batch, self._device)

        def ask(tokens: Tensor) -> tuple[Tensor, Tensor]:
            tokens = checked(tokens, count, longest, len(rows))
            return self._sent(h for _, h in prompts.activations(tokens)), prompts.mask(tokens)

        written = greedy(ask, Writer(self._server, rows), longest, encoder.answers.ends)
        return map(encoder.text, written.tolist())
