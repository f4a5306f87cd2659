"""Runs that are killed, stopped or refused: what is left is read, the next run ends the same."""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch

import bert_multilabel_cls
import data_preprocess
import train
from bert_multilabel_cls import load_model
from conftest import contents, finish, script, set_up, start
from data_preprocess import InputError, load_json

if sys.platform == "win32":
    pytest.skip("kills, signals and limits as POSIX has them", allow_module_level=True)
CHECKPOINT = "model/checkpoint.pth"
AT_STEP = """
import os, signal, time, torch
steps, real_step = [0], torch.optim.AdamW.step
def step(*arguments, **options):
    steps[0] += 1
    {}
    return real_step(*arguments, **options)
torch.optim.AdamW.step = step
"""
SLOW = AT_STEP.format("time.sleep(0.05)")
KILLED_AT_FILE = """
import os, shutil, signal
operations = [0]
def counted(real):
    def operation(*arguments, **options):
        if operations[0] == {}:
            os.kill(os.getpid(), signal.SIGKILL)
        operations[0] += 1
        return real(*arguments, **options)
    return operation
for name in ("replace", "rename", "remove", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
shutil.copy2 = counted(shutil.copy2)
"""
NO_HUB = """
import huggingface_hub as hub, data_helper
hub.HfApi.model_info = hub.snapshot_download = lambda *_, **__: open("no network in tests")
data_helper.scratch_config = dict(num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
"""  # for the small BERT from scratch


def results(folder):
    """Return weights, metrics and history of a finished run, without its name and folder."""
    metrics = load_json(f"{folder}/metrics.json")
    for name in ("save_model_path", "checkpoint_minutes", "resume"):
        del metrics["constants"][name]
    del metrics["run_name"]
    history = [json.loads(line) for line in open(f"{folder}/history.jsonl", encoding="utf-8")]
    return load_model(f"{folder}/multi_label_cls.pth", "")[0].state_dict(), metrics, history


def assert_same(folder, reference):
    weights, metrics, history = results(folder)
    torch.testing.assert_close(weights, reference[0], atol=0, rtol=0)
    assert metrics == reference[1] and history == reference[2]
    assert not [name for name in os.listdir(folder) if "checkpoint" in name or "tmp" in name]


def run_to_end(code, processes=1):
    exit_code, out, err = finish(start(code, processes))
    assert exit_code == 0, out + err
    return out


@cache
def reference(encoder, processes=1, **constants):
    """Return the results of a run that nothing stops; its folder is removed."""
    run_to_end(NO_HUB + script(encoder, **constants), processes)
    found = results("model")
    shutil.rmtree("model")
    return found


def killed(code):
    assert finish(start(code))[0] == -signal.SIGKILL


@pytest.mark.parametrize("from_scratch, processes, kills", [(True, 1, 3), (False, 2, 1)])
def test_a_run_killed_anywhere_again_and_again_ends_as_if_it_had_not_been(
    project, encoder_folder, from_scratch, processes, kills
):
    """At random moments; every optimizer step is a checkpoint."""
    encoder = bert_multilabel_cls.default_model if from_scratch else encoder_folder
    constants = {"accumulation_steps": 2, "precision": "fp32" if from_scratch else "bf16"}
    expected = reference(encoder, processes, **constants)
    code = NO_HUB + script(encoder, checkpoint_minutes=0, **constants)
    chance, moments = random.Random(0), set()
    for _ in range(kills):
        child = start(code, processes)
        wait_for_checkpoints(child, chance.randrange(1, 6))
        time.sleep(chance.uniform(0, 0.03))  # a step
        child.send_signal(signal.SIGKILL)
        assert child.finish()[0] in (0, -signal.SIGKILL)
        if os.path.exists(CHECKPOINT):
            saved = torch.load(CHECKPOINT, weights_only=True)
            moments.add((saved["epoch"], saved["batch"]))
    run_to_end(code, processes)
    assert_same("model", expected)
    assert moments


