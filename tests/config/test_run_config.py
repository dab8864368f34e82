"""config/run_config.py and config/resolve.py: every key, every refusal, and what a run falls back
to offline."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import put_into_hub_cache
from datasets import ClassLabel, Dataset, Features, Value
from pydantic import ValidationError

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.config.groups.base import Group
from hosl_flower.config.parse import parse_config
from hosl_flower.config.resolve import banner, resolve
from hosl_flower.config.run_config import KEYS, RunConfig
from hosl_flower.errors import ConfigError, HoslError, ModelError, ProtocolError
from hosl_flower.methods.load import load_method
from hosl_flower.tasks.known import TASKS

SIMULATIONS = sorted(Path(__file__).parents[2].glob("simulations/*/pyproject.toml"))


def test_defaults_are_valid_and_round_trip():
    config = parse_config({})
    assert config == RunConfig()
    assert parse_config(config.as_keys()) == config
    assert list(config.as_keys()) == list(KEYS)


def test_keys_are_kebab_case():
    config = parse_config({"cut-layer": 2, "client-learning-rate": 1e-4, "verbalizers": "a, b,"})
    assert (config.cut_layer, config.client.learning_rate) == (2, 1e-4)
    assert config.task.verbalizer_list == ["a", "b"]
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", key) for key in KEYS)


def test_every_field_of_a_group_is_a_key():
    groups = [getattr(RunConfig(), name) for name in RunConfig.model_fields]
    fields = [type(group).model_fields if isinstance(group, Group) else [0] for group in groups]
    assert len(KEYS) == sum(map(len, fields))


def test_a_config_with_other_keys_is_checked_and_leaves_the_first():
    config = parse_config({"dirichlet-alpha": 2.0, "partitioner": "dirichlet", "dtype": "bfloat16"})
    changed = config.with_keys({"stream-endpoint": "host:1", "eval-every": 5})
    assert (changed.stream.endpoint, changed.evaluation.every) == ("host:1", 5)
    assert (changed.clients.dirichlet_alpha, changed.zo.epsilon) == (2.0, 3e-3)
    assert (config.stream.endpoint, config.evaluation.every) == ("", 50)
    with pytest.raises(ValidationError, match="eval-every"):
        config.with_keys({"eval-every": 0})


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("cut_layer", "did you mean 'cut-layer'?"),
        ("client-learning-rat", "did you mean 'client-learning-rate'?"),
        ("zzz", "`hosl-flower keys`"),
    ],
)
def test_unknown_keys_are_refused_with_a_hint(key, hint):
    with pytest.raises(ConfigError) as caught:
        parse_config({key: 1})
    assert f"{key}: no such key" in str(caught.value)
    assert hint in str(caught.value)


def test_one_error_lists_every_problem():
    with pytest.raises(ConfigError) as caught:
        parse_config({"stepz": 1, "steps": 0, "dtype": "int4"}, origin="app/pyproject.toml")
    first, *problems = str(caught.value).splitlines()
    assert first == "app/pyproject.toml is not valid:"
    assert [line.split()[0] for line in problems] == ["stepz:", "dtype", "steps"]


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("strategy", "ho sfl"),
        ("model", " "),
        ("cut-layer", -1),
        ("cut-layer", 1.5),
        ("dtype", "float64"),
        ("device", "gpu"),
        ("threads", -1),
        ("max-length", 7),
        ("train-examples", -1),
        ("eval-examples", -1),
        ("offline-fallback", "perhaps"),
        ("num-clients", 0),
        ("turn-steps", 0),
        ("steps", 0),
        ("batch-size", 0),
        ("eval-batch-size", 0),
        ("eval-every", 0),
        ("evaluation", "both"),
        ("directions", 0),
        ("epsilon", 1e-7),
        ("epsilon", -1e-3),
        ("epsilon", 1.0),
        ("epsilon", NAN),
        ("perturbation", "uniform"),
        ("client-trainable", "none"),
        ("client-learning-rate", -1e-9),
        ("client-learning-rate", NAN),
        ("server-learning-rate", INFINITY),
        ("server-optimizer", "adam"),
        ("seed", -1),
        ("seed", 2**63),
        ("output-dir", ""),
        ("run-name", "a/b"),
        ("run-name", ".."),
        ("run-name", "a b"),
        ("run-name", "a\0b"),
        ("run-name", "n" * 256),
        ("run-name", "\N{SLIGHTLY SMILING FACE}" * 64),
        ("output-dir", "runs\0"),
        ("output-dir", "n" * 256),
        ("output-dir", "~nouser/runs"),
        ("resume", "runs/" + "n" * 256),
        ("data-path", "~nouser/data.csv"),
        ("model", "~nouser"),
        ("stream-key", "a\0b"),
        ("prompt", "{text}\0"),
        ("prompt", "\ud83d"),
        ("output-dir", "\udcff"),
        ("device", "\udcff"),
        ("dtype", "\udcff"),
        ("num-clients", 1_000_000),
        ("local-steps", 2**31 - 1),
        ("server-steps", 2**31 - 1),
        ("reply-deadline", 0),
        ("reply-deadline", NAN),
    ],
)
def test_values_out_of_range_are_named(key, value):
    with pytest.raises(ConfigError) as caught:
        parse_config({key: value})
    assert f"\n  {key} = {value!r}: " in str(caught.value)
    assert str(caught.value).count("\n") == 1


def test_keys_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"num-clients = 9 is more than train-examples = 8"):
        parse_config({"num-clients": 9, "train-examples": 8})
    with pytest.raises(ConfigError, match="at least two"):
        parse_config({"verbalizers": "good,"})
    assert parse_config({"num-clients": 9}).data.train_examples == 0


@pytest.mark.parametrize("path", SIMULATIONS, ids=lambda path: path.parent.name)
def test_simulations_list_every_key(path):
    project = tomllib.loads(path.read_text())
    values = project["tool"]["flwr"]["app"]["config"]
    assert list(values) == list(KEYS)
    defaults = RunConfig().as_keys()
    assert [key for key in KEYS if type(values[key]) is not type(defaults[key])] == []
    parse_config(values, str(path))
    assert re.fullmatch(r"[a-zA-Z][a-zA-Z0-9-]{0,31}", project["project"]["name"])


def test_there_are_simulations():
    assert "quickstart" in [path.parent.name for path in SIMULATIONS]


def settle(**keys):
    config = parse_config({key.replace("_", "-"): value for key, value in keys.items()})
    return resolve(config, "run-1")


def test_without_hub_and_cache_the_run_falls_back_and_says_so(hub_cache):
    resolved = settle(model="facebook/opt-125m", task="sst2")
    assert resolved.spec.model == "random:opt-125m"
    assert (resolved.spec.task, resolved.spec.source) == (TASKS["sms-spam"], "bundled:sms_spam")
    for part in ("NOT A RESULT", "facebook/opt-125m", "RANDOM", "sst2 -> sms-spam"):
        assert part in resolved.notice
    assert "*" not in resolved.notice
    framed = banner(resolved.notice)
    assert len({len(line) for line in framed}) == 1
    assert framed[1].startswith("* NOT A RESULT")
    assert banner("") == []


def test_without_fallback_what_is_missing_is_an_error(hub_cache):
    with pytest.raises(ModelError, match=r"'facebook/opt-125m' .*offline-fallback is false"):
        settle(offline_fallback=False)
    with pytest.raises(ConfigError, match=r"nyu-mll/glue/sst2 .*offline-fallback .*data-path"):
        settle(model="random:opt-125m", offline_fallback=False)


@pytest.mark.parametrize("model", ["org/unknown", "/nowhere/opt-125m", "./opt-125m", "opt-9000"])
def test_models_without_a_stand_in_are_an_error(hub_cache, model):
    with pytest.raises(ModelError, match=model):
        settle(model=model)


def test_a_missing_directory_is_named_besides_the_hub(hub_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=rf"no directory \({tmp_path}/mymodle is not there"):
        settle(model="mymodle")


def test_cached_model_is_kept_when_only_the_data_is_missing(hub_cache, tiny_opt):
    put_into_hub_cache(hub_cache, "org/tiny", tiny_opt()[0])
    resolved = settle(model="org/tiny", cut_layer=1)
    assert (resolved.spec.model, resolved.spec.task.name) == ("org/tiny", "sms-spam")
    assert "RANDOM" not in resolved.notice


def test_cached_data_is_kept(hub_cache):
    (hub_cache / "datasets" / "nyu-mll___glue" / "sst2").mkdir(parents=True)
    resolved = settle(model="random:opt-tiny", cut_layer=1)
    assert (resolved.spec.source, resolved.notice) == ("hub:nyu-mll/glue/sst2", "")


def test_local_model_and_data_need_no_hub(hub_cache, tiny_opt, tmp_path, monkeypatch):
    directory, _ = tiny_opt()
    monkeypatch.chdir(tmp_path)
    resolved = settle(model=str(directory), cut_layer=3, data_path="own.csv", num_clients=4)
    assert (resolved.spec.model, resolved.spec.task) == (str(directory), TASKS["sst2"])
    assert (resolved.spec.source, resolved.notice) == (str(tmp_path / "own.csv"), "")
    assert (resolved.spec.run, resolved.spec.num_clients) == ("run-1", 4)


def test_local_data_is_kept_when_the_model_falls_back(hub_cache, tmp_path):
    resolved = settle(data_path=str(tmp_path))
    assert (resolved.spec.source, resolved.spec.task) == (str(tmp_path), TASKS["sst2"])
    assert "random" in resolved.spec.model
    assert "sms" not in resolved.notice


def test_cut_beyond_the_model_is_refused(hub_cache, tiny_opt):
    with pytest.raises(ConfigError, match=r"cut-layer = 4 .* 0\.\.3"):
        settle(model=str(tiny_opt()[0]), cut_layer=4)


def test_client_spec_survives_the_wire(hub_cache):
    spec = replace(settle().spec, seed=2**63 - 1, source='/d\u00e9j\u00e0 "vu".csv')
    assert ClientSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\ud800", '{"run": 1}'])
def test_garbage_is_no_client_spec(text):
    with pytest.raises(ProtocolError, match="client spec"):
        ClientSpec.from_json(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [("cut_layer", "x"), ("task", {}), ("seed", 1.5), ("dtype", "load"), ("max_length", 0)],
)
def test_client_spec_with_one_wrong_field_names_it(hub_cache, name, value):
    fields = {**json.loads(settle().spec.to_json()), name: value}
    with pytest.raises(ProtocolError, match=f"client spec: .*{name}"):
        ClientSpec.from_json(json.dumps(fields))


def test_genesis_tells_apart_what_decides_the_bits(hub_cache):
    spec = settle().spec
    variants = {"seed": 1, "cut_layer": 1, "dtype": "float16", "perturbation": "signs"}
    assert all(replace(spec, **{k: v}).genesis != spec.genesis for k, v in variants.items())
    pretrained = replace(spec, model="org/tiny")
    assert replace(pretrained, seed=1).genesis == pretrained.genesis


@pytest.mark.parametrize(
    ("keys", "epsilon"),
    [
        ({}, 1e-3),
        ({"dtype": "bfloat16"}, 3e-3),
        ({"dtype": "float16", "epsilon": 0.0}, 1e-3),
        ({"dtype": "bfloat16", "epsilon": 1e-4}, 1e-4),
    ],
)
def test_epsilon_0_is_the_dtypes_own(keys, epsilon):
    config = parse_config(keys)
    assert config.zo.epsilon == epsilon
    assert parse_config(config.as_keys()) == config


def test_the_papers_setting_is_a_valid_override():
    simulation = SIMULATIONS[0].parents[1] / "opt125m_hosl"
    paper = tomllib.loads((simulation / "paper.toml").read_text())
    assert parse_config(paper).zo.directions == 10


def test_residual_feedback_is_a_valid_override():
    simulation = Path(__file__).parents[2] / "simulations" / "opt125m_ho_sfl"
    app = tomllib.loads((simulation / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    own = tomllib.loads((simulation / "residual.toml").read_text())
    assert own.keys() <= app["config"].keys(), "flwr run takes those the app lists"
    config = parse_config({**app["config"], **own})
    assert load_method(config).config.client.gradient == "residual"


def test_local_paths_reach_the_clients_as_absolute_paths(hub_cache, tiny_opt, monkeypatch):
    directory, _ = tiny_opt()
    monkeypatch.chdir(directory.parent)
    spec = settle(model=directory.name, cut_layer=1, data_path="a:b.csv").spec
    assert spec.model == str(directory)
    assert spec.source == str(directory.parent / "a:b.csv")


TEXTS = "text,label\nhe shoots,Sport\na soup,food\na goal,sport\n"


def own_file(path, content, **keys):
    path.write_text(content)
    keys = {"task": "mine", "data-path": str(path), **keys}
    return load_method(parse_config(keys)).config


def test_a_file_of_texts_and_words_is_task_enough(tmp_path):
    found = own_file(tmp_path / "mine.csv", TEXTS)
    assert (found.task.prompt, found.task.verbalizers) == ("{text}", "food=food,sport=sport")
    asked = own_file(tmp_path / "mine.csv", TEXTS, prompt="{text} This is about")
    assert asked.task.prompt == "{text} This is about"


def test_without_a_task_it_is_what_the_file_holds_or_what_is_bundled(tmp_path):
    found = own_file(tmp_path / "mine.csv", TEXTS, task="")
    assert (found.task.name, found.task.verbalizers) == ("own", "food=food,sport=sport")
    assert (
        own_file(tmp_path / "mine.csv", TEXTS, task="", **{"data-path": ""}).task.name == "sms-spam"
    )


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (TEXTS.replace("Sport", "1").replace("sport", "1").replace("food", "0"), {},
         "column 'label' has numbers (0, 1): say in verbalizers"),
        (TEXTS.replace("food", "food=soup"), {}, "with , or = cannot be answers"),
        (TEXTS.replace("food", "sport"), {}, "has 1 different labels (sport), expected 2 to 50"),
        (TEXTS + "".join(f"a,{n}x\n" for n in range(60)), {}, "has 62 different labels"),
        (TEXTS.replace("food", ""), {}, "mine.csv, line 3: label is missing"),
        (TEXTS.replace("label", "y"), {}, "no column 'label'; it has text, y: set label-column"),
        (TEXTS, {"labels": "client"}, "labels = client: the server reads no labels"),
        (TEXTS, {"data-path": "/data/{partition}.csv"}, "does not exist here, on the server"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("task", ["", "mine"])
def test_what_a_file_does_not_say_is_asked_for(tmp_path, content, keys, message, task):
    with pytest.raises(HoslError, match=re.escape(message)):
        own_file(tmp_path / "mine.csv", content, task=task, **keys)


def test_what_is_said_is_not_read_from_the_file(tmp_path):
    path = tmp_path / "mine.csv"
    assert own_file(path, TEXTS, task="sst2").task.verbalizers == ""
    assert own_file(path, TEXTS, **{"target-column": "label"}).task.verbalizers == ""
    found = own_file(path, TEXTS, verbalizers="food=a,sport=b")
    assert (found.task.prompt, found.task.verbalizers) == ("{text}", "food=a,sport=b")


def test_the_names_of_a_saved_data_sets_labels_are_words(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["Sport", "food"])})
    data = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features)
    data.save_to_disk(str(tmp_path / "saved"))
    config = load_method(parse_config({"task": "", "data-path": str(tmp_path / "saved")})).config
    assert config.task.verbalizers == "food=food,sport=Sport"
