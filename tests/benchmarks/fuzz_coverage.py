"""Damaged protocol messages, guided by coverage: what reaches new code is damaged further.

    pip install 'hosl-flower[fuzz]'           # atheris, libFuzzer for Python
    python tests/benchmarks/fuzz_coverage.py [--executions 1000000] [--minutes 15] [--seed 0]
        [--corpus FOLDER] [--write FILE]
    python tests/benchmarks/fuzz_coverage.py --reproduce FILE

The oracle is that of tests/benchmarks/fuzz.py (tests/support/fuzzing.py): one typed error or a
message, and no memory or time that its size does not explain. Seeds are valid frames of every kind;
half of the damage is libFuzzer's, to bytes, half to the fields and shapes that the protocol has.
pydantic is compiled and shows no coverage: what a message was refused for, or which kind of
message was accepted, counts as coverage in its place.

An input is a byte that settles every choice of the oracle, and a frame. Stops at the first input
that is not dealt with as it should, and leaves it in a file; else prints, as JSON, executions,
coverage, and the lines of the protocol's functions that the corpus it ended with runs through.
"""

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FrameType, ModuleType

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

MODULES = [
    "hosl_flower.protocol.wire", "hosl_flower.tensors.raw_bytes", "hosl_flower.protocol.checks",
    "hosl_flower.protocol.messages.requests",
    "hosl_flower.protocol.messages.replies", "hosl_flower.flower.stream.frames",
    "hosl_flower.flower.records",
]  # fmt: skip
BESIDES = [
    "hosl_flower.ledger.ledger",
    "hosl_flower.flower.stream.server_end",
]  # of which little is reached
MARKS = 1024
LONGEST = 16384  # bytes of an input
FUNCTION = 0x1  # CO_OPTIMIZED: the code of a function, not of a module or a class
WRITERS = {  # of messages, and so not what is tested
    "to_wire", "wire_bytes", "encode", "encode_word", "pack", "pack_invitation", "of", "raw_bytes",
}  # fmt: skip


def new_fuzz():
    """The oracle; imports what it tests."""
    from fuzzing import Fuzz
    from messages import ALL, LIMITS

    return Fuzz(ALL, LIMITS, 0)


def feed(fuzz, data: bytes) -> None:
    """One input."""
    fuzz.random.seed(data[0] if data else 0)
    fuzz._feed(data[1:])


def new_marks() -> list:
    """Functions that do nothing, each of which shows up as covered once it is called."""
    made: dict = {}
    for number in range(MARKS):
        exec(f"def mark{number}():\n    return {number}", made)
    return [made[f"mark{number}"] for number in range(MARKS)]


