"""Whatever lies in files and constants, a script takes it or says so in one line; and what it never does."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import predict
import train
from conftest import TOKENS, contents, finish, root, script, start, write_jsonl
from data_helper import MultiClsDataSet
from data_preprocess import InputError, run_script

LINE = json.dumps({"text": "中超", "label": ["体育"]}, ensure_ascii=False).encode()
quick = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def data(content):
    """Return a change that gives data/train.json a content."""
    return lambda: open("data/train.json", "wb").write(content)


def write(path, content):
    """Return a change that gives a file a content; None removes it."""
    return lambda: os.remove(path) if content is None else open(path, "wb").write(content)


def model_file(content):
    return lambda: torch.save(content, "model/multi_label_cls.pth")


def no_tokenizer():
    for name in os.listdir("encoder"):
        if "token" in name or "vocab" in name:
            os.remove(f"encoder/{name}")


def empty_vocabulary():
    no_tokenizer()
    open("encoder/vocab.txt", "w").close()


def checkpoint_of_the_article_with_other_labels():
    weights = torch.load("model/multi_label_cls.pth", weights_only=True)
    torch.save(dict(weights), "model/multi_label_cls.pth")
    open("data/label2idx.json", "w").write('{"a": 0}')


PREPROCESS, TRAIN, PREDICT = "data_preprocess", "train", "predict"
CASES = {  # what is wrong: (script, change, constants, parts of the message)
    "missing": (PREPROCESS, write("data/train.json", None), {}, ["./data/train.json: No such file"]),
    "empty": (PREPROCESS, data(b""), {}, ["./data/train.json: no examples"]),
    "blank": (PREPROCESS, data(b"\n\r\n \n"), {}, ["./data/train.json: no examples"]),
    "GBK": (
        PREPROCESS,
        data('{"text": "中超", "label": []}'.encode("gbk")),
        {},
        ["train.json:1: not UTF-8", "GBK", "iconv"],
    ),
    "UTF-16": (PREPROCESS, data(LINE.decode().encode("utf-16")), {}, ["train.json: UTF-16, not UTF-8"]),
    "array": (
        PREPROCESS,
        data(b"[\n" + LINE + b"\n]"),
        {},
        ["train.json: a JSON array", "one object a line"],
    ),
    "broken": (
        PREPROCESS,
        data(LINE + b"\n" + LINE[:20]),
        {},
        ["train.json:2: not JSON", "one whole object"],
    ),
    "no object": (PREPROCESS, data(LINE + b'\n\n"text"'), {}, ["train.json:3: not an object"]),
    "no text": (
        PREPROCESS,
        data(b'{"label": []}'),
        {},
        ['train.json:1: "text" must be a string, but is missing'],
    ),
    "text null": (
        PREPROCESS,
        data(b'{"text": null, "label": []}'),
        {},
        ['"text" must be a string, but is null'],
    ),
    "text list": (
        PREPROCESS,
        data(b'{"text": ["a"], "label": []}'),
        {},
        ['"text" must be a string, but is ["a"]'],
    ),
    "no label": (
        PREPROCESS,
        data(b'{"text": ""}'),
        {},
        ['"label" must be a list of strings, but is missing'],
    ),
    "label null": (
        PREPROCESS,
        data(b'{"text": "", "label": null}'),
        {},
        ['"label" must be a list of strings, but is null'],
    ),
    "bare label": (PREPROCESS, data(b'{"text": "", "label": "a"}'), {}, ["write one as a list too"]),
    "label number": (PREPROCESS, data(b'{"text": "", "label": [1]}'), {}, ["one is 1"]),
    "label empty": (PREPROCESS, data(b'{"text": "", "label": [""]}'), {}, ["non-blank", "one is ''"]),
    "label spaces": (PREPROCESS, data(b'{"text": "", "label": ["  "]}'), {}, ["non-blank"]),
    "ratio": (PREPROCESS, None, dict(max_len_ratio=1.5), ["max_len_ratio = 1.5"]),
    "dev label": (
        TRAIN,
        write("data/dev.json", b'{"text": "", "label": ["x"]}'),
        {},
        ["./data/dev.json:1: the label 'x'"],
    ),
    "test label": (
        TRAIN,
        write("data/test.json", b'{"text": "", "label": ["x"]}'),
        {},
        ["./data/test.json:1: the label 'x'"],
    ),
    "no index": (TRAIN, write("data/label2idx.json", None), {}, ["run: python data_preprocess.py"]),
    "index": (
        TRAIN,
        write("data/label2idx.json", b'{"a": 0, "b": 0}'),
        {},
        ["label2idx.json: not a map from labels one to one"],
    ),
    "index broken": (
        TRAIN,
        write("data/label2idx.json", b'{"a": 0'),
        {},
        ["label2idx.json: not a JSON file"],
    ),
    "no tokenizer": (TRAIN, no_tokenizer, {}, ["./encoder: has no tokenizer files, or an empty vocabulary"]),
    "no vocabulary": (TRAIN, empty_vocabulary, {}, ["./encoder: "]),
    "weights cut": (
        TRAIN,
        lambda: os.truncate("encoder/model.safetensors", 900),
        {},
        ["./encoder/model.safetensors: not a checkpoint", "incomplete"],
    ),
    "max_len": (TRAIN, None, dict(max_len="128"), ["max_len = '128': must be an integer"]),
    "positions": (TRAIN, None, dict(max_len=129), ["max_len = 129: this encoder takes at most 128 tokens"]),
    "epochs": (TRAIN, None, dict(epochs=0), ["epochs = 0: must be an integer, at least 1"]),
    "batch": (TRAIN, None, dict(batch_size=0), ["batch_size = 0: must be an integer, at least 1"]),
    "precision": (TRAIN, None, dict(precision="fp8"), ["precision = 'fp8'"]),
    "device": (TRAIN, None, dict(device="gpu"), ["device = 'gpu'"]),
    "no GPU": (TRAIN, None, dict(device="cuda:99"), ["device = 'cuda:99'"]),
    "lr": (TRAIN, None, dict(lr=float("nan")), ["lr = nan: must be a number, from 0 to 1"]),
    "threshold": (PREDICT, None, dict(threshold=1.5), ["threshold = 1.5: must be"]),
    "predict batch": (PREDICT, None, dict(batch_size=0), ["batch_size = 0: must be"]),
    "predict precision": (PREDICT, None, dict(precision="half"), ["precision = 'half'"]),
    "predict device": (PREDICT, None, dict(device="gpu"), ["device = 'gpu'"]),
    "predict positions": (
        PREDICT,
        None,
        dict(max_len=999),
        ["max_len = 999: this encoder takes at most 128"],
    ),
    "no config": (PREDICT, write("model/config.json", None), {}, ["model/config.json: No such file"]),
    "config": (PREDICT, write("model/config.json", b"[]"), {}, ["model/config.json: not a JSON object"]),
    "no model": (PREDICT, write("model/multi_label_cls.pth", None), {}, ["run: python train.py"]),
    "model cut": (
        PREDICT,
        lambda: os.truncate("model/multi_label_cls.pth", 9000),
        {},
        ["multi_label_cls.pth: not a checkpoint"],
    ),
    "model text": (
        PREDICT,
        write("model/multi_label_cls.pth", b"hello"),
        {},
        ["multi_label_cls.pth: not a checkpoint"],
    ),
    "model of something else": (
        PREDICT,
        model_file({"a": torch.ones(1)}),
        {},
        ["not the weights of a BERT: it has no embeddings"],
    ),
    "hostile": (
        PREDICT,
        write("model/multi_label_cls.pth", pickle.dumps(Hostile(), 2)),
        {},
        ["multi_label_cls.pth: not a checkpoint"],
    ),
    "hostile zip": (
        PREDICT,
        model_file({"fc.weight": Hostile()}),
        {},
        ["multi_label_cls.pth: not a checkpoint"],
    ),
    "other labels": (
        PREDICT,
        checkpoint_of_the_article_with_other_labels,
        {},
        ["has 4 labels, but ./data/label2idx.json lists 1"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_in_one_line_and_nothing_is_changed(trained, monkeypatch, encoder_folder, name):
    """In this process, but for run_script: exit code 1, one line on stderr, no file touched."""
    script, change, constants, parts = CASES[name]
    shutil.copytree(encoder_folder, "encoder")
    monkeypatch.setattr("bert_multilabel_cls.pretrained_model", "./encoder")
    if script == TRAIN:
        shutil.rmtree("model")
    if change:
        change()
    module = sys.modules[script]
    for constant, value in constants.items():
        monkeypatch.setattr(module, constant, value)
    before = contents(".")
    main = {PREPROCESS: lambda: module.main(), TRAIN: train.train, PREDICT: predict.main}[script]
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message and all(part in message for part in parts), (
        message
    )
    assert contents(".") == before and not os.path.exists("hacked")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """`python SCRIPT.py` of all three at once, each in an empty folder: {script: (folder, process)}."""
    running, pipes = {}, dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for name in (PREPROCESS, TRAIN, PREDICT):
        folder = tmp_path_factory.mktemp(name)
        process = subprocess.Popen([sys.executable, root / f"{name}.py"], cwd=folder, **pipes)
        running[name] = folder, process
    yield running
    for _, process in running.values():
        process.communicate()


@pytest.mark.parametrize("script", [PREPROCESS, TRAIN, PREDICT])
def test_the_line_goes_to_stderr_with_exit_code_1(commands, script):
    folder, process = commands[script]
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1
    assert os.listdir(folder) == []


def test_what_is_odd_but_right_is_taken(trained):
    """Byte order mark, blank lines, Windows line ends, no or repeated labels, empty text, emoji."""
    texts = ["", "😀👨‍👩‍👧", "𠮷龘", "\x00\u200b\ufeff", "中" * 3_400_000, "  "]  # one is 10 MB
    lines = [
        json.dumps({"text": text, "label": ["体育"] * 3 * (number % 2)}) for number, text in enumerate(texts)
    ]
    open("data/train.json", "wb").write(b"\xef\xbb\xbf" + "\r\n\r\n".join([*lines, LINE.decode()]).encode())
    dataset = MultiClsDataSet("data/train.json", 16, label2idx={"体育": 0})
    assert dataset.labels[:, 0].tolist() == [0, 1, 0, 1, 0, 1, 1] and dataset.lengths.max() <= 16
    probs = predict.predict_proba(texts)
    assert probs.shape == (6, 4) and np.isfinite(probs).all()
    assert [len(labels) for labels in predict.predict(texts)] == [(row > 0.5).sum() for row in probs]


@quick
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from(
                [
                    LINE,
                    b"",
                    b"\xef\xbb\xbf",
                    b"[",
                    b'{"text": 1}',
                    b"NaN",
                    b'{"text": "\\ud800", "label": []}',
                    b"\x00",
                    b"\r",
                ]
            ),
            st.text(max_size=20).map(lambda text: json.dumps({"text": text, "label": [text]}).encode()),
        ),
        max_size=5,
    )
)
def test_any_bytes_are_examples_or_one_line(tmp_path, tokenizer, lines):
    """Each line that is not blank is an example, or one line says what is wrong with the file."""
    path, content = tmp_path / "a.json", b"\n".join(lines)
    path.write_bytes(content)
    labels = {line["label"][0] for line in map(parse, lines) if line}
    try:
        dataset = MultiClsDataSet(
            str(path), tokenizer=tokenizer, label2idx={label: i for i, label in enumerate(labels)}
        )
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error) and "\r" not in str(error)
    else:
        filled = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
        assert filled and dataset.labels.sum(1).tolist() == [1] * len(filled)


def parse(line):
    """Return an example of the test above if a line is one with a label."""
    try:
        return (
            json.loads(line)
            if json.loads(line)["label"][0].strip() == json.loads(line)["label"][0] != ""
            else None
        )
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).map(str.strip).filter(bool)


@quick
@given(st.lists(names, min_size=1, max_size=12, unique=True), st.data())
def test_labels_become_numbers_and_labels_again(tmp_path, tokenizer, labels, draw):
    chosen = draw.draw(st.lists(st.lists(st.sampled_from(labels), unique=True), min_size=1, max_size=6))
    label2idx = {label: column for column, label in enumerate(sorted(labels))}
    path = write_jsonl(tmp_path / "a.json", [("中", some) for some in chosen])
    rows = MultiClsDataSet(path, tokenizer=tokenizer, label2idx=label2idx).labels
    assert [[label for label, value in zip(sorted(labels), row) if value] for row in rows.tolist()] == [
        sorted(some) for some in chosen
    ]


@settings(quick, max_examples=40)
@given(
    st.lists(
        st.text(
            st.one_of(st.sampled_from(TOKENS[5:-3]), st.characters(exclude_categories=["Cs"])), max_size=40
        ),
        max_size=30,
    ),
    st.integers(1, 4),
    st.integers(1, 30),
)
def test_predict_gives_one_list_a_text_in_order(trained, texts, batch_size, chunk_size):
    predict.batch_size, predict.chunk_size = batch_size, chunk_size
    try:
        together, alone = predict.predict_proba(texts), [predict.predict_proba([text])[0] for text in texts]
        assert len(together) == len(texts) and all(
            np.allclose(a, b, atol=1e-5) for a, b in zip(together, alone)
        )
        assert [len(labels) for labels in predict.predict(texts)] == [(row > 0.5).sum() for row in together]
    finally:
        predict.batch_size, predict.chunk_size = 32, 4096


def test_no_code_that_runs_code():
    """No pickle, eval, exec, shell or trust_remote_code; torch.load only with weights_only=True."""
    for path in root.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(
            r"\b(pickle|eval\(|exec\(|os\.system|subprocess|trust_remote_code)", source.replace(".eval()", "")
        ), path
        assert all(
            "weights_only=True" in call for call in re.findall(r"(?<!safetensors\.)torch\.load\(.*", source)
        ), path


def test_nothing_is_written_but_what_the_constants_name(project, encoder_folder):
    """A run, watched from inside: every file that is opened for writing, made, renamed or removed."""
    watch = """import os, sys
sys.dont_write_bytecode = True
import predict, torch, train
predict.save_model_path = train.save_model_path
touched = set()
def look(event, arguments):
    flags = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR) if event == "open" else 0
    writes = event == "open" and (set(str(arguments[1])) & set("wax+") or flags)
    if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate"):
        touched.add(os.path.relpath(str(arguments[0])).split(os.sep)[0])
sys.addaudithook(look)
real, train.train = train.train, lambda: (real(), predict.main(), print("touched", sorted(touched)))
"""
    code, out, err = finish(start(watch + script(encoder_folder)))  # . is tried with a file without a name
    assert code == 0 and out.splitlines()[-1] == "touched ['.', 'model']", (out, err)
