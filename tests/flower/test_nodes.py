"""link/nodes.py, flower/announced.py: which SuperNode serves which clients, and who does not get
them."""

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from grids import LocalGrid

from hosl_flower.errors import ConfigError
from hosl_flower.flower.nodes import Nodes

TEN = 10


@pytest.fixture(autouse=True)
def _inside_a_flower_process(monkeypatch):
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def fleet(numbers, **more):
    """Nodes 50, 51, ... with these partition-ids."""
    return {50 + i: {"partition-id": number, **more} for i, number in enumerate(numbers)}


def found(nodes, clients=TEN, per_node=0, required=None, seconds=0.1):
    grid = nodes if isinstance(nodes, LocalGrid) else LocalGrid(nodes)
    own = Nodes(grid, clients, per_node, 20.0)
    own.wait(seconds, clients if required is None else required)
    return own


def serving(nodes):
    return {p: nodes.of(p).id for p in nodes.served()}


ONE_OF_ONE = {"partition-id": 0, "num-partitions": 1}


def test_a_node_that_says_it_is_the_only_one_does_not_become_every_client():
    nodes = {40: ONE_OF_ONE, **fleet(range(1, TEN))}
    with pytest.raises(ConfigError) as refused:
        found(nodes)
    said = str(refused.value)
    assert "SuperNode 40 (partition-id=0, num-partitions=1)" in said
    assert "SuperNode 50 (partition-id=1, no num-partitions)" in said
    assert "... (9 in all)" in said
    assert "clients-per-node" in said


@pytest.mark.parametrize(
    "nodes",
    [
        {40: {"partition-id": 0, "num-partitions": 5}, **fleet(range(1, TEN))},
        {40: {"partition-id": 0, "num-partitions": 9}, **fleet(range(1, TEN))},
        {40: {"partition-id": 0, "num-partitions": 5}, **fleet(range(1, 5))},
        {40: {"partition-id": 2}, **fleet(range(2), **{"num-partitions": 3})},
        {40: {"partition-id": 2, "num-partitions": 4}, **fleet(range(2), **{"num-partitions": 3})},
    ],
)
def test_nodes_that_do_not_agree_are_refused_by_name(nodes):
    with pytest.raises(ConfigError, match=r"do not agree.*SuperNode 40 \(partition-id="):
        found(nodes, required=2)


def test_clients_per_node_counts_instead_of_what_nodes_announce():
    nodes = {40: ONE_OF_ONE, **fleet(range(1, TEN))}
    assert serving(found(nodes, per_node=1)) == {0: 40, **{p: 49 + p for p in range(1, TEN)}}
    assert serving(found(fleet(range(TEN)), per_node=5)) == {p: 50 + p % 2 for p in range(TEN)}


@pytest.mark.parametrize(
    "nodes",
    [
        {40: {"partition-id": 0, "num-partitions": 12}, **fleet(range(1, TEN))},
        {40: {"partition-id": 0, "num-partitions": TEN}, **fleet(range(1, TEN))},
    ],
)
def test_as_many_nodes_as_clients_is_what_no_announcement_means(nodes):
    assert serving(found(nodes)) == {0: 40, **{p: 49 + p for p in range(1, TEN)}}


class SlowGrid(LocalGrid):
    """The answers of nodes from 50 on come after some looks at who is there."""

    looks = 0

    def get_node_ids(self):
        self.looks += 1
        return super().get_node_ids()

    def pull_messages(self, ids):
        slow = {m.metadata.message_id for m in self.sent if m.metadata.dst_node_id >= 50}
        return super().pull_messages([i for i in ids if i not in slow or self.looks > 3])


def test_the_first_to_answer_does_not_settle_it_while_others_are_there():
    nodes = {40: ONE_OF_ONE, **fleet(range(1, TEN))}
    with pytest.raises(ConfigError, match="do not agree"):
        found(SlowGrid(nodes), seconds=5.0)


@pytest.mark.parametrize("broken", [{}, {"partition_id": 1}, {"partition-id": 1, "crash": True}])
def test_the_only_node_that_is_well_does_not_get_the_clients_of_the_others(broken):
    nodes = {40: ONE_OF_ONE, 41: broken}
    with pytest.raises(ConfigError, match=r"spread over 1 SuperNode.*SuperNode 41 .*per-node = 10"):
        found(nodes)
    assert set(serving(found(nodes, per_node=TEN)).values()) == {40}
    assert set(serving(found({40: ONE_OF_ONE})).values()) == {40}, "alone it may"


