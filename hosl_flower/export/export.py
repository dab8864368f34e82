"""A finished run's model as a directory to keep, give away or publish, with a card.

    model      config, weights and tokenizer of the merged model
    adapters   LoRA adapters of both halves, for peft
    client     the client's half: its tensors under their names in the whole model, and no others
    server     the server's half, likewise

A half is a model directory for its own side: `split.load_client` (or `load_server`) reads it as it
would read its part of the whole. `split.json` says which half it is and where the cut was.
"""

import json
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from hosl_flower.errors import ConfigError, HoslError
from hosl_flower.export.finished_run import Finished, read_run
from hosl_flower.export.model_card import WHAT, model_card
from hosl_flower.export.trained_model import trained_model
from hosl_flower.models.base_model import open_base
from hosl_flower.models.processors import load_processor
from hosl_flower.models.save_merged import save_merged


def export_run(run: Path, directory: Path, what: str = "model") -> Path:
    """Write a finished run's model to a directory that is not there yet, or empty; where it is.

    what: "model", "adapters", "client" or "server". The directory appears whole or not at all.
    Raises ConfigError for what cannot be, CheckpointError for a run or model that cannot be read,
    HoslError when there is no room.
    """
    if what not in WHAT:
        raise ConfigError(f"--what = {what!r} is none of {', '.join(WHAT)}")
    directory = directory.expanduser().absolute()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ConfigError(f"{directory} is there already and not empty; name another directory")
    finished = read_run(run.expanduser().absolute())
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # beside it, so that the last step is a rename
        with tempfile.TemporaryDirectory(
            dir=directory.parent, prefix=f".{directory.name}."
        ) as temporary:
            part = Path(temporary) / "part"
            _write(finished, part, what)
            model_card(finished, what).save(part / "README.md")
            if directory.exists():
                directory.rmdir()
            part.rename(directory)
    except (OSError, SafetensorError) as error:
        raise HoslError(f"{directory} cannot be written: {error}") from error
    return directory


def _write(run: Finished, directory: Path, what: str) -> None:
    """All but the card."""
    if what == "adapters":
        _check_adapters(run)
        _copy(run.model, directory)
    elif what == "model" and not run.has_adapters:
        open_base(str(run.model))  # a damaged one is not to be copied
        _copy(run.model, directory)
    else:
        _write_sides(run, directory, ("client", "server") if what == "model" else (what,))


def _copy(source: Path, directory: Path) -> None:
    """Files alone, as new ones: not their modes, which may be of an owner who shares nothing."""
    directory.mkdir(parents=True)
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            _copy(entry, directory / entry.name)
        else:
            shutil.copyfile(entry, directory / entry.name)


def _check_adapters(run: Finished) -> None:
    config = run.config
    if not config.client.trainable == config.server.trainable == "lora":
        raise ConfigError(
            f"{run.directory} has no adapters to export: they need client-trainable and "
            f"server-trainable = lora and save-format = adapters, here they were "
            f"{config.client.trainable}, {config.server.trainable} and {config.run.save_format}"
        )
    if not run.has_adapters:
        raise ConfigError(
            f"{run.directory} merged its adapters into the weights when it saved its model, and "
            "they cannot be taken out again: train with save-format = adapters"
        )


def _write_sides(run: Finished, directory: Path, sides: tuple[str, ...]) -> None:
    """One half, or the whole of two."""
    trained = trained_model(run)
    tensors = {}
    for side in sides:
        half = trained.client() if side == "client" else trained.server()
        tensors.update(half.merged_parameters())
    processor = load_processor(trained.tokenizer, trained.base.config)
    save_merged(directory, trained.base, tensors, {}, processor)
    if len(sides) == 1:
        split = {"side": sides[0], "cut_layer": trained.cut, "blocks": trained.base.blocks}
        (directory / "split.json").write_text(json.dumps(split, indent=2) + "\n", encoding="utf-8")
