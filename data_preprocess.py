"""Check the data and write the label index; before that, split one table into the three data files.

reads   ./data/train.json, dev.json, test.json   one example a line: {"text": "...", "label": ["...", ...]}
        table_path                if set, a .csv or .tsv file with a header, or JSONL
writes  ./data/label2idx.json     {"label": column, ...}, labels sorted
        ./data/train.json, dev.json, test.json   the rows of table_path, if it is set
prints  how many texts and labels there are, which max_len to choose, and what looks wrong in the data
run     python data_preprocess.py

Besides tqdm this file needs the standard library only. The other scripts take from it the readers, the
atomic write, the log line, and how a script ends on an error or a signal.
"""

import bz2
import codecs
import csv
import errno
import functools
import gzip
import hashlib
import json
import lzma
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict, namedtuple
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from itertools import chain, combinations, islice, product

from tqdm import tqdm

train_data_path = "./data/train.json"
dev_data_path = "./data/dev.json"
test_data_path = "./data/test.json"
label2idx_path = "./data/label2idx.json"
max_len_ratio = 0.9  # share of the texts that the suggested max_len covers, above 0 and at most 1
common_max_lens = (128, 512)  # tokens: the default of train.py, and the limit of BERT
min_label_count = 5  # labels with fewer training examples count as rare
shown_labels = 5  # so many of the most frequent and of the rarest labels are printed
num_special_tokens = 2  # [CLS] and [SEP]
log_columns = 100  # longer log lines are wrapped, in a narrower terminal earlier
bar_delay = 3  # seconds before reading and tokenizing show a bar

# One table, in place of the three files.
table_path = ""  # .csv or .tsv with a header, or JSONL; "" if the three files are there
split = (0.8, 0.1, 0.1)  # shares of the texts for training, dev and test
text_column = "text"  # its name in the header
label_columns = ["label"]  # one column of labels joined by label_separator, or several of 0 and 1
label_separator = ";"  # between the labels of a cell


def preprocess(train_data_path, label2idx_path, max_len_ratio=0.9, other_paths=()):
    """Write the label index of a training file, and print statistics of the data.

    Labels are sorted, so that preprocessing again never swaps the labels of a trained model.
    other_paths: of dev and test, which are checked too.
    Raises InputError naming file and line if an example is invalid, if no training example has a label, or if
    dev or test have labels that training has not.
    """
    check_writable(label2idx_path)
    stats = {path: scan_examples(path) for path in (train_data_path, *other_paths)}
    train = stats[train_data_path]
    if not train.label_counts:
        raise InputError(f"{train_data_path}: no example has a label")
    max_len = suggest_max_len(train.text_lengths, max_len_ratio)
    label2idx = {label: idx for idx, label in enumerate(sorted(train.label_counts))}
    dump_json(label2idx, label2idx_path)
    num_texts, sizes = len(train.text_lengths), train.labels_per_text
    counts = {"labels": len(label2idx), "labels_per_text": f"{sum(sizes) / num_texts:.2f}"}
    log("texts", count=num_texts, **counts, max_labels=max(sizes), without_label=sizes.count(0))
    tokens = [length + num_special_tokens for length in train.text_lengths]
    cuts = {f"over_{n}": sum(t > n for t in tokens) for n in (max_len, *common_max_lens)}
    log("length", max_len=max_len, covers=f"{100 * max_len_ratio:g}%", longest=max(tokens), **cuts)
    rare = sum(count < min_label_count for count in train.label_counts.values())
    log("rare", labels=rare, fewer_than=f"{min_label_count}_examples")
    log_label_counts([file.label_counts for file in stats.values()])
    log_suspects(list(stats.values()))
    log("wrote", path=label2idx_path)
    check_labels_known(stats, label2idx)


def suggest_max_len(text_lengths, max_len_ratio):
    """Return the smallest max_len, in tokens, that covers at least max_len_ratio of the texts.

    text_lengths: in characters. A Chinese character is one token; most other scripts need fewer tokens.
    """
    check_number("max_len_ratio", max_len_ratio, 1e-9, 1)
    covered = max(1, math.ceil(round(len(text_lengths) * max_len_ratio, 6)))  # 25 * 0.28 is 7.000000000000001
    return sorted(text_lengths)[covered - 1] + num_special_tokens


unknown_label = "if training has it, run python data_preprocess.py; if not, remove it, or add examples of it"
FileStats = namedtuple(
    "FileStats", "text_lengths labels_per_text label_counts first_locations text_hashes odd_texts"
)


