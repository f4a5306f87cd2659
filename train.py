"""Fine-tune BERT for multi-label text classification.

reads   ./data/train.json, dev.json, test.json   a line: {"text": "...", "label": ["...", ...]}
        ./data/label2idx.json                    written by `python data_preprocess.py`
writes  ./model/                                 the model, in Hugging Face format too
        ./model/metrics.json, history.jsonl, errors.jsonl   scores, epochs, misclassified texts
        ./model/previous/, checkpoint.pth, runs/   the model before; to resume; for TensorBoard
run     python train.py
        torchrun --nproc_per_node=4 train.py     on 4 GPUs; batch_size is per GPU
set     pretrained_model, the encoder, in bert_multilabel_cls.py; the rest in train.py
"""

import math
import os
import signal
import sys
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.nn as nn
from scipy.sparse import csr_matrix
from sklearn.metrics import accuracy_score
from transformers import BertModel, BertTokenizer, get_linear_schedule_with_warmup

import bert_multilabel_cls
from bert_multilabel_cls import BertMultiLabelCls, autocast, check_number, check_truncation
from bert_multilabel_cls import choose_dtype, clear_errors, complete_save, find_encoder
from bert_multilabel_cls import get_pth_path, init_classifier, limit_threads, load_label2idx
from bert_multilabel_cls import load_model, load_pretrained, predict_batches, save_model
from data_helper import GroupedBatchSampler, MultiClsDataSet, all_gather_object, broadcast_object
from data_helper import build_scratch_encoder, collect_predictions, compute_metrics, eval_dataloader
from data_helper import init_distributed, log_label_metrics, metrics_report, misclassified
from data_helper import only_process, predict_labels, sum_pooled, tune_thresholds, write_rows
from data_preprocess import InputError, atomic_write, check_labels_known, dump_json, get_world_size
from data_preprocess import is_main_process, log, read_examples, run_script, scan_examples

train_path = "./data/train.json"
dev_path = "./data/dev.json"
test_path = "./data/test.json"
label2idx_path = "./data/label2idx.json"
save_model_path = "./model/multi_label_cls.pth"  # all else is written to its folder
errors_name = "errors.jsonl"  # misclassified texts of dev and test; or "errors.csv"
device = "cuda" if torch.cuda.is_available() else "cpu"
precision = "auto"  # the fastest that the device supports; "bf16", "fp32", on a GPU "fp16"

# "auto": chosen by data and encoder, and printed; else a number.
lr = "auto"  # peak learning rate; 2e-5 at base size, 8e-5 at 384, from scratch 2.5e-4
head_lr_factor = 10  # pooler and classifier learn so many times as fast; not from scratch
epochs = "auto"  # 10, from scratch 12; on little data more, for 650 steps
batch_size = "auto"  # texts per process; if memory runs out halve it, double the next
accumulation_steps = 1  # batches per optimizer step
max_len = 128  # tokens; longer texts are truncated
keep_tail = 0  # how many of them are from the end of a longer text
dropout = 0.1  # before the classifier
loss_name = "bce"  # the article's BCELoss; "focal" helps rare labels; see `losses`
warmup_ratio = 0.1  # share of the steps with a rising learning rate; then linear decay to 0
max_grad_norm = 1.0  # gradient clipping; 0: none
weight_decay = 0.01  # not for biases and LayerNorm
seed = 42
best_metric = "accuracy"  # on dev: "accuracy", "micro_f1", "macro_f1", "samples_f1" or "loss"
patience = 0  # stop after this many epochs without improvement; 0: never
log_steps = 100  # batches from one line of loss and accuracy to the next
checkpoint_minutes = 10  # between checkpoints; one more after each epoch
resume = True  # False starts an interrupted run over


