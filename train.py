"""Fine-tune BERT for multi-label text classification.

reads   ./data/train.json, dev.json, test.json   one example a line: {"text": "...", "label": ["...", ...]}
        ./data/label2idx.json                    written by `python data_preprocess.py`
writes  ./model/                                 the best model, in Hugging Face format too
        ./model/metrics.json                     its scores on dev and test, and the settings of the run
        ./model/history.jsonl                    one line per epoch
        ./model/errors.jsonl                     misclassified texts of dev and test, one per line
        ./model/previous/                        the finished model before this one
        ./model/checkpoint.pth                   during training: what an interrupted run needs to resume
        ./model/runs/                            TensorBoard curves, if tensorboard is installed
run     python train.py
        torchrun --nproc_per_node=4 train.py     on 4 GPUs; batch_size is per GPU
"""

import math
import os
import shutil
import time
import zlib
from itertools import chain

if __name__ == "__main__":  # before torch is loaded
    from data_preprocess import limit_spinning

    limit_spinning()

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from sklearn.metrics import accuracy_score
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BertConfig, BertModel, BertTokenizer, get_linear_schedule_with_warmup

import bert_multilabel_cls
import data_helper
from bert_multilabel_cls import BertMultiLabelCls, autocast, check_truncation, choose_dtype, clip_grad_norm_
from bert_multilabel_cls import complete_save, find_encoder, get_pth_path, init_bias, init_from_texts
from bert_multilabel_cls import limit_threads, load_model, load_pretrained, oom_hint, parameter_groups
from bert_multilabel_cls import pooled_sums, predict_batches, save_model, to_inference, torch_load, wrap_model
from data_helper import GroupedBatchSampler, MultiClsDataSet, all_gather_object, all_reduce, broadcast_object
from data_helper import calibration_error, collect_predictions, compute_metrics, eval_dataloader
from data_helper import exit_if_stopped, gather_predictions, init_distributed, metrics_report, misclassified
from data_helper import tune_thresholds
from data_preprocess import InputError, atomic_write, check_labels_known, check_number, check_writable
from data_preprocess import dump_json, dump_jsonl, file_sha256, get_world_size, handle_signals, label_names
from data_preprocess import is_main_process, load_json_object, load_label2idx, log, log_label_metrics
from data_preprocess import log_metrics, plain_constants, read_examples, run_script, scan_examples
from data_preprocess import short_message, shorten, sibling_path

# Files. The encoder is pretrained_model in bert_multilabel_cls.py.
train_path = "./data/train.json"
dev_path = "./data/dev.json"
test_path = "./data/test.json"
label2idx_path = "./data/label2idx.json"
save_model_path = "./model/multi_label_cls.pth"  # or its folder, to which everything else is written too
checkpoint_name = "checkpoint.pth"  # removed when training finishes
scratch_name = "scratch_encoder"  # the small BERT, if bert-base-chinese is missing
tensorboard_name = "runs"  # with a folder per run; "" to skip

# Hardware.
device = "cuda" if torch.cuda.is_available() else "cpu"
precision = "auto"  # "bf16", "fp16" (GPU only) or "fp32"; "auto" picks the fastest that the hardware supports
compile_model = False  # torch.compile; takes minutes, pays off in long runs on a GPU
pad_to_multiple_of = 8  # tokens; with compile_model, batch lengths are rounded up to a multiple of this

# Hyperparameters.
lr = "auto"  # peak learning rate of the encoder; "auto": 2e-5 at base size, 8e-5 for a hidden size of 384
head_lr_factor = 10  # the pooler and the classifier learn this many times as fast
epochs = 10
min_steps = 650  # with little data batches get smaller, down to 8 texts, then epochs more; 0 to disable
batch_size = 32  # texts per process; if you run out of memory, halve it and double accumulation_steps
accumulation_steps = 1  # batches per optimizer step
max_len = 128  # tokens; longer texts are truncated
keep_tail = 0  # tokens of a truncated text that are kept from its end
dropout = 0.1  # before the classifier
loss = "bce"  # the article's BCELoss; "focal" weights it by 1 - p of what is right, which helps rare labels
many_labels = 500  # with so many, the classifier starts from the training texts that have each of them
warmup_ratio = 0.1  # share of the steps with a rising learning rate; after that it decays linearly to 0
max_grad_norm = 1.0  # gradient clipping; 0 to disable
weight_decay = 0.01  # not applied to biases and LayerNorm
seed = 42

