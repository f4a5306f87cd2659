"""What data_preprocess.py reads line by line, counts, writes and remarks on."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_preprocess
import train
from conftest import EXAMPLES, write_jsonl
from data_helper import MultiClsDataSet
from data_preprocess import InputError, read_examples


@pytest.fixture
def preprocess(tmp_path, monkeypatch, capsys):
    """A function that preprocesses lists of (text, labels); it returns {event: its lines}."""
    monkeypatch.chdir(tmp_path)

    def run(*files, ratio=0.9):
        names = zip(("train", "b", "c"), files)
        paths = [write_jsonl(f"{name}.json", rows) for name, rows in names]
        data_preprocess.preprocess(paths[0], "label2idx.json", ratio, paths[1:])
        events = {}
        for line in capsys.readouterr().out.splitlines():
            events[line[:9].strip()] = f"{events.get(line[:9].strip(), '')}{line[9:]} "
        return events

    return run


def tagged(*tags):
    return [(f"t{n}", [tag]) for n, tag in enumerate(tags)]


# 25 * 0.28 is a little more than 7 in floats.
SHARES = [(10, 1e-9, 2), (10, 0.28, 4), (10, 0.5, 6), (10, 0.91, 11), (10, 1, 11), (25, 0.28, 8)]


@pytest.mark.parametrize("count, ratio, max_len", SHARES)
def test_the_suggested_max_len_covers_the_share_with_cls_and_sep(preprocess, count, ratio, max_len):
    shown = preprocess([("字" * n, ["x"]) for n in reversed(range(count))], ratio=ratio)["length"]
    assert f"max_len={max_len} covers={ratio:.0%} longest={count + 1} " in shown


def test_preprocess_sorts_labels_and_says_what_it_found(preprocess):
    events = preprocess(EXAMPLES, EXAMPLES[:1], [("x", ["体育"])] * 3)
    label2idx = data_preprocess.load_json("label2idx.json")
    assert [*label2idx.items()] == [("中超", 0), ("体育", 1), ("股市", 2), ("财经", 3)]
    assert events["texts"] == "count=6 unlabelled=1 labels=4 "
    assert events["length"] == "max_len=10 covers=90% longest=10 over_128=0 over_512=0 "
    shown = "体育 train=3 dev=1 test=3 财经 train=3 dev=0 test=0 中超 train=2 dev=1 test=0 "
    assert events["label"] == f"{shown}股市 train=2 dev=0 test=0 "


def test_a_label_index_that_changes_is_kept_beside_the_new_one(preprocess):
    """A .pth of the article has no other."""
    data_preprocess.dump_json({"体育": 0, "中超": 1}, "label2idx.json")
    assert ".old" in preprocess([("a", ["体育", "中超"])])["note"]
    kept = [data_preprocess.load_json(f"label2idx.json{end}") for end in ("", ".old")]
    assert kept == [{"中超": 0, "体育": 1}, {"体育": 0, "中超": 1}]
    assert "note" not in preprocess([("a", ["体育", "中超"])])


def test_of_many_labels_the_most_frequent_and_the_rarest_are_shown(preprocess):
    rows = [(f"t{n}", [f"l{k}" for k in range(30) if n >= k]) for n in range(30)]
    shown = preprocess(rows)["label"].split()[::2]
    assert shown == [f"l{k}" for k in (0, 1, 2, 3, 4, 25, 26, 27, 28, 29)]


def test_byte_order_mark_blank_lines_windows_line_ends_are_accepted(tmp_path, tokenizer):
    path = tmp_path / "a.json"
    lines = [b'{"text": "a", "label": []}', b"  ", b'{"label": ["x", "x"], "text": "", "n": 1}']
    path.write_bytes(b"\xef\xbb\xbf\r\n" + b"\r\n".join(lines))
    dataset = MultiClsDataSet(str(path), tokenizer=tokenizer, label2idx={"x": 0})
    assert dataset.labels.tolist() == [[0], [1]] and dataset.lengths.tolist() == [3, 2]


BAD_LINES = {  # a word of the sentence: such third lines
    "中文|GB18030": ['{"text": "中文", "label": []}'.encode("gbk")],
    r"without \[ \]": [b'[{"text": "a", "label": []}]', b"["],
    "JSON": [b'{"text": "a", "label": [}', b"{", b"text,label", b"[" * 10**5,
             b'{"text": "a", "label": []}{}', b'"text"', b"3"],
    '"text" is': [b'{"label": []}', b'{"Text": "a"}', b'{"text": 5, "label": []}'],
    "half a character": [b'{"text": "a", "label": ["\\ud800"]}'],
    '"label" is None': [b'{"text": "", "labels": []}', b'{"text": "", "label": null}'],
    "list": [b'{"text": "a", "label": "x"}', b'{"text": "", "label": {"x": 1}}'],
    "labels are names": [f'{{"text": "a", "label": ["x", {json.dumps(x)}]}}'.encode()
                        for x in (1, None, ["x"], "", " ", " x", "x\t", "\u3000x", "\u200b")],
}  # fmt: skip


@pytest.mark.parametrize("line, word", [(x, w) for w, lines in BAD_LINES.items() for x in lines])
def test_file_line_and_fault_are_named_and_nothing_is_written(tmp_path, line, word):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"text": "fine", "label": ["x"]}\n\n' + line)
    with pytest.raises(InputError, match=rf"a.json:3: .*{word}") as caught:
        data_preprocess.preprocess(str(path), str(tmp_path / "label2idx.json"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert os.listdir(tmp_path) == ["a.json"]


ODD = [b"{", b'{"text": "a"}', b"\xef\xbb\xbf", b"\x00", b"\r", b'"', b"text,label", b"[" * 5000]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=20) | st.sampled_from(ODD), max_size=5), st.integers(0, 2))
def test_any_bytes_are_examples_or_one_line(tmp_path, lines, kind):
    path = tmp_path / ("a.json", "a.csv", "a.txt")[kind]
    path.write_bytes((b"text,label\n" if kind == 1 else b"") + b"\n".join(lines))
    try:
        rows = [int(location.rpartition(":")[2]) for location, *_ in read_examples(str(path))]
        assert rows == sorted({*rows}) and rows[-1] <= path.read_bytes().count(b"\n") + 1
    except InputError as error:
        assert str(error).startswith(str(path)) and not {"\n", "\r"} & {*str(error)}


@pytest.mark.parametrize("separator", [*" #+/|,:&；，、：\n", " & ", ", "])
def test_labels_that_are_probably_several_show_their_pieces_and_the_remedy(preprocess, separator):
    tags = [["red", "blue"], ["red", "green"], ["red"], ["blue", "red", "tall"], ["tall"]]
    note = preprocess(tagged(*map(separator.join, tags)))["note"]
    shown = data_preprocess.escape(f'"red{separator}blue" (1, train.json:1)')
    count = 2 if separator == " " else 3  # names of two words are usual
    assert f"{count} labels like {shown} may be red and blue (red, tall are labels too)" in note
    remedy = repr(separator.strip(" ") or separator)
    assert f"label_separator = {remedy}" in note


SPELLINGS = [["login", "log-in", "log_in", "logins", "Login", "LOGIN"], ["3", "3.0"]]
SPELLINGS += [["ab", "ａｂ", "a\u200bb"], ["New York", "NewYork", "new-york"]]


@pytest.mark.parametrize("tags", SPELLINGS)
def test_spellings_of_one_label_are_noted_with_their_rows(preprocess, tags):
    note = preprocess(tagged(*tags))["note"]
    for number, tag in enumerate(tags, 1):
        assert f'"{data_preprocess.escape(tag)}" (1, train.json:{number})' in note
    assert "probably one label" in note


@pytest.mark.parametrize("label", ["nan", "None", "NULL", "n/a", "#N/A", "<NA>", "\\N"])
def test_labels_that_are_probably_empty_cells_are_noted(preprocess, label):
    note = preprocess(tagged("a", label, label))["note"]
    assert f'empty cell: "{data_preprocess.escape(label)}" (2, train.json:2)' in note


def test_texts_that_are_odd_are_counted_with_the_first_row(preprocess):
    rows = [("x", ["a"]), ("", ["a"]), (" \u3000", ["a"]), ("x ", ["b"]), ("x", ["a", "b"])]
    note = preprocess([*rows, ("x", ["a"])])["note"]
    assert "train.json: 2 texts come again with other labels, the first at train.json:4" in note
    assert "train.json: 2 texts are empty, the first at train.json:2" in note


def test_texts_in_two_files_are_counted(preprocess):
    train_rows = [(f"t  {n} ", ["a"]) for n in range(5)]
    note = preprocess(train_rows, [("t 1", ["a"]), ("t 2", ["a"])], [("t 2", ["a"])])["note"]
    pairs = ("2 texts are in both train and dev", "1 texts are in both train and test")
    assert note == " ".join((*pairs, "1 texts are in both dev and test "))


CLEAN = [["New York", "New Delhi", "Rome"], ["C++", "C#", "R&D"], ["a/b"], ["bus", "bu"], ["3.0"]]


@pytest.mark.parametrize("tags", [*CLEAN, ["ab-c", "a", "a-1", "-a"], ["1.5", "15"], ["C", "C+"]])
def test_clean_data_have_no_notes(preprocess, tags):
    every = [(f"u{n}", tags) for n in range(9)]
    assert "note" not in preprocess([*tagged(*tags), *every], [("x", tags)], [("y", tags)])


def test_labels_that_training_lacks_are_listed_at_once(project):
    write_jsonl("data/dev.json", [("x", ["体育"]), ("y", ["新", "中超", "旧"]), ("z", ["新"])])
    message = r"^./data/dev.json:2: .*'新': 2, '旧': 1}; .*run python data_preprocess.py"
    for main in (data_preprocess.main, train.train):
        with pytest.raises(InputError, match=message):
            main()


def test_labels_without_an_example_are_counted_with_their_effect(project, capsys, monkeypatch):
    """Such as those of an old label2idx.json, which count 0 in macro F1 for ever."""
    monkeypatch.setattr(train, "epochs", 1)
    label2idx = {"中超": 0, "体育": 1, "旧": 2, "股市": 3, "财经": 4}
    data_preprocess.dump_json(label2idx, train.label2idx_path)
    write_jsonl("data/dev.json", [("x", ["体育"]), ("y", ["中超"])])
    train.train()
    lines = capsys.readouterr().out.splitlines()
    notes = " ".join(line[9:] for line in lines if line.startswith("note"))
    assert "1 labels without an example in train (旧)" in notes and "label2idx.json" in notes
    assert "3 labels without an example in dev" in notes and "macro_f1" in notes


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.json"
    data_preprocess.dump_json({"标签": 0}, path)
    with pytest.raises(TypeError):
        data_preprocess.dump_json({"a": 0, "b": object()}, path)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="a.json: cannot be written .*No space left on device"):
        data_preprocess.dump_json({"new": 0}, path)
    assert data_preprocess.load_json(path) == {"标签": 0} and os.listdir(tmp_path) == ["a.json"]
