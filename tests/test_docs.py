"""The Python blocks of the pages in docs/: each runs, section by section; those that cannot run here are compiled."""

import os
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"

_BLOCK: Final = re.compile(r"(<!-- not run: [^\n]+ -->\n)?```python\n(.*?)```", re.DOTALL)


class Section(NamedTuple):
    """The blocks under one heading, which share their variables."""

    page: str
    heading: str
    blocks: list[tuple[bool, str]]  # whether it is to be run, and the code

    def __str__(self) -> str:
        return f"{self.page}: {self.heading}"


def sections() -> list[Section]:
    found = []
    for page in sorted(DOCS.glob("*.md")):
        for text in re.split(r"^## ", page.read_text(), flags=re.MULTILINE):
            blocks = [(match[1] is None, match[2]) for match in _BLOCK.finditer(text)]
            if blocks:
                found.append(Section(page.name, text.partition("\n")[0], blocks))
    return found


@pytest.mark.parametrize("section", sections(), ids=str)
def test_blocks_run(section: Section) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for library in ("tensorflow", "tf_keras", "keras"):
        if any(re.search(rf"^import {library}\b", code, re.MULTILINE) for is_run, code in section.blocks if is_run):
            pytest.importorskip(library, reason="needs the extra 'keras'")
    namespace: dict[str, Any] = {"__name__": f"docs.{Path(section.page).stem}"}
    for number, (is_run, code) in enumerate(section.blocks, 1):
        compiled = compile(code, f"{section}, block {number}", "exec")
        if is_run:
            exec(compiled, namespace)


def test_every_block_is_found() -> None:
    for page in DOCS.glob("*.md"):
        text = page.read_text()
        assert text.count("```python") == len(_BLOCK.findall(text))
        assert text.count("<!-- not run") == sum(bool(marked) for marked, _ in _BLOCK.findall(text))


def test_links_lead_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        text = page.read_text()
        anchors = {
            re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        }
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in anchors, target
            elif "://" not in target:
                assert (page.parent / target.partition("#")[0]).exists(), target
