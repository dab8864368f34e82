"""The work of a ClientApp on a message: unpack, let the client answer, pack.

Outside simulation the server is another machine, and not trusted with this one: only the node's
configuration decides which data and models a run may have opened here, and errors leave with
their public text alone (errors.py).
"""

import logging

from flwr.app import ConfigRecord, Context, Message, RecordDict

from hosl_flower.client.client import Client
from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.config.node_config import NodeConfig
from hosl_flower.errors import HoslError, public_reason
from hosl_flower.flower.node import is_simulated
from hosl_flower.flower.records import pack, unpack_invitation, unpack_requests
from hosl_flower.flower.stream.client_end import serve
from hosl_flower.models.checkpoints.adapters import find_adapters
from hosl_flower.privacy.noise_secret import device_secret, simulated_secret
from hosl_flower.protocol.messages.base import Failure
from hosl_flower.tensors.device import use_threads

log = logging.getLogger("hosl_flower")

# The client of the run this process served last. A Ray worker answers many messages, for many
# partitions; loading the submodel for each would dwarf the work. Keyed by everything that
# makes a client, the run id included, so that two runs never mix; one, so memory is bounded.
_cached: dict[str, Client] = {}


def exchange(message: Message, context: Context) -> Message:
    """Answer the requests of one exchange, to each of the clients it is about in turn."""
    try:
        spec, groups = unpack_requests(message.content)
        client = _client(spec, context)
        content = pack(client.answer(requests) for requests in groups)
    except HoslError as error:
        content = pack([[Failure(step=0, seconds=0.0, peak_bytes=0, error=_reason(error))]])
    return Message(content, reply_to=message)


def session(message: Message, context: Context) -> Message:
    """Answer over a stream until the server closes it; see link/stream.py."""
    reason = ""
    try:
        spec, invitation = unpack_invitation(message.content)
        insecure = is_simulated() or NodeConfig.read(context.node_config).stream_insecure
        serve(invitation, _client(spec, context).answer, insecure)
    except HoslError as error:
        reason = _reason(error)
    return Message(RecordDict({"config": ConfigRecord({"error": reason})}), reply_to=message)


def _reason(error: HoslError) -> str:
    """The text about an error that the server gets."""
    whole = f"{type(error).__name__}: {error}"
    if is_simulated():
        return whole[:4000]
    log.error("%s", whole)
    return public_reason(error)[:4000]


def _client(spec: ClientSpec, context: Context) -> Client:
    node, remote = NodeConfig.read(context.node_config), not is_simulated()
    if remote:
        node.check(spec.source, spec.model)
        adapters = None if node.model_path else find_adapters(spec.model)
        if adapters is not None:  # their publisher names the base, which is opened too
            node.check("", adapters.base)
    secret = None
    if spec.dp_noise or spec.activation_noise:
        secret = device_secret(node.noise_secret) if remote else simulated_secret(spec.seed)
    key = f"{spec.to_json()}|{node}"
    if key not in _cached:
        _cached.clear()
        use_threads(spec.threads)
        _cached[key] = Client(
            spec,
            data_path=node.data_path,
            model=node.model_path,
            device=node.device,
            secret=secret,
            columns=node.data_columns,
            remote=remote,
        )
    return _cached[key]
