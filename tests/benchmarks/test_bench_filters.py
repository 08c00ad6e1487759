"""The benchmark of the filters: its oracle, its search, its run, and the records of a quick one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from problems import GemmCounter

from benchmarks import compare, filters, oracle, real_run, suite
from benchmarks.contestants import FLOOR, OURS
from benchmarks.filters import AnotherLossError, Case, at_bar, check, contrast_shares, largest_within
from benchmarks.packed import Oracle, Packed
from benchmarks.setting import Setting
from cpo_kernels import CandidateLayout, linear_cpo_loss

pytestmark = pytest.mark.cpu  # a tiny model on the host

QUICK = Setting(quick=True)
V, H = 97, 24


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny calls wait longer for a second thread than they take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def problem() -> Packed:
    """Two groups of three; the third candidate of each shares its rows with the first."""
    torch.manual_seed(0)
    lengths, starts = (4, 5, 3, 2, 6, 1), (0, 4, 0, 9, 11, 9)
    rows = torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])
    layout = CandidateLayout([0, 4, 9, 12, 14, 20, 21], [0, 3, 6], rows=rows)
    hidden, weight = torch.randn(17, H).requires_grad_(), (0.4 * torch.randn(V, H)).requires_grad_()
    options = {"ref_logps": -5.0 * torch.tensor(lengths), "beta": 0.3, "contrast_weight": 0.7, "mle_weight": 0.2}
    return Packed(hidden, weight, torch.randint(V, (21,)), layout, options)


@pytest.fixture(scope="module")
def run():
    return real_run.train(QUICK, real_run.QUICK)


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    return suite.measure("filters", QUICK, tmp_path_factory.mktemp("filters"), [])


def test_the_oracle_is_the_loss_in_float64(problem, monkeypatch):
    monkeypatch.setattr(oracle, "_BLOCK", 40)  # several blocks of the vocabulary, the last one shorter
    hidden, weight = (t.detach().double().requires_grad_() for t in (problem.hidden, problem.weight))
    loss = linear_cpo_loss(hidden, weight, problem.targets, layout=problem.layout, **problem.options).loss
    grads = torch.autograd.grad(loss, (hidden, weight))
    found = Oracle(problem)
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close((found.grad_hidden, found.grad_weight), grads, rtol=1e-9, atol=1e-14)


def test_a_peer_by_token_logps_has_the_same_loss(problem):
    def token_logps(hidden, weight, targets):
        return torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[:, None]).squeeze(-1)

    errors = Oracle(problem).errors(problem.run_by_token_logps(token_logps))
    assert max(errors.values()) < 1e-5


def test_wrong_contestants_are_refused(problem):
    oracle, right = Oracle(problem), problem.run()
    check("right", right, oracle, torch.float32)
    for wrong in (
        {"loss": 1.01 * right.loss},
        {"loss": float("nan")},
        {"grad_hidden": 1.01 * right.grad_hidden},
        {"grad_weight": right.grad_weight.roll(1, 0)},
    ):
        with pytest.raises(AnotherLossError, match="wrong"):
            check("wrong", replace(right, **wrong), oracle, torch.float32)
    check("filtered", replace(right, grad_hidden=0 * right.grad_hidden), oracle, torch.float32, filtered=True)
    with pytest.raises(AnotherLossError, match="filtered"):
        check("filtered", replace(right, loss=1.01 * right.loss), oracle, torch.float32, filtered=True)


def test_the_floor_is_three_products_of_the_rows(problem):
    floor = Case("", problem, 0, QUICK).floor()
    with GemmCounter() as counter:
        floor()
    assert counter.products(len(problem.hidden), problem.weight) == 3


@pytest.mark.parametrize("root", [1.3e-5, 1e-3, 0.04])
def test_the_search_finds_the_largest_eps(root):
    values = filters.grid("candidate_eps")
    found = largest_within(lambda eps: 1e-3 * eps / root, values)
    if root < values[0]:
        assert found == 0
    else:
        step = (values[1] / values[0]) ** (0.5**filters.REFINED)
        assert root / (step * (1 + 1e-9)) <= found <= root * (1 + 1e-9)
    assert largest_within(lambda eps: 0.0, values) == values[-1]


def test_shares_are_the_coefficients_of_the_contrast(problem):
    sums = torch.tensor([-3.0, -4.0, -9.0, -8.0, -2.0, -30.0], dtype=torch.float64, requires_grad=True)
    logps = torch.cat([s.expand(n) / n for s, n in zip(sums, (4, 5, 3, 2, 6, 1), strict=True)])
    alone = replace(problem, options=problem.options | {"mle_weight": 0.0, "contrast_weight": 1.0})
    (coef,) = torch.autograd.grad(alone.loss_of(logps), sums)
    rewards = 0.3 * (sums.detach() - problem.options["ref_logps"])
    torch.testing.assert_close(contrast_shares(rewards, (0, 3, 6)), coef.abs() / (0.3 / 2))


def test_the_run_is_looked_at_after_its_steps(run):
    first, last = run.looked
    assert (first.step, last.step) == real_run.QUICK.steps
    assert not torch.equal(first.hidden, last.hidden)
    assert not torch.equal(first.weight, last.weight)
    assert torch.equal(first.targets, last.targets)  # the same texts, and negatives that the reference draws
    assert torch.equal(first.options["ref_logps"], last.options["ref_logps"])
    assert first.layout.num_groups == real_run.QUICK.held_out
    assert first.layout.num_segments == real_run.QUICK.held_out * (1 + real_run.K)
    assert first.layout.rows.unique().numel() == len(first.hidden)


def test_the_run_is_repeatable(run):
    """But for the rounding of torch's own threads."""
    again = real_run.train(QUICK, real_run.QUICK)
    for one, other in zip(run.looked, again.looked, strict=True):
        assert torch.equal(one.targets, other.targets)
        torch.testing.assert_close((one.hidden, one.weight), (other.hidden, other.weight), rtol=1e-4, atol=1e-4)


