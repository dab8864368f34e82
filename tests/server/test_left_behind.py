"""A process may do many runs one after the other: nothing of a finished one stays."""

import gc
import logging
import threading
import weakref

import flwr_datasets.partitioner  # noqa: F401  its first import leaves a traceback, once
import pytest
from runs import run_factory, write_questions

from hosl_flower.client.client import Client
from hosl_flower.config.resolve import resolve
from hosl_flower.data.client_data import DataPool
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.server.session import Session
from hosl_flower.server.trainer import ServerTrainer
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl
from strategies.split_fo import SplitFo

HEAVY = (Session, ServerTrainer, Client, DataPool, ClientSubmodel)


@pytest.fixture
def made(monkeypatch):
    """Weak references to all that is heavy and made from now on; without garbage collection, as in
    a process with many other objects, where it is rare."""
    references = []

    def noted(original):
        def init(self, *args, **kwargs):
            references.append(weakref.ref(self))
            original(self, *args, **kwargs)

        return init

    for kind in HEAVY:
        monkeypatch.setattr(kind, "__init__", noted(kind.__init__))
    gc.collect()
    gc.disable()
    yield references
    gc.enable()


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        (Hosl, {}),
        (HoSfl, {"labels": "client", "num_clients": 2, "partitioner": "dirichlet"}),
        (
            SplitFo,
            {"client_gradient": "residual", "client_optimizer": "adafactor", "directions": 1},
        ),
        (SplitFo, {"evaluation": "central", "client_trainable": "lora", "directions": 1}),
    ],
)
def test_models_and_data_go_with_their_run(method, keys, tiny_opt, tmp_path, made):
    make = run_factory(method, tiny_opt, tmp_path)
    handlers = list(logging.getLogger("hosl_flower").handlers), list(logging.root.handlers)
    threads = threading.enumerate()
    make(**keys)
    assert len(made) >= len(HEAVY)
    assert [type(own()).__name__ for own in made if own() is not None] == []
    assert threading.enumerate() == threads
    assert (logging.getLogger("hosl_flower").handlers, logging.root.handlers) == handlers


def test_so_do_those_that_write_answers(tiny_opt, tmp_path, made):
    make = run_factory(Hosl, tiny_opt, tmp_path)
    data = write_questions(tmp_path / "questions")
    make(
        task="squad", data_path=str(data), prompt="", verbalizers="", max_new_tokens=3,
        cut_layer=1,
    )  # fmt: skip
    assert [type(own()).__name__ for own in made if own() is not None] == []


def test_a_client_that_starts_over_never_has_two_copies(tiny_opt, tmp_path, made):
    make = run_factory(Hosl, tiny_opt, tmp_path)
    _, _, config = make(steps=1, eval_every=1)
    made.clear()
    client = Client(resolve(config, "again").spec)
    first = weakref.ref(client.submodel)
    client.reset()
    assert first() is None
    assert client.submodel is not None
