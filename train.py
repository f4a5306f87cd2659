"""Fine-tune BERT to give a text several labels.

reads   ./data/train.json, dev.json, test.json    one object a line: {"text": "...", "label": ["...", ...]}
        ./data/label2idx.json                     written by `python data_preprocess.py`
writes  ./model/                                  the model of the best epoch: all that predict.py needs
        ./model/metrics.json                      how good it is on dev and test, and how it was made
        ./model/history.json                      a line an epoch
        ./model/errors.json                       the test texts that came out wrong, a line each
        ./model/training_state.pth                while it runs: all that it needs to go on after a stop
        ./model/transformers/                     the best model once more, as pipeline("text-classification") reads it
        ./model/runs/                             curves for TensorBoard, if it is installed
run     python train.py
        torchrun --nproc_per_node=4 train.py      on 4 GPUs; batch_size is that of each
"""
import json
import math
import os
import sys
import time
import zlib
from types import SimpleNamespace

import torch
import torch.nn as nn
import transformers
from sklearn.metrics import accuracy_score
from transformers import BertConfig, BertModel, BertTokenizer, get_linear_schedule_with_warmup
from transformers.utils.logging import tqdm

import bert_multilabel_cls
import data_helper
from bert_multilabel_cls import (BertMultiLabelCls, check_max_len, choose_precision, dtypes, export_model, find_encoder,
                                 gather_probs, load_model, load_pretrained, load_state, load_tensors, mixed,
                                 naming_memory, parameter_groups, save_model, save_tensors, set_up, start_at_prior)
from data_helper import (MultiClsDataSet, all_scores, build_scratch_encoder, by_length, find_errors, from_processes,
                         grouped_batches, join_processes, largest, leave_processes, load_batches,
                         over_processes, parts_of_steps, random_state, set_random_state, spread, summary,
                         tune_thresholds)
from data_preprocess import (InputError, beside, check_number, dump_json, dump_jsonl, file_hash, first_line, is_main,
                             label_names, load_label2idx, log, log_epoch, log_labels, log_scores, noted_signals,
                             read_examples, refuse_changes, run_script, whole_file)

# Files. The encoder's name is pretrained_model in bert_multilabel_cls.py.
train_path = "./data/train.json"
dev_path = "./data/dev.json"
test_path = "./data/test.json"
label2idx_path = "./data/label2idx.json"
save_model_path = "./model/multi_label_cls.pth"  # its folder takes the other files of the model
scratch_path = "./model/scratch_encoder"  # where the small BERT from scratch goes, if there has to be one
export_path = "./model/transformers"  # of the best model as other tools read it; "" writes none
runs_path = "./model/runs"  # of TensorBoard's curves, a folder a run; "" writes none

# Machine.
device = "cuda" if torch.cuda.is_available() else "cpu"
precision = "auto"  # "bf16", "fp16" (GPU only), "fp32"; "auto" takes the fastest that the hardware has natively
compile_model = False  # True compiles the network first, twice, some minutes on a CPU; for long runs on a GPU
compiled_length = 8  # tokens; compiled, lengths are rounded up to a multiple of it, the shapes that GPUs like

# Recipe.
lr = 2e-5  # highest learning rate of the encoder
head_lr = 2e-4  # and of the pooler and the last layer above it, which have further to go
epochs = 10  # passes over the training file
batch_size = 32  # texts at a time; if memory runs out, halve it and double accumulation_steps
accumulation_steps = 1  # batches whose gradients add up to one step of the optimizer
max_len = 128  # tokens; longer texts lose their end, or their middle:
keep_tail = 0  # of a text longer than max_len, so many tokens are taken from its end, the rest from its start
dropout = 0.1  # share of the pooled output that is set to 0 before the classifier
warmup_ratio = 0.1  # share of the steps in which the learning rate rises; then it falls to 0
max_grad_norm = 1.0  # gradients with a larger norm are scaled down to it; 0 never does
weight_decay = 0.01  # a step, times the learning rate; biases and LayerNorm are spared
seed = 42  # of weights, dropout and batches

