"""Runs that are killed, stopped, or run out of disk: what they leave, and that they go on as if nothing had happened.

The kills are real ones, of real processes. Most come from a fork server that has imported torch once.
"""
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import bert_multilabel_cls
import data_preprocess
import train
from bert_multilabel_cls import load_model
from conftest import EXAMPLES, contents, finish, root, script, start, write_jsonl
from data_preprocess import InputError

if sys.platform == "win32":
    pytest.skip("kills, signals and limits as POSIX has them", allow_module_level=True)
STATE = "model/training_state.pth"
SLOW = "import time, train\nreal = train.step\ntrain.step = lambda run: real(run) or time.sleep(0.05)\n"  # 0.6 s an epoch
os.environ["PYTHONPATH"] = str(root)  # for the fork server
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["train"])


def train_in_child(folder, code, output):
    """Be `python train.py` in `folder`, with a script's code."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open(output, "a", encoding="utf-8")
    exec(compile(code, "script", "exec"), {})


def begin(folder, code):
    """Start a training in a child process; its output goes to a file beside `folder`."""
    child = processes.Process(target=train_in_child, args=(str(folder), code, f"{folder}.out"))
    child.start()
    return child


def run_to_end(folder, code):
    child = begin(folder, code)
    child.join(120)
    assert child.exitcode == 0, Path(f"{folder}.out").read_text(encoding="utf-8")


def results(folder):
    """Return weights, metrics and history of a finished run, without the seconds that it took."""
    metrics = data_preprocess.load_json(f"{folder}/model/metrics.json")
    history = [json.loads(line) for line in open(f"{folder}/model/history.json")]
    for row in (metrics, *history):
        del row["seconds"]
    return load_model(f"{folder}/model/multi_label_cls.pth", "")[0].state_dict(), metrics, history


def assert_same(folder, reference):
    weights, metrics, history = results(folder)
    torch.testing.assert_close(weights, reference[0], atol=0, rtol=0)
    assert metrics == reference[1] and history == reference[2]


@pytest.fixture
def copies(project, tmp_path_factory):
    """A function that gives a fresh copy of the project's folder each time."""
    def copy():
        folder = tmp_path_factory.mktemp("run") / "project"
        shutil.copytree(project, folder)
        return folder
    return copy


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_killed_anywhere_again_and_again_ends_as_if_it_had_not_been(copies, encoder_folder, precision):
    """12 kills at random moments for each precision, 24 in all; each save is a step, so that many fall into one."""
    code = script(encoder_folder, epochs=12, save_minutes=0, accumulation_steps=2, precision=precision)
    reference_folder = copies()
    run_to_end(reference_folder, code)
    reference = results(reference_folder)
    assert not os.path.exists(reference_folder / STATE)
    chance, kills, folder, moments = random.Random(precision), 0, copies(), set()
    while kills < 12:
        child = begin(folder, code)
        child.join(chance.uniform(0.3, 1.2))
        child.kill()
        child.join()
        if child.exitcode == -signal.SIGKILL:
            kills += 1
            moments.add(left_behind(folder))
        else:
            assert child.exitcode == 0, Path(f"{folder}.out").read_text(encoding="utf-8")
            assert_same(folder, reference)
            folder = copies()
    run_to_end(folder, code)
    assert_same(folder, reference)
    assert len(moments) > 3  # the kills did not all come before the first step
    assert not [name for name in os.listdir(folder / "model") if "state" in name or "tmp" in name]


def left_behind(folder):
    """Return at which epoch and batch a killed run was saved; check that what it left can be read."""
    if os.path.exists(folder / "model" / "multi_label_cls.pth"):
        load_model(str(folder / "model" / "multi_label_cls.pth"), "")
    if not os.path.exists(folder / STATE):
        return None
    saved = bert_multilabel_cls.load_tensors(str(folder / STATE))
    return saved["epoch"], saved["batch"]


def wait_for(path, child, seconds=60):
    """Wait until a file is there."""
    end = time.monotonic() + seconds
    while not os.path.exists(path):
        assert child.poll() is None and time.monotonic() < end, child.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(copies, encoder_folder, monkeypatch, number, code):
    whole, stopped = copies(), copies()
    run = script(encoder_folder, epochs=15)
    monkeypatch.chdir(stopped)
    child = start(SLOW + run)
    wait_for(stopped / STATE, child)  # after the first epoch
    child.send_signal(number)
    exit_code, out, err = finish(child)
    assert (exit_code, err) == (code, "")
    assert "\nstopped  run the same command again to go on; epoch=" in out
    assert " saved=./model/training_state.pth\n" in out
    saved = bert_multilabel_cls.load_tensors(STATE)
    assert 1 <= saved["epoch"] < 15 and not err
    run_to_end(whole, run)
    run_to_end(stopped, run)
    assert_same(stopped, results(whole))


