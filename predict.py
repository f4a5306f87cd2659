"""Label texts with the model that train.py saved; needs no network.

reads   ./model/            written by `python train.py`
        input_path         if set, a file of texts of any size
writes  output_path        a line for each text: {"text": "...", "label": ["A"], "probability": {"A": 0.9876}}
run     python predict.py    or in Python:  from predict import predict;  predict(["...", "..."])
        torchrun --nproc_per_node=4 predict.py    a file on 4 GPUs, with the same output
"""

import functools
import json
import os
import time
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from bert_multilabel_cls import check_truncation, choose_dtype, get_pth_path, load_model, predict_probs
from data_helper import MultiClsDataSet, all_gather_object, all_reduce, confusion_counts, eval_dataloader
from data_helper import init_distributed, metrics_from_counts, per_label_metrics, restore_order
from data_preprocess import InputError, atomic_write, check_labels, check_number, check_surrogates, check_text
from data_preprocess import decode_utf8, is_main_process, label_names, log, parse_json_line, read_lines
from data_preprocess import log_label_metrics, log_metrics, run_script, sibling_path

input_path = ""  # JSONL with a "text" in each line, or plain text, one per line; "" labels the texts below
output_path = ""  # JSONL in the order of the input; other fields are copied through
save_model_path = "./model/multi_label_cls.pth"  # or its folder
label2idx_path = "./data/label2idx.json"  # read only for a .pth of the article
device = "cuda" if torch.cuda.is_available() else "cpu"
max_len = None  # tokens; longer texts are truncated. None: as in training
keep_tail = None  # tokens of a truncated text that are kept from its end. None: as in training
batch_size = 32  # texts; more need more memory
chunk_size = 4096  # texts tokenized, sorted by length and held in memory at a time
precision = "auto"  # of the weights; "fp32" for exact probabilities

threshold = 0.5  # labels with a probability above it; "tuned": above each label's own, tuned on dev
min_labels = 0  # at least so many labels per text, the most probable ones
max_labels = None  # at most so many; None for no limit

texts = ["中超-德尔加多扳平郭田雨绝杀 泰山2-1逆转亚泰", "今日沪深两市指数整体呈现震荡调整格局"]


def predict(texts):
    """Return one list of labels per text, in label order.

    Raises InputError for a bare string, for anything but strings, and if there is no model.
    """
    return [[label for label, _ in pairs] for pairs in predict_with_scores(texts)]


def predict_with_scores(texts):
    """Return one list of (label, probability) per text; raises as `predict` does."""
    examples = [(text, ()) for text in check_texts(texts)]
    if not examples:
        return []
    model, tokenizer, label2idx = get_model()
    thresholds, names, results = get_thresholds(model.bert.config), label_names(label2idx), []
    for _, probs in iter_probs(examples, model, tokenizer, label2idx):
        results += name_labels(probs, choose_labels(probs, thresholds), names)
    return results


def predict_proba(texts):
    """Return the probabilities of all labels, (N, C) float32, in label order. Raises as predict does."""
    examples = [(text, ()) for text in check_texts(texts)]
    model, tokenizer, label2idx = get_model()
    probs = [probs for _, probs in iter_probs(examples, model, tokenizer, label2idx)]
    return np.concatenate([np.empty((0, len(label2idx)), dtype=np.float32), *probs])


