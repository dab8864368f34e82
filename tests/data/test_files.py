"""data/readers/files.py, data/columns.py: every published form of every task's data loads alike,
and what is no such form is refused with file, row and what was expected."""

import json
from types import SimpleNamespace

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from hosl_flower.data.sources import load_source
from hosl_flower.errors import DataError
from hosl_flower.tasks.known import TASKS


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def load(path, name, **more):
    """(training, held-out) rows, each sorted."""
    parts = load_source(str(path), TASKS[name], 0, **more)
    return [
        sorted((row["label"], *(row[f] for f in TASKS[name].fields)) for row in p) for p in parts
    ]


def write(directory, **files):
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return directory


ENTAILED = {"premise": "It rains.", "hypothesis": "It is wet."}
PUBLISHED = {
    # task: (file name, labelled content, unlabelled test content, rows)
    "sst2": (
        "tsv",
        'sentence\tlabel\nsay "hi\t1\na , b \t0\n',
        "index\tsentence\n0\tnobody knows\n",
        [(0, "a , b "), (1, 'say "hi')],
    ),
    "rte": (
        "jsonl",
        lines(
            {**ENTAILED, "label": "not_entailment", "idx": 0},
            {**ENTAILED, "label": "entailment", "idx": 1},
        ),
        lines({**ENTAILED, "idx": 0}),
        [(0, "It rains.", "It is wet."), (1, "It rains.", "It is wet.")],
    ),
    "cb": (
        "jsonl",
        lines(*({**ENTAILED, "label": x} for x in ("neutral", "contradiction", "entailment"))),
        lines({**ENTAILED, "idx": 0}),
        [(label, "It rains.", "It is wet.") for label in range(3)],
    ),
    "wsc": (
        "jsonl",
        lines(
            *(
                {
                    "text": "Ann saw Eve when she sang.", "idx": 0, "label": label,
                    "target": {
                        "span2_index": 4, "span1_index": i, "span1_text": who, "span2_text": "she"
                    },
                }
                for i, who, label in ((0, "Ann", True), (2, "Eve", False))
            )
        ),
        lines({"text": "t", "idx": 0, "target": {"span1_text": "a", "span2_text": "b"}}),
        [
            (0, "Ann saw Eve when she sang.", "she", "Eve"),
            (1, "Ann saw Eve when she sang.", "she", "Ann"),
        ],
    ),
    "wic": (
        "jsonl",
        lines(
            *(
                {
                    "word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "idx": 0,
                    "label": label, "start1": 2, "start2": 4, "end1": 6, "end2": 8, "version": 1.1,
                }
                for label in (True, False)
            )
        ),
        lines({"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "idx": 0}),
        [(0, "bank", "A bank.", "The bank."), (1, "bank", "A bank.", "The bank.")],
    ),
    "boolq": (
        "jsonl",
        lines(
            {"question": "do cats purr", "passage": "Cats purr.", "idx": 0, "label": True},
            {"question": "do dogs purr", "passage": "Dogs bark.", "idx": 1, "label": False},
        ),
        lines({"question": "q", "passage": "p", "idx": 0}),
        [(0, "Dogs bark.", "do dogs purr"), (1, "Cats purr.", "do cats purr")],
    ),
    "ag-news": (
        "csv",
        '"3","Oil up","He said ""up"", \\$60."\n"4","Chips","Smaller."\n"1","A","B"\n"2","C","D"\n',
        '"Title","Description"\n"A","B"\n',
        [
            (0, "A B"),
            (1, "C D"),
            (2, 'Oil up He said "up", \\$60.'),
            (3, "Chips Smaller."),
        ],
    ),
    "trec": (
        "label",
        "DESC:manner How did serfdom develop ?\nENTY:cremat What films featured Popeye ?\n"
        "ABBR:exp What is NASA ?\nHUM:ind Who : when ?\nLOC:city Where ?\nNUM:count How many ?\n",
        "",
        [
            (0, "What is NASA ?"),
            (1, "What films featured Popeye ?"),
            (2, "How did serfdom develop ?"),
            (3, "Who : when ?"),
            (4, "Where ?"),
            (5, "How many ?"),
        ],
    ),
    "sms-spam": (
        "txt",
        'ham\tsay "hi\nspam\tWIN\n',
        "",
        [(0, 'say "hi'), (1, "WIN")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("held_out", ["val", "dev", "validation", "test"])
def test_a_published_directory_loads(tmp_path, name, held_out):
    suffix, content, _, rows = PUBLISHED[name]
    write(tmp_path, **{f"train__{suffix}": content, f"{held_out}__{suffix}": content})
    assert load(tmp_path, name) == [rows, rows]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if PUBLISHED[name][2]])
def test_a_test_part_without_labels_is_not_held_out(tmp_path, name):
    suffix, content, unlabelled, rows = PUBLISHED[name]
    write(tmp_path, **{f"train__{suffix}": content, f"test__{suffix}": unlabelled})
    train, held_out = load(tmp_path, name)
    assert sorted(train + held_out) == rows
    assert len(held_out) == 1
    write(tmp_path, **{f"val__{suffix}": content})
    assert load(tmp_path, name) == [rows, rows]


def test_a_test_part_with_labels_of_minus_one_is_not_held_out(tmp_path):
    rows = [{"text": "a", "label": -1}]
    train = [{"text": text, "label": i % 2} for i, text in enumerate("abcd")]
    parts = {"train": Dataset.from_list(train), "test": Dataset.from_list(rows)}
    DatasetDict(parts).save_to_disk(tmp_path / "d")
    assert [len(part) for part in load(tmp_path / "d", "sst2")] == [3, 1]
    parts["validation"] = parts.pop("test")  # a validation part must have labels
    DatasetDict(parts).save_to_disk(tmp_path / "e")
    with pytest.raises(
        DataError, match=r"e \(validation\), row 1, column 'label': label -1 is not one of 0\.\.1"
    ):
        load(tmp_path / "e", "sst2")


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        (
            "rte",
            "train.tsv",
            "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tnot_entailment\n"
            "1\tIt rains.\tIt is wet.\tentailment\n",
        ),
        ("sst2", "a.jsonl", lines({"text": "a , b ", "label": 0}, {"text": 'say "hi', "label": 1})),
        (
            "boolq",
            "a.jsonl",
            lines(
                {"question": "do cats purr", "answer": True, "passage": "Cats purr."},
                {"question": "do dogs purr", "answer": False, "passage": "Dogs bark."},
            ),
        ),
        (
            "ag-news",
            "a.csv",
            'Class Index,Title,Description\n3,Oil up,"He said ""up"", \\$60."\n4,Chips,Smaller.\n'
            "1,A,B\n2,C,D\n",
        ),
        (
            "ag-news",
            "a.jsonl",
            lines(
                *(
                    {"text": text, "label": label}
                    for label, text in PUBLISHED["ag-news"][3]
                )
            ),
        ),
        ("trec", "TREC.txt", PUBLISHED["trec"][1]),
        (
            "trec",
            "a.csv",
            "text,coarse_label,fine_label\n"
            + "".join(f"{text},{label},7\n" for label, text in PUBLISHED["trec"][3]),
        ),
        ("sms-spam", "SMSSpamCollection", PUBLISHED["sms-spam"][1]),
        ("sms-spam", "a.jsonl", lines({"sms": 'say "hi', "label": 0}, {"sms": "WIN", "label": 1})),
    ],
)  # fmt: skip
def test_other_publications_of_the_same_data(tmp_path, name, file, content):
    (tmp_path / file).write_text(content)
    train, held_out = load(tmp_path / file, name)
    assert sorted(train + held_out) == PUBLISHED[name][3]


def test_a_json_list_of_objects(tmp_path):
    path = tmp_path / "a.json"
    rows = [json.loads(line) for line in PUBLISHED["cb"][1].splitlines()]
    path.write_text(json.dumps(rows, indent=1))
    train, held_out = load(path, "cb")
    assert sorted(train + held_out) == PUBLISHED["cb"][3]
    path.write_text(json.dumps([*rows, 7]))
    with pytest.raises(DataError, match=r"a\.json, element 4: expected an object, got '7'"):
        load(path, "cb")
    path.write_text("[{")
    with pytest.raises(DataError, match=r"a\.json: not JSON .*one list of objects"):
        load(path, "cb")


def test_trec_under_its_own_file_names_and_with_its_odd_byte(tmp_path):
    content = PUBLISHED["trec"][1].encode()
    (tmp_path / "train_5500.label").write_bytes(content + b"HUM:ind What\xf0is it ?\n")
    (tmp_path / "TREC_10.label").write_bytes(content)
    train, held_out = load(tmp_path, "trec")
    assert held_out == PUBLISHED["trec"][3]
    assert (3, "What is it ?") in train


def features(**labels):
    """Features of a hub data set: text columns and labels with names."""
    return Features({
        name: ClassLabel(names=value) if isinstance(value, list)
        else Value(value) if isinstance(value, str) else value
        for name, value in labels.items()
    })  # fmt: skip


HUB = {
    # repository/configuration: (task, features, rows as the hub numbers them, what is wanted)
    "nyu-mll/glue/sst2": (
        "sst2",
        features(sentence="string", label=["negative", "positive"], idx="int32"),
        [("bad", 0, 0), ("good", 1, 1)],
        [(0, "bad"), (1, "good")],
    ),
    "aps/super_glue/rte": (
        "rte",
        features(
            premise="string", hypothesis="string", idx="int32",
            label=["entailment", "not_entailment"],
        ),
        [("p", "h", 0, 0), ("q", "i", 1, 1)],
        [(0, "p", "h"), (1, "q", "i")],
    ),
    "nyu-mll/glue/rte": (
        "rte",
        features(
            sentence1="string", sentence2="string", label=["entailment", "not_entailment"],
            idx="int32",
        ),
        [("p", "h", 0, 0), ("q", "i", 1, 1)],
        [(0, "p", "h"), (1, "q", "i")],
    ),
    "aps/super_glue/cb": (
        "cb",
        features(
            premise="string", hypothesis="string", idx="int32",
            label=["entailment", "contradiction", "neutral"],
        ),
        [("p", "h", 0, 2), ("p", "h", 0, 1), ("p", "h", 0, 0)],
        [(0, "p", "h"), (1, "p", "h"), (2, "p", "h")],
    ),
    "aps/super_glue/wsc.fixed": (
        "wsc",
        features(
            text="string", span1_index="int32", span2_index="int32", span1_text="string",
            span2_text="string", idx="int32", label=["False", "True"],
        ),
        [("t", 0, 4, "Ann", "she", 0, 1), ("t", 2, 4, "Eve", "she", 1, 0)],
        [(0, "t", "she", "Eve"), (1, "t", "she", "Ann")],
    ),
    "aps/super_glue/wic": (
        "wic",
        features(
            word="string", sentence1="string", sentence2="string", start1="int32", start2="int32",
            end1="int32", end2="int32", idx="int32", label=["False", "True"],
        ),
        [("w", "a", "b", 0, 0, 0, 0, 0, 1), ("w", "a", "b", 0, 0, 0, 0, 0, 0)],
        [(0, "w", "a", "b"), (1, "w", "a", "b")],
    ),
    "aps/super_glue/boolq": (
        "boolq",
        features(question="string", passage="string", idx="int32", label=["False", "True"]),
        [("q", "p", 0, 1), ("r", "o", 1, 0)],
        [(0, "o", "r"), (1, "p", "q")],
    ),
    "google/boolq/default": (
        "boolq",
        features(question="string", answer="bool", passage="string"),
        [("q", True, "p"), ("r", False, "o")],
        [(0, "o", "r"), (1, "p", "q")],
    ),
    "fancyzhx/ag_news/default": (
        "ag-news",
        features(text="string", label=["World", "Sports", "Business", "Sci/Tech"]),
        [("a", 3), ("b", 0)],
        [(0, "b"), (3, "a")],
    ),
    "CogComp/trec/default": (
        "trec",
        features(
            text="string", coarse_label=["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"],
            fine_label="int64",
        ),
        [("a", 2, 26), ("b", 5, 40)],
        [(2, "a"), (5, "b")],
    ),
    "somebody/trec/old-order": (
        "trec",
        features(
            text="string", coarse_label=["DESC", "ENTY", "ABBR", "HUM", "NUM", "LOC"],
        ),
        [("a", 0), ("b", 4)],
        [(2, "a"), (5, "b")],
    ),
    "ucirvine/sms_spam/plain_text": (
        "sms-spam",
        features(sms="string", label=["ham", "spam"]),
        [("a", 0), ("b", 1)],
        [(0, "a"), (1, "b")],
    ),
    "rajpurkar/squad/plain_text": (
        "squad",
        features(
            id="string", title="string", context="string", question="string",
            answers={"text": List(Value("string")), "answer_start": List(Value("int32"))},
        ),
        [
            ("1", "t", "c", "q", {"text": ["a", "b"], "answer_start": [0, 2]}),
            ("2", "t", "c", "r", {"text": [], "answer_start": []}),
        ],
        [([], "t", "c", "r"), (["a", "b"], "t", "c", "q")],
    ),
    "ucinlp/drop/default": (
        "drop",
        features(
            section_id="string", query_id="string", passage="string", question="string",
            answers_spans={"spans": List(Value("string")), "types": List(Value("string"))},
        ),
        [("s", "1", "p", "q", {"spans": ["4"], "types": ["number"]})],
        [(["4"], "p", "q")],
    ),
}  # fmt: skip


def hub_data(name):
    _, kinds, rows, _ = HUB[name]
    columns = dict(zip(kinds, map(list, zip(*rows, strict=True)), strict=True))
    return Dataset.from_dict(columns, features=kinds)


def builder_of(files):
    return SimpleNamespace(config=SimpleNamespace(data_files=files))


@pytest.mark.parametrize(
    "file",
    ["/etc/passwd", "file:///etc/passwd", "zip://x.csv::/tmp/x.zip", "hf://x/y.csv::/etc/passwd"],
)
def test_a_hub_data_set_that_refers_to_files_of_the_machine_is_not_read(monkeypatch, file):
    files = {"train": ["hf://datasets/x/y@main/a.csv", "https://example.org/b.csv", file]}
    monkeypatch.setattr(datasets, "load_dataset", pytest.fail)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder_of(files))
    with pytest.raises(DataError, match=r"'x/y' of the hub refers to .* do not use it"):
        load_source("hub:x/y/z", TASKS["sst2"], 0)


