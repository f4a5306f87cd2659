import ast
import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import BertConfig, BertModel, BertTokenizer

import bert_multilabel_cls
import data_preprocess
import predict
import train
from bert_multilabel_cls import BertMultiLabelCls, load_model
from conftest import EXAMPLES, TOKENS, as_predictions, contents, finish, root, script, start
from conftest import write_jsonl
from data_helper import MultiClsDataSet
from data_preprocess import InputError, load_json

LABELS = ["中超", "体育", "股市", "财经"]
TEXTS = [text for text, _ in EXAMPLES]
QUICK = {"lr": 5e-3, "head_lr_factor": 1}  # learns the examples in 25 epochs


def history():
    return [json.loads(line) for line in open("model/history.jsonl", encoding="utf-8")]


def metrics():
    return load_json("model/metrics.json")


def set_train(monkeypatch, **constants):
    """Set constants of train.py."""
    for name, value in constants.items():
        monkeypatch.setattr(train, name, value)


def run(monkeypatch, **constants):
    set_train(monkeypatch, **constants)
    train.train()


def train_and_read(monkeypatch, capsys, **constants):
    """Train with these constants; return what is printed."""
    capsys.readouterr()
    run(monkeypatch, **constants)
    return capsys.readouterr().out


def watch_steps(monkeypatch, look):
    """Return a list that takes look(optimizer) before each optimizer step."""
    seen, step = [], torch.optim.AdamW.step

    def watched(self, *arguments, **options):
        seen.append(look(self))
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return seen


def test_get_acc_score_takes_the_truth_first():
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    probs = torch.tensor([[0.9, 0.2], [0.5, 0.6], [0.6, 0.4]])
    assert train.get_acc_score(truth, probs) == pytest.approx(2 / 3)  # 0.5 is not above 0.5


def test_the_bias_starts_at_the_log_odds_of_each_label(project, monkeypatch):
    """Shares 0 and 1 are clamped to 1 and 4 of 5."""
    write_jsonl("data/train.json", [("中", ["中超", "财经"]), *[("中", ["财经"])] * 3])
    run(monkeypatch, epochs=1, lr=0.0, head_lr_factor=0)
    bias = load_model("model")[0].fc.bias
    torch.testing.assert_close(torch.sigmoid(bias).tolist(), [0.25, 0.2, 0.2, 0.8])


def write_all(examples):
    """Write all files with these examples, and the index of their labels."""
    for name in ("train", "dev", "test"):
        write_jsonl(f"data/{name}.json", examples)
    data_preprocess.preprocess("./data/train.json", "./data/label2idx.json")


def write_many_labels(copies=125):
    """Write all files with so many labels, 中超000 and so on, in place of each."""
    many = [(text, [f"{x}{n:03}" for x in y for n in range(copies)]) for text, y in EXAMPLES * 8]
    write_all(many)


def test_many_labels_start_from_the_texts_that_have_them(project, monkeypatch, capsys):
    """A model without a step finds labels by it, where there are at least 500."""
    precisions = []
    for copies in (125, 124):
        write_many_labels(copies)
        printed = train_and_read(monkeypatch, capsys, epochs=1, lr=0.0, batch_size=5)
        assert ("starts from the texts" in printed) == (copies == 125)
        precisions.append(metrics()["dev"]["precision@5"])
    assert precisions[0] > 0.8, precisions
    assert precisions[1] < 0.7