def scan_examples(data_path):
    """Return the FileStats of a data file. Raises InputError naming file and line for an invalid example."""
    stats = FileStats([], [], Counter(), {}, set(), defaultdict(list))
    for location, text, labels in read_examples(data_path):
        stats.text_lengths.append(len(text))
        stats.labels_per_text.append(len(set(labels)))
        stats.label_counts.update(set(labels))
        stats.text_hashes.add(hash(text_key(text)))
        for label in labels:
            stats.first_locations.setdefault(label, location)
        if not text.strip():
            stats.odd_texts["texts that are empty:"].append(location)
        if "\ufffd" in text:
            stats.odd_texts["texts with U+FFFD, which stands for damaged characters:"].append(location)
    return stats


def text_key(text):
    """Return what makes two texts the same one: all but white space."""
    return " ".join(text.split())


def log_label_counts(label_counts):
    """Print the most frequent and the rarest labels, with their texts in training, dev and test."""
    ranked = sorted(label_counts[0], key=lambda label: (-label_counts[0][label], label))
    hidden = len(ranked) - 2 * shown_labels
    for number, label in enumerate(ranked):
        if hidden <= 0 or number < shown_labels or number >= shown_labels + hidden:
            counts = zip(("train", "dev", "test"), label_counts)
            log("label", shorten(label), **{name: count[label] for name, count in counts})
        elif number == shown_labels:
            log("label", f"… {hidden} others")


def log_suspects(stats):
    """Print which labels are probably one, or several joined, and how many texts stand in two files."""
    counts = sum((file.label_counts for file in stats), Counter())
    spellings = defaultdict(list)
    for label in sorted(counts):
        folded = unicodedata.normalize("NFKC", label).casefold()
        visible = (c for c in folded if not c.isspace() and unicodedata.category(c) != "Cf")
        spellings["".join(visible)].append(f'"{shorten(label)}" ({counts[label]})')
    for same in spellings.values():
        if len(same) > 1:
            log("note", f"probably one label, to be spelt alike: {', '.join(same)}")
    empty = [label for label in sorted(counts) if label.casefold() in ("nan", "none", "null", "n/a", "#n/a")]
    if empty:
        log("note", f"labels that are probably empty cells: {', '.join(empty)}")
    parts = {label: re.split(r"[,;|/\n，；、]\s*", label) for label in sorted(counts)}
    of_labels = Counter(part for label in parts for part in set(parts[label]) if "/" not in label)
    joined = [
        label
        for label in parts
        if any(part != label and (part in counts or of_labels[part] > 1) for part in parts[label])
    ]
    if joined:
        some = ", ".join(map(shorten, joined[:3]))
        log("note", f"probably several labels in one: {some}", count=len(joined))
    for file in stats:
        for reason, locations in file.odd_texts.items():
            log("note", f"{reason} {len(locations)}, the first is {locations[0]}")
    pairs = combinations(zip(("train", "dev", "test"), stats), 2)
    twice = {f"{a}_{b}": len(one.text_hashes & two.text_hashes) for (a, one), (b, two) in pairs}
    if any(twice.values()):
        log("note", "texts that stand in two files:", **twice)


def check_labels_known(stats, label2idx):
    """Print each label of {path: FileStats} that the label index lacks, then raise InputError."""
    unknown = []
    for path, file in stats.items():
        for label in sorted(file.label_counts.keys() - label2idx):
            unknown.append(f"{file.first_locations[label]}: the label {label!r} is not in the label index")
            place = file.first_locations[label].removeprefix(f"{path}:")
            log("unknown", shorten(label), file=path, texts=file.label_counts[label], first_line=place)
    if unknown:
        more = f" (and {len(unknown) - 1} more, listed above)" * (len(unknown) > 1)
        raise InputError(f"{unknown[0]}{more}; {unknown_label}")


