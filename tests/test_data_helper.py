import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from sklearn.metrics import precision_recall_fscore_support
from torch.utils.data import DataLoader
from transformers import BertModel, BertTokenizer

import data_helper
import train
from bert_multilabel_cls import BertMultiLabelCls
from conftest import EXAMPLES, as_predictions, finish, root, script, start, write_jsonl
from data_helper import GroupedBatchSampler, MultiClsDataSet, build_scratch_encoder
from data_helper import eval_dataloader
from data_preprocess import InputError, load_json

LABEL2IDX = {"中超": 0, "体育": 1, "股市": 2, "财经": 3}


@pytest.fixture
def dataset(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.json", EXAMPLES)
    return MultiClsDataSet(path, max_len=16, tokenizer=tokenizer, label2idx=LABEL2IDX)


def encode(tokenizer, texts, max_len=128, **options):
    """Return a dataset of texts with a label."""
    options |= {"examples": [("", text, ["股市"], {}) for text in texts]}
    return MultiClsDataSet(None, max_len, None, tokenizer, LABEL2IDX, **options)


def tokens_of(dataset, row):
    """Return the tokens of a text, without padding."""
    ids = dataset.input_ids[row, : dataset.lengths[row]]
    return dataset.tokenizer.convert_ids_to_tokens(ids.tolist())


def test_tensors_mean_what_their_names_say(dataset):
    # [CLS] 中 超 开 赛 [SEP], then padding to the longest text, 8 characters and 2
    assert dataset.input_ids[0].tolist() == [2, 5, 6, 11, 12, 3, 0, 0, 0, 0]
    assert dataset.attention_mask[0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert dataset.token_type_ids[0].tolist() == [0] * 10
    assert dataset.labels.tolist()[:2] == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert dataset.labels[5].sum() == 0
    assert dataset.labels.dtype == torch.float32 and dataset.labels.shape == (6, 4)
    integers = dataset.input_ids, dataset.attention_mask, dataset.token_type_ids
    assert {t.dtype for t in integers} == {torch.int64}
    assert dataset.class_num == 4 and dataset.max_len == 16 and len(dataset) == 6


@pytest.mark.parametrize("num_labels, per_text", [(1, 1), (5, 5), (300, 4), (10_000, 3)])
def test_labels_are_kept_sparse_and_handed_out_dense(tokenizer, num_labels, per_text):
    """By one index, a list or a slice; texts without labels, and labels given twice."""
    chance = random.Random(num_labels)
    label2idx = {f"label {n}": n for n in range(num_labels)}
    chosen = [chance.choices(range(num_labels), k=chance.randint(0, per_text)) for _ in range(50)]
    chosen[3] = []
    examples = [("", "中超", [f"label {n}" for n in columns], {}) for columns in chosen]
    dataset = MultiClsDataSet(None, 8, None, tokenizer, label2idx, 0, examples)
    expected = torch.zeros(50, num_labels)
    for row, columns in enumerate(chosen):
        expected[row, columns] = 1
    assert torch.equal(dataset.labels, expected)
    assert torch.equal(dataset.label_counts, expected.sum(0).long())
    for item in (0, 3, -1, [7, 3, 49, 7], [3], slice(10, 20), slice(None)):
        assert torch.equal(dataset[item][3], expected[item])
    assert dataset.label_matrix.nnz == expected.sum() and dataset.label_matrix.dtype == bool


def test_an_item_is_ids_mask_types_labels_and_a_list_gives_a_batch_of_its_own_length(dataset):
    whole = dataset.input_ids, dataset.attention_mask, dataset.token_type_ids, dataset.labels
    for item in (1, -1):
        assert all(torch.equal(a, b[item]) for a, b in zip(dataset[item], whole, strict=True))
    for rows, longest in (([0, 1, 5], 6), ([4], 10)):
        *inputs, labels = dataset[rows]
        for tensor, expected in zip(inputs, whole):
            assert torch.equal(tensor, expected[rows, :longest])
        assert torch.equal(labels, dataset.labels[rows]) and labels.dtype == torch.float32


def test_encoder_returns_ids_types_mask_labels(dataset, tmp_path):
    ids, types, mask, labels = dataset.encoder(str(tmp_path / "a.json"))
    assert torch.equal(ids, dataset.input_ids) and torch.equal(types, torch.zeros_like(ids))
    assert torch.equal(mask, (ids != 0).long()) and torch.equal(labels, dataset.labels)


def test_defaults_come_from_the_constants(project, encoder_folder):
    dataset = MultiClsDataSet("./data/train.json")
    assert dataset.label2idx == LABEL2IDX and dataset.max_len == 128
    assert dataset.tokenizer.tokenize("中超") == ["中", "超"]
    code = f"import runpy, bert_multilabel_cls as b; b.pretrained_model = {encoder_folder!r}\n"
    code += f"runpy.run_path({str(root / 'data_helper.py')!r}, run_name='__main__')"
    exit_code, out, err = finish(start(code))
    assert exit_code == 0 and out.count("tensor(") == 4, err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, ["a.json:2: ", "'足球'", "preprocess again"]),
        ({"label2idx": None}, ["none.json: ", "python data_preprocess.py"]),
        *(({"max_len": value}, [f"max_len = {value!r}"]) for value in (-1, 0, 2, 8.0, "8")),
        *(({"keep_tail": value}, [f"keep_tail = {value!r}", "4"]) for value in (-1, 5, 1.0, "2")),
    ],
)
def test_what_cannot_be_encoded_is_said(tmp_path, tokenizer, arguments, words):
    path = write_jsonl(tmp_path / "a.json", [("a", ["体育"]), ("a", ["体育", "足球"])])
    options = {"max_len": 6, "tokenizer": tokenizer, "label2idx": LABEL2IDX}
    options["label2idx_path"] = str(tmp_path / "none.json")
    with pytest.raises(InputError) as error:
        MultiClsDataSet(path, **(options | arguments))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_tokens_are_those_of_the_tokenizer_however_many_texts_there_are(tokenizer):
    texts = [f"{text}{'今' * (n % 7)}" for n in range(150) for text, _ in EXAMPLES] + ["中" * 5000]
    dataset = encode(tokenizer, texts, 7)
    expected = tokenizer(texts, padding=True, truncation=True, max_length=7, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(getattr(dataset, name), expected[name]), name


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, ["中超股市"]),
        ({"keep_tail": 1}, ["中超股分"]),
        ({"keep_tail": 4}, ["门球得分"]),
        ({"windows": True}, ["中超股市", "今日大门", "球得分"]),
    ],
)
def test_of_a_longer_text_start_and_end_are_kept_or_all_in_windows(tokenizer, options, kept):
    text = "中超股市今日大门球得分"
    for max_len, expected in ((6, kept), (13, [text])):
        dataset = encode(tokenizer, ["中", text, ""], max_len, **options)
        parts = [tokens_of(dataset, row)[1:-1] for row in range(len(dataset))]
        assert ["".join(part) for part in parts] == ["中", *expected, ""]
        assert dataset.text_of.tolist() == [0, *[1] * len(expected), 2]
        assert dataset.labels.tolist() == [[0, 0, 1, 0]] * len(parts)


