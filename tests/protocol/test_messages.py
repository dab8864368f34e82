"""protocol/messages/registry.py, tensors/raw_bytes.py and link/records.py: exact round trips, one
typed error for the rest."""

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import ALL, AT, CUT, DONE, LIMITS, D, activations, ledger
from specs import client_spec

from hosl_flower.errors import OutOfRangeError, ProtocolError
from hosl_flower.flower.records import pack, unpack_replies, unpack_requests
from hosl_flower.protocol.messages.activations import (
    BatchKey,
    check_same_batch,
)
from hosl_flower.protocol.messages.describe import Describe, Described
from hosl_flower.protocol.messages.gradients import (
    Change,
    Gradient,
)
from hosl_flower.protocol.messages.kept_labels import (
    HeldOutStates,
    HiddenGradient,
    HiddenStates,
    Scored,
)
from hosl_flower.protocol.messages.ledger import (
    CatchUp,
    Fingerprint,
    Fingerprinted,
)
from hosl_flower.protocol.messages.registry import REPLIES, REQUESTS
from hosl_flower.protocol.messages.scalars import (
    CutGradient,
    Scalars,
)
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.protocol.wire import from_wire, to_wire, wire_bytes
from hosl_flower.tensors.raw_bytes import DTYPES, raw_bytes, tensor_from_bytes
from hosl_flower.tensors.update_codec import RowLayout, check


def same(a, b):
    (header_a, tensors_a), (header_b, tensors_b) = to_wire(a), to_wire(b)
    bits = [bytes(raw_bytes(t)) for t in tensors_a.values()]
    return (
        type(a) is type(b)
        and header_a == header_b
        and [t.dtype for t in tensors_a.values()] == [t.dtype for t in tensors_b.values()]
        and bits == [bytes(raw_bytes(t)) for t in tensors_b.values()]
    )


@pytest.mark.parametrize("message", ALL, ids=lambda m: m.kind)
def test_the_wire_carries_every_message_unchanged(message):
    assert same(message, from_wire(*to_wire(message), {**REQUESTS, **REPLIES}))


def test_every_kind_is_covered():
    assert {m.kind for m in ALL} == {*REQUESTS, *REPLIES}


def test_catch_up_carries_ledger_entries():
    message = next(m for m in ALL if isinstance(m, CatchUp))
    assert message.entries == ledger().entries
    assert CatchUp.of(ledger(), 1, 2, Describe(**AT)).entries == ledger().entries[1:]


