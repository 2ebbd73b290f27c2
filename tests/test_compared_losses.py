"""The compared detectors' losses and scores against loops in float64 from their papers."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import test_compared
import torch
from conftest import assert_frequency, assert_uniform, generator
from hypothesis import given
from hypothesis import strategies as st
from test_compared import Small, images
from torch import nn

from baselines import cutpaste, dae, fanogan, ocgan, panda
from baselines.steps import squared_error, stages
from ssim import ms_ssim, setting

# formulas, whose numbers are computed again on the CPU
small = functools.partial(test_compared.small, device=torch.device("cpu"))

# --- DAE, MS-SSIM --------------------------------------------------------------------------------


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=generator(seed))


def test_the_squared_error_is_the_mean_over_channels_then_pixels():
    x, y = doubles(2, 2, 3, 4, 4)
    maps, scores = squared_error(x, y)
    for b in range(2):
        total = 0.0
        for i in range(4):
            for j in range(4):
                here = sum(float(x[b, c, i, j] - y[b, c, i, j]) ** 2 for c in range(3)) / 3
                assert float(maps[b, i, j]) == pytest.approx(here, rel=1e-12)
                total += here / 16
        assert float(scores[b]) == pytest.approx(total, rel=1e-12)
    assert float(small("dae").loss(x, y)) == pytest.approx(float(scores.mean()), rel=1e-12)


def test_hidden_pixels_are_the_share_asked_for_in_all_channels():
    hidden = dae.hide(torch.ones(4, 3, 64, 64), 0.3, generator())
    assert_frequency(hidden[:, 0] == 0, 0.3)
    assert torch.equal(hidden[:, 0], hidden[:, 2])


def test_msssim_is_eq_11_with_the_global_part_alone():
    detector, (x, y) = small("msssim"), torch.rand(2, 3, 3, 32, 32, generator=generator())
    m = ms_ssim(x, y, **setting(32))
    want = [0.15 * float((x[b] - y[b]).abs().mean()) + 0.85 * (1 - float(m[b])) for b in range(3)]
    np.testing.assert_allclose(detector.error(x, y), want, rtol=1e-6)
    assert float(detector.error(x, x).abs().max()) < 1e-6


# --- f-AnoGAN ------------------------------------------------------------------------------------


def small_critic() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 1)
    ).double()


def printed_penalty(critic, x, fake, mix, step=1e-5):
    """E (|grad D|_2 - 1)^2 with the gradient by central differences."""
    total = 0.0
    for b in range(len(x)):
        point = x[b] + mix[b] * (fake[b] - x[b])
        square = 0.0
        for i in range(point.numel()):
            ends = []
            for sign in (1, -1):
                moved = point.clone()
                moved.view(-1)[i] += sign * step
                ends.append(float(critic(moved[None])))
            square += ((ends[0] - ends[1]) / (2 * step)) ** 2
        total += (math.sqrt(square) - 1) ** 2
    return total / len(x)


def test_the_gradient_penalty_agrees_with_finite_differences_and_so_does_its_gradient():
    critic, (x, fake), mix = small_critic(), doubles(2, 2, 3, 4, 4), doubles(2)

    def penalty():
        return fanogan.gradient_penalty(lambda y: critic(y)[:, 0], x, fake, mix)

    with torch.no_grad():
        want = printed_penalty(critic, x, fake, mix)
    assert float(penalty().detach()) == pytest.approx(want, rel=1e-6)
    weight = critic[0].weight
    (gradient,) = torch.autograd.grad(penalty(), weight)
    for i in (0, 17, 80):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.view(-1)[i] += sign * 1e-5
            values.append(float(penalty().detach()))
            with torch.no_grad():
                weight.view(-1)[i] -= sign * 1e-5
        assert float(gradient.reshape(-1)[i]) == pytest.approx(
            (values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-8
        )


def test_the_residuals_of_izi_f_are_means_over_pixels_and_features():
    x, y = doubles(2, 2, 3, 4, 4)
    f, g = doubles(2, 2, 7, seed=1)
    image, features = fanogan.residuals(x, y, f, g)
    for b in range(2):
        pairs = zip(x[b].flatten().tolist(), y[b].flatten().tolist(), strict=True)
        assert float(image[b]) == pytest.approx(sum((p - q) ** 2 for p, q in pairs) / 48)
        pairs = zip(f[b].tolist(), g[b].tolist(), strict=True)
        assert float(features[b]) == pytest.approx(sum((p - q) ** 2 for p, q in pairs) / 7)


def test_the_gan_steps_its_generator_every_so_often():
    detector = small("fanogan", critic_steps=3, epochs=1)
    training = next(iter(detector.trainings(images(4))))
    for step in range(3):
        training.step_done = step
        terms = training.losses()
        torch.stack(list(terms.values())).sum().backward()
        grads = {k: [w.grad for w in n.parameters()] for k, n in detector.networks.items()}
        assert all(g is not None and g.abs().sum() > 0 for g in grads["critic"][-2:-1])
        assert any(g is not None for g in grads["generator"]) == (step == 2)
        assert all(g is None for g in grads["encoder"])
        detector.networks.zero_grad(set_to_none=True)


def test_the_encoder_is_trained_and_generator_and_critic_are_not():
    detector = small("fanogan", kappa=0.5)
    trainings = detector.trainings(images(4))
    for _ in range(2):
        training = next(trainings)
        while training.name == "fanogan" and training.step_done < training.total:
            training.update(training.losses())
    before = {k: v.clone() for k, v in detector.networks.state_dict().items()}
    training.update(training.losses())
    changed = {
        k.split(".")[0] for k, v in detector.networks.state_dict().items() if (v != before[k]).any()
    }
    assert changed == {"encoder"}
    x = torch.from_numpy(images(2)) / 255
    detector.networks.eval()
    with torch.no_grad():
        maps, scores = detector.score_batch(x)
        x_tilde, f, g = detector.look(2 * x - 1)
    image, features = fanogan.residuals(2 * x - 1, x_tilde, f, g)
    torch.testing.assert_close(scores, image + 0.5 * features)
    torch.testing.assert_close(maps, (2 * x - 1 - x_tilde).abs().mean(dim=1))


# --- OCGAN, ADGAN --------------------------------------------------------------------------------


@given(st.integers(0, 2**31 - 1), st.integers(1, 6))
def test_mining_finds_latents_that_the_classifier_takes_for_fakes_more_surely(seed, steps):
    gen = torch.Generator().manual_seed(seed)
    weight, s = torch.randn(12, generator=gen), 2 * torch.rand(5, 12, generator=gen) - 1

    def classify(s):
        return torch.tanh(s @ weight)

    mined = ocgan.mine(s, classify, steps, 0.05)
    assert (classify(mined) < classify(s)).all()  # a lower logit is a surer fake
    assert mined.abs().max() <= 1 and not mined.requires_grad
    assert (mined - s).abs().max() <= 0.05 * steps + 1e-6


def test_ocgan_mines_negatives_with_its_own_classifier_and_trains_each_part_on_its_loss():
    detector = small("ocgan")
    encoder, decoder, of_latent, of_image, classifier = detector.networks.children()
    s = 2 * torch.rand(6, 288, generator=generator()) - 1
    mined = ocgan.mine(s, lambda s: classifier(decoder(s))[:, 0], 5, 0.05)
    with torch.no_grad():
        assert classifier(decoder(mined)).mean() < classifier(decoder(s)).mean()
    assert all(w.grad is None for w in detector.networks.parameters())  # mining leaves none
    training = next(iter(detector.trainings(images(4))))
    owners = {
        "rec": {"encoder", "decoder"}, "latent": {"encoder"}, "visual": {"decoder"},
        "latent_discriminator": {"latent"}, "visual_discriminator": {"visual"},
        "classifier": {"classifier"},
    }  # fmt: skip
    trained_by(training, detector, owners)


def test_adgan_trains_each_part_on_its_loss():
    owners = {
        "x": {"to_latent", "to_image"}, "z": {"to_latent", "to_image"},
        "to_latent": {"to_latent"}, "to_image": {"to_image"},
        "of_latent": {"of_latent"}, "of_image": {"of_image"},
    }  # fmt: skip
    detector = small("adgan")
    trained_by(next(iter(detector.trainings(images(4)))), detector, owners)


def test_f_anogan_trains_its_generator_and_its_critic_on_their_losses():
    detector = small("fanogan", critic_steps=2)
    training = next(iter(detector.trainings(images(4))))
    training.step_done = 1  # a step of both
    owners = {"critic": {"critic"}, "penalty": {"critic"}, "generator": {"generator"}}
    trained_by(training, detector, owners)


def trained_by(training, detector, owners):
    """Each term's gradient reaches the networks that it belongs to, and no other."""
    terms = training.losses()
    assert set(terms) == set(owners)
    for name, term in terms.items():
        detector.networks.zero_grad(set_to_none=True)
        term.backward(retain_graph=True)
        reached = {
            part
            for part, network in detector.networks.items()
            if any(w.grad is not None and w.grad.abs().sum() > 0 for w in network.parameters())
        }
        assert reached == owners[name], name


