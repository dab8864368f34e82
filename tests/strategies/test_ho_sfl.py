"""HO-SFL and FedAvg-ZO in process: equal to the one-page reference, and their promises kept."""

import json

import pytest
import torch
from links import link_that, scalars_of
from reference_ho_sfl import ho_sfl as reference
from reference_ho_sfl import unsplit_name
from runs import PROMPT, metrics, run_factory
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hosl_flower.client.ledger_follower import LedgerFollower
from hosl_flower.errors import (
    ClientError,
    ConfigError,
    DivergedError,
    DriftError,
    ProtocolError,
)
from hosl_flower.ledger.ledger import Ledger
from hosl_flower.protocol.messages.activations import Activations
from hosl_flower.protocol.messages.base import Failure
from hosl_flower.protocol.messages.describe import Described
from hosl_flower.protocol.messages.scalars import Scalars
from hosl_flower.run import start
from strategies.fedavg_zo import FedAvgZo
from strategies.ho_sfl import HoSfl

KEYS = {
    "num-clients": 7, "clients-per-step": 3, "client-trainable": "blocks", "perturbation": "signs",
    "client-learning-rate": 1e-2, "server-learning-rate": 1e-2,
}  # fmt: skip
LORA = {"client_trainable": "lora", "server_trainable": "lora", "lora_rank": 2}


@pytest.fixture
def make(tiny_opt, tmp_path):
    """Factory of finished runs: make(**config) -> (results, run directory, config)."""
    return run_factory(HoSfl, tiny_opt, tmp_path, **KEYS, **{"save-model": False})


def weights_of(directory):
    return load_file(directory / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "optimizer", "lora"),
    [
        ("rank1", "adamw", True),
        ("rank1", "sgd", False),
        ("signs", "sgd", True),
        ("signs", "adamw", False),
    ],
)
def test_a_run_equals_the_reference_loop(make, kind, optimizer, lora):
    results, directory, config = make(
        perturbation=kind, client_optimizer=optimizer, server_optimizer=optimizer,
        **(LORA if lora else {}), save_model=True)  # fmt: skip
    losses, means, accuracy, client, server = reference(
        config.model,
        directory.parent.parent / "reviews",
        config.cut_layer,
        PROMPT,
        config.task.verbalizer_list,
        {
            "steps": 4, "batch": 5, "clients": 7, "sampled": 3, "directions": 2,
            "epsilon": config.zo.epsilon, "lr": 1e-2, "optimizer": optimizer, "lora": lora,
            "rank": 2, "alpha": 16.0, "seed": 3, "kind": kind,
        },
    )  # fmt: skip
    ours = [row["train_loss"] for row in metrics(directory) if "train_loss" in row]
    assert ours == pytest.approx(losses, rel=1e-4)
    for mine, theirs in zip(scalars_of(directory), means, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-2, abs=2e-4)
    assert results.accuracy == accuracy
    merged = weights_of(directory)
    for side, inside in ((client, True), (server, False)):
        if lora:
            side = side.merge_and_unload()
        for n, p in side.named_parameters():
            name = unsplit_name(n)
            own = ".embed" in name or ".layers.0." in name or ".layers.1." in name
            if own is inside:
                assert torch.allclose(merged[name], p, atol=2e-3), name


def test_every_client_ends_with_the_same_submodel(make):
    results, _, _ = make(steps=6, **{"eval-every": 6})
    assert results.clients["fingerprint_checked"] == list(range(7))
    took_part = results.clients["steps_taken_part"]
    assert sum(took_part.values()) == 6 * 3
    assert len(took_part) > 3, "others are drawn in other steps"
    assert results.clients["dropped"] == []


