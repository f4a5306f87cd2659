import json
import os
import subprocess
import sys

import pytest

import data_preprocess
import train
from conftest import EXAMPLES, finish, root, start, write_jsonl
from data_helper import MultiClsDataSet
from data_preprocess import InputError


@pytest.mark.parametrize(
    "ratio, max_len", [(1e-9, 3), (0.1, 3), (0.5, 7), (0.7, 9), (0.9, 11), (0.91, 12), (1, 12)]
)
def test_the_suggested_max_len_covers_the_share_with_cls_and_sep(tmp_path, capsys, ratio, max_len):
    path = write_jsonl(tmp_path / "a.json", [("字" * n, ["x"]) for n in range(10, 0, -1)])
    data_preprocess.preprocess(path, str(tmp_path / "label2idx.json"), ratio)
    assert f"length   max_len={max_len} covers={100 * ratio:g}% longest=12 " in capsys.readouterr().out


def test_a_share_is_not_rounded_up_by_the_error_of_floats(tmp_path, capsys):
    """25 * 0.28 is a little more than 7."""
    path = write_jsonl(tmp_path / "a.json", [("字" * n, ["x"]) for n in range(1, 26)])
    data_preprocess.preprocess(path, str(tmp_path / "label2idx.json"), 0.28)
    assert "length   max_len=9 covers=28% longest=27 " in capsys.readouterr().out


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01])
def test_a_ratio_out_of_range_is_refused(tmp_path, ratio):
    path = write_jsonl(tmp_path / "a.json", EXAMPLES)
    with pytest.raises(InputError, match="max_len_ratio"):
        data_preprocess.preprocess(path, str(tmp_path / "label2idx.json"), ratio)
    assert os.listdir(tmp_path) == ["a.json"]


def test_preprocess_sorts_labels_and_says_what_it_found(tmp_path, capsys):
    path = write_jsonl(tmp_path / "train.json", EXAMPLES)
    data_preprocess.preprocess(path, str(tmp_path / "label2idx.json"), 0.5)
    label2idx = data_preprocess.load_json(tmp_path / "label2idx.json")
    assert label2idx == {"中超": 0, "体育": 1, "股市": 2, "财经": 3}
    printed = capsys.readouterr().out
    assert "texts    count=6 labels=4 labels_per_text=1.67 max_labels=4 without_label=1\n" in printed
    lengths = "max_len=6 covers=50% longest=10 over_6=2 over_128=0 over_512=0\n"
    assert f"length   {lengths}" in printed
    assert (
        "rare     labels=4 fewer_than=5_examples\nlabel    体育 train=3\nlabel    财经 train=3\n" in printed
    )


def test_a_label_that_a_text_has_twice_counts_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_preprocess, "min_label_count", 2)
    path = write_jsonl(tmp_path / "train.json", [("字", ["x", "x"]), ("字", ["y"]), ("字", ["y"])])
    data_preprocess.preprocess(path, str(tmp_path / "label2idx.json"))
    printed = capsys.readouterr().out
    assert "labels=2 labels_per_text=1.00 max_labels=1 " in printed
    assert "rare     labels=1 fewer_than=2_examples\nlabel    y train=2\nlabel    x train=1\n" in printed


def test_label_index_is_the_same_under_any_hash_seed(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.json", [("字", [f"标签{n * 37 % 100}"]) for n in range(100)])
    written = []
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, root / "data_preprocess.py"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        written.append((tmp_path / "data" / "label2idx.json").read_bytes())
    assert written[0] == written[1]
    assert len(json.loads(written[0])) == 100


def test_byte_order_mark_blank_lines_windows_line_ends_are_accepted(tmp_path, tokenizer):
    path = tmp_path / "a.json"
    path.write_bytes(
        b'\xef\xbb\xbf\r\n{"text": "a", "label": []}\r\n  \n{"label": ["x", "x"], "text": "", "more": 1}'
    )
    dataset = MultiClsDataSet(str(path), tokenizer=tokenizer, label2idx={"x": 0})
    assert dataset.labels.tolist() == [[0], [1]] and dataset.lengths.tolist() == [3, 2]


BAD_LINES = {
    "gbk": ('{"text": "中文", "label": []}'.encode("gbk"), "GBK"),
    "array": (b'[{"text": "a", "label": []}]', "array"),
    "broken": (b'{"text": "a", "label": [}', "not JSON (Expecting value at character 25)"),
    "deep": (b"[" * 100_000, "array"),
    "number": (b"3", "not an object"),
    "no text": (b'{"label": []}', '"text" must be a string, but is missing'),
    "null text": (b'{"text": null, "label": []}', '"text" must be a string, but is null'),
    "half a character": (b'{"text": "\\ud800", "label": []}', "half a character"),
    "half a character in a label": (b'{"text": "", "label": ["\\ud800"]}', "half a character"),
    "no label": (b'{"text": "a"}', '"label" must be a list of strings, but is missing'),
    "bare label": (b'{"text": "a", "label": "x"}', "write one as a list too"),
    "label of a wrong type": (b'{"text": "a", "label": [1]}', "one is 1"),
    "blank label": (b'{"text": "a", "label": [" "]}', "non-blank"),
}


@pytest.mark.parametrize("line, message", BAD_LINES.values(), ids=BAD_LINES)
def test_file_line_and_fault_are_named(tmp_path, line, message):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"text": "fine", "label": ["x"]}\n\n' + line)
    with pytest.raises(InputError) as caught:
        data_preprocess.preprocess(str(path), str(tmp_path / "label2idx.json"))
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_examples_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no examples"):
        data_preprocess.preprocess(str(path), str(tmp_path / "label2idx.json"))