@pytest.mark.parametrize("name", HUB)
def test_hub_data_sets_load_under_their_published_columns(name, monkeypatch):
    asked = []

    def load_dataset(*arguments, **more):
        asked.append((*arguments, *more.values()))
        data = hub_data(name)
        return DatasetDict({"train": data, "validation": data, "test": data.select([0])})

    monkeypatch.setattr("hosl_flower.models.checkpoints.hub.is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder_of(None))
    task, _, _, rows = HUB[name]
    found = load_source(f"hub:{name}", TASKS[task], 0)
    for part in found:
        kept = "answers" if TASKS[task].target else "label"
        assert sorted((r[kept], *(r[f] for f in TASKS[task].fields)) for r in part) == rows
    assert asked == [tuple(name.rsplit("/", 1))]


def test_a_hub_data_set_that_is_a_script_is_taken_from_its_tables(monkeypatch):
    asked = []

    def load_dataset(repository, configuration, revision="main"):
        asked.append((repository, configuration, revision))
        if revision == "main":
            raise RuntimeError("Dataset scripts are no longer supported, but found trec.py")
        data = hub_data("CogComp/trec/default")
        return DatasetDict({"train": data, "test": data})

    monkeypatch.setattr("hosl_flower.models.checkpoints.hub.is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder_of(None))
    assert len(load_source("hub:CogComp/trec/default", TASKS["trec"], 0)[1]) == 2
    assert [revision for _, _, revision in asked] == ["main", "refs/convert/parquet"]


@pytest.mark.parametrize("name", TASKS)
def test_every_hub_source_of_the_table_is_one_of_those_tested(name):
    source = TASKS[name].source
    assert source.startswith("bundled:") or source.removeprefix("hub:") in HUB


def test_parquet_shards_of_the_hub_are_one_part_and_keep_the_names_of_labels(tmp_path):
    data = hub_data("somebody/trec/old-order")
    for i in range(2):
        data.select([i]).to_parquet(tmp_path / f"train-0000{i}-of-00002.parquet")
    data.to_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert load(tmp_path, "trec") == [[(2, "a"), (5, "b")]] * 2


TWO = lines({**ENTAILED, "label": 0}, {**ENTAILED, "label": 1})
REFUSED = [
    ("rte", {"train__jsonl": TWO + lines({**ENTAILED, "label": "neutral"})},
     r"train.jsonl, line 3, column 'label': label 'neutral' is not one of 0\.\.1 or entailment"),
    ("rte", {"train__jsonl": TWO + lines({**ENTAILED, "label": None})}, "line 3, .*: label None"),
    ("rte", {"train__jsonl": TWO, "val__jsonl": lines(ENTAILED)},
     "val.jsonl has no column 'label'; task rte needs premise, hypothesis, label, the data has"),
    ("rte", {"train__jsonl": TWO, "test__jsonl": lines({**ENTAILED, "label": 0},
                                                      {**ENTAILED, "label": -1})},
     "test.jsonl, line 2, column 'label': label -1"),
    ("rte", {"train__jsonl": TWO + lines({"premise": "a", "label": 1})},
     "train.jsonl, line 3: hypothesis is missing"),
    ("rte", {"train__jsonl": TWO, "train__tsv": "x"}, "has train.jsonl and train.tsv; keep one"),
    ("wsc", {"train__jsonl": lines({"text": "t", "label": True, "target": {"span1_text": "a"}})},
     "no column 'span2_text'.*the data has text, label, target.span1_text"),
    ("ag-news", {"train__csv": '"5","a","b"\n"1","a","b"\n'}, "no column 'text', 'label'"),
    ("ag-news", {"train__csv": '"4","a","b"\n"5","a","b"\n'}, r"line 2, .* label '5' .* 1\.\.4 or"),
    ("ag-news", {"train__csv": '"4","a","b"\n"0","a","b"\n'}, r"line 2, .* label '0' .* 1\.\.4 or"),
    ("ag-news", {"train__csv": '"4","a","b"\n"1","a"\n'}, "line 2 has 2 fields, the header 3"),
    ("trec", {"train__label": "DESC:manner How ?\nHow many ?\n"},
     "train.label, line 2: expected LABEL:finer and a text, got 'How many "),
    ("trec", {"train__label": "DESC:manner How ?\nWHAT:x y\n"}, "line 2, .*: label 'WHAT'"),
    ("trec", {"train__csv": "text,label\na,1\n"}, "no column 'coarse_label'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "files", "complaint"), REFUSED)
def test_what_is_no_published_form_is_refused_with_the_place(tmp_path, name, files, complaint):
    write(tmp_path, **files)
    with pytest.raises(DataError, match=complaint) as caught:
        load(tmp_path, name)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
