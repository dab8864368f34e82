"""The clients of a run: their number, and who holds which examples."""

from pydantic import Field

from hosl_flower.config.groups.base import Group
from hosl_flower.config.value_types import Alpha, Natural, Partitioner, Positive


class ClientsKeys(Group):
    """How many clients there are, and how the training examples are spread over them."""

    count: int = Field(
        1, alias="num-clients", ge=1, le=100_000, description="N, data partitions, each one client"
    )
    per_step: Natural = Field(
        0,
        alias="clients-per-step",
        description="K, clients drawn for each step (HO-SFL, FedAvg); 0 is all",
    )
    minimum: Positive = Field(
        1,
        alias="min-clients",
        description="a step goes on without failing clients as long as so many remain",
    )
    per_node: Natural = Field(
        0,
        alias="clients-per-node",
        description="clients one SuperNode serves; 0 spreads them over the nodes there are",
    )
    partitioner: Partitioner = Field(
        "iid", description="how training examples are spread over the clients"
    )
    dirichlet_alpha: Alpha = Field(0.5, description="of dirichlet: smaller is more uneven labels")
    partition_column: str = Field(
        "", description="of natural-id: the column that says whose example it is"
    )
    min_partition_size: Positive = Field(
        1, description="of dirichlet: fewest examples a client may get"
    )

    @property
    def sampled(self) -> int:
        """K, the clients of a step."""
        return self.per_step or self.count
