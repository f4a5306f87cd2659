"""Fine-tune BERT to give a text several labels.

reads   ./data/train.json, dev.json, test.json    one object a line: {"text": "...", "label": ["...", ...]}
        ./data/label2idx.json                     written by `python data_preprocess.py`
writes  ./model/                                  the model of the best epoch: all that predict.py needs
        ./model/metrics.json                      how good it is on dev and test, and how it was made
        ./model/history.json                      a line an epoch
        ./model/errors.json                       the test texts that came out wrong, a line each
run     python train.py
        torchrun --nproc_per_node=4 train.py      on 4 GPUs; batch_size is that of each
"""
import json
import math
import os
import time
import zlib

import torch
import torch.nn as nn
import transformers
from sklearn.metrics import accuracy_score, hamming_loss, precision_recall_fscore_support
from torch.nn.parallel import DistributedDataParallel
from transformers import BertModel, BertTokenizer, get_linear_schedule_with_warmup
from transformers.utils.logging import tqdm

import bert_multilabel_cls
from bert_multilabel_cls import (BertMultiLabelCls, add_up, check_max_len, choose_precision, dtypes, find_encoder,
                                 gather_probs, join_processes, leave_processes, load_model, load_pretrained, load_state,
                                 main_first, mixed, save_model, spread)
from data_helper import (MultiClsDataSet, build_scratch_encoder, by_length, grouped_batches, load_batches,
                         parts_of_steps)
from data_preprocess import (InputError, dump_json, dump_jsonl, is_main, label_names, load_label2idx, log,
                             read_examples, run_script)

# Files. The encoder's name is pretrained_model in bert_multilabel_cls.py.
train_path = "./data/train.json"
dev_path = "./data/dev.json"
test_path = "./data/test.json"
label2idx_path = "./data/label2idx.json"
save_model_path = "./model/multi_label_cls.pth"  # its folder takes the other files of the model
scratch_path = "./model/scratch_encoder"  # where the small BERT from scratch goes, if there has to be one

# Machine.
device = "cuda" if torch.cuda.is_available() else "cpu"
precision = "auto"  # "bf16", "fp16" (GPU only), "fp32"; "auto" takes the fastest that the hardware has natively
compile_model = False  # True compiles the network first, which takes a minute and more; for long runs on a GPU
compiled_length = 16  # tokens; lengths are rounded up to multiples of it, and each of them is compiled once

# Recipe.
lr = 2e-5  # highest learning rate of the encoder
head_lr = 2e-4  # and of the pooler and the last layer above it, which have further to go
epochs = 10  # passes over the training file
batch_size = 32  # texts at a time; if memory runs out, halve it and double accumulation_steps
accumulation_steps = 1  # batches whose gradients add up to one step of the optimizer
max_len = 128  # tokens; longer texts lose their end
dropout = 0.1  # share of the pooled output that is set to 0 before the classifier
warmup_ratio = 0.1  # share of the steps in which the learning rate rises; then it falls to 0
max_grad_norm = 1.0  # gradients with a larger norm are scaled down to it
weight_decay = 0.01  # a step, times the learning rate; biases and LayerNorm are spared
seed = 42  # of weights, dropout and batches

# Which epoch is kept, and when to stop.
best_metric = "accuracy"  # on dev: "accuracy" (all labels of a text right), "micro_f1", "macro_f1" or "loss"
patience = 0  # stop after so many epochs without a better one; 0 never stops early
tune_from = 10  # a label with fewer dev examples than this gets no threshold of its own

# Recipe of the small BERT that is trained from scratch where bert-base-chinese cannot be had.
scratch_lr = 5e-4  # of all layers: all are new
scratch_epochs = 8


