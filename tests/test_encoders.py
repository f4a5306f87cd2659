"""Encoders and trained models of all kinds: read as transformers reads them, or refused in a sentence."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel
from transformers import BertTokenizer, pipeline

import bert_multilabel_cls as ours
import predict
import train
from conftest import TOKENS
from data_helper import MultiClsDataSet
from data_preprocess import InputError, dump_json

LABELS = {"体育": 0, "财经": 1, "科技": 2}
PIECES = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "▁",
    "▁中超",
    "开",
    "赛",
    "股市",
    "▁股市",
    "大涨",
    "今",
    "日",
    "▁up",
    "s",
    "<mask>",
]
TEXTS = ["中超开赛", "股市大涨", "今日 中超开赛 股市", "ups 龘 up", "", "中超" * 40]


def fill(folder, vocab_size, **config):
    """Write a random BERT with so many embeddings to a folder."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = BertConfig(
        vocab_size=vocab_size, max_position_embeddings=64, initializer_range=0.3, **sizes, **config
    )
    BertModel(config).save_pretrained(folder)
    return folder


def unigram():
    """Return a tokenizer as sentence-transformers' multilingual models have it: <s> first, [PAD] is 1."""
    tokenizer = Tokenizer(models.Unigram([(piece, -float(n)) for n, piece in enumerate(PIECES)], unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return with_special_tokens(tokenizer)


def with_special_tokens(tokenizer):
    """Return a tokenizer that puts <s> before and </s> after a text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    return tokenizer


def byte_level_bpe():
    """Return a tokenizer as RoBERTa has it; it has no unknown token."""
    vocab = {piece: n for n, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab | {"up": len(vocab)}, [("u", "p")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return with_special_tokens(tokenizer)


def metaspace_wordpiece():
    """Return a WordPiece model behind another normalizer and another way of splitting than BERT's."""
    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(PIECES)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Metaspace()
    return with_special_tokens(tokenizer)


NAMES = dict(cls_token="<s>", pad_token="<pad>", sep_token="</s>", unk_token="<unk>", model_max_length=64)
KINDS = {  # (tokenizer.json, tokenizer_config.json, config.json)
    "named in tokenizer_config": (unigram, {"tokenizer_class": "XLMRobertaTokenizer"}, {}),
    "named in config": (unigram, {}, {"tokenizer_class": "XLMRobertaTokenizerFast"}),
    "named by no one": (unigram, {}, {}),
    "named a BERT's": (unigram, {"tokenizer_class": "BertTokenizerFast"}, {}),
    "of the general class": (unigram, {"tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    "of a class of its own": (unigram, {"tokenizer_class": "OurTokenizer"}, {}),
    "bytes": (byte_level_bpe, {"tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    "bytes, named by no one": (byte_level_bpe, {}, {}),
    "words split otherwise": (metaspace_wordpiece, {}, {}),
}


@pytest.fixture(params=KINDS, ids=lambda name: name.replace(" ", "_"))
def other_tokenizer(request, tmp_path):
    """A folder of a BERT whose tokenizer is not BERT's, and the tokenizer."""
    build, settings, config = KINDS[request.param]
    tokenizer = build()
    fill(tmp_path / "encoder", tokenizer.get_vocab_size(), **config)
    tokenizer.save(f"{tmp_path}/encoder/tokenizer.json")
    dump_json(NAMES | settings, f"{tmp_path}/encoder/tokenizer_config.json")
    return tmp_path / "encoder", tokenizer


def rows(dataset):
    """Return the ids of each text of a dataset."""
    return [ids[mask > 0].tolist() for ids, mask, *_ in dataset]


def test_a_tokenizer_that_is_not_wordpiece_is_read_as_it_is(other_tokenizer):
    folder, tokenizer = other_tokenizer
    loaded = ours.load_pretrained(BertTokenizer, str(folder))
    dataset = MultiClsDataSet(None, 64, None, loaded, LABELS, examples=[(text, []) for text in TEXTS])
    expected = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)]
    assert rows(dataset)[:-1] == expected[:-1] and loaded.pad_token_id == 1
    assert set(dataset.input_ids[dataset.attention_mask == 0].tolist()) == {1}
    short = MultiClsDataSet(None, 8, None, loaded, LABELS, 3, [("今日 " * 29 + "今日", [])])
    ids = tokenizer.encode("今日 " * 29 + "今日").ids
    assert rows(short) == [[*ids[:4], *ids[-4:]]]


def test_it_is_the_same_in_training_in_what_is_saved_and_in_a_pipeline(other_tokenizer, project, monkeypatch):
    folder, tokenizer = other_tokenizer
    monkeypatch.setattr(ours, "pretrained_model", str(folder))
    train.train()
    label = pipeline("text-classification", model="./model", top_k=None, device="cpu")
    for text, probs in zip(TEXTS, predict.predict_proba(TEXTS), strict=True):
        theirs = {row["label"]: row["score"] for row in label([text], truncation=True)[0]}
        assert [theirs[name] for name in predict.get_labels()] == pytest.approx(probs.tolist(), abs=1e-5)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)]
    assert AutoTokenizer.from_pretrained("./model")(TEXTS[:-1]).input_ids == ids[:-1]


@pytest.fixture
def character_folder(tmp_path):
    """A Japanese BERT whose tokenizer is written in Python."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"中超開が日"]
    fill(tmp_path / "encoder", len(vocab), tokenizer_class="BertJapaneseTokenizer")
    (tmp_path / "encoder" / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    settings = {"word_tokenizer_type": "basic", "subword_tokenizer_type": "character", "do_lower_case": False}
    dump_json(settings, f"{tmp_path}/encoder/tokenizer_config.json")
    return tmp_path / "encoder"


def test_a_tokenizer_in_python_is_read_too(character_folder, project, monkeypatch):
    monkeypatch.setattr(ours, "pretrained_model", str(character_folder))
    dataset = MultiClsDataSet(None, 6, label2idx=LABELS, examples=[("中超が", []), ("日" * 9, []), ("x", [])])
    assert rows(dataset) == [[2, 5, 6, 8, 3], [2, 9, 9, 9, 9, 3], [2, 1, 3]] and dataset.num_truncated == 1
    train.train()
    assert predict.predict_proba(["中超"]).shape == (1, 4)
    assert AutoTokenizer.from_pretrained("./model")("中が").input_ids == [2, 5, 8, 3]


@pytest.mark.parametrize(
    "settings, files, message",
    [
        (
            {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"},
            ["vocab.txt"],
            "fugashi",
        ),
        ({"word_tokenizer_type": "mecab"}, ["vocab.txt"], "fugashi"),
        (
            {"tokenizer_class": "XLMRobertaTokenizer"},
            ["sentencepiece.bpe.model"],
            "pip install sentencepiece",
        ),
        ({}, ["spiece.model"], "pip install sentencepiece"),
        (
            {"tokenizer_class": "KoBertTokenizer"},
            ["vocab.txt"],
            "KoBertTokenizer, is not one of transformers",
        ),
        (
            {"tokenizer_class": "OurTokenizer", "auto_map": {"AutoTokenizer": ["code.OurTokenizer", None]}},
            ["vocab.txt", "code.py"],
            "OurTokenizer, is not one of transformers, and code of its own is not run",
        ),
        ({"tokenizer_class": "BertTokenizer"}, ["pieces"], "are not WordPiece; copy the tokenizer.json"),
        ({}, ["bpe"], "are not WordPiece"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch, settings, files, message):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    fill(tmp_path, 30)
    contents = {"pieces": [*TOKENS[:5], "▁中超", "▁up", "s"], "bpe": [*TOKENS[:5], "up@@", "s", "大@@"]}
    for name in files:
        text = 'import os\nos.mkdir("hacked")' if name == "code.py" else "\n".join(contents.get(name, TOKENS))
        (tmp_path / ("vocab.txt" if name in contents else name)).write_text(text, encoding="utf-8")
    dump_json(settings, f"{tmp_path}/tokenizer_config.json")
    with pytest.raises(InputError, match=message) as caught:
        ours.load_pretrained(BertTokenizer, str(tmp_path))
    assert "\n" not in str(caught.value) and not os.path.exists("hacked")


@pytest.mark.parametrize(
    "words, settings, text, tokens",
    [
        (["http", "gdp"], {"do_lower_case": False}, "HTTP GDP café", ["http", "gdp", "[UNK]"]),
        (["http", "cafe"], {"do_lower_case": False}, "HTTP Café", ["http", "cafe"]),
        (["축구", "경기", "kbo"], {"do_lower_case": False}, "축구 KBO", ["축구", "kbo"]),
        (["축구", "경기"], {"do_lower_case": False}, "축구", ["축구"]),
        (["축구", "경기"], {}, "축구", ["축구"]),
        (["が", "か", "nhk"], {"do_lower_case": False}, "が か NHK", ["が", "か", "nhk"]),
        (["がっこう", "nhk"], {"do_lower_case": False}, "がっこう NHK", ["がっこう", "nhk"]),
        (["हिन्दी", "bbc"], {"do_lower_case": False}, "हिन्दी BBC", ["हिन्दी", "bbc"]),
        (["größe", "über", "haus"], {"do_lower_case": False}, "Größe über Haus", ["größe", "über", "haus"]),
        (["größe", "über", "haus"], {"do_lower_case": True}, "Größe über Haus", ["größe", "über", "haus"]),
        (["große", "uber"], {"do_lower_case": True, "strip_accents": True}, "Über", ["uber"]),
        (["uber", "haus"], {"do_lower_case": True}, "Über Haus", ["uber", "haus"]),
        (["Größe", "Haus", "haus"], {"do_lower_case": True}, "Größe Haus", ["Größe", "Haus"]),
        (["большой"], {"do_lower_case": False}, "Большой", ["большой"]),
    ],
)
def test_capitals_and_accents_are_as_in_the_vocabulary(tmp_path, words, settings, text, tokens):
    """Overruled where it gains something and loses no word of the vocabulary."""
    fill(tmp_path, 5 + len(words))
    (tmp_path / "vocab.txt").write_text("\n".join([*TOKENS[:5], *words]), encoding="utf-8")
    dump_json(settings, f"{tmp_path}/tokenizer_config.json")
    assert ours.load_pretrained(BertTokenizer, str(tmp_path)).tokenize(text) == tokens


@pytest.fixture
def encoder(tmp_path, encoder_folder):
    """A copy of the tiny encoder that may be broken, and its weights by name."""
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    return tmp_path / "encoder", load_file(f"{encoder_folder}/model.safetensors")


def said(capfd):
    """Return the notes that were printed, and nothing else, as one line."""
    out, err = capfd.readouterr()
    assert not err and all(line.startswith("note ") for line in out.splitlines())
    return " ".join(line.removeprefix("note").strip() for line in out.splitlines())


def load(folder):
    """Return the weights of an encoder as we read them."""
    return ours.load_pretrained(BertModel, str(folder)).state_dict()


@pytest.mark.parametrize(
    "prefix", ["module.", "bert.", "module.bert.", "_orig_mod.", "model.bert.", "0.auto_model."]
)
def test_prefixes_of_training_are_removed(encoder, capsys, prefix):
    folder, weights = encoder
    heads = {"cls.predictions.bias": torch.zeros(24), "classifier.weight": torch.zeros(3, 16)}
    save_file(
        {**{prefix + name: tensor for name, tensor in weights.items()}, **heads}, folder / "model.safetensors"
    )
    torch.testing.assert_close(load(folder), weights)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("wrap", [None, "state_dict", "model_state_dict", "model"])
def test_weights_of_torch_save_are_read(encoder, wrap):
    folder, weights = encoder
    os.remove(folder / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in weights.items()}
    old["embeddings.position_ids"] = torch.arange(128)[None]
    torch.save({wrap: old, "epoch": 3} if wrap else old, folder / "pytorch_model.bin")
    torch.testing.assert_close(load(folder), weights)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_several_files_are_read(encoder, kind):
    folder, weights = encoder
    os.remove(folder / "model.safetensors")
    save = save_file if kind.endswith("safetensors") else torch.save
    weight_map = {}
    for part in range(3):
        some = dict(list(weights.items())[part::3])
        save(some, folder / f"part{part}{os.path.splitext(kind)[1]}")
        weight_map |= dict.fromkeys(some, f"part{part}{os.path.splitext(kind)[1]}")
    dump_json({"weight_map": weight_map}, f"{folder}/{kind}.index.json")
    torch.testing.assert_close(load(folder), weights)


def test_a_new_pooler_is_said_in_one_line(encoder, capfd):
    folder, weights = encoder
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, folder / "model.safetensors")
    loaded = load(folder)
    assert said(capfd) == f"{folder} has no pooler; a new one is trained"
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items() if "pooler" not in name)
    BertForMaskedLM(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    capfd.readouterr()
    load(folder)
    assert said(capfd) == f"{folder} has no pooler; a new one is trained"


def without(part):
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def renamed(old, new):
    return lambda weights: {name.replace(old, new): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "change, config, message",
    [
        (without("layer.1."), {}, "weights of 1 layers, but config.json says num_hidden_layers = 2"),
        (None, {"num_hidden_layers": 1}, "weights of 2 layers, but config.json says num_hidden_layers = 1"),
        (None, {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        (without("query.bias"), {}, "2 weights are missing: encoder.layer.0.attention.self.query.bias, enc"),
        (without("pooler.dense.bias"), {}, "1 weights are missing: pooler.dense.bias"),
        (without("embeddings.LayerNorm"), {}, "2 weights are missing: embeddings.LayerNorm.bias"),
        (without("word_embeddings"), {}, "it has no embeddings.word_embeddings.weight, but"),
        (renamed("embeddings.word", "x.word"), {}, "not the weights of a BERT"),
        (lambda w: {f"roberta.{k}": v for k, v in w.items()}, {}, "called roberta."),
        (lambda w: {f"a.b.{k}": v for k, v in w.items()}, {}, "its weights are called a.b.…"),
        (
            lambda w: {**w, "embeddings.rotary.weight": torch.zeros(2)},
            {},
            "are not those of a BERT: embeddings.rot",
        ),
        (lambda w: {k: v.to(torch.int8) for k, v in w.items()}, {}, "of another type or shape"),
        (None, {"hidden_size": 32}, "weights are of another type or shape than config.json says"),
        (
            None,
            {"vocab_size": 30},
            "1 weights are of another type or shape than config.json says: embeddings.word",
        ),
        (None, {"position_embedding_type": "relative_key"}, 'its position_embedding_type is "relative_key"'),
        (None, {"is_decoder": True}, "a decoder"),
        (None, {"num_attention_heads": 0}, "num_attention_heads = 0"),
        (None, {"num_attention_heads": 3}, "its config.json is not that of a BERT .*not a multiple"),
        (None, {"hidden_act": "sine"}, r"not that of a BERT \(there is no 'sine'\)"),
        (None, {"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob = nan"),
        (None, {"layer_norm_eps": "1e-12"}, "config.json: (not the config of a BERT .*)?layer_norm_eps"),
        (None, {"vocab_size": "many"}, "config.json: (not the config of a BERT .*)?vocab_size"),
        (None, {"quantization_config": {"load_in_8bit": True}}, "its weights are quantized"),
        (lambda w: {k: v / 0 for k, v in w.items()}, {}, "39 weights are infinite or NaN: embeddings.Lay"),
        (None, {"model_type": "distilbert"}, 'model_type is "distilbert"'),
    ],
)
def test_weights_that_do_not_fit_are_an_error_and_never_random(encoder, capfd, change, config, message):
    folder, weights = encoder
    if change:
        save_file(change(weights), folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_and_without_metadata_become_float32(encoder, dtype):
    folder, weights = encoder
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, folder / "model.safetensors")
    loaded = load(folder)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    torch.testing.assert_close(loaded, weights, rtol=0.01, atol=0.01)


def test_a_whole_model_instead_of_its_weights_is_refused_with_the_remedy(encoder):
    folder, _ = encoder
    torch.save(BertModel.from_pretrained(folder), folder / "pytorch_model.bin")
    os.remove(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"Python objects, which may run code; save model.state_dict\(\)"):
        load(folder)


def test_a_config_elsewhere_is_named(encoder):
    folder, _ = encoder
    os.rename(folder / "config.json", folder / "bert_config.json")
    with pytest.raises(InputError, match="encoder: rename its bert_config.json to config.json"):
        load(folder)
    os.rename(folder / "bert_config.json", folder / "config.json")
    (folder.parent / "whole").mkdir()
    os.rename(folder, folder.parent / "whole" / "0_Transformer")
    with pytest.raises(InputError, match="whole: has no config.json, but 0_Transformer/config.json; name"):
        load(folder.parent / "whole")


@pytest.mark.parametrize(
    "line",
    ["\u2028", "\u0085", "", "\n", " ", "\u3000", "中", "x\r"],
    ids="LS NEL - -- space wide twice CR".split(),
)
def test_an_odd_line_of_a_vocabulary_does_not_move_the_ids_after_it(encoder, line):
    """As in bert-base-chinese, which has a line separator among its tokens."""
    folder, weights = encoder
    tokens = [*TOKENS[:7], line, *TOKENS[7:]]
    os.remove(folder / "tokenizer.json")
    (folder / "vocab.txt").write_bytes("\n".join(tokens).encode())
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 24 + 1 + line.count("\n")}
    dump_json(config, f"{folder}/config.json")
    tokenizer = ours.load_pretrained(BertTokenizer, str(folder))
    shift = 1 + line.count("\n")
    assert tokenizer("超" + TOKENS[7] + TOKENS[20])["input_ids"] == [2, 6, 7 + shift, 20 + shift, 3]


@pytest.mark.parametrize("files", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("do_lower_case", [True, False])
def test_a_vocabulary_without_mask_is_read(encoder, project, monkeypatch, files, do_lower_case):
    """transformers adds [MASK] beyond the embeddings; [MASK] in a text is then text as any other."""
    folder, weights = encoder
    tokens = [token for token in TOKENS if token != "[MASK]"]
    os.remove(folder / "tokenizer.json")
    (folder / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    dump_json({"do_lower_case": do_lower_case}, f"{folder}/tokenizer_config.json")
    if files == "tokenizer.json":
        BertTokenizer.from_pretrained(folder, mask_token=None).backend_tokenizer.save(
            f"{folder}/tokenizer.json"
        )
        os.remove(folder / "vocab.txt")
    name = "embeddings.word_embeddings.weight"
    save_file({**weights, name: weights[name][1:].clone()}, folder / "model.safetensors")
    dump_json(json.loads((folder / "config.json").read_text()) | {"vocab_size": 23}, f"{folder}/config.json")
    monkeypatch.setattr(ours, "pretrained_model", str(folder))
    train.train()
    answers = predict.predict_proba(["中[MASK]超", "中超"])
    pipe = pipeline("text-classification", model="./model", top_k=None)
    for text, row in zip(["中[MASK]超", "中超"], answers, strict=True):
        scores = {score["label"]: score["score"] for score in pipe([text])[0]}
        assert [scores[label] for label in predict.get_labels()] == pytest.approx(row.tolist(), abs=1e-5)


def test_settings_that_a_tokenizer_json_keeps_for_others_change_nothing(encoder):
    """Truncation and padding, as sentence-transformers stores them, and the sides of both."""
    folder, _ = encoder
    expected = rows(dataset_of(folder))
    described = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    described["truncation"] = dict(direction="Left", max_length=4, strategy="LongestFirst", stride=0)
    described["padding"] = dict(strategy={"Fixed": 12}, direction="Left", pad_to_multiple_of=None)
    described["padding"] |= dict(pad_id=0, pad_type_id=0, pad_token="[PAD]")
    dump_json(described, f"{folder}/tokenizer.json")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    dump_json(
        settings | {"padding_side": "left", "truncation_side": "left"}, f"{folder}/tokenizer_config.json"
    )
    assert rows(dataset_of(folder)) == expected


def dataset_of(folder):
    tokenizer = ours.load_pretrained(BertTokenizer, str(folder))
    return MultiClsDataSet(None, 24, None, tokenizer, LABELS, 0, [(text, []) for text in TEXTS])


@pytest.mark.parametrize(
    "name, message",
    [
        ("tf_model.h5", "a TensorFlow checkpoint"),
        ("bert_model.ckpt.index", "a TensorFlow checkpoint"),
        ("flax_model.msgpack", "a Flax checkpoint"),
        ("model_state.pdparams", "a Paddle checkpoint"),
        ("README.md", "has no weights; copy model.safetensors"),
    ],
)
def test_weights_of_another_library_are_called_that(encoder, name, message):
    folder, _ = encoder
    os.rename(folder / "model.safetensors", folder / name)
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "vocab, message",
    [
        ([*TOKENS, "extra"], "'extra' has the id 24, but the encoder has 24 embeddings"),
        (["\ufeff[PAD]", *TOKENS[1:]], "vocab.txt starts with a byte order mark: '\\[PAD\\]' has the id 24"),
        (["<pad>", "<unk>", "<s>", "</s>", *TOKENS[4:]], "has the id 2\\d, but the encoder has 24"),
    ],
)
def test_ids_beyond_the_embeddings_are_an_error_when_loading(encoder, vocab, message):
    folder, _ = encoder
    os.remove(folder / "tokenizer.json")
    (folder / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        ours.load_pretrained(BertTokenizer, str(folder))
    assert "\n" not in str(caught.value)


def test_added_tokens_without_embeddings_are_an_error_when_training(encoder, project, monkeypatch):
    folder, _ = encoder
    tokenizer = BertTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<url>"])
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(ours, "pretrained_model", str(folder))
    with pytest.raises(InputError, match="tokens were added to it: '<url>' has the id 24"):
        train.train()


@pytest.fixture
def elsewhere(tmp_path, encoder_folder):
    """A folder of a classifier that was trained by other code, its network and its weights."""
    torch.manual_seed(1)
    config = BertConfig.from_pretrained(encoder_folder, num_labels=3)
    config.id2label = {idx: label for label, idx in LABELS.items()}
    network = BertForSequenceClassification(config).eval()
    network.save_pretrained(tmp_path / "model")
    BertTokenizer.from_pretrained(encoder_folder).save_pretrained(tmp_path / "model")
    return tmp_path / "model", network, dict(network.state_dict())


def agree(folder, network, label2idx_path=""):
    """Assert that a model gives the sigmoid of each logit of a network."""
    model, tokenizer, label2idx = ours.load_model(str(folder), label2idx_path)
    inputs = tokenizer(["中超开赛", "股市"], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = network(**inputs).logits.sigmoid()
        probs = model(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
    torch.testing.assert_close(probs, expected)
    return list(label2idx)


def test_without_problem_type_it_is_said_once_that_each_probability_is_a_sigmoid(elsewhere, capfd):
    folder, network, _ = elsewhere
    assert agree(folder, network) == list(LABELS)
    assert said(capfd).count("no problem_type; of the probabilities each is a sigmoid") == 1
    config = json.loads((folder / "config.json").read_text()) | {"problem_type": "multi_label_classification"}
    dump_json(config, f"{folder}/config.json")
    agree(folder, network)
    assert capfd.readouterr() == ("", "")


def test_keys_that_are_not_needed_are_passed_over_by_name(elsewhere, capfd):
    folder, network, weights = elsewhere
    extra = {"loss_fct.pos_weight": torch.ones(3), "bert_teacher.scale": torch.ones(1)}
    save_file({**weights, **extra}, folder / "model.safetensors")
    agree(folder, network)
    assert "passed over: bert_teacher.scale, loss_fct.pos_weight" in said(capfd)


def test_without_id2label_it_is_said_what_the_labels_are_called(elsewhere, capfd):
    folder, network, _ = elsewhere
    config = json.loads((folder / "config.json").read_text())
    dump_json({k: v for k, v in config.items() if k not in ("id2label", "label2id")}, f"{folder}/config.json")
    assert agree(folder, network) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert "no id2label; the labels are called LABEL_0" in capfd.readouterr().out


@pytest.mark.parametrize(
    "prefix, wrap", [("", None), ("module.", None), ("module.", "state_dict"), ("", "model")]
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "multi_label_cls.pth"])
def test_a_model_of_torch_save_is_read(elsewhere, monkeypatch, encoder_folder, prefix, wrap, name):
    folder, network, weights = elsewhere
    os.remove(folder / "model.safetensors")
    weights = {prefix + key: tensor for key, tensor in weights.items()}
    torch.save({wrap: weights, "epoch": 2} if wrap else weights, folder / name)
    dump_json(LABELS, f"{folder}/label2idx.json")
    monkeypatch.setattr(ours, "pretrained_model", encoder_folder)
    assert agree(folder, network, f"{folder}/label2idx.json") == list(LABELS)


def test_a_model_in_several_files_is_read(elsewhere):
    folder, network, _ = elsewhere
    os.remove(folder / "model.safetensors")
    network.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert agree(folder, network) == list(LABELS)


@pytest.mark.parametrize(
    "change, message",
    [
        (without("classifier"), "has no classifier, called fc or classifier"),
        (without("classifier.bias"), "has no classifier"),
        (renamed("classifier", "output"), "has no classifier, called fc or classifier, but output."),
        (without("pooler.dense.bias"), "1 weights are missing: pooler.dense.bias"),
        (without("pooler"), "2 weights are missing: pooler.dense.bias, pooler.dense.weight"),
        (
            lambda w: {**w, "classifier.weight": torch.zeros(3, 8)},
            "the classifier's weight is \\(3, 8\\), not",
        ),
        (lambda w: {**w, "classifier.bias": torch.zeros(4)}, "has 4 labels, but .* lists 3"),
    ],
)
def test_a_trained_model_that_does_not_fit_is_an_error_that_names_the_key(elsewhere, change, message):
    folder, _, weights = elsewhere
    save_file(change(weights), folder / "model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        ours.load_model(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"problem_type": "single_label_classification"}, "not multi-label"),
        ({"id2label": {"0": "a", "2": "b", "3": "c"}}, "does not number the labels"),
        ({"id2label": {"0": "a", "1": "a", "2": "b"}}, "has 3 labels, but .* lists 2"),
        ({"thresholds": [0.5]}, "not those of a run"),
        ({"truncation": "all"}, "not those of a run"),
        ({"id2label": {"0": "a", "1": "b", "2": {}}}, "does not number the labels"),
        ({"num_attention_heads": 3}, "is not that of a BERT"),
    ],
)
def test_a_config_of_a_trained_model_that_does_not_fit_is_an_error(elsewhere, config, message):
    folder, _, _ = elsewhere
    dump_json(json.loads((folder / "config.json").read_text()) | config, f"{folder}/config.json")
    with pytest.raises(InputError, match=message):
        ours.load_model(str(folder))
