"""Protocol messages to and from Flower's RecordDict.

    "config"   ConfigRecord: "headers", one JSON header per message; for requests also "spec",
               the ClientSpec, and for replies nothing else
    "arrays"   ArrayRecord: "<index>.<field>" -> tensor, as raw bytes with dtype and shape

Raw bytes, not .npy: numpy has no bfloat16, and one copy less.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from hosl_flower.errors import ProtocolError
from hosl_flower.messages import REPLIES, REQUESTS, Message, Reply, Request, from_wire, to_wire
from hosl_flower.spec import ClientSpec
from hosl_flower.tensors import dtype_name, raw_bytes, tensor_from_bytes

_STYPE = "hosl.raw"


def pack(messages: Iterable[Message], spec: ClientSpec | None = None) -> RecordDict:
    """Messages, and the spec when they are requests, as one RecordDict.

    Messages are taken one at a time, so that of lazily computed replies only the bytes stay.
    """
    headers, arrays = [], {}
    for index, message in enumerate(messages):
        header, tensors = to_wire(message)
        headers.append(header)
        for name, tensor in tensors.items():
            arrays[f"{index}.{name}"] = Array(
                dtype_name(tensor), tuple(tensor.shape), _STYPE, bytes(raw_bytes(tensor))
            )
    config: dict[str, Any] = {"headers": headers}
    if spec is not None:
        config["spec"] = spec.to_json()
    return RecordDict({"config": ConfigRecord(config), "arrays": ArrayRecord(arrays)})


def unpack_requests(content: RecordDict) -> tuple[ClientSpec, list[Request]]:
    """What a client received; ProtocolError when it is anything else."""
    config = _config(content)
    spec = config.get("spec")
    if not isinstance(spec, str):
        raise ProtocolError("requests came without a client spec")
    return ClientSpec.from_json(spec), _unpack(content, REQUESTS)


def unpack_replies(content: RecordDict) -> list[Reply]:
    """What the server received; ProtocolError when it is anything else."""
    return _unpack(content, REPLIES)


def _config(content: RecordDict) -> ConfigRecord:
    if set(content) != {"config", "arrays"} or "config" not in content.config_records:
        raise ProtocolError(f"expected records config and arrays, got {sorted(content)}")
    return content.config_records["config"]


def _unpack(content: RecordDict, known: Mapping[str, type]) -> list[Any]:
    headers = _config(content).get("headers")
    arrays = content.array_records.get("arrays")
    if not isinstance(headers, list) or arrays is None:
        raise ProtocolError("expected a list of headers and a record of arrays")
    tensors: list[dict[str, Tensor]] = [{} for _ in headers]
    for key, array in arrays.items():
        index, _, name = key.partition(".")
        if not index.isdecimal() or int(index) >= len(headers) or array.stype != _STYPE:
            raise ProtocolError(f"unexpected array {key!r} of kind {array.stype!r}")
        tensors[int(index)][name] = tensor_from_bytes(array.data, array.dtype, tuple(array.shape))
    return [
        from_wire(header if isinstance(header, str) else "", own, known)
        for header, own in zip(headers, tensors, strict=True)
    ]