def split_table(table_path, paths):
    """Write the examples of a table to the files of training, dev and test, the same every time.

    Each label is split in the shares of `split`, and is in all three where it has three texts or more. Equal
    texts go to one file. Raises InputError for an invalid row, or if a file was not written by this function.
    """
    if len(split) != 3 or min(split) <= 0 or abs(sum(split) - 1) > 1e-6:
        raise InputError(f"split = {split!r}: must be three shares above 0 with a sum of 1")
    examples, groups = [], defaultdict(set)
    is_table = file_format(table_path) == "table"
    for location, text, labels in read_table_examples(table_path) if is_table else read_examples(table_path):
        if not text.strip():
            raise InputError(f"{location}: the text is empty; fill it in, or remove the row")
        examples.append((text, labels))
        groups[text_key(text)].update(labels)
    sides = stratify(groups)
    rows = [[], [], []]
    for text, labels in examples:
        rows[sides[text_key(text)]].append({"text": text, "label": labels})
    if not all(rows):
        remedy = "training, dev and test need some each"
        raise InputError(f"{table_path}: {len(groups)} different texts are too few; {remedy}")
    record_path = sibling_path(paths[0], "split.json")
    record = load_json_object(record_path) if os.path.exists(record_path) else {}
    written = record["sha256"] if isinstance(record.get("sha256"), list) else []
    foreign = [path for path in paths if os.path.exists(path) and file_sha256(path) not in written]
    if foreign:
        remedy = "move them to another folder, or name other files in data_preprocess.py"
        raise InputError(
            f"{', '.join(foreign)}: would be replaced, but were not split from a table; {remedy}"
        )
    for path, part in zip(paths, rows, strict=True):
        dump_jsonl(part, path)
        written.append(file_sha256(path))
        dump_json({"sha256": written}, record_path)
    log("split", table_path, train=len(rows[0]), dev=len(rows[1]), test=len(rows[2]))


def stratify(groups):
    """Return {text: file} of {text: set of labels}; a file is 0 for training, 1 for dev, 2 for test.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011, section 3.1) in one pass: texts are dealt
    out by their rarest label, each to the file that still needs most of that label.
    """
    counts = Counter(label for labels in groups.values() for label in labels)
    needs = {None: [share * len(groups) for share in split]}  # None: texts, whatever their labels
    for label, count in counts.items():
        dev, test = (max(1, share * count) if count > 2 else 0 for share in split[1:])
        needs[label] = [count - dev - test, dev, test]

    rarest = {
        text: min(labels, key=lambda label: (counts[label], label), default=None)
        for text, labels in groups.items()
    }

    def rarest_first(text):
        """Return the sort key of a text: a hash stands in for chance, so that the split never changes."""
        label, digest = rarest[text], hashlib.sha256(text.encode()).digest()
        return (math.inf, "", digest) if label is None else (counts[label], label, digest)

    sides = {}
    for text in sorted(groups, key=rarest_first):
        label = rarest[text]
        sides[text] = max(range(3), key=lambda side: (needs[label][side], needs[None][side]))
        for label in (None, *groups[text]):
            needs[label][sides[text]] -= 1
    cover_labels(groups, sides, counts)
    return sides


def cover_labels(groups, sides, counts):
    """Move single texts in {text: file} so that a label of three texts or more is in all three files."""
    texts_with, held = defaultdict(list), Counter()
    for text, side in sides.items():
        for label in groups[text]:
            texts_with[label].append(text)
            held[label, side] += 1
    for label, side in product(sorted(counts), range(3)):
        if held[label, side] == 0 and counts[label] > 2:
            spare = (t for t in texts_with[label] if all(held[name, sides[t]] > 1 for name in groups[t]))
            if text := next(spare, None):
                held.subtract((name, sides[text]) for name in groups[text])
                held.update((name, side) for name in groups[text])
                sides[text] = side


def read_table_examples(table_path):
    """Yield (location, text, labels) for each row of a table; raises InputError naming the row."""
    for location, cells in read_table(table_path):
        labels = table_labels(location, cells)
        if labels is None:
            missing = label_columns if isinstance(label_columns, str) else label_columns[0]
            found = ", ".join(cells)
            raise InputError(f"{table_path}: has no column {missing!r} but {found}; set label_columns")
        yield location, cells[text_column], labels