# What survives a stop.
resume = True  # a run that was stopped or killed goes on; False starts over
save_minutes = 10  # how often the state of the run is saved, besides after each epoch
state_name = "training_state.pth"  # of that file, beside the model; a finished run leaves none

# Which epoch is kept, and when to stop.
best_metric = "accuracy"  # on dev: "accuracy" (all labels of a text right), "micro_f1", "macro_f1" or "loss"
patience = 0  # stop after so many epochs without a better one; 0 never stops early
tune_from = 10  # a label with fewer dev examples than this gets no threshold of its own

# Recipe of the small BERT that is trained from scratch where bert-base-chinese cannot be had.
scratch_lr = 5e-4  # of all layers: all are new
scratch_epochs = 8


def train():
    """Train, keep the epoch that is best on dev, and measure that one on dev and test.

    A run that was stopped or killed goes on where it was last saved, and ends as if nothing had happened.
    Raises InputError for what the user can mend in files and constants, and SystemExit after SIGTERM or Ctrl-C.
    """
    check_constants()
    run = prepare()
    try:
        with noted_signals(run.signals):
            while run.epoch < run.epochs and not out_of_patience(run):
                train_epoch(run)
                finish_epoch(run)
        report_run(run)
    finally:
        on_board(run, lambda board: board.close())
    if is_main():
        os.remove(beside(save_model_path, state_name))
    leave(run)


def train_epoch(run):
    """Train on what is left of the current epoch."""
    run.model.train()
    run.start = time.perf_counter() - run.seconds
    batches = grouped_batches(run.train_set.lengths, batch_size * run.processes, seed + run.epoch + 1)
    parts = list(parts_of_steps(batches, accumulation_steps, run.rank, run.processes))[run.batch:]
    loader = load_batches(run.train_set, (indices for indices, _, _ in parts), device)
    bar = progress_bar(run, batches)
    for batch, (_, share, last) in zip(loader, parts):
        with naming_memory(batch[0]):
            *inputs, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
            run.runner.require_backward_grad_sync = last  # the processes exchange gradients once a step
            with mixed(device, run.mode):
                probs = run.runner(*inputs)
            # BCELoss would only say that it wants numbers from 0 to 1: what is not finite shall reach the loss.
            loss = run.criterion(probs.nan_to_num(), labels) + 0 * probs.sum()
            run.losses.append((run.batch + 1, run.scheduler.get_last_lr()[0], loss.detach()))
            run.scaler.scale(loss * share).backward()
            if last:
                step(run)
        run.total_loss += loss.detach() * share
        bar.update(len(batches[run.batch]))
        run.batch += 1
        looked_at = run.board or not bar.disable
        if torch.device(device).type == "cpu" or looked_at and run.batch % 20 == 0:  # reading a loss waits for a GPU
            bar.set_postfix(loss=f"{check_losses(run):.4f}", refresh=False)
        if last:
            save_if_due(run)
    bar.close()
    check_losses(run)
    run.seconds = time.perf_counter() - run.start


def step(run):
    """Clip the gradients, and move the weights and the learning rate."""
    run.scaler.unscale_(run.optimizer)
    nn.utils.clip_grad_norm_(run.model.parameters(), max_grad_norm or math.inf)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.scheduler.step()
    run.optimizer.zero_grad()


def finish_epoch(run):
    """Measure the model on dev, keep it if it is the best so far, and save the state of the run."""
    run.epoch, run.batch = run.epoch + 1, 0
    train_loss = over_processes(run.total_loss.cpu()).item() / run.processes / run.steps
    row = dict(epoch=run.epoch, train_loss=train_loss, seconds=run.seconds)
    dev_loss, probs = evaluate(run.model, run.dev_set, run.criterion, run.mode)
    labels = run.dev_set.labels
    row.update(dev_loss=dev_loss, **summary(labels, probs))
    score = [-dev_loss if best_metric == "loss" else row[best_metric], -dev_loss]  # all 0 at first: the loss decides
    row["saved"] = run.best is None or score > run.best["score"]
    if row["saved"]:
        thresholds = tune_thresholds(labels, probs, tune_from)
        run.best = dict(score=score, epoch=run.epoch, thresholds=thresholds, probs=probs)
    run.history.append(row)
    log_epoch(row, run.epochs, len(run.train_set))
    draw_epoch(run, row, labels, probs)
    run.total_loss, run.seconds = torch.zeros((), device=device), 0.0
    save_state(run)
    keep_best(run)
    if asked := largest(max(run.signals, default=0)):
        stop(run, asked)


