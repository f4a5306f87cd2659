"""Label texts with the model that train.py saved; needs no network.

reads   ./model/           written by `python train.py`
        input_path         if set, a file of texts of any size
writes  output_path        a line for each text: {"text": "...", "label": ["A"], "probability": {"A": 0.98}},
                           or a .csv or .tsv file of the same
        output_path.tmp, .progress    until it is complete: what an interrupted run needs to resume
run     python predict.py "a text" "another"    or set `texts`, or input_path and output_path, below
        torchrun --nproc_per_node=4 predict.py    a file on 4 GPUs, with the same output
        in Python:  from predict import predict;  predict(["...", "..."])
"""

import csv
import functools
import io
import json
import os
import sys
import time
import zlib
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from numbers import Real

if __name__ == "__main__":  # before torch is loaded
    from data_preprocess import limit_spinning

    limit_spinning()

import numpy as np
import torch
from tqdm import tqdm

import data_preprocess
from bert_multilabel_cls import check_truncation, choose_dtype, get_pth_path, limit_threads, load_lock
from bert_multilabel_cls import load_model, predict_batches, to_inference
from data_helper import MultiClsDataSet, all_gather_object, all_reduce, broadcast_object, confusion_counts
from data_helper import eval_dataloader, exit_if_stopped, init_distributed, metrics_from_counts
from data_helper import per_label_metrics
from data_preprocess import InputError, atomic_write, check_labels, check_number, check_surrogates, check_text
from data_preprocess import check_writable, decode_utf8, dump_json, escape, file_format, file_sha256
from data_preprocess import handle_signals, is_main_process, label_names, load_json_object, log
from data_preprocess import log_label_metrics, log_metrics, parse_json_line, plain_constants, read_lines
from data_preprocess import read_table, run_script, sibling_path, table_labels

# JSONL with a "text" in each line; .csv or .tsv, whose text_column is set in data_preprocess.py; or plain
# text, one per line. Other fields are copied through. "" labels the texts below.
input_path = ""
output_path = ""  # in the order of the input: JSONL, or .csv or .tsv if it is called so
save_model_path = "./model/multi_label_cls.pth"  # or its folder
label2idx_path = "./data/label2idx.json"  # read only for a .pth of the article
device = "cuda" if torch.cuda.is_available() else "cpu"
max_len = None  # tokens; longer texts are truncated. None: as in training
keep_tail = None  # tokens of a truncated text that are kept from its end. None: as in training
batch_size = 32  # texts, of short ones up to 8 times as many; more need more memory
chunk_size = 4096  # texts tokenized, sorted by length and held in memory at a time
precision = "auto"  # of the weights; "fp32" for exact probabilities
resume = True  # continue an interrupted file; False starts over

threshold = 0.5  # of the probability; {"billing": 0.3}: the others at 0.5; "tuned": recommended in training
min_labels = 0  # at least so many labels per text, the most probable ones
max_labels = None  # at most so many; None for no limit
all_probabilities = False  # True: a file gets the probabilities of all labels, not only of the chosen ones

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
    names, results = label_names(label2idx), [[]] * len(examples)
    thresholds = get_thresholds(model.bert.config, names)
    for indices, probs, _ in iter_probs(examples, model, tokenizer, label2idx):
        for i, row, chosen in zip(indices, probs, choose_labels(probs, thresholds), strict=True):
            results[i] = [(names[c], float(row[c])) for c in np.flatnonzero(chosen)]
    return results


def predict_proba(texts):
    """Return the probabilities of all labels, (N, C) float32, columns as get_labels; raises as predict."""
    examples = [(text, ()) for text in check_texts(texts)]
    model, tokenizer, label2idx = get_model()
    result = np.empty((len(examples), len(label2idx)), dtype=np.float32)
    for indices, probs, _ in iter_probs(examples, model, tokenizer, label2idx):
        result[indices] = probs
    return result


def get_labels():
    """Return the labels of the model in the order of predict_proba's columns, a list of C str."""
    return label_names(get_model()[2])


