"""Language models of known shapes with random weights, and what a trainer needs beside them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

EOS = "</s>"


@dataclass(frozen=True)
class Sizes:
    """A GPT-2 (tied head, learned positions), or a Llama of version 3.2's proportions (rotary positions).

    Attributes:
        name: in the results.
        llama: which of the two.
        vocabulary, width, heads, layers: V, H, query heads, transformer layers.
        tied: whether the head of a Llama is its embedding.
    """

    name: str
    llama: bool
    vocabulary: int
    width: int
    heads: int
    layers: int
    tied: bool = True

    @property
    def conditions(self) -> dict[str, object]:
        """The sizes by the names of the results."""
        return {"model": self.name, "V": self.vocabulary, "H": self.width, "layers": self.layers, "tied": self.tied}


GPT2_SMALL = Sizes("GPT-2 small", llama=False, vocabulary=50257, width=768, heads=12, layers=12)
LLAMA_SMALL = Sizes("Llama, H=768", llama=True, vocabulary=128256, width=768, heads=12, layers=8)
LLAMA_1B = Sizes("Llama 3.2 1B", llama=True, vocabulary=128256, width=2048, heads=32, layers=16)
GPT2_TINY = Sizes("GPT-2, tiny", llama=False, vocabulary=64, width=16, heads=2, layers=1)
LLAMA_TINY = Sizes("Llama, tiny", llama=True, vocabulary=64, width=16, heads=4, layers=1)


def make_model(sizes: Sizes, positions: int, seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
    """A model in float32 on the host, without dropout, that takes so many positions."""
    torch.manual_seed(seed)
    if sizes.llama:
        return LlamaForCausalLM._from_config(llama_config(sizes, positions), attn_implementation=attention)
    return GPT2LMHeadModel._from_config(gpt2_config(sizes, positions), attn_implementation=attention)


def gpt2_config(sizes: Sizes, positions: int) -> GPT2Config:
    """The configuration of a GPT-2."""
    shape = {"n_embd": sizes.width, "n_head": sizes.heads, "n_layer": sizes.layers, "n_positions": positions}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(vocab_size=sizes.vocabulary, **shape, **dropout, **special_tokens(sizes))


def llama_config(sizes: Sizes, positions: int) -> LlamaConfig:
    """The configuration of a Llama: four query heads to a key, an MLP of four times the width."""
    shape = {"hidden_size": sizes.width, "intermediate_size": 4 * sizes.width, "num_hidden_layers": sizes.layers}
    heads = {"num_attention_heads": sizes.heads, "num_key_value_heads": max(1, sizes.heads // 4)}
    options = {"max_position_embeddings": positions, "tie_word_embeddings": sizes.tied}
    return LlamaConfig(vocab_size=sizes.vocabulary, **shape, **heads, **options, **special_tokens(sizes))


def special_tokens(sizes: Sizes) -> dict[str, int]:
    """One token for all: that of :func:`make_tokenizer`."""
    return {name: sizes.vocabulary - 1 for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another model on the same parameters and gradients, so that what a trainer does to its modules stays with it."""
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word, w0 and so on; the last of the vocabulary is EOS and padding."""
    words = {f"w{index}": index for index in range(vocabulary - 1)} | {EOS: vocabulary - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=EOS)
