"""Which client holds which examples, and in which order it visits them.

All partitions of a run are made from one loaded source; a process that serves a thousand
clients loads it once and keeps only the partitions used last.
"""

import warnings
from collections import Counter, OrderedDict

from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
)

from hosl_flower.data import load_source, take
from hosl_flower.errors import DataError, ProtocolError
from hosl_flower.perturb import derive_seed, permutation
from hosl_flower.spec import ClientSpec
from hosl_flower.tasks import Batch, Encoder

PLACEHOLDER = "{partition}"  # in a node's data-path: the number of the client it is for
_KEPT = 64  # partitions a process remembers


def shared_between_partitions(own: str) -> bool:
    """Whether a node's data-path is the same data for every client the node serves."""
    return bool(own) and PLACEHOLDER not in own


def make_partitioner(train: Dataset, spec: ClientSpec) -> Partitioner:
    """The partitioner of a run, with its training examples; DataError when they cannot be spread
    over so many clients."""
    of = spec.num_clients
    if of > len(train):
        raise DataError(
            f"{of} clients but only {len(train)} training examples: lower num-clients or raise "
            "train-examples"
        )
    seed = derive_seed(spec.seed, "partition")
    if spec.partitioner == "iid":
        partitioner: Partitioner = IidPartitioner(num_partitions=of)
        partitioner.dataset = train.select(permutation(len(train), seed))
        return partitioner
    if spec.partitioner == "dirichlet":
        partitioner = DirichletPartitioner(
            num_partitions=of,
            partition_by="label",
            alpha=float(spec.dirichlet_alpha),
            min_partition_size=spec.min_partition_size,
            self_balancing=False,
            seed=seed % 2**32,
        )
        partitioner.dataset = train
        _check_dirichlet(partitioner, train, spec)
        return partitioner
    partitioner = NaturalIdPartitioner(partition_by=spec.partition_column)
    partitioner.dataset = train
    if partitioner.num_partitions < of:
        raise DataError(
            f"num-clients = {of}, but column {spec.partition_column!r} names only "
            f"{partitioner.num_partitions} of them; lower num-clients"
        )
    return partitioner


def _check_dirichlet(partitioner: Partitioner, train: Dataset, spec: ClientSpec) -> None:
    """Draw the partition; flwr-datasets tries eleven times to reach the least size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns at every try
            assert partitioner.num_partitions == spec.num_clients
    except ValueError as error:
        raise DataError(
            f"dirichlet-alpha = {spec.dirichlet_alpha:g} leaves one of {spec.num_clients} clients "
            f"with fewer than min-partition-size = {spec.min_partition_size} of {len(train)} "
            "examples; raise dirichlet-alpha or lower num-clients or min-partition-size"
        ) from error


class ClientData:
    """What one client holds: its partition of the training data and the held-out part.

    held_out: shared by all clients of a process, sorted by `by_length`.
    """

    def __init__(self, train: Dataset, held_out: Dataset, encoder: Encoder, order_seed: int):
        if len(train) == 0:
            raise DataError("this client's partition is empty; lower num-clients")
        self.train, self.held_out = train, held_out
        self.encoder = encoder
        self.order_seed = order_seed
        self._order: tuple[int, list[int]] = (-1, [])

    def train_batch(self, number: int, size: int) -> Batch:
        """Mini-batch `number` (0, 1, ...) of an endless sequence of shuffled epochs."""
        size = min(size, len(self.train))
        rows = [self.train[self._row(i)] for i in range(number * size, (number + 1) * size)]
        return self.encoder.collate(rows)

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.train))
        if self._order[0] != epoch:
            seed = derive_seed(self.order_seed, "epoch", epoch)
            self._order = (epoch, permutation(len(self.train), seed))
        return self._order[1][offset]

    def held_out_batch(self, number: int, size: int) -> Batch:
        """Held-out examples number * size onwards; DataError past the end."""
        rows = range(number * size, min((number + 1) * size, len(self.held_out)))
        if not rows:
            raise DataError(f"held-out batch {number} is past {len(self.held_out)} examples")
        return self.encoder.collate([self.held_out[row] for row in rows])

    def label_counts(self) -> list[int]:
        """Training examples per label."""
        counts = Counter(self.train["label"])
        return [counts[label] for label in range(len(self.encoder.task.verbalizers))]


def by_length(held_out: Dataset, encoder: Encoder) -> Dataset:
    """Like lengths together: fewer padding tokens to forward, the same metrics."""
    columns = [held_out[name] for name in encoder.task.fields]
    lengths = [sum(map(len, texts)) for texts in zip(*columns, strict=True)]
    return held_out.select(sorted(range(len(lengths)), key=lengths.__getitem__))


class DataPool:
    """The data of every client one process serves.

    own: this node's data-path, used instead of the run's source and whole: a file or directory,
    with {partition} in it where the node serves several clients.
    """

    def __init__(self, spec: ClientSpec, encoder: Encoder, own: str = ""):
        self.spec, self.encoder, self.own = spec, encoder, own
        self._clients: OrderedDict[int, ClientData] = OrderedDict()
        self._shared: tuple[Partitioner, Dataset] | None = None
        self._served: int | None = None

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
        if self._shared is None:
            train, held_out = self._load(self.spec.source)
            self._shared = make_partitioner(train, self.spec), held_out
        partitioner, held_out = self._shared
        return self._made(number, partitioner.load_partition(number), held_out)

    def _own(self, number: int) -> ClientData:
        if shared_between_partitions(self.own):
            if self._served not in (None, number):
                raise DataError(
                    f"data-path {self.own!r} would serve clients {self._served} and {number} "
                    f"alike; put {PLACEHOLDER} into it, or set clients-per-node = 1"
                )
            self._served = number
        return self._made(number, *self._load(self.own.replace(PLACEHOLDER, str(number))))

    def _load(self, source: str) -> tuple[Dataset, Dataset]:
        spec = self.spec
        column = spec.partition_column if spec.partitioner == "natural-id" else ""
        train, held_out = load_source(source, spec.task, spec.seed, column)
        train = take(train, spec.train_examples, derive_seed(spec.seed, "train-examples"))
        held_out = take(held_out, spec.eval_examples, derive_seed(spec.seed, "eval-examples"))
        return train, by_length(held_out, self.encoder)

    def _made(self, number: int, train: Dataset, held_out: Dataset) -> ClientData:
        order_seed = derive_seed(self.spec.seed, "order", number)
        return ClientData(train, held_out, self.encoder, order_seed)
