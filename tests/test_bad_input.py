"""Whatever lies in files and constants, a script takes it or says so in one line."""

import math
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import train
from conftest import contents, root
from data_preprocess import run_script


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


PREPROCESS, TRAIN, PREDICT = "data_preprocess", "train", "predict"
INDEX, CONFIG, PTH = "data/label2idx.json", "model/config.json", "model/multi_label_cls.pth"
X, CUT = b'{"text": "", "label": ["x"]}', b'{"text": "", "lab'
INDICES = [b'["a"]', b"{}", b'{"a": 1}', b'{"a": 0, "b": 2}', b'{"a": "0"}', b'{"a": 0']
PICKLES = [9000, b"hello", pickle.dumps(Hostile(), 2), {"a": torch.ones(1)}, {"a": Hostile()}]
CASES = [  # (script, file, its content or size, None: removed, words of the sentence)
    (PREPROCESS, "data/train.json", None, "./data/train.json: No such file"),
    (PREPROCESS, "data/train.json", b'{"text": "", "label": []}', "./data/train.json: .*label"),
    (PREPROCESS, "data/dev.json", b"\n\r\n", "./data/dev.json: no examples"),
    (PREPROCESS, "data/test.json", CUT, "./data/test.json:1: .*JSON"),
    *((script, f"data/{name}.json", X, f"./data/{name}.json:1: .*'x'")
      for name in ("dev", "test") for script in (PREPROCESS, TRAIN)),
    (TRAIN, "data/train.json", b'{"text": "", "label": []}\n' + CUT, "./data/train.json:2: .*JSON"),
    (TRAIN, INDEX, None, "label2idx.json.*data_preprocess.py"),
    *((TRAIN, INDEX, index, f"./{INDEX}:") for index in INDICES),
    (TRAIN, "encoder/model.safetensors", 900, "./encoder"),
    (TRAIN, "encoder/config.json", b"[]", "./encoder"),
    (PREDICT, "model", None, "train.py"),
    (PREDICT, CONFIG, b'{"model_type": ', "./model"),
    *((PREDICT, PTH, content, PTH) for content in PICKLES),
]  # fmt: skip
CONSTANTS = {
    TRAIN: dict(max_len=["128", 129], keep_tail=[15], epochs=[0, 2.5, "Auto"], lr=[math.nan, -1],
                batch_size=[0, True], loss_name=["hinge"], best_metric=["f1"], seed=[None],
                precision=["fp8"], device=["gpu", "cuda:99"], errors_name=["errors.xlsx"]),
    PREDICT: dict(threshold=[1.5, {"x": 0.5}, None], batch_size=[0], max_labels=[-1],
                  precision=["half"], device=["gpu"], max_len=[999]),
}  # fmt: skip
for script_name, constants in CONSTANTS.items():
    for name, values in constants.items():
        CASES += [(script_name, name, x, re.escape(f"{name} = {x!r}")) for x in values]


def put(path, content):
    if content is None:
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    elif isinstance(content, int):
        os.truncate(path, content)
    else:
        Path(path).write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)


@pytest.mark.parametrize("script, place, content, words", CASES)
def test_it_is_said_in_one_line_and_nothing_is_changed(
    trained, monkeypatch, encoder_folder, script, place, content, words
):
    shutil.copytree(encoder_folder, "encoder")
    monkeypatch.setattr("bert_multilabel_cls.pretrained_model", "./encoder")
    if place in CONSTANTS.get(script, ()):
        monkeypatch.setattr(sys.modules[script], place, content)
    else:
        put(place, content)
    before = contents(".")
    with pytest.raises(SystemExit, match=f"^error: .*{words}.*$") as caught:  # exit code 1
        run_script(train.train if script == TRAIN else sys.modules[script].main)
    assert "\n" not in str(caught.value) and not os.path.exists("hacked")
    assert {k: v for k, v in contents(".").items() if not k.endswith(".lock")} == before


def test_no_code_that_runs_code():
    forbidden = r"\b(pickle|eval\(|exec\(|os\.system|subprocess|trust_remote_code|shell=)"
    for path in root.glob("*.py"):
        source = path.read_text(encoding="utf-8").replace(".eval()", "").replace("literal_eval", "")
        calls = re.findall(r"(?<!safetensors\.)torch\.load\(.*", source)
        assert not re.search(forbidden, source), path
        assert all("weights_only=True" in call for call in calls), path
