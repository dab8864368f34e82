"""Damaged messages of every kind: one typed error, or a message that is one (fuzzing.py)."""

import pytest
from fuzzing import Fuzz, _frame
from test_messages import ALL, LIMITS


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_messages_are_refused_and_nothing_else_happens(seed):
    fuzz = Fuzz(ALL, LIMITS, seed)
    fuzz.run(1500)
    assert fuzz.outcomes.total() == 1500
    assert fuzz.outcomes["refused"] > 1000
    assert fuzz.outcomes["accepted"] > 20  # some damage does not matter: the fuzz is not blunt


def test_what_is_not_damaged_passes():
    fuzz = Fuzz(ALL, LIMITS, 0)
    for frame in fuzz.frames[:15]:
        assert fuzz._outcome(frame).startswith("accepted")


def test_a_long_list_of_nonsense_costs_no_more_than_its_size():
    fuzz = Fuzz(ALL, LIMITS, 0)
    at = '"step":3,"seconds":0.5,"peak_bytes":7'
    for name, values in (("positions", "[null" + ",null" * 100_000 + "]"), ("fingerprints", "[]")):
        other = "fingerprints" if name == "positions" else "positions"
        header = f'{{"kind":"fingerprinted",{at},"{other}":[],"{name}":{values}}}'
        fuzz._feed(_frame({"key": [1, 0, 0], "header": header, "tensors": []}, b""))
    assert fuzz.outcomes == {"refused": 1, "accepted": 1}
    assert fuzz.most_bytes < 2**20
