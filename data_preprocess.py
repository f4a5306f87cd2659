"""Check the data and number its labels; before that, split a table into the three files.

reads   ./data/train.json, dev.json, test.json   a line: {"text": "...", "label": ["...", ...]}
        or table_path, a .csv or .tsv file with a header or JSONL; or at first ./data/sample/
writes  ./data/label2idx.json   {"label": column, ...}, labels sorted
        ./data/train.json, dev.json, test.json   the rows of table_path, or the sample
        ./data/split.json       which data files were written here: no others are replaced
run     python data_preprocess.py    prints what there is, the max_len to set, what looks wrong
"""

import ast
import csv
import hashlib
import json
import math
import os
import re
import signal
import sys
import textwrap
import time
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from itertools import chain, combinations, takewhile
from pathlib import Path
from types import SimpleNamespace

train_data_path = "./data/train.json"
dev_data_path = "./data/dev.json"
test_data_path = "./data/test.json"
label2idx_path = "./data/label2idx.json"
table_path = ""  # one .csv or .tsv file with a header, or JSONL, in place of the three
split = (0.8, 0.1, 0.1)  # shares of the rows for training, dev and test
text_column = "text"  # its name in the header; the columns hold for predict.py too
label_columns = ["label"]  # of names, or of 0 and 1: then their headers are the labels
label_separator = ";"  # between the labels of a cell
quotes = "auto"  # True: cells in "" may hold line breaks; False: " is like other characters


def load_json(data_path):
    """Return the content of a JSON file in UTF-8, or raise InputError."""
    try:
        return json.loads(decode_utf8(data_path, Path(data_path).read_bytes()))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{data_path}: {error}") from None


def dump_json(project, out_path, indent=None):
    """Write `project` to out_path as JSON in UTF-8, atomically."""
    with atomic_write(out_path) as path, open(path, "w", encoding="utf-8") as file:
        json.dump(project, file, ensure_ascii=False, indent=indent, default=float)


def preprocess(train_data_path, label2idx_path, max_len_ratio=0.9, other_paths=()):
    """Write the sorted label index; print statistics and a max_len for a share of the texts."""
    paths = zip(("train", "dev", "test"), (train_data_path, *other_paths))
    files = {n: scan_examples(p) for n, p in paths if n == "train" or os.path.exists(p)}
    num_texts, counts = len(files["train"].lengths), files["train"].label_counts
    if not counts:
        raise InputError(f"{train_data_path}: no example has a label")
    label2idx = {label: idx for idx, label in enumerate(sorted(counts))}
    if os.path.exists(label2idx_path) and load_json(label2idx_path) != label2idx:
        os.replace(label2idx_path, f"{label2idx_path}.old")
        log("note", f"new {label2idx_path}; a .pth of the article needs its .old beside it")
    dump_json(label2idx, label2idx_path)
    log("texts", count=num_texts, unlabelled=files["train"].num_unlabelled, labels=len(counts))
    # A Chinese character is a token, elsewhere tokens are longer; two more: [CLS] and [SEP].
    tokens = sorted(length + 2 for length in files["train"].lengths)
    max_len = tokens[min(max(0, math.ceil(num_texts * max_len_ratio - 1e-6) - 1), num_texts - 1)]
    longer = {f"over_{n}": sum(t > n for t in tokens) for n in (128, 512)}
    log("length", max_len=max_len, covers=f"{max_len_ratio:.0%}", longest=tokens[-1], **longer)
    ranked = sorted(counts, key=lambda x: (-counts[x], x))
    for label in ranked[:5] + ranked[5:][-5:]:  # the most frequent and the rarest
        log("label", f"{label:.40}", **{name: f.label_counts[label] for name, f in files.items()})
    note_odd_labels(files)
    note_odd_texts(files)
    check_labels_known(files, counts)


def scan_examples(data_path):
    """Return lengths, labels and faults of a data file, or raise InputError."""
    file = SimpleNamespace(path=data_path, lengths=[], label_counts=Counter(), labels_of={})
    file.first_locations, file.odd_texts, file.num_unlabelled = {}, defaultdict(list), 0
    for location, text, labels, _ in read_examples(data_path, needs_labels=True):
        file.lengths.append(len(text))
        file.num_unlabelled += not labels
        file.label_counts.update(set(labels))
        for label in labels:
            file.first_locations.setdefault(label, location)
        key, labels_hash = hash(" ".join(text.split())), hash(frozenset(labels))
        if file.labels_of.setdefault(key, labels_hash) != labels_hash:
            file.odd_texts["texts come again with other labels"].append(location)
        if not text.strip():
            file.odd_texts["texts are empty"].append(location)
    return file


