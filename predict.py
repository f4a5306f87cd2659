"""Label texts with the model that train.py saved; needs no network.

reads   ./model/           written by `python train.py`
        input_path         if set, a file of texts of any size
writes  output_path        a line for each text, such as {"text": "...", "label": ["A"],
                           "probability": {"A": 0.98}}, or a .csv or .tsv file of the same
        output_path.part   until it is complete, for an interrupted run
run     python predict.py "a text" "another"      or set `texts`; or: echo text | python predict.py
        python predict.py new.csv                 writes new_labelled.csv
        torchrun --nproc_per_node=4 predict.py    input_path on 4 GPUs, with the same output
        in Python:  from predict import predict;  predict(["...", "..."])
set     text_column, label_columns, label_separator, quotes in data_preprocess.py; the rest here
"""

import json
import os
import re
import stat
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from scipy.sparse import csr_matrix
from tqdm import tqdm

import data_preprocess
from bert_multilabel_cls import check_number, check_truncation, choose_dtype, clear_errors
from bert_multilabel_cls import get_pth_path, limit_threads, load_model, predict_batches
from data_helper import MultiClsDataSet, all_gather_object, broadcast_object, compute_metrics
from data_helper import eval_dataloader, init_distributed, log_label_metrics, only_process
from data_helper import per_label_metrics, write_rows
from data_preprocess import InputError, escape, is_main_process, log, read_examples, run_script

input_path = ""  # JSONL, .csv, .tsv, or .txt with a text a line; "" labels the texts below
output_path = ""  # in the order of the input; .json, .jsonl, .csv or .tsv
save_model_path = "./model/multi_label_cls.pth"  # or its folder
label2idx_path = "./data/label2idx.json"  # read only for a .pth of the article
device = "cuda" if torch.cuda.is_available() else "cpu"
max_len = None  # tokens; longer texts are truncated. None: as in training
keep_tail = None  # how many of them are from the end of a longer text. None: as in training
windows = False  # True: all of a longer text is read, in parts of max_len tokens
batch_size = 32  # texts, of short ones up to 8 times as many
precision = "auto"  # of the weights; "fp32" for exact probabilities

threshold = 0.5  # or "single" or "by_label", tuned on dev; {"billing": 0.3}: the others at 0.5
min_labels = 0  # at least so many labels per text, the most probable ones
max_labels = None  # at most so many; None: any
all_probabilities = False  # True: a file gets the probabilities of all labels
chunk_size = 4096  # texts sorted by length and written at a time

load_lock = threading.Lock()
texts = ["中超-德尔加多扳平郭田雨绝杀 泰山2-1逆转亚泰", "今日沪深两市指数整体呈现震荡调整格局"]


def predict(texts):
    """Return one list of labels per text, in label order, or raise InputError."""
    return [[label for label, _ in pairs] for pairs in predict_with_scores(texts)]


def predict_with_scores(texts):
    """Return one list of (label, probability) per text; raises as `predict` does."""
    texts = check_texts(texts)
    model, tokenizer, label2idx = get_model()
    names, pairs = list(label2idx), []
    thresholds = get_thresholds(model.bert.config, names)
    for probs in iter_probs(texts, model, tokenizer, label2idx):
        for row, chosen in zip(probs, choose_labels(probs, thresholds)):
            pairs.append([(names[c], float(row[c])) for c in np.flatnonzero(chosen)])
    return pairs


def predict_proba(texts):
    """Return the probabilities of all labels, (N, C) float32, columns as get_labels."""
    texts = check_texts(texts)
    model, tokenizer, label2idx = get_model()
    none = np.empty((0, len(label2idx)), dtype=np.float32)
    return np.concatenate([none, *iter_probs(texts, model, tokenizer, label2idx)])


def get_labels():
    """Return the C labels in the order of predict_proba's columns."""
    return list(get_model()[2])


