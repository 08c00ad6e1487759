"""TRL's CPO (that of Xu et al. 2024), here as SimPO, on the fused loss: `python examples/plugging_in/trl_cpo.py`.

A small random Llama is to prefer true continuations of the alphabet over random letters; well under a minute on a CPU.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.experimental.cpo import CPOConfig
from trl_dpo import LETTERS, make_examples, make_tokenizer

from cpo_kernels.integrations.trl import FusedCPOTrainer


def main(steps: int = 40) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(LETTERS) + 2, max_position_embeddings=32, **sizes))
    pairs = make_examples(256, seed=0).map(lambda example: {"rejected": example["rejected"][0]})
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    sampling = {"max_steps": steps, "per_device_train_batch_size": 16, "learning_rate": 3e-3}
    with tempfile.TemporaryDirectory() as folder:
        simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}
        args = CPOConfig(output_dir=folder, logging_steps=max(1, steps // 4), **simpo, **sampling, **quiet)
        trainer = FusedCPOTrainer(model, args, train_dataset=pairs, processing_class=make_tokenizer())
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logged:
        print(f"loss {entry['loss']:.4f}, true continuation preferred in {entry['rewards/accuracies']:.0%}")


if __name__ == "__main__":
    main()
