"""data/partition.py: who gets which examples, in which order they are visited, what is kept."""

import time

import datasets
import numpy
import pytest
from specs import client_spec

from hosl_flower.config.node_config import shared_between_partitions
from hosl_flower.data.client_data import ClientData, DataPool
from hosl_flower.data.encoders.prompts import PromptEncoder
from hosl_flower.data.partition import make_partitioner
from hosl_flower.errors import DataError, ProtocolError
from hosl_flower.models.processors import load_tokenizer
from hosl_flower.run.figures import clients_with, draw_partition
from hosl_flower.tasks.task import Task

TASK = Task("own", "{text} It was", ("terrible", "great"), ("no", "yes"))


def numbered(count, **columns):
    own = {"text": [f"number {i}" for i in range(count)], "label": [i % 2 for i in range(count)]}
    return datasets.Dataset.from_dict({**own, **columns})


def shares(data, **changes):
    spec = client_spec(task=TASK, **changes)
    partitioner = make_partitioner(data, spec)
    return [partitioner.load_partition(n) for n in range(spec.num_clients)]


def examples(*parts):
    return sorted((row["text"], row["label"]) for part in parts for row in part)


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder(TASK, load_tokenizer("random:opt-tiny"), 32)


WHO = {"who": [f"person {i % 4}" for i in range(40)]}


@pytest.mark.parametrize(
    ("clients", "changes"),
    [
        (1, {}),
        (3, {}),
        (40, {}),
        (3, {"partitioner": "dirichlet"}),
        (5, {"partitioner": "dirichlet", "dirichlet_alpha": 100.0}),
        (4, {"partitioner": "natural-id", "partition_column": "who"}),
    ],
)
def test_partitions_cover_without_overlap(clients, changes):
    data, settings = numbered(40, **WHO), {"num_clients": clients, **changes}
    state = numpy.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (shares(data, **settings, seed=seed) for seed in (7, 7, 8))
    assert examples(*first) == examples(data)
    assert [examples(s) for s in first] == [examples(s) for s in again]
    if clients > 1 and changes.get("partitioner") != "natural-id":
        assert [list(s["text"]) for s in first] != [list(s["text"]) for s in other]
    now = numpy.random.get_state()[1]  # noqa: NPY002
    assert (now == state).all(), "no global generator is touched"


def test_iid_shares_are_equal_to_one():
    assert sorted(map(len, shares(numbered(20), num_clients=3))) == [6, 7, 7]


def test_a_small_alpha_makes_labels_uneven():
    def skew(alpha):
        own = shares(numbered(400), num_clients=4, partitioner="dirichlet", dirichlet_alpha=alpha)
        return max(abs(sum(share["label"]) / len(share) - 0.5) for share in own)

    assert skew(0.1) > 0.3
    assert skew(1000.0) < 0.1


def test_a_least_size_is_kept():
    own = shares(numbered(400), num_clients=4, partitioner="dirichlet", min_partition_size=50)
    assert min(map(len, own)) >= 50


def test_natural_ids_are_whole_and_in_order():
    data = numbered(40, **WHO)
    settings = {"partitioner": "natural-id", "partition_column": "who"}
    own = shares(data, num_clients=2, **settings)  # ids beyond the clients are not used
    assert [set(share["who"]) for share in own] == [{"person 0"}, {"person 1"}]


def test_few_clients_and_a_small_alpha_are_drawn_until_it_fits(monkeypatch):
    uneven = {"num_clients": 10, "partitioner": "dirichlet", "dirichlet_alpha": 0.1, "seed": 0}
    with monkeypatch.context() as once:
        once.setattr("hosl_flower.data.partition._DRAWS", 1)
        with pytest.raises(DataError, match="leaves one of 10 clients"):
            shares(numbered(400), **uneven)
    own = shares(numbered(400), **uneven)
    assert min(map(len, own)) >= 1
    assert sum(map(len, own)) == 400


@pytest.mark.parametrize("partitioner", ["dirichlet", "natural-id"])
def test_drawing_prints_nothing(capfd, partitioner):
    data = numbered(80, who=[f"person {i % 4}" for i in range(80)]).select(range(0, 80, 2))
    # 15 of 40 for each of 2 clients: some draws fail, and flwr-datasets warns of each
    settings = {"dirichlet_alpha": 1.0, "min_partition_size": 15, "partition_column": "who"}
    shares(data, num_clients=2, partitioner=partitioner, **settings)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_clients": 41}, r"41 clients but only 40 training examples.*num-clients"),
        (
            {"num_clients": 30, "partitioner": "dirichlet", "dirichlet_alpha": 0.01},
            r"alpha = 0.01 leaves one of 30 clients with fewer than min-partition-size = 1",
        ),
        (
            {"num_clients": 5, "partitioner": "dirichlet", "min_partition_size": 8},
            r"min-partition-size = 8 of 40 examples; raise dirichlet-alpha or lower num-clients",
        ),
        (
            {"num_clients": 5, "partitioner": "dirichlet", "min_partition_size": 9},
            r"5 clients with min-partition-size = 9 need 45 training examples, there are 40; lower",
        ),
        (
            {"num_clients": 5, "partitioner": "natural-id", "partition_column": "who"},
            r"num-clients = 5, but column 'who' names only 4 of them in 40 training",
        ),
    ],
)
def test_data_that_cannot_be_spread_is_one_clear_error(changes, complaint):
    with pytest.raises(DataError, match=complaint):
        shares(numbered(40, **WHO), **changes)


def visits(data, batches, size):
    """Which training examples a client sees, in order."""
    seen = []
    for number in range(batches):
        batch = data.train_batch(number, size)
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            seen.append(tuple(ids[mask.bool()].tolist()))
    index = {tuple(data.encoder.encode(row)): i for i, row in enumerate(data.train)}
    return [index[row] for row in seen]


