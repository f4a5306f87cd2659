"""Fine-tune BERT to give a text several labels.

reads   ./data/train.json, dev.json, test.json    one object a line: {"text": "...", "label": ["...", ...]}
        ./data/label2idx.json                     written by `python data_preprocess.py`
writes  ./model/                                  the model of the best epoch: all that predict.py needs
run     python train.py
"""
import math
import time

import torch
import torch.nn as nn
from sklearn.metrics import accuracy_score, f1_score
from transformers import BertModel, BertTokenizer, get_linear_schedule_with_warmup
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils.logging import tqdm

import bert_multilabel_cls
from bert_multilabel_cls import (BertMultiLabelCls, build_scratch_encoder, choose_precision, find_encoder, gather_probs,
                                 load_model, load_pretrained, mixed, save_model)
from data_helper import MultiClsDataSet, by_length, load_batches
from data_preprocess import InputError, log, read_examples, run_script

# Files. The encoder's name is pretrained_model in bert_multilabel_cls.py.
train_path = "./data/train.json"
dev_path = "./data/dev.json"
test_path = "./data/test.json"
label2idx_path = "./data/label2idx.json"
save_model_path = "./model/multi_label_cls.pth"  # its folder takes the other files of the model
scratch_path = "./model/scratch_encoder"  # where the small BERT from scratch goes, if there has to be one

# Machine.
device = "cuda" if torch.cuda.is_available() else "cpu"
precision = "auto"  # "bf16", "fp16" (GPU only), "fp32"; "auto" takes the fastest that the hardware has natively

# Recipe.
lr = 2e-5  # highest learning rate
epochs = 10  # passes over the training file
batch_size = 32  # texts a step; halve it if the GPU's memory is too small
max_len = 128  # tokens; longer texts lose their end
dropout = 0.1  # share of the pooled output that is set to 0 before the classifier
warmup_ratio = 0.1  # share of the steps in which the learning rate rises; then it falls to 0
max_grad_norm = 1.0  # gradients with a larger norm are scaled down to it
weight_decay = 0.01  # a step, times the learning rate; biases and LayerNorm are spared
seed = 42  # of weights, dropout and batches

# Recipe of the small BERT that is trained from scratch where bert-base-chinese cannot be had.
scratch_lr = 5e-4
scratch_epochs = 8


def train():
    """Train, keep the epoch that is best on dev, and report that one on test.

    Raises InputError for what the user can mend in files and constants.
    """
    torch.manual_seed(seed)
    encoder, peak_lr, last_epoch = get_encoder()
    tokenizer = load_pretrained(BertTokenizer, encoder)
    train_set = MultiClsDataSet(train_path, max_len, label2idx_path, tokenizer)
    dev_set = MultiClsDataSet(dev_path, max_len, label2idx_path, tokenizer)
    dev_batches = load_batches(dev_set, by_length(dev_set.attention_mask, batch_size))

    model = BertMultiLabelCls(None, train_set.class_num, dropout, load_pretrained(BertModel, encoder))
    start_at_prior(model.fc, train_set.labels)
    model.to(device)
    mode = choose_precision(precision, device)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=mode == "fp16")
    steps = math.ceil(len(train_set) / batch_size)
    optimizer = torch.optim.AdamW(decay_groups(model), lr=peak_lr, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, round(warmup_ratio * steps * last_epoch), steps * last_epoch)
    criterion = nn.BCELoss()
    log("data", train=len(train_set), dev=len(dev_set), labels=train_set.class_num, max_len=f"{max_len}_tokens")
    log("model", encoder=encoder, parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M",
        device=device, precision=mode)
    log("plan", epochs=last_epoch, steps_per_epoch=steps, batch_size=batch_size, lr=peak_lr, seed=seed)

    best = None
    for epoch in range(1, last_epoch + 1):
        model.train()
        start, total_loss = time.perf_counter(), torch.zeros((), device=device)
        batches = load_batches(train_set, grouped_batches(train_set.attention_mask, seed + epoch))
        with tqdm(total=len(train_set), desc=f"epoch {epoch}/{last_epoch}", unit="ex", leave=False, disable=None) as bar:
            for step, batch in enumerate(batches, 1):
                *inputs, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
                with mixed(device, mode):
                    probs = model(*inputs)
                loss = criterion(probs, labels)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                optimizer.zero_grad()
                total_loss += loss.detach() * len(labels)
                bar.update(len(labels))
                if step % 20 == 0:  # reading the loss waits for the GPU
                    bar.set_postfix(loss=f"{loss.item():.4f}")
        train_loss = total_loss.item() / len(train_set)
        seconds = time.perf_counter() - start
        dev_loss, dev_acc = dev(model, dev_batches, criterion)
        score = dev_acc, -dev_loss  # early on a model may predict nothing at all: then the lower loss is the better
        saved = best is None or score > best
        if saved:
            best = score
            save_model(model, tokenizer, train_set.label2idx, save_model_path)
        log("epoch", epoch=f"{epoch}/{last_epoch}", train_loss=f"{train_loss:.4f}", dev_loss=f"{dev_loss:.4f}",
            dev_accuracy=f"{dev_acc:.4f}", speed=f"{len(train_set) / seconds:.1f}examples/s", time=f"{seconds:.1f}s",
            saved="yes" if saved else "no")
    test(save_model_path, test_path)


