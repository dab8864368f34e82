"""The tasks that come with the package: one row each.

Prompts of the first six, of squad and of drop: MeZO (Malladi et al. 2023,
https://arxiv.org/abs/2305.17333, Table 14).
Labels are in the order of the hub's data sets; label_names are the strings that published files
write for them.
"""

from hosl_flower.tasks.task import Columns, Task

BUNDLED_TASK = "sms-spam"  # what comes with the package
_BOOLEAN = ("false", "true")
_PAIR: Columns = {"premise": ("sentence1",), "hypothesis": ("sentence2",)}  # GLUE's names

TASKS = {
    task.name: task
    for task in (
        Task(
            name="sst2",
            prompt="{sentence} It was",
            verbalizers=("terrible", "great"),
            label_names=("negative", "positive"),
            source="hub:nyu-mll/glue/sst2",
            columns={"sentence": ("text",)},
        ),
        Task(
            name="rte",
            prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
            verbalizers=("Yes", "No"),
            label_names=("entailment", "not_entailment"),
            source="hub:aps/super_glue/rte",
            columns=_PAIR,
        ),
        Task(
            name="cb",
            prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
            verbalizers=("Yes", "No", "Maybe"),
            label_names=("entailment", "contradiction", "neutral"),
            source="hub:aps/super_glue/cb",
            columns=_PAIR,
        ),
        Task(
            name="wsc",
            prompt='{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to '
            "{span1_text}? Yes or No?\n",
            verbalizers=("No", "Yes"),
            label_names=_BOOLEAN,
            source="hub:aps/super_glue/wsc.fixed",
        ),
        Task(
            name="wic",
            prompt='Does the word "{word}" have the same meaning in these two sentences? Yes, No?'
            "\n{sentence1}\n{sentence2}\n",
            verbalizers=("No", "Yes"),
            label_names=_BOOLEAN,
            source="hub:aps/super_glue/wic",
        ),
        Task(
            name="boolq",
            prompt="{passage} {question}?\n",
            verbalizers=("No", "Yes"),
            label_names=_BOOLEAN,
            source="hub:aps/super_glue/boolq",
            columns={"label": ("answer",)},  # BoolQ's own release
        ),
        Task(
            name="ag-news",
            prompt="{text}\nTopic:",
            verbalizers=("World", "Sports", "Business", "Technology"),
            label_names=("world", "sports", "business", "sci/tech"),
            source="hub:fancyzhx/ag_news/default",
            columns={"text": ("title description",), "label": ("class_index",)},
            header=("class_index", "title", "description"),
            from_one=("class_index",),
        ),
        Task(
            name="trec",
            prompt="{text}\nAnswer type:",
            verbalizers=("acronym", "entity", "description", "person", "location", "number"),
            label_names=("abbr", "enty", "desc", "hum", "loc", "num"),
            label_column="coarse_label",
            source="hub:CogComp/trec/default",
        ),
        Task(
            name=BUNDLED_TASK,
            prompt="{SMS}\nThis message is",
            verbalizers=("real", "spam"),
            label_names=("ham", "spam"),
            label_column="Label",
            source="bundled:sms_spam",
            columns={"text": ("SMS",)},  # for a prompt that names the column as one's own data do
            header=("Label", "SMS"),
        ),
        Task(
            name="squad",
            prompt="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
            target="answers.text",
            cut="context",
            source="hub:rajpurkar/squad/plain_text",
            columns={"answers.text": ("answers", "answer")},
        ),
        Task(
            name="drop",
            prompt="Passage: {passage}\nQuestion: {question}\nAnswer:",
            target="answers_spans.spans",
            cut="passage",
            source="hub:ucinlp/drop/default",
        ),
    )
}
