"""A baseline on the same files: TF-IDF of character 1- to 3-grams with one-vs-rest LinearSVC.

Its thresholds are tuned on dev as those of the model are: a fair comparison needs both or neither.

reads   ./data/train.json, dev.json, test.json, ./model/ (run `python train.py` first)
run     python tests/baseline.py    from the repository's root
prints  a line for each kind of threshold
"""

import json
import sys
from pathlib import Path

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import MultiLabelBinarizer
from sklearn.svm import LinearSVC

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import predict
from data_helper import collect_predictions, metrics_report, tune_thresholds
from data_preprocess import run_script

data_paths = ("./data/train.json", "./data/dev.json", "./data/test.json")


def read(path):
    """Return (texts, labels) of a data file."""
    examples = [json.loads(line) for line in open(path, encoding="utf-8")]
    return [example["text"] for example in examples], [example["label"] for example in examples]


def compare(data_paths):
    """Return {name: metrics_report on the test file}, of the baseline and of the model."""
    names, config = predict.get_labels(), predict.get_model()[0].bert.config
    binarizer = MultiLabelBinarizer(classes=names)
    texts, labels = zip(*map(read, data_paths), strict=True)
    labels = [torch.tensor(binarizer.fit_transform(rows)).float() for rows in labels]
    dev, test = (
        collect_predictions([(probs, truth)], len(names), torch.nn.BCELoss())
        for probs, truth in zip(svm_probs(texts, labels[0]), labels[1:], strict=True)
    )
    found = {"tfidf_linear_svc": metrics_report(test, names, tune_thresholds(dev, names))}
    probs = torch.from_numpy(predict.predict_proba(texts[2]))
    test = collect_predictions([(probs, labels[2])], len(names), torch.nn.BCELoss())
    return found | {"this_project": metrics_report(test, names, config.thresholds)}


def svm_probs(texts, labels):
    """Yield the sigmoid of the margins of dev and of test."""
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3))
    classifier = OneVsRestClassifier(LinearSVC()).fit(
        vectorizer.fit_transform(texts[0]), labels.numpy()
    )
    for held_out in texts[1:]:
        margins = classifier.decision_function(vectorizer.transform(held_out))
        yield torch.from_numpy(margins).float().view(len(held_out), -1).sigmoid()


def main():
    """Print a line for each and each kind of threshold."""
    for name, metrics in compare(data_paths).items():
        for threshold in ("0.5", "single", "by_label"):
            scores = metrics[f"at_{threshold}"].items()
            print(name, f"threshold={threshold}", *(f"{key}={value:.4f}" for key, value in scores))
        print(name, f"precision@1={metrics['precision@1']:.4f}")


if __name__ == "__main__":
    run_script(main)
