"""Texts and files to labels: from Python, from the shell, and by several processes."""

import csv
import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import huggingface_hub
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import pipeline

import bert_multilabel_cls
import data_preprocess
import predict
import train
from bert_multilabel_cls import BertMultiLabelCls
from conftest import contents, finish, root, start
from data_preprocess import InputError, dump_json

TEXTS = ["中超开赛", "", "股市大涨今日股市大涨", "今", "龘", "中超得分股市大涨"]
NAMES = ["中超", "体育", "股市", "财经"]


def set_constants(monkeypatch, **constants):
    """Set constants of predict.py, or of data_preprocess.py."""
    for name, value in constants.items():
        module = predict if hasattr(predict, name) else data_preprocess
        monkeypatch.setattr(module, name, value)


def save_again(labels=NAMES, change=None, **options):
    """Save the model in ./model anew, with other labels, weights, thresholds or lengths."""
    model, tokenizer, _ = bert_multilabel_cls.load_model("./model")
    if len(labels) != len(model.fc.bias):
        model.fc = torch.nn.Linear(16, len(labels))
    if change:
        change(model)
    label2idx = {label: idx for idx, label in enumerate(labels)}
    bert_multilabel_cls.save_model(model, tokenizer, label2idx, "./model", **options)


def fixed_probs(monkeypatch, rows, **options):
    """Make the model in ./model give these probabilities (N, 3), the longest text first."""
    save_again(["a", "b", "c"], **options)
    given = iter(torch.tensor(rows))
    forward = lambda _, input_ids, *__: torch.stack([next(given) for _ in input_ids])  # noqa: E731
    monkeypatch.setattr(BertMultiLabelCls, "forward", forward)


def never(*_, **__):
    pytest.fail("this should not have been reached")


def test_texts_to_labels_in_the_order_of_the_texts(trained, monkeypatch):
    texts, labels = ["股市大涨", "中超得分股市大涨", "今日"], [NAMES[2:], NAMES, []]
    for give in (list, tuple, iter, np.array):
        assert predict.predict(give(texts)) == labels and predict.get_labels() == NAMES
    one_by_one = np.concatenate([predict.predict_proba([text]) for text in TEXTS])
    for batch_size, chunk_size in ((1, 4096), (2, 7), (100, 1)):
        set_constants(monkeypatch, batch_size=batch_size, chunk_size=chunk_size)
        probs = predict.predict_proba(TEXTS * 3)
        np.testing.assert_allclose(probs, np.tile(one_by_one, (3, 1)), atol=1e-5)
    assert predict.predict([]) == [] and predict.predict_proba([]).shape == (0, 4)


def test_probabilities_are_those_of_the_network(trained):
    model, tokenizer, _ = bert_multilabel_cls.load_model(predict.save_model_path, "")
    tensors = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        probs = model(tensors["input_ids"], tensors["attention_mask"], tensors["token_type_ids"])
    np.testing.assert_allclose(predict.predict_proba(TEXTS), probs, atol=1e-5)
    pairs = [dict(some) for some in predict.predict_with_scores(TEXTS)]
    expected = [{NAMES[c]: float(row[c]) for c in range(4) if row[c] > 0.5} for row in probs]
    assert pairs == [pytest.approx(some, abs=1e-5) for some in expected]


PROBS = [[0.9, 0.2, 0.6], [0.1, 0.4, 0.3], [0.5, 0.5, 0.5]]
TINY = [[1e-9, 3e-9, 2e-9]] * 3