def get_encoder():
    """Return (folder, learning rate, epochs): of the encoder `pretrained_model`, or of a small BERT in its place.

    Raises InputError if it cannot be had and is a name that the user chose.
    """
    name = bert_multilabel_cls.pretrained_model
    folder, tried = find_encoder(name)
    if folder:
        return folder, lr, epochs
    if name != bert_multilabel_cls.shipped_model:
        raise InputError(tried)
    log("note", tried)
    log("note", f"going on without it: a small BERT, trained from scratch on {train_path} alone, knows less; it takes "
                "scratch_lr and scratch_epochs in place of lr and epochs")
    build_scratch_encoder([text for text, _ in read_examples(train_path)], scratch_path, seed)
    return scratch_path, scratch_lr, scratch_epochs


def start_at_prior(fc, labels):
    """Set the bias of the last layer to the log odds of each label's share in `labels` (N, C).

    Lin et al. 2017, arXiv 1708.02002, section 4.1. With a bias of 0 every label starts at 0.5, and the
    first steps only push all of them down together: the model learns to predict nothing.
    """
    share = labels.mean(0).clamp(1 / (len(labels) + 1), len(labels) / (len(labels) + 1))  # never infinite odds
    with torch.no_grad():
        fc.bias.copy_(torch.log(share / (1 - share)))


def decay_groups(model):
    """Return the optimizer's groups of parameters: weight decay for matrices, none for biases and LayerNorm."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]


def grouped_batches(attention_mask, seed):
    """Return all indices as lists of `batch_size`, texts of similar length together, lists in random order."""
    generator = torch.Generator().manual_seed(seed)
    lengths = attention_mask.sum(1).tolist()
    indices = list(LengthGroupedSampler(batch_size, lengths=lengths, generator=generator))
    batches = [indices[start:start + batch_size] for start in range(0, len(indices), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def get_acc_score(y_true_tensor, y_pred_tensor):
    """Return the share of rows in which all C labels are right, at a probability above 0.5; both (N, C).

    The truth comes first, the probabilities second.
    """
    return accuracy_score(y_true_tensor.cpu().numpy(), (y_pred_tensor.cpu() > 0.5).int().numpy())


def dev(model, dataloader, criterion):
    """Return (mean loss, accuracy) of a model over all batches of `dataloader`. The model is left in eval mode."""
    probs, labels = gather_probs(model, dataloader, choose_precision(precision, device))
    return criterion(probs, labels).item(), get_acc_score(labels, probs)


def test(model_path, test_data_path):
    """Return the accuracy of the trained model at `model_path` on a data file; print it with the F1 scores."""
    model, tokenizer, label2idx = load_model(model_path, label2idx_path)
    dataset = MultiClsDataSet(test_data_path, max_len, tokenizer=tokenizer, label2idx=label2idx)
    batches = load_batches(dataset, by_length(dataset.attention_mask, batch_size))
    probs, labels = gather_probs(model.to(device), batches, choose_precision(precision, device))
    accuracy = get_acc_score(labels, probs)
    micro, macro = (f1_score(labels.numpy(), probs.numpy() > 0.5, average=average, zero_division=0)
                    for average in ("micro", "macro"))
    log("test", examples=len(dataset), accuracy=f"{accuracy:.4f}", micro_f1=f"{micro:.4f}", macro_f1=f"{macro:.4f}")
    return accuracy


if __name__ == "__main__":
    run_script(train)