def out_of_patience(run):
    """Return whether the last `patience` epochs brought no better one; say so."""
    over = patience and run.best and run.epoch - run.best["epoch"] >= patience
    if over:
        log("stop", f"no better {best_metric} in {patience} epochs")
    return over


def keep_best(run):
    """Write the history and, if the last epoch is the best so far, the model. Doing it twice is doing it once."""
    if is_main():
        if run.best["epoch"] == run.epoch:
            save_model(run.model, run.tokenizer, run.train_set.label2idx, save_model_path, run.best["thresholds"])
        dump_jsonl(run.history, beside(save_model_path, "history.json"))


def check_losses(run):
    """Return the last loss. Raises InputError, with step and learning rate, if one since the last call is no number."""
    if run.losses:
        losses = torch.stack([loss for _, _, loss in run.losses]).tolist()
        for (batch, rate, _), loss in zip(run.losses, losses):
            if not math.isfinite(loss):
                raise InputError(f"the loss is {loss} in epoch {run.epoch + 1}, batch {batch}, at a learning rate of "
                                 f"{rate:.2e}; lower lr and head_lr, raise warmup_ratio, or set precision = \"fp32\"")
            draw(run, {"train/loss": loss, "train/lr": rate}, batch)
        run.losses, run.loss = [], losses[-1]
    return run.loss


def open_board(run):
    """Return TensorBoard's writer in the main process, if it is installed and wanted; else None.

    A run that goes on writes on in its folder, and takes back what it had drawn of the steps that it now repeats.
    """
    if not runs_path or not is_main():
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(os.path.join(runs_path, run.name), purge_step=run.epoch * run.batches + run.batch + 1)
    except ImportError:
        log("note", f"no curves in {runs_path}; for them: pip install tensorboard && tensorboard --logdir {runs_path}")
    except Exception as error:  # an installation that does not fit together, a folder that cannot be written
        log("note", f"no curves in {runs_path}: {first_line(error)}")


def on_board(run, act):
    """Do `act` with TensorBoard's writer, if there is one: a full disk ends the curves, not the run."""
    try:
        if run.board:
            act(run.board)
    except OSError as error:
        log("note", f"no more curves in {runs_path}: {first_line(error)}")
        run.board = None


def draw(run, values, batch=0):
    """Give TensorBoard `values` by name, at the number of batches since the run began."""
    step = run.epoch * run.batches + batch
    on_board(run, lambda board: [board.add_scalar(name, value, step) for name, value in values.items()])


def draw_epoch(run, row, labels, probs):
    """Give TensorBoard what an epoch brought, with precision-recall curves: of all labels as one, and of each.

    Labels with fewer than `tune_from` examples get none.
    """
    scores = {f"dev/{name.removeprefix('dev_')}": value for name, value in row.items()
              if name not in ("epoch", "train_loss", "seconds", "saved")}
    draw(run, {**scores, "train/examples_per_second": len(run.train_set) / row["seconds"]})
    enough, step = (labels.sum(0) >= tune_from).tolist(), run.epoch * run.batches
    columns = {"dev/all labels": slice(None), **{f"dev by label/{name}": column for column, name in enumerate(
        label_names(run.dev_set.label2idx)) if enough[column]}}
    on_board(run, lambda board: [board.add_pr_curve(name, labels[:, column], probs[:, column], step)
                                 for name, column in columns.items()])


