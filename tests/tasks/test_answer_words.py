"""tasks/answer_words.py: scores of answer words of one and of several tokens, split and unsplit,
trained."""

import csv
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from runs import PROMPT, metrics, run_factory
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hosl_flower.errors import ProtocolError
from hosl_flower.models.base_model import open_base
from hosl_flower.models.split import load_client, load_server
from hosl_flower.protocol.messages.activations import Activations
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.server.scores import Score
from hosl_flower.server.trainer import ServerTrainer
from hosl_flower.tasks.answer_words import AnswerWords
from strategies.fedavg_zo import FedAvgZo
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl

WORDS = [[5], [9, 7, 5], [9, 30]]  # tokens of three answers
PROMPTS = [[2, 11, 12, 13], [2, 40], [2, 21, 22, 23, 24, 25], [2, 50, 51], [2, 60]]
LABELS = [2, 0, 1, 1, 0]


def reply(client, answers, prompts=PROMPTS, labels=LABELS):
    """What a client sends of these prompts."""
    rows = [row for prompt in prompts for row in answers.inputs(prompt)]
    length = max(map(len, rows))
    ids = torch.tensor([[1] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        h = client(ids, mask)
    return Activations(
        step=1, seconds=0.0, peak_bytes=0, activations=h, scales=torch.empty(0),
        attention_mask=mask.bool(), labels=torch.tensor(labels),
    )  # fmt: skip


@pytest.fixture
def halves(tiny_opt):
    """make(words, **server) -> (client submodel, server, unsplit model)."""
    directory, model = tiny_opt()

    def make(words, optimizer="sgd", learning_rate=0.1, **more):
        base = open_base(str(directory))
        client = load_client(base, 1, torch.float32, "cpu")
        submodel = load_server(base, 1, torch.float32, "cpu")
        return (
            client,
            ServerTrainer(submodel, AnswerWords(words), optimizer, learning_rate, **more),
            model,
        )

    return make


def summed_log_probabilities(model, prompt, word):
    """Of a word after a prompt, token by token, by the whole model: no padding, no batch."""
    total = 0.0
    for i, token in enumerate(word):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + word[:i]])).logits[0, -1]
        total += float(logits.log_softmax(0)[token])
    return total


def test_rows_and_trained_tokens():
    several, single = AnswerWords(WORDS), AnswerWords([[4], [8]])
    assert (several.sequences, several.longest, several.ids) == (3, 3, [5, 9, 7, 30])
    assert several.inputs([2, 3]) == [[2, 3], [2, 3, 9, 7], [2, 3, 9]]
    assert (single.sequences, single.longest, single.ids) == (1, 1, [4, 8])
    assert single.inputs([2, 3]) == [[2, 3]]


def test_a_score_is_the_sum_of_the_tokens_log_probabilities(halves):
    client, server, model = halves(WORDS)
    batch = reply(client, server.answers)
    scores = server._logits(batch.activations, batch.attention_mask)
    expected = torch.tensor(
        [[summed_log_probabilities(model, prompt, word) for word in WORDS] for prompt in PROMPTS]
    )
    assert scores.shape == (5, 3)
    assert (scores - expected).abs().max() <= 1e-4
    loss = F.cross_entropy(expected, torch.tensor(LABELS))
    assert server.loss(batch) == pytest.approx(float(loss), rel=1e-5)
    score = Score(3)
    server.score(batch, score)
    right = int((expected.argmax(1) == torch.tensor(LABELS)).sum())
    assert score.accuracy == right / len(LABELS)


def test_a_score_by_hand():
    """Hidden states and head are unit vectors: every logit is 0 or 1."""
    answers = AnswerWords([[0], [1, 2]])
    e = torch.eye(4)
    # padding, then prompt of one token; and the prompt with token 1 after it
    h = torch.stack([torch.stack([e[3], e[0]]), torch.stack([e[1], e[3]])])
    scores = answers.scores_of(answers.states(h), torch.eye(4), torch.eye(4)[answers.ids])
    hit, miss = 1 - torch.tensor(torch.e + 3).log(), -torch.tensor(torch.e + 3).log()
    assert torch.allclose(scores, torch.stack([hit, hit + miss]).unsqueeze(0))


def test_one_token_words_are_scored_as_the_logits_at_the_last_position(halves):
    client, server, model = halves([[5], [9]])
    batch = reply(client, server.answers, labels=[0, 1, 0, 1, 0])
    logits = server._logits(batch.activations, batch.attention_mask)
    own = server.submodel.answer_logits(batch.activations, batch.attention_mask, server.answer_rows)
    assert torch.equal(logits, own)
    with torch.no_grad():
        whole = model(torch.tensor([PROMPTS[0]])).logits[0, -1, [5, 9]]
    assert (logits[0] - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 7, 100])
