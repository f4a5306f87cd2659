"""Check the training file and write the label index.

reads   ./data/train.json       one example a line: {"text": "...", "label": ["...", ...]}
writes  ./data/label2idx.json   {"label": column, ...}, labels sorted
prints  how many texts and labels there are, which max_len to choose, which labels are rare
run     python data_preprocess.py

This file needs the standard library only. The other scripts take from it the reader of JSONL, the
atomic write, the log line, and how a script ends on an error or a signal.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress

train_data_path = "./data/train.json"
label2idx_path = "./data/label2idx.json"
max_len_ratio = 0.9  # share of the texts that the suggested max_len covers, above 0 and at most 1
common_max_lens = (128, 512)  # tokens: the default of train.py, and the limit of BERT
min_label_count = 5  # labels with fewer training examples are listed as rare
num_special_tokens = 2  # [CLS] and [SEP]
log_columns = 100  # longer log lines are wrapped


def preprocess(train_data_path, label2idx_path, max_len_ratio=0.9):
    """Write the label index of a training file, and print statistics of the file.

    Labels are sorted, so that preprocessing again never swaps the labels of a trained model.
    Raises InputError naming file and line if an example is invalid, or if no example has a label.
    """
    text_lengths, labels_per_text, label_counts = [], [], Counter()
    for text, labels in read_examples(train_data_path):
        text_lengths.append(len(text))
        labels_per_text.append(len(set(labels)))
        label_counts.update(set(labels))
    if not label_counts:
        raise InputError(f"{train_data_path}: no example has a label")
    max_len = suggest_max_len(text_lengths, max_len_ratio)
    dump_json({label: idx for idx, label in enumerate(sorted(label_counts))}, label2idx_path)
    mean = f"{sum(labels_per_text) / len(labels_per_text):.2f}"
    counts = {"labels": len(label_counts), "labels_per_text": mean, "max_labels": max(labels_per_text)}
    log("texts", count=len(text_lengths), **counts, without_label=labels_per_text.count(0))
    tokens = [length + num_special_tokens for length in text_lengths]
    cuts = {f"truncated_at_{n}": sum(t > n for t in tokens) for n in (max_len, *common_max_lens)}
    log("length", max_len=max_len, covers=f"{100 * max_len_ratio:g}%", longest=max(tokens), **cuts)
    rare = {label: count for label, count in sorted(label_counts.items()) if count < min_label_count}
    names = json.dumps(rare, ensure_ascii=False)
    log("rare", labels=len(rare), fewer_than=f"{min_label_count}_examples", names=names)
    log("wrote", path=label2idx_path)


def suggest_max_len(text_lengths, max_len_ratio):
    """Return the smallest max_len, in tokens, that covers at least max_len_ratio of the texts.

    text_lengths: in characters. A Chinese character is one token; most other scripts need fewer tokens.
    """
    check_number("max_len_ratio", max_len_ratio, 1e-9, 1)
    covered = max(1, math.ceil(round(len(text_lengths) * max_len_ratio, 6)))  # 25 * 0.28 is 7.000000000000001
    return sorted(text_lengths)[covered - 1] + num_special_tokens


def read_examples(data_path, label2idx=None):
    """Yield (text, labels) for each example of a data file; labels is a list of str, possibly empty.

    Raises InputError naming file and line if an example is invalid, or has a label that is not in label2idx.
    """
    for location, example in read_jsonl(data_path):
        text, labels = check_text(location, example), check_labels(location, example)
        for label in labels if label2idx is not None else ():
            if label not in label2idx:
                remedy = "if training has it, run python data_preprocess.py; if not, remove it from this line"
                raise InputError(f"{location}: the label {label!r} is not in the label index; {remedy}")
        yield text, labels


def check_text(location, example):
    """Return example["text"]. Raises InputError unless it is a string that can be encoded as UTF-8."""
    text = example.get("text")
    if not isinstance(text, str):
        raise InputError(f'{location}: "text" must be a string, but is {preview(example, "text")}')
    check_surrogates(location, text)
    return text


def check_labels(location, example):
    """Return example["label"]. Raises InputError unless it is a list of non-blank strings."""
    labels = example.get("label")
    if not isinstance(labels, list):
        found = preview(example, "label") + "; write one as a list too" * isinstance(labels, str)
        raise InputError(f'{location}: "label" must be a list of strings, but is {found}')
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise InputError(f"{location}: labels must be non-blank strings, but one is {label!r:.40}")
        check_surrogates(location, label)
    return labels


def check_surrogates(location, string):
    """Raise InputError if a string has a lone surrogate: neither a file nor a tokenizer accepts it."""
    try:
        string.encode("utf-8")
    except UnicodeEncodeError:
        where = f"{location}: half a character"
        raise InputError(f"{where} (a lone \\ud8xx or \\udcxx escape) in {string!r:.60}") from None


def preview(example, key):
    """Return the start of example[key] for an error message, or "missing"."""
    return json.dumps(example[key])[:40] if key in example else "missing"


def read_jsonl(data_path):
    """Yield (location, object) for each line of a JSONL file; location is "file:line".

    Accepts a byte order mark, blank lines and Windows line ends.
    Raises InputError at the first line that is not a JSON object in UTF-8, and for a file without any.
    """
    location = None
    for location, line in read_lines(data_path):
        yield location, parse_json_line(location, line)
    if location is None:
        raise InputError(f'{data_path}: no examples; a line is {{"text": "...", "label": ["..."]}}')


def read_lines(data_path, keep_blank=False):
    """Yield (location, line) for each line of a file; line is bytes without a byte order mark."""
    with open_file(data_path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if keep_blank or line.strip():
                yield f"{data_path}:{number}", line


def parse_json_line(location, line):
    """Return the JSON object in a line of bytes. Raises InputError naming the location."""
    text = decode_utf8(location, line)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        parsed = error
    if line.lstrip().startswith(b"["):
        raise InputError(f"{location}: a JSON array; write one object a line instead, without [ ] around")
    if isinstance(parsed, Exception):
        reason = parsed
        if isinstance(parsed, json.JSONDecodeError):
            reason = f"{parsed.msg} at character {parsed.pos + 1}"
        raise InputError(f"{location}: not JSON ({reason}); each line holds one whole object")
    if not isinstance(parsed, dict):
        raise InputError(f'{location}: not an object; a line is {{"text": "...", "label": ["..."]}}')
    return parsed


def decode_utf8(location, line):
    """Return a line of bytes as a string. Raises InputError naming the location if it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        remedy = "probably GBK; to convert: iconv -f GBK -t UTF-8 OLD > NEW"
        raise InputError(f"{location}: not UTF-8, {remedy}") from None


