"""The network, where its encoder comes from, and the folder of a trained model."""

import itertools
import json
import os
import pickle
import re
import shutil
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import huggingface_hub as hub
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import BertConfig, BertModel, pipeline

import bert_multilabel_cls as ours
import predict
import train
from conftest import EXAMPLES, TOKENS, TRAIN_CONSTANTS, contents, finish, root, start
from data_helper import MultiClsDataSet
from data_preprocess import InputError, dump_json, load_json

LABELS = {"体育": 0, "财经": 1, "科技": 2}
FOREIGN = "vocab.csv word2vec.model merges.txt tokenized_corpus.json foreign.safetensors".split()
NAMES = ["../data", "../../data", "/etc/passwd", "..", ".", "a\\b", "C:x", "", 5, None, [], {}]
NAMES += ["runs", "mine", "previous", "new.tmp", "finished.tmp", "mine/notes.txt"]
SIZE = "bert.config.hidden_size"
FORWARD = '(nn.Linear,), {"forward": lambda self, x: nn.Linear.forward'
HEADS = {
    "two layers": f"nn.Sequential(nn.Linear({SIZE}, 9), nn.Tanh(), nn.Linear(9, class_num))",
    "no bias": f"nn.Linear({SIZE}, class_num, bias=False)",
    "scaled": f'type("Scaled", {FORWARD}(self, 3 * x)}})({SIZE}, class_num)',
}
MEAN = """    mask = attention_mask[..., None]
    states = bert(input_ids, attention_mask, token_type_ids)[0]
    return (states * mask).sum(1) / mask.sum(1)"""
NETWORKS = [(None, None), (None, MEAN), ("two layers", MEAN), ("no bias", None), ("scaled", None)]
SCRIPTS = ("data_preprocess", "bert_multilabel_cls", "data_helper", "train", "predict")


class ArticleNet(nn.Module):  # for checking that weights move in both directions
    def __init__(self, hidden_size, class_num, folder):
        super().__init__()
        self.fc = nn.Linear(hidden_size, class_num)
        self.drop = nn.Dropout(0.1)
        self.bert = BertModel.from_pretrained(folder)

    def forward(self, input_ids, attention_mask, token_type_ids):
        pooled = self.bert(input_ids, attention_mask, token_type_ids)[1]
        return F.sigmoid(self.fc(self.drop(pooled)))


@pytest.fixture
def inputs():
    """Ids, mask and types that all differ: swapping any two changes the result."""
    rows = [[2, 5, 6, 3, 7, 3], [2, 8, 3, 9, 3, 0]], [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    return tuple(map(torch.tensor, (*rows, [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]])))


@pytest.fixture
def model(encoder_folder):
    rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    bert = BertModel.from_pretrained(encoder_folder, **rates)
    return ours.BertMultiLabelCls(None, len(LABELS), dropout=0.0, bert=bert).eval()


