"""How long `pip install .` takes in a fresh environment, once everything is downloaded.

    python build_tools/time_install.py

The source is a clean copy of what git knows, so nothing is compiled beforehand. Dependencies such as torch are not
installed; what the build needs is, from a folder.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build_requirements() -> list[str]:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^requires = \[(.+)\]$", settings, re.MULTILINE)
    return re.findall(r'"(.+?)"', listed)


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def copy_source(folder: Path) -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        packages, source, fresh = (Path(temporary) / name for name in ("packages", "source", "fresh"))
        pip = [str(fresh / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([sys.executable, "-m", "venv", fresh], check=True)
        subprocess.run([*pip, "download", "--dest", packages, *build_requirements()], check=True)
        copy_source(source)
        load, used = os.getloadavg()[0], processor_seconds()
        begin = time.monotonic()
        install = [*pip, "install", "--no-deps", "--no-index", "--find-links", packages, source]
        subprocess.run(install, check=True)
        seconds, used = time.monotonic() - begin, processor_seconds() - used
    print(
        f"pip install . took {seconds:.0f} s on {os.cpu_count()} cores, {used:.0f} s of processor time; load average "
        f"before it: {load:.1f}"
    )


if __name__ == "__main__":
    main()
