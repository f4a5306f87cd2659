"""Texts to tensors and batches; scores, thresholds; processes; a small encoder from scratch.

run     python data_helper.py    prints the tensors of ./data/train.json
"""

import atexit
import csv
import gc
import json
import os
import re
from array import array
from collections import Counter, namedtuple
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import chain, islice

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from filelock import FileLock, Timeout
from scipy.sparse import csr_matrix, vstack
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import AddedToken, BertConfig, BertModel, BertTokenizer
from transformers.trainer_pt_utils import get_length_grouped_indices

import bert_multilabel_cls
import data_preprocess
from bert_multilabel_cls import autocast, check_truncation, load_label2idx, load_pretrained
from bert_multilabel_cls import pooler_output
from data_preprocess import InputError, atomic_write, get_world_size, is_main_process, log
from data_preprocess import read_examples, run_script

# The small BERT that train.py trains if bert-base-chinese is missing.
scratch_config = dict(num_hidden_layers=1, hidden_size=512, num_attention_heads=64) | dict(
    intermediate_size=512, attention_probs_dropout_prob=0.65
)


class MultiClsDataSet(Dataset):
    """The tokenized examples of a data file: N texts, T tokens of the longest text, C labels.

    input_ids, token_type_ids, attention_mask: (N, T) int64; labels: (N, C) float32, 0 or 1. An item
    is (input_ids, attention_mask, token_type_ids, labels), of a list of indices a batch, padded to
    its own longest text. keep_tail: tokens kept from the end of a longer text. examples: of
    read_examples, in place of a file. windows: of a longer text all is read, in several items;
    text_of (N,): the index of each item's text. InputError names the line of a bad example.
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
        windows=False,
    ):
        check_truncation(max_len, keep_tail)
        self.label2idx = load_label2idx(label2idx_path) if label2idx is None else label2idx
        name = bert_multilabel_cls.pretrained_model
        self.tokenizer = tokenizer or load_pretrained(BertTokenizer, name)
        self.class_num, self.max_len, self.keep_tail = len(self.label2idx), max_len, keep_tail
        examples = read_examples(data_path, needs_labels=True) if examples is None else examples
        self.encode(examples, windows)

    input_ids = property(lambda self: self[:][0])
    attention_mask = property(lambda self: self[:][1])
    token_type_ids = property(lambda self: self[:][2])
    labels = property(lambda self: self[:][3])
    label_counts = property(lambda self: torch.tensor(self.label_matrix.sum(0).A1))

    def encoder(self, data_path):
        """Return (input_ids, token_type_ids, attention_mask, labels) of a data file."""
        options = (self.max_len, None, self.tokenizer, self.label2idx, self.keep_tail)
        input_ids, attention_mask, token_type_ids, labels = MultiClsDataSet(data_path, *options)[:]
        return input_ids, token_type_ids, attention_mask, labels

    def encode(self, examples, windows):
        """Set ids, of all items end to end; lengths, offsets, text_of (N,); the texts' labels."""
        ids, lengths, columns, row_ends = array("i"), array("q"), array("i"), array("q", [0])
        mask = self.tokenizer("a", return_special_tokens_mask=True).special_tokens_mask
        first, last = (m.index(0) if 0 in m else 1 for m in (mask, mask[::-1]))  # as [CLS], [SEP]
        size, tail = self.max_len - first - last, self.keep_tail + last
        examples, most, num_items = iter(examples), 1000 * self.max_len, []  # characters
        while chunk := list(islice(examples, 256)):
            for location, _, labels, _ in chunk:
                if unknown := [name for name in labels if name not in self.label2idx]:
                    raise InputError(f"{location}: unknown label {unknown[0]!r}; preprocess again")
                columns.extend(sorted({self.label2idx[name] for name in labels}))
                row_ends.append(len(columns))
            texts = [text.strip() for _, text, *_ in chunk]
            if not windows:
                texts = [text[:most] + text[most:][-most:] for text in texts]
            for text_ids in self.tokenizer(texts, verbose=False, truncation=False).input_ids:
                items, end = [text_ids], len(text_ids) - last
                if len(text_ids) > self.max_len and windows:
                    parts = [text_ids[i : min(i + size, end)] for i in range(first, end, size)]
                    items = [text_ids[:first] + part + text_ids[end:] for part in parts]
                elif len(text_ids) > self.max_len:  # Sun et al. 2019, arXiv 1905.05583, 5.3.1
                    items = [text_ids[: self.max_len - tail] + text_ids[end - self.keep_tail :]]
                ids.extend(chain(*items))
                lengths.extend(map(len, items))
                num_items.append(len(items))
        self.ids, self.lengths = (torch.from_numpy(np.array(values)) for values in (ids, lengths))
        self.text_of = np.arange(len(num_items)).repeat(num_items)
        self.offsets = self.lengths.cumsum(0) - self.lengths
        entries = np.ones(len(columns), dtype=bool), np.array(columns), np.array(row_ends)
        self.label_matrix = csr_matrix(entries, shape=(len(num_items), self.class_num))

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, item):
        lengths, offsets = self.lengths[item, None], self.offsets[item, None]
        longest = (lengths if isinstance(item, list) else self.lengths).max()
        columns = torch.arange(int(longest))
        mask = columns < lengths
        input_ids = self.ids[(offsets + columns).clamp(max=len(self.ids) - 1)].long()
        input_ids.masked_fill_(~mask, self.tokenizer.pad_token_id or 0)  # masked anyway
        labels = self.label_matrix[self.text_of[item]].toarray()
        labels = torch.from_numpy(labels.reshape(*mask.shape[:-1], self.class_num)).float()
        return input_ids, mask.long(), torch.zeros_like(input_ids), labels


