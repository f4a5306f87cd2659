import json
import os
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForPreTraining, BertModel, BertTokenizer, pipeline

import bert_multilabel_cls
import data_helper
import data_preprocess
import predict
import train
from bert_multilabel_cls import BertMultiLabelCls, load_model
from conftest import EXAMPLES, TOKENS, as_predictions, contents, finish, script, start, without_key_biases
from conftest import write_jsonl
from data_helper import MultiClsDataSet
from data_preprocess import InputError


def history():
    """Return the rows of history.jsonl."""
    return [json.loads(line) for line in open("model/history.jsonl", encoding="utf-8")]


def set_train(monkeypatch, **constants):
    """Set constants of train.py."""
    for name, value in constants.items():
        monkeypatch.setattr(train, name, value)


def test_get_acc_score_takes_the_truth_first():
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    probs = torch.tensor([[0.9, 0.2], [0.5, 0.6], [0.6, 0.4]])
    assert train.get_acc_score(truth, probs) == pytest.approx(2 / 3)
    # Swapped, the truth would be cut at 0.5 and compared with raw probabilities, which is an error.
    with pytest.raises(ValueError):
        train.get_acc_score(probs, truth)


def test_a_probability_of_exactly_one_half_is_no():
    assert train.get_acc_score(torch.tensor([[0.0]]), torch.tensor([[0.5]])) == 1


def watch_steps(monkeypatch, look):
    """Return a list that takes look(optimizer) before each optimizer step."""
    seen, step = [], torch.optim.AdamW.step

    def watched(self, *arguments, **options):
        seen.append(look(self))
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return seen


def test_the_bias_starts_at_the_log_odds_of_each_label(project, monkeypatch):
    """Shares 0 and 1 are clamped to 1 and 4 of 5."""
    write_jsonl(
        "data/train.json", [("中", ["中超", "财经"]), ("中", ["财经"]), ("中", ["财经"]), ("中", ["财经"])]
    )
    set_train(monkeypatch, epochs=1, lr=0.0, head_lr_factor=0)
    train.train()
    bias = load_model("model")[0].fc.bias  # of 中超, 体育, 股市, 财经
    torch.testing.assert_close(torch.sigmoid(bias).tolist(), [0.25, 0.2, 0.2, 0.8])


def test_many_labels_start_from_the_texts_that_have_them(project, monkeypatch, capsys):
    """The weights are those of the formula; a model that has not trained a step finds labels by them."""
    set_train(monkeypatch, epochs=1, lr=0.0, batch_size=5, many_labels=4)
    train.train()
    printed = capsys.readouterr().out
    assert "note     4 labels: the classifier starts from the texts that have each of them\n" in printed
    assert 'right; set best_metric = "micro_f1"\n' in printed
    model, dataset = load_model("model")[0], MultiClsDataSet(train.train_path)
    with torch.no_grad():
        pooled = model.bert(*dataset[:][:2]).pooler_output.double().numpy()
    labels = dataset.labels.double().numpy()
    mean, counts, prior = pooled.mean(0), labels.sum(0), bert_multilabel_cls.init_prior_texts
    covariance = np.cov(pooled.T, bias=True)
    covariance += bert_multilabel_cls.init_ridge * covariance.diagonal().mean() * np.eye(len(mean))
    shifts = labels.T @ (pooled - mean) / (counts + prior)[:, None]
    weights = shifts @ np.linalg.inv(covariance)
    assert model.fc.weight.detach().numpy() == pytest.approx(weights, abs=1e-3)
    logits = (pooled - mean) @ weights.T - (weights * shifts).sum(1) / 2 + np.log(counts / (48 - counts))
    found = predict.predict_proba([json.loads(line)["text"] for line in open(train.train_path, "rb")])
    assert found == pytest.approx(1 / (1 + np.exp(-logits)), abs=1e-3)
    precision = data_preprocess.load_json("model/metrics.json")["dev"]["mean_average_precision"]
    monkeypatch.setattr(train, "many_labels", 5)
    train.train()
    assert data_preprocess.load_json("model/metrics.json")["dev"]["mean_average_precision"] + 0.1 < precision


def test_an_encoder_from_scratch_does_not_start_from_texts(project, monkeypatch, offline, capsys):
    """Its outputs hardly differ: the first steps would overshoot."""
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", bert_multilabel_cls.default_model)
    set_train(monkeypatch, scratch_epochs=1, many_labels=1)
    train.train()
    assert "the classifier starts from" not in capsys.readouterr().out


def test_texts_that_are_all_alike_start_with_their_shares(project, monkeypatch):
    write_jsonl("data/train.json", [("中", ["中超", "体育", "股市", "财经"]), ("中", [])])
    set_train(monkeypatch, epochs=1, lr=0.0, many_labels=1)
    train.train()
    assert predict.predict_proba(["中"]) == pytest.approx(np.full((1, 4), 0.5), abs=1e-3)


def test_a_label_that_no_text_has_starts_with_the_others(project, monkeypatch):
    """Its weights are 0, its probability that of its share."""
    write_jsonl("data/train.json", [("中", ["中超"]), ("股", ["股市"]), ("球", ["体育", "中超"]), ("今", [])])
    set_train(monkeypatch, epochs=1, lr=0.0, many_labels=1)
    train.train()
    fc = load_model("model")[0].fc
    assert not fc.weight[3].any() and torch.sigmoid(fc.bias[3]).item() == pytest.approx(0.2)


