"""Links, kinds of constants, threads, shells, clusters, containers and signals."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants

import bert_multilabel_cls as ours
import data_preprocess
import predict
import train
from conftest import root
from data_preprocess import InputError
from test_stopped_runs import stop_after


@pytest.fixture(params=["the same disk", "another disk"])
def elsewhere(request, project):
    """A folder for files that are linked to."""
    if request.param == "the same disk":
        yield tempfile.mkdtemp(dir=project)
    elif not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(project).st_dev:
        pytest.skip("there is no other disk")
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield folder


@pytest.mark.parametrize("name", ["label2idx.json", "multi_label_cls.pth", "metrics.json", "config.json"])
def test_a_file_that_is_a_symbolic_link_stays_one(project, elsewhere, name):
    """Through two runs, the second of which moves the first to previous/."""
    folder = "data" if name == "label2idx.json" else "model"
    Path(folder).mkdir(exist_ok=True)
    Path(folder, name).unlink(missing_ok=True)
    Path(folder, name).symlink_to(f"{elsewhere}/{name}")
    data_preprocess.preprocess("./data/train.json", "./data/label2idx.json")
    for _ in range(2):
        train.train()
        assert Path(folder, name).is_symlink() and Path(elsewhere, name).stat().st_size > 9
        assert predict.predict(["中超"])
    assert Path("model/previous/metrics.json").is_file()


def test_the_output_of_a_prediction_that_is_a_link_stays_one(trained, monkeypatch):
    Path("elsewhere").mkdir()
    Path("out.json").symlink_to("elsewhere/real.json")
    monkeypatch.setattr(predict, "input_path", Path("data/test.json"))
    monkeypatch.setattr(predict, "output_path", Path("out.json"))
    predict.main()
    assert (
        Path("out.json").is_symlink()
        and len(Path("elsewhere/real.json").read_text("utf-8").splitlines()) == 6
    )


def test_a_run_with_paths_and_numbers_of_numpy_goes_on_after_a_stop(
    project, monkeypatch, encoder_folder, capsys
):
    for name in ("train_path", "dev_path", "test_path", "label2idx_path", "save_model_path"):
        monkeypatch.setattr(train, name, Path(getattr(train, name)))
    monkeypatch.setattr(ours, "pretrained_model", Path(encoder_folder))
    for name, value in (("lr", np.float64(1e-3)), ("epochs", np.int64(2)), ("dropout", np.float32(0.25))):
        monkeypatch.setattr(train, name, value)
    stop_after(monkeypatch, 1)
    capsys.readouterr()
    train.train()
    assert "checkpoint.pth epoch=2 batch=0" in capsys.readouterr().out
    assert predict.predict(["中超"])


@pytest.mark.parametrize("what", ["a folder", "a .pth"])
def test_a_model_is_loaded_once_for_eight_threads(trained, monkeypatch, what):
    loads, real, answers = [], predict.load_model, []
    monkeypatch.setattr(
        predict, "load_model", lambda *paths: loads.append(1) or time.sleep(0.1) or real(*paths)
    )
    monkeypatch.setattr(
        predict, "save_model_path", "./model" if what == "a folder" else "./model/multi_label_cls.pth"
    )
    predict.load_once.cache_clear()
    threads = [
        threading.Thread(target=lambda: answers.append(predict.predict(["中超开赛"]))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and answers == [answers[0]] * 8 and not constants.HF_HUB_OFFLINE


def test_no_switch_of_the_hub_is_left_behind_by_threads_that_load(encoder_folder):
    threads = [
        threading.Thread(target=ours.load_pretrained, args=(ours.BertModel, encoder_folder)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not constants.HF_HUB_OFFLINE


worker = """
import multiprocessing, threading, time
import predict

long_texts = ["新赛季中超" * 20] * 64  # enough work for PyTorch to start its threads
if WARM:
    predict.predict(long_texts)

def answer(queue):
    queue.put((predict.predict(["中超开赛"]), len(predict.predict(long_texts))))

