"""Exact match and F1 of a text beside the right ones, by SQuAD's rule, and SQuAD's JSON file.

Texts are compared in lower case, without punctuation, without the articles a, an, the, with single
spaces (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250). F1 is of the bags of words; both
scores are the best over the right answers. Where there is no answer, nothing is right and anything
else is wrong (SQuAD 2.0, Rajpurkar et al. 2018, https://arxiv.org/abs/1806.03822); right answers
without a word count for nothing, unless there is no other.
"""

from collections.abc import Iterator
from typing import Any

from hosl_flower.errors import DataError


def is_squad(content: Any) -> bool:
    """Whether a JSON file is SQuAD's, 1.1 or 2.0: articles, their paragraphs, their questions."""
    data = content.get("data") if isinstance(content, dict) else None
    first = data[0] if isinstance(data, list) and data else None
    return isinstance(first, dict) and "paragraphs" in first


def squad_rows(content: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The examples of such a file, as the hub's data set has them, each after its place. DataError
    with the place."""
    for number, article in enumerate(content["data"], start=1):
        try:
            questions = (
                (paragraph["context"], question)
                for paragraph in article["paragraphs"]
                for question in paragraph["qas"]
            )
            for count, (context, question) in enumerate(questions, start=1):
                yield (
                    f"article {number}, question {count}",
                    {
                        "id": question["id"],
                        "title": article.get("title", ""),
                        "context": context,
                        "question": question["question"],
                        "answers": {"text": [answer["text"] for answer in question["answers"]]},
                    },
                )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where}, article {number}: not as SQuAD's files are ({error!r}); expected "
                "paragraphs with context and qas, each with id, question and answers"
            ) from error


def right_answers(value: Any, where: str) -> list[str]:
    """The right answers that a data file gives: a text, a number, or a list of texts or of objects
    with a "text"; an empty list where there is none (SQuAD 2.0). DataError for anything else."""
    several = value if isinstance(value, list) else [value]
    answers = [own.get("text") if isinstance(own, dict) else own for own in several]
    if not all(isinstance(own, str | int | float) for own in answers):
        raise DataError(
            f"{where}: the answer is no text, and rows without an answer cannot be used; it is "
            f"{str(value)[:40]!r}"
        )
    texts = [str(own) for own in answers]
    if texts and not any(text.strip() for text in texts):
        raise DataError(
            f"{where}: the answer is empty; a question without an answer has a list of "
            "none, as in SQuAD 2.0"
        )
    return texts
