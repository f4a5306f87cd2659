"""Runs that are killed, stopped or refused: what is left can be read, and the next run ends the same."""

import json
import os
import re
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import bert_multilabel_cls
import data_preprocess
import train
from bert_multilabel_cls import load_model
from conftest import EXAMPLES, contents, finish, script, set_up, start, write_jsonl
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
KILLED_AT_STEP = AT_STEP.format("if steps[0] == {}: os.kill(os.getpid(), signal.SIGKILL)")
KILLED_AT_MOVE = """
import os, signal
moves = [0]
def counted(real):
    def move(*arguments, **options):
        if moves[0] == {}:
            os.kill(os.getpid(), signal.SIGKILL)
        moves[0] += 1
        return real(*arguments, **options)
    return move
for name in {}:
    setattr(os, name, counted(getattr(os, name)))
"""
NO_HUB = """
import bert_multilabel_cls
def no_hub(*_, **__):
    raise ConnectionError("no network in tests")
bert_multilabel_cls.HfApi.model_info = bert_multilabel_cls.snapshot_download = no_hub
"""


def results(folder):
    """Return weights, metrics and history of a finished run, without seconds and folders."""
    metrics = data_preprocess.load_json(f"{folder}/metrics.json")
    del metrics["train_seconds"], metrics["constants"]["save_model_path"], metrics["run_name"]
    metrics["changed"].pop("save_model_path", None)
    metrics["used"]["encoder"] = os.path.basename(metrics["used"]["encoder"])
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
    """12 kills at random moments with one process, 3 with two; every optimizer step is a checkpoint."""
    code = script(encoder_folder, epochs=10, checkpoint_minutes=0, accumulation_steps=2, precision=precision)
    run_to_end(code, processes)
    shutil.move("model", "reference")
    assert not os.path.exists("reference/checkpoint.pth")
    reference, chance, kills, moments = results("reference"), random.Random(precision), 0, set()
    while kills < 12 // processes**2:
        child = start(code, processes)
        checkpoints = chance.randrange(7)
        wait_for_checkpoints(child, checkpoints)
        time.sleep(chance.uniform(0, 0.03 if checkpoints else 0.5))  # a step, or the start
        if child.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                child.send_signal(signal.SIGKILL)
        exit_code, out, err = child.finish()
        if exit_code == -signal.SIGKILL:
            kills += 1
            moments.add(left_behind())
        else:
            assert exit_code == 0, out + err
            assert_same("model", reference)
            shutil.rmtree("model")
    run_to_end(code, processes)
    assert_same("model", reference)
    assert len(moments - {None}) > kills // 4  # the kills were spread over the run
    assert not [name for name in os.listdir("model") if "checkpoint" in name or "tmp" in name]


def wait_for_checkpoints(child, number):
    """Wait until a process has saved so many checkpoints, or has ended: however slow the machine is."""
    seen, end = set(), time.monotonic() + 120
    while len(seen) <= number and child.poll() is None:
        assert time.monotonic() < end, child.read("out") + child.read("err")
        seen.add(os.stat(CHECKPOINT).st_mtime_ns if os.path.exists(CHECKPOINT) else None)
        time.sleep(0.003)


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


TRAIN_ON = script("./model")
EVERY_STEP_SAVED = script("./model", checkpoint_minutes=0)


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


def killed_at_move(number):
    return KILLED_AT_MOVE.format(number, ("replace", "rename")) + TRAIN_ON


@pytest.mark.parametrize(
    "killed",
    [
        *(
            pytest.param(KILLED_AT_STEP.format(n) + EVERY_STEP_SAVED, id=f"step {n}")
            for n in (5, 12, 13, 20, 30)
        ),
        *(pytest.param(killed_at_move(n), id=f"move {n}") for n in range(1, 10)),
    ],
)
def test_a_killed_run_that_trains_on_from_its_own_folder_resumes_too(project, trained_on, killed):
    """The first model is saved over the encoder that the run started from.

    12 steps an epoch. Of the moves, 0 and 8 are checkpoints, 1 and 9 history.jsonl, 2 to 7 the model.
    """
    shutil.copytree(trained_on / "before", "model")
    assert finish(start(killed))[0] == -signal.SIGKILL
    left_behind()
    assert "\nresume   from ./model/checkpoint.pth epoch=" in run_to_end(TRAIN_ON)
    assert_same("model", results(trained_on / "after"))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(
    project, encoder_folder, number, code, processes
):
    run = script(encoder_folder, epochs=6, many_labels=4)
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
    assert re.fullmatch(r"stopped  .*; epoch=\d batch=\d+", out.splitlines()[-1])
    assert "\nresume   from ./model/checkpoint.pth epoch=" in run_to_end(run, processes)
    assert_same("model", results("reference"))


