"""Tables: one file becomes three, the data is looked at, and a table is labelled."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import data_preprocess
import predict
import train
from conftest import write_jsonl
from data_preprocess import InputError


def write_table(path, rows, delimiter=",", encoding="utf-8"):
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return str(path)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A function that splits a table with these constants; it returns the examples of the three files."""
    monkeypatch.chdir(tmp_path)

    def split(path="table.csv", **constants):
        for name, value in {"table_path": str(path), **constants}.items():
            monkeypatch.setattr(data_preprocess, name, value)
        data_preprocess.main()
        return [read(f"data/{name}.json") for name in ("train", "dev", "test")]

    return split


def read(path):
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    return [(row["text"], row["label"]) for row in rows]


def examples(count, labels=("a", "b", "c"), seed=0):
    chance = random.Random(seed)
    return [[f"text {n}", ";".join(chance.sample(labels, chance.choice([1, 2])))] for n in range(count)]


@pytest.mark.parametrize("name, delimiter", [("t.csv", ","), ("t.CSV", ";"), ("t.tsv", "\t"), ("t.txt", ",")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_becomes_three_files(table, name, delimiter, encoding):
    odd = ['第一行\n第二行, "引号"; \t制表', "a; b;"]
    rows = [["text", "label"], odd, *examples(99)]
    files = table(write_table(name, rows, delimiter, encoding))
    assert [len(file) for file in files] == pytest.approx([80, 10, 10], abs=4)
    expected = [(text, [label.strip() for label in labels.split(";") if label]) for text, labels in rows[1:]]
    assert sorted(sum(files, [])) == sorted(expected)


def test_columns_of_0_and_1_are_labels_by_their_names(table):
    rows = [["id", "comment", "toxic", "insult"]]
    rows += [[n, f"text {n}", ("0", "1", "1.0", "False")[n % 4], n // 2 % 2] for n in range(40)]
    write_table("table.csv", rows)
    files = table(text_column="comment", label_columns=["toxic", "insult"])
    expected = {f"text {n}": ["toxic"] * (n % 4 in (1, 2)) + ["insult"] * (n // 2 % 2) for n in range(40)}
    assert dict(sum(files, [])) == expected


@pytest.mark.parametrize("cell", ["['a', 'b']", '["a", "b"]', " ['b' , 'a' , ''] ", "a ;b;a", "[a];b"])
def test_a_cell_that_is_a_list_gives_its_labels(table, cell):
    files = table(write_table("t.csv", [["text ", " label"], *([f"text {n}", cell] for n in range(30))]))
    expected = {"[a]", "b"} if cell == "[a];b" else {"a", "b"}
    assert all(set(labels) == expected for part in files for _, labels in part)


def test_jsonl_is_split_too(table):
    pairs = [(text, labels.split(";")) for text, labels in examples(50)]
    assert sorted(sum(table(write_jsonl("all.jsonl", pairs)), [])) == sorted(pairs)


def test_every_label_with_three_texts_is_in_all_files_in_its_share(table):
    """A long tail of 60 labels, three to a text."""
    names = [f"label {n}" for n in range(60)]
    chance = random.Random(1)
    weights = [1 / (n + 1) for n in range(60)]
    rows = [[f"text {n}", ";".join({*chance.choices(names, weights, k=3)})] for n in range(2000)]
    write_table("table.csv", [["text", "label"], *rows])
    files = [Counter(label for _, labels in file for label in labels) for file in table()]
    total = sum(files, Counter())
    assert all(file[label] > 0 for file in files for label, count in total.items() if count >= 3)
    for file, share in zip(files, data_preprocess.split):
        assert all(abs(file[label] - share * total[label]) <= 2 + 0.04 * total[label] for label in total)


def test_a_label_of_one_or_two_texts_is_in_training(table):
    write_table(
        "table.csv", [["text", "label"], *examples(60), ["x", "once"], ["y", "twice"], ["z", "twice"]]
    )
    training = {label for _, labels in table()[0] for label in labels}
    assert {"once", "twice"} <= training


def test_equal_texts_are_in_one_file(table):
    rows = [[f"text  {n % 40}" if n < 40 else f"text {n % 40} ", "a;b"[n % 3 :: 2]] for n in range(80)]
    write_table("table.csv", [["text", "label"], *rows])
    texts = [{" ".join(text.split()) for text, _ in file} for file in table()]
    assert not texts[0] & texts[1] and not texts[1] & texts[2] and not texts[0] & texts[2]


def test_the_split_is_the_same_again_and_in_another_order(table):
    rows = examples(100)
    write_table("table.csv", [["text", "label"], *rows])
    first = table()
    assert table() == first  # over its own files
    write_table("table.csv", [["text", "label"], *reversed(rows)])
    assert [sorted(file) for file in table()] == [sorted(file) for file in first]


def test_files_that_it_did_not_write_stay(table):
    os.mkdir("data")
    write_jsonl("data/dev.json", [("mine", ["a"])])
    write_table("table.csv", [["text", "label"], *examples(50)])
    with pytest.raises(InputError, match="^./data/dev.json: would be replaced, .* move them"):
        table()
    assert read("data/dev.json") == [("mine", ["a"])] and os.listdir("data") == ["dev.json"]
    os.remove("data/dev.json")
    table()
    write_jsonl("data/dev.json", [("edited", ["a"])])
    with pytest.raises(InputError, match="./data/dev.json: would be replaced"):
        table()


@pytest.mark.parametrize(
    "content, constants, message",
    [
        ("text,label\na,b\n", {"text_column": "content"}, "has no column 'content', .* text, label"),
        ("text,label\na,b\n", {"label_columns": ["tags"]}, "no column 'tags' but text, label"),
        ("text,x\na,1\n", {"label_columns": ["x", "y"]}, r":2 \(row 2\): no column 'y' among text, x"),
        ("text,label\na,b\n", {"label_columns": "tags"}, "no column 'tags' but text, label"),
        ("text,text\na,b\n", {}, "columns of the same name, .* text, text; rename"),
        ('text,label\na,"[0, 1]"\n', {}, r":2 \(row 2\): the labels are '\[0, 1\]'; write their names with"),
        ("text,label\na,['b' 'c']\n", {}, r":2 \(row 2\): the labels are .* with ';' between"),
        ('text,label\na,"[[""b""]]"\n', {}, r":2 \(row 2\): the labels are"),
        ("text,label\ra,b\rc,d\r", {}, r"its lines end in CR alone; to convert: tr '\\r' '\\n'"),
        ('text,label\n"a\nb",c\n ,d\n', {}, r":4 \(row 3\): the text is empty"),
        ("text,label\na,b\nc\n", {}, r":3 \(row 3\): 1 cells under 2 columns"),
        ("text,label\na,b,c\n", {}, r":2 \(row 2\): 3 cells under 2 columns; .* quotes"),
        ('text,label\na,b\n"c,d\ne,f\n', {}, r":3 \(row 3\): unexpected end of data"),
        (
            "text,x,y\na,1,0\nb,2,0\n",
            {"label_columns": ["x", "y"]},
            r":3 \(row 3\): x must be 0 or 1, but is '2'",
        ),
        ("text,x,y\na,1,\n", {"label_columns": ["x", "y"]}, r":2 \(row 2\): y must be 0 or 1, but is ''"),
        ("text,label\na,b\n", {}, "1 different texts"),
        ("", {}, "no examples|has no column"),
    ],
)
def test_a_fault_of_a_table_is_named_with_its_row(table, content, constants, message):
    Path("table.csv").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        table(**constants)
    assert not os.path.exists("data")


def zipped(name):
    """Return a .zip file with an empty file of this name, as bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "")
    return file.getvalue()


@pytest.mark.parametrize(
    "content, message",
    [
        (gzip.compress(b"text,label", mtime=0), "compressed with gzip; unpack it: gzip -dc"),
        (gzip.compress(b"text,label", mtime=0)[:-9], "compressed with gzip, and damaged"),
        (bz2.compress(b"text,label"), "compressed with bzip2; unpack it: bzip2 -dc"),
        (bz2.compress(b"text,label")[:-9], "compressed with bzip2, and damaged"),
        (lzma.compress(b"text,label"), "compressed with xz; unpack it: xz -dc"),
        (lzma.compress(b"text,label")[:20] + b"\xff" * 20, "compressed with xz, and damaged"),
        (zipped("xl/workbook.xml"), "an .xlsx file; save it in Excel as CSV UTF-8"),
        (zipped("a.csv"), "a .zip file with a.csv; unpack it"),
        (b"PK\x03\x04rest", "a damaged .zip or .xlsx file"),
        (b"\xd0\xcf\x11\xe0rest", "an .xls or .doc file"),
        ("text,label".encode("utf-16"), "iconv -f UTF-16 "),
        ("text,label".encode("utf-16-le"), "iconv -f UTF-16LE "),
        ("text,label".encode("utf-16-be"), "iconv -f UTF-16BE "),
        ("text,label".encode("utf-32"), "iconv -f UTF-32 "),
        (b"PAR1\x15\0rest", "a Parquet file"),
        (bytes(range(256)), "a binary file"),
        (b'\n[\n{"text": "a"}]', "a JSON array"),
        ("text,label\n中,a".encode("gbk"), "not UTF-8, probably GBK; .* CSV UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.txt", "a"])
def test_what_cannot_be_read_is_refused_by_name_whatever_it_is_called(
    trained, monkeypatch, content, name, message
):
    Path(name).write_bytes(content)
    monkeypatch.setattr(predict, "input_path", name)
    monkeypatch.setattr(predict, "output_path", "out.json")
    monkeypatch.setattr(train, "dev_path", name)
    with pytest.raises(InputError, match=message):
        predict.main()
    if not message.startswith("not UTF-8"):
        with pytest.raises(InputError, match=message):
            train.train()
    assert not os.path.exists("out.json")


@pytest.mark.parametrize("name", ["t.csv", "t.json", "t.txt"])
def test_a_table_where_jsonl_is_needed_is_called_one(project, monkeypatch, name):
    write_table(name, [["text", "label"], ["a", "b"]])
    monkeypatch.setattr(train, "train_path", name)
    with pytest.raises(InputError, match=f"{name}: a table, where JSONL is needed; set table_path"):
        train.train()


def test_labels_that_training_lacks_are_listed_at_once(project, monkeypatch, capsys):
    write_jsonl("data/dev.json", [("x", ["体育"]), ("y", ["新", "中超"]), ("z", ["新"])])
    write_jsonl("data/test.json", [("x", ["体育"]), ("y", ["旧"])])
    for main in (data_preprocess.main, train.train):
        with pytest.raises(
            InputError, match="dev.json:2: the label '新' is not in .* .and 1 more, listed above"
        ):
            main()
        printed = capsys.readouterr().out
        assert "unknown  新 file=./data/dev.json texts=2 first_line=2\n" in printed
        assert "unknown  旧 file=./data/test.json texts=1 first_line=2\n" in printed


def test_what_is_in_the_data_is_shown(project, monkeypatch, capsys):
    rows = [(f"t{n}", [f"label {label}" for label in range(15) if n % (label + 1) == 0]) for n in range(30)]
    write_jsonl("data/train.json", [*rows, ("same  text", ["Label 0", "ｌabel 1", "label\u200b 2"])])
    write_jsonl("data/dev.json", [("same text ", ["label 0"]), ("t3", ["label 0"])])
    write_jsonl("data/test.json", [("t3", ["label 1"])])
    data_preprocess.main()
    printed = capsys.readouterr().out
    assert "label    label 0 train=30 dev=2 test=0\n" in printed and "label    … 8 others\n" in printed
    assert 'note     probably one label, to be spelt alike: "Label 0" (1), "label 0" (32)\n' in printed
    assert '"label 1" (16), "ｌabel 1" (1)' in printed and '"label 2" (10), "label\\u200b 2" (1)' in printed
    assert "note     texts that stand in two files: train_dev=2 train_test=1 dev_test=1\n" in printed


@pytest.mark.parametrize("separator", ["|", "；", "\n", ", ", "、"])
def test_labels_that_are_probably_several_or_none_are_noted(project, capsys, separator):
    labels = [f"a{separator}b", f"a{separator}c", "nan", "None", "科技/手机", "科技/电脑"]
    write_jsonl("data/train.json", [(f"t{label}", [label]) for label in labels])
    data_preprocess.preprocess("./data/train.json", "./data/label2idx.json")
    printed = " ".join(line.removeprefix("note").strip() for line in capsys.readouterr().out.splitlines())
    shown = data_preprocess.escape(f"a{separator}b, a{separator}c count=2")
    assert f"probably several labels in one: {shown}" in printed
    assert "labels that are probably empty cells: None, nan" in printed


def test_texts_that_are_empty_or_damaged_are_noted(project, capsys):
    rows = [("x", ["a"]), ("", ["a"]), (" \u3000", ["b"]), ("中\ufffd超", ["b"])]
    write_jsonl("data/train.json", rows)
    data_preprocess.preprocess("./data/train.json", "./data/label2idx.json")
    printed = " ".join(line.removeprefix("note").strip() for line in capsys.readouterr().out.splitlines())
    assert "texts that are empty: 2, the first is ./data/train.json:2" in printed
    assert "texts with U+FFFD, which stands for damaged characters: 1, the first is" in printed


@pytest.mark.parametrize("label", [" a", "a ", "a\t", "\u3000a"])
def test_spaces_around_a_label_are_refused_by_line(project, label):
    write_jsonl("data/train.json", [("x", ["a"]), ("y", [label])])
    with pytest.raises(InputError, match="train.json:2: the label .* has white space around it"):
        data_preprocess.main()


def label_file(monkeypatch, rows, name="in.csv", output="out.csv", **constants):
    """Return the rows of the labelled table."""
    write_table(name, rows, "\t" if name.endswith("tsv") else ",")
    for key, value in {"input_path": name, "output_path": output, **constants}.items():
        monkeypatch.setattr(predict, key, value)
    predict.main()
    with open(output, encoding="utf-8-sig", newline="") as file:
        return [*csv.reader(file, delimiter="\t" if output.endswith("tsv") else ",")]


@pytest.mark.parametrize("output", ["out.csv", "out.tsv"])
def test_a_table_is_labelled_row_by_row(trained, monkeypatch, output):
    texts = ["中超开赛", '股市\n大涨, "今日"', ""]
    pairs = predict.predict_with_scores(texts)
    rows = label_file(monkeypatch, [["id", "text"], *enumerate(texts)], output=output, chunk_size=2)
    assert rows[0] == ["id", "text", "label", "probability"]
    assert [row[:2] for row in rows[1:]] == [[str(n), text] for n, text in enumerate(texts)]
    assert [row[2] for row in rows[1:]] == [";".join(label for label, _ in some) for some in pairs]
    assert [row[3] for row in rows[1:]] == [";".join(str(round(p, 4)) for _, p in some) for some in pairs]


def test_labels_in_a_table_are_measured(trained, monkeypatch, capsys):
    rows = [["label", "text"], ["体育;中超", "中超开赛"], ["财经; 股市", "股市大涨"]]
    rows = label_file(monkeypatch, rows)
    assert rows[0] == ["text", "true", "label", "probability"]
    assert [row[1] for row in rows[1:]] == ["体育;中超", "财经;股市"]
    assert "scores   threshold=0.5 accuracy=1.000" in capsys.readouterr().out


def test_all_probabilities_of_a_file(trained, monkeypatch):
    table = label_file(monkeypatch, [["text"], ["中超开赛"]], all_probabilities=True)
    probs = predict.predict_proba(["中超开赛"])[0]
    assert table[0][2:] == [f"probability {label}" for label in predict.get_labels()]
    assert [float(cell) for cell in table[1][2:]] == pytest.approx(probs, abs=1e-4)
    monkeypatch.setattr(predict, "output_path", "out.json")
    predict.main()
    [row] = [json.loads(line) for line in open("out.json", encoding="utf-8")]
    assert list(row["probability"]) == predict.get_labels() == ["中超", "体育", "股市", "财经"]
    assert row["label"] == predict.predict(["中超开赛"])[0]


def test_a_column_that_the_output_needs_is_refused(trained, monkeypatch):
    with pytest.raises(InputError, match='the key "probability" is needed for the output'):
        label_file(monkeypatch, [["text", "probability"], ["a", "1"]])


def test_jsonl_is_jsonl_though_a_label_is_called_as_the_column(project, monkeypatch):
    for name in ("train", "dev", "test"):
        write_jsonl(f"data/{name}.json", [("中", ["体育", "text", "股市"])] * 8)
    data_preprocess.main()
    assert "text" in data_preprocess.load_json("data/label2idx.json")


SPOKEN = [  # (texts, encoding, what it is called)
    (["中超"], "gbk", "GBK"),
    (["今日沪深两市指数整体呈现震荡调整格局", "新赛季中超开赛"], "gb18030", "GBK"),
    (["今日臺股指數大漲，投資人對於後市看法樂觀。", "這個問題"], "big5", "Big5"),
    (["今日の試合は延期になりました。", "ソニーの新製品を発表する"], "cp932", "Shift JIS"),
    (["今日の試合は延期になりました。"], "euc-jp", "EUC-JP"),
    (["오늘 경기는 비로 인해 연기되었습니다.", "주식 시장이 크게 올랐다"], "euc-kr", "EUC-KR"),
    (["Сегодня матч перенесли из-за дождя"], "cp1251", "Windows-1251"),
    (["Сегодня матч перенесли из-за дождя"], "koi8-r", "KOI8-R"),
    (["Müller fährt über die Straße, größer als früher"], "latin-1", "Latin-1"),
    (["L'été dernier, j'ai été très déçu"], "latin-1", "Latin-1"),
]


@pytest.mark.parametrize(
    "texts, encoding, name", SPOKEN, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_encoding_is_named_and_what_is_advised_works(tmp_path, monkeypatch, texts, encoding, name):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": text, "label": ["a"]}, ensure_ascii=False) for text in texts]
    Path("OLD").write_bytes("\n".join(lines).encode(encoding))
    with pytest.raises(InputError, match="not UTF-8") as caught:
        list(data_preprocess.read_examples("OLD"))
    assert name in str(caught.value)
    if shutil.which("iconv"):
        subprocess.run(re.search("iconv [^;]+", str(caught.value))[0], shell=True, check=True)
        assert [text for _, text, _ in data_preprocess.read_examples("NEW")] == texts


def test_a_few_damaged_places_are_called_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = json.dumps({"text": "今日沪深两市指数整体呈现", "label": ["a"]}, ensure_ascii=False).encode()
    Path("a.json").write_bytes(line.replace("数".encode(), "数".encode()[:2]))
    with pytest.raises(InputError, match="damaged in 1 places"):
        list(data_preprocess.read_examples("a.json"))


def test_a_label_index_of_powershell_is_called_utf_16(tmp_path):
    (tmp_path / "label2idx.json").write_text('{"a": 0}', encoding="utf-16")
    with pytest.raises(InputError, match="UTF-16"):
        data_preprocess.load_label2idx(str(tmp_path / "label2idx.json"))