def test_biases_and_layer_norm_do_not_decay(project, monkeypatch):
    set_train(monkeypatch, epochs=1, warmup_ratio=0.0)
    names, real = {}, BertMultiLabelCls.train

    def note_names(self, mode=True):
        if not names:
            names.update((id(parameter), name) for name, parameter in self.named_parameters())
        return real(self, mode)

    monkeypatch.setattr(BertMultiLabelCls, "train", note_names)
    seen = watch_steps(monkeypatch, lambda optimizer: [dict(group) for group in optimizer.param_groups])
    train.train()
    found = {names[id(p)]: group for group in seen[0] for p in group["params"]}
    assert len(found) == len(names)
    for name, group in found.items():
        spared = "bias" in name or "LayerNorm" in name
        assert group["weight_decay"] == (0 if spared else train.weight_decay), name
        head = name.startswith(("fc.", "bert.pooler."))
        assert group["lr"] == pytest.approx(train.lr * (5 if head else 1)), name


@pytest.mark.parametrize(
    "num_texts, epochs, processes, expected",
    [
        (1, 10, 1, (650, 8)),
        (300, 10, 1, (18, 8)),
        (300, 10, 4, (18, 2)),
        (300, 30, 1, (30, 8)),
        (1000, 10, 1, (10, 8)),
        (1000, 10, 2, (10, 4)),
        (1500, 10, 1, (10, 16)),
        (2680, 8, 1, (8, 32)),
        (100_000, 3, 8, (3, 32)),
    ],
)
def test_little_data_gets_smaller_batches_and_then_more_epochs(
    monkeypatch, num_texts, epochs, processes, expected
):
    """Half the batch_size and twice the accumulation_steps, as when memory runs out, give the same steps."""
    monkeypatch.setattr(train, "get_world_size", lambda: processes)
    set_train(monkeypatch, min_steps=650, batch_size=32)
    assert train.plan_steps(num_texts, epochs) == expected
    set_train(monkeypatch, batch_size=16, accumulation_steps=2)
    assert train.plan_steps(num_texts, epochs) == (expected[0], (expected[1] + 1) // 2)
    monkeypatch.setattr(train, "min_steps", 0)
    assert train.plan_steps(num_texts, epochs) == (epochs, 16)


def test_a_run_on_little_data_takes_min_steps(project, monkeypatch, capsys):
    set_train(monkeypatch, epochs=1, min_steps=20, batch_size=32)
    train.train()
    printed = capsys.readouterr().out
    assert "note     48 training texts are few: 4 epochs in place of 1 give min_steps = 20\n" in printed
    assert "epochs=4 steps_per_epoch=6 batch_size=8 processes=1" in printed
    used = data_preprocess.load_json("model/metrics.json")["used"]
    assert (used["epochs"], used["batch_size"], len(history())) == (4, 8, 4)


@pytest.mark.parametrize("hidden_size, expected", [(768, 2e-5), (384, 8e-5), (1024, 1.125e-5), (64, 3e-4)])
def test_the_learning_rate_suits_the_size_of_the_encoder(project, monkeypatch, hidden_size, expected):
    folder = shutil.copytree(bert_multilabel_cls.pretrained_model, "encoder")
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", folder)
    config = data_preprocess.load_json(f"{folder}/config.json") | {"hidden_size": hidden_size}
    data_preprocess.dump_json(config, f"{folder}/config.json")
    monkeypatch.setattr(train, "lr", "auto")
    assert train.get_encoder(6)[1:3] == pytest.approx([expected, 5 * expected])


def test_dev_returns_mean_loss_and_accuracy(project):
    dataset = MultiClsDataSet("./data/dev.json")
    model = BertMultiLabelCls(None, 4)
    loss, accuracy = train.dev(model, DataLoader(dataset, batch_size=4), nn.BCELoss())
    model.eval()
    with torch.no_grad():
        probs = model(*dataset[:][:3])
    assert loss == pytest.approx(nn.BCELoss()(probs, dataset.labels).item(), abs=1e-6)
    assert accuracy == train.get_acc_score(dataset.labels, probs)
    dataloader = DataLoader(dataset, batch_size=4)
    *same, predictions = train.dev(model, dataloader, nn.BCELoss(), return_predictions=True)
    assert same == [loss, accuracy]
    for texts, columns, prob, true in zip(*predictions[:4]):
        assert prob == pytest.approx(probs[texts, columns].item(), abs=1e-6)
        assert true == dataset.labels[texts, columns]


def test_the_whole_path_learns_and_obeys_constants(project, monkeypatch, capsys):
    path = "./out/best.pth"
    set_train(monkeypatch, epochs=30, lr=5e-3, head_lr_factor=1, batch_size=5, save_model_path=path, seed=1)
    train.train()
    printed = capsys.readouterr().out
    assert printed.count("\nepoch    ") == 30
    assert "epochs=30 steps_per_epoch=10 batch_size=5 processes=1 lr=0.005 head_lr=0.005\n" in printed
    assert "train=48 dev=6 test=6 labels=4\n" in printed
    assert " on cpu " in printed and "dtype=float32" in printed
    assert train.test(path, "./data/test.json") == train.test("./out", "./data/test.json") == 1
    assert not (project / "model").exists()


@pytest.mark.parametrize("path", ["./out", "./out/", "./out/best.pth"])
def test_everything_is_written_to_the_folder_of_save_model_path(project, monkeypatch, path):
    """save_model_path names the folder or the .pth in it, for training and prediction alike."""
    set_train(monkeypatch, save_model_path=path, tensorboard_name="runs", epochs=1)
    monkeypatch.setattr(predict, "save_model_path", path)
    train.train()
    assert sorted(os.listdir()) == ["data", "out"]
    reports = "config.json errors.jsonl history.jsonl metrics.json model.safetensors runs".split()
    pth = "best.pth" if path.endswith(".pth") else "multi_label_cls.pth"
    found = os.listdir("out")
    assert sorted(name for name in found if "token" not in name) == sorted([*reports, pth])
    model, _, label2idx = load_model(f"./out/{pth}", "")
    dataset = MultiClsDataSet(train.test_path, train.max_len)
    with torch.no_grad():
        probs = model(*dataset[:][:3])
    assert train.test(path, train.test_path) == train.get_acc_score(dataset.labels, probs)
    texts = [json.loads(line)["text"] for line in open(train.test_path, encoding="utf-8")]
    assert predict.predict_proba(texts) == pytest.approx(probs.numpy(), abs=1e-6)
    names = sorted(label2idx)
    assert predict.predict(texts) == [[names[c] for c in (row > 0.5).nonzero()] for row in probs]


def test_every_log_steps_batches_there_is_a_line_and_a_point(project, monkeypatch, capsys):
    """Counted from batch 0 of each epoch; an epoch has 12."""
    set_train(monkeypatch, log_steps=5, epochs=2, tensorboard_name="runs")
    train.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train ")]
    form = r"train    epoch=(\d) batch=(\d+) acc=[01]\.\d{3} loss=(\d\.\d{4}) time=\d+s"
    found = [re.fullmatch(form, line).groups() for line in lines]
    logged = [(epoch, batch) for epoch in (1, 2) for batch in (0, 5, 10)]
    assert [(int(epoch), int(batch)) for epoch, batch, _ in found] == logged
    scalars = curves()
    steps = [12 * (epoch - 1) + batch + 1 for epoch, batch in logged]
    assert [step for step, _ in scalars["train/loss"]] == [step for step, _ in scalars["train/lr"]] == steps
    losses = [value for _, value in scalars["train/loss"]]
    assert [float(loss) for _, _, loss in found] == pytest.approx(losses, abs=6e-5)


def test_every_line_fits_100_columns_and_has_one_form(project, monkeypatch, capsys, offline):
    """Event, words, key=value: of a run from scratch with its long note, and of a labelled file."""
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", bert_multilabel_cls.default_model)
    set_train(monkeypatch, scratch_epochs=3, scratch_lr=0.0, patience=1, log_steps=4)
    data_preprocess.main()
    train.train()
    monkeypatch.setattr(predict, "input_path", "data/test.json")
    monkeypatch.setattr(predict, "output_path", "out.json")
    predict.main()
    printed, lines = (
        "texts length rare wrote data note model plan train epoch stop best label dev test tuned ",
        [],
    )
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= 100 and re.match(r"[a-z]+ +(?<=^.{9})[^ ]", line), line
        lines.append((line[:8].rstrip(), line[9:]))
    assert {event for event, _ in lines} == set((printed + "input checked scores").split())
    for event, text in lines:
        if event not in ("note", "stop"):  # these are prose
            assert re.fullmatch(r"([^ =]+ )*[a-z0-9_.@]+=[^ ]+( [a-z0-9_.@]+=[^ ]+)*", text), text
    assert sum(event == "note" for event, _ in lines) > 2  # it is wrapped


def test_the_same_seed_gives_the_same_weights(project, monkeypatch):
    states = []
    for path in ("./one/m.pth", "./two/m.pth"):
        set_train(monkeypatch, save_model_path=path)
        train.train()
        states.append(load_model(path, "")[0].state_dict())
    torch.testing.assert_close(*states, atol=0, rtol=0)


def test_the_first_evaluation_saves_even_at_accuracy_0(project, monkeypatch):
    write_jsonl("data/dev.json", [("今日", ["财经", "中超"])] * 3)  # never learned in these few steps
    monkeypatch.setattr(train, "epochs", 1)
    train.train()
    assert os.path.exists("model/multi_label_cls.pth")


def scripted(monkeypatch, epochs):
    """Make dev return these (loss, probabilities) epoch by epoch; the report measures as usual."""
    results, real = iter(epochs), train.dev

    def dev(model, dataloader, criterion, return_predictions=False):
        result = real(model, dataloader, criterion, return_predictions=True)
        if epoch := next(results, None):
            loss, probs = epoch
            predictions = as_predictions(dataloader.dataset.labels, probs)
            result = loss, train.get_acc_score(dataloader.dataset.labels, probs), predictions
        return result if return_predictions else result[:2]

    monkeypatch.setattr(train, "dev", dev)
    monkeypatch.setattr(train, "epochs", len(epochs))


def test_the_focal_loss_is_that_of_the_paper():
    """Equation 4 of Lin et al. 2017 at gamma = 1, and its gradient."""
    chance = torch.Generator().manual_seed(0)
    probs = torch.rand(5, 3, generator=chance, dtype=torch.float64).requires_grad_()
    labels = (torch.rand(5, 3, generator=chance) > 0.5).double()
    right = torch.where(labels > 0.5, probs, 1 - probs)
    expected = (-(1 - right) * right.log()).mean()
    torch.testing.assert_close(train.focal_loss(probs, labels), expected)
    (gradient,) = torch.autograd.grad(train.focal_loss(probs, labels), probs)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, probs)[0])
    certain = torch.tensor([[1.0, 0.0]]).requires_grad_()
    assert train.focal_loss(certain, torch.tensor([[1.0, 0.0]])).item() == 0
    assert train.focal_loss(certain, torch.tensor([[0.0, 1.0]])).isfinite()


