import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForPreTraining, BertTokenizer, pipeline

import bert_multilabel_cls
import data_preprocess
import predict
import train
from bert_multilabel_cls import BertMultiLabelCls, load_model
from conftest import TOKENS, finish, root, script, start, without_key_biases, write_jsonl
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
    groups = {id(p): group for group in train.parameter_groups(model, 1e-5, 1e-4, train.weight_decay) for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = groups.pop(id(parameter))
        assert group["weight_decay"] == (0 if "bias" in name or "LayerNorm" in name else train.weight_decay), name
        assert group["lr"] == (1e-4 if name.startswith(("fc.", "bert.pooler.")) else 1e-5), name
    assert not groups


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
    for name, value in dict(epochs=30, lr=5e-3, batch_size=5, save_model_path="./out/best.pth", seed=1,
                            export_path="./out/transformers").items():
        monkeypatch.setattr(train, name, value)
    train.train()
    printed = capsys.readouterr().out
    assert printed.count("\nepoch ") == 30
    assert "steps_per_epoch=10 batch_size=5 accumulation=1 lr=0.005 head_lr=0.005 " in printed
    assert "train=48 dev=6 test=6 labels=4 max_len=16_tokens train_texts_cut=0\n" in printed and "device=cpu precision=fp32" in printed
    assert train.test("./out/best.pth", "./data/test.json") == train.test("./out/transformers", "./data/test.json") == 1
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


def scripted(monkeypatch, rows):
    """Make the dev evaluations come out as these (loss, accuracy, micro F1, macro F1), one row for each epoch."""
    rows_of_run, real = iter(rows), train.evaluate
    last = []

    def evaluate(*given):
        last[:] = next(rows_of_run, [0, 0, 0, 0])
        return last[0], real(*given)[1]
    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "summary", lambda *_: dict(zip(("accuracy", "micro_f1", "macro_f1"), last[1:])))
    monkeypatch.setattr(train, "epochs", len(rows))


def saved_epochs():
    return [row["epoch"] for row in (json.loads(line) for line in open("model/history.json")) if row["saved"]]


@pytest.mark.parametrize("metric, saved", [("accuracy", [1, 2, 4]), ("loss", [1, 2, 5]), ("micro_f1", [1, 3, 5]),
                                           ("macro_f1", [1, 2])])
def test_the_better_loss_wins_among_equal_scores(project, monkeypatch, metric, saved):
    scripted(monkeypatch, [(0.6, 0.0, 0.2, 0.1), (0.5, 0.0, 0.1, 0.3), (0.7, 0.0, 0.3, 0.2), (0.9, 0.5, 0.2, 0.3),
                           (0.4, 0.25, 0.3, 0.2)])
    monkeypatch.setattr(train, "best_metric", metric)
    train.train()
    assert saved_epochs() == saved


@pytest.mark.parametrize("patience, trained", [(0, 6), (1, 2), (2, 5)])
def test_patience_stops_after_so_many_epochs_without_a_better_one(project, monkeypatch, patience, trained):
    scripted(monkeypatch, [(0.5, accuracy, 0, 0) for accuracy in (0.25, 0.0, 0.5, 0.0, 0.0, 0.75)])
    monkeypatch.setattr(train, "patience", patience)
    train.train()
    assert len(open("model/history.json").readlines()) == trained


def test_without_the_prior_the_first_epochs_predict_nothing(project, monkeypatch):
    """16 labels, seeds fixed: micro F1 of the first two epochs with the prior, and with all biases at 0 instead."""
    signs = "中超股市今日开赛大涨球门得分基金"
    write_jsonl("data/train.json", [(f"{a}{b}{c}", [a]) for a in signs for b in signs for c in signs[::2]])
    write_jsonl("data/dev.json", [(f"{a}{b}今", [a]) for a in signs for b in signs[::3]])
    data_preprocess.preprocess("./data/train.json", "./data/label2idx.json")
    shutil.copy("data/dev.json", "data/test.json")
    for name, value in dict(lr=8e-3, batch_size=8, seed=1).items():
        monkeypatch.setattr(train, name, value)
    micro_f1 = {}
    for prior in (True, False):
        if not prior:
            monkeypatch.setattr(train, "start_at_prior", lambda fc, labels: nn.init.zeros_(fc.bias))
        train.train()
        micro_f1[prior] = [json.loads(line)["micro_f1"] for line in open("model/history.json")]
    assert all(with_it > without + 0.1 for with_it, without in zip(micro_f1[True], micro_f1[False])), micro_f1


def watch_steps(monkeypatch, look):
    """Return a list that takes look(optimizer) at each step of the optimizer."""
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: seen.append(look(self)) or step(self, *a, **k))
    return seen


