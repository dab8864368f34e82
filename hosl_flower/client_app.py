"""The Flower ClientApp: runs on the edge device.

Flower starts a process for each message to a SuperNode. The first asks what the node is, and
torch, which takes a board ten seconds to load, is not loaded for that: what needs it is in
client_calls.py.
"""

import os

# Read by OpenMP when torch is loaded: client and server often compute at the same time on one
# machine, and threads that wait must not spin on the other's cores (tests/benchmarks/link.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from hosl_flower.node_config import shared_between_partitions

app = ClientApp()


@app.query("node")
def node(message: Message, context: Context) -> Message:
    """What this node says about itself, see link/announced.py."""
    config = context.node_config
    one_data = shared_between_partitions(str(config.get("data-path", "")))
    record = ConfigRecord({"one-data": one_data})
    for key in ("partition-id", "num-partitions"):
        if key in config:
            record[key] = config[key]
    return Message(RecordDict({"config": record}), reply_to=message)


@app.train("exchange")
def exchange(message: Message, context: Context) -> Message:
    """Answer the requests of one exchange."""
    from hosl_flower import client_calls

    return client_calls.exchange(message, context)


@app.train("session")
def session(message: Message, context: Context) -> Message:
    """Answer over a stream until the server closes it; see link/stream.py."""
    from hosl_flower import client_calls

    return client_calls.session(message, context)
