"""Clients that are not what they should be: an old ledger, a partition that is taken; a clock that
jumps; a disk that is full."""

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from fleet import fleet, wait_for

from hosl_flower.run.checkpoint import read


def test_two_supernodes_with_the_same_partition(tmp_path):
    with fleet() as own:
        own.start_superlink()
        own.start_node(0, 2)
        own.start_node(0, 2)
        run = own.submit(tmp_path, "run", **{"num-clients": 2, "min-clients": 2})
        assert "both serve partition 0; give each its own partition-id" in own.end(run)
        assert not run.directory.exists(), "nothing was trained"


def test_a_second_supernode_for_a_partition_that_trains(whole, tmp_path, undisturbed):
    run = whole.submit(tmp_path, "run")
    run.reach(10)
    first = whole.nodes[1]
    second = whole.start_node(1)  # idle: nobody asks it anything
    run.reach(30)
    whole.nodes[1] = first
    run.results()
    assert run.curve == undisturbed()
    second.kill()
    second.wait()


def test_a_client_that_comes_back_with_an_old_ledger(whole, tmp_path, undisturbed):
    """Its process is new: its position is that of the base checkpoint, far behind the run's."""
    run = whole.submit(tmp_path, "run")
    for step in (10, 30, 50):
        run.reach(step)
        for number in range(3):
            whole.kill_clients(number)
    results = run.results()
    assert run.log.count("is called again") >= 9
    assert results["bytes_down"]["catch-up"]["bytes"] > 0
    assert results["clients"]["fingerprint_checked"] == [0, 1, 2]
    assert run.curve == undisturbed()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB; skipped where none can be mounted."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path):
    """Until there is no room for a byte."""
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(os.urandom(4096))


def test_a_disk_that_is_full(whole, small_disk, tmp_path, undisturbed):
    run = whole.submit(small_disk, "run")
    wait_for("a checkpoint", lambda: list(run.directory.glob("checkpoint-*")))
    with pytest.raises(OSError, match="No space left"):
        fill(small_disk / "filler")
    said = whole.end(run)
    assert "metrics.jsonl cannot be written ([Errno 28] No space left on device)" in said
    assert "results.json ([Errno 28] No space left on device)" in said, "it took all its steps"
    assert not (run.directory / "results.json").exists()
    assert read(run.directory).step >= 5, "whole: its checksums are right"
    (small_disk / "filler").unlink()
    again = whole.submit(small_disk, "again", resume=str(run.directory))
    again.results()
    assert again.curve == undisturbed()


def test_a_checkpoint_that_does_not_fit(whole, tmp_path, undisturbed):
    """It fails in the middle: the one before survives, and training goes on."""
    run = whole.submit(tmp_path, "run")
    written = wait_for(
        "a checkpoint", lambda: list(run.directory.glob("checkpoint-*/tensors.safetensors"))
    )
    half = written[0].stat().st_size // 2
    (server,) = whole.apps("serverapp")
    resource.prlimit(server, resource.RLIMIT_FSIZE, (half, half))
    run.results()
    assert "cannot be written (" in run.log
    assert "training goes on" in run.log
    assert read(run.directory).step < 55, "whole: its checksums are right"
    assert run.curve == undisturbed()


@pytest.fixture(scope="session")
def own_clock(tmp_path_factory):
    """A library that moves the wall clock of what is started with it, and no other clock."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.mark.parametrize("jump", [86400, -86400])
def test_a_clock_that_jumps(tmp_path, own_clock, undisturbed, jump):
    """By a day, on every machine at once: SuperLink's, the ServerApp's and the devices'."""
    clock = tmp_path / "clock"
    clock.write_text("0\n")
    moved = {"LD_PRELOAD": str(own_clock), "CLOCK_OFFSET_FILE": str(clock)}
    with fleet() as own:
        own.start_superlink(**moved)
        for number in range(3):
            own.start_node(number, **moved)
        run = own.submit(tmp_path, "run")
        run.reach(20)
        clock.write_text(f"{jump}\n")
        end = run.end()
        stamps = [line.split()[0] for line in run.log.splitlines() if line[:2] == "20"]
        assert len(set(stamps)) > 1, "the log is of two days"
        if end != "finished":  # SuperLink's leases go by the wall clock, and a day is too long
            assert end.startswith(
                f"run stopped: signal 2 (flwr stop, or SuperLink is gone); resume={run.directory}"
            )
            run = own.submit(tmp_path, "run", resume=str(run.directory))
        assert run.results()["clients"]["dropped"] == []
    assert run.curve == undisturbed()
