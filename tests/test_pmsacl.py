"""Equations 1-9 against loops written straight from the page, in float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import U32, assert_within
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import patches
import pmsacl
from encoder import Conv3x3, Encoder, ResNet18, frozen_averages, normalise, start_weights
from support.run import generator


@st.composite
def features(draw):
    """z (N, Z), class ids n, pairs and centres c: N = 2 A B, some z exactly at their centre."""
    a, b, z_dim = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8]))
    g = generator(draw(st.integers(0, 2**31 - 1)))
    n = torch.arange(a).repeat_interleave(2 * b)
    c = torch.randn(a, z_dim, generator=g, dtype=torch.float64)
    z = c[n] + torch.randn(len(n), z_dim, generator=g, dtype=torch.float64)
    if draw(st.booleans()):
        z[0] = c[0]  # the zero vector after centring
    return z, n, torch.arange(len(n)) ^ 1, c


def printed_eq_5(z, n, pair, c, tau, alpha, scale):
    """Mean over i of -log of eq. 5's fraction, f by eq. 6 with R6's clamp, kappa by eq. 7."""
    size = len(z)
    f = []
    for i in range(size):
        u = [float(z[i, d] - c[n[i], d]) for d in range(z.shape[1])]
        norm = max(math.sqrt(sum(v * v for v in u)), 1e-4)
        f.append([v / norm for v in u])

    def dot(i, j):
        return sum(p * q for p, q in zip(f[i], f[j], strict=True))

    total = 0.0
    for i in range(size):
        denominator = 0.0
        for j in range(size):
            if j != i:
                kappa = 1 / (alpha * tau) if n[i] == n[j] else 1 / tau
                denominator += math.exp(kappa * dot(i, j))
        total += -math.log(math.exp(scale * dot(i, int(pair[i]))) / denominator)
    return total / size


@given(features(), st.sampled_from([0.1, 0.2, 1.0]), st.sampled_from([1.0, 2.0, 5.0]))
def test_contrastive_loss_is_the_printed_formula_for_each_reading_of_the_positive(args, tau, alpha):
    z, n, pair, c = args
    scales = {"kappa": 1 / (alpha * tau), "tau": 1 / tau, 0.5: 0.5}
    for name, scale in scales.items():
        got = pmsacl.contrastive_loss(
            z.float(), n, pair, c.float(), tau=tau, alpha=alpha, positive_scale=name
        )
        want = printed_eq_5(z.float().double(), n, pair, c.float().double(), tau, alpha, scale)
        # f: 8 roundings a component, amplified by 1/tau in the exponent; sums of N and Z terms
        budget = U32 * (1 / tau) * (16 + 2 * z.shape[1]) + U32 * (8 + len(z)) * (1 + abs(want))
        assert_within(got, torch.tensor(want, dtype=torch.float64), budget)


def test_the_readings_of_the_positive_differ():
    z, n, pair, c = (torch.randn(8, 4), torch.arange(2).repeat_interleave(4), torch.arange(8) ^ 1,
                     torch.zeros(2, 4))  # fmt: skip
    losses = {float(pmsacl.contrastive_loss(z, n, pair, c, positive_scale=s))
              for s in ("kappa", "tau", 0.5)}  # fmt: skip
    assert len(losses) == 3


@given(features())
def test_multi_centring_loss_is_the_printed_formula(args):
    z, n, _, c = args
    want = 0.0
    for i in range(len(z)):
        want += sum(float(z[i, d] - c[n[i], d]) ** 2 for d in range(z.shape[1])) / len(z)
    assert float(pmsacl.multi_centring_loss(z, n, c)) == pytest.approx(want, rel=1e-13, abs=1e-13)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31 - 1))
def test_classification_losses_are_the_printed_formula(rows, classes, seed):
    g = generator(seed)
    logits = 3 * torch.randn(rows, classes, generator=g, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=g)
    want = 0.0
    for i in range(rows):
        total = sum(math.exp(float(v)) for v in logits[i])
        probabilities = [math.exp(float(v)) / total for v in logits[i]]
        one_hot = [float(j == target[i]) for j in range(classes)]
        want -= math.log(sum(p * q for p, q in zip(one_hot, probabilities, strict=True))) / rows
    for loss in (pmsacl.augmentation_loss, pmsacl.position_loss):
        assert float(loss(logits, target)) == pytest.approx(want, rel=1e-12, abs=1e-12)


@given(features(), st.integers(0, 2**31 - 1))
def test_order_of_the_batch_changes_no_loss(args, seed):
    z, n, pair, c = args
    order = torch.randperm(len(z), generator=generator(seed))
    inverse = order.argsort()
    moved = z[order].float(), n[order], inverse[pair[order]]
    before = pmsacl.contrastive_loss(z.float(), n, pair, c.float())
    after = pmsacl.contrastive_loss(*moved, c.float())
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        pmsacl.multi_centring_loss(z, n, c), pmsacl.multi_centring_loss(z[order], n[order], c)
    )


def test_gradients_of_eq_3_8_and_9():
    z = torch.randn(6, 3, dtype=torch.float64, generator=generator(0), requires_grad=True)
    n = torch.tensor([0, 0, 1, 1, 2, 2])
    c = torch.randn(3, 3, dtype=torch.float64, generator=generator(1))
    assert torch.autograd.gradcheck(lambda v: pmsacl.multi_centring_loss(v, n, c), z)
    assert torch.autograd.gradcheck(lambda v: pmsacl.augmentation_loss(v, n), z)
    assert torch.autograd.gradcheck(lambda v: pmsacl.position_loss(v, n), z)


def test_gradient_at_the_centre_is_finite_and_below_its_bound():
    z = torch.zeros(4, 8, requires_grad=True)  # every z sits exactly on its centre
    n, pair = torch.tensor([0, 0, 1, 1]), torch.arange(4) ^ 1
    pmsacl.contrastive_loss(z, n, pair, torch.zeros(2, 8)).backward()
    assert torch.isfinite(z.grad).all() and z.grad.abs().max() < 1e4


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
    c = pmsacl.class_centres(encoder, batches)
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
    with pytest.raises(ValueError, match="view of each class"):
        pmsacl.class_centres(_Linear(), [(torch.rand(2, 3, 4, 4), torch.tensor([0, 2]))])


# --- views and eq. 9's pairs -------------------------------------------------------------------


def test_views_are_two_of_each_class_and_their_pairs_show_the_same_strong_image():
    x = torch.rand(3, 3, 32, 32, generator=generator(0))
    config = pmsacl.Config(classes=3)
    views, n, pair = pmsacl.class_views(x, config, generator(1))
    assert views.shape == (18, 3, 32, 32) and 0 <= views.min() and views.max() <= 1
    assert n.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert torch.equal(pair[pair], torch.arange(18)) and torch.equal(n[pair], n)
    assert not torch.equal(views[0], views[1])


def test_neighbours_lie_where_their_class_says():
    """A patch that encodes its own coordinates: channel 0 holds y, channel 1 holds x."""
    s, b = 63, 400
    y, x = torch.meshgrid(torch.arange(s), torch.arange(s), indexing="ij")
    images = torch.stack([y, x, torch.arange(s * s).view(s, s)]).float().expand(b, 3, s, s)
    first, second, p = patches.patch_pairs(images, generator(5))
    assert first.shape == second.shape == (b, 3, 32, 32) and set(p.tolist()) == set(range(8))
    assert torch.equal(first[:, 0, 1, 0] - first[:, 0, 0, 0], torch.ones(b))  # contiguous
    shift = second[:, :2, 0, 0] - first[:, :2, 0, 0]  # (B, 2): dy, dx
    wanted = torch.tensor(patches.DIRECTIONS)[p]
    assert torch.equal(shift.sign().long(), wanted)
    moved = shift[wanted != 0].abs()
    assert moved.min() == 24 and moved.max() == 31  # 24 + U{0..7}, all of them reached


def test_images_too_small_for_a_pair_are_refused():
    with pytest.raises(ValueError, match="63 px"):
        patches.patch_pairs(torch.rand(2, 3, 62, 62), generator(0))


def test_loss_terms_are_those_named_and_centre_weight_scales_eq_3():
    encoder = Encoder(classes=2, generator=generator(0)).train()
    x, c = torch.rand(2, 3, 64, 64, generator=generator(1)), torch.zeros(2, 128)

    def terms(**changes):
        config = pmsacl.Config(classes=2, device="cpu", **changes)
        return pmsacl.loss_terms(encoder, x, c, config, generator(2))

    every = terms(terms="ctr,pmsacl,aug,pos")
    assert list(every) == ["ctr", "pmsacl", "aug", "pos"]
    assert list(terms(terms="aug")) == ["aug"]
    assert "pos" not in terms()  # R13: only the local encoder learns positions by default
    halved = terms(terms="ctr", centre_weight=0.5)["ctr"].detach()
    assert float(halved) == pytest.approx(0.5 * float(terms(terms="ctr")["ctr"].detach()), rel=1e-6)


def test_local_terms_train_on_patches():
    encoder = Encoder(classes=2, generator=generator(0)).train()
    x = torch.rand(2, 3, 64, 64, generator=generator(1))
    seen = []
    encoder.backbone.conv1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    config = pmsacl.Config(classes=2)
    terms = pmsacl.loss_terms(encoder, x, torch.zeros(2, 128), config, generator(2), local=True)
    assert list(terms) == ["ctr", "pmsacl", "aug", "pos"]
    assert seen == [(8, 3, 32, 32), (4, 3, 32, 32)]


# --- encoder -----------------------------------------------------------------------------------


def torchvision_names():
    """torchvision's resnet18 state dict, written down from its published layout."""
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    names = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{k}" for k in norm}
    for layer in range(1, 5):
        for block in range(2):
            stem = f"layer{layer}.{block}"
            names |= {f"{stem}.conv{i}.weight" for i in (1, 2)}
            names |= {f"{stem}.bn{i}.{k}" for i in (1, 2) for k in norm}
        if layer > 1:
            stem = f"layer{layer}.0.downsample"
            names |= {f"{stem}.0.weight"} | {f"{stem}.1.{k}" for k in norm}
    return names