# --- PANDA ---------------------------------------------------------------------------------------


def test_compactness_and_ewc_are_the_printed_sums():
    f, c = doubles(4, 6), doubles(6, seed=1)
    rows = [sum((float(a) - float(b)) ** 2 for a, b in zip(row, c, strict=True)) for row in f]
    assert float(panda.compactness_loss(f, c)) == pytest.approx(sum(rows) / 4 / 6)
    parts = [doubles(2, 3, seed=k) for k in range(6)]
    want = 0.0
    for w, s, fisher in zip(parts[:2], parts[2:4], parts[4:], strict=True):
        for i in range(2):
            for j in range(3):
                want += float(fisher[i, j]) * (float(w[i, j]) - float(s[i, j])) ** 2 / 2
    assert float(panda.ewc_loss(parts[:2], parts[2:4], parts[4:])) == pytest.approx(want)


def test_the_fisher_information_is_the_mean_squared_gradient_of_single_images():
    resnet, x = Small().eval().double(), doubles(3, 3, 32, 32)
    weights = list(resnet.layer4.parameters())
    got = panda.fisher_information(resnet, x, weights, generator(7))
    draws, want = generator(7), [torch.zeros_like(w) for w in weights]
    for image in x:
        p = resnet.fc(stages(resnet, image[None])[-1].mean(dim=(2, 3))).softmax(dim=1)[0]
        y = int(torch.multinomial(p.detach(), 1, generator=draws))
        for w, g in zip(want, torch.autograd.grad(p[y].log(), weights), strict=True):
            w += g**2 / 3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_ewc_holds_the_weights_back():
    x, moved = images(8), []
    for ewc in (0.0, 1e4):
        detector = small("panda", ewc=ewc, epochs=10, clip=1.0)
        before = [w.detach().clone() for w in detector.weights()]
        detector.fit(x)
        pairs = zip(before, detector.weights(), strict=True)
        moved.append(float(sum((a - b.detach()).square().sum() for a, b in pairs)))
    assert moved[1] < 0.5 * moved[0]


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_the_knn_distance_is_numpys(n, k, seed):
    gen = torch.Generator().manual_seed(seed)
    x, bank = torch.randn(5, 3, generator=gen), torch.randn(n, 3, generator=gen)
    square = ((x.numpy()[:, None].astype(float) - bank.numpy()[None]) ** 2).sum(axis=2)
    want = np.sort(square, axis=1)[:, :k].mean(axis=1)
    np.testing.assert_allclose(panda.knn_distance(x, bank, k), want, rtol=1e-5, atol=1e-6)


