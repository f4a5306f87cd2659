"""Compare the speed of this project with the article's loop, Hugging Face Trainer and pipeline.

Same encoder (random weights), same texts, same batch size (in prediction this project and other engines
fill batches of short texts); in one process, one after the other, in turn, after a warm-up. Arithmetic is
counted on real tokens alone, 6 x encoder parameters x tokens for training and 2 x for prediction, and set
against the largest matrix product this machine does in the same run: padding, copies and dropout count as
lost, and so does what is left out as superfluous.

reads   a data file, ./data/train.json or the one that is named
run     pip install -r tests/requirements.txt
        python tests/benchmark.py [--compile] [--peers] [--size mini] [--batch 128] [FILE]
prints  a table for people; as the last line one JSON document
"""

import argparse
import ctypes
import functools
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch.utils.data import DataLoader, Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bert_multilabel_cls
import peers
import predict
import train
from data_helper import GroupedBatchSampler, MultiClsDataSet, scratch_tokenizer
from data_preprocess import InputError, dump_jsonl, preprocess, read_examples, run_script

repeats = 3
max_len = 128
steps = {"base": 16, "mini": 64}  # of training, in a measurement
article_steps = {"base": 4, "mini": 16}  # the article's are all of one shape: fewer say the same
predicted_texts = {"base": 512, "mini": 2048}  # the article's predict, one by one, gets a quarter of them
sizes = {
    "base": dict(num_hidden_layers=12, hidden_size=768, num_attention_heads=12, intermediate_size=3072),
    "mini": dict(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024),
}
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
        return F.sigmoid(self.fc(self.drop(self.bert(input_ids, attention_mask, token_type_ids)[1])))


class ArticleData(Dataset):
    """The article's tensors, all padded to max_len."""

    def __init__(self, texts, labels, tokenizer):
        encoded = tokenizer(
            texts, padding="max_length", truncation=True, max_length=max_len, return_tensors="pt"
        )
        self.tensors = encoded["input_ids"], encoded["attention_mask"], encoded["token_type_ids"], labels

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, item):
        return tuple(tensor[item] for tensor in self.tensors)


def finish():
    """Wait until the GPU, if there is one, has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def timed(result):
    """Put the seconds of a block, and the peak memory of the process or GPU in it in MiB, into `result`."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError, AttributeError):  # Linux alone can forget the peak of a process
            libc = ctypes.CDLL(None)
            libc.malloc_trim(0)
            libc.mallopt(
                -3, 32 * 2**20
            )  # what this project's training set, back to where the allocator gets by itself
            libc.mallopt(-1, 64 * 2**20)
            Path("/proc/self/clear_refs").write_text("5")
    finish()
    start = time.perf_counter()
    yield
    finish()
    result["seconds"] = time.perf_counter() - start
    result["memory_mib"] = peak_memory()


def peak_memory():
    """Return the peak since it was last reset, in MiB; None where that cannot be known."""
    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)


