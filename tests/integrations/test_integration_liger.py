"""``cpo_kernels.integrations.liger`` against Liger itself: loss, gradients and the other outputs in order."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from pair_formulas import loss_of_pairs
from tolerance import assert_accurate, relative_error
from torch import Tensor
from torch.testing import assert_close

# A development dependency, which constraints.txt pins and CI installs.
pytest.importorskip("liger_kernel")

from liger_kernel import chunked_loss as theirs
from liger_kernel import transformers as liger_transformers
from liger_kernel.chunked_loss import dpo_loss as liger_dpo
from liger_kernel.transformers import functional as liger_functional

from benchmarks import liger as bench_liger
from benchmarks.measure import ContestantError
from benchmarks.setting import Setting
from cpo_kernels.integrations import liger as ours
from cpo_kernels.integrations.liger import pairs
from cpo_kernels.loss_table import LOSSES

B, T, V, H = 5, 7, 23, 6
ORPO = "LigerFusedLinearORPOLoss"
NAMES = ("LigerFusedLinearCPOLoss", "LigerFusedLinearSimPOLoss", "LigerFusedLinearDPOLoss", ORPO)
OTHERS = ("LigerFusedLinearKTOLoss", "LigerFusedLinearGRPOLoss", "LigerFusedLinearCrossEntropyLoss")
FUNCTIONS = {"cpo": "CPO", "simpo": "SimPO", "dpo": "DPO", "orpo": "ORPO", "kto": "KTO", "grpo": "GRPO"}
AUX = (
    "chosen_logps",
    "rejected_logps",
    "chosen_logits",
    "rejected_logits",
    "nll",
    "chosen_rewards",
    "rejected_rewards",
)
AUX_OF_ORPO = (*AUX, "log_odds_ratio", "log_odds_chosen")
BETA = 0.3


def make_inputs(
    dtype: torch.dtype, *, bias: bool, reference: bool, ignore_index: int = -100, nll_target: bool = False
) -> list[Tensor | None]:
    """lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias in the order of the call, or nll_target."""
    weight, hidden = torch.randn(V, H), torch.randn(2 * B, T, H)
    target = torch.randint(V - 1, (2 * B, T))  # the last word is left for an ignore_index within the vocabulary
    prompt = torch.randint(4, (2 * B, 1))
    target = target.masked_fill(torch.arange(T) < prompt, ignore_index)
    shift = torch.randn(V)
    leaves = [weight, hidden, *([shift] if bias else [])]
    weight, hidden, *shifts = (leaf.to(dtype).requires_grad_() for leaf in leaves)
    inputs = [weight, hidden, target, shifts[0] if bias else None]
    if reference:
        others = (torch.randn(2 * B, T, H), weight.detach().float() + 0.1 * torch.randn(V, H), torch.randn(V))
        ref_hidden, ref_weight, ref_bias = (tensor.to(dtype) for tensor in others)
        inputs += [ref_hidden, ref_weight, ref_bias if bias else None]
    if nll_target:  # of prompts too, but not of the last position
        inputs += [torch.randint(V - 1, (2 * B, T)).masked_fill(torch.arange(T) == T - 1, ignore_index)]
    return inputs


def copies(inputs: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Leaves of another dtype."""
    return [
        x if x is None or not x.is_floating_point() else x.detach().to(dtype).requires_grad_(x.requires_grad)
        for x in inputs
    ]


def values(module: torch.nn.Module, inputs: list[Tensor | None], upstream: float = 1.0) -> dict[str, Tensor]:
    """Loss, the other outputs and the gradients by name."""
    loss, aux = module(*inputs)
    leaves = {name: x for name, x in zip(("weight", "input", "target", "bias"), inputs, strict=False) if x is not None}
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(loss * upstream, list(leaves.values()))
    assert not any(x.requires_grad for x in aux)
    names = AUX_OF_ORPO if type(module).__name__ == ORPO else AUX
    return {"loss": loss.detach(), **dict(zip(names, aux, strict=True)), **dict(zip(leaves, grads, strict=True))}


