"""The network, the pretrained encoder it starts from, and the folder of a trained model.

A trained model's folder needs nothing else to predict, and transformers reads it as it is:

    model/multi_label_cls.pth   the article's state dict, keys bert.* and fc.*
    model/model.safetensors     the same weights as a BertForSequenceClassification
    model/config.json           sizes, labels, tuned thresholds, truncation
    model/tokenizer*.json       the tokenizer
    model/previous/             the finished model before this one
"""

import copy
import ctypes
import functools
import glob
import inspect
import math
import os
import re
import shutil
import threading
import unicodedata
import weakref
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import islice

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from huggingface_hub import HfApi, constants, snapshot_download
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, BertTokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from data_preprocess import InputError, check_number, dump_jsonl, fsync_file, load_json_object
from data_preprocess import load_label2idx, log, move_file, short_message, sibling_path, write_error

default_model = "bert-base-chinese"  # do not change: the one that a small BERT replaces if it is missing
pretrained_model = default_model  # any BERT: a Hugging Face id, or a local folder
init_ridge = 0.1  # added to the covariance in init_from_texts, as a share of its mean variance
init_prior_texts = 100  # added to those of each label there, as alike as all texts
hub_timeout = 8  # seconds after which the hub counts as unreachable
# What training wraps around a network stands before the names of its weights.
known_prefixes = r"((module|_orig_mod|model|bert|bert_model|encoder|auto_model|transformer|0)\.)*"
batches_in_flight = 8  # batches a GPU is given before the CPU waits for the first of them
load_lock = threading.RLock()  # one thread at a time loads
packed_layers = weakref.WeakKeyDictionary()  # of a model that is to predict: a copy of it has none
tokenizer_files = "*token*.json vocab.* *.model merges.txt bpe.codes".split()
run_files = (
    "*.safetensors metrics.json history.jsonl errors.jsonl".split() + tokenizer_files + ["config.json"]
)


class BertMultiLabelCls(nn.Module):
    """BERT, dropout, a linear layer and a sigmoid: one probability per label.

    hidden_size: of the encoder; None takes it from there. class_num: C, the number of labels.
    bert: a BertModel; by default `pretrained_model` is loaded.
    Raises InputError if hidden_size is not the encoder's, or if the encoder cannot be loaded.
    """

    def __init__(self, hidden_size, class_num, dropout=0.1, bert=None):
        super().__init__()
        bert = load_pretrained(BertModel, pretrained_model) if bert is None else bert
        if hidden_size not in (None, bert.config.hidden_size):
            raise InputError(f"hidden_size = {hidden_size}, but the encoder has {bert.config.hidden_size}")
        self.fc = nn.Linear(bert.config.hidden_size, class_num, dtype=torch.float32)
        self.drop = FastDropout(dropout)
        self.bert = bert
        for parent in list(bert.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Dropout:
                    setattr(parent, name, FastDropout(child.p))

    def forward(self, input_ids, attention_mask, token_type_ids):
        """Return probabilities (B, C), float32, of three integer tensors (B, T).

        They are probabilities, not logits: the loss is BCELoss, not BCEWithLogitsLoss.
        """
        pooled = pooler_output(self.bert, input_ids, attention_mask, token_type_ids)  # = self.bert(...)[1]
        with torch.autocast(pooled.device.type, enabled=False):  # BCELoss needs float32
            return torch.sigmoid(self.fc(self.drop(pooled.float())))


def init_bias(fc, label_counts, num_texts):
    """Set the bias of the classifier to the log odds of each label's share; label_counts (C,) of num_texts.

    Lin et al. 2017, arXiv 1708.02002, section 4.1. With a bias of 0 every label starts at a probability
    of 0.5; the first steps only push all of them down, and the model learns to predict nothing.
    """
    smallest = 1 / (num_texts + 1)  # keeps the odds finite
    with torch.no_grad():
        fc.bias.copy_((label_counts.float() / num_texts).clamp(smallest, 1 - smallest).logit())


@torch.inference_mode()
def pooled_sums(model, dataloader, dtype):
    """Return sums over the texts: of the pooled output (1, H), of its products (H, H), and by label (C, H).

    In float64: the output differs little from text to text, and the sums of products are subtracted.
    """
    model.eval()
    num_labels, hidden_size = model.fc.weight.shape
    sums = [torch.zeros(n, hidden_size, dtype=torch.float64) for n in (1, hidden_size, num_labels)]
    for *inputs, labels in dataloader:
        with oom_hint(inputs[0]), autocast(model.fc.weight.device, dtype):
            inputs = (tensor.to(model.fc.weight.device, non_blocking=True) for tensor in inputs)
            pooled = pooler_output(model.bert, *inputs).double().cpu()
        for total, left in zip(sums, (torch.ones(len(pooled), 1), pooled, labels), strict=True):
            total += left.T.double() @ pooled
    return sums


def init_from_texts(fc, label_counts, num_texts, total, products, by_label):
    """Start the classifier from a linear discriminant analysis of pooled_sums, on top of init_bias.

    Where a label has a dozen texts, a few epochs leave its weights where they started, at random. Hastie,
    Tibshirani and Friedman 2009, The Elements of Statistical Learning, section 4.3; here each label against
    all texts, and the mean of its n texts is drawn towards theirs as if init_prior_texts were added.
    """
    mean = total[0] / num_texts
    covariance = products / num_texts - torch.outer(mean, mean)
    ridge = init_ridge * covariance.diagonal().mean() + 1e-12  # all texts may be alike
    counts = label_counts[:, None]
    shifts = (by_label - counts * mean) / (counts + init_prior_texts)
    weights = torch.linalg.solve(covariance + ridge * torch.eye(len(mean)), shifts.T).T
    with torch.no_grad():
        fc.weight.copy_(weights)
        fc.bias.sub_((weights @ mean + (weights * shifts).sum(1) / 2).to(fc.bias))


def parameter_groups(model, encoder_lr, head_lr, weight_decay):
    """Return the optimizer's groups: encoder, head (pooler, classifier); biases, LayerNorm do not decay."""
    head_ids = {id(p) for p in (*model.bert.pooler.parameters(), *model.fc.parameters())}
    groups = {}
    for p in sorted(model.parameters(), key=lambda p: id(p) in head_ids):  # the encoder first
        key = head_lr if id(p) in head_ids else encoder_lr, weight_decay if p.ndim > 1 else 0.0
        groups.setdefault(key, []).append(p)
    return [{"params": params, "lr": key[0], "weight_decay": key[1]} for key, params in groups.items()]


def clip_grad_norm_(parameters, max_norm):
    """Do what nn.utils.clip_grad_norm_ does; on a CPU the norm takes half the time."""
    parameters = [p for p in parameters if p.grad is not None]
    if parameters[0].device.type != "cpu":
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    grads = [p.grad.flatten() for p in parameters]
    total_norm = torch.stack([torch.dot(grad, grad) for grad in grads]).sum().sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm)
    return total_norm


def find_encoder(name):
    """Return (folder, "") of the encoder `name`, or (None, an error message).

    Searched in this order: a folder of that name, the local cache without a network call, the hub.
    """
    name = os.fspath(name)
    if os.path.isdir(name):
        return name, ""
    with suppress(OSError, ValueError):  # not cached; ValueError: not a valid id, such as ./model/none
        folder = snapshot_download(name, local_files_only=True)
        names = " ".join(os.listdir(folder))
        required = (r"\bconfig\.json", r"vocab\.|tokenizer\.json|\.model", r"\.safetensors|\.bin")
        if all(re.search(pattern, names) for pattern in required):
            return folder, ""
    try:
        names = list_hub_files(name)
    except Exception as error:  # anything that the network, a proxy or the hub may answer
        return None, (
            f"the encoder {name} was not found; tried: a folder of that name in {os.getcwd()}; the "
            f"cache {constants.HF_HUB_CACHE}; the hub {constants.ENDPOINT} ({short_message(error)}); to get "
            "it, set a mirror (HF_ENDPOINT=https://hf-mirror.com), or copy its config.json, vocab.txt and "
            "model.safetensors into a folder and set pretrained_model in bert_multilabel_cls.py to it"
        )
    weights = "*.safetensors*" if ".safetensors" in " ".join(names) else "pytorch_model*.bin*"
    patterns = ["config.json", *tokenizer_files, weights]
    try:
        return snapshot_download(name, allow_patterns=patterns), ""
    except (OSError, ValueError) as error:  # no reason to train something else instead
        reason = f"the download failed ({short_message(error)})"
        raise InputError(f"{name}: {reason}; run again to continue it") from None


def list_hub_files(name):
    """Return the names of the files of `name` on the hub, or raise an error, within hub_timeout."""
    result = [TimeoutError(f"no answer within {hub_timeout} s")]

    def ask_hub():
        """Put the names, or the error, into `result`."""
        try:
            siblings = HfApi().model_info(name, timeout=hub_timeout / 2).siblings
            result[0] = [file.rfilename for file in siblings]
        except Exception as error:
            result[0] = error

    thread = threading.Thread(target=ask_hub, daemon=True)  # the request's own timeout does not cover DNS
    thread.start()
    thread.join(hub_timeout)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def load_pretrained(cls, name, fine_tuned=False):
    """Return cls.from_pretrained(name); cls is BertModel (returned in float32), BertTokenizer or BertConfig.

    fine_tuned: keep the tokenizer's own lower-casing; for a pretrained encoder the vocabulary decides.
    Raises InputError if it is not found (without a network within hub_timeout), or would be read wrongly.
    """
    folder, error_message = find_encoder(name)
    try:
        with offline():
            if not folder:
                loaded = cls.from_pretrained(name)
            elif cls is BertModel:
                loaded = load_encoder(folder)
            else:
                config = load_config(folder)
                loaded = config if cls is BertConfig else load_tokenizer(folder, config, fine_tuned)
    except InputError:
        raise
    except Exception as error:  # each format has its own errors
        reason = f"{name}: cannot be loaded ({short_message(error)}); incomplete, or Git LFS pointers?"
        raise InputError(error_message or reason) from None
    if cls is BertTokenizer and len(loaded) <= len(loaded.all_special_tokens):
        raise InputError(error_message or f"{name}: has no tokenizer files, or an empty vocabulary")
    return loaded


