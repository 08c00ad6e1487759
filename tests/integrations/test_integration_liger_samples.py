"""``cpo_kernels.integrations.liger`` against Liger itself where sequences stand alone: KTO, GRPO and its relatives."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tolerance import assert_accurate, relative_error
from torch import Tensor
from torch.testing import assert_close

# A development dependency, which constraints.txt pins and CI installs.
pytest.importorskip("liger_kernel")

from liger_kernel import chunked_loss as theirs
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction

from cpo_kernels.integrations import liger as ours
from cpo_kernels.integrations.liger import grpo, unpaired

B, T, V, H = 5, 7, 23, 6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities from stored logits in the dtype of hidden."""
    logits = (hidden @ weight.T if bias is None else hidden @ weight.T + bias) / temperature
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def leaves_of(dtype: torch.dtype, *, bias: bool = True) -> list[Tensor | None]:
    """_input, lin_weight and bias."""
    torch.manual_seed(3)
    tensors = torch.randn(B, T, H), torch.randn(V, H), torch.randn(V)
    return [x.to(dtype).requires_grad_() if bias or x.dim() > 1 else None for x in tensors]


def with_grads(loss: Tensor, aux: tuple[Tensor, ...], leaves: list[Tensor | None]) -> dict[str, Tensor]:
    """Loss, metrics and the gradients of an upstream gradient of 3, by name."""
    tracked = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(3 * loss, tracked)
    named = {"loss": loss.detach(), **{f"aux {i}": x for i, x in enumerate(aux)}}
    return named | {f"grad {i}": x for i, x in enumerate(grads)}


def assert_equals(got: dict, eager: dict, oracle: dict, liger: dict | None) -> None:
    """Ours obeys the rule; Liger, in float32, says that the oracle computes its loss."""
    assert got.keys() == oracle.keys() == eager.keys()
    for name, value in got.items():
        assert_accurate(value, eager[name], oracle[name], name)
        assert liger is None or relative_error(liger[name], oracle[name]) < 1e-4, f"Liger's {name}"


# KTO

LABELS = torch.tensor([True, False, True, True, False])
KTO = {
    "plain": {},
    "means": {"average_log_prob": True, "ignore_index": V - 1},
    "reference": {"use_ref_model": True, "ignore_index": V - 1},
    "baseline": {"use_ref_model": True, "average_log_prob": True, "kl": 0.3},
}


def kto_target(ignore_index: int) -> Tensor:
    torch.manual_seed(4)
    return torch.randint(V - 1, (B, T)).masked_fill(
        torch.arange(T) < torch.tensor([[0], [1], [3], [0], [5]]), ignore_index
    )


def kto_arguments(leaves: list[Tensor | None], target: Tensor, kl: Any) -> tuple:
    """The arguments of a call; the reference is like the model, with another bias."""
    hidden, weight, bias = leaves
    reference = hidden.detach() + 0.1, weight.detach() * 0.9, None if bias is None else bias.detach() + 0.2
    return hidden, weight, target, bias, LABELS, *reference, None if kl is None else torch.tensor([kl])