@pytest.mark.parametrize("batch_size, accumulation, steps", [(4, 3, 4), (5, 4, 3), (48, 1, 1), (7, 100, 1)])
@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_steps_and_schedule_are_right(project, monkeypatch, capsys, batch_size, accumulation, steps, warmup):
    rates = watch_steps(monkeypatch, lambda optimizer: [group["lr"] for group in optimizer.param_groups])
    for name, value in dict(batch_size=batch_size, accumulation_steps=accumulation, warmup_ratio=warmup,
                            epochs=4).items():
        monkeypatch.setattr(train, name, value)
    train.train()
    assert f"steps_per_epoch={steps} " in capsys.readouterr().out
    total, rise = 4 * steps, round(warmup * 4 * steps)
    expected = [n / rise if n < rise else (total - n) / (total - rise) for n in range(total)]
    assert [groups[0] for groups in rates] == pytest.approx([train.lr * share for share in expected])
    assert [groups[-1] for groups in rates] == pytest.approx([train.head_lr * share for share in expected])


def test_what_only_the_end_of_a_text_says_is_learned_with_keep_tail(project, monkeypatch, capsys):
    examples = [("今日" * 10 + sign, ["体育"] if sign == "球" else ["财经"]) for sign in "球股" * 16]
    for name in ("train", "dev", "test"):
        write_jsonl(f"data/{name}.json", examples)
    data_preprocess.preprocess("./data/train.json", "./data/label2idx.json")
    accuracy = {}
    for keep_tail in (0, 2):
        for name, value in dict(keep_tail=keep_tail, epochs=20, lr=5e-3).items():
            monkeypatch.setattr(train, name, value)
        train.train()
        accuracy[keep_tail] = train.test(train.save_model_path, "./data/test.json")
    assert accuracy[0] <= 0.5 and accuracy[2] == 1, accuracy
    assert "max_len=16_tokens train_texts_cut=32\n" in capsys.readouterr().out


def curves(runs="./model/runs"):
    """Return what TensorBoard reads of the one run in a folder: {name: [(step, value)]}, and its other tags."""
    [folder] = os.listdir(runs)
    events = EventAccumulator(os.path.join(runs, folder), {"scalars": 0, "tensors": 0}).Reload()
    names = events.Tags()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names["scalars"]}, names["tensors"]


def test_curves_are_written_for_tensorboard(project, monkeypatch):
    for name, value in dict(runs_path="./model/runs", batch_size=8, epochs=3, warmup_ratio=0.5, tune_from=3).items():
        monkeypatch.setattr(train, name, value)
    train.train()
    scalars, others = curves()
    history = [json.loads(line) for line in open("model/history.json")]
    steps = list(range(1, 19))  # 6 batches an epoch
    assert [step for step, _ in scalars["train/loss"]] == [step for step, _ in scalars["train/lr"]] == steps
    assert [value for _, value in scalars["train/lr"]] == pytest.approx(
        [train.lr * n / 9 if n < 9 else train.lr * (18 - n) / 9 for n in range(18)])
    losses = [value for _, value in scalars["train/loss"]]
    assert [sum(losses[start:start + 6]) / 6 for start in (0, 6, 12)] == pytest.approx([row["train_loss"] for row in history])
    for name in ("accuracy", "micro_f1", "macro_f1", "dev_loss"):
        assert scalars[f"dev/{name.removeprefix('dev_')}"] == [(6 * row["epoch"], pytest.approx(row[name])) for row in history]
    assert [value for _, value in scalars["train/examples_per_second"]] == pytest.approx([48 / row["seconds"] for row in history])
    assert set(others) == {"dev/all labels", "dev by label/体育", "dev by label/财经"}  # the others have two examples


def test_curves_of_a_run_that_was_killed_go_on_where_it_does(project, encoder_folder):
    """Killed, or ended where there is no kill, in the middle of the second epoch, with nothing written out in time."""
    run = script(encoder_folder, runs_path="./model/runs", batch_size=8, epochs=2)
    die = ("import os, train\nreal = train.step\n"
           "train.step = lambda run: os._exit(9) if (run.epoch, run.batch) == (1, 3) else real(run)\n")
    assert finish(start(die + run))[0] == 9
    code, out, err = finish(start(run))
    assert code == 0 and "\nresume " in out, err
    scalars, _ = curves()
    assert [step for step, _ in scalars["train/loss"]] == list(range(1, 13))
    assert [step for step, _ in scalars["dev/accuracy"]] == [6, 12]


