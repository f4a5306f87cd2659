"""Texts to tensors, tensors to batches, probabilities to scores; processes; a small encoder from scratch.

reads   a data file, one example a line: {"text": "...", "label": ["...", ...]}
run     python data_helper.py    prints the tensors of ./data/train.json
"""

import atexit
import gc
import math
import os
import re
import sys
from array import array
from collections import Counter
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import AddedToken, BertConfig, BertModel, BertTokenizer
from transformers.trainer_pt_utils import get_length_grouped_indices

import bert_multilabel_cls
from bert_multilabel_cls import atomic_folder, check_truncation, load_pretrained, offline
from data_preprocess import InputError, get_world_size, is_main_process, load_label2idx, log
from data_preprocess import read_examples, run_script

tokenize_chunk_size = 1000  # texts tokenized at a time
max_chars_per_token = 1000  # characters read for each token kept: no need to tokenize 10 MB for one text
mega_batch_mult = 50  # batches whose texts are drawn at random and then sorted by length

threshold_grid = torch.arange(5, 96) / 100  # what thresholds are chosen from
average_examples = 40  # of all labels, added to those of a label when its threshold is chosen
num_folds = 5  # of dev, to see which thresholds hold on other texts
num_bins, first_bin = 64, 427  # of probabilities up to 0.05, by the first 11 bits of a float32: 4 an octave
ranks = (1, 3, 5)  # k of precision@k and nDCG@k

# The small BERT that train.py trains from scratch if bert-base-chinese is missing.
scratch_config = dict(num_hidden_layers=2, hidden_size=512, num_attention_heads=8, intermediate_size=2048)
scratch_vocab_size = 4000  # at most so many words, and so many Chinese n-grams
scratch_min_freq = 8  # of each of these in the texts
scratch_texts = 20_000  # about so many texts are counted,
scratch_max_chars = 512  # each up to this length
scratch_window = 20  # tokens at most this far apart are neighbours
scratch_tokens = 500_000  # at most so many are looked at for that
cjk_pattern = "[\u3400-\u9fff]"  # a Chinese character


