"""Text and labels to tensors, tensors to batches; a small encoder from texts alone.

reads   a data file, one object a line: {"text": "...", "label": ["...", ...]}
run     python data_helper.py    prints the tensors of ./data/train.json
"""
import re
from array import array
from collections import Counter
from itertools import islice

import torch
from torch.utils.data import Dataset
from transformers import AddedToken, BertConfig, BertModel, BertTokenizer
from transformers.trainer_pt_utils import get_length_grouped_indices

import bert_multilabel_cls
from bert_multilabel_cls import save_pretrained_whole
from data_preprocess import InputError, load_label2idx, read_examples, run_script

chunk_texts = 1000  # texts that are tokenized at a time
mega_batches = 50  # so many batches of texts drawn at random are sorted by length among themselves

# The small BERT from scratch, which train.py makes where the shipped encoder cannot be had.
scratch_config = dict(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024)
scratch_pieces = 4000  # at most this many pieces of 2 to 4 Chinese characters, and as many words of other scripts
scratch_characters = 512  # of each text
scratch_min_count = 4  # a piece or word stands at least this often in the training texts
scratch_window = 5  # tokens at most this far apart count as neighbours
scratch_texts = 20_000  # vocabulary and neighbours are counted on about this many texts
chinese = "[\u3400-\u9fff]"  # a Chinese character, as a regular expression

class MultiClsDataSet(Dataset):
    """The examples of one data file; N texts, T tokens of the longest text, C labels.

    input_ids, token_type_ids, attention_mask: (N, T) int64; labels: (N, C) float32, 0 or 1.
    An item is (input_ids, attention_mask, token_type_ids, labels): note that mask and types stand in
    the order in which the network takes them, the other way round than `encoder` returns them.
    An index may also be a list: then an item is a whole batch, cut to its own longest text.

    Kept are the ids alone, end to end, four bytes each, and a byte for each label of a text; the four
    tensors are made anew whenever they are asked for. lengths: (N,) tokens.
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
        self.round_to = 1  # batches are cut to a multiple of so many tokens, for fewer different lengths
        self.ids, self.lengths, self.targets = self.read(data_path)
        self.starts, self.longest = starts_of(self.lengths), int(self.lengths.max())

    input_ids = property(lambda self: self[:][0])
    attention_mask = property(lambda self: self[:][1])
    token_type_ids = property(lambda self: self[:][2])
    labels = property(lambda self: self.targets.float())

    def read(self, data_path):
        """Return (ids, lengths, targets) of a data file: int32, all texts end to end; (N,) int64; (N, C) uint8.

        The file is never held as text: the arrays grow in place, a chunk of texts at a time.
        """
        targets = bytearray()

        def texts():
            """Yield each text; its row of labels goes to `targets`."""
            for text, names in read_examples(data_path, self.label2idx):
                row = bytearray(self.class_num)
                for name in names:
                    row[self.label2idx[name]] = 1
                targets.extend(row)
                yield text
        ids, lengths = tokenize(self.tokenizer, texts(), self.max_len)
        return ids, lengths, torch.frombuffer(targets, dtype=torch.uint8).view(-1, self.class_num)

    def encoder(self, data_path):
        """Return (input_ids, token_type_ids, attention_mask, labels) of a data file."""
        ids, lengths, targets = self.read(data_path)
        pad_id = self.tokenizer.pad_token_id
        input_ids, attention_mask, token_type_ids = pad(ids, starts_of(lengths), lengths, pad_id)
        return input_ids, token_type_ids, attention_mask, targets.float()

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, item):
        longest = self.longest
        if isinstance(item, list):
            longest = min(-int(-self.lengths[item].max() // self.round_to) * self.round_to, self.max_len)
        tensors = pad(self.ids, self.starts[item], self.lengths[item], self.tokenizer.pad_token_id, longest)
        return *tensors, self.targets[item].float()


def tokenize(tokenizer, texts, max_len):
    """Return (ids, lengths) of texts: int32, the tokens of all texts end to end; (N,) int64, tokens of each.

    At most max_len tokens of a text are kept, [CLS] and [SEP] among them; longer texts lose their end.
    Raises InputError if max_len leaves no room for text.
    """
    if max_len < 3:
        raise InputError(f"max_len = {max_len}: must be at least 3, for [CLS], one token and [SEP]")
    ids, lengths, texts = array("i"), array("q"), iter(texts)
    while some := list(islice(texts, chunk_texts)):
        rows = tokenizer(some, truncation=True, max_length=max_len, return_attention_mask=False,
                         return_token_type_ids=False)["input_ids"]
        lengths.extend(map(len, rows))
        for row in rows:
            ids.extend(row)
    return torch.frombuffer(ids, dtype=torch.int32), torch.frombuffer(lengths, dtype=torch.int64)


def starts_of(lengths):
    """Return where each text begins among ids end to end, from the texts' lengths."""
    return lengths.cumsum(0) - lengths