def in_threads(queue):
    threads = [threading.Thread(target=answer, args=(queue,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

if LOADING:
    predict.load_once.cache_clear()
    threading.Thread(target=predict.predict, args=(long_texts,)).start()
    time.sleep(0.01)
fork = multiprocessing.get_context("fork")
queue = fork.SimpleQueue()
children = [fork.Process(target=TARGET, args=(queue,)) for _ in range(2)]
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
@pytest.mark.parametrize(
    "warm, loading, target, answers",
    [
        (True, False, "answer", 2),
        (True, False, "in_threads", 8),
        (True, True, "answer", 2),
        (False, True, "answer", 2),
    ],
)
def test_a_forked_worker_predicts(trained, warm, loading, target, answers):
    """After its parent predicted, in threads of its own, and while the parent loads the model."""
    code = worker.replace("WARM", str(warm)).replace("LOADING", str(loading)).replace("TARGET", target)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=150
    )
    assert run.stdout == "[['中超', '体育']] 64\n" * answers + "64 in the parent\n" and not run.stderr


def test_a_gpu_in_a_forked_worker_is_one_sentence_with_the_remedy(trained, monkeypatch):
    def in_fork(*_, **__):
        reason = (
            "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use"
        )
        raise RuntimeError(f"{reason} the 'spawn' start method")

    monkeypatch.setattr(ours.torch, "empty", in_fork)
    monkeypatch.setattr(predict, "device", "cuda")
    with pytest.raises(InputError, match=r"\(Cannot .* subprocess\); start the workers with spawn, or load"):
        predict.predict(["中超"])


@pytest.mark.parametrize(
    "variables, processes",
    [
        ({"WORLD_SIZE": "4"}, 1),
        ({"WORLD_SIZE": ""}, 1),
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


@pytest.mark.parametrize(
    "files, cpus",
    [
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "max 100000"}, float("inf")),
        ({"cpu.max": "max 100000", "a/cpu.max": "150000 100000", "a/b/cpu.max": "400000 100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_a_container_is_asked_how_many_cpus_it_allows(tmp_path, files, cpus):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    (tmp_path / "own").write_text("0::/a/b\n")
    assert ours.allowed_cpus(str(tmp_path), str(tmp_path / "own")) == cpus


@pytest.mark.parametrize("allowed, threads", [(float("inf"), 8), (16, 8), (2, 2), (1.5, 2), (0.1, 1)])
def test_training_and_prediction_use_the_cpus_that_are_allowed(trained, monkeypatch, allowed, threads):
    used = []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(ours, "allowed_cpus", lambda: allowed)
    monkeypatch.setattr(ours.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(ours.torch, "set_num_threads", used.append)
    predict.load_once.cache_clear()
    predict.predict(["中超"])
    monkeypatch.setattr(train, "epochs", 1)
    train.train()
    assert used == [threads, threads]


@pytest.mark.parametrize("device", ["mps", "xpu", "cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_one_sentence(device):
    with pytest.raises(InputError, match=f"device = '{device}': cannot be used") as caught:
        ours.choose_dtype("auto", device)
    assert ". " not in str(caught.value) and "\n" not in str(caught.value)


class Shell:
    """A stdout as Jupyter and IDLE have it: no file, no reconfigure, no isatty."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("stream", [Shell(), None])
def test_a_script_runs_where_stdout_is_no_file(project, monkeypatch, stream):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdout", stream)
    data_preprocess.run_script(data_preprocess.main)
    assert stream is None or "wrote    path=./data/label2idx.json" in stream.text
    assert signal.getsignal(signal.SIGINT) == before


def test_the_arguments_of_jupyter_are_not_taken_for_ours(project, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    with pytest.raises(SystemExit, match="'-f': not an argument of ipykernel_launcher.py"):
        data_preprocess.run_script(data_preprocess.main)
    monkeypatch.setitem(sys.modules, "ipykernel", data_preprocess)
    os.remove("data/label2idx.json")
    data_preprocess.run_script(data_preprocess.main)
    assert os.path.exists("data/label2idx.json")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
@pytest.mark.parametrize(
    "script, output, said",
    [
        ("data_preprocess.py", "| head -n 1", ""),
        ("data_preprocess.py", "| true", ""),
        ("predict.py a b c", "| head -n 1", ""),
        ("predict.py --help", "| true", ""),
        ("data_preprocess.py", "> /dev/full", "error: [Errno 28] No space left on device\n"),
    ],
)
def test_an_output_that_is_closed_or_full_ends_a_script_without_a_traceback(trained, script, output, said):
    if "full" in output and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    name, *arguments = script.split()
    command = f"{sys.executable} {root / name} {' '.join(arguments)} {output}"
    run = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert run.stderr == said


def test_the_default_dtype_of_a_notebook_changes_nothing(trained, monkeypatch):
    expected = predict.predict_proba(["中超开赛", "股市大涨"])
    predict.load_once.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        answers = predict.predict_proba(["中超开赛", "股市大涨"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert answers.dtype == np.float32 and np.array_equal(answers, expected)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("pause", [0.0, 0.02, 0.3])
def test_ctrl_c_twice_ends_without_a_traceback(project, encoder_folder, pause):
    """The second one just after the line "stopped", or while the process ends."""
    for path in root.glob("*.py"):
        shutil.copy(path, ".")
    text = Path("bert_multilabel_cls.py").read_text("utf-8")
    Path("bert_multilabel_cls.py").write_text(
        text.replace("pretrained_model = default_model", f"pretrained_model = {encoder_folder!r}", 1), "utf-8"
    )
    text = Path("train.py").read_text("utf-8").replace("epochs = 10", "epochs = 100000", 1)
    Path("train.py").write_text(text.replace("max_len = 128", "max_len = 16", 1), "utf-8")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(
        [sys.executable, "train.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as child:
        for line in child.stdout:
            if line.startswith("epoch "):
                child.send_signal(signal.SIGINT)
            if line.startswith("stopped"):
                break
        time.sleep(pause)
        child.send_signal(signal.SIGINT)
        child.stdout.read()
        assert "Traceback" not in child.stderr.read()
    assert child.returncode == 130
