"""The network, the encoder that it starts from, and the folder of a trained model.

An encoder (config.json, tokenizer, weights) is looked for by name: a local folder, the local
cache of the hub, the hub. A trained model is a folder that needs nothing else to predict:

    model/multi_label_cls.pth     state dict, keys bert.* and fc.*
    model/config.json             the encoder's sizes, the labels, the tuned thresholds
    model/tokenizer*.json         the tokenizer
    model/transformers/           the same once more, as other tools read it: a BertForSequenceClassification
"""
import copy
import hashlib
import os
import re
import shutil
import threading
from contextlib import contextmanager, suppress

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import HfApi, constants, snapshot_download
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer
from transformers.utils import logging as transformers_logging

from data_preprocess import (InputError, check_number, encoder_files, first_line, is_encoder, load_label2idx,
                             load_object, reuse_memory, whole_file)

shipped_model = "bert-base-chinese"  # leave as it is: without a network only this one is replaced, by a small BERT
pretrained_model = shipped_model  # any BERT: a Hugging Face id, or a folder written by save_pretrained
hub_seconds = 8  # how long the hub may take to answer before it counts as out of reach

classifier = ("fc.weight", "fc.bias")  # of the last layer, in a checkpoint
dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class BertMultiLabelCls(nn.Module):
    """BERT, then dropout, a linear layer and a sigmoid: one probability for each label.

    hidden_size: the encoder's; None takes it from the encoder. class_num: C, the number of labels.
    bert: a BertModel to use; without it, `pretrained_model` is loaded.
    Raises InputError if hidden_size is not the encoder's, or if the encoder cannot be had.
    """

    def __init__(self, hidden_size, class_num, dropout=0.1, bert=None):
        super().__init__()
        bert = load_pretrained(BertModel, pretrained_model) if bert is None else bert
        if hidden_size not in (None, bert.config.hidden_size):
            raise InputError(f"hidden_size = {hidden_size}, but the encoder has {bert.config.hidden_size}")
        self.fc = nn.Linear(bert.config.hidden_size, class_num)
        self.drop = Dropout(dropout)
        self.bert = bert
        for parent in list(bert.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Dropout:
                    setattr(parent, name, Dropout(child.p))

    def forward(self, input_ids, attention_mask, token_type_ids):
        """Return probabilities (B, C), float32, from three integer tensors (B, T).

        They are probabilities, not logits: the loss is BCELoss, not BCEWithLogitsLoss.
        """
        pooled = pooled_output(self.bert, input_ids, attention_mask, token_type_ids)
        with torch.autocast(pooled.device.type, enabled=False):  # BCELoss needs float32 probabilities
            return torch.sigmoid(self.fc(self.drop(pooled.float())))


def pooled_output(bert, input_ids, attention_mask, token_type_ids):
    """Return what `bert(...)[1]` is, (B, H), at less work: the pooler looks at [CLS] alone, so the last layer does too.

    The names are those of the weights in a checkpoint.
    """
    hidden = bert.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
    if torch.is_autocast_enabled(hidden.device.type):  # else float32 runs between the layers on a CPU
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    seen = attention_mask[:, None, None].bool()  # (B, 1, 1, T): for every head and every token
    *layers, last = bert.encoder.layer
    for layer in layers:
        hidden = run_layer(layer, hidden, hidden, seen)
    return bert.pooler(run_layer(last, hidden[:, :1], hidden, seen))


def run_layer(layer, queries, hidden, seen):
    """Return a BERT layer's output (B, Q, H) for the tokens `queries` (B, Q, H), which look at all of `hidden`."""
    attention = layer.attention.self

    def heads(states):
        """Return states (B, …, H) as (B, heads, …, H / heads)."""
        return states.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    context = attend(heads(attention.query(queries)), heads(attention.key(hidden)), heads(attention.value(hidden)),
                     seen, attention.dropout.p if layer.training else 0.0)
    attended = layer.attention.output(context.transpose(1, 2).flatten(2), queries)
    return layer.output(layer.intermediate(attended), attended)


def attend(query, key, value, seen, dropout):
    """Return scaled dot-product attention, with dropout on its weights."""
    if not dropout or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, seen, dropout)
    # With dropout PyTorch has no fused kernel on a CPU, and computes this in float32.
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    return drop_out(weights, dropout) @ value