# Logging, model selection, checkpoints.
log_steps = 100  # batches from one line with loss and accuracy to the next
best_metric = "accuracy"  # on dev: "accuracy" (exact match), "micro_f1", "macro_f1" or "loss"
patience = 0  # stop after this many epochs without improvement; 0 to disable
min_label_support = 10  # labels with fewer dev examples share a threshold
resume = True  # continue an interrupted run; False starts over
checkpoint_minutes = 10  # from one checkpoint to the next, besides the one after every epoch

# The small BERT that is trained from scratch if bert-base-chinese is missing.
scratch_lr = 2.5e-4  # of all its layers
scratch_epochs = 8


def train():
    """Train, keep the epoch that is best on dev, and test it. Resumes an interrupted run.

    Raises InputError for what the user can fix in files and constants, SystemExit after SIGTERM or Ctrl-C.
    """
    plain_constants(globals())
    plain_constants(vars(bert_multilabel_cls))
    check_constants()
    limit_threads()
    rank, world_size = init_distributed(device)
    dtype = choose_dtype(precision, device)
    label2idx = load_label2idx(label2idx_path)
    num_texts = check_data(label2idx)
    check_writable(output_path(checkpoint_name))
    checkpoint = Checkpoint(run_config(dtype, world_size), world_size)
    encoder = checkpoint.encoder or broadcast_object(lambda: get_encoder(num_texts))
    folder, encoder_lr, head_lr, num_epochs, local_batch_size = encoder

    tokenizer = load_pretrained(BertTokenizer, folder)
    train_dataset = MultiClsDataSet(train_path, max_len, label2idx_path, tokenizer, keep_tail=keep_tail)
    dev_dataset = MultiClsDataSet(dev_path, max_len, label2idx_path, tokenizer, keep_tail=keep_tail)
    train_dataset.pad_to_multiple_of = pad_to_multiple_of if compile_model else 1
    sampler = GroupedBatchSampler(train_dataset, local_batch_size, accumulation_steps, seed, rank, world_size)
    pin_memory = torch.device(device).type == "cuda"
    train_dataloader = DataLoader(train_dataset, batch_size=None, sampler=sampler, pin_memory=pin_memory)
    dev_dataloader = eval_dataloader(dev_dataset, batch_size, device, rank, world_size)
    num_batches = len(sampler)  # per epoch
    num_steps = math.ceil(num_batches / accumulation_steps)  # of the optimizer, per epoch

    torch.manual_seed(seed)
    model = BertMultiLabelCls(None, len(label2idx), dropout, load_pretrained(BertModel, folder)).to(device)
    init_bias(model.fc, train_dataset.label_counts, len(train_dataset))
    from_scratch = folder == output_path(scratch_name)  # whose outputs hardly differ from text to text yet
    if len(label2idx) >= many_labels and not from_scratch and checkpoint.states is None:
        init_classifier(model, train_dataset, dtype)
    network = wrap_model(model, compile_model, world_size)  # what trains the weights of model
    criterion = get_criterion()
    optimizer = torch.optim.AdamW(parameter_groups(model, encoder_lr, head_lr, weight_decay), fused=True)
    warmup_steps = round(warmup_ratio * num_steps * num_epochs)
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup_steps, num_steps * num_epochs)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == torch.float16)
    log_setup(model, encoder, dtype, num_steps)
    note_unknown_tokens(train_dataset)
    checkpoint.restore(encoder, train_dataset, model, optimizer, scheduler, scaler)
    history, log_scalars = checkpoint.history, open_writer(checkpoint, num_batches)
    bar_options = {"unit": "batch", "leave": False, "disable": None if is_main_process() else True}

    with handle_signals() as checkpoint.signals:
        for epoch in range(checkpoint.epoch, num_epochs):
            if should_stop_early(history):
                break
            model.train()
            sampler.set_epoch(epoch, checkpoint.batch)
            train_loss = torch.tensor(checkpoint.train_losses[rank], device=device)
            start_time = time.perf_counter() - checkpoint.seconds
            bar = tqdm(train_dataloader, f"epoch {epoch + 1}", initial=checkpoint.batch, **bar_options)
            for i, batch in enumerate(bar, checkpoint.batch):
                step = epoch * num_batches + i + 1
                torch.manual_seed(seed + step * world_size + rank)  # a resumed run gets the same dropout
                *inputs, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
                sync_gradients = (i + 1) % accumulation_steps == 0 or i + 1 == num_batches
                network.require_backward_grad_sync = sync_gradients  # DDP: once per optimizer step
                with oom_hint(inputs[0]), autocast(device, dtype):
                    probs = network(*inputs)
                loss = criterion(probs.nan_to_num(), labels) + 0 * probs.sum()  # BCELoss aborts on NaN
                scaler.scale(loss * sampler.loss_weight(i)).backward()
                train_loss += loss.detach() * sampler.loss_weight(i)
                if i % log_steps == 0:
                    loss = check_finite(loss, epoch, i, scheduler)
                    bar.set_postfix(loss=f"{loss:.4f}")
                    acc = get_acc_score(labels, probs)
                    with bar.external_write_mode():
                        shown = {"acc": f"{acc:.3f}", "loss": f"{loss:.4f}"}
                        seconds = f"{time.perf_counter() - start_time:.0f}s"
                        log("train", epoch=epoch + 1, batch=i, **shown, time=seconds)
                    log_scalars({"train/loss": loss, "train/lr": scheduler.get_last_lr()[0]}, step)
                if sync_gradients:
                    scaler.unscale_(optimizer)
                    clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
                    scaler.step(optimizer)
                    scaler.update()
                    scheduler.step()
                    optimizer.zero_grad()
                    if checkpoint.is_due():
                        checkpoint.save(epoch, i + 1, train_loss, time.perf_counter() - start_time)
            seconds = time.perf_counter() - start_time
            if not history:  # the first model may be saved over the encoder that the run started from
                checkpoint.save(epoch, num_batches, train_loss, seconds)
            dev_loss, dev_acc, predictions = dev(model, dev_dataloader, nn.BCELoss(), return_predictions=True)
            train_loss = all_reduce(train_loss.cpu()).item() / world_size / num_steps
            row = {"seconds": seconds, "train_loss": train_loss, "dev_loss": dev_loss}
            row |= compute_metrics(predictions) | {"accuracy": dev_acc}
            log_scalars({f"epoch/{name}": row[name] for name in row}, (epoch + 1) * num_batches)
            row = {"epoch": epoch + 1, **row, "saved": is_best(row, history)}
            history.append(row)
            log_epoch(row, num_epochs)
            note_no_predictions(row, predictions)
            if row["saved"] and is_main_process():
                names = label_names(label2idx)
                thresholds = tune_thresholds(predictions, names, min_label_support, tuned_metric())
                truncation = (max_len, keep_tail)
                save_model(model, tokenizer, label2idx, save_model_path, thresholds, truncation, history)
            elif is_main_process():
                dump_jsonl(history, output_path("history.jsonl"))
            checkpoint.save(epoch + 1)

    report(checkpoint, num_epochs, dtype)


