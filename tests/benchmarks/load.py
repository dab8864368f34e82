"""One server and many streaming clients: how many, how fast, with how much memory, and what then.

    python tests/benchmarks/load.py [--clients 1 10 50 100 200 400 800] [--seconds 20]
        [--write docs/results/load.json]

The server is the project's: StreamLink with its sessions, its checks and its counting, in a process
of its own for each number of clients. Clients are threads of a few processes that speak the real
protocol (link/dial.py), each over a connection of its own, and answer at once with prepared
replies: activations of 8 x 64 x 512 float32, 1 MiB. A step is that of HO-SFL without computing:
all clients are asked for activations, then each gets a cut gradient of the same size and answers
with a scalar. Latency is from asking to having the reply, checked, in the strategy's thread.

Then the server looks away: clients are asked for twenty activations each, which nobody reads for
some seconds. What waits at the server must stay within the window, and all must arrive afterwards.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from flwr.supercore.task_identity import TaskIdentity
from grids import LocalGrid
from specs import client_spec, history_for

from hosl_flower.flower.nodes import Nodes
from hosl_flower.flower.records import unpack_invitation
from hosl_flower.flower.stream import client_end as dial
from hosl_flower.flower.stream.frames import channel_options
from hosl_flower.flower.stream.link import SESSION, StreamLink
from hosl_flower.protocol.messages.activations import Activations, Forward
from hosl_flower.protocol.messages.scalars import CutGradient, Scalars
from hosl_flower.protocol.reply_limits import ReplyLimits

SEQUENCES, LENGTH, HIDDEN = 8, 64, 512
PROCESSES = 2  # of clients
AHEAD, LOOK_AWAY, LOOKED_AWAY_FROM = 20, 4.0, 50
MIB = 2.0**20
# everything is imported once, and gRPC not used before the last fork
FORK = multiprocessing.get_context("fork")


def clients(number: int, invitations, activations: torch.Tensor) -> None:
    """A process of clients, one for each invitation that comes, until None does."""
    taken = 0

    def options(limit: int) -> list:
        # gRPC would put clients of one process on one connection
        return [*channel_options(limit), ("hosl.client", f"{number}-{taken}")]

    def answer(requests):
        for request in requests:
            done = {"step": request.step, "seconds": 0.0, "peak_bytes": 0}
            if request.kind == "cut-gradient":
                yield Scalars(**done, scalars=torch.zeros(1, 1))
            else:
                mask = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
                labels = torch.zeros(SEQUENCES, dtype=torch.int64)
                yield Activations(
                    **done, activations=activations, scales=torch.empty(0), attention_mask=mask,
                    labels=labels,
                )  # fmt: skip

    dial.channel_options = options
    threads = []
    while (text := invitations.get()) is not None:
        taken += 1
        invitation = dial.Invitation.from_json(text)
        threads.append(threading.Thread(target=dial.serve, args=(invitation, answer)))
        threads[-1].start()
    for thread in threads:
        thread.join()


def open_link(count: int):
    """A stream link with so many clients, all connected, the processes they are in, and this one's
    memory before any came."""
    for name in ("_run_id", "_node_id", "_task_id"):  # as in a ServerApp's process
        setattr(TaskIdentity, name, 1)
    queues = [FORK.Queue() for _ in range(PROCESSES)]
    activations = torch.randn(SEQUENCES, LENGTH, HIDDEN)
    started = [
        FORK.Process(target=clients, args=(number, queue, activations))
        for number, queue in enumerate(queues)
    ]
    for process in started:
        process.start()

    class Grid(LocalGrid):
        def push_messages(self, messages):
            for message in messages:
                if message.metadata.message_type != SESSION:
                    continue
                _, invitation = unpack_invitation(message.content)
                queues[message.metadata.dst_node_id % PROCESSES].put(invitation.to_json())
            sessions = [m for m in messages if m.metadata.message_type == SESSION]
            return ["called"] * len(messages) if sessions else super().push_messages(messages)

    spec = client_spec(num_clients=count)
    grid = Grid({n + 1: {"partition-id": n, "num-partitions": count} for n in range(count)})
    nodes = Nodes(grid, count, 0, 300.0)
    nodes.wait(60.0, count)
    limits = ReplyLimits(batch=SEQUENCES, length=LENGTH, hidden=HIDDEN, dtype="float32", classes=2)
    history = history_for(spec)
    before = memory()
    link = StreamLink(grid, spec, history, limits, 300.0, nodes)
    give_up = time.monotonic() + 300
    while link.absent() and time.monotonic() < give_up:
        time.sleep(0.1)
    assert not link.absent(), f"{len(link.absent())} clients never came"
    for queue in queues:
        queue.put(None)
    return link, started, before


def at(link, step: int, partition: int) -> dict:
    """The fields every request has."""
    ledger = link.history.ledger
    where = {"position": len(ledger), "digest": ledger.digest()}
    return {"step": step, "partition": partition, **where}


def step_of(link, count: int, step: int, latencies: dict[str, list[float]]) -> None:
    """Activations of everybody, which the step holds, then a cut gradient to each."""
    asked = time.perf_counter()
    streams = link.exchange({p: [Forward(**at(link, step, p), batch=0)] for p in range(count)})
    held = []
    for replies in streams.values():
        held.append(next(replies))
        latencies["activations"].append(time.perf_counter() - asked)
    probes = []
    for partition, clean in enumerate(held):
        request = CutGradient(
            **at(link, step, partition), batch=0, directions=1, seeds=(1,), epsilon=1e-3,
            learning_rate=0.0, gradient=clean.activations, scales=torch.empty(0), scale=1.0,
        )  # fmt: skip
        probes.append((time.perf_counter(), link.exchange({partition: [request]})[partition]))
    for asked, replies in probes:
        next(replies)
        latencies["scalars"].append(time.perf_counter() - asked)


def look_away(link, count: int) -> dict:
    """What waits at the server while nobody reads."""
    before = memory()
    asked = {p: [Forward(**at(link, 0, p), batch=0)] * AHEAD for p in range(count)}
    streams, most = link.exchange(asked), 0
    give_up = time.monotonic() + LOOK_AWAY
    while time.monotonic() < give_up:
        most = max(most, *(len(line.session._replies) for line in link._lines.values()))
        time.sleep(0.1)
    waited = memory()
    arrived = sum(sum(1 for _ in replies) for replies in streams.values())
    return {
        "clients": count,
        "asked_each": AHEAD,
        "most_replies_waiting_per_client": most,
        "mib_per_client_while_waiting": round((waited - before) / MIB / count, 1),
        "all_arrived": arrived == count * AHEAD,
    }


def memory() -> int:
    """Resident bytes of this process now."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


