"""What a ClientApp does with a message: unpack, let the client answer, pack."""

from flwr.app import ConfigRecord, Context, Message, RecordDict

from hosl_flower.client import Client
from hosl_flower.errors import HoslError
from hosl_flower.link.dial import serve
from hosl_flower.link.records import pack, unpack_invitation, unpack_requests
from hosl_flower.messages import Failure
from hosl_flower.node_config import is_simulated
from hosl_flower.secret import device_secret, simulated_secret
from hosl_flower.spec import ClientSpec, use_threads

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
        text = f"{type(error).__name__}: {error}"
        content = pack([[Failure(step=0, seconds=0.0, peak_bytes=0, error=text[:4000])]])
    return Message(content, reply_to=message)


def session(message: Message, context: Context) -> Message:
    """Answer over a stream until the server closes it; see link/stream.py."""
    error = ""
    try:
        spec, invitation = unpack_invitation(message.content)
        serve(invitation, _client(spec, context).answer)
    except HoslError as problem:
        error = f"{type(problem).__name__}: {problem}"[:4000]
    return Message(RecordDict({"config": ConfigRecord({"error": error})}), reply_to=message)


def _client(spec: ClientSpec, context: Context) -> Client:
    own = {
        key: str(context.node_config.get(name, ""))
        for key, name in (("data_path", "data-path"), ("model", "model-path"), ("device", "device"))
    }
    secret = None
    if spec.dp_noise or spec.activation_noise:
        path = str(context.node_config.get("noise-secret", ""))
        secret = simulated_secret(spec.seed) if is_simulated() else device_secret(path)
    key = f"{spec.to_json()}|{sorted(own.items())}"
    if key not in _cached:
        _cached.clear()
        use_threads(spec.threads)
        _cached[key] = Client(spec, **own, secret=secret)
    return _cached[key]