def predict_file():
    """Label the texts of input_path in output_path; print metrics where the input has labels.

    One chunk is in memory at a time. Under torchrun the processes take chunks in turn: the output is the same
    for any number of processes. Resumes an interrupted run after the last chunk that is on disk.
    Raises InputError naming file and line for an invalid input, before anything is computed; SystemExit after
    SIGTERM or Ctrl-C.
    """
    rank, world_size = init_distributed(device)
    check_paths()
    model, tokenizer, label2idx = get_model()
    check_numbers(model.bert.config)
    names = label_names(label2idx)
    thresholds = get_thresholds(model.bert.config, names)
    dtype = str(model.bert.dtype).removeprefix("torch.")
    log("input", path=input_path, device=device, dtype=dtype, processes=world_size)
    num_texts, columns = validate_input(label2idx)
    log("checked", texts=num_texts)
    header, format_row = get_format(columns, names)
    config = run_config(model, tokenizer, names, thresholds) if is_main_process() else {}
    progress = broadcast_object(lambda: load_progress(config, len(names), num_texts))
    start, counts = progress["texts"], torch.tensor(progress["counts"])
    bar_options = {"unit": "text", "leave": False, "disable": None if is_main_process() else True}
    bar = tqdm(total=num_texts, initial=start, **bar_options)
    start_time = time.perf_counter()

    def on_batch(batch):
        """Move the bar on, on behalf of all processes."""
        bar.update(min(len(batch[0]) * world_size, num_texts - bar.n))
        return batch

    one_portion = num_texts - start <= chunk_size * world_size  # of which nothing is saved: a signal ends it
    with (
        nullcontext([]) if one_portion else handle_signals() as signals,
        bar,
        open_output(progress["bytes"]) as file,
    ):
        file.write(b"" if start else header)
        for items in read_shards(rank, world_size, num_texts, start):
            examples = [(text, labels or ()) for _, text, labels, _ in items]
            batches = iter_probs(examples, model, tokenizer, label2idx, on_batch)
            rows, chunk_counts = label_items(items, batches, thresholds, format_row)
            file.writelines(all_gather_object(rows))
            counts += all_reduce(chunk_counts)
            progress["texts"] += chunk_size * world_size
            if progress["texts"] < num_texts:
                save_progress(file, {**progress, "counts": counts.tolist()})
                exit_if_stopped(signals, resume, texts=progress["texts"])
    log_scores(counts, names)
    seconds = time.perf_counter() - start_time
    speed = f"{(num_texts - start) / seconds:.1f}texts/s"
    log("wrote", path=output_path, texts=num_texts, time=f"{seconds:.1f}s", speed=speed)


def label_items(items, batches, thresholds, format_row):
    """Return the rows of items of read_input, in bytes, and their confusion_counts; batches of iter_probs."""
    rows, counts = [b""] * len(items), torch.zeros(5, len(thresholds), dtype=torch.int64)
    for indices, probs, true in batches:
        chosen = choose_labels(probs, thresholds)
        labelled = [items[i][2] is not None for i in indices]
        counts += count_batch(true[labelled], chosen[labelled])
        for i, *row in zip(indices, chosen, probs, strict=True):
            rows[i] = format_row(items[i], *row)
    return b"".join(rows), counts


def iter_probs(examples, model, tokenizer, label2idx, on_batch=lambda batch: batch):
    """Yield (indices, probs, labels) of batches of (text, labels) pairs: B numbers, and (B, C) each."""
    check_numbers(model.bert.config)
    length, tail = get_truncation(model.bert.config)
    for start in range(0, len(examples), chunk_size):
        chunk = examples[start : start + chunk_size]
        dataset = MultiClsDataSet(None, length, None, tokenizer, label2idx, tail, chunk)
        dataloader = eval_dataloader(dataset, batch_size, device)
        batches = predict_batches(model, map(on_batch, dataloader))
        for indices, (probs, labels) in zip(dataloader.sampler, batches, strict=True):
            yield [start + i for i in indices], probs.numpy(), labels.numpy()


