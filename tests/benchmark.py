"""Compare the speed of this project with the article's loop, Hugging Face Trainer and pipeline.

Same encoder (random weights), texts and batch size (in prediction this project fills batches of
short texts); in one process, in turn, after a warm-up. Arithmetic is counted on real tokens alone,
6 x encoder parameters x tokens for training and 2 x for prediction, and set against the largest
matrix product this machine does in the same run: padding, copies and dropout count as lost.

reads   a data file, ./data/sample/train.json or the one that is named
run     pip install -r tests/requirements.txt
        python tests/benchmark.py [--size mini] [--batch 128] [FILE]    by default both sizes
prints  for each a table for training and one for prediction; ten minutes on two cores
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
import torch.nn as nn
import transformers
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments
from transformers import pipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bert_multilabel_cls
import predict
import train
from data_helper import GroupedBatchSampler, MultiClsDataSet, scratch_tokenizer, write_rows
from data_preprocess import InputError, preprocess, read_examples, run_script

repeats = 3
max_len = 128
# texts that are measured: in batches of training, of which the article gets a quarter, as all of
# its batches have one shape; in texts of prediction, of which its loop, one by one, gets a quarter
steps = {"base": 8, "mini": 48}
predicted_texts = {"base": 256, "mini": 1024}
# layers, hidden size, heads, intermediate size
sizes = {"base": (12, 768, 12, 3072), "mini": (4, 256, 4, 1024)}
inputs = "input_ids", "attention_mask", "token_type_ids"
device = "cuda" if torch.cuda.is_available() else "cpu"


class ArticleNet(nn.Module):
    """The article's network."""

    def __init__(self, folder, class_num, dropout=0.1):
        super().__init__()
        self.bert = BertModel.from_pretrained(folder)
        self.fc = nn.Linear(self.bert.config.hidden_size, class_num)
        self.drop = nn.Dropout(dropout)

    def forward(self, input_ids, attention_mask, token_type_ids):
        """Return probabilities (B, C)."""
        pooled = self.bert(input_ids, attention_mask, token_type_ids)[1]
        return torch.sigmoid(self.fc(self.drop(pooled)))


def finish():
    """Wait until the GPU, if there is one, has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def timed(result):
    """Put the seconds of a block into `result`."""
    finish()
    start = time.perf_counter()
    yield
    finish()
    result["seconds"] = time.perf_counter() - start


def matrix_peak(dtype):
    """Return the FLOP/s of a square matrix product in a dtype, the best of several."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    results = [{} for _ in range(8)]
    for result in results:
        with timed(result):
            a @ b
    return 2 * size**3 / min(result["seconds"] for result in results)