def dense(module: torch.nn.Module, inputs: list[Tensor | None], upstream: float = 1.0) -> dict[str, Tensor]:
    """The same from logits in the dtype of the inputs, by no code of Liger's or ours."""
    weight, hidden, target, bias, *reference = inputs

    def log_likelihoods(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor = target
    ) -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
        present = target != module.ignore_index
        wide = logits if logits.dtype == torch.float64 else logits.float()
        logps = wide.log_softmax(-1).gather(-1, target.where(present, 0).unsqueeze(-1)).squeeze(-1) * present
        return logits, logps

    present, orpo = target != module.ignore_index, type(module).__name__ == ORPO
    logits, tokens = log_likelihoods(hidden, weight, bias)
    average = getattr(module, "average_log_prob", True)
    divisor = present.sum(-1) if average else 1
    logps = tokens.sum(-1) / divisor
    ref = torch.zeros_like(logps)
    if getattr(module, "use_ref_model", False):
        ref = log_likelihoods(*reference)[1].sum(-1) / divisor
    good, bad = (logps - ref).chunk(2)
    if hasattr(module, "loss_type"):
        sigmoid = module.loss_type == "sigmoid"  # which ignores label_smoothing
        options = {"tau": module.discopop_tau, "smoothing": 0.0 if sigmoid else module.label_smoothing}
        name = "plackett_luce" if sigmoid else module.loss_type
        losses = loss_of_pairs(name, good, bad, module.beta, **options)
    elif orpo:
        odds = (good.exp() / (1 - good.exp())).log() - (bad.exp() / (1 - bad.exp())).log()
        losses = module.beta * (1 + (-odds).exp()).log()
    else:
        difference = module.beta * (good - bad) - getattr(module, "gamma", 0.0)
        losses = (1 - module.label_smoothing) * (1 + (-difference).exp()).log()
        losses = losses + module.label_smoothing * (1 + difference.exp()).log()
    counted = present[:B]
    if orpo and reference:
        target = reference[0]
        counted, tokens = target[:B] != module.ignore_index, log_likelihoods(hidden, weight, bias, target)[1]
    nll = -tokens[:B].sum() / counted.sum() if module.compute_nll_loss else logps.new_zeros(())
    loss = losses.mean() + (module.alpha * nll if module.compute_nll_loss else 0.0)
    means = [half.to(logps.dtype).mean() for half in logits.detach().chunk(2)]
    rewards = module.beta * (logps - ref)
    leaves = {name: x for name, x in (("weight", weight), ("input", hidden), ("bias", bias)) if x is not None}
    grads = torch.autograd.grad(loss * upstream, list(leaves.values()))
    aux = (*logps.chunk(2), *means, nll, *rewards.chunk(2))
    aux += (-losses.mean() / module.beta, odds.mean()) if orpo else ()
    out = {"loss": loss, **dict(zip(AUX_OF_ORPO if orpo else AUX, aux, strict=True))}
    return {name: x.detach() for name, x in out.items()} | dict(zip(leaves, grads, strict=True))


CASES = {
    "cpo": ("LigerFusedLinearCPOLoss", {"alpha": 0.7}),
    "cpo, no nll": ("LigerFusedLinearCPOLoss", {"compute_nll_loss": False, "alpha": 3.0}),
    "cpo, smoothed means": ("LigerFusedLinearCPOLoss", {"label_smoothing": 0.2, "average_log_prob": True}),
    "cpo, pad token": ("LigerFusedLinearCPOLoss", {"ignore_index": V - 1}),
    "simpo": ("LigerFusedLinearSimPOLoss", {"gamma": 0.7}),
    "simpo, smoothed": ("LigerFusedLinearSimPOLoss", {"label_smoothing": 0.1, "alpha": 0.4, "ignore_index": V - 1}),
    "orpo": (ORPO, {}),
    "orpo, no nll": (ORPO, {"compute_nll_loss": False, "ignore_index": V - 1}),
    "orpo, nll of other targets": (ORPO, {"ignore_index": V - 1}),
    "dpo": ("LigerFusedLinearDPOLoss", {}),
    "dpo, nll": ("LigerFusedLinearDPOLoss", {"compute_nll_loss": True, "alpha": 0.5}),
    "dpo, means": ("LigerFusedLinearDPOLoss", {"average_log_prob": True, "ignore_index": V - 1}),
    "dpo, no reference": ("LigerFusedLinearDPOLoss", {"use_ref_model": False}),
}
CASES |= {
    f"dpo, {kind}": ("LigerFusedLinearDPOLoss", {"loss_type": kind, "label_smoothing": 0.1, "discopop_tau": 0.5})
    for kind in ours.DPO_LOSS_TYPES
    if f'"{kind}"' in inspect.getsource(liger_dpo)  # the table may have losses that Liger lacks
}


