"""What a client process does not use it does not import: memory, and seconds of every start."""

import json
import subprocess
import sys

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