class GroupedBatchSampler(Sampler):
    """Lists of indices: texts of similar length share a batch, batches come in random order.

    batch_size: texts per process, each of which yields its part of every batch.
    """

    def __init__(self, dataset, batch_size, accumulation_steps=1, seed=0, rank=0, world_size=1):
        self.lengths, self.batch_size = dataset.lengths.tolist(), batch_size * world_size
        self.accumulation_steps, self.seed = accumulation_steps, seed
        self.rank, self.world_size = rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch, first_batch=0):
        """Draw the batches of an epoch; a resumed run skips those before first_batch."""
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)))
        size, num_batches = self.batch_size, -(-len(self.lengths) // self.batch_size)
        per_block = min(max(num_batches // 8, 8), 50)  # few: pairs rarely meet again
        indices = get_length_grouped_indices(self.lengths, size, per_block, generator)
        order = torch.randperm(num_batches, generator=generator).tolist()
        self.batches = [indices[i * size : (i + 1) * size] for i in order]
        self.first_batch = first_batch

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches[self.first_batch :]:
            yield batch[self.rank :: self.world_size] or batch[:1]  # idle: a dummy batch

    def loss_weight(self, i):
        """Return the weight of batch i with which a step has the mean loss of its texts."""
        first = i - i % self.accumulation_steps
        texts_in_step = sum(map(len, self.batches[first : first + self.accumulation_steps]))
        return len(self.batches[i][self.rank :: self.world_size]) * self.world_size / texts_in_step


def eval_dataloader(dataset, batch_size, rank=0, world_size=1):
    """Return a DataLoader: similar lengths, batch_size / 2 to 8 * batch_size texts each."""
    order, batches = dataset.lengths.argsort(descending=True, stable=True), []
    num_tokens = batch_size * min(dataset.max_len, 128)
    while len(order):  # the longest first: out of memory at once, or never
        longest = int(dataset.lengths[order[0]])
        most = num_tokens // max(longest, dataset.class_num // 8, 1)
        most = min(max(most, batch_size), 8 * batch_size)
        num_similar = int((dataset.lengths[order[:most]] >= 0.9 * longest).sum())
        size = max(num_similar, batch_size // 2, 1)
        batches.append(order[:size].tolist())
        order = order[size:]
    return DataLoader(dataset, batch_size=None, sampler=batches[rank::world_size])


# Sparse (N, C): true labels, bool, and the probs of these and of all above 0.05, float32; and
# sums, {metric: sum over the texts}: for scores, thresholds and errors.
Predictions = namedtuple("Predictions", "true probs sums")


def collect_predictions(batches, num_labels, criterion, sampler=None):
    """Return the Predictions of batches (probs, labels), (B, C) each, in the order of the texts.

    sampler: an iterator over the indices of the batches, of which each process has a share.
    """
    texts, true_rows, prob_rows, sums = [], [], [], Counter()
    for probs, labels in batches:
        true = labels > 0.5
        kept = probs.clamp(min=1e-30) * (true | (probs > 0.05))  # 0 would not be stored
        true_rows.append(csr_matrix(true.numpy()))
        prob_rows.append(csr_matrix(kept.numpy()))
        texts += next(sampler) if sampler else range(len(texts), len(texts) + len(labels))
        sums["loss"] += criterion(probs, labels).item() * len(labels)
        for k in (k for k in (1, 3, 5) if k <= num_labels):
            hits = labels.gather(1, probs.topk(k).indices)
            sums[f"precision@{k}"] += hits.mean(1).sum().item()
    part = texts, true_rows, prob_rows, sums
    texts, trues, probs, sums = zip(*(all_gather_object(part) if sampler else [part]))
    order = np.argsort(np.concatenate(texts))
    true, probs = (vstack([*chain(*rows)], "csr")[order] for rows in (trues, probs))
    sums = {name: sum(part[name] for part in sums) for name in sums[0]}
    return Predictions(true, probs, sums)


def predict_labels(probs, thresholds=0.5):
    """Return which probabilities are above thresholds, one or (C,): sparse, (N, C) bool."""
    limits = np.broadcast_to(np.float32(thresholds), probs.shape[1])
    above = probs.data > limits[probs.indices]
    predicted = csr_matrix((above, probs.indices, probs.indptr), probs.shape, copy=True)
    predicted.eliminate_zeros()
    return predicted


def count_labels(true, predicted, axis=0):
    """Return (support, predicted, true positives) by label (axis 0) or by text (axis 1)."""
    return [m.sum(axis).A1.astype(float) for m in (true, predicted, true.multiply(predicted))]


def f1_score(support, predicted, true_positives):
    """Return the F1 of counts, 0 where undefined."""
    return 2 * true_positives / np.maximum(support + predicted, 1)


def compute_metrics(true, predicted):
    """Return {metric: value} of sparse bool matrices (N, C), as scikit-learn defines them.

    All are printed, drawn and written, and may be best_metric. A label without examples counts 0.
    """
    counts = np.array(count_labels(true, predicted))
    metrics = {
        "accuracy": (np.diff((true != predicted).indptr) == 0).mean(),  # all labels right
        "micro_f1": f1_score(*counts.sum(1)),
        "macro_f1": f1_score(*counts).mean(),
        "samples_f1": f1_score(*count_labels(true, predicted, axis=1)).mean(),
    }
    return {k: float(v) for k, v in metrics.items()}


def per_label_metrics(true, predicted, names):
    """Return {label: {precision, recall, f1, support, predicted}} of sparse matrices (N, C)."""
    support, chosen, found = count_labels(true, predicted)
    columns = found / np.maximum(chosen, 1), found / np.maximum(support, 1)
    rows = zip(*columns, f1_score(support, chosen, found), support, chosen)
    keys = ("precision", "recall", "f1", "support", "predicted")
    return {name: dict(zip(keys, map(float, row))) for name, row in zip(names, rows)}


def metrics_report(predictions, names, thresholds):
    """Return {metric: value}, of those without a threshold and at each; by label at 0.5."""
    true, probs, sums = predictions
    metrics = {k: total / true.shape[0] for k, total in sorted(sums.items())}
    options = {"at_0.5": 0.5}
    if thresholds:  # the article has none
        options["at_single"] = thresholds["single"]
        options["at_by_label"] = [thresholds["by_label"][name] for name in names]
    metrics |= {k: compute_metrics(true, predict_labels(probs, t)) for k, t in options.items()}
    return metrics | {"by_label": per_label_metrics(true, predict_labels(probs), names)}


def tune_thresholds(predictions, names, smoothing=40):
    """Return {"single": t, "by_label": {name: t}} with the best F1, at a tie nearest to 0.5."""
    true, probs, *_ = predictions
    grid = np.array(sorted(range(5, 96), key=lambda percent: abs(percent - 50))) / 100
    counts = np.stack([count_labels(true, predict_labels(probs, t)) for t in grid], axis=1)
    total = counts.sum(2, keepdims=True)  # counts: (3, 91, C)
    # To each label, which may have few, are added so many examples of an average one.
    smoothed = counts + smoothing / max(total[0, 0, 0], 1) * total
    single, by_label = (grid[f1_score(*c).argmax(0)].tolist() for c in (total, smoothed))
    return {"single": single[0], "by_label": dict(zip(names, by_label, strict=True))}


def misclassified(examples, predictions, names):
    """Yield a dict for each example with a wrong label at 0.5, the worst first."""
    true, probs, *_ = predictions
    predicted = predict_labels(probs)
    errors = abs(probs - true).multiply(true != predicted).max(1).toarray().ravel()
    examples = list(examples)
    for i in np.argsort(-errors, kind="stable")[: np.count_nonzero(errors)].tolist():
        location, text, _, others = examples[i]
        labels, chosen = ([names[c] for c in matrix[i].indices] for matrix in (true, predicted))
        scores = {names[c]: round(float(p), 4) for c, p in zip(probs[i].indices, probs[i].data)}
        row = {"location": location, "text": text, "true": labels, "predicted": chosen}
        row["missed"] = [x for x in labels if x not in chosen]
        row["false_positives"] = [x for x in chosen if x not in labels]
        row["probability"] = {x: scores[x] for x in dict.fromkeys(labels + chosen)}
        yield row | {f"{k}_" if k in row else k: v for k, v in others.items()}


def write_rows(rows, out_path, header=None):
    """Write dicts as lines of JSON or, to a .csv or .tsv, as a table, atomically."""
    options, out_path = {"errors": "backslashreplace", "newline": ""}, os.fspath(out_path)
    with atomic_write(out_path) as path, open(path, "w", encoding="utf-8", **options) as file:
        if not out_path.lower().endswith((".csv", ".tsv")):
            file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
            return
        file.write("\ufeff")  # by it Excel knows UTF-8
        header = dict.fromkeys(chain(*rows)) if header is None else header
        delimiter = "\t" if out_path.lower().endswith(".tsv") else ","
        table = csv.DictWriter(file, header, delimiter=delimiter)
        table.writeheader()
        join = data_preprocess.label_separator.join
        for row in rows:  # names, and scores of names, are joined
            lists = {k: [*v.values()] if isinstance(v, dict) else v for k, v in row.items()}
            if "missed" in row:  # of an error: the scores are not of one column's labels
                lists["probability"] = [f"{k} {v}" for k, v in row["probability"].items()]
            lists = {k: join(map(str, v)) for k, v in lists.items() if isinstance(v, list)}
            table.writerow(row | lists)


def log_label_metrics(by_label, where):
    """Print a line per label, the weakest first, of many labels ten; `where` all are."""
    rows = sorted(by_label.items(), key=lambda item: item[1]["f1"])
    for name, row in rows[: 10 if len(rows) >= 50 else len(rows)]:
        scores = {k: f"{row[k]:.3f}" for k in ("precision", "recall", "f1")}
        log("label", f"{name:.40}", **scores, support=int(row["support"]))
    if len(rows) >= 50:
        log("label", f"… {len(rows) - 10} others; {where}")


def init_distributed(device):
    """Join the processes of torchrun and return (rank, world_size); without it (0, 1)."""
    if get_world_size() > 1 and not dist.is_initialized():
        num_gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        on_gpu = str(device).startswith("cuda")
        if on_gpu and (str(device) != "cuda" or local_rank >= num_gpus):
            raise InputError(f'device = {device}: use "cuda", a process per GPU ({num_gpus})')
        if on_gpu:
            torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl" if on_gpu and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # for a download
        # Before DistributedDataParallel is gone torch 2.13 with gloo can hang.
        atexit.register(lambda: (gc.collect(), dist.destroy_process_group()))
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def broadcast_object(function):
    """Return in all processes what function() returns in rank 0 alone."""
    return all_gather_object(function() if is_main_process() else None)[0]


def all_gather_object(value):
    """Return the list of the values of all processes."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


@torch.inference_mode()
def sum_pooled(model, dataset, device, dtype):
    """Return the sums over the texts from which init_classifier starts many labels, or None."""
    if type(model.fc) is not nn.Linear or dataset.class_num < 500 or not model.bert.name_or_path:
        return None
    log("note", "many labels: the classifier starts from the texts of each")
    num_labels, size = model.fc.weight.shape
    sums = [torch.zeros(n, size, dtype=torch.float64) for n in (1, size, num_labels)]
    for *inputs, labels in eval_dataloader(dataset, 32, *init_distributed(device)):
        with autocast(device, dtype):
            inputs = (tensor.to(device) for tensor in inputs)
            pooled = pooler_output(model.eval().bert, *inputs).double().cpu()
        for total, factors in zip(sums, (torch.ones(len(pooled), 1), pooled, labels)):
            total += factors.T.double() @ pooled
    return [sum(parts) for parts in zip(*all_gather_object(sums))]


@contextmanager
def only_process(get_path, what):
    """Let one process at a time in, by a lock file that a kill unlocks, or raise InputError."""
    lock = FileLock(get_path())
    try:
        held = lock.acquire(timeout=0) if is_main_process() else nullcontext()
    except (Timeout, NotImplementedError) as error:  # the latter from the file system
        raise InputError(f"another process {what}: wait, or set another path ({error})") from None
    with held:
        try:
            yield
        finally:
            if lock.is_locked and os.name == "posix":  # Windows removes no open file
                os.remove(lock.lock_file)


def build_scratch_encoder(examples, seed=0):
    """Return (a small untrained BERT, its tokenizer) for the texts of read_examples."""
    texts = [text[:512] for _, text, *_ in examples]
    texts = texts[:: max(1, len(texts) // 20_000)]
    tokenizer = scratch_tokenizer(texts)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        bert = BertModel(BertConfig(vocab_size=len(tokenizer), **scratch_config))
        token_ids = tokenizer(texts, add_special_tokens=False).input_ids
        token_ids = token_ids[:: 1 + sum(map(len, token_ids)) // 500_000]
        init_embeddings_ppmi(bert.embeddings.word_embeddings.weight, token_ids)
        # [CLS] starts as the average of the tokens; random matrices pass on nothing.
        for name, module in bert.named_modules():
            if name.endswith(("attention.self.value", "attention.output.dense", "pooler.dense")):
                module.weight += torch.eye(len(module.weight))
        bert.embeddings.position_embeddings.weight.zero_()
        bert.embeddings.token_type_embeddings.weight.zero_()
    return bert, tokenizer


def scratch_tokenizer(texts, max_tokens=4000, min_count=8):
    """Return a BertTokenizer of the characters, frequent words and Chinese n-grams of texts."""
    backend, chinese = BertTokenizer().backend_tokenizer, "[\u3400-\u9fff]"
    normalized = map(backend.normalizer.normalize_str, texts)
    pieces = map(backend.pre_tokenizer.pre_tokenize_str, normalized)
    words = Counter(word for word, _ in chain.from_iterable(pieces))
    characters = Counter("".join(words.elements()))
    # One seen once becomes [UNK], which so learns an embedding.
    singles = sorted(c for c, n in characters.items() if n > 1) or sorted(characters)
    suffixes = [f"##{character}" for character in singles if not re.match(chinese, character)]
    ngrams, frequent = Counter(), []  # of 2 to 4 characters; none mostly in a longer one
    for run in re.findall(f"{chinese}+", "\n".join(texts)):
        for n in (2, 3, 4):
            ngrams.update(run[start : start + n] for start in range(len(run) - n + 1))
    parts = ((p, n) for x, n in ngrams.items() if n >= min_count for p in (x[:-1], x[1:]))
    left_out = {*characters, *(part for part, n in parts if ngrams[part] <= 1.2 * n)}
    for counts in (words, ngrams):
        tokens = sorted(t for t, n in counts.items() if n >= min_count and t not in left_out)
        frequent.append(sorted(tokens, key=counts.get, reverse=True)[:max_tokens])
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *singles, *suffixes, *frequent[0]]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(dict.fromkeys(vocab))})
    tokenizer.add_tokens([AddedToken(ngram, normalized=False) for ngram in frequent[1]])
    return tokenizer


def init_embeddings_ppmi(embeddings, token_ids):
    """Start the embeddings (V, H) from what tokens share a text, in lists of ids.

    Positive pointwise mutual information and an SVD (Levy and Goldberg 2014, "Neural Word
    Embedding as Implicit Matrix Factorization", section 4.2).
    """
    size, hidden_size = embeddings.shape
    rows = np.repeat(np.arange(len(token_ids)), [len(ids) for ids in token_ids])
    columns = np.array([*chain(*token_ids)], dtype=np.int64)
    texts = csr_matrix((np.ones(len(rows)), (rows, columns)), (len(token_ids), size))
    pairs = (texts.T @ texts).tocoo()
    pairs.data[pairs.row == pairs.col] = 0
    totals, cells = pairs.sum(0).A1, np.stack([pairs.row, pairs.col])
    ratio = pairs.data * totals.sum() / totals[cells].prod(0).clip(1)
    ppmi = np.log(ratio.clip(1)).astype(np.float32)
    if not ppmi.any():
        return  # no pair is more frequent than by chance
    matrix = torch.sparse_coo_tensor(cells, ppmi, (size, size), check_invariants=True)
    vectors, values, _ = torch.svd_lowrank(matrix, q=min(hidden_size, size), niter=4)
    vectors, has_pairs = vectors * values.sqrt(), torch.from_numpy(totals > 0)
    vectors *= embeddings.std() / vectors[has_pairs].std()
    embeddings[has_pairs, : vectors.shape[1]] = vectors[has_pairs]


if __name__ == "__main__":
    run_script(lambda: print(*MultiClsDataSet("./data/train.json")[:], sep="\n"))
