"""What CPO does to a model's own texts, measured: arms, seeds and tests are fixed in ``protocol.py``.

    python examples/study/study.py [--quick] [--data FILE] [--judge-data FILE] [--out DIR]

An interrupted study goes on where it was. The report is written to ``--report``, and every figure of it to a JSON file
beside it. In full it takes about an hour and a half on two cores, with ``--quick`` about three minutes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from protocol import FULL, quick
from report import write_report
from runs import Study


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seeds and few steps: for a look, not for conclusions")
    parser.add_argument("--data", metavar="FILE", help="plain text, paragraphs separated by blank lines")
    parser.add_argument("--judge-data", metavar="FILE", help="plain text for the judge; default: a part of the data")
    parser.add_argument("--out", type=Path, help="results of single runs (default: study_output, with -quick)")
    parser.add_argument("--report", type=Path, help="where the report goes (default: report.md in that folder)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    return parser.parse_args()


def main() -> None:
    """Run the study and write its report."""
    arguments = parse_arguments()
    protocol = quick() if arguments.quick else FULL
    out = arguments.out or Path("study_output-quick" if arguments.quick else "study_output")
    study = Study(protocol, out, arguments.data, arguments.judge_data)
    results = study.run(arguments.workers)
    path = arguments.report or out / "report.md"
    write_report(protocol, results, path)
    print(f"The report: {path}")


if __name__ == "__main__":
    main()
