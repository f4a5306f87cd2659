"""Text and labels to tensors, tensors to batches, probabilities to scores; a small encoder from texts alone.

reads   a data file, one object a line: {"text": "...", "label": ["...", ...]}
run     python data_helper.py    prints the tensors of ./data/train.json
"""
import gc
import os
import re
from array import array
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import AddedToken, BertConfig, BertModel, BertTokenizer
from transformers.trainer_pt_utils import get_length_grouped_indices

import bert_multilabel_cls
from bert_multilabel_cls import save_pretrained_whole
from data_preprocess import (InputError, check_number, chinese, chinese_pieces, count_processes, load_label2idx,
                             most_common, read_examples, run_script)

chunk_texts = 1000  # texts that are tokenized at a time
looked_at = 1000  # characters of a text for each token that is kept: a text of 10 MB need not be tokenized whole
mega_batches = 50  # so many batches of texts drawn at random are sorted by length among themselves

# The small BERT from scratch, which train.py makes where the shipped encoder cannot be had.
scratch_config = dict(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024)
scratch_characters = 512  # of each text
scratch_window = 5  # tokens at most this far apart count as neighbours
scratch_texts = 20_000  # vocabulary and neighbours are counted on about this many texts


class MultiClsDataSet(Dataset):
    """The examples of one data file; N texts, T tokens of the longest text, C labels.

    input_ids, token_type_ids, attention_mask: (N, T) int64; labels: (N, C) float32, 0 or 1.
    An item is (input_ids, attention_mask, token_type_ids, labels): note that mask and types stand in
    the order in which the network takes them, the other way round than `encoder` returns them.
    An index may also be a list: then an item is a whole batch, cut to its own longest text.

    Kept are the ids alone, end to end, four bytes each, and a byte for each label of a text; the four
    tensors are made anew whenever they are asked for. lengths: (N,) tokens. cut: how many texts were longer.
    tokenizer: else that of `pretrained_model`. label2idx: else what is in `label2idx_path`.
    keep_tail: of a longer text, so many tokens are from its end.
    Raises InputError naming file and line for an example that is not valid.
    """

    def __init__(self, data_path, max_len=128, label2idx_path="./data/label2idx.json", tokenizer=None, label2idx=None,
                 keep_tail=0):
        self.label2idx = load_label2idx(label2idx_path) if label2idx is None else label2idx
        self.class_num = len(self.label2idx)
        if tokenizer is None:
            tokenizer = bert_multilabel_cls.load_pretrained(BertTokenizer, bert_multilabel_cls.pretrained_model)
        self.tokenizer = tokenizer
        self.max_len, self.keep_tail = max_len, keep_tail
        self.round_to = 1  # batches are cut to a multiple of so many tokens, for fewer different lengths
        self.ids, self.lengths, self.cut, self.targets = self.read(data_path)
        self.starts, self.longest = starts_of(self.lengths), int(self.lengths.max())

    input_ids = property(lambda self: self[:][0])
    attention_mask = property(lambda self: self[:][1])
    token_type_ids = property(lambda self: self[:][2])
    labels = property(lambda self: self.targets.float())

    def read(self, data_path):
        """Return (ids, lengths, cut, targets) of a data file: the first three as `tokenize` does; (N, C) uint8.

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
        ids, lengths, cut = tokenize(self.tokenizer, texts(), self.max_len, self.keep_tail)
        return ids, lengths, cut, torch.frombuffer(targets, dtype=torch.uint8).view(-1, self.class_num)

    def encoder(self, data_path):
        """Return (input_ids, token_type_ids, attention_mask, labels) of a data file."""
        ids, lengths, _, targets = self.read(data_path)
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


def tokenize(tokenizer, texts, max_len, keep_tail=0):
    """Return (ids, lengths, cut) of texts: int32, the tokens of all end to end; (N,) int64; how many texts were cut.

    At most max_len tokens of a text are kept, [CLS] and [SEP] among them. Of a longer one it is the start; with
    keep_tail start and end, which Sun et al. 2019, "How to Fine-Tune BERT for Text Classification?" (arXiv
    1905.05583, section 5.3.1) found best:

        [CLS] start … start end … end [SEP]     so many tokens of the end, the rest of the start
    """
    check_number("max_len", max_len, 3, whole=True)
    check_number("keep_tail", keep_tail, 0, max_len - 2, whole=True)
    check_number("chunk_texts", chunk_texts, 1, whole=True)
    ids, lengths, cut = array("i"), array("q"), 0
    backend = tokenizer.backend_tokenizer  # without the lists that the tokenizer makes of all it returns
    backend.no_truncation()
    backend.no_padding()
    head, tail = max_len * looked_at, keep_tail * looked_at  # characters
    seen = (text if len(text) <= head + tail else text[:head] + text[len(text) - tail:] for text in texts)
    while some := chunk_of(seen):
        for encoding in backend.encode_batch_fast(some):
            kept = encoding.ids
            if len(kept) > max_len:
                kept = kept[:max_len - keep_tail - 1] + kept[-keep_tail - 1:]
                cut += 1
            ids.extend(kept)
            lengths.append(len(kept))
    return torch.frombuffer(ids, dtype=torch.int32), torch.frombuffer(lengths, dtype=torch.int64), cut


def chunk_of(texts):
    """Return the next texts of an iterator as a list: chunk_texts of them, or fewer long ones."""
    some, characters = [], 0
    for text in texts:
        some.append(text)
        characters += len(text)
        if len(some) == chunk_texts or characters > 1000 * chunk_texts:  # encodings take 100 bytes a token
            break
    return some


def starts_of(lengths):
    """Return where each text begins among ids end to end."""
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
    check_number("mega_batches", mega_batches, 1, whole=True)
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


def join_processes(device):
    """Join the processes that torchrun started, one a GPU or share of the CPU; return (rank, processes).

    Without torchrun that is (0, 1), and nothing else in this section does anything.
    """
    if count_processes() == 1:
        return 0, 1
    if not dist.is_initialized():
        on_gpu, local_rank = str(device).startswith("cuda"), int(os.environ.get("LOCAL_RANK", 0))
        if on_gpu and (str(device) != "cuda" or local_rank >= torch.cuda.device_count()):
            raise InputError(f'device = {str(device)!r}: with several processes it must be "cuda", with a GPU for '
                             f"each; this machine has {torch.cuda.device_count()}")
        if on_gpu:
            torch.cuda.set_device(local_rank)
        # A day, because the others wait while the first one downloads an encoder, or labels its part of a file.
        backend = "cpu:gloo,cuda:nccl" if on_gpu and dist.is_nccl_available() else "gloo"  # Windows has no NCCL
        dist.init_process_group(backend, timeout=timedelta(days=1))
    return dist.get_rank(), dist.get_world_size()


def leave_processes():
    """End what join_processes began. What DistributedDataParallel made must not be in use any more.

    If its reducer went after the group, it would wait for gloo's thread with Python's lock in hand, and the thread
    for the lock: torch 2.13 then hangs at the end of a run, now and then.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def over_processes(tensor, operation="SUM"):
    """Return the sum of `tensor` over all processes, or the "MAX"."""
    if dist.is_initialized():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def largest(number):
    """Return the largest of the whole numbers that the processes give."""
    return over_processes(torch.tensor(int(number)), "MAX").item()


