import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import data_helper
from conftest import EXAMPLES, write_jsonl
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
    dataset.token_type_ids = dataset.token_type_ids + 7  # to tell it from the mask
    ids, mask, types, labels = dataset[1]
    assert torch.equal(ids, dataset.input_ids[1]) and torch.equal(mask, dataset.attention_mask[1])
    assert torch.equal(types, dataset.token_type_ids[1]) and torch.equal(labels, dataset.labels[1])


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
        data_helper.encode(tokenizer, ["中"], max_len)


@pytest.mark.parametrize("text", ["", "😀", "龘" * 50, "中" * 100_000, "\x00\u200b"])
def test_odd_texts_are_encoded(tokenizer, text):
    ids, mask, types = data_helper.encode(tokenizer, [text, "中超"], 16)
    assert ids.shape == mask.shape == types.shape and mask[0].sum() >= 2 and ids.shape[1] <= 16


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_by_length_holds_every_index_once_longest_first(dataset, batch_size):
    batches = data_helper.by_length(dataset.attention_mask, batch_size)
    order = [index for batch in batches for index in batch]
    lengths = dataset.attention_mask.sum(1)[order].tolist()
    assert sorted(order) == list(range(6)) and lengths == sorted(lengths, reverse=True)
    assert max(map(len, batches)) <= batch_size


def test_batches_are_cut_to_their_own_longest_text(dataset):
    short, long = list(data_helper.load_batches(dataset, [[0, 1, 5], [4]]))
    assert [tuple(t.shape) for t in short] == [(3, 6), (3, 6), (3, 6), (3, 4)]
    assert [tuple(t.shape) for t in long] == [(1, 10), (1, 10), (1, 10), (1, 4)]
    assert torch.equal(short[0][1], dataset.input_ids[1, :6]) and torch.equal(short[3][1], dataset.labels[1])


def test_batches_may_lack_labels(tokenizer):
    tensors = TensorDataset(*data_helper.encode(tokenizer, ["中", "中超"], 16))
    (ids, mask, types), = data_helper.load_batches(tensors, [[1, 0]])
    assert ids.tolist() == [[2, 5, 6, 3], [2, 5, 3, 0]] and mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