def note_odd_labels(files):
    """Print which labels are probably one, or empty cells, or several joined."""
    counts = sum((file.label_counts for file in files.values()), Counter())
    where = {k: v for f in reversed(files.values()) for k, v in f.first_locations.items()}
    shown = {x: f'"{x:.40}" ({counts[x]}, {where[x]})' for x in counts}
    spellings = defaultdict(list)
    for label in sorted(counts, key=lambda x: (-counts[x], x)):
        spellings[fold_spelling(label)].append(shown[label])
    for name, same in spellings.items():
        if len(same) > 1 or re.fullmatch(r"\W*|nan|none|\(?null\)?|#?n/?a|<na>|\\n", name):
            log("note", f"probably one label, or an empty cell: {', '.join(same)}")
    for separator in (";", ",", "|", "/", "，", "；", "、", "：", ":", "+", "&", "#", "\n", " "):
        parts = {x: [*filter(None, map(str.strip, x.split(separator)))] for x in counts}
        times = Counter(chain(*map(set, parts.values())))  # a label counts once
        enough = all if separator == " " else any  # names of two words are usual
        joined = [x for x in counts if len(parts[x]) > 1 and enough(times[p] > 1 for p in parts[x])]
        if joined:
            some = f"{shown[joined[0]]} may be {' and '.join(parts[joined[0]])}"
            alone = ", ".join(sorted(times.keys() & counts)[:3]) or "none"
            remedy = f"if so set label_separator = {separator!r}, in JSONL write a list"
            log("note", f"{len(joined)} labels like {some} ({alone} are labels too); {remedy}")
            break


def fold_spelling(label):
    """Return what near-equal spellings of a label share; "" if nothing is visible."""
    folded = unicodedata.normalize("NFKC", label).casefold()
    folded = "".join(c for c in folded if not c.isspace() and unicodedata.category(c) != "Cf")
    folded = re.sub(r"(?<=\w)[-_](?=\w)", "", folded)
    return re.sub(r"(?<=\d)\.0$|(?<=[a-z]{3})s$", "", folded)  # 3.0 is 3, logins is login


def note_odd_texts(files):
    """Print which texts are empty or contradictory, and how many are in two files."""
    for file in files.values():
        for fault, locations in file.odd_texts.items():
            log("note", f"{file.path}: {len(locations)} {fault}, the first at {locations[0]}")
    for a, b in combinations(files, 2):
        if num_twice := len(files[a].labels_of.keys() & files[b].labels_of.keys()):
            log("note", f"{num_twice} texts are in both {a} and {b}")


def check_labels_known(files, label2idx):
    """Raise InputError if a file of scan_examples has labels that label2idx lacks."""
    for file in files.values():
        unknown = {x: n for x, n in sorted(file.label_counts.items()) if x not in label2idx}
        if unknown:
            where = f"{file.first_locations[min(unknown)]}: the label index lacks {unknown!s:.300}"
            raise InputError(f"{where}; add to training if missing, run python data_preprocess.py")


def split_table(table_path, paths):
    """Write the rows of a table to the three data files; texts of an earlier split stay."""
    if len(split) != 3 or min(split) <= 0 or abs(sum(split) - 1) > 1e-6:
        raise InputError(f"split = {split!r}: not three shares above 0 with a sum of 1")
    write_data_files(paths, ())  # fails early
    rows_of = defaultdict(list)
    examples = list(read_examples(table_path, needs_labels=True))
    for location, text, labels, _ in (examples[0], examples[-1]):  # as read
        log("row", location, text=f"{text:.40}", label=labels)
    for _, text, labels, others in examples:
        if clash := {"text", "label"} & others.keys():
            raise InputError(f"{table_path}: rename the column {min(clash)!r}, not used here")
        rows_of[" ".join(text.split())].append({"text": text, "label": labels, **others})
    num_empty, num_joined, old = len(rows_of.pop("", [])), 0, {}
    most = max(((len(rows), text[:40]) for text, rows in rows_of.items()), default=None)
    for rows in rows_of.values():  # a database exports a row for each label of a text
        if len({frozenset(row["label"]) for row in rows}) > 1:
            rows[0]["label"] = list(dict.fromkeys(chain(*(row["label"] for row in rows))))
            num_joined += len(rows)
            del rows[1:]
    log("rows", without_text=num_empty, joined_by_text=num_joined, most_frequent=most)
    for number, path in enumerate(paths):
        for _, text, *_ in read_examples(path) if os.path.exists(path) else ():
            old[" ".join(text.split())] = number
    kept, parts = {text: old[text] for text in old if text in rows_of}, [[], [], []]
    for text, number in stratify(rows_of, kept).items():
        parts[number] += rows_of[text]
    if not all(parts):
        raise InputError(f"{table_path}: {len(rows_of)} different texts are too few")
    write_data_files(paths, parts)
    sizes, n = dict(zip(("train", "dev", "test"), map(len, parts))), len(kept)
    log("split", table_path, **sizes, texts_kept=n, texts_new=len(rows_of) - n, gone=len(old) - n)


