"""data/tables.py, data/readers/delimited.py, data/readers/json_rows.py: files as spreadsheets,
pandas, R and scripts write them, and the place of every fault in them."""

import json
import logging

import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset

from hosl_flower.data.sources import load_source
from hosl_flower.errors import DataError
from hosl_flower.tasks.known import TASKS
from hosl_flower.tasks.task import Task

TASK = Task("own", "{text} It was", ("terrible", "great"), ("neg", "pos"))
ROWS = [("bad", 0), ("good", 1)]


def read(path, task=TASK, **more):
    """(columns of the prompt, label) of all rows, sorted."""
    parts = load_source(str(path), task, 0, **more)
    return sorted((*(row[f] for f in task.fields), row["label"]) for part in parts for row in part)


def write(path, content, encoding="utf-8"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


QUOTED = [('a "b"', 1), ("c\td", 0), ("e\nf", 1), ("g, h", 0)]


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("semicolons.csv", "text;label\ngood, really;pos\nbad;neg\n",
         [("bad", 0), ("good, really", 1)]),
        ("tabs.csv", "text\tlabel\ngood\tpos\nbad\tneg\n", ROWS),
        ("commas.tsv", "text,label\ngood,pos\nbad,neg\n", ROWS),
        ("pipes.txt", "text|label\ngood|pos\nbad|neg\n", ROWS),
        ("windows.csv", "\ufefftext,label\r\ngood,pos\r\nbad,neg\r\n", ROWS),
        ("mac.csv", "text,label\rgood,pos\rbad,neg\r", ROWS),
        ("blank.csv", "\n\ntext,label\n\ngood,pos\n\nbad,neg\n\n", ROWS),
        ("index.csv", ",text,label\n0,good,pos\n1,bad,neg\n", ROWS),
        ("nameless.csv", "text,,label,\ngood,1,pos,2\nbad,3,neg,4\n", ROWS),
        ("unused.csv", "id,id,text,label\n1,2,good,pos\n3,4,bad,neg\n", ROWS),
        # R: names of rows have no name in the header
        ("r.tsv", '"text"\t"label"\n"1"\t"good"\t"pos"\n"2"\t"bad"\t"neg"\n', ROWS),
        ("r.csv", '"","text","label"\n"1","good","pos"\n"2","bad","neg"\n', ROWS),
        ("unquoted-r.txt", "text\tlabel\n3\tgood\tpos\n7\tbad\tneg\n", ROWS),
        ("escaped-r.tsv", '"text"\t"label"\n"say \\"hi\\""\t"pos"\n"bad"\t"neg"\n',
         [("bad", 0), ('say "hi"', 1)]),
        ("escaped.csv", 'text,label\n"say \\"hi\\", you",pos\nbad,neg\n',
         [("bad", 0), ('say "hi", you', 1)]),
        # spreadsheets quote commas in a table with tabs
        ("excel.txt", 'text\tlabel\n"a, b"\tpos\n"c, ""d"""\tneg\n', [("a, b", 1), ('c, "d"', 0)]),
        # GLUE quotes nothing
        ("glue.tsv", 'text\tlabel\n"a" b\t1\n"whole"\t0\n', [('"a" b', 1), ('"whole"', 0)]),
        ("open.tsv", 'text\tlabel\n"a\t1\nb"\t0\n', [('"a', 1), ('b"', 0)]),
        ("whole.tsv", 'text\tlabel\n"a, b"\t1\n"c, d"\t0\n', [('"a, b"', 1), ('"c, d"', 0)]),
        ("glue-commas.tsv", 'text\tlabel\n"a, b"\t1\nc, d\t0\n', [('"a, b"', 1), ("c, d", 0)]),
    ],
)  # fmt: skip
def test_tables_as_programs_write_them(tmp_path, name, content, rows):
    assert read(write(tmp_path / name, content)) == sorted(rows)


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("quoting", [0, 1, 2])
def test_what_pandas_quotes_is_read_back(tmp_path, separator, quoting):
    path = tmp_path / ("a.csv" if separator == "," else "a.tsv")
    frame = pandas.DataFrame(QUOTED, columns=["text", "label"])
    frame.to_csv(path, sep=separator, index=False, quoting=quoting)
    assert read(path) == sorted(QUOTED)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "pos\tgood\nneg\tbad\npos\tgood\n"),
        ("a.csv", "good,pos\nbad,neg\ngood,pos\n"),
        ("numbers.csv", "good,1\nbad,0\ngood,1\n"),
        ("a.txt", "good\tPOS\nbad\tneg \ngood\tpos\n"),
    ],
)
def test_a_file_without_header_whose_labels_are_evident(tmp_path, name, content):
    assert read(write(tmp_path / name, content)) == [("bad", 0), ("good", 1), ("good", 1)]


