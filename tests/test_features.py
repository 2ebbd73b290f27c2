"""t-SNE and the figure of features that it draws."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import generator, images
from PIL import Image

from encoder import Encoder
from support import features, layouts
from support.charts import spread_out
from support.features import POINTS, draw_features, scatter
from support.options import make_config
from support.tsne import affinities, tsne


def clusters(n: int = 20) -> torch.Tensor:
    centres = 5 * torch.randn(3, 8, generator=generator(1), dtype=torch.float64)
    noise = torch.randn(3, n, 8, generator=generator(2), dtype=torch.float64)
    return (centres[:, None] + noise).flatten(0, 1)


def test_each_row_of_the_affinities_has_the_entropy_of_the_perplexity():
    x, perplexity = clusters(8), 5.0
    d = torch.cdist(x, x).square()
    conditional = torch.zeros_like(d)
    for i in range(len(x)):  # a loop over the definition
        low, high = 1e-9, 1e9
        for _ in range(200):
            b = math.sqrt(low * high)
            w = torch.exp(-b * (d[i] - d[i][d[i] > 0].min()))
            w[i] = 0
            p = w / w.sum()
            entropy = -(p[p > 0] * p[p > 0].log()).sum().item()
            low, high = (b, high) if entropy > math.log(perplexity) else (low, b)
        conditional[i] = p
    want = (conditional + conditional.T) / (2 * len(x))
    got = affinities(x, perplexity)
    assert (got - want).abs().max() < 1e-9
    assert got.sum().item() == pytest.approx(1, abs=1e-9)


def test_it_ends_in_a_minimum_of_the_cost():
    x = torch.randn(40, 5, generator=generator(), dtype=torch.float64)
    y = tsne(x, generator(), perplexity=10)
    p = affinities(x, 10)

    def kl(y):
        w = 1 / (1 + (y[:, None] - y[None]).square().sum(-1))
        w = w * (1 - torch.eye(len(y), dtype=y.dtype))
        q = (w / w.sum()).clamp_min(1e-12)
        return (p * (p / q).log()).sum()

    y = y.clone().requires_grad_()
    value = kl(y)
    value.backward()
    assert y.grad.abs().max() < 2e-3  # a minimum
    for seed in range(5):  # and no saddle
        moved = torch.randn(y.shape, generator=generator(seed), dtype=y.dtype)
        assert kl(y.detach() + 0.05 * y.detach().std() * moved) > value + 1e-4


def test_clusters_stay_together_and_draws_are_the_seeds():
    x = clusters()
    y = tsne(x, generator(3), perplexity=10, steps=400)
    again = tsne(x, generator(3), perplexity=10, steps=400)
    assert torch.equal(y, again)
    nearest = torch.cdist(y, y).fill_diagonal_(math.inf).argmin(dim=1)
    assert (nearest // 20 == torch.arange(60) // 20).all()


def test_equal_points_are_no_error_and_an_impossible_perplexity_is():
    y = tsne(torch.ones(20, 3), generator(), perplexity=5, steps=50)
    assert torch.isfinite(y).all()
    for perplexity in (1.0, 20.0):
        with pytest.raises(ValueError, match="between 1 and N = 20"):
            tsne(torch.ones(20, 3), generator(), perplexity=perplexity)


def test_the_points_are_spread_over_a_folder():
    assert spread_out(3, POINTS).tolist() == [0, 1, 2]
    many = spread_out(10 * POINTS, POINTS)
    assert (len(many), many[0], many[-1]) == (POINTS, 0, 10 * POINTS - 1)


def test_the_figure_is_written_with_test_images_and_without(tmp_path):
    train = (images(6, 32) * 255).byte().numpy()
    config = make_config({"data": "x", "image_size": 32, "classes": 3})
    encoder = Encoder(classes=3).eval()
    samples = tuple(layouts.Sample(Path(f"{i}.png"), i % 2, "a") for i in range(6))
    dataset = layouts.Dataset("MVTec", Path("/data/colon"), (), samples)
    draw_features(encoder, train, None, dataset, config, tmp_path / "a")
    draw_features(encoder, train, train, dataset, config, tmp_path / "b")
    a, b = (np.asarray(Image.open(tmp_path / run / "figures/features.png")) for run in "ab")
    assert a.shape == b.shape and (a != b).any()
    draw_features(encoder, train[:2], None, dataset, config, tmp_path / "c")
    assert not (tmp_path / "c").exists()  # six points say nothing
    with torch.no_grad():
        encoder.head[0].weight.fill_(1e38)  # finite, but not what it gives
    with pytest.raises(FloatingPointError, match="not finite; a lower --lr"):
        draw_features(encoder, train, None, dataset, config, tmp_path / "d")


def test_every_group_has_its_own_mark():
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    names = ["healthy: A_0", "A_1", "A_2", "test, normal", "test, abnormal"]
    image = scatter({name: corners + k for k, name in enumerate(names)}, "a title")
    pixels = np.asarray(image).reshape(-1, 3).astype(int)
    for colour in ((11, 79, 158), (230, 159, 0), (0, 158, 115), (192, 0, 0), (0, 0, 0)):
        assert (abs(pixels - colour).max(1) < 40).sum() >= 20, colour  # edges are smooth


def test_normal_and_abnormal_test_images_have_their_own_rings(tmp_path, monkeypatch):
    train = (images(6, 32) * 255).byte().numpy()
    samples = tuple(layouts.Sample(Path(f"{i}.png"), int(i < 2), "a") for i in range(6))
    dataset = layouts.Dataset("MVTec", Path("/data/colon"), (), samples)
    seen: dict[str, np.ndarray] = {}

    def drawn(groups, title):
        seen.update(groups)
        return Image.new("RGB", (9, 9))

    monkeypatch.setattr(features, "scatter", drawn)
    config = make_config({"data": "x", "image_size": 32, "classes": 3})
    draw_features(Encoder(classes=3).eval(), train, train, dataset, config, tmp_path)
    counts = {name: len(points) for name, points in seen.items() if "test" in name}
    assert counts == {"test, normal": 4, "test, abnormal": 2}
