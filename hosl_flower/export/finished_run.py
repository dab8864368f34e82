"""A finished run's directory, read without torch: what is wrong with it is said at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from hosl_flower.config.parse import parse_recorded
from hosl_flower.config.run_config import RunConfig
from hosl_flower.config.task_from_config import task_from_config
from hosl_flower.errors import CheckpointError, ConfigError
from hosl_flower.models.before_loading import check_model
from hosl_flower.models.checkpoints import hub
from hosl_flower.run.run_files import ConfigFile, Read, ResultsFile
from hosl_flower.system.untrusted_files import check_tree, parse_json, read_json, read_regular
from hosl_flower.tasks.known import TASKS
from hosl_flower.tasks.known_images import IMAGE_TASKS
from hosl_flower.tasks.task import Task


@dataclass(frozen=True)
class Finished:
    """A run directory. record: its config.json; results: its results.json."""

    directory: Path
    config: RunConfig
    record: ConfigFile
    results: ResultsFile

    @property
    def model(self) -> Path:
        """Where it saved its model."""
        return self.directory / "model"

    @property
    def has_adapters(self) -> bool:
        """Whether what it saved are adapters."""
        return (self.model / "adapter_config.json").is_file()

    @property
    def is_classifier(self) -> bool:
        """Whether the saved model has a head of classes and no words to write."""
        settings = _read(self.model, "config.json")  # adapters have none, nor are they classifiers
        kinds = settings.get("architectures") if isinstance(settings, dict) else None
        return isinstance(kinds, list) and str(kinds[:1]).endswith("Classification']")

    @property
    def task(self) -> Task:
        """The task as the run used it: after a fallback not the one that was asked for.

        Raises:
            CheckpointError: where config.json names a task that does not exist.
        """
        used = self.record.task_used
        if used == self.config.task.name:
            return task_from_config(self.config)
        known = {**TASKS, **IMAGE_TASKS}
        if used not in known:
            raise CheckpointError(
                f"{self.directory / 'config.json'}, task_used: no task {used!r}; expected "
                f"{self.config.task.name!r} or one of {', '.join(known)}"
            )
        return known[used]


def read_run(directory: Path) -> Finished:
    """A finished run. Raises CheckpointError when the directory is none, has no model, or has one
    with links that lead out of it."""
    record = _read(directory, "config.json")
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise CheckpointError(
            f"{directory} is no run directory: expected a config.json that a run wrote; runs are "
            "under output-dir, each in a directory of its own"
        )
    results = _read(directory, "results.json")
    if results is None:
        raise CheckpointError(
            f"{directory} is no finished run, it has no results.json: wait for its end, or let it "
            "go on with resume"
        )
    config = parse_recorded(record["config"], str(directory))
    run = Finished(
        directory,
        config,
        _typed(directory / "config.json", ConfigFile, record),
        _typed(directory / "results.json", ResultsFile, results),
    )
    if not run.model.is_dir():
        why = (
            "it was not saved to the end, its log says why: resume writes it if there is a "
            "checkpoint of the last step"
            if config.run.save_model
            else "train with save-model = true (here it was false)"
        )
        raise CheckpointError(f"{directory} has no saved model, expected {run.model}: {why}")
    check_tree(directory, run.model)
    return run


def _read(directory: Path, name: str) -> Any:
    """What a JSON file holds; None where there is no such file."""
    try:
        return read_json(directory, directory / name)
    except (FileNotFoundError, NotADirectoryError):
        return None


_Model = TypeVar("_Model", bound=Read)


def _typed(path: Path, model: type[_Model], value: Any) -> _Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise CheckpointError(
            f"{path}, {where}: {first['msg']}; expected a file that a run wrote"
        ) from error


def check_source(source: str, cut: int | None) -> None:
    """Refuse what can be neither a finished run nor a model, and a cut outside it.

    Args:
        source: a run directory; or a model directory, hub id or `random:<architecture>`.
        cut: where to cut it; None for where the run did.

    Raises:
        CheckpointError: for a run that cannot be read.
        ModelError: for a model that is not there.
        ConfigError: for an unknown architecture, a wrong cut, or the run of a classifier.
    """
    if is_run(source):
        run = read_run(Path(source).expanduser())
        if run.is_classifier:
            raise ConfigError(
                f"{source} is a run of a classifier, which writes no text; use `hosl-flower "
                f"predict {source}` for labels and probabilities"
            )
        check_model(str(run.model), run.config.cut_layer if cut is None else cut)
    else:
        check_model(source, cut, find=hub.fetch)


def is_run(source: str) -> bool:
    """Whether a directory's config.json is of a run: a model's, which may be a link, has no key
    "config"."""
    try:
        path = Path(source).expanduser() / "config.json"
        return "config" in parse_json(read_regular(path))
    except (OSError, RuntimeError, ValueError, TypeError, CheckpointError):
        return False
