"""`python -m hosl_flower`."""

import sys

try:
    from hosl_flower.cli import cli
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] == "hosl_flower":
        raise
    sys.exit(
        f"error: {sys.executable} has no package {error.name!r}, which hosl-flower needs; activate "
        "the environment that has them, after `make run` with: . .venv/bin/activate"
    )

if __name__ == "__main__":
    cli(prog_name="python -m hosl_flower")