def get_acc_score(y_true_tensor, y_pred_tensor):
    """Return the share of rows with all labels right at > 0.5, of labels (N, C) and probabilities (N, C)."""
    return accuracy_score(y_true_tensor.cpu().numpy(), (y_pred_tensor.detach().cpu() > 0.5).int().numpy())


def dev(model, dataloader, criterion, return_predictions=False):
    """Return (mean loss, accuracy) over a DataLoader; with return_predictions also the Predictions."""
    batches = predict_batches(model, dataloader, choose_dtype(precision, device))
    by_length = dataloader.batch_size is None  # of eval_dataloader: each process has a share of the batches
    sampler = iter(dataloader.sampler) if by_length else None
    predictions = collect_predictions(batches, model.fc.out_features, criterion, sampler)
    predictions = gather_predictions(predictions) if by_length else predictions
    loss = predictions.sums["loss"] / predictions.num_texts
    acc = compute_metrics(predictions)["accuracy"]
    return (loss, acc, predictions) if return_predictions else (loss, acc)


def test(model_path, test_data_path, return_report=False):
    """Return the accuracy of a trained model on a data file, or its (metrics, errors), as in predict.py."""
    processes = init_distributed(device)
    model, tokenizer, label2idx = broadcast_object(lambda: load_model(model_path, label2idx_path))
    check_truncation(max_len, keep_tail, model.bert.config)
    torch.backends.cuda.matmul.allow_tf32 = False
    to_inference(model, device, choose_dtype(precision, device))
    dataset = MultiClsDataSet(test_data_path, max_len, None, tokenizer, label2idx, keep_tail)
    dataloader = eval_dataloader(dataset, batch_size, device, *processes)
    _, acc, predictions = dev(model, dataloader, nn.BCELoss(), return_predictions=True)
    if not return_report:
        return acc
    names = label_names(label2idx)
    metrics = metrics_report(predictions, names, model.bert.config.thresholds)
    metrics["calibration_error"] = calibration_error(predictions, min_label_support)
    return metrics, misclassified(list(read_examples(test_data_path)), predictions, names)


