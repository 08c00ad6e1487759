"""The shapes that are measured, and why each one is there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

CANDIDATES = 4  # one ground truth and K = 3 negatives
PAIR = 2  # K = 1, for peers that contrast a pair only


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
    without: tuple[str, ...] = ()  # peers left out, to keep a whole run under 15 minutes

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
        return replace(self, groups=self.num_tokens // (PAIR * self.tokens), candidates=PAIR)

    def with_tokens(self, num_tokens: int) -> Shape:
        """The same kind of groups, N = `num_tokens` in all."""
        groups, rest = divmod(num_tokens, self.candidates * self.tokens)
        if rest or not groups:
            raise ValueError(
                f"N must be a multiple of a group's {self.candidates * self.tokens} tokens, got {num_tokens}"
            )
        return replace(self, groups=groups)


FP32, BF16 = ("fp32", torch.float32), ("bf16", torch.bfloat16)
GPT2 = {"vocab": 50257, "hidden": 768}
LLAMA3 = {"vocab": 128256, "hidden": 1024}


def _both(
    name: str, head: dict[str, int], groups: int, tokens: int, reason: str, **options: object
) -> tuple[Shape, ...]:
    """One shape in fp32 and in bf16."""
    return tuple(
        Shape(f"{name} {suffix}", head["vocab"], head["hidden"], groups, tokens, dtype, reason, **options)  # type: ignore[arg-type]
        for suffix, dtype in (FP32, BF16)
    )


# Peers left out where a call takes seconds, by what they need at "gpt2 1k", where everyone is timed: two to thirty
# times the floor; as much as eager, and our K = 1 to compare with; 1.3 times. `report --all-peers` leaves nobody out.
FAR_BEHIND = ("F.linear_cross_entropy, chunked", "TRL fused head")
AND_PAIRS = (*FAR_BEHIND, "Liger CPO")
AND_BEHIND = (*AND_PAIRS, "eager", "F.linear_cross_entropy")


def _leave_out(shapes: tuple[Shape, ...], fp32: tuple[str, ...], bf16: tuple[str, ...]) -> tuple[Shape, ...]:
    """The shapes without the peers named for their dtype."""
    return tuple(replace(s, without=fp32 if s.dtype == torch.float32 else bf16) for s in shapes)


BARS = (
    *_both("gpt2 1k", GPT2, 4, 64, "GPT-2's head and few tokens: costs that do not grow with N show"),
    *_leave_out(
        _both("gpt2 4k", GPT2, 8, 128, "GPT-2's head and a batch that needs several chunks"), AND_PAIRS, FAR_BEHIND
    ),
    *_leave_out(
        _both("llama3 2k", LLAMA3, 4, 128, "Llama 3's vocabulary: the largest share of softmax traffic"),
        AND_BEHIND,
        AND_PAIRS,
    ),
)
HALF_PROMPT = _leave_out(
    _both(
        "gpt2 2k half prompt",
        GPT2,
        4,
        128,
        "half of the rows predict nothing: skipping them halves the GEMMs",
        prompt_share=0.5,
    ),
    AND_PAIRS,
    FAR_BEHIND,
)
SMALLEST_BUDGET = _both(
    "gpt2 4k smallest budget",
    GPT2,
    8,
    128,
    "one group per chunk: the least memory for three GEMMs",
    smallest_budget=True,
)
CASES = BARS + HALF_PROMPT + SMALLEST_BUDGET

PEAK_MEMORY = BARS[2:4]  # fp32 and bf16 ...
PEAK_MEMORY_TOKENS = (1024, 8192)  # ... at few and at many tokens: the peak must not depend on N
ACCURACY = Shape(
    "accuracy",
    **GPT2,
    groups=1,
    tokens=1024,
    dtype=torch.bfloat16,
    reason="1024 log-probabilities summed: rounding adds up",
)

_TINY = {"vocab": 509, "hidden": 32}  # a prime: no tile divides it
QUICK = (
    *_both("quick", _TINY, 4, 16, "smoke run: every contestant and column; its times mean nothing"),
    *_both("quick half prompt", _TINY, 4, 16, "smoke run of ignored tokens", prompt_share=0.5),
    *_both("quick smallest budget", _TINY, 4, 16, "smoke run of one group per chunk", smallest_budget=True),
)


def tiny(shape: Shape) -> Shape:
    """A small shape of the same dtype and prompt share, to load libraries and start threads with."""
    return replace(shape, **_TINY, groups=2, tokens=16)
