import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, hamming_loss, ndcg_score
from sklearn.metrics import precision_recall_fscore_support
from torch.utils.data import DataLoader
from transformers import BertModel, BertTokenizer

import bert_multilabel_cls
import data_helper
import data_preprocess
import train
from bert_multilabel_cls import BertMultiLabelCls
from conftest import EXAMPLES, as_predictions, finish, root, start, write_jsonl
from data_helper import MultiClsDataSet
from data_preprocess import InputError

LABEL2IDX = {"中超": 0, "体育": 1, "股市": 2, "财经": 3}


@pytest.fixture
def dataset(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.json", EXAMPLES)
    return MultiClsDataSet(path, max_len=16, tokenizer=tokenizer, label2idx=LABEL2IDX)


def test_tensors_mean_what_their_names_say(dataset):
    # [CLS] 中 超 开 赛 [SEP], then padding to the longest text, 8 characters and 2
    assert dataset.input_ids[0].tolist() == [2, 5, 6, 11, 12, 3, 0, 0, 0, 0]
    assert dataset.attention_mask[0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert dataset.token_type_ids[0].tolist() == [0] * 10
    assert dataset.labels.tolist()[:2] == [[1, 1, 0, 0], [0, 0, 1, 1]] and dataset.labels[5].sum() == 0
    assert dataset.labels.dtype == torch.float32 and dataset.labels.shape == (6, 4)
    assert {t.dtype for t in (dataset.input_ids, dataset.attention_mask, dataset.token_type_ids)} == {
        torch.int64
    }
    assert dataset.class_num == 4 and dataset.max_len == 16 and len(dataset) == 6


@pytest.mark.parametrize("num_labels, per_text", [(1, 1), (5, 5), (300, 4), (10_000, 3)])
def test_labels_are_kept_sparse_and_handed_out_dense(tokenizer, num_labels, per_text):
    """As a matrix, by one index, by a list and by a slice; texts without labels, and labels given twice."""
    chance = random.Random(num_labels)
    label2idx = {f"label {n}": n for n in range(num_labels)}
    chosen = [chance.choices(range(num_labels), k=chance.randint(0, per_text)) for _ in range(50)]
    chosen[3], chosen[-1] = [], []
    examples = [("中超", [f"label {n}" for n in columns]) for columns in chosen]
    dataset = MultiClsDataSet(None, 8, None, tokenizer, label2idx, 0, examples)
    expected = torch.zeros(50, num_labels)
    for row, columns in enumerate(chosen):
        expected[row, columns] = 1
    assert torch.equal(dataset.labels, expected)
    assert torch.equal(dataset.label_counts, expected.sum(0).long())
    for item in (0, 3, -1, [7, 3, 49, 7], [3], slice(10, 20), slice(None)):
        assert torch.equal(dataset[item][3], expected[item])
    assert dataset.label_ids.dtype == torch.int32 and len(dataset.label_ids) == expected.sum()


def test_no_text_may_have_a_label(tokenizer):
    dataset = MultiClsDataSet(None, 8, None, tokenizer, {"a": 0, "b": 1}, 0, [("中超", []), ("股市", [])])
    assert dataset.labels.tolist() == [[0, 0], [0, 0]] and dataset.label_counts.tolist() == [0, 0]


def test_an_item_is_ids_mask_types_labels(dataset):
    ids, mask, types, labels = dataset[1]
    assert torch.equal(ids, dataset.input_ids[1]) and torch.equal(mask, dataset.attention_mask[1])
    assert torch.equal(types, dataset.token_type_ids[1]) and torch.equal(labels, dataset.labels[1])
    assert mask.sum() == 6 and types.sum() == 0
    assert all(torch.equal(a, b) for a, b in zip(dataset[-1], dataset[5]))


def test_encoder_returns_ids_types_mask_labels(dataset, tmp_path):
    ids, types, mask, labels = dataset.encoder(str(tmp_path / "a.json"))
    assert torch.equal(ids, dataset.input_ids) and torch.equal(types, torch.zeros_like(ids))
    assert torch.equal(mask, (ids != 0).long()) and torch.equal(labels, dataset.labels)


def test_plain_data_loader_works(dataset):
    batches = list(DataLoader(dataset, batch_size=4))
    assert [[tuple(t.shape) for t in batch] for batch in batches] == [
        [(4, 10), (4, 10), (4, 10), (4, 4)],
        [(2, 10), (2, 10), (2, 10), (2, 4)],
    ]


def test_defaults_come_from_the_constants(project):
    dataset = MultiClsDataSet("./data/train.json")
    assert dataset.label2idx == LABEL2IDX and dataset.max_len == 128
    assert dataset.tokenizer.tokenize("中超") == ["中", "超"]


def test_long_texts_lose_their_end(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.json", [("中超股市今日", [])])
    dataset = MultiClsDataSet(path, max_len=5, tokenizer=tokenizer, label2idx=LABEL2IDX)
    assert dataset.input_ids.tolist() == [[2, 5, 6, 7, 3]]


def test_an_unknown_label_names_file_line_and_remedy(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.json", [("a", ["体育"]), ("a", ["体育", "足球"])])
    with pytest.raises(InputError, match=r"a.json:2: the label '足球' is not in .*python data_preprocess.py"):
        MultiClsDataSet(path, tokenizer=tokenizer, label2idx=LABEL2IDX)


def test_a_missing_label_index_names_the_remedy(tmp_path, tokenizer):
    with pytest.raises(InputError, match="run: python data_preprocess.py"):
        MultiClsDataSet("a.json", tokenizer=tokenizer, label2idx_path=str(tmp_path / "none.json"))


def encode(tokenizer, texts, max_len=128, keep_tail=0):
    """Return a dataset of texts without labels."""
    examples = [(text, ()) for text in texts]
    return MultiClsDataSet(None, max_len, None, tokenizer, LABEL2IDX, keep_tail, examples)


def tokens_of(dataset, row):
    """Return the tokens of a text, without padding."""
    ids = dataset.input_ids[row, : dataset.lengths[row]]
    return dataset.tokenizer.convert_ids_to_tokens(ids.tolist())


@pytest.mark.parametrize("max_len", [-1, 0, 2, 8.0, "8"])
def test_max_len_must_leave_room_for_text(tokenizer, max_len):
    with pytest.raises(InputError, match="max_len = "):
        encode(tokenizer, ["中"], max_len)


@pytest.mark.parametrize("text", ["", "😀", "龘" * 50, "中" * 100_000, "\x00\u200b"])
def test_odd_texts_are_encoded(tokenizer, text):
    dataset = encode(tokenizer, [text, "中超"], 16)
    tokens = tokens_of(dataset, 0)
    assert 2 <= len(tokens) <= 16 and tokens[0] == "[CLS]" and tokens[-1] == "[SEP]"
    assert dataset.num_truncated == (len(text) >= 50)


@pytest.mark.parametrize("chunk", [1, 2, 6, 1000])
def test_tokens_are_those_of_the_tokenizer_in_any_chunks(tokenizer, monkeypatch, chunk):
    monkeypatch.setattr(data_helper, "tokenize_chunk_size", chunk)
    texts = [text for text, _ in EXAMPLES] + ["中" * 5000]  # with which a chunk of 1 or 2 is full
    dataset = encode(tokenizer, texts, 7)
    expected = tokenizer(texts, padding=True, truncation=True, max_length=7, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(getattr(dataset, name), expected[name]), name


@pytest.mark.parametrize(
    "length, keep_tail, kept",
    [
        (6, 0, "中超股市"),
        (6, 1, "中超股分"),
        (6, 3, "中球得分"),
        (6, 4, "门球得分"),
        (12, 4, "中超股市今日门球得分"),
        (13, 4, None),
    ],
)
def test_of_a_longer_text_start_and_end_are_kept(tokenizer, length, keep_tail, kept):
    text = "中超股市今日大门球得分"
    dataset = encode(tokenizer, ["中", text], length, keep_tail)
    assert tokens_of(dataset, 1) == ["[CLS]", *(kept or text), "[SEP]"]
    assert dataset.lengths.tolist() == [3, min(length, 13)] and dataset.num_truncated == (kept is not None)


@pytest.mark.parametrize("keep_tail", [-1, 5, 1.0, "2"])
def test_keep_tail_must_fit_into_max_len(tokenizer, keep_tail):
    with pytest.raises(InputError, match=f"keep_tail = {keep_tail!r}: must be an integer, from 0 to 4"):
        encode(tokenizer, ["中"], 6, keep_tail)


def test_the_end_of_a_text_of_10_mb_is_seen_without_tokenizing_it_whole(tokenizer):
    start_time = time.perf_counter()
    dataset = encode(tokenizer, ["中" + "大" * 3_400_000 + "球门"], 8, 2)
    assert tokens_of(dataset, 0) == ["[CLS]", *"中大大大球门", "[SEP]"]
    assert time.perf_counter() - start_time < 2


def test_a_dataset_counts_the_texts_that_it_truncates(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.json", [("中超股市", []), ("中超股市今", []), ("中超股市今日", [])])
    dataset = MultiClsDataSet(path, 6, tokenizer=tokenizer, label2idx=LABEL2IDX, keep_tail=1)
    assert dataset.num_truncated == 2
    assert dataset.input_ids[:, 4].tolist() == tokenizer.convert_tokens_to_ids(["市", "今", "日"])


def test_padding_is_the_pad_token_of_the_tokenizer():
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "中", "超", "[PAD]"]
    tokenizer = BertTokenizer(vocab={token: idx for idx, token in enumerate(vocabulary)})
    dataset = encode(tokenizer, ["中超", "中"])
    assert dataset.input_ids.tolist() == [[1, 4, 5, 2], [1, 4, 2, 6]]
    assert dataset.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_a_list_as_index_is_a_batch_padded_to_its_own_longest_text(dataset):
    short, long = dataset[[0, 1, 5]], dataset[[4]]
    assert [tuple(t.shape) for t in short] == [(3, 6), (3, 6), (3, 6), (3, 4)]
    assert [tuple(t.shape) for t in long] == [(1, 10), (1, 10), (1, 10), (1, 4)]
    assert torch.equal(short[0][1], dataset.input_ids[1, :6]) and torch.equal(short[3][1], dataset.labels[1])
    assert {t.dtype for t in short[:3]} == {torch.int64} and short[3].dtype == torch.float32


@pytest.mark.parametrize("multiple, longest", [(1, 6), (4, 8), (8, 8), (12, 12), (32, 16)])  # max_len is 16
def test_lengths_may_be_rounded_up(dataset, multiple, longest):
    dataset.pad_to_multiple_of = multiple
    ids, mask, _, _ = dataset[[0, 1]]
    assert ids.shape == (2, longest) and mask.sum() == 12


def watch_batches(monkeypatch):
    """Return two lists that take the ids (B, T) of each batch: in training, and in evaluation."""
    seen, real = {True: [], False: []}, BertMultiLabelCls.forward

    def forward(self, input_ids, attention_mask, token_type_ids):
        seen[self.training].append(
            [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask)]
        )
        return real(self, input_ids, attention_mask, token_type_ids)

    monkeypatch.setattr(BertMultiLabelCls, "forward", forward)
    return seen[True], seen[False]


def number_text(n):
    """Return a text of its own for each n, n // 40 + 5 characters long."""
    return "".join("中超股市"[n // 4**digit % 4] for digit in range(5)) + "今" * (n // 40)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_evaluation_sees_every_text_once_longest_first(project, monkeypatch, batch_size):
    _, batches = watch_batches(monkeypatch)
    model = BertMultiLabelCls(None, 4)
    monkeypatch.setattr(train, "batch_size", batch_size)
    bert_multilabel_cls.save_model(
        model, BertTokenizer.from_pretrained(bert_multilabel_cls.pretrained_model), LABEL2IDX, "./model"
    )
    write_jsonl("data/dev.json", EXAMPLES * 10)
    train.test("./model", "./data/dev.json")
    assert (len(batches) > 1) == (batch_size < 8)
    lengths = [len(ids) for batch in batches for ids in batch]
    assert lengths == sorted(lengths, reverse=True) and max(map(len, batches)) <= 8 * batch_size
    texts = MultiClsDataSet("./data/dev.json")
    assert sorted(ids for batch in batches for ids in batch) == sorted(
        row[:length].tolist() for row, length in zip(texts.input_ids, texts.lengths)
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_of_an_evaluation_have_as_many_tokens_as_those_of_128_tokens(world_size):
    """Up to 8 times as many short texts; batch_size of the long ones, or with many labels."""
    for max_length in (1, 20, 128, 512):
        generator = torch.Generator().manual_seed(max_length)
        lengths = torch.randint(0, max_length + 1, (1000,), generator=generator)
        few, many = (SimpleNamespace(lengths=lengths, class_num=number) for number in (128, 1024))
        assert all(len(batch) == 4 for batch in data_helper.eval_dataloader(many, 4).sampler)
        loaders = [data_helper.eval_dataloader(few, 4, "cpu", rank, world_size) for rank in range(world_size)]
        batches = [batch for loader in loaders for batch in loader.sampler]
        assert sorted(i for batch in batches for i in batch) == list(range(1000))
        full = [batch for batch in batches if lengths[batch].min() > lengths.min()]
        for batch in full:
            longest = int(lengths[batch].max())
            assert 4 <= len(batch) <= 32 and len(batch) * longest <= 4 * max(longest, 128)
            assert len(batch) == 32 or (len(batch) + 1) * longest > 4 * 128


def test_an_epoch_holds_every_text_once_in_batches_of_similar_length(project, monkeypatch):
    """Another order in each epoch and with each seed; long batches do not all come first."""
    monkeypatch.setattr(data_helper, "mega_batch_mult", 25)
    write_jsonl("data/train.json", [(number_text(n), ["体育"]) for n in range(200)])
    batches, _ = watch_batches(monkeypatch)
    for name, value in dict(batch_size=8, epochs=2).items():
        monkeypatch.setattr(train, name, value)
    train.train()
    first, second = batches[:25], batches[25:]
    for epoch in (first, second):
        assert len({tuple(ids) for batch in epoch for ids in batch}) == 200 and {*map(len, epoch)} == {8}
        spread = [max(map(len, batch)) - min(map(len, batch)) for batch in epoch]
        assert sum(spread) / len(spread) < 1  # at random it is 3
        longest = [max(map(len, batch)) for batch in epoch]
        assert longest != sorted(longest, reverse=True)
    assert first != second
    batches.clear()
    train.train()
    assert batches[:25] == first
    batches.clear()
    monkeypatch.setattr(train, "seed", 7)
    train.train()
    assert batches[:25] not in (first, second)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_each_step_is_the_mean_over_its_texts(project, tmp_path, encoder_folder, processes, accumulation):
    """19 texts in batches of 6: one batch holds a single text, of which the other processes get none.

    The gradient of the classifier's bias is then the mean of probability − label, whatever was done before.
    """
    write_jsonl("data/train.json", [(number_text(n), ["体育", "股市"][: n % 3]) for n in range(19)])
    code = f"""
import json, os, torch, train, bert_multilabel_cls
bert_multilabel_cls.pretrained_model = {encoder_folder!r}
constants = dict(device="cpu", precision="fp32", epochs=1, batch_size={6 // processes}, max_len=16, lr=0.0,
                 min_steps=0, tensorboard_name="", dropout=0.0, max_grad_norm=0,
                 accumulation_steps={accumulation})
for name, value in constants.items():
    setattr(train, name, value)
seen, real_forward = [], bert_multilabel_cls.BertMultiLabelCls.forward
def forward(self, *inputs):
    probs = real_forward(self, *inputs)
    if self.training:
        seen.append([inputs[0].tolist(), probs.detach().tolist()])
        self.train(False)
        probs = real_forward(self, *inputs)  # without the encoder's dropout
        self.train(True)
        seen[-1][1] = probs.detach().tolist()
    return probs
bert_multilabel_cls.BertMultiLabelCls.forward = forward
steps, real_step = [], torch.optim.AdamW.step
def step(self, *arguments, **options):
    [bias] = [p for group in self.param_groups for p in group["params"] if p.shape == (4,)]
    steps.append([list(seen), bias.grad.tolist()])
    seen.clear()
    return real_step(self, *arguments, **options)
torch.optim.AdamW.step = step
train.run_script(train.train)
json.dump(steps, open("steps" + os.environ.get("RANK", "0"), "w", encoding="utf-8"))
"""
    exit_code, _, err = finish(start(code, processes))
    assert exit_code == 0, err
    dataset = MultiClsDataSet("./data/train.json", 16)
    labels = {
        tuple(row[:n].tolist()): y for row, n, y in zip(dataset.input_ids, dataset.lengths, dataset.labels)
    }
    ranks = [data_preprocess.load_json(f"steps{rank}") for rank in range(processes)]
    total, texts = 0, set()
    for parts in zip(*ranks):
        errors = {}
        for seen, _ in parts:
            for ids, probs in seen:
                for row, prob in zip(ids, probs):
                    text = tuple(token for token in row if token)
                    errors[text] = torch.tensor(prob) - labels[text]
        total += len(errors)
        texts |= errors.keys()
        mean = torch.stack([*errors.values()]).mean(0) / 4  # BCELoss is the mean over the labels too
        for _, gradient in parts:
            torch.testing.assert_close(torch.tensor(gradient), mean, atol=1e-6, rtol=1e-4)
    assert total == len(texts) == 19 and {*map(len, ranks)} == {-(-4 // accumulation)}


@pytest.mark.skipif(sys.platform == "win32", reason="measures with the resource module")
def test_a_large_file_is_read_fast_and_kept_small(tmp_path, encoder_folder):
    """In its own process, for the peak: 4 bytes a token and a label that is there, of 10,000, half on top."""
    labels = [f"标签{n}" for n in (7, 99, 1234, 5678, 9999)]
    path = write_jsonl(
        tmp_path / "a.json", [("中超股市今日开赛大涨球" * 5, labels)] * 40_000
    )  # 55 characters
    measure = f"""
import resource, time, data_helper
from data_helper import MultiClsDataSet, BertTokenizer
tokenizer = BertTokenizer.from_pretrained({encoder_folder!r})
labels = {{f"标签{{n}}": n for n in range(10_000)}}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
MultiClsDataSet(None, 128, tokenizer=tokenizer, label2idx=labels, examples=[("中超", [])])  # the tokenizer
before, start = peak(), time.perf_counter()
dataset = MultiClsDataSet({path!r}, 128, tokenizer=tokenizer, label2idx=labels)
seconds = time.perf_counter() - start
kept = sum(t.numel() * t.element_size() for t in vars(dataset).values() if hasattr(t, "numel"))
print(kept, peak() - before, len(dataset) / seconds)
"""
    run = subprocess.run(
        [sys.executable, "-c", measure], cwd=root, capture_output=True, text=True, check=True
    )
    kept, peak, speed = map(float, run.stdout.split())
    assert kept == 40_000 * (57 * 4 + 5 * 4 + 3 * 8) + 8 and peak < 1.5 * kept
    assert speed > 2000  # one thread of a busy machine; README has what two cores do


def test_a_large_batch_costs_little_more_than_a_small_one(dataset):
    """It is one index operation: 500 times the texts take far less than 500 times the time."""

    def seconds(batch):
        start = time.perf_counter()
        for _ in range(20):
            dataset[batch]
        return time.perf_counter() - start

    dataset[[0]]
    assert min(seconds([1] * 500) for _ in range(3)) < 50 * min(seconds([1]) for _ in range(3))


TRUTH = [["a"], ["a", "b"], ["b"], []]
PROBS = [[0.9, 0.6, 0.1], [0.3, 0.8, 0.1], [0.2, 0.4, 0.1], [0.1, 0.1, 0.1]]


def train_with_probs(monkeypatch, truth, probs, names=("a", "b", "c"), min_label_support=2):
    """Train for one epoch, with these labels and probabilities on dev and test; return metrics.json."""
    write_jsonl("data/train.json", [("中", list(names)), ("超", [])])
    for name in ("dev", "test"):
        write_jsonl(f"data/{name}.json", [(number_text(n), labels) for n, labels in enumerate(truth)])
    data_preprocess.preprocess("./data/train.json", "./data/label2idx.json")
    real = train.dev

    def dev(model, dataloader, criterion, return_predictions=False):
        loss, _ = real(model, dataloader, criterion)
        acc = train.get_acc_score(dataloader.dataset.labels, torch.tensor(probs))
        predictions = as_predictions(dataloader.dataset.labels, probs)
        return (loss, acc, predictions) if return_predictions else (loss, acc)

    monkeypatch.setattr(train, "dev", dev)
    for name, value in dict(epochs=1, min_label_support=min_label_support).items():
        monkeypatch.setattr(train, name, value)
    train.train()
    return data_preprocess.load_json("model/metrics.json")


def matrix(truth, names=("a", "b", "c")):
    """Return the labels as a matrix of 0 and 1."""
    return [[int(name in labels) for name in names] for labels in truth]


def test_metrics_are_what_scikit_learn_says(project, monkeypatch):
    metrics = train_with_probs(monkeypatch, TRUTH, PROBS)["test"]
    # per label: 1 of 1 right and 1 of 2 found; 1 of 2 right and 1 of 2 found; no example, nothing predicted
    expected = dict(
        accuracy=0.25, hamming_loss=3 / 12, micro_precision=2 / 3, micro_recall=0.5, micro_f1=4 / 7
    )
    expected |= dict(macro_precision=0.5, macro_recall=1 / 3, macro_f1=(2 / 3 + 1 / 2 + 0) / 3)
    expected["samples_f1"] = (2 / 3 + 2 / 3 + 0 + 0) / 4
    assert metrics["at_0.5"] == pytest.approx(expected)
    truth, predicted = matrix(TRUTH), [[int(p > 0.5) for p in row] for row in PROBS]
    for average in ("micro", "macro"):
        assert metrics["at_0.5"][f"{average}_f1"] == pytest.approx(
            f1_score(truth, predicted, average=average, zero_division=0)
        )
    columns = [*precision_recall_fscore_support(truth, predicted, zero_division=0), map(sum, zip(*predicted))]
    for name, *row in zip("abc", *columns):
        assert list(metrics["by_label"][name].values()) == pytest.approx(row)


def random_matrices(num_texts, num_labels, seed, ties=False):
    """Return labels and probabilities (N, C): labels without examples, texts without labels, rare ones."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.linspace(0, 0.4, num_labels) if num_labels > 1 else torch.tensor([0.3])
    labels = (torch.rand(num_texts, num_labels, generator=generator) < shares).float()
    logits = torch.randn(num_texts, num_labels, generator=generator) * 2 - 3 + 3 * labels
    probs = logits.sigmoid()
    return labels, (probs * 50).round() / 50 if ties else probs


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("num_labels", [1, 2, 7, 300])
def test_scores_of_the_entries_kept_are_those_of_the_matrices(num_labels, ties):
    labels, probs = random_matrices(200, num_labels, num_labels, ties)
    predictions = as_predictions(labels, probs)
    thresholds = torch.rand(num_labels, generator=torch.Generator().manual_seed(0)) * 0.95 + 0.05
    for threshold in (0.05, 0.3, 0.5, thresholds):
        by_column = torch.as_tensor(threshold).expand(num_labels)[predictions.columns]
        metrics = data_helper.compute_metrics(predictions, predictions.probs > by_column)
        predicted, options = (probs > torch.as_tensor(threshold)).int(), {"zero_division": 0}
        averages = ("micro", "macro", "samples")
        if num_labels > 1:
            expected = [f1_score(labels, predicted, average=average, **options) for average in averages]
        else:  # of one column scikit-learn makes two classes
            expected = [f1_score(labels, predicted, **options)] * 2 + [(labels * predicted).mean().item()]
        found = [metrics[f"{average}_f1"] for average in averages]
        assert found == pytest.approx(expected), threshold
        assert metrics["accuracy"] == accuracy_score(labels, predicted)
        assert metrics["hamming_loss"] == pytest.approx(hamming_loss(labels, predicted))


def report(predictions, threshold=0.5):
    """Return the metrics of predictions with one threshold."""
    names = [f"{column}" for column in range(predictions.num_labels)]
    thresholds = {"single": threshold, "by_label": dict.fromkeys(names, threshold)}
    return data_helper.metrics_report(predictions, names, thresholds)


@pytest.mark.parametrize("num_labels", [1, 2, 7, 300])
def test_the_order_of_labels_is_measured_as_scikit_learn_does(num_labels):
    labels, probs = random_matrices(200, num_labels, num_labels)
    metrics = report(as_predictions(labels, probs))
    assert [f"precision@{k}" in metrics for k in (1, 3, 5)] == [num_labels >= k for k in (1, 3, 5)]
    for k in (k for k in (1, 3, 5) if k <= num_labels):
        order = probs.argsort(1, descending=True)[:, :k]
        assert metrics[f"precision@{k}"] == pytest.approx(labels.gather(1, order).mean().item())
        if num_labels > 1:  # scikit-learn refuses a single label
            expected = ndcg_score(labels, probs, k=k, ignore_ties=True)
            assert metrics[f"ndcg@{k}"] == pytest.approx(expected)
    assert metrics["labels_without_examples"] == (labels.sum(0) == 0).sum()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("low", [False, True])
def test_average_precision_is_that_of_scikit_learn_or_hardly_less(low, ties):
    """Examples with a probability below 0.05 are placed among the others by bins."""
    labels, probs = random_matrices(300, 40, 1, ties)
    probs = probs.clamp(min=1e-9) * (0.1 if low else 1)
    if not low:
        probs = torch.where(labels > 0, probs.clamp(min=0.051), probs)
    found = data_helper.average_precision(as_predictions(labels, probs))
    assert found[0].isnan() and not found[1:].isnan().any()
    for column in range(1, 40):
        expected = average_precision_score(labels[:, column], probs[:, column])
        slack = 0.03 if low else 1e-6
        assert expected - slack < found[column] < expected + 1e-6


@pytest.mark.parametrize("least", [1, 60, 1000])
def test_the_calibration_error_is_the_mean_gap_between_probability_and_share_of_ten_bins(least):
    labels, probs = random_matrices(300, 40, 2)
    expected, support = {}, labels.sum(0)
    for name, group in (("frequent", support >= least), ("rare", support < least)):
        p, true = probs[:, group].flatten(), labels[:, group].flatten()
        p, true = p[p > 0.05].double(), true[p > 0.05].double()
        bins = [(p >= n / 10) & (p < (n + 1) / 10) for n in range(10)]
        gaps = [len(p[b]) / len(p) * abs(p[b].mean() - true[b].mean()) for b in bins if b.any()]
        expected |= {name: pytest.approx(sum(gaps).item(), abs=1e-6)} if len(p) else {}
    assert data_helper.calibration_error(as_predictions(labels, probs), least) == expected


def test_a_probability_that_is_the_share_of_true_labels_has_no_calibration_error():
    labels = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    probs = torch.tensor([[0.5, 0.75]]).expand(4, 2)
    assert data_helper.calibration_error(as_predictions(labels, probs), 3) == {"frequent": 0.25, "rare": 0}
    assert data_helper.calibration_error(as_predictions(labels, probs * 0.01), 3) == {}


@pytest.mark.parametrize("num_texts", [1, 3])
def test_texts_without_any_label_have_scores_of_0_and_thresholds(num_texts):
    predictions = as_predictions(torch.zeros(num_texts, 3), torch.full((num_texts, 3), 0.3))
    metrics = report(predictions)
    assert metrics["mean_average_precision"] == metrics["precision@1"] == metrics["ndcg@3"] == 0
    assert metrics["labels_without_examples"] == 3 and metrics["at_0.5"]["accuracy"] == 1
    tuned = data_helper.tune_thresholds(predictions, ["0", "1", "2"], 10, "micro_f1")
    assert tuned["recommended"] == "0.5" and tuned["single"] == 0.5
    assert list(data_helper.misclassified([], predictions, [])) == []


def test_entries_of_several_batches_in_any_order_are_those_of_one():
    labels, probs = random_matrices(50, 9, 3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1)).split(7)
    batches = [(probs[indices], labels[indices]) for indices in order]
    sampler = iter([indices.tolist() for indices in order])
    found = data_helper.collect_predictions(batches, 9, torch.nn.BCELoss(), sampler)
    found, expected = data_helper.gather_predictions(found), as_predictions(labels, probs)
    for tensor, other in zip(found[:5], expected[:5]):
        torch.testing.assert_close(tensor, other)
    assert found.sums == pytest.approx(expected.sums) and found.num_texts == expected.num_texts
    loss = torch.nn.BCELoss()(probs, labels).item()
    assert report(found)["loss"] == pytest.approx(loss)


def test_one_label_is_measured_as_that_label(project, monkeypatch):
    truth, probs = [[*{"a"} & {*labels}] for labels in TRUTH], [row[:1] for row in PROBS]
    metrics = train_with_probs(monkeypatch, truth, probs, ("a",))["test"]
    assert (metrics["at_0.5"]["micro_f1"], metrics["at_0.5"]["macro_f1"]) == pytest.approx((2 / 3, 2 / 3))
    assert metrics["by_label"]["a"]["support"] == 2


def best_threshold(truth, probs, all_truth=(), all_probs=(), added=0):
    """Return the thresholds with the best F1, by trying all; of equals those nearest to 0.5.

    added: so many examples, and their share of what is predicted, come from all labels.
    """
    scores = {}
    for percent in range(5, 96):
        found, total = 0, 0
        for labels, values, weight in (
            (truth, probs, 1),
            (all_truth, all_probs, added / max(1, sum(all_truth))),
        ):
            predicted = [p > torch.tensor(percent / 100) for p in torch.tensor(values)]
            found += weight * sum(int(p and t) for p, t in zip(predicted, labels))
            total += weight * (sum(map(int, predicted)) + sum(labels))
        scores[percent / 100] = (round(2 * found / max(1, total), 12), -abs(percent - 50))
    best = max(scores.values())
    return [threshold for threshold, score in scores.items() if score == best]


@pytest.mark.parametrize("seed", range(3))
def test_thresholds_are_those_that_are_best_of_all(project, monkeypatch, seed):
    """Probabilities that stand on thresholds, too; a label without examples, one with too few."""
    generator = torch.Generator().manual_seed(seed)
    names = ("a", "b", "c", "d")
    truth = [
        [name for name, share in zip(names, (0.5, 0.3, 0.1, 0.0)) if r < share]
        for r in torch.rand(30, generator=generator).tolist()
    ]
    probs = (torch.rand(30, 4, generator=generator) * 100).round() / 100
    probs += 0.2 * torch.tensor(matrix(truth, names))
    probs = probs.clamp(max=1).tolist()
    tuned = train_with_probs(monkeypatch, truth, probs, names, min_label_support=5)["thresholds"]
    columns = list(zip(*matrix(truth, names)))
    flat = [value for row in matrix(truth, names) for value in row]
    flat_probs = [p for row in probs for p in row]
    assert tuned["single"] in best_threshold(flat, flat_probs)
    for column, threshold, values in zip(columns, tuned["by_label"].values(), zip(*probs)):
        if sum(column) < 5:  # shared with the other rare ones
            rare = [c for c, other in enumerate(columns) if sum(other) < 5]
            column = [value for c in rare for value in columns[c]]
            values = [row[c] for c in rare for row in probs]
        expected = best_threshold(column, list(values), flat, flat_probs, data_helper.average_examples)
        assert threshold in expected


def test_thresholds_are_tuned_for_all_and_for_labels_with_enough_examples(project, monkeypatch):
    metrics = train_with_probs(monkeypatch, TRUTH, PROBS)
    tuned = metrics["thresholds"]
    assert 0.2 <= tuned["by_label"]["a"] < 0.3  # finds both examples of the first label, and no more
    assert tuned["by_label"]["c"] == tuned["single"]  # no example
    assert metrics["dev"]["at_by_label"]["micro_f1"] >= metrics["dev"]["at_0.5"]["micro_f1"]
    assert data_preprocess.load_json("model/config.json")["thresholds"] == tuned
    assert tuned.keys() == {"single", "by_label", "recommended", "cross_validation"}


@pytest.mark.parametrize(
    "shifts, recommended",
    [
        ((0.0, 0.0), "0.5"),  # all do equally well: the simplest
        ((-0.2, -0.2), "single"),
        ((-0.3, 0.15), "by_label"),
    ],
)
def test_recommended_is_what_is_best_on_texts_left_out(shifts, recommended):
    generator = torch.Generator().manual_seed(5)
    labels = (torch.rand(400, 2, generator=generator) < 0.5).float()
    noise = torch.rand(400, 2, generator=generator)
    probs = (0.3 + 0.3 * labels + torch.tensor(shifts) + 0.1 * noise).clamp(0.01, 0.99)
    tuned = data_helper.tune_thresholds(as_predictions(labels, probs), ["a", "b"], 5, "macro_f1")
    scores = tuned["cross_validation"]
    assert tuned["recommended"] == recommended and scores[recommended] == max(scores.values())
    assert scores.keys() == {"0.5", "single", "by_label"}


def test_among_equal_thresholds_the_nearest_to_one_half_is_taken(project, monkeypatch):
    metrics = train_with_probs(monkeypatch, [["a"], []], [[0.9], [0.1]], ("a",), min_label_support=1)
    assert (metrics["thresholds"]["single"], metrics["thresholds"]["by_label"]) == (0.5, {"a": 0.5})


@pytest.mark.parametrize("true, false, threshold", [(0.055, 0.045, 0.05), (0.96, 0.945, 0.95)])
def test_thresholds_are_sought_from_5_to_95_percent(project, monkeypatch, true, false, threshold):
    metrics = train_with_probs(monkeypatch, [["a"], []], [[true], [false]], ("a",), min_label_support=1)
    found = metrics["thresholds"]
    assert (found["single"], found["by_label"]) == (threshold, {"a": threshold})


def test_errors_come_with_the_most_confident_first(project, monkeypatch):
    train_with_probs(monkeypatch, TRUTH, PROBS)
    errors = [json.loads(line) for line in open("model/errors.jsonl", encoding="utf-8")]
    texts = [number_text(n) for n in range(4)]
    rows = [
        (1, {"true": ["a", "b"], "predicted": ["b"], "probability": {"a": 0.3, "b": 0.8}}),
        (0, {"true": ["a"], "predicted": ["a", "b"], "probability": {"a": 0.9, "b": 0.6}}),
        (2, {"true": ["b"], "predicted": [], "probability": {"b": 0.4}}),
    ]
    files = ("./data/dev.json", "./data/test.json")
    places = [({"file": file, "line": n + 1, "text": texts[n]}, row) for file in files for n, row in rows]
    assert errors == [{**place, **row} for place, row in places]


def train_from_scratch(monkeypatch, texts):
    """Train without a hub on these texts, one of which has a label."""
    write_jsonl("data/train.json", [(text, ["体育"][: 1 - n]) for n, text in enumerate(texts)])
    for name in ("dev", "test"):
        shutil.copy("data/train.json", f"data/{name}.json")
    data_preprocess.preprocess("./data/train.json", "./data/label2idx.json")
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", bert_multilabel_cls.default_model)
    monkeypatch.setattr(train, "scratch_epochs", 1)
    monkeypatch.setattr(train, "scratch_lr", 0)  # the encoder in model/ stays what training started from
    train.train()


TEXTS = ["今天股市大涨，股市成交放量", "股市低开 vs 高开 vs 平开", "vs 股市"] * 3


def test_the_scratch_encoder_is_an_ordinary_folder(project, monkeypatch, offline):
    train_from_scratch(monkeypatch, TEXTS)
    tokenizer = BertTokenizer.from_pretrained("model")
    bert = BertModel.from_pretrained("model")
    assert tokenizer.tokenize("股市低放 VS 龘") == ["股市", "低", "放", "vs", "[UNK]"]
    assert bert.config.vocab_size == len(tokenizer) and bert.config.hidden_size == 512
    assert bert.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    "texts", [["a a a"], ["啊 啊"], ["中"], ["你好", "天下"], ["股市大涨" * 100_000], ["", "a b"]]
)
def test_a_scratch_encoder_of_odd_texts_is_finite(project, monkeypatch, offline, texts):
    train_from_scratch(monkeypatch, texts)
    bert = BertModel.from_pretrained("model")
    assert bert.embeddings.word_embeddings.weight.isfinite().all()
    assert len(BertTokenizer.from_pretrained("model")) > 5


def test_words_with_the_same_neighbours_start_with_similar_embeddings(project, monkeypatch, offline):
    """And with the spread of the others, which are random."""
    small = dict(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    monkeypatch.setattr(data_helper, "scratch_config", small)  # fewer dimensions than tokens
    pairs = [("cat eats fish", "dog eats fish"), ("car needs fuel", "bus needs fuel")]
    train_from_scratch(monkeypatch, [text for pair in pairs for text in pair] * 10)
    tokenizer = BertTokenizer.from_pretrained("model")
    embeddings = BertModel.from_pretrained("model").embeddings.word_embeddings.weight
    words = embeddings[tokenizer.convert_tokens_to_ids(["cat", "dog", "car", "bus"])].detach()
    cosines = torch.cosine_similarity(words[:, None], words, dim=-1)
    assert cosines[0, 1] > 0.9 and cosines[2, 3] > 0.9 and cosines[:2, 2:].max() < 0.5
    assert words.std().item() == pytest.approx(0.02, rel=0.5)  # BertConfig's initializer_range


def test_the_scratch_encoder_tells_texts_apart_before_training(project, monkeypatch, offline):
    texts = ["cat eats fish", "fish fears cat", "car needs fuel", "fuel warms car"]
    train_from_scratch(monkeypatch, texts * 10)
    tokenizer, bert = BertTokenizer.from_pretrained("model"), BertModel.from_pretrained("model")
    with torch.no_grad():
        pooled = bert(**tokenizer(texts, return_tensors="pt"))[1]
    pooled -= pooled.mean(0)  # what all share: [CLS], the positions
    cosines = torch.cosine_similarity(pooled[:, None], pooled, dim=-1)
    assert cosines[0, 1] > 0.2 and cosines[2, 3] > 0.2 and cosines[:2, 2:].max() < 0
    assert pooled.std() > 0.05  # a random BERT has 0.02, of which a classifier learns slowly


def test_the_scratch_encoder_is_the_same_under_any_hash_seed(project, tmp_path):
    texts = [
        f"{text}{chr(0x4E00 + n * 37 % 50)}{chr(0x4E00 + n * 13 % 50)}" for n, text in enumerate(TEXTS * 20)
    ]
    write_jsonl("data/train.json", [(text, ["体育"]) for text in texts])
    code = "import sys, train\ntrain.scratch_epochs, train.device, train.scratch_lr = 1, 'cpu', 0\n"
    code += "train.save_model_path = sys.argv[1]\ntrain.train()"
    data_preprocess.preprocess("./data/train.json", "./data/label2idx.json")
    for name in ("dev", "test"):
        write_jsonl(f"data/{name}.json", [("股市", ["体育"])])
    runs, digests = [], []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
        runs.append(subprocess.Popen([sys.executable, "-c", code, seed], env=environment))
    for seed, run in zip(("1", "2"), runs):
        assert run.wait(120) == 0
        files = [file for file in (tmp_path / seed).iterdir() if "token" in file.name or "safe" in file.name]
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    assert digests[0] == digests[1]
    assert {"model.safetensors", "tokenizer.json"} <= digests[0].keys()


def test_the_script_prints_the_tensors_of_the_training_file(project, capsys):
    data_helper.main()
    printed = capsys.readouterr().out
    assert printed.count("tensor(") == 4