def test_one_pass_is_that_of_bert_model_with_its_gradients(model, inputs):
    """Though the last layer computes [CLS] alone; in training, in evaluation, and in bf16."""
    pooled = []
    model.drop.register_forward_hook(lambda *arguments: pooled.append(arguments[1][0]))

    def outputs_and_gradients(run):
        model.zero_grad()
        run()
        pooled[-1].square().sum().backward()
        return pooled[-1], [p.grad.clone() for p in model.bert.parameters()]

    whole = outputs_and_gradients(lambda: model.drop(model.bert(*inputs)[1]))
    for training in (False, True):
        model.train(training)
        found = outputs_and_gradients(lambda: model(*inputs))
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)
    expected = torch.sigmoid(whole[0] @ model.fc.weight.T + model.fc.bias)
    torch.testing.assert_close(model(*inputs), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(*inputs).dtype == torch.float32
    torch.testing.assert_close(pooled[-1].float(), whole[0], atol=0.03, rtol=0)


def test_dropout_is_on_in_training_alone(model, inputs):
    expected = model(*inputs)
    model.bert.encoder.layer[0].attention.self.dropout.p = 0.3
    assert not torch.equal(model.train()(*inputs), model(*inputs))
    model.drop.p = 1.0
    torch.testing.assert_close(model(*inputs), model.fc.bias.sigmoid().expand(2, -1))
    torch.testing.assert_close(model.eval()(*inputs), expected)


def test_an_article_checkpoint_predicts_here(tmp_path, monkeypatch, encoder_folder, inputs):
    monkeypatch.setattr(ours, "pretrained_model", encoder_folder)
    article, labels = ArticleNet(16, 3, encoder_folder).eval(), {"体育": 2, "财经": 0, "科技": 1}
    position_ids = {"bert.embeddings.position_ids": torch.arange(128)[None]}  # before 4.31
    torch.save(article.state_dict() | position_ids, tmp_path / "multi_label_cls.pth")
    dump_json(labels, tmp_path / "label2idx.json")
    model, tokenizer, label2idx = ours.load_model(tmp_path, tmp_path / "label2idx.json")
    torch.testing.assert_close(model(*inputs), article(*inputs), atol=1e-5, rtol=0)
    assert label2idx == labels and len(tokenizer) == len(TOKENS)


def test_an_article_checkpoint_has_a_report(project):
    """At 0.5 alone: no thresholds were tuned."""
    os.mkdir("model")
    torch.save(ours.BertMultiLabelCls(16, 4).state_dict(), "model/multi_label_cls.pth")
    metrics, _ = train.test("./model/multi_label_cls.pth", "./data/test.json", return_report=True)
    assert "at_0.5" in metrics and "at_single" not in metrics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_takes_its_share_and_keeps_the_mean(project, dtype):
    drop = ours.BertMultiLabelCls(16, 3, dropout=0.3).drop
    ones = torch.ones(999, 1001, dtype=dtype, requires_grad=True)
    once, twice = drop.train()(ones), drop(ones)
    assert (once == 0).float().mean().item() == pytest.approx(0.3, abs=0.003)
    assert once.float().mean().item() == pytest.approx(1, abs=0.01)
    assert 0.4 < (once != twice).float().mean() < 0.44
    once.sum().backward()
    assert torch.equal(ones.grad, once) and drop.eval()(ones) is ones


def test_our_checkpoint_loads_in_the_article(tmp_path, model, tokenizer, encoder_folder, inputs):
    path = f"{tmp_path}/m/multi_label_cls.pth"
    ours.save_model(model, tokenizer, LABELS, path)
    article = ArticleNet(16, 3, encoder_folder).eval()
    article.load_state_dict(torch.load(path, weights_only=True), strict=True)
    torch.testing.assert_close(model(*inputs), article(*inputs), atol=1e-5, rtol=0)
    loaded, loaded_tokenizer, label2idx = ours.load_model(path, "./no/such/index.json")
    assert torch.equal(loaded(*inputs), model(*inputs)) and not loaded.training
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab() and label2idx == LABELS


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize(
    "change, word",
    [
        (pickle.dumps(Hostile(), protocol=2), "state dict"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        ({"fc.bias": torch.zeros(4)}, "3 labels"),
        ({"bert.pooler.dense.bias": torch.full((16,), torch.nan)}, "pooler.dense.bias"),
        ({"bert.pooler.dense.bias": None}, "pooler.dense.bias"),
        ({f"bert.pooler.dense.{name}": None for name in ("weight", "bias")}, "pooler.dense.bias"),
        ({"fc.bias": None}, "fc.bias"),
        ("other labels", "not of the run"),
        (None, "python train.py"),  # there is none
    ],
)
def test_a_broken_checkpoint_is_one_sentence(tmp_path, monkeypatch, model, tokenizer, change, word):
    monkeypatch.chdir(tmp_path)
    path = Path("m/multi_label_cls.pth")
    ours.save_model(model, tokenizer, LABELS, path)
    if isinstance(change, dict):
        state_dict = torch.load(path, weights_only=True)
        for name, tensor in change.items():
            state_dict[name] = tensor
            if tensor is None:
                del state_dict[name]
        torch.save(state_dict, path)
    elif change == "other labels":
        ours.save_model(model, tokenizer, {"x": 0, "y": 1, "z": 2}, "n")
        shutil.copy("n/multi_label_cls.pth", path)
    elif change:
        path.write_bytes(change)
    else:
        shutil.rmtree("m")
    with pytest.raises(InputError, match=word) as caught:
        ours.load_model(path, "")
    assert str(caught.value).startswith("m") and "\n" not in str(caught.value)
    assert not os.path.exists("hacked")


def test_model_gives_a_pipeline_our_probabilities(trained):
    """For texts of all lengths, cut as predict does, in batches."""
    texts = ["中超开赛", "", "股市大涨今日股市大涨", "龘", "up ups a", "中超" * 100]
    pipe = pipeline("text-classification", model="./model", top_k=None, device="cpu")
    rows = pipe(texts, truncation=True, batch_size=3)
    scores = [{row["label"]: row["score"] for row in found} for found in rows]
    theirs = [[row[name] for name in predict.get_labels()] for row in scores]
    np.testing.assert_allclose(theirs, predict.predict_proba(texts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("removed", ["multi_label_cls.pth", "model.safetensors"])
def test_either_form_of_the_weights_is_a_whole_model(trained, removed):
    texts = ["中超开赛", "股市大涨"]
    probs = predict.predict_proba(texts)
    os.remove(f"model/{removed}")
    predict.load_once.cache_clear()
    np.testing.assert_array_equal(predict.predict_proba(texts), probs)
    assert predict.predict(texts) == [["中超", "体育"], ["股市", "财经"]]
    assert {*ours.load_model("./model")[0].bert.config.thresholds} == {"single", "by_label"}


@pytest.mark.parametrize("head, pooling", NETWORKS)
def test_another_network_trains_and_predicts(project, encoder_folder, head, pooling):
    """Changed in one place of a copy of the scripts; what was saved gives the loss of training."""
    for script in SCRIPTS:
        shutil.copy(root / f"{script}.py", ".")
    source = Path("bert_multilabel_cls.py").read_text("utf-8")
    line, body = r"(?m)^( +self\.fc = ).*$", r'(?s)(def pooler_output.*?""".*?"""\n).*?(?=\n\n\n)'
    for pattern, new in ((line, HEADS.get(head)), (body, pooling)):
        source, count = re.subn(pattern, rf"\g<1>{new}", source) if new else (source, 1)
        assert count == 1
    Path("bert_multilabel_cls.py").write_text(source, "utf-8")
    values = {name: getattr(train, name) for name in TRAIN_CONSTANTS}
    code = f"""
import json, sys
for name in {SCRIPTS}:
    sys.modules.pop(name, None)
import bert_multilabel_cls, predict, train
bert_multilabel_cls.pretrained_model = {encoder_folder!r}
vars(train).update({values!r})
predict.device, predict.precision = "cpu", "fp32"
train.train()
json.dump(predict.predict_proba({[text for text, _ in EXAMPLES]}).tolist(), open("probs", "w"))
"""
    code, out, err = finish(start(code))
    assert code == 0, err
    is_said = "other tools" in " ".join(out.split()).replace(" note ", " ")
    assert is_said == bool(head or pooling)
    history = [json.loads(line) for line in open("model/history.jsonl")]
    loss = [row["dev_loss"] for row in history if row["saved"]][-1]
    label2idx, probs = load_json("data/label2idx.json"), torch.tensor(load_json("probs"))
    true = torch.tensor([[float(name in labels) for name in label2idx] for _, labels in EXAMPLES])
    assert nn.BCELoss()(probs, true).item() == pytest.approx(loss, abs=1e-5)


def add_foreign(folder):
    """Write files to a folder that are not of ours; return their contents by path."""
    os.makedirs(f"{folder}/mine", exist_ok=True)
    paths = [Path(folder, name) for name in (*FOREIGN, "mine/notes.txt")]
    for path in paths:
        path.write_text(f"my {path.name}")
    return {str(path): contents(folder)[str(path)] for path in paths}


def test_two_runs_leave_the_files_of_others(project, monkeypatch, encoder_folder):
    """And previous/ holds what the run before wrote, first a checkpoint of the article."""
    foreign, written = add_foreign("model"), []
    torch.save(ArticleNet(16, 4, encoder_folder).state_dict(), "model/multi_label_cls.pth")
    article = contents("model")["model/multi_label_cls.pth"]
    others = ("previous", "runs", "train.lock", "saved.json", *FOREIGN, "mine")
    for seed in (1, 2):
        monkeypatch.setattr(train, "seed", seed)
        train.train()
        found = contents("model").items()
        assert found >= foreign.items()
        written.append({k: digest for k, digest in found if not any(x in k for x in others)})
        kept = contents("model/previous")
        assert (kept["model/previous/multi_label_cls.pth"] == article) == (seed == 1)
    kept = {k.replace("/previous", ""): digest for k, digest in kept.items()}
    assert kept.pop("model/saved.json") and kept == written[0] != written[1]
    assert ours.load_model("model/previous")
    assert not [name for name in os.listdir("model") if "tmp" in name or "checkpoint" in name]


@pytest.mark.parametrize("names", [NAMES, {"../data": 1}, "word2vec.model", 5])
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_saved_json_of_others_is_no_harm(project, model, tokenizer, names, is_finished):
    Path("model/runs").mkdir(parents=True)
    foreign = add_foreign("model") | contents("data")
    absolute = [os.path.abspath("data/train.json")]
    dump_json(names + absolute if names is NAMES else names, "model/saved.json")
    if is_finished:
        dump_json({"run_name": "../../data", "constants": {}}, "model/metrics.json")
    for _ in range(2):
        ours.save_model(model, tokenizer, LABELS, "./model")
    assert contents(".").items() >= foreign.items() and os.path.isdir("model/runs")
    assert ours.load_model("./model")[2] == LABELS


def end_at(monkeypatch, number):
    """Raise at the n-th file operation and do none from then on; return the list of all."""
    done = []

    def ending(operation):
        def call(*arguments, **options):
            done.append(operation)
            if len(done) >= number:
                raise SystemExit
            return operation(*arguments, **options)

        return call

    for name in ("replace", "rename", "remove", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, ending(getattr(os, name)))
    monkeypatch.setattr(shutil, "copy2", ending(shutil.copy2))
    return done


def files(folder):
    """Return the contents of the files that lie in a folder by name."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


class Run:
    """A run with weights and labels of its own, by its number."""

    def __init__(self, number, tokenizer):
        torch.manual_seed(number)
        sizes = dict(hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
        sizes |= dict(intermediate_size=4, vocab_size=len(TOKENS), max_position_embeddings=16)
        labels = {f"{name} of {number}": idx for idx, name in enumerate("abcd"[number:])}
        model = ours.BertMultiLabelCls(None, len(labels), bert=BertModel(BertConfig(**sizes)))
        self.number, self.saved = number, (model, tokenizer, labels)

    def save(self, folder, is_finished=False):
        """Save it, a finished one with measurements; return the files of the folder."""
        ours.save_model(*self.saved, str(folder))
        if is_finished:
            for name in ("metrics.json", "history.jsonl"):
                Path(folder, name).write_text(f"of run {self.number}")
        return files(folder)


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_save_killed_anywhere_leaves_one_model(tmp_path, monkeypatch, tokenizer, is_finished):
    """Or a sentence that says what to do; the next save completes it, and previous/ stays whole."""
    runs, folder, whole = [Run(n, tokenizer) for n in range(4)], tmp_path / "m", tmp_path / "whole"
    for place in (whole, whole / "previous", tmp_path / "2", tmp_path / "3"):
        add_foreign(place)
    kept = runs[0].save(whole, is_finished=True)
    old = runs[1].save(whole, is_finished)
    kept = without_record(old if is_finished else kept)
    new, next_one = (runs[n].save(tmp_path / str(n)) for n in (2, 3))
    states = []
    for number in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        with monkeypatch.context() as patch, suppress(SystemExit):
            done = end_at(patch, number)
            runs[2].save(folder)
        try:
            labels = ours.load_model(str(folder), "")[2]
            states.append("new" if labels == runs[2].saved[2] else "old")
            assert files(folder) == (new if states[-1] == "new" else old), number
        except InputError as error:
            states.append("none")
            assert "\n" not in str(error) and "python train.py" in str(error)
        if states[-1] != "old" or not is_finished:
            assert files(folder / "previous").items() >= kept, number
        assert runs[3].save(folder) == next_one, number
        assert without_record(files(folder / "previous")) == kept, number
        if len(done) < number:
            break
    assert [state for state, _ in itertools.groupby(states)] == ["old", "none", "new"]


def without_record(contents):
    """Return files, but what lists those that were written."""
    return {name: content for name, content in contents.items() if name != "saved.json"}.items()


@pytest.fixture
def cache(tmp_path, monkeypatch, encoder_folder):
    """The snapshot of someone/tiny in a cache of the hub, which may not be asked."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(encoder_folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    real, places = hub.snapshot_download, {"cache_dir": tmp_path / "hub"}
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: real(*a, **k | places))
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setattr(ours, "pretrained_model", "someone/tiny")
    return repository / "snapshots" / ("0" * 40)


def test_the_cache_needs_no_network_and_a_folder_comes_first(cache, tmp_path, monkeypatch):
    bert = BertModel.from_pretrained(cache)
    found = ours.BertMultiLabelCls(16, 3).bert.state_dict()
    torch.testing.assert_close(found, bert.state_dict())
    dataset = MultiClsDataSet(None, label2idx=LABELS, examples=[("", "中", [], {})])
    assert dataset.input_ids.tolist() == [[2, 5, 3]]
    with pytest.raises(InputError, match="768.*16"):
        ours.BertMultiLabelCls(768, 3)
    monkeypatch.chdir(tmp_path)
    nn.init.ones_(bert.pooler.dense.bias)
    bert.save_pretrained("someone/tiny")
    assert ours.BertMultiLabelCls(16, 3).bert.pooler.dense.bias.tolist() == [1.0] * 16


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_cache_without_an_essential_file_is_not_enough(cache, offline, missing):
    (cache / missing).unlink()
    with pytest.raises(InputError, match="someone/tiny.*HF_ENDPOINT"):
        ours.BertMultiLabelCls(16, 3)
    with pytest.raises(InputError, match="someone/tiny"):
        MultiClsDataSet(None, label2idx=LABELS, examples=[("", "中", [], {})])


def test_the_hub_is_the_last_resort(monkeypatch, encoder_folder):
    needed = "config.json vocab.txt spiece.model tokenizer.json model.safetensors".split()
    offered, downloads = [*needed, "pytorch_model.bin", "tf_model.h5"], []

    def download(name, local_files_only=False, allow_patterns=()):
        if local_files_only:
            raise OSError
        downloads.append([f for f in offered if any(fnmatch(f, p) for p in allow_patterns)])
        return encoder_folder

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in offered])
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, timeout: info)
    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(ours, "pretrained_model", "someone/tiny")
    assert ours.BertMultiLabelCls(16, 3).bert.config.hidden_size == 16 and downloads == [needed]