def test_a_signal_before_training_begins_ends_in_silence(project, encoder_folder):
    child = start("import time, train\ntrain.prepare = lambda: print('ready', flush=True) or time.sleep(60)\n"
                  + script(encoder_folder))
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert finish(child) == (130, "", "")
    assert not (project / "model").exists()


def test_processes_of_torchrun_go_on_too(copies, encoder_folder, monkeypatch):
    """One of two is killed in the middle of the second epoch; the next run is stopped by SIGTERM; then one goes on."""
    whole, stopped = copies(), copies()
    run = script(encoder_folder, save_minutes=0, epochs=5)
    die = ("import os, signal, train\nreal = train.step\ndef step(run):\n    real(run)\n"
           "    if run.rank == 1 and (run.epoch, run.batch) == (1, 3): os.kill(os.getpid(), signal.SIGKILL)\n"
           "train.step = step\n")
    monkeypatch.chdir(whole)
    code, _, err = finish(start(run, 2))
    assert code == 0, err
    monkeypatch.chdir(stopped)
    code, out, _ = finish(start(die + run, 2))
    saved = bert_multilabel_cls.load_tensors(STATE)
    assert code == 1 and (saved["epoch"], saved["batch"]) == (1, 3) and "epoch=1/5" in out
    child = start(SLOW + run, 2)
    written = os.stat(STATE).st_mtime_ns
    while os.stat(STATE).st_mtime_ns == written and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    code, out, err = finish(child)
    assert "\nresume   from ./model/training_state.pth epoch=2 batch=3" in out and out.count("\nstopped ") == 1
    assert code != 0
    code, out, err = finish(start(run, 2))
    assert code == 0 and "\nresume " in out, err
    assert_same(stopped, results(whole))


def stop_after(monkeypatch, epoch):
    """Train until `epoch` epochs are done, and leave the state as a kill would."""
    real = train.finish_epoch

    def finish_epoch(run):
        real(run)
        if run.epoch == epoch:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish_epoch", finish_epoch)
        with pytest.raises(KeyboardInterrupt):
            train.train()


def change_data(project, monkeypatch):
    write_jsonl("data/dev.json", EXAMPLES[:3])


def change_labels(project, monkeypatch):
    data_preprocess.dump_json({"体育": 0, "中超": 1, "股市": 2, "财经": 3}, "data/label2idx.json")


def change_lr(project, monkeypatch):
    monkeypatch.setattr(train, "lr", 0.5)


def change_precision(project, monkeypatch):
    monkeypatch.setattr(train, "precision", "bf16")


@pytest.mark.parametrize("change, named", [
    (change_data, "./data/dev.json was a file with sha256 "), (change_labels, "./data/label2idx.json was a file"),
    (change_lr, "lr was 0.001, is 0.5;"), (change_precision, "precision was fp32, is bf16; precision in use was fp32")])
def test_a_run_whose_recipe_has_changed_does_not_go_on(project, monkeypatch, capsys, change, named):
    stop_after(monkeypatch, 1)
    change(project, monkeypatch)
    before = contents(project)
    with pytest.raises(InputError, match="set resume = False in train.py to start over") as caught:
        train.train()
    assert named in str(caught.value) and contents(project) == before
    monkeypatch.setattr(train, "resume", False)
    train.train()
    assert "\nepoch    epoch=1/2" in capsys.readouterr().out and not os.path.exists(STATE)


def test_the_model_that_a_kill_kept_from_being_written_is_written_by_the_next_run(project, monkeypatch):
    """The state is saved first, then the model: killed in between, the best epoch is in the state alone."""
    def killed(run):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, "keep_best", killed)
        with pytest.raises(KeyboardInterrupt):
            train.train()
    assert os.path.exists(STATE) and not os.path.exists("model/multi_label_cls.pth")
    kept, real = [], train.keep_best
    monkeypatch.setattr(train, "keep_best", lambda run: real(run) or kept.append((run.epoch, os.listdir("model"))))
    train.train()
    assert [epoch for epoch, _ in kept] == [1, 2] and "multi_label_cls.pth" in kept[0][1]


