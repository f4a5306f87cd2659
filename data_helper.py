"""Text and labels to tensors, and tensors to batches.

reads   a data file, one object a line: {"text": "...", "label": ["...", ...]}
run     python data_helper.py    prints the tensors of ./data/train.json
"""
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import BertTokenizer

import bert_multilabel_cls
from data_preprocess import InputError, load_label2idx, read_examples, run_script


class MultiClsDataSet(Dataset):
    """The examples of one data file as tensors; N texts, T tokens of the longest text, C labels.

    input_ids, token_type_ids, attention_mask: (N, T) int64; labels: (N, C) float32, 0 or 1.
    An item is (input_ids, attention_mask, token_type_ids, labels): note that mask and types stand in
    the order in which the network takes them, the other way round than `encoder` returns them.
    An index may also be a list: then an item is a whole batch.

    tokenizer: without it, that of `pretrained_model`. label2idx: without it, what is in `label2idx_path`.
    Raises InputError naming file and line for an example that is not valid.
    """

    def __init__(self, data_path, max_len=128, label2idx_path="./data/label2idx.json", tokenizer=None, label2idx=None):
        self.label2idx = load_label2idx(label2idx_path) if label2idx is None else label2idx
        self.class_num = len(self.label2idx)
        if tokenizer is None:
            tokenizer = bert_multilabel_cls.load_pretrained(BertTokenizer, bert_multilabel_cls.pretrained_model)
        self.tokenizer = tokenizer
        self.max_len = max_len
        self.input_ids, self.token_type_ids, self.attention_mask, self.labels = self.encoder(data_path)

    def encoder(self, data_path):
        """Return (input_ids, token_type_ids, attention_mask, labels) of a data file."""
        texts, label_lists = zip(*read_examples(data_path, self.label2idx))
        labels = torch.zeros(len(texts), self.class_num)
        for row, names in zip(labels, label_lists):
            row[[self.label2idx[name] for name in names]] = 1
        input_ids, attention_mask, token_type_ids = encode(self.tokenizer, texts, self.max_len)
        return input_ids, token_type_ids, attention_mask, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, item):
        return self.input_ids[item], self.attention_mask[item], self.token_type_ids[item], self.labels[item]


def encode(tokenizer, texts, max_len):
    """Return (input_ids, attention_mask, token_type_ids), each (N, T) int64, of at least one text.

    T is the longest text's number of tokens, at most max_len; longer texts lose their end:

        text      [CLS] 中 超 开 赛 [SEP] [PAD] [PAD]
        mask        1   1  1  1  1    1     0     0
        types       0   0  0  0  0    0     0     0

    Raises InputError if max_len leaves no room for text.
    """
    if max_len < 3:
        raise InputError(f"max_len = {max_len}: must be at least 3, for [CLS], one token and [SEP]")
    tensors = tokenizer(list(texts), padding=True, truncation=True, max_length=max_len, return_tensors="pt")
    return tensors["input_ids"], tensors["attention_mask"], tensors["token_type_ids"]


def by_length(attention_mask, batch_size):
    """Return all indices as lists of at most `batch_size`, longest texts first: memory runs out early or not at all."""
    order = attention_mask.sum(1).argsort(descending=True, stable=True)
    return [batch.tolist() for batch in order.split(batch_size)]


def load_batches(dataset, batches, device="cpu"):
    """Return a loader of `dataset` in the given lists of indices, each batch cut to its own longest text.

    A batch is one index operation on the dataset. For a GPU it lies in pinned memory, from which it is copied faster.
    """
    return DataLoader(dataset, sampler=batches, batch_size=None, collate_fn=cut_to_longest,
                      pin_memory=torch.device(device).type == "cuda")


def cut_to_longest(batch):
    """Return a batch (input_ids, attention_mask, token_type_ids, …) without the columns that are all padding."""
    longest = int(batch[1].sum(1).max())
    return tuple(tensor[:, :longest] for tensor in batch[:3]) + tuple(batch[3:])


def main():
    """Print the tensors of the training file."""
    dataset = MultiClsDataSet("./data/train.json")
    print(dataset.input_ids, dataset.token_type_ids, dataset.attention_mask, dataset.labels, sep="\n")


if __name__ == "__main__":
    run_script(main)
