"""Links, paths, threads, forks, shells, consoles, clusters, containers, devices and Ctrl-C."""

import codecs
import io
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import bert_multilabel_cls as ours
import data_preprocess
import predict
import train
from conftest import finish, root, start
from data_preprocess import InputError

PREDICT = 'import os, predict\npredict.device, predict.precision = "cpu", "fp32"\n'


def test_what_is_a_symbolic_link_stays_one(project, tmp_path_factory, monkeypatch):
    """The label index, the folder of the model through two runs, and an output."""
    links = ["data/label2idx.json", "model", "out.json"]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "model").mkdir()
    os.remove("data/label2idx.json")
    for link in links:
        Path(link).symlink_to(elsewhere / os.path.basename(link))
    data_preprocess.preprocess("./data/train.json", "./data/label2idx.json")
    monkeypatch.setattr(predict, "input_path", "data/test.json")
    monkeypatch.setattr(predict, "output_path", "out.json")
    monkeypatch.setattr(train, "epochs", 1)
    for _ in range(2):
        train.train()
        predict.main()
        assert all(map(os.path.islink, links))
    assert Path("model/previous/metrics.json").is_file()
    assert (elsewhere / "out.json").read_bytes().count(b"\n") == 6


def test_constants_may_be_paths(project, monkeypatch, encoder_folder):
    """From the data to a labelled table."""
    monkeypatch.setattr(predict, "input_path", "data/test.json")
    monkeypatch.setattr(predict, "output_path", "out/labels.csv")
    for module in (data_preprocess, train, predict):
        for name in vars(module):
            if name.endswith("_path") and isinstance(path := getattr(module, name), str) and path:
                monkeypatch.setattr(module, name, Path(path))
    monkeypatch.setattr(ours, "pretrained_model", Path(encoder_folder))
    for main in (data_preprocess.main, train.train, predict.main):
        main()
    assert Path("out/labels.csv").read_bytes().count(b"\n") == 7 and predict.predict(["中超"])


def test_a_model_is_loaded_once_for_eight_threads(trained, monkeypatch):
    loads, answers, real = [], [], predict.load_model
    monkeypatch.setattr(predict, "load_model", lambda *paths: loads.append(1) or real(*paths))
    predict.load_once.cache_clear()
    work = lambda: answers.append(predict.predict(["中超开赛", "股市大涨"]))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(8)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert answers == [[["中超", "体育"], ["股市", "财经"]]] * 8 and len(loads) == 1


FORKS = """
import multiprocessing, torch
torch.set_num_threads(2)
long_texts = ["新赛季中超" * 20] * 64  # enough work for PyTorch to start its threads

def answer():
    queue.put((predict.predict(["中超开赛"]), len(predict.predict(long_texts))))

predict.predict(long_texts)
fork = multiprocessing.get_context("fork")
queue = fork.SimpleQueue()
children = [fork.Process(target=answer) for _ in range(2)]
for child in children:
    child.start()
for child in children:
    child.join(60)
    child.kill()
while not queue.empty():
    print(*queue.get())
print(len(predict.predict(long_texts)), "in the parent")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_forked_worker_predicts_after_its_parent(trained):
    _, out, err = finish(start(PREDICT + FORKS), 150)
    assert out == "[['中超', '体育']] 64\n" * 2 + "64 in the parent\n" and not err


def test_no_more_threads_are_used_than_a_container_has_cpus(trained):
    code = f"{PREDICT}import torch\nos.environ['LOKY_MAX_CPU_COUNT'] = '1'\n"
    code += "os.environ.pop('OMP_NUM_THREADS'), torch.set_num_threads(2)\n"
    code += "predict.predict(['中超'])\nprint('threads', torch.get_num_threads())"
    exit_code, out, err = finish(start(code))
    assert exit_code == 0 and "threads 1\n" in out, err


@pytest.mark.parametrize(
    "variables, processes",
    [
        ({"WORLD_SIZE": "4"}, 1),
        ({"WORLD_SIZE": "2", "RANK": ""}, 1),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, 1),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}, 2),
    ],
)
def test_variables_of_a_cluster_are_not_taken_for_torchrun(monkeypatch, variables, processes):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert data_preprocess.get_world_size() == processes
    assert data_preprocess.is_main_process() == (processes == 1)


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_one_sentence(trained, monkeypatch, device):
    for module, call in ((predict, lambda: predict.predict(["中"])), (train, train.train)):
        monkeypatch.setattr(module, "device", device)
        with pytest.raises(InputError, match=f"device = '{device}'") as caught:
            call()
        assert ". " not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_a_script_runs_where_stdout_is_no_file(trained, monkeypatch, stream):
    """As in Jupyter and IDLE, which have no reconfigure, and pythonw, which has none at all."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdout", stream)
    data_preprocess.run_script(data_preprocess.main)
    data_preprocess.run_script(predict.main, takes_texts=True)
    assert not stream or all(x in stream.getvalue() for x in ("count=48", *predict.texts))
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="as Linux has it")
@pytest.mark.parametrize(
    "command, code, said",
    [
        ("data_preprocess.py | true", 0, ""),
        ("data_preprocess.py > /dev/full", 1, "error: .*No space left on device\n"),
    ],
)
def test_an_output_that_is_closed_or_full_is_no_traceback(trained, command, code, said):
    command = f"{sys.executable} {root}/{command}"
    run = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert run.returncode == code and re.fullmatch(said, run.stderr)


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_a_console_that_is_not_utf_8_gets_escapes(trained, encoding):
    text = "中超 é 🏆"
    code = f"{PREDICT}import sys\nsys.argv[1:], predict.threshold = [{text!r}], 0.0\n"
    code += f"sys.stdout = open('shown', 'w', encoding={encoding!r})\n"
    code += "predict.run_script(predict.main, takes_texts=True)"
    exit_code, _, err = finish(start(code))
    assert exit_code == 0 and not err
    shown = Path("shown").read_bytes()
    assert shown.startswith(text.encode(encoding, "backslashreplace"))
    assert codecs.encode("财经(", encoding, "backslashreplace") in shown
