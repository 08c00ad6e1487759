"""Names the shapes that are measured, and why each one is there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

PAIR = 2  # candidates of K = 1, for peers that contrast a pair only

# What is computed: K negatives with reference log-likelihoods; K = 1 without a reference; the mean cross-entropy of all
# tokens.
CPO, PAIRS, NLL = "cpo", "pairs", "nll"
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
    candidates: int = 4  # one ground truth and K = 3 negatives
    prompt_share: float = 0.0  # leading share of every sequence whose targets are -100
    smallest_budget: bool = False  # max_logits_bytes holds the logits of exactly one group
    work: str = CPO
    mode: str = TRAINED
    peers: tuple[str, ...] | None = None  # None: every peer that does this work
    without: tuple[str, ...] = ()  # of those
    variants: bool = True  # also ours with fp32 logits
    rounds: int = 5
    note: str = ""  # what a reader must know of the peers' figures

    @property
    def num_tokens(self) -> int:
        """Returns N, prompt positions included."""
        return self.groups * self.candidates * self.tokens

    @property
    def prompt_tokens(self) -> int:
        """Returns the leading positions of each sequence that predict nothing."""
        return int(self.tokens * self.prompt_share)

    @property
    def predicted_tokens(self) -> int:
        """Returns N without the prompts."""
        return self.groups * self.candidates * (self.tokens - self.prompt_tokens)

    @property
    def sizes(self) -> dict[str, Any]:
        """Returns what a record says of head and tokens."""
        sizes = {"V": self.vocab, "H": self.hidden, "N": self.num_tokens, "K": self.candidates - 1}
        return sizes | {"dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def conditions(self) -> dict[str, Any]:
        """Returns all that a record says of it."""
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


Head = tuple[int, int]  # (V, H)
GPT2, LLAMA3 = (50257, 768), (128256, 1024)
GPT2_XL, OPENLLAMA_3B = (50257, 1600), (32000, 3200)
LLAMA3_8B, QWEN3, GEMMA3 = (128256, 4096), (151936, 4096), (262144, 2560)
SMALL = (509, 32)  # a prime: no tile divides it


def bf16(name: str, head: Head, groups: int, tokens: int, **options: Any) -> Shape:
    """Describe a shape in bfloat16."""
    return Shape(f"{name} bf16", *head, groups, tokens, torch.bfloat16, **options)


def fp32(name: str, head: Head, groups: int, tokens: int, **options: Any) -> Shape:
    """Describe a shape in float32."""
    return Shape(f"{name} fp32", *head, groups, tokens, torch.float32, **options)


CHUNKED = "F.linear_cross_entropy, chunked"  # the policy that torch picks
# What runs: its kernels need a GPU.
CCE = "Cut Cross-Entropy" if torch.cuda.is_available() else "Cut Cross-Entropy (torch.compile)"
# Peers by how far they are from ours where everyone is timed ("gpt2 1k"). Only there does every peer run on the CPU:
# the slower ones would take most of the time elsewhere, and come no closer.
ALL: dict[str, Any] = {"without": (CHUNKED,)}
FAST: dict[str, Any] = {"peers": ("torch.compile", CCE), "variants": False}
NEXT: dict[str, Any] = {"peers": (CCE,), "variants": False}  # where compiling takes the time
ALONE: dict[str, Any] = {"peers": (), "variants": False}
# What F.linear_cross_entropy and Cut Cross-Entropy were made for.
OF_TOKENS: dict[str, Any] = {"work": NLL, "peers": ("F.linear_cross_entropy", CCE, "QuACK")}
FEW = "few tokens, because a chunked policy takes seconds at any N; chunking pays from N = H"
CHUNKING: dict[str, Any] = {"peers": (CHUNKED,), "variants": False, "note": FEW}

CASES = (
    fp32("gpt2 1k", GPT2, 4, 64, **ALL),  # few tokens: costs that do not grow with N show
    bf16("gpt2 1k", GPT2, 4, 64, **ALL),
    fp32("llama3 512", LLAMA3, 4, 32, **NEXT),  # the largest share of softmax traffic
    bf16("llama3 512", LLAMA3, 4, 32, **FAST),
    fp32("gpt2 1k half prompt", GPT2, 4, 64, prompt_share=0.5, **NEXT),  # skipping rows halves the products
    bf16("gpt2 1k half prompt", GPT2, 4, 64, prompt_share=0.5, **ALL),
    bf16("gpt2 1k 0.8 prompt", GPT2, 4, 64, prompt_share=0.8, **ALONE),
    bf16("gpt2 1k frozen", GPT2, 4, 64, mode=FROZEN, **NEXT),
    bf16("gpt2 1k no_grad", GPT2, 4, 64, mode=NO_GRAD, **NEXT),
    bf16("gpt2 1k K=1", GPT2, 8, 64, candidates=2, **ALONE),  # DPO's work
    bf16("gpt2 1k K=4", GPT2, 4, 52, candidates=5, **ALONE),
    bf16("gpt2 1k K=16", GPT2, 2, 32, candidates=17, **ALONE),
    bf16("gpt2 1k smallest budget", GPT2, 2, 128, smallest_budget=True, **ALONE),  # one group a chunk
    bf16("gpt2 1k cross-entropy", GPT2, 4, 64, variants=False, **OF_TOKENS),
    bf16("gpt2 16 policies", GPT2, 1, 4, **CHUNKING),
    bf16("gpt2-xl 512", GPT2_XL, 2, 64, **NEXT),
    bf16("openllama-3b 512", OPENLLAMA_3B, 2, 64, **NEXT),  # a small vocabulary under a wide model
    fp32("gpt2-xl 512", GPT2_XL, 2, 64, **ALONE),
    fp32("openllama-3b 512", OPENLLAMA_3B, 2, 64, **ALONE),
    bf16("llama3-8b 256", LLAMA3_8B, 2, 32, **ALONE),
    bf16("qwen3 256", QWEN3, 2, 32, **ALONE),  # the shape of TRL's issue 7244
    bf16("gemma3 256", GEMMA3, 2, 32, **ALONE),  # the largest vocabulary
    *(make("llama3 512 frozen", LLAMA3, 4, 32, mode=FROZEN, **ALONE) for make in (fp32, bf16)),
)
_TEN = {"rounds": 10}
# Besides those of the part `gpu`, which has the bars' shapes.
GPU_CASES = (
    bf16("llama3-8b 8k", LLAMA3_8B, 16, 128, **_TEN),
    fp32("gpt2 8k", GPT2, 16, 128, **_TEN),
    bf16("gpt2 8k", GPT2, 16, 128, **_TEN),
    bf16("llama3-8b 8k 0.8 prompt", LLAMA3_8B, 16, 128, prompt_share=0.8, **_TEN, **FAST),
    bf16("llama3-8b 8k K=1", LLAMA3_8B, 32, 128, candidates=2, **_TEN, **FAST),
    bf16("llama3-8b 10k K=4", LLAMA3_8B, 16, 128, candidates=5, **_TEN, **FAST),
    bf16("llama3-8b 17k K=16", LLAMA3_8B, 8, 128, candidates=17, **_TEN, **FAST),
    bf16("llama3-8b 8k cross-entropy", LLAMA3_8B, 16, 128, **_TEN, **OF_TOKENS),
    bf16("gpt2-xl 16k", GPT2_XL, 32, 128, **_TEN, **FAST),
    bf16("openllama-3b 16k", OPENLLAMA_3B, 32, 128, **_TEN, **FAST),
    bf16("qwen3 16k", QWEN3, 32, 128, **_TEN, **FAST),
    bf16("gemma3 16k", GEMMA3, 32, 128, **_TEN, **FAST),
    bf16("llama3-8b 64k", LLAMA3_8B, 128, 128, **FAST),
)

# The shapes of an H200's bars.
BAR_8K = bf16("llama3 8k", LLAMA3_8B, 16, 128, peers=(), rounds=20)
BAR_4K = replace(BAR_8K, name="llama3 4k bf16", groups=8)  # published for plain cross-entropy on this chip
BAR_QWEN = replace(BAR_8K, name="qwen 8k bf16", vocab=QWEN3[0])  # the shape of TRL's issue 7244
BAR_NARROW = replace(BAR_8K, name="llama3 8k bf16, H=1024", hidden=1024)  # little work a logit
BAR_LOSSES = (
    BAR_4K,
    *(BAR_8K, replace(BAR_8K, name=f"{BAR_8K.name}, frozen", mode=FROZEN)),
    *(BAR_QWEN, replace(BAR_QWEN, name=f"{BAR_QWEN.name}, frozen", mode=FROZEN)),
)
BAR_PEERS = (
    replace(BAR_QWEN, name=f"{BAR_QWEN.name}, every peer", peers=None),
    replace(BAR_QWEN, name=f"{BAR_QWEN.name}, every peer, half prompt", peers=None, prompt_share=0.5),
)

# 48 MiB have no room for the accumulator of either head.
PEAK_HEADS = {"gpt2": GPT2, "openllama-3b": OPENLLAMA_3B}
PEAK_MEMORY = tuple(make(name, head, 8, 128, **ALONE) for name, head in PEAK_HEADS.items() for make in (fp32, bf16))
PEAK_MEMORY_TOKENS = (1536, 3072)  # the peak must not depend on N
GPU_PEAK_MEMORY = (bf16("llama3-8b peak", LLAMA3_8B, 32, 128, **ALONE),)
GPU_PEAK_MEMORY_TOKENS = (16384, 65536)
LOGPS = "log-likelihoods of 1024 tokens"
# A pair, for peers that know no other.
ACCURACY = Shape(LOGPS, *GPT2, 1, 1024, torch.bfloat16, candidates=PAIR, mode=NO_GRAD, rounds=1, without=(CHUNKED,))

# A part in seconds: nothing compiles.
STILL = ("eager", "F.linear_cross_entropy", "TRL fused head", "QuACK")
_QUICK: dict[str, Any] = {"rounds": 1, "peers": STILL}
QUICK_CASES = (
    bf16("quick", SMALL, 4, 16, **_QUICK),
    fp32("quick half prompt", SMALL, 4, 16, prompt_share=0.5, **_QUICK),
    fp32("quick smallest budget", SMALL, 4, 16, smallest_budget=True, rounds=1, peers=()),
    fp32("quick frozen", SMALL, 4, 16, mode=FROZEN, **_QUICK),
    bf16("quick no_grad", SMALL, 4, 16, mode=NO_GRAD, **_QUICK),
    bf16("quick cross-entropy", SMALL, 4, 16, work=NLL, **_QUICK),
)
QUICK_ACCURACY = replace(ACCURACY, vocab=SMALL[0], hidden=SMALL[1], tokens=64, peers=STILL)


def tiny(shape: Shape) -> Shape:
    """Return a small shape of the same dtype, work and prompt share, whose times mean nothing."""
    return replace(shape, vocab=SMALL[0], hidden=SMALL[1], groups=2, tokens=16)
