"""Read and check the data files; write the label index.

reads   ./data/train.json       one object a line: {"text": "...", "label": ["...", ...]}
writes  ./data/label2idx.json   {"label": column, ...}, labels sorted
prints  how many texts and labels there are, which labels are rare, and which max_len to choose
run     python data_preprocess.py

Everything here is standard library: the other scripts take from it the one reader of JSONL,
the one way to write a file whole, and the one form of a log line.
"""
import json
import math
import os
import sys
from collections import Counter
from contextlib import contextmanager, suppress

train_data_path = "./data/train.json"
label2idx_path = "./data/label2idx.json"
max_len_ratio = 0.9  # the share of texts that the printed max_len covers, above 0 and at most 1
rare_below = 5  # labels with fewer training examples than this are named: too few to learn from
special_tokens = 2  # the tokenizer puts [CLS] before a text and [SEP] behind it


class InputError(ValueError):
    """What a user can mend: a file, a line in it, or a constant. The message is one sentence."""


def run_script(main):
    """Call `main()`. An InputError becomes one line on stderr and exit code 1, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # where a console or pipe cannot show Chinese
    try:
        main()
    except InputError as error:
        one_a_machine = int(os.environ.get("LOCAL_RANK", 0)) == 0  # the processes of torchrun mostly all find it
        sys.exit(f"error: {error}" if one_a_machine else 1)


def is_main():
    """Return whether this process is the one that prints and writes: the only one, or torchrun's first."""
    return int(os.environ.get("RANK", 0)) == 0


def log(event, words="", **fields):
    """Print `event words key=value key=value`: the one form of all our log lines. Units go into the value."""
    if is_main():
        print(f"{event:<8}", *filter(None, [words]), *(f"{key}={value}" for key, value in fields.items()), flush=True)


@contextmanager
def whole_file(out_path):
    """Give a temporary path beside `out_path`; when the block ends well, it takes the place of `out_path`.

    A reader, or a run killed at any moment, meets the old file or the new one, never half of one.
    """
    os.makedirs(os.path.dirname(out_path) or ".", exist_ok=True)
    temporary = f"{out_path}.tmp"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, out_path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


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


def open_input(data_path):
    """Open a file of the user's for reading bytes. Raises InputError if that cannot be done."""
    try:
        return open(data_path, "rb")
    except OSError as error:
        raise InputError(f"{data_path}: {error.strerror}; paths start from {os.getcwd()}") from None


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


def read_jsonl(data_path):
    """Yield (place, object) for each line of a JSONL file; place is "file:line" for messages.

    A byte order mark, blank lines and Windows line ends are accepted.
    Raises InputError at the first line that is not a JSON object in UTF-8, or if no line holds one.
    """
    place = None
    with open_input(data_path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                place = f"{data_path}:{number}"
                yield place, parse_line(place, line)
    if place is None:
        raise InputError(f'{data_path}: no examples; each line holds one: {{"text": "...", "label": ["..."]}}')


def parse_line(place, line):
    """Return the object that the bytes of one line hold. Raises InputError naming `place`."""
    try:
        item = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{place}: not UTF-8, probably GBK; to convert: iconv -f GBK -t UTF-8 OLD > NEW") from None
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


def covering_max_len(lengths, ratio):
    """Return the smallest max_len, in tokens, that holds at least `ratio` of the texts uncut.

    `lengths` counts characters: a Chinese character is one token; other scripts mostly need fewer tokens.
    Raises InputError unless 0 < ratio <= 1.
    """
    if not 0 < ratio <= 1:
        raise InputError(f"max_len_ratio = {ratio}: must be above 0 and at most 1")
    covered = max(1, math.ceil(round(len(lengths) * ratio, 6)))  # rounded: 10 * 0.7 is 7.000000000000001
    return sorted(lengths)[covered - 1] + special_tokens


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
    log("length", max_len=max_len, covers=f"{100 * max_len_ratio:g}%", longest=max(lengths) + special_tokens)
    rare = {label: count for label, count in sorted(counts.items()) if count < rare_below}
    log("rare", labels=len(rare), fewer_than=f"{rare_below}_examples", names=json.dumps(rare, ensure_ascii=False))
    log("wrote", path=label2idx_path)


if __name__ == "__main__":
    run_script(lambda: preprocess(train_data_path, label2idx_path, max_len_ratio))