def test_the_focal_loss_trains_and_dev_is_measured_as_ever(project, monkeypatch):
    set_train(monkeypatch, loss="focal", epochs=25, lr=5e-3, head_lr_factor=1)
    train.train()
    metrics = data_preprocess.load_json("model/metrics.json")
    assert metrics["dev"]["at_0.5"]["accuracy"] == 1 and metrics["changed"]["loss"] == "focal"
    rows = history()
    assert rows[0]["train_loss"] < 0.7 * rows[0]["dev_loss"]  # of two losses


@pytest.mark.parametrize("metric", ["accuracy", "loss", "micro_f1", "macro_f1"])
def test_the_better_epoch_is_saved_and_the_lower_loss_wins_a_tie(project, monkeypatch, metric):
    """Few different losses and probabilities, so that epochs tie in the metric, and in both."""
    chance = np.random.default_rng(3)
    choices = [torch.from_numpy(chance.random((6, 4), dtype=np.float32)) for _ in range(3)]
    choices.append(torch.zeros(6, 4))
    epochs = [(float(chance.choice([0.5, 0.4, 0.6])), choices[chance.integers(4)]) for _ in range(14)]
    scripted(monkeypatch, epochs)
    set_train(monkeypatch, best_metric=metric, batch_size=48)
    train.train()
    best, rows = (-1.0, -1.0), history()
    for row in rows:
        score = (0 if metric == "loss" else row[metric], -row["dev_loss"])
        assert row["saved"] == (score > best), row
        best = max(best, score)
    assert [row["dev_loss"] for row in rows] == [loss for loss, _ in epochs]
    assert 1 < sum(row["saved"] for row in rows) < len(rows)


