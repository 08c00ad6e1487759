"""``python -m cpo_kernels info``."""

from __future__ import annotations

import argparse

from cpo_kernels.info import report


def main() -> None:
    """Parses the command line and prints what it asks for."""
    parser = argparse.ArgumentParser(prog="python -m cpo_kernels", description=__doc__)
    parser.add_argument("command", choices=["info"], help="info: versions, backends, instruction set, threads")
    parser.parse_args()
    print(report())


if __name__ == "__main__":
    main()
