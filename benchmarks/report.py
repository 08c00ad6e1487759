"""Runs the suite: every part in a process of its own, then one page with every bar, its JSON and its plots.

`make bench`, or `python -m benchmarks.report [--parts heads lengths] [--texts FILE --tokenizer FOLDER]`: for two idle
cores, or a GPU. The results are named after the device; parts that are not run are kept from the file that
is there. `--merge FOLDER` measures nothing but takes the PART.json files that benchmarks.suite left in a folder, maybe
on another machine; `--render` only writes page and plots anew. `python -m benchmarks.publish` takes figures into
README and docs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import environment, page, plots, records
from benchmarks.environment import log
from benchmarks.records import Part, Parts
from benchmarks.setting import Setting, add_options
from benchmarks.suite import ON_REQUEST, PARTS
from cpo_kernels.trainer.files import write_whole

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent


def run_part(name: str, setting: Setting) -> Part:
    """Measure a part in a fresh process; what it had measured when it died is kept."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.suite", name, "--out", folder, *setting.options]
        status = subprocess.run(command, cwd=ROOT).returncode
        part = records.load(Path(folder) / f"{name}.json").get(name)
    if part is None:
        described = environment.describe(["suite", name, *setting.options], setting.device.type)
        part = Part(name, described, error=f"no result, exit status {status}")
    return part


def merge(parts: Parts, folder: Path) -> None:
    """Take the parts of a folder."""
    for name in PARTS:
        parts.update(records.load(folder / f"{name}.json"))


def write(parts: Parts, folder: Path, name: str) -> None:
    """Write `name`.json, `name`.md and the plots."""
    records.save(parts, folder / f"{name}.json")
    pictures = plots.draw(parts, folder, name)
    write_whole(folder / f"{name}.md", page.render(parts, name, pictures))


def main(argv: list[str] | None = None) -> int:
    """Run, write and print; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in PARTS if name not in ON_REQUEST]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=usual, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--name", help="of the result files (default: the device's)")
    parser.add_argument("--merge", type=Path, metavar="FOLDER", help="take the PART.json files of a folder")
    parser.add_argument("--render", action="store_true", help="measure nothing, write page and plots again")
    add_options(parser)
    args = parser.parse_args(argv)
    folder, name = args.output, name_of(args)
    parts = records.load(folder / f"{name}.json")
    if args.merge:
        merge(parts, args.merge)
    for part in [] if args.merge or args.render else args.parts:
        log(f"{part} ...")
        parts[part] = run_part(part, Setting.of(args))
        log(f"{part}: {parts[part].seconds:.0f} s {parts[part].error}")
        records.save(parts, folder / f"{name}.json")
    write(parts, folder, name)
    print(page.headline(parts))
    return 1 if any(part.error for part in parts.values()) else 0


def name_of(args: argparse.Namespace) -> str:
    """Return the name of the result files."""
    if args.name or args.quick:
        return args.name or "quick"
    return environment.slug(environment.describe(["report"], args.device.type))


if __name__ == "__main__":
    sys.exit(main())
