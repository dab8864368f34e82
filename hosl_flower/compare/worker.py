"""One run of an experiment in a process of its own.

python -m hosl_flower.compare.worker < request
"""

import json
import sys
from pathlib import Path

from hosl_flower.compare.outcome import DIVERGED
from hosl_flower.config.parse import parse_config
from hosl_flower.errors import DivergedError, HoslError, printable
from hosl_flower.flower.local_run import run_flower_app
from hosl_flower.methods.load import load_method
from hosl_flower.run.run_log import log_to_stderr
from hosl_flower.run.start import run_in_process
from hosl_flower.system.signals import exit_when_told
from hosl_flower.system.whole_files import put


def main() -> None:
    """The request is JSON: keys, a run config; flower_app, a directory, or "" for in process."""
    request = json.loads(sys.stdin.read())
    keys, app = request["keys"], request["flower_app"]
    try:
        if app:
            run_flower_app(Path(app), keys, "", Path(keys["output-dir"]))
        else:
            log_to_stderr()
            run_in_process(load_method(parse_config(keys)))
    except DivergedError as error:
        print(f"diverged: {error}", file=sys.stderr)
        path = Path(keys["output-dir"]) / keys["run-name"] / DIVERGED
        try:
            put(path, printable(str(error)) + "\n")
        except OSError as full:
            raise SystemExit(f"{path} cannot be written: {full}") from None
    except HoslError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    exit_when_told()
    main()