def load_label2idx(label2idx_path):
    """Return the label index {label: column}.

    Raises InputError if the file is missing, or does not map its labels one to one onto 0 … C−1.
    """
    if not os.path.exists(label2idx_path):
        raise InputError(f"{label2idx_path}: there is no label index yet; run: python data_preprocess.py")
    label2idx = load_json_object(label2idx_path)
    columns = [idx if type(idx) is int else -1 for idx in label2idx.values()]
    if not columns or sorted(columns) != list(range(len(columns))):
        remedy = "one to one onto 0, 1, 2, …; run: python data_preprocess.py"
        raise InputError(f"{label2idx_path}: not a map from labels {remedy}")
    return label2idx


def label_names(label2idx):
    """Return the labels in column order."""
    return sorted(label2idx, key=label2idx.get)


def load_json(data_path):
    """Return the content of a JSON file. Raises InputError if it is missing or not JSON in UTF-8."""
    with open_file(data_path) as file:
        try:
            return json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{data_path}: not a JSON file in UTF-8 ({error})") from None


def load_json_object(data_path):
    """Return the dict in a JSON file. Raises InputError if it is missing or holds anything else."""
    loaded = load_json(data_path)
    if not isinstance(loaded, dict):
        raise InputError(f"{data_path}: not a JSON object")
    return loaded


def dump_json(project, out_path, indent=None):
    """Write `project` to out_path as JSON in UTF-8, atomically."""
    with atomic_write(out_path) as path, open(path, "w", encoding="utf-8") as file:
        json.dump(project, file, ensure_ascii=False, indent=indent)


def dump_jsonl(rows, out_path):
    """Write `rows` to out_path as JSON in UTF-8, one line each, atomically."""
    with atomic_write(out_path) as path, open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


@contextmanager
def atomic_write(out_path):
    """Give a temporary path to write to; at the end of the block it replaces out_path.

    A reader, or a process killed at any time, sees the old file or the new one.
    Raises InputError if the file cannot be written.
    """
    folder, temporary = os.path.dirname(out_path) or ".", f"{out_path}.tmp"
    try:
        os.makedirs(folder, exist_ok=True)
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, out_path)
    except OSError as error:
        raise InputError(write_error(out_path, error)) from None
    finally:
        with suppress(OSError):
            os.remove(temporary)