@pytest.mark.parametrize("start, end", [("中", "球门"), (" " * 1_000_000 + "中", "球门\n")])
def test_the_end_of_a_text_of_10_mb_is_seen_without_tokenizing_it_whole(tokenizer, start, end):
    start_time = time.process_time()
    dataset = encode(tokenizer, [start + "大" * 3_400_000 + end], 8, keep_tail=2)
    assert tokens_of(dataset, 0) == ["[CLS]", *"中大大大球门", "[SEP]"]
    assert time.process_time() - start_time < 2


def test_padding_is_the_pad_token_of_the_tokenizer():
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "中", "超", "[PAD]"]
    tokenizer = BertTokenizer(vocab={token: idx for idx, token in enumerate(vocabulary)})
    dataset = encode(tokenizer, ["中超", "中"])
    assert dataset.input_ids.tolist() == [[1, 4, 5, 2], [1, 4, 2, 6]]
    assert dataset.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def sample_lengths(number):
    """Return the lengths of texts of the sample data, shuffled."""
    lines = (root / "data" / "sample" / "train.json").read_text(encoding="utf-8").splitlines()
    lengths = [len(json.loads(line)["text"]) + 2 for line in lines]
    return torch.tensor(random.Random(0).sample(lengths, number))


def epochs_of(lengths, batch_size, count=2, seed=0):
    """Return the batches of each of the first epochs."""
    sampler = GroupedBatchSampler(SimpleNamespace(lengths=lengths), batch_size, seed=seed)
    return [sampler.set_epoch(epoch) or list(sampler) for epoch in range(count)]