@pytest.mark.parametrize(
    "content",
    [
        "pos\tgood\tx\nneg\tbad\ty\n",  # which of the others is the text?
        "pos\tneg\nneg\tpos\n",
        "good\tfine\nbad\tneg\n",
    ],
)
def test_a_file_without_header_is_else_refused_with_the_way_out(tmp_path, content):
    with pytest.raises(DataError, match=r"no column 'text', 'label'.*the first line is read as"):
        read(write(tmp_path / "a.tsv", content))


def test_a_field_of_any_length(tmp_path):
    long = "goal " * 60_000
    for name in ("a.csv", "a.tsv", "quoted.csv"):
        separator = "\t" if name.endswith("tsv") else ","
        field = f'"{long}"' if name.startswith("q") else long
        path = write(tmp_path / name, f"text{separator}label\n{field}{separator}1\nb{separator}0\n")
        assert read(path) == [("b", 0), (long, 1)]


@pytest.mark.parametrize("name", ["MINE.CSV", "Mine.Csv", "mine.TXT", "mine.TSV"])
def test_suffixes_in_any_case(tmp_path, name):
    separator = "," if name.lower().endswith("csv") else "\t"
    content = f"text{separator}label\ngood{separator}pos\nbad{separator}neg\n"
    assert read(write(tmp_path / name, content)) == ROWS


def test_parts_of_a_directory_in_any_case(tmp_path):
    write(tmp_path / "Train.CSV", "text,label\ngood,pos\n")
    write(tmp_path / "VALIDATION.JSONL", lines({"text": "bad", "label": 0}))
    train, held_out = load_source(str(tmp_path), TASK, 0)
    assert (train["text"][:], held_out["text"][:]) == (["good"], ["bad"])
    Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}).to_parquet(tmp_path / "A.PARQUET")
    assert read(tmp_path / "A.PARQUET") == ROWS


def two(extra):
    return lines(
        {"text": "good", "label": 1, "odd": extra}, {"text": "bad", "label": 0, "odd": "word"}
    )


@pytest.mark.parametrize("odd", [10**30, [1], {"a": {"b": 1}}, None, True, [{"a": 1}, "x"], 1e400])
def test_a_column_that_nobody_uses_does_no_harm(tmp_path, odd):
    assert read(write(tmp_path / "a.jsonl", two(odd))) == ROWS
    assert read(write(tmp_path / "a.json", f"[{','.join(two(odd).splitlines())}]")) == ROWS


