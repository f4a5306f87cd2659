"""Give texts their labels with the model that train.py saved; needs no network.

reads   ./model/       what `python train.py` wrote
        input_path     if it is set: a file of texts, of any size
writes  output_path    a line for each of its texts: {"text": "...", "label": ["A"], "probability": {"A": 0.9876}}
run     python predict.py    or, from Python:  from predict import predict;  predict(["...", "..."])
        torchrun --nproc_per_node=4 predict.py      a file on 4 GPUs: the same output
"""
import functools
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from itertools import islice

import numpy as np
import torch
from transformers.utils.logging import tqdm

from bert_multilabel_cls import check_max_len, choose_precision, dtypes, gather_probs, load_model
from data_helper import (by_length, count, from_processes, join_processes, label_scores, leave_processes,
                         over_processes, pad, scores_from, starts_of, tokenize)
from data_preprocess import (InputError, check_labels, check_number, check_text, check_whole, decode, is_main,
                             label_names, log, log_labels, parse_line, read_lines, run_script, whole_file)

input_path = ""  # JSONL with a "text" in each line, or plain text, one a line; "" labels the texts below
output_path = ""  # JSONL, a line for each line of the input, what else stood in it carried over
save_model_path = "./model/multi_label_cls.pth"  # or a folder such as ./model/transformers
label2idx_path = "./data/label2idx.json"  # read only where no config.json lies beside the model
device = "cuda" if torch.cuda.is_available() else "cpu"
max_len = 128  # tokens; longer texts lose their end, or their middle. As in training
keep_tail = 0  # of a text longer than max_len, so many tokens are taken from its end. As in training
batch_size = 32  # texts at a time; more needs more memory
sorted_together = 4096  # texts that are tokenized, and sorted by length, at a time
precision = "auto"  # of the weights: the fastest that the hardware has natively; "fp32" for exact probabilities

# Which labels a text gets.
threshold = 0.5  # those with a probability above this; "tuned": above each label's own, which training chose on dev
min_labels = 0  # at least so many: the most probable ones, also below the threshold
max_labels = None  # at most so many: the most probable ones; None is no limit

texts = ["中超-德尔加多扳平郭田雨绝杀 泰山2-1逆转亚泰", "今日沪深两市指数整体呈现震荡调整格局"]


def predict(texts):
    """Return one list of labels for each text, in label order.

    Raises InputError if `texts` is a bare string, holds something else than strings, or there is no model.
    """
    return [[label for label, _ in pairs] for pairs in predict_pairs(texts)]


def predict_pairs(texts):
    """Return for each text a list of (label, probability): the labels that it gets, in label order."""
    texts = check_texts(texts)
    if not texts:
        return []
    model, tokenizer, label2idx = trained_model()
    limits, labels = thresholds(model.bert.config), label_names(label2idx)
    return [pairs for probs in probs_of(texts, model, tokenizer)
            for pairs in pairs_of(probs, choose_labels(probs, limits), labels)]


def predict_proba(texts):
    """Return the probabilities of all labels, (N, C) float32, columns in label order. Raises as `predict` does."""
    texts = check_texts(texts)
    model, tokenizer, label2idx = trained_model()
    return np.concatenate([np.empty((0, len(label2idx)), dtype=np.float32), *probs_of(texts, model, tokenizer)])


def probs_of(texts, model, tokenizer, done=lambda number: None):
    """Yield the probabilities of a list of texts, (up to sorted_together, C) at a time, in the order of the texts.

    done: is called with the number of texts in each batch.
    """
    check_numbers(model.bert.config)
    for start in range(0, len(texts), sorted_together):
        ids, lengths, _ = tokenize(tokenizer, texts[start:start + sorted_together], max_len, keep_tail)
        batches, starts = by_length(lengths, batch_size), starts_of(lengths)

        def padded():
            """Yield each batch as tensors."""
            for batch in batches:
                yield pad(ids, starts[batch], lengths[batch], tokenizer.pad_token_id)
                done(len(batch))
        order = [index for batch in batches for index in batch]
        yield gather_probs(model, padded())[0].numpy()[np.argsort(order)]


def pairs_of(probs, chosen, labels):
    """Return for each row of probs (N, C) a list of (label, probability): those that are chosen, (N, C) bool."""
    return [[(labels[c], float(row[c])) for c in np.flatnonzero(kept)] for row, kept in zip(probs, chosen)]


