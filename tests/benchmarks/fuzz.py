"""Damaged protocol messages by the hundred thousand.

    python tests/benchmarks/fuzz.py [--frames 200000] [--strangers 2000] [--seed 0]

The test of a few thousand is tests/protocol/test_fuzz.py: see tests/support/fuzzing.py. Stops at
the first frame that crashes the decoder, is refused without one clear line, or takes memory or time
its size does not explain. Then strangers (tests/support/strangers.py) connect to a stream's server,
which listens for real, before anything is known of them: with bytes that are no call, tokens that
are nearly right, and frames of 16 MiB. Stops when one is let in, the server's process grows by more
than two such frames, or a client with the right token waits for more than a second. Prints what
became of all, the last line as JSON.
"""

import argparse
import json
import multiprocessing
import random
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from fuzzing import Fuzz
from messages import ALL, LIMITS
from strangers import LIMIT, Door, knock, noise, serve

MOST_SECONDS = 1.0


def resident(process: int) -> int:
    """Bytes of memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def strangers(count: int, seed: int) -> dict:
    """So many strangers, one after the other; the most that they cost."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    server.start()
    try:
        door = Door(*ours.recv())
        growth, slowest = _storm(door, server.pid, count, random.Random(seed))
    finally:
        ours.send("end")
        server.join(20.0)
    if growth > 2 * LIMIT or slowest > MOST_SECONDS:
        raise AssertionError(f"{growth} bytes, {slowest} s")
    return {
        "strangers": count, "most_bytes_of_growth": growth, "slowest_dial": round(slowest, 3),
    }  # fmt: skip


def _storm(door: Door, server: int, count: int, source: random.Random) -> tuple[int, float]:
    """(Bytes that the server's process has grown by at most, seconds of the slowest dial)."""
    frame = b"\xff\xff\xff\0" + b"[]," * (LIMIT // 3 - 2)
    assert door.admits()
    before, growth, slowest = resident(server), 0, 0.0
    for number in range(count):
        if source.random() < 0.7:
            noise(door, source)
        else:
            knock(door, source, frame)
        if number % 20 == 0:
            started = time.perf_counter()
            assert door.admits(), f"after {number} strangers"
            slowest = max(slowest, time.perf_counter() - started)
            growth = max(growth, resident(server) - before)
    return growth, slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=200_000)
    parser.add_argument("--strangers", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    fuzz, started = Fuzz(ALL, LIMITS, arguments.seed), time.perf_counter()
    fuzz.run(arguments.frames)
    found = {
        "frames": arguments.frames, "seed": arguments.seed, **fuzz.outcomes,
        "most_bytes_beyond_frame": fuzz.most_bytes,
        "most_cpu_seconds": round(fuzz.most_seconds, 3),
        **strangers(arguments.strangers, arguments.seed),
        "seconds": round(time.perf_counter() - started),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