def measure(count: int, seconds: float) -> dict:
    """One number of clients."""
    started = time.perf_counter()
    link, processes, before = open_link(count)
    connected, idle = time.perf_counter() - started, memory()
    latencies: dict[str, list[float]] = {"activations": [], "scalars": []}
    step_of(link, count, 0, {"activations": [], "scalars": []})
    sent = link.traffic.total(link.traffic.up) + link.traffic.total(link.traffic.down)
    peak, done = [memory()], threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], memory())

    threading.Thread(target=sample, daemon=True).start()
    begun, computed, steps = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begun < seconds or steps < 3:
        steps += 1
        step_of(link, count, steps, latencies)
    wall, cpu = time.perf_counter() - begun, time.process_time() - computed
    done.set()
    sent = link.traffic.total(link.traffic.up) + link.traffic.total(link.traffic.down) - sent
    requests = 2 * count * steps
    assert all(len(found) == count * steps for found in latencies.values()), "a reply was lost"
    row = {
        "clients": count,
        "seconds_to_connect": round(connected, 1),
        "steps": steps,
        "requests_per_second": round(requests / wall, 1),
        "mib_per_second": round(sent / MIB / wall, 1),
        "server_cpu_ms_per_request": round(1000 * cpu / requests, 2),
        "server_cpu_cores": round(cpu / wall, 2),
        **{f"{kind}_ms": quantiles(found) for kind, found in latencies.items()},
        "server_mib": round(peak[0] / MIB),
        "mib_per_client_connected": round((idle - before) / MIB / count, 2),
        "mib_per_client_at_work": round((peak[0] - before) / MIB / count, 2),
        "server_threads": len(os.listdir("/proc/self/task")),
    }
    if count == LOOKED_AWAY_FROM:
        row["looking_away"] = look_away(link, count)
    for line in link._lines.values():
        line.message = ""  # no Flower is there to say that a ClientApp has returned
    link.close()
    for process in processes:
        process.join(20.0)
        if process.is_alive():
            process.kill()
    return row


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(1000 * cuts[49], 1), "p99": round(1000 * cuts[98], 1)}


def report(pipe, count: int, seconds: float) -> None:
    """A process of one level."""
    pipe.send(measure(count, seconds))
    os._exit(0)  # threads of gRPC may linger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 10, 50, 100, 200, 400, 800])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for count in arguments.clients:
        near, far = FORK.Pipe()
        level = FORK.Process(target=report, args=(far, count, arguments.seconds))
        level.start()
        far.close()
        rows.append(near.recv())  # EOFError when it failed, and said why
        level.join()
        print(json.dumps(rows[-1]), flush=True)
    text = json.dumps({"activation_mib": SEQUENCES * LENGTH * HIDDEN * 4 / MIB, "levels": rows})
    if arguments.write:
        arguments.write.write_text(text + "\n")


if __name__ == "__main__":
    main()