def search(arguments: list[str]) -> None:
    """libFuzzer, in this process, which it ends."""
    import tracemalloc

    import atheris

    with atheris.instrument_imports(include=[*MODULES, *BESIDES]):
        for name in MODULES:
            import_module(name)
    fuzz = new_fuzz()
    marks = [atheris.instrument_func(mark) for mark in new_marks()]
    tracemalloc.start()

    def test(data: bytes) -> None:
        feed(fuzz, data)
        words = re.sub(r"\d+", "", re.split(r"[\"'\[{]", fuzz.last)[0])
        marks[zlib.crc32(words.encode()) % MARKS]()

    def damage(data: bytes, longest: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.5 or len(data) < 2:
            return atheris.Mutate(data, longest)
        fuzz.random.seed(seed)
        start = data[1:] if chance.random() < 0.8 else chance.choice(fuzz.frames)
        frame = chance.choice(fuzz.damage.ways)(start)
        return (bytes([chance.choice((data[0], chance.randrange(256)))]) + frame)[:longest]

    atheris.Setup([sys.argv[0], *arguments], test, custom_mutator=damage)
    atheris.Fuzz()


def run(arguments: argparse.Namespace, corpus: Path) -> dict:
    """A search in a process of its own, and what libFuzzer says of it."""
    corpus.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(new_fuzz().frames):
        for choice in (0, 1, 2, 3):
            (corpus / f"seed-{number:02}-{choice}").write_bytes(bytes([choice]) + frame)
    found = corpus.parent / "found-"
    command = [
        sys.executable, __file__, "--search", "--", str(corpus), f"-runs={arguments.executions}",
        f"-max_total_time={round(60 * arguments.minutes)}", f"-seed={arguments.seed + 1}",
        f"-max_len={LONGEST}", f"-artifact_prefix={found}", "-print_final_stats=1",
        "-rss_limit_mb=4096", "-verbosity=1", "-timeout=60", "-len_control=0",
    ]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    seconds = time.perf_counter() - started
    if done.returncode:
        kept = sorted(corpus.parent.glob("found-*"))
        sys.exit(f"{done.stderr[-6000:]}\nreproduce with --reproduce {kept[-1] if kept else '?'}")
    states = re.findall(r"#(\d+)\s+(\w+)\s+cov: (\d+) ft: (\d+) corp: (\d+)", done.stderr)
    first = next(state for state in states if state[1] == "INITED")
    return {
        "executions": int(re.findall(r"number_of_executed_units:\s*(\d+)", done.stderr)[-1]),
        "seconds": round(seconds),
        "cpu_seconds": round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])),
        "seed": arguments.seed,
        "edges_of_the_seeds": int(first[2]),
        "edges": int(states[-1][2]),
        "features_of_the_seeds": int(first[3]),
        "features": int(states[-1][3]),
        "corpus": int(states[-1][4]),
        "findings": 0,
    }


def functions(code: CodeType) -> Iterator[CodeType]:
    """Code of the functions in a module's, without those that write messages."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and constant.co_name not in WRITERS:
            if constant.co_flags & FUNCTION and constant.co_name[0] != "<":
                yield constant
            yield from functions(constant)


def lines_of(module: ModuleType) -> set[int]:
    """Lines of a module's functions that can be run."""
    path = Path(str(module.__file__))
    code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
    return {
        line
        for own in functions(code)
        for _, _, line in own.co_lines()
        if line and line != own.co_firstlineno
    }


def coverage(corpus: Path) -> dict[str, str]:
    """Lines of each module's functions that a corpus runs through, of how many."""
    fuzz = new_fuzz()
    files = {str(import_module(name).__file__): name for name in MODULES}
    reached: dict[str, set[int]] = {name: set() for name in MODULES}

    def follow(frame: FrameType, event: str, _):
        name = files.get(frame.f_code.co_filename)
        if name is None:
            return None
        if event == "line":
            reached[name].add(frame.f_lineno)
        return follow

    sys.settrace(follow)
    for path in sorted(corpus.iterdir()):
        data = path.read_bytes()
        fuzz.random.seed(data[0] if data else 0)
        try:
            fuzz._outcome(data[1:])
        except Exception:  # what it raises was judged before
            continue
    sys.settrace(None)
    wanted = {name: lines_of(import_module(name)) for name in MODULES}
    return {
        name: f"{len(reached[name] & own)} of {len(own)}" for name, own in wanted.items() if own
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="kept there; go on from what is there")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--reproduce", type=Path)
    arguments = parser.parse_args()
    if arguments.reproduce:
        import tracemalloc

        tracemalloc.start()
        feed(new_fuzz(), arguments.reproduce.read_bytes())
        return
    with tempfile.TemporaryDirectory() as own:
        corpus = arguments.corpus or Path(own) / "corpus"
        report = {**run(arguments, corpus), "lines_run": coverage(corpus)}
    report["atheris"] = version("atheris")
    text = json.dumps(report, indent=1)
    if arguments.write:
        arguments.write.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    if "--search" in sys.argv:
        search(sys.argv[sys.argv.index("--") + 1 :])
    else:
        main()