def train():
    """Train, keep the epoch that is best on dev, and measure that one on dev and test.

    Raises InputError for what the user can mend in files and constants.
    """
    started = time.perf_counter()
    check_constants()
    rank, processes = join_processes(device)
    mode = choose_precision(precision, device)
    label2idx = load_label2idx(label2idx_path)
    sizes = {name: sum(1 for _ in read_examples(path, label2idx))  # a fault in a file is said now, not after hours
             for name, path in (("train", train_path), ("dev", dev_path), ("test", test_path))}
    torch.manual_seed(seed)
    with main_first():
        encoder, encoder_lr, top_lr, total_epochs = get_encoder()
    tokenizer = load_pretrained(BertTokenizer, encoder)
    train_set = MultiClsDataSet(train_path, max_len, tokenizer=tokenizer, label2idx=label2idx)
    dev_set = MultiClsDataSet(dev_path, max_len, tokenizer=tokenizer, label2idx=label2idx)
    check_same_data(train_set, processes)

    model = BertMultiLabelCls(None, train_set.class_num, dropout, load_pretrained(BertModel, encoder))
    start_at_prior(model.fc, train_set.targets)
    check_max_len(max_len, model.bert.config)
    runner = set_up(model.to(device), train_set, processes)
    torch.manual_seed(seed + rank)  # dropout of its own in each process
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=mode == "fp16")
    steps = math.ceil(math.ceil(len(train_set) / (batch_size * processes)) / accumulation_steps)  # in an epoch
    optimizer = torch.optim.AdamW(parameter_groups(model, encoder_lr, top_lr), fused=True)
    total_steps = steps * total_epochs
    scheduler = get_linear_schedule_with_warmup(optimizer, round(warmup_ratio * total_steps), total_steps)
    criterion = nn.BCELoss()
    log("data", **sizes, labels=len(label2idx), max_len=f"{max_len}_tokens")
    log("model", encoder=encoder, parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M",
        device=device, precision=mode, processes=processes)
    log("plan", epochs=total_epochs, steps_per_epoch=steps, batch_size=batch_size, accumulation=accumulation_steps,
        lr=encoder_lr, head_lr=top_lr, best_metric=best_metric, seed=seed)

    history, best = [], None
    for epoch in range(1, total_epochs + 1):
        model.train()
        start, total_loss = time.perf_counter(), torch.zeros((), device=device)
        batches = grouped_batches(train_set.lengths, batch_size * processes, seed + epoch)
        parts = list(parts_of_steps(batches, accumulation_steps, rank, processes))
        loader = load_batches(train_set, (indices for indices, _, _ in parts), device)
        bar = progress_bar(f"epoch {epoch}/{total_epochs}", len(train_set))
        for number, (batch, (_, share, last)) in enumerate(zip(loader, parts)):
            *inputs, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
            runner.require_backward_grad_sync = last  # the processes exchange gradients once a step
            with mixed(device, mode):
                probs = runner(*inputs)
            loss = criterion(probs, labels)
            scaler.scale(loss * share).backward()
            if last:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                optimizer.zero_grad()
            total_loss += loss.detach() * share
            bar.update(len(batches[number]))
            if number % 20 == 0 and not bar.disable:  # reading the loss waits for the GPU
                bar.set_postfix(loss=f"{loss.item():.4f}")
        bar.close()
        train_loss = add_up(total_loss, device).item() / processes / steps
        row = dict(epoch=epoch, train_loss=train_loss, seconds=time.perf_counter() - start)

        dev_loss, dev_probs = evaluate(model, dev_set, criterion, mode)
        dev_labels = dev_set.labels
        row.update(dev_loss=dev_loss, **summary(dev_labels, dev_probs))
        score = -dev_loss if best_metric == "loss" else row[best_metric], -dev_loss  # all 0 at first: the loss decides
        row["saved"] = best is None or score > best["score"]
        if row["saved"]:
            best = dict(score=score, epoch=epoch, thresholds=tune_thresholds(dev_labels, dev_probs), probs=dev_probs)
            if is_main():
                save_model(model, tokenizer, label2idx, save_model_path, best["thresholds"])
        history.append(row)
        if is_main():
            dump_jsonl(history, beside_model("history.json"))
        log_epoch(row, total_epochs, len(train_set))
        if patience and epoch - best["epoch"] >= patience:
            log("stop", f"no better {best_metric} in {patience} epochs")
            break
    used = dict(encoder=encoder, lr=encoder_lr, head_lr=top_lr, epochs=total_epochs, precision=mode)
    report_run(best, model, tokenizer, dev_set, used, time.perf_counter() - started)
    leave_processes()