def test_labels_and_weights_fit_at_every_moment_of_a_save(project, monkeypatch):
    """Killed between config.json and the weights, the folder still holds a model that predicts, the one before."""
    train.train()
    model, tokenizer, label2idx = load_model("model/multi_label_cls.pth", "")
    before = model.fc.bias.clone()
    torch.nn.init.ones_(model.fc.bias)
    replace = os.replace

    def killed_before_the_weights(source, target):
        if str(target).endswith(".pth"):
            raise KeyboardInterrupt
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_before_the_weights)
        with pytest.raises(KeyboardInterrupt):
            bert_multilabel_cls.save_model(model, tokenizer, label2idx, "model/multi_label_cls.pth", {"single": 0.3})
    left = load_model("model/multi_label_cls.pth", "")[0]
    assert torch.equal(left.fc.bias, before) and left.bert.config.thresholds["single"] != 0.3
    for threshold in (0.3, 0.4):  # of the same weights the last one counts
        bert_multilabel_cls.save_model(model, tokenizer, label2idx, "model/multi_label_cls.pth", {"single": threshold})
        assert load_model("model/multi_label_cls.pth", "")[0].bert.config.thresholds == {"single": threshold}


@pytest.mark.parametrize("limit", [2000, 30_000, 70_000])
def test_a_full_disk_is_one_line_and_leaves_the_model(project, encoder_folder, limit):
    """By a limit on the size of a file, which the configuration, the model or the state of the run exceeds."""
    train.train()
    before = contents("model")
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code, out, err = finish(start(limited + script(encoder_folder, seed=7)))
    assert code == 1 and err.startswith("error: ./model/") and err.count("\n") == 1 and "cannot be written" in err
    after = contents("model")
    assert after["model/multi_label_cls.pth"] == before["model/multi_label_cls.pth"]
    load_model("model/multi_label_cls.pth", "")
    assert not [name for name in after if "tmp" in name]


def test_a_loss_that_is_no_number_stops_the_run_before_anything_is_saved(project, monkeypatch):
    steps = []

    def spoil(run, real=train.step):
        real(run)
        steps.append(run.batch)
        if len(steps) == 3:
            run.model.fc.weight.data.fill_(float("nan"))
    monkeypatch.setattr(train, "step", spoil)
    with pytest.raises(InputError, match=r"the loss is nan in epoch 1, batch 4, at a learning rate of \d.\d\de-\d\d"):
        train.train()
    assert not (project / "model").exists()


def test_weights_that_are_no_numbers_after_the_last_step_are_not_saved(project, monkeypatch):
    def spoil(run, real=train.step):
        real(run)
        if run.batch == 11:  # the last of the epoch: its own loss was fine
            run.model.fc.weight.data.fill_(float("nan"))
    monkeypatch.setattr(train, "step", spoil)
    with pytest.raises(InputError, match="the network gives no numbers any more"):
        train.train()
    assert not (project / "model").exists()


def test_an_encoder_that_is_another_one_now_is_refused(project, monkeypatch, encoder_folder):
    stop_after(monkeypatch, 1)
    shutil.copytree(encoder_folder, "other")
    tokens = json.loads(Path("other/tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokens["model"]["vocab"]
    vocabulary["中"], vocabulary["超"] = vocabulary["超"], vocabulary["中"]
    Path("other/tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
    saved = bert_multilabel_cls.load_tensors(STATE)
    torch.save({**saved, "plan": ["other", *saved["plan"][1:]]}, STATE)
    with pytest.raises(InputError, match="other: the encoder is not the one that the stopped run began with"):
        train.train()


def test_a_second_ctrl_c_is_obeyed():
    noted = []
    with pytest.raises(KeyboardInterrupt), data_preprocess.noted_signals(noted):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert noted == [signal.SIGTERM, signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_out_of_gpu_memory_names_batch_length_and_constants(project, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(bert_multilabel_cls, "pooled_output", too_large)
    with pytest.raises(InputError, match=r"out of GPU memory with 4 texts of \d+ tokens; lower batch_size .*max_len"):
        train.train()


def test_the_state_is_saved_by_the_clock(project, monkeypatch):
    saves, real = [], train.save_state
    monkeypatch.setattr(train, "save_state", lambda run: saves.append((run.epoch, run.batch)) or real(run))
    train.train()
    assert saves == [(1, 0), (2, 0)]  # 10 minutes do not pass in a test
    clock = iter(range(0, 10 ** 9, 150))  # seconds, at each look
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    saves.clear()
    train.train()
    assert (0, 4) in saves and (0, 3) not in saves  # the fourth look after the first is 600 s later


def test_a_state_that_is_no_state_is_one_sentence(project):
    os.mkdir("model")
    for content in (b"", b"PK", b"\x80\x02."):
        Path(STATE).write_bytes(content)
        with pytest.raises(InputError, match="training_state.pth: not the state of a run; set resume = False"):
            train.train()
    assert os.listdir("model") == ["training_state.pth"]
