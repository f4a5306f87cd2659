"""Tables as people have them: what is read, what is refused, and how one becomes three files."""

import csv
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_preprocess
from conftest import contents, write_jsonl
from data_preprocess import InputError, read_examples

FILES = [f"./data/{name}.json" for name in ("train", "dev", "test")]


@pytest.fixture
def read(tmp_path, monkeypatch):
    """A function that reads a file of this content; it returns [(text, labels, others)]."""
    monkeypatch.chdir(tmp_path)

    def read_file(content, name="t.csv", **constants):
        for key, value in constants.items():
            monkeypatch.setattr(data_preprocess, key, value)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [tuple(rest) for _, *rest in read_examples(name)]

    return read_file


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A function that splits rows, by default of (text, label); it returns the three files."""
    monkeypatch.chdir(tmp_path)

    def split(rows, header=("text", "label"), **constants):
        if rows is not None:
            write_table("t.csv", [header, *rows])
        for name, value in {"table_path": "t.csv", **constants}.items():
            monkeypatch.setattr(data_preprocess, name, value)
        data_preprocess.main()
        return [[json.loads(line) for line in open(path, encoding="utf-8")] for path in FILES]

    return split


def write_table(path, rows, delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def texts_of(files):
    return [[row["text"] for row in file] for file in files]


def examples(count, labels=("a", "b", "c"), seed=0):
    chance = random.Random(seed)
    samples = [";".join(chance.sample(labels, chance.choice([1, 2]))) for _ in range(count)]
    return [[f"text {n}", cell] for n, cell in enumerate(samples)]


def printed(capsys, event):
    lines = capsys.readouterr().out.splitlines()
    return " ".join(line[9:] for line in lines if line.startswith(f"{event} "))


ONE = [("a", ["b"])]
READ_AS_ONE = [
    "text;label\na;b\n", "text\tlabel\na\tb\n", "text|label\na|b\n", "\ufeff\ufefftext,label\na,b",
    "text,label,,,\na,b,,,\n", "text,label\na,b,, \n", "\n\ntext,label\n\na,b\n,\n\n",
    "text,label\r\r\na,b\r\r\n", ' text , label \n"a",b\n', "\ufeffsep=;\n\ufefftext;label\na;b\n",
    '"sep=;"\r\ntext;label\r\na;b\r\n', "text,label\na, b ;; b\n", "text,label\na,['b']\n",
]  # fmt: skip
READ = [  # (content, [(text, labels)])
    ("text;label\na, b, c;p\n", [("a, b, c", ["p"])]),
    ('text,label\n"a, ""b"", c",p\nd 5" e,q\n', [('a, "b", c', ["p"]), ('d 5" e', ["q"])]),
    ('text,label\n"a\nb",p\n"a\r\n\r\nb",q\n', [("a\nb", ["p"]), ("a\r\n\r\nb", ["q"])]),
    ("text,label\na, q ; p ;; q \nb,\n", [("a", ["q", "p"]), ("b", [])]),
    ("text,label\na,3\nb,0;12\n", [("a", ["3"]), ("b", ["0", "12"])]),
    ("text,label\na,[BUG];[UI]\nb,[UI]\n", [("a", ["[BUG]", "[UI]"]), ("b", ["[UI]"])]),
    ('text,label\na,"[""p\'s"", \'q\']"\nb,[]\n', [("a", ["p's", "q"]), ("b", [])]),
    ("text,label\na,x\nb,y\n", [("a", ["x"]), ("b", ["y"])]),
    ("text,label\n" + "a" * 10**6 + ",b\n", [("a" * 10**6, ["b"])]),
    ('text,label\n"a, b", "p;q"\n', [("a, b", ["p", "q"])]),
    (",text,label\n0,a,b\n\ufeff,text,label\n1,c,d\n", [*ONE, ("c", ["d"])]),
]


@pytest.mark.parametrize("content, expected", [*((content, ONE) for content in READ_AS_ONE), *READ])
def test_what_is_odd_but_clear_is_read(read, content, expected):
    assert [row[:2] for row in read(content)] == expected


@pytest.mark.parametrize("name, delimiter", [("t.csv", ","), ("t.CSV", ";"), ("t.tsv", "\t")])
def test_a_table_that_python_wrote_is_read(read, name, delimiter):
    text = '第一行\n第二行, "引号"; \t制表'
    rows = [["id", "text", "label", "n"], ["7", text, "a; b;", '"'], ["8", "", "a", ""]]
    write_table(name, rows, delimiter)
    found = read(Path(name).read_bytes(), name)
    assert found[0] == (text, ["a", "b"], {"id": "7", "n": '"'})
    assert found[1] == ("", ["a"], {"id": "8", "n": ""})


def test_columns_that_are_not_used_come_along(read):
    found = read(",label,body,,tags\n0,1,a,,x;y\n", text_column="body", label_columns="tags")
    assert found == [("a", ["x", "y"], {"column 1": "0", "label": "1", "column 4": ""})]


FLAGS = [  # (content, label_columns, labels of each row)
    ("text,toxic\na,1\nb,0\n", ["toxic"], [["toxic"], []]),
    ("text,x,y\na,1,\nb,,1\nc,, \n", ["x", "y"], [["x"], ["y"], []]),
    ("text,x,y\na,TRUE,false\nb,False,true\n", ["x", "y"], [["x"], ["y"]]),
    ("y,text,x\n1.0,a,1\n0.0,b, 0 \n", ["x", "y"], [["x", "y"], []]),
    ("text,l1,l2\na,in,out\nb,up,\nc,,in\n", ["l1", "l2"], [["in", "out"], ["up"], ["in"]]),
    ("text,l1,l2\na,10,101\nb,20,\n", ["l1", "l2"], [["10", "101"], ["20"]]),
    ("text,team,late\na,web,1\nb,app,0\n", ["team", "late"], [["web", "late"], ["app"]]),
    ("text,label\na,0\nb,1\nc,2\n", ["label"], [["0"], ["1"], ["2"]]),
]


@pytest.mark.parametrize("content, columns, labels", FLAGS)
def test_a_column_of_0_and_1_is_a_label_and_others_hold_names(read, content, columns, labels):
    assert [row[1] for row in read(content, label_columns=columns)] == labels


LISTS = [
    "[0, 1]",
    "['b' 'c'\n 'd']",
    "[['b']]",
    "[{[]: 1}]",
    "{'b', 'c'}",
    "{p,q}",
    "['p', 'q'",
    "['p'];['q']",
    "('p', 'q')",
]
LISTS += ["[{'c': ['p'], 'y': null}]", "{'c': ['p'], 'ok': true}", "['p', nan]", "['p', null]"]
REFUSED = [  # (content, where, a word of the sentence)
    ("text,label\na,1\nb,0\nc,-1\n", "t.csv", "'-1'"),
    ("text,x,y\na,yes,no\nb,no,\n", "t.csv", "x has 'no'"),
    *((f'text,label\na,p\nb,"{cell}"\n', "t.csv:3", "list of names") for cell in LISTS),
    ("Text,Label\na,b\n", "t.csv", "'Text'"),
    ("text,text,label\na,b,c\n", "t.csv:1", "'text', 'text'"),
    ("text,label\na,b\nc\n", "t.csv:3", "1 cells under 2 columns: .* left out"),
    ("text,label\na, hm,b\n", "t.csv:2", "3 cells under 2 columns"),
    ("My export of May,\n\ntext,label\na,b\n", "t.csv:3", "2 cells"),
    ('text,label\n"a,b\nc,d\n', "t.csv:2", "quotes = False"),
    ('{"text": "a", "label": ["b"]}\n', "t.csv:1", ""),
    ("text,label\n", "t.csv", "no examples"),
    ("text,label\na,\u200b\n", "t.csv:2", "label"),
    ("text,x,y\na,1,0\nb,2,0\n", "t.csv", "x has '2'"),
    ("text,x,y\na,1,-1\nb,0,1\n", "t.csv", "y has '-1'"),
    ("text,x,y\na,0.7,0.0\nb,1.0,1.0\n", "t.csv", "'0.7'"),
    ("text,x,y\na,TRUE,FALSE\nb,FALSE,WAHR\n", "t.csv", "wahr"),
]


@pytest.mark.parametrize("content, where, word", REFUSED)
def test_what_is_not_clear_is_refused_by_its_line(read, content, where, word):
    columns = ["x", "y"] if content.startswith("text,x") else ["label"]
    with pytest.raises(InputError, match=f"^{where}: .*{word}") as caught:
        read(content, label_columns=columns)
    assert "\n" not in str(caught.value)


WRONG = [{"text_column": "content"}, {"label_columns": ["label", "p"]}, {"label_columns": ["text"]}]


@pytest.mark.parametrize("constants", [*WRONG, {"label_separator": ""}, {"quotes": "no"}])
def test_constants_that_cannot_be_are_refused(read, constants):
    with pytest.raises(InputError, match=[*constants][0]):
        read("text,label\na,b\n", **constants)


def stray(cells, delimiter=","):
    """Return a table where a quote opens in row 10 and closes in row 40; cells: of these two."""
    header, plain = ["text", "label", "n"][: len(cells[0])], ["text", "a", "1"][: len(cells[0])]
    rows = [header, *[plain] * 9, cells[0], *[plain] * 29, cells[1], *[plain] * 20]
    return "".join(delimiter.join(row) + "\n" for row in rows)


PAIRS = [(['"Best', "a"], ['bye"', "b"]), (["Best", '"a'], ["bye", 'b"'])]
PAIRS += [(["Best", '"a'], ['bye"', "b"]), (["x", "a", '"1'], ["y", "b", '2"'])]
STRAY = [(name, stray(pair, d)) for pair in PAIRS for name, d in (("t.csv", ";"), ("t.tsv", "\t"))]
STRAY.append(("t.csv", stray(PAIRS[0])))
LATER = [stray(PAIRS[0]).replace("\n", "\n\n"), 'text,label,"note\na,b,c\nd,e,f"\ng,h,i\n']


@pytest.mark.parametrize("name, content", [*STRAY, *(("t.csv", content) for content in LATER)])
def test_rows_between_two_stray_quotes_are_not_swallowed(read, name, content):
    with pytest.raises(InputError, match=rf"^{name}:\d+: .*quotes"):
        read(content, name)
    if content not in LATER:
        found = [text for text, *_ in read(content, name, quotes=False)]
        assert found == [re.split("[;,\t]", line)[0] for line in content.splitlines()[1:]]


@pytest.mark.parametrize("text", ["Dear A,\nthanks", "a,b\n\nc", "x,1\n2,y\nz"])
def test_a_cell_that_may_be_several_rows_is_taken_if_quotes_is_true(read, text):
    content = f'text,label\n"{text}",p\n'
    with pytest.raises(InputError, match="t.csv:2: .* lines .*quotes = True"):
        read(content)
    assert read(content, quotes=True) == [(text, ["p"], {})]


@pytest.mark.parametrize("text", ["Dear A,\nthanks, bye,\nB", "a, b\n\nc, d", "a\r\n1,2\r\n"])
def test_a_cell_of_lines_that_are_no_rows_is_read(read, text):
    assert read(f'text,label\n"{text}",p\n') == [(text, ["p"], {})]


cells = st.text('ab, "', min_size=1, max_size=6).map(lambda cell: f"{cell}e")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(cells, min_size=3, max_size=3), min_size=1, max_size=6))
def test_lines_of_any_quotes_give_their_rows_or_are_refused(read, rows):
    lines = "".join("\t".join(row) + "\n" for row in [["id", "text", "label"], *rows])
    plain = read(lines, "t.tsv", quotes=False, label_separator="\n")
    stripped = [[cell.lstrip(" ") for cell in row] for row in rows]
    assert [[other["id"], text, *labels] for text, labels, other in plain] == stripped
    try:
        assert len(read(lines, "t.tsv", quotes="auto")) == len(rows)
    except InputError as error:
        assert "quotes" in str(error)


def test_a_txt_has_a_text_a_line_whatever_it_begins_with(read):
    content = '\ufeffone, text, two\r\n[x]\n{\n\n"a\nb"\n\ufeff a \t\n{"text": "a"}'
    texts = ["one, text, two", "[x]", "{", "", '"a', 'b"', " a \t", '{"text": "a"}']
    assert read(content, "t.TXT") == [(text, None, {}) for text in texts]


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t.data"])
def test_all_else_is_json_lines(read, name):
    content = '\ufeff{"text": "a\u2028", "id": 3, "label": ["x"], "more": {"n": null}}\r\n\n'
    assert read(content, name) == [("a\u2028", ["x"], {"id": 3, "more": {"n": None}})]
    with pytest.raises(InputError, match=f"{name}:1: .*JSON"):
        read("text,label\na,b\n", name)


NOT_UTF8 = [("£5 – ’tis".encode("cp1252"), "£5 – ’tis"), ("今日股市".encode("gbk"), "GB18030")]
NOT_UTF8 += [("a,b".encode("utf-16"), "UTF-8"), (b"PK\3\4\x14\0\6\0", "unpack")]


@pytest.mark.parametrize("content, word", NOT_UTF8)
@pytest.mark.parametrize("name", ["t.csv", "t.txt", "t.json", "t.xlsx"])
def test_what_is_no_text_in_utf_8_is_refused_with_a_remedy(read, name, content, word):
    with pytest.raises(InputError, match=rf"^{name}:1: .*{word}.*$"):
        read(content, name)


def test_a_table_becomes_three_files_in_the_shares_of_the_rows(table, capsys):
    rows = examples(100)
    files = table(rows)
    assert [len(file) for file in files] == pytest.approx([80, 10, 10], abs=3)
    found = [(row["text"], ";".join(row["label"])) for row in sum(files, [])]
    assert sorted(found) == sorted(map(tuple, rows))
    assert printed(capsys, "split").endswith("texts_kept=0 texts_new=100 gone=0")


def test_other_columns_and_keys_are_kept(table):
    labels = [["toxic"] * (n % 2) + ["rude"] * (n % 3 == 0) for n in range(40)]
    rows = [{"text": f"t {n}", "label": x, "id": f"{n}"} for n, x in enumerate(labels)]
    cells = [[f"{n}", f"t {n}", n % 2, n % 3 == 0] for n in range(40)]
    files = table(cells, ["id", "text", "toxic", "rude"], label_columns=["toxic", "rude"])
    assert sorted(sum(files, []), key=lambda row: int(row["id"])) == rows
    rows = [{**row, "more": {"n": [row["id"]]}} for row in rows]
    Path("all.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    files = table(None, table_path="all.jsonl")
    assert sorted(sum(files, []), key=lambda row: int(row["id"])) == rows


def test_rows_of_one_text_become_one_example(table, capsys):
    rows = [[f"ticket  {n} ", "billing"] for n in range(50)]
    rows += [[f"ticket {n}", "refund"] for n in range(20)]
    rows += [["ticket 3", "a;billing"], ["ticket 4", ""], ["", "a"], [" \u3000", "b"]]
    files = table([[n, *row] for n, row in enumerate(rows)], ["id", "text", "label"])
    found = {" ".join(row["text"].split()): (row["id"], row["label"]) for row in sum(files, [])}
    assert len(sum(files, [])) == len(found) == 50
    assert found["ticket 3"] == ("3", ["billing", "refund", "a"])
    assert found["ticket 30"] == ("30", ["billing"])
    out = capsys.readouterr().out
    assert re.search(r"^row .*label=\['billing'\]\nrow .*label=\['b'\]\nrows ", out, re.MULTILINE)
    assert "without_text=2 joined_by_text=42 most_frequent=(3, 'ticket 4')" in out


def test_every_label_with_three_texts_is_in_all_files_in_its_share(table):
    names, chance = [f"label {n}" for n in range(60)], random.Random(1)
    weights = [1 / (n + 1) for n in range(60)]
    rows = [[f"t {n}", ";".join({*chance.choices(names, weights, k=3)})] for n in range(2000)]
    files = [Counter(label for row in file for label in row["label"]) for file in table(rows)]
    total = sum(files, Counter())
    assert all(file[x] > 0 for file in files for x, count in total.items() if count >= 3)
    for file, share in zip(files, data_preprocess.split):
        assert all(abs(file[x] - share * total[x]) <= 2 + 0.04 * total[x] for x in total)


@pytest.mark.parametrize("seed", [174, 926])
def test_rare_labels_are_in_training(table, seed):
    rare = [["x", "once"], ["y", "twice;a"], ["z", "twice;b;other"], *[["y2", "again"]] * 6]
    rows = [*examples(60, seed=seed), *rare]
    files = table(rows)
    assert {"once", "twice", "other", "again"} <= {x for row in files[0] for x in row["label"]}
    rows = [[t, f"{x};new" if t == files[1][0]["text"] else x] for t, x in rows]
    assert any("new" in row["label"] for row in table(rows)[0])  # on an old text of dev
    weights, chance = {f"label {n}": 1 / (n + 1) for n in range(12)}, random.Random(seed)
    names = [sorted({*chance.choices([*weights], [*weights.values()], k=3)}) for _ in range(13)]
    table([[f"t {n}", ";".join(row)] for n, row in enumerate(names)])  # or it refuses the split


def test_shares_count_rows_where_texts_repeat(table):
    chance = random.Random(2)
    rows = [["same", "a"]] * 400 + [["hello", "b"]] * 60 + [["bye", "a;b"]] * 60
    rows += [[f"t {n}", chance.choice("abc")] for n in range(1480)]
    chance.shuffle(rows)
    files = table(rows, split=(0.7, 0.2, 0.1))
    assert [len(file) for file in files] == pytest.approx([1400, 400, 200], abs=40)
    texts = [{*part} for part in texts_of(files)]
    assert sum(map(len, texts)) == len(texts[0] | texts[1] | texts[2])


PLAIN = "text,label\n" + "".join(f"{text},{cell}\n" for text, cell in examples(30))
COLUMNS = {"text_column": "body", "label_columns": ["tags"]}
UNSPLIT = [  # (content, constants, words of the sentence)
    *((PLAIN, {"split": x}, "split = ") for x in ((0.8, 0.2), (1, 0, 0), (0.8, 0.1, 0.2))),
    ("text,label\na,b\na,c\nd,b\n", {}, "t.csv: 2 different texts are too few"),
    ("body,tags,label\na,b,c\n" * 9, COLUMNS, "t.csv: .*'label'"),
    ("body,tags,text\na,b,c\n" * 9, COLUMNS, "t.csv: .*'text'"),
    (stray(PAIRS[0]), {}, "t.csv:11: 31 lines .*quotes = "),
]


@pytest.mark.parametrize("content, constants, words", UNSPLIT)
def test_what_cannot_be_split_is_refused_and_nothing_is_written(table, content, constants, words):
    Path("t.csv").write_text(content)
    with pytest.raises(InputError, match=f"^{words}"):
        table(None, **constants)
    assert not any(map(os.path.exists, (*FILES, "data/label2idx.json")))


def test_the_split_is_the_same_again_and_in_another_order(table):
    rows = examples(100)
    first = table(rows)
    assert table(None) == first  # over its own files
    for path in (*FILES, "data/split.json"):
        os.remove(path)
    again = table(reversed(rows))
    assert [sorted(part) for part in texts_of(again)] == [sorted(part) for part in texts_of(first)]


def test_texts_stay_in_their_file_when_the_table_grows(table, capsys):
    rows = [[f"a  {text}", cell] for text, cell in examples(900, [f"l {n}" for n in range(12)])]
    first = texts_of(table(rows[:600]))
    random.Random(0).shuffle(rows)
    capsys.readouterr()
    second = texts_of(table(rows))
    assert all({*old} <= {*new} for old, new in zip(first, second))
    assert [len(part) for part in second] == pytest.approx([720, 90, 90], abs=6)
    assert printed(capsys, "split").endswith("texts_kept=600 texts_new=300 gone=0")
    third = texts_of(table([[f" {text}  ", "a;b;c"] for text, _ in rows[:450]]))  # other spaces
    for part, old in zip(third, second):
        assert {text.strip() for text in part} <= {*old}


def test_files_that_it_did_not_write_or_that_were_edited_stay(table):
    os.mkdir("data")
    for words in ("your own, .*; move them", "would be replaced"):
        write_jsonl("data/dev.json", [("mine", ["a"])])
        before = contents("data")
        with pytest.raises(InputError, match=f"^./data/dev.json: .*{words}"):
            table(examples(50))
        assert contents("data") == before
        os.remove("data/dev.json")
        table(None)


@pytest.fixture
def sample(tmp_path):
    """The texts of data/sample/, as a clone has it, and no data yet."""
    os.makedirs(tmp_path / "data/sample")
    texts = [[f"{name} {n}" for n in range(4)] for name in ("train", "dev", "test")]
    for path, part in zip(FILES, texts):
        rows = [(text, ["a", "b"][n % 2 :]) for n, text in enumerate(part)]
        write_jsonl(tmp_path / path.replace("data", "data/sample"), rows)
    return texts


def test_the_sample_is_there_until_data_take_its_place(sample, table, capsys):
    before = contents("data/sample")
    write_jsonl("data/train.json", [("mine", ["a"])])
    data_preprocess.main()
    assert {*os.listdir("data")} == {"sample", "train.json", "label2idx.json"}
    os.remove("data/train.json")
    assert texts_of(table(None, table_path="")) == sample
    assert "data/sample" in (note := printed(capsys, "note")) and "table_path" in note
    assert texts_of(table(None, table_path="")) == sample
    assert "data/sample" not in printed(capsys, "note")
    assert len(sum(table(examples(40)), [])) == 40
    assert "texts_kept=0 texts_new=40" in printed(capsys, "split")
    assert contents("data/sample") == before


def test_what_was_written_before_a_kill_is_not_taken_for_the_users(table, monkeypatch):
    rows, real, left = examples(60), os.replace, []

    def killed(source, target):
        if not left.pop():
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    for writes in range(7):
        left[:] = [0, *[1] * writes]
        with pytest.raises(KeyboardInterrupt):
            table(rows)
    left[:] = [1] * 99
    assert sum(map(len, table(rows))) == 60
