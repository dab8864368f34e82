"""`python -m hosl_flower`."""

from hosl_flower.cli import cli

if __name__ == "__main__":
    cli(prog_name="python -m hosl_flower")
