"""The mini-batches that requests name by number."""

from torch import Tensor

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.data.client_data import DataPool
from hosl_flower.models.batch import Batch


class MiniBatches:
    """Mini-batches of the partitions that a process serves."""

    def __init__(self, pool: DataPool, spec: ClientSpec):
        self.pool, self.spec = pool, spec

    def train(self, partition: int, number: int) -> Batch:
        """A training mini-batch of a partition."""
        return self.pool.client(partition).train_batch(number, self.spec.batch_size)

    def train_labels(self, partition: int, number: int) -> Tensor:
        """The labels of a training mini-batch [B]."""
        return self.pool.client(partition).train_labels(number, self.spec.batch_size)

    def repeated(self, partition: int, number: int) -> list[int]:
        """Places in a training mini-batch of examples that are in it before."""
        return self.pool.client(partition).repeated(number, self.spec.batch_size)

    def held_out(self, partition: int, number: int) -> Batch:
        """A held-out batch of a partition."""
        return self.pool.client(partition).held_out_batch(number, self.spec.eval_batch_size)

    def held_out_labels(self, partition: int, first: int, count: int) -> Tensor:
        """The labels of `count` held-out examples from number `first` on."""
        return self.pool.client(partition).held_out_labels(first, count)


class OneMiniBatch(MiniBatches):
    """The same training mini-batch whatever is asked for, to see what it takes."""

    def __init__(self, pool: DataPool, spec: ClientSpec, batch: Batch):
        super().__init__(pool, spec)
        self.batch = batch

    def train(self, partition: int, number: int) -> Batch:
        """The mini-batch."""
        return self.batch

    def train_labels(self, partition: int, number: int) -> Tensor:
        """Its labels."""
        return self.batch.labels
