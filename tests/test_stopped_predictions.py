"""Files whose labelling is killed, stopped or refused: the next run ends with the same output."""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import predict
from conftest import finish, start
from data_preprocess import InputError

if sys.platform == "win32":
    pytest.skip("kills, signals and limits as POSIX has them", allow_module_level=True)
OUTPUT, PART = Path("out/labels.json"), Path("out/labels.json.part")
SCORES = "(?m)^(?:scores|label) .*"
CONSTANTS = {"device": "cpu", "precision": "fp32", "chunk_size": 10, "batch_size": 1}
CONSTANTS |= {"threshold": 0.4, "input_path": "in.json", "output_path": str(OUTPUT)}
# A signal at the moment `number` of those at which a file or the network is about to be touched.
at_moment = """
import bert_multilabel_cls
moments = []
def counted(function):
    def call(*arguments, **options):
        moments.append(1)
        if len(moments) == {number}:
            os.kill(os.getpid(), {signal})
        return function(*arguments, **options)
    return call
os.fsync, os.replace, os.remove = map(counted, (os.fsync, os.replace, os.remove))
network = bert_multilabel_cls.BertMultiLabelCls
network.forward = counted(network.forward)
""".format
WAITING = """
import time
predict.get_model = lambda: print("begun", flush=True) or time.sleep(60)
"""


def label(more="", processes=1, **constants):
    """Start to label in.json."""
    lines = [f"predict.{name} = {value!r}" for name, value in (CONSTANTS | constants).items()]
    lines = ["import os, predict", *lines, more, "predict.run_script(predict.main)"]
    return start("\n".join(lines), processes)


@pytest.fixture(scope="module")
def whole_run(trained_model_folder, tmp_path_factory):
    """Label 115 texts without a stop; return the input, the output and what is printed."""
    chance, folder = random.Random(0), tmp_path_factory.mktemp("whole")
    texts = ["".join(chance.choices("中超股市今日开赛大涨", k=n % 13)) for n in range(115)]
    rows = [{"text": text, "id": n, "label": ["体育"][: n % 3]} for n, text in enumerate(texts)]
    shutil.copytree(trained_model_folder, folder / "model")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        Path("in.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        code, out, err = finish(label())
        assert code == 0 and {*os.listdir("out")} <= {"labels.json", "labels.json.lock"}, err
        return Path("in.json").read_bytes(), OUTPUT.read_bytes(), re.findall(SCORES, out)


@pytest.fixture
def reference(trained, whole_run):
    """Write the texts into a folder with the model; return the output and the scores."""
    Path("in.json").write_bytes(whole_run[0])
    return whole_run[1:]


def assert_ends_as(reference):
    code, out, err = finish(label())
    assert code == 0, out + err
    assert (OUTPUT.read_bytes(), re.findall(SCORES, out)) == reference and not PART.exists()
    return out


def test_a_file_killed_again_and_again_ends_as_if_it_had_not_been(reference):
    """Also where the last write is cut anywhere, or a power cut makes zeros of its end."""
    chance, done = random.Random(1), set()
    for _ in range(14):
        code, out, err = finish(label(at_moment(number=chance.randint(1, 50), signal=9)))
        if OUTPUT.exists():  # at the end, or killed in its last steps
            assert OUTPUT.read_bytes() == reference[0]
            OUTPUT.unlink()
        assert code in (0, -9), err
        if PART.exists():
            done.add(PART.read_bytes().count(b"\n"))
            kept = max(0, PART.stat().st_size - chance.randint(0, 300))
            PART.write_bytes(PART.read_bytes()[:kept] + bytes(chance.choice([0, 100])))
    assert_ends_as(reference)
    assert len(done) > 1


@pytest.mark.parametrize(
    "more, code, said",
    [
        (at_moment(number=50, signal=15), 143, ""),
        (at_moment(number=50, signal=2), 130, ""),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000,) * 2)",
            1,
            "error: .*\n",
        ),
    ],
)
def test_a_signal_or_a_full_disk_ends_it_and_the_next_run_goes_on(reference, more, code, said):
    exit_code, out, err = finish(label(more))
    assert exit_code == code and re.fullmatch(said, err) and not OUTPUT.exists()
    PART.write_bytes(b"".join(PART.read_bytes().splitlines(True)[:-4]))  # within a portion
    done = PART.read_bytes().count(b"}\n") // 10 * 10  # whole portions
    assert 0 < done < 115
    assert re.search(rf"(?m)^resume .*texts={done}$", assert_ends_as(reference))


@pytest.mark.parametrize(
    "more, constants, named",
    [
        ("", {"input_path": "in2.json"}, "input"),  # of the same size and time, as from an archive
        ("", {"max_labels": 1, "threshold": 0.6}, "max_labels.*threshold"),
        ("predict.data_preprocess.label_columns = ['tags']", {}, "label_columns"),
        ("os.utime('model/config.json')", {}, "model"),
    ],
)
def test_what_would_mix_two_outputs_is_refused_by_name(reference, more, constants, named):
    finish(label(at_moment(number=50, signal=9)))
    shutil.copy2("in.json", "in2.json")
    before = PART.read_bytes()
    code, out, err = finish(label(more, **constants))
    assert code == 1 and re.fullmatch(f"error: .*labels.json.part.*{named}.*\n", err)
    assert PART.read_bytes() == before  # nothing is lost by it


def test_the_second_prediction_into_one_output_is_refused_at_once(reference, monkeypatch):
    """In another process and in this one, until the first is killed."""
    first, end = label(WAITING), time.monotonic() + 60
    while "begun" not in first.read("out"):
        assert first.poll() is None and time.monotonic() < end, first.read("err")
        time.sleep(0.01)
    code, _, err = finish(label(output_path="out/../out/labels.json"), 60)
    assert code == 1 and re.fullmatch("error: another process .*\n", err)
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(predict, name, value)
    with pytest.raises(InputError, match="another process"):
        predict.predict_file()
    first.send_signal(signal.SIGKILL)
    assert finish(first)[0] == -signal.SIGKILL
    assert_ends_as(reference)


def test_the_batches_and_the_processes_may_change(reference):
    finish(label(at_moment(number=50, signal=9)))
    code, out, err = finish(label(processes=3, batch_size=3))
    assert code == 0 and "\nresume " in out, err
    rows, expected = (output.splitlines() for output in (OUTPUT.read_bytes(), reference[0]))
    assert [json.loads(row)["label"] for row in rows] == [
        json.loads(row)["label"] for row in expected
    ]


@pytest.mark.parametrize("content", ["of somebody\n", '{"a": 1}\n'])
def test_a_file_that_is_no_progress_is_refused_and_left(reference, content):
    PART.parent.mkdir()
    PART.write_text(content)
    code, _, err = finish(label())
    assert code == 1 and re.fullmatch("error: .*labels.json.part.*\n", err)
    assert PART.read_text() == content and not OUTPUT.exists()