def stratify(rows_of, kept):
    """Return {text: 0 for training, 1 for dev, 2 for test}, after Sechidis et al. 2011, 3.1."""
    names_of = {text: (None, *rows[0]["label"]) for text, rows in rows_of.items()}  # None: all
    num_texts = Counter(chain(*names_of.values()))
    num_rows = Counter(chain(*(names_of[text] for text in rows_of for _ in rows_of[text])))
    kept = {t: f for t, f in kept.items() if f == 0 or min(num_texts[n] for n in names_of[t]) > 2}
    file_of, remaining, held = dict(kept), Counter(num_texts), Counter()

    def rarest_first(text):
        digest = hashlib.sha256(text.encode()).digest()  # in place of chance
        rarest = min(num_texts[name] for name in names_of[text])
        return text not in kept, -len(rows_of[text]), rarest, digest

    def filled(name, file, num):
        if num_texts[name] < 3 or remaining[name] == 1 and not held[name, 0]:
            return 1000 * (file > 0)  # to training
        urgency = 0 if held[name, file] else 10 / remaining[name] ** 2
        return (held[name, file] + num / 2) / (split[file] * num_rows[name]) - urgency

    for text in sorted(names_of, key=rarest_first):
        names, num = names_of[text], len(rows_of[text])
        if text not in kept:
            file_of[text] = min(range(3), key=lambda f: sum(filled(n, f, num) for n in names))
        held.update({(name, file_of[text]): num for name in names})
        remaining.subtract(names)
    return file_of


def write_data_files(paths, parts):
    """Write rows to the data files, or raise InputError unless split.json lists old ones."""
    record_path = Path(paths[0]).with_name("split.json")
    written = load_json(record_path)["sha256"] if record_path.exists() else []
    old = {path: Path(path).read_bytes() for path in paths if os.path.exists(path)}
    own = [str(path) for path in old if hashlib.sha256(old[path]).hexdigest() not in written]
    if own:
        raise InputError(f"{', '.join(own)}: your own, would be replaced; move them away")
    for path, rows in zip(paths, parts):
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        content = lines.encode(errors="backslashreplace")  # half a character
        written.append(hashlib.sha256(content).hexdigest())
        dump_json({"sha256": written}, record_path)  # first: a kill may come between
        with atomic_write(path) as temporary:
            Path(temporary).write_bytes(content)


def read_examples(data_path, needs_labels=False):
    """Yield ("file:line", text, labels or None, others) of a .csv, .tsv, .txt, or else JSONL."""
    location = None
    readers = {".csv": read_table, ".tsv": read_table, ".txt": read_lines}
    for location, row in readers.get(Path(data_path).suffix.lower(), read_jsonl)(data_path):
        row = {"text": row.rstrip("\r\n")} if isinstance(row, str) else row
        text, labels = row.pop("text", None), row.pop("label", None)
        if not isinstance(text, str):
            raise InputError(f'{location}: "text" is {text!r:.40}, not a string, of {[*row]!s:.60}')
        if not isinstance(labels, (list, type(None))) or needs_labels and labels is None:
            remedy = f"in JSONL write a list; of a table set label_columns: {[*row.get(None, row)]}"
            raise InputError(f'{location}: "label" is {labels!r:.40}; {remedy:.120}')
        for label in labels or ():
            if not isinstance(label, str) or label != label.strip() or not fold_spelling(label):
                raise InputError(f"{location}: labels are names, no spaces around: {label!r:.40}")
        if re.search("[\ud800-\udfff]", "".join((text, *(labels or ())))):
            raise InputError(f"{location}: half a character, \\udxxx, in {text!r:.40}")
        yield location, text, labels, row.pop(None, row)
    if location is None:
        raise InputError(f'{data_path}: no examples; a line is {{"text": "...", "label": ["..."]}}')


def read_jsonl(data_path):
    """Yield ("file:line", object) for each line not blank, or raise InputError."""
    for location, line in read_lines(data_path):
        row = line.strip()
        with suppress(ValueError, RecursionError):
            row = json.loads(row)
        if isinstance(row, dict):
            yield location, row
        elif row != "":
            raise InputError(f"{location}: not a JSON object, one a line, without [ ]: {row!r:.40}")


