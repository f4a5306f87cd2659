"""The English and the Chinese page: the same commands, numbers and links, and all of them lead somewhere."""

import re

import pytest

from conftest import root

PAGES = {"english": root / "README.md", "chinese": root / ".github" / "zh-CN.md"}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
SECTIONS = {name: re.split(r"(?m)^## ", text) for name, text in TEXTS.items()}
HEADINGS = [section.splitlines()[0] for section in SECTIONS["english"]]


def code_blocks(section):
    """Return the code blocks of a section without their comments."""
    return [re.sub(r" *# .*", "", block) for block in re.findall(r"```\w*\n(.*?)```", section, re.S)]


def numbers(section):
    """Return the numbers of a section, without thousands separators and without those in code."""
    text = re.sub(r"```.*?```", "", section, flags=re.S).replace(",", "")
    return sorted(set(re.findall(r"\d+(?:\.\d+)?", re.sub(r"\]\(.*?\)", "]", text))))


def links(section):
    """Return the links of a section; those to files from the root of the repository."""
    targets = re.findall(r"\]\((.*?)\)", section)
    return sorted({target.removeprefix("../").removeprefix(".github/") for target in targets})


def test_both_pages_have_the_same_sections():
    assert len(SECTIONS["english"]) == len(SECTIONS["chinese"]) > 9


@pytest.mark.parametrize("position", range(len(HEADINGS)), ids=HEADINGS)
def test_a_section_has_the_same_commands_numbers_and_links_in_both(position):
    english, chinese = SECTIONS["english"][position], SECTIONS["chinese"][position]
    assert code_blocks(english) == code_blocks(chinese)
    assert english.count("\n| ") == chinese.count("\n| ")
    assert numbers(english) == numbers(chinese)
    if position:  # the first lines link to the other page
        assert links(english) == links(chinese)


@pytest.mark.parametrize("page", TEXTS)
def test_a_page_is_short_and_has_no_gaps(page):
    assert len(TEXTS[page].splitlines()) <= 230
    assert not re.findall(r"@\w+@", TEXTS[page])


@pytest.mark.parametrize(
    "path",
    [*PAGES.values(), *(root / folder / "README.md" for folder in ("data", "model", "tests"))],
    ids=lambda p: str(p.relative_to(root)),
)
def test_links_to_files_lead_somewhere(path):
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("page", TEXTS)
def test_constants_that_are_named_exist(page):
    """`name = value` in a page is a line at the top of a script; not those of the article, nor FastAPI's."""
    scripts = "\n".join(path.read_text(encoding="utf-8") for path in root.glob("*.py"))
    for name in re.findall(r"(?m)(?:`|^)([a-z_]+) = ", TEXTS[page]):
        assert re.search(rf"(?m)^{name} = ", scripts) or name in ("hidden_size", "class_num", "app"), name


def test_the_picture_shows_the_metrics():
    assert "epoch/micro_f1" in (root / ".github" / "curves.svg").read_text(encoding="utf-8")