@only_process(lambda: f"{output_path}.lock", "writes this output")
def predict_file():
    """Label the texts of input_path in output_path; print metrics where the input has labels.

    A chunk is in memory at a time; a killed run goes on after its last one.
    """
    rank, world_size = init_distributed(device)
    model, tokenizer, label2idx = get_model()
    names = list(label2idx)
    check_paths(names)
    thresholds = get_thresholds(model.bert.config, names)
    num_texts = check_input(label2idx)
    log("input", path=input_path, texts=num_texts, device=device, processes=world_size)
    part_path = f"{output_path}.part"
    done = broadcast_object(lambda: open_part(part_path, thresholds, model.bert.config))
    examples = islice(read_examples(input_path), done, num_texts)
    hidden = None if rank == 0 else True  # None: shown in a terminal
    bar = tqdm(total=num_texts // world_size, initial=done // world_size, disable=hidden)
    while turn := list(islice(examples, world_size * chunk_size)):
        chunk = turn[rank * chunk_size :][:chunk_size]
        rows, chunk_texts = [], [text for _, text, *_ in chunk]
        for probs in iter_probs(chunk_texts, model, tokenizer, label2idx, bar.update):
            chosen = choose_labels(probs, thresholds)
            rows = [format_row(*items, names) for items in zip(chunk, probs, chosen)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        lines = all_gather_object(lines.encode("utf-8", "backslashreplace"))
        if rank == 0:
            with open(part_path, "ab") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        done += len(turn)
    if done < num_texts:
        raise InputError(f"{input_path}: has been changed while it was read; run again")
    if rank == 0:
        finish_output(part_path, label2idx)
    log("wrote", path=output_path, texts=num_texts)


def format_row(example, probs, chosen, names):
    """Return the output, a dict, for an example of read_examples; probs, chosen: (C,) each."""
    _, text, true, others = example
    columns, row = np.flatnonzero(chosen), {} if true is None else {"true": true}
    row["label"] = [names[c] for c in columns]
    shown = range(len(names)) if all_probabilities else columns
    scores = {names[c]: round(float(probs[c]), 4) for c in shown}
    if all_probabilities and is_table(output_path):
        row |= {f"probability {name}": score for name, score in scores.items()}
    else:
        row["probability"] = scores
    text_name = data_preprocess.text_column if is_table(input_path) else "text"
    return {text_name: text} | others | row


def iter_probs(texts, model, tokenizer, label2idx, update=lambda num_texts: None):
    """Yield the probabilities of chunk_size texts at a time, (B, C) float32, in order."""
    length, tail = get_truncation(model.bert.config)
    for start in range(0, len(texts), chunk_size):
        examples = [(None, text, (), None) for text in texts[start : start + chunk_size]]
        dataset = MultiClsDataSet(None, length, None, tokenizer, label2idx, tail, examples, windows)
        dataloader = eval_dataloader(dataset, batch_size)  # sorted by length
        probs = np.zeros((len(examples), len(label2idx)), dtype=np.float32)
        lengths, text_of = dataset.lengths.numpy().clip(1), dataset.text_of
        weights = lengths / np.bincount(text_of, lengths)[text_of]  # of windows
        is_first = np.diff(text_of, prepend=-1)  # where a text begins
        for indices, (batch, _) in zip(dataloader.sampler, predict_batches(model, dataloader)):
            if windows:
                np.add.at(probs, text_of[indices], weights[indices, None] * batch.numpy() ** 2)
            else:
                probs[indices] = batch.numpy()
            update(is_first[indices].sum())
        yield np.sqrt(probs) if windows else probs  # of windows the root mean square


def get_truncation(config):
    """Return (max_len, keep_tail): the constants, or if None those of training."""
    values = zip((max_len, keep_tail), config.truncation)
    return [trained if value is None else value for value, trained in values]


def choose_labels(probs, thresholds):
    """Return which labels each text gets, (N, C) bool."""
    above = probs > thresholds
    if not min_labels and max_labels is None:
        return above
    order = np.lexsort((-probs, ~above), axis=1)  # those above come first, the likely ones first
    rank, most = np.argsort(order, axis=1), probs.shape[1] if max_labels is None else max_labels
    return (above | (rank < min_labels)) & (rank < most)


def get_thresholds(config, names):
    """Return the threshold of each label, (C,) float32: `threshold`, or tuned ones."""
    by_label = threshold
    if threshold in ("single", "by_label"):
        by_label = config.thresholds.get(threshold)
    if not isinstance(by_label, dict):
        by_label = dict.fromkeys(names, by_label)
    numbers = [v for v in by_label.values() if isinstance(v, (int, float)) and 0 <= v <= 1]
    if len(numbers) < len(by_label) or not by_label.keys() <= {*names}:
        kinds = 'from 0 to 1, "single" or "by_label" if training tuned them, or {"a label": 0.3}'
        raise InputError(f"threshold = {threshold!r:.60}: must be {kinds}")
    return np.array([by_label.get(name, 0.5) for name in names], dtype=np.float32)


def get_model():
    """Return (model, tokenizer, label2idx), loaded once, and again after a training."""
    dtype = choose_dtype(precision, device)
    with load_lock:  # of many threads one loads it
        loaded = load_once(save_model_path, label2idx_path, device, dtype, model_times())
    check_truncation(*get_truncation(loaded[0].bert.config), loaded[0].bert.config)
    for name, minimum in (("batch_size", 1), ("chunk_size", 1), ("min_labels", 0)):
        check_number(name, globals()[name], minimum, integer=True)
    if max_labels is not None:
        check_number("max_labels", max_labels, min_labels, integer=True)
    return loaded


@lru_cache(maxsize=1)
def load_once(model_path, label2idx_path, device, dtype, times):
    """Return what get_model does; a new model has other times."""
    limit_threads()
    model, tokenizer, label2idx = load_model(model_path, label2idx_path)
    if Path(get_pth_path(model_path)).with_name("checkpoint.pth").exists():
        log("note", f"{model_path}: of a run that is not finished")
    model.bert.to(dtype)
    if dtype == torch.bfloat16 and str(device) == "cpu":
        pack_linears(model.bert)
    return model.to(device), tokenizer, label2idx


def pack_linears(bert):
    """Lay out the weights of a BERT in bf16 for oneDNN; they must not change any more."""
    for module in bert.encoder.modules():
        with suppress(AttributeError, RuntimeError):  # a PyTorch without oneDNN
            if type(module) is nn.Linear:
                weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach())
                fixed = dict(W=weight, B=module.bias, attr="none", scalars=[], algorithm="")
                module.forward = partial(torch.ops.mkldnn._linear_pointwise, **fixed)


def model_times():
    """Return when the files that every training writes were written."""
    pth_path = Path(get_pth_path(save_model_path))
    paths = (pth_path, pth_path.with_name("config.json"))
    return tuple(path.stat().st_mtime_ns for path in paths if path.exists())


def check_texts(texts):
    """Return a list of texts, or raise InputError if they are none."""
    is_flat = isinstance(texts, Iterable) and getattr(texts, "ndim", 1) == 1  # a DataFrame is not
    if not is_flat or isinstance(texts, (str, bytes, Mapping)):
        remedy = 'such as ["a text", "another"], or the column of a table: table["text"]'
        raise InputError(f"predict takes a list of texts, {remedy}, not {type(texts).__name__}")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
            raise InputError(f"predict takes strings in Unicode, but one is {text!r:.40}")
    return texts


def check_paths(names):
    """Raise InputError unless input and output are two files that can hold the labels."""
    if not os.path.isfile(input_path):  # not a pipe either: it is read twice
        raise InputError(f"input_path = {input_path!r}: not a file in {os.getcwd()}")
    if Path(output_path).suffix.lower() not in (".json", ".jsonl", ".csv", ".tsv"):
        raise InputError(f"output_path = {output_path!r}: must end in .json, .jsonl, .csv or .tsv")
    if os.path.realpath(input_path) in map(os.path.realpath, (output_path, f"{output_path}.part")):
        raise InputError(f"output_path = {output_path!r}: would replace the input")
    separator = data_preprocess.label_separator
    joined = [name for name in names if separator in name and is_table(output_path)]
    if joined:
        fault = f"the label {joined[0]!r:.40} has the label_separator {separator!r} in it"
        raise InputError(f"{fault}; set another one in data_preprocess.py, or write .jsonl")


def is_table(path):
    return os.fspath(path).lower().endswith((".csv", ".tsv"))


def check_input(label2idx):
    """Return the number of texts, or raise InputError; print unknown labels."""
    num_texts, unknown = 0, Counter()
    ours = {"true", "label", "probability", *(f"probability {name}" for name in label2idx)}
    for location, _, labels, others in read_examples(input_path):
        clash = ours & {*others, data_preprocess.text_column}
        if clash:
            raise InputError(f"{location}: rename the column {min(clash)!r}, also of the output")
        unknown.update(x for x in labels or () if x not in label2idx)
        num_texts += 1
    if unknown:
        names = ", ".join(f"{x} ({n})" for x, n in unknown.most_common(5))
        log("note", f"{len(unknown)} labels that the model lacks, not in the scores: {names}")
    return num_texts


def open_part(part_path, thresholds, config):
    """Return how many texts part_path has, in whole chunks; cut off what follows."""
    names = "device precision windows min_labels max_labels all_probabilities chunk_size".split()
    settings = {k: str(globals()[k]) for k in names}
    for name in ("text_column", "label_columns", "label_separator", "quotes"):
        settings[name] = str(getattr(data_preprocess, name))
    status, settings["the model"] = os.stat(input_path), str(model_times())
    settings["the input"] = f"{input_path} {status.st_size} {status.st_mtime_ns}"
    settings["threshold"] = f"{threshold!s:.40} ({zlib.crc32(thresholds.tobytes()):08x})"
    settings["max_len, keep_tail"] = str(get_truncation(config))
    done = 0
    with open(part_path, "ab+") as file:
        file.seek(0)
        first = file.readline()
        with clear_errors(f"{part_path}: not the progress of a prediction"):
            old = dict(json.loads(first)) if first.endswith(b"\n") else {}  # killed in this line
        changed = [k for k in settings if old and old.get(k) != settings[k]]
        if changed:
            raise InputError(f"{part_path}: changed: {', '.join(changed)}; undo it, or delete this")
        size = len(first) if old else 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"}\n") or b"\0" in line:  # by a kill, or by a power cut
                break
            if number % chunk_size == 0:
                done, size = number, file.tell()
        file.truncate(size)
        file.write(b"" if old else json.dumps(settings).encode() + b"\n")
    if done:
        log("resume", f"from {part_path}", texts=done)
    return done


