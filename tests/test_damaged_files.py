"""Files with bytes flipped, cut and inserted, and JSON with other values: read, or refused in a sentence."""

import copy
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import BertModel, BertTokenizer

import bert_multilabel_cls as ours
import data_preprocess
import predict
import train
from conftest import EXAMPLES, contents
from data_helper import MultiClsDataSet, eval_dataloader
from data_preprocess import InputError, load_json

num_inputs = int(os.environ.get("DAMAGED_INPUTS", "6"))  # of each file and kind of damage
values = [None, "", "x", "▁", 0, -1, 1e308, 10**30, 2**31, [], [[]], {}, {"a": None}, True, float("nan"), 3.5]


def damage_bytes(data, rng):
    """Return bytes with some flipped, cut out, doubled or inserted, or the start of them."""
    start, stop = sorted(rng.choices(range(len(data) + 1), k=2))
    stop = min(stop, start + rng.choice([1, 4, 1000]))
    return rng.choice(
        [
            bytes(c ^ 1 << rng.randrange(8) if rng.random() < 3 / len(data) else c for c in data),
            data[:start],
            data[:start] + data[stop:],
            data[:stop] + data[start:],
            data[:start] + rng.randbytes(rng.choice([1, 2, 30])) + data[start:],
            data[:start] + bytes(stop - start) + data[stop:],
        ]
    )


def damage_json(data, rng):
    """Return JSON, or JSONL, with one value, key or element replaced, removed or added."""
    lines = data.decode("utf-8").splitlines() if b"}\n{" in data else [data.decode("utf-8")]
    number = rng.randrange(len(lines))
    parsed = json.loads(lines[number])
    nodes, found = [parsed], []
    while nodes:
        node = nodes.pop()
        children = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        found += [(node, key) for key, _ in children]
        nodes += [child for _, child in children if isinstance(child, (dict, list))]
    node, key = rng.choice(found)
    change = rng.choice(["replace", "remove", "double", "whole"])
    if change == "replace":
        node[key] = copy.deepcopy(rng.choice(values))
    elif change == "remove":
        del node[key]
    elif change == "double" and isinstance(node, list):
        node.insert(rng.randrange(len(node)), node[key])
    elif change == "double":
        node[f"{key}{rng.choice(['', 's', '2'])}"] = node.pop(key)
    else:
        parsed = rng.choice(values)
    lines[number] = json.dumps(parsed, ensure_ascii=False)
    return "\n".join(lines).encode("utf-8")


def load():
    """Read the encoder and compute with it."""
    tokenizer = ours.load_pretrained(BertTokenizer, "./encoder")
    bert = ours.load_pretrained(BertModel, "./encoder")
    dataset = MultiClsDataSet(None, 16, None, tokenizer, {"a": 0}, 0, [(text, ["a"]) for text, _ in EXAMPLES])
    for *inputs, _ in eval_dataloader(dataset, 4, "cpu"):
        ours.pooler_output(bert, *inputs)


def label():
    """Predict with the model in ./model."""
    predict.load_once.cache_clear()
    assert len(predict.predict_with_scores([text for text, _ in EXAMPLES])) == len(EXAMPLES)


def label_file():
    """Predict the texts of a file."""
    predict.main()


def split():
    """Split a table into ./split, read what was written, and write the label index."""
    data_preprocess.main()


def fit():
    """Train, on from a checkpoint if there is one."""
    train.train()


places = {
    "encoder/config.json": load,
    "encoder/tokenizer.json": load,
    "encoder/tokenizer_config.json": load,
    "encoder/vocab.txt": load,
    "encoder/model.safetensors": load,
    "encoder/pytorch_model.bin": load,
    "model/config.json": label,
    "model/tokenizer.json": label,
    "model/tokenizer_config.json": label,
    "model/model.safetensors": label,
    "model/multi_label_cls.pth": label,
    "texts.json": label_file,
    "texts.csv": label_file,
    "table.csv": split,
    "table.tsv": split,
    "split/split.json": split,
    "data/train.json": fit,
    "data/dev.json": fit,
    "data/label2idx.json": fit,
    "model/checkpoint.pth": fit,
    "model/history.jsonl": fit,
    "model/metrics.json": fit,
}
kinds = [(path, kind) for path in places for kind in ("bytes", "json") if kind == "bytes" or ".json" in path]


