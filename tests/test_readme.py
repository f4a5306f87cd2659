"""The English and the Chinese page say the same and what is so; the scripts keep their budget."""

import ast
import re
import unicodedata

import pytest

from conftest import root

PAGES = {"english": root / "README.md", "chinese": root / ".github" / "zh-CN.md"}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
SECTIONS = {name: re.split(r"(?m)^## ", text) for name, text in TEXTS.items()}
HEADINGS = [section.splitlines()[0] for section in SECTIONS["english"]]
SCRIPTS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(root.glob("*.py"))}
TREES = {name: ast.parse(text) for name, text in SCRIPTS.items()}


def without_code(text):
    """Return a page without its blocks of code."""
    return re.sub(r"```.*?```", "", text, flags=re.S)


def code_blocks(section):
    """Return the code blocks of a section without their comments."""
    blocks = re.findall(r"```\w*\n(.*?)```", section, re.S)
    return [re.sub(r" *# .*", "", block) for block in blocks]


def numbers(section):
    """Return the numbers of a section, without thousands separators and without those in code."""
    text = re.sub(r"\]\(.*?\)", "]", without_code(section)).replace(",", "")
    return sorted(set(re.findall(r"\d+(?:\.\d+)?", text)))


def links(section):
    """Return the links of a section; those to files from the root of the repository."""
    targets = re.findall(r"\]\((.*?)\)", section)
    return sorted({target.removeprefix("../").removeprefix(".github/") for target in targets})


def columns(line):
    """Return how wide a line is: a Chinese character takes two columns."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line)


def count_nodes(*kinds):
    """Return how many nodes of these kinds the scripts have, at any depth."""
    return sum(isinstance(node, kinds) for tree in TREES.values() for node in ast.walk(tree))


def test_both_pages_have_the_same_sections():
    assert len(SECTIONS["english"]) == len(SECTIONS["chinese"]) > 7


@pytest.mark.parametrize("position", range(len(HEADINGS)), ids=HEADINGS)
def test_a_section_has_the_same_commands_numbers_and_links_in_both(position):
    english, chinese = (SECTIONS[name][position : position + 1] for name in SECTIONS)
    for look in (code_blocks, numbers, lambda section: section.count("\n| ")):
        assert [*map(look, english)] == [*map(look, chinese)]
    if position:  # the first lines link to the other page
        assert [*map(links, english)] == [*map(links, chinese)]


@pytest.mark.parametrize("page", TEXTS)
def test_a_page_is_short_and_has_no_gaps(page):
    assert len(without_code(TEXTS["english"]).split()) <= 1200
    too_long = [
        line
        for line in TEXTS[page].splitlines()
        if columns(line) > 100 and not line.startswith("|") and "](" not in line
    ]
    assert not too_long
    gaps = re.findall(r"@\w+@|\bTODO\b|(?m:^[A-Z]+_[A-Z_]+$)|\bFIRST_\w+", TEXTS[page])
    assert not gaps


@pytest.mark.parametrize(
    "path",
    [*PAGES.values(), *(root / folder / "README.md" for folder in ("data", "model", "tests"))],
    ids=lambda path: str(path.relative_to(root)),
)
def test_links_to_files_lead_somewhere(path):
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("page", TEXTS)
def test_what_is_named_exists(page):
    """`name = value` is a constant, `file.py` is there."""
    scripts = "\n".join(SCRIPTS.values())
    for name in re.findall(r"(?m)(?:`|^)([a-z_0-9]+) = ", TEXTS[page]):
        assert re.search(rf"(?m)^{name} = ", scripts), name
    for module, name in re.findall(r"\b(train|predict|data_\w+)\.([a-z_0-9]+) = ", TEXTS[page]):
        assert re.search(rf"(?m)^{name} = ", SCRIPTS[module]), name
    for name in re.findall(r"(?:`|python )((?:tests/)?\w+\.py)\b", TEXTS[page]):
        assert (root / name).exists(), name
    tables = re.findall(r"(?m)^\| .*`(\w+)` in `(\w+)\.py`", TEXTS[page])
    for name, module in tables:
        assert re.search(rf"(?m)^\s*(def {name}\(|class {name}\(|{name} = )", SCRIPTS[module]), name


@pytest.mark.parametrize("page", TEXTS)
def test_the_number_of_lines_that_is_stated_is_right(page):
    lines = sum(text.count("\n") for text in SCRIPTS.values())
    stated = re.search(r"([\d,]{4,})\s+(?:lines|行)", TEXTS[page])
    assert stated and int(stated[1].replace(",", "")) == pytest.approx(lines, rel=0.05)


def test_the_picture_shows_the_metrics():
    assert "epoch/micro_f1" in (root / ".github" / "curves.svg").read_text(encoding="utf-8")


def test_the_scripts_are_read_in_one_sitting():
    names = ["bert_multilabel_cls", "data_helper", "data_preprocess", "predict", "train"]
    assert [*SCRIPTS] == names
    assert sum(text.count("\n") for text in SCRIPTS.values()) <= 2200
    assert sum(map(len, SCRIPTS.values())) <= 118_000
    assert count_nodes(ast.FunctionDef, ast.ClassDef) <= 140
    nodes = [node for tree in TREES.values() for node in tree.body]
    assert sum(isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) for node in nodes) <= 60


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_takes_few_names_of_another(name):
    lines = SCRIPTS[name].splitlines()
    assert len(lines) <= 460 and not [line for line in lines if columns(line) > 100]
    imports = [node for node in TREES[name].body if isinstance(node, ast.ImportFrom)]
    for other in SCRIPTS:
        assert sum(len(node.names) for node in imports if node.module == other) <= 30
    order = ["data_preprocess", "bert_multilabel_cls", "data_helper", "train", "predict"]
    modules = {node.module for node in imports} & {*SCRIPTS}
    assert all(order.index(module) < min(order.index(name), 3) for module in modules)
    (train,) = [
        f for f in TREES["train"].body if isinstance(f, ast.FunctionDef) and f.name == "train"
    ]
    assert train.end_lineno - train.lineno < 95
