"""A task: its prompt, its labels, its columns."""

from dataclasses import dataclass, field

from hosl_flower.tasks.prompt_template import fields_of

Columns = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Task:
    """One task: a choice among answer words, or, with a `target`, text to be generated.

    prompt: template; {fields} are columns of the data (prompt_template.py). verbalizers: answer
    words, by label. label_names: the strings a data file may use for the labels, by label.
    target: the column of the text that is to follow the prompt, or of a list of such texts, any of
    which is right. cut: the field that long examples lose the end of; "" is the longest.
    source: "hub:<repository>/<configuration>" or "bundled:<folder>".
    columns: by column, what other publications have in its place: one column, or several ("title
    description"), which are joined with a space.
    header: column names of the published file, where that comes without a header line.
    from_one: label columns that count the labels 1, 2, ...
    image: the column of the images, where the task is about such (known_images.py): then it has no
    prompt, and the verbalizers are the names of the classes.
    """

    name: str
    prompt: str
    verbalizers: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    label_column: str = "label"
    source: str = ""
    columns: Columns = field(default_factory=dict)
    header: tuple[str, ...] = ()
    from_one: tuple[str, ...] = ()
    target: str = ""
    cut: str = ""
    image: str = ""

    @property
    def answer_column(self) -> str:
        """The column of the data that says what is right."""
        return self.target or self.label_column

    @property
    def fields(self) -> list[str]:
        """The columns the prompt needs, each once."""
        return list(fields_of(self.prompt))
