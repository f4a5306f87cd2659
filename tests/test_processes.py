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
from data_preprocess import load_json


@pytest.fixture
def still_encoder(tmp_path, encoder_folder):
    """The tiny encoder without dropout."""
    folder = tmp_path / "still"
    shutil.copytree(encoder_folder, folder)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig.from_pretrained(encoder_folder, **none)
    BertModel.from_pretrained(encoder_folder, config=config).save_pretrained(folder)
    return str(folder)


def results(folder):
    """Return the losses and metrics of a run, epoch by epoch and on test, as tensors."""
    test = load_json(f"{folder}/metrics.json")["test"]
    history = [json.loads(line) for line in open(f"{folder}/history.jsonl", encoding="utf-8")]
    numbers = [(row["train_loss"], row["dev_loss"], row["accuracy"], row["macro_f1"]) for row in history]
    return torch.tensor(numbers), torch.tensor([test["loss"], *test["at_0.5"].values()])


@pytest.mark.parametrize("processes, batch_size, many_labels", [(2, 4, 500), (4, 2, 4)])
def test_several_processes_follow_one_with_the_same_batch(
    project, still_encoder, processes, batch_size, many_labels
):
    """51 texts in batches of 8: the 3 shortest are 2 and 1 for two processes, none for the last of four."""
    shortest = [("", ["体育", "财经"]), ("股", ["股市"]), ("中", [])]
    write_jsonl("data/train.json", EXAMPLES * 8 + shortest)
    write_jsonl("data/dev.json", EXAMPLES * 22 + EXAMPLES[:1])  # 3 batches of 64, or 5 of 32, or 9 of 16
    runs = {}
    for count, size in ((1, 8), (processes, batch_size)):
        folder = f"./model{count}"
        sizes = {"batch_size": size, "accumulation_steps": 2, "many_labels": many_labels}
        run = script(still_encoder, dropout=0.0, save_model_path=folder, **sizes)
        code, out, err = finish(start(run, count))
        assert code == 0, err
        runs[count] = results(folder)
        assert out.count("\nepoch ") == 3 and out.count("\nbest ") == 1
        assert f"steps_per_epoch=4 batch_size={size} processes={count} " in out
    for several, one in zip(runs[processes], runs[1]):
        torch.testing.assert_close(several, one, atol=1e-5, rtol=0)
    weights = [without_key_biases(f"model{count}") for count in runs]
    torch.testing.assert_close(*weights, atol=1e-4, rtol=0)


def test_processes_draw_dropout_masks_of_their_own_and_agree_on_the_weights(project, encoder_folder):
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


def of_all(encoder_folder):
    write_jsonl("data/dev.json", [("今日", ["别的"])])
    return script(encoder_folder, epochs=1), "./data/dev.json:1: the label"


def of_rank_0(encoder_folder):
    no_hub = """
import bert_multilabel_cls
def no_hub(*_, **__):
    raise ConnectionError("no network in tests")
bert_multilabel_cls.HfApi.model_info = no_hub
"""
    return no_hub + script("someone/none"), "the encoder someone/none was not found"


@pytest.mark.parametrize("fault", [of_all, of_rank_0])
def test_torchrun_says_a_fault_once_and_nothing_is_written(project, encoder_folder, fault):
    """By torchrun itself, which ends the others."""
    code, message = fault(encoder_folder)
    Path("run.py").write_text(code, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run.py"]
    options = {"env": {**os.environ, "PYTHONPATH": str(root)}, "encoding": "utf-8", "capture_output": True}
    run = subprocess.run(torchrun, timeout=120, **options)
    assert run.returncode == 1 and run.stderr.count(f"error: {message}") == 1, run.stderr
    assert run.stderr.count("Traceback") == 1  # torchrun's own, that a process ended with 1
    assert not (project / "model").exists()


def test_machines_with_different_data_are_refused(project, encoder_folder):
    """As on two machines that do not share a folder: one process has another file."""
    other = "import os, train\nif os.environ['RANK'] == '1': os.chdir('other')\n"
    shutil.copytree("data", "other/data")
    write_jsonl("other/data/train.json", EXAMPLES * 7)
    code, _, err = finish(start(other + script(encoder_folder), 2))
    assert code == 1 and "differ between the machines" in err and not os.path.exists("model")
