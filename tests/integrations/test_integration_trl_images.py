"""TRL's DPO of a vision-language model on the fused loss: equal to stock."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("PIL", reason="needs Pillow, which matplotlib of the extra bench brings")

import tiny_models
import transformers
import trl
from datasets import Dataset
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from trl_runs import ARGUMENTS, BETA, assert_histories_equal, first_batch, history, preferences, step

from cpo_kernels.integrations.trl import FusedDPOTrainer
from cpo_kernels.integrations.trl_candidates import CandidateCollator

pytestmark = pytest.mark.cpu
SIDE, PATCH = 8, 4


def processor() -> LlavaProcessor:
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    # The processor of images by its own name needs torchvision in transformers 5.
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    images = kind(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    numbers = {"patch_size": PATCH, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    return LlavaProcessor(image_processor=images, tokenizer=tokenizer, image_token="<image>", **numbers)


def llava(seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH, projection_dim=16)
    image = tiny_models.VOCAB
    text = LlamaConfig(**sizes, vocab_size=image + 1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1)
    counts = {"image_token_index": image, "image_seq_length": (SIDE // PATCH) ** 2, "vision_feature_layer": -1}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **counts))


def pictured() -> Dataset:
    draw = random.Random(0)
    pictures = (Image.frombytes("RGB", (SIDE, SIDE), draw.randbytes(3 * SIDE**2)) for _ in range(9))
    rows = zip(preferences(9), pictures, strict=True)
    return Dataset.from_list([row | {"prompt": "<image> " + row["prompt"], "images": [one]} for row, one in rows])


@pytest.mark.parametrize("loss", [{}, {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.4}], ids=["sigmoid", "ld_alpha"])
def test_images_equal_stock(tmp_path, loss):
    steps, runs = [], []
    for trainer, keywords in ((trl.DPOTrainer, {}), (FusedDPOTrainer, {"token_metrics": True})):
        args = trl.DPOConfig(output_dir=str(tmp_path), max_length=None, beta=BETA, **ARGUMENTS, **loss)
        models = {"model": llava(0), "ref_model": llava(1)}
        made = trainer(**models, args=args, train_dataset=pictured(), processing_class=processor(), **keywords)
        steps.append(step(made, first_batch(made)))
        runs.append(history(made))
    (want, want_grads), (found, grads) = steps
    torch.testing.assert_close(found, want)
    assert grads.keys() == want_grads.keys() and any("vision_tower" in name for name in grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert_histories_equal(*runs)


def test_several_negatives_of_an_image_are_refused():
    with pytest.raises(ValueError, match="rejected is a list, which examples with images cannot have"):
        CandidateCollator(dict)([{"prompt": "a cat", "chosen": "a", "rejected": ["b", "c"], "images": []}])
