import builtins
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

import bert_multilabel_cls
import data_preprocess
import predict
import train
from conftest import contents, finish, root, start
from bert_multilabel_cls import BertMultiLabelCls
from data_preprocess import InputError, dump_json, run_script

TEXTS = ["中超开赛", "", "股市大涨今日股市大涨", "今", "龘", "中超得分股市大涨"]


def dump_jsonl(rows, path):
    """Write rows as JSON, one line each."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def fixed_probs(monkeypatch, rows, labels=("a", "b", "c")):
    """Make the model in ./model give these probabilities (N, C), the longest text first."""
    model, tokenizer, _ = bert_multilabel_cls.load_model("./model")
    model.fc = torch.nn.Linear(16, len(labels))
    label2idx = {label: idx for idx, label in enumerate(labels)}
    bert_multilabel_cls.save_model(model, tokenizer, label2idx, "./model")
    given = iter(torch.tensor(rows))
    forward = lambda _, input_ids, *__: torch.stack([next(given) for _ in input_ids])  # noqa: E731
    monkeypatch.setattr(BertMultiLabelCls, "forward", forward)


def test_texts_to_labels(trained):
    assert predict.predict(["股市大涨", "中超得分股市大涨", "今日"]) == [
        ["股市", "财经"],
        ["中超", "体育", "股市", "财经"],
        [],
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_results_come_in_the_order_of_the_texts(trained, monkeypatch, batch_size):
    monkeypatch.setattr(predict, "batch_size", batch_size)
    one_by_one = np.concatenate([predict.predict_proba([text]) for text in TEXTS])
    np.testing.assert_allclose(predict.predict_proba(TEXTS * 5), np.tile(one_by_one, (5, 1)), atol=1e-5)
    assert predict.predict(TEXTS * 5) == [predict.predict([text])[0] for text in TEXTS] * 5


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


PROBS = [[0.9, 0.2, 0.6], [0.1, 0.4, 0.3], [0.5, 0.5, 0.5]]


@pytest.mark.parametrize(
    "threshold, at_least, at_most, chosen",
    [
        (0.5, 0, None, ["ac", "", ""]),
        (0.5, 1, None, ["ac", "b", "a"]),
        (0.5, 2, None, ["ac", "bc", "ab"]),
        (0.5, 0, 1, ["a", "", ""]),
        (0.5, 1, 1, ["a", "b", "a"]),
        (0.35, 0, 2, ["ac", "b", "ab"]),
        ([0.95, 0.1, 0.7], 1, None, ["b"] * 3),  # one above its own threshold comes before a likelier one
        (0.5, 9, None, ["abc"] * 3),
    ],
)
def test_labels_are_chosen_by_threshold_and_number(
    trained, monkeypatch, threshold, at_least, at_most, chosen
):
    fixed_probs(monkeypatch, PROBS)
    monkeypatch.setattr(predict, "min_labels", at_least)
    monkeypatch.setattr(predict, "max_labels", at_most)
    if isinstance(threshold, list):
        model, tokenizer, label2idx = bert_multilabel_cls.load_model("./model")
        bert_multilabel_cls.save_model(model, tokenizer, label2idx, "./model", {"by_label": threshold})
        threshold = "tuned"
    monkeypatch.setattr(predict, "threshold", threshold)
    assert predict.predict(["中"] * 3) == [list(labels) for labels in chosen]


def test_tuned_thresholds_are_those_of_the_model(trained, monkeypatch):
    probs = predict.predict_proba(["股市大涨"])[0]
    model, tokenizer, label2idx = bert_multilabel_cls.load_model("./model")
    assert len(model.bert.config.thresholds["by_label"]) == 4
    below = {"by_label": [float(probs[0]) - 1e-4, 1.0, 1.0, float(probs[3]) - 1e-4]}
    bert_multilabel_cls.save_model(model, tokenizer, label2idx, "./model", below)
    monkeypatch.setattr(predict, "threshold", "tuned")
    assert predict.predict(["股市大涨"]) == [["中超", "财经"]]
    bert_multilabel_cls.save_model(model, tokenizer, label2idx, "./model")
    with pytest.raises(InputError, match="model/multi_label_cls.pth has no tuned thresholds"):
        predict.predict(["股市大涨"])


@pytest.mark.parametrize(
    "recommended, chosen", [("0.5", ["体育", "财经"]), ("single", ["体育"]), ("by_label", ["中超", "股市"])]
)
def test_tuned_takes_the_thresholds_that_are_recommended(trained, monkeypatch, recommended, chosen):
    names = predict.get_labels()
    model, tokenizer, label2idx = bert_multilabel_cls.load_model("./model")
    thresholds = {
        "single": 0.7,
        "by_label": dict(zip(names, (0.1, 0.95, 0.2, 0.8))),
        "recommended": recommended,
    }
    bert_multilabel_cls.save_model(model, tokenizer, label2idx, "./model", thresholds)
    monkeypatch.setattr(BertMultiLabelCls, "forward", lambda *_: torch.tensor([[0.2, 0.9, 0.3, 0.6]]))
    monkeypatch.setattr(predict, "threshold", "tuned")
    assert predict.predict(["今日"]) == [chosen]


@pytest.mark.parametrize(
    "at_least, at_most", [(-1, None), (3, 1), (0, -1), (1.5, None), ("2", None), (0, "2")]
)
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


@pytest.mark.parametrize(
    "texts, message",
    [
        ("中超", r"write predict\(\['中超'\]\)"),
        ("", "takes a list of texts"),
        (["中超", None], "text 2 is None"),
        ([b"a"], "text 1 is b'a'"),
        (None, "got None"),
        (["\ud800"], "half a character"),
    ],
)
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
    np.testing.assert_allclose(
        predict.predict_proba(["股市大涨今日中超"]), predict.predict_proba(["股市大涨"]), atol=1e-6
    )
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
    monkeypatch.setattr(
        bert_multilabel_cls, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub")
    )
    assert predict.predict(["股市大涨"]) == [["股市", "财经"]]


@pytest.mark.parametrize("beside", ["nothing", "config", "model"])
def test_a_checkpoint_of_the_article_takes_labels_and_encoder_from_the_constants(
    trained, monkeypatch, encoder_folder, beside
):
    """Also where a config.json of somebody, or a model of ours, lies beside it."""
    os.makedirs("lone")
    if beside == "config":
        shutil.copy(os.path.join(encoder_folder, "config.json"), "lone/config.json")
    if beside == "model":
        shutil.copytree("model", "lone", dirs_exist_ok=True)
    weights = torch.load("model/multi_label_cls.pth", weights_only=True)
    torch.save(dict(weights), "lone/multi_label_cls.pth")
    monkeypatch.setattr(predict, "save_model_path", "./lone/multi_label_cls.pth")
    assert predict.predict(["股市大涨"]) == [["股市", "财经"]]
    os.remove("data/label2idx.json")
    monkeypatch.setattr(predict, "save_model_path", "lone/../lone/multi_label_cls.pth")
    with pytest.raises(InputError, match="no label index yet"):
        predict.predict(["股市大涨"])


def test_script_prints_texts_labels_and_probabilities(trained):
    run = subprocess.run(
        [sys.executable, root / "predict.py"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr
    assert [line.split("\t")[0] for line in lines] == predict.texts
    assert all(line.split("\t")[1] == "no label" or "(0." in line.split("\t")[1] for line in lines)


def test_the_weights_take_the_precision_of_the_machine_and_the_labels_stay(trained, monkeypatch):
    """3,000 texts with 4 labels each: where bf16 decides otherwise than float32, it was a tie but for 0.05.

    On DuEE 99.999 % of the decisions agree; a network of 16 dimensions has more ties.
    """
    chance = np.random.default_rng(0)
    signs = list("中超股市今日开赛大涨球门得分基金")
    many = ["".join(chance.choice(signs, chance.integers(1, 14))) for _ in range(3000)]
    exact = predict.predict_proba(many)
    monkeypatch.setattr(predict, "precision", "bf16")
    dtypes, real = set(), BertMultiLabelCls.forward

    def look(self, *inputs):
        dtypes.update([(self.bert.pooler.dense.weight.dtype, self.fc.weight.dtype)])
        return real(self, *inputs)

    monkeypatch.setattr(BertMultiLabelCls, "forward", look)
    rounded = predict.predict_proba(many)
    assert dtypes == {(torch.bfloat16, torch.float32)} and not np.array_equal(exact, rounded)
    differ = (exact > 0.5) != (rounded > 0.5)
    assert differ.mean() < 0.005 and np.abs(exact[differ] - 0.5).max(initial=0) < 0.05


def test_memory_is_that_of_a_batch_not_of_all_texts(trained, monkeypatch):
    sizes, real = [], BertMultiLabelCls.forward
    count = lambda self, ids, *more: sizes.append(len(ids)) or real(self, ids, *more)  # noqa: E731
    monkeypatch.setattr(BertMultiLabelCls, "forward", count)
    monkeypatch.setattr(predict, "chunk_size", 10)
    monkeypatch.setattr(predict, "batch_size", 1)
    assert len(predict.predict(["中超"] * 25)) == 25
    assert sizes == [8, 2, 8, 2, 5]  # of 16 tokens or fewer 8 times batch_size


def test_a_cold_start_imports_nothing_that_prediction_does_not_need():
    code = "import sys; from transformers import BertForSequenceClassification\n"  # it may import sklearn
    code += "import transformers.trainer_pt_utils\n"
    code += "names = {'sklearn', 'train'} - {*sys.modules}\n"
    code += "import predict; print(sorted(names & {*sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def label_file(monkeypatch, content, name="in.json", **constants):
    """Write a file, have predict.py label it, and return the rows of the output."""
    Path(name).write_bytes(
        content
        if isinstance(content, bytes)
        else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content).encode()
    )
    for constant, value in dict(input_path=name, output_path="out/labels.json", **constants).items():
        monkeypatch.setattr(predict, constant, value)
    predict.main()
    return [json.loads(line) for line in open("out/labels.json", encoding="utf-8")]


@pytest.mark.parametrize("chunk_size, batch_size", [(4096, 32), (2, 1), (20, 1)])
def test_a_file_is_labelled_in_its_order_with_what_else_is_in_it(
    trained, monkeypatch, chunk_size, batch_size
):
    rows = label_file(
        monkeypatch,
        [
            {"id": number, "text": text, "more": {"a": [1.5, None, "龘"]}}
            for number, text in enumerate(TEXTS * 5)
        ],
        chunk_size=chunk_size,
        batch_size=batch_size,
    )
    assert [(row["id"], row["text"], row["more"]) for row in rows] == [
        (number, text, {"a": [1.5, None, "龘"]}) for number, text in enumerate(TEXTS * 5)
    ]
    pairs = predict.predict_with_scores(TEXTS * 5)
    assert [row["label"] for row in rows] == [[label for label, _ in some] for some in pairs]
    assert [row["probability"] for row in rows] == [
        {label: pytest.approx(prob, abs=1e-4) for label, prob in some} for some in pairs
    ]
    assert all(prob == round(prob, 4) for row in rows for prob in row["probability"].values())
    assert '"label": ["中超", "体育"' in Path("out/labels.json").read_text(encoding="utf-8")  # no \u4e2d
    assert any(row["label"] for row in rows) and os.listdir("out") == ["labels.json"]


@pytest.mark.parametrize("name", ["in.txt", "in"])
def test_plain_text_is_a_text_a_line_blank_ones_too(trained, monkeypatch, name):
    rows = label_file(monkeypatch, b"\xef\xbb\xbf" + "股市大涨\r\n\r\n 中超 \n今日".encode(), name)
    assert [row["text"] for row in rows] == ["股市大涨", "", " 中超 ", "今日"]
    assert rows[0]["label"] == ["股市", "财经"] and set(rows[0]) == {"text", "label", "probability"}


def test_jsonl_is_known_by_its_first_line_too(trained, monkeypatch):
    rows = label_file(monkeypatch, b'\n{"text": "a", "x": "\\ud800"}\n\n{"text": "b"}', "in.txt")
    assert [(row["text"], row.get("x")) for row in rows] == [("a", "\ud800"), ("b", None)]


def test_thresholds_and_numbers_of_labels_hold_for_files_too(trained, monkeypatch):
    rows = label_file(monkeypatch, [{"text": "今日"}, {"text": "股市大涨"}], min_labels=1, max_labels=1)
    assert [len(row["label"]) for row in rows] == [1, 1]


def test_a_labelled_file_is_measured(trained, monkeypatch, capsys):
    """Against scikit-learn, on what was written; lines without a label do not count."""
    truth = [["中超"], [], ["股市", "财经"], None, ["体育"], ["中超", "体育"]]
    rows = label_file(
        monkeypatch,
        [
            {"text": text} | ({} if labels is None else {"label": labels})
            for text, labels in zip(TEXTS, truth)
        ],
        chunk_size=2,
    )
    assert [row.get("true") for row in rows] == truth
    names = ["中超", "体育", "股市", "财经"]
    found, true = (
        [[name in row[key] for name in names] for row in rows if "true" in row] for key in ("label", "true")
    )
    *labels, scores, wrote = capsys.readouterr().out.splitlines()[-6:]
    assert len([line for line in labels if line.startswith("label    ")]) == 4
    assert scores.startswith("scores   threshold=0.5 accuracy=") and wrote.startswith(
        "wrote    path=out/labels.json texts=6 "
    )
    printed = dict(field.split("=") for field in scores.split()[1:])
    assert float(printed["accuracy"]) == pytest.approx(
        np.mean([a == b for a, b in zip(found, true)]), abs=6e-4
    )
    for average in ("micro", "macro"):
        assert float(printed[f"{average}_f1"]) == pytest.approx(
            f1_score(true, found, average=average, zero_division=0), abs=6e-4
        )


def test_an_unlabelled_file_is_not_measured(trained, monkeypatch, capsys):
    label_file(monkeypatch, [{"text": "中超"}])
    assert "scores" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, name, message",
    [
        (b'{"text": "a"}\n{"text": 1}\n', "in.json", 'in.json:2: "text" must be a string'),
        (b'{"text": "a"}\n{"label": []}\n', "in.json", 'in.json:2: "text" must be a string, but is missing'),
        (b'{"text": "a"}\n{"text": "a", "label": "b"}\n', "in.json", 'in.json:2: "label" must be a list'),
        (
            b'{"text": "a"}\n{"text": "a", "label": ["other"]}\n',
            "in.json",
            "in.json:2: the model has no label 'other'",
        ),
        (b'{"text": "a"}\n{"text"', "in.json", "in.json:2: not JSON"),
        ("中超".encode("gbk"), "in.txt", "in.txt:1: not UTF-8, probably GBK"),
        (b"", "in.json", "in.json: no texts"),
        (b"a", "out/labels.json", "would replace the input"),
        (b"a", "out/labels.json.tmp", "would replace the input"),
        (b'{"text": "a", "true": []}', "in.json", 'in.json:1: the key "true"'),
        (b'{"text": "a", "probability": 1}', "in.json", 'in.json:1: the key "probability"'),
    ],
)
def test_a_fault_in_a_file_is_said_before_anything_is_computed(trained, monkeypatch, content, name, message):
    os.mkdir("out")
    Path("out/labels.json").write_text("before")
    monkeypatch.setattr(BertMultiLabelCls, "forward", lambda *_: pytest.fail("computed"))
    with pytest.raises(InputError, match=message):
        label_file(monkeypatch, content, name)
    assert Path(name).read_bytes() == content and (
        name == "out/labels.json" or Path("out/labels.json").read_text() == "before"
    )


@pytest.mark.parametrize(
    "constants, message",
    [
        (dict(output_path=""), "input_path = .*, output_path = .*: set both, or neither"),
        (dict(input_path=""), "input_path = .*, output_path = .*: set both, or neither"),
        (dict(output_path="data"), "output_path = 'data': is a folder"),
        (dict(output_path="out/"), "is a folder"),
        (dict(input_path="data"), "input_path = 'data': not a file"),
        (dict(input_path="none.json"), "none.json: No such file"),
        (dict(chunk_size=0), "chunk_size = 0"),
        (dict(max_len=999), "max_len = 999"),
        (dict(keep_tail=-1), "keep_tail = -1"),
    ],
)
def test_a_constant_that_cannot_be_is_said_before_anything_is_computed(
    trained, monkeypatch, constants, message
):
    monkeypatch.setattr(BertMultiLabelCls, "forward", lambda *_: pytest.fail("computed"))
    dump_jsonl([{"text": "a"}], "in.json")
    for name, value in (dict(input_path="in.json", output_path="out.json") | constants).items():
        monkeypatch.setattr(predict, name, value)
    with pytest.raises(InputError, match=message):
        predict.main()
    assert not os.path.exists("out.json")


@pytest.mark.parametrize("lines, message", [(9, None), (3, "in.json: has been changed while it was read")])
def test_an_input_that_changes_is_not_taken_for_the_one_that_was_checked(
    trained, monkeypatch, lines, message
):
    """What was added is left for the next time; what is missing is an error."""
    real = builtins.open

    def change(path, *more, **options):
        if str(path).endswith("labels.json.tmp"):  # the input has been checked, and is about to be labelled
            dump_jsonl([{"text": "今日"}] * lines, "in.json")
        return real(path, *more, **options)

    monkeypatch.setattr(builtins, "open", change)
    if message is None:
        assert len(label_file(monkeypatch, [{"text": "今日"}] * 6, chunk_size=2)) == 6
    else:
        with pytest.raises(InputError, match=message):
            label_file(monkeypatch, [{"text": "今日"}] * 6, chunk_size=2)
        assert not os.path.exists("out/labels.json")


def test_probabilities_that_are_nan_are_an_error(trained, monkeypatch):
    fixed_probs(monkeypatch, [[float("nan")] * 3])
    with pytest.raises(InputError, match="the network outputs NaN"):
        label_file(monkeypatch, [{"text": "今日"}])


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), KeyboardInterrupt("^C"), InputError("out of memory")]
)
def test_what_ends_in_the_middle_leaves_the_old_output(trained, monkeypatch, error):
    before = label_file(monkeypatch, [{"text": text} for text in TEXTS])
    calls, real = [], BertMultiLabelCls.forward

    def fail(*inputs):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(*inputs)

    monkeypatch.setattr(BertMultiLabelCls, "forward", fail)
    with pytest.raises(type(error), match=re.escape(str(error))):
        label_file(monkeypatch, [{"text": "新"}] * 9, chunk_size=2)
    assert [json.loads(line) for line in open("out/labels.json", encoding="utf-8")] == before


def test_a_training_that_ends_meanwhile_does_not_mix_two_models_into_one_file(trained, monkeypatch):
    expected = label_file(monkeypatch, [{"text": text} for text in TEXTS], chunk_size=2)

    real = BertMultiLabelCls.forward

    def train_on(self, *inputs):
        model, tokenizer, label2idx = bert_multilabel_cls.load_model(predict.save_model_path)
        torch.nn.init.constant_(model.fc.bias, 9.0)
        bert_multilabel_cls.save_model(model, tokenizer, label2idx, predict.save_model_path)
        return real(self, *inputs)

    monkeypatch.setattr(BertMultiLabelCls, "forward", train_on)
    assert label_file(monkeypatch, [{"text": text} for text in TEXTS], chunk_size=2) == expected


def test_keep_tail_is_obeyed(trained, monkeypatch):
    monkeypatch.setattr(predict, "max_len", 6)
    monkeypatch.setattr(predict, "keep_tail", 2)
    np.testing.assert_allclose(
        predict.predict_proba(["股市今日中超开赛大涨"]), predict.predict_proba(["股市大涨"]), atol=1e-6
    )
    monkeypatch.setattr(predict, "keep_tail", 5)
    with pytest.raises(InputError, match="keep_tail = 5: must be an integer, from 0 to 4"):
        predict.predict(["中"])


def test_texts_are_cut_as_in_training_unless_the_constants_say_otherwise(trained, monkeypatch):
    """Training had max_len = 16 and keep_tail = 0: a 15th character is not seen."""
    seen = predict.predict_proba(["中" * 14 + "股", "中" * 14, "中" * 14 + "超", "中" * 13])
    np.testing.assert_allclose(seen[0], seen[2], atol=1e-6)
    assert not np.allclose(seen[1], seen[3], atol=1e-6)
    monkeypatch.setattr(predict, "max_len", 32)
    longer = predict.predict_proba(["中" * 14 + "股", "中" * 14 + "超"])
    assert not np.allclose(longer[0], longer[1], atol=1e-6)
    model, tokenizer, label2idx = bert_multilabel_cls.load_model("./model")
    bert_multilabel_cls.save_model(model, tokenizer, label2idx, "./model", truncation=(6, 2))
    monkeypatch.setattr(predict, "max_len", None)
    probs = predict.predict_proba(["股市今日中超开赛大涨", "股市大涨"])
    np.testing.assert_allclose(probs[0], probs[1], atol=1e-6)


LABEL = """import predict
predict.device = "cpu"
constants = dict(input_path="in.json", output_path="out/labels.json", chunk_size=8, batch_size=3)
for name, value in constants.items():
    setattr(predict, name, value)
