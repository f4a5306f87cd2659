"""Give texts their labels with the model that train.py saved; needs no network.

reads   ./model/    what `python train.py` wrote
run     python predict.py    or, from Python:  from predict import predict;  predict(["...", "..."])
"""
import functools
import os
from collections.abc import Iterable

import numpy as np
import torch

from bert_multilabel_cls import check_max_len, choose_precision, dtypes, gather_probs, load_model
from data_helper import by_length, pad, starts_of, tokenize
from data_preprocess import InputError, check_number, check_whole, label_names, run_script

save_model_path = "./model/multi_label_cls.pth"
label2idx_path = "./data/label2idx.json"  # read only where no config.json lies beside the model
device = "cuda" if torch.cuda.is_available() else "cpu"
max_len = 128  # tokens; longer texts lose their end. As in training
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
    model, _, label2idx = trained_model()
    limits = thresholds(model.bert.config)
    labels = label_names(label2idx)
    return [[(labels[c], float(row[c])) for c in np.flatnonzero(kept)]
            for probs in probs_of(texts) for row, kept in zip(probs, choose_labels(probs, limits))]


def predict_proba(texts):
    """Return the probabilities of all labels, (N, C) float32, columns in label order. Raises as `predict` does."""
    texts = check_texts(texts)
    return np.concatenate([np.empty((0, len(trained_model()[2])), dtype=np.float32), *probs_of(texts)])


def probs_of(texts):
    """Yield the probabilities of a list of texts, (up to sorted_together, C) at a time, in the order of the texts."""
    check_numbers()
    model, tokenizer, _ = trained_model()
    check_max_len(max_len, model.bert.config)
    for start in range(0, len(texts), sorted_together):
        ids, lengths = tokenize(tokenizer, texts[start:start + sorted_together], max_len)
        starts, batches = starts_of(lengths), by_length(lengths, batch_size)
        padded = (pad(ids, starts[batch], lengths[batch], tokenizer.pad_token_id) for batch in batches)
        order = [index for batch in batches for index in batch]
        yield gather_probs(model, padded)[0].numpy()[np.argsort(order)]


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


def check_numbers():
    """Raise InputError if a number among the constants is out of range."""
    for name, least in (("batch_size", 1), ("sorted_together", 1), ("min_labels", 0)):
        check_number(name, globals()[name], least, whole=True)
    if max_labels is not None:
        check_number("max_labels", max_labels, min_labels, whole=True)


def choose_labels(probs, threshold):
    """Return which labels each text gets, (N, C) bool, with `min_labels` and `max_labels` obeyed."""
    above = probs > threshold
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
    model.bert.to(dtypes[mode])
    return model.to(device), tokenizer, label2idx


def main():
    """Print each of `texts` with its labels and their probabilities."""
    for text, pairs in zip(texts, predict_pairs(texts)):
        print(text, " ".join(f"{label}({prob:.3f})" for label, prob in pairs) or "no label", sep="\t")


if __name__ == "__main__":
    run_script(main)
