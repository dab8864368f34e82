"""One run of an experiment, in a process of its own: `python -m hosl_flower.cell < request`."""

import json
import sys
from pathlib import Path

from hosl_flower.cells import DIVERGED
from hosl_flower.config import parse_config
from hosl_flower.errors import DivergedError, HoslError
from hosl_flower.local_flower import run_flower_app
from hosl_flower.server_app import load_strategy, log_to_stderr
from hosl_flower.signals import exit_when_told


def main() -> None:
    """The request is JSON: keys, a run config; flower_app, a directory, or "" for in process."""
    request = json.loads(sys.stdin.read())
    keys, app = request["keys"], request["flower_app"]
    try:
        if app:
            run_flower_app(Path(app), keys, "", Path(keys["output-dir"]))
        else:
            log_to_stderr()
            load_strategy(parse_config(keys)).run_in_process()
    except DivergedError as error:
        (Path(keys["output-dir"]) / keys["run-name"] / DIVERGED).write_text(
            f"{error}\n", encoding="utf-8"
        )
        print(f"diverged: {error}", file=sys.stderr)
    except HoslError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    exit_when_told()
    main()