def wait_for_checkpoints(child, number):
    """Wait until a process has saved so many checkpoints, or has ended: on any machine."""
    seen, end = set(), time.monotonic() + 120
    while len(seen) < number and child.poll() is None:
        assert time.monotonic() < end, child.read("out") + child.read("err")
        time.sleep(0.003)
        with suppress(FileNotFoundError):
            seen.add(os.stat(CHECKPOINT).st_mtime_ns)


TRAIN_ON = script("./model", epochs=2)


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory, encoder_folder):
    """A folder with a trained model in before/, and in after/ what it is after a run from there."""
    folder = tmp_path_factory.mktemp("trained_on")
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_up(folder, monkeypatch, encoder_folder)
        run_to_end(script(encoder_folder))
        shutil.copytree("model", "before")
        run_to_end(TRAIN_ON)
        shutil.move("model", "after")
    return folder


@pytest.mark.parametrize("number", [9, 18, 24])
def test_a_killed_run_that_trains_on_from_its_own_folder_resumes_too(project, trained_on, number):
    """The first model is saved over the encoder that the run started from."""
    shutil.copytree(trained_on / "before", "model")
    killed(KILLED_AT_FILE.format(number) + TRAIN_ON)
    assert "\nresume   from ./model/checkpoint.pth epoch=" in run_to_end(TRAIN_ON)
    assert_same("model", results(trained_on / "after"))


def test_a_run_killed_before_its_last_operation_is_completed(project, encoder_folder):
    """Between the writing of metrics.json and the removal of the checkpoint."""
    code, expected = script(encoder_folder, epochs=1), reference(encoder_folder, epochs=1)
    remove = "if path.endswith('checkpoint.pth'): os.kill(os.getpid(), signal.SIGKILL)"
    killed(f"import os, signal\ndef remove(path):\n    {remove}\nos.remove = remove\n{code}")
    assert os.path.exists("model/metrics.json") and os.path.exists(CHECKPOINT)
    assert "\nresume " in run_to_end(code)
    assert_same("model", expected)


@pytest.mark.parametrize(
    "processes, number, code", [(1, signal.SIGINT, 130), (2, signal.SIGTERM, 143)]
)
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(
    project, encoder_folder, processes, number, code
):
    expected = reference(encoder_folder, processes)
    child = start(SLOW + script(encoder_folder), processes)
    wait_for_checkpoints(child, 1)  # after the first epoch
    child.send_signal(number)
    exit_code, out, err = finish(child)
    assert (exit_code, err) == (code, "")
    last = " ".join(re.findall(r"^stopped  (.*)", out, re.MULTILINE))
    assert "./model/checkpoint.pth" in last and "resume" in last
    printed = run_to_end(script(encoder_folder), processes)
    assert "\nresume   from ./model/checkpoint.pth epoch=" in printed
    assert_same("model", expected)


def test_a_second_run_in_the_same_folder_is_refused_whatever_its_constants(project, encoder_folder):
    """After a kill of the first nothing stays locked, and the next one goes on."""
    run, expected = script(encoder_folder, checkpoint_minutes=0), reference(encoder_folder)
    child = start(AT_STEP.format("time.sleep(60 if steps[0] == 3 else 0)") + run)
    wait_for_checkpoints(child, 2)
    before = contents("model")
    for constants in {"seed": 7, "resume": False}, {"save_model_path": "./model/b.pth"}:
        code, out, err = finish(start(script(encoder_folder, **constants)))
        assert (code, out) == (1, "") and err.startswith("error: another process")
        assert err.count("\n") == 1
    assert contents("model") == before and child.poll() is None
    child.send_signal(signal.SIGKILL)
    assert child.finish()[0] == -signal.SIGKILL
    assert "\nresume " in run_to_end(run)
    assert_same("model", expected)


