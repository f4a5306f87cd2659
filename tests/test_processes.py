"""Several processes under torchrun, on gloo: the same examples in a step, and the same numbers, as one process."""
import json
import shutil

import pytest
import torch
from transformers import BertConfig, BertModel

from conftest import EXAMPLES, finish, script, start, without_key_biases, write_jsonl
from data_preprocess import load_json


@pytest.fixture
def still_encoder(tmp_path, encoder_folder):
    """The tiny encoder without dropout."""
    folder = tmp_path / "still"
    shutil.copytree(encoder_folder, folder)
    config = BertConfig.from_pretrained(encoder_folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertModel.from_pretrained(encoder_folder, config=config).save_pretrained(folder)
    return str(folder)


def results(folder):
    metrics, history = load_json(f"{folder}/metrics.json"), [json.loads(line) for line in open(f"{folder}/history.json")]
    numbers = [(row["train_loss"], row["dev_loss"], row["accuracy"], row["macro_f1"]) for row in history]
    return torch.tensor(numbers), torch.tensor([metrics["test"]["loss"], *metrics["test"]["at_0.5"].values()])


def test_two_processes_follow_one_with_twice_the_batch(project, still_encoder):
    """49 texts in steps of 16: the last step has one text, of which the second process gets none. 7 dev texts."""
    write_jsonl("data/train.json", EXAMPLES * 8 + EXAMPLES[:1])
    write_jsonl("data/dev.json", EXAMPLES + EXAMPLES[:1])
    runs = {}
    for processes, batch_size in ((1, 8), (2, 4)):
        code = script(still_encoder, dropout=0.0, batch_size=batch_size, accumulation_steps=2,
                      save_model_path=f"./model{processes}/m.pth")
        code, out, err = finish(start(code, processes))
        assert code == 0, err
        runs[processes] = results(f"model{processes}")
        assert out.count("\nepoch ") == 3 and out.count("\nbest ") == 1 and f"processes={processes}" in out
        assert "steps_per_epoch=4" in out
    for two, one in zip(runs[2], runs[1]):
        torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(without_key_biases("model2/m.pth"), without_key_biases("model1/m.pth"), atol=1e-4, rtol=0)


def test_processes_with_dropout_draw_masks_of_their_own_and_agree_on_the_weights(project, encoder_folder):
    look = ("import torch, data_helper, train\nreal = train.report_run\ndef report_run(run):\n"
            "    masks = data_helper.from_processes(torch.rand(8))\n"
            "    weights = data_helper.from_processes(torch.cat([p.detach().flatten() for p in run.model.parameters()]))\n"
            "    if run.rank == 0: print('masks differ', not torch.equal(*masks), 'weights agree', torch.equal(*weights))\n"
            "    real(run)\ntrain.report_run = report_run\n")
    code, out, err = finish(start(look + script(encoder_folder), 2))
    assert code == 0, err
    assert "masks differ True weights agree True" in out


def test_a_fault_is_said_once(project, encoder_folder):
    write_jsonl("data/dev.json", [("今日", ["别的"])])
    code, out, err = finish(start(script(encoder_folder), 2))
    assert code == 1 and err.count("error: ./data/dev.json:1: the label") == 1
    assert not (project / "model").exists()


def test_a_fault_of_the_main_process_alone_is_said_once_and_ends_the_others(project, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = finish(start(script("someone/none"), 2))
    assert code == 1 and err.count("error: the encoder someone/none cannot be had") == 1
    assert err.count("Traceback") == 1  # torchrun's own, that a process ended with 1