def get_truncation(config):
    """Return (max_len, keep_tail): the constants, or where they are None those of training."""
    constants = zip((max_len, keep_tail), config.truncation, strict=True)
    return [trained if value is None else value for value, trained in constants]


def choose_labels(probs, thresholds):
    """Return which labels each text gets, (N, C) bool, by thresholds, min_labels and max_labels."""
    above = probs > thresholds
    if not min_labels and max_labels is None:
        return above
    rank = np.argsort(np.argsort(-(probs + above), axis=1, kind="stable"), axis=1)  # those above come first
    return (above | (rank < min_labels)) & (rank < (probs.shape[1] if max_labels is None else max_labels))


def get_thresholds(config, names):
    """Return the threshold of each label, (C,) float32: those of the constant `threshold`, or tuned ones."""
    chosen = threshold
    if threshold == "tuned":
        recommended = config.thresholds.get("recommended", "by_label")  # older models have none
        chosen = 0.5 if recommended == "0.5" else config.thresholds.get(str(recommended))
        if not chosen:
            raise InputError(f'threshold = "tuned": {save_model_path} has no tuned thresholds; set a number')
    if not isinstance(chosen, dict):
        chosen = dict.fromkeys(names, chosen)
    if unknown := sorted(chosen.keys() - set(names)):
        raise InputError(f"threshold = {threshold!r:.60}: the model has no label {unknown[0]!r}")
    for value in chosen.values():
        if not isinstance(value, Real) or not 0 <= value <= 1:
            kinds = 'a number from 0 to 1, "tuned", or {"label": number, ...}'
            raise InputError(f"threshold = {threshold!r:.60}: must be {kinds}")
    return np.array([chosen.get(name, 0.5) for name in names], dtype=np.float32)


def get_model():
    """Return (model on `device`, tokenizer, label2idx); loaded once, and again after a training."""
    plain_constants(globals())
    pth_path, dtype = get_pth_path(save_model_path), choose_dtype(precision, device)
    paths = filter(os.path.exists, (pth_path, sibling_path(pth_path, "config.json")))
    mtimes = tuple(os.stat(path).st_mtime_ns for path in paths)
    with load_lock:  # of many threads, one loads it and the others wait
        return load_once(save_model_path, label2idx_path, device, dtype, mtimes)


@functools.lru_cache(maxsize=1)
def load_once(model_path, label2idx_path, device, dtype, mtimes):
    """Return what get_model does; mtimes tell one model from the next."""
    limit_threads()
    model, tokenizer, label2idx = load_model(model_path, label2idx_path)
    return to_inference(model, device, dtype), tokenizer, label2idx


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
        raise InputError(
            f"input_path = {input_path!r}: not a file; it is read more than once, so a pipe will not do"
        )
    if os.path.isdir(output_path) or not os.path.basename(output_path):
        raise InputError(f"output_path = {output_path!r}: is a folder; name a file in it")
    check_writable(output_path)
    for path in (output_path, *temporary_paths()):  # which are written first
        if os.path.exists(path) and os.path.exists(input_path) and os.path.samefile(path, input_path):
            raise InputError(f"output_path = {output_path!r}: would replace the input; set another one")


def read_input(bar=True):
    """Yield (location, text, labels or None, fields) for each text of the input; fields: {name: value}."""
    kind = file_format(input_path)
    if kind == "table":
        for location, cells in read_table(input_path, bar):
            yield location, cells[data_preprocess.text_column], table_labels(location, cells), cells
    else:
        for location, line in read_lines(input_path, kind == "text", bar):
            if kind == "text":
                item = {"text": decode_utf8(location, line).rstrip("\r\n")}
            else:
                item = parse_json_line(location, line)
            text = check_text(location, item)
            yield location, text, check_labels(location, item) if "label" in item else None, item