def test_seeds_draw_orders_of_their_own():
    epochs = [epoch for seed in range(4) for epoch in epochs_of(sample_lengths(300), 8, 4, seed)]
    assert len({*map(str, epochs)}) == 16


@pytest.mark.parametrize("number, batch_size", [(300, 8), (301, 8), (2000, 16), (5, 8), (1, 1)])
def test_an_epoch_holds_every_text_once_in_an_order_of_its_own(number, batch_size):
    lengths = sample_lengths(number)
    first, second = epochs_of(lengths, batch_size)
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(number))
        sizes = sorted((len(batch) for batch in epoch), reverse=True)
        assert set(sizes[:-1]) <= {batch_size} and sizes[-1] == (number - 1) % batch_size + 1
        longest = [int(lengths[batch].max()) for batch in epoch]
        assert len(epoch) < 30 or longest not in (sorted(longest), sorted(longest, reverse=True))
    assert number < batch_size or number == 1 or first != second
    sampler = GroupedBatchSampler(SimpleNamespace(lengths=lengths), batch_size)
    for first_batch in (0, 3):  # of a resumed run
        sampler.set_epoch(1, first_batch)
        assert list(sampler) == second[first_batch:]


@pytest.mark.parametrize("lengths", [sample_lengths(300), torch.arange(300) * 7 % 120 + 5])
def test_texts_of_similar_length_share_a_batch_and_rarely_the_same_ones_again(lengths):
    """If the whole file is sorted in each epoch, 58 % of the pairs meet again, at random 2 %."""
    epochs = epochs_of(lengths, 8, 10)
    tokens = sum(int(lengths[batch].max()) * len(batch) for epoch in epochs for batch in epoch)
    assert tokens < 1.15 * len(epochs) * lengths.sum()
    pairs = [{p for b in epoch for p in itertools.combinations(sorted(b), 2)} for epoch in epochs]
    shares = [len(one & other) / len(one) for one, other in itertools.pairwise(pairs)]
    assert sum(shares) / len(shares) < 0.15