def get_criterion():
    """Return the function of (probs, labels) that training minimizes; dev and test always have BCELoss."""
    return {"bce": nn.BCELoss(), "focal": focal_loss}[loss]


def focal_loss(probs, labels):
    """Return the mean of -(1 - p) log p, p the probability of what is right, of probs and labels (B, C).

    Lin et al. 2017, arXiv 1708.02002, equation 4, at gamma = 1: labels that are right already weigh less.
    """
    return ((probs - labels).abs() * F.binary_cross_entropy(probs, labels, reduction="none")).mean()


def init_classifier(model, train_dataset, dtype):
    """Start the classifier from what the encoder makes of the training texts that have each label."""
    dataloader = eval_dataloader(train_dataset, batch_size, device, *init_distributed(device))
    sums = [all_reduce(tensor) for tensor in pooled_sums(model, dataloader, dtype)]
    init_from_texts(model.fc, train_dataset.label_counts, len(train_dataset), *sums)
    num_labels = model.fc.out_features
    log("note", f"{num_labels} labels: the classifier starts from the texts that have each of them")
    if best_metric == "accuracy":
        log("note", 'hardly any text will get all its labels right; set best_metric = "micro_f1"')


def report(checkpoint, num_epochs, dtype):
    """Measure the best model on dev and test, write metrics.json and errors.jsonl, and end the run."""
    history = checkpoint.history
    best_epoch = max(row["epoch"] for row in history if row["saved"])
    seconds = round(sum(row["seconds"] for row in history), 1)
    log("best", epoch=best_epoch, train_time=f"{seconds}s")
    metrics, errors = {}, []
    for name, path in (("dev", dev_path), ("test", test_path)):
        metrics[name], file_errors = test(save_model_path, path, return_report=True)
        errors.append(file_errors)
        if name == "test":
            log_label_metrics(metrics[name]["by_label"], f"all in {output_path('metrics.json')}")
        for threshold in ("0.5", "single", "by_label"):
            log_metrics(name, metrics[name][f"at_{threshold}"], threshold)
        ranking = ("precision@1", "precision@3", "precision@5", "mean_average_precision")
        log(name, **{key: f"{metrics[name][key]:.3f}" for key in ranking if key in metrics[name]})
        if error := metrics[name]["calibration_error"]:
            log(name, **{f"calibration_error_{group}": f"{value:.3f}" for group, value in error.items()})
    thresholds = load_json_object(output_path("config.json"))["thresholds"]
    scores = thresholds["cross_validation"]
    scores = {f"at_{name}": f"{scores[name]:.3f}" for name in ("0.5", "single", "by_label")}
    log("tuned", recommended=thresholds["recommended"], metric=tuned_metric(), **scores)
    note_what_helps(history, num_epochs, metrics["dev"]["by_label"])
    if is_main_process():
        names = ("encoder", "lr", "head_lr", "epochs", "batch_size", "dtype", "processes")
        used = dict(zip(names, (*checkpoint.encoder, str(dtype)[6:], get_world_size()), strict=True))
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        changed = {name: value for name, value in constants().items() if value != shipped.get(name, value)}
        run = {"run_name": checkpoint.run_name, "changed": changed, "used": used, "best_epoch": best_epoch}
        run |= {"train_seconds": seconds, "versions": versions}
        run["thresholds"] = thresholds
        dump_json({**run, "constants": constants(), **metrics}, output_path("metrics.json"), indent=1)
        dump_jsonl(chain(*errors), output_path("errors.jsonl"))
        shutil.rmtree(output_path(scratch_name), ignore_errors=True)
        os.remove(checkpoint.path)