def test_what_is_looked_at_has_the_loss_that_the_model_has(run):
    """Early in the run, model and reference are almost the same: contrasts near log(K + 1) and NLL near log V."""
    out = Packed.of(run.looked[0], torch.float32).output()
    assert out.contrastive_loss.item() == pytest.approx(torch.tensor(1.0 + real_run.K).log().item(), rel=0.05)
    assert out.nll_loss.item() == pytest.approx(torch.tensor(float(len(run.looked[0].weight))).log().item(), rel=0.1)


def test_a_wide_head_has_the_same_logits_and_norms(run):
    looked, wide = run.looked[-1], filters.widened(run.looked[-1], 80)
    narrow, turned = (Packed.of(x, torch.float32, 0.0).run() for x in (looked, wide))
    assert turned.grad_hidden.shape[1] == 80
    assert turned.loss == pytest.approx(narrow.loss, rel=1e-5)
    for one, other in ((narrow.grad_hidden, turned.grad_hidden), (narrow.grad_weight, turned.grad_weight)):
        torch.testing.assert_close(other.norm(), one.norm(), rtol=1e-3, atol=0)


def test_the_records_of_a_quick_run(part):
    assert part.error == ""
    cases = [f"after {step} steps, {which}" for step in real_run.QUICK.steps for which in ("float32", "bfloat16")]
    cases += [f"{case}, wide" for case in cases if case.endswith("16")]
    cases.append(f"after {real_run.QUICK.steps[-1]} steps, float32, with NLL")
    assert set(part.cases()) == {*cases, *(f"after {step} steps" for step in real_run.QUICK.steps)}
    for case in cases:
        for record in part.select(FLOOR, case=case):
            assert record.values["floor"] == 1
        for record in part.select(OURS, case=case):
            assert record.values["dropped"] == 0
            assert record.values["error_filter"] == 0
        for name in (*filters.FILTERS, filters.BOTH):
            (record,) = part.select(at_bar(name), case=case)
            assert record.values["seconds"] > 0
            assert record.values["error_filter"] <= filters.BAR
            assert (name in record.values) == (name != filters.BOTH)
        for name in filters.FILTERS if case.endswith("32") else ():
            errors = [part.select(f"{name} {eps:.2g}", case=case)[0].values for eps in filters.grid(name, quick=True)]
            assert all(one["dropped"] <= other["dropped"] for one, other in pairwise(errors))
        (peer,) = part.select(filters.CCE, case=case)
        assert peer.note


def test_every_figure_has_its_counterpart_in_another_run(part):
    timed = [record for record in part.records if "floor" in record.values]
    assert len(compare.figures({"filters": part})) == len(timed)
    eps = {**part.select(at_bar(filters.BOTH))[0].values, filters.CANDIDATES: 0.123}  # other runs find other eps
    again = [replace(r, values=eps) if r.contestant == at_bar(filters.BOTH) else r for r in part.records]
    assert "only in" not in compare.compare({"filters": part}, {"filters": replace(part, records=again)})