def from_processes(value):
    """Return a list of what each process gives as `value`; each waits for all."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def random_state(device):
    """Return the state of the random generators, the CPU's and a GPU's, as a tensor of bytes."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.cat([torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_gpu else [])])


def set_random_state(state, device):
    """Bring the random generators to a state that random_state returned."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size])
    if len(state) > size:
        torch.cuda.set_rng_state(state[size:], device)


def spread(model):
    """Give the model of every process the weights of the main process's."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def count(truth, predicted):
    """Return int64 (5, C) of two bool matrices (N, C): for each label the texts that have it, that get it, and both;
    then, alike for all labels, N and the texts that are all right. The counts of two files add up to those of both.
    """
    right = (truth == predicted).all(1).sum()
    rows = [truth.sum(0), predicted.sum(0), (truth & predicted).sum(0)]
    return torch.stack([*rows, *(torch.full_like(rows[0], number) for number in (len(truth), right))])


def rates(have, get, both):
    """Return (precision, recall, F1) of counts; 0 where undefined."""
    return both / get.clamp(min=1), both / have.clamp(min=1), 2 * both / (have + get).clamp(min=1)


def scores_from(counts):
    """Return {score: value} of what `count` returned.

    In the macro scores a label without examples counts 0, as one that is never found.
    """
    have, get, both, texts, right = counts.double()
    averages = {"micro": rates(have.sum(), get.sum(), both.sum()), "macro": [v.mean() for v in rates(have, get, both)]}
    scores = {"accuracy": right[0] / texts[0], "hamming_loss": (have + get - 2 * both).sum() / texts.sum()}
    for average, values in averages.items():
        scores.update({f"{average}_{name}": value for name, value in zip(("precision", "recall", "f1"), values)})
    return {name: value.item() for name, value in scores.items()}


