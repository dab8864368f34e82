"""LoRA adapters given as a model: their base with the adapters folded in, or what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from decoders import FULL, IDS, halves, whole_logits
from decoders import saved as saved  # a fixture
from peft import LoraConfig, PeftModel, get_peft_model
from runs import run_factory
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hosl_flower.errors import ConfigError, ModelError
from hosl_flower.export.generate import chooser, continuation
from hosl_flower.models.base_model import open_base
from hosl_flower.models.checkpoints import hub
from hosl_flower.models.families.base import HEAD
from hosl_flower.models.processors import load_tokenizer
from hosl_flower.models.split import load_client
from strategies.ho_sfl import HoSfl

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapters(saved, tmp_path):
    """adapters(architecture, targets, **settings) -> directory of peft's adapters, merged model."""

    def make(name, targets, **settings):
        directory, model = saved(name)
        if "lm_head" in targets:  # which is the embedding, in tiny models
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            model.save_pretrained(directory)
        config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            tuned = get_peft_model(model, config)
            with torch.no_grad():
                for key, parameter in tuned.named_parameters():
                    if "lora_" in key:
                        parameter.normal_(0, 0.3)
        tuned.peft_config["default"].base_model_name_or_path = str(directory)
        tuned.save_pretrained(tmp_path / "adapters", save_embedding_layers=False)
        return tmp_path / "adapters", tuned

    return make


@pytest.mark.parametrize(
    ("name", "targets", "settings"),
    [
        ("opt-tiny", ["q_proj", "fc1"], {}),
        ("gpt2-tiny", ["c_attn", "c_fc"], {"fan_in_fan_out": True}),
        ("qwen3-tiny", ["v_proj", "down_proj"], {"use_rslora": True}),
        ("opt-tiny", ["q_proj", "fc1"], {"rank_pattern": {"fc1": 4}}),
    ],
)
def test_the_halves_are_the_merged_model(adapters, name, targets, settings):
    directory, tuned = adapters(name, targets, **settings)
    before = open_base(json.loads((directory / CONFIG).read_text())["base_model_name_or_path"])
    with torch.no_grad():
        merged = tuned.merge_and_unload().eval()
        for cut in (0, 2, 4):
            client, server = halves(directory, cut)
            found = server(client(IDS, FULL), FULL)
            assert torch.allclose(found, whole_logits(merged, FULL), rtol=1e-4, atol=1e-4)
        plain = load_client(before, 2, torch.float32, "cpu")
        assert not torch.allclose(client(IDS, FULL), plain(IDS, FULL), atol=1e-2)


def test_rows_of_an_adapted_head_are_those_of_the_merged_matrix(adapters):
    directory, tuned = adapters("llama-tiny", ["lm_head", "q_proj"])
    source = open_base(str(directory)).source
    head = tuned.merge_and_unload().lm_head.weight.detach()
    assert torch.allclose(source.rows(HEAD, tuple(head.shape), [5, 2]), head[[5, 2]], atol=1e-5)


def change(**values):
    def damage(directory):
        path = directory / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


def with_tensors(edit):
    def damage(directory):
        tensors = load_file(directory / WEIGHTS)
        edit(tensors)
        save_file(tensors, directory / WEIGHTS)

    return damage


