"""The network, its pretrained encoder, and the folder of a trained model."""

import copy
import ctypes
import math
import os
import re
import shutil
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import huggingface_hub
import joblib
import torch
import torch.nn as nn
from tokenizers.normalizers import BertNormalizer
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel
from transformers import BertTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from data_preprocess import InputError, dump_json, load_json, log

default_model = "bert-base-chinese"  # if missing, a small BERT is trained instead
pretrained_model = default_model  # any BERT: a Hugging Face id, or a local folder
result_files = ("metrics.json", "history.jsonl", "errors.jsonl", "errors.csv")
log_once = cache(log)  # for what each save would say


class BertMultiLabelCls(nn.Module):
    """BERT, dropout, linear, sigmoid. hidden_size None: bert's; bert None: pretrained_model."""

    def __init__(self, hidden_size, class_num, dropout=0.1, bert=None):
        super().__init__()
        bert = bert or load_pretrained(BertModel, pretrained_model)
        size = bert.config.hidden_size
        if hidden_size not in (None, size):
            raise InputError(f"hidden_size = {hidden_size}, but the encoder has {size}")
        self.fc = nn.Linear(size, class_num, dtype=torch.float32)  # any (B, H) → (B, C)
        self.drop = nn.Dropout(dropout)
        self.bert = bert
        for module in self.modules():
            if type(module) is nn.Dropout:
                module.__class__ = FastDropout

    def forward(self, input_ids, attention_mask, token_type_ids):
        """Return probabilities (B, C), float32, not logits, of three integer tensors (B, T)."""
        pooled = pooler_output(self.bert, input_ids, attention_mask, token_type_ids)
        with torch.autocast(pooled.device.type, enabled=False):  # BCELoss needs float32
            return torch.sigmoid(self.fc(self.drop(pooled.float())))


@torch.no_grad()
def init_classifier(model, label_counts, num_texts, sums=None):
    """Set the last bias of fc to the log odds of the labels' shares; label_counts (C,).

    From 0 a model first learns to predict nothing: Lin et al. 2017, arXiv 1708.02002, section 4.1.
    sums: of sum_pooled, for a linear discriminant analysis (Hastie et al. 2009, section 4.3).
    """
    smallest = 1 / (num_texts + 1)  # keeps the odds finite
    biases = [p for name, p in model.fc.named_parameters() if name.endswith("bias")]
    if biases and biases[-1].shape == label_counts.shape:
        biases[-1].copy_((label_counts / num_texts).clamp(smallest, 1 - smallest).logit())
    if sums and biases:
        mean, counts = sums[0][0] / num_texts, label_counts[:, None]
        covariance = sums[1] / num_texts - torch.outer(mean, mean)
        ridge = 0.1 * covariance.diagonal().mean() + 1e-12  # all texts may be alike
        shifts = (sums[2] - counts * mean) / (counts + 100)  # + 100 average texts
        weights = torch.linalg.solve(covariance + ridge * torch.eye(len(mean)), shifts.T).T
        model.fc.weight.copy_(weights)
        model.fc.bias.sub_((weights @ mean + (weights * shifts).sum(1) / 2).to(model.fc.bias))


def find_encoder(name):
    """Return (folder, "") of an encoder here, in the cache or on the hub; or (None, why)."""
    name = os.fspath(name)
    if os.path.isdir(name):
        return name, ""
    needed = (r"\bconfig\.json", r"tokenizer\.json|vocab\.|\.model", r"\.safetensors|\.bin")
    with suppress(OSError, ValueError):  # not in the cache, or not a valid id
        folder = huggingface_hub.snapshot_download(name, local_files_only=True)
        if all(re.search(pattern, " ".join(os.listdir(folder))) for pattern in needed):
            return folder, ""
    try:
        info = huggingface_hub.HfApi().model_info(name, timeout=8)
        names = " ".join(file.rfilename for file in info.siblings)
    except Exception as error:  # of a proxy, too
        constants = huggingface_hub.constants
        places = f"here, in {constants.HF_HUB_CACHE}, at {constants.ENDPOINT}"
        remedy = "set HF_ENDPOINT=https://hf-mirror.com, or pretrained_model to a local folder"
        return None, f"the encoder {name} was not found {places} ({error!s:.80}); {remedy}"
    weights = "model*.safetensors*" if ".safetensors" in names else "pytorch_model*.bin*"
    patterns = ["config.json", "*token*", "vocab.*", "*.model", weights]
    with clear_errors(f"{name}: the download failed; run again to go on"):
        return huggingface_hub.snapshot_download(name, allow_patterns=patterns), ""


