"""`python -m kvevict.demo`, on smaller models than its own."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kvevict import demo, policies
from kvevict.plotting import LayerPicture, plot_comparison, plot_kept_patches
from tests.integrations.tiny_models import IMAGE_ID, llava, qwen2_5_vl, save_llava


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the demo build a model of 16 image tokens."""
    model = llava()
    monkeypatch.setattr(demo, "build_demo_model", lambda: model)
    monkeypatch.setattr(demo, "IMAGE_TOKEN_ID", IMAGE_ID)
    return model


@pytest.mark.parametrize("policy", ["tgv_kv", "adakv", "think"])
def test_demo(
    policy: str, tiny_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--policy", policy, "--keep", "0.5", "--new-tokens", "3", "--out", str(tmp_path)]
    assert demo.main(arguments) == 0
    printed = capsys.readouterr().out
    for expected in (
        "random weights",
        "image of 16",
        "text of 9",
        "KV cache after the prompt",
        "peak memory",
        "prefill, tokens/s",
        "decode, tokens/s",
        "next-token agreement",
        "logit cosine",
    ):
        assert expected in printed
    path = tmp_path / f"kept_{policy}.png"
    assert str(path) in printed
    with Image.open(path) as picture:
        assert picture.size[0] > 1500


def test_keeping_all_agrees_everywhere(
    tiny_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), (200, 30, 90)).save(photo)
    arguments = ["--keep", "1.0", "--new-tokens", "4", "--out", str(tmp_path)]
    assert demo.main([*arguments, "--image", str(photo)]) == 0
    printed = capsys.readouterr().out
    assert "100%   of 4" in printed
    assert "1.000   (1.000)" in printed


def test_every_policy_side_by_side(
    tiny_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = policies.list(with_keep=True)
    arguments = ["--compare", ",".join(names), "--keep", "9", "--new-tokens", "2"]
    assert demo.main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    table = printed.split("worst\n")[1].split("\n\n")[0]
    rows = {line.split()[0]: line.split() for line in table.splitlines()}
    assert rows["full"][1:3] == ["16.0", "9.0"]
    for name in names:
        row = rows[type(demo.make_policy(name, 9)).__name__]
        assert len(row) == 10
        assert float(row[1]) + float(row[2]) < 16
    with Image.open(tmp_path / "compared.png") as picture:
        assert picture.size[0] > 1500
        assert picture.size[1] > 1500


def test_the_built_in_model_is_what_it_says() -> None:
    model = demo.build_demo_model()
    assert 19e6 < sum(p.numel() for p in model.parameters()) < 22e6
    vision = model.config.vision_config
    assert (vision.image_size // vision.patch_size) ** 2 == 576
    again = demo.build_demo_model()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_missing_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_import = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert demo.main([]) == 1
    assert 'pip install "kvevict[demo]"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"), [("0.05", 0.05), ("64", 64), ("1.0", 1.0), ("1", 1), ("1e-2", 0.01)]
)
def test_keep_is_a_ratio_or_a_count(text: str, expected: float | int) -> None:
    keep = demo.parse_keep(text)
    assert keep == expected
    assert type(keep) is type(expected)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--keep", "0"],
        ["--keep", "-1"],
        ["--keep", "many"],
        ["--policy", "none"],
        ["--compare", "snapkv,none"],
        ["--compare", "snapkv,tova,snapkv"],
        ["--compare", "snapkv,tova", "--policy", "h2o"],
        ["--new-tokens", "1"],
        ["--image", "/nowhere/photo.png"],
    ],
)
def test_refused_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        demo.main(arguments)
    assert error.value.code == 2


def test_patches_of_a_grid_that_is_not_square() -> None:
    model = qwen2_5_vl()
    inputs = {
        "input_ids": torch.tensor([[1, *[IMAGE_ID] * 12, 9]]),
        "image_grid_thw": torch.tensor([[1, 6, 8]]),
        "pixel_values": torch.zeros(48, 1176),
    }
    image = Image.new("RGB", (80, 60))
    photo, grid = demo.locate_patches(model, inputs, image)
    assert grid == (3, 4)
    assert photo.shape == (60, 80, 3)
    inputs["input_ids"] = torch.tensor([[1, *[IMAGE_ID] * 11, 9]])
    assert demo.locate_patches(model, inputs, image)[1] is None


def test_plot_with_one_layer_and_fractions(tmp_path: Path) -> None:
    patches = torch.rand(3, 4).round(decimals=1)
    path = plot_kept_patches(
        torch.rand(30, 40, 3),
        [LayerPicture(0, patches, 4.5, 3.0)],
        tmp_path / "one.png",
        prompt_len=20,
        title="one layer",
    )
    assert path.stat().st_size > 10_000


def test_two_methods_side_by_side(tmp_path: Path) -> None:
    """On a gray photo one keeps the left half and one the right half, in half of the layers."""
    halves = {"left": torch.tensor([[1.0, 0.0]]), "right": torch.tensor([[0.0, 1.0]])}
    methods = {
        name: [LayerPicture(0, kept, 1, 2), LayerPicture(1, kept * 0, 0, 2)]
        for name, kept in halves.items()
    }
    path = plot_comparison(
        torch.full((40, 40, 3), 0.5), methods, tmp_path / "two.png", prompt_len=4, title="two"
    )
    with Image.open(path) as picture:
        gray = bytearray(picture.convert("L").tobytes())
        pixels = torch.frombuffer(gray, dtype=torch.uint8).view(picture.size[::-1])
    # Photos of 2.6 inches, 2.85 from one to the next; the middle of their left and right halves.
    row = round(150 * (1.3 + 1.3))
    centers = [0.36 + 2.85 * cell + half for cell in range(3) for half in (0.65, 1.95)]
    bright = [int(pixels[row, round(150 * x)]) > 100 for x in centers]
    assert bright == [True, True, True, False, False, True]


def test_a_checkpoint_with_a_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_llava(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--question", "What is it", "--keep", "0.6"]
    assert demo.main([*arguments, "--new-tokens", "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "LlavaForConditionalGeneration, 21 prompt tokens on cpu" in printed
    assert "image of 16" in printed
    assert "text of 5" in printed
    assert "full cache : 'word" in printed
    assert "TGVKV      : 'word" in printed
    assert "random weights" not in printed.lower()
    assert (tmp_path / "kept_tgv_kv.png").is_file()