def read_table(table_path, bar=True):
    """Yield (location, {column: cell}) for each row below the header; location is "file:line (row n)".

    Cells in quotes may hold line breaks. Raises InputError naming the row for one that does not fit.
    """
    lines = (decode_utf8(location, line) for location, line in read_lines(table_path, True, bar))
    first_line = next(lines, "")
    tabs = os.fspath(table_path).lower().endswith(".tsv")
    delimiter = "\t" if tabs else max(",;\t", key=first_line.count)  # Excel writes ; in much of Europe
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(chain([first_line], lines), delimiter=delimiter, strict=True)
    header, number = None, 0
    while True:
        location = f"{table_path}:{rows.line_num + 1} (row {(number := number + 1)})"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise InputError(
                f"{location}: {error}; double the quotes in a cell, and put it in quotes"
            ) from None
        if row is None:
            return
        if header is None:
            header = [name.strip() for name in row]
            found = f"its header is {', '.join(header)}"
            if text_column not in header:
                raise InputError(f"{table_path}: has no column {text_column!r}, {found}; set text_column")
            if len(set(header)) < len(header):
                raise InputError(f"{table_path}: has columns of the same name, {found}; rename one")
        elif row and len(row) != len(header):
            found = f"{len(row)} cells under {len(header)} columns"
            raise InputError(f"{location}: {found}; a cell with {delimiter!r} in it must stand in quotes")
        elif row:
            yield location, dict(zip(header, row, strict=True))


def table_labels(location, cells):
    """Return the labels of a row {column: cell}, or None if the table has no label columns."""
    columns = [label_columns] if isinstance(label_columns, str) else list(label_columns)
    if missing := [column for column in columns if column not in cells]:
        if len(missing) == len(columns):
            return None
        raise InputError(f"{location}: no column {missing[0]!r} among {', '.join(cells)}; set label_columns")
    if len(columns) == 1:
        cell = cells[columns[0]].strip()
        is_list = cell.startswith("[") and cell.endswith("]")
        labels = parse_list(location, cell) if is_list else cell.split(label_separator)
        return list(dict.fromkeys(filter(None, map(str.strip, labels))))
    values = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
    for column in columns:
        if cells[column].strip().lower() not in values:
            raise InputError(f"{location}: {column} must be 0 or 1, but is {cells[column]!r:.40}")
    return [column for column in columns if values[cells[column].strip().lower()]]


def parse_list(location, cell):
    """Return the labels of a cell that is a list, such as "['a', 'b']", which pandas writes."""
    with suppress(ValueError):
        labels = json.loads(cell.replace("'", '"'))
        if all(isinstance(label, str) for label in labels):
            return labels
    remedy = f"write their names with {label_separator!r} between, or a column of 0 and 1 for each label"
    raise InputError(f"{location}: the labels are {cell!r:.40}; {remedy}")


def read_examples(data_path, label2idx=None):
    """Yield (location, text, labels) for each example of a JSONL file; labels is a list of str, maybe empty.

    Raises InputError naming file and line if an example is invalid, or has a label that is not in label2idx.
    """
    for location, example in read_jsonl(data_path):
        text, labels = check_text(location, example), check_labels(location, example)
        for label in labels if label2idx is not None else ():
            if label not in label2idx:
                raise InputError(
                    f"{location}: the label {label!r} is not in the label index; {unknown_label}"
                )
        yield location, text, labels


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
            remedy = "; write their names" * isinstance(label, int)
            raise InputError(
                f"{location}: labels must be non-blank strings, but one is {label!r:.40}{remedy}"
            )
        if label != label.strip():
            raise InputError(f"{location}: the label {label!r:.60} has white space around it; remove it")
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
    """Return the start of example[key] for an error message, or "missing" with the keys that are there."""
    return json.dumps(example[key])[:40] if key in example else f"missing among {', '.join(example)[:40]!r}"


def read_jsonl(data_path):
    """Yield (location, object) for each line of a JSONL file; location is "file:line".

    Accepts a byte order mark, blank lines and Windows line ends.
    Raises InputError at the first line that is not a JSON object in UTF-8, and for a file without any.
    """
    location = None
    if file_format(data_path) == "table":
        remedy = "set table_path in data_preprocess.py to it, and run that first"
        raise InputError(f"{data_path}: a table, where JSONL is needed; {remedy}")
    for location, line in read_lines(data_path):
        yield location, parse_json_line(location, line)
    if location is None:
        raise InputError(f'{data_path}: no examples; a line is {{"text": "...", "label": ["..."]}}')


def read_lines(data_path, keep_blank=False, bar=True):
    """Yield (location, line) for each line of a file; line is bytes without a byte order mark.

    bar: show a progress bar in a terminal if it takes long, what is done with the lines included.
    """
    hidden = None if bar and is_main_process() else True
    options = {"unit": "B", "unit_scale": True, "leave": False, "delay": bar_delay, "disable": hidden}
    with open_file(data_path) as file, tqdm(total=os.fstat(file.fileno()).st_size, **options) as progress:
        progress.set_description(f"reading {data_path}", refresh=False)
        for number, line in enumerate(file, 1):
            progress.update(len(line))
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if keep_blank or line.strip():
                yield f"{data_path}:{number}", line