def test_the_same_seed_gives_the_same_curve_and_another_seed_another(make):
    torch.manual_seed(1)
    first, a, _ = make(**LORA, client_optimizer="adamw")
    torch.manual_seed(2)
    again, b, _ = make(**LORA, client_optimizer="adamw")
    other, c, _ = make(**LORA, client_optimizer="adamw", seed=4)
    assert metrics(a) == metrics(b) != metrics(c)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_micro_batches_give_the_same_numbers(make):
    whole, a, _ = make()
    for size in (1, 7):
        cut, b, _ = make(server_micro_batch=size)
        one, other = metrics(a), metrics(b)
        assert [r.get("train_loss") for r in one if "train_loss" in r] == pytest.approx(
            [r["train_loss"] for r in other if "train_loss" in r], rel=1e-5
        )
        assert cut.loss == pytest.approx(whole.loss, rel=1e-4)


def test_bytes_per_step_are_two_activations_and_a_little(make):
    results, _directory, _config = make(steps=5, **LORA, perturbation="rank1")
    up, down = results.bytes_up, results.bytes_down
    assert up["forward"]["messages"] == down["cut-gradient"]["messages"] == 5 * 3
    batches = up["forward"]["bytes"] - 5 * 3 * (3 * 100 + 400), up["forward"]["bytes"]
    # the activations [B, S, H] that went up come down as gradients of the same size
    gradients = down["cut-gradient"]["bytes"]
    assert batches[0] < gradients < batches[1] + 5 * 3 * 400
    small = up["cut-gradient"]["bytes"] + down["forward"]["bytes"] + down["catch-up"]["bytes"]
    assert small < 5 * 3 * 1200, "P scalars up and down, whatever the size of the model"
    assert "restore" not in down


def test_per_client_seeds_give_k_times_p_directions(make):
    _, directory, _config = make(client_seeds="per-client")
    entries = Ledger.read(directory / "ledger.jsonl").entries
    assert [len(set(e.seeds)) for e in entries] == [3 * 2] * 4
    _, shared, _ = make()
    assert [len(e.seeds) for e in Ledger.read(shared / "ledger.jsonl").entries] == [2] * 4


@pytest.mark.parametrize("aggregation", ["weighted-mean", "mean"])
def test_one_client_makes_all_seeds_and_rules_alike_in_value(make, aggregation):
    _, shared, _ = make(num_clients=1, clients_per_step=1, aggregation=aggregation, steps=1)
    (entry,) = Ledger.read(shared / "ledger.jsonl").entries
    _, median, _ = make(num_clients=1, clients_per_step=1, aggregation="median", steps=1)
    assert entry == Ledger.read(median / "ledger.jsonl").entries[0]


def test_local_steps_are_entered_one_by_one(make):
    results, directory, _ = make(local_steps=3, client_optimizer="adamw", **LORA)
    entries = Ledger.read(directory / "ledger.jsonl").entries
    assert [e.step for e in entries] == [s for s in (1, 2, 3, 4) for _ in range(3)]
    assert len({seed for e in entries for seed in e.seeds}) == 4 * 3 * 2
    assert results.bytes_up["forward"]["messages"] == 4 * 3, "no more activations than with one"


def test_local_steps_move_along_each_clients_own_scalars(make):
    # one client: its local steps are the committed ones, so E steps on one batch with lambda
    # kept are E ledger entries whose scalars a second run over the same entries reproduces
    _, a, _ = make(num_clients=1, clients_per_step=1, local_steps=2, steps=1)
    _, b, _ = make(num_clients=1, clients_per_step=1, local_steps=1, steps=1)
    two, one = (Ledger.read(d / "ledger.jsonl").entries for d in (a, b))
    assert two[0] == one[0], "the first local step starts where E = 1 does"
    assert two[1].seeds != two[0].seeds