def load_config(folder):
    """Return the BertConfig in a folder. Raises InputError unless it is that of a BERT encoder."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path) and (found := glob.glob("bert_config.json", root_dir=folder)):
        raise InputError(f"{folder}: rename its {found[0]} to config.json")
    if not os.path.exists(path) and (found := glob.glob("*/config.json", root_dir=folder)):
        raise InputError(f"{folder}: has no config.json, but {', '.join(found)}; name that folder")
    values = load_json_object(path)
    if "quantization_config" in values:
        raise InputError(f"{folder}: its weights are quantized; take those it was made from")
    for name, supported in (("model_type", "bert"), ("position_embedding_type", "absolute")):
        if (found := values.get(name, supported)) != supported:
            raise InputError(f'{folder}: its {name} is "{found}", but only "{supported}" is supported')
    if values.get("is_decoder") or values.get("add_cross_attention"):
        raise InputError(f"{folder}: a decoder (is_decoder or add_cross_attention), not an encoder")
    try:
        config = BertConfig.from_pretrained(folder)
    except Exception as error:  # it checks some of the values
        raise InputError(f"{path}: not the config of a BERT ({short_message(error)})") from None
    sizes = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size type_vocab_size"
    for name in (*sizes.split(), "max_position_embeddings"):
        check_number(f"{path}: {name}", getattr(config, name), 1, 2**31, integer=True)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps"):
        check_number(f"{path}: {name}", getattr(config, name), 0, 1)
    return config


def load_encoder(folder):
    """Return the BertModel of a folder in float32. Raises InputError unless all its weights are there."""
    config, paths = load_config(folder), weight_files(folder)
    weights, _ = split_state_dict(read_state_dict(paths)[0], paths[0])
    if new_pooler := not any(name.startswith("pooler.") for name in weights):
        log("note", f"{folder} has no pooler; a new one is trained")
    return build_encoder(config, weights, paths[0], new_pooler)


def weight_files(folder):
    """Return the paths of the weights in a folder. Raises InputError if there are none for PyTorch."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if os.path.exists(path := os.path.join(folder, name)):
            return [path]
        if os.path.exists(path := os.path.join(folder, f"{name}.index.json")):  # several files
            weight_map = load_json_object(path).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
                raise InputError(f"{path}: not the index of weights in several files")
            return [os.path.join(folder, name) for name in sorted(set(weight_map.values()))]
    foreign = {"*.h5": "TensorFlow", "*.ckpt*": "TensorFlow", "*.msgpack": "Flax", "*.pdparams": "Paddle"}
    for pattern, library in foreign.items():
        if glob.glob(pattern, root_dir=folder):
            raise InputError(f"{folder}: a {library} checkpoint; convert it to PyTorch (model.safetensors)")
    raise InputError(f"{folder}: has no weights; copy model.safetensors or pytorch_model.bin into it")


def read_state_dict(paths):
    """Return (state dict, info) of one file or of several; info is what save_model put into a .pth."""
    state_dict, info = {}, {}
    for path in paths:
        loaded = torch_load(path)
        metadata = getattr(loaded, "_metadata", None)
        info |= metadata.get("", {}) if isinstance(metadata, dict) else {}
        for name in ("state_dict", "model_state_dict", "model"):
            if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
                loaded = loaded[name]
        if not isinstance(loaded, dict) or not any(map(torch.is_tensor, loaded.values())):
            raise InputError(f"{path}: not a checkpoint of PyTorch (no weights by name)")
        state_dict |= {str(key): tensor for key, tensor in loaded.items() if torch.is_tensor(tensor)}
    return dict(sorted(state_dict.items())), info  # safetensors gives them in any order


def split_state_dict(state_dict, path):
    """Return (encoder, others): the weights by their names in a BertModel, and those around it.

    Prefixes that training adds, such as module., are removed. Raises InputError if there is no BERT.
    """
    found = "embeddings.word_embeddings.weight"
    prefix = min((key.removesuffix(found) for key in state_dict if key.endswith(found)), key=len, default="?")
    if not re.fullmatch(known_prefixes, prefix):
        reason = f"its weights are called {prefix}…" if prefix != "?" else f"it has no {found}"
        raise InputError(
            f"{path}: not the weights of a BERT: {reason}, but {', '.join(list(state_dict)[:3])}"
        )
    encoder, others, outer = {}, {}, prefix.removesuffix("bert.")
    for key, tensor in state_dict.items():
        name = re.sub(r"\bgamma$", "weight", re.sub(r"\bbeta$", "bias", key))  # as in TensorFlow
        is_encoder = name.startswith(tuple(prefix + part for part in ("embeddings.", "encoder.", "pooler.")))
        if is_encoder and not name.endswith(("embeddings.position_ids", "embeddings.token_type_ids")):
            encoder[name.removeprefix(prefix)] = tensor
        elif not is_encoder:
            others[name.removeprefix(outer)] = tensor
    return encoder, others


def build_encoder(config, weights, path, new_pooler=False):
    """Return a BertModel in float32 with these weights. Raises InputError unless each has its place."""
    layers = {int(number) for key in weights for number in re.findall(r"^encoder\.layer\.(\d+)\.", key)}
    if len(layers) != config.num_hidden_layers or max(layers, default=0) >= config.num_hidden_layers:
        sizes = f"weights of {len(layers)} layers, but config.json says num_hidden_layers"
        raise InputError(f"{path}: has {sizes} = {config.num_hidden_layers}; correct it")
    try:
        with torch.device("meta"):  # shapes alone
            expected = BertModel(config, add_pooling_layer=not new_pooler).state_dict()
    except Exception as error:  # sizes that do not go together, an activation that it does not know
        raise InputError(f"{path}: its config.json is not that of a BERT ({short_message(error)})") from None
    wrong = [k for k in expected.keys() & weights if weights[k].shape != expected[k].shape]
    wrong += [k for k in expected.keys() & weights if not weights[k].is_floating_point()]
    damaged = [k for k in weights if not weights[k].isfinite().all()]
    for names, reason in (
        (expected.keys() - weights, "missing"),
        (weights.keys() - expected, "not those of a BERT"),
        (wrong, "of another type or shape than config.json says"),
        (damaged, "infinite or NaN"),
    ):
        if names:
            some = ", ".join(sorted(names)[:3]) + ", …" * (len(names) > 3)
            raise InputError(
                f"{path}: does not fit its config.json: {len(names)} weights are {reason}: {some}"
            )
    return BertModel.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)