def predict_file():
    """Label the texts of `input_path` in `output_path`, and print the metrics where the input has labels too.

    Memory holds one portion of `sorted_together` texts, however large the file is. Under torchrun the processes take
    the portions in turn: batches, and so the output, are the same for any number of processes.
    Raises InputError, before anything is computed, naming file and line, for what is wrong in the input.
    """
    rank, processes = join_processes(device)
    check_paths()
    model, tokenizer, label2idx = trained_model()
    check_numbers(model.bert.config)
    limits, labels, begun = thresholds(model.bert.config), label_names(label2idx), time.perf_counter()
    log("input", path=input_path, device=device, precision=choose_precision(precision, device), processes=processes)
    parse = parse_line if is_jsonl() else parse_plain
    total = check_input(parse, label2idx)
    log("checked", texts=total)
    counts = torch.zeros(5, len(labels), dtype=torch.int64)
    bar = tqdm(total=total, unit="text", leave=False, disable=None if is_main() else True)
    with bar, whole_output() as file:
        for lines in portions(parse, rank, processes, total):
            items, rows = [parse(place, line) for place, line in lines], b""
            for probs in probs_of([item["text"] for item in items], model, tokenizer,  # once; with no items never
                                  lambda number: bar.update(min(number * processes, total - bar.n))):
                chosen = choose_labels(probs, limits)
                rows = b"".join(map(row_of, items, pairs_of(probs, chosen, labels)))
                counts += count_labelled(items, chosen, label2idx)
            file.writelines(from_processes(rows))
    report(over_processes(counts), labels)
    seconds = time.perf_counter() - begun
    log("wrote", path=output_path, texts=total, time=f"{seconds:.1f}s", speed=f"{total / seconds:.1f}texts/s")
    leave_processes()


def check_paths():
    """Raise InputError unless input_path and output_path are set, to two files."""
    if not input_path or not output_path:
        raise InputError(f"input_path = {input_path!r}, output_path = {output_path!r}: set both, or neither")
    if os.path.exists(input_path) and not os.path.isfile(input_path):
        raise InputError(f"input_path = {input_path!r}: is no file; it is read twice, so a pipe will not do")
    if os.path.isdir(output_path) or not os.path.basename(output_path):
        raise InputError(f"output_path = {output_path!r}: is a folder; name a file in it")
    for path in (output_path, f"{output_path}.tmp"):  # the second is written first
        if os.path.exists(path) and os.path.exists(input_path) and os.path.samefile(path, input_path):
            raise InputError(f"output_path = {output_path!r}: the input would be replaced; set another one")


def is_jsonl():
    """Return whether `input_path` is JSONL: by its name, or because its first line starts as an object does."""
    return input_path.lower().endswith((".json", ".jsonl")) or any(
        line.lstrip().startswith(b"{") for _, line in islice(read_lines(input_path), 1))


def parse_plain(place, line):
    """Return the object that a line of plain text stands for; an empty line is an empty text."""
    return {"text": decode(place, line).rstrip("\r\n")}


def check_input(parse, label2idx):
    """Return how many texts the input has. Raises InputError at the first line that is not as it should be."""
    total = 0
    for total, (place, line) in enumerate(read_lines(input_path, parse is parse_plain), 1):
        item = parse(place, line)
        check_text(place, item)
        unknown = set(check_labels(place, item)).difference(label2idx) if "label" in item else ()
        if unknown:
            raise InputError(f"{place}: the model does not know the label {min(unknown)!r}; take it out of this line, "
                             'or "label" out of the file: then nothing is measured')
        for key in {"true", "probability"} & set(item):
            raise InputError(f'{place}: has the key "{key}", which the output needs for itself; rename it')
    if not total:
        raise InputError(f"{input_path}: no texts")
    return total


def portions(parse, rank, processes, total):
    """Yield lists of up to sorted_together (place, line) of the input: this process's turns, perhaps empty at last.

    Raises InputError if the input has not the `total` of lines any more that were checked.
    """
    lines = islice(read_lines(input_path, parse is parse_plain), total)
    for left in range(total, 0, -sorted_together * processes):
        before = sum(1 for _ in islice(lines, sorted_together * rank))
        mine = list(islice(lines, sorted_together))
        after = sum(1 for _ in islice(lines, sorted_together * (processes - rank - 1)))
        if before + len(mine) + after < min(left, sorted_together * processes):
            raise InputError(f"{input_path}: has been changed while it was read; run again")
        yield mine


@contextmanager
def whole_output():
    """Give the file to write, which becomes `output_path` when all is written; one that forgets, in other processes."""
    with whole_file(output_path) if is_main() else nullcontext(os.devnull) as path, open(path, "wb") as file:
        yield file