def prepare():
    """Return what a run consists of, as attributes of one object: new, or as a stopped run left it."""
    rank, processes = join_processes(device)
    mode = choose_precision(precision, device)
    label2idx = load_label2idx(label2idx_path)
    sizes = {name: sum(1 for _ in read_examples(path, label2idx))  # a fault in a file is said now, not after hours
             for name, path in (("train", train_path), ("dev", dev_path), ("test", test_path))}
    identity = identify(mode, processes)
    saved = read_state(identity, processes)
    torch.manual_seed(seed)
    plan = saved["plan"] if saved else from_processes(get_encoder() if is_main() else None)[0]
    encoder, encoder_lr, top_lr, total_epochs = plan
    if not os.path.isdir(encoder):
        encoder = bert_multilabel_cls.pretrained_model  # on another machine than the main process's: found by its name
    check_max_len(max_len, load_pretrained(BertConfig, encoder))
    tokenizer = load_pretrained(BertTokenizer, encoder)
    train_set, dev_set = (MultiClsDataSet(path, max_len, tokenizer=tokenizer, label2idx=label2idx, keep_tail=keep_tail)
                          for path in (train_path, dev_path))
    model = BertMultiLabelCls(None, train_set.class_num, dropout, load_pretrained(BertModel, encoder))
    model.bert.config.trained_cut = [max_len, keep_tail]  # goes with the model: predict.py compares
    start_at_prior(model.fc, train_set.targets)
    batches = math.ceil(len(train_set) / (batch_size * processes))  # in an epoch
    steps = math.ceil(batches / accumulation_steps)
    optimizer = torch.optim.AdamW(parameter_groups(model.to(device), encoder_lr, top_lr, weight_decay), fused=True)
    warmup = round(warmup_ratio * steps * total_epochs)
    run = SimpleNamespace(
        rank=rank, processes=processes, mode=mode, identity=identity, plan=plan,
        name=time.strftime("%Y-%m-%d_%H-%M-%S"), epochs=total_epochs, batches=batches, steps=steps,
        tokenizer=tokenizer, train_set=train_set, dev_set=dev_set, model=model,
        optimizer=optimizer, scheduler=get_linear_schedule_with_warmup(optimizer, warmup, steps * total_epochs),
        scaler=torch.amp.GradScaler(torch.device(device).type, enabled=mode == "fp16"), criterion=nn.BCELoss(),
        epoch=0, batch=0, total_loss=torch.zeros((), device=device), losses=[], loss=0.0, history=[], best=None,
        seconds=0.0, begun=time.perf_counter(), saved_at=time.monotonic(), signals=[])
    torch.manual_seed(seed + rank)  # dropout of its own in each process
    log_run(run, sizes, encoder)
    if saved:
        go_on(run, saved)
    if compile_model:
        train_set.round_to = compiled_length
    run.board = open_board(run)
    run.runner = set_up(model, compile_model, processes)
    return run


def log_run(run, sizes, encoder):
    """Print what is in the data, what model on what machine, and what is about to be done."""
    log("data", **sizes, labels=run.train_set.class_num, max_len=f"{max_len}_tokens", train_texts_cut=run.train_set.cut)
    log("model", encoder=encoder, parameters=f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.1f}M",
        device=device, precision=run.mode, processes=run.processes)
    log("plan", epochs=run.epochs, steps_per_epoch=run.steps, batch_size=batch_size, accumulation=accumulation_steps,
        lr=run.plan[1], head_lr=run.plan[2], best_metric=best_metric, seed=seed)


def constants():
    """Return the constants of this script by name, and the encoder's name."""
    return {"pretrained_model": bert_multilabel_cls.pretrained_model, "mega_batches": data_helper.mega_batches,
            **{name: value for name, value in globals().items()
               if not name.startswith("_") and isinstance(value, (int, float, str, type(None), torch.device))}}


def identify(mode, processes):
    """Return what must not change while a run is stopped, by name: constants and the content of files, as strings."""
    free = "resume", "save_minutes", "state_name", "export_path", "runs_path"
    fixed = {name: value for name, value in constants().items() if name not in free}
    paths = train_path, dev_path, test_path, label2idx_path
    files = {path: f"a file with sha256 {file_hash(path)}" for path in paths}
    more = {"precision in use": mode, "number of processes": processes}
    return {name: str(value) for name, value in {**fixed, **files, **more}.items()}