def predict_file():
    """Label the texts of input_path in output_path; print metrics where the input has labels.

    One chunk is in memory at a time. Under torchrun the processes take chunks in turn: the output is the same
    for any number of processes.
    Raises InputError naming file and line for an invalid input, before anything is computed.
    """
    rank, world_size = init_distributed(device)
    check_paths()
    model, tokenizer, label2idx = get_model()
    check_numbers(model.bert.config)
    thresholds, names = get_thresholds(model.bert.config), label_names(label2idx)
    start_time = time.perf_counter()
    dtype = str(model.bert.dtype).removeprefix("torch.")
    log("input", path=input_path, device=device, dtype=dtype, processes=world_size)
    parse_line = parse_json_line if is_jsonl() else parse_text_line
    num_texts = validate_input(parse_line, label2idx)
    log("checked", texts=num_texts)
    counts = torch.zeros(5, len(names), dtype=torch.int64)
    bar = tqdm(total=num_texts, unit="text", leave=False, disable=None if is_main_process() else True)

    def on_batch(batch):
        """Move the bar on, on behalf of all processes."""
        bar.update(min(len(batch[0]) * world_size, num_texts - bar.n))
        return batch

    with bar, open_output() as file:
        for lines in read_shards(parse_line, rank, world_size, num_texts):
            items, rows = [parse_line(location, line) for location, line in lines], b""
            examples = [(item["text"], item.get("label", ())) for item in items]
            for labels, probs in iter_probs(examples, model, tokenizer, label2idx, on_batch):
                chosen = choose_labels(probs, thresholds)
                labelled = ["label" in item for item in items]
                counts += confusion_counts(labels[labelled] > 0.5, torch.from_numpy(chosen[labelled]))
                rows = b"".join(map(format_row, items, name_labels(probs, chosen, names)))
            file.writelines(all_gather_object(rows))
    log_scores(all_reduce(counts), names)
    seconds = time.perf_counter() - start_time
    speed = f"{num_texts / seconds:.1f}texts/s"
    log("wrote", path=output_path, texts=num_texts, time=f"{seconds:.1f}s", speed=speed)


def iter_probs(examples, model, tokenizer, label2idx, on_batch=lambda batch: batch):
    """Yield (labels, probs), each (up to chunk_size, C), for (text, labels) pairs, in their order."""
    check_numbers(model.bert.config)
    length, tail = get_truncation(model.bert.config)
    for start in range(0, len(examples), chunk_size):
        chunk = examples[start : start + chunk_size]
        dataset = MultiClsDataSet(None, length, None, tokenizer, label2idx, tail, chunk)
        dataloader = eval_dataloader(dataset, batch_size, device)
        probs, _ = predict_probs(model, map(on_batch, dataloader))
        yield dataset.labels, restore_order(probs, dataloader).numpy()


def get_truncation(config):
    """Return (max_len, keep_tail): the constants, or where they are None those of training."""
    constants = zip((max_len, keep_tail), config.truncation, strict=True)
    return [trained if value is None else value for value, trained in constants]


def name_labels(probs, chosen, names):
    """Return for each row of probs (N, C) a list of (label, probability) of those chosen, (N, C) bool."""
    rows = zip(probs, chosen, strict=True)
    return [[(names[c], float(row[c])) for c in np.flatnonzero(mask)] for row, mask in rows]


def choose_labels(probs, thresholds):
    """Return which labels each text gets, (N, C) bool, by thresholds, min_labels and max_labels."""
    above = probs > thresholds
    if not min_labels and max_labels is None:
        return above
    rank = np.argsort(np.argsort(-(probs + above), axis=1, kind="stable"), axis=1)  # those above come first
    return (above | (rank < min_labels)) & (rank < (probs.shape[1] if max_labels is None else max_labels))


def get_thresholds(config):
    """Return the constant `threshold`, or one for each label, (C,), if it is "tuned"."""
    if threshold == "tuned":
        if not config.thresholds:
            raise InputError(f'threshold = "tuned": {save_model_path} has no tuned thresholds; set a number')
        return np.array(config.thresholds["by_label"], dtype=np.float32)
    if not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise InputError(f'threshold = {threshold!r}: must be a number from 0 to 1, or "tuned"')
    return threshold


def get_model():
    """Return (model on `device`, tokenizer, label2idx); loaded once, and again after a training."""
    pth_path, dtype = get_pth_path(save_model_path), choose_dtype(precision, device)
    paths = filter(os.path.exists, (pth_path, sibling_path(pth_path, "config.json")))
    mtimes = tuple(os.stat(path).st_mtime_ns for path in paths)
    return load_once(save_model_path, label2idx_path, device, dtype, mtimes)


@functools.lru_cache(maxsize=1)
def load_once(model_path, label2idx_path, device, dtype, mtimes):
    """Return what get_model does; mtimes tell one model from the next."""
    model, tokenizer, label2idx = load_model(model_path, label2idx_path)
    model.bert.to(dtype)
    return model.to(device), tokenizer, label2idx


def check_numbers(config):
    """Raise InputError if a number among the constants is out of range."""
    check_truncation(*get_truncation(config), config)
    for name, minimum in (("batch_size", 1), ("chunk_size", 1), ("min_labels", 0)):
        check_number(name, globals()[name], minimum, integer=True)
    if max_labels is not None:
        check_number("max_labels", max_labels, min_labels, integer=True)


