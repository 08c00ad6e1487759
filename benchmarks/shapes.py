"""The shapes that are measured, and why each one is there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

CANDIDATES = 4  # one ground truth and K = 3 negatives
PAIR = 2  # K = 1, for peers that contrast a pair only

# What is computed: K negatives with reference log-likelihoods; K = 1 without a reference; K = 1 with the hidden states
# and the head of a reference model; the mean cross-entropy of all tokens.
CPO, PAIRS, DPO, NLL = "cpo", "pairs", "dpo", "nll"
# And its gradients: all of them, none of the head, none at all (log-likelihoods only).
TRAINED, FROZEN, NO_GRAD = "trained", "frozen", "no_grad"

# Peers by how far they are from ours where everyone is timed ("gpt2 1k"). Only there does every peer run on the CPU:
# the slower ones would take most of the time elsewhere, and come no closer.
FAST = ("torch.compile", "Cut Cross-Entropy")


@dataclass(frozen=True)
class Shape:
    """One measured case: `groups` prompts with `candidates` completions of `tokens` tokens each."""

    name: str
    vocab: int
    hidden: int
    groups: int
    tokens: int
    dtype: torch.dtype
    reason: str
    candidates: int = CANDIDATES
    prompt_share: float = 0.0  # leading share of every sequence whose targets are -100
    smallest_budget: bool = False  # max_logits_bytes holds the logits of exactly one group
    work: str = CPO
    mode: str = TRAINED
    peers: tuple[str, ...] | None = None  # None: every peer that does this work
    without: tuple[str, ...] = ()  # of those
    variants: bool = True  # also ours with fp32 logits, and the floor with its outputs reused
    rounds: int = 2  # of those that are close to the floor
    note: str = ""  # what a reader must know of the peers' figures

    @property
    def negatives(self) -> int:
        """K."""
        return self.candidates - 1

    @property
    def num_tokens(self) -> int:
        """N, prompt positions included."""
        return self.groups * self.candidates * self.tokens

    @property
    def prompt_tokens(self) -> int:
        """Leading positions of each sequence that predict nothing."""
        return int(self.tokens * self.prompt_share)

    @property
    def dtype_name(self) -> str:
        """float32 or bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    def pairs(self) -> Shape:
        """The same tokens as K = 1: the candidates of each group, two by two."""
        return replace(self, groups=self.num_tokens // (PAIR * self.tokens), candidates=PAIR, work=PAIRS)

    def with_tokens(self, num_tokens: int) -> Shape:
        """The same kind of groups, N = `num_tokens` in all."""
        groups, rest = divmod(num_tokens, self.candidates * self.tokens)
        if rest or not groups:
            raise ValueError(
                f"N must be a multiple of a group's {self.candidates * self.tokens} tokens, got {num_tokens}"
            )
        return replace(self, groups=groups)


FP32, BF16 = ("fp32", torch.float32), ("bf16", torch.bfloat16)
GPT2, LLAMA3 = {"vocab": 50257, "hidden": 768}, {"vocab": 128256, "hidden": 1024}
GPT2_XL, OPENLLAMA_3B = {"vocab": 50257, "hidden": 1600}, {"vocab": 32000, "hidden": 3200}
LLAMA3_8B, QWEN3 = {"vocab": 128256, "hidden": 4096}, {"vocab": 151936, "hidden": 4096}
GEMMA3 = {"vocab": 262144, "hidden": 2560}


def _shape(name: str, head: dict[str, int], groups: int, tokens: int, reason: str, **options: Any) -> Shape:
    """One shape in bf16."""
    options = {"dtype": torch.bfloat16, **options}
    return Shape(name, head["vocab"], head["hidden"], groups, tokens, reason=reason, **options)


def _both(name: str, *args: Any, **options: Any) -> tuple[Shape, Shape]:
    """One shape in fp32 and in bf16."""
    fp32, bf16 = (_shape(f"{name} {suffix}", *args, **options, dtype=dtype) for suffix, dtype in (FP32, BF16))
    return fp32, bf16


_FAST = {"peers": FAST, "variants": False}
_NEXT = {"peers": ("Cut Cross-Entropy",), "variants": False}  # the fastest of them, where compiling takes the time
_ALONE = {"peers": (), "variants": False}
CHUNKED = "F.linear_cross_entropy, chunked"  # the policy that torch picks
POLICIES = tuple(f"F.linear_cross_entropy, {policy}" for policy in ("accurate", "balanced", "compact"))
_BY_FAR = "few tokens, because a chunked policy takes seconds at any N; chunking pays from N = H"
_LARGEST_SHARE = "Llama 3's vocabulary: the largest share of softmax traffic"

BARS = (
    _shape(
        "gpt2 1k fp32",
        GPT2,
        4,
        64,
        "GPT-2's head and few tokens, every peer: costs that do not grow with N show",
        dtype=torch.float32,
        without=(CHUNKED, *POLICIES, "Liger DPO"),
    ),
    _shape("gpt2 1k bf16", GPT2, 4, 64, "the same in bf16", rounds=4, without=(CHUNKED, *POLICIES)),
    _shape("llama3 512 fp32", LLAMA3, 4, 32, _LARGEST_SHARE, dtype=torch.float32, **_NEXT),
    _shape("llama3 512 bf16", LLAMA3, 4, 32, _LARGEST_SHARE, rounds=4, **_FAST),
)
HALF_PROMPT = (
    _shape(
        "gpt2 1k half prompt fp32",
        GPT2,
        4,
        64,
        "half of the rows predict nothing: skipping them halves the GEMMs",
        dtype=torch.float32,
        prompt_share=0.5,
        **_NEXT,
    ),
    _shape(
        "gpt2 1k half prompt bf16",
        GPT2,
        4,
        64,
        "the same with every peer, but for the slow policies of one of them",
        prompt_share=0.5,
        rounds=4,
        without=(CHUNKED, *POLICIES, "Liger DPO"),
    ),
    _shape("gpt2 1k 0.8 prompt bf16", GPT2, 4, 64, "long prompts and short answers", prompt_share=0.8, **_ALONE),
)
MODES = (
    _shape("gpt2 1k frozen bf16", GPT2, 4, 64, "a frozen head: two GEMMs", mode=FROZEN, rounds=4, **_NEXT),
    _shape("gpt2 1k no_grad bf16", GPT2, 4, 64, "log-likelihoods only: one GEMM", mode=NO_GRAD, rounds=5, **_NEXT),
)
NEGATIVES = (
    _shape(
        "gpt2 1k K=1 bf16", GPT2, 8, 64, "one negative with a reference: DPO's work", candidates=2, rounds=4, **_ALONE
    ),
    _shape("gpt2 1k K=4 bf16", GPT2, 4, 52, "four negatives", candidates=5, rounds=4, **_ALONE),
    _shape(
        "gpt2 1k K=16 bf16",
        GPT2,
        2,
        32,
        "many negatives",
        rounds=4,
        candidates=17,
        **_ALONE,
    ),
)
SMALLEST_BUDGET = _shape(
    "gpt2 1k smallest budget bf16",
    GPT2,
    2,
    128,
    "one group per chunk: the least memory for three GEMMs",
    smallest_budget=True,
    rounds=4,
    **_ALONE,
)
CHUNKING = tuple(
    _shape(
        f"gpt2 16 policies {suffix}",
        GPT2,
        1,
        4,
        "the chunking policies of F.linear_cross_entropy",
        dtype=dtype,
        peers=peers,
        variants=False,
        note=_BY_FAR,
    )
    # In fp32 the policies differ in what they keep only.
    for (suffix, dtype), peers in ((FP32, (CHUNKED, POLICIES[0])), (BF16, (CHUNKED, *POLICIES)))
)
CROSS_ENTROPY = _shape(
    "gpt2 1k cross-entropy bf16",
    GPT2,
    4,
    64,
    "mean cross-entropy, the home of F.linear_cross_entropy and Cut Cross-Entropy",
    work=NLL,
    rounds=4,
    peers=("F.linear_cross_entropy", "Cut Cross-Entropy", "QuACK"),
    variants=False,
)
HUGE = (
    _shape("gpt2-xl 512 bf16", GPT2_XL, 2, 64, "GPT-2 XL", rounds=4, **_NEXT),
    _shape("openllama-3b 512 bf16", OPENLLAMA_3B, 2, 64, "a small vocabulary under a wide model", rounds=4, **_NEXT),
)
WIDE = (
    _shape("llama3-8b 256 bf16", LLAMA3_8B, 2, 32, "Llama 3 8B", rounds=8, **_NEXT),
    _shape("qwen3 256 bf16", QWEN3, 2, 32, "Qwen 3, and the shape of TRL's issue 7244", rounds=8, **_NEXT),
    _shape("gemma3 256 bf16", GEMMA3, 2, 32, "Gemma 3: the largest vocabulary", rounds=8, **_NEXT),
)
CASES = (*BARS, *HALF_PROMPT, *MODES, *NEGATIVES, SMALLEST_BUDGET, CROSS_ENTROPY, *CHUNKING, *HUGE)

_GPU = {"rounds": 10}
_GPU_FAST = {**_FAST, **_GPU}
GPU_CASES = (
    _shape("llama3-8b 8k bf16", LLAMA3_8B, 16, 128, "the bar's shape, every peer", **_GPU),
    _shape("gpt2 8k fp32", GPT2, 16, 128, "GPT-2's head, every peer", dtype=torch.float32, **_GPU),
    _shape("gpt2 8k bf16", GPT2, 16, 128, "the same in bf16", **_GPU),
    _shape("qwen3 8k half prompt bf16", QWEN3, 16, 128, "half prompt, every peer", prompt_share=0.5, **_GPU),
    _shape("llama3-8b 8k 0.8 prompt bf16", LLAMA3_8B, 16, 128, "long prompts", prompt_share=0.8, **_GPU_FAST),
    _shape("llama3-8b 8k frozen bf16", LLAMA3_8B, 16, 128, "a frozen head: two GEMMs", mode=FROZEN, **_GPU_FAST),
    _shape("llama3-8b 8k no_grad bf16", LLAMA3_8B, 16, 128, "one GEMM", mode=NO_GRAD, **_GPU_FAST),
    _shape("llama3-8b 8k K=1 bf16", LLAMA3_8B, 32, 128, "one negative", candidates=2, **_GPU_FAST),
    _shape("llama3-8b 10k K=4 bf16", LLAMA3_8B, 16, 128, "four negatives", candidates=5, **_GPU_FAST),
    _shape("llama3-8b 17k K=16 bf16", LLAMA3_8B, 8, 128, "many negatives", candidates=17, **_GPU_FAST),
    _shape("llama3-8b 8k cross-entropy bf16", LLAMA3_8B, 16, 128, "what QuACK computes", work=NLL, **_GPU),
    _shape("gpt2-xl 16k bf16", GPT2_XL, 32, 128, "GPT-2 XL", **_GPU_FAST),
    _shape("openllama-3b 16k bf16", OPENLLAMA_3B, 32, 128, "a small vocabulary under a wide model", **_GPU_FAST),
    _shape("qwen3 16k bf16", QWEN3, 32, 128, "Qwen 3", **_GPU_FAST),
    _shape("gemma3 16k bf16", GEMMA3, 32, 128, "Gemma 3: the largest vocabulary", **_GPU_FAST),
    _shape("llama3-8b 64k bf16", LLAMA3_8B, 128, 128, "many tokens", **{**_GPU_FAST, "rounds": 5}),
)

PEAK_MEMORY = _both("gpt2 peak", GPT2, 8, 128, "several chunks at either number of tokens", **_ALONE)
PEAK_MEMORY_TOKENS = (3072, 6144)  # the peak must not depend on N
GPU_PEAK_MEMORY = (_shape("llama3-8b peak bf16", LLAMA3_8B, 32, 128, "several chunks at either N", **_ALONE),)
GPU_PEAK_MEMORY_TOKENS = (16384, 65536)
ACCURACY = _shape(
    "accuracy", GPT2, 1, 1024, "1024 log-probabilities summed: rounding adds up", candidates=PAIR
)  # a pair, for peers that know no other

_TINY = {"vocab": 509, "hidden": 32}  # a prime: no tile divides it
QUICK = (
    *_both("quick", _TINY, 4, 16, "smoke run: every contestant; its times mean nothing"),
    *_both("quick half prompt", _TINY, 4, 16, "smoke run of ignored tokens", prompt_share=0.5),
    *_both("quick smallest budget", _TINY, 4, 16, "smoke run of one group per chunk", smallest_budget=True, peers=()),
    *_both("quick frozen", _TINY, 4, 16, "smoke run of a frozen head", mode=FROZEN),
    *_both("quick no_grad", _TINY, 4, 16, "smoke run of log-likelihoods", mode=NO_GRAD),
    *_both("quick cross-entropy", _TINY, 4, 16, "smoke run of the mean cross-entropy", work=NLL),
)
_TWINS = ("quick fp32", "quick half prompt bf16", "quick smallest budget bf16", "quick frozen bf16")
QUICK_POLICIES = _shape(
    "quick policies bf16", _TINY, 1, 2, "smoke run of a note", peers=POLICIES[2:], variants=False, note=_BY_FAR
)
# A part in seconds: nothing compiles.
_STILL = ("eager", "F.linear_cross_entropy", "TRL fused head", "QuACK")
QUICK_CASES = (
    *(replace(s, rounds=1, peers=_STILL if s.peers is None else s.peers) for s in QUICK if s.name not in _TWINS),
    QUICK_POLICIES,
)
QUICK_ACCURACY = _shape("quick accuracy", _TINY, 1, 64, "smoke run", candidates=PAIR, peers=_STILL)


def tiny(shape: Shape) -> Shape:
    """A small shape of the same dtype and prompt share, to load libraries and start threads with."""
    return replace(shape, **_TINY, groups=2, tokens=16)