def load_tokenizer(folder, config, fine_tuned=False):
    """Return the tokenizer of a folder: a BertTokenizer, or the one that it names, or its tokenizer.json.

    Raises InputError if it needs a package that is not installed, or does not fit the encoder.
    """
    paths = [os.path.join(folder, name) for name in ("tokenizer_config.json", "tokenizer.json")]
    settings, described = (load_json_object(path) if os.path.exists(path) else {} for path in paths)
    name = settings.get("tokenizer_class") or getattr(config, "tokenizer_class", None) or "BertTokenizer"
    name = "BertJapaneseTokenizer" if "word_tokenizer_type" in settings else str(name)
    is_bert, is_known = name.removesuffix("Fast") == "BertTokenizer", hasattr(transformers, name)
    if not described and glob.glob("*.model", root_dir=folder) and not find_spec("sentencepiece"):
        raise InputError(f"{folder}: its tokenizer needs a package; run: pip install sentencepiece protobuf")
    if not described and not is_known:
        reason = "is not one of transformers, and code of its own is not run"
        raise InputError(f"{folder}: its tokenizer, {name}, {reason}")
    options = {"tokenizer_type": "bert-japanese"} if name == "BertJapaneseTokenizer" else {}
    cls = AutoTokenizer if is_known and not is_bert else PreTrainedTokenizerFast
    cls = BertTokenizer if is_bert and is_wordpiece(described) else cls
    try:
        tokenizer = cls.from_pretrained(folder, **options)
        if (tokenizer.mask_token_id or 0) >= config.vocab_size:
            options["mask_token"] = None  # transformers added it; nothing here needs it
            tokenizer = cls.from_pretrained(folder, **options)
        if cls is BertTokenizer and not fine_tuned and (changes := choose_casing(tokenizer, settings)):
            tokenizer = cls.from_pretrained(folder, **options, **changes)
    except Exception as error:
        reason = f"its tokenizer, {name}, cannot be loaded ({short_message(error)})"
        raise InputError(f"{folder}: {reason}") from None
    check_vocabulary(tokenizer, folder, config.vocab_size)
    return tokenizer


def is_wordpiece(described):
    """Return whether a tokenizer.json, {} if there is none, is what BertTokenizer makes of its vocabulary."""
    kinds = {name: (described.get(name) or {}).get("type") for name in ("normalizer", "pre_tokenizer")}
    model = described.get("model") or {}
    is_usual = kinds == {"normalizer": "BertNormalizer", "pre_tokenizer": "BertPreTokenizer"}
    is_usual &= model.get("continuing_subword_prefix", "##") == "##"
    return not described or is_usual and model.get("type", "WordPiece") == "WordPiece"


def choose_casing(tokenizer, settings):
    """Return {setting: value} where a BertTokenizer's vocabulary speaks against its do_lower_case.

    Folders are often wrong: bert-base-chinese says do_lower_case = false, yet knows http and not HTTP. Where
    lower-casing is switched on, accents are stripped only if no word of the vocabulary has any.
    """
    words = {token.removeprefix("##") for token in tokenizer.get_vocab()}
    cased = [word for word in words if word.isalpha() and word.lower() != word.upper()]
    has_capitals = sum(word != word.lower() for word in cased) > len(cased) / 100
    accented = sum(word != strip_accents(word) for word in words if not word.isascii())
    changes = {}
    if cased and tokenizer.do_lower_case == has_capitals:
        changes["do_lower_case"] = not has_capitals
    lower, explicit = changes.get("do_lower_case", tokenizer.do_lower_case), settings.get("strip_accents")
    if lower and explicit is None and accented > (0 if changes else len(words) / 1000):
        changes["strip_accents"] = False
    return changes


def strip_accents(word):
    """Return a word as BERT's normalizer does, which takes Hangul and voiced kana apart too."""
    return "".join(c for c in unicodedata.normalize("NFD", word) if unicodedata.category(c) != "Mn")


def check_vocabulary(tokenizer, folder, vocab_size):
    """Raise InputError if a vocabulary has more ids than the encoder embeddings, or is of another kind."""
    vocab = tokenizer.get_vocab()
    last = max(vocab, key=vocab.get, default="")
    if vocab and vocab[last] >= vocab_size:
        starts_with_bom = any(token.startswith("\ufeff") for token in vocab)
        cause = "vocab.txt starts with a byte order mark" if starts_with_bom else "tokens were added to it"
        reason = f"{cause}: {last!r} has the id {vocab[last]}, but the encoder has {vocab_size} embeddings"
        raise InputError(f"{folder}: the tokenizer does not fit; {reason}")
    foreign = [token for token in vocab if re.match(r"[▁Ġ].|.+(@@|</w>)$", token)]
    if isinstance(tokenizer, BertTokenizer) and len(foreign) > len(vocab) / 20:
        reason = f"the pieces of its vocab.txt ({', '.join(foreign[:3])}) are not WordPiece"
        raise InputError(f"{folder}: {reason}; copy the tokenizer.json of this encoder too")
    try:
        tokenizer("a \U0010ffff")
    except Exception as error:  # without an unknown token, what is unknown is an error
        raise InputError(f"{folder}: the tokenizer cannot be used ({short_message(error)})") from None


@contextmanager
def offline():
    """Let transformers load and save without the hub, which it would retry for minutes, and in silence.

    One thread at a time: the switches are those of the whole process.
    """
    with load_lock:
        before = constants.HF_HUB_OFFLINE, transformers_logging.is_progress_bar_enabled()
        verbosity = transformers_logging.get_verbosity()
        constants.HF_HUB_OFFLINE = True
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()  # its table of weights: ours is said in a sentence
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before[0]
            transformers_logging.set_verbosity(verbosity)
            if before[1]:
                transformers_logging.enable_progress_bar()