def matrix_peak(dtype):
    """Return the GFLOP/s of a square matrix product in a dtype, the best of several."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        finish()
        start = time.perf_counter()
        a @ b
        finish()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


class Bench:
    """One encoder and its texts; each contender is a method, of which the measurements are returned."""

    def __init__(self, data_path, size, batch_size, compiled):
        self.size, self.batch_size, self.compiled = size, batch_size, compiled
        examples = [(text, labels) for _, text, labels in read_examples(data_path)]
        wanted = steps[size] * batch_size
        if len(examples) < wanted:
            raise InputError(f"{data_path}: has {len(examples)} texts, but {wanted} are measured")
        self.examples = examples[:: len(examples) // wanted][:wanted]
        self.texts = [text for text, _ in self.examples]
        for name, some in (
            ("train", self.examples),
            ("dev", self.examples[:8]),
            ("test", self.examples[:8]),
            ("warm", self.examples[: 2 * batch_size]),
        ):
            dump_jsonl([{"text": text, "label": labels} for text, labels in some], f"{name}.json")
        with redirect_stdout(StringIO()):
            preprocess("train.json", "label2idx.json")
        tokenizer = scratch_tokenizer(self.texts)
        bert = BertModel(BertConfig(vocab_size=21128, **sizes[size]))  # as many as bert-base-chinese has
        bert.save_pretrained("encoder")
        tokenizer.save_pretrained("encoder")
        self.tokenizer = BertTokenizer.from_pretrained("encoder")
        self.data = MultiClsDataSet("train.json", max_len, "label2idx.json", self.tokenizer)
        self.lengths, self.labels = self.data.lengths.tolist(), self.data.labels
        self.classes = self.data.class_num
        self.encoder_parameters = sum(p.numel() for p in bert.encoder.parameters())
        self.article = ArticleNet("encoder", self.classes).to(device)

    def train_this_project(self, data="train.json"):
        """`train.train()` as it is; its own clock stops before it measures dev."""
        constants = dict(
            train_path=data,
            dev_path="dev.json",
            test_path="test.json",
            label2idx_path="label2idx.json",
            save_model_path="./ours",
            tensorboard_name="",
            batch_size=self.batch_size,
            epochs=1,
            min_steps=0,
            max_len=max_len,
            compile_model=self.compiled,
        )
        for name, value in constants.items():
            setattr(train, name, value)
        bert_multilabel_cls.pretrained_model = "./encoder"
        result = {}
        with redirect_stdout(StringIO()), timed(result):
            train.train()
        result["seconds"] = json.loads(Path("ours/history.jsonl").read_text())["seconds"]
        batches = list(GroupedBatchSampler(self.data, self.batch_size, seed=train.seed))
        multiple = train.pad_to_multiple_of if self.compiled else 1
        return dict(result, texts=len(self.texts), padded=self.padded(batches, multiple))

    def padded(self, batches, multiple=1):
        """Return how many tokens are computed for each real one."""
        longest = [
            min(max_len, -(-max(self.lengths[i] for i in batch) // multiple) * multiple) for batch in batches
        ]
        return sum(len(batch) * width for batch, width in zip(batches, longest)) / sum(
            self.lengths[i] for batch in batches for i in batch
        )

    def train_article(self, count=None):
        """The article's loop: float32, everything padded to max_len, a plain AdamW."""
        count = count or article_steps[self.size] * self.batch_size
        model = ArticleNet("encoder", self.classes).to(device)
        data = ArticleData(self.texts[:count], self.labels[:count], self.tokenizer)
        loader = DataLoader(data, batch_size=self.batch_size, shuffle=True)
        network = torch.compile(model) if self.compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
        criterion = nn.BCELoss()
        model.train()
        result = {}
        with timed(result):
            for step, batch in enumerate(loader):
                optimizer.zero_grad()
                *inputs, labels = [tensor.to(device) for tensor in batch]
                loss = criterion(network(*inputs), labels)
                loss.backward()
                optimizer.step()
                if step % 100 == 0:
                    loss.item()
        return dict(result, texts=count, padded=count * max_len / sum(self.lengths[:count]))

    def train_trainer(self, count=None):
        """Hugging Face Trainer at its best: bf16, grouped by length, fused AdamW."""
        result, grouped = {}, []

        class Collator(DataCollatorWithPadding):
            """Notes which texts share a batch."""

            def __call__(self, features):
                """Return the batch."""
                grouped.append([feature.pop("number") for feature in features])
                return super().__call__(features)

        class Clock(TrainerCallback):
            """Times the loop alone, as for the others."""

            def on_train_begin(self, *_, **__):
                """Start."""
                self.block = timed(result)
                self.block.__enter__()

            def on_train_end(self, *_, **__):
                """Stop."""
                self.block.__exit__(None, None, None)

        encoded = self.tokenizer(self.texts[:count], truncation=True, max_length=max_len)["input_ids"]
        rows = [
            {"input_ids": ids, "labels": labels.tolist(), "number": number}
            for number, (ids, labels) in enumerate(zip(encoded, self.labels))
        ]
        model = BertForSequenceClassification.from_pretrained(
            "encoder", num_labels=self.classes, problem_type="multi_label_classification"
        )
        arguments = TrainingArguments(
            output_dir="trainer",
            per_device_train_batch_size=self.batch_size,
            num_train_epochs=1,
            bf16=True,
            train_sampling_strategy="group_by_length",
            optim="adamw_torch_fused",
            learning_rate=2e-5,
            warmup_steps=0.1,
            torch_compile=self.compiled,
            use_cpu=device == "cpu",
            tf32=True if device == "cuda" else None,
            save_strategy="no",
            logging_steps=20,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        with redirect_stdout(StringIO()):
            Trainer(
                model, arguments, Collator(self.tokenizer), train_dataset=rows, callbacks=[Clock()]
            ).train()
        return dict(result, texts=len(rows), padded=self.padded(grouped))

    def predict_this_project(self):
        """`predict.predict()` of all texts at once, with the model that training saved."""
        predict.save_model_path = "./ours/multi_label_cls.pth"
        predict.predict(self.texts[:2])  # loads the model
        texts, result = self.texts[: predicted_texts[self.size]], {}
        with timed(result):
            predict.predict(texts)
        return dict(result, texts=len(texts), padded=None)

    def add_peers(self):
        """Add what other engines make of the model that training saved, and say how exact each is."""
        predict.save_model_path = "./ours/multi_label_cls.pth"
        texts = self.texts[: predicted_texts[self.size]]
        probs = {"this_project": predict.predict_proba(texts)}
        for name, engine in peers.engines(predict.save_model_path, texts).items():
            setattr(self, f"predict_{name}", functools.partial(self.predict_peer, engine))
            with peers.run_by(engine):
                probs[name] = predict.predict_proba(texts)
        precision, predict.precision = predict.precision, "fp32"
        exact, predict.precision = predict.predict_proba(texts), precision
        for name, found in probs.items():
            print(f"{name:14}largest difference of a probability to float32 {abs(found - exact).max():.4f}")

    def predict_peer(self, engine):
        """`predict.predict()` of all texts at once, its network run by another engine."""
        with peers.run_by(engine):
            return self.predict_this_project()

    def predict_article(self):
        """The article's predict, text by text."""
        model, texts, result = self.article.eval(), self.texts[: predicted_texts[self.size] // 4], {}
        with timed(result):
            for text in texts:
                encoded = self.tokenizer(
                    [text], return_tensors="pt", max_length=max_len, padding=True, truncation=True
                )
                model(
                    encoded["input_ids"].to(device),
                    encoded["attention_mask"].to(device),
                    encoded["token_type_ids"].to(device),
                ).cpu().tolist()
        return dict(result, texts=len(texts), padded=1.0)

    def predict_pipeline(self):
        """transformers.pipeline with batch 32."""
        texts, result = self.texts[: predicted_texts[self.size]], {}
        model = BertForSequenceClassification.from_pretrained("encoder", num_labels=self.classes)
        run = pipeline(
            "text-classification",
            model=model,
            tokenizer=self.tokenizer,
            device=device,
            batch_size=32,
            top_k=None,
            function_to_apply="sigmoid",
            truncation=True,
            max_length=max_len,
        )
        run(texts[:2])
        with timed(result):
            run(texts)
        batches = [list(range(start, min(start + 32, len(texts)))) for start in range(0, len(texts), 32)]
        return dict(result, texts=len(texts), padded=self.padded(batches))


def measure(bench, kind):
    """Return a row for each contender of "train" or "predict", after a warm-up and `repeats` rounds."""
    contenders = [name for name in dir(bench) if name.startswith(f"{kind}_") and name != "predict_peer"]
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
    peak = max(peaks)
    return [row(bench, kind, name, results, peak) for name, results in runs.items()], peak


def row(bench, kind, name, results, peak):
    """Return what is reported of one contender: medians, and the slowest and fastest of the repeats."""
    speeds = sorted(result["texts"] / result["seconds"] for result in results)
    texts = bench.texts[: results[0]["texts"]]
    tokens = sum(bench.lengths[: len(texts)]) / len(texts)  # of a text
    flops = (6 if kind == "train" else 2) * bench.encoder_parameters * tokens * statistics.median(speeds)
    return dict(
        name=name.removeprefix(f"{kind}_"),
        examples_per_second=round(statistics.median(speeds), 2),
        slowest=round(speeds[0], 2),
        fastest=round(speeds[-1], 2),
        gflops=round(flops / 1e9, 1),
        share_of_peak=round(flops / 1e9 / peak, 3),
        texts=len(texts),
        memory_mib=results[-1]["memory_mib"],
        tokens_computed_per_real_one=results[0]["padded"] and round(results[0]["padded"], 3),
    )


def print_table(kind, rows, peak):
    """Print the rows for people, with how many times as fast as each other this project is."""
    ours = next(row for row in rows if row["name"] == "this_project")
    print(f"\n{kind}: {ours['texts']} texts, peak of a matrix product {peak:.0f} GFLOP/s")
    print(
        f"{'':14}{'texts/s':>11}{'(min..max)':>18}{'ours is':>9}{'of peak':>9}{'computed':>10}{'memory':>11}"
    )
    for row in rows:
        ratio = ours["examples_per_second"] / row["examples_per_second"]
        spread, padded = f"{row['slowest']}..{row['fastest']}", row["tokens_computed_per_real_one"]
        print(
            f"{row['name']:14}{row['examples_per_second']:11.2f}{spread:>18}{ratio:8.2f}x{row['share_of_peak']:9.1%}"
            f"{f'{padded:.2f}x' if padded else '-':>10}{row['memory_mib'] or '-':>7} MiB"
        )


def parse_arguments():
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description="Compare the speed of this project with other ways to train."
    )
    parser.add_argument("data_path", nargs="?", default="./data/train.json")
    parser.add_argument(
        "--compile", action="store_true", help="compile this project's network, and the others'"
    )
    parser.add_argument("--peers", action="store_true", help="predict by the engines of peers.py too")
    parser.add_argument("--size", choices=sizes, default="base")
    parser.add_argument("--batch", type=int, default=32)
    given, sys.argv[1:] = parser.parse_args(), []  # run_script refuses arguments
    return given


def measure_all(given):
    """Measure, and print the table and the JSON document."""
    data_path = os.path.abspath(given.data_path)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    report = dict(
        device=torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads",
        dtype=str(bert_multilabel_cls.choose_dtype("auto", device)),
        size=given.size,
        batch=given.batch,
        compile=given.compile,
        repeats=repeats,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        bench = Bench(data_path, given.size, given.batch, given.compile)
        for kind in ("train", "predict"):
            if kind == "predict" and given.peers:
                bench.add_peers()
            report[kind], report[f"{kind}_peak_gflops"] = measure(bench, kind)
            print_table(kind, report[kind], report[f"{kind}_peak_gflops"])
        os.chdir(os.path.dirname(data_path))
    print(json.dumps(report))


if __name__ == "__main__":
    given = parse_arguments()
    run_script(lambda: measure_all(given))
