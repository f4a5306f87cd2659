"""A baseline on the same files: TF-IDF of character 1- to 3-grams with one-vs-rest LinearSVC.

reads   ./data/train.json, ./data/test.json, ./model/ (run `python train.py` first)
run     python tests/baseline.py    from the repository's root; prints one line for each of the two
"""

import json
import sys
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import accuracy_score, f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import MultiLabelBinarizer
from sklearn.svm import LinearSVC

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import predict
from data_preprocess import run_script

train_path = "./data/train.json"
test_path = "./data/test.json"


def read(path):
    """Return (texts, labels) of a data file."""
    examples = [json.loads(line) for line in open(path, encoding="utf-8")]
    return [example["text"] for example in examples], [example["label"] for example in examples]


def compare(train_path, test_path):
    """Return {name: (accuracy, micro F1, macro F1)} on the test file, of the baseline and the model."""
    (train_texts, train_labels), (test_texts, test_labels) = read(train_path), read(test_path)
    binarizer = MultiLabelBinarizer().fit(train_labels)
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3))
    classifier = OneVsRestClassifier(LinearSVC()).fit(
        vectorizer.fit_transform(train_texts), binarizer.transform(train_labels)
    )
    predicted = {
        "tfidf_linear_svc": classifier.predict(vectorizer.transform(test_texts)),
        "this_project": binarizer.transform(predict.predict(test_texts)),
    }
    truth = binarizer.transform(test_labels)
    return {name: scores(truth, labels) for name, labels in predicted.items()}


def scores(truth, predicted):
    """Return (accuracy, micro F1, macro F1) of two matrices (N, C) of 0 and 1."""
    micro, macro = (
        f1_score(truth, predicted, average=average, zero_division=0) for average in ("micro", "macro")
    )
    return accuracy_score(truth, np.asarray(predicted)), micro, macro


def main():
    """Print a line for each."""
    for name, (accuracy, micro, macro) in compare(train_path, test_path).items():
        print(f"{name} accuracy={accuracy:.4f} micro_f1={micro:.4f} macro_f1={macro:.4f}")


if __name__ == "__main__":
    run_script(main)
