"""The keys that methods declare, read from their source: those that their classes have."""

import pytest

from hosl_flower.config.key_reference import sections
from hosl_flower.config.run_config import KEYS
from hosl_flower.methods.load import method_class
from hosl_flower.methods.registry import declared_keys, place_of, registered, used_by

SOURCE = '''
from strategies.hosl import Hosl as Base

class Own(Base):
    """Without keys."""

class More(Own):
    keys: frozenset[str] = Own.keys - {"epsilon"} | {"server-steps", "trim-fraction"}

class Computed(Base):
    keys = frozenset(name for name in Base.keys)
'''


@pytest.mark.parametrize("name", sorted(registered()))
def test_declared_keys_are_those_of_the_class(name):
    assert declared_keys(place_of(name)) == method_class(name).keys
    assert declared_keys(place_of(name)) <= KEYS.keys()


def test_keys_are_found_over_files_and_bases(tmp_path, monkeypatch):
    (tmp_path / "own_methods.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    hosl = method_class("hosl").keys
    assert declared_keys("own_methods:Own") == hosl
    assert declared_keys("own_methods:More") == hosl - {"epsilon"} | {
        "server-steps",
        "trim-fraction",
    }
    for place in ("own_methods:Computed", "own_methods:Nope", "no_such_module:Own", "sys:Own"):
        assert declared_keys(place) == frozenset()


def test_a_key_is_used_by_the_methods_that_declare_it():
    assert used_by()["turn-steps"] == ["hosl", "split-zo"]
    assert "cut-layer" not in used_by()  # by all


def test_every_key_is_in_one_section():
    listed = [key.name for rows in sections().values() for key in rows]
    assert sorted(listed) == sorted(KEYS)
