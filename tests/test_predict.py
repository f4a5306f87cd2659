import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

import bert_multilabel_cls
import predict
from conftest import root
from data_preprocess import InputError, dump_json

TEXTS = ["中超开赛", "", "股市大涨今日股市大涨", "今", "龘", "中超得分股市大涨"]


def test_texts_to_labels(trained):
    assert predict.predict(["股市大涨", "中超得分股市大涨", "今日"]) == [["股市", "财经"], ["中超", "体育", "股市", "财经"], []]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_results_come_in_the_order_of_the_texts(trained, monkeypatch, batch_size):
    monkeypatch.setattr(predict, "batch_size", batch_size)
    one_by_one = np.concatenate([predict.predict_proba([text]) for text in TEXTS])
    np.testing.assert_allclose(predict.predict_proba(TEXTS), one_by_one, atol=1e-5)
    assert predict.predict(TEXTS) == [predict.predict([text])[0] for text in TEXTS]


def test_probabilities_are_those_of_the_network(trained):
    model, tokenizer, _ = bert_multilabel_cls.load_model(predict.save_model_path, "")
    tensors = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        probs = model(tensors["input_ids"], tensors["attention_mask"], tensors["token_type_ids"])
    assert predict.predict_proba(TEXTS).shape == (len(TEXTS), 4)
    np.testing.assert_allclose(predict.predict_proba(TEXTS), probs, atol=1e-5)


def test_no_texts_give_no_labels_and_load_no_model(project):
    assert predict.predict([]) == []


def test_no_texts_give_no_rows(trained):
    assert predict.predict_proba([]).shape == (0, 4)


PROBS = np.array([[0.9, 0.2, 0.6], [0.1, 0.4, 0.3], [0.5, 0.5, 0.5]])


@pytest.mark.parametrize("threshold, at_least, at_most, chosen", [
    (0.5, 0, None, [[0, 2], [], []]),
    (0.5, 1, None, [[0, 2], [1], [0]]),
    (0.5, 2, None, [[0, 2], [1, 2], [0, 1]]),
    (0.5, 0, 1, [[0], [], []]),
    (0.5, 1, 1, [[0], [1], [0]]),
    (0.35, 0, 2, [[0, 2], [1], [0, 1]]),
    ([0.95, 0.1, 0.7], 1, None, [[1], [1], [1]]),  # a label above its own threshold comes before a likelier one
    (0.5, 9, None, [[0, 1, 2]] * 3),
])
def test_labels_are_chosen_by_threshold_and_number(monkeypatch, threshold, at_least, at_most, chosen):
    monkeypatch.setattr(predict, "min_labels", at_least)
    monkeypatch.setattr(predict, "max_labels", at_most)
    kept = predict.choose_labels(PROBS, np.array(threshold))
    assert [np.flatnonzero(row).tolist() for row in kept] == chosen


def test_tuned_thresholds_are_those_of_the_model(trained, monkeypatch):
    probs = predict.predict_proba(["股市大涨"])[0]
    config = predict.trained_model()[0].bert.config
    assert len(config.thresholds["by_label"]) == 4
    monkeypatch.setattr(config, "thresholds", {"by_label": [float(probs[0]) - 1e-4, 1.0, 1.0, float(probs[3]) - 1e-4]})
    monkeypatch.setattr(predict, "threshold", "tuned")
    assert predict.predict(["股市大涨"]) == [["中超", "财经"]]
    monkeypatch.setattr(config, "thresholds", {})
    with pytest.raises(InputError, match="no tuned thresholds lie beside ./model"):
        predict.predict(["股市大涨"])


@pytest.mark.parametrize("at_least, at_most", [(-1, None), (3, 1), (0, -1), (1.5, None), ("2", None), (0, "2")])
def test_numbers_of_labels_out_of_range_are_an_error(trained, monkeypatch, at_least, at_most):
    monkeypatch.setattr(predict, "min_labels", at_least)
    monkeypatch.setattr(predict, "max_labels", at_most)
    with pytest.raises(InputError, match="m.._labels = "):
        predict.predict(["中超"])


def test_more_tokens_than_the_encoder_has_positions_for_is_an_error(trained, monkeypatch):
    monkeypatch.setattr(predict, "max_len", 129)
    with pytest.raises(InputError, match="max_len = 129: this encoder takes at most 128 tokens"):
        predict.predict(["中超"])


@pytest.mark.parametrize("threshold", [-0.1, 1.5, "best", None])
def test_a_threshold_out_of_range_is_an_error(trained, monkeypatch, threshold):
    monkeypatch.setattr(predict, "threshold", threshold)
    with pytest.raises(InputError, match="threshold = "):
        predict.predict(["中超"])


@pytest.mark.parametrize("texts, message", [("中超", r"wrap the one text in a list: predict\(\['中超'\]\)"),
                                            ("", "wrap"), (["中超", None], "text 2 is None"),
                                            ([b"a"], "text 1 is b'a'"), (None, "got None"),
                                            (["\ud800"], "half a character")])
