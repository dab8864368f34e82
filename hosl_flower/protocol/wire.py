"""Messages as bytes: a JSON header plus raw tensors, and back, checked on arrival.

Each link carries that pair in its own way (link/records.py puts it into a Flower RecordDict),
so every link speaks the same protocol and counts the same bytes.
"""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from hosl_flower.errors import ProtocolError
from hosl_flower.protocol.messages.base import Message

# bytes of a JSON header, which takes some forty times that while it is read: a request may list a
# whole ledger; the longest reply is a trail of fingerprints (ledger/client_state.py)
LONGEST_REQUEST, LONGEST_REPLY = 1 << 24, 1 << 20


def to_wire(message: Message) -> tuple[str, dict[str, Tensor]]:
    """A message as (JSON header, tensors by field name)."""
    header: dict[str, Any] = {"kind": message.kind}
    tensors: dict[str, Tensor] = {}
    for field in fields(message):
        value = getattr(message, field.name)
        (tensors if isinstance(value, Tensor) else header)[field.name] = value
    return json.dumps(header, allow_nan=False), tensors


def from_wire(
    header: str,
    tensors: Mapping[str, Tensor],
    known: Mapping[str, type],
    longest: int = LONGEST_REQUEST,
) -> Any:
    """The message that arrived, of one of the `known` kinds, its header of at most `longest`
    characters.

    Raises ProtocolError for anything that is not exactly such a message.
    """
    if len(header) > longest:
        raise ProtocolError(f"message header: expected at most {longest} bytes, got {len(header)}")
    try:
        values = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"message header is not JSON: {header[:60]!r}") from error
    kind = values.pop("kind", "") if isinstance(values, dict) else ""
    if not isinstance(kind, str) or kind not in known:
        got = reprlib.repr(kind)
        raise ProtocolError(f"expected a message of kind {', '.join(sorted(known))}, got {got}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    if overlap := values.keys() & tensors.keys():
        raise ProtocolError(f"{kind}: {', '.join(overlap)} came twice")
    if strange := {*values, *tensors} - {field.name for field in fields(known[kind])}:
        raise ProtocolError(f"{kind}: {min(strange)[:40]!r}: unexpected field")
    try:
        return known[kind](**values, **tensors)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "message"
        raise ProtocolError(f"{kind}: {place}: {first['msg'].lower()}") from error


def wire_bytes(message: Message) -> int:
    """Bytes of the header and the tensors; the transport's own envelope is not counted."""
    header, tensors = to_wire(message)
    return len(header) + sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