def test_panda_keeps_all_images_and_a_share_of_positions():
    detector = small("panda").fit(images(4))
    x = torch.from_numpy(images(4)) / 255
    with torch.no_grad():
        pooled, local = detector.features(x)
    torch.testing.assert_close(detector.fitted["bank"], pooled)
    assert local.shape == (4, 16 + 16, 4, 4)
    assert len(detector.fitted["positions"]) == 4 * 16  # all, where there are fewer than asked for
    maps, scores = detector.score(x)  # a training image is its own nearest neighbour
    assert scores.max() < small("panda", seed=1).fit(images(4)).score(images(4, seed=9))[1].min()


# --- CutPaste ------------------------------------------------------------------------------------


@given(st.integers(0, 2**31 - 1), st.sampled_from([32, 64, 100]), st.booleans())
def test_rectangles_lie_in_the_image_and_have_the_papers_sizes(seed, size, scar):
    gen = torch.Generator().manual_seed(seed)
    sides, source, target, angle, factors = cutpaste.draw_pastes(7, size, gen, scar=scar)
    assert (sides == sides.round()).all() and 1 <= sides.min() and sides.max() <= size
    for centre in (source, target):
        corner = centre - sides / 2
        assert (corner == corner.floor()).all()
        assert (corner >= 0).all() and (corner + sides <= size).all()
    assert (factors - 1).abs().max() <= 0.1 + 1e-6
    if scar:
        scale = max(size / 256, 0.5)
        assert angle.abs().max() <= math.pi / 4
        assert (sides[:, 0] >= round(10 * scale) - 1).all() and sides[:, 0].max() <= 25 * scale + 1
        assert sides[:, 1].max() <= 16 * scale + 1
    else:
        assert (angle == 0).all()
        share = sides.prod(dim=1) / size**2
        assert share.min() > 0.02 * 0.7 and share.max() < 0.15 * 1.3  # of rounded sides
        ratio = sides[:, 0] / sides[:, 1]
        assert ratio.min() > 0.3 * 0.7 and ratio.max() < 3.3 * 1.3


