"""Generation through the split: the tokens that transformers gives for the unsplit model."""

import json

import pytest
import torch
from decoders import FULL, IDS, PADDED, halves
from decoders import saved as saved  # a fixture
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hosl_flower.cli import cli
from hosl_flower.errors import ConfigError
from hosl_flower.export.generate import chooser, generate
from hosl_flower.models.decoding import own_cache
from hosl_flower.models.families.decoders import _cache_argument
from hosl_flower.models.processors import load_tokenizer

NAMES = ["opt-tiny", "gpt2-tiny", "qwen3-tiny", "gemma3-tiny", "mistral-tiny"]


def invoke(*arguments):
    done = CliRunner().invoke(cli, ["generate", *map(str, arguments)])
    return done, " ".join(done.stderr.split())


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers(saved, name):
    directory, model = saved(name)
    prompt = IDS[:1, :9]
    kwargs = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    whole = model.generate(prompt, attention_mask=FULL[:1, :9], **kwargs)[0, 9:].tolist()
    assert len(whole) == 16  # 25 in all: beyond the sliding window of 16
    assert list(generate(*halves(directory, 2), prompt[0].tolist(), 16, chooser())) == whole


@pytest.mark.parametrize("name", NAMES)
def test_with_and_without_caches_the_logits_are_the_same(saved, name):
    directory, _ = saved(name)
    tokens = PADDED.bool()
    for cut in (0, 1, 3, 4):
        client, server = halves(directory, cut)
        caches = own_cache(client), own_cache(server)
        with torch.no_grad():
            whole = server(client(IDS, PADDED), PADDED)
            parts, done = [], 0
            for size in (19, 1, 3, 1):  # left-padded: a row's first token is in the third part
                ids, mask = IDS[:, done : done + size], PADDED[:, : done + size]
                hidden = server.hidden(client(ids, mask, caches[0]), mask, caches[1])
                parts.append(server.lm_head(hidden))
                done += size
        cached = torch.cat(parts, 1)
        assert torch.allclose(cached[tokens], whole[tokens], rtol=1e-4, atol=1e-4), cut


def test_a_cache_holds_the_blocks_of_its_side_alone(saved):
    client, server = halves(saved("gemma3-tiny")[0], 3)
    caches = own_cache(client), own_cache(server)
    with torch.no_grad():
        server.hidden(client(IDS, FULL, caches[0]), FULL, caches[1])
    held = [len({id(layer.keys) for layer in cache.layers}) for cache in caches]
    assert held == [3, 1]
    assert [cache.get_seq_length() for cache in caches] == [24, 24]


def test_it_stops_at_the_end_of_the_text_and_not_before(saved):
    sides = halves(saved("opt-tiny")[0], 2)
    prompt = IDS[0, :9].tolist()
    whole = list(generate(*sides, prompt, 12, chooser()))
    end = whole[4]
    stopped = list(generate(*sides, prompt, 12, chooser(), {end}))
    assert stopped == whole[: whole.index(end) + 1]


def test_sampling_keeps_to_the_likeliest_tokens_and_its_seed():
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log()
    draw = chooser(1.0, 0.6, seed=5)
    drawn = [draw(logits) for _ in range(400)]
    assert set(drawn) == {1, 2}  # 0.5 alone is not yet 0.6
    assert drawn.count(1) == pytest.approx(400 * 5 / 8, abs=40)
    again = chooser(1.0, 0.6, seed=5)
    assert [again(logits) for _ in range(400)] == drawn
    assert {chooser(1.0, 0.5)(logits) for _ in range(20)} == {1}
    cold, free = chooser(0.05, seed=1), chooser(1.0, seed=1)
    assert {cold(logits) for _ in range(50)} == {1}
    assert {free(logits) for _ in range(200)} == {0, 1, 2, 3}
    assert chooser()(logits) == 1
    for wrong in ((-1.0, 1.0), (1.0, 0.0), (1.0, 1.5)):
        with pytest.raises(ConfigError, match="expected a temperature of at least 0"):
            chooser(*wrong)


def test_the_command_continues_a_prompt(tiny_opt):
    directory, _ = tiny_opt(vocab_size=50272, max_position_embeddings=64)
    done, errors = invoke(directory, "a lovely film", "--max-new-tokens", 8, "--cut-layer", 2)
    assert done.exit_code == 0, errors
    tokenizer = load_tokenizer(str(directory))
    inputs = tokenizer("a lovely film", return_tensors="pt")
    whole = AutoModelForCausalLM.from_pretrained(directory).generate(
        **inputs, max_new_tokens=8, do_sample=False
    )
    assert done.stdout.rstrip("\n") == tokenizer.decode(whole[0], skip_special_tokens=True)
    drawn = [
        invoke(directory, "a film", "--max-new-tokens", 8, "--cut-layer", 1, *sampling)[0].stdout
        for sampling in (["--temperature", 3, "--seed", seed] for seed in (1, 1, 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_mistakes_are_one_line(tiny_opt, tmp_path):
    directory, _ = tiny_opt(vocab_size=50272, max_position_embeddings=64)
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "config.json").write_text(json.dumps({"config": {"steps": 3}}))
    few = ["--max-new-tokens", 4]
    for arguments, complaint in (
        (
            [directory, "a", *few],
            "is a model and no run, which would know its cut",
        ),
        ([directory, "a", *few, "--cut-layer", 4], "cut-layer = 4 is outside 0..3"),
        ([directory, "a", "--cut-layer", 1, "--max-new-tokens", 63], "expected at most 62"),
        ([directory, "a", *few, "--top-p", 0.5], "--top-p has no use at --temperature 0"),
        ([unfinished, "a"], "no finished run, it has no results.json"),
        ([tmp_path, "a"], "has no config.json"),
    ):
        done, errors = invoke(*arguments)
        assert done.exit_code == 1
        assert complaint in errors
        assert isinstance(done.exception, SystemExit), "no traceback"


@pytest.mark.parametrize("argument", ["cache", "past_key_values"])
def test_a_cache_goes_by_the_name_that_the_decoder_has_for_it(argument):
    if argument == "cache":

        class Decoder:
            def forward(self, cache=None, **more): ...

    else:

        class Decoder:
            def forward(self, past_key_values=None, **more): ...

    assert _cache_argument(Decoder) == argument


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_no_argument_is_one_that_transformers_will_remove(saved, name):
    client, server = halves(saved(name)[0], 2)
    with torch.no_grad():
        for caches in ((None, None), (own_cache(client), own_cache(server))):
            server.hidden(client(IDS, FULL, caches[0]), FULL, caches[1])
