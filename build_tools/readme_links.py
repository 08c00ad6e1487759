"""README as it is shown elsewhere, on PyPI for instance: a link to a file of the repository says where that is."""

from __future__ import annotations

import re

# [text](target) and ![text](target); a target with a scheme, or within the page, is complete.
LINK = re.compile(r"(!?)(\[[^\]]*\])\((?![a-z][a-z0-9+.-]*:|#)([^)\s]+)\)", re.IGNORECASE)


def with_absolute_links(text: str, source: str, version: str) -> str:
    """Links to files lead to the tag of this version in the repository ``source``; pictures to their bytes."""

    def absolute(link: re.Match[str]) -> str:
        picture, label, target = link.groups()
        kind = "raw" if picture else "blob"
        return f"{picture}{label}({source}/{kind}/v{version}/{target})"

    return LINK.sub(absolute, text)