def test_fedavg_of_weights_is_the_ledgers_aggregation_with_sgd_and_one_step(make):
    # one step: the same up to the rounding of one update. Later steps probe from weights that
    # differ by that rounding, which finite differences magnify by 1 / epsilon.
    for steps, share in ((1, 1e-5), (3, 1e-3)):
        ledger, a, config = make(steps=steps, client_learning_rate=1e-1, save_model=True)
        fedavg, b, _ = make(FedAvgZo, steps=steps, client_learning_rate=1e-1, save_model=True)
        base = AutoModelForCausalLM.from_pretrained(config.model).state_dict()
        mine, theirs = weights_of(a), weights_of(b)
        names = [n for n in mine if ".layers.0." in n or ".layers.1." in n]
        moved = max(float((mine[n] - base[n]).abs().max()) for n in names)
        apart = max(float((mine[n] - theirs[n]).abs().max()) for n in names)
        assert moved > 1e-3
        assert apart <= share * moved + 1e-7
        assert ledger.accuracy == fedavg.accuracy
        assert ledger.loss == pytest.approx(fedavg.loss, rel=1e-5)
    # and what each of them costs
    trained = ledger.client_parameters["trained"]
    assert fedavg.bytes_up["local-train"]["bytes"] > 3 * 3 * 4 * trained
    assert ledger.bytes_up["cut-gradient"]["bytes"] < 3 * 3 * 300
    assert fedavg.bytes_down["restore"]["bytes"] > 2 * 3 * 4 * trained


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fedavg_takes_local_steps_and_ends_with_one_submodel(make, optimizer):
    results, directory, _ = make(FedAvgZo, local_steps=3, client_optimizer=optimizer, **LORA)
    assert results.clients["fingerprint_checked"] == list(range(7))
    rows = [json.loads(x) for x in (directory / "ledger.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "weights" in row] == [1, 2, 3, 4]
    assert rows[-2]["weights"] == results.fingerprint


def absurd(partition, request, reply):
    if isinstance(reply, Scalars) and partition == 0:
        return Scalars(**{**vars(reply), "scalars": reply.scalars + 1e6})
    return reply


def test_robust_aggregation_survives_absurd_scalars(make, monkeypatch):
    keys = {"num_clients": 5, "clients_per_step": 5, "steps": 2}
    _honest, a, _ = make(**keys)
    largest = max(abs(g) for row in scalars_of(a) for g in row)
    link_that(monkeypatch, absurd)
    for rule in ("median", "trimmed-mean"):
        _, b, _ = make(**keys, aggregation=rule)
        assert max(abs(g) for row in scalars_of(b) for g in row) < 10 * largest + 1
    _, c, _ = make(**keys, aggregation="mean", client_learning_rate=1e-9)
    assert max(abs(g) for row in scalars_of(c) for g in row) > 1e5


def fails(step, partition, how):
    def change(own, request, reply):
        if own != partition or request.step != step or request.kind in ("evaluate", "fingerprint"):
            return reply
        if how == "huge":
            if isinstance(reply, Activations):
                huge = torch.full_like(reply.activations, 3e38)
                return Activations(**{**vars(reply), "activations": huge})
            return reply
        if how == "garbage":
            return Scalars(
                step=step, seconds=0.0, peak_bytes=0, scalars=torch.full((1, 2), float("nan"))
            )
        return Failure(step=step, seconds=0.0, peak_bytes=0, error="DataError: disk gone")

    return change


@pytest.mark.parametrize("how", ["error", "garbage", "huge"])
def test_a_failing_client_is_left_out_and_the_weights_renormalised(make, monkeypatch, how, caplog):
    caplog.set_level("WARNING", logger="hosl_flower")
    _healthy, a, _config = make(num_clients=3, clients_per_step=3)
    link_that(monkeypatch, fails(3, 1, how))
    results, b, _ = make(num_clients=3, clients_per_step=3, min_clients=2)
    (drop,) = results.clients["dropped"]
    assert (drop["step"], drop["partition"]) == (3, 1)
    assert "client 1" in drop["reason"] or "no finite logits" in drop["reason"]
    rows = {row["step"]: row for row in metrics(b) if "train_loss" in row}
    assert list(rows[3]["dropped"]) == ["1"]
    assert "dropped" not in rows[2]
    same = [row["train_loss"] for row in metrics(a) if "train_loss" in row][:2]
    assert [rows[1]["train_loss"], rows[2]["train_loss"]] == same
    assert "step 3 goes on without client 1" in caplog.text
    assert results.clients["fingerprint_checked"] == [0, 1, 2], "it is back and caught up"


def test_a_client_that_is_not_there_is_stood_in_for(make, monkeypatch):
    original = start.InProcessLink
    monkeypatch.setattr(original, "absent", lambda self: {0, 1, 2}, raising=False)
    results, _, _ = make(num_clients=7, clients_per_step=2, steps=6, eval_every=6)
    assert set(results.clients["steps_taken_part"]) <= {"3", "4", "5", "6"}
    assert sum(results.clients["steps_taken_part"].values()) == 12


def test_a_step_that_finds_nobody_says_so(make, monkeypatch):
    original = start.InProcessLink
    monkeypatch.setattr(original, "absent", lambda self: set(range(7)), raising=False)
    with pytest.raises(ClientError, match=r"step 1: 0 client\(s\) left.*no other is connected"):
        make()


def test_a_client_that_cannot_evaluate_is_passed_over(make, monkeypatch, caplog):
    def huge(partition, request, reply):
        if request.kind == "evaluate" and partition == 0:
            h = torch.full_like(reply.activations, 3e38)
            return Activations(**{**vars(reply), "activations": h})
        return reply

    expected, _, _ = make(num_clients=3, clients_per_step=3)
    link_that(monkeypatch, huge)
    results, _, _ = make(num_clients=3, clients_per_step=3)
    assert results.loss == expected.loss
    assert "asking the next client" in caplog.text


@pytest.mark.parametrize("micro_batch", [0, 5, 1])
def test_divergence_is_said_to_be_divergence(make, micro_batch):
    keys = {"num_clients": 3, "clients_per_step": 3, "min_clients": 2, "steps": 40}
    with pytest.raises(DivergedError, match="lower"):
        make(**keys, server_learning_rate=1e3, server_micro_batch=micro_batch)


def test_a_client_with_one_enormous_scalar_is_dropped_and_adam_goes_on(make, monkeypatch):
    def enormous(partition, request, reply):
        if isinstance(reply, Scalars) and request.step == 2 and partition == 0:
            return Scalars(**{**vars(reply), "scalars": torch.full_like(reply.scalars, 1e20)})
        return reply

    link_that(monkeypatch, enormous)
    results, _, _ = make(num_clients=2, clients_per_step=2, client_optimizer="adamw")
    (drop,) = results.clients["dropped"]
    assert (drop["step"], drop["partition"]) == (2, 0)
    assert "scalars: expected at most" in drop["reason"]
    assert results.clients["steps_taken_part"] == {"0": 3, "1": 4}


def test_mean_counts_every_client_the_same_on_both_sides(make, monkeypatch):
    def boasts(partition, request, reply):
        if isinstance(reply, Described) and partition == 0:
            counts = (10**6, 0)
            return Described(**{**vars(reply), "train_examples": 10**6, "label_counts": counts})
        return reply

    keys = {"num_clients": 3, "clients_per_step": 3, "aggregation": "mean"}
    _, honest, _ = make(**keys)
    link_that(monkeypatch, boasts)
    _, boasting, _ = make(**keys)
    assert metrics(honest) == metrics(boasting)


def test_too_few_clients_end_the_run_with_the_reasons(make, monkeypatch):
    link_that(monkeypatch, fails(2, 1, "error"))
    with pytest.raises(
        ClientError, match=r"step 2: 2 client\(s\) left, min-clients = 3.*disk gone"
    ):
        make(num_clients=3, clients_per_step=3, min_clients=3)


def test_drift_is_found_at_the_next_evaluation_and_names_the_step(make, monkeypatch):
    class Flipped(LedgerFollower):
        """Its memory is damaged while it applies step 3."""

        def apply(self, entries):
            super().apply(entries)
            if entries and entries[-1].step == 3 and self.state.position == 3:
                with torch.no_grad():
                    next(iter(self.state.parameters.values())).view(-1)[0] += 1e-3
                self.state.trail.pop(3, None)
                self.state.mark()

    monkeypatch.setattr("hosl_flower.client.client.LedgerFollower", Flipped)
    with pytest.raises(DriftError, match=r"client \d: the client submodel drifted at step 3"):
        make(steps=6, eval_every=6)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"clients_per_step": 8}, "clients-per-step = 8 is more than num-clients = 7"),
        ({"min_clients": 4}, "min-clients = 4 is more than the 3 clients of a step"),
        ({"dirichlet_alpha": 0.0}, "dirichlet-alpha = 0.0: input should be greater than 0"),
        ({"dirichlet_alpha": -1.0}, "dirichlet-alpha = -1.0"),
        ({"aggregation": "krum"}, "aggregation = 'krum': input should be 'weighted-mean'"),
        ({"client_seeds": "per-client", "aggregation": "median"}, "client-seeds = shared"),
        ({"partitioner": "natural-id"}, "natural-id needs partition-column"),
        ({"partitioner": "natural-id", "partition_column": "who"}, "who"),
        ({"num_clients": 41}, "41"),
        ({"partitioner": "dirichlet", "min_partition_size": 30}, "min-partition-size"),
        ({"client_trainable": "lora", "lora_targets": "nothing"}, "nothing"),
        ({"server_trainable": "lora", "lora_targets": "nothing"}, "nothing"),
        ({"save_format": "adapters"}, "save-format = adapters needs"),
        ({"client_trainable": "blocks", "cut_layer": 0}, "leaves the client nothing to train"),
        ({"server_trainable": "blocks", "cut_layer": 3}, "leaves the server nothing to train"),
        (
            {**LORA, "save_format": "adapters", "model": "random:opt-tiny", "cut_layer": 1},
            "random weights; use merged",
        ),
        ({"turn_steps": 2}, "ho-sfl does not use turn-steps"),
        ({"trim_fraction": 0.4}, "trim-fraction has no use without aggregation = trimmed-mean"),
        ({"dirichlet_alpha": 7.0}, "dirichlet-alpha has no use without partitioner = dirichlet"),
        ({"lora_rank": 99}, "lora-rank has no use without"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_is_written(make, tmp_path, changes, complaint):
    with pytest.raises((ConfigError, ClientError, ProtocolError), match=complaint) as error:
        make(**changes)
    assert len(str(error.value).splitlines()) <= 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("codec", "share"), [("bf16", 0.5), ("fp16", 0.5), ("int8", 0.25)])