def check_constants():
    """Raise InputError if a constant is out of range."""
    if best_metric not in ("accuracy", "micro_f1", "macro_f1", "loss"):
        raise InputError(f'best_metric = {best_metric!r}: must be "accuracy", "micro_f1", "macro_f1" or "loss"')
    for name, least in (("epochs", 1), ("scratch_epochs", 1), ("batch_size", 1), ("accumulation_steps", 1),
                        ("patience", 0)):
        if type(globals()[name]) is not int or globals()[name] < least:
            raise InputError(f"{name} = {globals()[name]!r}: must be a whole number, at least {least}")
    for name in ("warmup_ratio", "dropout"):
        if not 0 <= globals()[name] <= 1:
            raise InputError(f"{name} = {globals()[name]!r}: must be from 0 to 1")


def get_encoder():
    """Return (folder, lr, head_lr, epochs): of the encoder `pretrained_model`, or of a small BERT in its place.

    The small BERT takes scratch_lr for both: all its layers are new.
    Raises InputError if the encoder cannot be had and is a name that the user chose.
    """
    name = bert_multilabel_cls.pretrained_model
    folder, tried = find_encoder(name)
    if folder:
        return folder, lr, head_lr, epochs
    if name != bert_multilabel_cls.shipped_model:
        raise InputError(tried)
    log("note", tried)
    log("note", f"going on without it: a small BERT, trained from scratch on {train_path} alone, knows less; it takes "
                "scratch_lr and scratch_epochs in place of lr, head_lr and epochs")
    if is_main():
        build_scratch_encoder([text for text, _ in read_examples(train_path)], scratch_path, seed)
    return scratch_path, scratch_lr, scratch_lr, scratch_epochs


def check_same_data(dataset, processes):
    """Raise InputError where the processes of one run read different files, as two machines may."""
    labels = json.dumps(dataset.label2idx, sort_keys=True).encode()
    mark = torch.tensor(zlib.crc32(dataset.ids.numpy(), zlib.crc32(dataset.targets.numpy(), zlib.crc32(labels))))
    if add_up(mark, device) != mark * processes:
        raise InputError(f"{train_path}, {label2idx_path} or the encoder is not the same for all processes; share one "
                         "folder between the machines, or copy it")


def set_up(model, dataset, processes):
    """Return what runs forward and backward for `model`: itself, compiled, or joined to the other processes'."""
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    if compile_model:
        dataset.round_to = compiled_length
        model = torch.compile(model, dynamic=False)
    return DistributedDataParallel(model) if processes > 1 else model


def progress_bar(words, texts):
    """Return a bar that counts `texts`, in the main process and in a terminal only."""
    return tqdm(total=texts, desc=words, unit="ex", leave=False, disable=None if is_main() else True)


def start_at_prior(fc, labels):
    """Set the bias of the last layer to the log odds of each label's share in `labels` (N, C).

    Lin et al. 2017, arXiv 1708.02002, section 4.1. With a bias of 0 every label starts at 0.5, and the
    first steps only push all of them down together: the model learns to predict nothing.
    """
    share = labels.float().mean(0).clamp(1 / (len(labels) + 1), len(labels) / (len(labels) + 1))  # never infinite odds
    with torch.no_grad():
        fc.bias.copy_(torch.log(share / (1 - share)))


def parameter_groups(model, encoder_lr, top_lr):
    """Return the optimizer's groups: the encoder's layers, then the top: the pooler and the last layer.

    Biases and LayerNorm, the parameters of one dimension, are groups of their own without weight decay.
    """
    top = [*model.bert.pooler.parameters(), *model.fc.parameters()]
    in_top = {id(p) for p in top}
    layers = [p for p in model.parameters() if id(p) not in in_top]
    return [{"params": [p for p in part if (p.ndim > 1) == decays], "lr": part_lr,
             "weight_decay": weight_decay if decays else 0.0}
            for part, part_lr in ((layers, encoder_lr), (top, top_lr)) for decays in (True, False)]


def beside_model(name):
    """Return the path of a file in the trained model's folder."""
    return os.path.join(os.path.dirname(save_model_path), name)


def log_epoch(row, total_epochs, examples):
    """Print the line of an epoch."""
    scores = {name: f"{row[name]:.4f}" for name in ("train_loss", "dev_loss", "accuracy", "micro_f1", "macro_f1")}
    log("epoch", epoch=f"{row['epoch']}/{total_epochs}", **scores, time=f"{row['seconds']:.1f}s",
        speed=f"{examples / row['seconds']:.1f}examples/s", saved="yes" if row["saved"] else "no")


