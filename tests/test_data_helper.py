import hashlib
import os
import subprocess
import sys
import time

import pytest
import torch
from sklearn.metrics import f1_score
from torch.utils.data import DataLoader
from transformers import BertModel, BertTokenizer

import data_helper
from bert_multilabel_cls import load_pretrained
from conftest import EXAMPLES, root, write_jsonl
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
    assert {t.dtype for t in (dataset.input_ids, dataset.attention_mask, dataset.token_type_ids)} == {torch.int64}
    assert dataset.class_num == 4 and dataset.max_len == 16 and len(dataset) == 6


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
        [(4, 10), (4, 10), (4, 10), (4, 4)], [(2, 10), (2, 10), (2, 10), (2, 4)]]


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


@pytest.mark.parametrize("max_len", [-1, 0, 2])
def test_max_len_must_leave_room_for_text(tokenizer, max_len):
    with pytest.raises(InputError, match="max_len = "):
        data_helper.tokenize(tokenizer, ["中"], max_len)


@pytest.mark.parametrize("text", ["", "😀", "龘" * 50, "中" * 100_000, "\x00\u200b"])
def test_odd_texts_are_encoded(tokenizer, text):
    ids, lengths, cut = data_helper.tokenize(tokenizer, [text, "中超"], 16)
    assert len(ids) == lengths.sum() and 2 <= lengths[0] <= 16 and ids[0] == 2 and ids[lengths[0] - 1] == 3
    assert cut == (len(text) >= 50)


@pytest.mark.parametrize("chunk", [1, 2, 6, 1000])
def test_tokens_are_those_of_the_tokenizer_in_any_chunks(tokenizer, monkeypatch, chunk):
    monkeypatch.setattr(data_helper, "chunk_texts", chunk)
    texts = [text for text, _ in EXAMPLES] + ["中" * 5000]  # with which a chunk of 1 or 2 is full
    ids, lengths, _ = data_helper.tokenize(tokenizer, (text for text in texts), 7)
    expected = tokenizer(texts, padding=True, truncation=True, max_length=7, return_tensors="pt")
    found = data_helper.pad(ids, data_helper.starts_of(lengths), lengths, tokenizer.pad_token_id)
    for tensor, name in zip(found, ("input_ids", "attention_mask", "token_type_ids")):
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("length, keep_tail, kept", [
    (6, 0, "中超股市"), (6, 1, "中超股分"), (6, 3, "中球得分"), (6, 4, "门球得分"), (12, 4, "中超股市今日门球得分"), (13, 4, None)])
def test_of_a_longer_text_start_and_end_are_kept(tokenizer, length, keep_tail, kept):
    text = "中超股市今日大门球得分"
    ids, lengths, cut = data_helper.tokenize(tokenizer, ["中", text], length, keep_tail)
    assert tokenizer.convert_ids_to_tokens(ids[3:].tolist()) == ["[CLS]", *(kept or text), "[SEP]"]
    assert (lengths.tolist(), cut) == ([3, min(length, 13)], 0 if kept is None else 1)


@pytest.mark.parametrize("keep_tail", [-1, 5, 1.0, "2"])
def test_keep_tail_must_fit_into_max_len(tokenizer, keep_tail):
    with pytest.raises(InputError, match=f"keep_tail = {keep_tail!r}: must be a whole number, from 0 to 4"):
        data_helper.tokenize(tokenizer, ["中"], 6, keep_tail)


def test_the_end_of_a_text_of_10_mb_is_seen_without_tokenizing_it_whole(tokenizer):
    start = time.perf_counter()
    ids, _, _ = data_helper.tokenize(tokenizer, ["中" + "大" * 3_400_000 + "球门"], 8, 2)
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["[CLS]", *"中大大大球门", "[SEP]"]
    assert time.perf_counter() - start < 2