@pytest.mark.parametrize("method", ["add_scalar", "add_pr_curve", "flush", "close"])
def test_curves_that_cannot_be_written_end_the_curves_and_not_the_run(project, monkeypatch, capsys, method):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train, "runs_path", "./model/runs")
    monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.{method}", full)
    train.train()
    printed = capsys.readouterr().out
    assert printed.count("no more curves in ./model/runs: [Errno 28] No space left on device") == 1 and "\ntest " in printed


def test_a_folder_for_curves_that_cannot_be_is_a_note(project, monkeypatch, capsys):
    Path("runs").write_text("a file")
    monkeypatch.setattr(train, "runs_path", "./runs")
    train.train()
    assert "note     no curves in ./runs: " in capsys.readouterr().out and os.path.exists("model/metrics.json")


@pytest.mark.parametrize("path", ["./model", "./model/scratch_encoder"])
def test_the_export_does_not_go_where_something_else_lies(project, monkeypatch, path):
    monkeypatch.setattr(train, "export_path", path)
    with pytest.raises(InputError, match=f"export_path = '{path}'"):
        train.train()
    assert not os.path.exists("model")


def test_without_tensorboard_one_line_says_how_to_get_curves(project, monkeypatch, capsys):
    monkeypatch.setattr(train, "runs_path", "./model/runs")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train.train()
    assert [line for line in capsys.readouterr().out.splitlines() if "tensorboard" in line] == [
        "note     no curves in ./model/runs; for them: pip install tensorboard && tensorboard --logdir ./model/runs"]
    assert not os.path.exists("model/runs")


def test_an_empty_export_path_exports_nothing(project, monkeypatch):
    monkeypatch.setattr(train, "export_path", "")
    train.train()
    assert "transformers" not in os.listdir("model") and "multi_label_cls.pth" in os.listdir("model")


@pytest.mark.parametrize("layers, hidden, heads, words, files", [
    (2, 16, 2, ["hello", "cafe", "world"], "tokenizer.json model.safetensors"),  # as bert-base-uncased
    (1, 24, 3, ["Hello", "hello", "café", "World"], "vocab.txt pytorch_model.bin"),  # cased, and nothing says so
    (3, 32, 4, ["Hello", "hello", "café", "World"], "tokenizer.json pytorch_model.bin"),
    (2, 48, 12, ["hello", "cafe", "world"], "vocab.txt says_cased pytorch_model.bin"),  # as bert-base-chinese
])
def test_any_bert_is_trained_by_changing_its_name_alone(project, monkeypatch, layers, hidden, heads, words, files):
    """Sizes, capitals, the forms of vocabulary and weights; LayerNorm's old names, a masked language model's head."""
    vocabulary = [*TOKENS, *words]
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=hidden, num_hidden_layers=layers,
                        num_attention_heads=heads, intermediate_size=2 * hidden, max_position_embeddings=128)
    bert = BertForPreTraining(config)
    nn.init.normal_(bert.bert.embeddings.LayerNorm.weight)
    config.save_pretrained("another")
    state = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.clone()
             for name, tensor in bert.state_dict().items()}
    if "bin" in files:
        torch.save(state, "another/pytorch_model.bin")
    else:
        bert.save_pretrained("another")
    cased = "Hello" in words
    if "vocab.txt" in files:
        Path("another/vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    else:
        BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}, do_lower_case=not cased).save_pretrained("another")
        os.remove("another/tokenizer_config.json")
    if "says_cased" in files:
        Path("another/tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", "./another")
    monkeypatch.setattr(train, "lr", 0.0)
    train.train()
    shutil.rmtree("another")
    for path in ("./model/multi_label_cls.pth", "./model/transformers"):
        model, tokenizer, _ = load_model(path, "")
        assert torch.equal(model.bert.embeddings.LayerNorm.weight, bert.bert.embeddings.LayerNorm.weight)
        assert tokenizer.tokenize("Hello WORLD café中") == (
            ["Hello", "[UNK]", "café", "中"] if cased else ["hello", "world", "cafe", "中"])
    monkeypatch.setattr(predict, "precision", "fp32")
    label = pipeline("text-classification", model="./model/transformers", top_k=None)
    found = {row["label"]: row["score"] for row in label("Hello 中超")[0]}
    assert list(predict.predict_proba(["Hello 中超"])[0]) == pytest.approx([found[name] for name in sorted(found)], abs=1e-5)


def test_a_compiled_network_is_compiled_a_handful_of_times(project, monkeypatch):
    """By dynamo, without a C++ compiler: 14 lengths, and a last batch with fewer texts."""
    write_jsonl("data/train.json", [("中" * (1 + n % 14), ["体育"]) for n in range(57)])
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="eager"))
    for name, value in dict(compile_model=True, compiled_length=2, batch_size=4).items():
        monkeypatch.setattr(train, name, value)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train.train()
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert set(load_model("./model/multi_label_cls.pth", "")[0].state_dict()) == set(BertMultiLabelCls(None, 4).state_dict())