def get_acc_score(y_true_tensor, y_pred_tensor):
    """Return the share of rows in which all C labels are right, at a probability above 0.5; both (N, C).

    The truth comes first, the probabilities second.
    """
    return accuracy_score(y_true_tensor.cpu().numpy(), (y_pred_tensor.cpu() > 0.5).int().numpy())


def evaluate(model, dataset, criterion, mode):
    """Return (mean loss, probs) of a model on a dataset; probs (N, C) on the CPU, in the order of the file.

    The processes share out the batches, and all return the same.
    """
    rank, processes = join_processes(device)
    batches = by_length(dataset.lengths, batch_size)[rank::processes]
    probs = torch.zeros(len(dataset), dataset.class_num)
    if batches:
        order = [index for batch in batches for index in batch]
        probs[order] = gather_probs(model, load_batches(dataset, batches, device), mode)[0]
    probs = add_up(probs, device)
    return criterion(probs, dataset.labels).item(), probs


def dev(model, dataloader, criterion):
    """Return (mean loss, accuracy) of a model over all batches of `dataloader`. The model is left in eval mode."""
    probs, labels = gather_probs(model, dataloader, choose_precision(precision, device))
    return criterion(probs, labels).item(), get_acc_score(labels, probs)


def test(model_path, test_data_path):
    """Return the accuracy, at 0.5, of the trained model at `model_path` on a data file; print all scores."""
    scores, _ = measure(*load_model(model_path, label2idx_path), test_data_path)
    return scores["at_0.5"]["accuracy"]


def measure(model, tokenizer, label2idx, data_path):
    """Return (scores, errors) of a model on a data file, as all_scores and find_errors do; print the scores.

    It computes as predict.py does, with the weights in the precision of the machine.
    """
    check_max_len(max_len, model.bert.config)
    dataset = MultiClsDataSet(data_path, max_len, tokenizer=tokenizer, label2idx=label2idx)
    model.bert.to(dtypes[choose_precision(precision, device)])
    loss, probs = evaluate(model.to(device), dataset, nn.BCELoss(), "fp32")
    labels, names = dataset.labels, label_names(label2idx)
    scores = {"loss": loss, **all_scores(labels, probs, names, getattr(model.bert.config, "thresholds", {}))}
    log_labels(scores["by_label"])
    log_scores("test", scores)
    return scores, find_errors([text for text, _ in read_examples(data_path)], labels, probs, names)


def by_label(truth, predicted):
    """Return (precision, recall, F1, support), each (C,), of two bool matrices (N, C); 0 where undefined."""
    if truth.shape[1] == 1:  # which scikit-learn would take for two classes
        return precision_recall_fscore_support(truth[:, 0], predicted[:, 0], labels=[True], zero_division=0)
    return precision_recall_fscore_support(truth, predicted, zero_division=0)


def summary(labels, probs, threshold=0.5):
    """Return {score: value} of probabilities (N, C) above one threshold, or above one for each label (C,).

    In the macro scores a label without examples counts 0, as one that is never found.
    """
    truth, predicted = labels.numpy() > 0.5, (probs > threshold).numpy()
    micro = precision_recall_fscore_support(truth.ravel(), predicted.ravel(), average="binary", zero_division=0)
    macro = [values.mean() for values in by_label(truth, predicted)]
    scores = {"accuracy": accuracy_score(truth, predicted), "hamming_loss": hamming_loss(truth, predicted)}
    for average, values in (("micro", micro), ("macro", macro)):
        scores.update({f"{average}_{name}": float(v) for name, v in zip(("precision", "recall", "f1"), values)})
    return scores


def all_scores(labels, probs, names, thresholds):
    """Return {"at_0.5": scores, "at_single": scores, "at_by_label": scores, "by_label": {name: scores at 0.5}}.

    `thresholds` is what tune_thresholds returned; without it only 0.5 is measured.
    """
    columns = zip(*by_label(labels.numpy() > 0.5, (probs > 0.5).numpy()))
    table = {name: dict(precision=float(p), recall=float(r), f1=float(f), support=int(n))
             for name, (p, r, f, n) in zip(names, columns)}
    tuned = {f"at_{kind}": summary(labels, probs, torch.tensor(value)) for kind, value in thresholds.items()}
    return {"at_0.5": summary(labels, probs), **tuned, "by_label": table}


