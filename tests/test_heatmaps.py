"""Heat maps against small cases worked out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Resize

from anogan import heatmaps, scores
from anogan.decoding import View


def test_difference_by_hand() -> None:
    x = torch.full((2, 3, 64, 64), 0.5)
    generated = x.clone()
    assert heatmaps.difference(x, generated).abs().max() == 0

    def found_heats() -> list[np.ndarray]:
        return [heatmaps.smoothed(each[0], 64) for each in heatmaps.difference(x, generated)]

    generated[1] = -1
    generated[0, :, 20:40, 10:30] += torch.tensor([0.3, -0.3, 0.0])[:, None, None]  # colours do not cancel
    found = np.array(found_heats())
    assert found.shape == (2, 64, 64)
    np.testing.assert_allclose(found[1], np.full((64, 64), 0.75), rtol=1e-6)  # of a range of 2, 1.5
    assert found[0, 30, 20] == pytest.approx(0.1, abs=1e-3)  # far inside the patch, a mean of 0.2 in a range of 2
    assert found[0, 20, 20] == pytest.approx(0.05, abs=0.015) and found[0, 55, 50] == 0  # half at its edge, 0 far away
    assert [scores.peak(heat) for heat in found] == pytest.approx([0.1, 0.75], abs=1e-3)


def test_a_small_patch_raises_the_peak_more_than_the_residual() -> None:
    noise = 0.05 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(1, 1, 64, 64)
    spotted = x.clone()
    spotted[..., 30:34, 30:34] = 0.8
    heats = [heatmaps.smoothed(heatmaps.difference(each, noise)[0, 0], 64) for each in (x, spotted)]
    plain, spot = map(scores.peak, heats)
    residual = [(each - noise).abs().sum().item() for each in (x, spotted)]
    assert spot > 3 * plain and residual[1] < 1.1 * residual[0]


@pytest.mark.parametrize("size", [(100, 100), (200, 90), (90, 201), (33, 500), (64, 64)])
def test_the_window_is_what_the_network_sees(size: tuple[int, int]) -> None:
    """A dot of the network's image lands where it came from in the picture, to within a pixel of the network's."""
    width, height = size
    left, top, right, bottom = View(32, 1).window(size)
    assert right - left == bottom - top == min(size)
    assert abs(left - (width - right)) <= 1 and abs(top - (height - bottom)) <= 1
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    for ramp, start, end, whole in ((across, left, right, width), (down, top, bottom, height)):
        picture = Image.fromarray(ramp.round().astype(np.uint8))
        seen = np.asarray(CenterCrop(32)(Resize(32)(picture))).astype(float)
        middle = seen[16] if ramp is across else seen[:, 16]
        expected = 255 * (start + (np.arange(32) + 0.5) * (end - start) / 32 - 0.5) / (whole - 1)
        assert np.abs(middle - expected).max() <= 1 + 255 * min(size) / 32 / whole


def test_at_own_size() -> None:
    heat = np.zeros((32, 32), np.float32)
    heat[8, 24] = 1
    whole = heatmaps.at_own_size(heat, (320, 160), View(32, 1))
    assert whole.shape == (160, 320)
    assert np.isnan(whole[:, :80]).all() and np.isnan(whole[:, 240:]).all() and np.isfinite(whole[:, 80:240]).all()
    row, column = np.unravel_index(np.nanargmax(whole), whole.shape)
    assert abs(row - 8.5 * 5) <= 2.5 and abs(column - (80 + 24.5 * 5)) <= 2.5
    # a picture smaller than the network's is averaged
    assert heatmaps.at_own_size(heat, (16, 16), View(32, 1)).max() < 1


def test_colours_and_marks() -> None:
    heat = np.array([[0.0, 0.1, 0.2, 0.9, np.nan]], np.float32)
    colours = heatmaps.coloured(heat, 0.2).astype(int)
    assert colours.shape == (1, 5, 3) and colours[0, 0].sum() < 10 and colours[0, 2].sum() > 500
    assert colours[0, 0].sum() < colours[0, 1].sum() < colours[0, 2].sum()
    assert (colours[0, 2] == colours[0, 3]).all() and np.ptp(colours[0, 4]) == 0
    assert (heatmaps.coloured(np.zeros((1, 2)), 0) == colours[0, 0]).all()
    picture = np.full((1, 5, 3), 100, np.uint8)
    marked = heatmaps.marked(picture, heat, 0.1)
    assert marked[0, 2].tolist() == marked[0, 3].tolist() == [193, 40, 40]
    assert (marked[0, [0, 1, 4]] == 100).all()  # the level itself does not pass, nor does what was not looked at


def test_panels() -> None:
    black, white, grey = (np.full((8, 8, 3), level, np.uint8) for level in (0, 255, 128))
    heat = np.zeros((8, 8), np.float32)
    heat[0, 0] = 0.5
    real, drawn, colours, marked = heatmaps.panels(white, grey, heat, level=0.4, brightest=0.5, longest=8)
    assert {part.shape for part in (real, drawn, colours, marked)} == {(8, 8, 3)}
    assert (real == 255).all() and (drawn == 128).all()
    assert marked[0, 0].tolist() == [255, 102, 102] and (marked[1] == 255).all()
    assert colours[0, 0].sum() > 500 > colours[1, 1].sum()
    assert (heatmaps.panels(black, grey, 0 * heat, 0.4, 0.5, 8)[3] == 0).all()


def test_a_thin_defect_is_seen_in_a_reduced_panel() -> None:
    picture, heat = np.zeros((200, 100, 3), np.uint8), np.zeros((200, 100), np.float32)
    heat[:, 50] = 0.5
    marked = heatmaps.panels(picture, picture, heat, level=0.4, brightest=0.5, longest=20)[3]
    assert marked.shape == (20, 10, 3) and (marked[:, 5] == [153, 0, 0]).all() and (marked[:, :5] == 0).all()


def test_rgb() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0])[None, None]  # (1, 1, 3)
    assert heatmaps.to_rgb(x).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]


def test_what_is_usual_at_a_place_does_not_count() -> None:
    """An edge that is never drawn well hides a defect, and no longer does once each place is compared with itself."""
    rng = np.random.default_rng(0)

    def heat(defect: float = 0.0) -> np.ndarray:
        drawn = 0.02 + 0.004 * rng.random((40, 60))
        drawn[:, 20:22] += 0.3 * rng.random((40, 2))
        drawn[10:13, 40:44] += defect
        return drawn.astype(np.float32)

    normal = [heat() for _ in range(30)]
    usual = heatmaps.usual(normal, 32)
    among = [usual.relative(each, is_among=True).max() for each in normal]
    defective = heat(0.1)
    assert defective.argmax() % 60 in (20, 21) and defective.max() <= max(each.max() for each in normal)
    found = usual.relative(defective)
    assert found.max() > 3 * max(among) and np.unravel_index(found.argmax(), found.shape)[1] in range(40, 44)
    assert max(usual.relative(heat()).max() for _ in range(30)) < 2 * max(among)


def test_a_normal_picture_is_compared_with_the_others() -> None:
    rng = np.random.default_rng(0)
    heats = list(rng.random((25, 20, 30)).astype(np.float32))
    usual, others = heatmaps.usual(heats, 32), heatmaps.usual(heats[1:], 32)
    np.testing.assert_allclose(usual.relative(heats[0], True), others.relative(heats[0]), rtol=1e-4, atol=1e-5)


def test_where_nothing_is_usual() -> None:
    heats = [np.ones((4, 6), np.float32)] * 25
    assert heatmaps.usual(heats[:19], 32) is None and heatmaps.usual([], 32) is None
    assert heatmaps.usual([*heats, np.ones((6, 4), np.float32)], 32) is None  # they do not lie in one position
    usual = heatmaps.usual(heats, 32)  # all the same
    assert np.abs(usual.relative(heats[0])).max() < 1e-6
    assert usual.relative(np.full((8, 12), 3, np.float32)) == pytest.approx(2)  # of another size