@contextmanager
def atomic_folder(folder):
    """Give an empty folder to write to; at the end of the block its files move to `folder`.

    Raises InputError, with the old files untouched, if they cannot be written.
    """
    unfinished, finished = (os.path.join(folder, name) for name in ("unfinished.tmp", "finished.tmp"))
    try:
        complete_save(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        os.makedirs(unfinished)
        yield unfinished
        for path in (os.path.join(unfinished, name) for name in os.listdir(unfinished)):
            shutil.copymode(os.path.join(unfinished, "config.json"), path)  # safetensors are written as 0600
            fsync_file(path)
        os.rename(unfinished, finished)
        complete_save(folder)
    except Exception as error:  # a full disk: an OSError, torch.save's RuntimeError, or one of safetensors
        raise InputError(write_error(folder, error)) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def complete_save(folder):
    """Move the files that atomic_folder finished into place, also those that a killed run left.

    config.json is removed first and comes last: in between, the folder does not load.
    """
    finished = os.path.join(folder, "finished.tmp")
    if os.path.exists(os.path.join(finished, "config.json")):
        with suppress(FileNotFoundError):
            os.remove(os.path.join(folder, "config.json"))
    if os.path.isdir(finished):
        for name in sorted(os.listdir(finished), key="config.json".__eq__):
            os.replace(os.path.join(finished, name), os.path.join(folder, name))
        os.rmdir(finished)


def fsync_file(path):
    """Flush a written file to the disk, so that a power cut cannot lose it."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_error(path, error):
    """Return the message for a path that cannot be written, with the free space."""
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    free = f"; {shutil.disk_usage(folder).free / 2**20:.0f} MiB are free" if os.path.isdir(folder) else ""
    return f"{path}: cannot be written ({getattr(error, 'strerror', None) or short_message(error)}){free}"


def sibling_path(path, name):
    """Return the path of the file `name` in the folder of `path`."""
    return os.path.join(os.path.dirname(path), name)


def open_file(data_path):
    """Open a file for reading bytes. Raises InputError if that fails."""
    try:
        return open(data_path, "rb")
    except OSError as error:
        raise InputError(f"{data_path}: {error.strerror}; paths start from {os.getcwd()}") from None


def file_sha256(path):
    """Return the SHA-256 of a file. Raises InputError if it is missing."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class InputError(ValueError):
    """An error the user can fix: in a file, a line of it, or a constant. The message is one sentence."""


def check_number(name, value, minimum, maximum=None, integer=False):
    """Raise InputError unless the constant `name` is a number, or an integer, from minimum to maximum."""
    is_number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    if not is_number or not minimum <= value <= (value if maximum is None else maximum):
        limits = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise InputError(f"{name} = {value!r}: must be {'an integer' if integer else 'a number'}, {limits}")


def short_message(error):
    """Return the first line of an exception's message without its full stop, or the exception's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def run_script(main):
    """Call main(). An InputError is printed as one line on stderr, with exit code 1 and no traceback.

    Ctrl-C exits with code 130 and SIGTERM with 143, without output.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # where a console or pipe cannot show Chinese
    for number in termination_signals():
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main()
    except Exception as error:
        if not is_main_process():
            time.sleep(10)  # only rank 0 reports a shared error; then torchrun ends the others
        if type(error).__name__ == "OutOfMemoryError":
            sys.exit("error: out of GPU memory; lower batch_size or max_len, or see nvidia-smi")
        if not isinstance(error, InputError):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def termination_signals():
    """Return the signals, besides Ctrl-C, that ask a process to end; none where the system has none."""
    return [getattr(signal, name) for name in ("SIGTERM", "SIGBREAK") if hasattr(signal, name)]


@contextmanager
def handle_signals():
    """Give a list to which SIGTERM and Ctrl-C only add their number; a second Ctrl-C interrupts at once."""
    signals, handlers = [], {}

    def handler(number, _):
        """Note the signal."""
        if number == signal.SIGINT and number in signals and get_world_size() == 1:  # torchrun sends it twice
            raise KeyboardInterrupt
        signals.append(number)

    if threading.current_thread() is threading.main_thread():  # Python allows no handlers elsewhere
        handlers = {n: signal.signal(n, handler) for n in (*termination_signals(), signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, old_handler in handlers.items():
            signal.signal(number, old_handler)


def get_world_size():
    """Return the number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process():
    """Return whether this is the process that prints and writes files: the only one, or rank 0."""
    return get_world_size() == 1 or int(os.environ["RANK"]) == 0


def log(event, message="", **fields):
    """Print `event message key=value …`, the one form of a log line; long lines are wrapped.

    Values carry their units. Each line starts with the event, so that grep finds it.
    """
    if is_main_process():
        text = " ".join([*filter(None, [message]), *(f"{key}={value}" for key, value in fields.items())])
        for line in textwrap.wrap(text, log_columns - 9, break_long_words=False, break_on_hyphens=False):
            print(f"{event:<8} {line}", flush=True)


def log_metrics(event, metrics, threshold):
    """Print the main metrics in one line."""
    shown = {name: f"{metrics[name]:.4f}" for name in ("accuracy", "micro_f1", "macro_f1", "hamming_loss")}
    log(event, threshold=threshold, **shown)


def log_label_metrics(by_label):
    """Print one line per label, the weakest first."""
    for name, row in sorted(by_label.items(), key=lambda item: item[1]["f1"]):
        scores = {key: f"{row[key]:.3f}" for key in ("precision", "recall", "f1")}
        log("label", name, **scores, support=row["support"])


def main():
    """Preprocess with the constants above."""
    preprocess(train_data_path, label2idx_path, max_len_ratio)


if __name__ == "__main__":
    run_script(main)
