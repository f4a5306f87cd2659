"""Files whose labelling is killed, stopped or refused: the next run goes on, and the output is the same."""

import json
import os
import random
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import bert_multilabel_cls
from conftest import contents, finish, start

if sys.platform == "win32":
    pytest.skip("kills, signals and limits as POSIX has them", allow_module_level=True)
OUTPUT, UNFINISHED = Path("out/labels.json"), {"labels.json.tmp", "labels.json.progress"}
LABEL = """
import os, signal, time
import predict
predict.device, predict.precision = "cpu", "fp32"
predict.input_path, predict.output_path = "in.json", "out/labels.json"
predict.chunk_size, predict.batch_size, predict.threshold = 10, 1, 0.4
real = predict.dump_json
def saved(*arguments):
    time.sleep({delay})
    real(*arguments)
predict.dump_json = saved
{more}
predict.run_script(predict.main)
"""


def label(more="", delay=0):
    """Return the code that labels in.json, with a pause after each portion."""
    return LABEL.format(more=more, delay=delay)


@pytest.fixture
def reference(trained):
    """Write 120 texts with labels; return the output and the printed scores of a run that is not stopped."""
    chance = random.Random(0)
    texts = ["".join(chance.choices("中超股市今日开赛大涨", k=chance.randint(0, 12))) for _ in range(120)]
    rows = [{"text": text, "id": n, "label": ["体育"][: n % 3]} for n, text in enumerate(texts)]
    Path("in.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    code, out, err = finish(start(label()))
    assert code == 0, err
    assert os.listdir("out") == ["labels.json"]
    labelled = OUTPUT.read_bytes()
    OUTPUT.unlink()
    return labelled, scores(out)


def scores(out):
    return [line for line in out.splitlines() if line.startswith(("scores ", "label "))]


def assert_ends_as(reference, code=None, processes=1):
    exit_code, out, err = finish(start(code or label(), processes))
    assert exit_code == 0, out + err
    assert (OUTPUT.read_bytes(), scores(out)) == reference
    assert os.listdir("out") == ["labels.json"]
    return out


def wait_for_portions(child, number):
    """Wait until so many portions more are on disk, or the end."""
    seen = set()
    while len(seen) <= number and child.poll() is None:
        with suppress(FileNotFoundError):
            seen.add(os.stat("out/labels.json.progress").st_mtime_ns)
        time.sleep(0.002)


def stop_in_the_middle(number=signal.SIGKILL, processes=1):
    """Label with a signal after the first portions; return (exit code, stdout, stderr)."""
    child = start(label(delay=0.02), processes)
    wait_for_portions(child, 1)
    child.send_signal(number)
    return finish(child)


@pytest.mark.parametrize("processes, kills", [(1, 20), (2, 4)])
def test_a_file_killed_again_and_again_ends_as_if_it_had_not_been(reference, processes, kills):
    chance, done = random.Random(1), set()
    while kills:
        child, portions = start(label(delay=0.01), processes), chance.randrange(6)
        if portions:
            wait_for_portions(child, portions)
        time.sleep(chance.uniform(0, 0.02 if portions else 0.5))  # a portion, or the start
        child.send_signal(signal.SIGKILL)
        exit_code, out, err = finish(child)
        if exit_code == 0:
            assert (OUTPUT.read_bytes(), scores(out)) == reference
            OUTPUT.unlink()
            continue
        assert exit_code in (-signal.SIGKILL, 1), err  # 1: the other process was killed first
        if OUTPUT.exists():  # killed in its last steps
            assert OUTPUT.read_bytes() == reference[0]
            OUTPUT.unlink()
        if os.path.exists("out/labels.json.progress"):
            done.add(json.loads(Path("out/labels.json.progress").read_text())["texts"])
        kills -= 1
    assert_ends_as(reference, processes=processes)
    assert len(done) > 1


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_it_at_the_next_portion_and_says_how_to_go_on(reference, number, code, processes):
    exit_code, out, err = stop_in_the_middle(number, processes)
    assert (exit_code, err) == (code, "")
    done = re.fullmatch(r"stopped  run the same command again to resume; texts=(\d+)", out.splitlines()[-1])
    assert 0 < int(done[1]) < 120 and set(os.listdir("out")) == UNFINISHED
    out = assert_ends_as(reference, processes=processes)
    assert re.search(rf"^resume   from out/labels.json.tmp texts={done[1]}$", out, re.MULTILINE)


def another_model():
    model, *rest = bert_multilabel_cls.load_model("./model")
    model.bert.pooler.dense.bias.data += 1e-3
    bert_multilabel_cls.save_model(model, *rest, "./model")


def other_names():
    model, tokenizer, label2idx = bert_multilabel_cls.load_model("./model")
    renamed = {f"{label}类": idx for label, idx in label2idx.items()}
    bert_multilabel_cls.save_model(model, tokenizer, renamed, "./model")
    Path("in.json").write_text(Path("in.json").read_text().replace("\\u80b2", "\\u80b2\\u7c7b"))


def another_text():
    Path("in.json").write_text(Path("in.json").read_text().replace('"id": 119', '"id": 911'))


def nothing():
    pass


@pytest.mark.parametrize(
    "change, constants, named",
    [
        (another_model, "", "the model"),
        (another_text, "", "the content of in.json"),
        (nothing, "predict.threshold = 0.6", "threshold, the model"),
        (
            nothing,
            "predict.max_labels = 1; predict.all_probabilities = True",
            "max_labels, all_probabilities",
        ),
        (nothing, "predict.data_preprocess.label_separator = '/'", "label_separator"),
        (nothing, "predict.data_preprocess.label_columns = ['tags']", "label_columns"),
        (other_names, "", "the model, the content of in.json"),
    ],
)
def test_what_would_mix_two_outputs_is_refused_or_starts_over(reference, change, constants, named):
    stop_in_the_middle()
    before = Path("out/labels.json.progress").read_bytes()
    change()
    code, out, err = finish(start(label(constants)))
    assert code == 1 and err.count("\n") == 1 and f"cannot resume, changed: {named}; undo it" in err
    assert "delete " in err and "out/labels.json.progress or set resume = False in predict.py" in err
    assert Path("out/labels.json.progress").read_bytes() == before  # nothing is lost by it
    code, out, err = finish(start(label(f"{constants}\npredict.resume = False")))
    assert code == 0 and "resume " not in out, err
    assert os.listdir("out") == ["labels.json"] and OUTPUT.read_bytes().count(b"\n") == 120


def test_a_file_of_one_portion_is_ended_by_a_signal_at_once(reference):
    slow = "predict.chunk_size = 500\n"
    slow += "predict.iter_probs = lambda *arguments: [print('begun', flush=True), time.sleep(60)]"
    child = start(label(slow))
    while "begun" not in child.read("out"):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    assert finish(child, 20)[0] == 143
    assert os.listdir("out") == []


@pytest.mark.parametrize("processes", [1, 3])
def test_the_batches_and_the_processes_may_change(reference, processes):
    stop_in_the_middle()
    code, out, err = finish(start(label("predict.batch_size, predict.chunk_size = 3, 7"), processes))
    assert code == 0 and "\nresume " in out, err
    rows, expected = (
        list(map(json.loads, output.splitlines())) for output in (OUTPUT.read_bytes(), reference[0])
    )
    assert [row["id"] for row in rows] == list(range(120))
    assert [row["label"] for row in rows] == [row["label"] for row in expected]


@pytest.mark.parametrize("limit", [3000, 8000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(reference, limit):
    """By a limit on the size of a file, which the output exceeds."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    code, out, err = finish(start(label(limited)))
    assert code == 1 and re.match(r"error: out/labels.json.*cannot be written", err) and err.count("\n") == 1
    assert not OUTPUT.exists()
    assert "\nresume " in assert_ends_as(reference)


def change(name, value):
    """Return a function that changes a value of the progress."""
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:30]),
        lambda path: path.write_text("{}"),
        lambda path: path.write_text("[1]"),
        lambda path: path.write_text(json.dumps({"config": json.loads(path.read_text())["config"]})),
        lambda path: os.truncate("out/labels.json.tmp", 10),
        change("config", []),
        *(change(name, value) for name in ("texts", "bytes") for value in (0, -4, 4.0, "4", None, 10**20)),
        *(change("counts", value) for value in ([[1], [2]], [[1]] * 5, [[0.5] * 4] * 5, "five", 10**30)),
    ],
)
def test_progress_that_is_none_is_one_sentence(reference, damage):
    stop_in_the_middle()
    damage(Path("out/labels.json.progress"))
    before = contents("out")
    code, out, err = finish(start(label()))
    assert code == 1 and err.count("\n") == 1 and contents("out") == before
    assert "not the progress of " in err and "to start over, delete" in err


def test_progress_without_its_output_starts_over(reference):
    stop_in_the_middle()
    os.remove("out/labels.json.tmp")
    assert "resume " not in assert_ends_as(reference)