foreign_formats = {  # by the first bytes
    b"\xff\xfe\0\0": "UTF-32, not UTF-8; to convert: iconv -f UTF-32 -t UTF-8 OLD > NEW",
    b"\xff\xfe": "UTF-16, not UTF-8; save it in Excel as CSV UTF-8, or: iconv -f UTF-16 -t UTF-8 OLD > NEW",
    b"\xfe\xff": "UTF-16, not UTF-8; to convert: iconv -f UTF-16 -t UTF-8 OLD > NEW",
    b"\x1f\x8b": "compressed with gzip; unpack it: gzip -dc < OLD > NEW",
    b"BZh": "compressed with bzip2; unpack it: bzip2 -dc < OLD > NEW",
    b"\xfd7zXZ": "compressed with xz; unpack it: xz -dc < OLD > NEW",
    b"(\xb5/\xfd": "compressed with zstd; unpack it: zstd -dc < OLD > NEW",
    b"7z\xbc\xaf": "a .7z archive; unpack it",
    b"Rar!\x1a": "a .rar archive; unpack it",
    b"\xd0\xcf\x11\xe0": "an .xls or .doc file; save it in Excel as CSV UTF-8",
    b"PAR1": "a Parquet file; save it as CSV or JSONL",
    b"%PDF": "a PDF file; save its text as plain text in UTF-8",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
}
# What the advice above does, to try it: on a damaged file it would fail.
openers = {
    b"\xff\xfe\0\0": functools.partial(open, encoding="utf-32"),
    b"\xff\xfe": functools.partial(open, encoding="utf-16"),
    b"\xfe\xff": functools.partial(open, encoding="utf-16"),
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}


def is_utf8(head):
    """Return whether the start of a file may be that of one in UTF-8."""
    with suppress(UnicodeDecodeError):
        return codecs.getincrementaldecoder("utf-8")().decode(head) is not None and b"\0" not in head
    return False


