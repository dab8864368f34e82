"""The examples of one client, and those of all clients that a process serves."""

import logging
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.config.node_config import PLACEHOLDER, shared_between_partitions
from hosl_flower.data.encoders.base import ExampleEncoder
from hosl_flower.data.encoders.prompts import PromptEncoder
from hosl_flower.data.partition import make_partitioner
from hosl_flower.errors import DataError, ProtocolError
from hosl_flower.models.batch import Batch
from hosl_flower.tensors.seeds import derive_seed, permutation

if TYPE_CHECKING:  # heavy; flwr_datasets brings matplotlib, which a node with its own data spares
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner

    from hosl_flower.data.overlap import Overlap, Split
else:
    Dataset = Partitioner = Any

log = logging.getLogger("hosl_flower")

_KEPT = 64  # partitions a process remembers


class ClientData:
    """What one client holds: its partition of the training data and the held-out part.

    held_out: shared by all clients of a process, sorted by length. overlap: of held-out examples
    that were drawn off the training part, with the latter.
    """

    def __init__(
        self,
        train: Dataset,
        held_out: Dataset,
        encoder: ExampleEncoder,
        order_seed: int,
        overlap: "Overlap | None" = None,
    ):
        if len(train) == 0:
            raise DataError("this client's partition is empty; lower num-clients")
        self.train, self.held_out, self.overlap = train, held_out, overlap
        self.encoder = encoder
        self.order_seed = order_seed
        self._order: tuple[int, list[int]] = (-1, [])

    def train_batch(self, number: int, size: int) -> Batch:
        """Mini-batch `number` (0, 1, ...) of an endless sequence of shuffled epochs."""
        size = min(size, len(self.train))
        rows = [self.train[self._row(i)] for i in range(number * size, (number + 1) * size)]
        return self.encoder.collate(rows)

    def repeated(self, number: int, size: int) -> list[int]:
        """Places in mini-batch `number` of examples that are in it before: an epoch ends in it."""
        size = min(size, len(self.train))
        rows = [self._row(i) for i in range(number * size, (number + 1) * size)]
        return [place for place, row in enumerate(rows) if row in rows[:place]]

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.train))
        if self._order[0] != epoch:
            seed = derive_seed(self.order_seed, "epoch", epoch)
            self._order = (epoch, permutation(len(self.train), seed))
        return self._order[1][offset]

    def train_labels(self, number: int, size: int) -> Tensor:
        """Labels [B] int64 of mini-batch `number`."""
        size = min(size, len(self.train))
        rows = [self._row(i) for i in range(number * size, (number + 1) * size)]
        return torch.tensor(self.train[rows]["label"])

    def check(self) -> None:
        """DataError where a training example cannot be encoded."""
        for row in range(len(self.train)):
            self.encoder.collate([self.train[row]])

    def held_out_labels(self, first: int, count: int) -> Tensor:
        """Labels int64 of held-out examples first.., at most so many."""
        return torch.tensor(self.held_out["label"][:][first : first + count])

    def held_out_batch(self, number: int, size: int) -> Batch:
        """Held-out examples number * size onwards; DataError past the end."""
        return self.encoder.collate(self.held_out_examples(number, size))

    def held_out_examples(self, number: int, size: int) -> list[dict[str, Any]]:
        """Examples of a held-out batch; DataError past the end."""
        rows = range(number * size, min((number + 1) * size, len(self.held_out)))
        if not rows:
            raise DataError(f"held-out batch {number} is past {len(self.held_out)} examples")
        return [self.held_out[row] for row in rows]

    def label_counts(self) -> list[int]:
        """Training examples per label; of generated text all count as one."""
        if self.encoder.task.target:
            return [len(self.train)]
        counts = Counter(self.train["label"][:])  # read at once, not row by row
        return [counts[label] for label in range(len(self.encoder.task.verbalizers))]


