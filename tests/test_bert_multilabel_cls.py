import copy
import json
import os
import pickle
import shutil
import socket
import time
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import constants
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    pipeline,
)

import bert_multilabel_cls as ours
import predict
import train
from conftest import TOKENS, finish, start
from data_helper import MultiClsDataSet
from data_preprocess import InputError, dump_json

LABELS = {"体育": 0, "财经": 1, "科技": 2}


class ArticleNet(nn.Module):
    """The article's network, for checking that weights move in both directions."""

    def __init__(self, hidden_size, class_num, folder, dropout=0.1):
        super().__init__()
        self.fc = nn.Linear(hidden_size, class_num)
        self.drop = nn.Dropout(dropout)
        self.bert = BertModel.from_pretrained(folder)

    def forward(self, input_ids, attention_mask, token_type_ids):
        outputs = self.bert(input_ids, attention_mask, token_type_ids)
        return F.sigmoid(self.fc(self.drop(outputs[1])))


@pytest.fixture
def inputs():
    """Ids, mask and types that all differ: swapping any two changes the result."""
    ids = torch.tensor([[2, 5, 6, 3, 7, 3], [2, 8, 3, 9, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    types = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]])
    return ids, mask, types


@pytest.fixture
def model(encoder_folder):
    return ours.BertMultiLabelCls(None, len(LABELS), bert=BertModel.from_pretrained(encoder_folder)).eval()


def test_forward_is_pooled_output_linear_sigmoid(model, inputs):
    probs = model(*inputs)
    pooled = model.bert(input_ids=inputs[0], attention_mask=inputs[1], token_type_ids=inputs[2]).pooler_output
    assert probs.shape == (2, 3) and probs.dtype == torch.float32
    torch.testing.assert_close(probs, torch.sigmoid(pooled @ model.fc.weight.T + model.fc.bias))