@pytest.mark.parametrize("size", [1, 4, 7, 12, 20])
def test_every_epoch_visits_each_example_once(encoder, size):
    order = visits(ClientData(numbered(12), numbered(4), encoder, 3), 24, size)
    epochs = [order[i : i + 12] for i in range(0, len(order) - 11, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order == visits(ClientData(numbered(12), numbered(4), encoder, 3), 24, size)


def test_clients_with_data_of_their_own_visit_it_in_their_own_order(tmp_path, encoder):
    numbered(20).to_csv(tmp_path / "own.csv")
    spec = client_spec(task=TASK, num_clients=9, train_examples=0, eval_examples=0)
    own = [DataPool(spec, encoder, str(tmp_path / "own.csv")).client(n) for n in (0, 0, 1)]
    assert [len(data.train) for data in own] == [16, 16, 16]
    first, again, other = (visits(data, 4, 4) for data in own)
    assert first == again != other
    assert sum(own[0].label_counts()) == 16


def test_no_data_anywhere_is_one_clear_error(encoder):
    spec = client_spec(task=TASK, source="")
    with pytest.raises(DataError, match=r"task own has no data here: set data-path .*node-config"):
        DataPool(spec, encoder).client(0)


def test_a_file_for_each_client_of_a_node(tmp_path, encoder):
    for n in range(3):
        numbered(10 + 10 * n).to_csv(tmp_path / f"{n}.csv")
    spec = client_spec(task=TASK, num_clients=3, train_examples=0, eval_examples=0)
    path = str(tmp_path / "{partition}.csv")
    assert not shared_between_partitions(path)
    pool = DataPool(spec, encoder, path)
    assert [len(pool.client(n).train) for n in range(3)] == [8, 16, 24]


def test_a_file_of_its_own_needs_no_partition_column(tmp_path, encoder):
    numbered(10).to_csv(tmp_path / "own.csv")
    settings = {"partitioner": "natural-id", "partition_column": "who", "train_examples": 0}
    pool = DataPool(client_spec(task=TASK, **settings), encoder, str(tmp_path / "own.csv"))
    assert len(pool.client(1).train) == 8


def test_natural_ids_are_read_from_the_source(tmp_path, encoder):
    source = str(tmp_path / "all.csv")
    numbered(40, **WHO).to_csv(source)
    settings = {"partitioner": "natural-id", "partition_column": "who", "num_clients": 4}
    spec = client_spec(task=TASK, source=source, train_examples=0, **settings)
    pool = DataPool(spec, encoder)
    clients = [pool.client(n) for n in range(4)]
    assert [set(client.train["who"]) for client in clients] == [{f"person {n}"} for n in range(4)]
    assert sum(len(client.train) for client in clients) == 32


def test_one_file_is_not_quietly_given_to_two_clients(tmp_path, encoder):
    numbered(10).to_csv(tmp_path / "own.csv")
    own = str(tmp_path / "own.csv")
    assert shared_between_partitions(own)
    assert not shared_between_partitions("")
    pool = DataPool(client_spec(task=TASK, num_clients=3), encoder, own)
    pool.client(2)
    with pytest.raises(DataError, match=r"serve clients 2 and 0 alike; put \{partition\} into it"):
        pool.client(0)


def test_clients_of_one_run_share_what_is_drawn(tmp_path, encoder):
    source = str(tmp_path / "all.csv")
    numbered(30).to_csv(source)
    spec = client_spec(task=TASK, source=source, num_clients=3, train_examples=15, eval_examples=4)
    clients = [DataPool(spec, encoder).client(n) for n in range(3)]
    assert len(set(examples(*(client.train for client in clients)))) == 15
    assert [len(client.held_out) for client in clients] == [4, 4, 4]


def test_a_client_there_is_not_is_refused(encoder):
    with pytest.raises(ProtocolError, match="partition 2 is not one of 2"):
        DataPool(client_spec(task=TASK), encoder).client(2)


def test_held_out_batches_cover_everything_once(encoder):
    data = ClientData(numbered(4), numbered(11), encoder, 0)
    labels = [data.held_out_batch(n, 4).labels.tolist() for n in range(3)]
    assert [len(batch) for batch in labels] == [4, 4, 3]
    assert sum(map(sum, labels)) == sum(numbered(11)["label"])
    with pytest.raises(DataError, match="batch 3 is past 11 examples"):
        data.held_out_batch(3, 4)


def test_a_thousand_clients_load_once_and_few_are_kept(encoder, monkeypatch):
    from hosl_flower.data import sources as data

    loads = []
    original = data.load_source
    monkeypatch.setattr(data, "load_source", lambda *a: loads.append(a) or original(*a))
    spec = client_spec(num_clients=1000, train_examples=0)
    pool = DataPool(spec, PromptEncoder(spec.task, load_tokenizer(spec.model), 32))
    started = time.monotonic()
    counts = [pool.client(n).label_counts() for n in range(1000)]
    assert time.monotonic() - started < 30
    assert len(loads) == 1
    assert len(pool._clients) == 64
    assert len({id(client.held_out) for client in pool._clients.values()}) == 1
    assert {sum(own) for own in counts} == {4, 5}


@pytest.mark.parametrize("clients", [1, 1000])
def test_the_partition_is_drawn(tmp_path, clients):
    path = tmp_path / "partition.png"
    draw_partition(path, [[3 + n % 5, 2] for n in range(clients)], ["ham", "spam"])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_clients_are_counted_in_words():
    assert clients_with([240]) == "1 client with 240"
    assert clients_with([2, 4, 3]) == "3 clients with 2 to 4"
