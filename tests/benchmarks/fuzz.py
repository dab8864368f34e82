"""Damaged protocol messages by the hundred thousand.

    python tests/benchmarks/fuzz.py [--frames 200000] [--seed 0]

What tests/test_fuzz.py does with a few thousand: see tests/fuzzing.py. Stops at the first frame
that crashes the decoder, is refused without one clear line, or takes memory or time its size does
not explain; else prints what became of them, the last line as JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzzing import Fuzz
from test_messages import ALL, LIMITS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    fuzz, started = Fuzz(ALL, LIMITS, arguments.seed), time.perf_counter()
    fuzz.run(arguments.frames)
    found = {
        "frames": arguments.frames, "seed": arguments.seed, **fuzz.outcomes,
        "most_bytes_beyond_frame": fuzz.most_bytes,
        "most_cpu_seconds": round(fuzz.most_seconds, 3),
        "seconds": round(time.perf_counter() - started),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