def read_state(identity, processes):
    """Return the state of the run to go on with; None if there is none, or `resume` is off.

    Raises InputError if it is that of another run, or cannot be read by all processes.
    """
    path = beside(save_model_path, state_name)
    seen = resume and os.path.exists(path)
    mark = torch.tensor(zlib.crc32(json.dumps([identity, seen]).encode()))
    if over_processes(mark.clone()) != mark * processes:
        raise InputError(f"the data files, the constants or {path} are not the same for all processes; share one "
                         "folder between the machines")
    if not seen:
        return None
    try:
        saved = load_tensors(path)
        old = dict(saved["identity"])
    except (InputError, TypeError, KeyError, ValueError):
        raise InputError(f"{path}: not the state of a run; set resume = False in train.py to start over") from None
    refuse_changes(path, old, identity)
    return saved


saved_parts = ("model", "optimizer", "scheduler", "scaler")  # of a run: have state_dict and load_state_dict
saved_values = ("identity", "name", "plan", "epoch", "batch", "history", "best", "seconds")


def save_state(run):
    """Write all that the run needs to go on from here. All processes call it; the main one writes."""
    check_losses(run)
    on_board(run, lambda board: board.flush())
    if not torch.stack([parameter.detach().sum() for parameter in run.model.parameters()]).isfinite().all():
        raise InputError(f"the weights are no numbers any more after epoch {run.epoch + 1}, batch {run.batch}, at a "
                         f"learning rate of {run.scheduler.get_last_lr()[0]:.2e}; lower lr and head_lr")
    more = dict(generators=from_processes(random_state(device)), total_losses=from_processes(run.total_loss.cpu()),
                tokens=zlib.crc32(run.train_set.ids.numpy()), spent=time.perf_counter() - run.begun)
    if is_main():
        with whole_file(beside(save_model_path, state_name)) as temporary:
            parts = {name: getattr(run, name).state_dict() for name in saved_parts}
            save_tensors({**parts, **{name: getattr(run, name) for name in saved_values}, **more}, temporary)
    run.saved_at = time.monotonic()


def go_on(run, saved):
    """Bring a new run to the state of a saved one."""
    if saved["tokens"] != zlib.crc32(run.train_set.ids.numpy()):
        raise InputError(f"{run.plan[0]}: the encoder is not the one that the stopped run began with; set resume = "
                         "False in train.py to start over")
    for name in saved_parts:
        getattr(run, name).load_state_dict(saved[name])
    for name in saved_values:
        setattr(run, name, saved[name])
    run.total_loss = saved["total_losses"][run.rank].to(device)
    run.begun -= saved["spent"]
    set_random_state(saved["generators"][run.rank], device)
    if run.best and not run.batch:
        keep_best(run)  # the kill may have come between the state and the model
    log("resume", f"from {beside(save_model_path, state_name)}", epoch=run.epoch + 1, batch=run.batch)


def save_if_due(run):
    """Save the state every `save_minutes`, and end the run if a signal asks for it; all processes at the same step."""
    due = time.monotonic() - run.saved_at >= 60 * save_minutes
    asked = largest(max([*run.signals, due]))  # no signal that we note has the number 1
    if asked:
        run.seconds = time.perf_counter() - run.start
        save_state(run)
    if asked > 1:
        stop(run, asked)


def stop(run, number):
    """End the run, whose state is saved, after the signal `number`: exit code 128 + number, as a shell has it."""
    log("stopped", f"{'' if resume else 'set resume = True and '}run the same command again to go on;",
        epoch=run.epoch + 1, batch=run.batch, saved=beside(save_model_path, state_name))
    leave(run)
    sys.exit(128 + number)


def leave(run):
    """Part with the other processes; see leave_processes for why DistributedDataParallel has to go first."""
    run.runner = None
    leave_processes()


