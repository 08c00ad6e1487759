"""The code blocks and commands of README and docs, as they stand there."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from project import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a command begins with, behind variables of the environment. What else is indented is a formula or output.
PROGRAMS = ("make", "pip", "python", "torchrun", "accelerate", "cpo-kernels")
# What the fences of documents may hold that is neither Python nor a shell's.
PICTURES_AND_TEXT = ("mermaid", "text", "yaml", "json")
NOT_RUN = re.compile(r"<!-- not run: (\S.*?) -->", re.DOTALL)
VARIABLE = re.compile(r"\w+=.*", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command of a shell, split into words without comments; where it stands, and whether within a sentence."""

    place: str
    words: tuple[str, ...]
    mentioned: bool = False

    @property
    def arguments(self) -> list[str]:
        """The command's words behind variables of the environment, the program first."""
        words = list(self.words)
        while words and VARIABLE.fullmatch(words[0]):
            words.pop(0)
        return words

    @property
    def program(self) -> str:
        return self.arguments[0] if self.arguments else ""


@dataclass(frozen=True)
class Block:
    """A block of code: the line of the page before its first, its language, and why it is not run, if it is not."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line + 1}"

    def commands(self) -> list[Command]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [Command(self.place, words) for words in map(words_of, lines) if words]

    def compiled(self):
        """Code that tracebacks show with the lines of the page."""
        return compile("\n" * self.line + self.text, str(self.page), "exec")


@dataclass
class Document:
    """A page: its blocks in order, and the commands that its sentences and tables mention."""

    page: Path
    text: str
    blocks: list[Block] = field(default_factory=list)
    mentioned: list[Command] = field(default_factory=list)

    def of(self, language: str) -> list[Block]:
        return [block for block in self.blocks if block.language == language]


def words_of(line: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(line, comments=True))
    except ValueError:  # a formula with an apostrophe
        return ()


def is_command(words: tuple[str, ...]) -> bool:
    return Command("", words).program in PROGRAMS


def read(page: Path) -> Document:
    """Read a page as GitHub does."""
    text = page.read_text(encoding="utf-8")
    document = Document(page, text)
    reason = None
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in ("fence", "code_block"):
            fenced = token.type == "fence"
            language = token.info if fenced else "text"
            if not fenced and is_command(words_of(token.content.splitlines()[0])):
                language = "sh"
            document.blocks.append(Block(page, token.map[0] + fenced, language, token.content, reason))
        for child in token.children or ():
            words = words_of(child.content) if child.type == "code_inline" else ()
            if len(words) > 1 and is_command(words):
                document.mentioned.append(
                    Command(f"{page.relative_to(ROOT)}:{token.map[0] + 1}", words, mentioned=True)
                )
        matched = NOT_RUN.fullmatch(token.content.strip()) if token.type == "html_block" else None
        reason = matched and matched[1]
    return document
