"""Writes the pages of docs/ that are made from the code, options.md and api.md: `make docs-pages`.

    python -m build_tools.docs_pages [--check]

With --check nothing is written, and the exit status is 1 if a page is not what it would be.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from build_tools import api_page, options_page

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {"options.md": options_page.page, "api.md": api_page.page}


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page differs")
    check = parser.parse_args().check
    changed = [name for name, page in PAGES.items() if (DOCS / name).read_text(encoding="utf-8") != page()]
    for name in changed:
        print(name)
        if not check:
            (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