@pytest.mark.parametrize(
    "probs, threshold, low, high, chosen",
    [
        (PROBS, 0.5, 0, None, ["ac", "", ""]),
        (PROBS, 0.5, 2, None, ["ac", "bc", "ab"]),
        (PROBS, 0.5, 0, 1, ["a", "", ""]),
        (PROBS, 0.5, 1, 1, ["a", "b", "a"]),
        (PROBS, {"a": 0.95, "b": 0.1}, 0, None, ["bc", "b", "b"]),
        (PROBS, {"b": 0.1, "c": 0.7, "a": 0.95}, 1, 1, ["b"] * 3),  # above, though less likely
        (PROBS, "single", 0, None, ["ac", "bc", "abc"]),
        (PROBS, "by_label", 0, None, ["c", "bc", "bc"]),
        (TINY, 0.0, 0, 2, ["bc"] * 3),
    ],
)
def test_labels_are_chosen_by_limits(trained, monkeypatch, probs, threshold, low, high, chosen):
    tuned = {"single": 0.25, "by_label": {"a": 0.95, "b": 0.3, "c": 0.2}}
    fixed_probs(monkeypatch, probs, thresholds=tuned)
    set_constants(monkeypatch, threshold=threshold, min_labels=low, max_labels=high)
    assert predict.predict(["中"] * 3) == [list(labels) for labels in chosen]


@pytest.mark.parametrize(
    "constants, named",
    [
        ({"min_labels": 3, "max_labels": 1}, "max_labels = 1"),
        ({"threshold": 1.5}, "threshold = 1.5"),
        ({"threshold": {"别的": 0.3}}, "别的"),
        ({"chunk_size": 0}, "chunk_size = 0"),
        ({"max_len": 129}, "max_len = 129.*128"),  # of the encoder's positions
        ({"max_len": 6, "keep_tail": 5}, "keep_tail = 5.*4"),
        ({"precision": "fp8"}, "precision = 'fp8'"),
        ({"output_path": ""}, "output_path = ''"),
        ({"output_path": "out.xlsx"}, "output_path = 'out.xlsx'"),
        ({"output_path": "data/../in.json"}, "output_path = 'data/../in.json'"),
        ({"output_path": "in.json/out.json"}, "in.json"),
        ({"input_path": "none.json"}, "input_path = 'none.json'"),
        ({"label_separator": "超", "output_path": "out.csv"}, "'中超'.*label_separator"),
    ],
)
def test_a_constant_that_cannot_be_is_said_before_computing(trained, monkeypatch, constants, named):
    monkeypatch.setattr(BertMultiLabelCls, "forward", never)
    Path("in.json").write_text('{"text": "a"}\n')
    set_constants(monkeypatch, **{"input_path": "in.json", "output_path": "out.json"} | constants)
    in_python = not {"input_path", "output_path"} & {*constants}
    for call in (predict.main, *[lambda: predict.predict(["中超"])] * in_python):
        with pytest.raises((InputError, OSError), match=named):
            call()
    assert Path("in.json").read_text() == '{"text": "a"}\n'
    assert not {"out.json", "out.csv", "out.xlsx"} & {*os.listdir()}


@pytest.mark.parametrize(
    "texts, named",
    [
        ("中超", r"\[.*str"),
        ({"text": ["a"]}, r"\[.*dict"),
        (np.array([["a", "b"]]), r"\[.*ndarray"),
        (["中超", None], "None"),
        ([b"a"], "b'a'"),
        (["a", "\ud800"], "ud800"),
    ],
)
def test_what_is_no_list_of_texts_is_refused_with_the_remedy(trained, texts, named):
    for function in (predict.predict, predict.predict_proba):
        with pytest.raises(InputError, match=named):
            function(texts)


def test_without_a_model_it_says_to_train_and_where_paths_start(project):
    with pytest.raises(InputError, match=f"python train.py.*{project}"):
        predict.predict(["中超"])


def test_weights_laid_out_for_the_cpu_give_the_same(trained, monkeypatch):
    found = []
    for pack in (predict.pack_linears, lambda bert: None):
        set_constants(monkeypatch, pack_linears=pack, precision="bf16")
        predict.load_once.cache_clear()
        found.append(predict.predict_proba(TEXTS))
    np.testing.assert_allclose(*found, atol=0.02)
    assert predict.predict_proba(TEXTS).std() > 0.1


