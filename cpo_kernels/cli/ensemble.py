"""``cpo-kernels ensemble``: the average of two models' weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .errors import input_errors


def run(arguments: Sequence[str]) -> None:
    """Write the model whose weights are ``alpha`` of the first's and ``1 - alpha`` of the second's."""
    options = _parser().parse_args(arguments)
    from cpo_kernels.trainer.ensemble import ensemble_checkpoints

    from .inputs import whole_files

    with input_errors(RuntimeError, OSError), whole_files(options.cpo_dir, options.mle_dir):
        ensemble_checkpoints(options.cpo_dir, options.mle_dir, options.out, options.alpha)
    print(f"saved to {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cpo-kernels ensemble",
        description="Averages the weights of two models that were trained from the same one, such as with CPO and with "
        "MLE: alpha * CPO + (1 - alpha) * MLE.",
        epilog="example: cpo-kernels ensemble runs/cpo runs/mle runs/both --alpha 0.5",
    )
    parser.add_argument("cpo_dir", metavar="CPO_DIR", help="the first model, as train left it")
    parser.add_argument("mle_dir", metavar="MLE_DIR", help="the second model")
    parser.add_argument("out", metavar="OUT", help="directory to write to")
    parser.add_argument("--alpha", type=float, default=0.5, help="weight of the first, in [0, 1] (default: 0.5)")
    return parser
