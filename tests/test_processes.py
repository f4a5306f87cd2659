"""Several processes, on gloo: the same texts in a step, and the same numbers, as one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from conftest import EXAMPLES, finish, root, script, start, without_key_biases, write_jsonl
from data_preprocess import load_json, preprocess


@pytest.fixture
def still_encoder(tmp_path, encoder_folder):
    """The tiny encoder without dropout."""
    folder = shutil.copytree(encoder_folder, tmp_path / "still")
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig.from_pretrained(encoder_folder, **none)
    BertModel.from_pretrained(encoder_folder, config=config).save_pretrained(folder)
    return str(folder)


def results(folder):
    """Return the losses and scores of a run, epoch by epoch and on test, as tensors."""
    test = load_json(f"{folder}/metrics.json")["test"]
    history = [json.loads(line) for line in open(f"{folder}/history.jsonl", encoding="utf-8")]
    names = ("epoch", "train_loss", "dev_loss", "accuracy", "macro_f1")
    numbers = [[row[name] for name in names] for row in history]
    return torch.tensor(numbers), torch.tensor([test["loss"], *test["at_0.5"].values()])


@pytest.mark.parametrize("processes, batch_size, more_labels", [(2, 4, 0), (4, 2, 500)])
def test_several_processes_follow_one_with_the_same_batch(
    project, still_encoder, processes, batch_size, more_labels
):
    """51 texts in batches of 8: of the last, 3 texts, two processes have 2 and 1, a fourth none.

    With 500 labels more the classifier starts from the texts, of which each process has a share.
    """
    shortest = [("", ["体育", "财经"]), ("股", ["股市"]), ("中", [])]
    shortest[2][1].extend(f"label {n}" for n in range(more_labels))
    write_jsonl("data/train.json", EXAMPLES * 8 + shortest)
    write_jsonl("data/dev.json", EXAMPLES * 22 + EXAMPLES[:1])  # for the last process of 4 no batch
    preprocess("./data/train.json", "./data/label2idx.json")
    runs = {}
    for count, size in ((1, 8), (processes, batch_size)):
        options = {"batch_size": size, "accumulation_steps": 2, "dropout": 0.0}
        run = script(still_encoder, save_model_path=f"./model{count}", **options)
        code, out, err = finish(start(run, count))
        assert code == 0, err
        runs[count] = results(f"./model{count}")
        assert len(runs[count][0]) == out.count("\nepoch ") == 3 and " steps=12 " in out
    for several, one in zip(runs[processes], runs[1]):
        torch.testing.assert_close(several, one, atol=1e-5, rtol=0)
    weights = [without_key_biases(f"model{count}") for count in runs]
    torch.testing.assert_close(*weights, atol=1e-4, rtol=0)


def test_processes_draw_dropout_masks_of_their_own_and_agree_on_the_weights(
    project, encoder_folder
):
    """Seen in each process at its last optimizer step."""
    look = """
import os, torch
real = torch.optim.AdamW.step
def step(self, *arguments, **options):
    result = real(self, *arguments, **options)
    weights = [p.detach().flatten() for group in self.param_groups for p in group["params"]]
    torch.save([torch.rand(8), torch.cat(weights)], f"seen{os.environ['RANK']}.pt")
    return result
torch.optim.AdamW.step = step
"""
    code, _, err = finish(start(look + script(encoder_folder), 2))
    assert code == 0, err
    (random0, weights0), (random1, weights1) = (torch.load(f"seen{rank}.pt") for rank in (0, 1))
    assert not torch.equal(random0, random1) and torch.equal(weights0, weights1)


@pytest.mark.parametrize("fault", ["of all", "of rank 0"])
def test_torchrun_says_a_fault_once_and_nothing_is_written(project, encoder_folder, fault):
    """By torchrun itself, which ends the others."""
    name, message = "someone/none", "error: the encoder someone/none "
    if fault == "of all":
        write_jsonl("data/dev.json", [("今日", ["别的"])])
        name, message = encoder_folder, "error: ./data/dev.json:1: "
    Path("run.py").write_text(script(name), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    options = {"env": environment, "encoding": "utf-8", "capture_output": True, "timeout": 120}
    run = subprocess.run([*torchrun, "run.py"], **options)
    assert run.returncode == 1 and run.stderr.count(message) == 1, run.stderr
    assert run.stderr.count("Traceback") == 1  # torchrun's own, that a process ended with 1
    assert not list(project.glob("model/*[!k]"))  # but train.lock


def test_machines_with_different_data_are_refused(project, encoder_folder):
    """As on two machines that do not share a folder: one process has another file."""
    other = "import os, train\nif os.environ['RANK'] == '1': os.chdir('other')\n"
    shutil.copytree("data", "other/data")
    write_jsonl("other/data/train.json", EXAMPLES * 7)
    code, _, err = finish(start(other + script(encoder_folder), 2))
    assert code == 1 and "error: " in err and "differ" in err and "Traceback" not in err
    assert not list(project.glob("model/*[!k]"))
