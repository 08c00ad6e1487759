"""The gradient of a weight that is embedding and head: what PyTorch's two are in sum, on a CPU to the bit."""

from __future__ import annotations

import threading

import pytest
import tiny_models
import torch
import transformers
from devices import DEVICE
from problems import DTYPES
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cpo_kernels import CandidateLayout, attach_linear_loss
from cpo_kernels.models import CPORequest, LogpsRequest, SequenceLossRequest, tied
from cpo_kernels.models.tied import TiedLookup

V = tiny_models.VOCAB
WORDS = 200  # more than rows of scratch
PAD = 0
# A GPU sums the rows of one token in another order.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2} if DEVICE.type == "cuda" else {}


def gemma3():
    """Its embedding multiplies what it looks up, and does not train the row of the padding."""
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    settings = {"pad_token_id": PAD, "initializer_range": 0.3, "tie_word_embeddings": True}
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **heads, **settings))
    nn.init.normal_(model.get_input_embeddings().weight[PAD])  # normalising zeros has gradients beyond float16
    return model


def tied_llama():
    return tiny_models.llama(vocab_size=WORDS, tie_word_embeddings=True)


def gpt2():
    return tiny_models.gpt2(vocab_size=WORDS)


MODELS = {"gpt2": gpt2, "gpt2, few words": tiny_models.gpt2, "gemma3": gemma3, "llama": tied_llama}
TARGETS = torch.arange(24) % V
LAYOUT = CandidateLayout([0, 6, 12, 18, 24], [0, 2, 4])
REQUESTS = {
    "cpo": lambda: CPORequest(TARGETS.to(DEVICE), LAYOUT, beta=0.5, mle_weight=0.2),
    "filtered": lambda: CPORequest(TARGETS.to(DEVICE), LAYOUT, beta=0.5, mle_weight=0.2, grad_filter_eps=1e-3),
    "any loss": lambda: SequenceLossRequest(TARGETS.to(DEVICE), LAYOUT, lambda logps, groups: -logps.sum()),
    "log-likelihoods": lambda: LogpsRequest(TARGETS.to(DEVICE), LAYOUT),
}


def ids() -> torch.Tensor:
    """Every token often, and some padding."""
    return (torch.arange(24, device=DEVICE).view(4, 6) * 5) % 7