def test_the_model_is_loaded_once_and_after_a_training_again(trained, monkeypatch, capsys):
    predict.load_once.cache_clear()
    loads, load = [], predict.load_model
    monkeypatch.setattr(predict, "load_model", lambda *paths: loads.append(1) or load(*paths))
    before = predict.predict_proba(["中超"])
    assert np.array_equal(predict.predict_proba(["中超"]), before) and len(loads) == 1
    assert "note" not in capsys.readouterr().out
    save_again(change=lambda model: torch.nn.init.zeros_(model.fc.bias))
    Path("model/checkpoint.pth").write_bytes(b"")
    assert not np.allclose(predict.predict_proba(["中超"]), before) and len(loads) == 2
    assert re.search(r"(?m)^note .*not finished", capsys.readouterr().out)


def test_the_folder_alone_is_needed_wherever_it_is(trained, monkeypatch):
    """Other labels in data/label2idx.json, no hub, no pretrained encoder."""
    dump_json({"别的": 0, "标签": 1}, "data/label2idx.json")
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", "someone/none")
    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    shutil.move("model", "elsewhere")
    for path in ("./elsewhere/multi_label_cls.pth", "elsewhere"):
        set_constants(monkeypatch, save_model_path=path)
        assert predict.predict(["股市大涨"]) == [["股市", "财经"]]


def test_a_checkpoint_of_the_article_takes_labels_from_the_constants(trained, monkeypatch):
    """Also where a model of ours lies beside it."""
    weights = torch.load("model/multi_label_cls.pth", weights_only=True)
    torch.save(dict(weights), "model/multi_label_cls.pth")
    assert predict.predict(["股市大涨"]) == [["股市", "财经"]]
    os.remove("data/label2idx.json")
    set_constants(monkeypatch, save_model_path="model/../model/multi_label_cls.pth")
    with pytest.raises(InputError, match="data/label2idx.json"):
        predict.predict(["股市大涨"])


def test_the_weights_take_the_precision_of_the_machine_and_the_labels_stay(trained, monkeypatch):
    """Where bf16 decides otherwise than float32 it was a tie but for 0.05."""
    chance, signs = np.random.default_rng(0), list("中超股市今日开赛大涨球门得分基金")
    many = ["".join(chance.choice(signs, chance.integers(1, 14))) for _ in range(300)]
    exact = predict.predict_proba(many)
    set_constants(monkeypatch, precision="bf16")
    rounded, model = predict.predict_proba(many), predict.get_model()[0]
    assert model.bert.pooler.dense.weight.dtype == torch.bfloat16
    assert model.fc.weight.dtype == torch.float32 and not np.array_equal(exact, rounded)
    differ = (exact > 0.5) != (rounded > 0.5)
    assert differ.mean() < 0.005 and np.abs(exact[differ] - 0.5).max(initial=0) < 0.05


def test_texts_are_cut_as_in_training_unless_the_constants_say_otherwise(trained, monkeypatch):
    """Training had max_len = 16 and keep_tail = 0: a 15th character is not seen, but for spaces."""
    seen = predict.predict_proba(["中" * 14 + "股", "中" * 14, "中" * 14 + "超", "中" * 13])
    np.testing.assert_allclose(seen[0], seen[2], atol=1e-6)
    assert not np.allclose(seen[1], seen[3], atol=1e-6)
    for blank in (" " * 1_000_000, "\n\t\u3000" * 300_000):
        texts = ["股市大涨", f"{blank}股市大涨", f"股市大涨{blank}"]
        probs = predict.predict_proba(texts)
        np.testing.assert_allclose(probs, probs[[0, 0, 0]], atol=1e-6)
    ends = ["股市今日中超开赛大涨", "股市大涨"]
    set_constants(monkeypatch, max_len=6, keep_tail=2)
    np.testing.assert_allclose(*predict.predict_proba(ends), atol=1e-6)
    set_constants(monkeypatch, max_len=32, keep_tail=None)
    longer = predict.predict_proba(["中" * 14 + "股", "中" * 14 + "超"])
    assert not np.allclose(longer[0], longer[1], atol=1e-6)
    save_again(truncation=(6, 2))
    set_constants(monkeypatch, max_len=None)
    np.testing.assert_allclose(*predict.predict_proba(ends), atol=1e-6)


