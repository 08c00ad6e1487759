"""One process of the command in test_cli_finished.py."""

from __future__ import annotations

import sys

from cpo_kernels.__main__ import command

if __name__ == "__main__":
    sys.exit(command())
