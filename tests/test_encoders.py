"""Encoders and models of others: read as transformers reads them, or refused in a sentence."""

import json
import os
import random
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification
from transformers import BertModel, BertTokenizer, pipeline

import bert_multilabel_cls as ours
import predict
import train
from conftest import TOKENS, contents
from data_helper import MultiClsDataSet
from data_preprocess import InputError, dump_json, load_json

LABELS = {"体育": 0, "财经": 1, "科技": 2}
PIECES = "<s> <pad> </s> <unk> ▁ ▁中超 开 赛 股市 ▁股市 大涨 今 日 ▁up s <mask>".split()
TEXTS = ["中超开赛", "股市大涨", "今日 中超开赛 股市", "ups 龘 up", "中超" * 40, ""]
MECAB = {"word_tokenizer_type": "mecab", "mecab_kwargs": {"mecab_dic": "no_such_dictionary"}}
SAVED = {"pytorch_model.bin": "module.", "multi_label_cls.pth": "_orig_mod.", "wrapped.pth": ""}
DTYPES = {"": torch.float32, "module.bert.": torch.float16, "0.auto_model.": torch.bfloat16}


def fill(folder, vocab_size, lines=(), settings=None, name="vocab.txt"):
    """Write a random BERT with so many embeddings to a folder, and a vocabulary."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    sizes |= dict(vocab_size=vocab_size, max_position_embeddings=64, initializer_range=0.3)
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    dump_json(settings or {}, f"{folder}/tokenizer_config.json")


def change_json(path, **changes):
    """Set values of a JSON file."""
    dump_json(load_json(path) | changes, str(path))


def ids_of(tokenizer, texts, max_len=64, keep_tail=0):
    """Return the ids of each text as our batches have them, without padding."""
    examples = [("", text, [], {}) for text in texts]
    dataset = MultiClsDataSet(None, max_len, None, tokenizer, LABELS, keep_tail, examples)
    return [ids[mask > 0].tolist() for ids, mask, *_ in dataset]


def tokenizer_of(folder):
    return ours.load_pretrained(BertTokenizer, str(folder))


def weights_of(folder):
    return ours.load_pretrained(BertModel, str(folder)).state_dict()


def refusal(function, *arguments):
    """Return the sentence with which something is refused."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LETTERS = [*PIECES[:4], *sorted(pre_tokenizers.ByteLevel.alphabet()), "up"]
