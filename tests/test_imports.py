"""What a process does not use it does not import: memory, and seconds of every start."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hosl_flower.errors import ConfigError
from hosl_flower.models.architectures import architecture, known_architectures
from hosl_flower.models.before_loading import blocks_of, check_model
from hosl_flower.models.families.registry import family_of

SCRIPT = """
import json, sys
import hosl_flower.flower.client_calls
print(json.dumps(sorted(sys.modules)))
"""
NOT_A_CLIENTS = (
    "matplotlib", "pandas", "pyarrow", "datasets", "flwr_datasets",  # with its data, if at all
    "peft",  # with its adapters
    "torch._dynamo", "ray",
    "hosl_flower.server", "hosl_flower.run", "hosl_flower.methods", "hosl_flower.report",
    "hosl_flower.compare", "hosl_flower.export", "hosl_flower.cli",
    "hosl_flower.flower.message_link", "hosl_flower.flower.stream.link", "strategies",
)  # fmt: skip


def loaded_with(module):
    script = SCRIPT.replace("hosl_flower.flower.client_calls", module)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_client_imports_what_it_uses():
    loaded = loaded_with("hosl_flower.flower.client_calls")
    assert "hosl_flower.client.client" in loaded
    assert not {name for name in NOT_A_CLIENTS if name in loaded}


def test_a_supernode_says_what_it_is_without_torch():
    """Flower starts a process for every message, and a board loads torch in ten seconds."""
    loaded = loaded_with("hosl_flower.flower.client_app")
    assert not {name for name in (*NOT_A_CLIENTS, "torch", "transformers") if name in loaded}


def test_the_command_line_starts_without_torch():
    """It says what is wrong at once; and server_app settles how torch's threads wait, which must
    be before torch is loaded."""
    loaded = loaded_with("hosl_flower.cli")
    assert "hosl_flower.config.run_config" in loaded
    slow = ("torch", "transformers", "flwr", "matplotlib", "datasets")
    assert not {name for name in slow if name in loaded}


# What needs no torch does not wait for it

COMMANDS = """
import json, sys
from typer.testing import CliRunner
from hosl_flower.cli import cli
told = []
for arguments in json.loads(sys.argv[1]):
    done = CliRunner().invoke(cli, arguments)
    slow = sorted({name.partition(".")[0] for name in sys.modules} & set(json.loads(sys.argv[2])))
    told.append([done.exit_code, done.output, slow])
print(json.dumps(told))
"""
SLOW = ("torch", "transformers", "flwr", "datasets", "matplotlib")
OUTSIDE = "cut-layer = 9 is outside 0..4"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model directory, a hub's cache with the model in it, and a run directory."""
    root = tmp_path_factory.mktemp("places")
    snapshot = root / "hub/models--some--opt/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "opt", "num_hidden_layers": 4}')
    (refs := root / "hub/models--some--opt/refs").mkdir()
    (refs / "main").write_text("0" * 40)
    (root / "model").symlink_to(snapshot)
    run = root / "run"
    run.mkdir()
    results = {"steps": 2, "clients": {"number": 2, "steps_taken_part": {"0": 2, "1": 2}}}
    results["bytes_up"] = {"probe": {"messages": 4, "bytes": 100}}
    (run / "results.json").write_text(json.dumps(results))
    (run / "config.json").write_text('{"config": {"seed": 0, "clients-per-step": 0}}')
    (run / "metrics.jsonl").write_text('{"step": 1, "train_loss": 1.0}\n')
    (root / "saved" / "model").mkdir(parents=True)
    keys = {"task": "own", "prompt": "{text}", "verbalizers": "a,b"}
    record = {"config": keys, "task_used": "own"}
    (root / "saved" / "config.json").write_text(json.dumps(record))
    (root / "saved" / "results.json").write_text(json.dumps(results))
    shutil.copytree(root / "saved", root / "images")
    settings = {"architectures": ["ResNetForImageClassification"]}
    (root / "images" / "model" / "config.json").write_text(json.dumps(settings))
    (root / "bare.csv").write_text("a,b\n1,2\n")
    return root


