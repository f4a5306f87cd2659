"""A tiny random BERT and its data in a temporary folder, and processes; no network, no GPU."""

import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

# Before torch: for tiny tensors one thread is fastest; child processes inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["COLUMNS"] = "100"  # lines as long as without a terminal

import huggingface_hub
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for the fork server

import bert_multilabel_cls  # noqa: E402
import data_helper  # noqa: E402
import data_preprocess  # noqa: E402
import forked  # noqa: E402
import predict  # noqa: E402
import train  # noqa: E402

fork_server = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    fork_server.set_forkserver_preload(["forked"])

TRAIN_CONSTANTS = dict(
    device="cpu", precision="fp32", epochs=2, batch_size=4, max_len=16, lr=1e-3, head_lr_factor=5
)
TOKENS = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()
TOKENS += [*"中超股市今日开赛大涨球门得分基金", "up", "##s", "a"]
EXAMPLES = [
    ("中超开赛", ["体育", "中超"]),
    ("股市大涨", ["财经", "股市"]),
    ("球门得分今日", ["体育"]),
    ("基金大涨", ["财经"]),
    ("中超得分股市大涨", ["体育", "中超", "财经", "股市"]),
    ("今日", []),
]


def write_jsonl(path, examples):
    """Write (text, labels) pairs in the project's data format; return the path as a string."""
    rows = [{"text": text, "label": labels} for text, labels in examples]
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def as_predictions(labels, probs):
    """Return matrices (N, C) as what dev returns."""
    labels, probs = torch.as_tensor(labels).float(), torch.as_tensor(probs).float()
    return data_helper.collect_predictions([(probs, labels)], labels.shape[1], torch.nn.BCELoss())


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A folder as save_pretrained writes it: 2 layers, hidden size 16, 24 tokens."""
    if sys.platform != "win32":  # here, where no changed copies of the scripts are imported
        multiprocessing.forkserver.ensure_running()
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(TOKENS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    vocab = {token: index for index, token in enumerate(TOKENS)}
    BertTokenizer(vocab=vocab).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tokenizer(encoder_folder):
    return BertTokenizer.from_pretrained(encoder_folder)


def set_constants(monkeypatch, encoder_folder, **constants):
    """Set the constants of the scripts for the tiny encoder; constants are those of train.py."""
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", encoder_folder)
    for name, value in (TRAIN_CONSTANTS | constants).items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(predict, "device", "cpu")
    monkeypatch.setattr(predict, "precision", "fp32")


def set_up(folder, monkeypatch, encoder_folder):
    """Make `folder` a working folder with data/ and label2idx.json, and set the constants."""
    monkeypatch.chdir(folder)
    os.mkdir("data")
    for name, times in (("train", 8), ("dev", 1), ("test", 1)):
        write_jsonl(f"data/{name}.json", EXAMPLES * times)
    data_preprocess.preprocess("./data/train.json", "./data/label2idx.json")
    set_constants(monkeypatch, encoder_folder)
    monkeypatch.setattr(sys, "argv", ["script.py"])


def script(encoder_folder, **constants):
    """Return Python code that trains as `python train.py` does, with these constants."""
    values = TRAIN_CONSTANTS | {"epochs": 3} | constants
    lines = [f"train.{name} = {value!r}" for name, value in values.items()]
    lines.insert(0, f"bert_multilabel_cls.pretrained_model = {encoder_folder!r}")
    lines.insert(0, "import bert_multilabel_cls, train")
    return "\n".join([*lines, "train.run_script(train.train)"])


class Child:
    """A process, or several as torchrun starts them, that run Python code in the current folder."""

    def __init__(self, code, processes=1):
        self.output = Path(tempfile.mkdtemp()) / "child"
        environment = {**os.environ, "PYTHONPATH": str(root)}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.processes = []
        for rank in range(processes):
            if processes > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
            arguments = (code, os.getcwd(), dict(environment), f"{self.output}{rank}")
            self.processes.append(fork_server.Process(target=forked.run_code, args=arguments))
            self.processes[-1].start()

    def poll(self):
        """Return the exit code of the first process that ended, None while all run."""
        codes = [process.exitcode for process in self.processes]
        return next((code for code in codes if code is not None), None)

    def send_signal(self, number):
        """Send a signal to all processes, as torchrun passes it on."""
        for process in self.processes:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.kill(process.pid, number)

    def read(self, suffix):
        """Return what all processes have printed so far; suffix: "out" or "err"."""
        paths = [Path(f"{self.output}{rank}.{suffix}") for rank in range(len(self.processes))]
        return "".join(path.read_text(encoding="utf-8") for path in paths if path.exists())

    def finish(self, seconds=120):
        """Return (exit code, stdout, stderr); if one process fails the others are ended."""
        end = time.monotonic() + seconds
        while any(process.exitcode is None for process in self.processes):
            assert time.monotonic() < end, self.read("out") + self.read("err")
            if any(process.exitcode for process in self.processes):
                for process in self.processes:
                    process.join(5)  # they may be about to end by the same fault
                    process.kill()
            self.processes[0].join(0.01)
            time.sleep(0.005)
        codes = [process.exitcode for process in self.processes]
        return next((code for code in codes if code), 0), self.read("out"), self.read("err")


def start(code, processes=1):
    """Start a Child."""
    return Child(code, processes)


def finish(child, seconds=120):
    """Wait for a Child; return (exit code, stdout, stderr)."""
    return child.finish(seconds)


def contents(folder):
    """Return the hash of each file in a folder by its path."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def without_key_biases(path):
    """Return a saved model's weights, but those of which softmax takes no notice.

    The gradient of a key's bias is rounding alone, which Adam scales up to whole steps.
    """
    state = bert_multilabel_cls.load_model(path, "")[0].state_dict()
    return {name: tensor for name, tensor in state.items() if "key.bias" not in name}


@pytest.fixture
def project(tmp_path, monkeypatch, encoder_folder):
    """A working folder that is ready for training."""
    set_up(tmp_path, monkeypatch, encoder_folder)
    return tmp_path


@pytest.fixture(scope="session")
def trained_model_folder(tmp_path_factory, encoder_folder):
    """The model/ of a run that went on until it is right on its six examples."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_up(folder, monkeypatch, encoder_folder)
        monkeypatch.setattr(train, "epochs", 25)
        monkeypatch.setattr(train, "lr", 5e-3)
        monkeypatch.setattr(train, "head_lr_factor", 1)
        train.train()
    return folder / "model"


@pytest.fixture
def trained(project, trained_model_folder):
    """A working folder with a trained model."""
    shutil.copytree(trained_model_folder, project / "model")
    return project


@pytest.fixture
def offline(monkeypatch):
    """No hub, decided at once; nothing in the cache."""

    def no_hub(*_, **__):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
