"""data/sources.py: every file format, labels and splits."""

import json
from dataclasses import replace

import datasets
import pandas
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from specs import client_spec

from hosl_flower.config.parse import parse_config
from hosl_flower.config.task_from_config import task_from_config
from hosl_flower.data.client_data import DataPool
from hosl_flower.data.encoders.prompts import PromptEncoder
from hosl_flower.data.sources import load_source, take
from hosl_flower.errors import DataError
from hosl_flower.models.processors import load_tokenizer
from hosl_flower.tasks.known import TASKS
from hosl_flower.tasks.task import Task
from hosl_flower.tensors.seeds import derive_seed, permutation

TASK = Task("own", "{text} It was", ("terrible", "great"), ("no", "yes"))
FRAME = pandas.DataFrame({"label": [0, 1, 1], "text": ["one", "two", "three"]})
ROWS = [("one", 0), ("three", 1), ("two", 1)]


def examples(*parts):
    return sorted((row["text"], row["label"]) for part in parts for row in part)


def read(path, task=TASK):
    return examples(*load_source(str(path), task, 0))


def numbered(count):
    return datasets.Dataset.from_dict(
        {"text": [f"number {i}" for i in range(count)], "label": [i % 2 for i in range(count)]}
    )


WRITERS = {
    "d.csv": lambda p: FRAME.to_csv(p, index=False),
    "excel.csv": lambda p: FRAME.to_csv(p, index=False, encoding="utf-8-sig"),
    "d.tsv": lambda p: FRAME.to_csv(p, sep="\t", index=False),
    "d.txt": lambda p: FRAME.to_csv(p, sep="\t", index=False, lineterminator="\r\n"),
    "d.jsonl": lambda p: FRAME.to_json(p, orient="records", lines=True),
    "d.json": lambda p: FRAME.to_json(p, orient="records", lines=True),
    "d.parquet": lambda p: FRAME.set_index("label", drop=False).to_parquet(p),
    "dataset": lambda p: datasets.Dataset.from_pandas(FRAME).save_to_disk(p),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_reads_the_same(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == ROWS


def test_arrow_file_of_a_saved_dataset(tmp_path):
    datasets.Dataset.from_pandas(FRAME).save_to_disk(tmp_path)
    assert read(next(tmp_path.glob("*.arrow"))) == ROWS


def test_dataset_dict_brings_its_held_out_part(tmp_path):
    parts = {"train": numbered(3), "validation": numbered(2), "test": numbered(1)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path)
    assert [len(part) for part in load_source(str(tmp_path), TASK, 0)] == [3, 2]


@pytest.mark.parametrize("held_out", ["validation.csv", "val.tsv", "dev.csv", "test.tsv"])
def test_directory_of_files(tmp_path, held_out):
    numbered(3).to_csv(tmp_path / "train.csv")
    numbered(2).to_csv(tmp_path / held_out, sep="\t" if held_out.endswith("tsv") else ",")
    assert [len(part) for part in load_source(str(tmp_path), TASK, 0)] == [3, 2]


def test_csv_quotes_and_tsv_does_not(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"a, ""b""\nc",1\nd,0\n')
    assert read(tmp_path / "a.csv") == [('a, "b"\nc', 1), ("d", 0)]
    (tmp_path / "a.tsv").write_text('text\tlabel\nsay "hi\t1\n"x\t0\n')
    assert read(tmp_path / "a.tsv") == [('"x', 0), ('say "hi', 1)]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_words_that_mean_nothing_elsewhere_stay_text(tmp_path, name):
    words = ["", "-", "007", "1.0", "NA", "None", "nan", "null", "true"]
    frame = pandas.DataFrame({"label": 1, "text": words})
    if name.endswith("jsonl"):
        frame.to_json(tmp_path / name, orient="records", lines=True)
    else:
        frame.to_csv(tmp_path / name, index=False, sep="," if "csv" in name else "\t")
    assert [text for text, _ in read(tmp_path / name)] == words


@pytest.mark.parametrize("separator", ["\u2028", "\u0085"])
def test_json_lines_end_at_newlines_only(tmp_path, separator):
    row = json.dumps({"text": f"a{separator}b", "label": 1}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    assert read(tmp_path / "a.jsonl") == [(f"a{separator}b", 1)] * 2


@pytest.mark.parametrize(
    "labels", [[1, 0], ["1", "0"], [1.0, 0.0], [True, False], ["yes", "no"], [" Yes", "NO "]]
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_labels_as_files_write_them(tmp_path, labels, suffix):
    path = tmp_path / f"a.{suffix}"
    frame = pandas.DataFrame({"text": ["a", "b"], "label": labels})
    if suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    assert read(path) == [("a", 1), ("b", 0)]


REFUSED = {
    "a.csv": {
        "sentence,label\na,1\n": ["no column 'text'", "needs text, label", "has sentence, label"],
        "text,label\na,-1\nb,1\n": ["line 2", "column 'label'", "'-1'", "0..1 or no, yes"],
        "text,label\na,1\nb,2\n": ["line 3", "'2'", "0..1 or no, yes"],
        "text,label\na,\nb,1\n": ["line 2", "''", "without a label"],
        "text,label\na,1\n": ["1 example", "too few"],
        "text,label\n": ["no examples"],
        "": ["is empty"],
        "\n\n": ["is empty"],
        "text,label\na,1\nb, c,0\n": ["line 3 has 3 fields, the header 2"],
        "text,label\na, b,1\nc, d,0\n": [],
        'text,label\n"a,1\nb,0\n': ["line 2", "unexpected end", "in quotes"],
    },
    "a.jsonl": {
        '{"text": "a", "label": 1}\n\n{"text"\n': ["line 3", "not JSON"],
        '{"text": "a", "label": 1}\n[1]\n': ["line 2", "expected an object", "[1]"],
        '{"text": "a", "label": 1}\n{"label": 0}\n': ["line 2", "text"],
        '{"text": null, "label": 1}\n{"text": "b", "label": 0}\n': ["line 1", "text"],
        "": ["is empty"],
    },
    "a.parquet": {"": ["cannot be read as parquet"], "text": ["cannot be read as parquet"]},
    "a.arrow": {"": ["cannot be read as arrow"], "text": ["cannot be read as arrow"]},
    "a.xml": {"<a/>": ["unknown kind of file", ".csv", ".parquet"]},
}


@pytest.mark.parametrize(("name", "content"), [(n, c) for n, cs in REFUSED.items() for c in cs])
def test_bad_files_are_refused_with_place_and_reason(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    expected = [str(tmp_path / name), *REFUSED[name][content]]
    assert [part for part in expected if part not in str(caught.value)] == []


@pytest.mark.parametrize("damaged", ["state.json", "dataset_info.json"])
def test_damaged_saved_dataset_is_refused(tmp_path, damaged):
    numbered(4).save_to_disk(tmp_path)
    (tmp_path / damaged).write_text("{")
    with pytest.raises(DataError, match=str(tmp_path)):
        read(tmp_path)


def test_missing_path_and_missing_train_file(tmp_path):
    with pytest.raises(DataError, match=f"'{tmp_path}/nothing' does not exist"):
        read(tmp_path / "nothing")
    (tmp_path / "dev.csv").write_text("text,label\na,1\n")
    with pytest.raises(DataError, match=f"{tmp_path} has no train file; expected train"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("header", "task", "hint"),
    [
        ("text;y,z", TASK, "is the separator another"),
        ("text,y", TASK, r"\(set prompt and label-column\); the first line is read as the names"),
        ("words,y", TASKS["sms-spam"], "set task to a new name, with prompt, verbalizers"),
    ],
)
def test_missing_columns_come_with_a_way_out(tmp_path, header, task, hint):
    path = tmp_path / "mine.csv"
    path.write_text(f"{header}\n{header}\n")
    with pytest.raises(DataError, match=hint):
        read(path, task)


def test_rows_without_text_are_named_once(tmp_path, caplog):
    path = tmp_path / "mine.csv"
    path.write_text("text,label\nfine,1\n,0\n  ,1\n")
    assert len(read(path)) == 3
    (said,) = caplog.messages
    assert f"2 of 3 rows have no text (text), the first is {path}, line 3" in said


def test_a_table_of_another_kind_says_how_to_save_it(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes("text,label\ncaf\u00e9,1\n".encode("latin-1"))
    with pytest.raises(
        DataError, match=r"mine.csv, line 2 is not in UTF-8 \(byte 0xe9\); save it as UTF-8"
    ):
        read(path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match="it holds images: set image-column = image"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("names", "verbalizers", "wanted"),
    [
        (["negative", "positive"], "negative=bad,positive=good", [0, 1, 0]),
        (["negative", "positive"], "positive=good,negative=bad", [1, 0, 1]),
        (["negative", "positive"], "bad,good", [0, 1, 0]),  # no names: as they are numbered
        (
            ["negative", "positive"],
            "pos=good,neg=bad",
            "negative, positive, and the task's pos, neg",
        ),
        (["negative", "positive"], "positive=good,neg=bad", "say what each means in verbalizers"),
        (["1", "0"], "bad,good", [1, 0, 1]),  # folders are numbered as their names are sorted
    ],
)
def test_named_labels_are_matched_by_name_or_not_at_all(tmp_path, names, verbalizers, wanted):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = {"text": ["a", "b", "c"], "label": [0, 1, 0]}
    Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "saved"))
    keys = {"task": "mine", "prompt": "{text}", "verbalizers": verbalizers}
    task = task_from_config(parse_config(keys))
    if isinstance(wanted, str):
        with pytest.raises(DataError, match=wanted):
            load_source(str(tmp_path / "saved"), task, 0)
        return
    parts = load_source(str(tmp_path / "saved"), task, 0)
    found = examples(*parts)
    assert [label for _, label in found] == wanted


def test_hub_data_that_cannot_be_had_names_the_way_out(hub_cache):
    with pytest.raises(DataError, match=r"'nyu-mll/glue/sst2' .* set data-path"):
        load_source("hub:nyu-mll/glue/sst2", TASKS["sst2"], 0)


def test_a_fifth_is_held_out_by_seed(tmp_path):
    numbered(50).to_csv(tmp_path / "a.csv")
    splits = [load_source(str(tmp_path / "a.csv"), TASK, seed) for seed in (0, 0, 1)]
    assert [len(held_out) for _, held_out in splits] == [10, 10, 10]
    assert examples(*splits[0]) == examples(numbered(50))
    assert [train["text"] == splits[0][0]["text"] for train, _ in splits] == [True, True, False]


def test_held_out_examples_are_drawn_off_the_training_part(tmp_path):
    numbered(50).to_csv(tmp_path / "train.csv")
    numbered(7).to_csv(tmp_path / "validation.csv")
    path = str(tmp_path)
    assert [len(part) for part in load_source(path, TASK, 0)] == [50, 7]
    splits = [load_source(path, TASK, seed, held_out_examples=12) for seed in (0, 0, 1)]
    assert [len(held_out) for _, held_out in splits] == [12, 12, 12]
    assert examples(*splits[0]) == examples(numbered(50))
    assert [held["text"] == splits[0][1]["text"] for _, held in splits] == [True, True, False]
    order = permutation(50, derive_seed(0, "held-out"))
    assert splits[0][1]["text"] == [f"number {i}" for i in order[:12]]
    for many in (50, 51):
        with pytest.raises(DataError, match=rf"50 example.*hold {many} \(held-out-examples\) out"):
            load_source(path, TASK, 0, held_out_examples=many)


def test_held_out_examples_reach_every_client(tmp_path):
    numbered(50).to_csv(tmp_path / "train.csv")
    spec = client_spec(
        task=TASK, source=str(tmp_path), held_out_examples=12, train_examples=0, eval_examples=0
    )
    pool = DataPool(spec, PromptEncoder(TASK, load_tokenizer("random:opt-tiny"), 32))
    clients = [pool.client(number) for number in range(2)]
    assert [(len(c.train), len(c.held_out)) for c in clients] == [(19, 12)] * 2
    assert examples(*(c.train for c in clients), clients[0].held_out) == examples(numbered(50))


def test_a_prompt_may_call_the_bundled_messages_text():
    task = TASKS["sms-spam"]
    own = replace(task, prompt="{text} It was")
    (texts, _), (messages, _) = load_source(task.source, own, 0), load_source(task.source, task, 0)
    assert texts["text"][:9] == messages["SMS"][:9]


def test_bundled_sms_collection():
    train, held_out = load_source("bundled:sms_spam", TASKS["sms-spam"], 0)
    assert len(train) + len(held_out) == 5574
    assert sum(train["label"]) + sum(held_out["label"]) == 747


def test_take_draws_by_seed():
    data = numbered(20)
    assert len(take(data, 0, 0)) == len(take(data, 99, 0)) == 20
    drawn = [examples(take(data, 5, seed)) for seed in (0, 0, 1)]
    assert len(drawn[0]) == 5
    assert [one == drawn[0] for one in drawn] == [True, True, False]


def test_a_partition_column_is_kept_as_text(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text,label,who\na,0,7\nb,1,8\nc,0,7\n")
    train, held_out = load_source(str(path), TASK, 0, "who")
    assert set(train["who"]) <= {"7", "8"}
    assert held_out.column_names == train.column_names
    with pytest.raises(DataError, match=r"no column 'speaker' \(partition-column\).*label, who"):
        load_source(str(path), TASK, 0, "speaker")


def test_a_partition_column_may_be_the_text_or_the_label(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text,label\na,0\nb,1\nc,0\n")
    for column in ("text", "label"):
        train, _ = load_source(str(path), TASK, 0, column)
        assert set(train["label"]) <= {0, 1}


def test_a_second_column_called_label_is_refused(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text,Label,label\na,0,p\nb,1,q\nc,0,p\n")
    assert len(load_source(str(path), replace(TASK, label_column="Label"), 0)[0]) == 2
    for task, column, use in [
        (replace(TASK, label_column="Label"), "label", "partition-column"),
        (replace(TASK, label_column="Label", prompt="{label} {text}"), "", "prompt"),
    ]:
        with pytest.raises(DataError, match=f"'label' cannot be used by {use}.*'Label'.*rename"):
            load_source(str(path), task, 0, column)


@pytest.mark.parametrize("nobody", ["null", '""'])
def test_an_example_of_nobody_is_refused(tmp_path, nobody):
    path = tmp_path / "d.jsonl"
    rows = [f'{{"text": "a", "label": 1, "who": {who}}}' for who in ("7", nobody, "8")]
    path.write_text("\n".join(rows).replace("7", '"7"').replace("8", '"8"'))
    with pytest.raises(DataError, match=r"line 2: who \(partition-column\) is missing"):
        load_source(str(path), TASK, 0, "who")
