"""The model card of an exported model: what it is, what it can do, how it was made.

It may be published, so of local paths it has the last name alone, and no key that says where
things are or how they travelled.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hosl_flower.config.parse import parse_config
from hosl_flower.config.rules import KEYS_FREE_TO_CHANGE
from hosl_flower.config.run_config import RunConfig
from hosl_flower.config.value_types import Scalar
from hosl_flower.errors import CheckpointError, printable
from hosl_flower.export import markdown
from hosl_flower.export.finished_run import Finished
from hosl_flower.export.usage import usage
from hosl_flower.models.architectures import RANDOM
from hosl_flower.models.base_model import load_model_config
from hosl_flower.models.class_head import class_names
from hosl_flower.models.families.registry import family_of
from hosl_flower.run.run_files import Evaluation
from hosl_flower.system.untrusted_files import read_regular
from hosl_flower.tasks.prompt_template import fields_of

_MOST_CARD = 1 << 20  # bytes of a base model's card
# the fields of the header about terms, as the hub has them
_TERMS = {
    "license": re.compile(r"[A-Za-z0-9.+_-]{1,60}"),
    "license_name": re.compile(r"[^\n]{1,100}"),
    "license_link": re.compile(r"\S{1,500}"),
}
_ALWAYS = ("strategy", "model", "cut-layer", "task", "steps", "seed")  # also as by default
_RELATIONS = {"model": "finetune", "adapters": "adapter"}  # in the hub's words
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSequenceClassification": "text-classification",
}
WHAT = {
    "model": "the whole model, merged: for `{auto}.from_pretrained`",
    "adapters": "LoRA adapters of both halves: for `PeftModel.from_pretrained`, over the base",
    "client": "HALF a model: embeddings and the first {cut} blocks. Give this directory as "
    "`model-path` to a SuperNode or to `hosl_flower.models.base_model.open_base`; `load_client` "
    "loads it",
    "server": "HALF a model: the blocks after the first {cut}, final norm and LM head. Give this "
    "directory to `hosl_flower.models.base_model.open_base`; `load_server` loads it",
}


def model_card(run: Finished, what: str) -> ModelCard:
    """The card of a finished run's model; what: a key of WHAT. CheckpointError when the run's files
    do not say enough."""
    if not run.results.evaluations:
        raise CheckpointError(f"{run.directory / 'results.json'} has no evaluations for the card")
    terms, license_line = _license(run)
    header = ModelCardData(
        base_model=_hub_base(run),
        base_model_relation=_RELATIONS.get(what) if _hub_base(run) else None,
        library_name="peft" if what == "adapters" else "transformers",
        pipeline_tag=_PIPELINES[_auto(run)] if what in _RELATIONS else None,
        tags=["hosl-flower", "split-learning", "federated-learning", printable(run.results.method)],
        datasets=_hub_data(run),
        **terms,
    )
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {_base(run)}, trained on {markdown.plain(run.task.name)}",
    ]
    if run.results.notice:
        parts.append(markdown.block(run.results.notice))
    if not run.results.pretrained:
        parts.append("**The base model had random weights: what is measured here is no result.**")
    parts.append("\n".join(_description(run, what)))
    if what in _RELATIONS:
        parts.append(_usage(run, what))
    parts += ["\n".join(_results(run)), _origin(run)]
    return ModelCard("\n\n".join([*parts, license_line]) + "\n")


def _description(run: Finished, what: str) -> Iterator[str]:
    """The list of what it is."""
    results, clients, task = run.results, run.config.clients.count, run.task
    here = WHAT[what].format(cut=run.config.cut_layer, auto=_auto(run))
    yield f"- What is here: {here}."
    yield f"- Base model: {_base(run)}."
    yield (
        f"- Method: {markdown.plain(results.method)} ({markdown.code(run.config.strategy)}) of "
        f"hosl-flower: split federated fine-tuning, {results.steps} steps, "
        f"{clients} client{'s' * (clients > 1)}."
    )
    yield f"- Cut layer: {run.config.cut_layer}, the number of blocks that clients held."
    yield f"- Task: {markdown.plain(task.name)}. Training data: {_data(run)}."
    if _auto(run) == "AutoModelForCausalLM":
        answer = f", by label: {_quoted(task.verbalizers)}"
        follows = ": the answer, one line of text" if task.target else answer
        yield f"- Prompt, as TOML: {markdown.code(_toml(task.prompt))}; what comes next{follows}."
        return
    if not task.image:
        pair = " as a pair" * (len(task.fields) > 1)
        yield f"- Text: {_quoted(task.fields)} of the data{pair}, without a prompt."
    yield f"- Classes, by label: {_quoted(class_names(task))}."


def _quoted(words: Iterable[str]) -> str:
    return ", ".join(map(markdown.code, words))


def _usage(run: Finished, what: str) -> str:
    """The code that predicts with the model."""
    local = _last(run.record.model_used) if _is_local(run) else run.record.model_used
    code = usage(run, local if what == "adapters" else "")
    notes = []
    if what == "adapters" and _is_local(run):
        notes.append("Replace the name of the base model by the path of its directory.")
    if len(fields_of(run.task.prompt)) > 1 and _auto(run) == "AutoModelForCausalLM":
        notes.append(
            f"`hosl-flower predict` cuts the longest column of examples that have more than "
            f"{run.config.task.max_length} tokens. This code does not."
        )
    return "\n\n".join(["## Use the model", markdown.block(code, "python"), *notes])


def _results(run: Finished) -> Iterator[str]:
    """The table of held-out results, before and after training."""
    first, last = run.results.evaluations[0], run.results.evaluations[-1]
    yield f"## Results\n\nOn {run.results.held_out_examples} held-out examples, in the run:\n"
    yield f"| | step {first.step} | step {last.step} |"
    yield "|---|---|---|"
    for key in ("accuracy", "balanced_accuracy", "f1", "exact_match", "loss"):
        before, after = _figure(first, key), _figure(last, key)
        if after:
            yield f"| {key.replace('_', ' ')} | {before} | {after} |"
    if majority := _figure(last, "majority_accuracy"):
        yield f"\nThe most frequent label, always answered: accuracy {majority}."
    differences = list(_differences(run.config))
    if differences:
        yield f"\nWhat was evaluated there is not quite what is here: {'; '.join(differences)}."


def _figure(evaluation: Evaluation, key: str) -> str:
    """Of an evaluation; empty where it was not measured."""
    value: float | None = getattr(evaluation, key)
    return "" if value is None or math.isnan(value) else f"{value:.4f}"


def _differences(config: RunConfig) -> Iterator[str]:
    if config.client.quantization != "none":
        yield (
            f"the client's frozen weights were in {config.client.quantization}, here they are the "
            "base model's own"
        )
    if config.dtype != "float32":
        yield f"the client computed in {config.dtype}"
    if config.codec != "exact":
        yield f"activations travelled as {config.codec}"
    if config.update_codec != "exact":
        yield f"clients' updates travelled as {config.update_codec}"


def _origin(run: Finished) -> str:
    """How it was made: keys, command, versions."""
    keys = "\n".join(f"{key} = {_toml(value)}" for key, value in _keys(run).items())
    versions = ", ".join(f"{name} {number}" for name, number in run.record.versions.items())
    where = markdown.plain(f"{versions}, Python {run.record.python}; {run.record.machine}")
    config = markdown.block(f"[tool.flwr.app.config]\n{keys}", "toml")
    return (
        "## How it was made\n\n"
        "The run's keys without most defaults and what does not change the numbers, for the "
        f"`pyproject.toml` of a Flower app `APP`{_bare(run)}:\n\n"
        f"{config}\n\n"
        "```sh\npython -m hosl_flower run APP\n```\n\n"
        f"Versions: {where}."
    )


def _keys(run: Finished) -> dict[str, Scalar]:
    """The keys that make the run what it is; local paths without their directory."""
    defaults = parse_config({}).as_keys()
    keys = {
        key: value
        for key, value in run.config.as_keys().items()
        if key in _ALWAYS or (key not in KEYS_FREE_TO_CHANGE and value != defaults[key])
    }
    local = _local(run)
    return {key: _last(str(value)) if key in local else value for key, value in keys.items()}


def _local(run: Finished) -> list[str]:
    """The keys that are local paths."""
    data = run.config.data.path
    local = {"model": _is_local(run), "data-path": bool(data) and ":" not in data}
    return [key for key, is_path in local.items() if is_path]


def _bare(run: Finished) -> str:
    """What is to be put in place of names without their directory."""
    local = _local(run)
    if not local:
        return ""
    return f", with the paths you have them at in place of the bare names ({', '.join(local)})"


def _toml(value: Scalar) -> str:
    """Of such scalars JSON is the same as TOML."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)


