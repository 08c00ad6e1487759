"""Language models of known shapes with random weights, and a training step of CPOTrainer on them."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass, field
from itertools import repeat
from random import Random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.measure import dtype_name
from cpo_kernels import CPOTrainer

EOS = "</s>"


@dataclass(frozen=True)
class Sizes:
    """Describes a GPT-2 (tied head, learned positions), or a Llama of version 3.2's proportions (rotary positions)."""

    name: str  # in the results
    llama: bool  # which of the two
    vocabulary: int  # vocabulary, width, heads, layers: V, H, query heads, transformer layers
    width: int
    heads: int
    layers: int
    tied: bool = True  # whether the head of a Llama is its embedding

    @property
    def conditions(self) -> dict[str, object]:
        """Returns the sizes by the names of the results."""
        return {"model": self.name, "V": self.vocabulary, "H": self.width, "layers": self.layers, "tied": self.tied}


GPT2_SMALL = Sizes("GPT-2 small", llama=False, vocabulary=50257, width=768, heads=12, layers=12)
LLAMA_SMALL = Sizes("Llama, H=768", llama=True, vocabulary=128256, width=768, heads=12, layers=8)
LLAMA_1B = Sizes("Llama 3.2 1B", llama=True, vocabulary=128256, width=2048, heads=32, layers=16)
GPT2_TINY = Sizes("GPT-2, tiny", llama=False, vocabulary=64, width=16, heads=2, layers=1)
LLAMA_TINY = Sizes("Llama, tiny", llama=True, vocabulary=64, width=16, heads=4, layers=1)


@dataclass(frozen=True)
class Given:
    """Describes what the steps of a case are given; all texts are as long, so that none has more to do than another."""

    kind: str  # what is done with it: an objective, a family of negatives, an attention
    sizes: Sizes  # of the models
    groups: int  # prompts, each with its completions
    tokens: int  # of a prompt, and of each completion, EOS included
    dtype: torch.dtype = torch.float32  # of the parameters

    @property
    def conditions(self) -> dict[str, object]:
        """Returns what all records say of it."""
        return self.sizes.conditions | {"dtype": dtype_name(self.dtype), "prompt": 0.5}

    def model(self, device: torch.device, seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
        """Make a model of its sizes."""
        return make_model(self.sizes, 2 * self.tokens, seed, attention).to(device, self.dtype)


def make_model(
    sizes: Sizes, positions: int, seed: int = 0, attention: str = "sdpa", end: int | None = None
) -> PreTrainedModel:
    """Make a model in float32 on the host, without dropout, that takes so many positions.

    One token is the beginning, the end and the padding: `end`, or the last one, which is that of make_tokenizer.
    """
    torch.manual_seed(seed)
    end = sizes.vocabulary - 1 if end is None else end
    shape = {"hidden_size": sizes.width, "num_attention_heads": sizes.heads, "num_hidden_layers": sizes.layers}
    shape |= {"max_position_embeddings": positions, "vocab_size": sizes.vocabulary}
    shape |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    if sizes.llama:  # four query heads to a key, an MLP of four times the width
        keys = {"num_key_value_heads": max(1, sizes.heads // 4), "intermediate_size": 4 * sizes.width}
        config = LlamaConfig(**shape, **keys, tie_word_embeddings=sizes.tied)
    else:
        config = GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model around the same parameters and gradients, so that what is done to its modules stays there."""
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token a word, w0 and so on; the last of the vocabulary is EOS and padding."""
    words = {f"w{index}": index for index in range(vocabulary - 1)} | {EOS: vocabulary - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=EOS)


def draw_tokens(vocabulary: int, *lengths: int, seed: int = 0) -> list[list[int]]:
    """Draw texts of so many tokens each, without EOS."""
    draw = Random(seed)
    return [[draw.randrange(vocabulary - 1) for _ in range(length)] for length in lengths]


def gradients(model: PreTrainedModel) -> tuple[Tensor, ...]:
    """Return those of all parameters that have one."""
    return tuple(p.grad for p in model.parameters() if p.grad is not None)


@dataclass
class OwnStep:
    """Draws or writes the negatives, packs the batch, scores it with the reference; forward and backward."""

    trainer: CPOTrainer  # with its model in training mode
    groups: int  # the first so many examples are those of every step
    at_once: int = 1  # steps that a call runs: those whose negatives are written together
    making: list[float] = field(default_factory=list)  # seconds of each step until the batch was there
    positions: int = 0  # that the body ran on in the last call, padding included
    tokens: int = 0  # N of the last call

    def __post_init__(self) -> None:
        self.batches = repeat({"index": torch.arange(self.groups)})

    def __call__(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the steps without an optimizer; their gradients are added to those that are there."""
        return [self.one() for _ in range(self.at_once)][-1]

    def one(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run one of them."""
        begun, trainer = time.perf_counter(), self.trainer
        trainer.state.global_step += 1  # new negatives
        (inputs,), tokens = trainer.get_batch_samples(self.batches, 1, trainer.args.device)
        self.making.append(time.perf_counter() - begun)
        self.positions, self.tokens = inputs["input_ids"].numel(), inputs["targets"].numel()
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs), num_items_in_batch=tokens)
        loss.backward()
        return loss.detach(), gradients(trainer.model)

    def values(self) -> dict[str, float]:
        """Return what a record says besides its time."""
        making = statistics.median(self.making[1:] or self.making)
        return {"positions": self.positions, "tokens": self.tokens, "making": making}