class MultiClsDataSet(Dataset):
    """The tokenized examples of a data file: N texts, T tokens of the longest text, C labels.

    input_ids, token_type_ids, attention_mask: (N, T) int64; labels: (N, C) float32, 0 or 1.
    An item is (input_ids, attention_mask, token_type_ids, labels); note that `encoder` returns mask and types
    the other way round. With a list as index an item is a batch, padded to its own longest text.
    tokenizer: by default of `pretrained_model`. label2idx: by default read from label2idx_path. keep_tail:
    tokens kept from the end of a truncated text. examples: (text, labels) pairs in place of a file.
    Stored are the ids, 4 bytes a token, and the columns of the labels that a text has, 4 bytes each:
    label_ids, of all texts end to end; text i has label_ids[label_offsets[i] : label_offsets[i + 1]].
    `labels` makes the matrix anew at each access. lengths: (N,) tokens.
    Raises InputError naming file and line if an example is invalid.
    """

    def __init__(
        self,
        data_path,
        max_len=128,
        label2idx_path="./data/label2idx.json",
        tokenizer=None,
        label2idx=None,
        keep_tail=0,
        examples=None,
    ):
        self.label2idx = load_label2idx(label2idx_path) if label2idx is None else label2idx
        self.class_num = len(self.label2idx)
        self.tokenizer = tokenizer or load_pretrained(BertTokenizer, bert_multilabel_cls.pretrained_model)
        self.max_len, self.keep_tail, self.pad_to_multiple_of = max_len, keep_tail, 1
        encoded = self.encode_file(data_path, examples)
        self.ids, self.lengths, self.num_truncated, self.label_ids, self.label_offsets = encoded
        self.offsets = self.lengths.cumsum(0) - self.lengths

    input_ids = property(lambda self: self[:][0])
    attention_mask = property(lambda self: self[:][1])
    token_type_ids = property(lambda self: self[:][2])
    labels = property(lambda self: self.dense_labels(torch.arange(len(self))))
    label_counts = property(lambda self: torch.bincount(self.label_ids, minlength=self.class_num))

    def encoder(self, data_path):
        """Return (input_ids, token_type_ids, attention_mask, labels) of a data file."""
        other = MultiClsDataSet(data_path, self.max_len, None, self.tokenizer, self.label2idx, self.keep_tail)
        return other.input_ids, other.token_type_ids, other.attention_mask, other.labels

    def encode_file(self, data_path, examples=None):
        """Return (ids, lengths, num_truncated) as `tokenize` does, label_ids and label_offsets."""
        label_ids, label_offsets = array("i"), array("q", [0])

        def iter_texts():
            """Yield each text after adding its labels: no file is held in memory."""
            for *_, text, labels in (
                read_examples(data_path, self.label2idx) if examples is None else examples
            ):
                label_ids.extend(map(self.label2idx.__getitem__, dict.fromkeys(labels)))
                label_offsets.append(len(label_ids))
                yield text

        encoded = tokenize(self.tokenizer, iter_texts(), self.max_len, self.keep_tail)
        label_ids = label_ids or array("i", [0])  # PyTorch takes no empty buffer
        label_ids = torch.frombuffer(label_ids, dtype=torch.int32)[: label_offsets[-1]]
        return *encoded, label_ids, torch.frombuffer(label_offsets, dtype=torch.int64)

    def dense_labels(self, indices):
        """Return the labels (B, C) of the texts `indices` (B,), float32, 0 or 1."""
        starts = self.label_offsets[indices]
        counts = self.label_offsets[indices + 1] - starts
        rows = torch.arange(len(indices)).repeat_interleave(counts)
        places = torch.arange(len(rows)) + (starts - counts.cumsum(0) + counts).repeat_interleave(counts)
        labels = torch.zeros(len(indices), self.class_num, dtype=torch.float32)
        labels[rows, self.label_ids[places].long()] = 1
        return labels

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, item):
        longest, multiple = int(self.lengths.max()), self.pad_to_multiple_of
        if isinstance(item, list):
            longest = min(-int(-self.lengths[item].max() // multiple) * multiple, self.max_len)
        pad_token_id = self.tokenizer.pad_token_id or 0  # None: masked all the same
        tensors = pad_batch(self.ids, self.offsets[item], self.lengths[item], longest, pad_token_id)
        indices = torch.tensor(item) if isinstance(item, list) else torch.arange(len(self))[item]
        labels = self.dense_labels(indices.reshape(-1))
        return *tensors, labels.view(*indices.shape, self.class_num)


def tokenize(tokenizer, texts, max_len, keep_tail=0):
    """Return (ids, lengths, num_truncated): int32, the tokens of all texts end to end; (N,) int64; an int.

    Of a text longer than max_len tokens the first ones are kept, with keep_tail also so many of the last ones
    (Sun et al. 2019, arXiv 1905.05583, section 5.3.1: head and tail is best).
    """
    check_truncation(max_len, keep_tail)
    ids, lengths, num_truncated = array("i"), array("q"), 0
    encode_batch, num_last = batch_encoder(tokenizer)
    head, tail = max_len * max_chars_per_token, keep_tail * max_chars_per_token
    texts = (text if len(text) <= head + tail else text[:head] + text[len(text) - tail :] for text in texts)
    while chunk := next_chunk(texts):
        for kept in encode_batch(chunk):
            if len(kept) > max_len:
                kept = kept[: max_len - keep_tail - num_last] + kept[len(kept) - keep_tail - num_last :]
                num_truncated += 1
            ids.extend(kept)
            lengths.append(len(kept))
    ids, lengths = torch.frombuffer(ids, dtype=torch.int32), torch.frombuffer(lengths, dtype=torch.int64)
    return ids, lengths, num_truncated


def batch_encoder(tokenizer):
    """Return (a function from texts to their ids, how many special tokens it puts last, such as [SEP])."""
    options = {"truncation": False, "padding": False, "verbose": False}
    mask = tokenizer("a", return_special_tokens_mask=True, **options).special_tokens_mask
    num_last = mask[::-1].index(0) if 0 in mask else 1
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # in Python, such as MeCab's
        return lambda texts: tokenizer(texts, **options).input_ids, num_last
    if backend.truncation or backend.padding:  # only then: other threads may be using it
        backend.no_truncation()
        backend.no_padding()
    # The tokenizer itself would convert everything to lists.
    return lambda texts: (encoding.ids for encoding in backend.encode_batch_fast(texts)), num_last


def next_chunk(texts):
    """Return the next tokenize_chunk_size texts of an iterator, or fewer if they are long."""
    chunk, characters = [], 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if len(chunk) == tokenize_chunk_size or characters > 1000 * tokenize_chunk_size:
            break
    return chunk


def pad_batch(ids, offsets, lengths, max_length, pad_token_id):
    """Return (input_ids, attention_mask, token_type_ids), each (B, max_length) int64, in one index operation.

    text      [CLS] 中 超 开 赛 [SEP] [PAD] [PAD]
    mask        1   1  1  1  1    1     0     0
    types       0   0  0  0  0    0     0     0
    """
    columns = torch.arange(max_length)
    mask = columns < lengths[..., None]
    input_ids = ids[(offsets[..., None] + columns).clamp(max=len(ids) - 1)].long()
    return input_ids.masked_fill(~mask, pad_token_id), mask.long(), torch.zeros_like(input_ids)


class GroupedBatchSampler(Sampler):
    """Lists of indices: texts of similar length share a batch, batches come in random order.

    batch_size: texts per process; each process yields its own part of every batch. Call set_epoch first.
    """

    def __init__(self, dataset, batch_size, accumulation_steps=1, seed=0, rank=0, world_size=1):
        self.lengths, self.batch_size = dataset.lengths.tolist(), batch_size * world_size
        self.accumulation_steps, self.seed = accumulation_steps, seed
        self.rank, self.world_size = rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch, first_batch=0):
        """Draw the batches of an epoch; a resumed run skips those before first_batch."""
        generator = torch.Generator().manual_seed(self.seed + epoch + 1)
        indices = get_length_grouped_indices(self.lengths, self.batch_size, mega_batch_mult, generator)
        batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        self.batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        self.first_batch = first_batch

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches[self.first_batch :]:
            yield batch[self.rank :: self.world_size] or batch[:1]  # idle ranks compute a dummy batch

    def loss_weight(self, i):
        """Return the weight of batch i's mean loss that makes an optimizer step the mean over its texts."""
        first = i - i % self.accumulation_steps
        texts_in_step = sum(map(len, self.batches[first : first + self.accumulation_steps]))
        return len(self.batches[i][self.rank :: self.world_size]) * self.world_size / texts_in_step


def eval_dataloader(dataset, batch_size, device="cpu", rank=0, world_size=1):
    """Return a DataLoader over batches sorted by length, of which each process gets its share.

    batch_size: texts of 128 tokens or more. Of shorter ones a batch has as many as make 128 * batch_size
    tokens, at most 8 * batch_size, since small products are slow; with 1,024 labels or more batch_size again.
    """
    order = dataset.lengths.argsort(descending=True, stable=True)  # out of memory at once, or never
    batches, start = [], 0
    while start < len(order):
        longest = int(dataset.lengths[order[start]])
        size = batch_size * 128 // min(max(longest, 16, dataset.class_num // 8), 128)
        batches.append(order[start : start + size].tolist())
        start += size
    batches = batches[rank::world_size]
    return DataLoader(dataset, batch_size=None, sampler=batches, pin_memory=str(device).startswith("cuda"))


class Predictions(NamedTuple):
    """What scores, thresholds and errors of N texts and C labels need, without matrices of N x C.

    texts, columns, probs, true: (E,), an entry for each label of a text that is true or has a probability
    above the lowest threshold. rejected: (bins, C), how many other entries have a probability in each bin.
    sums: {name: sum over the texts} of the loss and of what depends on the order of a text's labels.
    """

    texts: torch.Tensor
    columns: torch.Tensor
    probs: torch.Tensor
    true: torch.Tensor
    rejected: torch.Tensor
    sums: Counter
    num_texts: int
    num_labels: int


def collect_predictions(batches, num_labels, criterion, sampler=None):
    """Return the Predictions of batches (probs, labels), each (B, C).

    sampler: an iterator over the indices of each batch; by default the texts are numbered as they come.
    """
    rejected = torch.zeros(num_bins * num_labels, dtype=torch.int32)
    # Not a list of small tensors: between the large ones of each batch they would leave gaps in the memory.
    buffers, sums, num_texts = (array("i"), array("i"), array("f"), array("b")), Counter(), 0
    for probs, labels in batches:
        texts = next(sampler) if sampler else range(num_texts, num_texts + len(labels))
        true = labels > 0.5
        kept = true | (probs > threshold_grid[0])
        rows, columns = kept.nonzero(as_tuple=True)
        entries = torch.tensor(texts)[rows].int(), columns.int(), probs[kept], true[kept]
        for buffer, values in zip(buffers, entries, strict=True):
            buffer.frombytes(values.numpy().tobytes())
        bins = ((probs.contiguous().view(torch.int32) >> 21) - first_bin).clamp(0, num_bins - 1)
        cells = bins * num_labels + torch.arange(num_labels)
        rejected.scatter_add_(0, cells.flatten(), (~kept).int().flatten())
        sums.update(ranking_sums(probs, labels))
        sums["loss"] += criterion(probs, labels).item() * len(labels)
        num_texts += len(labels)
    dtypes = torch.int32, torch.int32, torch.float32, torch.bool
    entries = [
        torch.frombuffer(buffer or bytearray(4), dtype=dtype)[: len(buffer)]
        for buffer, dtype in zip(buffers, dtypes, strict=True)
    ]
    return Predictions(*entries, rejected.view(num_bins, num_labels), sums, num_texts, num_labels)


def gather_predictions(predictions):
    """Return the Predictions of all processes in one, sorted by text."""
    parts = all_gather_object(predictions)
    *entries, rejected, sums, num_texts, _ = zip(*parts, strict=True)
    entries = [torch.cat(tensors) for tensors in entries]
    order = entries[0].argsort(stable=True)
    total = Counter()
    for part in sums:
        total.update(part)
    entries = [tensor[order] for tensor in entries]
    return Predictions(*entries, sum(rejected), total, sum(num_texts), predictions.num_labels)


def ranking_sums(probs, labels):
    """Return {metric: sum over the texts} of precision@k and nDCG@k; a text without labels counts as 0."""
    k = min(max(ranks), labels.shape[1])
    hits, num_true = labels.gather(1, probs.topk(k).indices).double(), labels.sum(1).long()
    discounts = 1 / torch.arange(2, k + 2).double().log2()
    sums = {}
    for k in (k for k in ranks if k <= labels.shape[1]):
        ideal = discounts.cumsum(0)[num_true.clamp(1, k) - 1]
        sums[f"precision@{k}"] = hits[:, :k].mean(1).sum().item()
        sums[f"ndcg@{k}"] = (hits[:, :k] @ discounts[:k] / ideal).sum().item()
    return sums


def average_precision(predictions):
    """Return the average precision of each label, (C,), as scikit-learn defines it; NaN without examples.

    Below the lowest threshold it is a lower bound: there the others in a bin, a fifth wide, come first.
    """
    bins, columns = predictions.rejected.nonzero(as_tuple=True)
    edges = ((bins + first_bin + 1) * 2**21).int().view(torch.float32).clamp(max=threshold_grid[0])
    probs = torch.cat([predictions.probs, edges])
    sizes = torch.cat([torch.ones_like(predictions.columns), predictions.rejected[bins, columns]])
    true = torch.cat([predictions.true, torch.zeros_like(columns, dtype=torch.bool)])
    columns = torch.cat([predictions.columns, columns])
    order = probs.argsort(descending=True)
    order = order[columns[order].argsort(stable=True)]
    probs, sizes, true, columns = probs[order], sizes[order], true[order], columns[order].long()
    support = torch.bincount(columns[true], minlength=predictions.num_labels)
    found = true.cumsum(0) - (support.cumsum(0) - support)[columns]
    above = sizes.cumsum(0) - columns * predictions.num_texts
    differs = (columns.diff() != 0) | (probs.diff() != 0)
    ends = torch.cat([differs, torch.ones(1, dtype=torch.bool)]).nonzero().flatten()  # of equal probabilities
    last = ends[torch.searchsorted(ends, true.nonzero().flatten())]
    return torch.bincount(columns[true], (found / above)[last], predictions.num_labels) / support


def calibration_error(predictions, min_label_support):
    """Return {"frequent": error, "rare": error}: by how much probabilities miss the share that is true.

    Expected calibration error in ten bins (Guo et al. 2017, arXiv 1706.04599, equation 3), of the entries
    above the lowest threshold: nearly all of N x C are close to 0, and would hide the others. Frequent are
    labels with min_label_support examples. A group without entries is left out.
    """
    _, columns, probs, true, *_ = predictions
    support = torch.bincount(columns[true], minlength=predictions.num_labels)
    shown, frequent = probs > threshold_grid[0], support[columns] >= min_label_support
    errors = {}
    for name, group in (("frequent", shown & frequent), ("rare", shown & ~frequent)):
        bins, gaps = (probs[group] * 10).long().clamp(max=9), probs[group].double() - true[group].double()
        if len(gaps):
            errors[name] = (torch.bincount(bins, gaps).abs().sum() / len(gaps)).item()
    return errors


def confusion_counts(texts, columns, true, predicted, num_texts, num_labels):
    """Return int64 (5, C): support, predicted, true positives, N, exact matches.

    Of the entries (E,) that are true, predicted or both; others do no harm.
    """
    masks = (true, predicted, true & predicted)
    rows = [torch.bincount(columns[mask], minlength=num_labels) for mask in masks]
    exact_matches = num_texts - len(texts[true != predicted].unique())
    return torch.stack([*rows, *(torch.full_like(rows[0], n) for n in (num_texts, exact_matches))])


def precision_recall_f1(support, predicted, true_positives):
    """Return (precision, recall, F1) of counts; 0 where undefined."""
    precision, recall = true_positives / predicted.clamp(min=1), true_positives / support.clamp(min=1)
    return precision, recall, 2 * true_positives / (support + predicted).clamp(min=1)


def metrics_from_counts(counts):
    """Return {metric: value} of confusion_counts. In macro averages labels without examples count as 0."""
    support, predicted, true_positives, texts, exact_matches = counts.double()
    hamming_loss = (support + predicted - 2 * true_positives).sum() / texts.sum()
    metrics = {"accuracy": exact_matches[0] / texts[0], "hamming_loss": hamming_loss}
    micro = precision_recall_f1(support.sum(), predicted.sum(), true_positives.sum())
    macro = [values.mean() for values in precision_recall_f1(support, predicted, true_positives)]
    names = ("precision", "recall", "f1")
    for average, values in (("micro", micro), ("macro", macro)):
        metrics |= dict(zip((f"{average}_{name}" for name in names), values, strict=True))
    return {name: value.item() for name, value in metrics.items()}


def per_label_metrics(counts, names):
    """Return {label: {precision, recall, f1, support, predicted}} of confusion_counts; the last are texts."""
    keys = ("precision", "recall", "f1", "support", "predicted")
    columns = [values.tolist() for values in (*precision_recall_f1(*counts[:3].double()), *counts[:2])]
    rows = zip(*columns, strict=True)
    return {name: dict(zip(keys, row, strict=True)) for name, row in zip(names, rows, strict=True)}


def count_entries(predictions, predicted):
    """Return confusion_counts of Predictions and which of their entries are predicted, (E,) bool."""
    texts, columns, _, true, *_ = predictions
    return confusion_counts(texts, columns, true, predicted, predictions.num_texts, predictions.num_labels)


def compute_metrics(predictions, predicted=None):
    """Return {metric: value} of Predictions; predicted: which entries are, (E,); by default those > 0.5."""
    texts, true = predictions.texts, predictions.true.int()
    predicted = predictions.probs > 0.5 if predicted is None else predicted
    found = torch.bincount(texts, true * predicted, predictions.num_texts)
    total = torch.bincount(texts, true + predicted, predictions.num_texts)
    samples_f1 = (2 * found / total.clamp(min=1)).mean().item()  # 0 for a text with neither
    return metrics_from_counts(count_entries(predictions, predicted)) | {"samples_f1": samples_f1}


def metrics_report(predictions, names, thresholds):
    """Return metrics that need no threshold, at 0.5 and at the tuned thresholds, and by label at 0.5."""
    precision, probs = average_precision(predictions), predictions.probs
    metrics = {name: total / predictions.num_texts for name, total in sorted(predictions.sums.items())}
    metrics["mean_average_precision"] = precision.nanmean().nan_to_num().item()
    metrics["labels_without_examples"] = int(precision.isnan().sum())
    by_label = torch.tensor([thresholds["by_label"][name] for name in names])[predictions.columns]
    metrics["at_0.5"] = compute_metrics(predictions)
    metrics["at_single"] = compute_metrics(predictions, probs > thresholds["single"])
    metrics["at_by_label"] = compute_metrics(predictions, probs > by_label)
    return metrics | {"by_label": per_label_metrics(count_entries(predictions, probs > 0.5), names)}


def tune_thresholds(predictions, names, min_label_support, metric):
    """Return {"single": t, "by_label": {name: t}, "recommended": name, "cross_validation": {name: metric}}.

    For dev only: on the texts they were chosen on, thresholds always look good. So recommended, of "0.5",
    "single" and "by_label", is what has the best metric on texts that were left out of choosing (five folds).
    """
    texts, columns, probs, true, *_ = predictions
    generator = torch.Generator().manual_seed(0)
    folds = (torch.randperm(predictions.num_texts, generator=generator) % num_folds)[texts]
    shape = num_folds, len(threshold_grid) + 1, predictions.num_labels
    keys = (folds * shape[1] + torch.bucketize(probs, threshold_grid)) * shape[2] + columns

    def count_above(keys):
        """Return (folds, 91, C): how many entries are above each threshold."""
        counts = torch.bincount(keys, minlength=math.prod(shape)).view(shape)
        return counts.flip(1).cumsum(1).flip(1)[:, 1:]

    support = torch.bincount(folds[true] * shape[2] + columns[true], minlength=shape[0] * shape[2])
    counts = support.view(num_folds, 1, -1), count_above(keys), count_above(keys[true])
    single, by_label = choose_thresholds(*(count.sum(0) for count in counts), min_label_support)
    pairs = [
        choose_thresholds(*(count.sum(0) - count[fold] for count in counts), min_label_support)
        for fold in range(num_folds)
    ]
    singles, by_labels = map(torch.stack, zip(*pairs, strict=True))
    options = {"0.5": 0.5, "single": singles[folds], "by_label": by_labels[folds, columns]}
    scores = {name: compute_metrics(predictions, probs > t)[metric] for name, t in options.items()}
    single, *by_label = (round(t, 2) for t in (single.item(), *by_label.tolist()))
    thresholds = {"single": single, "by_label": dict(zip(names, by_label, strict=True))}
    return thresholds | {"recommended": max(scores, key=scores.get), "cross_validation": scores}


def choose_thresholds(support, predicted, found, min_label_support):
    """Return (the threshold with the best micro F1, those with the best F1 by label (C,)) of counts (91, C).

    At a tie the nearest to 0.5. The labels with fewer than min_label_support examples share one. To the
    counts of a label, or of these, average_examples of an average label are added: few do not lead astray.
    """

    def best(*counts):
        """Return for each column the threshold with the best F1."""
        f1 = precision_recall_f1(*counts)[2][nearest_first]
        return threshold_grid[nearest_first][f1.numpy().argmax(0)]

    nearest_first = (threshold_grid - 0.5).abs().argsort(stable=True)
    counts = [count.double() for count in (support, predicted, found)]
    totals = [count.sum(1, keepdim=True) for count in counts]
    weight = average_examples / totals[0].clamp(min=1)
    [single] = best(*totals)
    rare = support[0] < min_label_support
    counts = [torch.where(rare, count[:, rare].sum(1, keepdim=True), count) for count in counts]
    return single, best(*(count + weight * total for count, total in zip(counts, totals, strict=True)))


def misclassified(examples, predictions, names):
    """Yield a dict for each (location, text, labels) with a wrong label at 0.5, the most confident first."""
    texts, columns, probs, true, *_ = predictions
    wrong = (probs > 0.5) != true
    order = (probs - true.float()).abs()[wrong].argsort(descending=True, stable=True)
    ends = torch.bincount(texts, minlength=predictions.num_texts).cumsum(0).tolist()
    for i in dict.fromkeys(texts[wrong][order].tolist()):
        span = slice(ends[i - 1] if i else 0, ends[i])
        entries = zip(*(tensor[span].tolist() for tensor in (columns, probs, true)), strict=True)
        entries = [(names[c], prob, is_true) for c, prob, is_true in entries if is_true or prob > 0.5]
        file, _, line = examples[i][0].rpartition(":")
        row = {"file": file, "line": int(line), "text": examples[i][1]}
        row["true"] = [name for name, _, is_true in entries if is_true]
        row["predicted"] = [name for name, prob, _ in entries if prob > 0.5]
        row["probability"] = {name: round(prob, 4) for name, prob, _ in entries}
        yield row


def init_distributed(device):
    """Join the processes that torchrun started and return (rank, world_size); without it (0, 1)."""
    if get_world_size() > 1 and not dist.is_initialized():
        on_gpu, local_rank = str(device).startswith("cuda"), int(os.environ.get("LOCAL_RANK", 0))
        if on_gpu and (str(device) != "cuda" or local_rank >= torch.cuda.device_count()):
            remedy = f'use "cuda" and one GPU per process; this machine has {torch.cuda.device_count()}'
            raise InputError(f"device = {str(device)!r}: {remedy}")
        if on_gpu:
            torch.cuda.set_device(local_rank)
        nccl = on_gpu and dist.is_nccl_available()  # Windows has none
        # A day: the others wait while rank 0 downloads an encoder, or labels its part of a file.
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timedelta(days=1))
        atexit.register(destroy_distributed)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def destroy_distributed():
    """Leave the process group. DistributedDataParallel has to go first: with gloo, torch 2.13 can hang."""
    gc.collect()
    dist.destroy_process_group()