def validate_input(label2idx):
    """Return (number of texts, names of the fields of all). Raises InputError at the first invalid line."""
    num_texts, columns = 0, {}
    for location, _, labels, fields in read_input():
        for label in labels or ():
            if label not in label2idx:
                raise InputError(f"{location}: the model has no label {label!r}; remove it from this line")
        for key in fields.keys() & {"true", "probability", *["label"] * (labels is None)}:
            raise InputError(f'{location}: the key "{key}" is needed for the output; rename it')
        num_texts += 1
        columns.update(dict.fromkeys(fields))
        columns.update(dict.fromkeys(["true"] if labels is not None else []))
    if not num_texts:
        raise InputError(f"{input_path}: no texts")
    return num_texts, list(columns)


def read_shards(rank, world_size, num_texts, start):
    """Yield lists of up to chunk_size items of read_input, this process's turns; the last may be empty.

    start: the texts to skip. Raises InputError if the input has fewer texts than num_texts by now.
    """
    items = islice(read_input(bar=False), start, None)
    for remaining in range(num_texts - start, 0, -chunk_size * world_size):
        turn = list(islice(items, min(remaining, chunk_size * world_size)))
        if len(turn) < min(remaining, chunk_size * world_size):
            raise InputError(f"{input_path}: has been changed while it was read; restore it, or run again")
        yield turn[rank * chunk_size : (rank + 1) * chunk_size]


def temporary_paths():
    """Return the paths of the unfinished output and of its progress."""
    target = os.path.realpath(output_path) if os.path.islink(output_path) else output_path
    return f"{target}.tmp", f"{target}.progress"


def run_config(model, tokenizer, names, thresholds):
    """Return {name: str}: what must not change before a run resumes.

    batch_size, chunk_size and the number of processes may be lowered when memory has run out.
    """
    parts = (
        names,
        thresholds.tolist(),
        get_truncation(model.bert.config),
        sorted(tokenizer.get_vocab().items()),
    )
    crc = zlib.crc32(repr(parts).encode("utf-8", "backslashreplace"))
    for tensor in model.state_dict().values():
        crc = zlib.crc32(tensor.cpu().contiguous().view(torch.uint8).numpy(), crc)
    constants = "device max_len keep_tail precision threshold min_labels max_labels all_probabilities".split()
    config = {name: globals()[name] for name in constants} | {"the model": crc}
    constants = ("text_column", "label_columns", "label_separator")
    config |= {name: getattr(data_preprocess, name) for name in constants}
    config[f"the content of {input_path}"] = file_sha256(input_path)
    return {name: str(value) for name, value in config.items()}


def load_progress(config, num_labels, num_texts):
    """Return {"config", "texts": done, "bytes": of them in the temporary file, "counts": 5 lists of C}.

    Raises InputError if what is there is of another run.
    """
    path, progress_path = temporary_paths()
    progress = {"config": config, "texts": 0, "bytes": 0, "counts": [[0] * num_labels] * 5}
    if not resume or not os.path.exists(path) or not os.path.exists(progress_path):
        with suppress(FileNotFoundError):
            os.remove(progress_path)
        return progress
    start_over = f"to start over, delete {progress_path} or set resume = False in predict.py"
    found = os.path.getsize(path)
    try:
        saved = load_json_object(progress_path)
        changed = [k for k in {**saved["config"], **config} if saved["config"].get(k) != config.get(k)]
        sizes = [type(saved[name]) is int and saved[name] > 0 for name in ("texts", "bytes")]
        counts = torch.tensor(saved["counts"])
        counts_fit = counts.shape == (5, num_labels) and counts.dtype == torch.int64
        if not changed and not (
            all(sizes) and saved["bytes"] <= found and counts_fit and saved["texts"] < num_texts
        ):
            raise ValueError
    except (InputError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError):
        raise InputError(f"{progress_path}: not the progress of {path}; {start_over}") from None
    if changed:
        raise InputError(
            f"{progress_path}: cannot resume, changed: {', '.join(changed)}; undo it, or, {start_over}"
        )
    log("resume", f"from {path}", texts=saved["texts"])
    return saved