@only_process(lambda: folder_path("train.lock"), "trains into this folder")
def train():
    """Train, keep the last epoch about as good as the best, test it. Resumes a run."""
    check_constants()
    limit_threads()
    rank, world_size = init_distributed(device)
    broadcast_object(lambda: complete_save(folder_path("")))
    dtype = choose_dtype(precision, device)
    label2idx = load_label2idx(label2idx_path)
    check_data(label2idx)
    torch.manual_seed(seed)  # also for a pooler the encoder lacks
    bert, tokenizer = load_encoder()

    # Data.
    options = {"tokenizer": tokenizer, "label2idx": label2idx, "keep_tail": keep_tail}
    train_dataset = MultiClsDataSet(train_path, max_len, **options)
    dev_dataset = MultiClsDataSet(dev_path, max_len, **options)
    num_epochs, size, encoder_lr, head_lr = plan(bert, len(train_dataset))
    sampler = GroupedBatchSampler(train_dataset, size, accumulation_steps, seed, rank, world_size)
    dataloader = torch.utils.data.DataLoader(train_dataset, batch_size=None, sampler=sampler)
    dev_dataloader = eval_dataloader(dev_dataset, size, rank, world_size)
    num_batches = len(sampler)  # per epoch
    steps_per_epoch = math.ceil(num_batches / accumulation_steps)  # of the optimizer

    # Model, loss, optimizer.
    model = BertMultiLabelCls(None, len(label2idx), dropout, bert).to(device)
    sums = sum_pooled(model, train_dataset, device, dtype)  # None for few labels
    init_classifier(model, train_dataset.label_counts, len(train_dataset), sums)
    network = model if world_size == 1 else nn.parallel.DistributedDataParallel(model)
    criterion = losses[loss_name]
    num_steps = num_epochs * steps_per_epoch
    optimizer, scheduler = create_optimizer(model, encoder_lr, head_lr, num_steps)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == torch.float16)
    log_setup(model, dtype, train_dataset)
    log("plan", epochs=num_epochs, batch_size=size, steps=num_steps, lr=f"{encoder_lr:g}")

    # An interrupted run goes on.
    config = get_run_config(bert, dtype, train_dataset)
    checkpoint = Checkpoint(config, model, optimizer, scheduler, scaler)
    start_epoch, start_batch, train_loss, history = checkpoint.restore(rank)
    log_scalars = open_writer(checkpoint.run_name, start_epoch * num_batches + start_batch)

    with handle_signals() as signals:
        for epoch in range(start_epoch, num_epochs):
            values = [row.get(best_metric) or -row["dev_loss"] for row in history]
            if patience and values and len(values) - values.index(max(values)) > patience:
                log("stop", f"no better {best_metric} in {patience} epochs")
                break
            model.train()
            sampler.set_epoch(epoch, start_batch)
            train_loss = torch.tensor(train_loss, device=device)  # a tensor: no wait per batch
            for i, batch in enumerate(dataloader, start_batch):
                step = epoch * num_batches + i
                torch.manual_seed(hash((seed, step, rank)))  # as in a resumed run
                *inputs, labels = (tensor.to(device) for tensor in batch)
                sync_gradients = (i + 1) % accumulation_steps == 0 or i + 1 == num_batches
                network.require_backward_grad_sync = sync_gradients  # DDP: once a step
                with autocast(device, dtype):
                    probs = network(*inputs)
                loss = criterion(probs.nan_to_num(), labels)  # BCELoss cannot take NaN
                scaler.scale(loss * sampler.loss_weight(i)).backward()
                train_loss += loss.detach() * sampler.loss_weight(i)
                if i % log_steps == 0:
                    log_batch(log_scalars, epoch, i, step, loss, labels, probs, scheduler)
                if sync_gradients:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
                    scaler.step(optimizer)
                    scaler.update()
                    scheduler.step()
                    optimizer.zero_grad()
                    checkpoint.save_if_due(signals, epoch, i + 1, train_loss, history)
            if not history:  # before save_model, which may replace the encoder
                checkpoint.save(signals, epoch, num_batches, train_loss, history)

            # Evaluate on dev; keep the last epoch within a standard error (chance) of the best.
            dev_loss, _, predictions = dev(model, dev_dataloader, criterion, True)
            mean_loss = sum(all_gather_object(train_loss.item())) / world_size / steps_per_epoch
            metrics = compute_metrics(predictions.true, predict_labels(predictions.probs))
            row = {"epoch": epoch + 1, "train_loss": mean_loss, "dev_loss": dev_loss} | metrics
            values.append(metrics.get(best_metric) or -dev_loss)  # at 0 the loss decides
            best = max(values)
            error = math.sqrt(max(best * (1 - best), 0) / len(dev_dataset))
            row["saved"] = values[-1] >= best - error
            history.append(row)
            log_epoch(log_scalars, row, (epoch + 1) * num_batches - 1)
            if row["saved"] and rank == 0:
                tuned, cut = tune_thresholds(predictions, label2idx), (max_len, keep_tail)
                save_model(model, tokenizer, label2idx, save_model_path, tuned, cut)
            start_batch, train_loss = 0, 0.0
            checkpoint.save(signals, epoch + 1, 0, train_loss, history)

    report(history, checkpoint)
    if rank == 0:
        os.remove(checkpoint.path)  # last: until then the run can go on


