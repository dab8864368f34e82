"""The methods HO-SFL and HOSL are compared with, each against something it must equal."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from reference_ho_sfl import ho_sfl as reference
from reference_ho_sfl import unsplit_name
from runs import PROMPT, run_factory
from safetensors.torch import load_file
from steps import losses
from transformers import AutoModelForCausalLM, AutoTokenizer

from hosl_flower.client.client import Client
from hosl_flower.errors import ClientError, ConfigError, ProtocolError
from hosl_flower.ledger.ledger import Ledger
from hosl_flower.optim.adafactor import Adafactor
from hosl_flower.optim.gradient import Dense
from hosl_flower.protocol.messages.activations import Activations, Forward
from hosl_flower.protocol.messages.base import Behind
from hosl_flower.protocol.messages.gradients import Adopt, Fetch, LocalStep
from hosl_flower.protocol.messages.ledger import Restore
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.server.in_process import InProcessLink
from hosl_flower.server.open_session import open_session
from hosl_flower.server.trainer import ServerTrainer
from hosl_flower.server.zo_trainer import ZoTrainer
from hosl_flower.tensors.rows import unflat
from strategies.fedavg_zo import FedAvgZo
from strategies.frozen_client import FrozenClient
from strategies.full_zo import FullZo
from strategies.heron import Heron
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl
from strategies.sign_vote import SignVote
from strategies.split_fo import SplitFo
from strategies.split_zo import SplitZo

ONE = {"client_trainable": "blocks"}
MANY = {**ONE, "num_clients": 4, "clients_per_step": 2}
SERVERLESS = {"server_learning_rate": 1e-3}  # the default
FO = {"directions": 1, "client_learning_rate": 1e-2}


@pytest.fixture
def make(tiny_opt, tmp_path):
    return run_factory(HoSfl, tiny_opt, tmp_path, **{"save-model": False})


def weights_of(directory):
    return load_file(directory / "model" / "model.safetensors")


def test_a_frozen_client_is_ho_sfl_without_steps_of_the_client(make):
    still, a, _ = make(FrozenClient, **MANY, directions=1, client_learning_rate=1e-6)
    moved, b, _ = make(HoSfl, **MANY, client_learning_rate=0.0)
    assert losses(a) == losses(b)
    assert still.evaluations == moved.evaluations
    assert still.fingerprint == moved.fingerprint, "of the base checkpoint"
    assert set(still.bytes_down) & {"cut-gradient", "catch-up", "restore"} == set()


@pytest.mark.parametrize(("optimizer", "lora"), [("sgd", False), ("adamw", False), ("sgd", True)])
def test_split_first_order_equals_the_reference_loop(make, optimizer, lora):
    own = {"client_trainable": "lora", "server_trainable": "lora", "lora_rank": 2} if lora else ONE
    results, directory, config = make(
        SplitFo, **{**own, **FO}, num_clients=4, clients_per_step=3,
        client_optimizer=optimizer, server_optimizer=optimizer, save_model=True)  # fmt: skip
    expected, _, accuracy, client, _ = reference(
        config.model, directory.parent.parent / "reviews", config.cut_layer, PROMPT,
        config.task.verbalizer_list,
        {
            "steps": 4, "batch": 5, "clients": 4, "sampled": 3, "directions": 1, "epsilon": 1e-3,
            "lr": 1e-2, "optimizer": optimizer, "lora": lora, "rank": 2, "alpha": 16.0, "seed": 3,
            "kind": "rank1", "first_order": True,
        },
    )  # fmt: skip
    assert losses(directory) == pytest.approx(expected, rel=1e-4)
    assert results.accuracy == accuracy
    merged = weights_of(directory)
    client = client.merge_and_unload() if lora else client
    for name, parameter in client.named_parameters():
        # a bias of keys moves all scores of a query alike: its gradient is rounding, scaled by Adam
        if (".layers.0." in name or ".layers.1." in name) and "k_proj.bias" not in name:
            assert torch.allclose(merged[unsplit_name(name)], parameter, atol=1e-3), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_for_one_client_local_steps_change_what_travels_and_nothing_else(make, optimizer):
    keys = {**ONE, **FO, "client_optimizer": optimizer, "steps": 6, "eval_every": 6}
    every, a, _ = make(SplitFo, **keys)
    thrice, b, _ = make(SplitFo, **keys, local_steps=3)
    assert losses(a) == losses(b)
    assert every.fingerprint == thrice.fingerprint
    assert every.bytes_up["backward"]["messages"] == 6
    assert thrice.bytes_up["fetch"]["messages"] == 2
    assert "restore" not in thrice.bytes_down, "the client is where the run is already"
    peaks = thrice.client_peak_memory["tensor_bytes"]
    assert peaks["exchange"] > peaks["forward"] / 2 > 0, "weights are copied to be sent"


def test_averaged_weights_are_the_mean_of_what_each_client_came_to(make):
    # each client alone, from the same start, with a server that stands still
    keys = {
        **ONE, **FO, "num_clients": 3, "server_learning_rate": 0.0, "steps": 2, "eval_every": 2,
        "local_steps": 2,
    }  # fmt: skip
    together, a, config = make(SplitFo, **keys, save_model=True)
    alone = []
    for member in range(3):
        session = open_session(config, "alone", 3)
        session.participation.clients = dict.fromkeys(range(3), SimpleNamespace(train_examples=1))
        session.sample = lambda step, absent=(), m=member: [m]
        link = InProcessLink(Client(session.spec).answer, session.history, session.limits)
        SplitFo(config).steps(session, link, [1, 2])
        alone.append(session.history.state.weights())
    shares = torch.tensor([14, 13, 13], dtype=torch.float64) / 40  # of the examples
    mean = (torch.stack(alone).double() * shares.unsqueeze(1)).sum(0)
    session.history.state.set_weights(mean.float())
    merged, state = weights_of(a), session.history.state.parameters
    for name, parameter in state.items():
        assert torch.allclose(merged[name], parameter, atol=1e-6), name
    assert not torch.equal(alone[0], alone[1])
    assert together.clients["fingerprint_checked"] == [0, 1, 2]


def test_a_client_that_lost_its_local_weights_is_left_out_until_the_next_averaging(
    make, monkeypatch
):
    class Forgetful(Client):
        """Whose process for partition 1 is a new one in step 2."""

        def _handle(self, request):
            if (request.partition, request.step, request.local) == (1, 2, 1):
                return Behind, {"position": 0, "digest": "0" * 16}
            return super()._handle(request)

    monkeypatch.setattr("hosl_flower.run.start.Client", Forgetful)
    results, _, _ = make(SplitFo, **ONE, **FO, num_clients=2, local_steps=2, steps=4, eval_every=4)
    (drop,) = results.clients["dropped"]
    assert (drop["partition"], drop["step"]) == (1, 2)
    assert "no longer has the weights of its 1 local step" in drop["reason"]
    assert results.clients["steps_taken_part"] == {"0": 4, "1": 3}


def test_a_process_serves_clients_that_are_at_different_weights(make):
    # one Client object for all: each answers from weights of its own
    _, _, config = make(
        SplitFo, **ONE, **FO, num_clients=2, local_steps=2, steps=2, eval_every=2,
        server_learning_rate=0.0, save_model=False,
    )  # fmt: skip
    session = open_session(config, "r", 2)
    process, lone = Client(session.spec), [Client(session.spec) for _ in range(2)]
    gradient = torch.ones(1)
    for m in (0, 1):
        at = session.at(1, m)
        for who in (process, lone[m]):
            (clean,) = who.answer([Forward(**at, batch=0)])
            gradient = clean.activations / 100
    for m in (0, 1):
        at = session.at(1, m)
        (clean,) = lone[m].answer([Forward(**at, batch=0)])
        step = LocalStep(
            **at, batch=0, gradient=clean.activations / 100, scales=torch.empty(0), scale=1.0,
            learning_rate=0.1,
        )  # fmt: skip
        for who in (process, lone[m]):
            (stepped,) = who.answer([step])
            assert stepped.local == 1
    assert gradient.abs().max() > 0
    found = []
    for m in (1, 0, 1):
        fetch = Fetch(**session.at(1, m), local=1, moments=True)
        (one,), (other,) = process.answer([fetch]), lone[m].answer([fetch])
        assert torch.equal(one.weights, other.weights)
        found.append(one.weights)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    (back,) = process.answer([Forward(**session.at(1, 0), batch=0)])
    (start,) = Client(session.spec).answer([Forward(**session.at(1, 0), batch=0)])
    assert torch.equal(back.activations, start.activations), "the shared weights were kept"


def test_a_local_step_or_an_adoption_asked_for_again_is_not_made_again(make):
    _, _, config = make(SplitFo, **ONE, **FO, local_steps=2, save_model=False)
    session = open_session(config, "r", 1)
    client, at = Client(session.spec), session.at(1, 0)
    (clean,) = client.answer([Forward(**at, batch=0)])
    step = LocalStep(
        **at, batch=0, gradient=clean.activations / 100, scales=torch.empty(0), scale=1.0,
        learning_rate=0.1,
    )  # fmt: skip
    (first,) = client.answer([step])
    once = client.state.weights()
    (again,) = client.answer([step])
    assert first.local == again.local == 1
    assert torch.equal(client.state.weights(), once)
    session.history.jump(1, once)
    ledger = session.history.ledger
    adopt = Adopt(
        **at, local=1, weights=session.history.state.mark().fingerprint,
        digest_after=ledger.digest(),
    )  # fmt: skip
    receipts = [reply for _ in range(2) for reply in client.answer([adopt])]
    assert [(r.position, r.digest) for r in receipts] == [(1, ledger.digest())] * 2


@pytest.mark.parametrize("gradient", ["exact", "recompute"])
@pytest.mark.parametrize("local_steps", [1, 2])
def test_block_by_block_clients_learn_what_back_propagating_ones_do(make, local_steps, gradient):
    keys = {**FO, "client_trainable": "full", "num_clients": 2, "local_steps": local_steps}
    _, a, _ = make(SplitFo, **keys, client_optimizer="adafactor")
    _, b, _ = make(
        SplitFo, **keys, client_optimizer="adafactor", client_gradient=gradient,
        client_micro_batch=2,
    )  # fmt: skip
    assert losses(a) == pytest.approx(losses(b), rel=1e-4)


def test_residual_feedback_trains_all_of_the_clients_half(make):
    keys = {**FO, "client_trainable": "full", "client_gradient": "residual", "local_steps": 2}
    _, a, _ = make(SplitFo, **{**keys, "client_learning_rate": 0.0}, save_model=True)
    moved, b, _ = make(SplitFo, **keys, client_optimizer="adafactor", save_model=True)
    before, after = weights_of(a), weights_of(b)
    changed = {name for name in before if ".layers.2." not in name and "decoder." in name}
    changed = {name for name in changed if not torch.equal(before[name], after[name])}
    parts = ("fc1", "fc2", "final_layer_norm", "self_attn_layer_norm")
    parts += tuple(f"self_attn.{each}_proj" for each in ("q", "k", "v", "out"))
    written = [f"layers.{i}.{w}.{k}" for i in (0, 1) for w in parts for k in ("weight", "bias")]
    written += ["embed_tokens.weight", "embed_positions.weight"]
    assert {f"model.decoder.{name}" for name in written} | {
        "model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"
    } == changed  # fmt: skip
    assert losses(a) != losses(b)
    assert (m := moved.client_peak_memory["tensor_bytes"])["backward"] == 0 < m["update"]


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_residual_feedback_serves_many_clients_on_either_path(make, trainable):
    for local_steps in (1, 2):
        results, directory, _ = make(
            SplitFo, **FO, client_trainable=trainable, client_gradient="residual", num_clients=4,
            clients_per_step=2, local_steps=local_steps, client_optimizer="adafactor",
        )  # fmt: skip
        assert results.clients["dropped"] == []
        assert sum(results.clients["steps_taken_part"].values()) == 2 * 4
        still, other, _ = make(
            SplitFo, **{**FO, "client_learning_rate": 0.0}, client_trainable=trainable,
            num_clients=4, client_gradient="residual", clients_per_step=2, local_steps=local_steps,
        )  # fmt: skip
        assert results.fingerprint != still.fingerprint
        assert losses(directory)[0] == losses(other)[0]


@pytest.mark.parametrize("method", [SplitFo, FedAvgZo])
def test_updates_in_8_bits_take_a_quarter_of_the_bytes_and_change_little(make, method):
    kind = "backward" if method is SplitFo else "local-train"
    keys = {**MANY, **FO, "steps": 6, "eval_every": 6}
    exact, a, _ = make(method, **keys)
    coded, b, _ = make(method, **keys, update_codec="int8")
    before, after = (results.bytes_up[kind]["bytes"] for results in (exact, coded))
    assert 0.25 < after / before < 0.36  # rows of 16: (16 + 4) / 64; headers
    assert losses(a) == pytest.approx(losses(b), rel=0.02)
    assert losses(a) != losses(b)
    assert coded.clients["fingerprint_checked"] == [0, 1, 2, 3]
    down = [
        sum(r.bytes_down[k]["bytes"] for k in ("move", "restore") if k in r.bytes_down)
        for r in (exact, coded)
    ]
    assert "move" not in exact.bytes_down
    assert down[1] < down[0]


def test_only_the_batchs_rows_of_an_embedding_travel(make):
    keys = {"client_trainable": "full", **FO, "client_gradient": "residual", "num_clients": 2}
    results, _, config = make(SplitFo, **keys)
    vocabulary, width = 50272, 16
    messages, size = (results.bytes_up["backward"][key] for key in ("messages", "bytes"))
    others = results.client_parameters["trained"] - vocabulary * width
    rows = config.batch_size * config.task.max_length  # were all of its tokens different
    assert size / messages < 4 * others + 4 * rows * width + vocabulary + 2000


def test_parameters_stepped_as_their_gradients_come_learn_as_those_stepped_together(make):
    keys = {
        **FO, "client_trainable": "full", "client_gradient": "residual", "steps": 6,
        "client_optimizer": "adafactor", "eval_every": 6,
    }  # fmt: skip
    _, together, _ = make(
        SplitFo, **keys, save_model=True
    )  # E = 1: the whole gradient travels, then one step
    _, apart, _ = make(SplitFo, **keys, local_steps=3, save_model=True)
    assert losses(together) == pytest.approx(losses(apart), rel=1e-4)
    one, other = weights_of(together), weights_of(apart)
    # softmax makes the gradient of key biases zero but for rounding, which adafactor scales up
    told = [name for name in one if not name.endswith("k_proj.bias")]
    assert len(told) == len(one) - 3
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in told)


def test_a_local_step_that_fails_half_way_is_nobodys_weights(make, monkeypatch):
    _, _, config = make(
        SplitFo, **FO, num_clients=2, local_steps=2, client_gradient="residual",
        client_optimizer="adafactor", save_model=False,
    )  # fmt: skip
    session = open_session(config, "r", 2)
    client = Client(session.spec)
    start = client.state.weights()

    def ask(m):
        (clean,) = client.answer([Forward(**session.at(1, m), batch=0)])
        assert isinstance(clean, Activations)
        (reply,) = client.answer(
            [
                LocalStep(
                    **session.at(1, m), batch=0, gradient=clean.activations / 100,
                    scales=torch.empty(0), scale=1.0, learning_rate=0.1,
                )
            ]
        )  # fmt: skip
        return reply

    def fails(self, *arguments, made=Adafactor.move):
        made(self, *arguments)
        if len(self.moments) == 3:
            raise MemoryError("no more")

    with monkeypatch.context() as during:
        during.setattr(Adafactor, "move", fails)
        assert "MemoryError" in ask(0).error
    assert not torch.equal(client.state.weights(), start)
    # nobody is served from there: the client must be restored, and then it is where it was
    (behind,) = client.answer([Forward(**session.at(1, 1), batch=0)])
    assert isinstance(behind, Behind)
    restore = Restore.of(session.history.snapshot(), Forward(**session.at(1, 1), batch=0))
    list(client.answer([restore]))
    assert torch.equal(client.state.weights(), start)
    assert ask(1).local == 1


@pytest.mark.parametrize("optimizer", ["adafactor", "adafactor-momentum"])
def test_adafactors_state_is_checked_like_any_other(make, optimizer):
    _, _, config = make(
        SplitFo, **FO, local_steps=2, client_gradient="residual", client_optimizer=optimizer,
        save_model=False,
    )  # fmt: skip
    session = open_session(config, "r", 1)
    client, state = Client(session.spec), session.history.state
    gradient = torch.ones(state.elements)
    client.state.update(Dense(unflat(gradient, client.state.parameters)), 0.1)
    client.state.update(Dense(unflat(-gradient, client.state.parameters)), 0.2)
    (own,) = client.answer([Fetch(**session.at(1, 0), moments=True)])
    assert own.moments.shape == state.moments_shape
    own.check(None, ReplyLimits(1, 1, 1, "float32", 1), state)
    for moments, expected in ((own.moments[:, 1:], "expected"), (-own.moments, "0 or more")):
        with pytest.raises(ProtocolError, match=expected):
            replace(own, moments=moments).check(None, ReplyLimits(1, 1, 1, "float32", 1), state)
    session.history.jump(1, own.weights, own.moments, own.updates)
    fresh = Client(session.spec)
    restore = Restore.of(session.history.snapshot(), Forward(**session.at(2, 0), batch=0))
    list(fresh.answer([restore]))
    for one in (client, fresh):
        one.state.update(Dense(unflat(gradient, one.state.parameters)), 0.1)
    assert torch.equal(client.state.weights(), fresh.state.weights())


def test_only_methods_that_send_gradients_have_adafactor(make):
    with pytest.raises(ConfigError, match="ho-sfl has no client-optimizer = adafactor"):
        make(HoSfl, **ONE, client_optimizer="adafactor")
    with pytest.raises(ConfigError, match="does not use client-gradient"):
        make(HoSfl, **ONE, client_gradient="residual")
    with pytest.raises(ConfigError, match="needs client-trainable = full"):
        make(SplitFo, **FO, client_gradient="residual", client_trainable="blocks", cut_layer=0)


def test_split_zo_with_a_server_that_stands_still_is_hosl(make):
    keys = {**ONE, "server_learning_rate": 0.0, "client_learning_rate": 1e-2}
    _, a, _ = make(SplitZo, **keys, server_steps=2)
    _, b, _ = make(Hosl, **keys)
    one, other = (Ledger.read(d / "ledger.jsonl").entries for d in (a, b))
    assert one == other


def test_a_zeroth_order_server_steps_along_its_own_directions(make):
    _, _, config = make(SplitZo, **ONE, save_model=False)
    session = open_session(config, "r", 1)
    client = Client(session.spec)
    (batch,) = client.answer([Forward(**session.at(1, 0), batch=0)])
    zo, server = ZoTrainer(session.server, config), session.server
    before = {name: p.detach().clone() for name, p in server.trained.items()}
    (scalar,) = zo.step(batch, [7])
    direction = zo.layout.draw(7)
    slope = 0.0
    for name, gradient in _server_gradient(server, batch, before).items():
        slope += float((gradient * direction.dense(name)).sum())
        moved = before[name] - config.server.learning_rate * scalar * direction.dense(name)
        assert torch.allclose(server.trained[name], moved, atol=1e-6), name
    assert scalar == pytest.approx(slope, rel=2e-2)


def _server_gradient(server, batch, values):
    now = {name: p.detach().clone() for name, p in server.trained.items()}
    for name, value in values.items():
        server.trained[name].data.copy_(value)
    list(server.propagate([batch], [1.0]))
    gradients = {name: p.grad.clone() for name, p in server.trained.items()}
    for name, value in now.items():
        server.trained[name].data.copy_(value)
    return gradients


def test_the_server_of_split_zo_takes_tau_steps_before_it_answers_probes(make, monkeypatch):
    events, loss, step = [], ServerTrainer.loss, ZoTrainer.step

    def noted_loss(self, batch):
        events.append("loss")
        return loss(self, batch)

    def noted_step(self, batch, seeds, factor):
        before = len(events)
        scalars = step(self, batch, seeds, factor)
        del events[before:]  # its own probes
        events.append(tuple(seeds))
        return scalars

    monkeypatch.setattr(ServerTrainer, "loss", noted_loss)
    monkeypatch.setattr(ZoTrainer, "step", noted_step)
    _, a, config = make(SplitZo, **ONE, steps=1, eval_every=1, server_steps=3, save_model=True)
    clean, *turns = events[:4]
    assert clean == "loss"
    assert [len(seeds) for seeds in turns] == [config.zo.directions] * 3
    assert len({seed for seeds in turns for seed in seeds}) == 3 * config.zo.directions
    assert events[4:] == ["loss"] * 2 * config.zo.directions
    _, b, _ = make(SplitZo, **ONE, steps=1, eval_every=1, server_steps=1, save_model=True)
    head = "model.decoder.final_layer_norm.weight"
    assert not torch.equal(weights_of(a)[head], weights_of(b)[head])


def test_split_zo_learns_and_sends_what_it_says(make):
    results, directory, config = make(SplitZo, **ONE, steps=3, eval_every=3, server_steps=2)
    assert results.bytes_up["probe"]["messages"] == 3 * 2 * config.zo.directions
    assert results.bytes_up["forward"]["messages"] == 3
    assert all(loss > 0 for loss in losses(directory))


def test_herons_scalars_are_slopes_of_the_clients_own_head(make):
    _, _, config = make(Heron, **ONE, save_model=False)
    session = open_session(config, "r", 1, client_head=True)
    client = Client(session.spec)
    strategy = Heron(config)
    (reply,) = client.answer([strategy.head_probe(session, 1, 0, 0)])
    data = client.pool.client(0).train_batch(0, config.batch_size)
    parameters = client.state.parameters
    assert {"head.rows", "head.decoder.final_layer_norm.weight"} <= set(parameters)
    h = client.submodel(data.input_ids, data.attention_mask)
    logits = client.submodel.head(h, data.attention_mask)
    loss = torch.nn.functional.cross_entropy(logits, data.labels)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    assert reply.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    for seed, scalar in zip(strategy.seeds(session, 1, 0)[0], reply.scalars[0], strict=True):
        direction = client.state.layout.draw(seed)
        slope = sum(
            float((g * direction.dense(name)).sum())
            for name, g in zip(parameters, gradients, strict=True)
        )
        assert float(scalar) * config.zo.directions == pytest.approx(slope, rel=5e-2, abs=5e-3)


def test_the_head_starts_as_the_models_own(make):
    _, _, config = make(Heron, **ONE, save_model=False, cut_layer=3)
    session = open_session(config, "r", 1, client_head=True)
    client = Client(session.spec)
    whole = AutoModelForCausalLM.from_pretrained(config.model)
    data = client.pool.client(0).train_batch(0, 5)
    with torch.no_grad():
        h = client.submodel(data.input_ids, data.attention_mask)
        ours = client.submodel.head(h, data.attention_mask)
        theirs = whole(data.input_ids, attention_mask=data.attention_mask).logits[:, -1]
    assert torch.allclose(ours, theirs[:, client.encoder.answers.ids], atol=1e-4)


def test_herons_server_learns_from_uploads_alone(make):
    keys = {**MANY, "client_learning_rate": 0.0}
    heron, a, _ = make(Heron, **keys)
    frozen, _, _ = make(FrozenClient, **MANY, directions=1, client_learning_rate=1e-6)
    assert heron.evaluations == frozen.evaluations
    rare, _, _ = make(Heron, **keys, steps=4, eval_every=4, upload_every=2, local_steps=2)
    assert rare.bytes_up["forward"]["messages"] == 2 * 2
    assert rare.bytes_up["head-probe"]["messages"] == 4 * 2
    assert "cut-gradient" not in heron.bytes_down
    assert all(loss > 0 for loss in losses(a))


def test_herons_local_steps_use_new_mini_batches_and_move_every_client_alike(make):
    results, directory, _ = make(
        Heron, **MANY, local_steps=3, client_learning_rate=1e-2, steps=4, eval_every=4
    )
    assert results.clients["fingerprint_checked"] == [0, 1, 2, 3]
    assert len(Ledger.read(directory / "ledger.jsonl").entries) == 4 * 3


def test_full_zo_trains_a_model_that_plain_transformers_agrees_about(make):
    results, directory, _ = make(
        FullZo,
        **MANY,
        **SERVERLESS,
        cut_layer=3,
        client_learning_rate=3e-3,
        steps=6,
        eval_every=6,
        save_model=True,
    )
    assert results.evaluations[0]["loss"] != results.evaluations[-1]["loss"]
    assert "forward" not in results.bytes_up, "nothing but scalars"
    model = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    ids = [
        tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in ("terrible", "great")
    ]
    total, count = 0.0, 0
    for line in (
        (directory.parent.parent / "reviews" / "validation.csv").read_text().splitlines()[1:]
    ):
        text, label = line.rsplit(",", 1)
        tokens = tokenizer(PROMPT.format(text=text.strip('"')), return_tensors="pt")
        with torch.no_grad():
            logits = model(**tokens).logits[0, -1, ids]
        total -= float(logits.log_softmax(0)[int(label)])
        count += 1
    assert results.loss == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_float32_head_on_a_16_bit_client_trains_restores_and_saves(make, dtype):
    results, directory, _ = make(
        Heron, **MANY, dtype=dtype, local_steps=2, client_learning_rate=1e-2, save_model=True
    )
    assert results.clients["fingerprint_checked"] == [0, 1, 2, 3]
    assert (directory / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("changes", [{"link": "grid"}, {"max_session_seconds": 5.0}])
def test_weights_that_stay_on_clients_need_a_stream_that_stays_open(make, changes):
    with pytest.raises(ConfigError, match="needs a stream that stays open"):
        make(SplitFo, **ONE, **FO, local_steps=2, **changes)


def test_weights_that_stay_on_clients_travel_exactly(make):
    with pytest.raises(ConfigError, match="weights travel, which it would round by more"):
        make(SplitFo, **ONE, **FO, local_steps=2, update_codec="int8")


def test_full_zo_needs_the_whole_model_on_the_client(make):
    with pytest.raises(ConfigError, match="cut-layer = 3, the number of blocks"):
        make(FullZo, **MANY, **SERVERLESS, cut_layer=2)


def test_a_head_on_the_client_needs_answers_of_one_token(make):
    with pytest.raises(ConfigError, match="answer words of one token each"):
        make(Heron, **ONE, verbalizers="terribly bad,great")


def test_per_client_seeds_in_full_zo_are_fedavg_of_weights(make):
    # concatenated (seed, w_m g) entries move theta by the mean of what clients moved alone
    keys = {
        **ONE, **SERVERLESS, "num_clients": 2, "cut_layer": 3, "client_learning_rate": 1e-2,
        "steps": 1, "eval_every": 1, "client_seeds": "per-client",
    }  # fmt: skip
    _, directory, config = make(FullZo, **keys, save_model=True)
    session = open_session(config, "r", 2, client_head=True)
    moved = []
    strategy = FullZo(config)
    for m in (0, 1):
        client = Client(session.spec)
        (reply,) = client.answer([strategy.head_probe(session, 1, m, 0)])
        seeds = strategy.seeds(session, 1, m)[0]
        client.state.update(client.state.seeded(seeds, reply.scalars[0].tolist()), 1e-2)
        moved.append(client.state.weights())
    session.history.state.set_weights(torch.stack(moved).double().mean(0).float())
    merged = weights_of(directory)
    for name, parameter in session.history.state.parameters.items():
        if ".layers." in name:
            assert torch.allclose(merged[name], parameter, atol=1e-6), name


@pytest.mark.parametrize(
    ("method", "key", "value", "match"),
    [
        (HoSfl, "server_steps", 2, "ho-sfl does not use server-steps"),
        (Hosl, "upload_every", 2, "hosl does not use upload-every"),
        (FrozenClient, "client_learning_rate", 1e-3, "does not use client-learning-rate"),
        (SplitFo, "directions", 4, "split-fo does not use directions"),
        (SplitFo, "local_steps", 3, "eval-every = 2 is no multiple of local-steps = 3"),
        (FullZo, "server_learning_rate", 1e-4, "does not use server-learning-rate"),
        (FedAvgZo, "server_steps", 2, "fedavg-zo does not use server-steps"),
        (FedAvgZo, "aggregation", "median", "fedavg-zo averages weights: aggregation = median is"),
        (FedAvgZo, "scalar_clip", 1.0, "fedavg-zo does not use scalar-clip"),
        (FrozenClient, "scalar_clip", 1.0, "frozen-client does not use scalar-clip"),
        (HoSfl, "update_codec", "int8", "ho-sfl does not use update-codec"),
        (SplitFo, "scalar_clip", 1.0, "split-fo does not use scalar-clip"),
        (SignVote, "scalar_clip", 1.0, "sign-vote does not use scalar-clip"),
    ],
)
def test_a_key_a_method_does_not_use_is_refused(make, method, key, value, match):
    defaults = {"directions": 1, "client_learning_rate": 1e-6, "server_learning_rate": 1e-3}
    with pytest.raises(ConfigError, match=match):
        make(method, **{**defaults, key: value})


def test_a_request_for_weights_that_are_nowhere_names_the_client(make):
    _, _, config = make(SplitFo, **ONE, **FO, save_model=False)
    session = open_session(config, "r", 1)
    link = InProcessLink(Client(session.spec).answer, session.history, session.limits)
    replies = link.exchange({0: [Fetch(**session.at(1, 0), local=2, moments=False)]})
    with pytest.raises(ClientError, match=r"client 0.*no longer has the weights of its 2 local"):
        list(replies[0])