def test_a_codec_saves_bytes_both_ways_and_changes_little(make, codec, share):
    exact, a, _ = make()
    coded, b, _ = make(codec=codec)
    for way, kind in (("bytes_up", "forward"), ("bytes_down", "cut-gradient")):
        before, after = (getattr(r, way)[kind]["bytes"] for r in (exact, coded))
        assert share <= after / before < share + 0.25  # masks, labels, scales, headers
    losses = [[row["train_loss"] for row in metrics(d) if "train_loss" in row] for d in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_clients_train_float32_adapters(make, dtype):
    results, directory, _ = make(dtype=dtype, **LORA, client_optimizer="adamw")
    assert any(abs(g) > 0 for row in scalars_of(directory) for g in row)
    assert results.fingerprint


def test_adapters_can_be_saved_for_peft(make):
    from peft import PeftModel

    results, directory, config = make(
        **LORA, save_format="adapters", client_optimizer="adamw", save_model=True
    )
    _, merged, _ = make(**LORA, client_optimizer="adamw", save_model=True)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(config.model), directory / "model"
    ).merge_and_unload()
    expected = weights_of(merged)
    for name, parameter in model.state_dict().items():
        assert torch.allclose(parameter, expected[name], atol=1e-6), name
    saved = json.loads((directory / "model" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == config.model
    assert results.client_parameters["trained"] == 2 * 2 * 2 * 2 * 16
