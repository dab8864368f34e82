"""Damaged messages of every kind: one typed error, or a message that is one (fuzzing.py)."""

import pytest
import torch
from damage import join
from fuzzing import Fuzz
from messages import ALL, LIMITS

from hosl_flower.errors import ProtocolError
from hosl_flower.protocol.messages.ledger import CatchUp


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_messages_are_refused_and_nothing_else_happens(seed):
    fuzz = Fuzz(ALL, LIMITS, seed)
    fuzz.run(1500)
    assert fuzz.outcomes.total() == 1500
    assert fuzz.outcomes["refused"] > 1000
    assert fuzz.outcomes["accepted"] > 20  # some damage does not matter: the fuzz is not blunt


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"scalars": torch.zeros(3, 5)}, r"scalars: expected float32\[n\], got float32\[3, 5\]"),
        ({"scalars": torch.zeros(())}, r"scalars: expected float32\[n\], got float32\[\]"),
        ({"scalars": torch.ones(3).bool()}, "scalars: expected float32"),
        ({"seeds": torch.zeros(3)}, r"seeds: expected int64\[n\], got float32\[3\]"),
        ({"seeds": torch.tensor([1, -1, 2])}, "seeds: expected 0 or more, got -1"),
    ],
)
def test_columns_of_entries_are_what_entries_are_made_of(change, complaint):
    (request,) = [message for message in ALL if isinstance(message, CatchUp)]
    with pytest.raises(ProtocolError, match=complaint):
        _ = CatchUp(**{**vars(request), **change}).entries


def test_what_is_not_damaged_passes():
    fuzz = Fuzz(ALL, LIMITS, 0)
    fuzz.others, fuzz._records = [LIMITS], lambda frame: None
    for frame in fuzz.frames[:15]:
        assert fuzz._outcome(frame).startswith("accepted")


def test_a_long_list_of_nonsense_costs_no_more_than_its_size():
    fuzz = Fuzz(ALL, LIMITS, 0)
    at = '"step":3,"seconds":0.5,"peak_bytes":7'
    for name, values in (("positions", "[null" + ",null" * 100_000 + "]"), ("fingerprints", "[]")):
        other = "fingerprints" if name == "positions" else "positions"
        header = f'{{"kind":"fingerprinted",{at},"{other}":[],"{name}":{values}}}'
        fuzz._feed(join({"key": [1, 0, 0], "header": header, "tensors": []}, b""))
    assert fuzz.outcomes == {"refused": 2}  # empty lists end nowhere
    assert fuzz.most_bytes < 2**20


def test_labels_that_are_answers_pass_where_answers_are_generated():
    fuzz = Fuzz(ALL, LIMITS, 0)
    *_, answers, _word = fuzz.frames
    fuzz.others, fuzz._records = fuzz.others[:1], lambda frame: None
    became = set()
    for _ in range(50):
        try:
            became.add(fuzz._outcome(answers))
        except ProtocolError as error:
            became.add(str(error).partition(" expected")[0])
    assert became == {"accepted", "labels:"}