class Dropout(nn.Dropout):
    """nn.Dropout, five times as fast on a CPU."""

    def forward(self, states):
        """Return `states`, in training with a share p of them at 0 and the others scaled up to keep the mean."""
        return drop_out(states, self.p) if self.training else states


def drop_out(states, p):
    """Return `states` with a share p of them at 0 and the others divided by 1 − p.

    On a CPU: 16 random bits an element are compared with p, where PyTorch draws a number for each.
    That took a tenth of a training step; operations that keep the type are those that are vectorized.
    """
    if states.device.type != "cpu" or torch.compiler.is_compiling() or not 0 < p < 1:
        return F.dropout(states, p)
    words = torch.empty(-(-states.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)  # all 64 bits
    bits = words.view(torch.int16)[:states.numel()].view(states.shape)
    return states * bits.ge_(round(p * 2 ** 16) - 2 ** 15).to(states.dtype).mul_(1 / (1 - p))


def start_at_prior(fc, labels):
    """Set the bias of the last layer to the log odds of each label's share in `labels` (N, C).

    Lin et al. 2017, arXiv 1708.02002, section 4.1. With a bias of 0 every label starts at 0.5, and the
    first steps only push all of them down together: the model learns to predict nothing.
    """
    share = labels.float().mean(0).clamp(1 / (len(labels) + 1), len(labels) / (len(labels) + 1))  # never infinite odds
    with torch.no_grad():
        fc.bias.copy_(torch.log(share / (1 - share)))


def parameter_groups(model, encoder_lr, top_lr, weight_decay):
    """Return the optimizer's groups: the encoder, and the top of pooler and last layer; each with and without decay.

    Biases and LayerNorm, which have one dimension, do not decay.
    """
    top = [*model.bert.pooler.parameters(), *model.fc.parameters()]
    in_top = {id(p) for p in top}
    layers = [p for p in model.parameters() if id(p) not in in_top]
    return [{"params": [p for p in part if (p.ndim > 1) == decays], "lr": part_lr,
             "weight_decay": weight_decay if decays else 0.0}
            for part, part_lr in ((layers, encoder_lr), (top, top_lr)) for decays in (True, False)]


@contextmanager
def locally():
    """Have transformers load and save without progress bars, and without the hub: it retries for minutes offline."""
    offline, bars = constants.HF_HUB_OFFLINE, transformers_logging.is_progress_bar_enabled()
    constants.HF_HUB_OFFLINE = True
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        if bars:
            transformers_logging.enable_progress_bar()


def load_pretrained(part, name, trained=False):
    """Return `part.from_pretrained` of an encoder; `part` is BertModel (given in float32), BertTokenizer or BertConfig.

    trained: whether for a trained model: then the tokenizer says itself whether it puts texts in lower case, as it
    did in that training, the article's too.
    Raises InputError, within `hub_seconds` if there is no network, if it cannot be had or is not a BERT.
    """
    folder, tried = find_encoder(name)
    if folder:
        kind = load_object(os.path.join(folder, "config.json")).get("model_type", "bert")
        if kind != "bert":
            raise InputError(f'{name}: its model_type is "{kind}", but only "bert" is supported')
    try:
        with locally():
            loaded = part.from_pretrained(folder or name)
            if part is BertTokenizer and not trained and loaded.do_lower_case == is_cased(loaded):
                loaded = part.from_pretrained(folder or name, do_lower_case=not loaded.do_lower_case)
    except Exception as error:  # each format of the weights has errors of its own
        raise InputError(tried or f"{name}: cannot be loaded ({first_line(error)}); is the download complete, and "
                         "are the weights more than a Git LFS pointer?") from None
    if isinstance(loaded, nn.Module):
        for parameter in loaded.parameters():  # float16 would be trained in float16; Windows replaces no mapped file
            parameter.data = parameter.data.to(torch.float32, copy=True)
        return loaded
    if hasattr(loaded, "all_special_tokens") and len(loaded) <= len(loaded.all_special_tokens):
        raise InputError(tried or f"{name}: has no tokenizer files, or an empty vocabulary")
    return loaded


def is_cased(tokenizer):
    """Return whether the vocabulary has words with capitals, more than 1 % of its words in Latin or such letters.

    It alone decides whether texts are put in lower case. transformers would do it to a cased vocabulary whose folder
    lacks tokenizer_config.json, and not to that of bert-base-chinese, where HTTP then is [UNK], though http is known.
    """
    words = [token.removeprefix("##") for token in tokenizer.get_vocab()]
    words = [word for word in words if word.isalpha() and word.lower() != word.upper()]
    return sum(word != word.lower() for word in words) > len(words) / 100


def find_encoder(name):
    """Return (folder, "") of the encoder `name`, or (None, what was tried and how to get it).

    Looked for in this order: a folder of that name; the local cache, without a network call; the hub.
    """
    if os.path.isdir(name):
        return name, ""
    with suppress(OSError, ValueError):  # not cached; ValueError: no possible id on the hub, such as ./model/none
        folder = snapshot_download(name, local_files_only=True)
        if is_encoder(os.listdir(folder)):
            return folder, ""
    try:
        names = files_on_hub(name)
    except Exception as error:  # whatever the network, a proxy or the hub may answer
        return None, (
            f"the encoder {name} cannot be had: no folder of that name; not in the cache {constants.HF_HUB_CACHE}; "
            f"the hub {constants.ENDPOINT} says: {first_line(error)}. To get it, set a mirror in the environment "
            "(HF_ENDPOINT=https://hf-mirror.com), or copy its config.json, vocab.txt and model.safetensors into a "
            "folder and set pretrained_model in bert_multilabel_cls.py to that folder")
    try:
        return snapshot_download(name, allow_patterns=encoder_files(names)), ""
    except (OSError, ValueError) as error:  # a half-finished download is no reason to train something else
        raise InputError(f"{name}: the hub has it, but the download failed ({first_line(error)}); run again, it "
                         "goes on where it stopped") from None


def files_on_hub(name):
    """Return the names of the files of `name` on the hub. Raises what went wrong, within `hub_seconds`."""
    answer = [TimeoutError(f"no answer within {hub_seconds} s")]

    def ask():
        """Put the names, or what went wrong, in `answer`."""
        try:
            answer[0] = [file.rfilename for file in HfApi().model_info(name, timeout=hub_seconds / 2).siblings]
        except Exception as error:
            answer[0] = error

    # A thread, because the timeout of the request does not bound the search for the host's address.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(hub_seconds)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def save_pretrained_whole(folder, *parts):
    """Write a model, tokenizer or configuration to `folder` as its save_pretrained does, each file whole.

    Where weights are among them, config.json is away while they change: a kill leaves no mixture that loads.
    """
    unfinished = os.path.join(folder, "unfinished.tmp")  # of a fixed name, so that kills leave one at most
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        with locally():
            for part in parts:
                part.save_pretrained(unfinished)
    except Exception as error:  # a full disk is an OSError, or one of safetensors' own
        shutil.rmtree(unfinished, ignore_errors=True)
        raise InputError(f"{folder}: cannot be written ({first_line(error)})") from None
    names = sorted(os.listdir(unfinished), key="config.json".__eq__)  # which comes last
    if any(name.endswith(".safetensors") for name in names):
        with suppress(OSError):
            os.remove(os.path.join(folder, "config.json"))
    for name in names:
        with whole_file(os.path.join(folder, name)) as target:
            shutil.copymode(os.path.join(unfinished, "config.json"), os.path.join(unfinished, name))  # not 0600
            os.replace(os.path.join(unfinished, name), target)
    os.rmdir(unfinished)


def labelled_config(model, label2idx):
    """Return the encoder's configuration with the labels in it."""
    config = copy.deepcopy(model.bert.config)
    config.update(dict(id2label={column: label for label, column in label2idx.items()}, label2id=label2idx,
                       problem_type="multi_label_classification", dtype="float32"))
    return config


def save_tensors(tensors, path):
    """Write `tensors` to `path` with torch.save. Raises OSError if it cannot."""
    try:
        torch.save(tensors, path)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(first_line(error)) from None


def save_model(model, tokenizer, label2idx, model_path, thresholds=None):
    """Write a trained model's folder: weights to `model_path`, configuration and tokenizer beside them.

    thresholds: what was tuned on dev, kept in the configuration because it fits only these weights. Those of the
    weights before stay, if labels and sizes are the same: a kill between the two files leaves a model that loads.
    """
    folder = os.path.dirname(model_path) or "."
    config = labelled_config(model, label2idx)
    before = {}
    with suppress(InputError):  # there is none yet, or none that can be read
        before = load_object(os.path.join(folder, "config.json"))
    same = all(before.get(name) == getattr(config, name) for name in ("label2id", "hidden_size", "vocab_size"))
    known = {fingerprint(model.state_dict()): thresholds or {}}
    known = {**known, **(before.get("classifiers", {}) if same else {}), **known}  # the new ones first, and last word
    config.classifiers = dict(list(known.items())[:4])
    vars(config).pop("thresholds", None)  # of a model that was loaded
    with whole_file(model_path) as temporary:
        save_tensors(model.state_dict(), temporary)
        save_pretrained_whole(folder, config, tokenizer)


def export_model(model, tokenizer, label2idx, folder, max_len):
    """Write a model to `folder` as transformers' BertForSequenceClassification: for all that reads that format.

    Its tokenizer cuts at max_len where it is asked for truncation, and always the end. The tuned thresholds are
    carried along in config.json.
    """
    config = labelled_config(model, label2idx)
    config.classifier_dropout = model.drop.p
    with torch.device("meta"):  # spends no time on random weights
        exported = BertForSequenceClassification(config)
    exported.bert, exported.classifier = model.bert, model.fc
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_len
    save_pretrained_whole(folder, exported, tokenizer)


def fingerprint(state):
    """Return a hash of the classifier in a state dict: it ties the labels in config.json to these weights."""
    weight, bias = (state[name].cpu().numpy().tobytes() for name in classifier)
    return hashlib.sha256(weight + bias).hexdigest()


def load_model(model_path, label2idx_path="./data/label2idx.json"):
    """Return (model, tokenizer, label2idx) of a trained model; needs no network.

    model_path: a .pth with config.json and tokenizer beside it; a lone .pth from the article's code, for which the
    labels come from `label2idx_path`, sizes and tokenizer from `pretrained_model`; or the folder of a
    BertForSequenceClassification, as export_model writes it. The model is on the CPU, in evaluation mode.
    Raises InputError if a file is missing, broken, or does not fit the others.
    """
    state = load_state(model_path)
    folder, written, tuned = read_config(model_path, state, label2idx_path)
    complete = written is not None
    encoder = folder if complete else pretrained_model
    config = load_pretrained(BertConfig, encoder)
    config.thresholds = tuned
    tokenizer = load_pretrained(BertTokenizer, encoder, trained=True)
    if complete:
        label2idx = {label: column for column, label in config.id2label.items()}
    else:
        label2idx = load_label2idx(label2idx_path)
    if state["fc.bias"].numel() != len(label2idx):
        raise InputError(f"{model_path}: has {state['fc.bias'].numel()} labels, but {len(label2idx)} are listed in "
                         f"{folder if complete else label2idx_path}; they belong to different runs")
    bert = {key.removeprefix("bert."): value for key, value in state.items() if key.startswith("bert.")}
    try:
        with locally():  # given a state dict, from_pretrained spends no time on random weights
            bert = BertModel.from_pretrained(None, config=config, state_dict=bert, dtype=torch.float32)
        model = BertMultiLabelCls(None, len(label2idx), bert=bert)
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{model_path}: does not fit the encoder in {encoder} ({first_line(error)})") from None
    return model.eval(), tokenizer, label2idx


def read_config(model_path, state, label2idx_path):
    """Return (folder, config.json, tuned thresholds) of a trained model; None for a config.json that is not its own.

    Raises InputError if it is that of another model.
    """
    exported = os.path.isdir(model_path)
    folder = model_path if exported else os.path.dirname(model_path) or "."
    config_path = os.path.join(folder, "config.json")
    written = load_object(config_path) if exported or os.path.exists(config_path) else {}
    if exported:
        if written.get("problem_type") not in (None, "multi_label_classification"):
            raise InputError(f"{config_path}: its problem_type is {written['problem_type']!r}; only a model that was "
                             "trained with a sigmoid for each label fits here: multi_label_classification")
        return folder, written, written.get("thresholds") or {}
    if "classifiers" not in written:
        return folder, None, {}
    if fingerprint(state) not in written["classifiers"]:
        raise InputError(f"{model_path}: is not the model that {config_path} was written for, so its labels are "
                         "unknown; train again, or move config.json away to use "
                         f"{label2idx_path} and the encoder {pretrained_model}")
    return folder, written, written["classifiers"][fingerprint(state)]


def check_max_len(max_len, config):
    """Raise InputError if texts of `max_len` tokens are longer than the encoder has positions for, or hold no text."""
    check_number("max_len", max_len, 3, whole=True)  # [CLS], one token, [SEP]
    if max_len > config.max_position_embeddings:
        raise InputError(f"max_len = {max_len}: this encoder takes at most {config.max_position_embeddings} tokens")


def load_state(model_path):
    """Return the state dict at `model_path`, a .pth or a folder, on the CPU. Raises InputError if it is none."""
    exported = os.path.isdir(model_path)
    path = os.path.join(model_path, "model.safetensors") if exported else model_path
    if not os.path.exists(path):
        raise InputError(f"{path}: there is no trained model " + (
            "in this folder; a .pth is named by its file, other weights become model.safetensors by save_pretrained"
            if exported else "yet; run: python train.py"))
    state = load_tensors(path)
    if exported:
        state = {re.sub(r"^classifier\.", "fc.", name): tensor for name, tensor in state.items()}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), torch.Tensor) for name in classifier):
        raise InputError(f"{model_path}: not a checkpoint of this project (it has no {' and '.join(classifier)})")
    state.pop("bert.embeddings.position_ids", None)  # written by transformers before 4.31
    return state


