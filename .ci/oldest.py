"""Prints the lower bound of every requirement in pyproject.toml as an exact one, which `make test-oldest` installs.

Exit status 1 where a requirement has no lower bound, or two different ones.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
TABLES = ("build-system", "project", "project.optional-dependencies")
REQUIREMENT = re.compile(r"([A-Za-z][\w.-]*)(\[[\w,-]+\])?\s*(?:>=\s*([\w.]+))?\s*(;.*)?")


def requirements(text: str) -> list[str]:
    """The strings of all lists of requirements. Python 3.10 has no parser of TOML, and the file's format is simple."""
    text = re.sub(r"\s+#.*$", "", text, flags=re.MULTILINE)
    tables = dict(re.findall(r"^\[([\w.-]+)\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL))
    lists = [
        body
        for table in TABLES
        for name, body in re.findall(r"^([\w-]+) = \[(.*?)\]$", tables[table], re.MULTILINE | re.DOTALL)
        if table != "project" or name == "dependencies"
    ]
    return [requirement for body in lists for requirement in re.findall(r'"([^"]+)"', body)]


def oldest(text: str) -> dict[str, str]:
    """The exact requirement by name."""
    own = re.search(r'^name = "(.+)"$', text, re.MULTILINE)
    bounds: dict[str, str] = {}
    for requirement in requirements(text):
        matched = REQUIREMENT.fullmatch(requirement)
        if matched is None:
            raise SystemExit(f"{requirement!r} is not of the form name>=version")
        name, _, version, marker = matched.groups()
        if own and name == own[1]:
            continue
        if version is None:
            raise SystemExit(f"{requirement!r} has no lower bound")
        exact = f"{name}=={version}{marker or ''}"
        if bounds.setdefault(name, exact) != exact:
            raise SystemExit(f"two lower bounds: {bounds[name]} and {exact}")
    return bounds


if __name__ == "__main__":
    sys.stdout.write("".join(f"{exact}\n" for exact in oldest(PROJECT.read_text()).values()))