def save_model(model, tokenizer, label2idx, model_path, thresholds=None, truncation=(128, 0), history=None):
    """Write the folder of a trained model; model_path names it, or the .pth in it.

    thresholds: tuned on dev. truncation: max_len, keep_tail. history: a dict per epoch, for history.jsonl.
    Raises InputError, with the old model untouched.
    """
    config = copy.deepcopy(model.bert.config)
    config.id2label, config.label2id = {idx: label for label, idx in label2idx.items()}, label2idx
    config.problem_type, config.dtype = "multi_label_classification", "float32"
    config.thresholds, config.truncation = thresholds or {}, list(truncation)
    config.classifier_dropout = model.drop.p
    with torch.device("meta"):  # allocates no random weights
        exported = BertForSequenceClassification(config)
    exported.bert, exported.classifier = model.bert, model.fc
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = truncation[0]
    state_dict = model.state_dict()
    state_dict._metadata[""].update(model_info(config))  # torch.save keeps it, load_state_dict ignores it
    folder, pth_name = os.path.split(get_pth_path(model_path))
    with atomic_folder(folder or ".", pth_name) as new_folder, offline():
        exported.save_pretrained(new_folder)
        tokenizer.save_pretrained(new_folder)
        torch.save(state_dict, os.path.join(new_folder, pth_name))
        if history:
            dump_jsonl(history, os.path.join(new_folder, "history.jsonl"))


@contextmanager
def atomic_folder(folder, pth_name=None):
    """Give an empty folder to write to; at the end of the block its files move to `folder`.

    pth_name: of a trained model; a finished one that is replaced goes to folder/previous.
    Raises InputError, with the old files untouched, if they cannot be written.
    """
    unfinished, finished = (os.path.join(folder, name) for name in ("unfinished.tmp", "finished.tmp"))
    try:
        complete_save(folder, pth_name)
        shutil.rmtree(unfinished, ignore_errors=True)
        os.makedirs(unfinished)
        yield unfinished
        for path in (os.path.join(unfinished, name) for name in os.listdir(unfinished)):
            shutil.copymode(os.path.join(unfinished, "config.json"), path)  # safetensors are written as 0600
            fsync_file(path)
        if pth_name and is_finished(folder, pth_name):
            os.makedirs(os.path.join(folder, "previous.tmp"))
            log("note", f"the finished model in {folder} moves to {os.path.join(folder, 'previous')}")
        os.rename(unfinished, finished)
        complete_save(folder, pth_name)
    except Exception as error:  # a full disk: an OSError, torch.save's RuntimeError, or one of safetensors
        raise InputError(write_error(folder, error)) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_finished(folder, pth_name):
    """Return whether a folder has a model that is worth keeping: of a finished run, or from elsewhere."""
    is_ours = "truncation" in read_values(os.path.join(folder, "config.json"))
    has_weights = any(os.path.exists(os.path.join(folder, name)) for name in (pth_name, "model.safetensors"))
    return os.path.exists(os.path.join(folder, "metrics.json")) or has_weights and not is_ours


def complete_save(folder, pth_name=None):
    """Move the files that atomic_folder finished into place, also those that a killed run left.

    config.json is removed first and comes last: in between, the folder does not load.
    """
    finished, previous = os.path.join(folder, "finished.tmp"), os.path.join(folder, "previous.tmp")
    if os.path.isdir(finished) and os.path.isdir(previous):
        keep_previous(folder, pth_name)
    shutil.rmtree(previous, ignore_errors=True)  # of a save that was not finished: empty
    old_config = os.path.join(folder, "config.json")
    if os.path.exists(os.path.join(finished, "config.json")) and os.path.exists(old_config):
        for pattern in tokenizer_files if pth_name else ():  # of an earlier run with another tokenizer
            for name in set(glob.glob(pattern, root_dir=folder)).difference(os.listdir(finished)):
                os.remove(os.path.join(folder, name))
        os.remove(os.path.realpath(old_config))  # nothing has been moved before
    if os.path.isdir(finished):
        for name in sorted(os.listdir(finished), key="config.json".__eq__):
            move_file(os.path.join(finished, name), os.path.join(folder, name))
        os.rmdir(finished)


def read_values(path):
    """Return the dict in a JSON file, {} if there is none or it is damaged."""
    with suppress(InputError):
        return load_json_object(path)
    return {}


def keep_previous(folder, pth_name):
    """Move all files of the finished run in `folder` to folder/previous, by way of previous.tmp."""
    previous = os.path.join(folder, "previous.tmp")
    run_name = read_values(os.path.join(folder, "metrics.json")).get("run_name")
    curves = [os.path.join("runs", glob.escape(run_name))] if run_name and isinstance(run_name, str) else []
    for pattern in (*curves, glob.escape(pth_name), *run_files):
        for name in glob.glob(pattern, root_dir=folder):
            if os.path.exists(os.path.join(folder, name)):  # else a link whose file has been moved
                move_file(os.path.join(folder, name), os.path.join(previous, name))
    shutil.rmtree(os.path.join(folder, "previous"), ignore_errors=True)
    os.rename(previous, os.path.join(folder, "previous"))


def model_info(config):
    """Return what has to be the same in config.json and in the .pth beside it."""
    labels = [config.id2label[idx] for idx in range(len(config.id2label))]
    return {"labels": labels, "thresholds": config.thresholds, "truncation": list(config.truncation)}


