"""The parts of the suite: quick runs have a record of everyone, and what is wrong or slow is found out."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")

from benchmarks import (
    bars,
    contestants,
    filters,
    growth,
    heads,
    lengths,
    negatives,
    real_run,
    shapes,
    sharing,
    steps,
    texts,
)
from benchmarks.contestants import FLOOR, FLOOR_OURS, OURS, OURS_FP32_LOGITS, OURS_PAIRS
from benchmarks.lengths import Life, Stopwatch, Task, live
from benchmarks.measure import AnotherLossError
from benchmarks.oracle import Dense, Oracle
from benchmarks.peers import BUILDERS, VARYING
from benchmarks.problem import IGNORE, draw
from benchmarks.processes import ProcessError
from benchmarks.setting import CPU, Setting
from benchmarks.shapes import CPO, PAIRS
from benchmarks.texts import Corpus, Example
from benchmarks.training import GPT2_TINY, Given, make_model, twin

pytestmark = pytest.mark.cpu  # small dry runs on the host

QUICK = Setting(quick=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny calls wait longer for a second thread than they take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def changed(**changes):
    """A builder of eager with changes."""
    return lambda: replace(BUILDERS["eager"](), **changes)


# Heads


def test_heads_have_a_complete_record_of_everyone(monkeypatch):
    def fail(*tensors):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(BUILDERS, "failing", changed(name="failing", loss=fail, nll=fail, sequence_logps=fail))
    names = ("quick half prompt fp32", "quick frozen fp32", "quick no_grad bf16", "quick cross-entropy bf16")
    chosen = [replace(s, peers=("eager", "failing")) for s in shapes.QUICK_CASES if s.name in names]
    monkeypatch.setattr(shapes, "QUICK_CASES", tuple(chosen))
    accuracy = replace(shapes.QUICK_ACCURACY, peers=("eager", "failing"))
    monkeypatch.setattr(shapes, "QUICK_ACCURACY", accuracy)
    monkeypatch.setattr(heads, "call_alone", lambda function, *args: function(*args))
    found = list(heads.run(replace(QUICK, ceilings={"float32": 9.0, "bfloat16": 9.0, "copy": 9.0})))
    for shape in chosen:
        records = {r.contestant: r for r in found if r.case == shape.name}
        reason = records.pop("failing")
        assert reason.note == "RuntimeError: no such kernel" and not reason.values
        assert records[FLOOR].values["floor"] == records[OURS].values["of_ours"] == 1
        errors = {"nats_largest", "nats_mean"} if shape.mode == "no_grad" else {"error_loss", "error_grad_hidden"}
        errors |= {"error_grad_weight"} if shape.mode == "trained" else set()
        timed = {"seconds", "spread", "rounds", "floor", "tflops", "of_peak", "of_ours", "peak_mib"}
        for name, record in records.items():
            assert timed <= record.values.keys()
            assert record.conditions == shape.conditions
            assert name.startswith("floor") or errors <= record.values.keys()
    assert {"torch.mm float32", "multiply-adds float32", "torch.mm bfloat16", "copy"} <= {
        r.contestant for r in found if r.case == "ceilings"
    }
    logps = {r.contestant: r for r in found if r.case == shapes.LOGPS}
    assert logps["failing"].note == "RuntimeError: no such kernel"
    largest = {name: record.values.get("nats_largest") for name, record in logps.items()}
    assert largest[OURS_FP32_LOGITS] <= 2e-3 < largest["eager"]
    (peak,) = (r.values for r in found if r.case.startswith("peak memory"))
    assert peak["of_plan"] == peak["peak_mib"] / peak["planned_mib"] and peak["of_budget"] < peak["of_plan"]


def test_the_best_ceiling_of_each_dtype_counts():
    ceiling = [("a", 1.0, "float32"), ("b", 2.0, "float32"), ("a", 3.0, "bfloat16")]
    ceiling.append(("multiply-adds float32", 9.0, "float32"))  # what no product reaches
    found = [heads.Record("ceilings", who, {"tflops": rate}, {"dtype": dtype}) for who, rate, dtype in ceiling]
    assert heads.best_of(found) == {"float32": 2.0, "bfloat16": 3.0}


# Growth


@pytest.mark.parametrize("sizes", [growth.ON_CPU, growth.ON_GPU, growth.QUICK], ids=["cpu", "gpu", "quick"])
def test_along_a_curve_one_quantity_grows(sizes):
    for along, points in sizes.curves().items():
        own = [shape.conditions[along] for shape in points]
        assert own == sorted(set(own)) and len(own) > 1
        follows = {"N": (), "V": (), "K": ("N",)}[along]  # more candidates are more tokens
        for key in points[0].conditions.keys() - {along, *follows}:
            assert len({shape.conditions[key] for shape in points}) == 1, key
        # Compilers take a dimension of 1 for a constant.
        assert min(points[0].groups, points[0].candidates) > 1


def grown(monkeypatch, peer, limit=10.0, tokens=(128, 256, 384)):
    monkeypatch.setattr(growth, "PEERS", ("eager",))
    monkeypatch.setitem(VARYING, "eager", peer)
    points = replace(growth.QUICK, tokens=tokens).curves()["N"]
    found = list(growth.curve("N", points, limit, QUICK))
    assert all(r.values for r in found if r.contestant in (FLOOR, OURS))
    return [r for r in found if r.contestant == "eager"]


def test_a_slow_peer_grows_no_further(monkeypatch):
    found = grown(monkeypatch, BUILDERS["eager"], limit=0.0)
    assert [r.note.split(":")[0] for r in found] == ["", "", "grew no further"]  # two points are a curve
    assert [bool(r.values) for r in found] == [True, True, False]


def test_a_peer_that_is_wrong_at_a_later_point_goes_no_further(monkeypatch):
    loss = BUILDERS["eager"]().loss

    def wrong_later(hidden, *rest):
        return loss(hidden, *rest) * (1.0 if hidden[..., 0].numel() <= 128 else 2.0)

    first, *others = grown(monkeypatch, changed(loss=wrong_later))
    assert first.values and all("another loss" in r.note and not r.values for r in others)


def test_a_quick_run_has_every_point():
    records = list(growth.run(QUICK))
    points = {along: len(own) for along, own in growth.QUICK.curves().items()}
    for along, count in points.items():
        assert len([r for r in records if r.case == along and r.contestant == OURS]) == count
        assert len([r for r in records if r.case == along and r.note == "not in a quick run"]) == 3 * count
    small = [r.conditions for r in records if r.case == "small call fp32" and r.contestant == OURS]
    assert [(c["V"], c["H"], c["N"]) for c in small] == [(8192, 256, 64), (256, 64, 64)]


def test_compilers_compile_once_along_a_curve():
    peer, counters = VARYING["torch.compile"](), torch._dynamo.utils.counters
    torch._dynamo.reset()
    compiled = []
    for shape in growth.QUICK.curves()["N"]:
        peer.run(growth.mark(draw(shape), "N"))
        compiled.append(counters["stats"]["unique_graphs"])
    assert len(compiled) > 1 and len(set(compiled)) == 1


# Lengths


def corpus(*completion_lengths: int) -> Corpus:
    """Make completions that say of each token whose it is."""
    examples = [Example([0], [index] * length) for index, length in enumerate(completion_lengths)]
    return Corpus(examples, None)  # type: ignore[arg-type]


SIZES = replace(lengths.QUICK, batches=8, longest=9, vocab=61, hidden=8)


def task() -> Task:
    targets = lengths.draw_batches(corpus(2, 5, 7, 3, 9, 4), SIZES)
    return Task(targets, SIZES, CPU)


def lived(name: str) -> Life:
    life = Life()
    live(name, task(), life, Stopwatch(life, math.inf, lambda: None))
    return life


def test_batches_hold_whole_completions_of_different_examples():
    own = [2, 5, 7, 3, 9, 4, 30]
    batches = lengths.draw_batches(corpus(*own), SIZES)
    assert len(batches) == 8 and {len(batch) for batch in batches} <= set(lengths.GROUPS)
    for batch in batches:
        assert batch.shape[1:] == (lengths.CANDIDATES, (batch != IGNORE).sum(-1).max())
        for group in batch:
            examples = group[:, 0].tolist()
            assert len(set(examples)) == lengths.CANDIDATES and 6 not in examples  # longer than what is taken
            for tokens, example in zip(group, examples, strict=True):
                assert tokens[tokens != IGNORE].tolist() == [example] * own[example]
                assert (tokens[own[example] :] == IGNORE).all()
    with pytest.raises(ValueError, match="only 3 completions of at most 9 tokens"):
        lengths.draw_batches(corpus(1, 2, 3, 10), SIZES)


@pytest.mark.parametrize("name", [FLOOR, OURS, OURS_PAIRS, "eager"])
def test_a_life_has_every_call_and_checks_some(name):
    life = lived(name)
    assert life.work == (PAIRS if name == OURS_PAIRS else CPO)
    assert len(life.seconds) == 8 and life.total == sum(life.seconds)
    assert max(life.errors.values(), default=0) < 1e-5 and bool(life.errors) == (name != FLOOR)


def test_another_loss_is_refused_whenever_it_comes(monkeypatch):
    eager, calls = BUILDERS["eager"](), []

    def wrong_at_last(*tensors):
        calls.append(None)
        return eager.loss(*tensors) * (2 if len(calls) == 8 else 1)

    monkeypatch.setitem(VARYING, "wrong", changed(loss=wrong_at_last))
    with pytest.raises(AnotherLossError):
        lived("wrong")
    assert len(calls) == 8


def test_a_life_ends_after_the_call_that_passes_the_limit():
    class Slow(Stopwatch):
        """Says that every call takes 0.4 s."""

        def time(self, call):
            self.life.seconds.append(0.4)
            return call()

    life = Life()
    live("eager", task(), life, Slow(life, 1.0, lambda: None))
    assert life.seconds == [0.4] * 3


def test_a_call_without_end_is_counted_until_the_limit():
    life, stopped = Life(seconds=[0.5]), []
    Stopwatch(life, 0.7, lambda: stopped.append(life.total)).time(lambda: time.sleep(0.6))
    assert len(stopped) == 1 and 0.7 <= stopped[0] < 1.1


LIVES = {
    FLOOR: Life(CPO, [1.0] * 8),
    OURS: Life(CPO, [0.5] * 7 + [1.0], {"error_loss": 0.1}),
    OURS_PAIRS: Life(PAIRS, [2.0] * 8),
    "eager": Life(CPO, [3.0] * 3),
    "torch.compile": Life(CPO, [9.0] * 10 + [1.5] * 3),
    "Liger CPO": Life(PAIRS, [], {}, unfinished=40.0),
}


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Records of a case whose processes are made up, and the limits that they were given."""
    limits = {}

    def alone(function, path, name, limit, preload):
        limits[name] = limit
        if name not in LIVES:
            raise ProcessError("ImportError: not here")
        return LIVES[name]

    monkeypatch.setattr(lengths, "call_alone", alone)
    monkeypatch.setattr(lengths, "WARM", 2)
    targets = task()
    return list(lengths.records(replace(targets, sizes=replace(SIZES, limit=5.0)), tmp_path, lengths.PEERS)), limits