def tuned_metric():
    """Return the metric that the recommended thresholds are best in: best_metric, which may be the loss."""
    return "micro_f1" if best_metric == "loss" else best_metric


def note_unknown_tokens(dataset):
    """Say so if the encoder does not know more than 3 % of the tokens: it is of another language."""
    unknown_id = dataset.tokenizer.unk_token_id
    unknown = (dataset.ids == (-1 if unknown_id is None else unknown_id)).float().mean().item()
    if unknown > 0.03:
        log("note", f"{unknown:.1%} of the tokens are unknown to this encoder; is it of another language?")


def note_no_predictions(row, predictions):
    """Say so if no probability of dev is above 0.5 after an epoch."""
    if not (predictions.probs > 0.5).any():
        remedy = "if it stays so, raise lr or epochs, or lower threshold in predict.py"
        log("note", f"no label is predicted on dev after epoch {row['epoch']}; {remedy}")


def note_what_helps(history, num_epochs, by_label):
    """Say so if the last epoch is the best and the loss still falls, and which labels dev never gets."""
    losses = [row["dev_loss"] for row in history]
    if history[-1]["saved"] and len(history) == num_epochs > 1 and losses[-1] < 0.98 * losses[-2]:
        log("note", "the last epoch is the best one and the loss on dev still falls; raise epochs")
    never = sorted(name for name, row in by_label.items() if row["support"] and not row["predicted"])
    if never:
        some = ", ".join(map(shorten, never[:3])) + ", …" * (len(never) > 3)
        log("note", f'{len(never)} labels are never predicted on dev: {some}; try threshold = "tuned"')