def load_tensors(path):
    """Return what torch.save wrote to `path`, on the CPU; runs no code from it. Raises InputError if it can't.

    A file of safetensors will do as well.
    """
    try:
        if path.endswith(".safetensors"):
            with open(path, "rb") as file:  # read, not mapped: Windows replaces no mapped file
                return safetensors.torch.load(file.read())
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no one kind of error for a file that is cut short or hostile
        raise InputError(f"{path}: not a checkpoint of this project ({first_line(error)})") from None


def choose_precision(precision, device):
    """Return "bf16", "fp16" or "fp32": `precision`, or for "auto" the fastest that `device` computes natively.

    Never float16 on a CPU, where it is slower than float32 a hundred times and more.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch without support for it
        raise InputError(f"device = {str(device)!r}: cannot be used ({first_line(error)})") from None
    if precision not in ("auto", "bf16", "fp16", "fp32"):
        raise InputError(f'precision = {precision!r}: must be "auto", "bf16", "fp16" or "fp32"')
    on_gpu = torch.device(device).type == "cuda"
    if precision == "fp16" and not on_gpu:
        raise InputError('precision = "fp16": only on a GPU; use "auto"')
    if precision != "auto":
        return precision
    if on_gpu:
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def mixed(device, precision):
    """Return the autocast context for a precision that choose_precision returned."""
    dtype = dtypes[precision]
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not torch.float32)


def set_up(model, compiled, processes):
    """Return what runs forward and backward for `model`: itself, compiled, or joined to the other processes'."""
    torch.backends.cuda.matmul.allow_tf32 = True
    reuse_memory()
    runner = torch.compile(model) if compiled else model
    return DistributedDataParallel(runner, forward_sync_buffers=False) if processes > 1 else runner


