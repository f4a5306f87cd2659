"""Read and check the data files; write the label index.

reads   ./data/train.json       one object a line: {"text": "...", "label": ["...", ...]}
writes  ./data/label2idx.json   {"label": column, ...}, labels sorted
prints  how many texts and labels there are, which max_len to choose and how many texts it cuts, which labels are rare
run     python data_preprocess.py

Everything here is standard library, and what the other scripts share: the one reader of JSONL, the one
way to write a file whole, the one form of a log line, of a check and of an end by error or signal.
"""
import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress

train_data_path = "./data/train.json"
label2idx_path = "./data/label2idx.json"
max_len_ratio = 0.9  # the share of texts that the printed max_len covers, above 0 and at most 1
usual_max_lens = (128, 512)  # tokens: train.py's max_len, and the most that BERT takes; how many texts they cut is said
rare_below = 5  # labels with fewer training examples than this are named: too few to learn from
scratch_pieces = 4000  # a vocabulary from texts has at most so many pieces of 2 to 4 characters, and other words
scratch_min_count = 4  # and each stands at least so often in them
special_tokens = 2  # the tokenizer puts [CLS] before a text and [SEP] behind it
chinese = "[\u3400-\u9fff]"  # a Chinese character, as a regular expression


class InputError(ValueError):
    """What a user can mend: a file, a line in it, or a constant. The message is one sentence."""