def _is_local(run: Finished) -> bool:
    """Whether the base model was a directory: what a run used is an absolute path then."""
    return Path(run.record.model_used).is_absolute()


def _auto(run: Finished) -> str:
    """transformers' class that loads the model."""
    if run.has_adapters:  # which no classifier has
        return "AutoModelForCausalLM"
    return family_of(load_model_config(str(run.model))).auto.__name__


def _hub_base(run: Finished) -> str | None:
    """The base model's hub id, if it has one."""
    model = run.record.model_used
    try:
        validate_repo_id(model)
    except HFValidationError:  # a directory, or random weights
        return None
    return model


def _base(run: Finished) -> str:
    model = run.record.model_used
    if model.startswith(RANDOM):
        return f"{markdown.plain(model.removeprefix(RANDOM))} with random weights"
    local = f"{markdown.plain(_last(model))} (a local directory)"
    return local if _is_local(run) else markdown.plain(model)


def _source(run: Finished) -> str:
    """Where the data came from, as in a task, or a path; empty where each node had its own."""
    return run.config.data.path or run.task.source


def _data(run: Finished) -> str:
    source = _source(run)
    if source == "bundled:digits":
        return "Optical Recognition of Handwritten Digits (CC BY 4.0), bundled with hosl-flower"
    if source.startswith("bundled:"):
        return "the SMS Spam Collection (CC BY 4.0), bundled with hosl-flower"
    if source.startswith("hub:"):
        return f"{markdown.plain(source.removeprefix('hub:'))} of the Hugging Face hub"
    local = f"{markdown.code(_last(source))}, a local file or directory"
    return local if source else "each node's own"