class Checkpoint:
    """Where a run stands: on disk every checkpoint_minutes, after each epoch, and after SIGTERM or Ctrl-C."""

    saved_names = "config encoder token_crc run_name epoch batch seconds train_losses history".split()

    def __init__(self, config, world_size):
        self.path, self.saved_at, self.signals = output_path(checkpoint_name), time.monotonic(), []
        self.config, self.encoder, self.token_crc, self.states, self.parts = config, None, None, None, ()
        folder_name = os.path.basename(os.path.abspath(output_path("")))
        self.run_name, self.history = f"{folder_name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}", []
        self.epoch, self.batch, self.seconds, self.train_losses = 0, 0, 0.0, [0.0] * world_size
        broadcast_object(lambda: complete_save(*os.path.split(get_pth_path(save_model_path))))
        exists = resume and os.path.exists(self.path)
        if any(other != [config, exists] for other in all_gather_object([config, exists])):
            raise InputError(f"the data, the constants or {self.path} differ between the machines")
        try:
            saved = torch_load(self.path) if exists else {"config": config}
            changed = [k for k in {**saved["config"], **config} if saved["config"].get(k) != config.get(k)]
            vars(self).update({k: saved[k] for k in (*self.saved_names, "states") if exists})
        except (InputError, TypeError, KeyError, AttributeError):
            raise InputError(f"{self.path}: not a checkpoint of a run; {start_over(self.path)}") from None
        if changed:
            old = {k: f" (was {saved['config'].get(k)}, is {config.get(k)})" for k in globals()}
            changes = ", ".join(name + old.get(name, "") for name in changed)
            raise InputError(
                f"{self.path}: cannot resume, changed: {changes}; undo it; or, {start_over(self.path)}"
            )

    def restore(self, encoder, train_dataset, *parts):
        """Bring model, optimizer, scheduler and scaler to where the run was saved."""
        token_crc = zlib.crc32(train_dataset.ids.numpy())
        if self.states is not None:
            if token_crc != self.token_crc:
                raise InputError(f"{self.path}: cannot resume, changed: the tokenizer in {encoder[0]}")
            try:
                for part, state in zip(parts, self.states, strict=True):
                    part.load_state_dict(state)
                for parameter, state in parts[1].state.items():  # which load_state_dict does not look at
                    expected = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
                    if {name: value.shape for name, value in state.items()} != expected:
                        raise ValueError
            except (RuntimeError, ValueError, TypeError, KeyError, AttributeError):
                raise InputError(f"{self.path}: not a checkpoint of a run; {start_over(self.path)}") from None
            log("resume", f"from {self.path}", epoch=self.epoch + 1, batch=self.batch)
        self.encoder, self.token_crc, self.parts, self.states = encoder, token_crc, parts, None

    def is_due(self):
        """Return whether to save now; the same in all processes."""
        due = bool(self.signals) or time.monotonic() - self.saved_at >= 60 * checkpoint_minutes
        return bool(all_reduce(torch.tensor(int(due)), "MAX"))

    def save(self, epoch, batch=0, train_loss=0.0, seconds=0.0):
        """Write the checkpoint, unless training has diverged. After a signal, exit with 128 + its number."""
        model, _, scheduler, _ = self.parts
        weights = sum(parameter.detach().sum() for parameter in model.parameters())
        check_finite(train_loss + 0 * weights, epoch, batch, scheduler)
        self.epoch, self.batch, self.seconds, self.saved_at = epoch, batch, seconds, time.monotonic()
        self.train_losses = all_gather_object(float(train_loss))
        if is_main_process():
            saved = {name: getattr(self, name) for name in self.saved_names}
            saved["states"] = [part.state_dict() for part in self.parts]
            with atomic_write(self.path) as path:
                try:
                    torch.save(saved, path)
                except RuntimeError as error:  # a full disk
                    raise OSError(short_message(error)) from None
        exit_if_stopped(self.signals, resume, epoch=epoch + 1, batch=batch)


def start_over(path):
    """Return the remedy for a checkpoint that cannot be resumed."""
    return f"to start over, delete {path} or set resume = False in train.py"


def run_config(dtype, world_size):
    """Return {name: str}: what must not change before a run resumes."""
    free = ("resume", "checkpoint_minutes", "checkpoint_name", "tensorboard_name", "log_steps")
    config = constants() | {"the precision in use": dtype, "the number of processes": world_size}
    files = (train_path, dev_path, test_path, label2idx_path)
    config |= {f"the content of {path}": file_sha256(path) for path in files}
    return {name: str(value) for name, value in config.items() if name not in free}


def constants():
    """Return {name: value} of the constants that a run depends on."""
    values = {k: v for k, v in globals().items() if isinstance(v, (int, float, str)) and k[0] != "_"}
    values |= {"device": str(device), "pretrained_model": bert_multilabel_cls.pretrained_model}
    return values | {"mega_batch_mult": data_helper.mega_batch_mult}