def test_one_pass_is_that_of_the_whole_encoder_with_its_gradients(model, inputs):
    """Though the last layer computes [CLS] alone; in training without dropout, in evaluation, and in bf16."""

    pooled = []
    model.drop.register_forward_hook(lambda *arguments: pooled.append(arguments[1][0]))

    def outputs_and_gradients(run):
        model.zero_grad()
        run()
        pooled[-1].float().square().sum().backward()
        return pooled[-1], [p.grad.clone() for p in model.bert.parameters()]

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    whole = outputs_and_gradients(lambda: model.drop(model.bert(*inputs)[1]))
    for training in (False, True):
        model.train(training)
        torch.testing.assert_close(outputs_and_gradients(lambda: model(*inputs)), whole, atol=1e-5, rtol=1e-4)
    passed_on = []
    value = model.bert.encoder.layer[0].attention.self.value
    value.register_forward_pre_hook(lambda *arguments: passed_on.append(arguments[1][0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probs = model(*inputs)
    assert probs.dtype == torch.float32 and passed_on == [torch.bfloat16]  # also between the layers
    torch.testing.assert_close(pooled[-1], whole[0], atol=0.03, rtol=0)


@pytest.mark.skipif(not ours.cpu_has_bf16(), reason="needs a CPU that multiplies bf16")
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_a_model_made_ready_to_predict_gives_the_same_probabilities(encoder_folder, inputs, act):
    """With weights in bf16, laid out for the CPU if the activation is BERT's; the state dict is as ever."""
    bert = BertModel.from_pretrained(encoder_folder, hidden_act=act)
    model = ours.BertMultiLabelCls(None, len(LABELS), bert=bert).eval()
    with torch.no_grad():
        expected, plain = model(*inputs), copy.deepcopy(model)
        plain.bert.to(torch.bfloat16)
        unpacked = plain(*inputs)
        packed = ours.to_inference(model, "cpu", torch.bfloat16)
        torch.testing.assert_close(packed(*inputs), expected, atol=0.02, rtol=0)
        assert torch.equal(packed(*inputs), unpacked) == (act != "gelu")  # those are rounded elsewhere
        torch.testing.assert_close(copy.deepcopy(packed)(*inputs), unpacked, atol=0, rtol=0)
        torch.testing.assert_close(copy.deepcopy(packed).float()(*inputs), expected, atol=0.02, rtol=0)
    torch.testing.assert_close(packed.state_dict(), plain.state_dict(), atol=0, rtol=0)
    packed.train()  # whose weights would change
    packed(*inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in packed.parameters())


def test_attention_with_dropout_is_the_same_on_average(model, inputs):
    """What the first layer attends to: its mean over many masks is nearly that without dropout."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3 if name.endswith("attention.self.dropout") else 0.0
    seen = []
    model.bert.encoder.layer[0].attention.output.dense.register_forward_hook(lambda *a: seen.append(a[1][0]))
    with torch.no_grad():
        model(*inputs)
        model.train()
        torch.manual_seed(0)
        for _ in range(10):
            model(*(tensor.repeat(400, 1) for tensor in inputs))  # each copy has a mask of its own
    dropped = torch.cat(seen[1:]).view(4000, *seen[0].shape)
    torch.testing.assert_close(dropped.mean(0), seen[0], atol=0.02, rtol=0)
    assert not torch.equal(dropped[0], dropped[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_drops_its_share_and_keeps_the_mean(encoder_folder, dtype, p):
    torch.manual_seed(0)
    model = ours.BertMultiLabelCls(None, 3, p, BertModel.from_pretrained(encoder_folder)).train()
    states = torch.ones(101, 997, dtype=dtype, requires_grad=True)  # no multiple of the 4 masks in a word
    dropped = model.drop(states)
    dropped.sum().backward()
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=0.005)
    assert dropped.unique().numel() <= 2 and torch.equal(states.grad, dropped)
    assert dropped.float().mean().item() == pytest.approx(float(p < 1), abs=0.01)
    assert p in (0.0, 1.0) or not torch.equal(model.drop(states), model.drop(states))
    assert torch.equal(model.eval().drop(states), states)


def test_dropout_before_the_classifier_is_on_in_training_alone(model, inputs):
    expected = model(*inputs)
    model.drop.p = 1.0
    torch.testing.assert_close(model(*inputs), expected)
    torch.testing.assert_close(model.train()(*inputs), model.fc.bias.sigmoid().expand(2, -1))


def test_every_dropout_of_the_encoder_is_of_one_kind(model):
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Dropout)}
    assert kinds == {type(model.drop)} and model.bert.embeddings.dropout.p == 0.1


def test_attention_mask_and_types_are_not_mixed_up(model, inputs):
    ids, mask, types = inputs
    assert not torch.allclose(model(ids, mask, types), model(ids, types, mask), atol=1e-4)


def test_the_default_encoder_is_pretrained_model(encoder_folder, monkeypatch):
    monkeypatch.setattr(ours, "pretrained_model", encoder_folder)
    model = ours.BertMultiLabelCls(16, 3)
    torch.testing.assert_close(
        model.bert.state_dict(), BertModel.from_pretrained(encoder_folder).state_dict()
    )
    with pytest.raises(InputError, match="hidden_size = 768, but the encoder has 16"):
        ours.BertMultiLabelCls(768, 3)


def test_from_pretrained_may_be_replaced(offline, monkeypatch, encoder_folder):
    """Both are called through their own names, so a stand-in needs no files and no network."""
    bert = BertModel.from_pretrained(encoder_folder)
    monkeypatch.setattr(ours.BertModel, "from_pretrained", lambda name: bert)
    assert ours.BertMultiLabelCls(16, 3).bert is bert


def test_state_dict_has_the_keys_of_the_article(model):
    keys = model.state_dict().keys()
    assert {key.split(".")[0] for key in keys} == {"bert", "fc"}
    assert {"fc.weight", "fc.bias", "bert.pooler.dense.weight"} < keys


def test_an_article_checkpoint_predicts_here(tmp_path, monkeypatch, encoder_folder, inputs):
    monkeypatch.setattr(ours, "pretrained_model", encoder_folder)
    article = ArticleNet(16, 3, encoder_folder).eval()
    state = article.state_dict()
    state["bert.embeddings.position_ids"] = torch.arange(128)[None]  # written by transformers before 4.31
    torch.save(state, tmp_path / "multi_label_cls.pth")
    dump_json({"体育": 2, "财经": 0, "科技": 1}, tmp_path / "label2idx.json")
    model, tokenizer, label2idx = ours.load_model(
        f"{tmp_path}/multi_label_cls.pth", f"{tmp_path}/label2idx.json"
    )
    torch.testing.assert_close(model(*inputs), article(*inputs), atol=1e-5, rtol=0)
    assert label2idx == {"体育": 2, "财经": 0, "科技": 1} and len(tokenizer) == len(TOKENS)


def test_our_checkpoint_loads_in_the_article(tmp_path, model, tokenizer, encoder_folder, inputs):
    ours.save_model(model, tokenizer, LABELS, f"{tmp_path}/multi_label_cls.pth")
    article = ArticleNet(16, 3, encoder_folder).eval()
    article.load_state_dict(torch.load(tmp_path / "multi_label_cls.pth", weights_only=True), strict=True)
    torch.testing.assert_close(model(*inputs), article(*inputs), atol=1e-5, rtol=0)


def test_a_saved_folder_needs_nothing_else(tmp_path, model, tokenizer, inputs, offline):
    ours.save_model(model, tokenizer, LABELS, f"{tmp_path}/m/multi_label_cls.pth")
    loaded, loaded_tokenizer, label2idx = ours.load_model(
        f"{tmp_path}/m/multi_label_cls.pth", "./no/such/index.json"
    )
    assert torch.equal(loaded(*inputs), model(*inputs)) and not loaded.training
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert label2idx == LABELS
    config = BertConfig.from_pretrained(tmp_path / "m")
    assert config.problem_type == "multi_label_classification" and config.id2label[2] == "科技"
    assert not [name for name in os.listdir(tmp_path / "m") if "tmp" in name]


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def broken_checkpoints(state):
    """Yield (what is wrong, bytes or a state dict to save, part of the message)."""
    yield "no checkpoint", b"hello", "not a checkpoint"
    yield "a list", [1, 2], "not a checkpoint"
    yield "a pickle that would run code", pickle.dumps(Hostile(), protocol=2), "not a checkpoint"
    yield "empty", b"", "not a checkpoint"
    yield "other labels", {**state, "fc.bias": torch.zeros(4)}, "has 4 labels, but"
    yield "other sizes", {**state, "bert.pooler.dense.bias": torch.zeros(5)}, "pooler.dense.bias"
    yield (
        "a layer missing",
        {k: v for k, v in state.items() if "layer.1" not in k},
        "weights of 1 layers, but config.json says num_hidden_layers = 2",
    )


def test_a_broken_checkpoint_is_one_sentence(tmp_path, monkeypatch, model, tokenizer):
    monkeypatch.chdir(tmp_path)
    path = "./m/multi_label_cls.pth"
    ours.save_model(model, tokenizer, LABELS, path)
    whole = open(path, "rb").read()
    known = torch.load(path, weights_only=True)._metadata
    for what, content, message in [
        *broken_checkpoints(model.state_dict()),
        ("cut", whole[:9000], "not a checkpoint"),
    ]:
        if isinstance(content, bytes):
            open(path, "wb").write(content)
        else:
            if isinstance(content, dict):
                content = type(model.state_dict())(content)
                content._metadata = known
            torch.save(content, path)
        with pytest.raises(InputError) as caught:
            ours.load_model(path, "")
        assert message in str(caught.value) and "\n" not in str(caught.value), what
    assert not os.path.exists("hacked")
    os.remove(path)
    with pytest.raises(InputError, match="run: python train.py"):
        ours.load_model(path, "")


def test_a_half_precision_encoder_is_used_in_float32(tmp_path, monkeypatch, tokenizer, encoder_folder):
    shutil.copytree(encoder_folder, tmp_path / "half")
    BertModel.from_pretrained(encoder_folder).half().save_pretrained(tmp_path / "half")
    monkeypatch.setattr(ours, "pretrained_model", str(tmp_path / "half"))
    model = ours.BertMultiLabelCls(None, 3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ours.save_model(model, tokenizer, LABELS, f"{tmp_path}/m/m.pth")
    torch.testing.assert_close(ours.load_model(f"{tmp_path}/m/m.pth", "")[0].state_dict(), model.state_dict())


@pytest.mark.parametrize("what", ["labels", "thresholds", "truncation"])
def test_labels_of_one_run_never_meet_the_weights_of_another(tmp_path, model, tokenizer, what):
    """A .pth of ours beside the config.json of another run is refused; alone it says what it needs."""
    ours.save_model(model, tokenizer, LABELS, str(tmp_path / "a"), {"single": 0.4}, (16, 0))
    others = {"labels": dict(zip("xyz", range(3))), "thresholds": {"single": 0.5}, "truncation": (18, 2)}
    given = {"labels": LABELS, "thresholds": {"single": 0.4}, "truncation": (16, 0)} | {what: others[what]}
    ours.save_model(
        model, tokenizer, given["labels"], str(tmp_path / "b"), given["thresholds"], given["truncation"]
    )
    shutil.copy(tmp_path / "a" / "multi_label_cls.pth", tmp_path / "b" / "multi_label_cls.pth")
    with pytest.raises(InputError, match="of another run than the config.json beside it"):
        ours.load_model(f"{tmp_path}/b/multi_label_cls.pth", "")
    os.remove(tmp_path / "b" / "config.json")
    with pytest.raises(InputError, match="config.json: No such file"):
        ours.load_model(f"{tmp_path}/b/multi_label_cls.pth", "")


@pytest.mark.parametrize(
    "broken, message",
    [
        ({"config.json": '{"model_type": "roberta"}'}, 'model_type is "roberta"'),
        ({"model.safetensors": "version https://git-lfs.github.com/spec/v1"}, "Git LFS"),
        ({"config.json": None}, "config.json: No such file"),
    ],
)
def test_a_broken_encoder_folder_is_one_sentence(tmp_path, monkeypatch, encoder_folder, broken, message):
    shutil.copytree(encoder_folder, tmp_path / "e")
    for name, content in broken.items():
        (tmp_path / "e" / name).write_text(content) if content else (tmp_path / "e" / name).unlink()
    monkeypatch.setattr(ours, "pretrained_model", str(tmp_path / "e"))
    with pytest.raises(InputError, match=message) as caught:
        ours.BertMultiLabelCls(None, 3)
    assert "\n" not in str(caught.value)


def test_model_gives_a_pipeline_our_probabilities(trained):
    """Within 1e-5 in float32, with the labels' names, for texts of all lengths, just after training."""
    texts = ["中超开赛", "", "股市大涨今日股市大涨", "今", "龘", "中超得分股市大涨", "up ups a"]
    label = pipeline("text-classification", model="./model", top_k=None, function_to_apply="sigmoid")
    found = [{row["label"]: row["score"] for row in rows} for rows in label(texts, batch_size=3)]
    assert [sorted(row["label"] for row in rows) for rows in label(texts)] == [sorted(row) for row in found]
    by_itself = pipeline("text-classification", model="./model", top_k=None)  # problem_type says sigmoid
    assert [
        {row["label"]: pytest.approx(row["score"], abs=1e-6) for row in rows} for rows in by_itself(texts)
    ] == found
    names = ["中超", "体育", "股市", "财经"]
    expected = [[row[name] for name in names] for row in found]
    np.testing.assert_allclose(expected, predict.predict_proba(texts), atol=1e-5, rtol=0)
    [cut] = label("中超" * 100, truncation=True)  # at the max_len of training, as predict does
    scores = {row["label"]: row["score"] for row in cut}
    expected = predict.predict_proba(["中超" * 100])[0]
    np.testing.assert_allclose([scores[name] for name in names], expected, atol=1e-5, rtol=0)


def test_model_is_read_by_the_auto_classes(trained):
    classifier = AutoModelForSequenceClassification.from_pretrained("./model").eval()
    encoded = AutoTokenizer.from_pretrained("./model")(["中超开赛"], return_tensors="pt")
    with torch.no_grad():
        probs = classifier(**encoded).logits.sigmoid()
    np.testing.assert_allclose(probs, predict.predict_proba(["中超开赛"]), atol=1e-5)


def test_model_says_what_it_is(trained):
    config = json.loads(Path("model/config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertForSequenceClassification"] and config["model_type"] == "bert"
    assert config["problem_type"] == "multi_label_classification" and config["dtype"] == "float32"
    assert config["id2label"] == {"0": "中超", "1": "体育", "2": "股市", "3": "财经"}
    assert config["label2id"] == {"中超": 0, "体育": 1, "股市": 2, "财经": 3}
    assert config["classifier_dropout"] == train.dropout and config["truncation"] == [16, 0]
    assert {"single", "by_label", "recommended"} < set(config["thresholds"])
    assert {"model.safetensors", "tokenizer.json", "tokenizer_config.json"} < set(os.listdir("model"))
    info = torch.load("model/multi_label_cls.pth", weights_only=True)._metadata[""]
    assert info["labels"] == ["中超", "体育", "股市", "财经"] and info["truncation"] == [16, 0]


@pytest.mark.parametrize("removed", ["multi_label_cls.pth", "model.safetensors"])
def test_either_form_of_the_weights_is_a_model_to_load_predict_and_train_from(trained, monkeypatch, removed):
    texts = ["中超开赛", "股市大涨"]
    probs, thresholds = predict.predict_proba(texts), ours.load_model("./model")[0].bert.config.thresholds
    os.remove(f"model/{removed}")
    monkeypatch.setattr(predict, "save_model_path", "./model")
    np.testing.assert_array_equal(predict.predict_proba(texts), probs)
    assert predict.predict(texts) == [["中超", "体育"], ["股市", "财经"]]
    before = ours.load_model("./model")[0]
    assert before.bert.config.thresholds == thresholds != {}
    if removed == "multi_label_cls.pth":
        monkeypatch.setattr(ours, "pretrained_model", "./model")
        monkeypatch.setattr(train, "lr", 0.0)
        train.train()
        for path in ("./model/multi_label_cls.pth", "./model"):
            after = ours.load_model(path)[0].bert.state_dict()
            torch.testing.assert_close(after, before.bert.state_dict(), atol=0, rtol=0)


def trained_elsewhere(folder, encoder_folder, **changes):
    """Write a classifier to `folder` as somebody's Trainer does; return it."""
    config = BertConfig.from_pretrained(
        encoder_folder, id2label=dict(enumerate(LABELS)), label2id=LABELS, **changes
    )
    classifier = BertForSequenceClassification.from_pretrained(encoder_folder, config=config)
    classifier.save_pretrained(folder)
    BertTokenizer.from_pretrained(encoder_folder).save_pretrained(folder)
    return classifier.eval()


@pytest.mark.parametrize(
    "problem_type, dtype", [("multi_label_classification", torch.float32), (None, torch.float16)]
)
def test_what_was_trained_elsewhere_predicts_here(tmp_path, encoder_folder, inputs, problem_type, dtype):
    classifier = trained_elsewhere(tmp_path, encoder_folder, problem_type=problem_type)
    classifier.to(dtype).save_pretrained(tmp_path)
    model, _, label2idx = ours.load_model(str(tmp_path))
    with torch.no_grad():
        expected = classifier.float()(inputs[0], inputs[1], inputs[2]).logits.sigmoid()
    torch.testing.assert_close(model(*inputs).detach(), expected, atol=1e-5, rtol=0)
    assert (
        label2idx == LABELS and model.fc.weight.dtype == torch.float32 and model.bert.config.thresholds == {}
    )


@pytest.mark.parametrize(
    "says", [dict(id2label={1: "a", 0: "b"}), dict(id2label={0: "b", 1: "a"}, label2id=None)]
)
def test_the_labels_of_a_folder_are_those_that_a_pipeline_gives(tmp_path, encoder_folder, says):
    trained_elsewhere(tmp_path, encoder_folder)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    BertForSequenceClassification(BertConfig.from_pretrained(encoder_folder, num_labels=2)).save_pretrained(
        tmp_path
    )
    dump_json({**config, **{"label2id": {"LABEL_0": 0, "LABEL_1": 1}}, **says}, str(tmp_path / "config.json"))
    assert ours.load_model(str(tmp_path))[2] == {"b": 0, "a": 1}


def test_the_tokenizer_of_a_trained_folder_is_taken_as_it_is(tmp_path, encoder_folder):
    trained_elsewhere(tmp_path, encoder_folder)
    BertTokenizer(vocab={token: n for n, token in enumerate(TOKENS)}, do_lower_case=False).save_pretrained(
        tmp_path
    )
    assert ours.load_model(str(tmp_path))[1].tokenize("A a") == ["[UNK]", "a"]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda folder, encoder: trained_elsewhere(
                folder, encoder, problem_type="single_label_classification"
            ),
            "its problem_type is 'single_label_classification'",
        ),
        (
            lambda folder, encoder: os.remove(folder / "model.safetensors"),
            "has no weights; copy model.safetensors",
        ),
        (
            lambda folder, encoder: shutil.copy(f"{encoder}/model.safetensors", folder),
            "has no classifier, called fc or classifier",
        ),
        (lambda folder, encoder: os.remove(folder / "config.json"), "config.json: No such file"),
        (
            lambda folder, encoder: os.truncate(folder / "model.safetensors", 900),
            "not a checkpoint of PyTorch",
        ),
    ],
)
def test_a_folder_that_holds_no_such_model_is_one_sentence(tmp_path, encoder_folder, change, message):
    trained_elsewhere(tmp_path, encoder_folder, problem_type="multi_label_classification")
    change(tmp_path, encoder_folder)
    with pytest.raises(InputError, match=message) as caught:
        ours.load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words, says, cased",
    [
        (["nba", "<S>"], False, False),
        (["nba"], None, False),
        (["NBA", "nba"], None, True),
        (["NBA"], True, True),
        (
            ["nba", "X", *(f"##{a}{b}" for a in "abcdefghijkl" for b in "abcdefghijkl")],
            False,
            False,
        ),  # one in 150 was added
        (["NBA", *"ABC", *map(chr, range(0x4E00, 0x5200))], None, True),
    ],
)  # few, but all letters are capitals
def test_the_vocabulary_decides_about_capitals(tmp_path, monkeypatch, encoder_folder, words, says, cased):
    BertConfig(vocab_size=len(TOKENS) + len(words)).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join([*TOKENS, *words]), encoding="utf-8")
    if says is not None:
        dump_json({"do_lower_case": says}, str(tmp_path / "tokenizer_config.json"))
    monkeypatch.setattr(ours, "pretrained_model", str(tmp_path))
    dataset = MultiClsDataSet(None, label2idx=LABELS, examples=[("NBA", ())])
    assert dataset.tokenizer.tokenize("NBA") == ["NBA" if cased else "nba"]


