"""Differential privacy: noise of the right distribution, bounded examples, and nothing else that a
client says of them."""

import math
import stat
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from links import link_that
from messages import ALL
from runs import metrics, run_factory
from specs import client_spec

from hosl_flower.client.client import Client
from hosl_flower.config.parse import parse_config
from hosl_flower.errors import ConfigError
from hosl_flower.flower import client_calls
from hosl_flower.privacy import dp_scalars as privacy
from hosl_flower.privacy.accountant import epsilon, most_uses
from hosl_flower.privacy.discrete_gaussian import Bits, discrete_gaussian, discrete_laplace
from hosl_flower.privacy.dp_scalars import (
    UNITS,
    Mechanism,
    example_gradients,
    in_units,
)
from hosl_flower.privacy.noise_secret import device_secret, simulated_secret
from hosl_flower.protocol.messages.base import Failure, Request
from hosl_flower.protocol.messages.describe import Describe, Described
from hosl_flower.protocol.messages.gradients import Fetch
from hosl_flower.protocol.messages.ledger import Fingerprint
from hosl_flower.protocol.messages.scalars import HeadProbe, Scalars
from hosl_flower.run.plan import plan
from strategies.full_zo import FullZo
from strategies.heron import Heron
from strategies.ho_sfl import HoSfl

PRIVATE = {
    "num_clients": 4, "clients_per_step": 2, "client_trainable": "blocks", "cut_layer": 3,
    "server_learning_rate": 1e-3, "dp_noise": 0.5, "dp_clip": 4.0, "evaluation": "central",
    "save_model": False,
}  # fmt: skip
SPEC = client_spec(
    cut_layer=2, client_head=True, dp_noise=0.5, dp_clip=4.0, batch_size=7, train_examples=20
)


@pytest.fixture
def make(tiny_opt, tmp_path):
    return run_factory(FullZo, tiny_opt, tmp_path)


def chi_square(sample, likely, count=20_000):
    """Of so many samples; likely: of each of a few values, as it should be."""
    total = sum(likely.values())
    seen = Counter(sample() for _ in range(count))
    rest = count * (1 - total)
    found = sum((seen[x] - count * p) ** 2 / (count * p) for x, p in likely.items())
    beyond = count - sum(seen[x] for x in likely)
    return found + ((beyond - rest) ** 2 / rest if rest > 5 else 0.0)


@pytest.mark.parametrize("sigma", [1, 2, 5])
def test_integers_are_as_likely_as_the_discrete_gaussian_says(sigma):
    weight = {x: math.exp(-x * x / 2 / sigma**2) for x in range(-60, 61)}
    total, reach = sum(weight.values()), 2 * sigma
    likely = {x: w / total for x, w in weight.items() if abs(x) <= reach}
    bits = Bits(b"gaussian")
    # 99.99 % of all samples of so many cells are below
    assert chi_square(lambda: discrete_gaussian(sigma, bits), likely) < 2.2 * len(likely) + 15


def test_integers_are_as_likely_as_the_discrete_laplace_says():
    weight = {x: math.exp(-abs(x) / 3) for x in range(-90, 91)}
    likely = {x: w / sum(weight.values()) for x, w in weight.items() if abs(x) <= 9}
    bits = Bits(b"laplace")
    assert chi_square(lambda: discrete_laplace(3, bits), likely) < 2.2 * len(likely) + 15


def test_noise_in_units_of_the_clip_has_its_size():
    bits, sigma = Bits(b"size"), 3 * UNITS
    drawn = [discrete_gaussian(sigma, bits) / sigma for _ in range(4000)]
    mean = sum(drawn) / len(drawn)
    deviation = math.sqrt(sum(x * x for x in drawn) / len(drawn))
    assert abs(mean) < 4 / math.sqrt(4000)
    assert abs(deviation - 1) < 4 / math.sqrt(8000)


def test_bits_are_uniform_and_the_keys_own():
    a, b, other = Bits(b"a"), Bits(b"a"), Bits(b"b")
    drawn = [a.below(6) for _ in range(6000)]
    assert drawn == [b.below(6) for _ in range(6000)]
    assert drawn != [other.below(6) for _ in range(6000)]
    assert chi_square(iter(drawn).__next__, dict.fromkeys(range(6), 1 / 6), 6000) < 26
    assert [Bits(b"").below(1) for _ in range(3)] == [0, 0, 0]