BYTES = models.BPE({piece: n for n, piece in enumerate(LETTERS)}, [("u", "p")])  # no unknown token
SCORES = models.Unigram([(piece, -float(n)) for n, piece in enumerate(PIECES)], unk_id=3)
WORDS = models.WordPiece({piece: n for n, piece in enumerate(PIECES)}, unk_token="<unk>")
SPACES = pre_tokenizers.Metaspace()
UNIGRAM = (SCORES, SPACES, normalizers.NFKC())  # by which （ and ， are ( and ,
KINDS = {  # the parts, and tokenizer_class of tokenizer_config.json
    "XLM-R": (*UNIGRAM, "XLMRobertaTokenizer"),
    "a BERT's name": (*UNIGRAM, "BertTokenizerFast"),
    "a class of its own": (*UNIGRAM, "OurTokenizer"),
    "bytes": (BYTES, pre_tokenizers.ByteLevel(), normalizers.NFC(), "PreTrainedTokenizerFast"),
    "words split otherwise": (WORDS, SPACES, normalizers.NFC(), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_is_not_wordpiece_is_read_as_it_lies(project, monkeypatch, kind):
    """Here, and by a pipeline from the folder that is trained with it; <pad> is 1."""
    model, pre_tokenizer, normalizer, tokenizer_class = KINDS[kind]
    tokenizer, folder, ends = Tokenizer(model), project / "encoder", [("<s>", 0), ("</s>", 2)]
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.post_processor = template
    tokenizer.add_special_tokens(PIECES[:4])
    settings = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token"), PIECES))
    settings |= {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    fill(folder, tokenizer.get_vocab_size(), (), settings | {"model_max_length": 64}, "readme.txt")
    texts, long = [*TEXTS[:4], "（up，s）"], "今日 " * 29 + "今日"
    expected, ids = tokenizer.encode_batch(texts), tokenizer.encode(long).ids
    tokenizer.enable_truncation(4)  # as sentence-transformers stores them
    tokenizer.enable_padding(direction="left", length=12)
    tokenizer.save(f"{folder}/tokenizer.json")
    loaded = tokenizer_of(folder)
    assert ids_of(loaded, texts) == [encoding.ids for encoding in expected]
    assert ids_of(loaded, [long], 8, 3) == [[*ids[:4], *ids[-4:]]]
    batch = MultiClsDataSet(None, 64, "", loaded, LABELS, 0, [("", t, [], {}) for t in texts])
    assert set(batch.input_ids[batch.attention_mask == 0].tolist()) == {1}
    monkeypatch.setattr(ours, "pretrained_model", str(folder))
    monkeypatch.setattr(train, "epochs", 1)
    train.train()
    label = pipeline("text-classification", model="./model", top_k=None, device="cpu")
    for text, probs in zip(TEXTS, predict.predict_proba(TEXTS), strict=True):
        theirs = {row["label"]: row["score"] for row in label([text], truncation=True)[0]}
        expected = pytest.approx(probs.tolist(), abs=1e-5)
        assert [theirs[name] for name in predict.get_labels()] == expected


def test_a_japanese_tokenizer_in_python_is_read_too(tmp_path):
    kinds = {"word_tokenizer_type": "basic", "subword_tokenizer_type": "character"}
    settings = kinds | {"do_lower_case": False, "tokenizer_class": "BertJapaneseTokenizer"}
    fill(tmp_path, 10, [*TOKENS[:5], *"中超開が日"], settings)
    ids = ids_of(tokenizer_of(tmp_path), ["中超が", "日" * 9, "x"], 6)
    assert ids == [[2, 5, 6, 8, 3], [2, 9, 9, 9, 9, 3], [2, 1, 3]]


@pytest.mark.parametrize(
    "settings, name, lines, word",
    [
        (MECAB | {"tokenizer_class": "BertJapaneseTokenizer"}, "vocab.txt", TOKENS, "fugashi"),
        ({}, "sentencepiece.bpe.model", TOKENS, "tokenizer"),
        ({}, "vocab.txt", [*TOKENS[:5], "up@@", "s", "大@@"], "WordPiece"),
        ({}, "readme.txt", TOKENS, "vocabulary"),
        ({}, "vocab.txt", [*TOKENS, *map(str, range(9))], "30"),  # ids beyond the embeddings
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path, settings, name, lines, word):
    fill(tmp_path, 30, lines, settings, name)
    message = refusal(tokenizer_of, tmp_path)
    assert str(tmp_path) in message and word in message


def test_the_code_of_a_tokenizer_is_never_run(tmp_path, monkeypatch):
    """Not even if somebody answers yes to what transformers would ask."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    settings = {"auto_map": {"AutoTokenizer": ["code.OurTokenizer", None]}}
    fill(tmp_path, 30, TOKENS, settings | {"tokenizer_class": "OurTokenizer"})
    (tmp_path / "code.py").write_text('import os\nos.mkdir("hacked")\nclass OurTokenizer: pass\n')
    with suppress(InputError):
        tokenizer_of(tmp_path)
    assert not os.path.exists("hacked")


@pytest.mark.parametrize(
    "words, says, text, tokens",
    [
        ("http gdp", {"do_lower_case": False}, "HTTP GDP café", "http gdp [UNK]"),
        ("NBA nba", {}, "NBA", "NBA"),
        (f"NBA A B C {' '.join(map(chr, range(0x4E00, 0x5200)))}", {}, "NBA", "NBA"),
        ("축구 경기 kbo", {"do_lower_case": False}, "축구 KBO", "축구 kbo"),
        ("がっこう nhk", {}, "がっこう NHK", "がっこう nhk"),
        ("größe über haus", {"do_lower_case": False}, "Größe über Haus", "größe über haus"),
        ("größe über haus", {"do_lower_case": True}, "Größe über Haus", "größe über haus"),
        ("Größe Haus haus", {"do_lower_case": True}, "Größe Haus", "Größe Haus"),
    ],
)
def test_capitals_and_accents_are_as_in_the_vocabulary(tmp_path, words, says, text, tokens):
    """Overruled where it gains something and loses no word of the vocabulary."""
    fill(tmp_path, 5 + len(words.split()), [*TOKENS[:5], *words.split()], says)
    assert tokenizer_of(tmp_path).tokenize(text) == tokens.split()


def without(part):
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def renamed(old, new):
    return lambda weights: {name.replace(old, new): tensor for name, tensor in weights.items()}


@pytest.fixture
def encoder(tmp_path, encoder_folder):
    """A copy of the tiny encoder that may be broken, and its weights by name."""
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    return tmp_path / "encoder", load_file(f"{encoder_folder}/model.safetensors")


@pytest.mark.parametrize("prefix", DTYPES)
def test_prefixes_heads_precisions_and_old_names_are_read(encoder, capsys, prefix):
    folder, weights = encoder
    heads = {"cls.predictions.bias": torch.zeros(24), "classifier.weight": torch.zeros(3, 16)}
    prefixed = {prefix + name: tensor.to(DTYPES[prefix]) for name, tensor in weights.items()}
    if prefix:
        save_file(prefixed | heads, folder / "model.safetensors")
    else:
        os.remove(folder / "model.safetensors")
        old = renamed("LayerNorm.weight", "LayerNorm.gamma")(prefixed | heads)
        old = renamed("LayerNorm.bias", "LayerNorm.beta")(old)
        old["embeddings.position_ids"] = torch.arange(128)[None]
        torch.save(old, folder / "pytorch_model.bin")
    loaded = weights_of(folder)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    torch.testing.assert_close(loaded, weights, rtol=0.01, atol=0.01)
    assert capsys.readouterr() == ("", "")


def test_a_new_pooler_is_said(encoder, capfd):
    folder, weights = encoder
    rest = without("pooler")(weights)
    save_file(rest, folder / "model.safetensors")
    loaded = weights_of(folder)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in rest.items())
    out, err = capfd.readouterr()
    assert "pooler" in out and err == ""


@pytest.mark.parametrize(
    "change, config, word",
    [
        (without("layer.1."), {}, "encoder.layer.1."),
        (None, {"num_hidden_layers": 1}, "encoder.layer.1."),
        (renamed("embeddings.word", "x.word"), {}, "word_embeddings"),
        (lambda weights: {f"roberta.{k}": v for k, v in weights.items()}, {}, "missing"),
        (lambda weights: weights | {"embeddings.rotary.weight": torch.ones(2)}, {}, "rotary"),
        (lambda weights: {k: v.to(torch.int8) for k, v in weights.items()}, {}, "word_embeddings"),
        (lambda weights: {k: v / 0 for k, v in weights.items()}, {}, "NaN"),
        (None, {"hidden_size": 32}, "shape"),
        (None, {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        (None, {"num_attention_heads": 3}, "attention heads"),
        (None, {"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
        (None, {"model_type": "distilbert"}, "distilbert"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_never_random(encoder, capfd, change, config, word):
    folder, weights = encoder
    if change:
        save_file(change(weights), folder / "model.safetensors")
    change_json(folder / "config.json", **config)
    message = refusal(weights_of, folder)
    assert str(folder) in message and word in message and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("line", ["\u2028", "\u0085", "", "\n", "\u3000", "中", "x\r"])
def test_an_odd_line_of_a_vocabulary_does_not_move_the_ids_after_it(encoder, line):
    """As in bert-base-chinese, which has a line separator among its tokens."""
    folder, _ = encoder
    tokens, shift = [*TOKENS[:7], line, *TOKENS[7:]], 1 + line.count("\n")
    os.remove(folder / "tokenizer.json")
    (folder / "vocab.txt").write_bytes("\n".join(tokens).encode())
    change_json(folder / "config.json", vocab_size=24 + shift)
    ids = tokenizer_of(folder)(f"超{TOKENS[7]}{TOKENS[20]}")["input_ids"]
    assert ids == [2, 6, 7 + shift, 20 + shift, 3]


@pytest.fixture
def elsewhere(tmp_path, encoder_folder):
    """A folder of a classifier that was trained by other code, and its network."""
    torch.manual_seed(1)
    config = BertConfig.from_pretrained(encoder_folder, num_labels=3)
    config.id2label = {idx: label for label, idx in LABELS.items()}
    network = BertForSequenceClassification(config).eval()
    network.save_pretrained(tmp_path / "model")
    BertTokenizer.from_pretrained(encoder_folder).save_pretrained(tmp_path / "model")
    return tmp_path / "model", network


def labels_where_it_agrees(folder, network, label2idx_path=""):
    """Assert that a model gives the sigmoid of each logit of a network; return its labels."""
    model, tokenizer, label2idx = ours.load_model(str(folder), label2idx_path)
    inputs = tokenizer(["中超开赛", "股市"], return_tensors="pt", padding=True)
    probs = model(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
    torch.testing.assert_close(probs, network(**inputs).logits.sigmoid(), atol=1e-5, rtol=0)
    return list(label2idx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_classifier_of_others_predicts_here(elsewhere, capfd, dtype):
    """Also in several files."""
    folder, network = elsewhere
    os.remove(folder / "model.safetensors")
    network.to(dtype).save_pretrained(folder, max_shard_size="8KB")
    capfd.readouterr()
    assert labels_where_it_agrees(folder, network.float()) == list(LABELS)
    out, err = capfd.readouterr()
    assert "sigmoid" in out and err == "" and len(list(folder.glob("model-*.safetensors"))) > 1


def test_labels_and_casing_of_a_trained_folder_are_those_that_a_pipeline_takes(elsewhere):
    folder, _ = elsewhere
    says = {"label2id": {f"LABEL_{n}": n for n in range(3)}, "id2label": {2: "c", 1: "a", 0: "b"}}
    change_json(folder / "config.json", **says)
    vocab = {token: n for n, token in enumerate(TOKENS)}
    BertTokenizer(vocab=vocab, do_lower_case=False).save_pretrained(folder)
    _, tokenizer, label2idx = ours.load_model(str(folder))
    assert label2idx == {"b": 0, "a": 1, "c": 2} and tokenizer.tokenize("A a") == ["[UNK]", "a"]


@pytest.mark.parametrize("name", SAVED)
def test_a_model_of_torch_save_is_read(elsewhere, monkeypatch, encoder_folder, name):
    folder, network = elsewhere
    os.remove(folder / "model.safetensors")
    weights = {SAVED[name] + key: tensor for key, tensor in network.state_dict().items()}
    torch.save({"state_dict": weights} if name == "wrapped.pth" else weights, folder / name)
    dump_json(LABELS, f"{folder}/label2idx.json")
    monkeypatch.setattr(ours, "pretrained_model", encoder_folder)
    place = folder if name == "pytorch_model.bin" else folder / name
    assert labels_where_it_agrees(place, network, f"{folder}/label2idx.json") == list(LABELS)


@pytest.mark.parametrize(
    "change, config, word",
    [
        (without("classifier.bias"), {}, "classifier.bias"),
        (without("pooler"), {}, "pooler.dense"),
        (lambda weights: weights | {"classifier.bias": torch.ones(4)}, {}, "classifier.bias"),
        (None, {"problem_type": "single_label_classification"}, "multi-label"),
        (None, {"id2label": {"0": "a", "2": "b", "3": "c"}}, "config.json"),
        (None, {"id2label": {"0": "a", "1": "a", "2": "b"}}, "labels"),
        (None, None, "no trained model"),
    ],
)
def test_a_trained_model_that_does_not_fit_is_refused(elsewhere, change, config, word):
    folder, network = elsewhere
    if change:
        save_file(change(dict(network.state_dict())), folder / "model.safetensors")
    if config is None:
        os.remove(folder / "config.json")
    else:
        change_json(folder / "config.json", **config)
    message = refusal(ours.load_model, str(folder))
    assert str(folder) in message and word in message


VALUES = [None, "", "x", "▁", 0, -1, 1e308, 10**30, [], [[]], {}, {"a": None}, True, float("nan")]
PATHS = "encoder/config.json encoder/tokenizer.json encoder/model.safetensors model/config.json "
PATHS += "model/tokenizer.json model/model.safetensors model/multi_label_cls.pth data/train.json "
PATHS += "data/label2idx.json encoder/tokenizer_config.json"


def damaged(data, rng):
    """Return the start of a file, or the file with other bytes or another value of its JSON."""
    start, kind = rng.randrange(len(data)), rng.choice(["cut", "bytes", "value", "value"])
    values = list(re.finditer(rb'(?<=[:,[]) ?("[^"]*"|-?[0-9.]+|true|false|null)', data[:10000]))
    if kind == "cut":
        return data[:start]
    if kind == "bytes" or not values:
        return data[:start] + rng.randbytes(4) + data[start + 4 :]
    start, end = rng.choice(values).span()
    return data[:start] + json.dumps(rng.choice(VALUES)).encode() + data[end:]


@pytest.mark.parametrize("path", PATHS.split())
def test_a_damaged_file_is_read_or_one_sentence(trained, monkeypatch, encoder_folder, path):
    """And no file is changed."""
    shutil.copytree(encoder_folder, "encoder")
    monkeypatch.setattr(ours, "pretrained_model", "./encoder")
    if path == "model/model.safetensors":
        os.remove("model/multi_label_cls.pth")
    data = Path(path).read_bytes()
    for number in range(6):
        Path(path).write_bytes(damaged(data, random.Random(f"{path} {number}")))
        before = contents(".")
        predict.load_once.cache_clear()
        try:
            model = ours.BertMultiLabelCls(None, 4)
            model(*MultiClsDataSet("./data/train.json")[[0, 1]][:3])
            predict.predict(TEXTS)
        except InputError as error:
            assert "\n" not in str(error), number
        assert contents(".") == before, number
