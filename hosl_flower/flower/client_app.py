"""The Flower ClientApp: runs on the edge device.

Flower starts a process for each message to a SuperNode. The first asks what the node is, and
torch, which takes a board ten seconds to load, is not loaded for that: what needs it is in
client_calls.py.
"""

import functools
import logging
import os
from collections.abc import Callable

# Read by OpenMP when torch is loaded: client and server often compute at the same time on one
# machine, and threads that wait must not spin on the other's cores (tests/benchmarks/link.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from hosl_flower.config.node_config import shared_between_partitions
from hosl_flower.errors import ClientError, public_reason
from hosl_flower.flower.node import is_simulated

log = logging.getLogger("hosl_flower")

app = ClientApp()
Call = Callable[[Message, Context], Message]


def _closed(call: Call) -> Call:
    """The call, with the text of any exception kept on this device: Flower sends to the server
    whatever an exception says that leaves a ClientApp."""

    @functools.wraps(call)
    def closed(message: Message, context: Context) -> Message:
        try:
            return call(message, context)
        except Exception as error:
            if is_simulated():
                raise
            log.exception("this client failed")
            raise ClientError(public_reason(error)) from None

    return closed


@app.query("node")
@_closed
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
@_closed
def exchange(message: Message, context: Context) -> Message:
    """Answer the requests of one exchange."""
    from hosl_flower.flower import client_calls

    return client_calls.exchange(message, context)


@app.train("session")
@_closed
def session(message: Message, context: Context) -> Message:
    """Answer over a stream until the server closes it; see link/stream.py."""
    from hosl_flower.flower import client_calls

    return client_calls.session(message, context)
