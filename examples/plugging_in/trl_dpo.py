"""TRL's DPO with several negatives per prompt on the fused loss, and TRL's own trainer with our fused head.

A small random Llama is to prefer true continuations of the alphabet over three wrong ones each. `rejected` is a list;
everything else is as for `trl.DPOTrainer`. `python examples/plugging_in/trl_dpo.py`; well under a minute on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import random
import string
import tempfile

import datasets
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cpo_kernels.integrations.trl import FusedDPOTrainer, fused_head

LETTERS, NEGATIVES = string.ascii_lowercase, 3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def make_examples(count: int, seed: int) -> datasets.Dataset:
    """A stretch of the alphabet, how it goes on, and random letters instead."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        start, shown, more = rng.randrange(14), rng.randint(2, 5), rng.randint(3, 6)
        prompt, chosen = LETTERS[start : start + shown], LETTERS[start + shown : start + shown + more]
        rejected = [" ".join(rng.choices(LETTERS, k=rng.randint(3, 6))) for _ in range(NEGATIVES)]
        rows.append({"prompt": " ".join(prompt) + " ", "chosen": " ".join(chosen), "rejected": rejected})
    return datasets.Dataset.from_list(rows)


def train(trainer_class: type[trl.DPOTrainer], data: datasets.Dataset, steps: int) -> list[dict[str, float]]:
    """What a trainer logs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(LETTERS) + 2, max_position_embeddings=32, **sizes))
    with tempfile.TemporaryDirectory() as directory:
        config = trl.DPOConfig(
            output_dir=directory,
            beta=0.1,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=max(1, steps // 4),
            report_to="none",
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        trainer = trainer_class(
            model, copy.deepcopy(model), config, train_dataset=data, processing_class=make_tokenizer()
        )
        trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    datasets.disable_progress_bars()
    data = make_examples(256, seed=0)
    ours = train(FusedDPOTrainer, data, steps)
    accuracy = ours[-1]["rewards/accuracies"]
    print(f"{NEGATIVES} negatives: the true continuation is rewarded above all in {accuracy:.0%} of the last prompts")

    pairs = data.map(lambda row: {"rejected": row["rejected"][0]})
    with fused_head():  # patch_fused_head() does it for good
        stock = train(trl.DPOTrainer, pairs, steps)
    one = train(FusedDPOTrainer, pairs, steps)
    losses = stock[-1]["loss"], one[-1]["loss"]
    print("1 negative: the loss of TRL's trainer with our head ends at {:.6f}, that of ours at {:.6f}".format(*losses))


if __name__ == "__main__":
    main()