@pytest.mark.parametrize("patience, trained", [(0, 6), (1, 2), (2, 5)])
def test_patience_stops_after_so_many_epochs_without_a_better_one(project, monkeypatch, patience, trained):
    truth = MultiClsDataSet("./data/dev.json").labels
    right = [1, 0, 2, 0, 0, 3]  # texts of dev in each epoch
    scripted(monkeypatch, [(0.5, torch.cat([truth[:n], 1 - truth[n:]])) for n in right])
    set_train(monkeypatch, patience=patience)
    train.train()
    assert len(history()) == trained


def test_without_the_prior_the_first_epochs_predict_nothing(project, monkeypatch):
    """16 labels, fixed seeds: micro F1 of the first two epochs with the prior, and with a bias of 0."""
    signs = "中超股市今日开赛大涨球门得分基金"
    write_jsonl("data/train.json", [(f"{a}{b}{c}", [a]) for a in signs for b in signs for c in signs[::4]])
    write_jsonl("data/dev.json", [(f"{a}{b}今", [a]) for a in signs for b in signs[::3]])
    data_preprocess.preprocess("./data/train.json", "./data/label2idx.json")
    shutil.copy("data/dev.json", "data/test.json")
    set_train(monkeypatch, lr=8e-3, batch_size=8, seed=1)
    micro_f1 = {}
    for prior in (True, False):
        if not prior:
            started, real = [], BertMultiLabelCls.train

            def start_at_zero(self, mode=True, started=started, real=real):
                if mode and not started:
                    started.append(nn.init.zeros_(self.fc.bias))
                return real(self, mode)

            monkeypatch.setattr(BertMultiLabelCls, "train", start_at_zero)
        train.train()
        micro_f1[prior] = [row["micro_f1"] for row in history()]
    assert all(with_it > without + 0.1 for with_it, without in zip(micro_f1[True], micro_f1[False])), micro_f1


@pytest.mark.parametrize("batch_size, accumulation, steps", [(4, 3, 4), (5, 4, 3), (48, 1, 1), (7, 100, 1)])
@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_steps_and_schedule_are_right(project, monkeypatch, capsys, batch_size, accumulation, steps, warmup):
    rates = watch_steps(
        monkeypatch, lambda optimizer: sorted({group["lr"] for group in optimizer.param_groups})
    )
    set_train(
        monkeypatch, batch_size=batch_size, accumulation_steps=accumulation, warmup_ratio=warmup, epochs=4
    )
    train.train()
    assert f"steps_per_epoch={steps} " in capsys.readouterr().out
    total, rise = 4 * steps, round(warmup * 4 * steps)
    expected = [n / rise if n < rise else (total - n) / (total - rise) for n in range(total)]
    assert [lowest for lowest, *_ in rates] == pytest.approx([train.lr * share for share in expected])
    assert [highest for *_, highest in rates] == pytest.approx([5 * train.lr * share for share in expected])


def test_what_only_the_end_of_a_text_says_is_learned_with_keep_tail(project, monkeypatch):
    examples = [("今日" * 10 + sign, ["体育"] if sign == "球" else ["财经"]) for sign in "球股" * 16]
    for name in ("train", "dev", "test"):
        write_jsonl(f"data/{name}.json", examples)
    data_preprocess.preprocess("./data/train.json", "./data/label2idx.json")
    accuracy = {}
    for keep_tail in (0, 2):
        set_train(monkeypatch, keep_tail=keep_tail, epochs=10, lr=5e-3, head_lr_factor=1)
        train.train()
        accuracy[keep_tail] = train.test(train.save_model_path, "./data/test.json")
    assert accuracy[0] <= 0.5 and accuracy[2] == 1, accuracy
    assert predict.predict(["今日" * 10 + "球"]) == [["体育"]]  # cut as in training