def get_pth_path(model_path):
    """Return the path of the .pth: model_path may name it, or its folder."""
    model_path = os.fspath(model_path)
    is_file = os.path.isfile(model_path) or model_path.endswith((".pth", ".pt", ".bin"))
    return model_path if is_file else os.path.join(model_path, "multi_label_cls.pth")


def load_model(model_path, label2idx_path="./data/label2idx.json"):
    """Return (model, tokenizer, label2idx) of a trained model, on the CPU, in eval mode; needs no network.

    model_path: a folder written by save_model, or by transformers for a BertForSequenceClassification; or a
    .pth. One of the article takes its labels from label2idx_path, the rest from `pretrained_model`.
    model.bert.config has the tuned `thresholds` and `truncation`: [max_len, keep_tail].
    Raises InputError if a file is missing or broken, or does not fit the others.
    """
    weights, head, info, path = load_weights(model_path)
    from_article = path == get_pth_path(model_path) and "labels" not in info
    encoder = pretrained_model if from_article else os.path.dirname(path) or "."
    config = load_pretrained(BertConfig, encoder)
    tokenizer = load_pretrained(BertTokenizer, encoder, fine_tuned=True)
    if from_article:
        label2idx = load_label2idx(label2idx_path)
        config.thresholds, config.truncation = {}, [128, 0]  # as the article does
    else:
        label2idx = complete_config(config, encoder, len(head["bias"]), tokenizer.model_max_length)
    if "labels" in info and any(info.get(key) != value for key, value in model_info(config).items()):
        raise InputError(f"{path}: of another run than the config.json beside it; train again")
    if isinstance(by_label := config.thresholds.get("by_label"), list):  # as written before they had names
        config.thresholds["by_label"] = dict(zip(label2idx, by_label))
    if (num_labels := len(head["bias"])) != len(label2idx):
        source = label2idx_path if from_article else encoder
        raise InputError(f"{path}: has {num_labels} labels, but {source} lists {len(label2idx)}")
    if head["weight"].shape != (num_labels, config.hidden_size):
        sizes = f"{tuple(head['weight'].shape)}, not {(num_labels, config.hidden_size)}"
        raise InputError(f"{path}: does not fit {encoder}: the classifier's weight is {sizes}")
    with offline():  # with a state dict, from_pretrained initialises no random weights
        model = BertMultiLabelCls(None, num_labels, bert=build_encoder(config, weights, path))
    model.fc.load_state_dict(head)
    return model.eval(), tokenizer, label2idx


def complete_config(config, folder, num_labels, model_max_length):
    """Add to the config of a trained folder what only ours have; return its {label: column}."""
    values = load_json_object(os.path.join(folder, "config.json"))
    if "id2label" not in values:
        config.id2label = {idx: f"LABEL_{idx}" for idx in range(num_labels)}
        log("note", f"{folder}: its config.json has no id2label; the labels are called LABEL_0, LABEL_1, …")
    names = list(config.id2label.values())
    if set(config.id2label) != set(range(len(names))) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{folder}: its id2label does not number the labels 0, 1, 2, …")
    if config.problem_type not in (None, "multi_label_classification"):
        raise InputError(f"{folder}: its problem_type is {config.problem_type!r}, not multi-label")
    if config.problem_type is None:
        reason = "each is a sigmoid of its own, even if the model was trained with a softmax"
        log("note", f"{folder}: its config.json has no problem_type; of the probabilities {reason}")
    longest = min(model_max_length, config.max_position_embeddings)
    config.thresholds = getattr(config, "thresholds", {})
    config.truncation = getattr(config, "truncation", [longest, 0])
    if not isinstance(config.thresholds, dict) or not isinstance(config.truncation, list):
        raise InputError(f"{folder}: thresholds or truncation in its config.json are not those of a run")
    return {config.id2label[idx]: idx for idx in range(len(config.id2label))}


def load_weights(model_path):
    """Return (weights of the BertModel, those of the classifier, info, path of the file) of a trained model.

    info: what save_model put into the metadata of a .pth.
    """
    pth_path = get_pth_path(model_path)
    if os.path.isdir(pending := sibling_path(pth_path, "finished.tmp")):
        raise InputError(f"{pending}: a save was interrupted; run python train.py again to complete it")
    names = ("config.json", "model.safetensors", "pytorch_model.bin")
    if not any(map(os.path.exists, (pth_path, *(os.path.join(model_path, name) for name in names)))):
        remedy = f"run: python train.py; paths start from {os.getcwd()}"
        raise InputError(f"{pth_path}: there is no trained model yet; {remedy}")
    in_folder = os.path.exists(os.path.join(model_path, "model.safetensors")) or not os.path.exists(pth_path)
    path, *others = weight_files(model_path) if in_folder else [pth_path]
    state_dict, info = read_state_dict([path, *others])
    weights, others = split_state_dict(state_dict, path)
    layer = next((name for name in ("fc", "classifier") if f"{name}.weight" in others), "fc")
    head = {part: others.pop(f"{layer}.{part}", None) for part in ("weight", "bias")}
    if any(tensor is None or not tensor.is_floating_point() or not tensor.ndim for tensor in head.values()):
        found = f", but {', '.join(list(others)[:3])}" * bool(others)
        raise InputError(f"{path}: has no classifier, called fc or classifier{found}")
    if others:
        log("note", f"{path}: passed over: {', '.join(list(others)[:5])}{', …' * (len(others) > 5)}")
    return weights, head, info, path


