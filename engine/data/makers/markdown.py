"""Rows from Markdown pages with front matter and fenced code."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from engine.data.corpus.records import Record, new_record
from engine.storage import strict_yaml

SUFFIXES = (".md", ".markdown")
SHORTEST_PROSE = 80
"""Characters of a section's text that becomes an answer."""

_HEAD = re.compile(r"\A\ufeff?---[ \t]*\n(.*?\n)??(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FENCE = re.compile(r"(?P<indent> {0,3})(?P<mark>`{3,}|~{3,})[ \t]*(?P<info>[^\n]*)$")
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$")
_ALIASES = {"py": "python", "python3": "python", "js": "javascript", "ts": "typescript",
            "sh": "bash", "shell": "bash", "yml": "yaml", "rs": "rust"}  # fmt: skip


class PageFault(ValueError):
    """A page that cannot be used; the message says what was found."""


@dataclass(frozen=True)
class PageBlock:
    """A paragraph, or fenced code with its language; `line` counts from 1."""

    text: str
    heading: str
    line: int
    language: str | None = None


@dataclass
class Page:
    """A page: its front matter, its title, and its blocks in order."""

    about: dict[str, Any]
    title: str
    blocks: list[PageBlock] = field(default_factory=list)

    @property
    def eligible(self) -> bool:
        """Whether its author lets it be trained on."""
        return self.about.get("training_eligible") is True


def read_page(text: str, name: str) -> Page:
    """Parse a page.

    Args:
        text: of the page.
        name: its title where neither front matter nor a heading of it has one.

    Raises:
        PageFault: the front matter is broken, or a key of it has the wrong type.
    """
    text = text.replace("\r\n", "\n")
    head = _HEAD.match(text)
    about = _front_matter(head[1] or "") if head else {}
    body = text[head.end() :] if head else text
    first = text[: head.end()].count("\n") + 1 if head else 1
    blocks = list(_blocks(body.split("\n"), first))
    headings = [block.heading for block in blocks if block.heading]
    title = str(about.get("title") or (headings[0] if headings else name))
    return Page(about, title, [block for block in blocks if block.text])


def page_rows(page: Page, source: str, languages: Collection[str], mode: str) -> list[Record]:
    """Rows of a page.

    Args:
        page: read before.
        source: path of the page; rows have `source:line`.
        languages: of the code that becomes answers.
        mode: `code`, `prose` (the text of sections), or `both`.
    """
    rows = []
    wanted = {plain_language(language) for language in languages}
    if mode in ("code", "both"):
        rows += list(_code_rows(page, source, wanted))
    if mode in ("prose", "both"):
        rows += list(_prose_rows(page, source))
    return rows


def plain_language(info: str) -> str:
    """The language that the words after a fence name: `{.py title="x"}` is python."""
    word = re.split(r"[\s,}]", info.strip().lstrip("{.").strip(), maxsplit=1)[0].lower()
    return _ALIASES.get(word, word)


def _front_matter(text: str) -> dict[str, Any]:
    try:
        about = strict_yaml.load(text) or {}
    except yaml.YAMLError as error:
        raise PageFault(f"front matter that is no YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(about, dict):
        raise PageFault("front matter that is no mapping of keys")
    if about.get("training_eligible") not in (None, True, False):
        value = about["training_eligible"]
        raise PageFault(f"training_eligible: {value!r}, where true or false was expected")
    for key in ("title", "category", "difficulty"):
        if isinstance(about.get(key), dict | list):
            raise PageFault(f"'{key}' that is no text")
    if isinstance(about.get("constructs"), dict):
        raise PageFault("'constructs' that is no list")
    return about


def _blocks(lines: list[str], first: int) -> Iterator[PageBlock]:
    """Paragraphs and fenced code; a heading gives a block without text."""
    heading, paragraph, start = "", list[str](), first
    at = 0
    while at < len(lines):
        line, number = lines[at], first + at
        fence, title = _FENCE.match(line), _HEADING.match(line)
        if fence and not ("`" in fence["info"] and fence["mark"][0] == "`"):
            yield PageBlock("\n".join(paragraph), heading, start)
            paragraph = []
            end = _end_of_fence(lines, at + 1, fence["mark"])
            indent = len(fence["indent"])
            code = [re.sub(rf"^ {{0,{indent}}}", "", inner) for inner in lines[at + 1 : end]]
            yield PageBlock(
                "\n".join(code).strip("\n"), heading, number, plain_language(fence["info"])
            )
            at = end + 1
            continue
        if title or not line.strip():
            yield PageBlock("\n".join(paragraph), heading, start)
            paragraph = []
            if title:
                heading = title[2]
                yield PageBlock("", heading, number)
        else:
            start = start if paragraph else number
            paragraph.append(line.strip())
        at += 1
    yield PageBlock("\n".join(paragraph), heading, start)


def _end_of_fence(lines: list[str], start: int, mark: str) -> int:
    close = re.compile(rf" {{0,3}}{mark[0]}{{{len(mark)},}}[ \t]*$")
    return next((at for at in range(start, len(lines)) if close.match(lines[at])), len(lines))


def _code_rows(page: Page, source: str, languages: Collection[str]) -> Iterator[Record]:
    before: PageBlock | None = None
    for block in page.blocks:
        if block.language is None:
            before = block
            continue
        if block.language in languages:
            prompt = f'Show {block.language} code for "{_subject(page, block.heading)}".'
            if before is not None and before.heading == block.heading:
                prompt += f"\n\n{before.text}"
            yield _row(page, prompt, block.text, f"{source}:{block.line}")
        before = None


def _prose_rows(page: Page, source: str) -> Iterator[Record]:
    sections: dict[str, list[PageBlock]] = {}
    for block in page.blocks:
        if block.language is None:
            sections.setdefault(block.heading, []).append(block)
    for heading, blocks in sections.items():
        text = "\n\n".join(block.text for block in blocks)
        if len(text) >= SHORTEST_PROSE:
            prompt = f'Explain "{_subject(page, heading)}".'
            yield _row(page, prompt, text, f"{source}:{blocks[0].line}")


def _subject(page: Page, heading: str) -> str:
    return page.title if heading in ("", page.title) else f"{page.title}: {heading}"


def _row(page: Page, prompt: str, response: str, source: str) -> Record:
    about = page.about
    tags = about.get("constructs") or []
    return new_record(
        prompt,
        response,
        category=_text(about.get("category")),
        tags=[str(tag) for tag in (tags if isinstance(tags, list) else [tags])],
        difficulty=_text(about.get("difficulty")),
        rating=5,
        source=source,
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
