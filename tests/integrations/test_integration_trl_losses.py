"""TRL's DPO losses that are no options of the objective: equal to stock, in one chunk of logits and in several."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("trl")

import tiny_models
import trl
from expert_models import experts
from problems import GemmCounter
from tolerance import assert_accurate
from torch.nn.functional import logsigmoid
from trl_runs import assert_histories_equal, first_batch, history, make, preferences, step, untied, untimed

from cpo_kernels import CandidateLayout
from cpo_kernels.integrations.padded_rows import MeanLogitsRequest
from cpo_kernels.integrations.trl import FusedDPOTrainer
from cpo_kernels.integrations.trl_losses import PairLosses, PairLossRequest
from cpo_kernels.models import CPORequest, LogpsRequest, StatisticsRequest
from cpo_kernels.models.adapters import AppliedHead

pytestmark = pytest.mark.cpu
OF_DIVERGENCES = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"]
MIXED = [1.0, 0.5, 0.25, 0.02, 0.5, 0.3, 0.2, 0.7]
CASES = {
    "sft": {"loss_type": ["sft"], "loss_weights": [0.7]},
    "aot": {"loss_type": ["aot"], "label_smoothing": 0.2},
    "aot_unpaired, sft": {"loss_type": ["aot_unpaired", "sft"], "loss_weights": [0.6, 0.3]},
    "sigmoid, apo_down, sft": {"loss_type": ["sigmoid", "apo_down", "sft"], "loss_weights": [0.7, 0.2, 0.5]},
    "discopop, tau": {"loss_type": ["discopop"], "discopop_tau": 0.3},
    "ld_alpha": {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.3, "loss_weights": [1.0, 0.4]},
    "ld_alpha of aot": {"loss_type": ["aot", "sppo_hard"], "ld_alpha": 0.6, "loss_weights": [1.0, 0.1]},
    "ld_alpha 1": {"loss_type": ["sigmoid_norm"], "ld_alpha": 1.0},
    "WPO": {
        "loss_type": ["sigmoid", "bco_pair", "nca_pair", "apo_zero"],
        "loss_weights": [0.7, 0.4, 0.2, 0.3],
        "use_weighting": True,
    },
    "WPO, ld_alpha": {"loss_type": ["robust"], "label_smoothing": 0.1, "use_weighting": True, "ld_alpha": 0.5},
    "forward_kl": {"loss_type": OF_DIVERGENCES, "loss_weights": MIXED, "f_divergence_type": "forward_kl"},
    "js_divergence": {"loss_type": OF_DIVERGENCES, "loss_weights": MIXED, "f_divergence_type": "js_divergence"},
    "alpha 0.5": {"loss_type": OF_DIVERGENCES, "loss_weights": MIXED, "f_divergence_type": "alpha_divergence"},
    "alpha 1": {
        "loss_type": ["ipo", "sft"],
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 1.0,
    },
}
CASES |= {name: CASES[name] | {"label_smoothing": 0.1} for name in ("forward_kl", "js_divergence", "alpha 0.5")}
# Those of which linear_cpo_loss has options.
OF_OBJECTIVE = {"sft", "ld_alpha 1", "alpha 1"}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Data sets made from generators are cached on disk."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def dpo(trainer, tmp_path, arguments=None, **keywords):
    models = {"model": untied(), "ref_model": untied(1)}
    return make(trainer, trl.DPOConfig, tmp_path, arguments=arguments, **models | keywords)


def metrics_of(trainer) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_step_equals(found, expected):
    (loss, grads), (want, want_grads) = found, expected
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        scale = want_grads[name].abs().max().item()
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_metrics_equal_stock(tmp_path, name):
    stock = dpo(trl.DPOTrainer, tmp_path, CASES[name])
    ours = dpo(FusedDPOTrainer, tmp_path, CASES[name], token_metrics=True)
    batch = first_batch(ours)
    expected = step(stock, first_batch(stock))
    assert_step_equals(step(ours, batch), expected)
    assert metrics_of(ours) == pytest.approx(metrics_of(stock), rel=1e-5, abs=1e-6)
    assert {"entropy", "mean_token_accuracy"} < metrics_of(ours).keys()
    assert (ours.losses.objective is not None) is (name in OF_OBJECTIVE)


@pytest.mark.parametrize("name", ["sigmoid, apo_down, sft", "ld_alpha", "aot", "WPO, ld_alpha"])
def test_three_chunks_of_logits_equal_stock(tmp_path, monkeypatch, name):
    """A function of log-likelihoods sees a pair at a time; ``aot`` sees the batch, whose logits come in parts."""
    pairs, original = [], PairLosses._contrast
    watched = lambda self, name, policy, *rest: pairs.append(len(policy)) or original(self, name, policy, *rest)  # noqa: E731
    monkeypatch.setattr(PairLosses, "_contrast", watched)
    stock = dpo(trl.DPOTrainer, tmp_path, CASES[name])
    ours = dpo(FusedDPOTrainer, tmp_path, CASES[name], token_metrics=True)
    ours.objective["max_logits_bytes"] = 1500
    batch = first_batch(ours)
    with GemmCounter() as products:
        found = step(ours, batch)
    rows = [m for m, n, _ in products.shapes if n == tiny_models.VOCAB]
    losses = sum(name != "sft" for name, _ in ours.losses.weights)
    assert pairs == ([3] * losses if ours.losses.whole_batch else [1] * 3 * losses)
    assert len(rows) >= 9 and max(rows) < sum(rows) / 9 * 2  # three products of reference, loss and statistics each
    assert_step_equals(found, step(stock, first_batch(stock)))
    assert metrics_of(ours) == pytest.approx(metrics_of(stock), rel=1e-5, abs=1e-6)


def log_likelihoods(dtype, batch):
    """Per-token log-probabilities of policy and reference, 0 beyond the completions, and the policy."""
    model, ref_model = (untied(seed).to(dtype) for seed in (0, 1))
    mask, ids = batch["completion_mask"][:, 1:].bool(), batch["input_ids"]

    def of(one):
        logits = one(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * mask, logits

    policy, logits = of(model)
    with torch.no_grad():
        return policy, of(ref_model)[0], logits, mask, model


def desensitized(per_token, mask, alpha):
    """Per-token log-probabilities of pairs: those beyond the shorter length count ``alpha`` times."""
    shared = mask.sum(-1).view(-1, 2).amin(1).repeat_interleave(2)
    return torch.where(mask.cumsum(-1) <= shared[:, None], per_token, alpha * per_token).sum(-1).view(-1, 2)


def ld_with_sft(policy, ref, logits, mask):
    ratios = desensitized(policy, mask, 0.3) - desensitized(ref, mask, 0.3)
    return -logsigmoid(0.3 * (ratios[:, 0] - ratios[:, 1])).mean() - 0.4 * policy[::2].sum() / mask[::2].sum()


def aot(policy, ref, logits, mask):
    own, other = (x.sum(-1).view(-1, 2) for x in (policy, ref))
    d = (own[:, 0] - own[:, 1]).sort().values - (other[:, 0] - other[:, 1]).sort().values
    return (-0.8 * logsigmoid(0.3 * d) - 0.2 * logsigmoid(-0.3 * d)).mean()


def weighted_sft(policy, ref, logits, mask):
    """TRL stops at this, with an error of an in-place product."""
    log_p = logits.detach().log_softmax(-1)
    aligned = (policy.detach() - (2 * log_p).logsumexp(-1)) * mask
    weights = (aligned.sum(-1) / mask.sum(-1)).view(-1, 2).sum(1).exp()
    return -policy[::2].sum() / mask[::2].sum() * weights.mean()


FORMULAS = {
    "ld_alpha": (CASES["ld_alpha"], ld_with_sft),
    "aot": (CASES["aot"], aot),
    "sft, WPO": ({"loss_type": ["sft"], "use_weighting": True}, weighted_sft),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("arguments", "formula"), FORMULAS.values(), ids=FORMULAS)
def test_loss_and_gradients_by_the_policy(tmp_path, arguments, formula, dtype):
    models = {"model": untied().to(dtype), "ref_model": untied(1).to(dtype)}
    trainer = dpo(FusedDPOTrainer, tmp_path, arguments, **models)
    batch = first_batch(trainer)
    losses, grads = [], []
    for kind in (dtype, torch.float64):
        *inputs, model = log_likelihoods(kind, batch)
        loss = formula(*inputs)
        loss.backward()
        losses.append(loss.detach())
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    loss, found = step(trainer, batch)
    assert_accurate(loss.to(dtype), *losses, "loss")
    assert found.keys() == grads[1].keys()
    for name, grad in found.items():
        assert_accurate(grad, grads[0][name], grads[1][name], name)


@pytest.mark.parametrize("precomputed", [False, True], ids=["asked", "precomputed"])
def test_a_run_logs_what_stock_logs(tmp_path, precomputed):
    arguments = CASES["ld_alpha"] | {"precompute_ref_log_probs": precomputed, "gradient_accumulation_steps": 2}
    logged = []
    for trainer, keywords in ((trl.DPOTrainer, {}), (FusedDPOTrainer, {"token_metrics": True})):
        made = dpo(trainer, tmp_path, arguments, eval_dataset=preferences(5, seed=4), **keywords)
        logged.append([*history(made), untimed(made.evaluate())])
    assert_histories_equal(*logged)


def test_statistics_are_no_part_of_a_compiled_graph():
    hidden, weight, targets = torch.randn(4, 8), torch.randn(11, 8), torch.tensor([3, 5, -100, 7])
    logps = LogpsRequest(targets, CandidateLayout([0, 2, 4], [0, 2]))
    statistics = StatisticsRequest(targets, torch.arange(4), entropy=True, top1=True)
    request = MeanLogitsRequest(logps, torch.arange(4), statistics=statistics)

    def compute(hidden):
        return request.compute(hidden, AppliedHead(hidden, weight, None), {})

    want, out = compute(hidden), torch.compile(compute, backend="eager")(hidden)
    torch.compiler.reset()
    for name in ("logps", "entropy", "mean_logits"):
        torch.testing.assert_close(out[name], want[name])
    assert torch.equal(out.top1, want.top1)


@pytest.mark.parametrize(
    ("options", "rows", "products"),
    [
        ({"ld_alpha": 0.3}, None, 3),
        ({"f_divergence_type": "forward_kl"}, None, 3),
        ({"use_weighting": True}, None, 4),
        ({"weights": (("aot", 1.0),)}, None, 3),
        ({"weights": (("aot", 1.0),)}, 5, 4),
        ({"weights": (("sft", 1.0),), "use_weighting": True}, 5, 5),
    ],
)
def test_products_of_the_head_are_those_of_the_documentation(options, rows, products):
    losses = PairLosses(**{"weights": (("sigmoid", 1.0),), "beta": 0.1} | options)
    hidden, weight, targets = torch.randn(12, 8), torch.randn(31, 8), torch.randint(31, (12,))
    layout = losses.split(CandidateLayout([0, 4, 6, 9, 12], [0, 2, 4]))
    request = PairLossRequest(losses, targets, layout, torch.zeros(4), max_logits_bytes=rows and rows * 31 * 4)
    head = AppliedHead(hidden.requires_grad_(), weight.requires_grad_(), None)
    with GemmCounter() as counter:
        request.compute(hidden, head, {}).loss.backward()
    assert counter.products(12, weight) == products


def test_experts_with_a_router_loss(tmp_path):
    made = [
        dpo(trainer, tmp_path, CASES["WPO"], model=experts(), ref_model=experts())
        for trainer in (trl.DPOTrainer, FusedDPOTrainer)
    ]
    expected, found = (step(trainer, first_batch(trainer)) for trainer in made)
    assert_step_equals(found, expected)
    assert metrics_of(made[1])["aux_loss"] == pytest.approx(metrics_of(made[0])["aux_loss"], rel=1e-5)


def test_a_router_without_a_loss_is_refused_with_the_way_out(tmp_path, monkeypatch):
    trainer = dpo(FusedDPOTrainer, tmp_path)
    trainer.aux_loss_enabled, trainer.router_aux_loss_coef = True, 0.5
    monkeypatch.setattr(trainer.model.config, "output_router_logits", False, raising=False)
    with pytest.raises(ValueError, match=r"set router_aux_loss_coef=0\.0\. trl\.DPOTrainer .* patch_fused_head\(\)"):
        step(trainer, first_batch(trainer))


def test_token_metrics_of_several_negatives(tmp_path):
    """Entropy of all candidates' tokens, accuracy of the chosen ones'."""
    trainer = dpo(FusedDPOTrainer, tmp_path, data=preferences(negatives=(2, 3, 1)), token_metrics=True)
    batch = first_batch(trainer)
    step(trainer, batch)
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].detach()
    mask, log_p = batch["completion_mask"][:, 1:].bool(), logits.log_softmax(-1)
    chosen = torch.cumsum(torch.tensor([0, *batch["group_sizes"][:-1]]), 0)
    right = (logits.argmax(-1) == batch["input_ids"][:, 1:])[chosen][mask[chosen]]
    expected = {
        "entropy": -(log_p.exp() * log_p).sum(-1)[mask].mean().item(),
        "mean_token_accuracy": right.float().mean().item(),
    }
    logged = metrics_of(trainer)
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("arguments", [{"ld_alpha": 0.5}, {"loss_type": ["aot"]}], ids=["ld_alpha", "aot"])
def test_several_negatives_are_refused_by_losses_of_pairs(tmp_path, arguments):
    trainer = dpo(FusedDPOTrainer, tmp_path, arguments, data=preferences(negatives=2))
    with pytest.raises(ValueError, match=r"needs one negative per prompt \(K = 1\), got K = 2; plain 'sigmoid' or"):
        step(trainer, first_batch(trainer))


def test_sft_of_several_negatives_is_that_of_the_chosen(tmp_path):
    trainer = dpo(FusedDPOTrainer, tmp_path, CASES["sft"], data=preferences(negatives=(2, 3, 1)))
    batch = first_batch(trainer)
    policy, *_, mask, _ = log_likelihoods(torch.float32, batch)
    chosen = torch.cumsum(torch.tensor([0, *batch["group_sizes"][:-1]]), 0)
    expected = -0.7 * policy[chosen].sum() / mask[chosen].sum()
    torch.testing.assert_close(step(trainer, batch)[0], expected.detach())


def test_filters_hold_for_the_loss_alone(tmp_path):
    """Calls without gradients, of the reference and of metrics, have no filters."""
    for arguments in ({}, CASES["WPO"]):
        trainer = dpo(FusedDPOTrainer, tmp_path, arguments, token_metrics=True)
        batch = first_batch(trainer)
        expected = step(trainer, batch)[0]
        trainer.objective["grad_filter_eps"] = 1e-9
        torch.testing.assert_close(step(trainer, batch)[0], expected)


def test_an_option_of_the_objective_is_refused_by_a_function_of_log_likelihoods(tmp_path):
    trainer = dpo(FusedDPOTrainer, tmp_path, CASES["aot"])
    trainer.objective["beta"] = 0.5
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        step(trainer, first_batch(trainer))


def test_one_name_is_one_option_of_the_objective(tmp_path):
    """A name twice is a sum, which a dictionary of weights would lose."""
    options = {"beta": 0.3}
    assert PairLosses((("sigmoid", 1.0),), **options).objective["loss_type"] == "plackett_luce"
    assert PairLosses((("sft", 1.0),), **options).objective["contrast_weight"] == 0
    assert PairLosses((("sigmoid", 1.0), ("sigmoid", 1.0)), **options).objective is None
    trainer = dpo(FusedDPOTrainer, tmp_path, {"loss_type": ["sigmoid"] * 2, "loss_weights": [0.25, 0.5]})
    batch = first_batch(trainer)
    alone = dpo(FusedDPOTrainer, tmp_path)
    assert isinstance(alone._request(None, None, None), CPORequest)
    torch.testing.assert_close(step(trainer, batch)[0], 0.75 * step(alone, batch)[0])


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"weights": (("dpop", 1.0),)}, r"loss_type='dpop' is not computed here; .*takes what TRL has, with patch_fus"),
        ({"f_divergence_type": "hellinger"}, r"f_divergence_type='hellinger' is not computed here\. trl\.DPOTrainer"),
        ({"weights": (("exo_pair", 1.0),)}, r"loss_type='exo_pair' needs label_smoothing in \(0, 0.5\)"),
        ({"weights": (("aot", 1.0),), "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"weights": (("sft", math.nan),)}, "contrast_weight must be a finite number, got nan"),
        ({"beta": 0.0}, r"beta must be a positive number, got 0\.0"),
    ],
)
def test_what_is_not_computed_is_named(losses, message):
    with pytest.raises(ValueError, match=message):
        PairLosses(**{"weights": (("sigmoid", 1.0),), "beta": 0.1} | losses)