def make_case(name: str, dtype: torch.dtype, bias: bool) -> tuple[str, dict, list[Tensor | None]]:
    kind, options = CASES[name]
    options = {"beta": BETA} | options
    reference = kind == NAMES[2] and options.get("use_ref_model", True)
    given = {"ignore_index": options.get("ignore_index", -100), "nll_target": "other targets" in name}
    return kind, options, make_inputs(dtype, bias=bias, reference=reference, **given)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_equals_liger(name, dtype, bias):
    """Liger, in float32, says that the oracle computes its loss; the policy says how near ours has to come to it."""
    kind, options, inputs = make_case(name, dtype, bias)
    module = getattr(ours, kind)(**options)
    liger = getattr(theirs, kind)(**options, compiled=False, chunk_size=2)
    oracle = dense(module, copies(inputs, torch.float64), upstream=3.0)
    eager, expected = dense(module, inputs, upstream=3.0), values(liger, inputs, upstream=3.0)
    got = values(module, inputs, upstream=3.0)
    assert got.keys() == expected.keys() == oracle.keys()
    for field, value in got.items():
        assert value.dtype == expected[field].dtype, field
        assert_accurate(value, eager[field], oracle[field], field)
        assert dtype != torch.float32 or relative_error(expected[field], oracle[field]) < 2e-5, f"Liger's {field}"


@pytest.mark.parametrize("kind", [*NAMES, *OTHERS])
def test_constructors_and_calls_take_what_ligers_take(kind):
    source = theirs if hasattr(theirs, kind) else liger_transformers
    for function in ("__init__", "forward"):
        mine, liger = (getattr(getattr(m, kind), function) for m in (ours, source))
        assert arguments_of(mine) == arguments_of(liger)
    assert vars(getattr(ours, kind)()).keys() >= set(inspect.signature(getattr(ours, kind)).parameters)