def torch_load(path):
    """Return what torch.save or safetensors wrote, on the CPU, without running code. Raises InputError."""
    try:
        if path.endswith(".safetensors"):
            with open(path, "rb") as file:  # not mapped: Windows locks mapped files
                return safetensors.torch.load(file.read())
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated or hostile file raises anything
        reason = f"{short_message(error)}; incomplete, or a Git LFS pointer?"
        if "nsupported global" in str(error) or "not an allowed global" in str(error):
            reason = "it has Python objects, which may run code; save model.state_dict() instead"
        raise InputError(f"{path}: not a checkpoint of PyTorch ({reason})") from None


def check_truncation(max_len, keep_tail, config=None):
    """Raise InputError if max_len is out of range for the encoder, or keep_tail for max_len."""
    check_number("max_len", max_len, 3, integer=True)  # [CLS], one token, [SEP]
    check_number("keep_tail", keep_tail, 0, max_len - 2, integer=True)
    limit = config.max_position_embeddings if config else max_len
    if max_len > limit:
        raise InputError(f"max_len = {max_len}: this encoder takes at most {limit} tokens")


def choose_dtype(precision, device):
    """Return the torch dtype for `precision`; "auto" is the fastest that the device supports natively.

    Raises InputError if the device or the precision cannot be used.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch built without it
        in_fork = "; start the workers with spawn, or load the model in them" * ("fork" in str(error))
        reason = f"cannot be used ({short_message(error)}){in_fork}"
        raise InputError(f"device = {str(device)!r}: {reason}") from None
    on_gpu = torch.device(device).type == "cuda"
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision not in ("auto", "bf16", "fp32", *["fp16"] * on_gpu):
        raise InputError(f'precision = {precision!r}: must be "auto", "bf16", "fp32", or on a GPU "fp16"')
    if precision != "auto":
        return dtypes[precision]
    if on_gpu:
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def cpu_has_bf16():
    """Return whether the CPU multiplies bf16 matrices natively."""
    if hasattr(torch.cpu, "get_capabilities"):
        native = torch.cpu.get_capabilities()
        return bool(native.get("avx512_bf16") or native.get("amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # older torch


def autocast(device, dtype):
    """Return the autocast context for a dtype of choose_dtype."""
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not torch.float32)


def limit_threads():
    """Let PyTorch use no more threads than the CPUs that a container allows, and one after a fork."""
    survive_fork()
    if "OMP_NUM_THREADS" not in os.environ:  # else PyTorch counts those of the machine
        torch.set_num_threads(math.ceil(min(torch.get_num_threads(), allowed_cpus())))


@functools.cache
def survive_fork():
    """Let a process that is forked from this one predict too: it has no other thread to wait for."""
    if hasattr(os, "register_at_fork"):
        release, one_thread = load_lock.release, functools.partial(torch.set_num_threads, 1)
        os.register_at_fork(before=load_lock.acquire, after_in_parent=release, after_in_child=release)
        os.register_at_fork(after_in_child=one_thread)  # OpenMP would wait for those of the parent


def allowed_cpus(cgroups="/sys/fs/cgroup", own_cgroup="/proc/self/cgroup"):
    """Return how many CPUs this process may keep busy, by the quotas of its control groups; inf without."""

    def read(path):
        """Return the content of a file, "" if there is none."""
        with suppress(OSError), open(path, encoding="utf-8") as file:
            return file.read().strip()
        return ""

    groups = {"", *(line.split(":", 2)[2] for line in read(own_cgroup).splitlines() if line.count(":") > 1)}
    groups |= {group[: match.start()] for group in groups for match in re.finditer("/", group)}
    quotas = []
    for group in groups:
        quotas.append(read(f"{cgroups}{group}/cpu.max"))  # version 2: "200000 100000" is 2 CPUs
        first = f"{cgroups}/cpu{group}/cpu.cfs_"
        quotas.append(f"{read(first + 'quota_us')} {read(first + 'period_us')}")
    quotas = [quota.split() for quota in quotas if re.fullmatch(r"[1-9]\d* [1-9]\d*", quota)]
    return min((int(quota) / int(period) for quota, period in quotas), default=math.inf)


def wrap_model(model, compile_model, world_size):
    """Return the module to train: the model itself, compiled, or in DistributedDataParallel."""
    torch.backends.cuda.matmul.allow_tf32 = True
    tune_malloc()
    network = torch.compile(model) if compile_model else model
    if world_size == 1:
        return network
    names = inspect.signature(DistributedDataParallel).parameters
    # Torch before 2.13 has the second name only.
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(network, **{sync_buffers: False})


def tune_malloc():
    """Let glibc keep freed blocks: getting them zeroed again took a tenth of a step of BERT-base on a CPU."""
    with suppress(OSError, AttributeError, TypeError):  # other systems do without
        libc = ctypes.CDLL(None)
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):  # M_MMAP_THRESHOLD; some allow 32 MiB at most
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@contextmanager
def oom_hint(input_ids):
    """Raise InputError naming the constants to change if memory runs out with these ids (B, T)."""
    try:
        yield
    except torch.OutOfMemoryError:
        texts, tokens = input_ids.shape
        remedy = "lower batch_size (in train.py halve it and double accumulation_steps) or max_len"
        raise InputError(f"out of GPU memory with {texts} texts of {tokens} tokens; {remedy}") from None


def to_inference(model, device, dtype):
    """Move a trained model to `device`, its encoder in `dtype`, to predict; its weights must stay then."""
    model.bert.to(dtype)
    model.to(device).eval()
    native = torch.device(device).type == "cpu" and dtype == torch.bfloat16 and cpu_has_bf16()
    if native and model.bert.config.hidden_act == "gelu":
        with suppress(AttributeError, NotImplementedError, RuntimeError):  # a PyTorch without oneDNN
            for layer in model.bert.encoder.layer:
                packed_layers[layer] = pack_layer(layer)
    return model


@torch.no_grad()
def pack_layer(layer):
    """Return the (weight, bias) of a layer's five products as oneDNN multiplies them fastest.

    What torch.compile does when it freezes a network, without its half a minute.
    """
    attn = layer.attention.self
    key_value = [
        torch.cat([getattr(attn.key, name), getattr(attn.value, name)]) for name in ("weight", "bias")
    ]
    linears = (attn.query, layer.attention.output.dense, layer.intermediate.dense, layer.output.dense)
    pairs = [key_value, *((linear.weight, linear.bias) for linear in linears)]
    return [(torch.ops.mkldnn._reorder_linear_weight(weight), bias.detach()) for weight, bias in pairs]


@torch.inference_mode()
def predict_batches(model, dataloader, dtype=torch.float32):
    """Yield (probs, labels) of each batch, (B, C) float32 on the CPU.

    dtype: of autocast, where the weights are float32.
    The model is left in eval mode. Raises InputError on NaN, or if memory runs out.
    """
    model.eval()
    device, batches = model.fc.weight.device, iter(dataloader)
    dtype = dtype if model.bert.dtype == torch.float32 else torch.float32
    while group := list(islice(batches, batches_in_flight)):
        outputs = []
        for *inputs, _ in group:
            with oom_hint(inputs[0]), autocast(device, dtype):
                outputs.append(model(*(tensor.to(device, non_blocking=True) for tensor in inputs)))
        for probs, (*_, labels) in zip(outputs, group, strict=True):
            probs = probs.cpu()
            if not probs.isfinite().all():
                raise InputError('the network outputs NaN; set precision = "fp32", or train with a lower lr')
            yield probs, labels


def pooler_output(bert, input_ids, attention_mask, token_type_ids):
    """Return bert(...)[1], (B, H), with less work: of the last layer the pooler needs [CLS] alone."""
    hidden_states = bert.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):  # else float32 is passed between the layers on a CPU
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
    attention_mask = attention_mask[:, None, None].bool()  # (B, 1, 1, T), for all heads and queries
    *layers, last_layer = bert.encoder.layer
    for layer in layers:
        hidden_states = bert_layer(layer, hidden_states, hidden_states, attention_mask)
    return bert.pooler(bert_layer(last_layer, hidden_states[:, :1], hidden_states, attention_mask))


def bert_layer(layer, query_states, hidden_states, attention_mask):
    """Return a layer's output (B, Q, H) for query_states (B, Q, H) that attend to hidden_states (B, T, H)."""
    attn = layer.attention.self

    def split_heads(states):  # (B, …, H) to (B, heads, …, H / heads)
        return states.unflatten(-1, (attn.num_attention_heads, -1)).transpose(1, 2)

    packed = None if layer.training or query_states.dtype != torch.bfloat16 else packed_layers.get(layer)
    if packed and query_states.device.type == "cpu":
        return packed_layer(layer, packed, split_heads, query_states, hidden_states, attention_mask)
    query = split_heads(attn.query(query_states))
    key, value = split_heads(attn.key(hidden_states)), split_heads(attn.value(hidden_states))
    dropout_p = attn.dropout.p if layer.training else 0.0
    context = attention(query, key, value, attention_mask, dropout_p).transpose(1, 2).flatten(2)
    attention_output = layer.attention.output(context, query_states)
    return layer.output(layer.intermediate(attention_output), attention_output)