# What differs from this is `changed` in metrics.json; a test keeps it equal to the constants as shipped.
# fmt: off
shipped = dict(
    train_path="./data/train.json", dev_path="./data/dev.json", test_path="./data/test.json",
    label2idx_path="./data/label2idx.json", save_model_path="./model/multi_label_cls.pth",
    checkpoint_name="checkpoint.pth", scratch_name="scratch_encoder", tensorboard_name="runs",
    precision="auto", compile_model=False, pad_to_multiple_of=8, lr="auto", head_lr_factor=10,
    epochs=10, min_steps=650, batch_size=32, accumulation_steps=1, max_len=128, keep_tail=0, dropout=0.1,
    loss="bce", many_labels=500, warmup_ratio=0.1, max_grad_norm=1.0, weight_decay=0.01, seed=42,
    log_steps=100, best_metric="accuracy", patience=0, min_label_support=10, resume=True,
    checkpoint_minutes=10, scratch_lr=0.00025, scratch_epochs=8, pretrained_model="bert-base-chinese",
    mega_batch_mult=50
)
# fmt: on


def output_path(name):
    """Return the path of a file in the model's folder."""
    return sibling_path(get_pth_path(save_model_path), name)


def check_constants():
    """Raise InputError if a constant is out of range."""
    if loss not in ("bce", "focal"):
        raise InputError(f'loss = {loss!r}: not "bce" or "focal"')
    if best_metric not in ("accuracy", "micro_f1", "macro_f1", "loss"):
        raise InputError(f'best_metric = {best_metric!r}: not "accuracy", "micro_f1", "macro_f1" or "loss"')
    sizes = ("batch_size", "accumulation_steps", "pad_to_multiple_of")
    for name in ("epochs", "scratch_epochs", "log_steps", "many_labels", *sizes):
        check_number(name, globals()[name], 1, integer=True)
    for name in ("patience", "min_label_support", "min_steps", "seed"):
        check_number(name, globals()[name], 0, integer=True)
    for name in ("head_lr_factor", "max_grad_norm", "checkpoint_minutes"):
        check_number(name, globals()[name], 0)
    for name in ("warmup_ratio", "dropout", "scratch_lr", "weight_decay"):
        check_number(name, globals()[name], 0, 1)
    if lr != "auto":
        check_number("lr", lr, 0, 1)


def check_data(label2idx):
    """Return the number of training texts. Reads all files: a bad line is reported now, not hours later."""
    stats = {path: scan_examples(path) for path in (train_path, dev_path, test_path)}
    check_labels_known(stats, label2idx)
    counts = [len(stats[path].text_lengths) for path in (train_path, dev_path, test_path)]
    log("data", **dict(zip(("train", "dev", "test"), counts, strict=True)), labels=len(label2idx))
    return counts[0]


def get_encoder(num_texts):
    """Return [folder, lr, head_lr, epochs, batch_size]; of a small BERT if the default encoder is missing."""
    name = bert_multilabel_cls.pretrained_model
    folder, error_message = find_encoder(name)
    if not folder and name != bert_multilabel_cls.default_model:
        raise InputError(error_message)
    config = load_pretrained(BertConfig, folder) if folder else BertConfig(**data_helper.scratch_config)
    check_truncation(max_len, keep_tail, config)
    if folder:
        encoder_lr = min(2e-5 * (768 / config.hidden_size) ** 2, 3e-4) if lr == "auto" else lr
        return [folder, encoder_lr, encoder_lr * head_lr_factor, *plan_steps(num_texts, epochs)]
    log("note", f"{error_message}; training a small BERT from scratch instead, with scratch_lr")
    folder = output_path(scratch_name)
    data_helper.build_scratch_encoder([text for _, text, _ in read_examples(train_path)], folder, seed)
    return [folder, scratch_lr, scratch_lr, *plan_steps(num_texts, scratch_epochs)]