def get_acc_score(y_true_tensor, y_pred_tensor):
    """Return the share of texts with all labels right at > 0.5, of two tensors (N, C)."""
    predicted = (y_pred_tensor.detach().cpu() > 0.5).int().numpy()
    return accuracy_score(y_true_tensor.cpu().numpy(), predicted)


def dev(model, dataloader, criterion, return_predictions=False):
    """Return (mean loss, accuracy) of a DataLoader; with return_predictions also Predictions."""
    batches = predict_batches(model, dataloader, choose_dtype(precision, device))
    by_length = dataloader.batch_size is None  # of eval_dataloader: a share of the batches
    sampler = iter(dataloader.sampler) if by_length else None
    predictions = collect_predictions(batches, dataloader.dataset.class_num, criterion, sampler)
    loss = predictions.sums["loss"] / predictions.true.shape[0]
    acc = compute_metrics(predictions.true, predict_labels(predictions.probs))["accuracy"]
    return (loss, acc, predictions) if return_predictions else (loss, acc)


def test(model_path, test_data_path, return_report=False):
    """Return the accuracy of a trained model on a data file, or its (metrics, errors)."""
    rank, world_size = init_distributed(device)
    model, tokenizer, label2idx = load_model(model_path, label2idx_path)
    check_truncation(max_len, keep_tail, model.bert.config)
    model.to(device).bert.to(choose_dtype(precision, device))
    dataset = MultiClsDataSet(test_data_path, max_len, None, tokenizer, label2idx, keep_tail)
    size = 32 if batch_size == "auto" else batch_size
    dataloader = eval_dataloader(dataset, size, rank, world_size)
    _, acc, predictions = dev(model, dataloader, nn.BCELoss(), return_predictions=True)
    if not return_report:
        return acc
    metrics = metrics_report(predictions, label2idx, model.bert.config.thresholds)
    return metrics, misclassified(read_examples(test_data_path), predictions, list(label2idx))


def focal_loss(probs, labels):
    """Return the focal loss for gamma 1: the mean of -(1 - p_t) log p_t, arXiv 1708.02002."""
    return ((probs - labels).abs() * nn.BCELoss(reduction="none")(probs, labels)).mean()


# Minimized, of probs and labels (B, C); dev calls it on the CPU.
losses = {"bce": nn.BCELoss(), "focal": focal_loss}


def check_constants():
    """Raise InputError if a constant is out of range."""
    zero = csr_matrix((1, 1), dtype=bool)
    choices = {"loss_name": losses, "errors_name": ("errors.jsonl", "errors.csv")}
    choices["best_metric"] = ("loss", *compute_metrics(zero, zero))
    for name, values in choices.items():
        if globals()[name] not in values:
            raise InputError(f"{name} = {globals()[name]!r}: not one of {', '.join(values)}")
    counts = {"epochs": 1, "batch_size": 1, "accumulation_steps": 1, "log_steps": 1, "patience": 0}
    others = {"seed": 0, "lr": 0, "head_lr_factor": 0, "max_grad_norm": 0, "checkpoint_minutes": 0}
    shares = {"warmup_ratio": 0, "dropout": 0, "weight_decay": 0}
    for k, least in (counts | others | shares).items():
        if globals()[k] != "auto" or k not in ("epochs", "batch_size", "lr"):
            check_number(k, globals()[k], least, 1 if k in shares else 2**31, integer=k in counts)