def read_table(table_path):
    """Yield (location, {"text", "label", None: others}); a column of 0 and 1 is itself a label."""
    columns = [label_columns] if isinstance(label_columns, str) else list(label_columns)
    header = next((cells for _, cells in read_cells(table_path)), {text_column: ""})
    missing = [column for column in columns if column not in header]
    bad = 0 < len(missing) < len(columns) or len({text_column, *columns}) <= len(columns)
    if bad or text_column not in header:
        names = f"{[text_column, *columns]} are not all different ones of {[*header]}"
        raise InputError(f"{table_path}: {names}; set text_column and label_columns")
    if not label_separator or quotes not in ("auto", True, False):
        raise InputError(f"label_separator = {label_separator!r}, quotes = {quotes!r}: invalid")
    columns = [] if missing else columns
    values, yes, no = {c: set() for c in columns}, {"1", "1.0", "true"}, {"0", "0.0", "false", ""}
    for _, cells in read_cells(table_path) if columns else ():
        for column in columns:
            values[column].add(cells[column].strip().lower())
    flags = [c for c in columns if values[c] <= yes | no and values[c] != {""}]
    marks = {"-1"} if len(columns) < 2 else yes | no - {""}
    words = set().union(*values.values()) - {""}  # two: yes and no
    marks = words if len(columns) > 1 and len(words) < 3 and not flags else marks
    for column in columns:
        if column not in flags and values[column] & marks:
            other = min(values[column] - yes - no)
            raise InputError(f"{table_path}: {column} has {other!r:.40}, not 0 or 1; blank is 0")
    for location, cells in read_cells(table_path):
        row, names = {"text": cells.pop(text_column), None: cells}, []
        for column in columns:
            cell = cells.pop(column).strip()
            names += split_cell(location, cell) if column not in flags else []
            names += [column] if column in flags and cell.lower() in yes else []
        yield location, row | ({"label": list(dict.fromkeys(names))} if columns else {})


def split_cell(location, cell):
    """Return the labels of a cell: names with label_separator between, or a list of Python."""
    names, is_literal = cell.split(label_separator), cell.startswith(("{", "[{", '["', "['", "('"))
    if is_literal or cell.startswith("[") and cell.endswith("]"):
        names = None if is_literal else names  # [BUG];[UI] are two names
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            names = ast.literal_eval(cell)
        joined = re.search(r"""['"]\s+['"]""", cell)  # as NumPy writes it
        if joined or not isinstance(names, list) or not all(isinstance(x, str) for x in names):
            remedy = f"write a{label_separator}b, or ['a', 'b']"
            raise InputError(f"{location}: labels {cell!r:.40} are no list of names; {remedy}")
    return [name for name in map(str.strip, names) if name]


def read_cells(table_path):
    """Yield ("file:line", {column: cell}) for each row not blank, or raise InputError."""
    lines = (line for _, line in read_lines(table_path))
    first, header = next(lines, ""), []
    separator = re.fullmatch(r'"?sep=(.)"?\s*', first)  # a first line for Excel
    first = next(lines, "") if separator else first
    by_suffix = {".tsv": "\t"}.get(Path(table_path).suffix.lower())  # Excel writes ; in Europe
    delimiter = separator[1] if separator else by_suffix or max(",;\t|", key=first.count)
    csv.field_size_limit(2**31 - 1)
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    options = {"quoting": quoting, "skipinitialspace": True, "strict": True}
    rows = csv.reader(chain([first], lines), delimiter=delimiter, **options)
    location, plain = f"{table_path}:1", "save as CSV UTF-8; if quotes are plain, quotes = False"
    try:
        for cells in rows:
            last = max((n for n, cell in enumerate(cells, 1) if cell.strip()), default=0)
            parts = [line for line in delimiter.join(cells).split("\n") if line.strip()]
            fit = {line.count(delimiter) for line in parts} == {first.count(delimiter)}
            if fit and len(parts) > 1 and quotes == "auto":
                fault = f"{len(parts)} lines that may be rows of their own, from {parts[0]!r:.40}"
                raise InputError(f"{location}: {fault}; if not, set quotes = True; {plain}")
            if not header:
                names = cells
                header = [cell.strip() or f"column {n}" for n, cell in enumerate(cells[:last], 1)]
                if len(set(header)) < len(header):
                    raise InputError(f"{location}: columns of one name in {header}")
            elif last and (len(cells) < len(header) or last > len(header)):
                sizes = f"{len(cells)} cells under {len(header)} columns"
                raise InputError(f"{location}: {sizes}: some left out, or {delimiter!r} unquoted")
            elif last and cells != names:  # two files were joined
                yield location, dict(zip(header, cells))
            location = f"{table_path}:{rows.line_num + 1 + bool(separator)}"
    except csv.Error as error:
        raise InputError(f"{location}: {error}; double quotes in cells, or {plain}") from None