def test_bytes_are_counted_as_sent():
    message = activations(activations=torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    header, _ = to_wire(message)
    assert wire_bytes(message) == len(header) + 2 * 3 * 4 * 2 + 2 * 3 + 2 * 8
    coded = activations(
        activations=torch.zeros(2, 3, 4, dtype=torch.int8), scales=torch.zeros(2, 3)
    )
    assert wire_bytes(coded) == len(to_wire(coded)[0]) + 2 * 3 * 4 + 2 * 3 * 4 + 2 * 3 + 2 * 8


HEADER = '"step":3,"partition":1,"position":2,"digest":"0123456789abcdef"'


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ("", "not JSON"),
        ("[]", "kind"),
        ('{"kind":["forward"]}', "kind"),
        ('{"kind":"pickle"}', "expected a message of kind adopt, "),
        ('{"kind":"forward",' + HEADER + "}", "batch: field required"),
        ('{"kind":"forward",' + HEADER + ',"batch":-1}', "greater than or equal to 0"),
        ('{"kind":"forward",' + HEADER + ',"batch":1.5}', "valid integer"),
        ('{"kind":"forward",' + HEADER + ',"batch":true}', "valid integer"),
        ('{"kind":"forward",' + HEADER + ',"batch":9223372036854775808}', "less than"),
        ('{"kind":"forward",' + HEADER + ',"batch":1,"x":1}', "unexpected"),
        ('{"kind":"probe",' + HEADER + ',"batch":1,"seed":1,"coefficient":NaN}', "finite"),
        ('{"kind":"describe","step":3,"partition":1,"position":2,"digest":"x"}', "digest"),
        ("[" * 100_000, "not JSON"),
        ('{"kind":"describe",' + HEADER + ',"__dataclass_self__":1}', "unexpected field"),
    ],
)
def test_what_is_not_a_message_is_one_protocol_error(header, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        from_wire(header, {}, REQUESTS)


@pytest.mark.parametrize("seconds", ["-1e300", "-1e-9", "1e308", "NaN", "Infinity"])
def test_seconds_that_nobody_computes_for_are_refused(seconds):
    header = f'{{"kind":"stepped","step":3,"seconds":{seconds},"peak_bytes":7,"local":1}}'
    with pytest.raises(ProtocolError, match="seconds: "):
        from_wire(header, {}, REPLIES)


@given(st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(repr))
@settings(max_examples=200, deadline=None)
def test_any_text_is_refused_with_a_protocol_error(header):
    with pytest.raises(ProtocolError):
        from_wire(header, {}, REQUESTS)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"activations": torch.zeros(2, 3, 5)}, r"expected float32\[B, S, 4\]"),
        ({"activations": torch.zeros(2, 3)}, "expected float32"),
        ({"activations": torch.zeros(2, 3, 4, dtype=torch.int64)}, "got int64"),
        ({"activations": torch.zeros(9, 3, 4)}, "at most 8 sequences"),
        ({"activations": torch.full((2, 3, 4), float("nan"))}, "24 of 24 values are not finite"),
        ({"attention_mask": torch.ones(2, 2, dtype=torch.bool)}, "attention_mask"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask"),
        ({"attention_mask": torch.tensor([[True, True, False]] * 2)}, "left-padded"),
        ({"attention_mask": torch.tensor([[True, False, True]] * 2)}, "left-padded"),
        ({"activations": torch.zeros(2, 3, 4, dtype=torch.float16)}, "got float16"),
        ({"scales": torch.zeros(2, 3)}, r"scales: expected float32\[0\]"),
        ({"labels": torch.tensor([0, 2])}, r"labels: expected 0\.\.1, got 2 at \[1\]"),
        ({"labels": torch.tensor([0])}, "labels"),
        ({"labels": torch.tensor([-1, 7])}, r"labels: expected 0\.\.1, got -1 at \[0\]$"),
    ],
)
def test_activations_that_do_not_fit_the_run_are_refused(changes, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        activations(**changes).check(None, LIMITS, None)


@pytest.mark.parametrize(
    "other",
    [
        {"labels": torch.tensor([1, 1])},
        {"activations": torch.ones(2, 2, 4), "attention_mask": torch.ones(2, 2, dtype=torch.bool)},
    ],
)
def test_replies_about_different_batches_are_noticed(other):
    first = BatchKey.of(activations())
    check_same_batch([first, BatchKey.of(activations())], 3)
    with pytest.raises(ProtocolError, match=r"step 3.*2 different mini-batches"):
        check_same_batch([first, BatchKey.of(activations(**other))], 3)


def test_local_seeds_are_those_of_each_step():
    assert CutGradient(**CUT).local_seeds == [(1, 2), (3, 4)]
    with pytest.raises(ProtocolError, match="4 seeds are no steps of 3 directions"):
        CutGradient(**{**CUT, "directions": 3}).local_seeds  # noqa: B018


@pytest.mark.parametrize(
    "scalars",
    [
        torch.zeros(2, 3),
        torch.zeros(4),
        torch.zeros(2, 2).double(),
        torch.full((2, 2), 1e20),
        torch.full((2, 2), float("inf")),
    ],
)
def test_scalars_that_do_not_fit_the_request_are_refused(scalars):
    Scalars(**DONE, scalars=torch.zeros(2, 2)).check(CutGradient(**CUT), LIMITS, None)
    with pytest.raises(ProtocolError, match="scalars: "):
        Scalars(**DONE, scalars=scalars).check(CutGradient(**CUT), LIMITS, None)


@pytest.mark.parametrize(
    ("value", "shown"), [(-1e20, r"-1e\+20"), (float("nan"), "nan"), (float("inf"), "inf")]
)
def test_of_scalars_that_are_too_large_the_first_is_named(value, shown):
    scalars = torch.tensor([[1.0, 2.0], [3.0, value]])
    with pytest.raises(OutOfRangeError, match=rf"at most \+-\S+, got {shown} at \[1, 1\]$"):
        Scalars(**DONE, scalars=scalars).check(CutGradient(**CUT), LIMITS, None)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"label_counts": (5,)}, "expected 2 label counts"),
        ({"label_counts": (3, 1)}, "that sum to the number of training examples"),
        ({"train_examples": 0, "label_counts": (0, 0)}, "1 or more"),
        ({"train_examples": 2**62, "label_counts": (2**62, 0)}, "1 or more"),
        ({"held_out_examples": 0}, "expected 1 to 40 held-out examples, got 0"),
        ({"held_out_examples": 41}, "got 41"),
        ({"held_out_overlap": (2, 1, 5)}, "expected held_out_overlap"),
        ({"held_out_overlap": (2, 3, 5, 6)}, "shared <= examples <= 2"),
        ({"held_out_overlap": (3, 1, 5, 6)}, "shared <= examples <= 2"),
        ({"held_out_overlap": (0, 0, 0, 0)}, "expected held_out_overlap"),
    ],
)
def test_a_description_that_cannot_be_is_refused(changes, complaint):
    good = next(vars(m) for m in ALL if isinstance(m, Described))
    limits = ReplyLimits(batch=8, length=16, hidden=4, dtype="float32", classes=2, held_out=40)
    Described(**good).check(None, limits, None)
    with pytest.raises(ProtocolError, match=complaint):
        Described(**{**good, **changes}).check(None, limits, None)