def finish_output(part_path, label2idx):
    """Write the rows of part_path to output_path; print metrics of those with labels."""

    def read_rows():
        with open(part_path, encoding="utf-8", newline="") as lines:
            next(lines)  # the settings
            yield from map(json.loads, lines)

    header = dict.fromkeys(chain.from_iterable(read_rows())) if is_table(output_path) else ()
    write_rows(read_rows(), output_path, header)
    from sklearn.preprocessing import MultiLabelBinarizer  # half a second

    binarizer, matrices = MultiLabelBinarizer(classes=list(label2idx), sparse_output=True), []
    for key in ("true", "label"):
        rows = (row[key] for row in read_rows() if "true" in row)
        known = ([name for name in row if name in label2idx] for row in rows)
        matrices.append(csr_matrix(binarizer.fit_transform(known), dtype=bool))
    os.remove(part_path)
    if matrices[0].shape[0]:
        by_label = per_label_metrics(*matrices, list(label2idx))
        log_label_metrics(by_label, f"see `true` in {output_path}")
        scores = {k: f"{v:.3f}" for k, v in compute_metrics(*matrices).items()}
        log("scores", threshold=f"{threshold!s:.40}", **scores)


def main():
    """Label the texts or the file of the command line, else input_path, else `texts`."""
    global input_path, output_path
    given, pattern = sys.argv[1:], r"(?i)[^ ]+\.(csv|tsv|jsonl?|txt|xlsx)"
    end = given.index("--") if "--" in given else len(given)  # what follows are texts
    files = [x for x in given[:end] if os.path.isfile(x) or re.fullmatch(pattern, x)]
    given = given[:end] + given[end + 1 :]
    if files and (len(given) > 1 or not os.path.isfile(files[0])):
        raise InputError(f"{files[0]!r}: name one file that exists, or after -- only texts")
    if files:
        root, suffix = os.path.splitext(given.pop())
        input_path, suffix = root + suffix, ".csv" if suffix.lower() == ".txt" else suffix
        output_path = output_path or f"{root}_labelled{suffix}"
    if (input_path or output_path) and not given:
        return predict_file()
    mode = os.fstat(0).st_mode if sys.stdin else 0
    is_piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
    lines = [line.strip("\ufeff\r\n") for line in sys.stdin] if is_piped and not given else []
    shown = given or lines or texts
    for text, pairs in zip(shown, predict_with_scores(shown) if is_main_process() else ()):
        labels = " ".join(f"{label}({prob:.3f})" for label, prob in pairs) or "no label"
        print(escape(text), escape(labels), sep="\t")


if __name__ == "__main__":
    run_script(main, takes_texts=True)