def test_ratios_are_of_totals_on_the_same_work(made_up):
    records, limits = made_up
    names = [record.contestant for record in records]
    assert names[:2] == [FLOOR, OURS] and names[-2:] == [OURS, FLOOR] and set(names) == {*lengths.OWN, *lengths.PEERS}
    found = {record.contestant: record for record in records}
    assert found[OURS].values["of_ours"] == 1.0 and found[OURS].values["floor"] == 4.5 / 8
    assert found[OURS].values["first"] == 0.5 and found[OURS].values["error_loss"] == 0.1
    assert found["Liger CPO"].values["of_ours"] == 40.0 / 16.0 and found["Liger CPO"].conditions["K"] == 1
    # What a call takes once it is compiled stands beside the life with the compilation.
    assert found["torch.compile"].values["of_ours"] == 94.5 / 4.5
    assert found["torch.compile"].values["steady_of_ours"] == 9.0 / 0.5
    assert "of_ours" not in found[FLOOR].values
    # Ours runs to its end, and everyone else for twice its time at least.
    assert limits[FLOOR] == limits[OURS] == limits[OURS_PAIRS] == math.inf and limits["eager"] == 9.0


def test_who_was_stopped_is_a_lower_bound_and_who_did_not_run_says_why(made_up):
    found = {record.contestant: record for record in made_up[0]}
    assert found["eager"].note == "stopped after 3 batches: >= 9.0 s" and found["eager"].values["batches"] == 3
    assert found["Liger CPO"].note == "stopped after 0 batches: >= 40.0 s"
    assert found["TRL fused head"].note == "ImportError: not here"
    assert all(record.note for record in found.values() if not record.values)