QUERY = "base_model.model.model.decoder.layers.0.self_attn.q_proj"
MERGE = "merge_and_unload"
DAMAGES = {
    "base gone": (change(base_model_name_or_path="/none/here"),
                  r"has adapters of the model '/none/here', which cannot be read: .* not exist"),
    "no base": (change(base_model_name_or_path=None), "names no base model: set base_model_name"),
    "another kind": (change(peft_type="IA3"), rf"peft_type = 'IA3', .* plain LoRA .*{MERGE}"),
    "of its own alpha": (change(alpha_pattern={"q_proj": 4}), rf"alpha_pattern = .*{MERGE}"),
    "changed base": (change(init_lora_weights="pissa"), rf"init_lora_weights = 'pissa'.*{MERGE}"),
    "a saved head": (with_tensors(lambda t: t.update({f"{QUERY}.weight": torch.zeros(1)})),
                     rf"{QUERY}.weight, no LoRA matrix .*{MERGE}"),
    "of another model": (with_tensors(
        lambda t: t.update({f"{QUERY}x.lora_A.weight": torch.zeros(2, 64)})), "another model"),
    "of another size": (with_tensors(
        lambda t: t.update({f"{QUERY}.lora_A.weight": torch.zeros(2, 7)})), "do not fit a matrix"),
    "not finite": (with_tensors(lambda t: t[f"{QUERY}.lora_B.weight"].fill_(float("nan"))),
                   rf"{QUERY} has NaN or infinity"),
    "no weights": (lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"), f"but no {WEIGHTS}"),
    "truncated": (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:300]),
                  f"{WEIGHTS} cannot be read"),
    "not json": (lambda d: (d / CONFIG).write_text("["), "no configuration of adapters"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_what_cannot_be_folded_in_is_said_in_a_line(adapters, case):
    directory, _ = adapters("opt-tiny", ["q_proj"])
    damage, message = DAMAGES[case]
    damage(directory)
    with pytest.raises(ModelError, match=message) as error:
        load_client(open_base(str(directory)), 2, torch.float32, "cpu")
    assert str(directory) in str(error.value)


def test_adapters_of_adapters_are_refused(adapters, tmp_path):
    directory, _ = adapters("opt-tiny", ["q_proj"])
    shutil.copytree(directory, tmp_path / "again")
    change(base_model_name_or_path=str(directory))(tmp_path / "again")
    with pytest.raises(ModelError, match="itself adapters: merge them"):
        open_base(str(tmp_path / "again"))


def test_adapters_on_the_hub_are_found_without_a_config_of_a_model(adapters, monkeypatch, tmp_path):
    directory, _ = adapters("opt-tiny", ["q_proj"])
    base = Path(json.loads((directory / CONFIG).read_text())["base_model_name_or_path"])
    repositories = {"org/bad": tmp_path / "bad", "org/a": tmp_path / "good", "org/base": base}
    shutil.copytree(directory, tmp_path / "bad")
    shutil.copytree(directory, tmp_path / "good")
    change(base_model_name_or_path="org/base")(tmp_path / "good")

    def fetch(model, file):
        path = repositories[model] / file
        return path if path.is_file() else None

    monkeypatch.setattr(hub, "fetch", fetch)
    with pytest.raises(ModelError, match="on the hub may name no directory of this machine"):
        open_base("org/bad")
    own, same = (open_base(m).source for m in ("org/a", str(directory)))
    name = "model.decoder.layers.0.self_attn.q_proj.weight"
    found, expected = torch.empty(64, 64), torch.empty(64, 64)
    own.fill(name, found)
    same.fill(name, expected)
    assert torch.equal(found, expected)


def test_the_adapters_of_a_run_are_a_model_for_the_next(tiny_opt, tmp_path):
    lora = {"client-trainable": "lora", "server-trainable": "lora"}
    run = run_factory(HoSfl, tiny_opt, tmp_path, steps=1, **{"eval-every": 1, **lora})
    first, directory, config = run(save_format="adapters")
    model = directory / "model"
    assert (model / CONFIG).is_file()
    second, merged, _ = run(model=str(model), client_trainable="full", server_trainable="full")
    assert second.evaluations[0]["loss"] == pytest.approx(first.evaluations[-1]["loss"], abs=1e-4)
    assert AutoModelForCausalLM.from_pretrained(merged / "model")
    (model / "tokenizer_config.json").unlink()  # peft saves no tokenizer: it is the base's
    (model / "tokenizer.json").unlink()
    assert load_tokenizer(str(model))("Hello")["input_ids"] == [2, 31414]
    base = AutoModelForCausalLM.from_pretrained(config.model)
    whole = PeftModel.from_pretrained(base, model).merge_and_unload()
    ids = load_tokenizer(str(model))("a film", return_tensors="pt")
    expected = whole.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=1)[0]
    text = load_tokenizer(str(model)).decode(expected, skip_special_tokens=True)
    assert continuation(str(model), "a film", 4, chooser(), cut=1) == text
    with pytest.raises(ConfigError, match="save-format = adapters needs a base model of its own"):
        run(model=str(model), save_format="adapters")