def curves(runs="./model/runs"):
    """Return {name: [(step, value)]} that TensorBoard reads of the one run in a folder."""
    [folder] = os.listdir(runs)
    events = EventAccumulator(os.path.join(runs, folder), {"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_curves_are_written_for_tensorboard(project, monkeypatch):
    set_train(monkeypatch, tensorboard_name="runs", batch_size=8, epochs=3, warmup_ratio=0.5, log_steps=1)
    train.train()
    scalars = curves()
    steps = list(range(1, 19))  # 6 batches an epoch
    assert [step for step, _ in scalars["train/loss"]] == [step for step, _ in scalars["train/lr"]] == steps
    rates = [train.lr * n / 9 if n < 9 else train.lr * (18 - n) / 9 for n in range(18)]  # of the encoder
    assert [value for _, value in scalars["train/lr"]] == pytest.approx(rates)
    losses = [value for _, value in scalars["train/loss"]]
    means = [sum(losses[start : start + 6]) / 6 for start in (0, 6, 12)]
    assert means == pytest.approx([row["train_loss"] for row in history()])
    for name in ("accuracy", "micro_f1", "macro_f1", "dev_loss", "train_loss", "seconds"):
        expected = [(6 * row["epoch"], pytest.approx(row[name])) for row in history()]
        assert scalars[f"epoch/{name}"] == expected


def test_curves_of_a_run_that_was_killed_go_on_where_it_does(project, encoder_folder):
    """Killed in the middle of the second epoch."""
    run = script(encoder_folder, tensorboard_name="runs", batch_size=8, epochs=2, log_steps=1)
    die = (
        "import os, torch\nreal, steps = torch.optim.AdamW.step, []\n"
        "torch.optim.AdamW.step = lambda self, *a, **k: "
        "os._exit(9) if len(steps) == 9 else steps.append(1) or real(self, *a, **k)\n"
    )
    assert finish(start(die + run))[0] == 9
    code, out, err = finish(start(run))
    assert code == 0 and "\nresume " in out, err
    scalars = curves()
    assert [step for step, _ in scalars["train/loss"]] == list(range(1, 13))
    assert [step for step, _ in scalars["epoch/accuracy"]] == [6, 12]


@pytest.mark.parametrize("method", ["add_scalar", "flush"])
def test_curves_that_cannot_be_written_end_the_curves_and_not_the_run(project, monkeypatch, capsys, method):
    def full(*_):
        raise OSError(28, "No space left on device")

    set_train(monkeypatch, tensorboard_name="runs")
    monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.{method}", full)
    train.train()
    printed = capsys.readouterr().out
    assert printed.count("no more curves in ./model/runs: [Errno 28] No space left on device") == 1
    assert "\ntest " in printed


def test_a_folder_for_curves_that_cannot_be_is_a_note(project, monkeypatch, capsys):
    os.mkdir("model")
    Path("model/runs").write_text("a file")
    set_train(monkeypatch, tensorboard_name="runs")
    train.train()
    assert "note     no curves in ./model/runs (" in capsys.readouterr().out
    assert os.path.exists("model/metrics.json")


def test_without_tensorboard_one_line_says_how_to_get_curves(project, monkeypatch, capsys):
    set_train(monkeypatch, tensorboard_name="runs")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train.train()
    assert "pip install tensorboard" in capsys.readouterr().out and not os.path.exists("model/runs")


def test_no_curves_are_written_without_a_name_for_their_folder(project, capsys):
    train.train()
    assert "tensorboard" not in capsys.readouterr().out and not os.path.exists("model/runs")


@pytest.mark.parametrize(
    "layers, hidden, heads, words, files",
    [
        (2, 16, 2, ["hello", "cafe", "world"], "tokenizer.json model.safetensors"),  # as bert-base-uncased
        (
            1,
            24,
            3,
            ["Hello", "hello", "café", "World"],
            "vocab.txt pytorch_model.bin",
        ),  # cased, and nothing says so
        (3, 32, 4, ["Hello", "hello", "café", "World"], "tokenizer.json pytorch_model.bin"),
        (
            2,
            48,
            12,
            ["hello", "cafe", "world"],
            "vocab.txt says_cased pytorch_model.bin",
        ),  # as bert-base-chinese
    ],
)
def test_any_bert_is_trained_by_changing_its_name_alone(
    project, monkeypatch, layers, hidden, heads, words, files
):
    """Sizes, capitals, formats of vocabulary and weights; LayerNorm's old names, the head of pretraining."""
    vocabulary = [*TOKENS, *words]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden,
        max_position_embeddings=128,
    )
    bert = BertForPreTraining(config)
    nn.init.normal_(bert.bert.embeddings.LayerNorm.weight)
    config.save_pretrained("another")
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor.clone()
        for name, tensor in bert.state_dict().items()
    }
    if "bin" in files:
        torch.save(state, "another/pytorch_model.bin")
    else:
        bert.save_pretrained("another")
    cased = "Hello" in words
    if "vocab.txt" in files:
        Path("another/vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    else:
        BertTokenizer(
            vocab={word: index for index, word in enumerate(vocabulary)}, do_lower_case=not cased
        ).save_pretrained("another")
        os.remove("another/tokenizer_config.json")
    if "says_cased" in files:
        Path("another/tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", "./another")
    monkeypatch.setattr(train, "lr", 0.0)
    train.train()
    shutil.rmtree("another")
    for path in ("./model/multi_label_cls.pth", "./model"):
        model, tokenizer, _ = load_model(path, "")
        assert torch.equal(model.bert.embeddings.LayerNorm.weight, bert.bert.embeddings.LayerNorm.weight)
        assert tokenizer.tokenize("Hello WORLD café中") == (
            ["Hello", "[UNK]", "café", "中"] if cased else ["hello", "world", "cafe", "中"]
        )
    monkeypatch.setattr(predict, "precision", "fp32")
    label = pipeline("text-classification", model="./model", top_k=None)
    found = {row["label"]: row["score"] for row in label("Hello 中超")[0]}
    assert list(predict.predict_proba(["Hello 中超"])[0]) == pytest.approx(
        [found[name] for name in sorted(found)], abs=1e-5
    )


def test_a_compiled_network_is_compiled_a_handful_of_times(project, monkeypatch):
    """By dynamo, without a C++ compiler: 14 lengths, and a last batch with fewer texts."""
    write_jsonl("data/train.json", [("中" * (1 + n % 14), ["体育"]) for n in range(57)])
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="eager"))
    for name, value in dict(compile_model=True, pad_to_multiple_of=2, batch_size=4).items():
        monkeypatch.setattr(train, name, value)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train.train()
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert set(load_model("./model/multi_label_cls.pth", "")[0].state_dict()) == set(
        BertMultiLabelCls(None, 4).state_dict()
    )