@contextmanager
def clear_errors(message):
    """Turn any error into an InputError: each format and each library has its own."""
    transformers_logging.set_verbosity_error()  # a sentence says it
    transformers_logging.disable_progress_bar()
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{message} ({reason:.150})") from None


def load_pretrained(cls, name, fine_tuned=False):
    """Return the BertModel in float32, BertTokenizer or BertConfig (cls) of an encoder."""
    folder, error_message = find_encoder(name)
    if not folder:
        raise InputError(error_message)
    path = os.path.join(folder, "config.json")
    with clear_errors(f"{folder}: not the folder of a BERT"):
        values, config = load_json(path), BertConfig.from_pretrained(folder)
    expected = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False}
    for key, value in (expected | {"quantization_config": None}).items():
        if values.get(key) not in (value, None):  # read as a plain BERT
            raise InputError(f"{path}: {key} is {values[key]!r:.40}, not {value!r}")
    check_number(f"{path}: num_hidden_layers", config.num_hidden_layers, 1, 1000, integer=True)
    if cls is BertModel:
        return load_network(BertModel, folder, config)
    return config if cls is BertConfig else load_tokenizer(folder, config, fine_tuned)


def load_network(cls, folder, config, state_dict=None):
    """Return cls.from_pretrained of a folder or a state dict, in float32; all weights fit."""
    prefixes = r"^(?:(?:module|_orig_mod|model|bert_model|auto_model|transformer|0)\.)+"
    options = dict(config=config, state_dict=state_dict, key_mapping={prefixes: ""})
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32)
    with clear_errors(f"{folder}: no weights for PyTorch, incomplete, or a Git LFS pointer"):
        network, info = cls.from_pretrained(None if state_dict else folder, **options)
    if not state_dict and info["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}:
        info["missing_keys"] = ()
        log("note", f"{folder} has no pooler; a new one is trained")
    weights, embeddings = network.state_dict(), network.get_input_embeddings().weight
    problems = {  # other unexpected keys are of heads, as cls.predictions.bias
        "missing": info["missing_keys"],
        "unknown": [k for k in info["unexpected_keys"] if re.search(r"embeddings\.|layer\.", k)],
        "of another shape": [f"{k} {[*a]}, not {[*b]}" for k, a, b in info["mismatched_keys"]],
        "infinite or NaN": [k for k, t in weights.items() if not t.isfinite().all()],
        "quantized": ["word_embeddings"] if (embeddings % 1 == 0).all() else [],
    }
    found = [f"{len(keys)} are {what}, as {min(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise InputError(f"{folder}: weights do not fit the config: {'; '.join(found)}")
    return network


def load_tokenizer(folder, config, fine_tuned=False):
    """Return the tokenizer of a folder; if not fine_tuned the vocabulary decides on casing."""
    paths = (Path(folder, name) for name in ("tokenizer.json", "tokenizer_config.json"))
    described, settings = (load_json(path) if path.exists() else {} for path in paths)
    parts = ("'WordPiece'", "'BertNormalizer'", "'BertPreTokenizer'")
    is_bert = not described or all(part in str(described) for part in parts)
    cls = AutoTokenizer if is_bert else PreTrainedTokenizerFast  # read as it is
    options = {"tokenizer_type": "bert-japanese"} if "word_tokenizer_type" in settings else {}
    with clear_errors(f"{folder}: its tokenizer cannot be loaded"):
        tokenizer = cls.from_pretrained(folder, **options)
        if (tokenizer.mask_token_id or 0) >= config.vocab_size:  # made up
            options["mask_token"] = None
        if type(tokenizer) is BertTokenizer and not fine_tuned:
            options |= choose_casing(tokenizer, settings.get("strip_accents"))
        tokenizer = cls.from_pretrained(folder, **options)
        tokenizer("a \U0010ffff")  # without an unknown token this is an error
    vocab, size = tokenizer.get_vocab(), config.vocab_size
    foreign = [token for token in vocab if re.match(r"[▁Ġ].|.+(@@|</w>)$", token)]
    if len(vocab) <= len(tokenizer.all_special_tokens):
        raise InputError(f"{folder}: no vocabulary, or an empty one")
    if max(vocab.values()) >= size:
        raise InputError(f"{folder}: vocabulary ids are beyond the {size} embeddings")
    if is_bert and len(foreign) > len(vocab) / 20:
        raise InputError(f"{folder}: no WordPiece vocabulary; copy tokenizer.json too")
    return tokenizer


def choose_casing(tokenizer, strip_accents):
    """Return settings by the vocabulary: that of bert-base-chinese knows http, not HTTP."""
    words = {token.removeprefix("##") for token in tokenizer.get_vocab()}
    cased = [word for word in words if word.isalpha() and word.lower() != word.upper()]
    has_capitals = sum(word != word.lower() for word in cased) > len(cased) / 100
    is_lower = not has_capitals if cased else tokenizer.do_lower_case
    without = BertNormalizer(False, False, strip_accents=True, lowercase=False).normalize_str
    accented = sum(word != without(word) for word in words if not word.isascii())
    if is_lower and strip_accents is None and accented > len(words) / 1000:
        strip_accents = False
    return {"do_lower_case": is_lower, "strip_accents": strip_accents}


def save_model(model, tokenizer, label2idx, model_path, thresholds=None, truncation=(128, 0)):
    """Write the folder of a trained model; a kill leaves the old or the new one."""
    config = copy.deepcopy(model.bert.config)
    config.id2label, config.label2id = {idx: name for name, idx in label2idx.items()}, label2idx
    config.problem_type, config.dtype = "multi_label_classification", "float32"
    config.thresholds, config.truncation = thresholds or {}, list(truncation)
    config.classifier_dropout = model.drop.p
    tokenizer, state_dict = copy.deepcopy(tokenizer), model.state_dict()
    tokenizer.model_max_length, tokenizer.truncation_side = truncation[0], "right"
    state_dict._metadata[""]["labels"] = list(label2idx)  # torch.save keeps it
    folder, pth_name = os.path.split(get_pth_path(model_path))
    unfinished = Path(folder, "new.tmp")
    with clear_errors(f"{folder or '.'}: cannot be written"):
        complete_save(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        export(model, config).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        torch.save(state_dict, unfinished / pth_name)
        names = sorted({*os.listdir(unfinished), "saved.json", *result_files})
        dump_json(names, unfinished / "saved.json")
        for file in unfinished.iterdir():
            shutil.copymode(unfinished / "config.json", file)  # safetensors: 0600
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        keep_previous(folder, names)
        os.rename(unfinished, Path(folder, "finished.tmp"))
        complete_save(folder)


@torch.inference_mode()
def export(model, config):
    """Return a BertForSequenceClassification; say if it computes other probabilities."""
    with torch.device("meta"):  # allocates no random weights
        exported = BertForSequenceClassification(config)
    exported.bert, exported.classifier = model.bert, model.fc
    input_ids = torch.arange(32, device=model.bert.device).view(2, 16) % config.vocab_size
    inputs = input_ids, torch.ones_like(input_ids).tril(12), torch.zeros_like(input_ids)
    probs, logits = model.eval()(*inputs), exported.eval()(*inputs).logits
    is_linear = type(model.fc) is nn.Linear and model.fc.bias is not None
    if not is_linear or (probs - logits.sigmoid()).abs().max() > 1e-4:
        log_once("note", "the network is changed: other tools will not give its probabilities")
    return exported


def saved_names(folder):
    """Return the names of the files in a folder that a save wrote there."""
    path = Path(folder, "saved.json")
    listed = load_json(path) if path.exists() else []
    listed = listed if isinstance(listed, list) else []
    return {f.name for f in Path(folder).iterdir() if f.name in listed and f.is_file()}


def complete_save(folder):
    """Move what save_model finished into place; meanwhile the folder has no config.json."""
    finished = Path(folder, "finished.tmp")
    new_names = os.listdir(finished) if finished.is_dir() else []
    if "saved.json" in new_names:  # the old one is still here: it is moved last but one
        gone = saved_names(folder) - {*load_json(finished / "saved.json")}
        for name in gone | {"config.json", *result_files}:
            Path(folder, name).unlink(missing_ok=True)
    for name in sorted(new_names, key=lambda name: (name == "config.json", name == "saved.json")):
        os.replace(finished / name, Path(folder, name))
    if finished.is_dir():
        finished.rmdir()


def keep_previous(folder, new_names):
    """Copy to previous/ what will be replaced: a finished model, or files that are not ours."""
    ours, previous = saved_names(folder), Path(folder, "previous")
    is_finished = Path(folder, "metrics.json").exists()
    names = (ours if is_finished else set()) | set(new_names) - ours
    kept = sorted(name for name in names if Path(folder, name).exists())
    if kept:
        previous.mkdir(exist_ok=True)
        for name in saved_names(previous) - {"saved.json"}:
            (previous / name).unlink()
        dump_json([*kept, "saved.json"], previous / "saved.json")
        for name in {*kept} - {"saved.json"}:
            shutil.copy2(Path(folder, name), previous)
        log("note", f"the model in {folder or '.'} is kept in {previous}")


def get_pth_path(model_path):
    """Return the path of the .pth: model_path may name it, or its folder."""
    model_path = os.fspath(model_path)
    is_file = os.path.isfile(model_path) or model_path.endswith((".pth", ".pt", ".bin"))
    return model_path if is_file else os.path.join(model_path, "multi_label_cls.pth")


def load_model(model_path, label2idx_path="./data/label2idx.json"):
    """Return (model, tokenizer, label2idx) of a folder or a .pth, on the CPU, in eval mode.

    A .pth of the article takes its labels from label2idx_path, the rest from `pretrained_model`.
    """
    pth_path = get_pth_path(model_path)
    folder = os.path.dirname(pth_path) or "."
    if Path(folder, "finished.tmp").exists():
        raise InputError(f"{folder}: a save was interrupted; run python train.py again")
    has_pth = os.path.exists(pth_path)
    if not has_pth and not Path(folder, "config.json").exists():
        raise InputError(f"{pth_path}: no trained model: run python train.py in {os.getcwd()}")
    weights, labels = load_pth(pth_path) if has_pth else (None, None)
    from_article = has_pth and not labels
    encoder = pretrained_model if from_article else folder
    config = load_pretrained(BertConfig, encoder)
    tokenizer = load_pretrained(BertTokenizer, encoder, fine_tuned=True)
    if from_article:
        label2idx = load_label2idx(label2idx_path)
        config.thresholds, config.truncation = {}, [128, 0]
    else:
        label2idx = read_labels(config, tokenizer, folder)
    if labels not in (None, list(label2idx)):
        raise InputError(f"{pth_path}: not of the run of config.json beside it")
    if not has_pth:
        network = load_network(BertForSequenceClassification, folder, config)
        weights = {re.sub("^classifier", "fc", k): t for k, t in network.state_dict().items()}
    bert = {k[5:]: t for k, t in weights.items() if k.startswith("bert.")}
    bert = load_network(BertModel, pth_path, config, bert)
    model = BertMultiLabelCls(None, len(label2idx), bert=bert)
    others = {k: t for k, t in weights.items() if not k.startswith("bert.")}
    with clear_errors(f"{pth_path}: does not fit a network for {len(label2idx)} labels"):
        model.load_state_dict(bert.state_dict(prefix="bert.") | others)
    return model.eval(), tokenizer, label2idx


def load_pth(path):
    """Return (state dict with keys bert.* and fc.*, labels of save_model or None) of a .pth."""
    with clear_errors(f"{path}: not a state dict of PyTorch, incomplete, or a Git LFS pointer"):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        labels = getattr(loaded, "_metadata", {}).get("", {}).get("labels")
        loaded = loaded.get("state_dict", loaded)
        weights = {re.sub(r"^((module|_orig_mod|model)\.)+", "", k): t for k, t in loaded.items()}
    weights = {re.sub(r"^classifier\.", "fc.", k): t for k, t in weights.items()}
    if not {"bert", "fc"} <= {name.partition(".")[0] for name in weights}:
        fault = f"its keys are not bert.* and fc.*, but {', '.join(weights):.60}"
        raise InputError(f"{path}: {fault}; save model.state_dict()")
    return weights, labels


def read_labels(config, tokenizer, folder):
    """Return {label: column} of a trained config; give a foreign one what ours have."""
    names = [config.id2label.get(idx) for idx in range(config.num_labels)]
    is_multi_label = config.problem_type in (None, "multi_label_classification")
    if not is_multi_label or not all(isinstance(name, str) for name in names):
        raise InputError(f"{folder}: config.json is not of a multi-label model")
    if not hasattr(config, "truncation"):
        log("note", f"{folder}: trained elsewhere; outputs are taken as logits of a sigmoid")
        longest = min(tokenizer.model_max_length, config.max_position_embeddings)
        tail = longest - 2 if tokenizer.truncation_side == "left" else 0
        config.thresholds, config.truncation = {}, [longest, tail]  # max_len, keep_tail
    return {name: idx for idx, name in enumerate(names)}


def load_label2idx(label2idx_path):
    """Return {label: column} in column order, or raise InputError."""
    remedy = "run: python data_preprocess.py, or copy that of the article's .pth"
    if not os.path.exists(label2idx_path):
        raise InputError(f"{label2idx_path}: there is no label index yet; {remedy}")
    label2idx = load_json(label2idx_path)
    columns = sorted(map(repr, label2idx.values())) if isinstance(label2idx, dict) else []
    if not columns or columns != sorted(map(repr, range(len(columns)))):
        raise InputError(f"{label2idx_path}: not a map from labels to 0, 1, …; {remedy}")
    return dict(sorted(label2idx.items(), key=lambda item: item[1]))


def check_number(name, value, least, most=math.inf, integer=False):
    """Raise InputError unless a constant is a number, or an integer, in these limits."""
    is_number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        kind = "an integer" if integer else "a number"
        raise InputError(f"{name} = {value!r}: must be {kind} from {least} to {most}")


def check_truncation(max_len, keep_tail, config=None):
    """Raise InputError unless the encoder can read max_len tokens, keep_tail among them."""
    limit = config.max_position_embeddings if config else math.inf
    check_number("max_len", max_len, 3, limit, integer=True)  # [CLS], one token, [SEP]
    check_number("keep_tail", keep_tail, 0, max_len - 2, integer=True)


def choose_dtype(precision, device):
    """Return the torch dtype of `precision`; "auto" is the fastest on the device."""
    with clear_errors(f"device = {str(device)!r}: not there, or not in a forked process"):
        on_gpu = torch.empty(0, device=device).is_cuda
    native = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions
    has_bf16 = native.get("avx512_bf16") or native.get("amx_bf16")
    if on_gpu:
        has_bf16 = torch.cuda.get_device_capability(device)[0] >= 8
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtypes["auto"] = dtypes["bf16" if has_bf16 else "fp16" if on_gpu else "fp32"]
    if precision not in dtypes or precision == "fp16" and not on_gpu:
        raise InputError(f'precision = {precision!r}: "auto", "bf16", "fp32", or on a GPU "fp16"')
    return dtypes[precision]


def autocast(device, dtype):
    """Return the autocast context for a dtype of choose_dtype."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not torch.float32)


@cache
def limit_threads():
    """Use no more threads than a container has CPUs, one in a fork; let glibc keep memory."""
    with suppress(OSError, AttributeError, TypeError):  # to get it zeroed again takes time
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; some allow 32 MiB
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), joblib.cpu_count()))
    if hasattr(os, "register_at_fork"):  # OpenMP would wait for the threads of the parent
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@torch.inference_mode()
def predict_batches(model, dataloader, dtype=torch.float32):
    """Yield (probs, labels), (B, C) float32 on the CPU, of batches; dtype: of autocast."""
    model.eval()
    device = next(model.parameters()).device
    dtype = dtype if model.bert.dtype == torch.float32 else torch.float32
    for *inputs, labels in dataloader:
        with autocast(device, dtype):
            probs = model(*(tensor.to(device) for tensor in inputs)).float().cpu()
        if not probs.isfinite().all():
            raise InputError('the output is NaN; set precision = "fp32", or a lower lr')
        yield probs, labels


def pooler_output(bert, input_ids, attention_mask, token_type_ids):
    """Return bert(...)[1], (B, H), with less work: the pooler needs [CLS] of the last layer."""
    hidden_states = bert.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
    if torch.is_autocast_enabled(hidden_states.device.type):  # else float32 between the layers
        hidden_states = hidden_states.to(torch.get_autocast_dtype(hidden_states.device.type))
    attention_mask = attention_mask[:, None, None].bool()  # (B, 1, 1, T)
    *layers, last_layer = bert.encoder.layer
    for layer in layers:
        hidden_states = bert_layer(layer, hidden_states, hidden_states, attention_mask)
    return bert.pooler(bert_layer(last_layer, hidden_states[:, :1], hidden_states, attention_mask))


def bert_layer(layer, query_states, hidden_states, attention_mask):
    """Return a layer's output (B, Q, H): query_states (B, Q, H) attend to hidden_states."""
    attn = layer.attention.self
    states = attn.query(query_states), attn.key(hidden_states), attn.value(hidden_states)
    heads = [x.unflatten(-1, (attn.num_attention_heads, -1)).transpose(1, 2) for x in states]
    if hidden_states.is_cpu and (layer.training or hidden_states.dtype == torch.bfloat16):
        query, key, value = heads  # PyTorch's is slow here
        scores = (query * query.shape[-1] ** -0.5) @ key.mT
        weights = scores.masked_fill(~attention_mask, -math.inf).softmax(-1)
        context = attn.dropout(weights) @ value
    else:
        dropout_p = attn.dropout.p if layer.training else 0.0
        context = nn.functional.scaled_dot_product_attention(*heads, attention_mask, dropout_p)
    attended = layer.attention.output(context.transpose(1, 2).flatten(2), query_states)
    return layer.output(layer.intermediate(attended), attended)


class FastDropout(nn.Dropout):
    """nn.Dropout, faster on a CPU: a random number of 64 bits decides about four elements."""

    def forward(self, states):
        if not self.training or not states.is_cpu or not 0 < self.p < 1:
            return super().forward(states)
        draws = torch.empty(states.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: states.numel()].view(states.shape)
        is_kept = bits.ge_(round(self.p * 2**16) - 2**15)  # in place: vectorized
        return states * is_kept.to(states.dtype).mul_(1 / (1 - self.p))
