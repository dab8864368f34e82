"""Answers that are generated: loss, gradient and tokens of the unsplit model; whole runs."""

import json
import re

import pytest
import torch
from decoders import halves
from decoders import saved as saved  # a fixture
from links import link_that
from runs import CITIES, metrics, run_factory, write_questions
from specs import client_spec, history_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from hosl_flower.client.client import Client
from hosl_flower.config.parse import parse_config
from hosl_flower.errors import ClientError, ConfigError, ProtocolError
from hosl_flower.models.batch import Batch
from hosl_flower.models.decoding import Prompts, Writer, greedy
from hosl_flower.protocol.messages.activations import Activations
from hosl_flower.protocol.messages.base import Failure
from hosl_flower.protocol.messages.generation import (
    Continue,
    Continued,
    Grade,
    Graded,
)
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.run.plan import plan
from hosl_flower.server.trainer import ServerTrainer
from hosl_flower.tasks.generated_answers import IGNORED, Completion
from hosl_flower.tasks.known import TASKS
from hosl_flower.tasks.squad_score import graded
from strategies.heron import Heron
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl

PROMPTS = [[2, 11, 12, 13], [2, 40], [2, 21, 22, 23, 24, 25]]
ANSWERS = [[5, 9, 7], [9], [30, 5]]


