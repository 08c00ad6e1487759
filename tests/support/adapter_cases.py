"""Models with adapters of peft."""

from __future__ import annotations

import warnings

import peft
import tiny_models
import torch
from attach_cases import biased, softcapped

GPT2 = {"target_modules": ["c_attn"], "fan_in_fan_out": True}


CASES = {
    "body": lambda: adapted(tiny_models.llama(), lora(target_modules=["q_proj", "down_proj"])),
    "tied, body": lambda: adapted(tiny_models.gpt2(), lora(**GPT2)),
    "head": lambda: adapted(tiny_models.llama(), lora()),
    "rank-stabilised": lambda: adapted(tiny_models.llama(), lora(use_rslora=True)),
    "DoRA": lambda: adapted(tiny_models.llama(), lora(use_dora=True)),
    "tied, head": lambda: adapted(tiny_models.gpt2(), lora(**GPT2 | {"target_modules": ["c_attn", "lm_head"]})),
    "two adapters": lambda: adapted(tiny_models.llama(), lora(), lora(r=3, lora_alpha=5)),
    "two adapters, one of the head": lambda: adapted(tiny_models.llama(), lora(), lora(target_modules=["v_proj"])),
    "dropout": lambda: adapted(tiny_models.llama(), lora(lora_dropout=0.3, target_modules=["lm_head"])),
    "bias": lambda: adapted(biased(), lora()),
    "bias of the adapter": lambda: adapted(biased(), lora(lora_bias=True)),
    "softcap": lambda: adapted(softcapped(), lora()),
    "tied, embeddings": lambda: adapted(tiny_models.gpt2(), lora(target_modules=["wte"])),
    "tied, embeddings and head": lambda: adapted(
        tiny_models.llama(tie_word_embeddings=True), lora(target_modules=["embed_tokens"], ensure_weight_tying=True)
    ),
    "trained copy": lambda: adapted(tiny_models.llama(), lora(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "tied, trained copy": lambda: adapted(tiny_models.gpt2(), lora(**GPT2, modules_to_save=["lm_head"])),
    "tied, trained copies": lambda: adapted(
        tiny_models.llama(tie_word_embeddings=True),
        lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
}


def lora(**options) -> peft.LoraConfig:
    """Make a LoRA configuration; without ``init_lora_weights`` B is random, so that the adapter changes the logits."""
    defaults = {"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return peft.LoraConfig(**(defaults | {"target_modules": ["lm_head", "q_proj"]} | options))


def adapted(model, *configs: peft.LoraConfig) -> peft.PeftModel:
    """Return the model with one adapter per configuration, all of them active and trainable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT: tied weights, biases that cannot be merged
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(model, configs[0])
        names = ["default"]
        for number, config in enumerate(configs[1:]):
            names.append(f"more-{number}")
            wrapped.add_adapter(names[-1], config)
    if len(names) > 1:
        wrapped.base_model.set_adapter(names)
    for name, parameter in wrapped.named_parameters():
        if "magnitude" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return wrapped