def test_a_signal_before_training_begins_ends_in_silence(project, encoder_folder):
    """In the minute in which the first batches are drawn."""
    wait = "import time, torch\ntorch.Generator = lambda: print('drawing', flush=True) or time.sleep(60)\n"
    child = start(wait + script(encoder_folder))
    while "drawing" not in child.read("out"):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    exit_code, out, err = child.finish(20)
    assert (exit_code, err) == (130, "") and "stopped" not in out and not (project / "model").exists()


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
    with pytest.raises(
        InputError, match="to start over, delete ./model/checkpoint.pth or set resume = False in train.py"
    ) as caught:
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


SAVE_OTHER_LABELS = """
import torch
from bert_multilabel_cls import load_model, save_model
model, tokenizer, label2idx = load_model("model", "")
torch.nn.init.ones_(model.fc.bias)
others = {f"新{label}": idx for label, idx in label2idx.items()}
save_model(model, tokenizer, others, "model", {"single": 0.3})
"""


@pytest.mark.parametrize("killed_at", range(17))
def test_a_save_that_is_killed_leaves_one_model_or_says_that_it_does_not(project, monkeypatch, killed_at):
    """With other labels than before. The next run completes the save, and a note of somebody's stays.

    16 moves: the finished folder; eight files of the finished run, their folder; five new
    files, the emptied folder. Then no kill. The finished run is there to the end, in one of two folders.
    """
    train.train()
    finished = {os.path.basename(path): digest for path, digest in contents("model").items()}
    Path("model/note.txt").write_text("mine", encoding="utf-8")
    old, _, label2idx = load_model("model", "")
    others = {f"新{label}": idx for label, idx in label2idx.items()}

    def is_new(path):
        """Return whether a path gives the new model; check that it gives the new or the old one."""
        left, _, labels = load_model(path, "")
        new = labels == others
        assert labels == (others if new else label2idx)
        assert torch.equal(left.fc.bias, torch.ones(4) if new else old.fc.bias)
        assert left.bert.config.thresholds == ({"single": 0.3} if new else old.bert.config.thresholds)
        return new

    killed = KILLED_AT_MOVE.format(killed_at, ("replace", "rename", "remove", "rmdir"))
    code, _, err = finish(start(killed + SAVE_OTHER_LABELS))
    assert code == (0 if killed_at == 16 else -signal.SIGKILL), err
    for path in ("model", "model/multi_label_cls.pth"):
        try:
            assert is_new(path) == (killed_at > 0)
        except InputError as error:
            assert "a save was interrupted; run python train.py again" in str(error) and 0 < killed_at < 16
    stop_after(monkeypatch, 0)
    assert is_new("model") == is_new("model/multi_label_cls.pth") == (killed_at > 0)
    train.train()
    assert load_model("model", "")[2] == label2idx and Path("model/note.txt").read_text("utf-8") == "mine"
    assert not [name for name in os.listdir("model") if "tmp" in name]
    assert {os.path.basename(path): digest for path, digest in contents("model/previous").items()} == finished


@pytest.mark.parametrize("from_scratch", [False, True])
def test_two_runs_into_two_folders_share_no_file(project, encoder_folder, from_scratch):
    """At the same time; from one encoder, or each from a small BERT of its own."""
    small = "dict(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=32)"
    begin = f"{NO_HUB}import data_helper\ndata_helper.scratch_config = {small}\n" if from_scratch else ""
    encoder = bert_multilabel_cls.default_model if from_scratch else encoder_folder
    options = {"tensorboard_name": "runs", "scratch_epochs": 2}
    children = [start(begin + script(encoder, save_model_path=path, **options)) for path in "ab"]
    for child in children:
        exit_code, out, err = finish(child)
        assert exit_code == 0, out + err
    written = {path.split(os.sep)[0] for path in contents(".")}
    assert written == {"a", "b", "data"} and len(os.listdir("a/runs")) == len(os.listdir("b/runs")) == 1
    assert not os.path.exists("a/scratch_encoder") and not os.path.exists("b/scratch_encoder")
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
    assert child.finish(20)[0] == 130 and "stopped" not in child.read("out")


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
        with pytest.raises(
            InputError, match="checkpoint.pth: not a checkpoint of a run; to start over, delete"
        ):
            train.train()
    assert os.listdir("model") == ["checkpoint.pth"]
