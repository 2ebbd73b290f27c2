"""Table 9's losses against loops written from their papers.

Sizes as in losses.py: N views, A classes, Z features.
"""

from __future__ import annotations

import torch
from conftest import assert_within, generator
from hypothesis import given
from hypothesis import strategies as st
from page import budget, features, printed_nt_xent, printed_supcon

from baselines import pretraining
from losses import contrastive_loss


@given(features(), st.sampled_from([0.1, 0.2, 0.5]))
def test_nt_xent_is_the_printed_formula(args, tau):
    z, _, pair, _ = args
    want = printed_nt_xent(z, pair, tau)
    got = pretraining.nt_xent(z, pair, tau=tau)
    assert_within(got, torch.tensor(want, dtype=torch.float64), budget(z, want, tau))


@given(features(), st.sampled_from([0.1, 0.2, 0.5]))
def test_supervised_contrastive_is_the_printed_formula(args, tau):
    z, n, pair, _ = args
    want = printed_supcon(z, n, tau)
    got = pretraining.supervised_contrastive(z, n, pair, tau=tau)
    assert_within(got, torch.tensor(want, dtype=torch.float64), budget(z, want, tau))


def test_the_formulas_differ_where_a_class_has_several_images():
    z, n = torch.randn(8, 4, generator=generator(0)), torch.arange(2).repeat_interleave(4)
    pair = torch.arange(8) ^ 1
    con = float(pretraining.nt_xent(z, pair, tau=0.2))
    sup = float(pretraining.supervised_contrastive(z, n, pair, tau=0.2))
    assert abs(con - sup) > 1e-2  # a loss that took all positives for one would fail above


@given(features())
def test_simclr_is_eq_5_with_one_class_alpha_1_and_centres_at_zero(args):
    z, n, pair, _ = args
    centres = torch.zeros(int(n.max()) + 1, z.shape[1])
    want = pretraining.nt_xent(z, pair, tau=0.2)
    one = contrastive_loss(
        z, torch.zeros_like(n), pair, centres, tau=0.2, alpha=1.0, positive_scale="tau"
    )
    assert torch.equal(one, want)
    # with several classes too: row 3 of Table 8 is CCD's loss unless eq. 6 centres
    several = contrastive_loss(z, n, pair, centres, tau=0.2, alpha=1.0)
    assert_within(several, want.double(), 2 * budget(z, float(want), 0.2))


@given(features())
def test_supcon_with_a_class_for_each_image_is_simclr(args):
    z, _, pair, _ = args
    each = torch.arange(len(z)) // 2
    want = pretraining.nt_xent(z, pair, tau=0.2)
    got = pretraining.supervised_contrastive(z, each, pair, tau=0.2)
    assert_within(got, want.double(), 2 * budget(z, float(want), 0.2))


def test_gradients_and_rows_of_several_processes():
    g = generator(3)
    z = torch.randn(8, 3, dtype=torch.float64, generator=g, requires_grad=True)
    n, pair = torch.arange(2).repeat_interleave(4), torch.arange(8) ^ 1
    for loss in (
        lambda z, rows=None: pretraining.nt_xent(z, pair, tau=0.5, rows=rows),
        lambda z, rows=None: pretraining.supervised_contrastive(z, n, pair, tau=0.5, rows=rows),
    ):
        assert torch.autograd.gradcheck(loss, z)
        halves = [loss(z, rows) for rows in ((0, 4), (4, 8))]
        torch.testing.assert_close(sum(halves) / 2, loss(z))
