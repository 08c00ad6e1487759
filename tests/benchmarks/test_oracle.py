"""The float64 oracle is autograd's, the floor multiplies what must be multiplied, and mistakes are found out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import contestants, oracle, shapes
from benchmarks.contestants import LineUp, product_flops, smallest_budget
from benchmarks.floor import Floor, plan_of, product_rows
from benchmarks.measure import AnotherLossError, ContestantError, measure
from benchmarks.oracle import Dense, Oracle, Oracles
from benchmarks.peers import BUILDERS, build, ours
from benchmarks.problem import IGNORE, contrast, draw
from benchmarks.setting import CPU
from benchmarks.shapes import CCE
from cpo_kernels import CandidateLayout, linear_cpo_loss
from cpo_kernels.kernels.cpu import gemm as cpu_gemm

pytestmark = pytest.mark.cpu

SHAPE = shapes.fp32("quick", shapes.SMALL, 4, 16, rounds=1, variants=False)
HALF = replace(SHAPE, prompt_share=0.5)
# Peers that compile take seconds each, so they are run once, by the slow test
COMPILING = ("torch.compile", "Liger CPO", CCE)
FIRST = {contestants.FLOOR, contestants.OURS}
FIRST |= {contestants.FLOOR_OURS} if cpu_gemm.gemm_supported(torch.float32, torch.float32) else set()
PLAIN = [name for name in BUILDERS if name not in (*COMPILING, "QuACK")]


@pytest.fixture
def every_peer():
    """For tests of all peers. Development installs them but QuACK, so these tests are skipped only by users."""
    missing = [name for name in (*COMPILING, *PLAIN) if isinstance(build(name, BUILDERS), str)]
    if missing:
        pytest.skip(f"without {', '.join(missing)}")


def in_double(problem, hidden, weight):
    """The loss of a problem by its definition, from all logits."""
    if problem.shape.work == shapes.NLL:
        return F.cross_entropy((hidden @ weight.T).flatten(0, 2), problem.targets.flatten(), ignore_index=IGNORE)

    def sums(rows, head):
        logps = torch.log_softmax(rows @ head.T, -1).gather(-1, problem.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return logps.masked_fill(problem.targets == IGNORE, 0).sum(-1)

    if problem.shape.work == shapes.PAIRS:
        chosen, rejected = sums(hidden, weight).unbind(1)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    return contrast(sums(hidden, weight), problem.ref_logps.double())


@pytest.mark.parametrize("work", [shapes.CPO, shapes.NLL, shapes.PAIRS])
@pytest.mark.parametrize("shape", [SHAPE, HALF], ids=["whole", "half prompt"])
def test_the_oracle_is_autograd_in_double(monkeypatch, shape, work):
    monkeypatch.setattr(oracle, "BLOCK", 64)  # several blocks of the vocabulary, the last one shorter
    drawn = draw(replace(shape, work=shapes.NLL if work == shapes.NLL else shapes.CPO))
    problem = drawn.as_work(work)
    hidden, weight = (x.detach().double().requires_grad_() for x in (problem.hidden, problem.weight))
    loss = in_double(problem, hidden, weight)
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    oracles = Oracles(drawn)
    found, predicting = oracles.of(work), problem.targets.flatten() != IGNORE
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    assert_close(found.grad_hidden, grad_hidden.flatten(0, 2)[predicting][found.rows])
    assert_close(found.grad_weight, grad_weight[found.columns])
    assert max(oracles.check(work, ours("ours").run(problem)).values()) < 1e-5


def test_the_oracle_of_rows_with_several_tokens_is_autograd_in_double(monkeypatch):
    monkeypatch.setattr(oracle, "BLOCK", 40)
    torch.manual_seed(0)
    rows = torch.tensor([0, 1, 2, 0, 1, 3, 3])
    layout, targets = CandidateLayout([0, 3, 6, 7], [0, 3], rows=rows), torch.randint(97, (7,))
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 97))
    loss = linear_cpo_loss(hidden, weight, targets, layout=layout, beta=0.3).loss

    def objective(logps):
        scores = 0.3 * torch.stack([logps[:3].sum(), logps[3:6].sum(), logps[6:].sum()])
        return torch.logsumexp(scores, 0) - scores[0]

    found = Oracle(Dense(hidden, weight, targets, rows), objective)
    errors = found.errors(loss.item(), *torch.autograd.grad(loss, (hidden, weight)))
    assert max(errors.values()) < 1e-6


def test_the_contrast_is_not_settled():
    assert Oracles(draw(SHAPE)).of(shapes.CPO).grad_hidden.norm(dim=-1).median() > 1e-4


def mistaken(name: str):
    """Eager with one mistake."""
    eager = BUILDERS["eager"]()
    losses = {
        "mean": lambda h, w, t, ref: contrast(eager.sequence_logps(h, w, t) / t.shape[-1], ref),
        "no reference": lambda h, w, t, ref: eager.loss(h, w, t, None),
        "nan": lambda h, w, t, ref: eager.loss(h, w, t, ref) * float("nan"),
        "nan gradient": lambda h, w, t, ref: eager.loss(h, w, t, ref) + (0 * w[0, 0]).sqrt(),
        "gradient": lambda h, w, t, ref: eager.loss(h, 2 * w.detach() - w, t, ref),
    }
    return replace(eager, name=name, loss=losses[name])


@pytest.mark.parametrize("mistake", ["mean", "no reference", "nan", "nan gradient", "gradient"])
def test_another_loss_or_gradient_is_not_timed(mistake):
    line_up = LineUp(draw(replace(SHAPE, dtype=torch.bfloat16)))
    records = measure(line_up.case([*line_up.everyone(()), line_up.peer(mistaken(mistake), shapes.CPO)]), CPU)
    assert records[-1].contestant == mistake and not records[-1].values
    assert records[-1].note.startswith("AnotherLossError: computes another loss")
    with pytest.raises(ContestantError, match=mistake):
        measure(
            line_up.case([line_up.floor(shapes.CPO), line_up.peer(mistaken(mistake), shapes.CPO, needed=True)]), CPU
        )


def test_log_likelihoods_of_something_else_are_not_timed():
    eager = BUILDERS["eager"]()
    wrong = replace(eager, name="mean", sequence_logps=lambda *tensors: eager.sequence_logps(*tensors) / 16)
    line_up = LineUp(draw(replace(SHAPE, mode=shapes.NO_GRAD)))
    (record,) = measure(line_up.case([line_up.peer(wrong, shapes.CPO)]), CPU)
    assert "another loss" in record.note


def test_gradients_of_prompt_rows_and_missing_ones_are_found():
    problem = draw(HALF)
    oracles, (loss, (grad_hidden, grad_weight)) = Oracles(problem), ours("ours").run(problem)
    touched = grad_hidden.clone()
    touched[0, 0, 0, 0] = 1e-8
    for wrong in ((touched, grad_weight), (grad_hidden,), (grad_hidden, grad_weight.double())):
        with pytest.raises(AnotherLossError):
            oracles.check(shapes.CPO, (loss, wrong))


@pytest.mark.parametrize(
    ("mode", "work", "products"),
    [("trained", "cpo", 3), ("frozen", "cpo", 2), ("no_grad", "cpo", 1), ("trained", "nll", 3)],
)
def test_the_floor_multiplies_what_must_be_multiplied(mode, work, products):
    shape = replace(HALF, mode=mode, work=work)
    with FlopCounterMode(display=False) as counter:
        _, grads = Floor.of(draw(shape), None)()
    assert len(grads) == {"trained": 2, "frozen": 1, "no_grad": 0}[mode]
    assert counter.get_total_flops() == products * product_flops(shape)
    assert product_flops(shape) == 2 * (shape.num_tokens // 2) * shape.vocab * shape.hidden


def test_the_floor_computes_all_three_products():
    hidden, weight = torch.randn(11, 5, dtype=torch.float64), torch.randn(17, 5, dtype=torch.float64)
    _, (grad_hidden, grad_weight) = Floor(hidden, weight, [4, 4, 3])()
    assert_close(grad_hidden, hidden @ weight.T @ weight)
    assert_close(grad_weight, (hidden @ weight.T).T @ hidden)
    with pytest.raises(ValueError, match="11 rows predict"):
        Floor(hidden, weight, [4, 4])


@pytest.mark.parametrize("mode", ["trained", "frozen", "no_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_of_ours_has_the_products_of_torchs(dtype, mode):
    """By the engine's own products, whose sums over chunks are rounded once."""
    problem = draw(replace(HALF, dtype=dtype, mode=mode, smallest_budget=True))
    budget = smallest_budget(problem)
    (_, found), (_, expected) = (Floor.of(problem, budget, ours=ours_too)() for ours_too in (True, False))
    assert len(found) == len(expected) == contestants.PRODUCTS[mode] - 1
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())