def foreign_format(data_path, head):
    """Return what a file is that starts with the bytes `head`, and the remedy, or "" if it may be text."""
    if head.startswith(b"PK\x03\x04"):
        with suppress(zipfile.BadZipFile):
            names = zipfile.ZipFile(data_path).namelist()
            if "xl/workbook.xml" in names:
                return "an .xlsx file; save it in Excel as CSV UTF-8"
            return f"a .zip file with {', '.join(names[:2])}; unpack it"
        return "a damaged .zip or .xlsx file; copy or download it again"
    if is_utf8(head):
        return ""
    for start, remedy in foreign_formats.items():
        if head.startswith(start):
            try:
                if start in openers:
                    with openers[start](data_path) as file:
                        while file.read(2**20):
                            pass
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
                return f"{re.split('[,;]', remedy)[0]}, and damaged; copy or download it again"
            return remedy
    if b"\0" not in head:
        return ""
    encoding = "UTF-16LE" if head[1::2].count(0) > head[::2].count(0) else "UTF-16BE"  # without an order mark
    with suppress(UnicodeDecodeError):
        if "\0" not in head[: len(head) // 2 * 2].decode(encoding) and head.count(0) > len(head) / 9:
            return f"UTF-16, not UTF-8; to convert: iconv -f {encoding} -t UTF-8 OLD > NEW"
    return "a binary file, not text: it has bytes of 0"


# (for Python and iconv, its name, first bytes of the frequent characters in its language: level 1 of GB 2312
# and of Big5, kana and level 1 of JIS, Hangul, letters)
legacy_encodings = (
    ("gb18030", "GBK", {*range(0xB0, 0xD8), 0xA1, 0xA3}),
    ("euc-jp", "EUC-JP", {0xA1, 0xA4, 0xA5, *range(0xB0, 0xD0)}),
    ("big5", "Big5", {*range(0xA4, 0xC7), 0xA1}),
    ("cp932", "Shift JIS", {*range(0x81, 0x84), *range(0x88, 0x98)}),
    ("cp949", "EUC-KR", {*range(0xB0, 0xC9)}),
    ("cp1251", "Windows-1251", {*range(0xE0, 0x100)}),  # small letters, in KOI8-R the capital ones
    ("koi8-r", "KOI8-R", {*range(0xC0, 0xE0)}),
    ("cp1252", "Windows-1252 (Latin-1)", {*range(0xC0, 0x100)}),
)


def guess_encoding(data_path):
    """Return why a text file is not UTF-8, and a remedy that has been tried on it (on 256 MiB at most)."""
    with open_file(data_path) as file:
        data = file.read(2**28)
    lines = (line for line in data.splitlines(keepends=True) if not line.isascii())
    sample = b"".join(islice(lines, 10_000))[: 2**20]
    text = sample.decode("utf-8", "replace")
    damaged, runs = text.count("\ufffd"), re.findall(rb"[\x80-\xff]+", sample)
    if 9 * damaged < sum(c > "\x7f" for c in text):
        return f"damaged in {damaged} places; to drop these: iconv -c -f UTF-8 -t UTF-8 OLD > NEW"
    single = sum(map(len, runs)) < 1.5 * len(runs)  # letters among those of ASCII
    shares = []
    for encoding, name, first_bytes in legacy_encodings:
        counts = Counter(c for c in sample.decode(encoding, "ignore") if c > "\x7f")
        hits = sum(n for c, n in counts.items() if c.encode(encoding)[0] in first_bytes)
        share = hits / max(1, sum(counts.values())) * (single == (encoding == "cp1252"))
        # The same bytes write frequent characters of Chinese and of Korean.
        shares.append((share + (encoding == "cp949" and hits > 20) / 20, encoding, name))
    for share, encoding, name in sorted(shares, key=lambda row: -row[0]):
        with suppress(UnicodeDecodeError):
            if share > 0.6 and (decoded := data.decode(encoding)):
                start = next(i for i, c in enumerate(decoded) if c > "\x7f")
                reads = f"it then reads {decoded[start : start + 9]!r}"
                command = f"iconv -f {encoding.upper()} -t UTF-8 OLD > NEW"
                remedy = f"to convert: {command}; or in Excel save as CSV UTF-8"
                return f"not UTF-8, probably {name}; {reads}; {remedy}"
    return "not UTF-8, nor any other one encoding: damaged, or joined from several files; save it as UTF-8"


def file_format(data_path):
    """Return "jsonl", "table" or "text", by the start of the file, then by its name.

    Raises InputError for formats that no script reads, whatever the file is called.
    """
    with open_file(data_path) as file:
        head = file.read(2**16).removeprefix(b"\xef\xbb\xbf")
    if reason := foreign_format(data_path, head):
        raise InputError(f"{data_path}: {reason}")
    if b"\r" in head.strip() and b"\n" not in head:
        raise InputError(f"{data_path}: its lines end in CR alone; to convert: tr '\\r' '\\n' < OLD > NEW")
    first_line = head.strip().partition(b"\n")[0].strip()
    if re.match(rb"\[\s*([{\"\[]|$)", first_line):
        raise InputError(f"{data_path}: a JSON array; write one object a line instead, without [ ] around")
    if first_line.startswith(b"{"):
        return "jsonl"
    name = os.fspath(data_path).lower()
    cells = [cell.strip('" ') for cell in re.split("[,;\t]", first_line.decode("utf-8", "replace"))]
    if name.endswith((".csv", ".tsv")) or len(cells) > 1 and text_column in cells:
        return "table"
    return "jsonl" if name.endswith((".json", ".jsonl")) else "text"


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
        raise InputError(f"{location}: {guess_encoding(location.rpartition(':')[0])}") from None


def load_label2idx(label2idx_path):
    """Return the label index {label: column}.

    Raises InputError if the file is missing, or does not map its labels one to one onto 0 … C−1.
    """
    if not os.path.exists(label2idx_path):
        remedy = f"run: python data_preprocess.py; paths start from {os.getcwd()}"
        raise InputError(f"{label2idx_path}: there is no label index yet; {remedy}")
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
        content = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        reason = foreign_format(data_path, content[: 2**16]) or guess_encoding(data_path)
        raise InputError(f"{data_path}: {reason}") from None
    except (ValueError, RecursionError) as error:
        reason = foreign_format(data_path, content[: 2**16]) or f"not a JSON file ({error})"
        raise InputError(f"{data_path}: {reason}") from None


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
def atomic_write(out_path, progress_path=""):
    """Give a temporary path to write to; at the end of the block it replaces out_path.

    A reader, or a process killed at any time, sees the old file or the new one.
    progress_path: while this file exists, what fails or stops leaves the temporary one, for the next run.
    Raises InputError if the file cannot be written.
    """
    target = os.path.realpath(out_path)  # a symbolic link stays one
    temporary = f"{target}.tmp"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, target)
        if progress_path:
            with suppress(OSError):
                os.remove(progress_path)
    except OSError as error:
        raise InputError(write_error(out_path, error)) from None
    finally:
        if not os.path.exists(progress_path):
            with suppress(OSError):
                os.remove(temporary)