def save_progress(file, progress):
    """Note that so much of the output is on disk."""
    if is_main_process():
        file.flush()
        os.fsync(file.fileno())
        dump_json(progress | {"bytes": file.tell()}, temporary_paths()[1])


@contextmanager
def open_output(num_bytes):
    """Give the file to write, after num_bytes of an interrupted run; os.devnull on other ranks.

    It becomes output_path once it is complete.
    """
    progress_path = temporary_paths()[1]
    with atomic_write(output_path, progress_path) if is_main_process() else nullcontext(os.devnull) as path:
        resumes = num_bytes and is_main_process()
        with open(path, "r+b" if resumes else "wb") as file:
            if resumes:
                file.truncate(num_bytes)
                file.seek(num_bytes)
            yield file


def get_format(columns, names):
    """Return (header, a function of (item, chosen, probs) that returns a row), in bytes, for output_path.

    The labels of the input become "true".
    """

    def get_row(item, chosen, probs):
        """Return the output for an item of read_input, a dict."""
        _, _, true, fields = item
        row = {**fields} | ({} if true is None else {"true": true})
        columns = np.flatnonzero(chosen)
        row["label"] = [names[c] for c in columns]
        shown = range(len(names)) if all_probabilities else columns
        return row | {"probability": {names[c]: round(float(probs[c]), 4) for c in shown}}

    def jsonl_row(*arguments):
        """Return a line of JSON."""
        row = json.dumps(get_row(*arguments), ensure_ascii=False)
        return row.encode("utf-8", "backslashreplace") + b"\n"

    def table_row(*arguments):
        """Return a line of a table; a probability stands in a column of its label if all are wanted."""
        row, separator = get_row(*arguments), data_preprocess.label_separator
        probabilities = row.pop("probability")
        row |= {f"probability {label}": prob for label, prob in probabilities.items()}
        row["probability"] = separator.join(map(str, probabilities.values()))
        row |= {name: separator.join(row[name]) for name in ("true", "label") if name in row}
        return write_row(row.get(name, "") for name in header)

    def write_row(cells):
        """Return cells as a line of CSV or TSV."""
        line = io.StringIO()
        csv.writer(line, delimiter="\t" if output_path.lower().endswith(".tsv") else ",").writerow(cells)
        return line.getvalue().encode("utf-8", "backslashreplace")

    if not output_path.lower().endswith((".csv", ".tsv")):
        return b"", jsonl_row
    shown = [f"probability {name}" for name in names] if all_probabilities else ["probability"]
    header = [*(name for name in columns if name != "label"), "label", *shown]
    return b"\xef\xbb\xbf" + write_row(header), table_row


def count_batch(true, chosen):
    """Return the confusion_counts of labels (B, C), 0 or 1, and which are chosen, (B, C) bool."""
    true, chosen = torch.from_numpy(true > 0.5), torch.from_numpy(chosen)
    either = true | chosen
    return confusion_counts(*either.nonzero(as_tuple=True), true[either], chosen[either], *true.shape)


def log_scores(counts, names):
    """Print the metrics of the labels given, if any text of the input had labels."""
    if counts[3, 0]:
        log_label_metrics(per_label_metrics(counts, names), f"labels and `true` are in {output_path}")
        kind = "by_label" if isinstance(threshold, dict) else threshold
        log_metrics("scores", metrics_from_counts(counts), kind)


def main():
    """Label the texts of the command line; else the file input_path; else print `texts` with their labels."""
    if (input_path or output_path) and not sys.argv[1:]:
        return predict_file()
    shown = sys.argv[1:] or texts
    for text, pairs in zip(shown, predict_with_scores(shown) if is_main_process() else ()):
        labels = " ".join(f"{label}({prob:.3f})" for label, prob in pairs) or "no label"
        print(escape(text), escape(labels), sep="\t")


if __name__ == "__main__":
    run_script(main, takes_texts=True)
