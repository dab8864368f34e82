"""Whole runs in process: reviews a tiny OPT can be trained on, and a factory of finished runs."""

import contextlib
import csv
import json
from unittest import mock

from hosl_flower.config.parse import parse_config
from hosl_flower.run.start import run_in_process
from hosl_flower.tensors.seeds import permutation

PROMPT = "{text} It was"
WORDS = {0: ["awful", "dull", "bad", "boring"], 1: ["lovely", "great", "fine", "superb"]}


def write_reviews(directory, train=40, held_out=24):
    directory.mkdir(exist_ok=True)
    for name, count, salt in (("train", train, 0), ("validation", held_out, 1)):
        with (directory / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for i, k in enumerate(permutation(count, salt)):
                word = WORDS[i % 2][k % 4]
                writer.writerow([f"a {word} film, number {k} of {i % 40 * 'very '}many", i % 2])
    return directory


def question(text, *answers, **more):
    own = [{"text": answer, "answer_start": 0} for answer in answers]
    return {"id": text, "question": text, "answers": own, **more}


def squad_file(path, *paragraphs, version="1.1"):
    """paragraphs: (context, questions)."""
    articles = [
        {"title": f"T{n}", "paragraphs": [{"context": context, "qas": questions}]}
        for n, (context, questions) in enumerate(paragraphs)
    ]
    path.write_text(json.dumps({"data": articles, "version": version}))


CITIES = ["New York", "York City"]  # it learns to say the first; of the second that is half


def write_questions(directory):
    """SQuAD's two files, of so few words that a tiny model learns an answer."""
    directory.mkdir()
    for name, cities in (("train", CITIES[:1] * 12), ("dev", CITIES * 2)):
        articles = (
            (f"{city} is a city.", [question(f"Where {n}?", city, "x")])
            for n, city in enumerate(cities)
        )
        squad_file(directory / f"{name}-v1.1.json", *articles)
    return directory


def run_factory(strategy, tiny_opt, tmp_path, **own):
    """make(**config) -> (results, run directory, config); own: defaults of this factory.

    With method=None nothing is run.
    """
    model, _ = tiny_opt(vocab_size=50272, max_position_embeddings=128)
    data = write_reviews(tmp_path / "reviews")
    defaults = {
        "model": str(model), "data-path": str(data), "task": "reviews", "prompt": PROMPT,
        "verbalizers": "terrible,great", "cut-layer": 2, "steps": 4, "eval-every": 2,
        "batch-size": 5, "eval-batch-size": 7, "directions": 2, "max-length": 100,
        "client-learning-rate": 1e-3, "server-learning-rate": 1e-2, "threads": 1, "seed": 3,
        "output-dir": str(tmp_path / "runs"), "device": "cpu", "trackers": "", **own,
    }  # fmt: skip

    def run(method=strategy, pictures=False, **changes):
        keys = {key.replace("_", "-"): value for key, value in changes.items()}
        name = f"run{len(list(tmp_path.glob('runs/*')))}"
        config = parse_config({**defaults, "run-name": name, **keys})
        with contextlib.ExitStack() as without:
            for picture in () if pictures else ("draw_curve", "draw_partition"):
                # drawing takes half of such a short run
                without.enter_context(mock.patch(f"hosl_flower.run.recorder.{picture}"))
            results = None if method is None else run_in_process(method(config))
        return results, tmp_path / "runs" / name, config

    return run


def metrics(directory):
    """What a run measured, without the seconds."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