def test_a_client_cannot_have_an_evaluation_without_end():
    good = next(vars(m) for m in ALL if isinstance(m, Described))
    Described(**{**good, "held_out_examples": 10**6}).check(None, LIMITS, None)
    with pytest.raises(ProtocolError, match="expected 1 to 1000000 held-out examples, got 1000001"):
        Described(**{**good, "held_out_examples": 10**6 + 1}).check(None, LIMITS, None)


def test_no_labels_are_taken_where_they_are_the_clients():
    limits = ReplyLimits(8, 16, 4, "float32", 2, private_labels=True, label_counts=False)
    good = next(vars(m) for m in ALL if isinstance(m, Described))
    Described(**{**good, "label_counts": ()}).check(None, limits, None)
    with pytest.raises(ProtocolError, match="no label counts, which stay on the client; got 5"):
        Described(**good).check(None, limits, None)
    activations(labels=torch.empty(0, dtype=torch.int64)).check(None, limits, None)
    with pytest.raises(ProtocolError, match="expected none, they stay on the client"):
        activations().check(None, limits, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient": torch.zeros(2, 3, 5)},
        {"gradient": torch.zeros(2, 3, 4).half()},
        {"gradient": torch.zeros(0)},
        {"gradient": torch.full((2, 3, 4), float("nan"))},
        {"gradient": torch.full((2, 3, 4), 1e20)},
        {"loss": -0.1},
        {"loss": 1e20},
    ],
)
def test_a_gradient_that_does_not_fit_the_hidden_states_is_refused(changes):
    request = HiddenStates(**AT, batch=4, first=0, states=torch.randn(2, 3, 4))
    good = {"loss": 0.5, "gradient": torch.zeros(2, 3, 4)}
    HiddenGradient(**DONE, **good).check(request, LIMITS, None)
    with pytest.raises(ProtocolError, match=r"gradient: expected|loss: expected"):
        HiddenGradient(**DONE, **{**good, **changes}).check(request, LIMITS, None)


@pytest.mark.parametrize("changes", [{"correct": 3}, {"loss_sum": -1.0}, {"loss_sum": 1e20}])
def test_totals_that_cannot_be_are_refused(changes):
    request = HeldOutStates(**AT, first=40, states=torch.randn(2, 3, 4))
    good = {"correct": 2, "loss_sum": 1.5}
    Scored(**DONE, **good).check(request, None, None)
    with pytest.raises(ProtocolError, match=r"correct: expected|loss_sum: expected"):
        Scored(**DONE, **{**good, **changes}).check(request, None, None)


ROWS = RowLayout({"a": torch.Size([2, 3]), "b": torch.Size([4])})
CODED = {
    "exact": {"values": torch.ones(7), "scales": torch.empty(0)},
    "int8": {"values": torch.ones(7, dtype=torch.int8), "scales": torch.ones(2)},
}  # of two rows, present


@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize(
    "damage",
    [
        {"present": torch.tensor([True, False])},
        {"present": torch.tensor([1, 0, 1])},
        {"present": torch.tensor([True, True, True])},
        {"values": torch.ones(8)},
        {"values": torch.ones(7).half()},
        {"values": torch.full((7,), float("inf"))},
        {"values": torch.full((7,), 1e13)},
        {"scales": torch.ones(3)},
        {"scales": torch.tensor([1.0, float("nan")])},
        {"scales": torch.tensor([1.0, -1.0])},
        {"scales": torch.tensor([1.0, 1e11])},
    ],
)
def test_an_update_that_does_not_fit_the_model_is_refused(codec, damage):
    own = {"present": torch.tensor([True, False, True]), **CODED[codec]}
    check(ROWS.widths(), Change(**DONE, **own), codec, "change")
    with pytest.raises(ProtocolError, match=r"^(scales of the )?change: expected|are not finite"):
        check(ROWS.widths(), Change(**DONE, **{**own, **damage}), codec, "change")