def test_with_windows_all_of_a_long_text_decides(trained, monkeypatch):
    """By the root mean square of the probabilities of its parts, weighted by their tokens."""
    parts, counts = ["今" * 14, "大" * 14, "股市大涨"], np.array([[1500], [3000], [1]])
    probs, lengths = predict.predict_proba(parts), counts * [[16], [16], [6]]
    expected = np.sqrt((probs**2 * lengths).sum(0) / lengths.sum())
    long = "".join(part * count for part, [count] in zip(parts, counts))
    set_constants(monkeypatch, windows=True, chunk_size=3)
    found = predict.predict_proba([parts[2], long, "", parts[0]])
    np.testing.assert_allclose(found[[0, 1, 3]], [probs[2], expected, probs[0]], atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_folder_of_transformers_is_truncated_as_it_says(trained, monkeypatch, side):
    """Its model was trained with max_length = 6, on the ends of long texts or their beginnings."""
    for name, changes in (
        ("config.json", {"thresholds": None, "truncation": None}),
        ("tokenizer_config.json", {"truncation_side": side, "model_max_length": 6}),
    ):
        settings = data_preprocess.load_json(f"model/{name}") | changes
        dump_json({k: v for k, v in settings.items() if v is not None}, f"model/{name}")
    os.remove("model/multi_label_cls.pth")
    texts = ["股市大涨中超开赛", "中超开赛股市大涨", "今"]
    theirs = pipeline("text-classification", model="./model", top_k=None, device="cpu")
    found = predict.predict_proba(texts)
    for probs, row in zip(found, theirs(texts, truncation=True)):
        expected = {pair["label"]: pair["score"] for pair in row}
        assert dict(zip(NAMES, probs)) == pytest.approx(expected, abs=1e-5)


def write_input(name, content):
    """Write bytes, a string, or rows as JSON, one line each."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def label_file(monkeypatch, content, name="in.json", output="out/labels.json", **constants):
    """Write a file, have predict.py label it, and return the rows of the output."""
    write_input(name, content)
    set_constants(monkeypatch, input_path=name, output_path=output, **constants)
    predict.main()
    assert not os.path.exists(f"{output}.part")
    return read_output(output)


def read_output(path):
    """Return the rows of an output, as dicts."""
    if path.lower().endswith(("csv", "tsv")):
        with open(path, encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if path.lower().endswith("tsv") else ","
            return list(csv.DictReader(file, delimiter=delimiter))
    return [json.loads(line) for line in Path(path).read_text("utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("chunk, batch", [(4096, 32), (2, 1)])
def test_a_file_is_labelled_in_its_order_with_all_in_it(trained, monkeypatch, capsys, chunk, batch):
    others = {"more": {"a": [1.5, None, "龘"]}, "columns": 5, "half": "\ud800"}
    given = [{"id": number, "text": text} | others for number, text in enumerate(TEXTS * 5)]
    rows = label_file(monkeypatch, given, chunk_size=chunk, batch_size=batch)
    assert [{key: row[key] for key in given[0]} for row in rows] == given
    assert "scores" not in capsys.readouterr().out
    pairs = predict.predict_with_scores(TEXTS * 5)
    assert [row["label"] for row in rows] == [[label for label, _ in some] for some in pairs]
    assert [row["probability"] for row in rows] == [
        {label: pytest.approx(prob, abs=1e-4) for label, prob in some} for some in pairs
    ]
    assert '"label": ["中超", "体育"' in Path("out/labels.json").read_text("utf-8")  # no \u4e2d


@pytest.mark.parametrize(
    "name, content, texts",
    [
        ("in.txt", "\ufeff股市大涨\r\n\r\n 中超 \n今日", ["股市大涨", "", " 中超 ", "今日"]),
        ("IN.TXT", '{"text": "a"}\n[1]\none, text', ['{"text": "a"}', "[1]", "one, text"]),
        ("in.json", '\n{"text": "a"}\r\n\n{"text": "b\\nc"}', ["a", "b\nc"]),
        ("in.csv", 'id,text\n1,"a, ""b"""\n2,\n', ['a, "b"', ""]),
        ("in.tsv", 'text\tid\na "b\t1\n"c"\t2\n', ['a "b', "c"]),
    ],
)
def test_the_extension_decides_how_a_file_is_read(trained, monkeypatch, name, content, texts):
    rows = label_file(monkeypatch, content, name)
    assert [row["text"] for row in rows] == texts
    assert [row["label"] for row in rows] == predict.predict(texts)
    ids = ["1", "2"][: len(rows)] if "id" in content else [None] * len(rows)
    assert [row.get("id") for row in rows] == ids