def test_aspects_are_uniform_on_either_side_of_one():
    sides, *_ = cutpaste.draw_pastes(4000, 4096, generator(), scar=False)
    aspect = sides[:, 0] / sides[:, 1]
    assert_frequency(aspect < 1, 0.5)
    assert_uniform(aspect[aspect < 1], 0.299, 1.0)
    assert_uniform(aspect[aspect > 1], 1.0, 3.302)
    assert_uniform(sides.prod(dim=1) / 4096**2, 0.0199, 0.1501)


@given(st.integers(0, 2**31 - 1))
def test_an_unturned_paste_is_the_copy_of_a_rectangle(seed):
    gen = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 3, 32, 32, generator=gen)
    sides, source, target, angle, _ = cutpaste.draw_pastes(3, 32, gen, scar=False)
    got, mask = cutpaste.paste(x, sides, source, target, angle, torch.ones(3, 3))
    for b in range(3):
        h, w = sides[b].int().tolist()
        (i, j), (k, m) = (((c[b] - sides[b] / 2).int().tolist()) for c in (source, target))
        want = x[b].clone()
        want[:, k : k + h, m : m + w] = x[b, :, i : i + h, j : j + w]
        torch.testing.assert_close(got[b], want, rtol=0, atol=1e-6)
        assert int(mask[b].sum()) == h * w and mask[b, k : k + h, m : m + w].all()