@pytest.mark.parametrize(
    "processes, accumulation", [(1, 1), (1, 2), (1, 5), (2, 1), (2, 2), (3, 1), (3, 5)]
)
def test_each_step_is_the_mean_over_its_texts(project, encoder_folder, processes, accumulation):
    """19 texts in batches of 6: of the last, a single text, the other processes get none."""
    texts = ["".join("中超股市"[n // 4**k % 4] for k in range(3)) for n in range(19)]
    rows = [(text, ["体育", "股市"][: n % 3]) for n, text in enumerate(texts)]
    write_jsonl("data/train.json", rows)
    constants = dict(batch_size=6 // processes, accumulation_steps=accumulation, max_grad_norm=0)
    run = script(encoder_folder, epochs=1, lr=0.0, dropout=0.0, **constants)
    code = f"""
import json, os, torch, bert_multilabel_cls
seen, real_forward = [], bert_multilabel_cls.BertMultiLabelCls.forward
def forward(self, *inputs):
    if not self.training:
        return real_forward(self, *inputs)
    self.train(False)  # without the encoder's dropout
    probs = real_forward(self, *inputs)
    self.train(True)
    seen.append([inputs[0].tolist(), probs.tolist()])
    return probs
bert_multilabel_cls.BertMultiLabelCls.forward = forward
steps, real_step = [], torch.optim.AdamW.step
def step(self, *arguments, **options):
    [bias] = [p for group in self.param_groups for p in group["params"] if p.shape == (4,)]
    steps.append([list(seen), bias.grad.tolist()])
    seen.clear()
    return real_step(self, *arguments, **options)
torch.optim.AdamW.step = step
{run}
json.dump(steps, open("steps" + os.environ.get("RANK", "0"), "w", encoding="utf-8"))
"""
    exit_code, _, err = finish(start(code, processes))
    assert exit_code == 0, err
    dataset = MultiClsDataSet("./data/train.json", 16)
    labels = dict(zip(map(tuple, dataset.input_ids.tolist()), dataset.labels))
    ranks = [load_json(f"steps{rank}") for rank in range(processes)]
    texts = []
    for parts in zip(*ranks):
        errors = {}
        for row, probs in (pair for seen, _ in parts for batch in seen for pair in zip(*batch)):
            errors[tuple(row)] = torch.tensor(probs) - labels[tuple(row)]
        texts += errors
        mean = torch.stack([*errors.values()]).mean(0) / 4  # BCELoss: the mean over labels too
        for _, gradient in parts:
            torch.testing.assert_close(torch.tensor(gradient), mean, atol=1e-6, rtol=1e-4)
    assert len(texts) == len({*texts}) == 19 and {*map(len, ranks)} == {-(-4 // accumulation)}


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_evaluation_is_that_of_a_plain_data_loader(dataset, encoder_folder, batch_size):
    model = BertMultiLabelCls(None, 4, bert=BertModel.from_pretrained(encoder_folder))
    loaders = eval_dataloader(dataset, batch_size), DataLoader(dataset, batch_size=2)
    found, expected = (train.dev(model, loader, torch.nn.BCELoss(), True) for loader in loaders)
    assert found[:2] == pytest.approx(expected[:2], abs=1e-6)
    torch.testing.assert_close(found[2].probs.toarray(), expected[2].probs.toarray())
    assert np.array_equal(found[2].true.toarray(), dataset.labels.bool().numpy())


@pytest.mark.parametrize("max_len", [16, 128, 512])
def test_batches_of_an_evaluation_have_little_padding_and_the_tokens_of_128(max_len):
    """Up to 8 times as many short texts; batch_size of the long ones, or with many labels."""
    lengths = torch.tensor(random.Random(max_len).choices(range(2, max_len + 1), k=1000))
    few = SimpleNamespace(lengths=lengths, class_num=8, max_len=max_len)
    many = SimpleNamespace(lengths=lengths, class_num=1024, max_len=max_len)
    assert max(map(len, eval_dataloader(many, 4).sampler)) == 4
    shares = [eval_dataloader(few, 4, rank, 3).sampler for rank in range(3)]
    batches, tokens = eval_dataloader(few, 4).sampler, 4 * min(max_len, 128)
    assert sorted(batches) == sorted(itertools.chain(*shares))
    assert sorted(itertools.chain(*batches)) == list(range(1000))
    ends = [int(lengths[i]) for batch in batches for i in (batch[0], batch[-1])]
    assert ends == sorted(ends, reverse=True)  # out of memory at once, or never
    for batch, longest, shortest, following in zip(batches, ends[::2], ends[1::2], ends[2::2]):
        most = min(max(tokens // longest, 4), 32)
        assert len(batch) == 2 or shortest >= 0.9 * longest
        assert len(batch) == most or len(batch) < most and following < 0.9 * longest


NAMES = ("a", "b", "c")
TRUTH = [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]]
PROBS = [[0.9, 0.6, 0.1], [0.3, 0.8, 0.1], [0.2, 0.4, 0.1], [0.1, 0.1, 0.1]]


def report(predictions, threshold=0.5):
    """Return the metrics of predictions with one threshold for all labels."""
    names = [f"{column}" for column in range(predictions.true.shape[1])]
    thresholds = {"single": threshold, "by_label": dict.fromkeys(names, threshold)}
    return data_helper.metrics_report(predictions, names, thresholds)


def random_matrices(num_texts, num_labels, seed, ties=False):
    """Return labels and probabilities (N, C), with labels without examples and rare ones."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.linspace(0, 0.4, num_labels) if num_labels > 1 else torch.tensor([0.3])
    labels = (torch.rand(num_texts, num_labels, generator=generator) < shares).float()
    logits = torch.randn(num_texts, num_labels, generator=generator) * 2 - 3 + 3 * labels
    probs = logits.sigmoid()
    return labels, (probs * 50).round() / 50 if ties else probs


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("num_labels", [1, 2, 7, 600])
def test_metrics_are_what_scikit_learn_says(num_labels, ties):
    labels, probs = random_matrices(200, num_labels, num_labels, ties)
    predictions = as_predictions(labels, probs)
    thresholds = torch.rand(num_labels, generator=torch.Generator().manual_seed(0)) * 0.95 + 0.05
    for threshold in (0.05, 0.3, 0.5, thresholds):
        kept = data_helper.predict_labels(predictions.probs, threshold)
        predicted, options = (probs > torch.as_tensor(threshold)).int(), {"zero_division": 0}
        assert np.array_equal(kept.toarray(), predicted.bool().numpy())
        metrics = data_helper.compute_metrics(predictions.true, kept)
        expected = {"accuracy": accuracy_score(labels, predicted)}
        for average in ("micro", "macro", "samples"):
            average = average if num_labels > 1 else "binary"  # else it makes two classes of one
            expected[f"{average}_f1"] = f1_score(labels, predicted, average=average, **options)
        if num_labels == 1:
            score, found = expected.pop("binary_f1"), (labels * predicted).mean().item()
            expected |= {"micro_f1": score, "macro_f1": score, "samples_f1": found}
        assert metrics == pytest.approx(expected), threshold
    metrics = report(predictions)
    assert metrics["loss"] == pytest.approx(torch.nn.BCELoss()(probs, labels).item())
    for k in (1, 3, 5):
        first = labels.gather(1, probs.topk(min(k, num_labels)).indices).mean().item()
        expected = pytest.approx(first) if k <= num_labels else None
        assert ties or metrics.get(f"precision@{k}") == expected
    predicted = (probs > 0.5).int()
    columns = list(zip(labels.T, predicted.T))
    options = {"average": "binary", "zero_division": 0}
    rows = [*metrics["by_label"].values()]
    for row, (true, chosen) in [*zip(rows, columns, strict=True)][:: num_labels // 20 + 1]:
        expected = *precision_recall_fscore_support(true, chosen, **options)[:3], true.sum()
        assert [*row.values()] == pytest.approx([*map(float, expected), chosen.sum().item()])


def test_texts_without_any_label_have_scores_of_0_and_thresholds():
    predictions = as_predictions(torch.zeros(2, 3), torch.full((2, 3), 0.3))
    metrics = report(predictions)
    assert metrics["precision@1"] == 0
    assert metrics["at_0.5"].pop("accuracy") == 1 and not any(metrics["at_0.5"].values())
    tuned = data_helper.tune_thresholds(predictions, NAMES)
    assert tuned == {"single": 0.5, "by_label": dict.fromkeys(NAMES, 0.5)}
    assert list(data_helper.misclassified([], predictions, NAMES)) == []


def best_thresholds(truth, probs, all_truth, all_probs, added):
    """Return the best of all thresholds for F1, with `added` examples of all labels' share."""
    scores, weight = {}, added / max(1, all_truth.sum())
    for percent in range(5, 96):
        found, total = 0, 0
        for true, p, times in ((truth, probs, 1), (all_truth, all_probs, weight)):
            predicted = p > np.float32(percent / 100)
            found += times * (predicted & true).sum()
            total += times * (predicted.sum() + true.sum())
        scores[percent / 100] = (round(2 * found / max(1, total), 12), -abs(percent - 50))
    return [percent for percent, score in scores.items() if score == max(scores.values())]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("smoothing", [0, 40])
def test_thresholds_are_those_that_are_best_of_all(seed, smoothing):
    """Probabilities that stand on thresholds, too; a label without examples, one with few."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.rand(60, 4, generator=generator) < torch.tensor([0.5, 0.3, 0.1, 0.0])
    probs = (torch.rand(60, 4, generator=generator) * 100).round() / 100 + 0.2 * true
    probs = probs.clamp(max=1)
    tuned = data_helper.tune_thresholds(as_predictions(true, probs), "abcd", smoothing)
    true, probs = true.numpy(), probs.numpy()
    assert tuned["single"] in best_thresholds(true, probs, true, probs, 0)
    for n, threshold in enumerate(tuned["by_label"].values()):
        expected = best_thresholds(true[:, n], probs[:, n], true, probs, smoothing)
        assert threshold in expected, (n, expected)


@pytest.mark.parametrize(
    "true, false, threshold",
    [(0.9, 0.1, 0.5), (0.055, 0.045, 0.05), (0.96, 0.945, 0.95), (0.7, 0.6, 0.6), (0.3, 0.2, 0.29)],
)
def test_thresholds_are_sought_from_5_to_95_percent_the_nearest_to_one_half(true, false, threshold):
    predictions = as_predictions([[1], [0]], [[true], [false]])
    expected = {"single": threshold, "by_label": {"a": threshold}}
    assert data_helper.tune_thresholds(predictions, ["a"]) == expected


def test_errors_come_with_the_most_confident_first():
    rows = [(f"d.csv:{n + 2}", f"text {n}", None, {"id": str(n)}) for n in range(4)]
    errors = list(data_helper.misclassified(rows, as_predictions(TRUTH, PROBS), NAMES))
    place = [("d.csv:3", "text 1"), ("d.csv:2", "text 0"), ("d.csv:4", "text 2")]
    assert [(row["location"], row["text"]) for row in errors] == place
    assert [row["true"] for row in errors] == [["a", "b"], ["a"], ["b"]]
    assert [row["predicted"] for row in errors] == [["b"], ["a", "b"], []]
    assert [row["missed"] for row in errors] == [["a"], [], ["b"]]
    assert [row["false_positives"] for row in errors] == [[], ["b"], []]
    expected = [{"a": 0.3, "b": 0.8}, {"a": 0.9, "b": 0.6}, {"b": 0.4}]
    assert [row["probability"] for row in errors] == expected
    assert [row["id"] for row in errors] == ["1", "0", "2"]


def measure(code):
    """Return the numbers that code prints in a process of its own; peak() is its peak in MB."""
    resource = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000"
    exit_code, out, err = finish(start(f"import resource, time\npeak = lambda: {resource}\n{code}"))
    assert exit_code == 0, err
    return map(float, out.split())


linux = pytest.mark.skipif(sys.platform != "linux", reason="measures as Linux does")


@linux
def test_a_large_file_is_read_fast_and_kept_small(tmp_path, encoder_folder):
    """15,000 texts of 57 tokens, 5 labels of 10,000: 4.2 MB are kept, padded tensors have 20."""
    labels = [f"标签{n}" for n in (7, 99, 1234, 5678, 9999)]
    path = write_jsonl(tmp_path / "a.json", [("中超股市今日开赛大涨球" * 5, labels)] * 15_000)
    code = f"""from data_helper import MultiClsDataSet, BertTokenizer
tokenizer = BertTokenizer.from_pretrained({encoder_folder!r})
labels = {{f"标签{{n}}": n for n in range(10_000)}}
MultiClsDataSet(None, 128, None, tokenizer, labels, 0, [("", "中超", [], {{}})])  # the tokenizer
before, start = peak(), time.process_time()
dataset = MultiClsDataSet({path!r}, 128, None, tokenizer, labels)
print(peak() - before, time.process_time() - start)
start = time.process_time()
for _ in range(10):
    dataset[list(range(500))][0]  # one index operation, no loop over texts
print(time.process_time() - start)"""
    peak, seconds, batch_seconds = measure(code)
    assert peak < 19 and seconds < 10 and batch_seconds < 1


@linux
def test_many_labels_are_evaluated_without_a_matrix_of_texts_and_labels():
    """10,000 × 4,000: one such matrix of float32 has 160 MB."""
    code = """import torch, data_helper as d
def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        columns = torch.randint(4000, (100, 5), generator=generator)
        labels = torch.zeros(100, 4000).scatter_(1, columns, 1)
        yield (0.02 + 0.9 * labels * torch.rand(100, 4000, generator=generator)), labels
next(batches())
before, names = peak(), [str(n) for n in range(4000)]
predictions = d.collect_predictions(batches(), 4000, torch.nn.BCELoss())
start = time.process_time()
tuned = d.tune_thresholds(predictions, names)
metrics = d.metrics_report(predictions, names, tuned)
errors = list(d.misclassified([("", "", None, {})] * 10_000, predictions, names))
print(peak() - before, time.process_time() - start)
print(metrics["at_single"]["micro_f1"], len(errors))"""
    peak, seconds, micro_f1, errors = measure(code)
    assert peak < 120 and seconds < 15 and micro_f1 > 0.9 and errors > 5000


def scratch(texts, seed=0):
    """Return a small BERT and its tokenizer."""
    return build_scratch_encoder([("", text, [], {}) for text in texts], seed)


TEXTS = ["今天股市大涨，股市成交放量", "股市低开 vs 高开 vs 平开", "vs 股市"] * 3


def test_frequent_words_and_characters_are_tokens_of_a_scratch_encoder():
    bert, tokenizer = scratch(TEXTS * 2)
    assert tokenizer.tokenize("股市低放 VS 龘") == ["股市", "低", "放", "vs", "[UNK]"]
    assert bert.config.hidden_size == data_helper.scratch_config["hidden_size"]


ODD_TEXTS = ["a a a"], ["啊 啊"], ["你好", "天下"], ["股市大涨" * 100_000], ["", "a"], ["😀"]


@pytest.mark.parametrize("texts", [*ODD_TEXTS, [""], [" "]])
def test_a_scratch_encoder_of_odd_texts_is_finite(texts):
    bert, tokenizer = scratch(texts)
    assert bert.config.vocab_size == len(tokenizer) >= 5
    inputs = tokenizer([text[:100] for text in texts], return_tensors="pt", padding=True)
    assert bert(**inputs).pooler_output.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in bert.state_dict().values())


def test_the_scratch_encoder_tells_texts_apart_before_training():
    texts = ["cat eats fish", "fish fears cat", "car needs fuel", "fuel warms car"]
    bert, tokenizer = scratch(texts * 10)
    with torch.no_grad():
        pooled = bert.eval()(**tokenizer(texts, return_tensors="pt"))[1]
    pooled -= pooled.mean(0)  # what all share: [CLS], the positions
    cosines = torch.cosine_similarity(pooled[:, None], pooled, dim=-1)
    assert cosines[0, 1] > 0.2 and cosines[2, 3] > 0.2 and cosines[:2, 2:].max() < 0
    assert pooled.std() > 0.05  # a random BERT has 0.02, of which a classifier learns slowly


def digest(seed):
    """Return a hash of the weights and the vocabulary of a scratch encoder."""
    characters = [(chr(0x4E00 + n * 37 % 50), chr(0x4E00 + n * 13 % 50)) for n in range(180)]
    bert, tokenizer = scratch([f"{t}{a}{b}" for t, (a, b) in zip(TEXTS * 20, characters)], seed)
    tensors = [tensor.numpy().tobytes() for tensor in bert.state_dict().values()]
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    return hashlib.sha256(b"".join([*tensors, vocabulary])).hexdigest()


def test_the_scratch_encoder_is_the_same_under_any_hash_seed_and_another_by_seed():
    state = torch.get_rng_state()
    first, other = digest(1), digest(2)
    assert first != other and torch.equal(torch.get_rng_state(), state)
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    paths = os.pathsep.join([str(root), str(root / "tests")])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": paths}
    command = [sys.executable, "-c", "import test_data_helper as t; print(t.digest(1))"]
    run = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert run.returncode == 0 and run.stdout.strip() == first, run.stderr