def check_data(label2idx):
    """Read all files: a bad line is reported now, not hours later."""
    paths = {"train": train_path, "dev": dev_path, "test": test_path}
    files = {k: scan_examples(path) for k, path in paths.items()}
    check_labels_known(files, label2idx)
    log("data", **{name: len(f.lengths) for name, f in files.items()}, labels=len(label2idx))
    for name, file in files.items():
        missing = sorted(label2idx.keys() - file.label_counts)
        if missing:
            some = f"{len(missing)} labels without an example in {name} ({', '.join(missing):.40})"
            remedy = f"; is {label2idx_path} of older data?" if name == "train" else ""
            log("note", f"{some} count 0 in macro_f1{remedy}")


def load_encoder():
    """Return (BertModel, tokenizer); a small BERT from scratch if the default one is missing."""
    name = bert_multilabel_cls.pretrained_model
    folder, error_message = broadcast_object(lambda: find_encoder(name))
    if not folder and name != bert_multilabel_cls.default_model:
        raise InputError(error_message)
    if folder:
        bert, tokenizer = load_pretrained(BertModel, folder), load_pretrained(BertTokenizer, folder)
    else:
        log("note", f"{error_message}; a small BERT is trained from scratch instead")
        bert, tokenizer = build_scratch_encoder(read_examples(train_path), seed)
    check_truncation(max_len, keep_tail, bert.config)
    if tokenizer.truncation_side == "left" and not keep_tail:
        log("note", "the encoder's truncation_side is left; keep_tail = max_len - 2 does that here")
    return bert, tokenizer