def move_file(source, target):
    """Replace the file or folder `target` by `source`; symbolic links stay, also to other disks."""
    source, target = os.path.realpath(source), os.path.realpath(target)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        if os.path.isdir(source):  # on another disk
            shutil.copytree(source, target, dirs_exist_ok=True)
            return shutil.rmtree(source)
        shutil.copy2(source, f"{target}.tmp")
        fsync_file(f"{target}.tmp")
        os.replace(f"{target}.tmp", target)
        os.remove(source)


def fsync_file(path):
    """Flush a written file to the disk, so that a power cut cannot lose it."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def check_writable(path):
    """Raise InputError unless a file can be written at `path`; leaves nothing behind."""
    folder = os.path.dirname(path) or "."
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder) or "."
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(write_error(path, error)) from None


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
    is_number = isinstance(value, Integral if integer else Real) and not isinstance(value, bool)
    if not is_number or not minimum <= value <= (value if maximum is None else maximum):
        limits = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise InputError(f"{name} = {value!r}: must be {'an integer' if integer else 'a number'}, {limits}")


def short_message(error):
    """Return the first sentence of an exception's message, or the exception's name."""
    first_line, *others = (str(error).strip() or type(error).__name__).splitlines()
    if isinstance(error, KeyError):
        first_line = f"there is no {first_line}"
    if first_line.endswith(":") and others:
        first_line += f" {others[0].strip()}"
    return re.split(r"(?<=[^.])\. (?=[A-Z])", first_line)[0].rstrip(".")


def plain_constants(values):
    """Make each path in a script's globals() a str, and each number of numpy one of Python.

    They are compared and stored: a checkpoint with a path or a number of numpy would not load.
    """
    for name, value in list(values.items()):
        if isinstance(value, os.PathLike):
            values[name] = os.fspath(value)
        elif hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            values[name] = value.item()


def limit_spinning(path="/proc/loadavg"):
    """If another process is running now, let OpenMP's threads sleep while they wait.

    Spinning, they take the CPU from each other, and training takes 2.5 times as long; alone it is faster.
    Call it before torch is loaded.
    """
    with suppress(OSError, ValueError, IndexError), open(path, encoding="utf-8") as file:
        num_running = int(file.read().split()[3].split("/")[0])  # of "0.94 1.33 1.54 2/75 15944"
        if num_running > 1 and "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "0")


def run_script(main, takes_texts=False):
    """Call main(). An InputError is printed as one line on stderr, with exit code 1 and no traceback.

    Ctrl-C exits with code 130 and SIGTERM with 143, without output. takes_texts: whether the command line may
    have arguments besides --help.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in Jupyter, in IDLE, or without a console
            stream.reconfigure(errors="backslashreplace")  # where a console or pipe cannot show Chinese
    handlers = {}
    with suppress(ValueError):  # Python allows handlers in the main thread alone
        for number in (*termination_signals(), signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                handlers[number] = signal.signal(number, end_script)
    is_script = main.__module__ == "__main__"
    try:
        given = sys.argv[1:] if is_script or not is_interactive() else []  # those of Jupyter are not ours
        options = [argument for argument in given if argument.startswith("-") or not takes_texts]
        if {"-h", "--help"} & set(options):
            return print_help()
        if options:
            remedy = "settings are the constants at the top of the script; see --help"
            raise InputError(f"{options[0]!r}: not an argument of {os.path.basename(sys.argv[0])}; {remedy}")
        main()
    except BrokenPipeError:  # whoever read the output has ended, as in: python predict.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        sys.exit(128 + 13)
    except Exception as error:
        exit_with_message(error)
        raise
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        # A process that ends is not interrupted in its last steps; in Jupyter it goes on.
        ends = is_script and not is_interactive()
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_IGN if ends else handler)


def exit_with_message(error):
    """Exit with code 1 and one line on stderr, if that is all an error needs."""
    if not is_main_process():
        time.sleep(10)  # only rank 0 reports a shared error; then torchrun ends the others
    if type(error).__name__ == "OutOfMemoryError":
        sys.exit("error: out of GPU memory; lower batch_size or max_len, or see nvidia-smi")
    if isinstance(error, InputError) or getattr(error, "errno", None) == errno.ENOSPC:
        message = f"error: {error}"
        in_terminal = sys.stderr is not None and sys.stderr.isatty()
        sys.exit("\n".join(wrap(message, get_columns())) if in_terminal else message)


