"""Bad input gets an error that shows the offending value and the expected one: never a wrong number, never a crash."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from problems import Problem, packed_problem, random_problem

from cpo_kernels import (
    CandidateLayout,
    CPOLoss,
    LinearCPOLoss,
    contrastive_loss,
    cpo_loss,
    linear_cpo_loss,
    linear_sequence_logps,
    linear_sequence_loss,
    linear_token_logps,
    plan,
    sequence_logps,
    token_logps,
)
from cpo_kernels.kernels.registry import available

pytestmark = pytest.mark.cpu  # values are checked on the host there; test_cuda_device.py has the device's assertions


def padded() -> Problem:
    return random_problem(bias=True).to(torch.float32)


def packed() -> Problem:
    return packed_problem(bias=True).to(torch.float32)


def changed(make, **changes):
    problem = make()
    return replace(problem, **{name: change(getattr(problem, name)) for name, change in changes.items()})


def one(name, change, make=None):
    """A problem with one argument changed."""
    return lambda: changed(make or padded, **{name: change})


def both(change, **others):
    """A problem whose hidden states, targets and reference are cut alike."""
    return lambda: changed(padded, hidden=change, targets=change, **others)


def ranked(*ranks):
    return lambda: replace(padded(), ranks=torch.tensor(ranks))


def set_item(index, value):
    def change(tensor):
        tensor = tensor.detach().clone()
        tensor[index] = value
        return tensor

    return change


# What is wrong: the arguments of linear_cpo_loss, and the parts that the message must show.
TENSORS = {
    "targets_shape": (one("targets", lambda t: t[..., :2]), ["(3, 3, 4)", "(3, 3, 2)"]),
    "targets_dtype": (one("targets", lambda t: t.int()), ["int64", "torch.int32"]),
    "targets_too_large": (one("targets", set_item((1, 0, 2), 31)), ["token 14 is 31", "[0, 31)"]),
    "targets_negative": (one("targets", set_item((1, 0, 2), -1)), ["token 14 is -1", "[0, 31)", "-100"]),
    "hidden_dim": (both(lambda t: t[0]), ["(G, C, T, H)", "(3, 4, 7)"]),
    "hidden_scalar": (both(lambda t: t.sum()), ["()"]),
    "hidden_dtype": (one("hidden", lambda t: t.long()), ["hidden", "torch.int64"]),
    "weight_dtype": (one("weight", lambda t: t.half()), ["torch.float32", "torch.float16"]),
    "weight_shape": (one("weight", lambda t: t.t()), ["(V, 7)", "(7, 31)"]),
    "weight_dim": (one("weight", lambda t: t[0]), ["(V, 7)", "(7,)"]),
    "weight_empty": (one("weight", lambda t: t[:0]), ["V >= 1", "(0, 7)"]),
    "bias_shape": (one("bias", lambda t: t[:30]), ["(31,)", "(30,)"]),
    "bias_dtype": (one("bias", lambda t: t.long()), ["floating point", "torch.int64"]),
    "weight_device": (one("weight", lambda t: t.to("meta")), ["weight", "cpu", "meta"]),
    "bias_device": (one("bias", lambda t: t.to("meta")), ["bias", "cpu", "meta"]),
    "targets_device": (one("targets", lambda t: t.to("meta")), ["targets", "cpu", "meta"]),
    "ref_logps_shape": (one("ref_logps", lambda t: t[:2]), ["ref_logps", "(3, 3)", "(2, 3)"]),
    "ref_logps_dtype": (one("ref_logps", lambda t: t.long()), ["ref_logps", "floating", "torch.int64"]),
    "ref_logps_device": (one("ref_logps", lambda t: t.to("meta")), ["ref_logps", "cpu", "meta"]),
    "ranks_shape": (ranked(*[[0, 1]] * 3), ["ranks", "(3, 3)", "(3, 2)"]),
    "ranks_dtype": (ranked(*[[0.0, 1.0, 1.0]] * 3), ["ranks", "integers", "torch.float32"]),
    "no_rank_0": (ranked([0, 1, 1], [0, 1, 1], [2, 1, 1]), ["group 2", "[2, 1, 1]"]),
    "negative_rank": (ranked([0, 1, 1], [0, 1, -1], [0, 1, 1]), ["group 1", "rank below 0", "[0, 1, -1]"]),
    "rank_0_absent": (one("targets", set_item((1, 0), -100)), ["group 1", "False"]),
    "nothing_to_contrast": (ranked([0, 1, 1], [0, 0, 0], [0, 1, 1]), ["group 1", "contrast_weight=1.0", "[0, 0, 0]"]),
    "others_absent": (one("targets", set_item((2, slice(1, 3)), -100)), ["group 2", "nothing to contrast"]),
    "one_candidate": (both(lambda t: t[:, :1], ref_logps=lambda t: t[:, :1]), ["group 0", "nothing to contrast"]),
    "no_groups": (both(lambda t: t[:0], ref_logps=lambda t: t[:0]), ["group 0", "(0, 3, 4)"]),
    "no_tokens": (both(lambda t: t[:, :, :0]), ["group 0", "(3, 3, 0)"]),
    "packed_hidden_dim": (one("hidden", lambda t: t[None], packed), ["(R, H)", "(1, 18, 7)"]),
    "packed_targets_shape": (one("targets", lambda t: t[:-1], packed), ["(20,)", "(19,)"]),
    "packed_without_rows": (one("layout", lambda x: replace(x, rows=None), packed), ["20 rows", "18"]),
    "row_too_large": (
        one("layout", lambda x: replace(x, rows=set_item(3, 18)(x.rows)), packed),
        ["row of token 3 is 18", "[0, 18)"],
    ),
    "row_negative": (one("layout", lambda x: replace(x, rows=set_item(3, -1)(x.rows)), packed), ["token 3 is -1"]),
    "rows_device": (one("layout", lambda x: replace(x, rows=x.rows.to("meta")), packed), ["layout.rows", "meta"]),
    "packed_ref_logps": (one("ref_logps", lambda t: t[1:], packed), ["ref_logps", "(9,)", "(8,)"]),
    "layout_ranks_shape": (one("layout", lambda x: replace(x, ranks=[0, 1]), packed), ["ranks", "(9,)", "(2,)"]),
    "ranks_twice": (lambda: replace(packed(), ranks=torch.tensor([0, 1, 0, 1, 2, 0, 0, 1, 3])), ["twice"]),
    "packed_no_rank_0": (
        one("layout", lambda x: replace(x, ranks=[0, 1, 0, 1, 2, 3, 1, 1, 3]), packed),
        ["group 2", "rank-0"],
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_linear_cpo_loss(name):
    make, parts = TENSORS[name]
    problem = make()
    with pytest.raises(ValueError) as error:
        linear_cpo_loss(**problem.arguments())
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in: {error.value}"


SHAPES_OF_ANY_FUNCTION = [n for n in TENSORS if n.startswith(("targets", "weight", "bias", "hidden_dt", "hidden_sc"))]


@pytest.mark.parametrize("name", SHAPES_OF_ANY_FUNCTION)
@pytest.mark.parametrize(
    "function",
    [
        linear_token_logps,
        linear_sequence_logps,
        lambda *args, bias: linear_sequence_loss(*args, lambda logps, groups: logps.sum(), bias=bias),
        lambda *args, bias: plan(*args, bias=bias),
    ],
    ids=["linear_token_logps", "linear_sequence_logps", "linear_sequence_loss", "plan"],
)
def test_tensors_of_the_other_linear_functions(function, name):
    make, parts = TENSORS[name]
    problem = make()
    with pytest.raises(ValueError) as error:
        function(problem.hidden, problem.weight, problem.targets, bias=problem.bias)
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in: {error.value}"


OPTIONS = {
    "beta_zero": ({"beta": 0.0}, "beta must be .*0.0"),
    "beta_negative": ({"beta": -0.1}, "beta must be .*-0.1"),
    "beta_nan": ({"beta": float("nan")}, "beta must be .*nan"),
    "beta_infinite": ({"beta": float("inf")}, "beta must be .*inf"),
    "label_smoothing": ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
    "loss_type": ({"loss_type": "sigmoid"}, "plackett_luce.*hinge.*ipo.*'sigmoid'"),
    "smoothed_hinge": ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1.*'hinge'"),
    "margin": ({"margin": float("nan")}, "margin must be a finite number, got nan"),
    "contrast_weight": ({"contrast_weight": float("inf")}, "contrast_weight must be a finite number, got inf"),
    "mle_weight": ({"mle_weight": float("nan")}, "mle_weight must be a finite number, got nan"),
    "num_groups": ({"num_groups": 0}, "num_groups must be positive, got 0"),
    "num_target_tokens": ({"num_target_tokens": -3}, "num_target_tokens must be positive, got -3"),
    "hinge_of_many": ({"loss_type": "hinge"}, "loss_type='hinge' needs .*K = 1.*got K = 2"),
    "ipo_of_many": ({"loss_type": "ipo"}, "loss_type='ipo' needs .*K = 1.*got K = 2"),
    "smoothing_of_many": ({"label_smoothing": 0.1}, "label_smoothing=0.1 needs .*K = 1.*got K = 2"),
    "logit_scale": ({"logit_scale": float("inf")}, "logit_scale must be a finite number, got inf"),
    "softcap": ({"softcap": -1.0}, "softcap must be .*-1.0"),
    "softcap_zero": ({"softcap": 0.0}, "softcap must be .*0.0"),
    "softcap_above_float32": ({"softcap": 1e39}, "softcap must be .*1e[+]39"),
    "softcap_below_float32": ({"softcap": 1e-46}, "softcap must be .*1e-46"),
    "logit_scale_above_float32": ({"logit_scale": -1e39}, "logit_scale must be .*-1e[+]39"),
    "temperature_above_float32": ({"temperature": 1e39}, "temperature must be .*1e[+]39"),
    "ratio_above_float32": ({"logit_scale": 1e30, "softcap": 1e-20}, "logit_scale=1e[+]30, softcap=1e-20 .* ratios"),
    "num_groups_infinite": ({"num_groups": math.inf}, "num_groups must be positive, got inf"),
    "max_logits_bytes_nan": ({"max_logits_bytes": math.nan}, "max_logits_bytes must be positive, got nan"),
    "frozen_columns_nan": ({"frozen_columns": math.nan}, "frozen_columns must be at least 0, got nan"),
    "temperature": ({"temperature": 0.0}, "temperature must be .*0.0"),
    "max_logits_bytes": ({"max_logits_bytes": 0}, "max_logits_bytes must be positive, got 0"),
    "logits_dtype": ({"logits_dtype": torch.bfloat16}, "logits_dtype must be .*float32, got torch.bfloat16"),
    "grad_filter_eps": ({"grad_filter_eps": -1e-4}, "grad_filter_eps must be .* at least 0 or None, got -0.0001"),
    "candidate_eps": ({"candidate_eps": math.inf}, "candidate_eps must be .* at least 0 or None, got inf"),
    "backend": ({"backend": "tpu"}, "unknown backend 'tpu', expected 'auto' or one of .*torch.*cpu"),
}
# These are about the budget of the logits that the other functions take as they are.
LINEAR_OPTIONS = {
    "budget_of_less_than_a_row": (
        {"max_logits_bytes": 31 * 4 - 1},
        "max_logits_bytes=123 does not hold one row of logits, which takes 124 bytes",
    )
}


@pytest.mark.parametrize("name", OPTIONS | LINEAR_OPTIONS)
def test_options_of_linear_cpo_loss(name):
    options, message = (OPTIONS | LINEAR_OPTIONS)[name]
    with pytest.raises(ValueError, match=message):
        linear_cpo_loss(**padded().arguments(), **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_cpo_loss(name):
    options, message = OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        cpo_loss(torch.randn(2, 3, 4, 5), torch.zeros(2, 3, 4, dtype=torch.int64), **options)


@pytest.mark.parametrize("module", [CPOLoss, LinearCPOLoss])
def test_modules_check_their_options_when_they_are_made(module):
    with pytest.raises(ValueError, match=r"beta must be .*-1"):
        module(beta=-1.0)
    with pytest.raises(TypeError, match=f"{module.__name__}.*'betta'"):
        module(betta=1.0)


@pytest.mark.parametrize("function", [linear_cpo_loss, plan])
def test_unknown_option(function):
    with pytest.raises(TypeError, match="'temprature'"):
        function(**padded().arguments(), temprature=2.0)


@pytest.mark.skipif("cuda" in available(), reason="backend 'cuda' is available here")
def test_backend_that_is_not_there_says_why():
    with pytest.raises(RuntimeError, match=r"backend 'cuda' is not available: \S+"):
        linear_cpo_loss(**padded().arguments(), backend="cuda")


@pytest.mark.parametrize("name", ["grad_filter_eps", "candidate_eps"])
def test_filters_of_what_has_none(name):
    """They shorten products of the contrast, so that dropping nothing in silence would be a wrong promise."""
    logits, targets = torch.randn(2, 3, 4, 31), torch.randint(0, 31, (2, 3, 4))
    hidden, weight = torch.randn(2, 3, 4, 7), torch.randn(31, 7)
    for call in (
        lambda: cpo_loss(logits, targets, **{name: 0.1}),
        lambda: token_logps(logits, targets, **{name: 0.1}),
        lambda: linear_token_logps(hidden, weight, targets, **{name: 0.1}),
        lambda: linear_sequence_logps(hidden, weight, targets, **{name: 0.1}),
    ):
        with pytest.raises(ValueError, match=f"{name}=0.1: .* no filters"):
            call()


def test_float64_is_refused_by_the_compiled_backend():
    problem = random_problem().to(torch.float64)
    with pytest.raises((ValueError, RuntimeError), match=r"'cpu'.*(torch\.float64|not available)"):
        linear_cpo_loss(**problem.arguments(), backend="cpu")


def test_float32_logits_of_float64_inputs_are_refused():
    """They would be less exact than the inputs."""
    problem = random_problem().to(torch.float64)
    with pytest.raises(ValueError, match=r"logits_dtype.*torch\.float64"):
        linear_cpo_loss(**problem.arguments(), logits_dtype=torch.float32)


LAYOUTS = {
    "cu_tokens_start": (([1, 3], [0, 1]), "cu_tokens must start with 0, got .*1"),
    "cu_groups_start": (([0, 3], [1]), "cu_groups must start with 0, got .*1"),
    "cu_tokens_empty": (([], [0]), "cu_tokens must start with 0"),
    "cu_tokens_decrease": (([0, 3, 2], [0, 2]), "cu_tokens must not decrease, got 3 before 2 at index 2"),
    "cu_groups_decrease": (([0, 3, 4], [0, 2, 1]), "cu_groups must not decrease, got 2 before 1"),
    "cu_groups_end": (([0, 3, 4], [0, 1]), "cu_groups must end at the number of segments, 2, got 1"),
    "empty_group": (([0, 3, 4], [0, 1, 1, 2]), "group 1 is empty"),
    "no_groups": (([0], [0]), "group"),
    "rows_shape": (([0, 3], [0, 1], torch.arange(4)), r"rows must have shape \(3,\), got \(4,\)"),
    "rows_dtype": (([0, 3], [0, 1], torch.arange(3).int()), "rows must be int64, got torch.int32"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    arguments, message = LAYOUTS[name]
    with pytest.raises(ValueError, match=message):
        CandidateLayout(*arguments)


CONTRASTS = {
    "dim": ({"logps": torch.zeros(3)}, r"\(G, C\).*\(3,\)"),
    "dtype": ({"logps": torch.zeros(2, 3).long()}, "floating point.*torch.int64"),
    "reduction": ({"logps": torch.zeros(2, 3), "reduction": "avg"}, "'mean', 'sum' or 'none', got 'avg'"),
    "ref_shape": ({"logps": torch.zeros(2, 3), "ref_logps": torch.zeros(2)}, r"ref_logps.*\(2, 3\).*\(2,\)"),
    "ranks_shape": ({"logps": torch.zeros(2, 3), "ranks": torch.zeros(3).long()}, r"ranks.*\(2, 3\).*\(3,\)"),
    "pair_only": ({"logps": torch.zeros(2, 3), "loss_type": "ipo"}, "loss_type='ipo'.*got K = 2"),
    "negative_rank": (
        {"logps": torch.zeros(2, 2), "ranks": torch.tensor([[0, 1], [0, -1]])},
        r"group 1 has a rank below 0.*\[0, -1\]",
    ),
    "no_rank_0": ({"logps": torch.zeros(2, 2), "ranks": torch.tensor([[0, 1], [1, 2]])}, r"group 1 .*rank-0.*\[1, 2\]"),
    "no_contrast": (
        {"logps": torch.zeros(2, 2), "ranks": torch.tensor([[0, 0], [0, 1]])},
        "group 0 has nothing to contr",
    ),
    "one_candidate": ({"logps": torch.zeros(2, 1)}, "group 0 has nothing to contrast"),
    "no_candidates": ({"logps": torch.zeros(2, 0)}, "group 0 is empty"),
    "no_groups": ({"logps": torch.zeros(0, 2)}, "group 0 is empty"),
}


@pytest.mark.parametrize("name", CONTRASTS)
def test_contrastive_loss(name):
    arguments, message = CONTRASTS[name]
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**arguments)


def logits_and_targets(**changes):
    given = {"logits": torch.randn(2, 3, 4, 5), "targets": torch.zeros(2, 3, 4, dtype=torch.int64)}
    return {name: changes.get(name, lambda t: t)(tensor) for name, tensor in given.items()}


LOGITS = {
    "targets_shape": ({"targets": lambda t: t[..., :2]}, ["(2, 3, 4)", "(2, 3, 2)"]),
    "targets_dtype": ({"targets": lambda t: t.int()}, ["int64", "torch.int32"]),
    "targets_too_large": ({"targets": set_item((0, 1, 2), 5)}, ["token 6 is 5", "[0, 5)"]),
    "targets_negative": ({"targets": set_item((0, 1, 2), -7)}, ["token 6 is -7", "[0, 5)", "-100"]),
    "targets_device": ({"targets": lambda t: t.to("meta")}, ["targets", "cpu", "meta"]),
    "logits_dtype": ({"logits": lambda t: t.long()}, ["logits", "torch.int64"]),
    "no_words": ({"logits": lambda t: t[..., :0]}, ["V >= 1"]),
}


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("function", [token_logps, sequence_logps, cpo_loss])
def test_logits(function, name):
    changes, parts = LOGITS[name]
    with pytest.raises(ValueError) as error:
        function(**logits_and_targets(**changes))
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in: {error.value}"


@pytest.mark.parametrize("function", [token_logps, sequence_logps, cpo_loss])
def test_bias_of_logits(function):
    for bias, parts in (
        (torch.zeros(4), ["(5,)", "(4,)"]),
        (torch.zeros(5).long(), ["floating point", "torch.int64"]),
        (torch.zeros(5, device="meta"), ["bias", "cpu", "meta"]),
    ):
        with pytest.raises(ValueError) as error:
            function(**logits_and_targets(), bias=bias)
        assert all(part in str(error.value) for part in parts), error.value


def test_cpo_loss_wants_groups_of_candidates():
    with pytest.raises(ValueError, match=r"\(G, C, T, V\).*\(3, 4, 5\)"):
        cpo_loss(torch.randn(3, 4, 5), torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"group 0 is empty: .*\(0, 3, 4\)"):
        cpo_loss(torch.randn(0, 3, 4, 5), torch.zeros(0, 3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="group 1 has no rank-0"):
        cpo_loss(**logits_and_targets(targets=set_item((1, 0), -100)))


@pytest.mark.parametrize("scalar", [torch.tensor(0.5), "matrix", "constant", None], ids=str)
def test_a_loss_fn_must_return_a_differentiable_scalar(scalar):
    problem = padded()

    def loss_fn(logps, groups):
        return logps if scalar == "matrix" else torch.tensor(1.0) if scalar == "constant" else scalar

    with pytest.raises((ValueError, TypeError, AttributeError), match="loss_fn must return a scalar"):
        linear_sequence_loss(problem.hidden, problem.weight, problem.targets, loss_fn)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("returned", ["matrix", "number"])
def test_a_loss_fn_must_return_a_scalar_without_gradients_too(returned, compiled):
    problem = padded()

    def loss_fn(logps, groups):
        return logps if returned == "matrix" else 1.0

    def call(hidden, weight):
        return linear_sequence_loss(hidden, weight, problem.targets, loss_fn)

    function = torch.compile(call, fullgraph=True, backend="eager") if compiled else call
    # Early releases of the compiler keep the message of an error to themselves.
    known = "loss_fn must return a scalar" + ("|Observed exception" if compiled else "")
    with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException), match=known):
        function(problem.hidden.detach(), problem.weight.detach())
    constant = linear_sequence_loss(
        problem.hidden.detach(), problem.weight.detach(), problem.targets, lambda *_: torch.tensor(2.0)
    )
    assert constant == 2.0


META = {
    "linear_cpo_loss": lambda h, w, y: linear_cpo_loss(h, w, y).loss,
    "linear_sequence_logps": linear_sequence_logps,
    "linear_token_logps": linear_token_logps,
    "linear_sequence_loss": lambda h, w, y: linear_sequence_loss(h, w, y, lambda logps, groups: logps.sum()),
    "token_logps": lambda h, w, y: token_logps(h @ w.t(), y),
    "cpo_loss": lambda h, w, y: cpo_loss(h @ w.t(), y).loss,
    "plan": plan,
}


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
@pytest.mark.parametrize("name", META)
def test_meta_tensors_never_crash(name, backend):
    """Either the right shape comes back, on meta, or an error."""
    problem = padded()
    tensors = [t.detach().to("meta") for t in (problem.hidden, problem.weight, problem.targets)]
    try:
        result = META[name](*tensors)
    except (ValueError, RuntimeError):
        return
    assert result.device.type == "meta"


@pytest.mark.parametrize("name", META)
def test_sizes_of_zero_never_crash(name):
    """No rows, no hidden units: an error, or what dense arithmetic gives."""
    for shape, H in (((0, 3, 4), 7), ((2, 0, 4), 7), ((2, 3, 0), 7), ((2, 3, 4), 0)):
        hidden, weight = torch.zeros(*shape, H), torch.zeros(31, H)
        targets = torch.zeros(shape, dtype=torch.int64)
        try:
            result = META[name](hidden, weight, targets)
        except (ValueError, RuntimeError) as error:
            assert re.search(r"empty|shape|size|H >= 1", str(error)), error
            continue
        if isinstance(result, torch.Tensor):
            assert result.isfinite().all()