def plan(bert, num_texts, min_steps=650):
    """Return (epochs, batch size per process, learning rates of encoder and head).

    "auto" aims at min_steps: too few fail on small data (Mosbach et al. 2021, arXiv 2006.04884).
    """
    from_scratch = not bert.name_or_path
    auto_lr = 2.5e-4 if from_scratch else min(2e-5 * (768 / bert.config.hidden_size) ** 2, 3e-4)
    encoder_lr = auto_lr if lr == "auto" else lr
    head_lr = encoder_lr if from_scratch else encoder_lr * head_lr_factor
    num_epochs = (12 if from_scratch else 10) if epochs == "auto" else epochs
    size, batches_per_step = batch_size, accumulation_steps * get_world_size()
    if size == "auto":
        texts_per_step = 8 * max(1, num_texts * num_epochs // (8 * min_steps))
        size = min(32, math.ceil(texts_per_step / batches_per_step))
    if epochs == "auto":
        steps = math.ceil(num_texts / (size * batches_per_step))  # per epoch
        num_epochs = min(max(num_epochs, math.ceil(min_steps / steps)), 100)
    return num_epochs, size, encoder_lr, head_lr


def create_optimizer(model, encoder_lr, head_lr, num_steps):
    """Return (AdamW, its schedule); head: pooler, classifier; biases, LayerNorm: no decay."""
    head_ids = {id(p) for p in (*model.bert.pooler.parameters(), *model.fc.parameters())}
    groups = {}
    for p in sorted(model.parameters(), key=lambda p: id(p) in head_ids):  # encoder first
        key = head_lr if id(p) in head_ids else encoder_lr, weight_decay * (p.ndim > 1)
        groups.setdefault(key, []).append(p)
    groups = [{"params": ps, "lr": r, "weight_decay": d} for (r, d), ps in groups.items()]
    optimizer = torch.optim.AdamW(groups, fused=True)
    warmup = round(warmup_ratio * num_steps)
    return optimizer, get_linear_schedule_with_warmup(optimizer, warmup, num_steps)


def log_setup(model, dtype, dataset):
    """Print the model, what is "auto", and if texts are unknown to the encoder."""
    size = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M"
    name = model.bert.name_or_path or "small BERT from scratch"
    log("model", f"{name} on {device}", parameters=size, dtype=str(dtype).split(".")[1])
    auto = ", ".join(name for name in ("epochs", "batch_size", "lr") if globals()[name] == "auto")
    log("auto", auto or "none", texts=len(dataset), hidden_size=model.bert.config.hidden_size)
    unknown = (dataset.ids == (dataset.tokenizer.unk_token_id or -1)).float().mean().item()
    if unknown > 0.03:
        log("note", f"{unknown:.1%} of the tokens are unknown; an encoder of another language?")


def get_run_config(bert, dtype, train_dataset):
    """Return {name: value} of all that must not change before a run resumes."""
    config = {k: v for k, v in globals().items() if isinstance(v, (int, float, str))}
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    config |= {"save_model_path": str(save_model_path), "device": str(device), "dtype": str(dtype)}
    config |= {"encoder": bert.name_or_path, "processes": get_world_size()}
    config["tokens of train_path"] = zlib.crc32(train_dataset.ids.numpy())
    for path in (train_path, dev_path, test_path, label2idx_path):
        config[f"the content of {path}"] = zlib.crc32(Path(path).read_bytes())
    if any(other != config for other in all_gather_object(config)):
        raise InputError("data or constants differ between the machines")
    return config


class Checkpoint:
    """Where a run is: on disk every checkpoint_minutes, after epochs and signals."""

    def __init__(self, config, *parts):
        self.path = folder_path("checkpoint.pth")
        self.config, self.parts = config, parts
        self.run_name, self.saved_at = time.strftime("%Y-%m-%d_%H-%M-%S"), time.monotonic()

    def restore(self, rank):
        """Return (epoch, batch, train loss so far, history); load all parts."""
        if not resume or not os.path.exists(self.path):
            return 0, 0, 0.0, []
        start_over = f"to start over, delete {self.path} or set resume = False in train.py"
        with clear_errors(f"{self.path}: not a checkpoint of a run; {start_over}"):
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            old, train_losses = saved["config"], saved["losses"]
            self.run_name = os.path.basename(saved["run_name"])
        names = self.config.keys() - {"resume", "checkpoint_minutes", "log_steps"}
        changed = sorted(k for k in names if old.get(k) != self.config[k])
        if changed:
            changes = ", ".join(f"{name} (was {old.get(name)})" for name in changed)
            raise InputError(f"{self.path}: changed: {changes}; undo it, or, {start_over}")
        with clear_errors(f"{self.path}: does not fit the network; {start_over}"):
            for part, state in zip(self.parts, saved["states"], strict=True):
                part.load_state_dict(state)
        log("resume", f"from {self.path}", epoch=saved["epoch"] + 1, batch=saved["batch"])
        return saved["epoch"], saved["batch"], train_losses[rank], saved["history"]

    def save_if_due(self, signals, *state):
        """Save after a signal or checkpoint_minutes; all processes do the same."""
        minutes = (time.monotonic() - self.saved_at) / 60
        if any(all_gather_object(bool(signals) or minutes >= checkpoint_minutes)):
            self.save(signals, *state)

    def save(self, signals, epoch, batch, train_loss, history):
        """Write the checkpoint, unless training has diverged. After a signal, exit."""
        check_finite(sum(parameter.detach().sum() for parameter in self.parts[0].parameters()))
        saved = {"config": self.config, "run_name": self.run_name, "history": history}
        saved |= {"epoch": epoch, "batch": batch, "losses": all_gather_object(float(train_loss))}
        if is_main_process():
            saved["states"] = [part.state_dict() for part in self.parts]
            with atomic_write(self.path) as path:
                torch.save(saved, path)
            if history:
                write_rows(history, folder_path("history.jsonl"))
        self.saved_at, number = time.monotonic(), max(all_gather_object(max(signals, default=0)))
        if number:
            log("stopped", f"saved in {self.path}; with resume = True the same command goes on")
            sys.exit(128 + number)


@contextmanager
def handle_signals():
    """Give a list to which SIGTERM and Ctrl-C add their number; a second Ctrl-C interrupts."""
    signals, handlers = [], {}

    def handler(n, _):
        if n == signal.SIGINT and n in signals and get_world_size() == 1:  # torchrun sends two
            raise KeyboardInterrupt
        signals.append(n)
        if is_main_process():  # print may have been interrupted
            os.write(1, b"stopping after this step, to save; Ctrl-C again: at once\n")

    if threading.current_thread() is threading.main_thread():  # only it may
        handlers = {n: signal.signal(n, handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, old_handler in handlers.items():
            signal.signal(number, old_handler)


def log_batch(log_scalars, epoch, i, step, loss, labels, probs, scheduler):
    """Print and draw the loss of a batch, or raise InputError if it is not finite."""
    check_finite(loss + probs.sum())
    shown = {"acc": f"{get_acc_score(labels, probs):.3f}", "loss": f"{loss.item():.4f}"}
    log("train", epoch=epoch + 1, batch=i, **shown)
    log_scalars({"train/loss": loss.item(), "train/lr": scheduler.get_last_lr()[0]}, step)


def check_finite(value):
    """Raise InputError if training has diverged."""
    if not math.isfinite(value.item()):
        raise InputError('the loss is NaN; lower lr, or set precision = "fp32"')


def log_epoch(log_scalars, row, step):
    """Print and draw the scores of an epoch."""
    scores = {k: v for k, v in row.items() if k not in ("epoch", "saved")}
    shown = {k.removeprefix("train_"): f"{v:.3f}" for k, v in scores.items()}
    log("epoch", str(row["epoch"]), **shown)
    log_scalars({f"epoch/{k}": v for k, v in scores.items()}, step)
    if row.get("micro_f1") == 0:
        remedy = "if it stays so, raise lr or epochs, or lower threshold in predict.py"
        log("note", f"no right label on dev after epoch {row['epoch']}; {remedy}")


def open_writer(run_name, next_step):
    """Return a function that draws {name: value} at a step, if tensorboard is installed."""
    writer, folder = None, folder_path(f"runs/{run_name}")
    with suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder, purge_step=next_step) if is_main_process() else None
    if writer is None:
        log("note", "no curves; for TensorBoard: pip install tensorboard")

    def log_scalars(values, step):
        with suppress(OSError):  # a full disk ends the curves, not the run
            for name, value in values.items() if writer else ():
                writer.add_scalar(name, value, step)
                writer.flush()

    return log_scalars


def report(history, checkpoint):
    """Measure the saved model on dev and test; write metrics.json and errors.jsonl."""
    metrics, errors = {}, []
    for name, path in (("dev", dev_path), ("test", test_path)):
        metrics[name], file_errors = test(save_model_path, path, return_report=True)
        errors += file_errors
    log_label_metrics(metrics["test"]["by_label"], f"all are in {folder_path('metrics.json')}")
    best_epoch = [row["epoch"] for row in history if row["saved"]][-1]
    log("scores", f"of epoch {best_epoch}: {'/'.join(metrics['dev']['at_0.5'])}")
    for name, scores in metrics.items():
        cells = {t: scores[f"at_{t}"].values() for t in ("0.5", "single", "by_label")}
        log(name, **{t: "/".join(map("{:.3f}".format, values)) for t, values in cells.items()})
    if is_main_process():
        run = {"run_name": checkpoint.run_name, "best_epoch": best_epoch}
        run |= {"torch": torch.__version__, "constants": checkpoint.config}
        write_rows(errors, folder_path(errors_name))
        dump_json(run | metrics, folder_path("metrics.json"), indent=1)


def folder_path(name):  # in the model's folder
    return os.path.join(os.path.dirname(get_pth_path(save_model_path)), name)


if __name__ == "__main__":
    run_script(train)