@pytest.mark.parametrize("output", ["out/labels.csv", "out/labels.TSV", "out/labels.jsonl"])
def test_a_table_comes_out_as_it_went_in_with_labels_beside(trained, monkeypatch, output):
    """Cells with line breaks, quotes, delimiters and formulas; two labels in a cell."""
    content = 'number,message,tags,note\n007,股市大涨,股市;财经,"a ""b""\nc"\n=1+1,今日,,"x,y\tz"\n'
    columns = {"text_column": "message", "label_columns": ["tags"]}
    rows = label_file(monkeypatch, content, "in.csv", output, **columns)
    join = (lambda names: names) if output.endswith("jsonl") else ";".join
    names = ("number", "message", "note", "true", "label")
    assert [[row[name] for name in names] for row in rows] == [
        ["007", "股市大涨", 'a "b"\nc', join(NAMES[2:]), join(NAMES[2:])],
        ["=1+1", "今日", "x,y\tz", join([]), join([])],
    ]


def test_a_label_with_the_separator_in_it_can_be_read_back(trained, monkeypatch):
    """It is refused, and another separator or JSONL does."""
    save_again(["a;b", "a", "b", "c"])
    labels, content = predict.predict(TEXTS), "\n".join(TEXTS)
    with pytest.raises(InputError, match="'a;b'"):
        label_file(monkeypatch, content, "in.txt", "out/labels.csv")
    rows = label_file(monkeypatch, content, "in.txt", "out/labels.csv", label_separator="/")
    assert [row["label"] for row in rows] == ["/".join(some) for some in labels]
    rows = label_file(monkeypatch, content, "in.txt", "out/other.json", label_separator=";")
    assert [row["label"] for row in rows] == labels


@pytest.mark.parametrize("output", ["out/labels.json", "out/labels.csv"])
def test_all_probabilities_are_written_if_asked_for(trained, monkeypatch, output):
    rows = label_file(monkeypatch, "\n".join(TEXTS), "in.txt", output, all_probabilities=True)
    for row, probs in zip(rows, predict.predict_proba(TEXTS), strict=True):
        found = row.get("probability") or {n: float(row[f"probability {n}"]) for n in NAMES}
        assert found == {name: pytest.approx(p, abs=1e-4) for name, p in zip(NAMES, probs)}


def test_a_labelled_file_is_measured(trained, monkeypatch, capsys):
    """Against scikit-learn; neither lines without a label nor unknown tags count."""
    truth = [["中超"], [], ["股市", "财经", "新"], None, ["体育", "新", "旧"], ["中超", "体育"]]
    given = [{"text": t} | ({} if y is None else {"label": y}) for t, y in zip(TEXTS, truth)]
    rows = label_file(monkeypatch, given, chunk_size=2)
    assert [row.get("true") for row in rows] == truth
    true, found = (
        np.array([[name in row[key] for name in NAMES] for row in rows if "true" in row])
        for key in ("true", "label")
    )
    out = capsys.readouterr().out
    assert re.search(r"(?m)^note .*\b2 labels.*新 \(2\), 旧 \(1\)", out)
    (scores,) = re.findall("(?m)^scores .*", out)
    printed = dict(field.split("=") for field in scores.split()[1:])
    assert float(printed["accuracy"]) == pytest.approx((true == found).all(1).mean(), abs=6e-4)
    for name in ("micro", "macro", "samples"):
        expected = f1_score(true, found, average=name, zero_division=0)
        assert float(printed[f"{name}_f1"]) == pytest.approx(expected, abs=6e-4)


