import csv
import subprocess
import sys
import time
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text

from mimo_strategy.layout import Layout, ModuleParallel, ModuleSizes
from mimo_strategy.pictures import CaptionedImage, draw_captions, draw_curves, draw_layout

SIZES = ModuleSizes(num_experts=64, pp_stages=frozenset({1, 2}))


def resolve(world_size: int, **modules: ModuleParallel) -> Layout:
    return Layout.resolve(dict.fromkeys(modules, SIZES), world_size, modules)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def patches(figure: Figure) -> dict[str, Patch]:
    return {patch.get_gid(): patch for patch in figure.findobj(Patch) if patch.get_gid()}


def overlapping_texts(figure: Figure) -> list[tuple[str, str]]:
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure.findobj(Text) if text.get_text()]
    return [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]


NON_COLOCATED_4 = resolve(4, images=ModuleParallel(dp=2), language=ModuleParallel(tp=2, ep=2, rank_offset=2))
COLOCATED_4 = resolve(4, images=ModuleParallel(dp=4), language=ModuleParallel(tp=2, dp=2, ep=2))
PIPELINED_8 = resolve(
    8,
    images=ModuleParallel(dp=4),
    language=ModuleParallel(tp=2, pp=2, ep=2, rank_offset=4),
)
TWO_ENCODERS_6 = resolve(
    6,
    images=ModuleParallel(dp=2),
    audio=ModuleParallel(dp=1, tp=2, rank_offset=2),
    language=ModuleParallel(dp=2, rank_offset=4),
)
LAYOUTS = {
    "1": resolve(1, images=ModuleParallel(), language=ModuleParallel()),
    "3": resolve(3, images=ModuleParallel(dp=1), language=ModuleParallel(dp=2, ep=2, rank_offset=1)),
    "4 non-colocated": NON_COLOCATED_4,
    "4 colocated": COLOCATED_4,
    "4 language only": resolve(4, language=ModuleParallel(tp=2, ep=2)),
    "6 two encoders": TWO_ENCODERS_6,
    "8 fan-out": resolve(8, images=ModuleParallel(tp=4, dp=2), language=ModuleParallel(tp=2, dp=4, ep=8)),
    "8 pipelined": PIPELINED_8,
    "16": resolve(16, images=ModuleParallel(dp=16), language=ModuleParallel(tp=2, ep=4, etp=2)),
    "24": resolve(24, images=ModuleParallel(dp=8), language=ModuleParallel(tp=2, ep=4, rank_offset=8)),
    "64": resolve(64, images=ModuleParallel(tp=2), language=ModuleParallel(tp=4, ep=8)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_shows_every_rank_and_coordinate_and_no_text_overlaps(layout: Layout) -> None:
    figure = draw_layout(layout)
    shown = texts(figure)
    for rank in range(layout.world_size):
        assert shown.count(f"rank {rank}") == len(layout.modules)
    for module in layout.modules.values():
        for rank in module.ranks:
            at = module.coordinates(rank)
            assert f"tp {at['tp']}" in shown
            assert f"dp {at['dp']}" in shown
    expected = sum(2 * module.num_ranks for module in layout.modules.values())
    assert sum(text.startswith(("tp ", "dp ")) for text in shown) == expected
    assert overlapping_texts(figure) == []


def test_layout_shows_both_factorizations() -> None:
    shown = texts(draw_layout(NON_COLOCATED_4))
    times = "\N{MULTIPLICATION SIGN}"
    assert "Non-colocated, world size 4" in shown
    assert f"ranks 0-1   |   tp 1 {times} dp 2 = 2" in shown
    assert f"ranks 2-3   |   tp 2 {times} dp 1 = 2   |   etp 1 {times} ep 2 {times} edp 1 = 2" in shown
    for coordinate, count in {"etp 0": 2, "ep 0": 1, "ep 1": 1, "edp 0": 2, "tp 1": 1, "dp 1": 1}.items():
        assert shown.count(coordinate) == count, coordinate


def test_layout_shows_stages_in_both_factorizations() -> None:
    shown = texts(draw_layout(PIPELINED_8))
    times = "\N{MULTIPLICATION SIGN}"
    primary, experts = (
        f"tp 2 {times} dp 1 {times} pp 2 = 4",
        f"etp 1 {times} ep 2 {times} edp 1 {times} pp 2 = 4",
    )
    assert f"ranks 4-7   |   {primary}   |   {experts}" in shown
    assert shown.count("pp 0") == shown.count("pp 1") == 2


def missing_light(figure: Figure, gid: str) -> np.ndarray:
    return 1 - np.array(patches(figure)[gid].get_facecolor()[:3])


def hue(color: np.ndarray) -> np.ndarray:
    return color / color.max()


def test_cells_of_a_lane_share_a_hue_and_its_shards_differ_in_shade() -> None:
    figure = draw_layout(COLOCATED_4)
    first, shard, other = (missing_light(figure, f"language rank {rank}") for rank in (0, 1, 2))
    np.testing.assert_allclose(hue(first), hue(shard))
    assert not np.allclose(first, shard)
    assert not np.allclose(hue(first), hue(other), atol=0.1)


@pytest.mark.parametrize("dp", [2, 8, 14])
def test_neighbouring_lanes_differ_in_hue_whatever_feeds_them(dp: int) -> None:
    for finer in (1, 2, 7, 8):
        encoder, language = ModuleParallel(dp=dp * finer), ModuleParallel(dp=dp, tp=finer)
        figure = draw_layout(resolve(dp * finer, images=encoder, language=language))
        hues = [hue(missing_light(figure, f"language lane {lane}")) for lane in range(dp)]
        assert all(not np.allclose(one, other, atol=0.01) for one, other in pairwise(hues))


@pytest.mark.parametrize(
    ("images", "language", "label", "pairs"),
    [
        (
            ModuleParallel(dp=4),
            ModuleParallel(dp=2, rank_offset=4),
            "fan-in 4",
            [(0, 0), (1, 0), (2, 1), (3, 1)],
        ),
        (
            ModuleParallel(dp=2),
            ModuleParallel(dp=4, rank_offset=2),
            "fan-out 2",
            [(0, 0), (0, 1), (1, 2), (1, 3)],
        ),
        (
            ModuleParallel(dp=2),
            ModuleParallel(tp=2, dp=2, pp=2, rank_offset=2),
            "equal 2",
            [(0, 0), (1, 1)],
        ),
        (
            ModuleParallel(dp=32),
            ModuleParallel(tp=2, dp=16),
            "fan-in 32",
            [(lane, lane // 2) for lane in range(32)],
        ),
    ],
)
def test_bridge_leads_from_lane_to_lane(
    images: ModuleParallel, language: ModuleParallel, label: str, pairs: list[tuple[int, int]]
) -> None:
    world_size = max(part.rank_offset + part.tp * part.dp * part.pp for part in (images, language))
    layout = resolve(world_size, images=images, language=language)
    figure = draw_layout(layout)
    drawn = patches(figure)
    assert any(text.startswith(label) for text in texts(figure))
    assert sum(" feeds " in gid for gid in drawn) == len(pairs)
    for encoder_lane, language_lane in pairs:
        start, *_, end = drawn[f"images {encoder_lane} feeds {language_lane}"].get_path().vertices
        for (x, _), bar in (
            (start, drawn[f"images lane {encoder_lane}"]),
            (end, drawn[f"language lane {language_lane}"]),
        ):
            assert x == pytest.approx(bar.get_x() + bar.get_width() / 2)


@pytest.mark.parametrize("layout", [NON_COLOCATED_4, COLOCATED_4, PIPELINED_8], ids=str)
def test_lanes_stand_over_the_ranks_that_the_bridge_reaches(layout: Layout) -> None:
    drawn = patches(draw_layout(layout))
    for module in layout.modules.values():
        for rank in module.ranks:
            at = module.coordinates(rank)
            if at["pp"] == 0:
                cell, lane = drawn[f"{module.name} rank {rank}"], drawn[f"{module.name} lane {at['dp']}"]
                assert lane.get_x() - 1e-9 <= cell.get_x()
                assert cell.get_x() + cell.get_width() <= lane.get_x() + lane.get_width() + 1e-9


def test_language_alone_has_no_bridge() -> None:
    figure = draw_layout(LAYOUTS["4 language only"])
    assert not any("feeds" in gid or "lane" in gid for gid in patches(figure))
    assert "Language model alone, world size 4" in texts(figure)


@pytest.mark.parametrize(
    "modules",
    [
        {"images": ModuleParallel(dp=512), "language": ModuleParallel(tp=8, ep=64)},
        {"images": ModuleParallel(tp=2, dp=128), "language": ModuleParallel(tp=4, pp=2, rank_offset=256)},
    ],
    ids=["colocated", "non-colocated"],
)
def test_512_ranks_keep_their_numbers(modules: dict[str, ModuleParallel], tmp_path: Path) -> None:
    start = time.monotonic()
    layout = resolve(512, **modules)
    figure = draw_layout(layout)
    figure.savefig(tmp_path / "layout.png")
    assert time.monotonic() - start < 60
    shown = texts(figure)
    for rank in range(512):
        assert shown.count(str(rank)) >= sum(rank in module.ranks for module in layout.modules.values())
    for module in layout.modules.values():
        # the bars above
        assert any(text.startswith(f"ranks {module.ranks[0]}-") for text in shown)


def test_a_world_of_very_many_ranks_is_drawn_as_bars() -> None:
    modules = {"images": ModuleParallel(dp=8192), "language": ModuleParallel(tp=4, pp=2, rank_offset=8192)}
    shown = texts(draw_layout(resolve(16_384, **modules)))
    assert {"ranks 0-8191", "ranks 8192-12287, pp 0", "ranks 12288-16383, pp 1"} <= set(shown)
    assert len(shown) < 20


def write_metrics(path: Path, rows: list[dict[str, float]]) -> Path:
    """As CSVLogger does: one column for every key, sorted, empty where a row has no value."""
    with path.open("w", newline="") as table:
        writer = csv.DictWriter(table, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)
    return path


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_curves_draw_every_panel(tmp_path: Path) -> None:
    rows = [
        {
            "step": step,
            "train_loss": 4 * 0.9**step + 0.01 * (step % 2),
            "grad_norm": 1.0,
            "tokens/s": 5e4,
        }
        for step in range(100)
    ]
    rows += [{"step": step, "lr-Adam/images": 1e-3, "lr-Adam/language": 1e-4} for step in range(0, 100, 10)]
    rows += [{"step": step, "val_loss": 4 * 0.9**step} for step in (49, 99)]
    drawn = panels(draw_curves(write_metrics(tmp_path / "metrics.csv", rows)))
    assert list(drawn) == ["loss", "tokens per second", "gradient norm", "learning rate"]
    loss = drawn["loss"]
    assert loss.get_yscale() == "log"
    raw, smoothed, val = loss.lines
    assert raw.get_linewidth() < smoothed.get_linewidth()
    roughness, raw_roughness = (np.abs(np.diff(line.get_ydata(), 2)).mean() for line in (smoothed, raw))
    assert roughness < raw_roughness
    assert list(val.get_xdata()) == [49, 99]
    assert [text.get_text() for text in drawn["learning rate"].get_legend().get_texts()] == [
        "images",
        "language",
    ]


def test_curves_skip_absent_and_empty_columns_and_values_that_are_not_finite(tmp_path: Path) -> None:
    losses = (3.0, np.nan, 2.0)
    rows = [{"step": step, "train_loss": loss, "grad_norm": ""} for step, loss in enumerate(losses)]
    drawn = panels(draw_curves(write_metrics(tmp_path / "metrics.csv", rows)))
    assert list(drawn) == ["loss"]
    assert drawn["loss"].get_yscale() == "linear"
    assert list(drawn["loss"].lines[0].get_xdata()) == [0, 2]


def test_curves_without_anything_to_draw_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no loss"):
        draw_curves(write_metrics(tmp_path / "metrics.csv", [{"step": 0, "heldout_accuracy": 1.0}]))


def sample(generated: str, truth: str | None, image: torch.Tensor | None = None) -> CaptionedImage:
    return CaptionedImage(torch.rand(3, 8, 8) if image is None else image, "Which digit?", generated, truth)


def test_wrong_captions_show_the_truth_and_are_marked() -> None:
    shown = texts(draw_captions([sample("7", "7"), sample("1 ", " 1"), sample("3", "8")]))
    assert "2 of 3 shown are right" in shown
    assert shown.count("\N{CHECK MARK}") == 2
    assert shown.count("\N{BALLOT X}") == 1
    assert shown.count("Which digit?") == 3
    assert [text for text in shown if text.startswith("truth")] == ["truth: 8"]


def test_captions_whose_truth_is_not_known_are_not_judged() -> None:
    shown = texts(draw_captions([sample("7", "7"), sample("3", None)]))
    assert "2 shown" in shown and not any(text.startswith("truth") for text in shown)
    assert shown.count("\N{CHECK MARK}") == 1 and "\N{BALLOT X}" not in shown


def test_long_captions_wrap_without_touching_one_another() -> None:
    story = "a long story about a $5 note, a $10 note and " + "W" * 80
    figure = draw_captions([sample(story, "a note" * 20), sample("", "W " * 90), sample("7", "7")] * 5)
    assert overlapping_texts(figure) == []
    assert "(nothing)" in texts(figure)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (torch.tensor([-1.0, 0.0, 1.0]), [0, 0.5, 1]),
        (torch.tensor([0.0, 0.5, 1.0]), [0, 0.5, 1]),
        (torch.tensor([0.0, 0.5, 1.0], dtype=torch.bfloat16, requires_grad=True), [0, 0.5, 1]),
    ],
)
def test_images_of_either_range_show_the_same_colours(image: torch.Tensor, expected: list[float]) -> None:
    figure = draw_captions([sample("7", "7", image.reshape(3, 1, 1).expand(3, 2, 4))])
    (drawn,) = figure.axes[0].images
    assert drawn.get_interpolation() == "nearest"
    left, right, bottom, top = drawn.get_extent()
    assert (right - left) / (bottom - top) == pytest.approx(2)
    np.testing.assert_allclose(drawn.get_array()[0, 0], expected)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        draw_captions([])


def test_pictures_save_without_a_display(tmp_path: Path) -> None:
    pictures = {
        "layout": draw_layout(NON_COLOCATED_4),
        "curves": draw_curves(write_metrics(tmp_path / "metrics.csv", [{"step": 0, "train_loss": 1.0}])),
        "captions": draw_captions([sample("7", "7")]),
    }
    for name, figure in pictures.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == []


def test_pictures_are_imported_only_when_asked_for() -> None:
    code = "import sys, mimo_strategy; assert 'mimo_strategy.pictures' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
