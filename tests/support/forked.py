"""SuperNodes for long tests: each ClientApp is a process that can be killed, at no great cost."""

import multiprocessing
import os
import signal
import time
from collections.abc import Collection

from flwr.app import ConfigRecord, Error, Message, RecordDict
from grids import LocalGrid

from hosl_flower.client.client import Client
from hosl_flower.flower.records import unpack_invitation
from hosl_flower.flower.stream.calls import SESSION
from hosl_flower.flower.stream.client_end import Invitation, serve

FORK = multiprocessing.get_context("fork")


class Nursery:
    """A process with a loaded client that forks, whenever it is asked, a process that serves: what
    a new ClientApp is, less the seconds of its imports. It must be made before gRPC is used."""

    def __init__(self, spec):
        self.near, far = FORK.Pipe()
        self.process = FORK.Process(target=self._run, args=(spec, far), daemon=False)
        self.process.start()
        far.close()

    def start(self, invitation: str) -> int:
        """The id of a new client process."""
        self.near.send(invitation)
        return self.near.recv()

    def exit_code(self, pid: int) -> int | None:
        """What it ended with, minus a signal; None while it is alive."""
        self.near.send(pid)
        return self.near.recv()

    def close(self) -> None:
        """End it; its children must have ended."""
        self.near.send(None)
        self.process.join()

    def _run(self, spec, asked) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        client, ended = Client(spec), {}
        for partition in range(spec.num_clients):
            client.pool.client(partition)
        while (what := asked.recv()) is not None:
            if isinstance(what, int):
                if what not in ended and (found := os.waitpid(what, os.WNOHANG)) != (0, 0):
                    ended[what] = os.waitstatus_to_exitcode(found[1])
                asked.send(ended.get(what))
                continue
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    serve(Invitation.from_json(what), client.answer)
                    code = 0
                finally:
                    os._exit(code)
            asked.send(pid)


class ForkedGrid(LocalGrid):
    """SuperNodes 1..clients whose ClientApps are processes. joined: nodes that are there, at first
    all but those of the `late` partitions; away: until when a node says nothing."""

    def __init__(self, nursery: Nursery, clients: int, late: Collection[int]):
        configs = {
            n: {"partition-id": n - 1, "num-partitions": clients} for n in range(1, clients + 1)
        }
        super().__init__(configs)
        self.nursery = nursery
        self.joined = {node for node in configs if node - 1 not in late}
        self.away: dict[int, float] = {}
        self.called: dict[str, tuple] = {}  # by message: it, and the process that it started
        self.processes: dict[int, int] = {}  # by node, the latest
        self.calls = 0

    def get_node_ids(self):
        return sorted(self.joined)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            if message.metadata.message_type != SESSION:
                ids += super().push_messages([message])
                continue
            self.calls += 1
            _, invitation = unpack_invitation(message.content)
            process = self.nursery.start(invitation.to_json())
            message.metadata._message_id = f"session{self.calls}"
            self.processes[message.metadata.dst_node_id] = process
            self.called[message.metadata.message_id] = (message, process)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, ids):
        found = super().pull_messages(ids)
        for own in [i for i in ids if i in self.called]:
            message, process = self.called[own]
            back = self.away.get(message.metadata.dst_node_id, 0.0)
            if time.monotonic() < back or (code := self.nursery.exit_code(process)) is None:
                continue
            del self.called[own]
            if code:
                found.append(Message(Error(2, f"exit {code}"), reply_to=message))
            else:
                record = RecordDict({"config": ConfigRecord({"error": ""})})
                found.append(Message(record, reply_to=message))
        return found