def test_parquet_with_categories_maps_and_repeated_names(tmp_path):
    a_map = pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64()))
    category = pa.array(["pos", "neg"]).dictionary_encode()
    columns = [pa.array(["good", "bad"]), category, pa.array([1, 2]), pa.array(["x", "y"]), a_map]
    names = ["text", "label", "id", "id", "odd"]
    pa.parquet.write_table(pa.table(columns, names=names), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ROWS
    names[3] = "text"
    pa.parquet.write_table(pa.table(columns, names=names), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: column 'text' is there twice"):
        read(tmp_path / "b.parquet")


def test_numbers_and_words_in_a_text_column_are_text(tmp_path):
    rows = [{"text": 10**30, "label": 1.0}, {"text": "a", "label": "1"}, {"text": 7, "label": True}]
    found = read(write(tmp_path / "a.jsonl", lines(*rows)))
    assert found == [("1" + "0" * 30, 1), ("7", 1), ("a", 1)]


TWICE = [
    ("a.csv", "text,text,label\na,b,1\n", "a.csv: column 'text' is there twice"),
    ("a.tsv", "text\tlabel\tlabel\na\t1\t1\n", "a.tsv: column 'label' is there twice"),
    ("a.csv", "Text,Text,label\na,b,1\n", "column 'Text' is there twice"),
    ("a.csv", "text,text,text,label\na,b,c,1\n", "column 'text' is there 3 times"),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "a", "text": "b", "label": 1}\n',
     "a.jsonl, line 2: 'text' is there twice"),
    ("a.json", '[{"text": "a", "label": 1, "label": 0}]', "element 1: 'label' is there twice"),
    ("a.csv", "TEXT,Text,label\na,b,1\n", "no column 'text'.*did you mean 'TEXT' or 'Text'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), TWICE)
def test_a_column_that_is_used_is_there_once(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


def test_two_columns_of_one_name_in_a_nested_object_are_one_too_many(tmp_path):
    rows = lines({"a.b": "x", "a": {"b": "y", "c": 1}, "label": 1})
    task = Task("own", "{a.b}", ("bad", "good"))
    with pytest.raises(DataError, match=r"line 1: 'a.b' is there twice"):
        read(write(tmp_path / "a.jsonl", rows), task)
    assert read(write(tmp_path / "a.jsonl", rows * 2), Task("own", "{a.c}", ("bad", "good"))) == [
        ("1", 1), ("1", 1),
    ]  # fmt: skip


PLACES = [
    ("a.csv", 'text,label\n"two\nlines",1\n"x\n\ny",7\n', "line 4, column 'label': label '7'"),
    ("a.csv", "\ntext,label\n\na,1\n\nb,x1\n", "line 6, column 'label': label 'x1'"),
    ("a.csv", 'text,label\n"two\nlines",1\nb,1,0\n', "line 4 has 3 fields, the header 2"),
    ("a.csv", 'text,label\na,1\n"b" c,0\n', "line 3: ',' expected after '\"'"),
    ("a.tsv", '"text"\t"label"\n"a"\t1\n"b" c\t0\n', "line 3: .* expected after '\"'"),
    ("a.jsonl", '\n{"text": null, "label": 1}\n', "line 2: text is missing"),
    ("a.jsonl", '{"text": NaN, "label": 1}\n', "line 1: text is missing"),
    ("a.jsonl", '{"text": ["a"], "label": 1}\n', "line 1: text is a list, expected text"),
    ("a.jsonl", '{"text": "a", "label": [1]}\n', "line 1, column 'label': expected one label"),
    ("a.json", '[{"text": "a", "label": 9}]', "element 1, column 'label': label 9"),
    ("a.json", '{"text":\n"a"}', "line 1: not JSON .* expected an object a line"),
    ("a.csv", "text,label\n", "has no examples"),
    ("a.csv", " \n", "is empty"),
    ("a.json", "[]", "has no examples"),
    ("a.tsv", "\ufeff", "is empty"),
    ("a.jsonl", "\n\n", "is empty"),
    ("a.csv", b"text,label\na,1\ncaf\xe9,0\n", r"line 3 is not in UTF-8 \(byte 0xe9\)"),
    ("a.csv", "text,label\na,1\n".encode("utf-16"), "is UTF-16; expected text in UTF-8"),
    ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), "line 1 has a byte 0.*UTF-16"),
    ("a.csv", b"text,label\na,1\nb\0,0\n", "line 3 has a byte 0"),
    ("a.csv", b"PK\x03\x04rest", "is a zip archive, as the workbooks of spreadsheets"),
    ("a.jsonl", b"\x1f\x8b\x08rest", "is compressed with gzip"),
    ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), PLACES)