def test_what_is_no_list_of_texts_is_an_error(project, texts, message):
    with pytest.raises(InputError, match=message):
        predict.predict(texts)


def test_without_a_model_it_says_to_train(project):
    with pytest.raises(InputError, match="run: python train.py"):
        predict.predict(["中超"])


def test_constants_are_obeyed_when_set_from_outside(trained, monkeypatch):
    monkeypatch.setattr(predict, "threshold", 0.0)
    assert predict.predict(["今日"]) == [["中超", "体育", "股市", "财经"]]
    monkeypatch.setattr(predict, "max_len", 6)
    np.testing.assert_allclose(predict.predict_proba(["股市大涨今日中超"]), predict.predict_proba(["股市大涨"]), atol=1e-6)
    shutil.move("model", "elsewhere")
    monkeypatch.setattr(predict, "save_model_path", "./elsewhere/multi_label_cls.pth")
    monkeypatch.setattr(predict, "threshold", 0.5)
    assert predict.predict(["股市大涨"]) == [["股市", "财经"]]


def test_the_model_is_loaded_once_at_the_first_use(trained, monkeypatch):
    loads = []
    load = predict.load_model
    monkeypatch.setattr(predict, "load_model", lambda *paths: loads.append(paths) or load(*paths))
    predict.predict(["中超"]), predict.predict(["股市"])
    assert len(loads) == 1


def test_a_model_that_was_trained_anew_is_loaded_anew(trained):
    before = predict.predict_proba(["中超"])
    model, tokenizer, label2idx = bert_multilabel_cls.load_model(predict.save_model_path, "")
    torch.nn.init.zeros_(model.fc.bias)
    bert_multilabel_cls.save_model(model, tokenizer, label2idx, predict.save_model_path)
    assert not np.allclose(predict.predict_proba(["中超"]), before)


@pytest.mark.parametrize("give", [tuple, iter, np.array])
def test_any_sequence_of_texts_will_do(trained, give):
    assert predict.predict(give(["股市大涨", "今日"])) == [["股市", "财经"], []]


def test_no_network_and_no_label_file_is_needed(trained, monkeypatch):
    """Other labels in data/label2idx.json, no hub, no pretrained encoder: the model's folder is enough."""
    dump_json({"别的": 0, "标签": 1}, "data/label2idx.json")
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", "someone/none")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("used the network"))
    monkeypatch.setattr(bert_multilabel_cls, "find_encoder", lambda name: (name, "") if os.path.isdir(name) else 1 / 0)
    assert predict.predict(["股市大涨"]) == [["股市", "财经"]]


@pytest.mark.parametrize("beside", ["nothing", "plain"])
def test_a_lone_checkpoint_takes_labels_and_encoder_from_the_constants(trained, monkeypatch, encoder_folder, beside):
    os.makedirs("lone")
    shutil.copy("model/multi_label_cls.pth", "lone/multi_label_cls.pth")
    if beside == "plain":
        shutil.copy(os.path.join(encoder_folder, "config.json"), "lone/config.json")
    monkeypatch.setattr(predict, "save_model_path", "./lone/multi_label_cls.pth")
    expected = ["股市", "财经"]
    assert predict.predict(["股市大涨"]) == [expected]


def test_script_prints_texts_labels_and_probabilities(trained):
    run = subprocess.run([sys.executable, root / "predict.py"], capture_output=True, text=True, encoding="utf-8",
                         env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr
    assert [line.split("\t")[0] for line in lines] == predict.texts
    assert all(line.split("\t")[1] == "no label" or "(0." in line.split("\t")[1] for line in lines)


def test_the_weights_take_the_precision_of_the_machine_and_the_labels_stay(trained, monkeypatch):
    """bf16 agrees with float32 on at least 99.9 % of the decisions, over 3,000 texts with 4 labels each."""
    chance = np.random.default_rng(0)
    signs = list("中超股市今日开赛大涨球门得分基金")
    many = ["".join(chance.choice(signs, chance.integers(1, 14))) for _ in range(3000)]
    exact = predict.predict_proba(many)
    monkeypatch.setattr(predict, "precision", "bf16")
    rounded = predict.predict_proba(many)
    assert predict.trained_model()[0].bert.pooler.dense.weight.dtype == torch.bfloat16
    assert predict.trained_model()[0].fc.weight.dtype == torch.float32
    assert not np.array_equal(exact, rounded)
    assert ((exact > 0.5) == (rounded > 0.5)).mean() >= 0.999


def test_memory_is_that_of_a_batch_not_of_all_texts(trained, monkeypatch):
    sizes, real = [], predict.pad
    monkeypatch.setattr(predict, "pad", lambda *given: sizes.append(len(given[1])) or real(*given))
    monkeypatch.setattr(predict, "sorted_together", 10)
    monkeypatch.setattr(predict, "batch_size", 4)
    assert len(predict.predict(["中超"] * 25)) == 25
    assert sizes == [4, 4, 2, 4, 4, 2, 4, 1]


def test_a_cold_start_imports_nothing_that_prediction_does_not_need():
    code = "import sys, predict; print([name for name in ('sklearn', 'train') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