predict.run_script(predict.main)
"""


def test_processes_of_torchrun_write_the_same_bytes(trained, monkeypatch):
    """60 texts in portions of 8: in the last round the second process has part of one, and the third none."""
    chance = np.random.default_rng(0)
    lengths = chance.integers(1, 30, 60)
    dump_jsonl(
        [
            {"text": "".join(chance.choice(list("中超股市今日开赛大涨"), n)), "id": int(n), "label": ["体育"]}
            for n in lengths
        ],
        "in.json",
    )
    outputs, scores = [], []
    for processes in (1, 3):
        monkeypatch.setenv(
            "OMP_NUM_THREADS", "2" if processes == 1 else "1"
        )  # torchrun gives each process one thread
        code, out, err = finish(start(LABEL, processes))
        assert code == 0, err
        outputs.append(Path("out/labels.json").read_bytes())
        scores.append([line for line in out.splitlines() if line.startswith("scores ")])
        assert f"processes={processes}\n" in out and out.count("\nwrote ") == 1
    assert (
        outputs[0] == outputs[1]
        and outputs[0].count(b"\n") == 60
        and scores[0] == scores[1]
        and len(scores[0]) == 1
    )
    assert os.listdir("out") == ["labels.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="measures with the resource module")
def test_memory_does_not_grow_with_the_file(trained):
    """Ten times as many texts; what they have beside the text is 200 bytes a line."""
    for name, texts in (("in.json", 4_000), ("large.json", 40_000)):
        dump_jsonl(({"text": "中超股市", "more": "x" * 200} for _ in range(texts)), name)
    look = "import resource\ndef peak():\n"
    look += "    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\npeak()\n"
    code, out, err = finish(
        start(
            LABEL.replace("chunk_size=8, batch_size=3", "chunk_size=500")
            + look
            + "predict.input_path = 'large.json'\npredict.main()\npeak()"
        )
    )
    assert code == 0, err
    small, large = (int(line.split()[1]) for line in out.splitlines() if line.startswith("peak "))
    assert os.path.getsize("out/labels.json") > 10 * 2**20
    assert large - small < 5 * 1024, (small, large)  # KiB


def test_texts_of_the_command_line_are_labelled(trained, monkeypatch, capsys):
    monkeypatch.setattr(predict, "input_path", "of a file")
    monkeypatch.setattr(sys, "argv", ["predict.py", "中超开赛", "股市\n大涨"])
    run_script(predict.main, takes_texts=True)
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"中超开赛\t中超\(0\.\d{3}\) 体育\(0\.\d{3}\)", first) and second.startswith(
        "股市\\n大涨\t"
    )


@pytest.mark.parametrize("module", [predict, train, data_preprocess])
@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["x", "-h"], ["--lr", "3"], ["--threshold=0.3", "text"]]
)
def test_arguments_are_explained_or_refused_and_nothing_is_done(project, module, arguments):
    before = contents(project)
    command = [sys.executable, module.__file__, *arguments]
    run = subprocess.run(
        command, capture_output=True, encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"}
    )
    assert contents(project) == before
    name = os.path.basename(module.__file__)
    if {"-h", "--help"} & {*arguments}:
        words = ("reads ", "writes ", "run ", "\nlabel2idx_path = ")
        assert run.returncode == 0 and all(word in run.stdout for word in words)
        assert not re.search(r"^\w+ = [({\[]$", run.stdout, re.MULTILINE)  # no constant without its value
    else:
        settings = "settings are the constants at the top of the script; see --help"
        refused = f"error: {arguments[0]!r}: not an argument of {name}; {settings}\n"
        assert (run.returncode, run.stdout, run.stderr) == (1, "", refused)


def test_a_threshold_by_label_leaves_the_others_at_one_half(trained, monkeypatch):
    fixed_probs(monkeypatch, [[0.35, 0.45, 0.55, 0.65]], predict.get_labels())
    monkeypatch.setattr(predict, "threshold", {"中超": 0.3, "财经": 0.7})
    assert predict.predict(["中"]) == [["中超", "股市"]]
    monkeypatch.setattr(predict, "threshold", {"别的": 0.3})
    with pytest.raises(InputError, match="threshold = .*: the model has no label '别的'"):
        predict.predict(["中"])
    monkeypatch.setattr(predict, "threshold", {"中超": 3})
    with pytest.raises(InputError, match="threshold = .*: must be a number from 0 to 1"):
        predict.predict(["中"])


def test_tuned_thresholds_are_written_with_their_labels(trained):
    thresholds = data_preprocess.load_json("model/config.json")["thresholds"]
    assert list(thresholds["by_label"]) == predict.get_labels() == ["中超", "体育", "股市", "财经"]


def test_an_output_that_cannot_be_written_is_refused_before_reading(trained, monkeypatch):
    Path("in.txt").write_bytes(b"\xff")
    monkeypatch.setattr(predict, "input_path", "in.txt")
    monkeypatch.setattr(predict, "output_path", "in.txt/out.json")
    with pytest.raises(InputError, match="in.txt/out.json: cannot be written"):
        predict.main()


def test_whatever_is_missing_is_said_with_the_folder_that_paths_start_from(project, monkeypatch, offline):
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", "someone/none")
    here = str(project)
    for call in (lambda: predict.predict(["a"]), train.train):
        with pytest.raises(InputError, match=here):
            call()
    os.remove("data/label2idx.json")
    with pytest.raises(InputError, match=f"label index yet; .*{here}"):
        train.train()