@pytest.mark.parametrize("codec", CODED)
def test_only_the_runs_update_codec_is_taken(codec):
    present = torch.tensor([True, False, True])
    for own, fields in CODED.items():
        reply = Gradient(**DONE, present=present, **fields)
        if own == codec:
            check(ROWS.widths(), reply, codec, "gradient")
            continue
        with pytest.raises(ProtocolError, match="gradient: expected"):
            check(ROWS.widths(), reply, codec, "gradient")


@pytest.mark.parametrize("positions", [(), (1,), (2, 1, 2), (2, 3)])
def test_fingerprints_of_other_positions_are_refused(positions):
    reply = Fingerprinted(**DONE, positions=positions, fingerprints=(D,) * len(positions))
    with pytest.raises(ProtocolError, match="fingerprints: expected positions up to 2"):
        reply.check(Fingerprint(**AT, since=0), None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_tensors_survive_as_bytes(dtype, shape):
    tensor = torch.randint(0, 2, shape).to(DTYPES[dtype])
    back = tensor_from_bytes(bytes(raw_bytes(tensor)), dtype, shape)
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


@pytest.mark.parametrize(
    ("data", "dtype", "shape"),
    [
        (b"1234", "float32", (2,)),
        (b"1234", "object", (1,)),
        (b"", "float32", (-1,)),
        (b"1234", "float32", (1, 1, 1, 1, 1)),
        (b"", "float32", (2**40, 2**40)),
        (b"", "float32", (2**62, 2**62, 0)),
    ],
)
def test_bytes_that_do_not_fit_are_refused_before_memory_is_taken(data, dtype, shape):
    with pytest.raises(ProtocolError):
        tensor_from_bytes(data, dtype, shape)


SPEC = client_spec()


def test_record_dicts_carry_requests_with_the_spec_and_replies():
    requests = [m for m in ALL if m.kind in REQUESTS]
    replies = [m for m in ALL if m.kind in REPLIES]
    groups = [requests[:3], [], requests[3:]]
    spec, received = unpack_requests(pack(groups, SPEC))
    assert spec == SPEC
    assert [len(group) for group in received] == [len(group) for group in groups]
    for sent, arrived in zip(groups, received, strict=True):
        assert all(map(same, sent, arrived))
    assert all(map(same, replies, unpack_replies(pack([replies]))[0]))


def broken_records():
    good = pack([[activations()]])
    headers = good["config"]["headers"]
    yield RecordDict({"config": good["config"]})
    yield RecordDict({**good, "more": ConfigRecord({})})
    yield RecordDict({**good, "config": ConfigRecord({"headers": "x"})})
    yield RecordDict({**good, "config": ConfigRecord({"headers": [1], "sizes": [1]})})
    yield RecordDict({**good, "config": ConfigRecord({"headers": headers})})
    yield RecordDict({**good, "config": ConfigRecord({"headers": headers, "sizes": [2]})})
    yield RecordDict({**good, "config": ConfigRecord({"headers": headers, "sizes": [2, -1]})})
    yield RecordDict({**good, "arrays": ArrayRecord({})})
    npy = Array("float32", (1,), "numpy.ndarray", b"1234")
    yield RecordDict({**good, "arrays": ArrayRecord({"0.activations": npy})})
    raw = Array("float32", (1,), "hosl.raw", b"1234")
    yield RecordDict({**good, "arrays": ArrayRecord({"9.activations": raw})})
    yield RecordDict({**good, "arrays": ArrayRecord({"activations": raw})})
    yield RecordDict({**good, "arrays": ArrayRecord({"9" * 5000 + ".x": raw})})
    short = Array("float32", (2, 3, 4), "hosl.raw", b"1234")
    yield RecordDict({**good, "arrays": ArrayRecord({"0.activations": short})})


@pytest.mark.parametrize("index", range(13))
def test_other_record_dicts_are_refused(index):
    with pytest.raises(ProtocolError):
        unpack_replies(list(broken_records())[index])


def test_requests_without_a_spec_are_refused():
    with pytest.raises(ProtocolError, match="spec"):
        unpack_requests(pack([[Describe(**AT)]]))
