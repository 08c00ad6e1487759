"""Names the shapes that are measured, and why each one is there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

PAIR = 2  # candidates of K = 1, for peers that contrast a pair only

# What is computed: K negatives with reference log-likelihoods; K = 1 without a reference; K = 1 with the hidden states
# and the head of a reference model; the mean cross-entropy of all tokens.
CPO, PAIRS, DPO, NLL = "cpo", "pairs", "dpo", "nll"
# And its gradients: all of them, none of the head, none at all (log-likelihoods only).
TRAINED, FROZEN, NO_GRAD = "trained", "frozen", "no_grad"


@dataclass(frozen=True)
class Shape:
    """Describes the tensors of one case: `groups` prompts with `candidates` completions of `tokens` tokens each."""

    name: str
    vocab: int
    hidden: int
    groups: int
    tokens: int
    dtype: torch.dtype
    reason: str = ""
    candidates: int = 4  # one ground truth and K = 3 negatives
    prompt_share: float = 0.0  # leading share of every sequence whose targets are -100
    smallest_budget: bool = False  # max_logits_bytes holds the logits of exactly one group
    work: str = CPO
    mode: str = TRAINED
    peers: tuple[str, ...] | None = None  # None: every peer that does this work
    without: tuple[str, ...] = ()  # of those
    variants: bool = True  # also ours with fp32 logits, and the floor with its outputs reused
    rounds: int = 3
    note: str = ""  # what a reader must know of the peers' figures

    @property
    def negatives(self) -> int:
        """Return K."""
        return self.candidates - 1

    @property
    def num_tokens(self) -> int:
        """Return N, prompt positions included."""
        return self.groups * self.candidates * self.tokens

    @property
    def prompt_tokens(self) -> int:
        """Return the leading positions of each sequence that predict nothing."""
        return int(self.tokens * self.prompt_share)

    @property
    def predicted_tokens(self) -> int:
        """Return N without the prompts."""
        return self.groups * self.candidates * (self.tokens - self.prompt_tokens)

    @property
    def sizes(self) -> dict[str, Any]:
        """Return what a record says of head and tokens."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"V": self.vocab, "H": self.hidden, "N": self.num_tokens, "K": self.negatives, "dtype": dtype}

    @property
    def conditions(self) -> dict[str, Any]:
        """Return all that a record says of it."""
        return self.sizes | {"prompt": self.prompt_share, "mode": self.mode, "work": self.work}

    def pairs(self) -> Shape:
        """Return the same tokens as K = 1: the candidates of each group, two by two."""
        return replace(self, groups=self.num_tokens // (PAIR * self.tokens), candidates=PAIR, work=PAIRS)

    def with_tokens(self, num_tokens: int) -> Shape:
        """Return the same kind of groups, N = `num_tokens` in all."""
        group = self.candidates * self.tokens
        groups, rest = divmod(num_tokens, group)
        if rest or not groups:
            raise ValueError(f"N must be a multiple of a group's {group} tokens, got {num_tokens}")
        return replace(self, groups=groups)


GPT2, LLAMA3 = (50257, 768), (128256, 1024)
GPT2_XL, OPENLLAMA_3B = (50257, 1600), (32000, 3200)
LLAMA3_8B, QWEN3, GEMMA3 = (128256, 4096), (151936, 4096), (262144, 2560)
SMALL = (509, 32)  # a prime: no tile divides it


def bf16(name: str, head: tuple[int, int], groups: int, tokens: int, reason: str, **options: Any) -> Shape:
    """Describe a shape in bfloat16 by the (V, H) of its head."""
    return Shape(f"{name} bf16", *head, groups, tokens, torch.bfloat16, reason, **options)


def fp32(name: str, head: tuple[int, int], groups: int, tokens: int, reason: str, **options: Any) -> Shape:
    """Describe a shape in float32 by the (V, H) of its head."""
    return Shape(f"{name} fp32", *head, groups, tokens, torch.float32, reason, **options)


# Peers by how far they are from ours where everyone is timed ("gpt2 1k"). Only there does every peer run on the CPU:
# the slower ones would take most of the time elsewhere, and come no closer.
FAST: dict[str, Any] = {"peers": ("torch.compile", "Cut Cross-Entropy"), "variants": False}
NEXT: dict[str, Any] = {"peers": ("Cut Cross-Entropy",), "variants": False}  # where compiling takes the time
ALONE: dict[str, Any] = {"peers": (), "variants": False}
CHUNKED = "F.linear_cross_entropy, chunked"  # the policy that torch picks
POLICIES = tuple(f"F.linear_cross_entropy, {policy}" for policy in ("accurate", "balanced", "compact"))
SLOW = (CHUNKED, *POLICIES)
CHUNKING: dict[str, Any] = {
    "variants": False,
    "note": "few tokens, because a chunked policy takes seconds at any N; chunking pays from N = H",
}
LARGEST_SHARE = "Llama 3's vocabulary: the largest share of softmax traffic"
BY_FAR = "the chunking policies of F.linear_cross_entropy"
CROSS_ENTROPY = ("F.linear_cross_entropy", "Cut Cross-Entropy", "QuACK")

CASES = (
    fp32("gpt2 1k", GPT2, 4, 64, "few tokens: costs that do not grow with N show", without=(*SLOW, "Liger DPO")),
    bf16("gpt2 1k", GPT2, 4, 64, "the same in bf16", rounds=4, without=SLOW),
    fp32("llama3 512", LLAMA3, 4, 32, LARGEST_SHARE, **NEXT),
    bf16("llama3 512", LLAMA3, 4, 32, LARGEST_SHARE, rounds=4, **FAST),
    fp32("gpt2 1k half prompt", GPT2, 4, 64, "skipping rows halves the GEMMs", prompt_share=0.5, **NEXT),
    bf16(
        "gpt2 1k half prompt",
        GPT2,
        4,
        64,
        "the same with every peer, but for the slow policies of one of them",
        prompt_share=0.5,
        rounds=4,
        without=(*SLOW, "Liger DPO"),
    ),
    bf16("gpt2 1k 0.8 prompt", GPT2, 4, 64, "long prompts and short answers", prompt_share=0.8, **ALONE),
    bf16("gpt2 1k frozen", GPT2, 4, 64, "a frozen head: two GEMMs", mode=FROZEN, rounds=4, **NEXT),
    bf16("gpt2 1k no_grad", GPT2, 4, 64, "log-likelihoods only: one GEMM", mode=NO_GRAD, rounds=5, **NEXT),
    bf16("gpt2 1k K=1", GPT2, 8, 64, "one negative with a reference: DPO's work", candidates=2, rounds=4, **ALONE),
    bf16("gpt2 1k K=4", GPT2, 4, 52, "four negatives", candidates=5, rounds=4, **ALONE),
    bf16("gpt2 1k K=16", GPT2, 2, 32, "many negatives", candidates=17, rounds=4, **ALONE),
    bf16("gpt2 1k smallest budget", GPT2, 2, 128, "one group per chunk", smallest_budget=True, rounds=4, **ALONE),
    bf16(
        "gpt2 1k cross-entropy",
        GPT2,
        4,
        64,
        "mean cross-entropy, the home of F.linear_cross_entropy and Cut Cross-Entropy",
        work=NLL,
        rounds=4,
        peers=CROSS_ENTROPY,
        variants=False,
    ),
    # In fp32 the policies differ in what they keep only.
    fp32("gpt2 16 policies", GPT2, 1, 4, BY_FAR, peers=(CHUNKED, POLICIES[0]), **CHUNKING),
    bf16("gpt2 16 policies", GPT2, 1, 4, BY_FAR, peers=SLOW, **CHUNKING),
    bf16("gpt2-xl 512", GPT2_XL, 2, 64, "GPT-2 XL", rounds=4, **NEXT),
    bf16("openllama-3b 512", OPENLLAMA_3B, 2, 64, "a small vocabulary under a wide model", rounds=4, **NEXT),
)
WIDE = (
    bf16("llama3-8b 256", LLAMA3_8B, 2, 32, "Llama 3 8B", rounds=8, **NEXT),
    bf16("qwen3 256", QWEN3, 2, 32, "Qwen 3, and the shape of TRL's issue 7244", rounds=8, **NEXT),
    bf16("gemma3 256", GEMMA3, 2, 32, "Gemma 3: the largest vocabulary", rounds=8, **NEXT),
)
_TEN: dict[str, Any] = {"rounds": 10}
_FAST_TEN = FAST | _TEN
GPU_CASES = (
    bf16("llama3-8b 8k", LLAMA3_8B, 16, 128, "the bar's shape, every peer", **_TEN),
    fp32("gpt2 8k", GPT2, 16, 128, "GPT-2's head, every peer", **_TEN),
    bf16("gpt2 8k", GPT2, 16, 128, "the same in bf16", **_TEN),
    bf16("qwen3 8k half prompt", QWEN3, 16, 128, "half prompt, every peer", prompt_share=0.5, **_TEN),
    bf16("llama3-8b 8k 0.8 prompt", LLAMA3_8B, 16, 128, "long prompts", prompt_share=0.8, **_FAST_TEN),
    bf16("llama3-8b 8k frozen", LLAMA3_8B, 16, 128, "a frozen head: two GEMMs", mode=FROZEN, **_FAST_TEN),
    bf16("llama3-8b 8k no_grad", LLAMA3_8B, 16, 128, "one GEMM", mode=NO_GRAD, **_FAST_TEN),
    bf16("llama3-8b 8k K=1", LLAMA3_8B, 32, 128, "one negative", candidates=2, **_FAST_TEN),
    bf16("llama3-8b 10k K=4", LLAMA3_8B, 16, 128, "four negatives", candidates=5, **_FAST_TEN),
    bf16("llama3-8b 17k K=16", LLAMA3_8B, 8, 128, "many negatives", candidates=17, **_FAST_TEN),
    bf16("llama3-8b 8k cross-entropy", LLAMA3_8B, 16, 128, "what QuACK computes", work=NLL, **_TEN),
    bf16("gpt2-xl 16k", GPT2_XL, 32, 128, "GPT-2 XL", **_FAST_TEN),
    bf16("openllama-3b 16k", OPENLLAMA_3B, 32, 128, "a small vocabulary under a wide model", **_FAST_TEN),
    bf16("qwen3 16k", QWEN3, 32, 128, "Qwen 3", **_FAST_TEN),
    bf16("gemma3 16k", GEMMA3, 32, 128, "Gemma 3: the largest vocabulary", **_FAST_TEN),
    bf16("llama3-8b 64k", LLAMA3_8B, 128, 128, "many tokens", rounds=5, **FAST),
)

# The shapes of an H200's bars.
_TWENTY: dict[str, Any] = {"peers": (), "rounds": 20}
BAR_8K = bf16("llama3 8k", LLAMA3_8B, 16, 128, "the bar's shape", **_TWENTY)
BAR_4K = bf16("llama3 4k", LLAMA3_8B, 8, 128, "published for plain cross-entropy on this chip", **_TWENTY)
BAR_QWEN = bf16("qwen 8k", QWEN3, 16, 128, "the shape of TRL's issue 7244", **_TWENTY)
BAR_NARROW = replace(BAR_8K, name="llama3 8k bf16, H=1024", hidden=1024, reason="little work a logit")
BAR_LOSSES = (
    BAR_4K,
    *(
        shape
        for trained in (BAR_8K, BAR_QWEN)
        for shape in (trained, replace(trained, name=f"{trained.name}, frozen", mode=FROZEN))
    ),
)
BAR_PEERS = (
    replace(BAR_QWEN, name=f"{BAR_QWEN.name}, every peer", peers=None),
    replace(BAR_QWEN, name=f"{BAR_QWEN.name}, every peer, half prompt", peers=None, prompt_share=0.5),
)

PEAK_MEMORY = tuple(make("gpt2 peak", GPT2, 8, 128, "several chunks at either N", **ALONE) for make in (fp32, bf16))
PEAK_MEMORY_TOKENS = (3072, 6144)  # the peak must not depend on N
GPU_PEAK_MEMORY = (bf16("llama3-8b peak", LLAMA3_8B, 32, 128, "several chunks at either N", **ALONE),)
GPU_PEAK_MEMORY_TOKENS = (16384, 65536)
# A pair, for peers that know no other.
ACCURACY = replace(bf16("", GPT2, 1, 1024, "1024 log-probabilities summed", candidates=PAIR), name="accuracy")

# A part in seconds: nothing compiles.
STILL = ("eager", "F.linear_cross_entropy", "TRL fused head", "QuACK")
_QUICK: dict[str, Any] = {"rounds": 1, "peers": STILL}
QUICK_CASES = (
    bf16("quick", SMALL, 4, 16, "every contestant", **_QUICK),
    fp32("quick half prompt", SMALL, 4, 16, "ignored tokens", prompt_share=0.5, **_QUICK),
    fp32("quick smallest budget", SMALL, 4, 16, "one group per chunk", smallest_budget=True, rounds=1, peers=()),
    fp32("quick frozen", SMALL, 4, 16, "a frozen head", mode=FROZEN, **_QUICK),
    fp32("quick no_grad", SMALL, 4, 16, "log-likelihoods", mode=NO_GRAD, **_QUICK),
    bf16("quick no_grad", SMALL, 4, 16, "log-likelihoods", mode=NO_GRAD, **_QUICK),
    bf16("quick cross-entropy", SMALL, 4, 16, "the mean cross-entropy", work=NLL, **_QUICK),
    bf16("quick policies", SMALL, 1, 2, "a note", rounds=1, peers=POLICIES[2:], **CHUNKING),
)
QUICK_ACCURACY = replace(ACCURACY, vocab=SMALL[0], hidden=SMALL[1], tokens=64, peers=STILL)


def tiny(shape: Shape) -> Shape:
    """Return a small shape of the same dtype, work and prompt share, whose times mean nothing."""
    return replace(shape, vocab=SMALL[0], hidden=SMALL[1], groups=2, tokens=16)