@pytest.fixture
def cache(tmp_path, monkeypatch, encoder_folder):
    """A hub cache that holds someone/tiny."""
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(encoder_folder, snapshot)
    refs = tmp_path / "hub" / "models--someone--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    real = ours.snapshot_download
    monkeypatch.setattr(ours, "snapshot_download", lambda *a, **k: real(*a, cache_dir=tmp_path / "hub", **k))
    monkeypatch.setattr(ours.HfApi, "model_info", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setattr(ours, "pretrained_model", "someone/tiny")
    return snapshot


def weights_of(folder):
    """Return an encoder's weights."""
    return BertModel.from_pretrained(folder).state_dict()


def test_an_encoder_in_the_cache_needs_no_network_call(cache):
    torch.testing.assert_close(ours.BertMultiLabelCls(16, 3).bert.state_dict(), weights_of(cache))
    assert MultiClsDataSet(None, label2idx=LABELS, examples=[("中", ())]).input_ids.tolist() == [[2, 5, 3]]


def test_a_folder_comes_before_the_cache(cache, tmp_path, monkeypatch, encoder_folder):
    monkeypatch.chdir(tmp_path)
    bert = BertModel.from_pretrained(encoder_folder)
    nn.init.ones_(bert.pooler.dense.bias)
    bert.save_pretrained("someone/tiny")
    assert ours.BertMultiLabelCls(16, 3).bert.pooler.dense.bias.tolist() == [1.0] * 16


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_cache_without_an_essential_file_is_not_enough(cache, monkeypatch, missing):
    (cache / missing).unlink()
    asked = []
    monkeypatch.setattr(ours.HfApi, "model_info", lambda self, name, **_: asked.append(name) or 1 / 0)
    with pytest.raises(InputError, match="someone/tiny was not found"):
        if missing == "tokenizer.json":
            MultiClsDataSet(None, label2idx=LABELS, examples=[("中", ())])
        else:
            ours.BertMultiLabelCls(16, 3)
    assert set(asked) == {"someone/tiny"}


def test_a_hub_that_never_answers_is_given_up_in_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        search = f"""
import time
import bert_multilabel_cls as b
from huggingface_hub import constants
constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE, constants.ENDPOINT = False, {str(tmp_path)!r}, {url!r}
b.pretrained_model, b.hub_timeout, start = "someone/none", 3, time.time()
try:
    b.BertMultiLabelCls(768, 3)
except b.InputError as error:
    print(error)
print(time.time() - start)
"""
        code, out, err = finish(start(search))
        server.settimeout(1)
        server.accept()[0].close()  # the hub was asked indeed
    message, seconds = out.splitlines()
    assert code == 0 and float(seconds) < 5, err
    assert "HF_ENDPOINT" in message and str(tmp_path) in message and url in message


class Info:
    """What the hub says of a repository: the names of its files."""

    def __init__(self, *names):
        self.siblings = [type("File", (), {"rfilename": name}) for name in names]


@pytest.fixture
def hub(monkeypatch, encoder_folder):
    """A hub that has the tiny encoder in two formats, and no cache. `hub` holds what was downloaded."""
    downloads = []

    def download(name, local_files_only=False, allow_patterns=None):
        if local_files_only:
            raise FileNotFoundError("not cached")
        downloads.append(allow_patterns)
        return encoder_folder

    monkeypatch.setattr(ours.HfApi, "model_info", lambda *_, **__: Info(*files))
    monkeypatch.setattr(ours, "snapshot_download", download)
    monkeypatch.setattr(ours, "pretrained_model", "someone/tiny")
    return downloads


files = "config.json model.safetensors pytorch_model.bin vocab.txt spiece.model tokenizer.json tf.h5".split()


def test_what_is_nowhere_else_is_downloaded_in_one_format(hub, monkeypatch, encoder_folder):
    assert ours.BertMultiLabelCls(16, 3).bert.config.hidden_size == 16
    names = [name for name in files if any(fnmatch(name, pattern) for pattern in hub[0])]
    assert names == ["config.json", "model.safetensors", "vocab.txt", "spiece.model", "tokenizer.json"]
    monkeypatch.setattr(ours.HfApi, "model_info", lambda *_, **__: Info("config.json", "pytorch_model.bin"))
    ours.BertMultiLabelCls(16, 3)
    assert hub[1][-1] == "pytorch_model*.bin*"


def test_a_download_that_breaks_off_is_an_error_and_no_reason_for_another_model(hub, monkeypatch):
    def broken(name, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(ours, "snapshot_download", broken)
    with pytest.raises(InputError, match="someone/tiny: the download failed .No space left"):
        ours.BertMultiLabelCls(16, 3)


@pytest.mark.parametrize("part", ["network", "tokenizer"])
def test_what_is_not_found_is_an_error_and_quick(offline, monkeypatch, part):
    monkeypatch.setattr(ours, "pretrained_model", "someone/none")
    start_time = time.time()
    with pytest.raises(InputError, match="someone/none was not found"):
        if part == "network":
            ours.BertMultiLabelCls(16, 3)
        else:
            MultiClsDataSet(None, label2idx=LABELS, examples=[("中", ())])
    assert time.time() - start_time < 10


def test_a_folder_without_tokenizer_is_an_error(tmp_path, monkeypatch, encoder_folder):
    BertModel.from_pretrained(encoder_folder).save_pretrained(tmp_path)
    monkeypatch.setattr(ours, "pretrained_model", str(tmp_path))
    with pytest.raises(InputError, match="no tokenizer files, or an empty vocabulary"):
        MultiClsDataSet(None, label2idx=LABELS, examples=[("中", ())])


@pytest.mark.parametrize(
    "precision, able, chosen",
    [
        ("fp32", {"avx512_bf16": True}, "float32"),
        ("bf16", {}, "bfloat16"),
        ("auto", {}, "float32"),
        ("auto", {"avx512_bf16": True}, "bfloat16"),
        ("auto", {"amx_bf16": True}, "bfloat16"),
        ("auto", {"avx512_f": True}, "float32"),
    ],
)
def test_a_named_precision_is_taken_and_auto_takes_bf16_only_where_it_is_native(
    trained, monkeypatch, capsys, precision, able, chosen
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    Path("in.txt").write_text("中\n", encoding="utf-8")
    for name, value in dict(precision=precision, input_path="in.txt", output_path="out.json").items():
        monkeypatch.setattr(predict, name, value)
    predict.main()
    assert f"device=cpu dtype={chosen} " in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp16", "half", None])
def test_a_precision_that_cannot_be_is_an_error(trained, monkeypatch, precision):
    monkeypatch.setattr(predict, "precision", precision)
    with pytest.raises(InputError, match="precision = "):
        predict.predict(["中"])


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-6), ("bf16", 0.02)])
def test_dev_keeps_the_order_of_the_batches(model, inputs, monkeypatch, precision, tolerance):
    labels = torch.eye(3)[:2]
    batches = [tuple(t[[1]] for t in (*inputs, labels)), tuple(t[[0]] for t in (*inputs, labels))]

    class Loader(list):
        batch_size = 1

    monkeypatch.setattr(train, "precision", precision)
    monkeypatch.setattr(train, "device", "cpu")
    loss, acc, found = train.dev(model.train(), Loader(batches), nn.BCELoss(), return_predictions=True)
    expected = model.eval()(*inputs)[[1, 0]].detach()
    probs = torch.zeros(2, 3)
    probs[found.texts, found.columns] = found.probs
    torch.testing.assert_close(probs, expected, atol=tolerance, rtol=0)
    assert loss == pytest.approx(nn.BCELoss()(expected, labels[[1, 0]]).item(), abs=tolerance)
    assert acc == train.get_acc_score(labels[[1, 0]], probs) and probs.dtype == torch.float32
