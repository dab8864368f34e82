"""What a training client needs, next to inference and to the first-order rivals (rivals.py).

    python tests/benchmarks/memory.py --quick               OPT-125M, 64 x 256 tokens, one JSON line
    python tests/benchmarks/memory.py [--minutes 25]        the table; goes on where it stopped
    python tests/benchmarks/memory.py --traced              what is missing, on shapes alone
    python tests/benchmarks/memory.py --process             a whole ClientApp process, one JSON line
    python tests/benchmarks/memory.py --table [micro]       the table of the results so far

Random weights, cut 5, synthetic full-length batches (memory depends on shapes only). HOSL with one
direction, HO-SFL with one (ho_sfl_exact: by forward-mode), SGD; residual feedback and recomputing
with adafactor, whose state is in the peak, updating in place. Every cell is a process of its own,
so that its peak resident set is too. Peaks are of tensors, weights and cut gradient included, on
CUDA from the allocator, on the CPU from memory.LiveTensors; loading is not in them. Seconds are of
one watched step. A cell that would not fit into --limit-gib is skipped and named. A traced cell is
the same code on tensors without data (hosl_flower/tensors/shapes_only.py): bytes, no seconds and
no resident set, a batch of tokens that all differ.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "memory.json"
COLUMNS = (
    "inference", "inference_micro", "hosl", "hosl_micro", "ho_sfl", "ho_sfl_micro",
    "ho_sfl_exact", "ho_sfl_exact_micro",
    "residual", "residual_micro", "exact", "exact_micro", "recompute", "recompute_micro",
    "fo", "fo_checkpoint", "fo_fused", "fo_fused_micro",
)  # fmt: skip
MICRO_BATCH = 2
QUICK = ("opt-125m", 64, 256, "float32", "full")
SHAPES = [  # the telling ones first: a run may end before the last
    QUICK,
    *[
        (model, batch, length, dtype, trainable)
        for model, dtypes in (("opt-125m", ("float32", "bfloat16")), ("opt-1.3b", ("float32",)))
        for length in (256, 64, 512)
        for trainable in ("full", "lora")
        for dtype in dtypes
        for batch in (64, 8)
        if (trainable == "full" or length == 256)
        and (model, batch, length, dtype, trainable) != QUICK
    ],
]


def measure(shape: tuple, column: str, device: str) -> dict[str, Any]:
    """One cell, in this process: peak bytes by phase, seconds of the step, peak resident set."""
    from hosl_flower.tensors.device import use_threads
    from hosl_flower.tensors.memory import peak_rss_bytes

    use_threads(0)
    work = _first_order if column.startswith("fo") else _client
    return {**work(shape, column, device), "rss": peak_rss_bytes()}


def trace(shape: tuple, column: str) -> dict[str, Any]:
    """The bytes of a cell, from its shapes."""
    from hosl_flower.tensors.shapes_only import shapes_only

    work = _first_order if column.startswith("fo") else _client
    with shapes_only():
        cell = work(shape, column, "cpu")
    return {**cell, "seconds": None, "traced": True}


def _batch(batch: int, length: int) -> tuple[Any, Any]:
    import torch

    ids = torch.randint(5, 50_000, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # so that attention needs a mask, as with real texts
    return ids, mask


def _client(shape: tuple, column: str, device: str) -> dict[str, Any]:
    """A real Client answering the requests of one step of a method."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    from specs import client_spec

    from hosl_flower.client.client import Client
    from hosl_flower.client.mini_batches import OneMiniBatch
    from hosl_flower.ledger.ledger import Entry
    from hosl_flower.models.batch import Batch
    from hosl_flower.protocol.messages.activations import Forward, Probe
    from hosl_flower.protocol.messages.base import Failure
    from hosl_flower.protocol.messages.gradients import LocalStep
    from hosl_flower.protocol.messages.scalars import CutGradient
    from hosl_flower.tensors.device import torch_dtype

    model, size, length, dtype, trainable = shape
    method = column.removesuffix("_micro")
    local = method in ("residual", "exact", "recompute")
    spec = client_spec(
        model=f"random:{model}", cut_layer=5, dtype=dtype, client_trainable=trainable,
        batch_size=size, max_length=length, threads=0, device=device,
        client_micro_batch=MICRO_BATCH if column.endswith("_micro") else 0,
        **({"client_gradient": method, "client_optimizer": "adafactor"} if local else {}),
    )  # fmt: skip
    ids, mask = _batch(size, length)
    batch = Batch(ids, mask, torch.zeros(size, dtype=torch.int64))
    client = Client(spec, mini_batches=lambda pool, own: OneMiniBatch(pool, own, batch))
    at = {"step": 1, "partition": 0, "position": 0, "digest": client.state.digest}

    def ask(request: Any) -> None:
        (reply,) = client.answer([request])
        if isinstance(reply, Failure):
            raise RuntimeError(reply.error)

    def probe() -> None:
        ask(Probe(**at, batch=0, seed=1, coefficient=1e-3))

    def forward() -> None:
        ask(Forward(**at, batch=0))

    def lambda_() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        cut = torch.empty(size, length, client.submodel.hidden_size, dtype=torch_dtype(dtype))
        for row in cut:  # no full-size temporary in another dtype
            row.copy_(torch.randn(row.shape, generator=generator) * 1e-3)
        return {"batch": 0, "gradient": cut, "scales": torch.empty(0), "scale": 1.0}

    def cut_gradient(epsilon: float = 1e-3) -> None:
        ask(CutGradient(**at, **lambda_(), directions=1, seeds=(1,), epsilon=epsilon,
                        learning_rate=1e-6))  # fmt: skip

    def local_step() -> None:
        ask(LocalStep(**at, **lambda_(), learning_rate=1e-6))

    def update() -> None:
        client.follower.apply([Entry(1, (1,), (0.125,), 1e-6)])

    weights = sum(p.nbytes for p in client.submodel.parameters())
    if method == "together":  # inference, HOSL and HO-SFL with as few forwards as they can share
        probe()
        forward()
        first = dict(client.meter.peaks)
        client.meter.start_over()
        cut_gradient()
        update()
        second = client.meter.peaks
        inference = first["forward"]
        return {
            "inference": inference,
            "hosl": max(inference, first["probe"], second["update"]),
            "ho_sfl": max(inference, second["probe"], second["update"]),
        }
    steps = {
        "inference": [forward],
        "hosl": [probe, probe, forward, update],
        "ho_sfl": [forward, cut_gradient, update],
        "ho_sfl_exact": [forward, partial(cut_gradient, 0.0), update],
        "residual": [forward, local_step],
        "exact": [forward, local_step],
        "recompute": [forward, local_step],
    }
    started = time.perf_counter()
    for step in steps[method]:
        step()
    seconds = time.perf_counter() - started
    phases = dict(client.meter.peaks)
    loading = phases.pop("load")
    return {
        "peak": max(phases.values()), "phases": phases, "seconds": seconds,
        "weights": weights, "load": loading,
    }  # fmt: skip