class DataPool:
    """The data of every client one process serves.

    own: this node's data-path, used instead of the run's source and whole: a file or directory,
    with {partition} in it where the node serves several clients. columns: those that a run may use,
    all where none are given.
    """

    def __init__(
        self,
        spec: ClientSpec,
        encoder: ExampleEncoder,
        own: str = "",
        columns: tuple[str, ...] = (),
    ):
        self.spec, self.encoder, self.own, self.columns = spec, encoder, own, columns
        self._clients: OrderedDict[int, ClientData] = OrderedDict()
        self._shared: tuple[Partitioner, Dataset, Overlap | None] | None = None
        self._served: int | None = None

    @property
    def text_encoder(self) -> PromptEncoder:
        """Of prompts: a language model's. ProtocolError where the run has another kind."""
        if not isinstance(self.encoder, PromptEncoder):
            raise ProtocolError(
                f"the request is for a language model, task {self.spec.task.name} has none here: "
                "server and client do not run the same release"
            )
        return self.encoder

    def client(self, number: int) -> ClientData:
        """The data of one client. Raises DataError, or ProtocolError for one there is not."""
        if number >= self.spec.num_clients:
            raise ProtocolError(f"partition {number} is not one of {self.spec.num_clients}")
        if number not in self._clients:
            self._clients[number] = self._own(number) if self.own else self._partition(number)
        self._clients.move_to_end(number)
        if len(self._clients) > _KEPT:
            self._clients.popitem(last=False)
        return self._clients[number]

    def _partition(self, number: int) -> ClientData:
        if not self.spec.source:
            raise DataError(
                f"task {self.spec.task.name} has no data here: set data-path in the run config, "
                "or in this node's --node-config",
                public="there is no data here: set data-path in this node's --node-config",
            )
        if self._shared is None:
            column = self.spec.partition_column if self.spec.partitioner == "natural-id" else ""
            train, *rest = self._load(self.spec.source, column)
            self._shared = make_partitioner(train, self.spec), *rest
        partitioner, *rest = self._shared
        return self._made(number, partitioner.load_partition(number), *rest)

    def _own(self, number: int) -> ClientData:
        if shared_between_partitions(self.own):
            if self._served not in (None, number):
                raise DataError(
                    f"data-path {self.own!r} would serve clients {self._served} and {number} "
                    f"alike; put {PLACEHOLDER} into it, or set clients-per-node = 1",
                    public=f"this node's data-path would serve clients {self._served} and {number} "
                    f"alike; put {PLACEHOLDER} into it, or set clients-per-node = 1",
                )
            self._served = number
        return self._made(number, *self._load(self.own.replace(PLACEHOLDER, str(number))))

    def _load(
        self, source: str, partition_column: str = ""
    ) -> "tuple[Dataset, Dataset, Overlap | None]":
        from hosl_flower.data.sources import load_source, take

        spec = self.spec
        splits: list[Split] = []
        train, held_out = load_source(
            source,
            spec.task,
            spec.seed,
            partition_column,
            spec.held_out_examples,
            splits.append,
            self.columns,
        )
        seeds = derive_seed(spec.seed, "train-examples"), derive_seed(spec.seed, "eval-examples")
        train = take(train, spec.train_examples, seeds[0])
        held_out = take(held_out, spec.eval_examples, seeds[1])
        overlap = self._overlap(splits[0], *seeds) if splits and not spec.task.image else None
        return train, self.encoder.by_length(held_out), overlap

    def _overlap(self, split: "Split", train_seed: int, eval_seed: int) -> "Overlap":
        from hosl_flower.data.sources import taken

        spec = self.spec
        found = split._replace(
            train_rows=taken(split.train_rows, spec.train_examples, train_seed),
            held_out_rows=taken(split.held_out_rows, spec.eval_examples, eval_seed),
        ).overlap(spec.task.fields)
        if found.matters and not spec.tells_labels:  # the server is told nothing of it
            log.warning("%s", found)
        return found

    def _made(
        self, number: int, train: Dataset, held_out: Dataset, overlap: "Overlap | None"
    ) -> ClientData:
        order_seed = derive_seed(self.spec.seed, "order", number)
        return ClientData(train, held_out, self.encoder, order_seed, overlap)