def test_clipping_is_that_of_pytorch():
    """Also of a gradient that lies transposed in memory, and of a parameter that has none."""
    for max_norm in (1.0, float("inf")):
        grads = [100 * torch.randn(()), torch.randn(3), torch.randn(50, 40).T, torch.randn(2, 3, 4)]
        ours, theirs = (
            [torch.nn.Parameter(torch.zeros_like(g)) for g in (*grads, grads[1])] for _ in range(2)
        )
        for grad, *pair in zip(grads, ours, theirs):  # the last parameters get none
            for parameter in pair:
                parameter.grad = grad.clone()
        norms = [
            clip(p, max_norm)
            for clip, p in (
                (bert_multilabel_cls.clip_grad_norm_, ours),
                (torch.nn.utils.clip_grad_norm_, theirs),
            )
        ]
        torch.testing.assert_close(*norms)
        for one, other in zip(ours[:-1], theirs):
            torch.testing.assert_close(one.grad, other.grad)
    ours[1].grad[0] = float("nan")
    assert bert_multilabel_cls.clip_grad_norm_(ours, 1.0).isnan()


def test_gradients_are_clipped(project, monkeypatch):
    monkeypatch.setattr(train, "max_grad_norm", 1e-3)
    norms = watch_steps(
        monkeypatch,
        lambda optimizer: (
            torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])
            .norm()
            .item()
        ),
    )
    train.train()
    assert norms and max(norms) <= 1.001e-3


def test_accumulated_batches_make_the_step_of_one_large_batch(project, monkeypatch):
    """Also where the last batch is smaller: 48 texts in one batch, or in 9, 9, 9, 9, 9, 3. No dropout."""
    states = []
    for batch_size, accumulation in ((48, 1), (9, 6)):
        for name, value in dict(
            batch_size=batch_size,
            accumulation_steps=accumulation,
            dropout=0.0,
            epochs=1,
            warmup_ratio=0.0,
            save_model_path=f"./out{batch_size}/m.pth",
        ).items():
            monkeypatch.setattr(train, name, value)
        monkeypatch.setattr(BertMultiLabelCls, "train", lambda self, mode=True: nn.Module.train(self, False))
        train.train()
        states.append(without_key_biases(train.save_model_path))
    torch.testing.assert_close(*states, atol=1e-4, rtol=0)


def test_a_run_leaves_its_measurements(project, monkeypatch, capsys):
    write_jsonl("data/test.json", [("中超开赛", ["体育"]), ("今日", ["财经", "股市"])])
    monkeypatch.setattr(train, "min_label_support", 1)
    train.train()
    printed = capsys.readouterr().out
    metrics = data_preprocess.load_json("model/metrics.json")
    assert load_model(train.save_model_path, "")[0].bert.config.thresholds == metrics["thresholds"]
    assert metrics["used"]["dtype"] == "float32" and metrics["constants"]["device"] == "cpu"
    assert metrics["constants"]["lr"] == 1e-3 and metrics["versions"]["torch"] == torch.__version__
    assert metrics["test"]["by_label"]["体育"]["support"] == 1 and metrics["train_seconds"] > 0
    assert metrics["test"]["at_0.5"]["accuracy"] == train.test(train.save_model_path, train.test_path)
    assert list(metrics["dev"]["by_label"]) == ["中超", "体育", "股市", "财经"]
    assert len(metrics["thresholds"]["by_label"]) == 4
    assert (
        {"at_0.5", "at_single", "at_by_label", "by_label", "loss", "precision@1", "precision@3"}
        | {"ndcg@1", "ndcg@3", "mean_average_precision", "labels_without_examples", "calibration_error"}
        == metrics["dev"].keys()
        == metrics["test"].keys()
    )
    best = history()[metrics["best_epoch"] - 1]
    assert best["saved"] and best["micro_f1"] == metrics["dev"]["at_0.5"]["micro_f1"]
    errors = [json.loads(line) for line in open("model/errors.jsonl", encoding="utf-8")]
    errors = [row for row in errors if row["file"] == "./data/test.json"]
    assert all(row["text"] in ("中超开赛", "今日") and row["true"] != row["predicted"] for row in errors)
    assert all(
        f"\n{name:<8} threshold={kind} accuracy=" in printed
        for name in ("dev", "test")
        for kind in ("0.5", "single", "by_label")
    )
    assert printed.count("\nlabel ") == 4


