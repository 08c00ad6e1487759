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

from benchmarks import bars, environment, page, plots, records
from benchmarks.environment import RESULTS, ROOT, log
from benchmarks.records import Part
from benchmarks.setting import Setting, add_options
from benchmarks.suite import ON_REQUEST, PARTS
from cpo_kernels.negatives.files import write_whole


def run_part(name: str, setting: Setting) -> Part:
    """Measure a part in a fresh process; what it had measured when it died is kept."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.suite", name, "--out", folder, *setting.options]
        status = subprocess.run(command, cwd=ROOT).returncode
        part = records.load(Path(folder) / f"{name}.json").get(name)
    described = environment.describe(["suite", name, *setting.options], setting.device.type)
    return part or Part(name, described, error=f"no result, exit status {status}")


def main(argv: list[str] | None = None) -> int:
    """Run, writes and prints; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in PARTS if name not in ON_REQUEST]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=usual, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--name", help="of the result files (default: the device's)")
    parser.add_argument("--merge", type=Path, metavar="FOLDER", help="take the PART.json files of a folder")
    parser.add_argument("--render", action="store_true", help="measure nothing, write page and plots again")
    add_options(parser)
    args = parser.parse_args(argv)
    described = environment.describe(["report"], args.device.type)
    name = args.name or ("quick" if args.quick else environment.slug(described))
    results = args.output / f"{name}.json"
    parts = records.load(results)
    for part in PARTS if args.merge else ():
        parts |= records.load(args.merge / f"{part}.json")
    for part in () if args.merge or args.render else args.parts:
        log(f"{part} ...")
        parts[part] = run_part(part, Setting.of(args))
        log(f"{part}: {parts[part].seconds:.0f} s {parts[part].error}")
        records.save(parts, results)
    records.save(parts, results)
    write_whole(results.with_suffix(".md"), page.render(parts, name, plots.draw(parts, args.output, name)))
    failed = [f"{part.name} did not finish: {part.error}" for part in parts.values() if part.error]
    print(bars.table(bars.verdicts(parts)), *failed, sep="\n\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
