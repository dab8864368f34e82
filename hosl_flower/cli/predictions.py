"""Commands that use the model of a finished run on new data: predict and evaluate."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hosl_flower.cli.group import on_terminal
from hosl_flower.errors import ConfigError, HoslError
from hosl_flower.export.finished_run import read_run
from hosl_flower.system.whole_files import put

_SHOWN = 5  # labels that each have a column on a terminal, at most

Run = Annotated[Path, typer.Argument(help="Directory of a finished run.")]
Row = dict[str, Any]  # inputs: by column; label, probabilities by label; or answer


def predict(
    run: Run,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to classify, or paths of image files.", show_default=False),
    ] = None,
    file: Annotated[
        str,
        typer.Option(
            help="Read the examples from this file: a table with the columns of the prompt, or a "
            "folder or a table of images. Labels in it are ignored."
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Write the predictions to this file: .csv, .json or .jsonl."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = (
        False
    ),
) -> None:
    """Predict labels and their probabilities with the model of a finished run.

    If the run generates answers, predict prints the answers. On a terminal, the output is a table,
    elsewhere it is CSV.
    """
    if bool(inputs) == bool(file):
        raise ConfigError(
            "expected texts (or image files) after the run directory, or a file with --file, but "
            f"{'both' if file else 'neither'} were given"
        )
    if out is not None and out.suffix not in (".csv", ".json", ".jsonl"):
        raise ConfigError(f"--out = {str(out)!r}: expected a name that ends in .csv, .json, .jsonl")
    finished = read_run(run.expanduser().absolute())
    task = finished.task
    from hosl_flower.data.inference import file_inputs, given_inputs

    examples = given_inputs(inputs, task) if inputs else file_inputs(file, task)
    from hosl_flower.export.predict import Predictor

    rows = _rows(Predictor(finished), examples)
    if out is not None:
        text = _json_lines(rows) if out.suffix != ".csv" else _csv(rows)
        try:
            put(out.expanduser(), text)
        except OSError as error:
            raise HoslError(f"--out = {str(out)!r} cannot be written: {error}") from error
        typer.echo(f"predictions: {out}")
    elif as_json or not on_terminal():
        typer.echo(_json_lines(rows) if as_json else _csv(rows), nl=False)
    else:
        Console().print(_table(rows))


def evaluate(
    run: Run,
    data: Annotated[
        str,
        typer.Argument(
            help="Labeled data: a file, a directory or a hub data set, as data-path takes it. If "
            "the data have a held-out part, that part is used."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate the model of a finished run on labeled data.

    The figures are those of the run's own evaluation: loss, accuracy, balanced accuracy and the
    accuracy of the majority class, or exact match and F1 of generated answers.
    """
    finished = read_run(run.expanduser().absolute())
    task = finished.task
    from hosl_flower.data.inference import labeled_examples

    where, examples = labeled_examples(data, task)
    from hosl_flower.export.predict import Predictor

    score = Predictor(finished).evaluate(examples)
    if as_json:
        typer.echo(json.dumps({"data": where, "examples": score.examples, **score.metrics()}))
        return
    typer.echo(f"{'examples':<20}{score.examples}  ({where})")
    for name, value in score.metrics().items():
        typer.echo(f"{name.replace('_', ' '):<20}{value:.4f}")


def _rows(predictor: Any, examples: Any) -> Iterator[Row]:
    """Each example's inputs with its label and probabilities, or with its generated answer."""
    task = predictor.task
    names = [task.image] if task.image else task.fields
    inputs = (
        {name: _shown(example[name], number) for name in names}
        for number, example in enumerate(examples, start=1)
    )
    if task.target:
        for own, answer in zip(inputs, predictor.answers(examples), strict=True):
            yield {"inputs": own, "answer": answer}
        return
    for own, found in zip(inputs, predictor.probabilities(examples), strict=True):
        shares = dict(zip(predictor.labels, found, strict=True))
        yield {"inputs": own, "label": max(shares, key=shares.__getitem__), "probabilities": shares}


def _shown(value: Any, number: int) -> str:
    """A text, or the path of an image, or its number where it has no path."""
    return value if isinstance(value, str) else value["path"] or f"image {number}"


def _json_lines(rows: Iterator[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _flat(rows: Iterator[Row], most: int = sys.maxsize) -> Iterator[dict[str, str]]:
    """Rows of a table. If there are more labels than `most`, only the likeliest is in it."""
    for row in rows:
        if "answer" in row:
            yield row["inputs"] | {"answer": row["answer"]}
            continue
        label, shares = row["label"], row["probabilities"]
        shown = {f"p({name})": p for name, p in shares.items()}
        if len(shares) > most:
            shown = {"probability": shares[label]}
        yield row["inputs"] | {"label": label} | {name: f"{p:.6f}" for name, p in shown.items()}


def _csv(rows: Iterator[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, row in enumerate(_flat(rows)):
        if not number:
            writer.writerow(row)
        writer.writerow(row.values())
    return text.getvalue()


def _table(rows: Iterator[Row]) -> Table:
    table = Table()
    for row in _flat(rows, _SHOWN):
        if not table.columns:
            for name in row:
                table.add_column(Text(name), overflow="fold")
        table.add_row(*map(Text, row.values()))
    return table
