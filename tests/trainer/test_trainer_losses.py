"""Losses of the trainer by name and by a function of one's own: loss and gradients as dense computations have them."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from pair_formulas import SMOOTHED, loss_of_pairs
from torch import Tensor
from trainer_runs import config, parameters, steps, trainer
from trainer_steps import GIVEN, NONE, candidates, micro_batch

from cpo_kernels.loss_table import LOSS_TYPES, TRL_LOGISTIC

pytestmark = pytest.mark.cpu
PAIRS = [example | {"negatives": example["negatives"][:1]} for example in GIVEN]
RAGGED = [GIVEN[0], GIVEN[1] | {"negatives": GIVEN[1]["negatives"][:2]}]


def run_of(path, examples, **options):
    """A trainer of a float64 model and reference, of GPT-2, as the norms of Llama round to float32."""
    model = tiny_models.gpt2().double()
    reference = None if options.get("reference") == "none" else tiny_models.gpt2(seed=1).double()
    loss_fn = options.pop("loss_fn", None)
    own = {} if loss_fn is None else {"loss_fn": loss_fn}
    options = {"beta": 0.4, "prefix_sharing": "off", **NONE, **options}
    return trainer(path, model, examples, ref_model=reference, **own, **options)


def logps_of(model, prompt, completion) -> Tensor:
    """The log-likelihood of one completion from its logits, differentiable."""
    text = torch.tensor([[*prompt, *completion]])
    logps = model(input_ids=text).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, text[0, 1:, None])[len(prompt) - 1 :, 0].sum()


def ratios_of(run, inputs, model, averaged: bool) -> tuple[list[Tensor], Tensor]:
    """For each group the log-likelihoods less those of the reference, and the NLL of all its truths' tokens."""
    reference = run.ref_model
    groups, nll, tokens = [], 0.0, 0
    for index, group in enumerate(candidates(run, inputs)):
        prompt = run.train_dataset.prompts[index]
        logps = torch.stack([logps_of(model, prompt, completion) for completion in group])
        nll, tokens = nll - logps[0], tokens + len(group[0])
        if reference is not None:
            with torch.no_grad():
                ref = torch.stack([logps_of(reference, prompt, completion) for completion in group])
            logps = logps - ref
        groups.append(logps / torch.tensor([len(c) for c in group]) if averaged else logps)
    return groups, nll / tokens