def test_micro_batches_of_whole_examples_change_nothing(halves, micro_batch):
    """Two clients, five and two examples: 21 sequences, never cut inside an example."""
    weights = [0.75, 0.25]
    found = []
    for size in (0, micro_batch):
        client, server, _ = halves(WORDS)
        batches = [
            reply(client, server.answers),
            reply(client, server.answers, PROMPTS[:2], [1, 2]),
        ]
        lambdas = list(server.propagate(batches, weights, size))
        server.apply()
        found.append((lambdas, server.answer_rows.detach().clone()))
    for (m, loss, gradient), (n, other_loss, other) in zip(found[0][0], found[1][0], strict=True):
        assert m == n
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert gradient.shape == batches[m].activations.shape
        assert torch.allclose(gradient, other, atol=1e-6)
        assert gradient.abs().sum() > 0
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_the_cut_gradient_is_that_of_the_unsplit_model(halves):
    client, server, _ = halves(WORDS)
    batch = reply(client, server.answers, PROMPTS[:2], LABELS[:2])
    h = batch.activations.clone().requires_grad_(True)
    log_p = server.submodel(h, batch.attention_mask.long()).log_softmax(2)
    length = h.shape[1]
    scores = torch.stack([
        sum(log_p[row, length - len(word) + j, t] for j, t in enumerate(word))
        for row, word in enumerate(WORDS * 2)
    ]).view(2, 3)  # fmt: skip
    (expected,) = torch.autograd.grad(F.cross_entropy(scores, batch.labels), h)
    ((_, _, found),) = server.propagate([batch], [1.0])
    assert torch.allclose(found, expected, atol=1e-6)


def test_only_the_rows_of_the_words_tokens_are_trained(halves):
    client, server, model = halves(WORDS)
    before = server.state_dict()["lm_head.weight"].clone()
    server.train_step(reply(client, server.answers))
    changed = (server.state_dict()["lm_head.weight"] != before).any(1).nonzero().flatten()
    assert changed.tolist() == sorted({t for word in WORDS for t in word})
    assert torch.equal(before, model.lm_head.weight)


LIMITS = ReplyLimits(
    batch=15, length=16, hidden=16, dtype="float32", classes=3, each=3, shortest=3
)  # fmt: skip


def test_replies_must_have_a_label_for_every_three_sequences(halves):
    client, server, _ = halves(WORDS)
    batch = reply(client, server.answers)
    batch.check(None, LIMITS, None)
    for wrong in (torch.zeros(15), torch.zeros(4), torch.zeros(6)):
        with pytest.raises(ProtocolError, match=r"labels: expected int64\[5\], one for 3 of 15"):
            replace(batch, labels=wrong.long()).check(None, LIMITS, None)
    rows = slice(0, 14)
    cut = replace(
        batch,
        activations=batch.activations[rows],
        attention_mask=batch.attention_mask[rows],
        labels=batch.labels[:4],
    )
    with pytest.raises(ProtocolError, match=r"one for 3 of 14 sequences"):
        cut.check(None, LIMITS, None)
    short = replace(
        batch,
        activations=batch.activations[:, -2:],
        attention_mask=batch.attention_mask[:, -2:],
    )
    with pytest.raises(ProtocolError, match=r"sequences of 3 to 16 tokens, got 15 of 2"):
        short.check(None, LIMITS, None)
    with pytest.raises(ProtocolError, match="at most 12 sequences"):
        batch.check(None, replace(LIMITS, batch=12), None)


@pytest.mark.parametrize("method", [Hosl, HoSfl, FedAvgZo])
def test_a_run_with_two_token_words_learns_and_merges(tiny_opt, tmp_path, method):
    """The merged model in plain transformers gives the accuracy of the last evaluation."""
    words = "not good,great"
    more = {} if method is Hosl else {"server-micro-batch": 4, "client-micro-batch": 3}
    make = run_factory(method, tiny_opt, tmp_path, **more)
    results, directory, config = make(
        steps=12, eval_every=12, verbalizers=words, server_learning_rate=3e-2,
        client_learning_rate=1e-4,
    )  # fmt: skip
    assert results.loss < 0.9 * results.evaluations[0]["loss"]
    assert len([row for row in metrics(directory) if "train_loss" in row]) == 12
    model = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    answers = [tokenizer(f" {w}", add_special_tokens=False).input_ids for w in words.split(",")]
    assert [len(word) for word in answers] == [2, 1]
    right, loss, rows = 0, 0.0, 0
    with (directory.parent.parent / "reviews" / "validation.csv").open() as file:
        for row in csv.DictReader(file):
            prompt = tokenizer(PROMPT.format(text=row["text"])).input_ids
            scores = [summed_log_probabilities(model, prompt, word) for word in answers]
            label = torch.tensor(int(row["label"]))
            right += int(torch.tensor(scores).argmax()) == int(label)
            loss += float(F.cross_entropy(torch.tensor(scores), label))
            rows += 1
    assert results.accuracy == right / rows
    assert results.loss == pytest.approx(loss / rows, rel=1e-3)
    base = AutoModelForCausalLM.from_pretrained(config.model).state_dict()["lm_head.weight"]
    head = load_file(directory / "model" / "model.safetensors")["lm_head.weight"]
    changed = (head != base).any(1).nonzero().flatten().tolist()
    assert changed == sorted({token for word in answers for token in word})