TAGS, PROBABILITIES = {"label_columns": ["tags"]}, {"all_probabilities": True}


@pytest.mark.parametrize(
    "content, name, constants, named",
    [
        ('{"text": "a"}\n{"text": 1}\n', "in.json", {}, 'in.json:2: "text"'),
        ('{"text": "a"}\n{"text"', "in.json", {}, "in.json:2"),
        ("中超".encode("gbk"), "in.txt", {}, "in.txt:1.*GB18030"),
        ("texts,label\na,b\n", "in.csv", {}, "in.csv.*text_column"),
        ('text,id\n"a,1\nb,2\nc"d,3\n', "in.csv", {}, "in.csv:2.*quotes"),
        ("tags,text,label\nx,a,b\n", "in.csv", TAGS, "in.csv:2.*'label'"),
        ("text,probability 中超\na,b\n", "in.csv", PROBABILITIES, "'probability 中超'"),
        ('{"text": "a", "true": 1}\n', "in.json", {}, "in.json:1.*'true'"),
    ],
)
def test_a_fault_in_a_file_is_said_first(trained, monkeypatch, content, name, constants, named):
    """So is a column that is called as one of the output."""
    os.mkdir("out")
    Path("out/labels.json").write_text("before")
    monkeypatch.setattr(BertMultiLabelCls, "forward", never)
    with pytest.raises(InputError, match=named):
        label_file(monkeypatch, content, name, **constants)
    assert Path("out/labels.json").read_text() == "before"


def test_an_input_that_is_cut_after_it_was_checked_is_an_error(trained, monkeypatch):
    real, given = predict.open_part, [{"text": "今日"}] * 6
    change = lambda *more: (real(*more), write_input("in.json", given[:3]))[0]  # noqa: E731
    monkeypatch.setattr(predict, "open_part", change)
    with pytest.raises(InputError, match="in.json"):
        label_file(monkeypatch, given, chunk_size=2)
    assert not os.path.exists("out/labels.json")


LABEL = """import predict
predict.device, predict.precision = "cpu", "fp32"
predict.input_path, predict.output_path = "in.json", "out/labels.json"
predict.chunk_size, predict.batch_size = 8, 3
"""


def test_processes_of_torchrun_write_the_same_bytes(trained):
    """60 texts in portions of 8: in the last round one process has part of one, another none."""
    chance, outputs, scores = np.random.default_rng(0), [], []
    signs, lengths = list("中超股市今日开赛大涨"), chance.integers(1, 30, 60).tolist()
    given = [{"text": "".join(chance.choice(signs, n)), "label": ["体育", "新"]} for n in lengths]
    write_input("in.json", given)
    for processes in (1, 3):
        code, out, err = finish(start(f"{LABEL}predict.run_script(predict.main)", processes))
        assert code == 0, err
        outputs.append(Path("out/labels.json").read_bytes())
        scores.append(re.findall("(?m)^(?:scores|label|note) .*", out))
        assert f"processes={processes}\n" in out and out.count("\nwrote ") == 1
    assert outputs[0] == outputs[1] and outputs[0].count(b"\n") == 60
    assert scores[0] == scores[1] and len(scores[0]) == 6


