"""rerotate_keys_: as if the keys had been rotated at their new positions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kvevict import reference
from tests.support.backends import Backend
from tests.support.checks import as_integers, assert_same_bytes, clone, to_cpu
from tests.support.moving import LAYOUTS
from tests.support.samples import Arguments
from tests.support.shapes import make_tensor
from tests.support.tolerances import assert_rotated_close

OP = "rerotate_keys_"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUM_LAYERS, BATCH_SIZE, NUM_KV_HEADS = 2, 2, 3
# Vectors, tails of vectors, single pairs, a row of which only a part turns.
HEAD_DIMS_AND_FREQS = ((128, 64), (80, 40), (64, 8), (24, 5), (16, 7), (9, 4), (2, 1), (300, 150))
FORMS = (
    (BATCH_SIZE,),
    (BATCH_SIZE, 1),
    (BATCH_SIZE, NUM_KV_HEADS),
    (1, BATCH_SIZE, NUM_KV_HEADS),
    (NUM_LAYERS, BATCH_SIZE, 1),
    (NUM_LAYERS, BATCH_SIZE, NUM_KV_HEADS),
)


def make_inv_freq(num_freqs: int, base: float = 10_000.0) -> Tensor:
    """Return the usual frequencies: 1 radian per position and less."""
    return base ** -(torch.arange(num_freqs) / max(num_freqs, 1))


def make_positions(*size: int, end: int) -> Tensor:
    """Return positions below `end`, of which some are -1."""
    positions = torch.randint(0, end, size, dtype=torch.int32)
    return positions.masked_fill(torch.rand(size) < 0.1, -1)


def make_arguments(
    device: str,
    *,
    old: tuple[int, ...] = (BATCH_SIZE,),
    new: tuple[int, ...] = (BATCH_SIZE,),
    kv_len: int = 37,
    head_dim: int = 16,
    num_freqs: int = 8,
    num_axes: int = 0,
    end: int = 2**20,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    interleaved: bool = False,
) -> Arguments:
    """Return keys and positions of the forms `old` and `new`; without axes if num_axes is 0."""
    size = (BATCH_SIZE, NUM_KV_HEADS, kv_len, head_dim)
    axes = (num_axes,) if num_axes else ()
    old_positions = make_positions(*axes, *old, kv_len, end=end)
    new_positions = make_positions(*axes, *new, kv_len, end=end)
    new_positions[..., ::5] = 3
    old_positions[..., ::5] = 3
    arguments: Arguments = {
        "keys": [
            make_tensor(*size, dtype=dtype, device=device, layout=layout) for _ in range(NUM_LAYERS)
        ],
        "old_positions": old_positions.to(device),
        "new_positions": new_positions.to(device),
        "inv_freq": make_inv_freq(num_freqs).to(device),
        "interleaved": interleaved,
    }
    if num_axes:
        axis_of_freq = torch.randint(0, num_axes, (num_freqs,), dtype=torch.int32)
        arguments["axis_of_freq"] = axis_of_freq.to(device)
    return arguments


def expected_keys(arguments: Arguments) -> list[Tensor]:
    """Return what the oracle makes of the keys, not rounded."""
    exact = to_cpu(arguments)
    exact["keys"] = [key.double() for key in exact["keys"]]
    reference.rerotate_keys_(**exact)
    keys: list[Tensor] = exact["keys"]
    return keys


def assert_matches_oracle(backend: Backend, arguments: Arguments) -> None:
    """Compare with the oracle; what does not turn must keep its bytes."""
    before, expected = clone(arguments["keys"]), expected_keys(arguments)
    backend.op(OP)(**arguments)
    for key, old_key, wanted in zip(arguments["keys"], before, expected, strict=True):
        assert_rotated_close(key, wanted)
        still = (wanted == old_key.cpu().double()).to(key.device)
        assert_same_bytes(key[still], old_key[still])


@pytest.mark.every_isa
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_oracle(
    backend: Backend, dtype: torch.dtype, layout: str, interleaved: bool
) -> None:
    """Over distances up to 2**20, at a radian per position and less."""
    options: dict[str, Any] = {"dtype": dtype, "layout": layout, "interleaved": interleaved}
    for head_dim, num_freqs in HEAD_DIMS_AND_FREQS:
        sizes = {"head_dim": head_dim, "num_freqs": num_freqs}
        assert_matches_oracle(backend, make_arguments(backend.device, **sizes, **options))


@pytest.mark.parametrize("num_axes", [0, 3])
@pytest.mark.parametrize(("old", "new"), itertools.product(FORMS, FORMS), ids=str)
def test_every_form_of_positions(
    backend: Backend, old: tuple[int, ...], new: tuple[int, ...], num_axes: int
) -> None:
    assert_matches_oracle(
        backend, make_arguments(backend.device, old=old, new=new, num_axes=num_axes, kv_len=7)
    )


@pytest.mark.parametrize("num_axes", [1, 2, 4])
def test_any_number_of_axes(backend: Backend, num_axes: int) -> None:
    assert_matches_oracle(backend, make_arguments(backend.device, num_axes=num_axes))


@pytest.mark.parametrize("num_axes", [0, 2])
def test_neighbors_that_turn_alike(backend: Backend, num_axes: int) -> None:
    """On all axes, or on some of them."""
    options = {"kv_len": 300, "end": 3, "num_axes": num_axes}
    assert_matches_oracle(backend, make_arguments(backend.device, **options))


@pytest.mark.parametrize("kv_len", [0, 1, 31, 32, 33, 300])
def test_lengths(backend: Backend, kv_len: int) -> None:
    assert_matches_oracle(backend, make_arguments(backend.device, kv_len=kv_len))
    per_head = {"old": (BATCH_SIZE, NUM_KV_HEADS), "kv_len": kv_len}
    assert_matches_oracle(backend, make_arguments(backend.device, **per_head, num_axes=2))


def test_empty(backend: Backend) -> None:
    arguments = make_arguments(backend.device, num_freqs=0)
    before = clone(arguments["keys"])
    backend.op(OP)(**arguments)
    assert_same_bytes(arguments["keys"], before)
    nobody = torch.empty(0, NUM_KV_HEADS, 9, 16, device=backend.device)
    nowhere = torch.empty(0, 9, dtype=torch.int32, device=backend.device)
    backend.op(OP)([nobody], nowhere, nowhere, arguments["inv_freq"])


def test_layers_of_different_size(backend: Backend) -> None:
    """Positions are as long as the longest layer; a layer ignores those behind its end."""
    for form in ((BATCH_SIZE,), (NUM_LAYERS, BATCH_SIZE, NUM_KV_HEADS)):
        arguments = make_arguments(backend.device, old=form, kv_len=50)
        short = make_tensor(BATCH_SIZE, NUM_KV_HEADS, 35, 40, device=backend.device)
        arguments["keys"][0] = short
        assert_matches_oracle(backend, arguments)


@pytest.mark.parametrize("per_layer", [False, True])
def test_many_layers(backend: Backend, per_layer: bool) -> None:
    """More of them than one launch takes."""
    arguments = make_arguments(backend.device, kv_len=3)
    arguments["keys"] = [
        make_tensor(BATCH_SIZE, NUM_KV_HEADS, 3, 16, device=backend.device) for _ in range(70)
    ]
    if per_layer:
        arguments["old_positions"] = make_positions(70, BATCH_SIZE, 1, 3, end=99).to(backend.device)
    assert_matches_oracle(backend, arguments)


@pytest.mark.every_isa
@pytest.mark.parametrize("distance", [1, -1, 2**10 + 1, -(2**20), 2**20])
def test_angles_of_every_frequency(backend: Backend, distance: int) -> None:
    """Any frequency is exact, not only the usual ones; those of 0 and of whole turns, too."""
    signs = torch.tensor([1.0, -1.0]).repeat(200)
    inv_freq = torch.cat([torch.logspace(-30, 2, 400) * signs, torch.zeros(1), -torch.ones(1)])
    key = torch.randn(1, 1, 1, 2 * len(inv_freq), device=backend.device)
    old = torch.full((1, 1), max(-distance, 0), dtype=torch.int32, device=backend.device)
    arguments = {"keys": [key], "old_positions": old, "new_positions": old + distance}
    assert_matches_oracle(backend, arguments | {"inv_freq": inv_freq.to(backend.device)})


def random_bits(key: Tensor) -> Tensor:
    """Return keys of any bits, NaNs of all kinds among them."""
    return torch.randint(-(2**15), 2**15, key.shape, dtype=torch.int16).view(key.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_does_not_turn_keeps_its_bytes(backend: Backend, dtype: torch.dtype) -> None:
    """Slots whose positions are equal or empty, whatever their bits, and the other channels."""
    arguments = make_arguments(backend.device, num_axes=3, head_dim=40, dtype=dtype)
    arguments["keys"] = [random_bits(key).to(backend.device) for key in arguments["keys"]]
    old, new = arguments["old_positions"], arguments["new_positions"]
    old[1, 0, 8] = -1  # on one axis
    new[2, 1, 9] = -1
    new[:2, :, 11] = old[:2, :, 11] = 4  # equal on two of three
    before = clone(arguments["keys"])
    backend.op(OP)(**arguments)
    empty = ((old < 0) | (new < 0)).any(0)
    turns = ~empty & (old != new).any(0)
    assert turns.any() and turns[:, 11].any() and not turns[0, 8] and not turns[1, 9]
    still = ~turns[:, None].expand(-1, NUM_KV_HEADS, -1)
    for key, old_key in zip(arguments["keys"], before, strict=True):
        assert_same_bytes(as_integers(key)[still], as_integers(old_key)[still])
        assert_same_bytes(as_integers(key)[..., 16:], as_integers(old_key)[..., 16:])


def test_nan_stays_in_its_pair(backend: Backend) -> None:
    for interleaved, partner in ((False, 11), (True, 2)):
        arguments = make_arguments(backend.device, interleaved=interleaved)
        arguments["old_positions"][:] = 1
        arguments["new_positions"][:] = 2
        arguments["keys"][0][1, 2, 20, 3] = torch.nan
        backend.op(OP)(**arguments)
        nan = arguments["keys"][0].isnan().nonzero().tolist()
        assert nan == [[1, 2, 20, channel] for channel in sorted((3, partner))]


def test_there_and_back(backend: Backend) -> None:
    arguments = make_arguments(backend.device, num_axes=3)
    back = {
        "new_positions": arguments["old_positions"],
        "old_positions": arguments["new_positions"],
    }
    before = clone(arguments["keys"])
    backend.op(OP)(**arguments)
    backend.op(OP)(**{**arguments, **back})
    torch.testing.assert_close(arguments["keys"], before, rtol=0, atol=3e-6)


def test_positions_inside_a_compacted_cache(backend: Backend) -> None:
    """Kept indices are the old positions, as they are; the new ones count from 0 (StreamingLLM)."""
    device, inv_freq = backend.device, make_inv_freq(8).to(backend.device)
    plain = make_tensor(2, 3, 30, 16, device=device)
    key, zeros = plain.clone(), torch.zeros(2, 30, dtype=torch.int32, device=device)
    index = torch.arange(30, dtype=torch.int32, device=device)
    backend.op(OP)([key], zeros, index.expand(2, 30), inv_freq)
    scores = torch.rand(2, 3, 30, device=device)
    row_k = torch.tensor([[12, 5, 0], [9, 12, 1]], dtype=torch.int32, device=device)
    kept_indices, kept_lens = backend.op("select_topk")(scores, 12, row_k=row_k)
    backend.op("compact_kv_")([key], [key.clone()], kept_indices, kept_lens)
    backend.op(OP)([key[:, :, :12]], kept_indices, index[:12].expand(2, 12), inv_freq)

    (expected,), _ = backend.op("gather_kv")([plain], [plain], kept_indices, kept_lens)
    backend.op(OP)([expected], zeros[:, :12], index[:12].expand(2, 12), inv_freq)
    kept = index[:12] < kept_lens[..., None]
    torch.testing.assert_close(key[:, :, :12][kept], expected[kept], rtol=0, atol=3e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writes_only_inside_the_tensors(backend: Backend, layout: str) -> None:
    arguments = make_arguments(backend.device, layout=layout, dtype=torch.bfloat16)
    stores = [
        torch.empty(0, dtype=torch.uint8, device=key.device).set_(key.untyped_storage())
        for key in arguments["keys"]
    ]
    before = [store.clone() for store in stores]
    backend.op(OP)(**arguments)
    for key, store, old in zip(arguments["keys"], stores, before, strict=True):
        new = store.clone()
        store.fill_(1)
        key.zero_()
        assert_same_bytes(new[store == 1], old[store == 1])


def test_offsets_of_64_bits(backend: Backend) -> None:
    """Slots of one head more than 2**31 elements apart; few pages are ever touched."""
    whole = torch.empty(2**32 + 64, dtype=torch.float16, device=backend.device)
    key = whole.as_strided((1, 1, 3, 16), (0, 0, 2**31, 1))
    key.copy_(torch.randn(1, 1, 3, 16))
    near = key.contiguous()
    old = torch.tensor([[5, 6, 7]], dtype=torch.int32, device=backend.device)
    inv_freq = make_inv_freq(8).to(backend.device)
    backend.op(OP)([key], old, old - 4, inv_freq)
    backend.op(OP)([near], old, old - 4, inv_freq)
    assert_same_bytes(key.contiguous(), near)


def test_a_lazy_clone_gets_memory_of_its_own(backend: Backend) -> None:
    original = torch.randn(1, 2, 9, 8, device=backend.device)
    before, key = original.clone(), torch._lazy_clone(original)
    old = torch.arange(9, dtype=torch.int32, device=backend.device)[None]
    backend.op(OP)([key], old, old + 1, make_inv_freq(4).to(backend.device))
    assert torch.equal(original, before)
    assert not torch.equal(key, before)


def test_keys_must_not_overlap(backend: Backend) -> None:
    whole = torch.randn(1, 2, 11, 8, device=backend.device)
    before = whole.clone()
    old = torch.arange(10, dtype=torch.int32, device=backend.device)[None]
    inv_freq = make_inv_freq(4).to(backend.device)
    for keys, what in (
        ([whole[:, :, :-1], whole[:, :, 1:]], r"keys\[1\] must not overlap keys\[0\]"),
        ([whole[:, :1, :-1].expand(-1, 2, -1, -1)], r"keys\[0\] must not overlap itself"),
    ):
        with pytest.raises(ValueError, match=what):
            backend.op(OP)(keys, old, old + 1, inv_freq)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("argument", ["old_positions", "new_positions", "inv_freq", "axis_of_freq"])
def test_what_is_read_must_not_lie_in_the_keys(backend: Backend, argument: str) -> None:
    key = torch.zeros(1, 1, 4, 8, device=backend.device)
    arguments: Arguments = {
        "keys": [key],
        "old_positions": torch.zeros(1, 1, 4, dtype=torch.int32, device=backend.device),
        "new_positions": torch.ones(1, 1, 4, dtype=torch.int32, device=backend.device),
        "inv_freq": make_inv_freq(4).to(backend.device),
        "axis_of_freq": torch.zeros(4, dtype=torch.int32, device=backend.device),
    }
    inside = key[:, 0, 0, :4] if argument.endswith("positions") else key[0, 0, 0, :4]
    if argument.endswith("positions"):
        inside = inside[None]
    arguments[argument] = inside.view(arguments[argument].dtype).view(arguments[argument].shape)
    with pytest.raises(ValueError, match=rf"{argument} must not overlap keys\[0\]"):
        backend.op(OP)(**arguments)
    assert (key == 0).all()


# --- As transformers rotates ----------------------------------------------------------------------


def rotate_llama(key: Tensor, positions: Tensor) -> tuple[Tensor, Arguments]:
    from transformers.models.llama import modeling_llama as model

    config = model.LlamaConfig(hidden_size=64, num_attention_heads=2)
    embedding = model.LlamaRotaryEmbedding(config)
    cos, sin = embedding(key, positions[0])
    return model.apply_rotary_pos_emb(key, key, cos, sin)[1], {"inv_freq": embedding.inv_freq}


def rotate_qwen2_5_vl(key: Tensor, positions: Tensor) -> tuple[Tensor, Arguments]:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as model

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    sizes = {"hidden_size": 64, "num_attention_heads": 2}
    config = model.Qwen2_5_VLTextConfig(**sizes, rope_parameters=rope)
    embedding = model.Qwen2_5_VLRotaryEmbedding(config)
    sections = [0] * 4 + [1] * 6 + [2] * 6
    return with_axes(model, embedding, key, positions, sections, rope)


def rotate_qwen3_vl(key: Tensor, positions: Tensor) -> tuple[Tensor, Arguments]:
    from transformers.models.qwen3_vl import modeling_qwen3_vl as model

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}
    config = model.Qwen3VLTextConfig(**sizes, rope_parameters=rope)
    embedding = model.Qwen3VLTextRotaryEmbedding(config)
    axes = [0, 1, 2] * 5 + [0]
    return with_axes(model, embedding, key, positions, axes, rope)


def with_axes(
    model: Any, embedding: Any, key: Tensor, positions: Tensor, axes: list[int], rope: Any
) -> tuple[Tensor, Arguments]:
    """Rotate by M-RoPE; cos and sin have an axis in front in older versions of transformers."""
    cos, sin = embedding(key, positions)
    if cos.dim() == 4:
        apply, extra = model.apply_multimodal_rotary_pos_emb, (rope["mrope_section"],)
    else:
        apply, extra = model.apply_rotary_pos_emb, ()
    arguments = {
        "inv_freq": embedding.inv_freq,
        "axis_of_freq": torch.tensor(axes, dtype=torch.int32),
    }
    return apply(key, key, cos, sin, *extra)[1], arguments


def rotate_gptj(key: Tensor, positions: Tensor) -> tuple[Tensor, Arguments]:
    from transformers.models.gptj import modeling_gptj as model

    table = model.create_sinusoidal_positions(100, 20)
    sin, cos = table[positions[0]].chunk(2, dim=-1)
    rotated = model.apply_rotary_pos_emb(key[..., :20].transpose(1, 2), sin, cos).transpose(1, 2)
    inv_freq = 1e4 ** -(torch.arange(0, 20, 2) / 20)
    rotated = torch.cat([rotated, key[..., 20:]], dim=-1)
    return rotated, {"inv_freq": inv_freq, "interleaved": True}


@pytest.mark.parametrize("rotate", [rotate_llama, rotate_qwen2_5_vl, rotate_qwen3_vl, rotate_gptj])
def test_equals_rotation_at_the_new_positions(backend: Backend, rotate: Any) -> None:
    """Positions stay below 100: transformers' angles are float32 products."""
    pytest.importorskip("transformers")
    key = torch.randn(2, 2, 25, 32)
    old, new = torch.randint(0, 100, (2, 3, 2, 25)).unbind()
    rotated, arguments = rotate(key, old)
    expected, _ = rotate(key, new)
    if "axis_of_freq" not in arguments:
        old, new = old[0], new[0]
    arguments = {
        name: value.to(backend.device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    keys = [rotated.contiguous().to(backend.device)]
    backend.op(OP)(keys, old.int().to(backend.device), new.int().to(backend.device), **arguments)
    torch.testing.assert_close(keys[0].cpu(), expected, rtol=0, atol=5e-5)
