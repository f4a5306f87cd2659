"""What Windows and macOS lack or forbid, taken away on Linux: the scripts do without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import finish, root, script, start
from data_preprocess import load_json

AS_ON_WINDOWS = """
import ctypes, os, signal, sys
import sklearn.metrics, torch.distributed.nn, torch.utils.data, filelock
import transformers.models.bert.modeling_bert
from transformers import BertForSequenceClassification, BertTokenizer, trainer_pt_utils
posix = ["fork", "posix_spawn", "kill", "sched_getaffinity", "mkfifo", "geteuid", "link"]
posix += ["register_at_fork"]
signals = ["SIGKILL", "SIGHUP", "SIGALRM", "setitimer", "pthread_kill"]
for module, names in ((signal, signals), (os, posix)):
    for name in names:
        delattr(module, name)
unix = ("fcntl", "resource", "pwd", "grp", "termios", "_posixsubprocess")
sys.modules.update(dict.fromkeys(unix, None))

def no_library(name):
    raise TypeError("Windows wants the name of a library")
ctypes.CDLL = no_library
for name in ("data_preprocess", "bert_multilabel_cls", "data_helper", "train", "predict"):
    sys.modules.pop(name, None)  # imported again, without what was taken away
import data_preprocess, predict, train, bert_multilabel_cls

def unless_open(real):
    def call(path, *more, **options):
        files = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        held = {os.readlink(file) for file in files if os.path.exists(file)}
        lines = open("/proc/self/maps", encoding="utf-8")
        held |= {line.split(maxsplit=5)[-1].strip() for line in lines}
        if str(path).endswith(".lock"):  # which stays where os.name is not "posix"
            return real(path, *more, **options)
        for held_path in (path, *more):  # a file, or one in a folder that is moved
            real_path = os.path.realpath(held_path)
            if any(file == real_path or file.startswith(real_path + "/") for file in held):
                raise PermissionError(13, f"open or mapped, so it would not go: {held_path}")
        return real(path, *more, **options)
    return call
for name in ("replace", "remove", "rename", "unlink"):
    setattr(os, name, unless_open(getattr(os, name)))
"""
linux = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="looks into /proc")


@linux
def test_all_works_without_what_only_linux_has(project, encoder_folder):
    """Trained twice, so that each file is replaced, the second time while the model is in use."""
    Path("texts.txt").write_text("中超开赛\n股市大涨\n", encoding="utf-8")
    code = f"""{AS_ON_WINDOWS}
data_preprocess.run_script(data_preprocess.main)
{script(encoder_folder)}
predict.device, predict.input_path, predict.output_path = "cpu", "texts.txt", "out.json"
train.run_script(predict.main)
train.run_script(train.train)
train.run_script(predict.main)
"""
    code, out, err = finish(start(code))
    assert code == 0, err
    assert out.count("\nwrote    path=out.json texts=2\n") == 2 and out.count("\nepoch ") == 6
    assert load_json("model/config.json")["problem_type"] == "multi_label_classification"
    assert os.path.exists("model/previous/config.json")


def test_no_file_is_read_or_written_in_the_encoding_of_the_system(trained):
    """Which is GBK on a Chinese Windows."""
    Path("in.json").write_text('{"text": "中超"}', encoding="utf-8")
    rows = [f"第 {n} 天,财经" for n in range(20)]
    Path("t.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    code = """import bert_multilabel_cls, data_preprocess, train, predict
data_preprocess.main()
for module in (train, predict):
    module.device, module.precision = "cpu", "fp32"
train.epochs, train.max_len, train.errors_name = 1, 16, "errors.csv"
bert_multilabel_cls.pretrained_model = "./model"
train.train()
predict.input_path, predict.output_path = "in.json", "out.csv"
predict.main()
data_preprocess.table_path, data_preprocess.train_data_path = "t.csv", "new/train.json"
data_preprocess.dev_data_path, data_preprocess.test_data_path = "new/dev.json", "new/test.json"
data_preprocess.label2idx_path = "new/label2idx.json"
data_preprocess.main()
"""
    strict = [f"-Werror::EncodingWarning:{path.stem}" for path in root.glob("*.py")]
    command = [sys.executable, "-X", "warn_default_encoding", *strict, "-c", code]
    options = {"env": {**os.environ, "PYTHONPATH": str(root)}, "encoding": "utf-8"}
    run = subprocess.run(command, capture_output=True, **options)
    assert run.returncode == 0, run.stderr