@pytest.mark.parametrize("name", [FLOOR, OURS])
def test_nothing_is_measured_without_ours_and_the_floor(name, monkeypatch, tmp_path):
    def alone(function, path, who, limit, preload):
        if who == name:
            raise ProcessError("MemoryError")
        return LIVES[who]

    monkeypatch.setattr(lengths, "call_alone", alone)
    with pytest.raises(ProcessError, match="MemoryError"):
        list(lengths.records(task(), tmp_path, ()))


def test_conditions_count_tokens_and_shapes():
    targets, found = task().targets, task().conditions
    tokens, positions = sum(int((t != IGNORE).sum()) for t in targets), sum(t.numel() for t in targets)
    assert found["N"] == tokens and found["padding"] == pytest.approx(1 - tokens / positions, abs=1e-3)
    assert found["shapes"] == len({t.shape for t in targets})
    again = lengths.draw_batches(texts.load(QUICK, longest=100), lengths.QUICK)
    assert len({batch.shape for batch in again}) > 2


# Filters


@pytest.fixture(scope="module")
def run():
    return real_run.train(QUICK, real_run.QUICK)


def test_the_run_is_looked_at_after_its_steps(run):
    (early, *_), (first, last) = run
    assert [tuple(looked.step for looked in some) for some in run] == [real_run.QUICK.choosing, real_run.QUICK.steps]
    assert not torch.equal(early.targets, first.targets)  # filters are not chosen on the texts that are timed
    assert not torch.equal(first.hidden, last.hidden) and not torch.equal(first.weight, last.weight)
    assert torch.equal(first.targets, last.targets)  # the same texts, and negatives that the reference draws
    assert first.layout.num_segments == real_run.QUICK.held_out * (1 + len(real_run.NEGATIVES))
    # Early in the run, model and reference are almost the same: contrasts near log(K + 1) and NLL near log V.
    contrast, both = (first.to(torch.float32, contrast_weight=1.0, mle_weight=weight).run()[0] for weight in (0.0, 1.0))
    assert contrast.item() == pytest.approx(math.log(1 + len(real_run.NEGATIVES)), rel=0.05)
    assert (both - contrast).item() == pytest.approx(math.log(len(first.weight)), rel=0.1)


