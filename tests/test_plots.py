"""The animation shows the tiles that the algorithm visits, in its order."""

import io

import pytest
import torch

from flash_attn_ext.series import tiled

plots = pytest.importorskip("flash_attn_ext.series.plots", reason="needs matplotlib")
Image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_order_of_tiles_is_that_of_the_walkthrough(causal, backward, monkeypatch):
    visited = []
    scores = tiled._Tiles.scores

    def record(self, Q_i, K_j, rows, cols):
        visited.append((rows.start // 4, cols.start // 4))
        return scores(self, Q_i, K_j, rows, cols)

    q, k, v, do = torch.randn(4, 1, 1, 20, 8)
    window = (-1, 0) if causal else (-1, -1)
    sizes = {"block_m": 4, "block_n": 4}
    out, lse = tiled.forward(q, k, v, window=window, **sizes)
    monkeypatch.setattr(tiled._Tiles, "scores", record)
    if backward:
        tiled.backward(do, q, k, v, None, None, out, lse, window=window, **sizes)
    else:
        tiled.forward(q, k, v, window=window, **sizes)
    assert visited == plots.order_of_tiles(5, causal=causal, backward=backward)


def test_sweep_has_a_frame_for_each_tile():
    with Image.open(io.BytesIO(plots.sweep(tiles=3))) as picture:
        assert picture.n_frames == 6  # causal: 3 + 2 + 1
