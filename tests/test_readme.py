"""The README: English and Chinese say the same, and both name every constant."""
import ast
import re

import pytest

from conftest import root

README = (root / "README.md").read_text(encoding="utf-8")
ENGLISH, CHINESE = README.split("\n## 中文\n")
SECTIONS = list(zip(re.split(r"(?m)^## ", ENGLISH)[3:], re.split(r"(?m)^### ", CHINESE)[3:]))  # after What you see


def code(text):
    """Return the code blocks without comments, and the code within lines, sorted."""
    blocks = [re.sub(r" *#.*", "", block) for block in re.findall(r"```\w*\n(.*?)```", text, re.S)]
    return blocks, sorted(set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))))


def test_both_have_the_same_sections():
    assert ENGLISH.count("\n## ") == CHINESE.count("\n### ") and len(SECTIONS) > 15


@pytest.mark.parametrize("english, chinese", SECTIONS, ids=[english.splitlines()[0] for english, _ in SECTIONS])
def test_a_section_has_the_same_code_numbers_and_links_in_both(english, chinese):
    assert code(english)[0] == code(chinese)[0]
    ours = [names for names in code(english)[1] if names not in code(chinese)[1] and re.fullmatch(r"[\w./=\" -]+", names)]
    assert [name for name in ours if "text" not in name] == []
    assert english.count("\n| ") == chinese.count("\n| ")
    for pattern in (r"\d+\.\d+", r"https?://[^)\s`\"]+"):
        assert sorted(set(re.findall(pattern, english))) == sorted(set(re.findall(pattern, chinese)))


@pytest.mark.parametrize("script", ["data_preprocess", "bert_multilabel_cls", "data_helper", "train", "predict"])
def test_every_constant_is_in_both_tables(script):
    """What is assigned at the top of a script before its first function, and has a comment that says what it does."""
    lines = (root / f"{script}.py").read_text(encoding="utf-8").splitlines()
    named = [line.split(" = ")[0] for line in lines if re.match(r"[a-z]\w* = ", line)]
    body = ast.parse("\n".join(lines)).body
    top = {target.id for node in body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)}
    inner = {"special_tokens", "chinese", "classifier", "dtypes", "saved_parts", "saved_values"}  # nobody's to set
    for half in (ENGLISH, CHINESE):
        assert [name for name in named if name in top - inner and not name.startswith("scratch_") and f"`{name}" not in half] == []


def test_the_picture_is_there():
    [path] = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert "dev/micro_f1" in (root / path).read_text(encoding="utf-8")
