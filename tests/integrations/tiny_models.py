"""Tiny random models of several families, built from config, with prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

IMAGE_ID, VIDEO_ID, PAD_ID, VOCAB = 5, 6, 0, 96
NUM_IMAGE_TOKENS = 16
NUM_LAYERS = 3

TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD_ID,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


@dataclass(frozen=True)
class Row:
    """One sequence: text before, images each followed by text."""

    before: int
    after: tuple[int, ...]


ONE_IMAGE, TWO_IMAGES, LONG_ROW = Row(6, (11,)), Row(4, (5, 9)), Row(3, (2, 21))


def llama() -> Any:
    """Build a text-only model."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TEXT_CONFIG)).eval()


def llava() -> Any:
    """Build a LLaVA of 16 image tokens."""
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT_CONFIG),
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).eval()


def save_llava(directory: Path) -> None:
    """Save a tiny LLaVA with a processor, as a checkpoint from a hub would look."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "USER:", "<image>", "ASSISTANT:", "What", "is", "it"]
    vocabulary = {word: i for i, word in enumerate(words)}
    assert vocabulary["<image>"] == IMAGE_ID
    vocabulary |= {f"word{i}": i for i in range(len(words), 96)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            unk_token="<unk>",
            additional_special_tokens=["<image>"],
        ),
        patch_size=7,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(directory)
    llava().save_pretrained(directory)


def qwen2_5_vl() -> Any:
    """Build a Qwen2.5-VL (M-RoPE, contiguous sections)."""
    torch.manual_seed(2)
    config = Qwen2_5_VLConfig(
        text_config={**_without("head_dim"), "rope_parameters": MROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "window_size": 112,
        },
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen3_vl() -> Any:
    """Build a Qwen3-VL (M-RoPE, interleaved sections; q and k norm; deepstack)."""
    torch.manual_seed(3)
    config = Qwen3VLConfig(
        text_config={**TEXT_CONFIG, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    return Qwen3VLForConditionalGeneration(config).eval()


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in TEXT_CONFIG.items() if key != name}


VISION_MODELS: dict[str, Callable[[], Any]] = {
    "llava": llava,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}
MODELS: dict[str, Callable[[], Any]] = {**VISION_MODELS, "llama": llama}


@cache
def get_model(name: str) -> Any:
    """Build each model once."""
    return MODELS[name]()


def make_inputs(model: Any, rows: list[Row], seed: int = 0) -> dict[str, Tensor]:
    """Return left-padded inputs of `generate`, one sequence per row."""
    generator = torch.Generator().manual_seed(seed)
    has_vision = hasattr(model.config, "vision_config")
    sequences = [_sequence(row, has_vision, generator) for row in rows]
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(rows), longest), PAD_ID)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for b, sequence in enumerate(sequences):
        input_ids[b, longest - len(sequence) :] = sequence
        mask[b, longest - len(sequence) :] = 1
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if not has_vision:
        return inputs
    num_images = sum(len(row.after) for row in rows)
    if model.config.model_type == "llava":
        inputs["pixel_values"] = torch.randn(num_images, 3, 28, 28, generator=generator)
        return inputs
    # A grid of 8 x 8 patches, merged 2 x 2.
    inputs["image_grid_thw"] = torch.tensor([[1, 8, 8]] * num_images)
    patch_size = 3 * 2 * 14 * 14
    inputs["pixel_values"] = torch.randn(num_images * 64, patch_size, generator=generator)
    inputs["mm_token_type_ids"] = (input_ids == IMAGE_ID).long()
    return inputs


def _sequence(row: Row, has_vision: bool, generator: torch.Generator) -> Tensor:
    def text(count: int) -> Tensor:
        return torch.randint(10, VOCAB, (count,), generator=generator)

    image = torch.full((NUM_IMAGE_TOKENS,), IMAGE_ID) if has_vision else text(NUM_IMAGE_TOKENS)
    parts = [text(row.before)]
    for after in row.after:
        parts += [image, text(after)]
    return torch.cat(parts)


def row_of(model: Any, inputs: dict[str, Tensor], rows: list[Row], b: int) -> dict[str, Tensor]:
    """Return sequence `b` of a batch alone, without its padding."""
    real = inputs["attention_mask"][b].bool()
    alone = {
        name: inputs[name][b : b + 1, real]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in inputs
    }
    first = sum(len(row.after) for row in rows[:b])
    stop = first + len(rows[b].after)
    if "image_grid_thw" in inputs:
        alone["image_grid_thw"] = inputs["image_grid_thw"][first:stop]
        alone["pixel_values"] = inputs["pixel_values"][64 * first : 64 * stop]
    elif "pixel_values" in inputs:
        alone["pixel_values"] = inputs["pixel_values"][first:stop]
    return alone


def generate(model: Any, inputs: dict[str, Tensor], num_new: int = 6, **options: Any) -> Any:
    """Generate greedily and return sequences, logits and cache."""
    return model.generate(
        **inputs,
        max_new_tokens=num_new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