def check_texts(texts):
    """Return `texts` as a list. Raises InputError unless they are strings in a list or another iterable."""
    if isinstance(texts, str):
        raise InputError(f"predict takes a list of texts; write predict([{texts[:20]!r}])")
    if not isinstance(texts, Iterable):
        raise InputError(f"predict takes a list of texts, but got {texts!r:.40}")
    texts = list(texts)
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise InputError(f"predict takes a list of strings, but text {number} is {text!r:.40}")
        check_surrogates(f"text {number}", text)
    return texts


def check_paths():
    """Raise InputError unless input_path and output_path are set, to two different files."""
    if not input_path or not output_path:
        raise InputError(f"input_path = {input_path!r}, output_path = {output_path!r}: set both, or neither")
    if os.path.exists(input_path) and not os.path.isfile(input_path):
        raise InputError(f"input_path = {input_path!r}: not a file; it is read twice, so a pipe will not do")
    if os.path.isdir(output_path) or not os.path.basename(output_path):
        raise InputError(f"output_path = {output_path!r}: is a folder; name a file in it")
    for path in (output_path, f"{output_path}.tmp"):  # the second is written first
        if os.path.exists(path) and os.path.exists(input_path) and os.path.samefile(path, input_path):
            raise InputError(f"output_path = {output_path!r}: would replace the input; set another one")


def is_jsonl():
    """Return whether input_path is JSONL: by its name, or because its first line starts with a brace."""
    if input_path.lower().endswith((".json", ".jsonl")):
        return True
    return any(line.lstrip().startswith(b"{") for _, line in islice(read_lines(input_path), 1))


def parse_text_line(location, line):
    """Return the object for a line of plain text; an empty line is an empty text."""
    return {"text": decode_utf8(location, line).rstrip("\r\n")}


def validate_input(parse_line, label2idx):
    """Return the number of texts in the input. Raises InputError at the first invalid line."""
    num_texts = 0
    for num_texts, (location, line) in enumerate(read_lines(input_path, parse_line is parse_text_line), 1):  # noqa: B007
        item = parse_line(location, line)
        check_text(location, item)
        for label in check_labels(location, item) if "label" in item else ():
            if label not in label2idx:
                raise InputError(f"{location}: the model has no label {label!r}; remove it from this line")
        for key in {"true", "probability"} & set(item):
            raise InputError(f'{location}: the key "{key}" is needed for the output; rename it')
    if not num_texts:
        raise InputError(f"{input_path}: no texts")
    return num_texts


def read_shards(parse_line, rank, world_size, num_texts):
    """Yield lists of up to chunk_size (location, line), this process's turns; the last may be empty.

    Raises InputError if the input has fewer lines than the num_texts that were validated.
    """
    lines = read_lines(input_path, keep_blank=parse_line is parse_text_line)
    for remaining in range(num_texts, 0, -chunk_size * world_size):
        turn = list(islice(lines, min(remaining, chunk_size * world_size)))
        if len(turn) < min(remaining, chunk_size * world_size):
            raise InputError(f"{input_path}: has been changed while it was read; run again")
        yield turn[rank * chunk_size : (rank + 1) * chunk_size]


@contextmanager
def open_output():
    """Give the file to write, which becomes output_path once it is complete; os.devnull on other ranks."""
    with atomic_write(output_path) if is_main_process() else nullcontext(os.devnull) as path:
        with open(path, "wb") as file:
            yield file


def format_row(item, pairs):
    """Return the output line for an object with (label, probability) pairs; its own labels become "true"."""
    true = {"true": item["label"]} if "label" in item else {}
    probs = {label: round(prob, 4) for label, prob in pairs}
    row = {**item, **true, "label": list(probs), "probability": probs}
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def log_scores(counts, names):
    """Print the metrics of the labels given, if any text of the input had labels."""
    if counts[3, 0]:
        log_label_metrics(per_label_metrics(counts, names))
        log_metrics("scores", metrics_from_counts(counts), threshold)


def main():
    """Label the file input_path; without one print each of `texts` with its labels and probabilities."""
    if input_path or output_path:
        return predict_file()
    for text, pairs in zip(texts, predict_with_scores(texts) if is_main_process() else ()):
        print(text, " ".join(f"{label}({prob:.3f})" for label, prob in pairs) or "no label", sep="\t")


if __name__ == "__main__":
    run_script(main)
