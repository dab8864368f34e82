"""How many held-out examples repeat training examples, where they are drawn off one file.

    python tests/benchmarks/overlap.py -c task=sms-spam             # the bundled SMS collection
    python tests/benchmarks/overlap.py -c data-path=runs/debian/section.csv -c task=debian \
        -c "prompt={text} . topic :" -c label-column=label -c held-out-examples=1500 \
        -c verbalizers=game=game,music=music,network=network,picture=picture,...

Takes the keys of a run. Prints for each seed the share of all held-out examples with the text of
a training example, with its words (in lower case, without punctuation), and those that
hosl_flower/data/overlap.py counts, in all examples instead of a sample.
"""

from typing import Annotated

import typer

from hosl_flower.config.app_config import key_value
from hosl_flower.config.parse import parse_config
from hosl_flower.config.resolve import resolve
from hosl_flower.data import overlap
from hosl_flower.data.sources import load_source


def repeated(train: list[str], held_out: list[str]) -> float:
    """Share of the held-out texts that are training texts."""
    known = set(train)
    return sum(text in known for text in held_out) / len(held_out)


def main(
    config: Annotated[list[str], typer.Option("-c", help="key=value")],
    seeds: Annotated[list[int], typer.Option()] = [0, 1, 2],  # noqa: B006
) -> None:
    overlap.WORDS = 10**9
    print("seed  training  held out  same text  same words  counted")
    for seed in seeds:
        spec = resolve(parse_config({**dict(map(key_value, config)), "seed": seed}), "overlap").spec
        splits: list[overlap.Split] = []
        load_source(spec.source, spec.task, seed, "", spec.held_out_examples, splits.append)
        if not splits:
            raise SystemExit(f"{spec.source} has a held-out part of its own")
        texts = splits[0].texts(spec.task.fields)
        words = [[" ".join(overlap.words_of(text)) for text in part] for part in texts]
        counted = overlap.find_overlap(*texts)
        print(
            f"{seed:4}  {len(texts[0]):8}  {len(texts[1]):8}  {repeated(*texts):9.3f}  "
            f"{repeated(*words):10.3f}  {counted.shared / counted.examples:7.3f}"
        )


if __name__ == "__main__":
    typer.run(main)
