"""Text and labels to tensors, tensors to batches, probabilities to scores; a small encoder from texts alone.

reads   a data file, one object a line: {"text": "...", "label": ["...", ...]}
run     python data_helper.py    prints the tensors of ./data/train.json
"""
import os
import re
from array import array
from collections import Counter
from datetime import timedelta
from itertools import islice

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
    tensors are made anew whenever they are asked for. lengths: (N,) tokens.
    tokenizer: else that of `pretrained_model`. label2idx: else what is in `label2idx_path`.
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
    """
    for name, value, least in (("max_len", max_len, 3), ("chunk_texts", chunk_texts, 1)):
        check_number(name, value, least, whole=True)
    ids, lengths, texts = array("i"), array("q"), iter(texts)
    backend = tokenizer.backend_tokenizer  # without the lists that the tokenizer makes of all it returns
    backend.enable_truncation(max_len)
    backend.no_padding()
    while some := [text[:max_len * looked_at] for text in islice(texts, chunk_texts)]:
        for encoding in backend.encode_batch_fast(some):
            ids.extend(encoding.ids)
            lengths.append(len(encoding))
    return torch.frombuffer(ids, dtype=torch.int32), torch.frombuffer(lengths, dtype=torch.int64)


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
            raise InputError(f'device = {str(device)!r}: with several processes it must be "cuda", with a GPU for each; '
                             f"this machine has {torch.cuda.device_count()}")
        if on_gpu:
            torch.cuda.set_device(local_rank)
        # An hour, because the others wait while the first one downloads an encoder.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(hours=1))
    return dist.get_rank(), dist.get_world_size()


def leave_processes():
    """End what join_processes began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def over_processes(tensor, operation="SUM"):
    """Return the sum of `tensor` over all processes, or the "MAX"."""
    if dist.is_initialized():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def largest(number):
    """Return the largest of the whole numbers that the processes give."""
    return over_processes(torch.tensor(int(number)), "MAX").item()


def from_processes(tensor):
    """Return a list of what each process gives as `tensor`, all of one shape."""
    if not dist.is_initialized():
        return [tensor]
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(tensors, tensor)
    return tensors


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


def from_main(value):
    """Return what the main process gives as `value`; the others wait for it."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, 0)
    return box[0]


def by_label(truth, predicted):
    """Return (precision, recall, F1, support), each (C,), of two bool matrices (N, C); 0 where undefined."""
    from sklearn.metrics import precision_recall_fscore_support  # here: predict.py has no use for it
    if truth.shape[1] == 1:  # which scikit-learn would take for two classes
        return precision_recall_fscore_support(truth[:, 0], predicted[:, 0], labels=[True], zero_division=0)
    return precision_recall_fscore_support(truth, predicted, zero_division=0)


def summary(labels, probs, threshold=0.5):
    """Return {score: value} of probabilities (N, C) above one threshold, or above one for each label (C,).

    In the macro scores a label without examples counts 0, as one that is never found.
    """
    from sklearn.metrics import accuracy_score, hamming_loss, precision_recall_fscore_support
    truth, predicted = labels.numpy() > 0.5, (probs > threshold).numpy()
    micro = precision_recall_fscore_support(truth.ravel(), predicted.ravel(), average="binary", zero_division=0)
    macro = [values.mean() for values in by_label(truth, predicted)]
    scores = {"accuracy": accuracy_score(truth, predicted), "hamming_loss": hamming_loss(truth, predicted)}
    for average, values in (("micro", micro), ("macro", macro)):
        scores.update({f"{average}_{name}": float(v) for name, v in zip(("precision", "recall", "f1"), values)})
    return scores


def all_scores(labels, probs, names, thresholds):
    """Return {"at_0.5": scores, "by_label": {name: scores at 0.5}} and one more for each of the tuned `thresholds`."""
    columns = zip(*by_label(labels.numpy() > 0.5, (probs > 0.5).numpy()))
    table = {name: dict(precision=float(p), recall=float(r), f1=float(f), support=int(n))
             for name, (p, r, f, n) in zip(names, columns)}
    tuned = {f"at_{kind}": summary(labels, probs, torch.tensor(value)) for kind, value in thresholds.items()}
    return {"at_0.5": summary(labels, probs), **tuned, "by_label": table}


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