def tune_thresholds(labels, probs):
    """Return {"single": t, "by_label": [t, …]}: what gives the best micro F1, and the best F1 of each label.

    For dev only: chosen on the texts on which they are judged, thresholds always look good.
    """
    single = best_threshold(labels, probs)
    enough = (labels.sum(0) >= tune_from).tolist()
    return {"single": single, "by_label": [best_threshold(labels[:, c], probs[:, c]) if enough[c] else single
                                           for c in range(len(enough))]}


def best_threshold(labels, probs):
    """Return the threshold from 0.05 to 0.95 with the best F1 over all entries; among equals the nearest to 0.5."""
    truth = labels > 0.5
    best = 0.0, 0.0, 0.5
    for percent in range(5, 96):
        predicted = probs > percent / 100
        f1 = 2 * (predicted & truth).sum().item() / max(1, predicted.sum().item() + truth.sum().item())
        best = max(best, (f1, -abs(percent - 50), percent / 100))
    return best[2]


def find_errors(texts, labels, probs, names):
    """Return a dict for each text whose labels at 0.5 are not all right, the most confident mistakes first."""
    truth = labels > 0.5
    surprise = torch.where(truth, 1 - probs, probs).max(1).values  # of a text's worst label
    errors = []
    for row in surprise.argsort(descending=True, stable=True).tolist():
        true, predicted = truth[row].tolist(), (probs[row] > 0.5).tolist()
        if true != predicted:
            shown = [c for c in range(len(names)) if true[c] or predicted[c]]
            errors.append({"text": texts[row], "true": [names[c] for c in shown if true[c]],
                           "predicted": [names[c] for c in shown if predicted[c]],
                           "probability": {names[c]: round(probs[row, c].item(), 4) for c in shown}})
    return errors


def log_scores(event, scores):
    """Print what all_scores returned, and the loss: a line for each kind of threshold."""
    for kind in ("at_0.5", "at_single", "at_by_label"):
        if kind in scores:
            log(event, threshold=kind.removeprefix("at_"), loss=f"{scores['loss']:.4f}",
                **{name: f"{value:.4f}" for name, value in scores[kind].items()})


def log_labels(table):
    """Print a line for each label, the weakest first."""
    for name, row in sorted(table.items(), key=lambda item: item[1]["f1"]):
        log("label", name, precision=f"{row['precision']:.4f}", recall=f"{row['recall']:.4f}", f1=f"{row['f1']:.4f}",
            support=row["support"])


def report_run(best, model, tokenizer, dev_set, used, seconds):
    """Measure the best model on dev and test; write metrics.json and errors.json beside the model.

    used: what the run took where the constants leave it open, such as the precision behind "auto".
    """
    names = label_names(dev_set.label2idx)
    dev_scores = {"loss": -best["score"][1], **all_scores(dev_set.labels, best["probs"], names, best["thresholds"])}
    log("best", epoch=best["epoch"], time=f"{seconds:.1f}s")
    log_scores("dev", dev_scores)
    if is_main():
        model.load_state_dict(load_state(save_model_path))
    spread(model)
    model.bert.config.thresholds = best["thresholds"]
    test_scores, errors = measure(model, tokenizer, dev_set.label2idx, test_path)
    constants = {name: value if isinstance(value, (int, float)) else str(value) for name, value in globals().items()
                 if not (name.startswith("_") or callable(value) or isinstance(value, type(os)))}
    if not is_main():
        return
    dump_jsonl(errors, beside_model("errors.json"))
    dump_json({"pretrained_model": bert_multilabel_cls.pretrained_model, "used": used, "best_epoch": best["epoch"],
               "seconds": round(seconds, 1),
               "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
               "constants": constants, "labels": names, "thresholds": best["thresholds"],
               "dev": dev_scores, "test": test_scores}, beside_model("metrics.json"), indent=1)


if __name__ == "__main__":
    run_script(train)