def pad(ids, starts, lengths, pad_id, longest=None):
    """Return (input_ids, attention_mask, token_type_ids), each (B, T) int64, of the texts at `starts` in `ids`.

    T is the longest text's number of tokens, or `longest`. One index operation, whatever B is:

        text      [CLS] 中 超 开 赛 [SEP] [PAD] [PAD]
        mask        1   1  1  1  1    1     0     0
        types       0   0  0  0  0    0     0     0
    """
    columns = torch.arange(longest or int(lengths.max()))
    mask = columns < lengths[..., None]
    tokens = ids[(starts[..., None] + columns).clamp(max=len(ids) - 1)]
    return tokens.long().masked_fill(~mask, pad_id), mask.long(), torch.zeros_like(mask, dtype=torch.int64)


def by_length(lengths, batch_size):
    """Return all indices as lists of at most `batch_size`, longest texts first: memory runs out early or not at all."""
    return [batch.tolist() for batch in lengths.argsort(descending=True, stable=True).split(batch_size)]


def grouped_batches(lengths, batch_size, seed):
    """Return all indices as lists of `batch_size`, texts of similar length together, lists in random order."""
    generator = torch.Generator().manual_seed(seed)
    indices = get_length_grouped_indices(lengths.tolist(), batch_size, mega_batches, generator)
    batches = [indices[start:start + batch_size] for start in range(0, len(indices), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def parts_of_steps(batches, accumulation_steps, rank, processes):
    """Yield for each batch (indices, share, last): what process `rank` of `processes` takes of it.

    share: the weight of the mean loss over these texts. Gradients are averaged over the processes
    and added up over the batches of a step: with it a step follows the mean over all its texts,
    also where the last batch, or the last step, is not full.
    last: whether the optimizer steps after this batch.
    """
    for start in range(0, len(batches), accumulation_steps):
        step = batches[start:start + accumulation_steps]
        texts = sum(map(len, step))
        for number, batch in enumerate(step, 1):
            part = batch[rank::processes]
            # With fewer texts than processes, who gets none computes one for nothing: all must take part.
            yield part or batch[:1], len(part) * processes / texts, number == len(step)


def load_batches(dataset, batches, device="cpu"):
    """Yield the items of `dataset` at the given lists of indices; for a GPU in pinned memory, which copies faster."""
    for batch in batches:
        tensors = dataset[batch]
        yield tuple(tensor.pin_memory() for tensor in tensors) if torch.device(device).type == "cuda" else tensors


def build_scratch_encoder(texts, folder, seed=0):
    """Write a small untrained BERT with a vocabulary of `texts` to `folder`, as save_pretrained does.

    The same texts and seed always give the same files.
    """
    texts = [text[:scratch_characters] for text in texts[::max(1, len(texts) // scratch_texts)]]
    tokenizer = scratch_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bert = BertModel(BertConfig(vocab_size=len(tokenizer), **scratch_config))
        sequences = tokenizer(texts, add_special_tokens=False).input_ids
        start_from_neighbours(bert.embeddings.word_embeddings.weight, sequences)
    save_pretrained_whole(bert, folder)
    save_pretrained_whole(tokenizer, folder)


def scratch_tokenizer(texts):
    """Return a BertTokenizer whose vocabulary is the characters and the common words of `texts`.

    BERT's own tokenizer takes Chinese one character at a time; a network without pretraining learns
    words such as 股市 from far fewer texts if each is one token. They are added tokens: around them,
    and where none of them stands in a text, a character is still a token.
    """
    splitter = BertTokenizer().backend_tokenizer
    words = Counter(word for text in texts
                    for word, _ in splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(text)))
    characters = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    # A character seen once becomes [UNK], so that the network learns what to make of unknown ones.
    singles = sorted(character for character, count in characters.items() if count > 1) or sorted(characters)
    words = Counter({word: count for word, count in words.items() if len(word) > 1})
    inner = [f"##{character}" for character in singles if not re.match(chinese, character)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *singles, *inner, *most_common(words)]
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(dict.fromkeys(vocabulary))})
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in chinese_pieces(texts)])
    return tokenizer