def test_resnet18_has_torchvisions_names_and_shapes():
    state = ResNet18().state_dict()
    assert set(state) == torchvision_names() and len(state) == 122
    assert sum(v.numel() for k, v in state.items() if "running" not in k and "num" not in k) == (
        11_689_512  # parameters of torchvision's resnet18
    )
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert state["layer4.0.downsample.0.weight"].shape == (512, 256, 1, 1)
    assert state["fc.weight"].shape == (1000, 512)


def test_stages_have_a_resnets_shapes_and_logits_come_from_their_pooled_end():
    net, x = ResNet18().eval(), torch.rand(2, 3, 64, 64, generator=generator(0))
    shapes = [tuple(stage.shape) for stage in net.stages(x)]
    assert shapes == [(2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4), (2, 512, 2, 2)]
    torch.testing.assert_close(net(x), F.linear(net.pooled(x), net.fc.weight, net.fc.bias))


@given(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.integers(0, 2**31 - 1))
def test_a_convolution_of_a_small_map_is_a_convolution(side, stride, seed):
    g = generator(seed)
    x = torch.randn(3, 5, side, side, generator=g, dtype=torch.float64).requires_grad_()
    layer = Conv3x3(5, 4, stride).double()
    layer.bias = nn.Parameter(torch.randn(4, generator=g, dtype=torch.float64))  # as when folded
    got, want = layer(x), F.conv2d(x, layer.weight, layer.bias, stride, padding=1)
    torch.testing.assert_close(got, want)
    weights = torch.randn(want.shape, generator=g, dtype=torch.float64)
    of = [x, layer.weight, layer.bias]
    torch.testing.assert_close(
        torch.autograd.grad((got * weights).sum(), of),
        torch.autograd.grad((want * weights).sum(), of),
    )