def all_reduce(tensor, operation="SUM"):
    """Return the sum of a tensor over all processes, or the "MAX"."""
    if dist.is_initialized():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def broadcast_object(function):
    """Return in all processes what function() returns in rank 0, which alone calls it."""
    values = [function() if is_main_process() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def all_gather_object(value):
    """Return the list of the values of all processes."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def exit_if_stopped(signals, resume, **where):
    """Exit with 128 + the number of a signal that any process has got, and say how to go on from `where`."""
    if number := int(all_reduce(torch.tensor(max(signals, default=0)), "MAX")):
        remedy = "" if resume else "set resume = True and "
        log("stopped", f"{remedy}run the same command again to resume;", **where)
        sys.exit(128 + number)


def build_scratch_encoder(texts, folder, seed=0):
    """Write a small untrained BERT with a vocabulary of `texts` to `folder`, always the same for a seed."""
    texts = [text[:scratch_max_chars] for text in texts[:: max(1, len(texts) // scratch_texts)]]
    tokenizer = scratch_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bert = BertModel(BertConfig(vocab_size=len(tokenizer), **scratch_config))
        token_ids = tokenizer(texts, add_special_tokens=False).input_ids
        token_ids = token_ids[:: 1 + sum(map(len, token_ids)) // scratch_tokens]
        init_embeddings_ppmi(bert.embeddings.word_embeddings.weight, token_ids)
        init_bag_of_words(bert)
    with atomic_folder(folder) as path, offline():
        bert.save_pretrained(path)
        tokenizer.save_pretrained(path)


def scratch_tokenizer(texts):
    """Return a BertTokenizer with the characters, frequent words and frequent Chinese n-grams of `texts`.

    BERT's own splits Chinese into characters. Without pretraining a network learns 股市 from far fewer
    texts if it is one token, so the n-grams are added tokens; elsewhere a character is still a token.
    """
    backend = BertTokenizer().backend_tokenizer
    words = Counter()
    for text in texts:
        pieces = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
        words.update(word for word, _ in pieces)
    characters = Counter(character for word in words.elements() for character in word)
    # A character seen once becomes [UNK], so that the network learns an embedding for unknown ones.
    singles = sorted(character for character, count in characters.items() if count > 1) or sorted(characters)
    suffixes = [f"##{character}" for character in singles if not re.match(cjk_pattern, character)]
    frequent_words = top_tokens({word: count for word, count in words.items() if len(word) > 1})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *singles, *suffixes, *frequent_words]
    tokenizer = BertTokenizer(vocab={token: idx for idx, token in enumerate(dict.fromkeys(vocabulary))})
    tokenizer.add_tokens([AddedToken(ngram, normalized=False) for ngram in frequent_ngrams(texts)])
    return tokenizer


def frequent_ngrams(texts):
    """Return the frequent n-grams of 2 to 4 Chinese characters, without those mostly inside a longer one."""
    counts, fragments = Counter(), set()
    for run in (run for text in texts for run in re.findall(f"{cjk_pattern}+", text)):
        for n in (2, 3, 4):
            counts.update(run[start : start + n] for start in range(len(run) - n + 1))
    for ngram, count in counts.items():
        if count >= scratch_min_freq:
            fragments.update(part for part in (ngram[:-1], ngram[1:]) if counts[part] <= 1.2 * count)
    return top_tokens({ngram: count for ngram, count in counts.items() if ngram not in fragments})


def top_tokens(counts):
    """Return at most scratch_vocab_size tokens that occur scratch_min_freq times, in a fixed order."""
    frequent = [token for token, count in counts.items() if count >= scratch_min_freq]
    return sorted(frequent, key=lambda token: (-counts[token], token))[:scratch_vocab_size]


def init_embeddings_ppmi(embeddings, token_ids):
    """Initialise the embeddings (V, H) of the tokens in `token_ids`, lists of ids, from their neighbours.

    Positive pointwise mutual information, reduced to H dimensions by a singular value decomposition (Levy and
    Goldberg 2014, "Neural Word Embedding as Implicit Matrix Factorization", section 4.2).
    """
    flat = torch.tensor([token for ids in token_ids for token in (*ids, *[-1] * scratch_window)])
    pairs = torch.cat([torch.stack([flat[:-n], flat[n:]]) for n in range(1, scratch_window + 1)], dim=1)
    pairs = pairs[:, (pairs >= 0).all(0)]  # none across the end of a text
    if not pairs.numel():
        return  # no text has two tokens
    vocab_size, hidden_size = embeddings.shape
    keys = torch.cat([pairs[0] * vocab_size + pairs[1], pairs[1] * vocab_size + pairs[0]])
    keys, counts = keys.unique(return_counts=True)
    pairs = torch.stack([keys // vocab_size, keys % vocab_size])
    totals = torch.bincount(pairs[0], weights=counts, minlength=vocab_size)
    ppmi = torch.log(counts * totals.sum() / totals[pairs].prod(0)).clamp(min=0).float()
    matrix = torch.sparse_coo_tensor(pairs, ppmi, (vocab_size, vocab_size), check_invariants=True)
    vectors, values, _ = torch.svd_lowrank(matrix, q=min(hidden_size, vocab_size), niter=4)
    vectors = vectors * values.sqrt()
    has_pairs = totals > 0
    if not vectors[has_pairs].std() > 0:
        return  # no pair is more frequent than by chance
    with torch.no_grad():
        vectors *= embeddings.std() / vectors[has_pairs].std()
        embeddings[has_pairs, : vectors.shape[1]] = vectors[has_pairs]


def init_bag_of_words(bert):
    """Add identities to the attention and the pooler of a new BERT: [CLS] starts as an average of the tokens.

    Without them it also attends to all tokens about equally, but its random matrices pass on almost nothing.
    """
    attentions = [layer.attention for layer in bert.encoder.layer]
    linears = [linear for attn in attentions for linear in (attn.self.value, attn.output.dense)]
    with torch.no_grad():
        for linear in (*linears, bert.pooler.dense):
            linear.weight += torch.eye(len(linear.weight))


def main():
    """Print the tensors of the training file."""
    dataset = MultiClsDataSet("./data/train.json")
    print(dataset.input_ids, dataset.token_type_ids, dataset.attention_mask, dataset.labels, sep="\n")


if __name__ == "__main__":
    run_script(main)