def test_a_fault_is_named_with_its_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fault_in_one_of_several_files_is_named_with_its_file(tmp_path):
    for number, label in enumerate((1, 0, 5)):
        path = tmp_path / f"train-0000{number}-of-00003.csv"
        write(path, f"text,label\na,{label}\n")
    with pytest.raises(DataError, match=r"train-00002-of-00003.csv, line 2, column 'label'"):
        read(tmp_path)
    write(path, "label\n1\n")
    with pytest.raises(DataError, match=r"train-00002-of-00003.csv, line 2: text is missing"):
        read(tmp_path)


def test_half_an_emoji_is_replaced_and_said(tmp_path, caplog):
    rows = [{"text": "ok", "label": 1, "who": "a"}, {"text": "cut \ud83d", "label": 0, "who": "b"}]
    path = write(tmp_path / "a.jsonl", lines(*rows))
    assert read(path) == [("cut \ufffd", 0), ("ok", 1)]
    (said,) = caplog.messages
    assert "1 texts of column text" in said
    assert "line 2" in said
    task = Task("own", "{who}", target="text")
    found = [own for part in load_source(str(path), task, 0) for own in part["answers"][:]]
    assert sorted(found) == [["cut \ufffd"], ["ok"]]
    rows[1]["who"] = "\ude00"
    with pytest.raises(DataError, match=r"line 2: who \(partition-column\) has half a character"):
        read(write(path, lines(*rows)), partition_column="who")
    rows[1]["label"] = "\ude00"
    with pytest.raises(DataError, match=r"line 2, column 'label'") as caught:
        read(write(path, lines(*rows)))
    assert str(caught.value).encode()


@pytest.mark.parametrize(
    "name", ["Review Text", "a.b", "a-b", "a:b", "0", "x!r", "größe (cm)", "評価", "$ price", "a/b"]
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet", "saved"])
def test_a_column_of_any_name_is_in_the_prompt(tmp_path, name, suffix):
    data = Dataset.from_dict({name: ["good", "bad"], "label": [1, 0], "text": ["x", "y"]})
    path = tmp_path / f"a.{suffix}"
    if suffix == "saved":
        data.save_to_disk(path)
    else:
        {"csv": data.to_csv, "jsonl": data.to_json, "parquet": data.to_parquet}[suffix](path)
    assert read(path, Task("own", f"{{{name}}} It was", ("bad", "good"))) == ROWS


def test_column_names_are_matched_whatever_their_form_of_unicode(tmp_path):
    path = write(tmp_path / "a.csv", "Re\u0301sume\u0301\u00a0court,label\ngood,1\nbad,0\n")
    assert read(path, Task("own", "{r\u00e9sum\u00e9 court}", ("bad", "good"))) == ROWS


def test_braces_that_are_no_column_come_with_a_suggestion(tmp_path):
    path = write(tmp_path / "a.csv", "Review Text,label\ngood,1\nbad,0\n")
    for prompt, message in [
        ("{Review Txt}", "no column 'Review Txt'.*did you mean 'Review Text'.*written twice, {{"),
        ("{Review Text} {positive}", "no column 'positive'"),
        ('{"a": "{Review Text}", "b": "{{x}}"}', "no column 'x'.*written twice"),
    ]:
        with pytest.raises(DataError, match=message):
            read(path, Task("own", prompt, ("bad", "good")))


def test_a_column_in_double_braces_is_warned_of(tmp_path, caplog):
    path = write(tmp_path / "a.csv", "text,title,label\ngood,x,1\nbad,y,0\n")
    with caplog.at_level(logging.WARNING):
        read(path, Task("own", "{{title}} {text}", ("bad", "good")))
    assert "prompt: {title} is text in it" in caplog.text


def test_a_known_task_reads_its_columns_alone(tmp_path):
    path = write(
        tmp_path / "a.tsv", "index\tSENTENCE\tlabel\tx\tx\n0\tgood\t1\t\t\n1\tbad\t0\t\t\n"
    )
    assert read(path, TASKS["sst2"]) == ROWS
