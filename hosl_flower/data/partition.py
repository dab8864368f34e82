"""Which client holds which examples, and in which order it visits them.

All partitions of a run are made from one loaded source; a process that serves a thousand
clients loads it once and keeps only the partitions used last.
"""

import contextlib
import io
import logging
import warnings
from typing import TYPE_CHECKING, Any

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.errors import DataError
from hosl_flower.tensors.seeds import derive_seed, permutation

if TYPE_CHECKING:  # heavy; flwr_datasets brings matplotlib, which a node with its own data spares
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner

else:
    Dataset = Partitioner = Any

log = logging.getLogger("hosl_flower")


_DRAWS = 20  # times the Dirichlet partitioner may try, eleven draws each


def make_partitioner(train: Dataset, spec: ClientSpec) -> Partitioner:
    """The partitioner of a run, with its training examples, already drawn.

    iid: equal parts to within one example. dirichlet: see flwr-datasets; every client gets
    min-partition-size or more. natural-id: client n holds the examples of the n-th id, in the
    order of their text ("10" before "2"); ids beyond num-clients are not used.
    DataError when the examples cannot be spread over so many clients.
    """
    if spec.num_clients > len(train):
        raise DataError(
            f"{spec.num_clients} clients but only {len(train)} training examples: lower "
            "num-clients or raise train-examples"
        )
    seed = derive_seed(spec.seed, "partition")
    if spec.partitioner == "dirichlet":
        return _dirichlet(train, spec, seed)
    if spec.partitioner == "natural-id":
        return _natural_id(train, spec)
    from flwr_datasets.partitioner import IidPartitioner

    partitioner = IidPartitioner(num_partitions=spec.num_clients)
    partitioner.dataset = train.select(permutation(len(train), seed))
    return partitioner


def _dirichlet(train: Dataset, spec: ClientSpec, seed: int) -> Partitioner:
    from flwr_datasets.partitioner import DirichletPartitioner

    clients, least = spec.num_clients, spec.min_partition_size
    if spec.task.target:
        raise DataError(
            f"partitioner = dirichlet spreads labels unevenly, task {spec.task.name} has none; use "
            "iid, or natural-id with a column such as a title"
        )
    if clients * least > len(train):
        raise DataError(
            f"{clients} clients with min-partition-size = {least} need {clients * least} training "
            f"examples, there are {len(train)}; lower num-clients or min-partition-size"
        )
    for number in range(_DRAWS):
        # the library draws eleven times; few clients with a small alpha need more
        own = derive_seed(seed, "redraw", number) if number else seed
        partitioner = DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=float(spec.dirichlet_alpha),
            min_partition_size=least,
            self_balancing=False,
            shuffle=True,
            seed=own % 2**32,
        )
        partitioner.dataset = train
        try:
            _draw(partitioner)
        except ValueError:  # it does not say how far off they were
            continue
        return partitioner
    raise DataError(
        f"dirichlet-alpha = {spec.dirichlet_alpha:g} leaves one of {clients} clients with fewer "
        f"than min-partition-size = {least} of {len(train)} examples; raise dirichlet-alpha or "
        f"lower num-clients or min-partition-size ({11 * _DRAWS} draws)"
    )


def _natural_id(train: Dataset, spec: ClientSpec) -> Partitioner:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    partitioner = NaturalIdPartitioner(partition_by=spec.partition_column)
    partitioner.dataset = train
    _draw(partitioner)
    if partitioner.num_partitions < spec.num_clients:
        raise DataError(
            f"num-clients = {spec.num_clients}, but column {spec.partition_column!r} names only "
            f"{partitioner.num_partitions} of them in {len(train)} training examples; lower "
            "num-clients"
        )
    return partitioner


def _draw(partitioner: Partitioner) -> None:
    """Have the examples spread now, not at the first client's request, and without the progress
    bars and the warning per draw that would fill the log of every worker."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        partitioner.load_partition(0)
