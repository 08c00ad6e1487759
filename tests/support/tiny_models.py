"""Random models, a tokenizer and examples that are small enough for one training step to take milliseconds."""

from __future__ import annotations

import random

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = ["the", "a", "cat", "dog", "bird", "fish", "sat", "ran", "flew", "swam", "on", "under", "over", "near", "mat"]
WORDS += ["tree", "river", "house", "and", "then", "slept"]
VOCAB = len(WORDS) + 3


def tokenizer(**special: str | None) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token a word."""
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | special
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v is not None})


def gpt2(seed: int = 0, **config) -> GPT2LMHeadModel:
    """Make a GPT-2 of two layers with a tied head, without dropout unless asked for."""
    torch.manual_seed(seed)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**(sizes | dropout | {"initializer_range": 0.2} | config)))


def llama(seed: int = 0, **config) -> LlamaForCausalLM:
    """Make a Llama of two layers with an untied head."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | {"initializer_range": 0.2} | config)))


def sure_of(model: LlamaForCausalLM, word: int) -> LlamaForCausalLM:
    """Make a Llama give all of its probability to one word, after anything."""
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1.0
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 100.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight[word, 0] = 100.0
    return model


def adapted(model: PreTrainedModel | None = None, **config) -> PeftModel:
    """Make a model with random LoRA adapters."""
    model = llama() if model is None else model
    torch.manual_seed(3)
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**(lora | config)))


def examples(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Make distinct prompts and completions of varying length; a completion begins with the space between them."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    return [{"prompt": text(1, 6), "completion": " " + text(3, 9)} for _ in range(count)]