def chinese_pieces(texts):
    """Return the common pieces of 2 to 4 Chinese characters, without those that are mostly part of a longer one."""
    counts = Counter(run[start:start + size] for text in texts for run in re.findall(f"{chinese}+", text)
                     for size in (2, 3, 4) for start in range(len(run) - size + 1))
    parts = {part for piece, count in counts.items() if count >= scratch_min_count
             for part in (piece[:-1], piece[1:]) if counts[part] <= 1.2 * count}
    return most_common(Counter({piece: count for piece, count in counts.items() if piece not in parts}))


def most_common(counts):
    """Return the keys that count at least `scratch_min_count`, at most `scratch_pieces`, in an order that is fixed."""
    common = [key for key, count in counts.items() if count >= scratch_min_count]
    return sorted(common, key=lambda key: (-counts[key], key))[:scratch_pieces]


def start_from_neighbours(embeddings, sequences):
    """Set the embeddings (V, H) of the tokens in `sequences`, lists of ids, by which tokens stand near which.

    Positive pointwise mutual information of neighbours, reduced to H dimensions by a singular value
    decomposition (Levy and Goldberg 2014, "Neural Word Embedding as Implicit Matrix Factorization",
    section 4.2): tokens that stand in like company start alike, before the first label is seen.
    """
    flat = torch.tensor([token for ids in sequences for token in (*ids, *[-1] * scratch_window)])  # -1 ends a text
    near = [(flat[:-distance], flat[distance:]) for distance in range(1, scratch_window + 1)]
    left, right = (torch.cat(side) for side in zip(*near))
    within = (left >= 0) & (right >= 0)
    if not within.any():
        return  # no text has two tokens
    left, right = left[within], right[within]
    pairs = torch.stack([torch.cat([left, right]), torch.cat([right, left])])
    size, width = embeddings.shape
    counts = torch.sparse_coo_tensor(pairs, torch.ones(pairs.shape[1]), (size, size), check_invariants=True).coalesce()
    total = torch.zeros(size).index_add_(0, counts.indices()[0], counts.values())
    information = torch.log(counts.values() * total.sum() / total[counts.indices()].prod(0)).clamp(min=0)
    matrix = torch.sparse_coo_tensor(counts.indices(), information, (size, size), check_invariants=True)
    vectors, values, _ = torch.svd_lowrank(matrix, q=min(width, size), niter=4)
    vectors = vectors * values.sqrt()
    seen = total > 0
    if not vectors[seen].std() > 0:
        return  # no pair of tokens is more frequent than chance
    with torch.no_grad():
        vectors *= embeddings.std() / vectors[seen].std()
        embeddings[seen, :vectors.shape[1]] = vectors[seen]


def main():
    """Print the tensors of the training file."""
    dataset = MultiClsDataSet("./data/train.json")
    print(dataset.input_ids, dataset.token_type_ids, dataset.attention_mask, dataset.labels, sep="\n")


if __name__ == "__main__":
    run_script(main)
