"""Pictures of what a stranger sees first, in docs/screens: README's first screen, and pages of the site.

`make screens`, after `make docs`; needs Debian's package chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "screens"
PAGES = ("index", "trl", "options")  # of the site
WIDTH, HEIGHT, COLOURS = 1000, 1000, 64
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")
# About as GitHub shows a README.
STYLE = """<!doctype html><meta charset=utf-8><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 900px; margin: 24px auto; padding: 0 24px; color: #1f2328 }
code, pre { background: #f6f8fa; border-radius: 6px; font: 13px monospace } pre { padding: 12px; overflow: auto }
img { max-width: 100% } h1, h2 { border-bottom: 1px solid #d0d7de } a { color: #0969da; text-decoration: none }
</style>"""


def take(page: Path, picture: Path) -> None:
    """Write the first screen of a page, in few colours."""
    with tempfile.TemporaryDirectory() as profile:
        own = (f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}")
        command = ["chromium", *OPTIONS, *own, "--hide-scrollbars", page.as_uri()]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=120)
    Image.open(picture).convert("RGB").quantize(COLOURS).save(picture, optimize=True)


def main() -> int:
    """Write all of them; 1 if something that it takes is not there."""
    missing = [page for page in PAGES if not (ROOT / "build" / "site" / f"{page}.html").exists()]
    if shutil.which("chromium") is None or missing:
        print("needs chromium (apt-get install chromium), and the site (make docs)", file=sys.stderr)
        return 1
    OUT.mkdir(exist_ok=True)
    text = MarkdownIt("gfm-like", {"linkify": False, "html": True}).render((ROOT / "README.md").read_text("utf-8"))
    with tempfile.NamedTemporaryFile("w", dir=ROOT, suffix=".html", encoding="utf-8") as page:
        page.write(STYLE + text)
        page.flush()
        take(Path(page.name), OUT / "readme.png")
    for name in PAGES:
        take(ROOT / "build" / "site" / f"{name}.html", OUT / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