def check_constants():
    """Raise InputError if a constant is out of range."""
    if best_metric not in ("accuracy", "micro_f1", "macro_f1", "loss"):
        raise InputError(f'best_metric = {best_metric!r}: must be "accuracy", "micro_f1", "macro_f1" or "loss"')
    ranges = {(1, None, True): ("epochs", "scratch_epochs", "batch_size", "accumulation_steps", "compiled_length"),
              (0, None, True): ("patience", "tune_from", "seed"), (0, None, False): ("max_grad_norm", "save_minutes"),
              (0, 1, False): ("warmup_ratio", "dropout", "lr", "head_lr", "scratch_lr", "weight_decay")}
    for (least, most, whole), names in ranges.items():
        for name in names:
            check_number(name, globals()[name], least, most, whole)
    check_number("max_len", max_len, 3, whole=True)
    check_number("keep_tail", keep_tail, 0, max_len - 2, whole=True)
    taken = (beside(save_model_path, ""), scratch_path, bert_multilabel_cls.pretrained_model)
    if export_path and os.path.realpath(export_path) in map(os.path.realpath, taken):
        raise InputError(f"export_path = {export_path!r}: holds the encoder, or what training writes besides; set "
                         "another folder")


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
    check_max_len(max_len, BertConfig(**data_helper.scratch_config))
    log("note", tried)
    log("note", f"going on without it: a small BERT, trained from scratch on {train_path} alone, knows less; it takes "
                "scratch_lr and scratch_epochs in place of lr, head_lr and epochs")
    build_scratch_encoder([text for text, _ in read_examples(train_path)], scratch_path, seed)
    return scratch_path, scratch_lr, scratch_lr, scratch_epochs


def progress_bar(run, batches):
    """Return a bar that counts the texts of an epoch, in the main process and in a terminal only."""
    return tqdm(total=len(run.train_set), initial=sum(map(len, batches[:run.batch])), unit="ex", leave=False,
                desc=f"epoch {run.epoch + 1}/{run.epochs}", disable=None if is_main() else True)


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
    over_processes(probs)
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
    dataset = MultiClsDataSet(data_path, max_len, tokenizer=tokenizer, label2idx=label2idx, keep_tail=keep_tail)
    torch.backends.cuda.matmul.allow_tf32 = False
    model.bert.to(dtypes[choose_precision(precision, device)])
    loss, probs = evaluate(model.to(device), dataset, nn.BCELoss(), "fp32")
    labels, names = dataset.labels, label_names(label2idx)
    scores = {"loss": loss, **all_scores(labels, probs, names, model.bert.config.thresholds)}
    log_labels(scores["by_label"])
    log_scores("test", scores)
    return scores, find_errors([text for text, _ in read_examples(data_path)], labels, probs, names)


def report_run(run):
    """Measure the best model on dev and test; write metrics.json and errors.json beside the model."""
    best, names = run.best, label_names(run.dev_set.label2idx)
    dev_scores = {"loss": -best["score"][1], **all_scores(run.dev_set.labels, best["probs"], names, best["thresholds"])}
    seconds = time.perf_counter() - run.begun
    log("best", epoch=best["epoch"], time=f"{seconds:.1f}s")
    log_scores("dev", dev_scores)
    if is_main():
        run.model.load_state_dict(load_state(save_model_path))
    spread(run.model)
    run.model.bert.config.thresholds = best["thresholds"]
    if export_path and is_main():
        export_model(run.model, run.tokenizer, run.dev_set.label2idx, export_path, max_len)
        log("wrote", path=export_path)
    test_scores, errors = measure(run.model, run.tokenizer, run.dev_set.label2idx, test_path)
    if not is_main():
        return
    dump_jsonl(errors, beside(save_model_path, "errors.json"))
    used = dict(zip(("encoder", "lr", "head_lr", "epochs"), run.plan), precision=run.mode, processes=run.processes)
    dump_json({"used": used, "best_epoch": best["epoch"], "seconds": round(seconds, 1),
               "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
               "constants": {name: value if isinstance(value, (int, float, type(None))) else str(value)
                             for name, value in constants().items()},
               "labels": names, "thresholds": best["thresholds"], "dev": dev_scores, "test": test_scores},
              beside(save_model_path, "metrics.json"), indent=1)


if __name__ == "__main__":
    run_script(train)