@pytest.fixture
def workplace(trained, monkeypatch, encoder_folder):
    """A working folder with the file of each of `places`."""
    shutil.copytree(encoder_folder, "encoder")
    monkeypatch.setattr(ours, "pretrained_model", "./encoder")
    monkeypatch.setattr(predict, "output_path", "./labelled.json")
    rows = [f"{text},{';'.join(labels)}\n" for text, labels in EXAMPLES * 3]
    Path("table.csv").write_text("".join(["text,label\n", *rows]), encoding="utf-8")
    Path("table.tsv").write_text(Path("table.csv").read_text("utf-8").replace(",", "\t"), encoding="utf-8")
    shutil.copy("data/train.json", "texts.json")
    shutil.copy("table.csv", "texts.csv")
    monkeypatch.setattr(train, "epochs", 2)
    return trained


def prepare(path, monkeypatch):
    """Make `path` the file that is read."""
    name = Path(path).name
    if name == "vocab.txt":
        tokens = load_json("encoder/tokenizer.json")["model"]["vocab"]
        Path(path).write_text("\n".join(sorted(tokens, key=tokens.get)), encoding="utf-8")
        os.remove("encoder/tokenizer.json")
    elif name == "pytorch_model.bin":
        torch.save(ours.read_state_dict(["encoder/model.safetensors"])[0], path)
        os.remove("encoder/model.safetensors")
    elif name == "multi_label_cls.pth":
        os.remove("model/model.safetensors")
    elif name.startswith("texts"):
        monkeypatch.setattr(predict, "input_path", path)
    elif name.startswith("table") or name == "split.json":
        monkeypatch.setattr(data_preprocess, "table_path", path if name != "split.json" else "table.csv")
        for part in ("train", "dev", "test"):
            monkeypatch.setattr(data_preprocess, f"{part}_data_path", f"./split/{part}.json")
        monkeypatch.setattr(data_preprocess, "label2idx_path", "./split/label2idx.json")
        if name == "split.json":
            data_preprocess.main()
    elif name == "checkpoint.pth":
        shutil.rmtree("model")
        real = train.save_model

        def stop(*arguments):
            real(*arguments)
            os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(train, "save_model", stop)
            train.train()


def in_time(seconds):
    """Let SIGALRM raise an error after some seconds; 0: never mind."""

    def end(*_):
        raise TimeoutError(f"not done within {seconds} s")

    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, end)
        signal.alarm(seconds)


@pytest.mark.parametrize("path, kind", kinds)
def test_a_damaged_file_is_read_or_refused_in_a_sentence(
    workplace, monkeypatch, tmp_path_factory, path, kind
):
    """And no other file is changed, whatever the damage; the number of the damage is that of its seed."""
    prepare(path, monkeypatch)
    whole, damage = Path(path).read_bytes(), damage_bytes if kind == "bytes" else damage_json
    faults, whole_model = [], tmp_path_factory.mktemp("whole") / "model"
    shutil.copytree("model", whole_model)
    for seed in range(num_inputs):
        damaged = damage(whole, random.Random(f"{path} {kind} {seed}"))
        Path(path).write_bytes(damaged)
        before, start = contents("."), time.monotonic()
        in_time(10)
        try:
            places[path]()
        except InputError as error:
            assert "\n" not in str(error)
            assert contents(".") == before, (seed, str(error))
        except BaseException as error:
            faults.append((seed, f"{error!r:.200}"))
        finally:
            in_time(0)
        assert time.monotonic() - start < 10, seed
        after = contents(".")
        inputs = [name for name in before if not name.startswith(("model", "split", "labelled"))]
        assert [after.get(name) for name in inputs] == [before[name] for name in inputs], seed
        shutil.rmtree("model")
        shutil.copytree(whole_model, "model")
        if "split" not in path:
            shutil.rmtree("split", ignore_errors=True)
        Path("labelled.json").unlink(missing_ok=True)
    assert not faults