@given(
    st.lists(st.floats(), min_size=1, max_size=20),
    st.floats(min_value=1e-6, max_value=1e6),
)
def test_no_example_weighs_more_than_the_clip(gradient, clip):
    units = in_units(gradient, clip)
    assert sum(x * x for x in units) <= UNITS * UNITS
    if math.isfinite(math.hypot(*gradient)):
        assert all(x * g >= 0 for x, g in zip(units, gradient, strict=True))
    else:
        assert not any(units)


def test_short_gradients_stay_and_long_ones_are_shortened():
    assert in_units([0.5, -0.25], 1.0) == [UNITS // 2 - 1, -UNITS // 4 + 1], "rounded to zero"
    long = in_units([30.0, -40.0], 1.0)
    assert [x / UNITS for x in long] == pytest.approx([0.6, -0.8], abs=2 / UNITS)


def test_without_noise_what_is_released_is_the_mean_of_the_clipped(monkeypatch):
    monkeypatch.setattr(privacy, "discrete_gaussian", lambda sigma, bits: 0)
    found = Mechanism(2.0, 1.0, b"s").release([[0.5, 0.5], [3.0, 4.0], [math.nan, 0.0]], {})
    # (0.5, 0.5) + (1.2, 1.6) + nothing, over 3
    assert found == pytest.approx([1.7 / 3, 2.1 / 3], abs=1e-4)


def test_noise_is_in_proportion_to_clip_over_batch():
    mechanism, quiet = Mechanism(3.0, 2.0, b"s"), [[0.0]] * 5
    drawn = [mechanism.release(quiet, {"step": n})[0] for n in range(3000)]
    deviation = math.sqrt(sum(x * x for x in drawn) / len(drawn))
    assert deviation == pytest.approx(2.0 * 3.0 / 5, rel=0.06)


def test_the_same_question_has_one_answer_and_any_other_noise_of_its_own():
    def noise(gradient, about, secret=b"s", clip=1.0):
        return Mechanism(clip, 1.0, secret).release([[gradient]], about)[0] - gradient

    first = noise(0.25, {"step": 1})
    assert noise(0.25, {"step": 1}) == first
    others = [
        noise(0.25, {"step": 2}), noise(0.25, {"step": 1}, b"t"), noise(0.5, {"step": 1}),
        noise(0.25, {"step": 1}, clip=2.0) / 2,
    ]  # fmt: skip
    assert len({round(x, 3) for x in (first, *others)}) == 5


def test_example_gradients_by_hand():
    """Losses (t, t^2 + 1, nothing) along both directions, P = 2."""
    losses = {0.0: [0.0, 1.0, 2.0], 0.5: [0.5, 1.25, 2.0]}
    found = example_gradients(lambda p: losses[p.coefficient], [7, 8], 0.5)
    assert found == [[0.5, 0.5], [0.25, 0.25], [0.0, 0.0]]


@pytest.mark.parametrize(("batches", "size", "examples"), [(7, 3, 10), (4, 5, 20), (9, 7, 20)])
def test_uses_of_an_example_are_counted(batches, size, examples):
    data = Client(client_spec(train_examples=examples, num_clients=1)).pool.client(0)
    uses = Counter[int]()
    for number in range(batches):
        rows = [data._row(i) for i in range(number * size, (number + 1) * size)]
        repeated = data.repeated(number, size)
        assert [rows[p] for p in repeated] == [r for p, r in enumerate(rows) if r in rows[:p]]
        uses.update(set(rows))
    assert max(uses.values()) <= most_uses(batches, size, examples) <= max(uses.values()) + 1


def test_epsilon_of_gaussians():
    """Two with noise 2 are one with sqrt 2; one with 1 has 4.38 exactly, by Renyi 4.73."""
    assert epsilon(2.0, 2, 1e-5) == pytest.approx(epsilon(math.sqrt(2), 1, 1e-5))
    assert 4.377 < epsilon(1.0, 1, 1e-5) < 4.9
    assert epsilon(1.0, 0, 1e-5) == 0.0


def test_epsilon_needs_an_accountant(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install 'hosl-flower\[dp\]'"):
        make(**PRIVATE)


@pytest.mark.parametrize(
    ("method", "changes", "match"),
    [
        (FullZo, {"dp_clip": 0.0}, "dp-noise needs dp-clip"),
        (FullZo, {"dp_noise": 0.0}, "dp-clip has no use without dp-noise"),
        (FullZo, {"evaluation": "split"}, "dp-noise needs evaluation = central"),
        (Heron, {}, "heron-sfl does not use dp-noise, dp-clip"),
        (HoSfl, {}, "ho-sfl does not use dp-noise, dp-clip"),
    ],
)
def test_what_cannot_be_private_is_refused(make, method, changes, match):
    with pytest.raises(ConfigError, match=match):
        make(method, **{**PRIVATE, **changes})


def simulated_client(spec):
    return Client(spec, secret=simulated_secret(spec.seed))


def probe_of(spec, **changes):
    at = {"step": 1, "partition": 0, "position": 0, "digest": simulated_client(spec).state.digest}
    own = {"batch": 0, "directions": 2, "seeds": (5, 6, 7, 8), "epsilon": 1e-3}
    return HeadProbe(**{**at, **own, "learning_rate": 1e-4, **changes})


def scalars(client, request):
    (reply,) = client.answer([request])
    assert isinstance(reply, Scalars), reply
    return reply.scalars


def test_with_hardly_any_noise_and_a_wide_clip_a_client_answers_as_it_would_without():
    same = {**vars(SPEC), "batch_size": 5}  # of 10 examples: none twice
    loose = client_spec(**{**same, "dp_noise": 1e-6, "dp_clip": 200.0})
    open_ = client_spec(**{**same, "dp_noise": 0.0, "dp_clip": 0.0})
    found, plain = (scalars(simulated_client(spec), probe_of(spec)) for spec in (loose, open_))
    assert found.shape == (2, 2)
    assert found.flatten().tolist() == pytest.approx(plain.flatten().tolist(), abs=0.02, rel=0.02)
    assert plain.abs().max() > 0.1


def test_an_example_that_comes_twice_counts_once(monkeypatch):
    monkeypatch.setattr(privacy, "discrete_gaussian", lambda sigma, bits: 0)
    client = simulated_client(SPEC)
    data, request = client.pool.client(0), probe_of(SPEC, batch=1, seeds=(5, 6))
    assert data.repeated(1, 7), "of 10 examples, 7 to 13"
    released = []
    monkeypatch.setattr(
        Mechanism, "release", lambda self, found, about: released.append(found) or [0.0, 0.0]
    )
    scalars(client, request)
    zero = [place for place, own in enumerate(released[0]) if own == [0.0, 0.0]]
    assert zero == data.repeated(1, 7)


def test_all_passes_are_of_one_shape(monkeypatch):
    client, shapes = simulated_client(SPEC), set()
    forward = client.submodel.forward

    def seen(ids, mask):
        shapes.add((*ids.shape,))
        return forward(ids, mask)

    monkeypatch.setattr(client.submodel, "forward", seen)
    scalars(client, probe_of(SPEC))
    assert shapes == {(7, SPEC.max_length + 1)}, "there is padding always"


def test_a_restarted_device_gives_the_answer_it_gave():
    request = probe_of(SPEC)
    first = scalars(Client(SPEC, secret=b"x" * 32), request)
    assert scalars(Client(SPEC, secret=b"x" * 32), request).equal(first)
    assert not scalars(Client(SPEC, secret=b"y" * 32), request).equal(first)
    assert scalars(simulated_client(SPEC), request).equal(
        scalars(Client(SPEC, secret=simulated_secret(SPEC.seed)), request)
    )


def test_nothing_else_is_told_of_examples():
    client = simulated_client(SPEC)
    at = {"step": 1, "partition": 0, "position": 0, "digest": client.state.digest}
    (described,) = client.answer([Describe(**at)])
    assert isinstance(described, Described)
    assert described.label_counts == ()
    (reply,) = client.answer([probe_of(SPEC)])
    assert isinstance(reply, Scalars)
    assert reply.loss == 0.0


@pytest.mark.parametrize(
    "request_", [m for m in ALL if isinstance(m, Request)], ids=lambda m: m.kind
)
def test_all_other_requests_about_examples_are_refused(request_):
    client = simulated_client(SPEC)
    (reply,) = client.answer([request_])
    refused = isinstance(reply, Failure) and "nothing but noisy scalars leaves" in reply.error
    allowed = (
        "describe", "head-probe", "losses", "catch-up", "restore", "move", "fetch", "adopt",
        "fingerprint",
    )  # fmt: skip
    assert refused == (request_.kind not in allowed)


def test_of_one_example_nothing_but_scalars_tells(tmp_path):
    """The same run of requests with two data sets that differ in one example's words and label."""
    replies = []
    for number, other in enumerate(("a grand old film,1", "rubbish that is longer than grand,0")):
        data = tmp_path / str(number)
        data.mkdir()
        rows = [f"film number {n} of some,{n % 2}" for n in range(19)]
        (data / "train.csv").write_text("\n".join(["sms,label", *rows, other]))
        (data / "validation.csv").write_text("\n".join(["sms,label", *rows]))
        spec = client_spec(**{**vars(SPEC), "train_examples": 0, "num_clients": 1})
        client = Client(spec, data_path=str(data), secret=b"s" * 32)
        at = {"step": 1, "partition": 0, "position": 0, "digest": client.state.digest}
        probes = [probe_of(spec, batch=n, seeds=(5, 6)) for n in range(4)]
        asked = [Describe(**at), *probes, Fingerprint(**at, since=0), Fetch(**at, moments=True)]
        replies.append(list(client.answer(asked)))
    differing = set()
    for one, two in zip(*replies, strict=True):
        assert type(one) is type(two)
        for name, value in vars(one).items():
            if name in ("seconds", "peak_bytes", "tensor_peaks"):  # SECURITY.md names them
                continue
            other = vars(two)[name]
            same = value.equal(other) if torch.is_tensor(value) else value == other
            if not same:
                differing.add((one.kind, name))
    assert differing == {("scalars", "scalars")}


def test_the_move_between_local_steps_is_along_what_is_released(monkeypatch):
    monkeypatch.setattr(Mechanism, "release", lambda self, found, about: [0.25, -0.5])
    client, moves = simulated_client(SPEC), []
    update = client.state.update
    monkeypatch.setattr(client.state, "update", lambda g, rate: moves.append(g) or update(g, rate))
    seeded = client.state.seeded
    told = []
    monkeypatch.setattr(
        client.state, "seeded", lambda seeds, own: told.append(list(own)) or seeded(seeds, own)
    )
    scalars(client, probe_of(SPEC))
    assert told == [[0.25, -0.5]]
    assert len(moves) == 1


def test_noise_needs_a_secret_that_is_given():
    with pytest.raises(ValueError, match="noise needs a secret of 32 bytes"):
        Client(SPEC)
    for secret in (b"", b"short"):
        with pytest.raises(ValueError, match="noise needs a secret of 32 bytes"):
            Client(SPEC, secret=secret)
    assert "xxx" not in repr(Client(SPEC, secret=b"x" * 32).mechanism)


def test_a_resumed_run_counts_what_it_has_taken_again(make):
    whole, _, _ = make(**PRIVATE, steps=6)
    assert whole.privacy is not None
    _, stopped, _ = make(**PRIVATE, steps=4, checkpoint_every=2)
    resumed, _, config = make(**PRIVATE, steps=6, checkpoint_every=2, resume=str(stopped))
    assert resumed.privacy is not None
    assert resumed.fingerprint == whole.fingerprint, "the same noise"
    again = most_uses(2 + 1, config.batch_size, 10)  # steps 3 and 4, and one more at most
    for client, uses in whole.privacy["uses"].items():
        assert resumed.privacy["uses"][client] == uses + again


def test_what_is_wrong_with_an_example_stays_in_the_clients_log(tmp_path, caplog):
    data = tmp_path / "mine.csv"
    data.write_text("sms,label\nsecret words,7\n")
    client = Client(SPEC, data_path=str(data), secret=simulated_secret(0))
    at = {"step": 1, "partition": 0, "position": 0, "digest": client.state.digest}
    (reply,) = client.answer([Describe(**at)])
    assert isinstance(reply, Failure)
    assert "keeps its data to itself" in reply.error
    assert "secret" not in reply.error
    assert "7" in caplog.text


def test_a_run_says_what_it_has_cost(make, monkeypatch, caplog):
    caplog.set_level("INFO", logger="hosl_flower")
    told = []
    link_that(monkeypatch, lambda partition, request, reply: told.append(reply) or reply)
    results, directory, config = make(**PRIVATE, local_steps=2)
    kinds = {type(reply).__name__ for reply in told}
    assert kinds == {"Described", "Fingerprinted", "Scalars", "Applied"}
    assert all(reply.loss == 0.0 for reply in told if isinstance(reply, Scalars))
    assert "forward" not in results.bytes_up
    assert "evaluate" not in results.bytes_up
    cost, taken = results.privacy, results.clients["steps_taken_part"]
    assert cost is not None
    for client, steps in taken.items():
        uses = most_uses(2 * steps, config.batch_size, 10)
        assert cost["uses"][client] == uses
        assert cost["epsilon"][client] == pytest.approx(epsilon(0.5, uses, 1e-5))
    assert not any("train_loss" in row for row in metrics(directory))
    assert "differential privacy of each training example: epsilon at most" in caplog.text
    assert "at delta 1e-05, per example" in caplog.text, "in the table at the end"


def test_a_private_run_can_be_repeated_and_differs_from_an_open_one(make):
    first, _, _ = make(**PRIVATE)
    again, _, _ = make(**PRIVATE)
    assert again.fingerprint == first.fingerprint
    assert again.evaluations == first.evaluations
    louder, _, _ = make(**{**PRIVATE, "dp_noise": 1.0})
    assert louder.fingerprint != first.fingerprint
    open_, _, _ = make(**{**PRIVATE, "dp_noise": 0.0, "dp_clip": 0.0})
    assert open_.privacy is None


def test_pictures_can_be_drawn_without_training_losses(make):
    _, directory, _ = make(pictures=True, **PRIVATE)
    assert (directory / "curve.png").is_file()
    assert (directory / "partition.png").is_file()


def test_a_devices_secret_is_made_once_and_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    secret = device_secret("")
    file = tmp_path / "hosl-flower" / "noise-secret"
    assert len(secret) == 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert device_secret("") == secret
    assert [path.name for path in file.parent.iterdir()] == ["noise-secret"]
    assert device_secret(str(tmp_path / "other")) != secret
    file.write_text("not hexadecimal")
    with pytest.raises(ConfigError, match="cannot be read or made"):
        device_secret("")
    file.write_text("00")
    with pytest.raises(ConfigError, match="is no secret of 32 bytes"):
        device_secret("")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="set noise-secret in the node config"):
        device_secret(str(tmp_path / "file" / "secret"))


def test_a_supernode_uses_its_secret_and_a_simulation_the_runs_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(client_calls, "_cached", {})
    path = tmp_path / "secret"
    context = SimpleNamespace(node_config={"noise-secret": str(path)})
    node = client_calls._client(SPEC, context)
    assert node.mechanism is not None
    assert node.mechanism.secret == device_secret(str(path))
    client_calls._cached.clear()
    monkeypatch.setattr(client_calls, "is_simulated", lambda: True)
    simulated = client_calls._client(SPEC, context)
    assert simulated.mechanism is not None
    assert simulated.mechanism.secret == simulated_secret(SPEC.seed)


@pytest.mark.parametrize(
    ("method", "changes"),
    [(FullZo, PRIVATE), (HoSfl, {"activation_noise": 1.0, "evaluation": "central"})],
)
def test_a_run_with_noise_can_be_planned(make, method, changes):
    _, _, config = make(method, **changes)
    keys = {**config.as_keys(), "strategy": f"{method.__module__}:{method.__name__}"}
    found = plan(parse_config(keys))
    assert found.up_bytes > 0
    assert "probe" in found.peak_bytes


@pytest.mark.parametrize("model", ["random:opt-tiny", "random:gpt2-tiny", "random:llama-tiny"])
def test_texts_may_be_as_long_as_the_model_has_positions(model):
    """Each pass has one column of padding more, which takes no position."""
    spec = client_spec(**{**vars(SPEC), "model": model, "max_length": 256, "batch_size": 2})
    client = simulated_client(spec)
    assert client.config.max_position_embeddings == 256
    assert scalars(client, probe_of(spec)).isfinite().all()