def test_the_loss_by_definition_is_ours(run):
    problem = run[1][-1].to(torch.float32)
    oracle = Oracle(Dense(problem.hidden, problem.weight, problem.targets, problem.layout.rows), problem.loss_of)
    loss, grads, _ = problem.run()
    assert max(oracle.errors(loss.item(), *grads).values()) < 1e-4


def test_a_wide_head_has_the_same_logits_and_norms(run):
    looked, wide = run[1][-1], filters.widened(run[1][-1], 80)
    narrow, turned = (x.to(torch.float32, mle_weight=0.0).run() for x in (looked, wide))
    assert turned[0].item() == pytest.approx(narrow[0].item(), rel=1e-5)
    for one, other in zip(narrow[1], turned[1], strict=True):
        assert other.shape[1] == 80
        assert_close(other.norm(), one.norm(), rtol=1e-3, atol=0)


class Head:
    """One whose filter adds as much error as its eps is of a root."""

    def __init__(self, **roots):
        self.roots = roots

    def error_of_filter(self, **eps):
        return filters.BAR * sum(value / self.roots[name] for name, value in eps.items())


def test_the_largest_eps_of_the_grid_within_the_error_is_chosen():
    grid = filters.GRIDS["candidate_eps"]
    tolerant = Head(candidate_eps=9 * grid[3], grad_filter_eps=1e-9)
    chosen = filters.choose([tolerant, Head(candidate_eps=1.01 * grid[3], grad_filter_eps=1e-9)])
    assert chosen[filters.at_bar("candidate_eps")] == {"candidate_eps": grid[3]}
    assert chosen[filters.at_bar("grad_filter_eps")] == {"grad_filter_eps": 0.0}
    assert chosen[filters.at_bar("both")] == {"candidate_eps": grid[3], "grad_filter_eps": 0.0}