@pytest.mark.skipif(sys.platform == "win32", reason="measures with the resource module")
def test_memory_does_not_grow_with_the_file(trained):
    """Ten times as many texts; what they have beside the text is 1,000 bytes a line."""
    for name, texts in (("small.json", 600), ("in.json", 6_000)):
        write_input(name, [{"text": "中超股市", "more": "x" * 1000}] * texts)
    code = f"""{LABEL}
import resource
predict.chunk_size, predict.batch_size = 200, 32
for predict.input_path in ("small.json", "small.json", "in.json"):
    predict.main()
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    code, out, err = finish(start(code))
    assert code == 0, err
    _, small, large = map(int, re.findall(r"(?m)^peak (\d+)", out))
    assert os.path.getsize("out/labels.json") > 6 * 2**20
    assert large - small < 5 * 1024, (small, large)  # KiB


def command(name, *arguments, stdin=None):
    """Run a script as from the shell, stdin: of a pipe; return (exit code, stdout, stderr)."""
    code = f"import os, runpy, sys\nsys.argv = {[name, *arguments]!r}\n"
    if stdin is not None:
        code += f"reader, writer = os.pipe()\nos.write(writer, {stdin.encode()!r})\n"
        code += "os.close(writer), os.dup2(reader, 0)\nsys.stdin = open(0, encoding='utf-8')\n"
    path = str(root / name)
    return finish(start(f"{code}runpy.run_path({path!r}, run_name='__main__')"))


@pytest.mark.parametrize(
    "arguments, stdin, texts",
    [
        (["中超开赛", "股市\n大涨"], None, ["中超开赛", "股市\\n大涨"]),
        (["--", "-5 degrees"], None, ["-5 degrees"]),
        (["--", "new.csv"], None, ["new.csv"]),
        (["股市"], "中超\n", ["股市"]),
        ([], "中超开赛\n\n股市大涨\n", ["中超开赛", "", "股市大涨"]),
        ([], None, predict.texts),
    ],
)
def test_texts_from_the_shell_are_labelled_one_a_line(trained, arguments, stdin, texts):
    code, out, err = command("predict.py", *arguments, stdin=stdin)
    assert code == 0, err
    printed = [line.split("\t") for line in out.split("\n")[:-1]]
    assert [text for text, _ in printed] == texts
    given = [text.replace("\\n", "\n") for text in texts]
    for (_, shown), pairs in zip(printed, predict.predict_with_scores(given)):
        found = {name: float(p) for name, p in re.findall(r"(\w+)\((\d\.\d{3})\)", shown)}
        assert found == {name: pytest.approx(p, abs=0.02) for name, p in pairs}
        assert found or shown == "no label"


@pytest.mark.parametrize(
    "name, content, output",
    [
        ("new.csv", "id,text\n7,股市大涨\n", "new_labelled.csv"),
        ("new table.CSV", "id,text\n7,股市大涨\n", "new table_labelled.CSV"),
        ("./data/new.jsonl", '{"text": "股市大涨", "id": 7}\n', "data/new_labelled.jsonl"),
        ("new.v2.txt", "股市大涨\n", "new.v2_labelled.csv"),
    ],
)
def test_a_file_in_place_of_a_text_is_labelled_beside_it(trained, name, content, output):
    write_input(name, content)
    code, out, err = command("predict.py", name)
    (row,) = read_output(output)
    assert code == 0 and row["text"] == "股市大涨" and "股市" in row["label"], err
    assert output in out and Path(name).read_text("utf-8") == content
    assert row.get("id") in (7, "7") or name.endswith(".txt")


@pytest.mark.parametrize("arguments", [["a.csv", "b.csv"], ["a.csv", "text"], ["missing.csv"]])
def test_the_name_of_a_file_is_not_labelled_as_a_text(trained, arguments):
    for name in ("a.csv", "b.csv"):
        Path(name).write_text("text\na\n")
    code, out, err = command("predict.py", *arguments)
    assert code == 1 and out == "" and re.fullmatch(r"error: .*\n", err)


@pytest.mark.parametrize(
    "script, others",
    [
        (predict, "data_preprocess.py text_column label_columns label_separator quotes"),
        (train, "bert_multilabel_cls.py pretrained_model"),
        (data_preprocess, ""),
    ],
)
def test_arguments_are_explained_or_refused_and_nothing_is_done(project, script, others):
    """The help names the constants of other scripts too."""
    before, name = contents(project), os.path.basename(script.__file__)
    code, out, err = command(name, "--help")
    words = ["reads ", "writes ", "run ", *others.split()]
    assert (code, err) == (0, "") and all(word in out for word in words)
    code, out, err = command(name, "--threshold=1", "a")
    assert (code, out) == (1, "") and re.fullmatch("error: '--threshold=1'.*--help\n", err)
    assert contents(project) == before