def test_commands_that_fail_or_only_read_do_not_import_torch(places):
    nowhere, model = str(places / "nowhere"), str(places / "model")
    app = str(Path(__file__).parents[1] / "simulations" / "quickstart")
    wrong = {
        f"model={nowhere}": f"{nowhere!r} does not exist",
        "model=random:nope": "no architecture 'nope'",
        f"data-path={nowhere}": f"{nowhere!r} does not exist",
        "cut-layer=9": OUTSIDE,
    }
    expected = [
        (["keys"], 0, "| `cut-layer` |"),
        (["--help"], 0, "simulate"),
        (["--version"], 0, "hosl-flower"),
        *(([command, nowhere], 1, "cannot be read") for command in ("run", "simulate", "plan")),
        *(
            ([command, app, "-c", own], 1, said)
            for command in ("run", "simulate", "plan")
            for own, said in wrong.items()
        ),
        *(
            (["run", app, "-c", f"model={name}", "-c", "cut-layer=9"], 1, OUTSIDE)
            for name in (model, "some/opt")
        ),
        (["run", app, "-c", "task=sst2", "-c", f"data-path={nowhere}"], 1, "data path"),
        (["export", nowhere, str(places / "out")], 1, "is no run directory"),
        (["export", str(places / "run"), str(places / "out")], 1, "has no saved model"),
        (["generate", nowhere, "a"], 1, f"{nowhere!r} does not exist"),
        (["generate", "no/where", "a"], 1, "'no/where' is no directory"),
        (["generate", model, "a", "--cut-layer", "9"], 1, OUTSIDE),
        (["generate", str(places / "images"), "a"], 1, "use `hosl-flower predict"),
        (["compare", nowhere], 1, "cannot be read"),
        (["report", nowhere], 1, "is no run directory"),
        (["predict", nowhere, "a"], 1, "is no run directory"),
        (["predict", str(places / "run"), "a"], 1, "has no saved model"),
        (["evaluate", nowhere, "a.csv"], 1, "is no run directory"),
    ]
    saved, bare = str(places / "saved"), str(places / "bare.csv")
    reading = [  # data, with the datasets library
        (["predict", saved, "--file", bare], 1, "has no column 'text'"),
        (["predict", saved, "--file", nowhere], 1, f"{nowhere!r} does not exist"),
        (["evaluate", saved, bare], 1, "has no column 'text'"),
    ]
    drawing = (["report", str(places / "run"), "--out", str(places / "a.html")], 0, "report: ")
    used = [[]] * len(expected) + [["datasets"]] * len(reading) + [["datasets", "matplotlib"]]
    expected += [*reading, drawing]
    commands = [arguments for arguments, _, _ in expected]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands), json.dumps(SLOW)],
        env={**os.environ, "HF_HUB_CACHE": str(places / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    for (arguments, code, said), (exit_code, output, slow), known in zip(
        expected, told, used, strict=True
    ):
        assert exit_code == code, (arguments, output)
        assert said in output, (arguments, output)
        assert slow == known, arguments


def test_blocks_by_config_json_are_those_of_the_family():
    for name, settings in known_architectures().items():
        config = architecture(name)
        assert blocks_of(settings) == family_of(config).count(config), name
        assert blocks_of(config.to_dict()) == blocks_of(settings), name  # as it is saved


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_hidden_layers": "4"}, {"num_hidden_layers": 2, "n_layer": 3},
     {"model_type": "resnet", "depths": 3}, {"num_hidden_layers": True}],
)  # fmt: skip
def test_blocks_that_config_json_does_not_say_are_left_to_the_model(settings):
    assert blocks_of(settings) is None


def test_adapters_are_left_to_their_base_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "opt", "num_hidden_layers": 4}')
    with pytest.raises(ConfigError, match=OUTSIDE):
        check_model(str(tmp_path), 9)
    check_model(str(tmp_path), 4)
    (tmp_path / "adapter_config.json").write_text("{}")
    check_model(str(tmp_path), 9)
