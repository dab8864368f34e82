"""What a client must know to take part: everything, in one small JSON that travels with
the messages. A client never reads the server's files or environment."""

import os

from pydantic.dataclasses import dataclass

from hosl_flower.config.client_spec import ClientSpec, client_spec
from hosl_flower.config.run_config import RunConfig
from hosl_flower.config.task_from_config import task_from_config
from hosl_flower.errors import ConfigError, ModelError
from hosl_flower.models.architectures import RANDOM, known_architectures
from hosl_flower.models.base_model import check_cut, open_base
from hosl_flower.models.checkpoints import hub
from hosl_flower.tasks.known import BUNDLED_TASK, TASKS
from hosl_flower.tasks.known_images import IMAGE_TASKS

FALLBACK_IMAGE_TASK = "digits"


@dataclass(frozen=True)
class Resolved:
    """A run configuration with model and data settled. notice: of a fallback, a sentence a line."""

    spec: ClientSpec
    notice: str


def resolve(config: RunConfig, run: str, client_head: bool = False) -> Resolved:
    """Settle which model and data a run uses, on the server, before anything is loaded.

    Without hub and cache, and with offline-fallback, a hub model becomes its architecture with
    random weights and a hub data set becomes bundled data, the SMS collection or digits. Raises
    ConfigError or ModelError otherwise.
    """
    notes = []
    model = config.model
    if not model.startswith(RANDOM):
        try:
            check_cut(open_base(model).config, config.cut_layer)
            model = _absolute(model) if hub.local_directory(model) else model
        except ModelError as error:
            model = _fallback_model(config, error)
            notes.append(f"{config.model} -> the same architecture with RANDOM weights")
    config_task, source = task_from_config(config), config.data.path
    if not source:
        source = config_task.source
        hub_task = source.startswith("hub:")
        if hub_task and (notes or not _has_data(source)):
            if not config.offline_fallback:
                raise ConfigError(
                    f"data set {source.removeprefix('hub:')} is neither on a reachable hub"
                    f"{hub.proxy_note()} nor cached, and offline-fallback is false; set data-path "
                    "to a local copy"
                )
            images = bool(config_task.image)
            what = "bundled images of digits" if images else "bundled SMS collection"
            config_task = IMAGE_TASKS[FALLBACK_IMAGE_TASK] if images else TASKS[BUNDLED_TASK]
            notes.append(f"task {config.task.name} -> {config_task.name}, the {what}")
            source = config_task.source
    source = source if _is_no_path(source) else _absolute(source)
    spec = client_spec(config, run, model, config_task, source, client_head)
    return Resolved(spec, _notice(notes))


def _is_no_path(source: str) -> bool:
    """Hub and bundled sources, and none at all where every node has its own data."""
    return not source or source.startswith(("hub:", "bundled:"))


def _absolute(path: str) -> str:
    """A local path that means the same in a worker process with another current directory."""
    return os.path.abspath(os.path.expanduser(path))


def _fallback_model(config: RunConfig, error: ModelError) -> str:
    """random:<architecture> for a known hub model that cannot be had; else the error."""
    architecture = config.model.rpartition("/")[2].lower()
    is_hub_model = config.model.count("/") == 1 and not config.model.startswith((".", "/", "~"))
    unreachable = not hub.is_reachable()
    known = known_architectures()
    if is_hub_model and unreachable and config.offline_fallback and architecture in known:
        return f"{RANDOM}{architecture}"
    if is_hub_model and unreachable and not config.offline_fallback:
        raise ModelError(f"{error} (offline-fallback is false)") from error
    raise error


def _has_data(source: str) -> bool:
    """Whether a hub data set can be had: the hub answers, or it is in the datasets cache."""
    import datasets

    repository, _, configuration = source.removeprefix("hub:").rpartition("/")
    folder = repository.replace("/", "___")
    cached = os.path.join(datasets.config.HF_DATASETS_CACHE, folder, configuration)
    return hub.is_reachable() or os.path.isdir(cached)


def _notice(notes: list[str]) -> str:
    if not notes:
        return ""
    proxy = hub.proxy_note()
    first = f"NOT A RESULT: the Hugging Face hub cannot be reached{proxy} and nothing is cached."
    return "\n".join([first, *(f"{note}." for note in notes)])


def banner(notice: str) -> list[str]:
    """The lines of a notice in a frame; none where there is none."""
    lines = notice.splitlines()
    if not lines:
        return []
    width = max(map(len, lines)) + 4
    body = [f"* {line.ljust(width - 4)} *" for line in lines]
    return ["*" * width, *body, "*" * width]