def read_lines(data_path):
    """Yield ("file:line", line) for each line of a text file in UTF-8."""
    with open(data_path, "rb") as file:
        for number, line in enumerate(file, 1):
            location = f"{data_path}:{number}"
            yield location, decode_utf8(location, line)


def decode_utf8(location, content):
    """Return bytes in UTF-8 as a string without byte order marks, or raise InputError."""
    with suppress(UnicodeDecodeError):
        text = content.decode("utf-8")
        if "\0" not in text:
            return text.lstrip("\ufeff")
    says = re.sub(rb"^[\t -~]+(?=[\t -~]{9})", b"", content)[:30].decode("cp1252", "ignore")
    remedy = f"unpack; or iconv -f GB18030 (or UTF-16; WINDOWS-1252: {says!r}) -t UTF-8 OLD > NEW"
    raise InputError(f"{location}: not text in UTF-8; in Excel save as CSV UTF-8; {remedy}")


@contextmanager
def atomic_write(out_path):
    """Give a temporary path, which at the end replaces out_path: never half a file."""
    target = os.path.realpath(out_path)  # a symbolic link stays one
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        yield f"{target}.tmp"
        with open(f"{target}.tmp", "rb+") as file:
            os.fsync(file.fileno())  # a power cut cannot lose it
        os.replace(f"{target}.tmp", target)
    except (OSError, RuntimeError) as error:  # full disk; the latter of torch.save
        raise InputError(f"{out_path}: cannot be written ({error})") from None
    finally:
        with suppress(OSError):
            os.remove(f"{target}.tmp")


class InputError(ValueError):
    """An error the user can fix: in a file, a line of it, or a constant. One sentence."""


def run_script(main, takes_texts=False):
    """Call main(); errors of the user end it with a line, Ctrl-C and SIGTERM with none."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console may not be able to show Chinese
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    options = sys.argv[1:]
    if takes_texts:  # all but what starts with a hyphen, up to --
        options = takewhile(lambda text: text != "--", options)
        options = [text for text in options if text.startswith("-")]
    try:
        if {"-h", "--help"} & {*options[:1]}:
            return print(sys.modules["__main__"].__doc__)
        if options:
            raise InputError(f"{options[0]!r}: settings are constants at the top; see --help")
        main()
    except BrokenPipeError:  # as in: python predict.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is not interrupted
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            error = "out of GPU memory; halve batch_size (in train.py double accumulation_steps)"
        elif isinstance(error, FileNotFoundError):
            error = f"{error.filename}: {error.strerror}; paths start from {os.getcwd()}"
        elif not isinstance(error, (InputError, OSError)):
            raise
        if not is_main_process():
            time.sleep(10)  # rank 0 reports it, then torchrun ends the others
        sys.exit(f"error: {error}")


def get_world_size():
    """Return the number of processes of torchrun; 1 without it."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")  # a cluster may set some
    numbers = [os.environ.get(name, "") for name in names]
    return int(numbers[0]) if all(map(str.isdecimal, numbers)) else 1


def is_main_process():
    """Return whether this process prints and writes files: the only one, or rank 0."""
    return get_world_size() == 1 or os.environ["RANK"] == "0"


def log(event, message="", **fields):
    """Print `event message key=value …`, wrapped; each line starts with the event."""
    if is_main_process():
        text = " ".join([message, *(f"{key}={value}" for key, value in fields.items())]).strip()
        for line in textwrap.wrap(escape(text), 91, break_long_words=False, break_on_hyphens=False):
            print(f"{event:<8} {line}", flush=True)


def escape(text):
    """Return a text with line breaks and other invisible characters as escapes."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c)[0] == "C" else c for c in text)


def main():
    """Preprocess with the constants above."""
    paths = (train_data_path, dev_data_path, test_data_path)
    if table_path:
        split_table(table_path, paths)
    elif os.path.isdir("./data/sample") and not any(map(os.path.exists, paths)):
        sample = [f"./data/sample/{os.path.basename(path)}" for path in paths]
        write_data_files(paths, [[row for _, row in read_jsonl(path)] for path in sample])
        log("note", "no data yet: copied ./data/sample; for your own table set table_path")
    preprocess(train_data_path, label2idx_path, other_paths=paths[1:])


if __name__ == "__main__":
    run_script(main)