def row_of(item, pairs):
    """Return the output's line for an object of the input with the labels that it gets; its own become "true"."""
    true = {"true": item["label"]} if "label" in item else {}
    row = {**item, **true, "label": [label for label, _ in pairs],
           "probability": {label: round(prob, 4) for label, prob in pairs}}
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"  # as \ud800 is


def count_labelled(items, chosen, label2idx):
    """Return what data_helper.count does, for those of the input's objects that have labels of their own."""
    labelled = ["label" in item for item in items]
    truth = np.zeros_like(chosen)
    for row, item in zip(truth, items):
        row[[label2idx[label] for label in item.get("label", ())]] = True
    return count(torch.from_numpy(truth[labelled]), torch.from_numpy(chosen[labelled]))


def report(counts, labels):
    """Print the metrics of the labels that the texts got, if any text of the input had its own."""
    texts = int(counts[3, 0])
    if texts:
        log_labels(label_scores(counts, labels))
        log("scores", threshold=threshold, texts=texts,
            **{name: f"{value:.4f}" for name, value in scores_from(counts).items()})


def check_texts(texts):
    """Return `texts` as a list. Raises InputError unless it is a list, or something else that gives strings."""
    if isinstance(texts, str):
        raise InputError(f"predict takes a list of texts; wrap the one text in a list: predict([{texts[:20]!r}])")
    if not isinstance(texts, Iterable):
        raise InputError(f"predict takes a list of texts, but got {texts!r:.40}")
    texts = list(texts)
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise InputError(f"predict takes a list of strings, but text {number} is {text!r:.40}")
        check_whole(f"text {number}", text)
    return texts


def thresholds(config):
    """Return the threshold, or one for each label, that the constant `threshold` asks for."""
    if threshold == "tuned":
        if not config.thresholds:
            raise InputError(f'threshold = "tuned": no tuned thresholds lie beside {save_model_path}; train again, or '
                             "set a number")
        return np.array(config.thresholds["by_label"], dtype=np.float32)
    if not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise InputError(f'threshold = {threshold!r}: must be a number from 0 to 1, or "tuned"')
    return threshold


def check_numbers(config):
    """Raise InputError if a number among the constants is out of range."""
    check_max_len(max_len, config)
    check_number("keep_tail", keep_tail, 0, max_len - 2, whole=True)
    for name, least in (("batch_size", 1), ("sorted_together", 1), ("min_labels", 0)):
        check_number(name, globals()[name], least, whole=True)
    if max_labels is not None:
        check_number("max_labels", max_labels, min_labels, whole=True)


def choose_labels(probs, threshold):
    """Return which labels each text gets, (N, C) bool, with `min_labels` and `max_labels` obeyed."""
    above = probs > threshold
    if not min_labels and max_labels is None:
        return above
    rank = np.argsort(np.argsort(-(probs + above), axis=1, kind="stable"), axis=1)  # those above come first
    return (above | (rank < min_labels)) & (rank < (probs.shape[1] if max_labels is None else max_labels))


def trained_model():
    """Return (model on `device`, tokenizer, label2idx); loaded at the first call, and again after a training."""
    written = os.stat(save_model_path).st_mtime_ns if os.path.exists(save_model_path) else None
    return load_once(save_model_path, label2idx_path, device, choose_precision(precision, device), written)


@functools.lru_cache(maxsize=1)
def load_once(save_model_path, label2idx_path, device, mode, written):
    """Return what trained_model does; `written`, the time of the file, only tells one model from the next."""
    model, tokenizer, label2idx = load_model(save_model_path, label2idx_path)
    cut = getattr(model.bert.config, "trained_cut", [max_len, keep_tail])
    if cut != [max_len, keep_tail] and is_main():
        print(f"note     max_len = {max_len} and keep_tail = {keep_tail}, but training had {cut[0]} and {cut[1]}; set "
              "these in predict.py too", file=sys.stderr)
    model.bert.to(dtypes[mode])
    return model.to(device), tokenizer, label2idx


def main():
    """Label the file `input_path`; without one, print each of `texts` with its labels and their probabilities."""
    if input_path or output_path:
        return predict_file()
    for text, pairs in zip(texts, predict_pairs(texts) if is_main() else ()):
        print(text, " ".join(f"{label}({prob:.3f})" for label, prob in pairs) or "no label", sep="\t")


if __name__ == "__main__":
    run_script(main)