def _first_order(shape: tuple, column: str, device: str) -> dict[str, Any]:
    import torch

    from hosl_flower.models.base_model import open_base
    from hosl_flower.models.lora import Lora
    from hosl_flower.models.split import load_client
    from hosl_flower.tensors.device import pick_device, torch_dtype
    from hosl_flower.tensors.memory import Meter

    sys.path.insert(0, str(Path(__file__).parent))
    from rivals import RIVALS

    model, size, length, dtype, trainable = shape
    lora = Lora(4, 16.0, ("q_proj", "v_proj"), 0) if trainable == "lora" else None
    device = pick_device(device)
    base = open_base(f"random:{model}")
    client = load_client(base, 5, torch_dtype(dtype), device, lora)
    ids, mask = (tensor.to(device) for tensor in _batch(size, length))
    cut = torch.full((size, length, base.config.hidden_size), 1e-3, dtype=torch_dtype(dtype))
    cut = cut.to(device)
    meter = Meter(device)
    more = {"micro_batch": MICRO_BATCH} if column.endswith("micro") else {}
    started = time.perf_counter()
    with meter.phase("update", 1, [*client.parameters(), ids, mask, cut]):
        RIVALS[column](client, ids, mask, cut, 1e-6, **more)
    return {"peak": meter.peaks["update"], "seconds": time.perf_counter() - started}