def end_script(number, _):
    """End the script at a signal; what follows is not interrupted."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def is_interactive():
    """Return whether Python goes on after a script, as in Jupyter, in IDLE, or with python -i."""
    shells = {"ipykernel", "IPython", "idlelib"} & sys.modules.keys()
    return bool(shells) or hasattr(sys, "ps1") or bool(sys.flags.interactive)


def print_help():
    """Print the docstring of the script and its constants, as they stand in the file."""
    script = sys.modules["__main__"]
    with open(script.__file__, encoding="utf-8") as file:
        constants = re.findall(r"^\w+ = .*", file.read().partition("\ndef ")[0], re.MULTILINE)
    print(script.__doc__, "Settings, to be edited at the top of the file:", sep="\n", end="\n\n")
    for constant in constants:
        print(*wrap(constant, get_columns()), sep="\n    ")


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
            signal.signal(number, signal.SIG_IGN)
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
    """Return the number of processes that torchrun started; 1 without it.

    A cluster may set some of torchrun's variables, or empty ones, for purposes of its own.
    """
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    numbers = [os.environ.get(name, "") for name in names]
    return int(numbers[0]) if all(map(str.isdecimal, numbers)) else 1


def is_main_process():
    """Return whether this is the process that prints and writes files: the only one, or rank 0."""
    return get_world_size() == 1 or int(os.environ["RANK"]) == 0


def log(event, message="", **fields):
    """Print `event message key=value …`, the one form of a log line; long lines are wrapped.

    Values carry their units. Each line starts with the event, so that grep finds it.
    """
    if is_main_process():
        text = " ".join([*filter(None, [message]), *(f"{key}={value}" for key, value in fields.items())])
        for line in wrap(text, get_columns() - 9):
            print(f"{event:<8} {line}", flush=True)


def get_columns():
    """Return how many columns a line may have: log_columns, or those of a narrower terminal."""
    return max(40, min(log_columns, shutil.get_terminal_size((log_columns, 24)).columns))


def escape(text):
    """Return a text with control characters, such as line breaks, shown as escapes."""
    shown = (c.isprintable() or unicodedata.category(c) == "Zs" for c in text)  # Zs: wide and other spaces
    return "".join(
        c if keep else c.encode("unicode_escape").decode() for c, keep in zip(text, shown, strict=True)
    )


def wrap(text, columns):
    """Return the lines of a text, broken between words."""
    text = escape(text)
    wide = "".join(f"{c}\0" if unicodedata.east_asian_width(c) in "WF" else c for c in text)  # two columns
    lines = textwrap.wrap(wide, columns, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", "") for line in lines]


def shorten(text, length=40):
    """Return a text for a log line, cut to `length` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def log_metrics(event, metrics, threshold):
    """Print the main metrics in one line."""
    shown = {name: f"{metrics[name]:.3f}" for name in ("accuracy", "micro_f1", "macro_f1")}
    log(event, threshold=threshold, **shown)


def log_label_metrics(by_label, where):
    """Print a line per label, the weakest first; of many labels the ten weakest, and `where` others are."""
    rows = sorted(by_label.items(), key=lambda item: item[1]["f1"])
    num_shown = 10 if len(rows) >= 50 else len(rows)
    for name, row in rows[:num_shown]:
        scores = {key: f"{row[key]:.3f}" for key in ("precision", "recall", "f1")}
        log("label", shorten(name), **scores, support=row["support"])
    if rows[num_shown:]:
        least = f"{rows[num_shown][1]['f1']:.3f}"
        log("label", f"… {len(rows) - num_shown} others with f1 of {least} or more; {where}")


def main():
    """Preprocess with the constants above."""
    plain_constants(globals())
    paths = (train_data_path, dev_data_path, test_data_path)
    if table_path:
        split_table(table_path, paths)
    preprocess(train_data_path, label2idx_path, max_len_ratio, [*filter(os.path.exists, paths[1:])])
    for path in [path for path in paths[1:] if not os.path.exists(path)]:
        log("note", f"{path}: missing, but train.py needs it; paths start from {os.getcwd()}")


if __name__ == "__main__":
    run_script(main)
