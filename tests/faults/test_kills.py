"""Kill -9 of each kind of process: training goes on, or ends with one line and a checkpoint."""

import json

from fleet import kill, wait_for


def test_a_client_killed_in_the_middle_of_a_step(whole, tmp_path, undisturbed):
    run = whole.submit(tmp_path, "run")
    run.reach(10)
    assert whole.kill_clients(1) > 0
    results = run.results()
    assert "is called again" in run.log
    assert results["clients"]["dropped"] == []
    assert run.curve == undisturbed()


def test_a_supernode_killed_and_another_in_its_place(whole, tmp_path, undisturbed):
    run = whole.submit(tmp_path, "run")
    run.reach(10)
    whole.kill_node(1)
    whole.start_node(1)
    results = run.results()
    assert results["clients"]["dropped"] == []
    assert run.curve == undisturbed()


def test_a_supernode_killed_and_nobody_in_its_place(whole, tmp_path):
    run = whole.submit(tmp_path, "run", **{"min-clients": 2, "steps": 40, "eval-every": 20})
    run.reach(10)
    whole.kill_node(2)  # not 0, which evaluates
    results = run.results()
    took_part = results["clients"]["steps_taken_part"]
    assert took_part["0"] == took_part["1"] == 40 > took_part.get("2", 0) >= 10
    assert results["clients"]["fingerprint_checked"] == [0, 1]


def test_the_serverapp_killed_and_the_run_resumed(whole, tmp_path, undisturbed):
    run = whole.submit(tmp_path, "run")
    run.reach(12)
    (server,) = whole.apps("serverapp")
    kill(server)
    wait_for("the end of the ServerApp", lambda: not whole.apps("serverapp"))
    assert run.ended == ""
    assert run.step < 60
    again = whole.submit(tmp_path, "again", resume=str(run.directory))
    again.results()
    assert "resumed after step" in again.log
    assert again.curve == undisturbed()
    steps = [row["step"] for row in map(json.loads, (run.directory / "metrics.jsonl").open())]
    assert steps == sorted(steps)


def test_superlink_killed_and_the_run_resumed(whole, tmp_path, undisturbed):
    run = whole.submit(tmp_path, "run")
    run.reach(12)
    whole.superlink.kill()
    whole.superlink.wait()
    end = run.end(60)
    assert end.startswith("run stopped: ")
    assert f"resume={run.directory}" in end
    wait_for("the end of the ServerApp", lambda: not whole.apps("serverapp"), 60)
    for number in list(whole.nodes):
        whole.kill_node(number)
    whole.ensure()
    again = whole.submit(tmp_path, "again", resume=str(run.directory))
    again.results()
    assert again.curve == undisturbed()