def packed_layer(layer, packed, split_heads, query_states, hidden_states, attention_mask):
    """Return what bert_layer does in prediction, with the weights of pack_layer: faster on a CPU."""
    linear = torch.ops.mkldnn._linear_pointwise
    key_value, query, attention_output, intermediate, output = packed
    key, value = map(split_heads, linear(hidden_states, *key_value, "none", [], "").chunk(2, -1))
    query = split_heads(linear(query_states, *query, "none", [], ""))
    context = F.scaled_dot_product_attention(query, key, value, attention_mask).transpose(1, 2).flatten(2)
    states = layer.attention.output.LayerNorm(linear.binary(context, query_states, *attention_output, "add"))
    activated = linear(states, *intermediate, "gelu", [], "none")
    return layer.output.LayerNorm(linear.binary(activated, states, *output, "add"))


def attention(query, key, value, attention_mask, dropout_p):
    """Return scaled dot-product attention with dropout on its weights."""
    if not dropout_p or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attention_mask, dropout_p)
    # With dropout PyTorch has no fused kernel on a CPU, and computes in float32.
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)
    weights = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min).softmax(-1)
    return fast_dropout(weights, dropout_p) @ value


class FastDropout(nn.Dropout):
    """nn.Dropout, five times as fast on a CPU."""

    def forward(self, states):
        """Return `states`, in training with dropout."""
        return fast_dropout(states, self.p) if self.training else states


def fast_dropout(states, p):
    """Return `states` with a share p set to 0 and the rest scaled by 1 / (1 - p).

    On a CPU p is compared with 16 random bits an element; PyTorch draws a number for each, a tenth of a
    training step. Operations that keep the dtype are the ones that are vectorized.
    """
    if states.device.type != "cpu" or torch.compiler.is_compiling() or not 0 < p < 1:
        return F.dropout(states, p)
    words = torch.empty(-(-states.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    bits = words.view(torch.int16)[: states.numel()].view(states.shape)
    return states * bits.ge_(round(p * 2**16) - 2**15).to(states.dtype).mul_(1 / (1 - p))
