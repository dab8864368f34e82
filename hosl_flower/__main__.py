"""The command `hosl-flower`, which is also `python -m hosl_flower`."""

import sys

from hosl_flower.system.signals import exit_when_told


def main() -> None:
    """Run the command line."""
    exit_when_told()  # before seconds of imports
    try:
        from hosl_flower.cli import cli
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "hosl_flower":
            raise
        sys.exit(
            f"error: {sys.executable} has no package {error.name!r}, which hosl-flower needs; "
            "activate the environment that has them, after `make run` with: . .venv/bin/activate"
        )
    except KeyboardInterrupt:
        sys.exit(130)
    # what is said may have characters that the terminal's encoding lacks
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    cli()


if __name__ == "__main__":
    main()
