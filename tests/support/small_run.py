"""Runs a small forward and backward of everything that a backend computes: what compute-sanitizer watches.

`python tests/support/small_run.py cuda`. Sizes are odd, so that tails, masks and unaligned rows are among what
runs.
"""

from __future__ import annotations

import argparse

import torch

from cpo_kernels import CandidateLayout, linear_cpo_loss, linear_sequence_logps, token_logps
from cpo_kernels.kernels import registry
from cpo_kernels.kernels.cuda import groups as cuda_groups
from cpo_kernels.kernels.cuda import hopper as cuda_hopper
from cpo_kernels.kernels.cuda import rows as cuda_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
V, H = 1009, 64
HEADS = ({}, {"logit_scale": 0.7, "softcap": 5.0, "temperature": 1.2})


def logits_form(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Run row kernels over logits that exist."""
    targets = torch.randint(0, V, (5, 3), device=device)
    targets[1, 1] = -100
    for head in HEADS:
        logits = torch.randn(5, 3, V, device=device).to(dtype).requires_grad_()
        token_logps(logits, targets, backend=backend, **head).sum().backward()


def linear_form(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Run the engine, padded and packed with shared rows, and log-likelihoods without gradients."""
    weight = torch.randn(V, H, device=device).to(dtype).requires_grad_()
    hidden = torch.randn(3, 3, 4, H, device=device).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (3, 3, 4), device=device)
    targets[1, 2, 1:] = -100
    rows = torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 5, 7, 8, 9], device=device)
    layout = CandidateLayout([0, 3, 6, 9, 12], [0, 2, 4], rows=rows)
    for head in HEADS:
        # Float32 logits take half-precision gradients over them.
        for budget, logits_dtype in ((None, None), (5 * V * dtype.itemsize, None), (None, torch.float32)):
            given = {"backend": backend, "max_logits_bytes": budget, "logits_dtype": logits_dtype, **head}
            (3 * linear_cpo_loss(hidden, weight, targets, **given).loss).backward()
            packed = linear_cpo_loss(hidden.flatten(0, 2)[:10], weight, targets.flatten()[:12], layout=layout, **given)
            packed.loss.backward()
            with torch.no_grad():
                linear_sequence_logps(hidden, weight, targets, **given)


def one_launch(device: torch.device, dtype: torch.dtype) -> None:
    """Run the cooperative launch of the whole objective: groups of three candidates with four slots each.

    Three groups, and so many rows that blocks take several, however many there are of them.
    """
    blocks = 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    for groups in (3, blocks * 2 // 12 + 1):
        for head in ((1.0, 0.0, 1.0), (0.7, 5.0, 1.2)):
            objective_of(groups, head, device, dtype)


def objective_of(groups: int, head: tuple[float, float, float], device: torch.device, dtype: torch.dtype) -> None:
    """Run the objective without a gradient, with a separate one, and with one over the logits."""
    rows = 12 * groups
    targets = torch.randint(0, V, (rows,), device=device)
    targets[20:24] = -100
    starts = torch.arange(0, rows + 1, 4, device=device)
    lengths = (targets != -100).view(-1, 4).sum(1)
    objective = {"beta": 0.1, "margin": 0.0, "label_smoothing": 0.0, "loss_type": "plackett_luce", "gain": 1.0}
    objective |= {"contrast_weight": 1.0, "mle_weight": 0.5, "length_normalized": False, "max_candidates": 3}
    logits = torch.randn(rows, V, device=device).to(dtype)
    for grad in (None, torch.empty_like(logits), logits):
        cuda_groups.cpo_loss(
            *(logits, targets, grad, starts, None, lengths, None, None, None, *head),
            **objective,
            num_groups=groups,
            num_target_tokens=rows,
        )


def one_read(device: torch.device, dtype: torch.dtype) -> None:
    """Run forward and unit gradient in shared memory: of a block, a cluster, one with room to spare; narrow too."""
    targets = torch.randint(0, V, (7,), device=device)
    targets[5] = targets[4] = targets[3]  # one target, beside rows of several and of none
    starts = torch.tensor([0, 3, 3, 6, 7], device=device)
    slices = (0, 2048, 512) if device.type == "cpu" or torch.cuda.get_device_capability(device)[0] >= 9 else (0,)
    for slice_bytes in slices:
        for grad_dtype in {dtype, torch.float16} if dtype == torch.float32 else {dtype}:
            logits, coef = torch.randn(4, V, device=device).to(dtype), torch.randn(7, device=device)
            head = (None, 1.0, 0.0, 1.0, grad_dtype)
            stats, _ = cuda_rows.unit_forward_(logits, targets, starts, *head, slice_bytes=slice_bytes)
            cuda_rows.unit_finish_(logits, targets, starts, stats, coef, *head)


# (R, H) of the fused linear path: less than a tile; two blocks a cluster, and more steps along H than stages.
LINEAR_SIZES = ((5, H), (300, 9 * 64))


def hopper_linear(device: torch.device, dtype: torch.dtype) -> None:
    """Run the fused linear path of sm_90, alone and with the exponentials that its gradient overwrites."""
    for rows, width in LINEAR_SIZES:
        hidden, weight = (torch.randn(n, width, device=device).to(dtype) for n in (rows, V))
        targets = torch.randint(0, V, (rows + 2,), device=device)
        starts = torch.arange(rows + 1, device=device)
        starts[1:] += 2  # three tokens in the first row
        for head in ((1.0, 0.0, 1.0), (0.7, 5.0, 1.2)):
            cuda_hopper.linear_forward(hidden, weight, targets, starts, None, *head)
            kept = cuda_hopper.new_kept(hidden, weight, targets)
            stats, logps = cuda_hopper.linear_forward(hidden, weight, targets, starts, None, *head, kept)
            cuda_hopper.linear_backward_(kept, targets, starts, stats, logps, torch.ones_like(logps), *head)


def main(argv: list[str] | None = None) -> None:
    """Run one backend on its device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=registry.available())
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    for dtype in DTYPES:
        logits_form(args.backend, args.device, dtype)
        linear_form(args.backend, args.device, dtype)
        if args.backend == "cuda":
            one_launch(args.device, dtype)
            one_read(args.device, dtype)
            if dtype != torch.float32 and torch.cuda.get_device_capability(args.device) == (9, 0):
                hopper_linear(args.device, dtype)
    if args.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
