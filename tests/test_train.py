import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

import bert_multilabel_cls
import train
from bert_multilabel_cls import BertMultiLabelCls, load_model
from conftest import root, write_jsonl
from data_helper import MultiClsDataSet
from data_preprocess import InputError


def test_get_acc_score_takes_the_truth_first():
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    probs = torch.tensor([[0.9, 0.2], [0.5, 0.6], [0.6, 0.4]])
    assert train.get_acc_score(truth, probs) == pytest.approx(2 / 3)
    # Swapped, the truth would be cut at 0.5 and compared with raw probabilities, which is an error.
    with pytest.raises(ValueError):
        train.get_acc_score(probs, truth)


def test_a_probability_of_exactly_one_half_is_no():
    assert train.get_acc_score(torch.tensor([[0.0]]), torch.tensor([[0.5]])) == 1


def test_the_bias_starts_at_the_log_odds_of_each_label():
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    fc = nn.Linear(2, 3)
    train.start_at_prior(fc, labels)
    torch.testing.assert_close(torch.sigmoid(fc.bias).tolist(), [0.25, 0.2, 0.8])  # shares 0 and 1 are clamped


def test_biases_and_layer_norm_do_not_decay(project):
    model = BertMultiLabelCls(None, 4)
    decayed, spared = train.decay_groups(model)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in spared["params"])
    assert decayed["weight_decay"] == train.weight_decay and spared["weight_decay"] == 0


def test_grouped_batches_hold_every_text_once_and_change_with_the_seed(monkeypatch):
    monkeypatch.setattr(train, "batch_size", 8)
    lengths = torch.arange(1, 101)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    mask = (torch.arange(100)[None] < lengths[:, None]).long()
    first, again, other = (train.grouped_batches(mask, seed) for seed in (1, 1, 2))
    assert sorted(index for batch in first for index in batch) == list(range(100))
    assert first == again != other and max(map(len, first)) == 8
    spread = [int(lengths[batch].max() - lengths[batch].min()) for batch in first if len(batch) == 8]
    assert sum(spread) / len(spread) < 40  # similar lengths together: 8 of 1 to 100 at random spread over 79
    longest = [int(lengths[batch].max()) for batch in first]
    assert longest != sorted(longest, reverse=True)  # but long batches do not all come first


def test_dev_returns_mean_loss_and_accuracy(project):
    dataset = MultiClsDataSet("./data/dev.json")
    model = BertMultiLabelCls(None, 4)
    loss, accuracy = train.dev(model, DataLoader(dataset, batch_size=4), nn.BCELoss())
    model.eval()
    with torch.no_grad():
        probs = model(*dataset[:][:3])
    assert loss == pytest.approx(nn.BCELoss()(probs, dataset.labels).item(), abs=1e-6)
    assert accuracy == train.get_acc_score(dataset.labels, probs)


def test_the_whole_path_learns_and_obeys_constants(project, monkeypatch, capsys):
    for name, value in dict(epochs=30, lr=5e-3, batch_size=5, save_model_path="./out/best.pth", seed=1).items():
        monkeypatch.setattr(train, name, value)
    train.train()
    printed = capsys.readouterr().out
    assert printed.count("\nepoch ") == 30 and "steps_per_epoch=10 batch_size=5 lr=0.005 seed=1" in printed
    assert "train=48 dev=6 labels=4 max_len=16_tokens" in printed and "device=cpu precision=fp32" in printed
    assert train.test("./out/best.pth", "./data/test.json") == 1
    assert not (project / "model").exists()


def test_the_same_seed_gives_the_same_weights(project, monkeypatch):
    states = []
    for path in ("./one/m.pth", "./two/m.pth"):
        monkeypatch.setattr(train, "save_model_path", path)
        train.train()
        states.append(load_model(path, "")[0].state_dict())
    torch.testing.assert_close(*states, atol=0, rtol=0)


def test_the_first_evaluation_saves_even_at_accuracy_0(project, monkeypatch):
    write_jsonl("data/dev.json", [("今日", ["财经", "中超"])] * 3)  # never learned in these few steps
    monkeypatch.setattr(train, "epochs", 1)
    train.train()
    assert os.path.exists("model/multi_label_cls.pth")


def test_the_better_loss_wins_among_equal_accuracies(project, monkeypatch, capsys):
    results = iter([(0.6, 0.0), (0.5, 0.0), (0.7, 0.0), (0.9, 0.5), (0.1, 0.25)])
    monkeypatch.setattr(train, "epochs", 5)
    monkeypatch.setattr(train, "dev", lambda *_: next(results))
    train.train()
    saved = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert saved == ["saved=yes", "saved=yes", "saved=no", "saved=yes", "saved=no"]


def test_a_chosen_encoder_is_what_is_trained(project, monkeypatch, encoder_folder):
    monkeypatch.setattr(train, "lr", 0.0)
    train.train()
    trained = load_model("./model/multi_label_cls.pth", "")[0].bert.state_dict()
    start = bert_multilabel_cls.load_pretrained(bert_multilabel_cls.BertModel, encoder_folder).state_dict()
    torch.testing.assert_close(trained, start, atol=0, rtol=0)


def test_without_a_network_training_goes_on_from_scratch(project, monkeypatch, offline, capsys):
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", bert_multilabel_cls.shipped_model)
    monkeypatch.setattr(train, "scratch_epochs", 1)
    train.train()
    printed = capsys.readouterr().out
    assert "bert-base-chinese cannot be had" in printed and "HF_ENDPOINT" in printed
    assert "encoder=./model/scratch_encoder" in printed and "lr=0.0005" in printed and "epoch=1/1" in printed
    assert load_model("./model/multi_label_cls.pth", "")[0].bert.config.hidden_size == 256


def test_a_chosen_encoder_that_cannot_be_had_is_an_error(project, monkeypatch, offline):
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", "someone/none")
    with pytest.raises(InputError, match="someone/none cannot be had"):
        train.train()
    assert not (project / "model").exists()


@pytest.mark.parametrize("content, message", [(None, "there is no label index yet"), ('{"体育": 0}', "label '中超'")])
def test_script_says_to_preprocess(project, encoder_folder, content, message):
    os.remove("data/label2idx.json")
    if content:
        (project / "data" / "label2idx.json").write_text(content, encoding="utf-8")
    script = f"import bert_multilabel_cls as b, train; b.pretrained_model = {encoder_folder!r}; " \
             "train.run_script(train.train)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(root)})
    assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert message in run.stderr and "python data_preprocess.py" in run.stderr