def plan_steps(num_texts, num_epochs):
    """Return (epochs, batch size per process) for min_steps optimizer steps or more.

    On small data too few steps are what fails (Mosbach et al. 2021, arXiv 2006.04884).
    """
    if not min_steps:
        return num_epochs, batch_size
    texts_per_step = 8 * max(1, num_texts * num_epochs // (8 * min_steps))
    batches_per_step = accumulation_steps * get_world_size()
    size = min(batch_size, math.ceil(texts_per_step / batches_per_step))
    steps = math.ceil(num_texts / (size * batches_per_step))  # per epoch
    least = math.ceil(min_steps / steps)
    if least > num_epochs:
        remedy = f"{least} epochs in place of {num_epochs} give min_steps = {min_steps}"
        log("note", f"{num_texts} training texts are few: {remedy}")
    return max(num_epochs, least), size


def log_setup(model, encoder, dtype, num_steps):
    """Print the model and the plan."""
    folder, encoder_lr, head_lr, num_epochs, local_batch_size = encoder
    parameters = sum(parameter.numel() for parameter in model.parameters())
    log("model", f"{folder} on {device}", parameters=f"{parameters / 1e6:.1f}M", dtype=str(dtype)[6:])
    sizes = {"steps_per_epoch": num_steps, "batch_size": local_batch_size, "processes": get_world_size()}
    log("plan", epochs=num_epochs, **sizes, lr=f"{encoder_lr:g}", head_lr=f"{head_lr:g}")


def check_finite(loss, epoch, batch, scheduler):
    """Return a loss as a float, which forces a GPU sync. Raises InputError if training has diverged."""
    if not math.isfinite(loss.item()):
        where = f"epoch {epoch + 1}, batch {batch}, at a learning rate of {scheduler.get_last_lr()[0]:.2e}"
        raise InputError(f'the loss is {loss.item()} in {where}; lower lr, or set precision = "fp32"')
    return loss.item()


def log_epoch(row, num_epochs):
    """Print the line of an epoch."""
    names = ("train_loss", "dev_loss", "accuracy", "micro_f1", "macro_f1")
    values = zip(
        ("loss", "dev_loss", "acc", "micro_f1", "macro_f1"), (row[name] for name in names), strict=True
    )
    log("epoch", f"{row['epoch']}/{num_epochs}", **{name: f"{value:.3f}" for name, value in values})


def is_best(row, history):
    """Return whether an epoch is better than all before: by best_metric, at a tie by the lower loss."""
    keys = [(0 if best_metric == "loss" else r[best_metric], -r["dev_loss"]) for r in (*history, row)]
    return all(keys[-1] > key for key in keys[:-1])


def should_stop_early(history):
    """Return whether the last `patience` epochs brought no improvement; print it."""
    best_epoch = max((row["epoch"] for row in history if row["saved"]), default=0)
    if stop := bool(patience) and len(history) - best_epoch >= patience:
        log("stop", f"no better {best_metric} in {patience} epochs")
    return stop


def open_writer(checkpoint, num_batches):
    """Return a function that writes {name: value} to TensorBoard; without tensorboard it does nothing."""
    folder, writer = output_path(tensorboard_name), None
    try:
        if tensorboard_name and is_main_process():
            from torch.utils.tensorboard import SummaryWriter

            next_step = checkpoint.epoch * num_batches + checkpoint.batch + 1
            writer = SummaryWriter(os.path.join(folder, checkpoint.run_name), purge_step=next_step)
    except Exception as error:  # not installed, a broken installation, or a folder that cannot be written
        log("note", f"no curves in {folder} ({short_message(error)}); pip install tensorboard")

    def log_scalars(values, step):
        """Write and flush, so that a killed run keeps them."""
        nonlocal writer
        try:
            for name, value in values.items() if writer else ():
                writer.add_scalar(name, value, step)
                writer.flush()
        except OSError as error:
            log("note", f"no more curves in {folder}: {short_message(error)}")
            writer = None

    return log_scalars


if __name__ == "__main__":
    run_script(train)