def test_filters_are_measured_and_wrong_ones_refused(run):
    alone = [looked.to(torch.float32, mle_weight=0.0) for some in run for looked in some]
    chosen = filters.choose([filters.Head("", early, QUICK) for early in alone[:2]])
    head = filters.Head("x", alone[-1], QUICK)
    found = {record.contestant: record for record in head.records(chosen)}
    assert found[FLOOR].values["floor"] == 1 and chosen.keys() < found.keys()
    assert found[OURS].values["dropped"] == found[OURS].values["error_filter"] == 0
    for name, grid in filters.GRIDS.items():
        dropped = [found[f"{name} {eps:.2g}"].values["dropped"] for eps in grid[::3]]
        assert dropped == sorted(dropped)
    loss, (grad_hidden, grad_weight), _ = head.problem.run()
    head.check({"candidate_eps": 0.1}, (loss, (0 * grad_hidden, grad_weight), 0.5))
    wrong = [(1.01 * loss, grad_hidden, grad_weight), (loss, 0 * grad_hidden, grad_weight)]
    for other, *grads in [*wrong, (loss, grad_hidden, grad_weight.roll(1, 0))]:
        with pytest.raises(AnotherLossError):
            head.check({}, (other, tuple(grads), 0.0))


# Training steps


CASE = Given("dpo", GPT2_TINY, groups=2, tokens=8)


def test_twins_share_parameters_and_nothing_else():
    model = make_model(GPT2_TINY, 16)
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not {id(module) for module in model.modules()} & {id(module) for module in other.modules()}