def batch_of(client):
    """Activations of prompts with answers, and the token ids and labels [B, S] of the whole."""
    rows = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    length = max(map(len, rows))
    ids = torch.tensor([[1] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    labels = torch.tensor([[IGNORED] * (length - len(a)) + a for a in ANSWERS])
    with torch.no_grad():
        h = client(ids[:, :-1], mask[:, :-1])
    reply = Activations(
        step=1, seconds=0.0, peak_bytes=0, activations=h, scales=torch.empty(0),
        attention_mask=mask[:, :-1].bool(), labels=labels[:, -3:],
    )  # fmt: skip
    return reply, ids, mask, labels


def server_of(submodel, **more):
    answers = Completion(lambda text: [], 9, frozenset({9}), 8)
    return ServerTrainer(submodel, answers, "sgd", 0.1, **more)


FINAL_NORMS = {
    "opt-tiny": "model.decoder.final_layer_norm.weight",
    "gpt2-tiny": "transformer.ln_f.weight",
}


@pytest.mark.parametrize("name", ["opt-tiny", "gpt2-tiny", "qwen3-tiny"])
def test_loss_and_step_are_those_of_the_unsplit_model(saved, name):
    """transformers' own loss of labels that are -100 but at the answers' tokens."""
    directory, model = saved(name)
    client, submodel = halves(directory, 2)
    batch, ids, mask, labels = batch_of(client)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions, labels=labels).loss
    server = server_of(submodel)
    assert server.loss(batch) == pytest.approx(float(whole.detach()), rel=1e-5)
    whole.backward()
    name = FINAL_NORMS.get(name, "model.norm.weight")
    start = dict(model.named_parameters())[name]
    server.train_step(batch)
    moved = (start - server.state_dict()[name]).detach() / 0.1
    assert torch.allclose(moved, start.grad, rtol=1e-3, atol=1e-4)


def test_micro_batches_change_nothing_though_answers_differ_in_length(saved):
    """The mean is over tokens, whichever sequences are propagated together."""
    directory, _ = saved("opt-tiny")
    found = []
    for micro_batch in (0, 1, 2):
        client, submodel = halves(directory, 2)
        server = server_of(submodel)
        batch, *_ = batch_of(client)
        parts = list(server.propagate([batch, batch], [0.25, 0.75], micro_batch))
        found.append((parts, server.answer_rows.grad))
    (whole, rows), *others = found
    assert whole[0][1] == pytest.approx(whole[1][1], rel=1e-6)
    for parts, grad in others:
        for (_, loss, cut), (_, wanted, whole_cut) in zip(parts, whole, strict=True):
            assert loss == pytest.approx(wanted, rel=1e-5)
            assert torch.allclose(cut, whole_cut, atol=1e-6)
        assert torch.allclose(grad, rows, atol=1e-6)


def test_all_rows_of_the_head_are_trained_without_a_copy(saved):
    client, submodel = halves(saved("opt-tiny")[0], 2)
    server = server_of(submodel)
    assert server.answer_rows.data_ptr() == submodel.lm_head.weight.data_ptr()
    before = server.state_dict()["lm_head.weight"]
    server.train_step(batch_of(client)[0])
    after = server.state_dict()["lm_head.weight"]
    assert (after != before).any(1).all()
    assert torch.equal(submodel.lm_head.weight, after)
    frozen = server_of(halves(saved("gpt2-tiny")[0], 2)[1], trainable="blocks")
    frozen.train_step(batch_of(client)[0])
    assert "answer_rows" not in frozen.trained


def left_padded(rows):
    length = max(map(len, rows))
    ids = torch.tensor([[1] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return Batch(ids, mask, torch.empty(0, dtype=torch.int64))


NAMES = ["opt-tiny", "gpt2-tiny", "llama-tiny", "qwen3-tiny", "gemma3-tiny", "mistral-tiny"]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_of_a_padded_batch_are_those_of_transformers(saved, name):
    """Beyond the sliding window of 16, with ends, whatever the micro-batch; a client that has
    forgotten what came before goes on all the same."""
    directory, model = saved(name)
    batch = left_padded([[2, *range(11, 20)], [2, 40], [2, *range(21, 33)]])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    free = model.generate(
        batch.input_ids, attention_mask=batch.attention_mask, eos_token_id=None, **settings
    )[:, batch.input_ids.shape[1] :]
    end = int(free[0, 4])
    ended = model.generate(
        batch.input_ids, attention_mask=batch.attention_mask, eos_token_id=end, **settings
    )[:, batch.input_ids.shape[1] :]
    client, submodel = halves(directory, 2)
    for ends, whole in ((set(), free), ({end}, ended)):
        for micro_batch, forgets in ((0, False), (2, False), (0, True)):
            prompts = [Prompts(client, batch, micro_batch, "cpu")]

            def ask(tokens, prompts=prompts, micro_batch=micro_batch, forgets=forgets):
                if not len(tokens):
                    tokens = tokens.reshape(3, 0)
                assert prompts[0].follows(tokens) == (tokens.shape[1] > 0)
                if forgets and tokens.shape[1] == 3:
                    prompts[0] = Prompts(client, batch, micro_batch, "cpu")
                parts = [piece for _, piece in prompts[0].activations(tokens)]
                return torch.cat(parts), prompts[0].mask(tokens)

            found = greedy(ask, Writer(submodel, submodel.lm_head.weight), 12, ends)
            assert found.shape == whole.shape
            for own, wanted in zip(found.tolist(), whole.tolist(), strict=True):
                stop = wanted.index(end) + 1 if ends and end in wanted else len(wanted)
                assert own[:stop] == wanted[:stop]


@pytest.fixture
def make(tiny_opt, tmp_path):
    data = write_questions(tmp_path / "squad")
    return run_factory(
        HoSfl, tiny_opt, tmp_path,
        **{"task": "squad", "data-path": str(data), "prompt": "", "verbalizers": "",
           "max-new-tokens": 4, "num-clients": 2, "eval-batch-size": 3, "batch-size": 2},
    )  # fmt: skip


def test_a_run_writes_answers_and_its_model_writes_the_same(make):
    results, directory, _ = make(
        steps=26, eval_every=26, server_optimizer="adamw", server_learning_rate=0.03
    )
    assert results.accuracy is None
    assert results.loss < 0.5 * results.evaluations[0]["loss"]
    assert results.evaluations[-1] == {
        "step": 26, "loss": results.loss, "exact_match": results.exact_match, "f1": results.f1,
    }  # fmt: skip
    assert metrics(directory)[-1]["held_out"]["f1"] == results.f1
    assert json.loads((directory / "results.json").read_text())["f1"] == results.f1
    assert results.held_out_examples == 4

    model = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    newline = tokenizer("\n", add_special_tokens=False).input_ids[-1]
    grades = []
    for n in range(4):
        prompt = TASKS["squad"].prompt.format(
            title=f"T{n}", context=f"{CITIES[n % 2]} is a city.", question=f"Where {n}?"
        )
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, eos_token_id=[newline, 2], pad_token_id=1
        )[0, inputs.input_ids.shape[1] :]
        text = tokenizer.decode(tokens, skip_special_tokens=True).split("\n")[0]
        grades.append(graded(text.strip(), [CITIES[n % 2], "x"]))
    exact, f1 = torch.tensor(grades).mean(0).tolist()
    assert (results.exact_match, results.f1) == (pytest.approx(exact), pytest.approx(f1))
    assert 0 < results.exact_match < results.f1 < 1
    assert "continue" in results.bytes_up
    assert "f1" in (directory / "curve.png").parent.joinpath("results.json").read_text()


def test_a_zeroth_order_client_and_one_of_16_bits_write_answers_too(make):
    results, *_ = make(
        method=Hosl, steps=1, num_clients=1, dtype="bfloat16", codec="int8", client_micro_batch=2
    )
    assert 0 <= results.exact_match <= results.f1 <= 1


def test_a_client_continues_every_prompt_it_was_scored_on(make, monkeypatch):
    def easiest(partition, request, reply):
        if not isinstance(reply, Continued):
            return reply
        own = {k: v[:1] for k, v in vars(reply).items() if k in ("activations", "attention_mask")}
        return Continued(**{**vars(reply), **own})

    link_that(monkeypatch, easiest)
    expected = "client 0, step 0, continue: expected 3 sequences of held-out batch 0, got 1"
    with pytest.raises(ClientError, match=expected):
        make(steps=1)


def test_central_evaluation_writes_the_same(make):
    split, *_ = make(steps=1)
    central, *_ = make(steps=1, evaluation="central")
    assert central.evaluations == split.evaluations


def test_what_needs_labels_says_so(make):
    with pytest.raises(ConfigError, match="needs a task with answer words"):
        make(method=Heron, steps=1)
    with pytest.raises(ConfigError, match="task squad is about answers that are generated; use"):
        make(steps=1, labels="client")
    with pytest.raises(Exception, match="dirichlet spreads labels unevenly, task squad has none"):
        make(steps=1, partitioner="dirichlet")
    results, *_ = make(steps=1, partitioner="natural-id", partition_column="title")
    assert results.clients["number"] == 2


def test_a_plan_of_a_run_that_generates(make, tiny_opt, tmp_path, monkeypatch):
    monkeypatch.setattr("hosl_flower.run.plan._SECONDS", 0.0)
    model, _ = tiny_opt(vocab_size=50272, max_position_embeddings=128)
    planned = plan(
        parse_config(
            {"strategy": "strategies.hosl:Hosl", "model": str(model), "task": "squad",
             "data-path": str(tmp_path / "squad"), "cut-layer": 1, "steps": 2, "batch-size": 2,
             "eval-batch-size": 4, "max-length": 60, "max-new-tokens": 3, "threads": 1,
             "device": "cpu", "trackers": ""}
        )
    )  # fmt: skip
    # prompts and the answer's tokens of one batch: over those of the losses alone
    assert planned.evaluation_bytes > 0
    assert planned.server_trained > 50272 * 16, "the whole head"
    assert {"probe", "forward"} <= planned.peak_bytes.keys()


LIMITS = ReplyLimits(
    batch=4, length=10, hidden=3, dtype="float32", classes=1, longest=3, vocabulary=64
)
AT = {"step": 1, "partition": 0, "position": 0, "digest": "0" * 16, "batch": 0}
DONE = {"step": 1, "seconds": 0.0, "peak_bytes": 0}


def sent(labels, length=5):
    shape = (len(labels), length)
    return Activations(
        **DONE, activations=torch.zeros(*shape, 3), scales=torch.empty(0),
        attention_mask=torch.ones(shape, dtype=torch.bool), labels=torch.tensor(labels),
    )  # fmt: skip


def test_labels_that_are_no_tokens_of_answers_are_refused():
    sent([[IGNORED, 5], [7, 63]]).check(None, LIMITS, None)
    for labels, complaint in (
        ([5, 7], r"expected int64\[2, A\] with A at most 3"),
        ([[5, 6, 7, 8]], "A at most 3"),
        ([[IGNORED, 6], [5, 64]], r"0\.\.63, left-padded with -100, got 64 at \[1, 1\]$"),
        ([[-1, 64]], r"0\.\.63, left-padded with -100, got -1 at \[0, 0\]$"),
        ([[5, IGNORED]], "tokens in each row, left-padded with -100$"),
        ([[5, IGNORED, 6]], "tokens in each row, left-padded"),
        ([[IGNORED], [5]], "tokens in each row, left-padded"),
    ):
        with pytest.raises(ProtocolError, match=complaint):
            sent(labels).check(None, LIMITS, None)
    with pytest.raises(ProtocolError, match="A at most 1"):
        sent([[5, 6]], length=1).check(None, LIMITS, None)


def continued(batch, length):
    own = vars(sent([[5]] * batch, length)).copy()
    del own["labels"]
    return Continued(**own)


def test_activations_that_do_not_follow_are_refused():
    start = Continue(**AT, tokens=torch.empty((0, 0), dtype=torch.int64))
    then = Continue(**AT, tokens=torch.ones((2, 1), dtype=torch.int64))
    continued(2, 5).check(start, LIMITS, None)
    continued(2, 1).check(then, LIMITS, None)
    for batch, length in ((3, 1), (2, 2)):
        with pytest.raises(ProtocolError, match="expected 2 sequences of 1"):
            continued(batch, length).check(then, LIMITS, None)
    asked = Grade(**AT, tokens=torch.ones((2, 1), dtype=torch.int64))
    Graded(**DONE, scores=torch.ones(2, 2)).check(asked, None, None)
    for scores in (torch.ones(2), torch.ones(3, 2), torch.full((2, 2), 1.5), -torch.ones(2, 2)):
        with pytest.raises(ProtocolError, match="scores: expected"):
            Graded(**DONE, scores=scores).check(asked, None, None)


def test_a_client_refuses_tokens_that_cannot_follow(make, tmp_path):
    del make  # it has written the data
    squad = client_spec(task=TASKS["squad"], source=str(tmp_path / "squad"), max_length=100)
    choice = client_spec()
    zeros = torch.zeros((4, 1), dtype=torch.int64)
    for spec, tokens, complaint in (
        (squad, torch.zeros(4, dtype=torch.int64), r"expected int64\[4, t\] for 4 prompts"),
        (squad, zeros[:3], "for 4 prompts, got"),
        (squad, zeros.float(), "expected int64"),
        (squad, zeros + 60000, "of 0..50271"),
        (squad, zeros.expand(4, 9), "at most 8"),
        (choice, zeros, "task sms-spam has no answers to write"),
    ):
        client = Client(spec)
        at = {**AT, "digest": history_for(spec).ledger.digest(), "tokens": tokens}
        for request in (Continue(**at), Grade(**at)):
            (reply,) = client.answer([request])
            assert isinstance(reply, Failure)
            assert re.search(complaint, reply.error), reply.error
