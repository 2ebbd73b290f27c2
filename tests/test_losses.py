"""Equations 2-9 of losses.py against loops written straight from the page, in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import SIGMAS, assert_within, generator
from hypothesis import given
from hypothesis import strategies as st
from page import budget, features, printed_cross_entropy, printed_eq_3, printed_eq_5
from torch import nn

import losses


@given(features(), st.sampled_from([0.07, 0.1, 0.2, 1.0]), st.sampled_from([1.0, 2.0, 3.0]))
def test_contrastive_loss_is_the_printed_formula_for_each_reading_of_the_positive(args, tau, alpha):
    z, n, pair, c = args
    scales = {"kappa": 1 / (alpha * tau), "tau": 1 / tau, 0.5: 0.5}
    for name, scale in scales.items():
        got = losses.contrastive_loss(z, n, pair, c, tau=tau, alpha=alpha, positive_scale=name)
        want = printed_eq_5(z, n, pair, c, tau, alpha, scale)
        assert float(got) == pytest.approx(want, rel=1e-11, abs=1e-11)
        single = losses.contrastive_loss(
            z.float(), n, pair, c.float(), tau=tau, alpha=alpha, positive_scale=name
        )
        assert_within(single, torch.tensor(want).double(), budget(z, want, tau))
        assert single.dtype == torch.float32


@pytest.mark.parametrize("tau", [0.1, 0.2, 1.0])
def test_the_budget_rejects_a_denominator_with_the_view_itself(tau):
    z = torch.randn(64, 8, generator=generator(0), dtype=torch.float64)
    n, pair, c = torch.zeros(64).long(), torch.arange(64) ^ 1, torch.zeros(1, 8).double()
    want = printed_eq_5(z, n, pair, c, tau, 1.0, 1 / tau)
    f = nn.functional.normalize(z)
    wrong = (f @ f.T / tau).logsumexp(1) - (f * f[pair]).sum(1) / tau  # j = i, too
    assert abs(float(wrong.mean()) - want) > 10 * budget(z, want, tau)


def test_the_defaults_are_the_readings_r2_and_r3():
    z, n = torch.randn(8, 4, generator=generator(0)), torch.arange(2).repeat_interleave(4)
    pair, c = torch.arange(8) ^ 1, torch.randn(2, 4, generator=generator(1))
    want = printed_eq_5(z.double(), n, pair, c.double(), 0.2, 2.0, 1 / (2.0 * 0.2))
    assert float(losses.contrastive_loss(z, n, pair, c)) == pytest.approx(want, rel=1e-5)
    part = losses.contrastive_losses(z, n, pair, c)[2:5].mean()
    torch.testing.assert_close(losses.contrastive_loss(z, n, pair, c, rows=(2, 5)), part)


def test_eq_6_is_clamped_as_r6_says():
    z = torch.tensor([[5e-5, 0.0], [0.0, 2e-4]], dtype=torch.float64)
    f = losses.centred_features(z, torch.zeros(2).long(), torch.zeros(1, 2).double())
    assert torch.allclose(f, torch.tensor([[0.5, 0.0], [0.0, 1.0]]).double())  # norms 1e-4, 2e-4


@given(features())
def test_multi_centring_loss_is_the_printed_formula(args):
    z, n, _, c = args
    want = printed_eq_3(z, n, c)
    assert float(losses.multi_centring_loss(z, n, c)) == pytest.approx(want, rel=1e-13, abs=1e-13)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31 - 1))
def test_classification_losses_are_the_printed_formula(rows, classes, seed):
    g = generator(seed)
    logits = 3 * torch.randn(rows, classes, generator=g, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=g)
    want = printed_cross_entropy(logits, target)
    for loss in (losses.augmentation_loss, losses.position_loss):
        assert float(loss(logits, target)) == pytest.approx(want, rel=1e-12, abs=1e-12)


def test_gradients_of_eq_3_8_and_9():
    z = torch.randn(6, 3, dtype=torch.float64, generator=generator(0), requires_grad=True)
    n = torch.tensor([0, 0, 1, 1, 2, 2])
    c = torch.randn(3, 3, dtype=torch.float64, generator=generator(1))
    assert torch.autograd.gradcheck(lambda v: losses.multi_centring_loss(v, n, c), z)
    assert torch.autograd.gradcheck(lambda v: losses.augmentation_loss(v, n), z)
    assert torch.autograd.gradcheck(lambda v: losses.position_loss(v, n), z)


# --- eq. 2 -------------------------------------------------------------------------------------


class _Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x).mean(dim=(2, 3))


def test_centres_are_class_means_and_leave_running_averages_alone():
    g = generator(3)
    batches = [(torch.rand(6, 3, 4, 4, generator=g), torch.tensor([0, 1, 2, 0, 1, 2])),
               (torch.rand(3, 3, 4, 4, generator=g), torch.tensor([2, 1, 0]))]  # fmt: skip
    encoder = _Linear().eval()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    c = losses.class_centres(encoder, batches)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert not encoder.norm.training and encoder.norm.track_running_stats
    sums, counts = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3)
    for x, n in batches:
        mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
        z = ((x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()).mean(dim=(2, 3))
        for i in range(len(x)):
            sums[n[i]] += z[i]
            counts[n[i]] += 1
    torch.testing.assert_close(c, (sums / counts[:, None]).float(), rtol=1e-4, atol=1e-6)


def test_centres_need_a_view_of_each_class():
    for views in ([], [(torch.zeros(2, 3, 4, 4), torch.tensor([0, 2]))]):
        with pytest.raises(ValueError, match="needs a view of each class"):
            losses.class_centres(_Linear(), views)


@pytest.mark.parametrize("synchronised", [False, True])
def test_frozen_averages_uses_the_batch_and_gives_the_mode_back(synchronised):
    net = (nn.SyncBatchNorm if synchronised else nn.BatchNorm2d)(2).eval()
    x, own = 5 + torch.randn(4, 2, 3, 3, generator=generator(0)), dict(net.named_buffers())
    versions = [value._version for value in own.values()]
    with losses.frozen_averages(net):
        assert net.training and net.track_running_stats == synchronised
        if synchronised:  # on GPUs and in bfloat16 it fails without averages: it has copies
            assert net.running_mean is not own["running_mean"] and net.running_mean is not None
            net.running_mean.add_(1)
        else:
            assert net(x).mean().abs() < 1e-5
    assert not net.training and net.track_running_stats
    assert torch.equal(net.running_mean, torch.zeros(2))
    assert all(own[name] is value for name, value in net.named_buffers())
    assert [value._version for value in own.values()] == versions  # a backward pass may need them


# --- eq. 9's pairs


def test_neighbours_lie_where_their_class_says():
    """A patch that encodes its own coordinates: channel 0 holds y, channel 1 holds x."""
    s, b = 63, 400
    y, x = torch.meshgrid(torch.arange(s), torch.arange(s), indexing="ij")
    images = torch.stack([y, x, torch.arange(s * s).view(s, s)]).float().expand(b, 3, s, s)
    first, second, p = losses.patch_pairs(images, generator(5))
    assert first.shape == second.shape == (b, 3, 32, 32) and set(p.tolist()) == set(range(8))
    assert torch.equal(first[:, 0, 1, 0] - first[:, 0, 0, 0], torch.ones(b))  # contiguous
    shift = second[:, :2, 0, 0] - first[:, :2, 0, 0]  # (B, 2): dy, dx
    wanted = torch.tensor(losses.DIRECTIONS)[p]
    assert torch.equal(shift.sign().long(), wanted)
    moved = shift[wanted != 0].abs()
    assert moved.min() == 24 and moved.max() == 31  # 24 + U{0..7}, all of them reached
    across = wanted.abs().sum(1) == 2  # each axis has its own distance and its own place
    assert (shift[across].abs().diff() != 0).any()
    place = (first[:, :2, 0, 0] + shift.clamp(max=0))[across]
    assert abs(torch.corrcoef(place.T)[0, 1]) < SIGMAS / across.sum() ** 0.5


def test_images_too_small_for_a_pair_are_refused():
    with pytest.raises(ValueError, match="63 px"):
        losses.patch_pairs(torch.zeros(2, 3, 62, 62), generator(0))
    with pytest.raises(ValueError, match="square"):
        losses.patch_pairs(torch.zeros(2, 3, 64, 100), generator(0))


def test_what_would_broadcast_or_be_cut_is_refused_or_means_the_same():
    z, n, c = torch.rand(6, 4, generator=generator(0)), torch.arange(6) % 2, torch.zeros(2, 4)
    assert losses.multi_centring_loss(z, n[:, None], c) == losses.multi_centring_loss(z, n, c)
    for loss in (losses.multi_centring_loss, losses.centred_features):
        with pytest.raises(RuntimeError):
            loss(z, n[:1], c)
    for wrong in (None, True, "half"):
        with pytest.raises(ValueError, match="positive_scale"):
            losses.kappas(0.2, 2.0, wrong)