def test_a_turned_paste_lies_along_its_angle_and_colours_change_by_the_factors():
    x = torch.zeros(1, 3, 64, 64)
    x[:, :, 30:34, 20:44] = 0.5
    middle, sides = torch.tensor([[32.0, 32.0]]), torch.tensor([[24.0, 4.0]])
    turned = torch.tensor([math.pi / 4])
    _, mask = cutpaste.paste(x, sides, middle, middle, turned, torch.ones(1, 3))
    rows, columns = mask[0].nonzero().double().T
    assert abs(len(rows) - 96) < 20
    slope = ((rows - 31.5) * (columns - 31.5)).sum() / ((columns - 31.5) ** 2).sum()
    assert abs(slope) == pytest.approx(1, abs=0.15)
    at, to = torch.tensor([[32.0, 32.0]]), torch.tensor([[8.0, 8.0]])
    patch = x.clone()
    patch[0, 0, 30:34, 30:34] = 0.8  # reddish
    unturned, square = torch.zeros(1), torch.tensor([[4.0, 4.0]])
    bright, _ = cutpaste.paste(patch, square, at, to, unturned, torch.tensor([[1.1, 1.0, 1.0]]))
    torch.testing.assert_close(bright[0, :, 7, 7], torch.tensor([0.88, 0.55, 0.55]))
    grey, _ = cutpaste.paste(patch, square, at, to, unturned, torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(grey[0, :, 7, 7], torch.full((3,), 0.6))
    flat, _ = cutpaste.paste(patch, square, at, to, unturned, torch.tensor([[1.0, 0.0, 1.0]]))
    torch.testing.assert_close(flat[0, :, 7, 7], torch.full((3,), 0.6))


def printed_ledoit_wolf(x):
    """Their formulas, with |A|^2 = tr(A A^T) / p, as loops over the samples."""
    x = x - x.mean(axis=0)
    n, p = x.shape
    cov = x.T @ x / n
    mean = np.trace(cov) / p
    d2 = ((cov - mean * np.eye(p)) ** 2).sum() / p
    b2 = sum(((np.outer(row, row) - cov) ** 2).sum() / p for row in x) / n**2
    s = min(b2, d2) / d2
    return s * mean * np.eye(p) + (1 - s) * cov


@pytest.mark.parametrize(("n", "p"), [(6, 9), (200, 4)])
def test_the_gaussian_is_ledoit_and_wolfs(n, p):
    x = np.random.default_rng(n).normal(size=(n, p)) * np.arange(1, p + 1)
    mu, w = cutpaste.gaussian(torch.from_numpy(x))
    sigma = printed_ledoit_wolf(x)
    np.testing.assert_allclose(mu, x.mean(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.linalg.inv((w.T @ w).double()), sigma, rtol=1e-3, atol=1e-3)


def test_the_score_is_the_mahalanobis_distance_and_the_map_that_of_the_patches_over_a_pixel():
    detector = small("cutpaste", image_size=64, epochs=1).fit(images(6, 64))
    x = torch.from_numpy(images(2, 64, seed=3)) / 255
    with torch.no_grad():
        maps, scores = detector.score_batch(x)
        f = detector.features("image", x).double().numpy()
        fits = detector.features("image", torch.from_numpy(images(6, 64)) / 255).double().numpy()
        local = detector.distance("patch", detector.patches(x)).view(2, 9, 9)
    centre, inverse = (
        fits.mean(axis=0),
        np.linalg.inv(printed_ledoit_wolf(fits) + 1e-9 * np.eye(16)),
    )
    want = [math.sqrt((row - centre) @ inverse @ (row - centre)) for row in f]
    np.testing.assert_allclose(scores, want, rtol=2e-2)
    assert (detector.patch, detector.stride) == (32, 4)
    for row, column in ((0, 0), (33, 20), (63, 63)):
        over = [float(local[0, i, j]) for i in range(9) for j in range(9)
                if 4 * i <= row < 4 * i + 32 and 4 * j <= column < 4 * j + 32]  # fmt: skip
        assert float(maps[0, row, column]) == pytest.approx(sum(over) / len(over), rel=1e-4)


def test_the_three_ways_are_the_image_the_patch_and_the_scar():
    detector, x = small("cutpaste", image_size=64), torch.from_numpy(images(4, 64)) / 255
    seen = []
    detector.networks["image"].conv1.register_forward_pre_hook(lambda _, v: seen.append(v[0]))
    loss = float(detector.loss("image", x, generator())["class"].detach())
    mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
    std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    views = seen[0] * std + mean
    torch.testing.assert_close(views[:4], x)
    changed = [(v - x).abs().amax(dim=1).gt(1e-3).double().mean() for v in views[4:].split(4)]
    assert changed[0] > changed[1] > 0  # a scar is smaller
    with torch.no_grad():
        logits = detector.networks["image head"](detector.features("image", views))
    p = logits.double().softmax(dim=1)
    want = -sum(math.log(float(p[i, i // 4])) for i in range(12)) / 12
    assert loss == pytest.approx(want, rel=1e-4)


def test_patches_are_drawn_everywhere_and_are_parts_of_their_image():
    detector = small("cutpaste", image_size=64)
    x = torch.arange(64.0 * 64).view(1, 1, 64, 64).expand(500, 3, 64, 64)
    patches = detector.crop(x, generator())
    assert patches.shape == (500, 3, 32, 32)
    first = patches[:, 0, 0, 0]
    assert torch.equal(patches[:, 0, 5, 7], first + 5 * 64 + 7)
    assert_uniform((first // 64).float(), -0.5, 32.5)
    assert_uniform((first % 64).float(), -0.5, 32.5)
