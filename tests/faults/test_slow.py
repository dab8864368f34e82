"""Slow clients and bad networks: a step waits no longer than it is told to, and a broken connection
costs time only."""

import time

from fleet import kill, slowed, wait_for
from proxy import Proxy

from hosl_flower.flower.processes import free_port
from hosl_flower.flower.stream.link import _CLOSE_SECONDS

STOP, CONTINUE = 19, 18


def test_a_client_ten_times_slower_than_the_others(whole, tmp_path):
    keys = {"min-clients": 2, "step-deadline": 0.3, "steps": 80, "eval-every": 40}
    run = whole.submit(tmp_path, "run", **keys)
    run.reach(5)
    with slowed(whole.apps("clientapp", whole.nodes[2]), 10):
        run.reach(70)
    results = run.results()
    took_part = results["clients"]["steps_taken_part"]
    assert took_part["0"] == 80
    assert 5 <= took_part["2"] <= 80
    assert 2 in results["clients"]["fingerprint_checked"], "it was caught up"


def test_a_client_that_stands_still_costs_a_step_its_deadline_once(whole, tmp_path):
    keys = {"min-clients": 2, "step-deadline": 2.0, "steps": 80, "eval-every": 80}
    run = whole.submit(tmp_path, "run", **keys)
    run.reach(5)
    still = whole.apps("clientapp", whole.nodes[2])
    for pid in still:
        kill(pid, STOP)
    run.reach(60)
    for pid in still:
        kill(pid, CONTINUE)
    results = run.results()
    reasons = [row["dropped"]["2"] for row in run.curve if "dropped" in row]
    assert reasons == ["it did not answer within 2 s (step-deadline)"]
    assert results["clients"]["steps_taken_part"]["2"] < 80
    assert results["clients"]["fingerprint_checked"] == [0, 1, 2], "it was caught up"


def test_late_over_flower_messages(whole, tmp_path):
    """Each takes seconds, so few steps, and the deadline is one that the others, for each of whose
    messages a process starts, keep on a busy machine. What stands still is all that the SuperNode
    has started: its own heartbeat goes on, which Flower would miss after 30 to 60 s."""
    keys = {
        "link": "grid", "min-clients": 2, "step-deadline": 40.0, "reply-deadline": 900.0,
        "steps": 2, "eval-every": 2,
    }  # fmt: skip
    run = whole.submit(tmp_path, "run", **keys)
    wait_for("a first evaluation", lambda: run.step >= 0, 900)
    still = whole.below(2)
    for pid in still:
        kill(pid, STOP)
    try:
        run.reach(1)
        assert "step 1 goes on without client 2: it did not answer within 40 s" in run.log
    finally:
        for pid in still:
            kill(pid, CONTINUE)
    assert run.results(900)["clients"]["steps_taken_part"]["0"] == 2


def through(proxy_of, whole, tmp_path, **keys):
    """A run whose streams go through a proxy; (run, proxy)."""
    port = free_port()
    proxy = proxy_of(port)
    endpoints = {
        "stream-endpoint": f"127.0.0.1:{proxy.port}",
        "stream-bind": f"127.0.0.1:{port}",
    }
    return whole.submit(tmp_path, "run", **endpoints, **keys), proxy


def test_a_network_that_delays_and_drops(whole, tmp_path, undisturbed):
    run, proxy = through(lambda port: Proxy(port, delay=0.02), whole, tmp_path)
    for step in (5, 15, 25, 35, 45):
        run.reach(step)
        proxy.cut()
    results = run.results()
    assert proxy.connections >= 3 + 3 * 4
    assert results["clients"]["dropped"] == []
    assert run.curve == undisturbed()
    proxy.close()


def test_a_network_that_swallows_everything(whole, tmp_path):
    """The connection stands and nothing comes: no step waits longer than reply-deadline."""
    keys = {"reply-deadline": 6.0, "steps": 200, "eval-every": 200}
    run, proxy = through(Proxy, whole, tmp_path, **keys)
    run.reach(10)
    proxy.silent = True
    started = time.monotonic()
    end = run.end(60)
    at_most = 3 * 6 + _CLOSE_SECONDS + 10
    assert time.monotonic() - started < at_most, "a deadline for each client, and a farewell"
    assert end.startswith("run failed: ClientError: step ")
    assert "did not answer within 6 s" in end
    assert f"resume={run.directory} goes on from the checkpoint of step" in run.log
    proxy.silent = False
    proxy.close()
