"""Give texts their labels with the model that train.py saved; needs no network.

reads   ./model/    what `python train.py` wrote
run     python predict.py    or, from Python:  from predict import predict;  predict(["...", "..."])
"""
import functools

import torch
from torch.utils.data import TensorDataset

from bert_multilabel_cls import gather_probs, load_model
from data_helper import by_length, encode, load_batches
from data_preprocess import InputError, run_script

save_model_path = "./model/multi_label_cls.pth"
label2idx_path = "./data/label2idx.json"  # read only where no config.json lies beside the model
device = "cuda" if torch.cuda.is_available() else "cpu"
max_len = 128  # tokens; longer texts are cut. As in training
batch_size = 32  # texts at a time; more needs more memory
threshold = 0.5  # a label is given where its probability is above this

texts = ["中超-德尔加多扳平郭田雨绝杀 泰山2-1逆转亚泰", "今日沪深两市指数整体呈现震荡调整格局"]


def predict(texts):
    """Return one list of labels for each text: those with a probability above `threshold`, in label order.

    Raises InputError if `texts` is a bare string, holds something else than strings, or there is no model.
    """
    return [[label for label, prob in pairs if prob > threshold] for pairs in predict_pairs(texts)]


def predict_pairs(texts):
    """Return for each text a list of C pairs (label, probability), in label order."""
    if isinstance(texts, str):
        raise InputError(f"predict takes a list of texts; wrap the one text in a list: predict([{texts[:20]!r}])")
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise InputError(f"predict takes a list of strings, but one of them is {wrong[0]!r:.40}")
    if not texts:
        return []
    model, tokenizer, label2idx = trained_model(save_model_path, label2idx_path, device)
    dataset = TensorDataset(*encode(tokenizer, texts, max_len))
    batches = by_length(dataset.tensors[1], batch_size)
    sorted_probs, _ = gather_probs(model, load_batches(dataset, batches))
    probs = torch.empty_like(sorted_probs)
    probs[[index for batch in batches for index in batch]] = sorted_probs  # back to the order of `texts`
    labels = sorted(label2idx, key=label2idx.get)
    return [list(zip(labels, row)) for row in probs.tolist()]


@functools.lru_cache(maxsize=1)
def trained_model(save_model_path, label2idx_path, device):
    """Return (model on `device`, tokenizer, label2idx); loaded at the first call, then kept."""
    model, tokenizer, label2idx = load_model(save_model_path, label2idx_path)
    return model.to(device), tokenizer, label2idx


def main():
    """Print each of `texts` with its labels and their probabilities."""
    for text, pairs in zip(texts, predict_pairs(texts)):
        labels = " ".join(f"{label}({prob:.3f})" for label, prob in pairs if prob > threshold)
        print(text, labels or "no label", sep="\t")


if __name__ == "__main__":
    run_script(main)