def dense_kto(module: Any, arguments: tuple, kl: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Liger's own formula of a chunk, of log-likelihoods from stored logits."""
    hidden, weight, target, bias, labels, ref_hidden, ref_weight, ref_bias, _ = arguments
    present = target != module.ignore_index
    words = target.where(present, 0)
    divisor = present.sum(-1) if module.average_log_prob else 1
    logps = (token_logps(hidden, weight, bias, words) * present).sum(-1) / divisor
    ref = (token_logps(ref_hidden, ref_weight, ref_bias, words) * present).sum(-1) / divisor
    given = {"ref_log_prob_chunk": ref if module.use_ref_model else None, "beta": module.beta, "kl": kl}
    loss, *rewards = LigerFusedLinearKTOFunction.preference_loss_fn(logps, labels, target, **given)
    logits = (hidden @ weight.T if bias is None else hidden @ weight.T + bias).detach().to(logps.dtype)
    sums = [values[mask].sum() for values in (logps, logits) for mask in (labels, ~labels)]
    return loss, tuple(x.detach() for x in (*sums, *rewards))


@pytest.mark.skipif(
    "unsqueeze(1)" in inspect.getsource(LigerFusedLinearKTOFunction.preference_loss_fn),
    reason="this liger-kernel gives each sequence's reward the label of every other",
)
@DTYPES
@pytest.mark.parametrize("name", KTO)
def test_kto_equals_liger(name, dtype):
    options = {"beta": 0.3} | KTO[name]
    kl, bias = options.pop("kl", None), name != "means"
    target = kto_target(options.get("ignore_index", -100))
    module = ours.LigerFusedLinearKTOLoss(**options)
    results = {}
    for kind in {dtype, torch.float64}:
        leaves = [None if x is None else x.detach().to(kind).requires_grad_() for x in leaves_of(dtype, bias=bias)]
        results[kind] = with_grads(*dense_kto(module, kto_arguments(leaves, target, kl), kl), leaves)
    leaves = leaves_of(dtype, bias=bias)
    got = with_grads(*module(*kto_arguments(leaves, target, kl)), leaves)
    liger = None
    if dtype == torch.float32:
        stock = theirs.LigerFusedLinearKTOLoss(**options, compiled=False, chunk_size=2)
        liger = with_grads(*stock(*kto_arguments(leaves, target, kl)), leaves)
    assert_equals(got, results[dtype], results[torch.float64], liger)


def test_kto_takes_a_baseline_for_each_sequence(monkeypatch):
    """Several chunks too, each of which takes its own."""
    leaves, target = leaves_of(torch.float32), kto_target(-100)
    kl = torch.linspace(-0.5, 0.5, B)
    module = ours.LigerFusedLinearKTOLoss(use_ref_model=True, beta=0.5)
    arguments = kto_arguments(leaves, target, None)[:-1]
    whole, seen = unpaired.linear_sequence_loss, []

    def in_chunks(hidden, weight, targets, loss_fn, **options):
        def counted(logps, groups):
            seen.append(groups)
            return loss_fn(logps, groups)

        return whole(hidden, weight, targets, counted, max_logits_bytes=T * V * 4, **options)

    monkeypatch.setattr(unpaired, "linear_sequence_loss", in_chunks)
    got = with_grads(*module(*arguments, kl), leaves)
    assert len(seen) >= B - 1
    expected = [
        with_grads(*module(*(x[i : i + 1] if j in (0, 2, 4, 5) else x for j, x in enumerate(arguments)), kl[i]), leaves)
        for i in range(B)
    ]
    for name, value in got.items():
        total = torch.stack([e[name] for e in expected]).sum(0)
        assert_close(value, total if name.startswith("aux") else total / B, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [None, LABELS[:-1], LABELS.long()], ids=["none", "too few", "integers"])
def test_kto_asks_for_labels(labels):
    hidden, weight, target, bias = kto_arguments(leaves_of(torch.float32), kto_target(-100), None)[:4]
    with pytest.raises(ValueError, match=r"preference_labels must be torch.bool of shape \(5,\), got"):
        ours.LigerFusedLinearKTOLoss()(hidden, weight, target, bias, labels)


# GRPO

GRPO = {
    "grpo": {"old": True, "delta": 1.2},
    "bnpo": {"ref_per_token_logps": True, "temperature": 0.7},
    "dr_grpo": {"max_completion_length": T + 2, "old": True, "ref": True},
    "dapo": {"old": True, "ref": True, "use_bias_correction_kl": True, "num_items_in_batch": 40},
    "cispo": {"epsilon_high": 1.1, "old": True},
    "sapo": {"old": True, "ref": True, "sapo_temperature_neg": 0.6, "vllm": (B, 1)},
    "luspo": {"old": True, "ref_per_token_logps": True},
    "vespo": {"old": True, "beta": 0.0, "vllm": (B, T), "vespo_k_neg": 2.5},
    "grpo of sequences": {"importance_sampling_level": "sequence", "old": True, "vllm": (B,)},
    "luspo of sequences": {"importance_sampling_level": "sequence", "old": True, "beta": 0.0},
    "dapo of sequences": {
        "importance_sampling_level": "sequence",
        "ref": True,
        "use_bias_correction_kl": True,
        "old": True,
    },
    "dapo without a model before": {},
}


class Samples:
    """The inputs of a call of GRPO, and what of them a case gives to it."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        options = {"loss_type": name.split()[0], "beta": 0.3} | GRPO[name]
        old, ref, ref_logps = (options.pop(key, False) for key in ("old", "ref", "ref_per_token_logps"))
        shape = options.pop("vllm", None)
        self.call = {key: options.pop(key) for key in ["num_items_in_batch"] if key in options}
        self.options = options | {"use_ref_model": bool(ref or ref_logps)}
        self.leaves = leaves_of(dtype, bias="sequences" not in name)
        torch.manual_seed(5)
        self.ids = torch.randint(V, (B, T))
        self.mask = (torch.arange(T) < torch.tensor([[7], [4], [7], [0], [5]])).long()
        self.advantages = torch.tensor([-1.0, 1.5, 0.4, 2.0, -0.3]).to(dtype)
        hidden, weight, bias = (None if x is None else x.detach() for x in self.leaves)
        self.reference = hidden + 0.1 * torch.randn(B, T, H).to(dtype), weight * 0.95, bias
        temperature = options.get("temperature", 1.0)
        near = token_logps(
            hidden.float(), weight.float(), None if bias is None else bias.float(), self.ids, temperature
        )
        self.old = near + 0.3 * torch.randn(B, T) if old else None
        self.ref_logps = near + 0.3 * torch.randn(B, T) if ref_logps else None
        self.ratio = None if shape is None else 0.5 + torch.rand(shape)

    def run(self, module: torch.nn.Module) -> dict[str, Tensor]:
        """The results of a module, ours or Liger's."""
        hidden, weight, bias = self.leaves
        given = self.ids, self.mask, self.advantages, bias, self.ref_logps, self.old
        needs_ref = module.use_ref_model and self.ref_logps is None
        reference = self.reference if needs_ref else (None, None, None)
        return with_grads(*module(hidden, weight, *given, *reference, self.ratio, **self.call), self.leaves)

    def dense(self, module: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        """The results of Liger's own formula of a chunk, of log-probabilities from stored logits in ``dtype``."""
        leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in self.leaves]
        logps = token_logps(*leaves, self.ids, module.temperature)
        wide = logps.dtype
        ref = self.ref_logps
        if module.use_ref_model and ref is None:
            reference = [None if x is None else x.to(dtype) for x in self.reference]
            ref = token_logps(*reference, self.ids, module.temperature)
        ratio = None if self.ratio is None else self.ratio.view(B, -1).to(wide)
        mask, old = self.mask.to(wide), None if self.old is None else self.old.to(wide)
        named = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
        given = {"ref_per_token_logps": None if ref is None else ref.to(wide), "old_per_token_logps": old}
        loss, metrics = LigerFusedLinearGRPOFunction.ppo_loss_fn(
            logps, mask, self.advantages.to(wide), mask, vllm_is_ratio=ratio, **given, **named, **self.call
        )
        return with_grads(loss, tuple(x.detach() for x in metrics), leaves)


@DTYPES
@pytest.mark.parametrize("name", GRPO)
def test_grpo_equals_liger(name, dtype):
    samples = Samples(name, dtype)
    module = ours.LigerFusedLinearGRPOLoss(**samples.options)
    eager, oracle = samples.dense(module, dtype), samples.dense(module, torch.float64)
    liger = None
    if dtype == torch.float32:
        liger = samples.run(theirs.LigerFusedLinearGRPOLoss(**samples.options, compiled=False, chunk_size=2))
    assert_equals(samples.run(module), eager, oracle, liger)


def test_grpo_in_several_chunks(monkeypatch):
    """Metrics and terms are put together from the chunks, and a sequence beyond the budget is computed twice."""
    samples = Samples("dapo", torch.float32)
    module = ours.LigerFusedLinearGRPOLoss(**samples.options)
    expected, whole = samples.run(module), grpo.linear_sequence_loss
    for rows in (8, 2):
        monkeypatch.setattr(
            grpo, "linear_sequence_loss", lambda *args, r=rows, **head: whole(*args, max_logits_bytes=r * V * 4, **head)
        )
        for name, value in samples.run(module).items():
            assert_close(value, expected[name])


@pytest.mark.parametrize("kind", ["grpo", "dapo", "luspo"])
def test_without_any_token_the_loss_is_0_as_in_liger(kind):
    samples = Samples(kind, torch.float32)
    samples.mask = torch.zeros_like(samples.mask)
    stock = theirs.LigerFusedLinearGRPOLoss(**samples.options, compiled=False)
    expected = samples.run(stock)
    for name, value in samples.run(ours.LigerFusedLinearGRPOLoss(**samples.options)).items():
        assert not value.any() and not expected[name].any(), name


def test_what_masked_positions_hold_has_no_effect():
    samples = Samples("grpo", torch.float32)
    module = ours.LigerFusedLinearGRPOLoss(**samples.options)
    expected = samples.run(module)
    absent = samples.mask == 0
    with torch.no_grad():
        samples.leaves[0][absent] = torch.nan
    samples.ids[absent], samples.old[absent] = -100, -torch.inf
    for name, value in samples.run(module).items():
        assert_close(value, expected[name], rtol=0, atol=0)
    samples.ids[0, 1] = -100
    with pytest.raises(ValueError, match=r"target \(0, 1\) is -100, expected a word or a token that attention_mask"):
        samples.run(module)


def test_grpo_compiled_without_a_break():
    samples = Samples("dapo", torch.float32)
    module = ours.LigerFusedLinearGRPOLoss(**samples.options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled.use_ref_model = module.use_ref_model
    expected = samples.run(module)
    for name, value in samples.run(compiled).items():
        assert_close(value, expected[name])


def test_kto_compiled_without_a_break():
    leaves, target = leaves_of(torch.float32), kto_target(V - 1)
    module = ours.LigerFusedLinearKTOLoss(ignore_index=V - 1, use_ref_model=True)
    arguments = kto_arguments(leaves, target, 0.3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, got = (with_grads(*m(*arguments), leaves) for m in (module, compiled))
    for name, value in got.items():
        assert_close(value, expected[name])


def test_both_kinds_of_reference_are_a_warning():
    samples = Samples("bnpo", torch.float32)
    hidden, weight, bias = samples.leaves
    module = ours.LigerFusedLinearGRPOLoss(**samples.options)
    expected = samples.run(module)["loss"]
    with pytest.warns(UserWarning, match="ref_input is not used"):
        given = samples.ids, samples.mask, samples.advantages, bias, samples.ref_logps, None
        loss, _ = module(hidden, weight, *given, *samples.reference)
    assert torch.equal(loss, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, r"loss_type must be one of \('grpo', .*, got 'ppo'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be 'token' or 'sequence', got 'word'"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be positive, got 0.0"),
        ({"delta": -1.0}, "delta must be positive, got -1.0"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "is not supported for loss_type='sapo'"),
        ({"loss_type": "dr_grpo"}, "'dr_grpo' needs max_completion_length, got None"),
        ({"use_ref_model": True}, "use_ref_model=True needs ref_per_token_logps, or ref_input and ref_weight"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    hidden, weight, _ = leaves_of(torch.float32)
    ids = torch.zeros(B, T, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        ours.LigerFusedLinearGRPOLoss(**{"use_ref_model": False} | options)(
            hidden, weight, ids, torch.ones(B, T), torch.ones(B)
        )


@pytest.mark.parametrize("wrong", ["hidden", "mask", "advantages", "ratio"])
def test_shapes_that_do_not_fit_are_refused(wrong):
    samples = Samples("sapo", torch.float32)
    hidden, weight, bias = samples.leaves
    given = {"hidden": hidden, "mask": samples.mask, "advantages": samples.advantages, "ratio": samples.ratio}
    given[wrong] = given[wrong][:-1]
    with pytest.raises(ValueError, match=r"must be .*\(?4"):
        ours.LigerFusedLinearGRPOLoss(use_ref_model=False)(
            given["hidden"], weight, samples.ids, given["mask"], given["advantages"], bias, vllm_is_ratio=given["ratio"]
        )
