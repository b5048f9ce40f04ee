"""A stock LLaVA of less than a million parameters: its sizes, its initial weights, its losses.

Nothing of the architecture is changed. Only the initial weights are chosen so that looking
something up is a short way to go: position vectors of the tower are sums of a row's, a column's and
a place-within-the-digit's vector, and every attention head starts out comparing tokens with
themselves and passing on what it finds ("mimetic", arXiv 2305.09828).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bench.fidelity.data import (
    BOS,
    DIGIT_PIXELS,
    FIRST_DIGIT,
    FIRST_REGION,
    IMAGE_ID,
    LAST_REGION_WORD,
    NUM_DIGITS,
    PAD,
    Design,
)

HIDDEN = 128
_EMBEDDING_STD, _POSITION_STD = 0.06, 0.5
_ALIGNMENT_SCALE = 20.0

TRAINING_ATTENTION = "kvevict_fidelity_float32"
"""Attention in float32 under autocast: on CPUs the backward of bfloat16 is several times slower."""


def _attend_in_float32(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Any:
    with torch.autocast(query.device.type, enabled=False):
        return sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), mask, **options
        )


AttentionInterface.register(TRAINING_ATTENTION, _attend_in_float32)
AttentionMaskInterface.register(TRAINING_ATTENTION, sdpa_mask)


def build_model(design: Design, seed: int) -> Any:
    """Build the model of a design with its initial weights, on the CPU in float32."""
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_channels=1,
        image_size=design.grid * DIGIT_PIXELS,
        patch_size=design.patch,
        projection_dim=HIDDEN,
    )
    text = LlamaConfig(
        vocab_size=design.vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
        initializer_range=0.05,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=design.num_vision,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        _initialize_embeddings(model, design)
        for layer in model.model.language_model.layers:
            _initialize_attention(layer.self_attn, layer.self_attn.o_proj, num_kv_heads=2)
        if design.cells > 1:
            first = tower(model).encoder.layers[0].self_attn
            _initialize_attention(first, first.out_proj, num_kv_heads=4, scale=1.4)
    return model


def tower(model: Any) -> Any:
    """Return the transformer of the vision tower."""
    vision_tower = model.model.vision_tower
    return getattr(vision_tower, "vision_model", vision_tower)


def _initialize_embeddings(model: Any, design: Design) -> None:
    words = model.model.language_model.embed_tokens.weight
    words.copy_(torch.randn_like(words) * _EMBEDDING_STD)
    embeddings = tower(model).embeddings
    patches = embeddings.patch_embedding.weight
    patches.copy_(torch.randn_like(patches) / design.patch)
    rows, columns = (_POSITION_STD * torch.randn(design.grid, HIDDEN) for _ in range(2))
    places = _POSITION_STD * torch.randn(design.cells**2, HIDDEN)
    token = torch.arange(design.num_vision)
    row, column, cells = token // design.side, token % design.side, design.cells
    positions = rows[row // cells] + columns[column // cells]
    if cells > 1:
        positions = positions + places[row % cells * cells + column % cells]
    embeddings.position_embedding.weight[1:] = positions


def _initialize_attention(
    attention: Any, output: Any, *, num_kv_heads: int, scale: float = 0.5
) -> None:
    """Make W_Q equal W_K (nearly) and W_O a multiple of W_V transposed, head by head."""
    query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
    head_dim = key.out_features // num_kv_heads
    group_size = query.out_features // key.out_features
    for head in range(num_kv_heads):
        compare, read = (torch.linalg.qr(torch.randn(HIDDEN, head_dim))[0].T for _ in range(2))
        compare = compare * scale * math.sqrt(HIDDEN / head_dim)
        own = slice(head * head_dim, (head + 1) * head_dim)
        key.weight[own], value.weight[own] = compare, read
        for reader in range(head * group_size, (head + 1) * group_size):
            own = slice(reader * head_dim, (reader + 1) * head_dim)
            query.weight[own] = compare + 0.02 * torch.randn_like(compare)
            output.weight[:, own] = 0.7 * read.T


def vision_features(model: Any, pixels: Tensor, *, train_tower: bool = True) -> Tensor:
    """Return what the text decoder sees of images [count, num_vision, hidden]."""
    with torch.set_grad_enabled(train_tower and torch.is_grad_enabled()):
        hidden = model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
    features: Tensor = model.model.multi_modal_projector(hidden)
    return features


def text_logits(model: Any, features: Tensor, positions: Tensor | None, text: Tensor) -> Tensor:
    """Run several questions per image in one pass, each as if it were alone behind the image.

    Args:
        model: the model.
        features: [count, num_vision, hidden], or the chosen ones where positions are given.
        positions: [count, num_chosen] int64, which vision tokens these are; None = all.
        text: [count, num_questions, text_len] int64, questions and answers without the last digit.

    Returns:
        [count, num_questions, text_len, vocab_size] float32.
    """
    count, num_questions, text_len = text.shape
    num_seen = features.shape[1]
    device = features.device
    num_vision = model.config.image_seq_length
    if positions is None:
        positions = torch.arange(num_vision, device=device).expand(count, -1)
    words = model.model.language_model.embed_tokens(text.flatten(1))
    bos = model.model.language_model.embed_tokens.weight[BOS].expand(count, 1, -1)
    text_positions = torch.arange(text_len, device=device).repeat(num_questions)
    position_ids = torch.cat(
        [
            torch.zeros(count, 1, dtype=torch.int64, device=device),
            1 + positions,
            (1 + num_vision + text_positions).expand(count, -1),
        ],
        1,
    )
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([bos, features.to(words.dtype), words], 1),
        attention_mask=_packed_mask(num_seen, num_questions, text_len, device),
        position_ids=position_ids,
        use_cache=False,
    ).last_hidden_state
    logits: Tensor = model.lm_head(hidden[:, 1 + num_seen :]).float()
    return logits.view(count, num_questions, text_len, -1)


def _packed_mask(num_seen: int, num_questions: int, text_len: int, device: torch.device) -> Tensor:
    """Let every question see the image and itself [1, 1, length, length] bool."""
    question = torch.arange(num_questions, device=device).repeat_interleave(text_len)
    length = 1 + num_seen + len(question)
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[1 + num_seen :, 1 + num_seen :] &= question[:, None] == question
    return mask[None, None]


def alignment_loss(
    model: Any, design: Design, features: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Ask every vision token for its digit, row and column, by cosine with the words for them.

    Args:
        model: the model.
        design: its design.
        features: [count, num_vision, hidden].
        labels: [count, grid, grid].

    Returns:
        The loss, and the share of tokens with the right digit.
    """
    table = F.normalize(model.model.language_model.embed_tokens.weight.float(), dim=-1)
    logits = _ALIGNMENT_SCALE * F.normalize(features.float(), dim=-1) @ table.T
    cells, grid, side = design.cells, design.grid, design.side
    digit = labels.repeat_interleave(cells, 1).repeat_interleave(cells, 2).flatten()
    token = torch.arange(design.num_vision, device=labels.device).repeat(len(labels))

    def loss(first: int, count: int, target: Tensor) -> Tensor:
        return F.cross_entropy(logits[..., first : first + count].flatten(0, 1), target)

    of_digits = logits[..., FIRST_DIGIT : FIRST_DIGIT + NUM_DIGITS]
    accuracy = (of_digits.argmax(-1).flatten() == digit).float().mean()
    places = loss(FIRST_REGION, grid, token // side // cells)
    places = places + loss(FIRST_REGION + grid, grid, token % side // cells)
    return loss(FIRST_DIGIT, NUM_DIGITS, digit) + 0.5 * places, accuracy


def answer_loss(logits: Tensor, answers: Tensor, *, first_weight: float) -> tuple[Tensor, Tensor]:
    """Cross entropy of the answers; the first digit counts more.

    Args:
        logits: [count, num_questions, text_len, vocab_size].
        answers: [count, num_questions, width] int64.
        first_weight: weight of the first digit, that of the others being 1.

    Returns:
        The loss, and which digits are right [count, num_questions, width] bool.
    """
    logits = logits[:, :, -answers.shape[-1] :]
    weight = torch.ones(answers.shape[-1], device=logits.device)
    weight[0] = first_weight
    losses = F.cross_entropy(logits.flatten(0, 2), answers.flatten(), reduction="none")
    loss = (losses.view_as(answers) * weight).mean() / weight.mean()
    return loss, logits.argmax(-1) == answers


def bag_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """KL divergence from the answer's digits, in no order, at the last word that names the region.

    Makes the question read its region before the first answer token. A bag has no order, so the
    digits still have to be looked up one by one.
    """
    words = F.log_softmax(logits[:, :, LAST_REGION_WORD], -1)
    bag = F.one_hot(answers, words.shape[-1]).float().mean(2)
    return F.kl_div(words, bag, reduction="none").sum(-1).mean()