def test_thresholds_are_the_best_on_dev_and_on_no_other_file(project, monkeypatch):
    """Labels go with other texts in each of the files, so that other thresholds are best there."""
    names = ["中超", "体育", "股市", "财经"]
    moved = [(text, labels) for (text, _), (_, labels) in zip(EXAMPLES, EXAMPLES[1:] + EXAMPLES[:1])]
    write_jsonl("data/dev.json", moved)
    others = [(text, [name for name in names if name not in labels]) for text, labels in EXAMPLES]
    write_jsonl("data/test.json", others)
    set_train(monkeypatch, epochs=3, min_label_support=3)  # two labels have 2 examples
    train.train()
    thresholds = data_preprocess.load_json("model/metrics.json")["thresholds"]
    probs = predict.predict_proba([text for text, _ in EXAMPLES])
    best = {}
    for path in (train.train_path, train.dev_path, train.test_path):
        truth = MultiClsDataSet(path).labels[:6].numpy() > 0.5

        def counts(threshold, labels=slice(None), truth=truth):
            true, predicted = truth[:, labels], probs[:, labels] > threshold
            return np.array([2 * (true & predicted).sum(), true.sum() + predicted.sum()])

        def f1(threshold, labels=slice(None), truth=truth):
            """Of a label, to which examples of an average label are added."""
            added = (
                0
                if labels == slice(None)
                else data_helper.average_examples / truth.sum() * counts(threshold, truth=truth)
            )
            found, total = counts(threshold, labels, truth) + added
            return found / max(1, total)

        grid = [n / 100 for n in range(5, 96)]
        best[path] = []
        for columns in (slice(None), *range(4)):
            scores = {n: (round(f1(n, columns), 9), -abs(n - 0.5)) for n in grid}
            enough = truth[:, columns].sum() >= 3
            best[path].append(max(grid, key=scores.get) if enough else best[path][0])
    found = [thresholds["single"], *thresholds["by_label"].values()]
    assert found == best[train.dev_path] and found not in (best[train.train_path], best[train.test_path])


@pytest.mark.parametrize(
    "name, value",
    [
        ("best_metric", "f1"),
        ("loss", "mse"),
        ("epochs", 0),
        ("scratch_epochs", 0),
        ("batch_size", 0),
        ("batch_size", 8.0),
        ("accumulation_steps", 0),
        ("log_steps", 0),
        ("pad_to_multiple_of", 0),
        ("patience", -1),
        ("min_label_support", -1),
        ("head_lr_factor", -1),
        ("checkpoint_minutes", -1),
        ("warmup_ratio", 10),
        ("dropout", -0.1),
        ("precision", "fp8"),
        ("max_len", 2),
        ("max_len", 129),  # the tiny encoder has 128 positions
    ],
)
def test_a_constant_out_of_range_is_an_error_that_names_it(project, monkeypatch, name, value):
    monkeypatch.setattr(train, name, value)
    with pytest.raises(InputError, match=f"{name} = {value!r}"):
        train.train()
    assert not (project / "model").exists()


def test_a_chosen_encoder_is_what_is_trained(project, monkeypatch, encoder_folder):
    monkeypatch.setattr(train, "lr", 0.0)
    train.train()
    trained = load_model("./model/multi_label_cls.pth", "")[0].bert.state_dict()
    start = BertModel.from_pretrained(encoder_folder).state_dict()
    torch.testing.assert_close(trained, start, atol=0, rtol=0)


def test_without_a_network_training_goes_on_from_scratch(project, monkeypatch, offline, capsys):
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", bert_multilabel_cls.default_model)
    monkeypatch.setattr(train, "scratch_epochs", 1)
    train.train()
    printed = capsys.readouterr().out
    assert "bert-base-chinese was not found" in printed and "HF_ENDPOINT" in printed
    assert (
        "model    ./model/scratch_encoder on cpu" in printed
        and "lr=0.00025" in printed
        and "epoch    1/1" in printed
    )
    assert load_model("./model/multi_label_cls.pth", "")[0].bert.config.hidden_size == 512


def test_a_chosen_encoder_that_cannot_be_had_is_an_error(project, monkeypatch, offline):
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", "someone/none")
    with pytest.raises(InputError, match="someone/none was not found"):
        train.train()
    assert not (project / "model").exists()


@pytest.mark.parametrize("name", ["train", "dev", "test"])
def test_a_fault_in_any_file_is_said_before_anything_is_written(project, monkeypatch, offline, name):
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", bert_multilabel_cls.default_model)
    write_jsonl(f"data/{name}.json", [("今日", ["体育"]), ("今日", ["别的"])])
    with pytest.raises(InputError, match=f"{name}.json:2: the label '别的'"):
        train.train()
    assert not (project / "model").exists()


@pytest.mark.parametrize(
    "content, message", [(None, "there is no label index yet"), ('{"体育": 0}', "label '中超'")]
)
def test_script_says_to_preprocess(project, encoder_folder, content, message):
    os.remove("data/label2idx.json")
    if content:
        (project / "data" / "label2idx.json").write_text(content, encoding="utf-8")
    code, _, err = finish(start(script(encoder_folder)))
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert message in err and "python data_preprocess.py" in err


def test_the_defaults_of_metrics_json_are_the_constants_as_shipped(project, monkeypatch):
    """And what differs from them is said."""
    monkeypatch.undo()
    values = {name: value for name, value in train.constants().items() if name != "device"}
    assert values == train.shipped
    monkeypatch.chdir(project)


def test_metrics_say_what_differs_from_the_defaults(project):
    train.train()
    metrics = data_preprocess.load_json("model/metrics.json")
    expected = dict(
        precision="fp32", epochs=2, batch_size=4, max_len=16, lr=1e-3, head_lr_factor=5, min_steps=0
    )
    assert metrics["changed"].pop("pretrained_model").endswith("encoder0")
    assert metrics["changed"] == expected | {"tensorboard_name": ""}
    assert re.fullmatch(r"model_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", metrics["run_name"])