def estimate_bytes(shape: tuple, column: str) -> int:
    """About what a cell's process will need, from above."""
    model, batch, length, dtype, trainable = shape
    width, weights = {"opt-125m": (768, 76e6), "opt-1.3b": (2048, 360e6)}[model]
    size = 4 if dtype == "float32" else 2
    unit = batch * length * width * size
    units = {"fo": 80, "fo_checkpoint": 35, "fo_fused": 35, "fo_fused_micro": 10}.get(column, 14)
    copies = 2.3 if column in ("fo", "fo_checkpoint") and trainable == "full" else 1.2
    return int(weights * size * copies + unit * units + 8e8)


def in_process_of_its_own(shape: tuple, column: str, device: str) -> dict[str, Any]:
    """A cell measured in a child; what went wrong, as {"failed": reason}."""
    command = [sys.executable, __file__, "--device", device, "--cell", json.dumps([shape, column])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"failed": reason[0][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def probe_over_forward() -> float:
    """Seconds of a rank-1 probe over those of a plain forward, OPT-125M, 8 x 64 tokens."""
    script = str(Path(__file__).with_name("probe.py"))
    done = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["ratio_to_forward"]["probe_rank1"]


def summary(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The ratios of one shape; a key is absent when a cell it needs is."""
    peak = {column: cell["peak"] for column, cell in cells.items() if "peak" in cell}

    def ratio(over: str, under: str) -> float | None:
        return round(peak[over] / peak[under], 3) if over in peak and under in peak else None

    pairs = {
        "hosl_over_inference": ("hosl", "inference"),
        "ho_sfl_over_inference": ("ho_sfl", "inference"),
        "hosl_micro_over_inference_micro": ("hosl_micro", "inference_micro"),
        "ho_sfl_micro_over_inference_micro": ("ho_sfl_micro", "inference_micro"),
        "residual_over_inference": ("residual", "inference"),
        "residual_micro_over_inference_micro": ("residual_micro", "inference_micro"),
        "exact_over_inference": ("exact", "inference"),
        "exact_micro_over_inference_micro": ("exact_micro", "inference_micro"),
        "recompute_over_inference": ("recompute", "inference"),
        "recompute_micro_over_inference_micro": ("recompute_micro", "inference_micro"),
        "fo_over_hosl": ("fo", "hosl"),
        "fo_over_hosl_micro": ("fo", "hosl_micro"),
        "fo_over_ho_sfl": ("fo", "ho_sfl"),
        "fo_checkpoint_over_hosl": ("fo_checkpoint", "hosl"),
        "fo_fused_over_hosl": ("fo_fused", "hosl"),
        "fo_fused_micro_over_hosl_micro": ("fo_fused_micro", "hosl_micro"),
    }
    found = {name: ratio(*pair) for name, pair in pairs.items()}
    return {name: value for name, value in found.items() if value is not None}


def quick(device: str) -> None:
    """The cell that docs/results.md quotes first."""
    cells: dict[str, dict[str, Any]] = {}
    for micro in ("", "_micro"):
        together = in_process_of_its_own(QUICK, f"together{micro}", device)
        if "failed" in together:
            raise SystemExit(together["failed"])
        together.pop("rss", None)
        for method, peak in together.items():
            cells[f"{method}{micro}"] = {"peak": peak}
    cells["fo"] = in_process_of_its_own(QUICK, "fo", device)
    ratios = summary(cells)
    train = [v for name, v in ratios.items() if name.startswith("ho") and "_over_inf" in name]
    print(
        json.dumps(
            {
                "shape": QUICK,
                "micro_batch": MICRO_BATCH,
                "train_over_inference": max(train, default=None),
                **ratios,
                "peak_bytes": {c: cell.get("peak") for c, cell in cells.items()},
                "probe_over_forward": probe_over_forward(),
            }
        )
    )


def full(device: str, minutes: float, limit: float, traced: bool) -> None:
    """Every cell that is not in the results yet, until the time is up. What was traced, or too
    large for another machine, is measured."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    device = "cpu" if traced else device  # what is traced is what a CPU would hold
    deadline = time.monotonic() + 60 * minutes
    for shape in SHAPES:
        cells = results.setdefault(f"{device} " + " ".join(map(str, shape)), {})
        for column in COLUMNS:
            known = cells.get(column, {})
            measured = "peak" in known and not known.get("traced")
            if measured:
                # traced beside it, to compare
                if traced and "traced_peak" not in known:
                    known["traced_peak"] = trace(shape, column)["peak"]
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                continue
            if "peak" in known and traced:
                continue
            if time.monotonic() > deadline:
                return
            if traced and column.endswith("micro") and not _is_traced_micro(shape):
                continue
            if traced:
                cells[column] = trace(shape, column)
            elif estimate_bytes(shape, column) > limit * 2**30:
                if known:
                    continue
                cells[column] = {"skipped": f"would need more than {limit:g} GiB"}
            else:
                cells[column] = in_process_of_its_own(shape, column, device)
            print(shape, column, json.dumps(cells[column]), flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def process() -> dict[str, Any]:
    """MiB resident of a process that is a Flower ClientApp of OPT-125M, cut 5, 8 x 64 tokens: with
    its imports, with the model and the bundled data, and at its peak in a forward and a probe."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    import hosl_flower.flower.client_calls  # noqa: F401
    from hosl_flower.tensors.memory import peak_rss_bytes

    found = {"imports": peak_rss_bytes() >> 20}
    from specs import client_spec

    from hosl_flower.client.client import Client
    from hosl_flower.protocol.messages.activations import Forward, Probe
    from hosl_flower.protocol.messages.describe import Describe

    spec = client_spec(
        model="random:opt-125m", cut_layer=5, client_trainable="full", batch_size=8, max_length=64,
        num_clients=1, train_examples=0, threads=0,
    )  # fmt: skip
    client = Client(spec)
    found["loaded"] = peak_rss_bytes() >> 20
    at = {"step": 1, "partition": 0, "position": 0, "digest": client.state.digest}
    probe = Probe(**at, batch=0, seed=1, coefficient=1e-3)
    list(client.answer([Describe(**at), Forward(**at, batch=0), probe]))
    found["tensors"] = max(client.meter.peaks.values()) >> 20
    return {**found, "peak": peak_rss_bytes() >> 20}


def _is_traced_micro(shape: tuple) -> bool:
    """Tracing takes a millisecond per operation, whatever its size: 32 micro-batches only once."""
    return shape[1] <= 8 or shape[2:] == QUICK[2:]


def table(micro: bool) -> str:
    """Markdown of the columns with micro-batches, or of those without: peak MiB (times inference),
    seconds; ~ traced, - not there, ... skipped."""
    results = json.loads(RESULTS.read_text())
    there = {column for cells in results.values() for column in cells}
    columns = [name for name in COLUMNS if name.endswith("_micro") == micro and name in there]
    lines = [
        "| shape | " + " | ".join(columns) + " | fo / hosl |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for shape in SHAPES:
        for device in ("cuda", "cpu"):
            cells = results.get(f"{device} " + " ".join(map(str, shape)), {})
            texts = [_text(cells, column, columns[0]) for column in columns]
            if any(text != "-" for text in texts):
                model, batch, length, *rest = shape
                name = ", ".join([device, model, f"{batch} x {length}", *rest])
                ratio = summary(cells).get("fo_over_hosl_micro" if micro else "fo_over_hosl")
                lines.append(f"| {name} | " + " | ".join(texts) + f" | {ratio or '-'} |")
    return "\n".join(lines)


def _text(cells: dict[str, dict[str, Any]], column: str, inference: str) -> str:
    cell, base = cells.get(column, {}), cells.get(inference, {})
    if "peak" not in cell:
        return "..." if "skipped" in cell else "-"
    text = "~" * cell.get("traced", False) + f"{cell['peak'] / 2**20:.0f}"
    text += f" ({cell['peak'] / base['peak']:.2f})" if "peak" in base else ""
    return text + (f", {cell['seconds']:.1f} s" if cell["seconds"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", nargs="?", const="whole", choices=["whole", "micro"])
    parser.add_argument("--process", action="store_true")
    parser.add_argument("--traced", action="store_true", help="bytes from shapes, no seconds")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--limit-gib", type=float, default=14.0)
    arguments = parser.parse_args()
    if arguments.process:
        print(json.dumps(process()))
    elif arguments.cell:
        shape, column = json.loads(arguments.cell)
        print(json.dumps(measure(tuple(shape), column, arguments.device)))
    elif arguments.quick:
        quick(arguments.device)
    elif arguments.table:
        print(table(arguments.table == "micro"))
    else:
        full(arguments.device, arguments.minutes, arguments.limit_gib, arguments.traced)


if __name__ == "__main__":
    main()