def test_script_ends_with_one_line_and_exit_code_1(tmp_path):
    run = subprocess.run(
        [sys.executable, root / "data_preprocess.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("error: ./data/train.json: No such file") and run.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_preprocess_refuses_data_without_labels(tmp_path):
    path = write_jsonl(tmp_path / "a.json", [("字", [])])
    with pytest.raises(InputError, match="no example has a label"):
        data_preprocess.preprocess(path, str(tmp_path / "label2idx.json"))
    assert not (tmp_path / "label2idx.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        '["a"]',
        "{}",
        '{"a": 1}',
        '{"a": 0, "b": 0}',
        '{"a": 0, "b": 2}',
        '{"a": true}',
        '{"a": false}',
        '{"a": "0"}',
        '{"a": 0',
    ],
)
def test_the_label_index_must_be_one_to_one(project, content):
    (project / "data" / "label2idx.json").write_text(content)
    for read in (train.train, lambda: MultiClsDataSet("./data/train.json")):
        with pytest.raises(InputError, match="label2idx.json: not a"):
            read()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    data_preprocess.dump_json({"标签": 0}, path)
    with pytest.raises(TypeError):
        data_preprocess.dump_json({"a": 0, "b": object()}, path)
    assert data_preprocess.load_json(path) == {"标签": 0}
    assert os.listdir(tmp_path) == ["a.json"]
    assert "标签" in path.read_text(encoding="utf-8")


def test_a_file_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    path = str(tmp_path / "a.json")
    data_preprocess.dump_json({"old": 0}, path)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="cannot be written .No space left on device.; .* MiB are free"):
        data_preprocess.dump_json({"new": 0}, path)
    assert data_preprocess.load_json(path) == {"old": 0} and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "content, given, chosen",
    [
        ("0.94 1.33 1.54 2/75 15944\n", {}, "0"),
        ("9.94 9.33 9.54 1/75 15944\n", {}, None),
        ("0.94 1.33 1.54 2/75 15944\n", {"GOMP_SPINCOUNT": "77"}, "77"),
        ("0.94 1.33 1.54 2/75 15944\n", {"OMP_WAIT_POLICY": "active"}, None),
        ("0.94\n", {}, None),
        (None, {}, None),
    ],
)
def test_threads_sleep_while_they_wait_beside_a_busy_process(tmp_path, monkeypatch, content, given, chosen):
    """Where that is known, and the user has not chosen."""
    monkeypatch.setattr(os, "environ", {**given})
    if content is not None:
        (tmp_path / "loadavg").write_text(content)
    data_preprocess.limit_spinning(tmp_path / "loadavg")
    assert os.environ.get("GOMP_SPINCOUNT") == chosen


def test_importing_reads_writes_and_asks_nothing(tmp_path, monkeypatch):
    """In an empty folder, with every network call and every write forbidden."""
    monkeypatch.chdir(tmp_path)
    watch = """
import sys
sys.dont_write_bytecode = True
def hook(event, arguments):
    if event.startswith("socket.") and event != "socket.__new__":
        raise RuntimeError(event)
    ours = event == "open" and str(arguments[0]).endswith((".json", ".pth"))
    if event == "open" and (ours or arguments[1] not in ("r", "rb", None)):
        raise RuntimeError(f"{event} {arguments}")
scripts = ("data_preprocess", "bert_multilabel_cls", "data_helper", "train", "predict")
for name in scripts:
    del sys.modules[name]  # loaded by the process that this one was forked from
sys.addaudithook(hook)
import data_preprocess, bert_multilabel_cls, data_helper, train, predict
try:
    open("a.json")
except RuntimeError:
    print("watched")
"""
    assert finish(start(watch)) == (0, "watched\n", "")
    assert os.listdir(tmp_path) == []
