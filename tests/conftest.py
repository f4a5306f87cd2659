"""A tiny random BERT, its vocabulary and a data set in a temporary folder: no test needs a network or a GPU."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: for tiny tensors one thread is fastest; child processes inherit it
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import BertConfig, BertModel, BertTokenizer  # noqa: E402

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))

import bert_multilabel_cls  # noqa: E402
import data_preprocess  # noqa: E402
import predict  # noqa: E402
import train  # noqa: E402

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"中超股市今日开赛大涨球门得分基金", "up", "##s", "a"]
EXAMPLES = [("中超开赛", ["体育", "中超"]), ("股市大涨", ["财经", "股市"]), ("球门得分今日", ["体育"]), ("基金大涨", ["财经"]),
            ("中超得分股市大涨", ["体育", "中超", "财经", "股市"]), ("今日", [])]


def write_jsonl(path, examples):
    """Write (text, labels) pairs in the project's data format; return the path as a string."""
    lines = (json.dumps({"text": text, "label": labels}, ensure_ascii=False) for text, labels in examples)
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A folder as save_pretrained writes it: 2 layers, hidden size 16, 24 tokens."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(TOKENS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=128, initializer_range=0.2)
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={token: index for index, token in enumerate(TOKENS)}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tokenizer(encoder_folder):
    return BertTokenizer.from_pretrained(encoder_folder)


def set_up(folder, monkeypatch, encoder_folder):
    """Make `folder` a working folder with data/ and label2idx.json, and set the scripts' constants for it."""
    monkeypatch.chdir(folder)
    os.mkdir("data")
    for name, times in (("train", 8), ("dev", 1), ("test", 1)):
        write_jsonl(f"data/{name}.json", EXAMPLES * times)
    data_preprocess.preprocess("./data/train.json", "./data/label2idx.json")
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", encoder_folder)
    for name, value in dict(device="cpu", precision="fp32", epochs=2, batch_size=4, max_len=16, lr=1e-3, head_lr=5e-3,
                            runs_path="").items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(predict, "device", "cpu")
    monkeypatch.setattr(predict, "precision", "fp32")
    predict.load_once.cache_clear()


def script(encoder_folder, **constants):
    """Return Python code that trains as `python train.py` does, with these constants and the tiny encoder."""
    constants = dict(device="cpu", precision="fp32", epochs=3, batch_size=4, max_len=16, lr=1e-3, head_lr=5e-3,
                     runs_path="") | constants
    lines = [f"train.{name} = {value!r}" for name, value in constants.items()]
    return "\n".join(["import bert_multilabel_cls, train", f"bert_multilabel_cls.pretrained_model = {encoder_folder!r}",
                      *lines, "train.run_script(train.train)"])


def start(code, processes=1, **options):
    """Start a Python process, or `processes` of them under torchrun, in the current folder."""
    command = [sys.executable, "-c", code]
    if processes > 1:
        Path("run_it.py").write_text(code, encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "run_it.py"]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(root)}, encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(process):
    """Wait for a process; return (exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def contents(folder):
    """Return the hash of each file in a folder by its path."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).rglob("*") if path.is_file()}


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
    def no_hub(name, **options):
        raise ConnectionError("no network in tests")
    monkeypatch.setattr(bert_multilabel_cls, "files_on_hub", no_hub)
    monkeypatch.setattr(bert_multilabel_cls, "snapshot_download", no_hub)