def test_trainers_are_fed_the_same_pairs_and_find_the_same(tmp_path):
    pytest.importorskip("trl")
    trainers = steps.Trainers(CASE, CPU, str(tmp_path))
    fed = []
    trainers.policy.register_forward_pre_hook(lambda _, a, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    trainers.trl_step("stock")()  # the hook is copied with the module
    assert [ids.shape for ids in fed] == [(4, 16)] and fed[0].numel() == steps.fed(CASE)
    assert not (fed[0][:, :-1] == GPT2_TINY.vocabulary - 1).any()  # no padding, and EOS is the last
    shared, separate = (trainers.our_step(how) for how in ("required", "off"))
    for step in (shared, separate):
        step()
    assert shared.positions == 2 * (8 + 2 * 7) and separate.positions == 2 * 2 * 15
    assert shared.tokens == separate.tokens == 2 * 2 * 8


def test_the_bound_runs_the_body_and_never_the_head(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("the head ran")

    trainers = steps.Trainers(CASE, CPU, str(tmp_path))
    free, whole = (trainers.our_step("off", free=is_free) for is_free in (True, False))
    for name in ("linear_cpo_loss", "linear_sequence_logps"):
        monkeypatch.setattr(steps.requests, name, refuse)
    loss, grads = free()
    body = [n for n, p in trainers.policy.named_parameters() if p.grad is not None and p.grad.any()]
    assert loss.isfinite() and len(grads) >= len(body) > 4
    with pytest.raises(RuntimeError, match="the head ran"):
        whole()


def test_the_bound_says_how_near_a_head_at_the_peak_comes(monkeypatch):
    """By hand: one pair of two words, so four words are predicted, by four products of (4, H) and (H, V) in DPO."""
    monkeypatch.setitem(sys.modules, "trl", None)
    case, setting = replace(CASE, groups=1, tokens=2), replace(QUICK, ceilings={"float32": 1e-9})
    bound = {record.contestant: record for record in steps.beside_trl(case, setting)}[steps.BOUND].values
    at_peak = 4 * 2 * 4 * case.sizes.vocabulary * case.sizes.width / 1e3  # at 1,000 operations a second
    assert bound[bars.AT_PEAK] == pytest.approx(bound["seconds"] / (bound["seconds"] + at_peak), rel=1e-12)


def test_a_wrong_trainer_has_a_note_and_no_values(monkeypatch):
    pytest.importorskip("trl")
    right, betas = steps.Trainers.arguments, iter([0.1, 0.1, 0.1, 0.2, 0.1, 0.1])
    monkeypatch.setattr(steps.Trainers, "arguments", lambda self: right(self) | {"beta": next(betas)})
    records = {record.contestant: record for record in steps.beside_trl(CASE, QUICK)}
    assert [name for name, record in records.items() if not record.values] == [OURS]
    bound = records.pop(steps.BOUND).values
    assert "differs from the first" in records[OURS].note
    stock = records[steps.STOCK].values
    assert bound["of_trl"] == stock["seconds"] / bound["seconds"] and "loss" not in bound  # no product of the head
    for record in records.values():
        if record.values:
            assert record.values["loss"] == pytest.approx(stock["loss"], rel=1e-4)
            assert record.values["of_trl"] == stock["seconds"] / record.values["seconds"]
            assert record.values["tokens_per_second"] == steps.fed(CASE) / record.values["seconds"]


def test_a_trainer_that_is_not_there_has_a_note(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    records = {record.contestant: record for record in steps.beside_trl(CASE, QUICK)}
    assert "ModuleNotFoundError" in records[steps.STOCK].note and not records[steps.STOCK].values
    assert records[OURS].values["loss"] > 0 and "of_trl" not in records[OURS].values


GROWTH, KINDS = negatives.cases(QUICK)


def steps_of(given, folder):
    model, reference = (given.model(CPU) for _ in range(2))
    return negatives.make_steps(given, model.train(), reference, str(folder))


def test_positions_and_tokens_are_those_of_the_texts(tmp_path):
    made, groups, length = steps_of(GROWTH, tmp_path), GROWTH.groups, GROWTH.tokens
    for way in negatives.WAYS["K"]:
        step = made[way.name]
        step()
        shared, separate = length + (way.k + 1) * (length - 1), (way.k + 1) * (2 * length - 1)
        assert step.positions == groups * (shared if way.shared else separate)
        assert step.tokens == groups * (way.k + 1) * length
    results = []
    for name in ("K = 4", "K = 4, sharing off"):
        made[name].trainer.state.global_step = 0
        made[name].trainer.model.zero_grad()
        loss, grads = made[name]()
        results.append((loss, [grad.clone() for grad in grads]))
    assert_close(*results, rtol=1e-5, atol=1e-6)


def test_every_call_draws_new_negatives_and_truncations_take_no_positions(tmp_path):
    made, gradients = steps_of(KINDS, tmp_path), set()
    base = made[negatives.BASE]
    for _ in range(3):
        base.trainer.model.zero_grad()
        gradients.add(float(base()[1][0].norm()))
    assert len(gradients) == 3
    for name in negatives.TRUNCATED:
        made[name]()
        assert made[name].positions == base.positions and made[name].tokens > base.tokens


def test_steps_with_negatives_are_compared_with_mle_and_with_one_negative():
    records = list(negatives.beside_mle(GROWTH, QUICK))
    assert all(record.values["rounds"] == 1 for record in records)
    expected = [(0, "off"), *((k, "on") for k in (1, 2, 4, 8, 16)), *((k, "off") for k in (1, 4))]
    assert [(r.conditions["K"], r.conditions["sharing"]) for r in records] == expected
    mle, base, *_ = (record.values["seconds"] for record in records)
    for record in records:
        assert record.values["of_mle"] == record.values["seconds"] / mle
        assert record.values["of_base"] == record.values["seconds"] / base and record.values["making"] > 0


# Prefix sharing


BODY = Given("sdpa", GPT2_TINY, groups=2, tokens=6)


def test_both_ways_have_the_same_rows():
    batch = sharing.Batch(BODY, CPU)
    assert batch.positions == {sharing.SHARED: 2 * 6 * (1 + sharing.CANDIDATES), sharing.SEPARATE: 2 * 5 * 12}
    shared, separate = batch.shared_ids.flatten()[batch.shared_rows], batch.separate_ids.flatten()[batch.separate_rows]
    assert torch.equal(shared, separate) and len(shared) == 2 * sharing.CANDIDATES * 7


def test_wrong_hidden_states_are_not_timed(monkeypatch):
    right, flat = sharing.tree_inputs, {"position_ids": torch.zeros(2, 36, dtype=torch.int64)}
    monkeypatch.setattr(sharing, "tree_inputs", lambda *args: right(*args) | flat)
    separate, shared = sharing.beside_separate(BODY, QUICK)
    assert separate.values and not shared.values and "differs from the first" in shared.note


def test_bodies_are_compared_and_an_attention_that_fails_has_a_note():
    separate, shared = sharing.beside_separate(BODY, QUICK)
    assert separate.values["ratio"] == 1
    assert shared.values["ratio"] == separate.values["seconds"] / shared.values["seconds"]
    assert separate.values["positions"] / shared.values["positions"] == pytest.approx(5 / 3)
    for record in sharing.beside_separate(replace(BODY, kind="flash_attention_none"), QUICK):
        assert not record.values and record.note and record.conditions["attention"] == "flash_attention_none"


def test_contestants_of_other_work_are_compared_with_ours_on_it():
    described = contestants.LineUp(draw(shapes.QUICK_CASES[0])).described(PAIRS)
    assert described["ratios"] == {"floor": FLOOR, "floor_ours": FLOOR_OURS, "of_ours": OURS_PAIRS}
    assert described["conditions"] == {"K": 1, "work": PAIRS}