class Bench:
    """One encoder and its texts; each contender is a method that returns its measurements."""

    def __init__(self, data_path, size, batch_size):
        self.size, self.batch_size = size, batch_size
        examples = [(text, labels) for _, text, labels, _ in read_examples(data_path)]
        wanted = steps[size] * batch_size
        if len(examples) < wanted:
            raise InputError(f"{data_path}: has {len(examples)} texts, but {wanted} are measured")
        self.examples = examples[:: len(examples) // wanted][:wanted]
        self.texts = [text for text, _ in self.examples]
        counts = {"train": wanted, "dev": 8, "test": 8, "warm": 2 * batch_size}
        for name, count in counts.items():
            some = self.examples[:count]
            write_rows([{"text": text, "label": labels} for text, labels in some], f"{name}.json")
        with redirect_stdout(StringIO()):
            preprocess("train.json", "label2idx.json")
        tokenizer = scratch_tokenizer(self.texts)
        names = "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"
        options = dict(zip(names, sizes[size], strict=True))
        bert = BertModel(BertConfig(vocab_size=21128, **options))  # that of bert-base-chinese
        bert.save_pretrained("encoder")
        tokenizer.save_pretrained("encoder")
        self.tokenizer = BertTokenizer.from_pretrained("encoder")
        self.data = MultiClsDataSet("train.json", max_len, "label2idx.json", self.tokenizer)
        self.lengths, self.labels = self.data.lengths.tolist(), self.data.labels
        self.classes = self.data.class_num
        self.encoder_parameters = sum(p.numel() for p in bert.encoder.parameters())
        self.article = ArticleNet("encoder", self.classes).to(device)

    def train_this_project(self, data="train.json"):
        """`train.train()` as it is, from before its first batch to before it measures dev."""
        constants = dict(train_path=data, dev_path="dev.json", test_path="test.json")
        constants |= dict(label2idx_path="label2idx.json", save_model_path="./ours")
        constants |= dict(batch_size=self.batch_size, epochs=1, max_len=max_len)
        for name, value in constants.items():
            setattr(train, name, value)
        bert_multilabel_cls.pretrained_model = "./encoder"
        result, clock, real = {}, timed({}), (train.handle_signals, train.dev)

        def start():
            nonlocal clock
            clock = timed(result)
            clock.__enter__()
            return real[0]()

        def dev(*arguments, **options):
            if "seconds" not in result:
                clock.__exit__(None, None, None)
            return real[1](*arguments, **options)

        train.handle_signals, train.dev = start, dev
        with redirect_stdout(StringIO()):
            train.train()
        train.handle_signals, train.dev = real
        batches = list(GroupedBatchSampler(self.data, self.batch_size, seed=train.seed))
        return dict(result, texts=len(self.texts), padded=self.padded(batches))

    def padded(self, batches):
        """Return how many tokens are computed for each real one."""
        computed = sum(len(batch) * max(self.lengths[i] for i in batch) for batch in batches)
        return computed / sum(self.lengths[i] for batch in batches for i in batch)

    def train_article(self, count=None):
        """The article's loop: float32, everything padded to max_len, a plain AdamW."""
        count = count or steps[self.size] * self.batch_size // 4
        options = dict(padding="max_length", truncation=True, max_length=max_len)
        encoded = self.tokenizer(self.texts[:count], return_tensors="pt", **options)
        rows = list(zip(*(encoded[name] for name in inputs), self.labels))
        loader = DataLoader(rows, batch_size=self.batch_size, shuffle=True)
        model, result = ArticleNet("encoder", self.classes).to(device).train(), {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
        with timed(result):
            for batch in loader:
                optimizer.zero_grad()
                *tensors, labels = [tensor.to(device) for tensor in batch]
                nn.BCELoss()(model(*tensors), labels).backward()
                optimizer.step()
        return dict(result, texts=count, padded=count * max_len / sum(self.lengths[:count]))

    def train_trainer(self, count=None):
        """Hugging Face Trainer at its best: bf16, grouped by length, fused AdamW."""
        result, grouped = {}, []

        class Collator(DataCollatorWithPadding):
            """Notes which texts share a batch."""

            def __call__(self, features):
                grouped.append([feature.pop("number") for feature in features])
                return super().__call__(features)

        class Clock(TrainerCallback):
            """Times the loop alone, as for the others."""

            def on_train_begin(self, *_, **__):
                self.block = timed(result)
                self.block.__enter__()

            def on_train_end(self, *_, **__):
                self.block.__exit__(None, None, None)

        encoded = self.tokenizer(self.texts[:count], truncation=True, max_length=max_len)
        rows = [
            {"input_ids": ids, "labels": labels.tolist(), "number": number}
            for number, (ids, labels) in enumerate(zip(encoded["input_ids"], self.labels))
        ]
        model = BertForSequenceClassification.from_pretrained(
            "encoder", num_labels=self.classes, problem_type="multi_label_classification"
        )
        options = dict(per_device_train_batch_size=self.batch_size, num_train_epochs=1)
        options |= dict(bf16=bert_multilabel_cls.choose_dtype("auto", device) == torch.bfloat16)
        options |= dict(train_sampling_strategy="group_by_length", optim="adamw_torch_fused")
        options |= dict(use_cpu=device == "cpu", tf32=True if device == "cuda" else None)
        options |= dict(save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=2e-5)
        arguments = TrainingArguments("trainer", remove_unused_columns=False, **options)
        collator = Collator(self.tokenizer)
        trainer = Trainer(model, arguments, collator, train_dataset=rows, callbacks=[Clock()])
        with redirect_stdout(StringIO()):
            trainer.train()
        return dict(result, texts=len(rows), padded=self.padded(grouped))

    def predict_this_project(self):
        """`predict.predict()` of all texts at once, with the model that training saved."""
        predict.save_model_path = "./ours/multi_label_cls.pth"
        predict.predict(self.texts[:2])  # loads the model
        texts, result = self.texts[: predicted_texts[self.size]], {}
        with timed(result):
            predict.predict(texts)
        return dict(result, texts=len(texts), padded=None)

    def predict_article(self):
        """The article's predict, text by text."""
        texts, result = self.texts[: predicted_texts[self.size] // 4], {}
        model = self.article.eval()
        options = dict(return_tensors="pt", max_length=max_len, padding=True, truncation=True)
        with timed(result):
            for text in texts:
                encoded = self.tokenizer([text], **options).to(device)
                model(*(encoded[name] for name in inputs)).cpu().tolist()
        return dict(result, texts=len(texts), padded=1.0)

    def predict_pipeline(self):
        """transformers.pipeline with batch 32."""
        texts, result = self.texts[: predicted_texts[self.size]], {}
        model = BertForSequenceClassification.from_pretrained("encoder", num_labels=self.classes)
        options = dict(model=model, tokenizer=self.tokenizer, device=device, batch_size=32)
        options |= dict(truncation=True, max_length=max_len)
        options |= dict(function_to_apply="sigmoid", top_k=None)
        run = pipeline("text-classification", **options)
        run(texts[:2])
        with timed(result):
            run(texts)
        batches = [range(len(texts))[start : start + 32] for start in range(0, len(texts), 32)]
        return dict(result, texts=len(texts), padded=self.padded(batches))


def measure(bench, kind):
    """Measure each contender of "train" or "predict" in turn, and print a table."""
    contenders = [name for name in dir(bench) if name.startswith(f"{kind}_")]
    if kind == "train":
        bench.train_this_project("warm.json")
        bench.train_article(2 * bench.batch_size)
        bench.train_trainer(2 * bench.batch_size)
    runs, peaks = {name: [] for name in contenders}, []
    dtype = bert_multilabel_cls.choose_dtype("auto", device)
    for _ in range(repeats):
        for name in contenders:
            peaks.append(matrix_peak(dtype))
            runs[name].append(getattr(bench, name)())
            print(f"{name}: {runs[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    speeds = {n: sorted(run["texts"] / run["seconds"] for run in runs[n]) for n in contenders}
    ours = statistics.median(speeds[f"{kind}_this_project"])
    print(f"\n{kind}: peak of a matrix product {max(peaks) / 1e9:.0f} GFLOP/s")
    print(f"{'':14}{'texts/s':>9}{'(min..max)':>16}{'ours is':>9}{'of peak':>9}{'computed':>10}")
    for name, (slowest, *_, fastest) in speeds.items():
        median, texts = statistics.median(speeds[name]), runs[name][0]["texts"]
        tokens = sum(bench.lengths[:texts]) / texts  # of a text
        share = (6 if kind == "train" else 2) * bench.encoder_parameters * tokens * median
        spread, padded = f"{slowest:.1f}..{fastest:.1f}", runs[name][0]["padded"]
        print(
            f"{name.removeprefix(f'{kind}_'):14}{median:9.1f}{spread:>16}{ours / median:8.2f}x"
            f"{share / max(peaks):9.1%}{f'{padded:.2f}x' if padded else '-':>10}"
        )


def parse_arguments():
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data_path", nargs="?", default="./data/sample/train.json")
    parser.add_argument("--size", choices=sizes, help="by default both")
    parser.add_argument("--batch", type=int, default=32)
    given, sys.argv[1:] = parser.parse_args(), []  # run_script refuses arguments
    return given


def measure_all(given):
    """Measure, and print the tables."""
    data_path = os.path.abspath(given.data_path)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{name}, {bert_multilabel_cls.choose_dtype('auto', device)}, {versions}")
    for size in [given.size] if given.size else sizes:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            print(f"\n{size}: layers, hidden size, heads, intermediate size {sizes[size]}")
            bench = Bench(data_path, size, given.batch)
            for kind in ("train", "predict"):
                measure(bench, kind)
            os.chdir(os.path.dirname(data_path))


if __name__ == "__main__":
    given = parse_arguments()
    run_script(lambda: measure_all(given))
