"""What Windows and macOS lack or forbid: the scripts do without, on Linux with those things taken away."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import finish, root, script, start
from data_preprocess import load_json

AS_ON_WINDOWS = """
import ctypes, os, signal, sys
import sklearn.metrics, torch.distributed.nn, torch.utils.data, transformers.models.bert.modeling_bert
from transformers import BertForSequenceClassification, BertTokenizer, trainer_pt_utils
posix = ("fork", "posix_spawn", "kill", "sched_getaffinity", "mkfifo", "geteuid", "link")
for module, names in ((signal, ("SIGTERM", "SIGKILL", "SIGHUP", "SIGALRM", "setitimer", "pthread_kill")),
                      (os, posix)):
    for name in names:
        delattr(module, name)
sys.modules.update(dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios", "_posixsubprocess"), None))

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
        held |= {line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps", encoding="utf-8")}
        for held_path in (path, *more):
            if os.path.realpath(held_path) in held:
                raise PermissionError(13, f"open or mapped, so Windows would not let it go: {held_path}")
        return real(path, *more, **options)
    return call
for name in ("replace", "remove"):
    setattr(os, name, unless_open(getattr(os, name)))
"""
linux = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="looks into /proc")


@linux
def test_preprocessing_training_and_prediction_do_without_what_only_linux_has(project, encoder_folder):
    """Trained twice, so that each file is replaced, the second time while the model is in use."""
    Path("texts.txt").write_text("中超开赛\n股市大涨\n", encoding="utf-8")
    run = (
        AS_ON_WINDOWS
        + "data_preprocess.run_script(data_preprocess.main)\n"
        + script(encoder_folder)
        + """
predict.save_model_path = "./model"
for name, value in dict(device="cpu", input_path="texts.txt", output_path="out.json").items():
    setattr(predict, name, value)
train.run_script(predict.main)
train.run_script(train.train)
train.run_script(predict.main)
"""
    )
    code, out, err = finish(start(run))
    assert code == 0, err
    assert out.count("\nwrote    path=out.json texts=2 ") == 2 and out.count("\nbest ") == 2
    assert load_json("model/config.json")["problem_type"] == "multi_label_classification"


@linux
def test_a_file_that_is_open_is_what_the_test_above_would_see(project):
    code, _, err = finish(
        start(AS_ON_WINDOWS + "file = open('a', 'w', encoding='utf-8'); os.replace('a', 'b')")
    )
    assert code == 1 and "Windows would not let it go: a" in err


def test_no_file_is_read_or_written_in_the_encoding_of_the_system(trained):
    """Which is GBK on a Chinese Windows."""
    Path("in.json").write_text('{"text": "中超"}', encoding="utf-8")
    strict = [f"-Werror::EncodingWarning:{path.stem}" for path in root.glob("*.py")]
    code = """import bert_multilabel_cls, data_preprocess, train, predict
data_preprocess.main()
for module in (train, predict):
    module.device, module.precision = "cpu", "fp32"
train.epochs, train.max_len, train.tensorboard_name = 1, 16, ""
bert_multilabel_cls.pretrained_model = "./model"
train.train()
predict.input_path, predict.output_path = "in.json", "out.json"
predict.main()
"""
    run = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", *strict, "-c", code],
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr
