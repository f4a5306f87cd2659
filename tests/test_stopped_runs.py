"""Runs that are killed, stopped or refused: what is left can be read, and the next run ends the same."""

import json
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
from conftest import EXAMPLES, contents, finish, script, start, write_jsonl
from data_preprocess import InputError

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


def results(folder):
    """Return weights, metrics and history of a finished run, without the seconds that it took."""
    metrics = data_preprocess.load_json(f"{folder}/metrics.json")
    del metrics["train_seconds"], metrics["constants"]["save_model_path"]
    history = [json.loads(line) for line in open(f"{folder}/history.jsonl", encoding="utf-8")]
    for row in history:
        del row["seconds"]
    return load_model(f"{folder}/multi_label_cls.pth", "")[0].state_dict(), metrics, history


def assert_same(folder, reference):
    weights, metrics, history = results(folder)
    torch.testing.assert_close(weights, reference[0], atol=0, rtol=0)
    assert metrics == reference[1] and history == reference[2]


def run_to_end(code, processes=1):
    exit_code, out, err = finish(start(code, processes))
    assert exit_code == 0, out + err
    return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_anywhere_again_and_again_ends_as_if_it_had_not_been(
    project, encoder_folder, precision, processes
):
    """Kills at random moments, 12 with one process; every optimizer step is a checkpoint."""
    code = script(encoder_folder, epochs=10, checkpoint_minutes=0, accumulation_steps=2, precision=precision)
    run_to_end(code, processes)
    shutil.move("model", "reference")
    assert not os.path.exists("reference/checkpoint.pth")
    reference, chance, kills, moments = results("reference"), random.Random(precision), 0, set()
    while kills < 12 // processes**2:
        child, end = start(code, processes), time.monotonic() + chance.uniform(0.2, 1.2)
        while time.monotonic() < end and child.poll() is None:
            time.sleep(0.005)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            child.finish()
            kills += 1
            moments.add(left_behind())
        else:
            assert child.finish()[0] == 0, child.finish()
            assert_same("model", reference)
            shutil.rmtree("model")
    run_to_end(code, processes)
    assert_same("model", reference)
    assert moments != {None}  # the kills did not all come before the first step
    assert not [name for name in os.listdir("model") if "checkpoint" in name or "tmp" in name]


def left_behind():
    """Return at which epoch and batch a killed run was saved; check what it left."""
    if os.path.exists("model/multi_label_cls.pth"):
        try:
            load_model("model", "")
        except InputError as error:
            assert "a save was interrupted" in str(error)
    if not os.path.exists(CHECKPOINT):
        return None
    saved = torch.load(CHECKPOINT, weights_only=True)
    return saved["epoch"], saved["batch"]


@pytest.mark.parametrize("killed_at", [5, 12, 13, 20, 30])  # 12 steps an epoch
def test_a_killed_run_that_trains_on_from_its_own_folder_goes_on_too(project, encoder_folder, killed_at):
    """The first model is saved over the encoder that the run started from."""
    run_to_end(script(encoder_folder))
    shutil.copytree("model", "never_stopped")
    run_to_end(script("./never_stopped", save_model_path="./never_stopped", epochs=4))
    die = AT_STEP.format(f"if steps[0] == {killed_at}: os._exit(9)")
    code = script("./model", save_model_path="./model", epochs=4, checkpoint_minutes=0)
    assert finish(start(die + code))[0] == 9
    assert "\nresume " in run_to_end(code)
    weights, stopped = results("never_stopped")[0], results("model")[0]
    torch.testing.assert_close(stopped, weights, atol=0, rtol=0)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(
    project, encoder_folder, number, code, processes
):
    run = script(encoder_folder, epochs=6)
    run_to_end(run, processes)
    shutil.move("model", "reference")
    child = start(SLOW + run, processes)
    while not os.path.exists(CHECKPOINT):  # after the first epoch
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(number)
    exit_code, out, err = finish(child)
    assert (exit_code, err) == (code, "")
    assert out.count("\nstopped  run the same command again to resume; epoch=") == 1
    assert out.endswith(" checkpoint=./model/checkpoint.pth\n")
    assert "\nresume   from ./model/checkpoint.pth epoch=" in run_to_end(run, processes)
    assert_same("model", results("reference"))


def test_a_signal_before_training_begins_ends_in_silence(project, encoder_folder):
    wait = "import time, train\ntrain.accuracy_score = None\nprint('ready', flush=True)\n"
    slow_file = (
        "import torch\ntorch.Generator = lambda: time.sleep(60)\n"  # the first batches are never drawn
    )
    child = start(wait + slow_file + script(encoder_folder))
    while "data " not in child.read("out"):
        time.sleep(0.01)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    exit_code, _, err = finish(child)
    assert (exit_code, err) == (130, "") and not (project / "model").exists()


def test_one_of_two_processes_is_killed_and_the_run_goes_on(project, encoder_folder):
    run = script(encoder_folder, checkpoint_minutes=0, epochs=5)
    run_to_end(run, 2)
    shutil.move("model", "reference")
    die = AT_STEP.format(
        "if steps[0] == 9 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)"
    )
    code, out, _ = finish(start(die + run, 2))
    saved = torch.load(CHECKPOINT, weights_only=True)
    assert code != 0 and (saved["epoch"], saved["batch"]) == (1, 2) and "epoch    1/5" in out
    assert "\nresume   from ./model/checkpoint.pth epoch=2 batch=2\n" in run_to_end(run, 2)
    assert_same("model", results("reference"))


def stop_after(monkeypatch, epoch):
    """Train until `epoch` epochs are done, and leave what a kill in the next one would leave."""
    real, steps = torch.optim.AdamW.step, []

    def step(self, *arguments, **options):
        steps.append(1)
        if len(steps) > 12 * epoch:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train.train()


def change_data(monkeypatch):
    write_jsonl("data/dev.json", EXAMPLES[:3])


def change_labels(monkeypatch):
    data_preprocess.dump_json({"体育": 0, "中超": 1, "股市": 2, "财经": 3}, "data/label2idx.json")


def change_lr(monkeypatch):
    monkeypatch.setattr(train, "lr", 0.5)


def change_precision(monkeypatch):
    monkeypatch.setattr(train, "precision", "bf16")


@pytest.mark.parametrize(
    "change, named",
    [
        (change_data, "changed: the content of ./data/dev.json;"),
        (change_labels, "changed: the content of ./data/label2idx.json;"),
        (change_lr, "changed: lr (was 0.001, is 0.5);"),
        (change_precision, "changed: precision (was fp32, is bf16), the precision in use;"),
    ],
)
def test_a_run_whose_recipe_has_changed_is_not_resumed(project, monkeypatch, capsys, change, named):
    stop_after(monkeypatch, 1)
    change(monkeypatch)
    before = contents(project)
    with pytest.raises(InputError, match="delete this file, or set resume = False in train.py") as caught:
        train.train()
    assert named in str(caught.value) and contents(project) == before
    monkeypatch.setattr(train, "resume", False)
    train.train()
    assert "\nepoch    1/2 " in capsys.readouterr().out and not os.path.exists(CHECKPOINT)


def test_what_does_not_change_the_result_may_change(project, monkeypatch, capsys):
    stop_after(monkeypatch, 1)
    monkeypatch.setattr(train, "log_steps", 3)
    monkeypatch.setattr(train, "checkpoint_minutes", 0)
    train.train()
    assert "\nresume   from ./model/checkpoint.pth epoch=2 batch=0\n" in capsys.readouterr().out


def save_counting_moves(monkeypatch, model, tokenizer, label2idx, killed_at):
    """Save a model, and be killed at the given one of all moves of files; return whether it was."""
    moves = []

    def counted(real):
        def move(*paths):
            if len(moves) == killed_at:
                raise KeyboardInterrupt
            moves.append(paths)
            real(*paths)

        return move

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "remove"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            bert_multilabel_cls.save_model(model, tokenizer, label2idx, "model", {"single": 0.3})
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize("killed_at", range(8))  # staging, config.json away, five files, and none
def test_a_save_that_is_killed_leaves_one_model_or_says_that_it_does_not(project, monkeypatch, killed_at):
    """With other labels than before; the next run completes the save, and a note of somebody's stays."""
    train.train()
    Path("model/note.txt").write_text("mine", encoding="utf-8")
    model, tokenizer, label2idx = load_model("model", "")
    before = model.fc.bias.clone()
    torch.nn.init.ones_(model.fc.bias)
    others = {f"新{label}": idx for label, idx in label2idx.items()}
    killed = save_counting_moves(monkeypatch, model, tokenizer, others, killed_at)
    assert killed == (killed_at < 7)
    for path in ("model", "model/multi_label_cls.pth"):
        try:
            left, _, labels = load_model(path, "")
        except InputError as error:
            assert "a save was interrupted; run python train.py again" in str(error) and killed
        else:
            new = labels == others
            assert torch.equal(left.fc.bias, model.fc.bias if new else before) and (
                new or labels == label2idx
            )
            assert left.bert.config.thresholds == {"single": 0.3} or not new
    train.train()
    assert load_model("model", "")[2] == label2idx and Path("model/note.txt").read_text("utf-8") == "mine"
    assert not [name for name in os.listdir("model") if "tmp" in name]


def test_two_runs_into_two_folders_share_no_file(project, encoder_folder):
    """Started in the same second, from one encoder."""
    children = [start(script(encoder_folder, save_model_path=path, tensorboard_name="runs")) for path in "ab"]
    assert [finish(child)[0] for child in children] == [0, 0]
    written = {path.split(os.sep)[0] for path in contents(".")}
    assert written == {"a", "b", "data"} and len(os.listdir("a/runs")) == len(os.listdir("b/runs")) == 1
    assert_same("a", results("b"))


@pytest.mark.parametrize("limit", [2000, 30_000, 60_000])
def test_a_full_disk_is_one_line_and_leaves_the_model(project, encoder_folder, limit):
    """By a limit on the size of a file, which the model's files or the checkpoint exceed."""
    train.train()
    before = contents("model")
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code, out, err = finish(start(limited + script(encoder_folder, seed=7)))
    assert (
        code == 1 and err.startswith("error: ./model") and err.count("\n") == 1 and "cannot be written" in err
    )
    after = contents("model")
    for name in ("multi_label_cls.pth", "model.safetensors", "config.json"):
        assert after[f"model/{name}"] == before[f"model/{name}"]
    load_model("model/multi_label_cls.pth", "")
    assert not [name for name in after if "tmp" in name]


def spoil_weights(monkeypatch, at_step):
    """Make the classifier NaN after the given optimizer step."""
    real, steps = torch.optim.AdamW.step, []

    def step(self, *arguments, **options):
        real(self, *arguments, **options)
        steps.append(1)
        if len(steps) == at_step:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


@pytest.mark.parametrize("log_steps, batch", [(1, 3), (100, 12)])
def test_a_loss_that_is_nan_stops_the_run_before_a_model_is_saved(project, monkeypatch, log_steps, batch):
    """At the next line with a loss, or at the end of the epoch."""
    spoil_weights(monkeypatch, 3)
    monkeypatch.setattr(train, "log_steps", log_steps)
    message = rf"the loss is nan in epoch 1, batch {batch}, at a learning rate of \d.\d\de-\d\d; lower lr"
    with pytest.raises(InputError, match=message):
        train.train()
    assert not (project / "model").exists()


def test_weights_that_are_nan_after_the_last_step_are_not_saved(project, monkeypatch):
    spoil_weights(monkeypatch, 12)  # the last of the epoch: its own loss was fine
    with pytest.raises(InputError, match="the loss is nan in epoch 1, batch 12"):
        train.train()
    assert not (project / "model").exists()


def test_a_tokenizer_that_has_changed_is_refused(project, monkeypatch, encoder_folder):
    shutil.copytree(encoder_folder, "encoder")
    monkeypatch.setattr(bert_multilabel_cls, "pretrained_model", "./encoder")
    stop_after(monkeypatch, 1)
    tokens = json.loads(Path("encoder/tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokens["model"]["vocab"]
    vocabulary["中"], vocabulary["超"] = vocabulary["超"], vocabulary["中"]
    Path("encoder/tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
    with pytest.raises(InputError, match="cannot resume, changed: the tokenizer in ./encoder"):
        train.train()


def test_a_second_ctrl_c_interrupts_at_once(project, encoder_folder):
    """The step in which both come takes a minute."""
    wait = "steps[0] == 5 and (open('step_5', 'w').close(), time.sleep(60))"
    child = start(AT_STEP.format(wait) + script(encoder_folder))
    while not os.path.exists("step_5"):
        assert child.poll() is None
        time.sleep(0.01)
    for _ in range(2):
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
    assert finish(child, 20)[0] == 130 and "stopped" not in child.read("out")


def test_out_of_gpu_memory_names_batch_length_and_constants(project, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.functional, "embedding", too_large)
    with pytest.raises(
        InputError, match=r"out of GPU memory with 4 texts of \d+ tokens; lower batch_size .*max_len"
    ):
        train.train()


def test_checkpoints_are_saved_by_the_clock(project, monkeypatch):
    saves, real = [], torch.save

    def save(value, path):
        if isinstance(value, dict) and "history" in value:
            saves.append((value["epoch"], value["batch"]))
        real(value, path)

    monkeypatch.setattr(torch, "save", save)
    train.train()
    assert saves == [(0, 12), (1, 0), (2, 0)]  # 10 minutes do not pass in a test
    clock = iter(range(0, 10**9, 150))  # seconds, at each look
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    saves.clear()
    train.train()
    assert (0, 4) in saves and (0, 3) not in saves  # the fourth look after the first is 600 s later


def test_a_checkpoint_that_is_none_is_one_sentence(project):
    os.mkdir("model")
    for content in (b"", b"PK", b"\x80\x02."):
        Path(CHECKPOINT).write_bytes(content)
        with pytest.raises(InputError, match="checkpoint.pth: not a checkpoint of a run; delete this file"):
            train.train()
    assert os.listdir("model") == ["checkpoint.pth"]