def stop_early(monkeypatch):
    """Train until the first epoch is measured; leave the checkpoint that a kill would leave."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "log_epoch", lambda *_: 1 / 0)
        train.train()


CHANGES = {
    "./data/label2idx.json": lambda _: data_preprocess.dump_json(
        {"体育": 0, "中超": 1, "股市": 2, "财经": 3}, "data/label2idx.json"
    ),
    r"lr \(was 0.001": lambda monkeypatch: monkeypatch.setattr(train, "lr", 0.5),
}


@pytest.mark.parametrize("named", CHANGES)
def test_a_run_whose_recipe_has_changed_is_not_resumed(project, monkeypatch, capsys, named):
    stop_early(monkeypatch)
    CHANGES[named](monkeypatch)
    before = contents(project)
    remedy = "delete ./model/checkpoint.pth or set resume = False in train.py"
    with pytest.raises(InputError, match=rf"changed: .*{named}.*{remedy}"):
        train.train()
    assert contents(project) == before
    monkeypatch.setattr(train, "resume", False)
    train.train()
    assert "\nepoch    1 " in capsys.readouterr().out and not os.path.exists(CHECKPOINT)


def test_a_run_name_of_a_checkpoint_is_never_a_path(project, monkeypatch):
    stop_early(monkeypatch)
    saved = torch.load(CHECKPOINT, weights_only=True)
    torch.save(saved | {"run_name": "../../../data/mine"}, CHECKPOINT)
    train.train()
    assert sorted(os.listdir()) == ["data", "model"] and "mine" not in os.listdir("data")


@pytest.mark.parametrize("limit", [2000, 60_000])
def test_a_full_disk_is_one_line_and_leaves_the_model(project, encoder_folder, limit):
    """By a limit on the size of a file, which the model's files or the checkpoint exceed."""
    train.train()
    before = contents("model")
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code, out, err = finish(start(limited + script(encoder_folder, seed=7)))
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert "./model" in err or "File too large" in err
    after = contents("model")
    for name in ("multi_label_cls.pth", "model.safetensors", "config.json"):
        assert after[f"model/{name}"] == before[f"model/{name}"]
    load_model("model/multi_label_cls.pth", "")


def test_a_loss_that_is_nan_stops_the_run_before_that_model_is_saved(project, monkeypatch):
    """In the second epoch, which has 12 steps; the model of the first one stays."""
    real, steps = torch.optim.AdamW.step, []

    def step(self, *arguments, **options):
        real(self, *arguments, **options)
        steps.append(1)
        if len(steps) == 15:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(InputError, match="NaN.* lr"):
        train.train()
    assert len(steps) <= 24 and not os.path.exists("model/metrics.json")
    assert load_model("model", "")[0].fc.bias.isfinite().all()


def test_out_of_gpu_memory_names_the_constants(project, encoder_folder):
    full = "import torch\ndef full(*_, **__):\n    raise torch.OutOfMemoryError('CUDA')\n"
    full += "torch.nn.functional.embedding = full\n"
    code, _, err = finish(start(full + script(encoder_folder)))
    assert code == 1 and re.fullmatch("error: .*batch_size.*accumulation_steps.*\n", err)


def test_checkpoints_are_saved_by_the_clock(project, monkeypatch):
    """By default every ten minutes, and after the first epoch before and after its evaluation."""
    saves, steps, real_save, step = [], [], torch.save, torch.optim.AdamW.step

    def save(value, path):
        saves.append((value["epoch"], value["batch"]) if "history" in value else None)
        real_save(value, path)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **b: steps.append(1) or step(*a, **b))
    monkeypatch.setattr(train.time, "monotonic", lambda: 150 * len(steps))
    monkeypatch.setattr(train, "epochs", 1)
    train.train()
    assert [save for save in saves if save] == [(0, 4), (0, 8), (0, 12), (0, 12), (1, 0)]


def test_a_checkpoint_that_is_none_is_one_sentence(project):
    os.mkdir("model")
    for content in (b"", b"PK", b"\x80\x02."):
        Path(CHECKPOINT).write_bytes(content)
        with pytest.raises(InputError, match="checkpoint.pth: not a checkpoint .* delete"):
            train.train()
    assert set(os.listdir("model")) <= {"checkpoint.pth", "train.lock"}