def label_scores(counts, names):
    """Return {label: {precision, recall, f1, support}} of what `count` returned."""
    columns = zip(*(values.tolist() for values in rates(*counts[:3].double())), counts[0].tolist())
    return {name: dict(zip(("precision", "recall", "f1", "support"), column)) for name, column in zip(names, columns)}


def summary(labels, probs, threshold=0.5):
    """Return {score: value} of probabilities (N, C) above one threshold, or above one for each label (C,)."""
    return scores_from(count(labels > 0.5, probs > threshold))


def all_scores(labels, probs, names, thresholds):
    """Return {"at_0.5": scores, "by_label": {name: scores at 0.5}} and one more for each of the tuned `thresholds`."""
    counts = count(labels > 0.5, probs > 0.5)
    tuned = {f"at_{kind}": summary(labels, probs, torch.tensor(value)) for kind, value in thresholds.items()}
    return {"at_0.5": scores_from(counts), **tuned, "by_label": label_scores(counts, names)}


def tune_thresholds(labels, probs, tune_from):
    """Return {"single": t, "by_label": [t, …]}: what gives the best micro F1, and the best F1 of each label.

    A label with fewer than `tune_from` examples takes the single threshold.

    For dev only: chosen on the texts on which they are judged, thresholds always look good.
    """
    single = best_threshold(labels, probs)
    enough = (labels.sum(0) >= tune_from).tolist()
    return {"single": single, "by_label": [best_threshold(labels[:, c], probs[:, c]) if enough[c] else single
                                           for c in range(len(enough))]}


def best_threshold(labels, probs):
    """Return the threshold from 0.05 to 0.95 with the best F1 over all entries; among equals the nearest to 0.5."""
    truth = labels > 0.5
    best = 0.0, 0.0, 0.5
    for percent in range(5, 96):
        predicted = probs > percent / 100
        f1 = 2 * (predicted & truth).sum().item() / max(1, predicted.sum().item() + truth.sum().item())
        best = max(best, (f1, -abs(percent - 50), percent / 100))
    return best[2]


def find_errors(texts, labels, probs, names):
    """Return a dict for each text whose labels at 0.5 are not all right, the most confident mistakes first."""
    truth = labels > 0.5
    surprise = torch.where(truth, 1 - probs, probs).max(1).values  # of a text's worst label
    errors = []
    for row in surprise.argsort(descending=True, stable=True).tolist():
        true, predicted = truth[row].tolist(), (probs[row] > 0.5).tolist()
        if true != predicted:
            shown = [c for c in range(len(names)) if true[c] or predicted[c]]
            errors.append({"text": texts[row], "true": [names[c] for c in shown if true[c]],
                           "predicted": [names[c] for c in shown if predicted[c]],
                           "probability": {names[c]: round(probs[row, c].item(), 4) for c in shown}})
    return errors


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
    save_pretrained_whole(folder, bert, tokenizer)


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