def arguments_of(function: Callable) -> list[tuple[str, object]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_what_ligers_take(name):
    """Liger's are an autograd function's ``apply``, which takes the arguments of its ``forward`` behind the context."""
    functions = importlib.import_module(f"liger_kernel.chunked_loss.{name}_loss")
    forward = getattr(functions, f"LigerFusedLinear{FUNCTIONS[name]}Function").forward
    assert arguments_of(getattr(ours, f"liger_fused_linear_{name}")) == arguments_of(forward)[1:]


def test_the_function_of_cross_entropy_takes_what_ligers_takes():
    mine, liger = (arguments_of(m.liger_fused_linear_cross_entropy) for m in (ours, liger_functional))
    newest = ("chunk_mem_const", 1)  # Liger 0.8.1 lacks it
    assert mine == (liger if newest in liger else [*liger, newest])


def test_functions_compute_what_the_modules_compute():
    """Every argument reaches the module: each differs from its default."""
    weight, hidden, target, _, *reference = make_inputs(torch.float32, bias=True, reference=True, ignore_index=V - 1)
    shared = {"ignore_index": V - 1, "beta": BETA, "compiled": False, "chunk_size": 3}
    cases = {
        "cpo": {"alpha": 0.3, "label_smoothing": 0.1, "compute_nll_loss": False, "average_log_prob": True},
        "simpo": {"alpha": 0.3, "label_smoothing": 0.1, "compute_nll_loss": True, "gamma": 0.9},
        "orpo": {"compute_nll_loss": False},
        "dpo": {"alpha": 0.3, "compute_nll_loss": True, "average_log_prob": True, "loss_type": "discopop"},
    }
    cases["dpo"] |= {"discopop_tau": 0.4, "label_smoothing": 0.1, "use_ref_model": True}
    for name, own in cases.items():
        options, more = shared | own, reference if name == "dpo" else []
        module = getattr(ours, f"LigerFusedLinear{FUNCTIONS[name]}Loss")(**options)
        expected = module(weight, hidden, target, None, *more)
        got = getattr(ours, f"liger_fused_linear_{name}")(hidden, weight, target, None, *more, **options)
        assert_close((got[0], *got[1]), (expected[0], *expected[1]), rtol=0, atol=0)


def test_what_compares_distributions_is_refused_by_name():
    for name in ("LigerFusedLinearJSDLoss", "liger_fused_linear_cosine"):
        with pytest.raises(ImportError, match=f"{name} compares whole distributions"):
            getattr(ours, name)
    with pytest.raises(AttributeError, match="no attribute 'LigerFusedLinearPPOLoss'"):
        ours.LigerFusedLinearPPOLoss  # noqa: B018


@pytest.mark.parametrize("kind", NAMES)
def test_without_gradients(kind):
    inputs = [x if x is None else x.detach() for x in make_inputs(torch.float32, bias=True, reference=kind == NAMES[2])]
    loss, aux = getattr(ours, kind)()(*inputs)
    expected, others = getattr(theirs, kind)(compiled=False)(*inputs)
    assert not loss.requires_grad
    assert_close((loss, *aux), (expected, *others))


def test_several_chunks_put_their_log_likelihoods_in_order(monkeypatch):
    """The log-likelihoods are collected from the calls of a Python function, one for each chunk of groups."""
    inputs = make_inputs(torch.float32, bias=True, reference=False)
    module = ours.LigerFusedLinearCPOLoss()
    expected, whole, calls = values(module, inputs), pairs.linear_sequence_loss, []

    def in_chunks(hidden, weight, targets, loss_fn, **options):
        def counted(logps, groups):
            calls.append(groups)
            return loss_fn(logps, groups)

        return whole(hidden, weight, targets, counted, max_logits_bytes=2 * T * V * 4, **options)

    monkeypatch.setattr(pairs, "linear_sequence_loss", in_chunks)
    got = values(module, inputs)
    assert len(calls) == B
    for field, value in expected.items():
        assert_close(got[field], value)


def test_compiled_without_a_break():
    kind, options, inputs = make_case("dpo", torch.float32, bias=True)
    module = getattr(ours, kind)(**options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, got = values(module, inputs), values(compiled, inputs)
    for field, value in expected.items():
        assert_close(got[field], value)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("sequences", [0, 1, 5])
def test_sequences_that_do_not_pair_are_refused(kind, sequences):
    """Liger returns a loss of wrong pairs, or without the odd one."""
    target, hidden = torch.randint(V, (sequences, T)), torch.randn(sequences, T, H)
    module = getattr(ours, kind)(**({"use_ref_model": False} if kind == NAMES[2] else {}))
    with pytest.raises(ValueError, match=f"even number, got {sequences} sequences"):
        module(torch.randn(V, H), hidden, target)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(((4, T, H), (4, T + 1)), r"target \(2B, T\), got \(4, 7, 6\) and \(4, 8\)"), (((4 * T, H), (4 * T,)), "_input")],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    hidden, target = torch.randn(shapes[0]), torch.randint(V, shapes[1])
    with pytest.raises(ValueError, match=message):
        ours.LigerFusedLinearCPOLoss()(torch.randn(V, H), hidden, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ipo"}, "loss_type must be one of .*'sigmoid'.* got 'ipo'"),
        ({"loss_type": "exo_pair"}, r"exo_pair' needs label_smoothing in \(0, 1\), got 0.0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "robust' needs label_smoothing"),
    ],
)
def test_options_that_liger_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ours.LigerFusedLinearDPOLoss(**options)
    with pytest.raises(ValueError):
        theirs.LigerFusedLinearDPOLoss(**options)


def test_a_reference_that_is_not_given_is_asked_for():
    inputs = make_inputs(torch.float32, bias=False, reference=False)
    with pytest.raises(ValueError, match="use_ref_model=True needs ref_input and ref_weight"):
        ours.LigerFusedLinearDPOLoss()(*inputs)


def test_a_sequence_without_tokens_has_log_likelihood_zero_as_in_liger():
    inputs = make_inputs(torch.float32, bias=False, reference=False)
    inputs[2][B + 1] = -100
    module, liger = (
        m.LigerFusedLinearCPOLoss(compute_nll_loss=False, **o) for m, o in ((ours, {}), (theirs, {"compiled": False}))
    )
    got, expected = values(module, inputs), values(liger, inputs)
    assert got["rejected_logps"][1] == 0
    for field, value in expected.items():
        assert_close(got[field], value)


@pytest.mark.parametrize("options", [{}, {"compute_nll_loss": False}, {"average_log_prob": True}])
@pytest.mark.parametrize("sequences", [B, 2 * B])
def test_where_all_chosen_or_all_sequences_are_ignored(sequences, options):
    """An NLL is 0 / 0, and means are NaN. Without an NLL Liger's loss and NLL are 0 / 0 too, and ours are not."""
    inputs = make_inputs(torch.float32, bias=True, reference=False)
    inputs[2][:sequences] = -100
    with torch.no_grad():
        loss, aux = ours.LigerFusedLinearCPOLoss(**options)(*inputs)
        expected, others = theirs.LigerFusedLinearCPOLoss(**options, compiled=False)(*inputs)
    assert expected.isnan() and others[AUX.index("nll")].isnan()
    with_nll = options != {"compute_nll_loss": False}
    assert bool(loss.isnan()) == bool(aux[AUX.index("nll")].isnan()) == with_nll
    for name, got, value in zip(AUX, aux, others, strict=True):
        if name != "nll":
            assert_close(got, value, equal_nan=True)
    if not with_nll:
        difference = 0.1 * (aux[0] - aux[1])  # beta is 0.1 by default
        assert_close(loss, (1 + (-difference).exp()).log().mean())


def test_a_token_of_minus_100_is_refused_where_another_index_is_ignored():
    """It would silently count as no token."""
    inputs = make_inputs(torch.float32, bias=False, reference=False, ignore_index=V - 1)
    inputs[2][3, 5] = -100
    with pytest.raises(ValueError, match=rf"target \(3, 5\) is -100, expected a word or ignore_index={V - 1}"):
        ours.LigerFusedLinearCPOLoss(ignore_index=V - 1)(*inputs)
    with pytest.raises(ValueError, match=r"targets must be integers, got torch\.float32"):
        ours.LigerFusedLinearCPOLoss()(*inputs[:2], inputs[2].float())


def test_targets_of_32_bits_are_taken():
    kind, options, inputs = make_case("orpo, nll of other targets", torch.float32, bias=False)
    module = getattr(ours, kind)(**options)
    expected = values(module, inputs)
    got = values(module, [x.int() if x is not None and not x.is_floating_point() else x for x in inputs])
    assert all(torch.equal(got[field], value) for field, value in expected.items())


def test_importing_needs_neither_liger_nor_transformers():
    code = "import sys, cpo_kernels.integrations.liger, cpo_kernels.integrations.losses as _; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"liger_kernel", "transformers", "trl"} & set(done.stdout.split())


@pytest.mark.cpu  # it measures the memory of the process
def test_the_benchmark_runs_and_checks_what_it_times(monkeypatch):
    found = list(bench_liger.run(Setting(quick=True)))
    assert [(record.case, record.contestant) for record in found] == [
        (f"{name}, {dtype}", who)
        for dtype in ("float32", "bfloat16")
        for name in bench_liger.LOSSES
        for who in (bench_liger.OURS, bench_liger.EAGER, bench_liger.COMPILED)
    ]
    assert all(record.values["of_ours"] == 1 for record in found if record.contestant == bench_liger.OURS)
    monkeypatch.setitem(LOSSES, "plackett_luce", LOSSES["hinge"])
    with pytest.raises(ContestantError, match="differs from the first"):
        list(bench_liger.run(Setting(quick=True)))