def test_biases_and_layer_norm_do_not_decay_and_the_head_learns_faster(project):
    model = BertMultiLabelCls(None, 4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in train.create_optimizer(model, 1.0, 5.0, 1)[0].param_groups:
        for name in (names.pop(id(parameter)) for parameter in group["params"]):
            spared = "bias" in name or "LayerNorm" in name
            assert group["weight_decay"] == (0 if spared else 0.01), name
            assert group["initial_lr"] == (5 if name.startswith(("fc.", "bert.pooler.")) else 1), (
                name
            )
    assert not names


@pytest.mark.parametrize(
    "num_texts, processes, constants, expected",
    [
        (300, 1, {}, (18, 8)),
        (300, 4, {}, (18, 2)),
        (300, 1, {"accumulation_steps": 2}, (18, 4)),
        (1000, 1, {}, (10, 8)),
        (3000, 1, {}, (10, 32)),
        (3000, 4, {}, (10, 10)),
        (300, 8, {"epochs": 3, "batch_size": 16}, (3, 16)),
        (300, 1, {"batch_size": 16}, (35, 16)),
        (20, 8, {"accumulation_steps": 16}, (100, 1)),
    ],
)
def test_a_number_is_obeyed_and_auto_aims_at_steps_in_at_most_100_epochs(
    project, monkeypatch, capsys, num_texts, processes, constants, expected
):
    """What "auto" chooses is printed with the reason."""
    write_jsonl("data/train.json", (EXAMPLES * num_texts)[:num_texts])
    monkeypatch.setattr(train, "get_world_size", lambda: processes)
    watch_steps(monkeypatch, lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, **{"epochs": "auto", "batch_size": "auto"} | constants)
    printed = capsys.readouterr().out
    found = re.search(r"^plan     epochs=(\d+) batch_size=(\d+) ", printed, re.MULTILINE)
    assert tuple(map(int, found.groups())) == expected
    names = ", ".join(name for name in ("epochs", "batch_size") if name not in constants)
    reason = f"\nauto     {names or 'none'} texts={num_texts} "
    assert reason in printed


@pytest.mark.parametrize("hidden_size, expected", [(384, 8e-5), (768, 2e-5), (64, 3e-4)])
def test_auto_suits_the_learning_rate_to_the_encoder(project, monkeypatch, hidden_size, expected):
    sizes = {"hidden_size": hidden_size, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 8
    shutil.copytree(bert_multilabel_cls.pretrained_model, "encoder")
    BertModel(BertConfig(vocab_size=len(TOKENS), **sizes)).save_pretrained("encoder")
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", "encoder")
    set_train(monkeypatch, lr="auto", epochs=1, batch_size=48, warmup_ratio=0.0)
    seen = watch_steps(monkeypatch, lambda optimizer: {g["lr"] for g in optimizer.param_groups})
    train.train()
    assert sorted(seen[0]) == pytest.approx([expected, 5 * expected])


def test_the_whole_path_learns_and_says_nothing_where_all_is_well(project, monkeypatch, capsys):
    path = "./out/best.pth"
    constants = {"epochs": 25, "batch_size": 6, "save_model_path": path, "seed": 1}
    printed = train_and_read(monkeypatch, capsys, **QUICK, **constants)
    assert re.findall(r"^epoch    (\d+) ", printed, re.MULTILINE) == [*map(str, range(1, 26))]
    assert "train=48 dev=6 test=6 labels=4\n" in printed
    assert "epochs=25 batch_size=6 steps=200 lr=0.005" in printed
    assert " on cpu " in printed and "dtype=float32" in printed
    assert train.test(path, train.test_path) == train.test("./out", train.test_path) == 1
    assert not (project / "model").exists()
    notes = re.sub("\nnote  ", "", printed).splitlines()
    assert all("after epoch" in line for line in notes if line.startswith("note")), notes
    assert all(re.match(r"[a-z]+ +(?<=^.{9})[^ ]", line) for line in printed.splitlines())
    lines = [line for line in printed.splitlines() if not line.startswith("model ")]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("path", ["./out", "./out/best.pth"])
def test_everything_is_written_to_the_folder_of_save_model_path(project, monkeypatch, path):
    """save_model_path names the folder or the .pth in it, for training and prediction alike."""
    run(monkeypatch, save_model_path=path, epochs=1)
    assert sorted(os.listdir()) == ["data", "out"]
    written = {name for name in os.listdir("out") if "token" not in name and "lock" not in name}
    weights = {"model.safetensors", os.path.basename(path).replace("out", "multi_label_cls.pth")}
    weights |= {"config.json", "saved.json"}
    assert written == weights | {"errors.jsonl", "history.jsonl", "metrics.json", "runs"}
    monkeypatch.setattr(predict, "save_model_path", path)
    right = [set(found) == set(y) for found, (_, y) in zip(predict.predict(TEXTS), EXAMPLES)]
    assert train.test(path, train.test_path) == pytest.approx(np.mean(right))


def scripted(monkeypatch, epochs):
    """Make dev return these (loss, probabilities) by epoch; the report measures as usual."""
    results, real = iter(epochs), train.dev

    def dev(model, dataloader, criterion, return_predictions=False):
        if not (epoch := next(results, None)):
            return real(model, dataloader, criterion, return_predictions)
        loss, probs = epoch
        truth = dataloader.dataset.labels
        return loss, train.get_acc_score(truth, probs), as_predictions(truth, probs)

    set_train(monkeypatch, dev=dev, epochs=len(epochs), batch_size=48)


@pytest.mark.parametrize("metric", ["accuracy", "loss", "micro_f1", "macro_f1", "samples_f1"])
def test_the_last_epoch_within_a_standard_error_of_the_best_is_kept(project, monkeypatch, metric):
    """Of six texts; the first is saved even at accuracy 0, and a loss has to be the lowest."""
    truth, losses = MultiClsDataSet("./data/dev.json").labels, [0.9, 0.5, 0.6, 0.5, 0.7, 0.4]
    probs = [torch.cat([truth[:right], 1 - truth[right:]]) for right in (0, 4, 3, 1, 4, 2)]
    scripted(monkeypatch, [*zip(losses, probs)])
    run(monkeypatch, best_metric=metric)
    saved = [row["epoch"] for row in history() if row["saved"]]
    assert saved == ([1, 2, 4, 6] if metric == "loss" else [1, 2, 3, 5])
    assert metrics()["best_epoch"] == saved[-1] and history()[0]["accuracy"] == 0


@pytest.mark.parametrize(
    "right, patience, trained",
    [((1, 0, 2, 1, 1, 3), 0, 6), ((1, 0, 2, 1, 1, 3), 2, 5), ((1, 0, 2), 1, 2), ((0,) * 5, 2, 5)],
)
def test_patience_stops_after_so_many_epochs_without_a_better_one(
    project, monkeypatch, right, patience, trained
):
    """By texts of dev that are right; while none is, a lower loss is better."""
    truth = MultiClsDataSet("./data/dev.json").labels
    losses = [0.9 - 0.1 * epoch for epoch in range(len(right))]
    scripted(monkeypatch, [*zip(losses, [torch.cat([truth[:n], 1 - truth[n:]]) for n in right])])
    run(monkeypatch, patience=patience)
    assert len(history()) == trained


@pytest.mark.parametrize("size, accumulation, steps", [(4, 3, 4), (5, 4, 3), (7, 9, 1)])
def test_steps_and_schedule_are_right(project, monkeypatch, capsys, size, accumulation, steps):
    rates = watch_steps(monkeypatch, lambda optimizer: {g["lr"] for g in optimizer.param_groups})
    constants = {"batch_size": size, "accumulation_steps": accumulation, "epochs": 4}
    printed = train_and_read(monkeypatch, capsys, warmup_ratio=0.5, **constants)
    total, rise = 4 * steps, 2 * steps
    assert f" steps={total} " in printed
    expected = [train.lr * (n if n < rise else total - n) / rise for n in range(total)]
    assert [min(pair) for pair in rates] == pytest.approx(expected)
    assert [max(pair) for pair in rates] == pytest.approx([5 * rate for rate in expected])


@pytest.mark.parametrize("max_norm, expected", [(1e-3, 1e-3), (0, 1e9)])
def test_gradients_are_clipped_unless_the_limit_is_0(project, monkeypatch, max_norm, expected):
    def norm(optimizer):
        grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        return torch.cat(grads).norm().item()

    norms = watch_steps(monkeypatch, norm)
    run(monkeypatch, max_grad_norm=max_norm, epochs=1)
    assert len(norms) == 12 and max(norms) <= 1.001 * expected
    assert max_norm or max(norms) > 0.1


@pytest.mark.parametrize("keep_tail", [0, 2])
def test_the_end_of_a_text_is_learned_from_with_keep_tail(project, monkeypatch, keep_tail):
    labels = {"球": ["体育"], "股": ["财经"]}
    write_all([("今日" * 10 + sign, labels[sign]) for sign in "球股" * 16])
    run(monkeypatch, keep_tail=keep_tail, epochs=8, **QUICK)
    assert (train.test(train.save_model_path, train.test_path) == 1) == (keep_tail == 2)
    assert (predict.predict(["今日" * 10 + "球"]) == [["体育"]]) == (keep_tail == 2)


def test_the_focal_loss_is_that_of_the_paper(project, monkeypatch):
    """Equation 4 of Lin et al. 2017 at gamma = 1. Every epoch has it, the report the BCELoss."""
    chance = torch.Generator().manual_seed(0)
    probs, labels = torch.rand(2, 5, 3, generator=chance, dtype=torch.float64)
    labels = labels.round()
    right = torch.where(labels > 0.5, probs, 1 - probs)
    expected = (-(1 - right) * right.log()).mean()
    torch.testing.assert_close(train.focal_loss(probs, labels), expected)
    certain = torch.tensor([[1.0, 0.0]])
    assert train.focal_loss(certain, certain) == 0
    assert train.focal_loss(certain, 1 - certain).isfinite()
    run(monkeypatch, loss_name="focal", epochs=1)
    losses = history()[0]["train_loss"], history()[0]["dev_loss"]
    assert max(losses) < 0.7 * metrics()["dev"]["loss"]


@pytest.fixture
def copied(project, encoder_folder):
    """A working folder with a copy of the scripts in code/, set for the tiny encoder."""
    os.mkdir("code")
    for path in root.glob("*.py"):
        shutil.copy(path, "code")
    insert("bert_multilabel_cls.py", "^pretrained_model = ", f"{encoder_folder!r}  # ")
    tiny = {"device": "cpu", "epochs": 3, "batch_size": 4, "max_len": 16, "lr": 5e-3}
    for name, value in (tiny | {"precision": "fp32", "head_lr_factor": 1}).items():
        insert("train.py", f"^{name} = ", f"{value!r}  # ")


def insert(name, pattern, text):
    """Insert a text into a copied script, behind the only match of a pattern."""
    path = Path("code", name)
    source, flags = path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    source, count = re.subn(pattern, lambda match: match[0] + text, source, flags=flags)
    assert count == 1, pattern
    path.write_text(source, encoding="utf-8")


RUN_COPY = """
import runpy, sys
sys.path.insert(0, "code")
for name in ("data_preprocess", "bert_multilabel_cls", "data_helper", "train", "predict"):
    sys.modules.pop(name, None)
runpy.run_path("code/train.py", run_name="__main__")
"""


def killed_after(steps):
    """Return code that ends a process at once after so many optimizer steps."""
    return f"""
import os, torch
more, step = iter([True] * {steps}), torch.optim.AdamW.step
torch.optim.AdamW.step = lambda *a, **b: step(*a, **b) if next(more, 0) else os._exit(9)
"""


def run_copy():
    """Run `python train.py` of the copy; return what it prints."""
    code, out, err = finish(start(RUN_COPY))
    assert (code, err) == (0, ""), out + err
    return out


def test_another_loss_is_one_entry_in_a_dict(copied):
    squared = '"squared": lambda probs, labels: ((probs - labels) ** 2).mean(), '
    insert("train.py", r"^losses = \{", squared)
    insert("train.py", "^loss_name = ", '"squared"  # ')
    run_copy()
    assert max(history()[0]["train_loss"], history()[0]["dev_loss"]) < 0.3
    assert metrics()["dev"]["loss"] > 0.3
    assert metrics()["constants"]["loss_name"] == "squared"


def test_another_metric_is_added_in_one_place(copied):
    """It is printed, drawn, in metrics.json, can be best_metric, and survives a kill."""
    shares = "true.multiply(predicted).sum(1) / np.maximum((true + predicted).sum(1), 1)"
    start_of_dict = r"^def compute_metrics\(.*?metrics = \{"
    insert("data_helper.py", start_of_dict, f'\n        "jaccard": np.mean({shares}),')
    insert("train.py", "^best_metric = ", '"jaccard"  # ')
    assert finish(start(killed_after(20) + RUN_COPY))[0] == 9
    printed, rows = run_copy(), history()
    found = re.findall(r"^epoch .* jaccard=(\d\.\d{3})", printed, re.MULTILINE)
    assert "\nresume " in printed and found == [f"{row['jaccard']:.3f}" for row in rows[1:]]
    drawn = [value for _, value in curves()["epoch/jaccard"]]
    assert drawn == pytest.approx([row["jaccard"] for row in rows])
    for name in ("dev", "test"):
        assert all("jaccard" in metrics()[name][f"at_{t}"] for t in ("0.5", "single", "by_label"))
    kept = [row for row in rows if row["saved"]][-1]
    assert metrics()["best_epoch"] == kept["epoch"]
    assert metrics()["dev"]["at_0.5"]["jaccard"] == kept["jaccard"] > 0
    assert re.search(r"^scores .*\bjaccard\b", printed, re.MULTILINE)


def test_another_line_per_epoch_is_added_in_one_place(copied):
    line = """    log("mine", f"{row['epoch']}: {1 - row['accuracy']:.2f} wrong")\n"""
    insert("train.py", r"^def log_epoch\(.*?\n(?=    log\()", line)
    found = re.findall(r"^mine     (\d): (\d\.\d\d) wrong$", run_copy(), re.MULTILINE)
    assert found == [(str(row["epoch"]), f"{1 - row['accuracy']:.2f}") for row in history()]


def curves():
    """Return {name: [(step, value)]} that TensorBoard reads of the only run."""
    [folder] = os.listdir("model/runs")
    events = EventAccumulator(f"model/runs/{folder}", {"scalars": 0}).Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def test_curves_are_written_for_tensorboard(project, monkeypatch, capsys):
    constants = {"batch_size": 8, "epochs": 3, "warmup_ratio": 0.5, "log_steps": 1}
    printed, scalars = train_and_read(monkeypatch, capsys, **constants), curves()
    form = r"^train    epoch=(\d) batch=(\d) acc=[01]\.\d{3} loss=(\d\.\d{4})$"
    lines = re.findall(form, printed, re.MULTILINE)
    assert [line[:2] for line in lines] == [(e, b) for e in "123" for b in "012345"]
    steps, rates = zip(*scalars["train/lr"])
    assert steps == (*range(18),)  # 6 batches an epoch
    expected = [train.lr * n / 9 if n < 9 else train.lr * (18 - n) / 9 for n in range(18)]
    assert rates == pytest.approx(expected)  # of the encoder
    losses = [value for _, value in scalars["train/loss"]]
    assert losses == pytest.approx([float(loss) for *_, loss in lines], abs=6e-5)
    means = [sum(losses[first : first + 6]) / 6 for first in (0, 6, 12)]
    assert means == pytest.approx([row["train_loss"] for row in history()])
    for name in ("accuracy", "micro_f1", "macro_f1", "samples_f1", "dev_loss", "train_loss"):
        expected = [(6 * row["epoch"] - 1, pytest.approx(row[name])) for row in history()]
        assert scalars[f"epoch/{name}"] == expected


def test_curves_of_a_run_that_was_killed_go_on_where_it_does(project, encoder_folder):
    run = script(encoder_folder, batch_size=8, epochs=2, log_steps=1)
    assert finish(start(killed_after(9) + run))[0] == 9
    code, out, err = finish(start(run))
    assert code == 0 and "\nresume " in out, err
    scalars = curves()
    assert [step for step, _ in scalars["train/loss"]] == [*range(12)]
    assert [step for step, _ in scalars["epoch/accuracy"]] == [5, 11]


def test_without_tensorboard_one_line_says_how_to_get_curves(project, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    printed = train_and_read(monkeypatch, capsys)
    assert printed.count("pip install tensorboard") == 1 and not os.path.exists("model/runs")


def test_without_a_network_a_small_bert_is_trained_from_scratch(
    project, monkeypatch, offline, capsys
):
    """In place of the default encoder; one that was chosen is an error."""
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", "someone/none")
    with pytest.raises(InputError, match="someone/none was not found"):
        train.train()
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", bert_multilabel_cls.default_model)
    write_many_labels()  # of which it does not start from the texts: its outputs hardly differ
    printed = train_and_read(monkeypatch, capsys, lr="auto", epochs=1)
    assert "bert-base-chinese was not found" in printed and "HF_ENDPOINT" in printed
    assert " lr=0.00025" in printed and "starts from the texts" not in printed
    assert load_model("./model/multi_label_cls.pth", "")[0].bert.config.hidden_size == 512


def test_a_run_leaves_its_measurements_and_ends_with_a_table(project, monkeypatch, capsys):
    write_jsonl("data/test.json", [("中超开赛", ["体育"]), ("今日", ["财经", "股市"])])
    printed, found = train_and_read(monkeypatch, capsys), metrics()
    thresholds = load_json("model/config.json")["thresholds"]
    assert list(thresholds["by_label"]) == list(found["dev"]["by_label"]) == LABELS
    expected = {"lr": 1e-3, "epochs": 2, "device": "cpu", "processes": 1}
    assert expected.items() <= found["constants"].items() and torch.__version__ in str(found)
    assert found["test"]["by_label"]["体育"]["support"] == 1
    assert found["test"]["at_0.5"]["accuracy"] == train.test("model", train.test_path)
    assert {"loss", "precision@3"} <= found["test"].keys()
    best = history()[found["best_epoch"] - 1]
    assert best["saved"] and best["micro_f1"] == found["dev"]["at_0.5"]["micro_f1"]
    lines = printed[printed.index("\nscores ") :].splitlines()[1:]  # the table at the end
    assert [line.split()[0] for line in lines if "note" not in line] == ["scores", "dev", "test"]
    for name, line in zip(("dev", "test"), lines[1:]):
        cells = dict(cell.split("=") for cell in line.split()[1:])
        assert [*cells] == ["0.5", "single", "by_label"]
        for threshold, cell in cells.items():
            scores = found[name][f"at_{threshold}"]
            assert lines[0].split()[-1].split("/") == list(scores)
            assert cell.split("/") == [f"{value:.3f}" for value in scores.values()]


def test_errors_lead_back_to_the_row(project, monkeypatch):
    """With the columns of the data, what is missed and what is too much; as a table too."""
    rows = [{"text": text, "label": ["股市"], "id": n} for n, text in enumerate(TEXTS)]
    Path("data/test.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run(monkeypatch, epochs=3, **QUICK)
    expected = []
    for n, labels in enumerate(predict.predict(TEXTS)):
        missed, others = {"股市"} - {*labels}, [name for name in labels if name != "股市"]
        row = {"location": f"./data/test.json:{n + 1}", "text": TEXTS[n], "true": ["股市"]}
        row |= {"missed": [*missed], "false_positives": others, "predicted": labels, "id": n}
        expected += [row] if missed or others else []
    errors = [json.loads(line) for line in open("model/errors.jsonl", encoding="utf-8")]
    found = [{k: v for k, v in row.items() if k != "probability"} for row in errors if "id" in row]
    assert sorted(found, key=lambda row: row["id"]) == expected != []
    run(monkeypatch, errors_name="errors.csv")
    assert not os.path.exists("model/errors.jsonl")
    table = csv.DictReader(open("model/errors.csv", encoding="utf-8-sig", newline=""))
    for row, cells in zip(errors, table, strict=True):
        assert cells["id"] == str(row.get("id", "")) and cells["location"] == row["location"]
        assert cells["predicted"] == ";".join(row["predicted"])
        scores = (f"{name} {score}" for name, score in row["probability"].items())
        assert cells["probability"] == ";".join(scores)


def test_a_pooler_that_the_encoder_lacks_starts_from_the_seed(
    project, monkeypatch, encoder_folder, capsys
):
    encoder = shutil.copytree(encoder_folder, project / "encoder")
    BertModel.from_pretrained(encoder, add_pooling_layer=False).save_pretrained(encoder)
    BertTokenizer.from_pretrained(encoder, truncation_side="left").save_pretrained(encoder)
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", str(encoder))
    losses = []
    for seed in (1, 1, 2):
        assert "truncation_side is left" in train_and_read(monkeypatch, capsys, seed=seed, epochs=1)
        losses.append(history()[0]["train_loss"])
    assert losses[0] == losses[1] != losses[2]


def test_thresholds_are_the_best_on_dev_and_on_no_other_file(project, monkeypatch):
    found = []
    for name in ("none", "test", "dev"):
        write_jsonl(f"data/{name}.json", [(t, EXAMPLES[n - 1][1]) for n, t in enumerate(TEXTS)])
        run(monkeypatch, epochs=1)
        found.append(load_json("model/config.json")["thresholds"])
    assert found[0] == found[1] != found[2]


OUT_OF_RANGE = """
epochs='many' batch_size=8.0 lr='1e-5' accumulation_steps='auto' log_steps=0 patience=-1
head_lr_factor=-1 max_grad_norm=-1 checkpoint_minutes=-1 dropout=-0.1 dropout=2 warmup_ratio=10
weight_decay=2 seed=-1 seed=18446744073709551616 max_len=2
"""


@pytest.mark.parametrize("setting", OUT_OF_RANGE.split())
def test_a_constant_out_of_range_is_an_error_that_names_it(project, monkeypatch, setting):
    name, value = setting.split("=")
    monkeypatch.setattr(train, name, ast.literal_eval(value))
    with pytest.raises(InputError, match=f"{name} = {value}"):
        train.train()
    assert not os.path.exists("model/config.json")


def test_labels_without_an_example_are_counted(project, monkeypatch, capsys):
    label2idx = load_json("data/label2idx.json") | {"旧一": 4, "旧二": 5}
    data_preprocess.dump_json(label2idx, "data/label2idx.json")
    write_jsonl("data/test.json", [("今日", ["体育", "中超", "股市"])])
    printed = train_and_read(monkeypatch, capsys).replace("\nnote     ", " ")
    found = re.findall(r"(\d) labels without an example in (\w+) ", printed)
    assert found == [("2", "train"), ("2", "dev"), ("3", "test")]
    assert "旧一, 旧二" in printed and "label2idx.json" in printed


def test_a_run_that_was_not_finished_never_becomes_the_previous_one(project, monkeypatch):
    train.train()
    names = ("multi_label_cls.pth", "config.json", "metrics.json", "errors.jsonl")
    finished = [contents("model")[f"model/{name}"] for name in names]
    for seed in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            run(patch, test=lambda *_, **__: 1 / 0, seed=seed, resume=False)
        assert not os.path.exists("model/metrics.json") and not os.path.exists("model/errors.jsonl")
        assert [contents("model")[f"model/previous/{name}"] for name in names] == finished