def test_gradients_are_clipped(project, monkeypatch):
    monkeypatch.setattr(train, "max_grad_norm", 1e-3)
    norms = watch_steps(monkeypatch, lambda optimizer: torch.cat([
        p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]).norm().item())
    train.train()
    assert norms and max(norms) <= 1.001e-3


def test_accumulated_batches_make_the_step_of_one_large_batch(project, monkeypatch):
    """Also where the last batch is smaller: 48 texts in batches of 48, or of 9, 9, 9, 9, 9, 3. Without dropout."""
    states = []
    for batch_size, accumulation in ((48, 1), (9, 6)):
        for name, value in dict(batch_size=batch_size, accumulation_steps=accumulation, dropout=0.0, epochs=1,
                                warmup_ratio=0.0, save_model_path=f"./out{batch_size}/m.pth").items():
            monkeypatch.setattr(train, name, value)
        monkeypatch.setattr(BertMultiLabelCls, "train", lambda self, mode=True: nn.Module.train(self, False))
        train.train()
        states.append(without_key_biases(train.save_model_path))
    torch.testing.assert_close(*states, atol=1e-4, rtol=0)


def test_a_run_leaves_its_measurements(project, monkeypatch, capsys):
    write_jsonl("data/test.json", [("中超开赛", ["体育"]), ("今日", ["财经", "股市"])])
    tuned_on, tune = [], train.tune_thresholds
    monkeypatch.setattr(train, "tune_thresholds", lambda labels, *a: tuned_on.append(len(labels)) or tune(labels, *a))
    train.train()
    assert set(tuned_on) == {6}  # the texts of dev, never the two of test
    printed = capsys.readouterr().out
    metrics = data_preprocess.load_json("model/metrics.json")
    assert load_model(train.save_model_path, "")[0].bert.config.thresholds == metrics["thresholds"]
    assert metrics["used"]["precision"] == "fp32" and metrics["constants"]["device"] == "cpu"
    assert metrics["constants"]["lr"] == 1e-3 and metrics["versions"]["torch"] == torch.__version__
    assert metrics["test"]["by_label"]["体育"]["support"] == 1 and metrics["seconds"] > 0
    assert metrics["test"]["at_0.5"]["accuracy"] == train.test(train.save_model_path, train.test_path)
    assert metrics["labels"] == ["中超", "体育", "股市", "财经"] and len(metrics["thresholds"]["by_label"]) == 4
    assert {"at_0.5", "at_single", "at_by_label", "by_label", "loss"} == metrics["dev"].keys() == metrics["test"].keys()
    history = [json.loads(line) for line in open("model/history.json")]
    best = history[metrics["best_epoch"] - 1]
    assert best["saved"] and best["micro_f1"] == metrics["dev"]["at_0.5"]["micro_f1"]
    errors = [json.loads(line) for line in open("model/errors.json", encoding="utf-8")]
    assert all(row["text"] in ("中超开赛", "今日") and row["true"] != row["predicted"] for row in errors)
    assert all(f"\n{name:<8} threshold={kind} loss=" in printed for name in ("dev", "test")
               for kind in ("0.5", "single", "by_label"))
    assert printed.count("\nlabel ") == 4


@pytest.mark.parametrize("name, value", [
    ("best_metric", "f1"), ("epochs", 0), ("scratch_epochs", 0), ("batch_size", 0), ("batch_size", 8.0),
    ("accumulation_steps", 0), ("patience", -1), ("warmup_ratio", 10), ("dropout", -0.1), ("precision", "fp8"),
    ("max_len", 2), ("max_len", 129),  # the tiny encoder has 128 positions
])
def test_a_constant_out_of_range_is_an_error_that_names_it(project, monkeypatch, name, value):
    monkeypatch.setattr(train, name, value)
    with pytest.raises(InputError, match=f"{name} = {value!r}"):
        train.train()
    assert not (project / "model").exists()


def test_a_chosen_encoder_is_what_is_trained(project, monkeypatch, encoder_folder):
    monkeypatch.setattr(train, "lr", 0.0)
    monkeypatch.setattr(train, "head_lr", 0.0)
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


@pytest.mark.parametrize("name", ["train", "dev", "test"])
def test_a_fault_in_any_file_is_said_before_anything_is_written(project, monkeypatch, offline, name):
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", bert_multilabel_cls.shipped_model)
    write_jsonl(f"data/{name}.json", [("今日", ["体育"]), ("今日", ["别的"])])
    with pytest.raises(InputError, match=f"{name}.json:2: the label '别的'"):
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