def test_a_dataset_counts_the_texts_that_it_cuts(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.json", [("中超股市", []), ("中超股市今", []), ("中超股市今日", [])])
    dataset = MultiClsDataSet(path, 6, tokenizer=tokenizer, label2idx=LABEL2IDX, keep_tail=1)
    assert dataset.cut == 2
    assert dataset.input_ids[:, 4].tolist() == tokenizer.convert_tokens_to_ids(["市", "今", "日"])


def test_padding_is_the_pad_token_of_the_tokenizer():
    ids, mask, _ = data_helper.pad(torch.tensor([4, 5, 6]), torch.tensor([0, 2]), torch.tensor([2, 1]), 9, longest=3)
    assert ids.tolist() == [[4, 5, 9], [6, 9, 9]] and mask.tolist() == [[1, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_by_length_holds_every_index_once_longest_first(dataset, batch_size):
    batches = data_helper.by_length(dataset.lengths, batch_size)
    order = [index for batch in batches for index in batch]
    lengths = dataset.attention_mask.sum(1)[order].tolist()
    assert sorted(order) == list(range(6)) and lengths == sorted(lengths, reverse=True)
    assert max(map(len, batches)) <= batch_size


def test_batches_are_cut_to_their_own_longest_text(dataset):
    short, long = data_helper.load_batches(dataset, [[0, 1, 5], [4]])
    assert [tuple(t.shape) for t in short] == [(3, 6), (3, 6), (3, 6), (3, 4)]
    assert [tuple(t.shape) for t in long] == [(1, 10), (1, 10), (1, 10), (1, 4)]
    assert torch.equal(short[0][1], dataset.input_ids[1, :6]) and torch.equal(short[3][1], dataset.labels[1])
    assert {t.dtype for t in short[:3]} == {torch.int64} and short[3].dtype == torch.float32


@pytest.mark.parametrize("round_to, longest", [(1, 6), (4, 8), (8, 8), (12, 12), (32, 16)])  # max_len is 16
def test_lengths_may_be_rounded_up(dataset, round_to, longest):
    dataset.round_to = round_to
    ids, mask, _, _ = dataset[[0, 1]]
    assert ids.shape == (2, longest) and mask.sum() == 12


def test_grouped_batches_hold_every_text_once_and_change_with_the_seed(monkeypatch):
    monkeypatch.setattr(data_helper, "mega_batches", 6)
    lengths = torch.arange(1, 101)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    first, again, other = (data_helper.grouped_batches(lengths, 8, seed) for seed in (1, 1, 2))
    assert sorted(index for batch in first for index in batch) == list(range(100))
    assert first == again != other and max(map(len, first)) == 8
    spread = [int(lengths[batch].max() - lengths[batch].min()) for batch in first if len(batch) == 8]
    assert sum(spread) / len(spread) < 40  # similar lengths together: 8 of 1 to 100 at random spread over 79
    longest = [int(lengths[batch].max()) for batch in first]
    assert longest != sorted(longest, reverse=True)  # but long batches do not all come first


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_each_step_is_the_mean_over_its_texts(processes, accumulation):
    """Gradients of the losses `values`: averaged over the processes, added up over a step's batches."""
    values = torch.arange(22.0) ** 2
    batches = [list(range(start, min(start + 7, 22))) for start in range(0, 22, 7)]  # the last holds one text
    runs = [list(data_helper.parts_of_steps(batches, accumulation, rank, processes)) for rank in range(processes)]
    steps, step, texts = [], 0.0, []
    for number, parts in enumerate(zip(*runs)):
        assert sorted(i for part, share, _ in parts if share for i in part) == batches[number]  # every text once
        step += sum(values[part].mean() * share for part, share, _ in parts) / processes
        texts += batches[number]
        if parts[0][2]:
            steps.append((step.item(), values[texts].mean().item()))
            step, texts = 0.0, []
    assert not texts and len(steps) == -(-4 // accumulation)
    for got, expected in steps:
        assert got == pytest.approx(expected)


@pytest.mark.skipif(sys.platform == "win32", reason="measures with the resource module")
def test_a_large_file_is_read_fast_and_kept_small(tmp_path, encoder_folder):
    """In a process of its own, for its peak: kept 4 bytes a token and 1 a label, at most half as much on top."""
    path = write_jsonl(tmp_path / "a.json", [("中超股市今日开赛大涨球" * 5, ["体育"])] * 40_000)  # 55 characters
    measure = f"""
import resource, time, data_helper
from data_helper import MultiClsDataSet, BertTokenizer
tokenizer = BertTokenizer.from_pretrained({encoder_folder!r})
labels = dict((f"标签{{n}}", n) for n in range(299)) | {{"体育": 299}}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
MultiClsDataSet({path!r}, 128, tokenizer=tokenizer, label2idx={{"体育": 0}})  # what tokenizing needs of its own
before, start = peak(), time.perf_counter()
dataset = MultiClsDataSet({path!r}, 128, tokenizer=tokenizer, label2idx=labels)
seconds = time.perf_counter() - start
kept = sum(t.numel() * t.element_size() for t in vars(dataset).values() if hasattr(t, "numel"))
print(kept, peak() - before, len(dataset) / seconds)
"""
    run = subprocess.run([sys.executable, "-c", measure], cwd=root, capture_output=True, text=True, check=True)
    kept, peak, speed = map(float, run.stdout.split())
    assert kept == 40_000 * (57 * 4 + 300 + 8 + 8) and peak < 1.5 * kept
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


TRUTH = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]])
PROBS = torch.tensor([[0.9, 0.6, 0.1], [0.3, 0.8, 0.1], [0.2, 0.4, 0.1], [0.1, 0.1, 0.1]])


def test_summary_is_what_scikit_learn_says():
    scores = data_helper.summary(TRUTH, PROBS)
    # per label: 1 of 1 right and 1 of 2 found; 1 of 2 right and 1 of 2 found; no example, nothing predicted
    assert scores == pytest.approx(dict(accuracy=0.25, hamming_loss=3 / 12, micro_precision=2 / 3, micro_recall=0.5,
                                        micro_f1=4 / 7, macro_precision=0.5, macro_recall=1 / 3,
                                        macro_f1=(2 / 3 + 1 / 2 + 0) / 3))
    truth, predicted = TRUTH.numpy(), (PROBS > 0.5).numpy()
    assert scores["micro_f1"] == pytest.approx(f1_score(truth, predicted, average="micro"))
    assert scores["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0))


def test_one_label_is_measured_as_that_label():
    scores = data_helper.summary(TRUTH[:, :1], PROBS[:, :1])
    assert (scores["micro_f1"], scores["macro_f1"]) == pytest.approx((2 / 3, 2 / 3))
    assert data_helper.all_scores(TRUTH[:, :1], PROBS[:, :1], ["a"], {})["by_label"]["a"]["support"] == 2


def test_thresholds_are_tuned_for_all_and_for_labels_with_enough_examples():
    tuned = data_helper.tune_thresholds(TRUTH, PROBS, 2)
    assert 0.2 <= tuned["by_label"][0] < 0.3  # finds both examples of the first label, and no more
    assert tuned["by_label"][2] == tuned["single"]  # no example
    best = max(data_helper.summary(TRUTH, PROBS, t / 100)["micro_f1"] for t in range(5, 96))
    assert data_helper.summary(TRUTH, PROBS, tuned["single"])["micro_f1"] == pytest.approx(best)
    scores = data_helper.all_scores(TRUTH, PROBS, ["a", "b", "c"], tuned)
    assert scores["at_by_label"]["micro_f1"] >= scores["at_0.5"]["micro_f1"]


def test_among_equal_thresholds_the_nearest_to_one_half_is_taken():
    assert data_helper.best_threshold(torch.tensor([1.0, 0.0]), torch.tensor([0.9, 0.1])) == 0.5


def test_errors_come_with_the_most_confident_first():
    errors = data_helper.find_errors(["a", "b", "c", "d"], TRUTH, PROBS, ["x", "y", "z"])
    assert errors == [{"text": "b", "true": ["x", "y"], "predicted": ["y"], "probability": {"x": 0.3, "y": 0.8}},
                      {"text": "a", "true": ["x"], "predicted": ["x", "y"], "probability": {"x": 0.9, "y": 0.6}},
                      {"text": "c", "true": ["y"], "predicted": [], "probability": {"y": 0.4}}]


TEXTS = ["今天股市大涨，股市成交放量", "股市低开 vs 高开 vs 平开", "vs 股市"] * 3


def test_scratch_encoder_is_an_ordinary_folder(tmp_path):
    data_helper.build_scratch_encoder(TEXTS, str(tmp_path))
    tokenizer = load_pretrained(BertTokenizer, str(tmp_path))
    bert = load_pretrained(BertModel, str(tmp_path))
    assert tokenizer.tokenize("股市低放 VS 龘") == ["股市", "低", "放", "vs", "[UNK]"]
    assert bert.config.vocab_size == len(tokenizer) and bert.config.hidden_size == 256
    assert bert.config.num_hidden_layers == 4


@pytest.mark.parametrize("texts", [["a a a"], ["啊 啊"], ["中"], ["你好", "天下"], ["股市大涨" * 100_000], ["", "a b"]])
def test_scratch_encoder_of_odd_texts_is_finite(tmp_path, texts):
    data_helper.build_scratch_encoder(texts, str(tmp_path))
    assert load_pretrained(BertModel, str(tmp_path)).embeddings.word_embeddings.weight.isfinite().all()
    assert len(load_pretrained(BertTokenizer, str(tmp_path))) > 5


def test_scratch_encoder_is_the_same_under_any_hash_seed(tmp_path):
    texts = [f"{text}{chr(0x4e00 + n * 37 % 50)}{chr(0x4e00 + n * 13 % 50)}" for n, text in enumerate(TEXTS * 20)]
    path = write_jsonl(tmp_path / "a.json", [(text, []) for text in texts])
    build = ("import sys, data_helper as h, data_preprocess as d; "
             "h.build_scratch_encoder([t for t, _ in d.read_examples(sys.argv[1])], sys.argv[2])")
    digests = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        subprocess.run([sys.executable, "-c", build, path, folder], cwd=root, check=True, capture_output=True,
                       env={**os.environ, "PYTHONHASHSEED": seed})
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()})
    assert digests[0] == digests[1]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= digests[0].keys()