def test_start_weights_depend_on_the_generator_alone():
    one, same, other = (ResNet18(generator(s)).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_unit_features_have_length_one_and_raw_ones_do_not():
    x = torch.rand(2, 3, 32, 32, generator=generator(0))
    unit = Encoder(features="unit", generator=generator(1)).eval()(x)
    raw = Encoder(features="raw", generator=generator(1)).eval()(x)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(F.normalize(raw, dim=1), unit)
    assert not torch.allclose(raw.norm(dim=1), torch.ones(2))


def test_normalise_subtracts_imagenets_statistics():
    x = torch.tensor([0.485, 0.456, 0.406])[None, :, None, None].expand(1, 3, 2, 2)
    assert normalise(x).abs().max() == 0
    torch.testing.assert_close(
        normalise(x + 0.1)[0, :, 0, 0], torch.tensor([0.1 / 0.229, 0.1 / 0.224, 0.1 / 0.225])
    )


def test_frozen_averages_uses_the_batch_and_gives_the_mode_back():
    net = nn.BatchNorm2d(2).eval()
    x = 5 + torch.randn(4, 2, 3, 3, generator=generator(0))
    with frozen_averages(net):
        y = net(x)
    assert y.mean().abs() < 1e-5 and torch.equal(net.running_mean, torch.zeros(2))
    assert not net.training


def test_weights_load_from_a_file_and_a_wrong_file_is_named(tmp_path):
    source, target = ResNet18(generator(1)), ResNet18(generator(2))
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    assert start_weights(target, str(tmp_path / "weights.pt")) == "weights.pt"
    assert torch.equal(source.conv1.weight, target.conv1.weight)
    wrong = tmp_path / "other.pt"
    for content in ({"a": torch.zeros(1)}, [1], {1: torch.zeros(1)}, "not weights", ""):
        torch.save(content, wrong) if not isinstance(content, str) else wrong.write_text(content)
        with pytest.raises(ValueError, match="--init .*other.pt: no state dict of a resnet18") as e:
            start_weights(target, str(wrong))
        assert "weights_only" not in str(e.value)
    with pytest.raises(ValueError, match="--init .*nowhere.pt: No such file"):
        start_weights(target, str(tmp_path / "nowhere.pt"))


def test_the_pretext_is_watched_on_400_views_and_four_images_are_enough(monkeypatch):
    config = pmsacl.Config(image_size=32, batch_size=2, init="random", device="cpu")
    training = pmsacl.Pretraining(np.zeros((4, 3, 32, 32), np.uint8), config)
    assert len(training.watched) == 2 and len(training.trained) == 2
    views_of, seen = training.views_of, []

    def watched(*arguments):
        views, n = views_of(*arguments)
        seen.append(views)
        return views, n

    monkeypatch.setattr(training, "views_of", watched)
    training.health()
    assert 400 <= sum(map(len, seen)) < 400 + 16 and len(seen) == 25
    with pytest.raises(ValueError, match="3 training images"):
        pmsacl.Pretraining(np.zeros((3, 3, 32, 32), np.uint8), config)


# --- config ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"alpha": 0.0}, "--alpha"),
        ({"tau": math.nan}, "--tau"),
        ({"terms": "ctr,psmacl"}, "--terms"),
        ({"positive_scale": "half"}, "--positive-scale"),
        ({"features": "sphere"}, "--features"),
        ({"image_size": 100}, "--image-size"),
        ({"batch_size": 1}, "--batch-size"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"epochs": 0}, "--epochs"),
        ({"strong": "permutation", "classes": 9}, "--classes"),
        ({"igd_lr": 0.0}, "--igd-lr"),
    ],
)
def test_an_impossible_setting_is_refused_by_its_options_name(changes, named):
    with pytest.raises(ValueError, match=named):
        pmsacl.Config(**changes)


def test_the_learning_rate_falls_from_its_start_to_its_end():
    rates = [pmsacl.cosine(0.01, 1e-5, k / 10) for k in range(11)]
    assert rates[0] == 0.01 and rates[-1] == pytest.approx(1e-5)
    assert rates == sorted(rates, reverse=True)
    assert rates[5] == pytest.approx((0.01 + 1e-5) / 2)


def test_config_fields_can_be_replaced_but_not_assigned():
    with pytest.raises(dataclasses.FrozenInstanceError):
        pmsacl.Config().alpha = 3.0
