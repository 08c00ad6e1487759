"""The load-balancing loss of mixtures of experts: the value and the gradients that the model itself would add."""

from __future__ import annotations

import pytest
import torch
from attach_cases import request_for
from expert_models import FAMILIES, experts, padded, router_loss
from torch.nn import functional

from cpo_kernels import CandidateLayout, attach_linear_loss
from cpo_kernels.models import CPORequest, LogpsRequest, SequenceLossRequest, pack_groups

LAYOUT = CandidateLayout([0, 3, 5, 8, 10], [0, 2, 4], rows=torch.tensor([1, 2, 3, 8, 9, 2, 3, 4, 8, 9]))
TARGETS = torch.tensor([5, 9, 4, 3, 12, 20, 7, 7, 11, 8])
REFERENCE = torch.tensor([-9.0, -5.0, -8.0, -7.0])


def gradients(model) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def dense(model, ids, targets, layout, ref_logps):
    """Of two groups of two candidates."""
    logps = model(ids).logits.flatten(0, 1).log_softmax(-1)[layout.rows, targets]
    sums = torch.stack([part.sum() for part in logps.split(torch.tensor(layout.cu_tokens).diff().tolist())])
    scores = (0.3 * (sums - ref_logps)).view(2, 2)
    return 0.75 * -scores.log_softmax(1)[:, 0].mean() - 0.25 * (sums[0] + sums[2]) / 6


@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradients_are_those_that_the_model_adds(family):
    model = experts(family).eval()
    ids, mask = padded()
    added = router_loss(model, ids, mask)
    want = dense(model, ids, TARGETS, LAYOUT, REFERENCE) + added
    want.backward()
    want_grads = gradients(model)
    model.zero_grad(set_to_none=True)

    attach_linear_loss(model)
    # JetMoe of transformers 5.10 adds it only where it is asked to by the call.
    asked = {"output_router_logits": True}
    out = model(ids, attention_mask=mask, **asked, linear_loss=request_for(TARGETS, LAYOUT, REFERENCE))
    out.loss.backward()
    assert float(added) > 0.1, "what is to be found is not nothing"
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.router_loss, added.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.aux_loss, model(ids, attention_mask=mask, **asked).aux_loss)
    for name, got in gradients(model).items():
        expected = want_grads[name]
        bound = 1e-5 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def test_the_value_by_hand():
    """Equations 4 to 6 of Fedus et al. 2022 (arXiv 2101.03961), for two experts a token, over all layers together."""
    model = attach_linear_loss(experts().eval())
    ids, mask = padded()
    out = model(ids, attention_mask=mask, linear_loss=LogpsRequest(TARGETS, LAYOUT))
    gates = torch.stack(model.model(ids, attention_mask=mask, output_router_logits=True).router_logits)
    probabilities = gates.softmax(-1)[:, mask.flatten().bool()].flatten(0, 1)  # (tokens of all layers, E)
    chosen = functional.one_hot(probabilities.topk(2).indices, 4).float()  # (tokens, 2, E)
    want = 4 * (chosen.mean(0) * probabilities.mean(0)).sum()
    torch.testing.assert_close(out.aux_loss, want, rtol=1e-5, atol=1e-6)
    assert out.loss is None and out.router_loss is None


def test_without_router_logits_nothing_is_added():
    ids, mask = padded()
    model = attach_linear_loss(experts(output_router_logits=False).eval())
    request = request_for(TARGETS, LAYOUT, REFERENCE)
    out = model(ids, attention_mask=mask, linear_loss=request)
    assert out.aux_loss is None and out.router_loss is None
    torch.testing.assert_close(out.loss, dense(model, ids, TARGETS, LAYOUT, REFERENCE), rtol=1e-5, atol=1e-6)
    asked = model(ids, attention_mask=mask, output_router_logits=True, linear_loss=request)
    torch.testing.assert_close(asked.loss, out.loss + 0.3 * asked.aux_loss)
    on = attach_linear_loss(experts().eval())
    assert on(ids, attention_mask=mask, output_router_logits=False, linear_loss=request).aux_loss is None


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_it_is_added(share):
    ids, mask = padded()
    model = attach_linear_loss(experts().eval())

    def loss_fn(logps, groups):
        return -logps.sum()

    plain, shared = (
        model(ids, attention_mask=mask, linear_loss=make)
        for make in (
            CPORequest(TARGETS, LAYOUT, router_share=share),
            SequenceLossRequest(TARGETS, LAYOUT, loss_fn, router_share=share),
        )
    )
    for out in (plain, shared):
        torch.testing.assert_close(out.router_loss, share * 0.3 * out.aux_loss.detach())
    torch.testing.assert_close(shared.loss, -dense_sum(model, ids) + share * 0.3 * shared.aux_loss)


def dense_sum(model, ids):
    return model(ids).logits.flatten(0, 1).log_softmax(-1)[LAYOUT.rows, TARGETS].sum()


def test_shared_prefixes_count_for_every_candidate():
    """One of which has a single token, and so no position of its own."""
    prompts = [[5, 9, 4, 8, 3], [7, 11]]
    completions = [[[4, 6, 8], [10], [12, 3]], [[5, 5, 6, 7], [8, 9]]]
    model = attach_linear_loss(experts().eval())
    batch = pack_groups(prompts, completions)
    rows = [[*p, *c[:-1]] for p, own in zip(prompts, completions, strict=True) for c in own]
    ids, mask = torch.zeros(len(rows), 8, dtype=torch.int64), torch.zeros(len(rows), 8, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    targets = torch.tensor([token for own in completions for c in own for token in c])
    bounds, groups = [0, 3, 4, 6, 10, 12], [0, 3, 5]
    packed = torch.tensor([row for own in batch.rows for c in own for row in c])
    apart = torch.tensor(
        [
            i * 8 + len(prompts[i > 2]) - 1 + t
            for i, c in enumerate(c for own in completions for c in own)
            for t in range(len(c))
        ]
    )
    outs, grads = [], []
    for inputs, where in (
        ({"input_ids": batch.input_ids, "prefix_tree": batch.tree}, packed),
        ({"input_ids": ids, "attention_mask": mask}, apart),
    ):
        model.zero_grad(set_to_none=True)
        out = model(**inputs, linear_loss=CPORequest(targets, CandidateLayout(bounds, groups, rows=where)))
        out.loss.backward()
        outs.append(out)
        grads.append(gradients(model))
    torch.testing.assert_close(outs[0].aux_loss, outs[1].aux_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outs[0].loss, outs[1].loss, rtol=1e-5, atol=1e-6)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_several_threads_and_a_copy_leave_the_model_alone():
    model = attach_linear_loss(experts().eval())
    modules, state = list(model.modules()), dict(vars(model))
    ids, mask = padded()
    model(ids, attention_mask=mask, linear_loss=request_for(TARGETS, LAYOUT, REFERENCE)).loss.backward()
    assert list(model.modules()) == modules and vars(model) == state
