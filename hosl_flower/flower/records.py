"""Protocol messages to and from Flower's RecordDict.

    "config"   ConfigRecord: "headers", one JSON header per message; "sizes", how many messages
               there are for or from each client in turn; for requests also "spec", the ClientSpec
    "arrays"   ArrayRecord: "<index>.<field>" -> tensor, as raw bytes with dtype and shape

Raw bytes, not .npy: numpy has no bfloat16, and one copy less.
"""

import itertools
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.errors import ProtocolError
from hosl_flower.flower.stream.client_end import Invitation
from hosl_flower.protocol.messages.base import Message, Reply, Request
from hosl_flower.protocol.messages.registry import REPLIES, REQUESTS
from hosl_flower.protocol.wire import LONGEST_REPLY, LONGEST_REQUEST, from_wire, to_wire
from hosl_flower.tensors.raw_bytes import dtype_name, raw_bytes, tensor_from_bytes

_STYPE = "hosl.raw"


def pack(groups: Iterable[Iterable[Message]], spec: ClientSpec | None = None) -> RecordDict:
    """Messages of several clients, and the spec when they are requests, as one RecordDict.

    Messages are taken one at a time, so that of lazily computed replies only the bytes stay.
    """
    headers: list[str] = []
    sizes: list[int] = []
    arrays = {}
    for group in groups:
        before = len(headers)
        for message in group:
            header, tensors = to_wire(message)
            for name, tensor in tensors.items():
                arrays[f"{len(headers)}.{name}"] = Array(
                    dtype_name(tensor), tuple(tensor.shape), _STYPE, bytes(raw_bytes(tensor))
                )
            headers.append(header)
        sizes.append(len(headers) - before)
    config: dict[str, Any] = {"headers": headers, "sizes": sizes}
    if spec is not None:
        config["spec"] = spec.to_json()
    return RecordDict({"config": ConfigRecord(config), "arrays": ArrayRecord(arrays)})


def unpack_requests(content: RecordDict) -> tuple[ClientSpec, list[list[Request]]]:
    """What arrived for each client; ProtocolError when it is anything else."""
    spec = _config(content).get("spec")
    if not isinstance(spec, str):
        raise ProtocolError("requests came without a client spec")
    return ClientSpec.from_json(spec), _unpack(content, REQUESTS, LONGEST_REQUEST)


def pack_invitation(invitation: Invitation, spec: ClientSpec) -> RecordDict:
    """What opens a stream: where to dial, and what to know."""
    own = ConfigRecord({"spec": spec.to_json(), "invitation": invitation.to_json()})
    return RecordDict({"config": own})


def unpack_invitation(content: RecordDict) -> tuple[ClientSpec, Invitation]:
    """What a client received; ProtocolError when it is anything else."""
    config = content.config_records.get("config", ConfigRecord())
    spec, invitation = config.get("spec"), config.get("invitation")
    if not isinstance(spec, str) or not isinstance(invitation, str):
        raise ProtocolError("expected a client spec and an invitation")
    return ClientSpec.from_json(spec), Invitation.from_json(invitation)


def unpack_replies(content: RecordDict) -> list[list[Reply]]:
    """What each client answered; ProtocolError when it is anything else."""
    return _unpack(content, REPLIES, LONGEST_REPLY)


def _config(content: RecordDict) -> ConfigRecord:
    if set(content) != {"config", "arrays"} or "config" not in content.config_records:
        raise ProtocolError(
            f"expected records config and arrays, got {reprlib.repr(sorted(content))}"
        )
    return content.config_records["config"]


def _unpack(content: RecordDict, known: Mapping[str, type], longest: int) -> list[list[Any]]:
    config = _config(content)
    headers, sizes = config.get("headers"), config.get("sizes")
    arrays = content.array_records.get("arrays")
    if not isinstance(headers, list) or not isinstance(sizes, list) or arrays is None:
        raise ProtocolError("expected lists of headers and sizes, and a record of arrays")
    groups = [n for n in sizes if isinstance(n, int) and n >= 0]
    if len(groups) != len(sizes) or sum(groups) != len(headers):
        shown = reprlib.repr(sizes)
        raise ProtocolError(f"sizes {shown} do not add up to {len(headers)} messages")
    tensors: list[dict[str, Tensor]] = [{} for _ in headers]
    for key, array in arrays.items():
        index, _, name = key.partition(".")
        known_index = index.isdecimal() and len(index) < 10 and int(index) < len(headers)
        if not known_index or array.stype != _STYPE:
            raise ProtocolError(f"unexpected array {key[:40]!r} of kind {array.stype[:40]!r}")
        tensors[int(index)][name] = tensor_from_bytes(array.data, array.dtype, tuple(array.shape))
    messages = (
        from_wire(header if isinstance(header, str) else "", own, known, longest)
        for header, own in zip(headers, tensors, strict=True)
    )
    return [list(itertools.islice(messages, size)) for size in groups]