@contextmanager
def naming_memory(input_ids):
    """Raise InputError, with the constants to change, where a block for these ids (B, T) runs out of GPU memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        texts, tokens = input_ids.shape
        raise InputError(f"out of GPU memory with {texts} texts of {tokens} tokens; lower batch_size (in train.py "
                         "halve it and double accumulation_steps) or max_len") from None


@torch.inference_mode()
def gather_probs(model, batches, precision="fp32"):
    """Return (probs, labels), each (N, C) float32 on the CPU, in the order of the batches.

    `batches` gives (input_ids, attention_mask, token_type_ids, labels), or the first three: then labels is None.
    precision: that of autocast; a model whose weights are in a precision of their own needs none.
    Raises InputError if a probability is not a number, or memory runs out.
    """
    model.eval()
    device = model.fc.weight.device
    probs, labels = [], []
    for batch in batches:
        with naming_memory(batch[0]), mixed(device, precision):
            probs.append(model(*(tensor.to(device, non_blocking=True) for tensor in batch[:3])))
        labels.extend(batch[3:])
    probs = torch.cat(probs).cpu()
    if not probs.isfinite().all():
        raise InputError("the network gives no numbers any more; set precision = \"fp32\", or in training lower lr and "
                         "head_lr, or raise warmup_ratio")
    return probs, torch.cat(labels).cpu() if labels else None