def assert_step_is(run, contrast_of, averaged: bool = False) -> None:
    """The loss of a batch, its parts and every gradient, against ``contrast_of`` the groups' ratios."""
    model, inputs = tiny_models.gpt2().double(), micro_batch(run, [0, 1])
    groups, nll = ratios_of(run, inputs, model, averaged)
    contrast = contrast_of(groups)
    want = run.args.alpha * contrast + run.args.mle_weight * nll
    out = run._forward(run.model, inputs)
    torch.testing.assert_close(out.loss, want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(out.contrastive_loss.double(), contrast.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(out.nll_loss.double(), nll.detach(), rtol=1e-9, atol=1e-11)
    rewards = torch.cat([run.args.beta * group for group in groups]).detach()
    torch.testing.assert_close(out.rewards, rewards, rtol=1e-9, atol=1e-11)
    out.loss.backward()
    want.backward()
    for (name, got), (_, own) in zip(run.model.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, own.grad, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss_type", [*LOSS_TYPES, *TRL_LOGISTIC])
def test_every_loss_type_is_the_dense_one(tmp_path, loss_type):
    name = "plackett_luce" if loss_type in TRL_LOGISTIC else loss_type
    smoothing = 0.0 if loss_type in TRL_LOGISTIC else SMOOTHED.get(loss_type, 0.0)
    run = run_of(tmp_path, PAIRS, loss_type=loss_type, label_smoothing=smoothing)

    def contrast_of(groups):
        good, bad = torch.stack(groups).unbind(1)
        return loss_of_pairs(name, good, bad, 0.4, smoothing=smoothing).mean()

    assert_step_is(run, contrast_of, averaged=loss_type == "sigmoid_norm")


def squares(logps: Tensor, groups: range) -> Tensor:
    """A loss that no option gives: squared distances of all ratios from a step below the first one."""
    present = logps.isfinite()
    logps = logps.masked_fill(~present, 0.0)
    return ((logps[:, :1] - logps[:, 1:] - 0.5).square() * present[:, 1:]).sum()


def dense_squares(groups: list[Tensor]) -> Tensor:
    return sum((group[0] - ratio - 0.5).square() for group in groups for ratio in group[1:]) / len(groups)


@pytest.mark.parametrize("reference", ["frozen", "none"])
@pytest.mark.parametrize("averaged", [False, True], ids=["sums", "means"])
@pytest.mark.parametrize("examples", [PAIRS, GIVEN, RAGGED], ids=["pairs", "groups", "ragged"])
def test_a_loss_of_ones_own_is_the_dense_one(tmp_path, examples, averaged, reference):
    run = run_of(tmp_path, examples, loss_fn=squares, length_normalized=averaged, reference=reference)
    assert_step_is(run, dense_squares, averaged)


def test_a_loss_in_chunks_and_over_shared_prefixes(tmp_path):
    """Each call of the function sees some groups of the batch; the width is that of the largest group of all."""
    seen = []

    def noted(logps, groups):
        seen.append((tuple(logps.shape), groups))
        return squares(logps, groups)

    run = run_of(tmp_path, RAGGED, loss_fn=noted, max_logits_bytes=2000, prefix_sharing="required")
    assert_step_is(run, dense_squares)
    assert seen == [((1, 4), range(0, 1)), ((1, 4), range(1, 2))]


def test_a_run_with_a_loss_of_ones_own_equals_that_of_the_option(tmp_path):
    """Accumulated batches, evaluation and logs, by the function that the option computes."""

    def logistic(logps, groups):
        return torch.nn.functional.softplus(0.4 * (logps[:, 1] - logps[:, 0])).sum()

    data = [{"prompt": e["prompt"], "completion": e["completion"]} for e in tiny_models.examples(8)]
    options = {"num_batch_negatives": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    runs = [run_of(tmp_path, data, eval_dataset=data, **own, **options) for own in ({}, {"loss_fn": logistic})]
    for run in runs:
        run.train()
    logs = [[*steps(run), run.evaluate()] for run in runs]
    for want, got in zip(*logs, strict=True):
        assert want.keys() == got.keys()
        for name in want:
            if not name.endswith(("runtime", "per_second")):
                assert got[name] == pytest.approx(want[name], rel=1e-6, abs=1e-9), name
    for name, value in parameters(runs[0]).items():
        torch.testing.assert_close(parameters(runs[1])[name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "loss_fn takes the place of the contrast, which alpha=0.0 leaves out"),
        ({"loss_type": "hinge"}, "loss_type='hinge' is for; use 'plackett_luce'"),
        ({"margin": 0.5}, "margin=0.5 is for"),
        ({"given_weight": 2.0}, "given_weight=2.0 is for"),
        ({"candidate_eps": 1e-3}, "candidate_eps=0.001 is for"),
        ({"ranking": "similarity"}, "ranking='similarity' is for"),
    ],
)
def test_options_that_a_loss_of_ones_own_would_ignore_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run_of(tmp_path, PAIRS, loss_fn=squares, **options)


def test_a_loss_without_a_gradient_is_refused(tmp_path):
    run = run_of(tmp_path, PAIRS, loss_fn=lambda logps, groups: logps.detach().sum())
    with pytest.raises(ValueError, match="loss_fn must return a scalar tensor that depends differentiably on logps"):
        run._forward(run.model, micro_batch(run, [0, 1]))


def test_means_that_are_refused_and_asked_for(tmp_path):
    with pytest.raises(ValueError, match="loss_type='sigmoid_norm' is of means, but length_normalized is False"):
        config(tmp_path, loss_type="sigmoid_norm", length_normalized=False)
    with pytest.raises(ValueError, match=r"loss_type='exo_pair' needs label_smoothing in \(0, 0.5\)"):
        config(tmp_path, loss_type="exo_pair", num_batch_negatives=1, num_truncation_negatives=0)