def test_the_reason_of_a_node_that_fails_is_one_short_line():
    grid = LocalGrid({40: {"partition-id": 0}})
    reason = "gone\nrun failed: \x1b[31mforged" + "x" * 5000
    grid.answer = lambda message, config: Message(Error(code=2, reason=reason), reply_to=message)
    with pytest.raises(ConfigError) as refused:
        found(grid, clients=1)
    said = str(refused.value)
    assert "SuperNode 40 failed: gone\\nrun failed: \\x1b[31mforgedx" in said
    assert said.isprintable()
    assert len(said) < 700


def test_a_node_that_fails_at_first_is_asked_again_before_clients_are_shared_out():
    grid, failed = LocalGrid(fleet(range(2), **{"num-partitions": 2})), []
    original = grid.answer

    def fails_once(message, config):
        if message.metadata.dst_node_id == 51 and not failed:
            failed.append(message)
            return Message(Error(code=2, reason="busy"), reply_to=message)
        return original(message, config)

    grid.answer = fails_once
    assert serving(found(grid, seconds=5.0)) == {p: 50 + p % 2 for p in range(TEN)}


def test_a_node_that_never_answers_is_waited_for_and_then_done_without():
    nodes = {40: ONE_OF_ONE, 41: None}
    assert set(serving(found(nodes)).values()) == {40}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"num-partitions": 2}, "has no partition-id; start it with --node-config"),
        ({"partition-id": -1}, "whole number from 0 for partition-id, got -1"),
        ({"partition-id": "1"}, "whole number from 0 for partition-id, got '1'"),
        ({"partition-id": True}, "whole number from 0 for partition-id, got True"),
        ({"partition-id": 1.0}, r"whole number from 0 for partition-id, got 1\.0"),
        ({"partition-id": 2, "num-partitions": 2}, "above partition-id = 2 .*got 2"),
        ({"partition-id": 1, "num-partitions": "2"}, "above partition-id = 1 .*got '2'"),
        ({"partition-id": 1, "num-partitions": 0}, "above partition-id = 1 .*got 0"),
        ({"partition-id": 1, "num-partitions": -1}, "above partition-id = 1 .*got -1"),
        ({"partition-id": 1, "num-partitions": 2.0}, r"above partition-id = 1 .*got 2\.0"),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(config, complaint):
    with pytest.raises(ConfigError, match=f"SuperNode 41.*{complaint}"):
        found({40: {"partition-id": 0, "num-partitions": 2}, 41: config}, clients=2)


def test_nodes_that_serve_nobody_are_named(caplog):
    nodes = {**fleet(range(2)), 40: {"partition-id": 7}, 41: {}}
    assert serving(found(nodes, clients=2)) == {0: 50, 1: 51}
    assert "left alone: SuperNode 40 (partition-id=7, no num-partitions)" in caplog.text
    assert "left alone: SuperNode 41 has no partition-id" in caplog.text


def test_a_node_that_comes_later_and_does_not_agree_is_left_alone(caplog):
    there = {50: {"partition-id": 0, "num-partitions": 2}}
    nodes = found(there, required=5)
    before = serving(nodes)
    there[51] = {"partition-id": 1, "num-partitions": 1}  # cannot be
    there[52] = {"partition-id": 1, "num-partitions": 4}
    there[53] = {"partition-id": 1}
    for _ in range(4):
        nodes.look()
    assert serving(nodes) == before
    assert caplog.text.count("left alone: ") == 3
    there[54] = {"partition-id": 1, "num-partitions": 2}
    nodes.look()
    assert serving(nodes) == {p: 50 + 4 * (p % 2) for p in range(TEN)}


def test_a_lost_node_is_replaced_by_one_that_agrees_alone(caplog):
    there = fleet(range(3))
    nodes = found(there, clients=3)
    nodes.doubt(nodes.of(1))
    there[60] = {"partition-id": 1, "num-partitions": 2}
    nodes.look()
    assert nodes.of(1).id == 51
    del there[60]
    there[61] = {"partition-id": 1}
    nodes.look()
    assert serving(nodes) == {0: 50, 1: 61, 2: 52}
    assert "SuperNode 61 takes the place of 51, partition 1" in caplog.text


class Boasting(LocalGrid):
    """Nodes whose answers claim to be the simulation engine's."""

    def answer(self, message, config):
        record = ConfigRecord({**config, "one-data": False, "simulated": True})
        return Message(RecordDict({"config": record}), reply_to=message)


def test_a_node_cannot_say_that_the_run_is_simulated(monkeypatch):
    nodes = found(Boasting(fleet(range(2))), clients=2)
    assert not nodes.simulated
    monkeypatch.setattr("hosl_flower.flower.nodes.is_simulated", lambda: True)
    assert nodes.simulated, "the engine is in the ServerApp's own process"