def _hub_data(run: Finished) -> list[str] | None:
    source = _source(run)
    hub = source.startswith("hub:")
    return [source.removeprefix("hub:").rpartition("/")[0]] if hub else None


def _last(path: str) -> str:
    """The last name of a path."""
    return os.path.basename(path.rstrip("/"))


def _license(run: Finished) -> tuple[dict[str, Any], str]:
    """(fields of the header, a line about them): what the base model's card says, if it is on
    this machine."""
    said = _base_header(run)
    terms = {
        name: value
        for name, allowed in _TERMS.items()
        if isinstance(value := said.get(name), str)
        and value.isprintable()
        and allowed.fullmatch(value)
    }
    if "license" in terms:
        known = markdown.plain(terms["license"])
        return terms, f"License: {known}, that of the base model by its card."
    if run.record.model_used.startswith(RANDOM):
        return {}, "License: not given here; there is no base model with a license of its own."
    return {}, (
        "License: not given here, the base model's card was not found where this was exported, or "
        "names none. See the base model for its terms."
    )


def _base_header(run: Finished) -> dict[str, Any]:
    """What the YAML header of the base model's card says; empty where there is none."""
    model = run.record.model_used
    if _is_local(run):
        path = Path(model, "README.md")
    elif _hub_base(run) is None:
        return {}
    else:
        path = Path(str(try_to_load_from_cache(model, "README.md", constants.HF_HUB_CACHE)))
    try:
        text = read_regular(path, _MOST_CARD).decode()
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # not there, or whatever yaml makes of a damaged header
        return {}
