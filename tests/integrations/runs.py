"""Runs of tiny models that several tests make: turns with padding, a watched step, beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvevict
from tests.integrations.tiny_models import generate
from tests.support.reads import Reads


@torch.no_grad()
def run_padded_turns(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """Run three prompts, a token, a question of 8 columns with padding, and a token.

    Returns:
        The logits of the last 4 columns of the question and of the token, and the cache.
    """
    prompt_len = inputs["input_ids"].shape[1]
    question = torch.randint(10, 90, (3, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 9).long()], 1)
    mask[1, prompt_len + 1 : prompt_len + 4] = 0
    options: dict[str, Any] = {"past_key_values": DynamicCache(config=model.config)}
    token = torch.full((3, 1), 20)
    model(**inputs, **options)
    model(input_ids=token, attention_mask=mask[:, : prompt_len + 1], **options)
    first = model(input_ids=question, attention_mask=mask, **options).logits
    longer = torch.cat([mask, torch.ones(3, 1).long()], 1)
    second = model(input_ids=token, attention_mask=longer, **options).logits
    return torch.cat([first[:, -4:], second], 1), options["past_key_values"]


@torch.no_grad()
def find_reads_of_a_step(model: Any, policy: Any, inputs: dict[str, Tensor]) -> list[str]:
    """Run a prompt and a token under a policy, and return what the next token's step reads back."""
    batch_size = len(inputs["input_ids"])
    mask = torch.cat([inputs["attention_mask"], torch.ones(batch_size, 2).long()], 1)
    token = torch.full((batch_size, 1), 20)
    with kvevict.evict(model, policy):
        cached = model(**inputs).past_key_values
        model(input_ids=token, attention_mask=mask[:, :-1], past_key_values=cached)
        with Reads() as reads:
            model(input_ids=token, attention_mask=mask, past_key_values=cached)
    return reads.found


def assert_beams_stand_alone(
    model: Any, policy: Any, inputs: dict[str, Tensor], *, num_new: int, num_beams: int
) -> None:
    """Every beam has the score of a run of its own tokens, so it took its cache along."""
    with kvevict.evict(model, policy):
        beams = generate(
            model,
            inputs,
            num_new=num_new,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            output_scores=True,
        )
    prompt_len = inputs["input_ids"].shape[1]
    for sequence, score in zip(beams.sequences, beams.sequences_scores, strict=True):
        with kvevict.evict(model, policy), torch.no_grad():
            output = model(**inputs)
            cached, total = output.past_key_values, 0.0
            for token in sequence[prompt_len:]:
                total += float(output.logits[0, -1].log_softmax(-1)[token])
                output = model(input_ids=token.view(1, 1), past_key_values=cached)
        assert total / num_new == pytest.approx(float(score), abs=1e-4)