def test_a_second_run_keeps_the_finished_model_and_its_curves(project, monkeypatch, capsys):
    monkeypatch.setattr(train, "tensorboard_name", "runs")
    train.train()
    name = data_preprocess.load_json("model/metrics.json")["run_name"]
    finished = {os.path.relpath(path, "model"): digest for path, digest in contents("model").items()}
    monkeypatch.setattr(train, "seed", 1)
    monkeypatch.setattr(train.time, "strftime", lambda form: "later")
    train.train()
    assert capsys.readouterr().out.count("the finished model in ./model moves to ./model/previous\n") == 1
    previous = {
        os.path.relpath(path, "model/previous"): digest for path, digest in contents("model/previous").items()
    }
    assert previous == finished and any(path.startswith(os.path.join("runs", name)) for path in previous)
    assert os.listdir("model/runs") == ["model_later"]
    assert predict.predict(["中"]) is not None


def test_a_run_that_was_not_finished_never_becomes_the_previous_one(project, monkeypatch):
    train.train()
    finished = contents("model")

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "resume", False)
    for seed in (1, 2):
        monkeypatch.setattr(train, "seed", seed)
        with monkeypatch.context() as patch:
            patch.setattr(train, "test", fail)
            with pytest.raises(KeyboardInterrupt):
                train.train()
        previous = contents("model/previous")
        assert [*previous.values()] and {os.path.basename(p): d for p, d in previous.items()} == {
            os.path.basename(p): d for p, d in finished.items()
        }
        assert not os.path.exists("model/metrics.json") and not os.path.exists("model/errors.jsonl")


def test_a_checkpoint_of_the_article_is_kept(project, encoder_folder):
    """It has no labels of its own, and stands alone in the folder."""
    os.mkdir("model")
    model = BertMultiLabelCls(None, 4)
    torch.save(model.state_dict(), "model/multi_label_cls.pth")
    before = contents("model")["model/multi_label_cls.pth"]
    train.train()
    assert contents("model/previous") == {"model/previous/multi_label_cls.pth": before}


def test_what_does_not_fit_is_said(project, monkeypatch, capsys):
    """Unknown tokens; nothing predicted; a last epoch that is the best; labels never predicted."""
    write_jsonl("data/train.json", [("привет мир", ["体育"]), ("股市大涨", ["中超"])] * 8)
    write_jsonl("data/dev.json", [("привет", ["体育"]), ("股市", ["中超"])])
    write_jsonl("data/test.json", [("привет", ["体育"])])
    data_preprocess.main()
    monkeypatch.setattr(train, "lr", 1e-4)
    train.train()
    printed = capsys.readouterr().out
    assert re.search(r"note     \d\d\.\d% of the tokens are unknown to this encoder", printed)
    assert printed.count("no label is predicted on dev after epoch") == 2
    assert "2 labels are never predicted on dev: 中超, 体育; try threshold" in printed


def test_a_run_that_still_gets_better_is_said_to(project, monkeypatch, capsys):
    set_train(monkeypatch, best_metric="loss", lr=5e-3, head_lr_factor=1, epochs=6, warmup_ratio=0)
    train.train()
    assert (
        "the last epoch is the best one and the loss on dev still falls; raise epochs"
        in capsys.readouterr().out
    )


def test_nothing_is_said_where_all_is_well(project, monkeypatch, capsys):
    monkeypatch.setattr(train, "epochs", 25)
    monkeypatch.setattr(train, "lr", 5e-3)
    monkeypatch.setattr(train, "head_lr_factor", 1)
    train.train()
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert all("after epoch" in note or "threshold in predict.py" in note for note in notes), notes


@pytest.mark.parametrize("path", ["data/train.json/model", "data/train.json/m.pth", "/proc/model/m.pth"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(project, monkeypatch, capsys, path):
    monkeypatch.setattr(train, "save_model_path", path)
    with pytest.raises(InputError, match=f"^{path.removesuffix('/m.pth')}/.*: cannot be written"):
        train.train()
    assert "epoch" not in capsys.readouterr().out and not os.path.exists("model")


@pytest.mark.parametrize("columns", [80, 100])
def test_lines_fit_the_terminal(project, monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    data_preprocess.main()
    train.train()
    lines = capsys.readouterr().out.splitlines()
    wide = [len(line) + sum(unicodedata.east_asian_width(c) in "WF" for c in line) for line in lines]
    assert max(width for width, line in zip(wide, lines) if "/" not in line) <= columns
    whole = [line for line in lines if re.match(r"(epoch|test|dev|texts|length|label) ", line)]
    assert all(re.search(r"=", line) for line in whole)  # none is the second half of another


def test_of_many_labels_the_ten_weakest_are_printed_and_line_breaks_are_shown(project, monkeypatch, capsys):
    labels = [f"label\n{n}" for n in range(50)]
    for name in ("train", "dev", "test"):
        write_jsonl(f"data/{name}.json", [("中超", labels), ("股市", [])])
    data_preprocess.main()
    monkeypatch.setattr(train, "epochs", 1)
    capsys.readouterr()
    train.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("label ")]
    assert len(lines) == 11 and lines[0].startswith("label    label\\n0 precision=")
    assert re.fullmatch(
        r"label    … 40 others with f1 of 0\.\d+ or more; all in ./model/metrics.json", lines[10]
    )