def run_script(main):
    """Call `main()`. An InputError becomes one line on stderr and exit code 1, without a traceback.

    Ctrl-C ends with exit code 130, SIGTERM with 143, both in silence.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # where a console or pipe cannot show Chinese
    for number in stop_signals():
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main()
    except Exception as error:
        if not is_main():
            time.sleep(3)  # what all processes find, the main one says; then torchrun ends the others
        if type(error).__name__ == "OutOfMemoryError":
            sys.exit("error: out of GPU memory before the first batch; another program may hold it, see nvidia-smi")
        if not isinstance(error, InputError):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def stop_signals():
    """Return the signals, besides Ctrl-C, that ask a program to end: none where the system has none."""
    return [getattr(signal, name) for name in ("SIGTERM", "SIGBREAK") if hasattr(signal, name)]


@contextmanager
def noted_signals(noted):
    """Within the block SIGTERM and Ctrl-C only add their number to the list `noted`: a step is always finished.

    A second Ctrl-C is obeyed; not under torchrun, which passes the first one on once more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # where Python allows no handlers
        return

    def note(number, _):
        """Take notice of a signal."""
        if number == signal.SIGINT and number in noted and count_processes() == 1:
            raise KeyboardInterrupt
        noted.append(number)
    handlers = {number: signal.signal(number, note) for number in (*stop_signals(), signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def count_processes():
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    """Return whether this process is the one that prints and writes: the only one, or torchrun's first."""
    return count_processes() == 1 or int(os.environ["RANK"]) == 0


def reuse_memory():
    """Have Linux's allocator keep large blocks, which the system else takes back and fills with zeros, step by step.

    That was a tenth of a training step of BERT-base on a CPU. Other systems go without.
    """
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        if libc.mallopt(-3, 2 ** 30) or libc.mallopt(-3, 2 ** 25):  # M_MMAP_THRESHOLD, in bytes; 32 MiB at most once
            libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def log(event, words="", **fields):
    """Print `event words key=value key=value`: the one form of all our log lines. Units go into the value."""
    if is_main():
        print(f"{event:<8}", *filter(None, [words]), *(f"{key}={value}" for key, value in fields.items()), flush=True)


def log_epoch(row, total_epochs, examples):
    """Print the line of an epoch."""
    scores = {name: f"{row[name]:.4f}" for name in ("train_loss", "dev_loss", "accuracy", "micro_f1", "macro_f1")}
    log("epoch", epoch=f"{row['epoch']}/{total_epochs}", **scores, time=f"{row['seconds']:.1f}s",
        speed=f"{examples / row['seconds']:.1f}examples/s", saved="yes" if row["saved"] else "no")


def log_scores(event, scores):
    """Print what all_scores returned, and the loss: a line for each kind of threshold."""
    for kind in ("at_0.5", "at_single", "at_by_label"):
        if kind in scores:
            log(event, threshold=kind.removeprefix("at_"), loss=f"{scores['loss']:.4f}",
                **{name: f"{value:.4f}" for name, value in scores[kind].items()})


def log_labels(table):
    """Print a line for each label, the weakest first."""
    for name, row in sorted(table.items(), key=lambda item: item[1]["f1"]):
        log("label", name, precision=f"{row['precision']:.4f}", recall=f"{row['recall']:.4f}", f1=f"{row['f1']:.4f}",
            support=row["support"])


@contextmanager
def whole_file(out_path):
    """Give a temporary path beside `out_path`; when the block ends well, it takes the place of `out_path`.

    A reader, or a run killed at any moment, meets the old file or the new one, never half of one.
    Raises InputError if it cannot be written.
    """
    folder, temporary = os.path.dirname(out_path) or ".", f"{out_path}.tmp"
    try:
        os.makedirs(folder, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, out_path)
    except OSError as error:
        why = error.strerror or first_line(error)
        free = f"; {shutil.disk_usage(folder).free / 2 ** 20:.0f} MiB are free there" if os.path.isdir(folder) else ""
        raise InputError(f"{out_path}: cannot be written ({why}){free}") from None
    finally:
        with suppress(OSError):
            os.remove(temporary)


def beside(path, name):
    """Return the path of the file `name` in the folder of `path`."""
    return os.path.join(os.path.dirname(path), name)


def dump_json(project, out_path, indent=None):
    """Write `project` to `out_path` as UTF-8 JSON, whole or not at all; `indent` spreads it over lines."""
    with whole_file(out_path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(project, file, ensure_ascii=False, indent=indent)


def dump_jsonl(rows, out_path):
    """Write `rows` to `out_path` as UTF-8 JSON, a line each, whole or not at all."""
    with whole_file(out_path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def load_json(data_path):
    """Return what the JSON file at `data_path` holds. Raises InputError if it is missing or not JSON."""
    with open_input(data_path) as file:
        try:
            return json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{data_path}: not a JSON file in UTF-8 ({error})") from None


def load_object(data_path):
    """Return the dict that the JSON file at `data_path` holds. Raises InputError if it is missing or holds none."""
    loaded = load_json(data_path)
    if not isinstance(loaded, dict):
        raise InputError(f"{data_path}: not a JSON object")
    return loaded


def check_number(name, value, least, most=None, whole=False):
    """Raise InputError unless the constant `name` is a number, or a whole number, from `least` to `most`."""
    kinds = int if whole else (int, float)
    right_kind = isinstance(value, kinds) and not isinstance(value, bool)
    if not right_kind or not least <= value <= (value if most is None else most):
        limit = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} = {value!r}: must be a {'whole ' * whole}number, {limit}")


def refuse_changes(path, old, new):
    """Raise InputError if two dicts of strings differ, naming what does: the run saved in `path` is another one."""
    changed = [f"{name} was {old.get(name)}, is {new.get(name)}" for name in {**old, **new}
               if old.get(name) != new.get(name)]
    if changed:
        raise InputError(f"{path}: the stopped run can't go on, because this has changed since: {'; '.join(changed)}; "
                         "change it back, or set resume = False in train.py to start over")


def open_input(data_path):
    """Open a file of the user's for reading bytes. Raises InputError if that cannot be done."""
    try:
        return open(data_path, "rb")
    except OSError as error:
        raise InputError(f"{data_path}: {error.strerror}; paths start from {os.getcwd()}") from None


def file_hash(path):
    """Return the SHA-256 of a file's content. Raises InputError if it is missing."""
    with open_input(path) as file:
        digest = hashlib.sha256()
        while block := file.read(2 ** 20):
            digest.update(block)
        return digest.hexdigest()


def load_label2idx(path):
    """Return the label index at `path`: {label: column}, a one-to-one map onto 0 … C−1.

    Raises InputError if it is missing or is not such a map.
    """
    if not os.path.exists(path):
        raise InputError(f"{path}: there is no label index yet; run: python data_preprocess.py")
    label2idx = load_json(path)
    columns = list(label2idx.values()) if isinstance(label2idx, dict) else [None]
    if not columns or any(type(c) is not int for c in columns) or sorted(columns) != list(range(len(columns))):
        raise InputError(f"{path}: not a map from labels one to one onto 0, 1, 2, …; run: python data_preprocess.py")
    return label2idx


def label_names(label2idx):
    """Return the labels of an index in the order of their columns."""
    return sorted(label2idx, key=label2idx.get)


def read_lines(data_path, blank=False):
    """Yield (place, line) for each line of a file: "file:line" for messages, and bytes without a byte order mark.

    Blank lines are left out, unless `blank`.
    """
    with open_input(data_path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if blank or line.strip():
                yield f"{data_path}:{number}", line


def read_jsonl(data_path):
    """Yield (place, object) for each line of a JSONL file; place is "file:line" for messages.

    A byte order mark, blank lines and Windows line ends are accepted.
    Raises InputError at the first line that is not a JSON object in UTF-8, or if no line holds one.
    """
    place = None
    for place, line in read_lines(data_path):
        yield place, parse_line(place, line)
    if place is None:
        raise InputError(f'{data_path}: no examples; each line holds one: {{"text": "...", "label": ["..."]}}')


def decode(place, line):
    """Return the bytes of a line as a string. Raises InputError, naming `place`, if they are not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{place}: not UTF-8, probably GBK; to convert: iconv -f GBK -t UTF-8 OLD > NEW") from None


def parse_line(place, line):
    """Return the object that the bytes of one line hold. Raises InputError naming `place`."""
    text = decode(place, line)
    try:
        item = json.loads(text)
    except (ValueError, RecursionError) as error:
        item = error
    if line.lstrip().startswith(b"["):
        raise InputError(f"{place}: a JSON array; write one object a line instead, without [ ] around")
    if isinstance(item, Exception):
        fault = f"{item.msg} at character {item.pos + 1}" if isinstance(item, json.JSONDecodeError) else item
        raise InputError(f"{place}: not JSON ({fault}); each line holds one whole object")
    if not isinstance(item, dict):
        raise InputError(f'{place}: not an object; each line looks like {{"text": "...", "label": ["..."]}}')
    return item


def read_examples(data_path, label2idx=None):
    """Yield (text, labels) for each example of a data file; labels is a list of str, perhaps empty.

    With `label2idx`, a label that it lacks is an error. Raises InputError naming file and line.
    """
    for place, item in read_jsonl(data_path):
        text, labels = check_text(place, item), check_labels(place, item)
        unknown = [label for label in labels if label2idx is not None and label not in label2idx]
        if unknown:
            raise InputError(f"{place}: the label {unknown[0]!r} is not in the label index; if the training file "
                             "has it, run: python data_preprocess.py; if not, take it out of this line")
        yield text, labels


def check_text(place, item):
    """Return item["text"]. Raises InputError unless it is a string that can be written as UTF-8."""
    text = item.get("text")
    if not isinstance(text, str):
        raise InputError(f'{place}: "text" must be a string, but is {shown(item, "text")}')
    check_whole(place, text)
    return text


def check_labels(place, item):
    """Return item["label"]. Raises InputError unless it is a list of strings that are not blank."""
    labels = item.get("label")
    if not isinstance(labels, list):
        hint = "; write it as a list, even if it is one" if isinstance(labels, str) else ""
        raise InputError(f'{place}: "label" must be a list of strings, but is {shown(item, "label")}{hint}')
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise InputError(f"{place}: each label must be a string that is not blank, but one is {label!r:.40}")
        check_whole(place, label)
    return labels


def check_whole(place, string):
    """Raise InputError if a string holds half of a surrogate pair: no file and no tokenizer takes that."""
    try:
        string.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{place}: half a character (a lone \\ud8xx or \\udcxx escape) in {string!r:.60}") from None


def shown(item, key):
    """Return how item[key] reads in a message: its start, or "missing"."""
    return f"{json.dumps(item[key])[:40]}" if key in item else "missing"


def encoder_files(names):
    """Return those of a hub folder's files that make the encoder: one form of the weights, not all of them."""
    weights = "*.safetensors*" if any(name.endswith(".safetensors") for name in names) else "pytorch_model*.bin*"
    return ["config.json", "vocab.txt", "*token*.json", weights]


def is_encoder(names):
    """Return whether a folder with files of these names holds config, vocabulary and weights."""
    vocabulary = {"vocab.txt", "tokenizer.json"} & set(names)
    return "config.json" in names and bool(vocabulary) and any(n.endswith((".safetensors", ".bin")) for n in names)


def first_line(error):
    """Return the first line of an exception's message without its full stop, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def covering_max_len(lengths, ratio):
    """Return the smallest max_len, in tokens, that holds at least `ratio` of the texts uncut.

    `lengths` counts characters: a Chinese character is one token; other scripts mostly need fewer tokens.
    """
    check_number("max_len_ratio", ratio, 1e-9, 1)
    covered = max(1, math.ceil(round(len(lengths) * ratio, 6)))  # rounded: 10 * 0.7 is 7.000000000000001
    return sorted(lengths)[covered - 1] + special_tokens


def chinese_pieces(texts):
    """Return the common pieces of 2 to 4 Chinese characters, without those that are mostly part of a longer one."""
    counts = Counter(run[start:start + size] for text in texts for run in re.findall(f"{chinese}+", text)
                     for size in (2, 3, 4) for start in range(len(run) - size + 1))
    parts = {part for piece, count in counts.items() if count >= scratch_min_count
             for part in (piece[:-1], piece[1:]) if counts[part] <= 1.2 * count}
    return most_common(Counter({piece: count for piece, count in counts.items() if piece not in parts}))


def most_common(counts):
    """Return the keys that count at least `scratch_min_count`, at most `scratch_pieces`, in an order that is fixed."""
    common = [key for key, count in counts.items() if count >= scratch_min_count]
    return sorted(common, key=lambda key: (-counts[key], key))[:scratch_pieces]


def preprocess(train_data_path, label2idx_path, max_len_ratio=0.9):
    """Write the label index of a training file, and print what the file holds.

    Labels are sorted, so the same labels always get the same columns: a trained model and a new
    run of this function agree. Raises InputError naming the file and line that is wrong.
    """
    lengths, counts, sizes = [], Counter(), []
    for text, labels in read_examples(train_data_path):
        lengths.append(len(text))
        counts.update(set(labels))
        sizes.append(len(set(labels)))
    if not counts:
        raise InputError(f"{train_data_path}: no example has a label; there is nothing to learn")
    max_len = covering_max_len(lengths, max_len_ratio)
    dump_json({label: column for column, label in enumerate(sorted(counts))}, label2idx_path)
    log("texts", count=len(lengths), labels=len(counts), labels_per_text=f"{sum(sizes) / len(sizes):.2f}",
        fewest=min(sizes), most=max(sizes), without_label=sizes.count(0))
    cut = {f"cut_at_{most}": sum(length + special_tokens > most for length in lengths)
           for most in (max_len, *usual_max_lens)}
    log("length", counted="characters", max_len=max_len, covers=f"{100 * max_len_ratio:g}%",
        longest=max(lengths) + special_tokens, **cut)
    rare = {label: count for label, count in sorted(counts.items()) if count < rare_below}
    log("rare", labels=len(rare), fewer_than=f"{rare_below}_examples", names=json.dumps(rare, ensure_ascii=False))
    log("wrote", path=label2idx_path)


def main():
    """Preprocess as the constants say."""
    preprocess(train_data_path, label2idx_path, max_len_ratio)


if __name__ == "__main__":
    run_script(main)
