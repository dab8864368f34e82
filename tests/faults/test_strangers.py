"""Clients that are not what they should be: an old ledger, a partition that is taken; a clock that
jumps; a disk that is full."""

import os
import resource
import subprocess
from pathlib import Path

import pytest
from fleet import fleet, wait_for

from hosl_flower.checkpoint import read

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


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


@pytest.mark.skipif(not FAKETIME.exists(), reason="needs Debian's libfaketime")
@pytest.mark.parametrize("jump", ["+1d", "-1d"])
def test_a_clock_that_jumps(tmp_path, undisturbed, jump):
    """On every machine at once: SuperLink's, the ServerApp's and the devices'."""
    clock = tmp_path / "clock"
    clock.write_text("+0\n")
    faked = {
        "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    with fleet() as own:
        own.start_superlink(**faked)
        for number in range(3):
            own.start_node(number, **faked)
        run = own.submit(tmp_path, "run")
        run.reach(20)
        clock.write_text(f"{jump}\n")
        assert run.results()["clients"]["dropped"] == []
    assert run.curve == undisturbed()