@pytest.mark.parametrize("shape", shapes.QUICK_CASES, ids=lambda shape: shape.name)
def test_the_floor_multiplies_the_rows_of_our_plan(shape):
    problem = draw(shape)
    budget = smallest_budget(problem) if shape.smallest_budget else None
    rows = product_rows(plan_of(problem, budget))
    assert sum(rows) == int((problem.targets != IGNORE).sum()) == shape.predicted_tokens
    if shape.smallest_budget:
        assert rows == [shape.predicted_tokens // shape.groups] * shape.groups


def test_rates_are_of_the_products_of_rows_that_predict():
    found = contestants.rates(replace(HALF, dtype=torch.bfloat16), {"bfloat16": 2e-6}, 2.0)
    assert found["tflops"] == pytest.approx(3 * 2 * 128 * 509 * 32 / 2e12)
    assert found["of_peak"] == found["tflops"] / 2e-6
    assert "of_peak" not in contestants.rates(HALF, {"bfloat16": 2e-6}, 2.0)


def everyone(shape, names) -> dict[str, str]:
    line_up = LineUp(draw(shape))
    return {r.contestant: r.note for r in measure(line_up.case(line_up.everyone(names)), CPU)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("work", [shapes.CPO, shapes.NLL])
def test_every_plain_peer_computes_the_same_loss(every_peer, dtype, work):
    notes = everyone(replace(HALF, dtype=dtype, work=work), PLAIN)
    expected = set(PLAIN) - ({"TRL fused head"} if work == shapes.NLL else set())
    assert notes.keys() == expected | FIRST and not any(notes.values())


def test_every_compiling_peer_computes_the_same_loss(every_peer):
    notes = everyone(HALF, COMPILING)
    assert notes.keys() == {*COMPILING, contestants.OURS_PAIRS, *FIRST} and not any(notes.values())


def test_a_peer_that_is_not_there_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert everyone(replace(SHAPE, work=shapes.NLL), ["QuACK"])["QuACK"] == "needs a GPU"


@pytest.mark.parametrize("cases", [shapes.CASES, (*shapes.GPU_CASES, *shapes.BAR_LOSSES, *shapes.BAR_PEERS)])
def test_cases_cover_what_is_compared(cases):
    assert len({shape.name for shape in cases}) == len(cases)
    heads_of_models = {(50257, 1600), (32000, 3200), (128256, 4096), (151936, 4096), (262144, 2560)}
    assert heads_of_models <= {(shape.vocab, shape.hidden) for shape in cases}
    assert {shape.candidates for shape in cases} == {2, 4, 5, 17}
    assert {shape.prompt_share for shape in cases} == {0, 0.5, 0.8}
    assert {"trained", "frozen"} <= {shape.mode for shape in cases}
    assert {name for shape in cases for name in contestants.asked_of(shape)} == set(BUILDERS)
    assert all((shape.groups * shape.candidates) % 2 == 0 for shape in cases)  # the same tokens as pairs
    with pytest.raises(ValueError, match="1000"):
        cases[0].with_tokens(1000)