def backward(model, request) -> None:
    out = model(ids(), linear_loss=request)
    (out.logps.sum() if out.loss is None else out.loss).backward()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_without(monkeypatch, model, run, rtol: float = TOLERANCE.get(torch.float32, 0.0)) -> None:
    """What ``run`` leaves is what it leaves where PyTorch adds the two gradients itself."""
    run()
    own = gradients(model)
    model.zero_grad(set_to_none=True)
    monkeypatch.setattr(tied, "_shares_a_gradient", lambda *_: False)
    run()
    for name, wanted in gradients(model).items():
        assert wanted.isfinite().all(), name
        torch.testing.assert_close(own[name], wanted, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("request_of", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_pytorch_to_the_bit(monkeypatch, make, request_of, dtype):
    model = attach_linear_loss(make().to(DEVICE)).to(dtype)
    assert_same_without(monkeypatch, model, lambda: backward(model, request_of()), TOLERANCE.get(dtype, 0.0))


def test_gradients_add_up_over_steps_and_over_passes_of_one_graph(monkeypatch):
    model = attach_linear_loss(tiny_models.gpt2().to(DEVICE))

    def run() -> None:
        first, second = (model(ids(), linear_loss=REQUESTS["cpo"]()).loss for _ in range(2))
        (first + 2 * second).backward(retain_graph=True)
        first.backward()
        backward(model, REQUESTS["any loss"]())

    assert_same_without(monkeypatch, model, run, rtol=1e-5)  # the four of one graph are summed in another order


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing(monkeypatch, use_reentrant):
    model = attach_linear_loss(tiny_models.gpt2().to(DEVICE)).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same_without(monkeypatch, model, lambda: backward(model, REQUESTS["cpo"]()))


def test_under_autocast(monkeypatch):
    model = attach_linear_loss(tiny_models.gpt2().to(DEVICE))

    def run() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(ids(), linear_loss=REQUESTS["cpo"]()).loss
        loss.backward()

    assert_same_without(monkeypatch, model, run)


def around_body(model):
    return tied.one_gradient(model.base_model, model.get_input_embeddings(), model.get_output_embeddings())


def is_shared(model) -> bool:
    with around_body(model):
        return isinstance(model.get_input_embeddings().forward, tied._TiedForward)


class EmbeddingGradients(TorchDispatchMode):
    """Numbers of rows of the gradients of embeddings, which are dense in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.embedding_dense_backward.default:
            self.rows.append(out.shape[0])
        return out


def embedding_gradients(model) -> list[int]:
    with EmbeddingGradients() as seen:
        backward(model, REQUESTS["cpo"]())
    return seen.rows


def test_the_embedding_has_no_gradient_of_its_own():
    positions = 64  # of GPT-2, learned
    assert sorted(embedding_gradients(attach_linear_loss(gpt2().to(DEVICE)))) == [ids().numel(), positions]
    assert sorted(embedding_gradients(attach_linear_loss(gemma3().to(DEVICE)))) == [ids().numel()]


def test_with_many_tokens_the_matrix_is_less_than_the_scratch():
    model = attach_linear_loss(tiny_models.llama(vocab_size=3 * ids().numel() - 1, tie_word_embeddings=True).to(DEVICE))
    assert embedding_gradients(model) == [3 * ids().numel() - 1]


def test_other_embeddings_are_left_alone():
    """An untied head, an embedding of another kind and one that hooks hold keep the gradient of PyTorch."""
    assert embedding_gradients(attach_linear_loss(tiny_models.llama().to(DEVICE))) == [V]
    model = attach_linear_loss(tied_llama().to(DEVICE))
    model.get_input_embeddings().scale_grad_by_freq = True
    assert embedding_gradients(model) == [WORDS]
    model.get_input_embeddings().scale_grad_by_freq = False
    model.get_input_embeddings().weight.ds_id = 0  # as ZeRO-3 marks what it gathers
    assert not is_shared(model)


def test_a_frozen_weight_and_no_grad_take_pytorchs_path():
    model = attach_linear_loss(tiny_models.gpt2().to(DEVICE))
    head = model.get_output_embeddings()
    for enabled, trained in ((True, False), (False, True)):
        head.weight.requires_grad_(trained)
        with torch.set_grad_enabled(enabled):
            assert not is_shared(model)
    head.weight.requires_grad_(False)
    backward(model, REQUESTS["cpo"]())
    assert head.weight.grad is None and model.transformer.wpe.weight.grad is not None


def test_a_replaced_forward_is_called_and_comes_back():
    model = attach_linear_loss(tied_llama().to(DEVICE))
    embedding = model.get_input_embeddings()
    calls = []

    def forward(ids):
        calls.append(ids)
        return nn.Embedding.forward(embedding, ids)

    embedding.forward = forward
    assert embedding_gradients(model) == [ids().numel()]
    assert len(calls) == 1 and embedding.forward is forward
    del embedding.forward
    with pytest.raises(ValueError, match="broken"), around_body(model):
        raise ValueError("broken")
    assert "forward" not in vars(embedding)


def unseen(forward):
    """Looks up first without gradients, then with them."""

    def both(ids):
        with torch.no_grad():
            forward(ids)
        return forward(ids)

    return both


def checkpointed(forward):
    """Reentrant: the forward pass has no gradients, and the one that has comes with the backward pass."""
    return lambda ids: checkpoint(
        lambda ids, _: forward(ids), ids, torch.ones(1, requires_grad=True), use_reentrant=True
    )


@pytest.mark.parametrize("wrapped", [unseen, checkpointed])
def test_a_lookup_without_gradients_does_not_count(monkeypatch, wrapped):
    model = attach_linear_loss(tied_llama().to(DEVICE))
    embedding = model.get_input_embeddings()
    embedding.forward = wrapped(embedding.forward)
    assert_same_without(monkeypatch, model, lambda: backward(model, REQUESTS["cpo"]()))


def compile_body(model, backend):
    model.transformer.compile(backend=backend, fullgraph=True)


def wrap_body(model, backend):
    model.transformer = torch.compile(model.transformer, backend=backend, fullgraph=True)


def compile_forward(model, backend):
    model.transformer.forward = torch.compile(model.transformer.forward, backend=backend, fullgraph=True)


@pytest.mark.parametrize("compiled", [compile_body, wrap_body, compile_forward])
def test_what_is_compiled_is_compiled_once(compiled):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = attach_linear_loss(gpt2().to(DEVICE))
    compiled(model, counter)
    for _ in range(3):
        backward(model, REQUESTS["cpo"]())
    assert counter.frame_count == 1
    assert not is_shared(model)


def test_compiled_layers_do_not_matter():
    model = attach_linear_loss(gpt2().to(DEVICE))
    for layer in model.transformer.h:
        layer.compile(backend="aot_eager")
    assert is_shared(model)


def test_threads_do_not_share_a_lookup():
    """While one thread is inside, another has PyTorch's two gradients."""
    model = attach_linear_loss(tied_llama().to(DEVICE))
    embedding = model.get_input_embeddings()
    found = []
    with around_body(model):
        thread = threading.Thread(target=lambda: found.append(embedding_gradients(model)))
        thread.start()
        thread.join()
        rows = embedding(ids())
    assert found == [[WORDS]] and type(rows.grad_fn).__name__ == "TiedLookupBackward"
    assert "forward" not in vars(embedding)


def unknown():
    raise NotImplementedError


@pytest.mark.parametrize("find", [None, unknown])
def test_a_model_that_does_not_name_its_embedding(monkeypatch, find):
    model = attach_linear_loss(tied_llama().to(DEVICE))
    head = model.get_output_embeddings()
    monkeypatch.setattr(model, "get_input_embeddings", find)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    assert embedding_gradients(model) == [WORDS]


@pytest.mark.parametrize("entries", [5, 100])
@pytest.mark.parametrize("used", ["both", "rows", "weight"])
@pytest.mark.parametrize("padding_idx", [-1, 2])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_each_output_may_go_unused(used, padding_idx, tokens, entries):
    """Also with no ids at all, and with a gradient that cannot be written to."""
    weight = torch.randn(entries, 3, device=DEVICE, dtype=torch.float64, requires_grad=True)
    which = (torch.arange(tokens, device=DEVICE) * 3 % 4).int()
    found = []
    for own in (True, False):
        if own:
            rows, alias = TiedLookup.apply(which, weight, padding_idx)
        else:
            rows, alias = nn.functional.embedding(which, weight, None if padding_idx < 0 else padding_idx), weight
        parts = {"rows": rows.square().sum(), "weight": alias.sum()}
        loss = parts["rows"] + parts["weight"] if used == "both" else parts[used]
        found.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
