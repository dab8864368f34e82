"""Labels that stay on the clients: the same numbers, and nothing on the wire that tells them but
the gradient of the loss."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import metrics, run_factory
from safetensors.torch import load_file
from specs import client_spec, history_for

from hosl_flower.client.client import Client
from hosl_flower.errors import ClientError, ConfigError
from hosl_flower.flower.stream.link import longest_frame
from hosl_flower.models.base_model import open_base
from hosl_flower.models.families.registry import embedding_name
from hosl_flower.models.label_head import OutputHead, load_output_head
from hosl_flower.models.split import load_client, load_server
from hosl_flower.protocol.messages.kept_labels import HeldOutStates, HiddenStates, Scored
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.protocol.wire import to_wire
from hosl_flower.server.kept_labels import score_by_client
from hosl_flower.server.link import Link
from hosl_flower.tasks.answer_words import AnswerWords
from hosl_flower.tensors.raw_bytes import raw_bytes
from strategies.frozen_client import FrozenClient
from strategies.heron import Heron
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl
from strategies.split_fo import SplitFo
from strategies.split_zo import SplitZo

SEVERAL = [[5], [9, 7, 5], [9, 30]]  # tokens of three answers


def test_the_gradient_by_hand():
    """h = (1, 1), W = ((2, 0), (0, 2)): both words are as likely, softmax - onehot is
    (-1, 1) / 2."""
    head = OutputHead(AnswerWords([[0], [1]]), 2 * torch.eye(2))
    found = head.judge(torch.ones(1, 1, 2), torch.tensor([0]))
    assert found.loss == pytest.approx(0.6931472, rel=1e-6)
    assert found.gradient.tolist() == [[[-1.0, 1.0]]]
    assert found.correct == 1
    twice = head.judge(torch.ones(2, 1, 2), torch.tensor([0, 1]))
    assert twice.gradient.tolist() == [[[-0.5, 0.5]], [[0.5, -0.5]]]
    assert twice.correct == 1
    assert head.judge(torch.ones(1, 1, 2), torch.tensor([0]), gradient=False).gradient.numel() == 0


@pytest.mark.parametrize("words", [[[4], [8]], [[1], [2], [3], [0], [7]]])
def test_one_token_answers_have_the_bits_of_autograd(words):
    answers, generator = AnswerWords(words), torch.Generator().manual_seed(0)
    for examples in (1, 3, 8):
        rows = torch.randn(len(words), 24, generator=generator)
        states = torch.randn(examples, 1, 24, generator=generator).requires_grad_()
        labels = torch.randint(len(words), (examples,), generator=generator)
        loss = F.cross_entropy(answers.scores_of(states, rows, rows), labels)
        found = OutputHead(answers, rows).judge(states.detach(), labels)
        (expected,) = torch.autograd.grad(loss, states)
        assert torch.equal(found.gradient, expected)
        assert found.loss == loss.item()


@pytest.mark.parametrize("chunk", [1 << 22, 16 * 7])
def test_answers_of_several_tokens_have_autograds_gradient(monkeypatch, chunk):
    """The head in one piece, or in pieces of 7 rows."""
    monkeypatch.setattr("hosl_flower.models.label_head._CHUNK_ELEMENTS", chunk)
    answers, generator = AnswerWords(SEVERAL), torch.Generator().manual_seed(0)
    head = torch.randn(40, 16, generator=generator)
    states = torch.randn(5, 6, 16, generator=generator).requires_grad_()
    labels = torch.tensor([2, 0, 1, 1, 0])
    scores = answers.scores_of(states, head, head[answers.ids])
    loss = F.cross_entropy(scores, labels)
    (expected,) = torch.autograd.grad(loss, states)
    found = OutputHead(answers, head).judge(states.detach(), labels)
    assert found.loss == pytest.approx(loss.item(), rel=1e-6)
    assert (found.gradient - expected).abs().max() <= 1e-6
    assert found.correct == int((scores.argmax(1) == labels).sum())


@pytest.fixture
def make(tiny_opt, tmp_path):
    own = {"client-trainable": "blocks", "server-trainable": "blocks", "save-model": False}
    return run_factory(HoSfl, tiny_opt, tmp_path, **own)


def steps(directory):
    """What a run measured in its training steps."""
    return [row for row in metrics(directory) if "train_loss" in row]


def both(make, strategy, **changes):
    """The run with labels sent, and the same with labels kept: (results, directory) each."""
    return [make(strategy, labels=labels, **changes)[:2] for labels in ("server", "client")]


MANY = {"num_clients": 4, "clients_per_step": 2, "aggregation": "mean"}
LORA = {"client_trainable": "lora", "server_trainable": "lora", "server_optimizer": "adamw"}
SAME = {
    "ho-sfl": (HoSfl, LORA),
    "ho-sfl-many": (
        HoSfl, {**MANY, "local_steps": 2, "codec": "bf16", "steps_per_message": 2, "steps": 6}
    ),
    "split-fo": (SplitFo, {**MANY, "directions": 1}),
    "split-fo-local": (SplitFo, {**MANY, "directions": 1, "local_steps": 2}),
    "frozen": (FrozenClient, {"directions": 1, "client_learning_rate": 1e-6}),
    "hosl": (Hosl, {"num_clients": 2, "turn_steps": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_same_bits_as_with_labels_sent(make, name):
    """The shares of clients are powers of two here: scaling by them rounds nothing."""
    strategy, changes = SAME[name]
    (sent, sent_directory), (kept, kept_directory) = both(make, strategy, **changes)
    assert steps(kept_directory) == steps(sent_directory)
    assert kept.fingerprint == sent.fingerprint
    assert kept.ledger_digest == sent.ledger_digest
    for one, other in zip(kept.evaluations, sent.evaluations, strict=True):
        assert one["accuracy"] == other["accuracy"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)  # summed in other groups
        assert one["balanced_accuracy"] is one["majority_accuracy"] is None


def test_server_trainable_full_trains_the_final_norm_but_not_the_answer_words(make):
    _, directory, _ = make(labels="client", server_trainable="full", save_model=True)
    tensors = load_file(directory / "model" / "model.safetensors")
    base = load_file(Path(read_config(directory)["model_used"]) / "model.safetensors")
    norm, head = "model.decoder.final_layer_norm.weight", "model.decoder.embed_tokens.weight"
    assert not torch.equal(tensors[norm], base[norm])
    assert torch.equal(tensors["lm_head.weight"], base[head])


def read_config(directory):
    return json.loads((directory / "config.json").read_text())


def test_answers_of_several_tokens(make):
    words = {"verbalizers": "terrible,not great at all", "server_micro_batch": 4}
    (sent, a), (kept, b) = both(make, HoSfl, client_trainable="full", **words)
    for one, other in zip(steps(a), steps(b), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    assert kept.loss == pytest.approx(sent.loss, rel=1e-5)
    assert kept.accuracy == sent.accuracy


def recorded(make, monkeypatch, *arguments, **changes):
    """A run, and all that its clients have sent: (results, [(kind, {field: bytes})])."""
    sent, original = [], Client.answer

    def answer(self, requests):
        for reply in original(self, requests):
            header, tensors = to_wire(reply)
            fields = {k: json.dumps(v).encode() for k, v in json.loads(header).items()}
            fields |= {k: bytes(raw_bytes(tensor)) for k, tensor in tensors.items()}
            for measured in ("seconds", "peak_bytes", "tensor_peaks"):
                del fields[measured]
            sent.append((reply.kind, fields))
            yield reply

    monkeypatch.setattr(Client, "answer", answer)
    results, _, _ = make(*arguments, **changes)
    monkeypatch.setattr(Client, "answer", original)
    return results, sent


def relabelled(directory, label):
    """The same reviews in another directory, all with one label."""
    other = directory.with_name(f"all{label}")
    other.mkdir()
    for file in directory.iterdir():
        rows = [line.rsplit(",", 1)[0] for line in file.read_text().splitlines()[1:]]
        (other / file.name).write_text("\n".join(["text,label", *(f"{r},{label}" for r in rows)]))
    return other


@pytest.mark.parametrize("strategy", [HoSfl, Hosl])
def test_labels_change_nothing_on_the_wire_but_gradient_and_losses(
    make, monkeypatch, tmp_path, strategy
):
    """Nothing learns here, so that a step's messages do not tell of earlier ones' gradients."""
    still = {
        "client_learning_rate": 0.0, "server_learning_rate": 0.0, "num_clients": 2,
        "labels": "client", "steps": 2,
    }  # fmt: skip
    _, mixed = recorded(make, monkeypatch, strategy, **still)
    other = relabelled(tmp_path / "reviews", 0)
    _, same = recorded(make, monkeypatch, strategy, data_path=str(other), **still)
    assert [kind for kind, _ in mixed] == [kind for kind, _ in same]
    differ = {
        (kind, field)
        for (kind, one), (_, another) in zip(mixed, same, strict=True)
        for field in one
        if one[field] != another[field]
    }
    expected = {("hidden-gradient", "gradient"), ("hidden-gradient", "loss")}
    expected |= {("scored", "correct"), ("scored", "loss_sum")}
    # what follows from numbers the server has sent: of its ledger, of its cut gradient
    expected.add(("applied", "digest"))
    if strategy is HoSfl:
        expected.add(("scalars", "scalars"))
    assert differ == expected
    assert {f["labels"] for kind, f in mixed if kind == "activations"} == {b""}
    assert {f["label_counts"] for kind, f in mixed if kind == "described"} == {b"[]"}


def test_with_labels_sent_the_same_comparison_finds_them(make, monkeypatch):
    _, sent = recorded(make, monkeypatch, steps=2)
    assert all(len(f["labels"]) > 0 for kind, f in sent if kind == "activations")


def test_what_it_costs(make):
    """Batches of 5 examples, hidden states of 16 float32; 24 held-out examples, in one request."""
    results, _, _ = make(labels="client")
    for way in (results.bytes_up, results.bytes_down):
        header = way["hidden-states"]["bytes"] - 4 * 5 * 16 * 4
        assert way["hidden-states"]["messages"] == 4
        assert 0 < header < 4 * 400
    down, up = (way["held-out-states"] for way in (results.bytes_down, results.bytes_up))
    assert down["messages"] == up["messages"] == 3
    assert 3 * 24 * 16 * 4 < down["bytes"] < 3 * (24 * 16 * 4 + 400)
    assert up["bytes"] < 3 * 300


@pytest.mark.parametrize("strategy", [SplitZo, Heron])
def test_methods_that_need_labels_on_the_server_say_so(make, strategy):
    with pytest.raises(ConfigError, match=f"{strategy.name} needs labels on the server"):
        make(strategy, labels="client", directions=1)


def test_the_servers_own_evaluation_data_has_labels(make):
    results, _, _ = make(labels="client", evaluation="central")
    assert results.balanced_accuracy is not None
    assert results.majority_accuracy == 0.5


def test_a_client_that_gives_no_gradient_is_left_out(make, monkeypatch):
    original = Client._handle

    def handle(self, request):
        if isinstance(request, HiddenStates) and (request.step, request.partition) == (2, 1):
            raise RuntimeError("label 7 of a secret")
        return original(self, request)

    monkeypatch.setattr(Client, "_handle", handle)
    results, directory, _ = make(labels="client", num_clients=3, server_micro_batch=3)
    (drop,) = results.clients["dropped"]
    assert (drop["step"], drop["partition"]) == (2, 1)
    assert "RuntimeError" in drop["reason"]
    assert "secret" not in (directory / "results.json").read_text()


def test_a_client_says_nothing_of_its_data_in_an_error(make, tmp_path):
    data = tmp_path / "bad"
    data.mkdir()
    (data / "train.csv").write_text("text,label\na film,secret\n")
    for labels, told in (("server", True), ("client", False)):
        with pytest.raises(ClientError) as failed:
            make(labels=labels, data_path=str(data), prompt="{text} It was")
        assert ("secret" in str(failed.value)) is told
        assert "DataError" in str(failed.value)


class Counting(Link):
    """AnswerWords that as many examples are right as were sent."""

    def describe_client(self, partition):
        return f"client {partition}"

    def _deliver(self, requests, until):
        done = {"step": 1, "seconds": 0.0, "peak_bytes": 0, "loss_sum": 0.5}
        return {
            p: iter([Scored(**done, correct=len(request.states)) for request in own])
            for p, own in requests.items()
        }


@pytest.mark.parametrize(
    ("examples", "width", "requests"), [(3, 300 * 4096, 3), (5, 1 << 18, 2), (5, 1 << 10, 1)]
)
def test_held_out_states_are_asked_for_in_requests_of_an_example_at_least(
    examples, width, requests
):
    """States of 4.7 MiB, 1 MiB and 4 KiB each, where 4 MiB go together."""
    spec = client_spec(labels="client")
    limits = ReplyLimits(4, 32, width, "float32", 2, private_labels=True)
    link = Counting(history_for(spec), limits)
    at = {"step": 1, "partition": 0, "position": 0, "digest": "0" * 16}
    tally = score_by_client(link, at, [torch.zeros(examples, 1, width)])
    assert (tally.examples, tally.correct) == (examples, examples)
    assert link.traffic.down["held-out-states"][0] == requests
    longest = -(-examples // requests) * width * 4 + 400  # the header too
    assert longest <= longest_frame(limits, link.history)


def test_states_that_do_not_fit_are_refused():
    """Batches of 3; 20 held-out examples; activations as wide as hidden states."""
    client = Client(client_spec(labels="client"))
    width = client.submodel.hidden_size
    at = {"step": 1, "partition": 0, "position": 9, "digest": "0" * 16}
    for shape in ((4, 1, width), (0, 1, width), (3, 2, width), (3, 1, width + 1)):
        request = HiddenStates(**at, batch=0, first=0, states=torch.zeros(shape))
        (reply,) = client.answer([request])
        assert f"expected float32[1 to 3, 1, {width}]" in reply.error
    held_out = HeldOutStates(**at, first=20, states=torch.zeros(1, 1, width))
    (reply,) = client.answer([held_out])
    assert f"expected float32[1 to 0, 1, {width}]" in reply.error
    (reply,) = Client(client_spec()).answer([held_out])
    assert "in this run labels are sent to the server" in reply.error


def test_the_head_is_read_row_by_row(tiny_opt, tmp_path):
    """Tied or not, from safetensors or fresh: the rows of what is read whole."""
    for model in (tiny_opt()[0], tiny_opt(tie_word_embeddings=False)[0], "random:opt-tiny"):
        base = open_base(str(model), seed=3)
        width = base.config.hidden_size
        client = load_client(base, 1, torch.float32, "cpu")
        server = load_server(base, 1, torch.float32, "cpu")
        head = load_output_head(client, base, AnswerWords([[9], [40]]), "cpu", "blocks")
        assert head.weight.shape == (2, width)
        assert torch.equal(head.weight, server.lm_head.weight[[9, 40]])
        embedding = client.canonical_parameters()[embedding_name(base.config)]
        for trainable in ("full", "blocks"):
            whole = load_output_head(client, base, AnswerWords(SEVERAL), "cpu", trainable).weight
            assert torch.equal(whole, server.lm_head.weight)
            shared = trainable == "blocks" and base.config.tie_word_embeddings
            assert (whole.data_ptr() == embedding.data_ptr()) is shared
