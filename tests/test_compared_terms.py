"""The compared detectors' training steps, term by term, and their defaults; on the CPU."""

from __future__ import annotations

import functools
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SIGMAS, assert_uniform, generator
from test_compared import images, repeat
from test_compared import small as small_on
from torch import nn

from baselines import cutpaste, dae, fanogan, ocgan, panda
from baselines.steps import Training, convolutions, deconvolutions, squared_error, stages, widths
from ssim import residual_map, setting
from support.compared import COMPARED

small = functools.partial(small_on, device=torch.device("cpu"))

# --- settings ------------------------------------------------------------------------------------


def test_the_optimisers_are_those_of_the_papers():
    want = {
        "cutpaste": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 3e-5}),
        "panda": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 5e-5}),
        "fanogan": (torch.optim.Adam, {"betas": (0.0, 0.9)}),
        "ocgan": (torch.optim.Adam, {"betas": (0.5, 0.999)}),
        "adgan": (torch.optim.Adam, {"betas": (0.5, 0.999)}),
        "dae": (torch.optim.Adam, {"betas": (0.9, 0.999)}),
        "msssim": (torch.optim.Adam, {"betas": (0.9, 0.999)}),
    }
    for name, (kind, settings) in want.items():
        detector = small(name, lr=0.007)
        trainings = detector.trainings(images(4))
        training = next(trainings)
        assert type(training.optimiser) is kind, name
        (group,) = training.optimiser.param_groups
        assert {"lr": 0.007, **settings}.items() <= group.items(), name
        assert training.cosine == (name == "cutpaste")
        assert training.clip == (1e-3 if name == "panda" else math.inf)
        if name == "fanogan":
            optimiser = next(trainings).optimiser
            assert type(optimiser) is torch.optim.RMSprop
            (group,) = optimiser.param_groups
            assert (group["lr"], group["alpha"]) == (detector.encoder_lr, 0.9)
            z = detector.networks["encoder"](torch.full((2, 3, 32, 32), 9.0))
            assert -1 <= z.min() and z.max() <= 1


def test_the_defaults_are_those_that_the_deviations_state():
    want = {
        "cutpaste": {"epochs": 0, "batch_size": 32, "lr": 0.03, "width": 512},
        "panda": {"epochs": 50, "batch_size": 32, "lr": 1e-2, "ewc": 1e4, "clip": 1e-3, "k": 2},
        "fanogan": {"epochs": 2000, "encoder_epochs": 1000, "batch_size": 64, "lr": 1e-4,
                    "encoder_lr": 5e-5, "latent": 128, "critic_steps": 5, "penalty": 10.0,
                    "kappa": 1.0},
        "ocgan": {"epochs": 500, "batch_size": 32, "lr": 2e-4, "latent": 288, "noise": 0.1,
                  "weight": 40.0, "mining_steps": 5, "mining_length": 0.05},
        "adgan": {"epochs": 500, "batch_size": 32, "lr": 2e-4, "latent": 128, "weight_x": 10.0,
                  "weight_z": 1.0},
        "dae": {"epochs": 256, "batch_size": 16, "lr": 1e-3, "latent": 128, "denoise": 0.0},
        "msssim": {"epochs": 256, "batch_size": 16, "lr": 1e-3, "latent": 128, "rho": 0.15},
    }  # fmt: skip
    for name, kind in COMPARED.items():
        assert {key: getattr(kind, key) for key in want[name]} == want[name], name
    assert (panda.KEPT, panda.FISHER_IMAGES, cutpaste.KEPT) == (10_000, 200, 20_000)


def test_the_quick_preset_is_what_the_docs_measured():
    assert {name: kind.quick for name, kind in COMPARED.items()} == {
        "cutpaste": {"epochs": 4, "batch_size": 16},
        "panda": {"epochs": 2, "batch_size": 16},
        "fanogan": {"epochs": 15, "encoder_epochs": 15, "batch_size": 16, "width": 8,
                    "critic_steps": 2, "lr": 5e-4, "encoder_lr": 5e-4},
        "ocgan": {"epochs": 15, "batch_size": 16, "width": 12, "lr": 1e-3},
        "adgan": {"epochs": 15, "batch_size": 16, "width": 12, "lr": 1e-3},
        "dae": {"epochs": 20, "batch_size": 16, "width": 16},
        "msssim": {"epochs": 15, "batch_size": 16, "width": 16},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "networks"),
    [
        ("dae", ["encoder", "decoder"]),
        ("msssim", ["encoder", "decoder"]),
        ("fanogan", ["generator", "critic"]),
        ("ocgan", ["encoder", "decoder", "latent", "visual", "classifier"]),
        ("adgan", ["to_latent", "to_image", "of_latent", "of_image"]),
        ("cutpaste", ["image", "image head"]),
    ],
)
def test_the_optimiser_steps_all_weights_of_its_networks_and_no_others(name, networks):
    detector = small(name)
    (group,) = next(iter(detector.trainings(images(4)))).optimiser.param_groups
    want = [w for network in networks for w in detector.networks[network].parameters()]
    assert [*map(id, group["params"])] == [*map(id, want)]


def test_channels_double_up_to_eight_times_the_width():
    assert widths(16, 4) == (4, [4, 8, 16])
    assert widths(128, 64) == (4, [64, 128, 256, 512, 512, 512])
    assert widths(48, 4) == (6, [4, 8, 16, 32])


# --- the loop ------------------------------------------------------------------------------------


def recorded(n, **options):
    """A training of one weight on n numbered images, and the numbers and draws of its steps."""
    detector, seen = small("dae", batch_size=2, seed=4), []
    weight = nn.Parameter(torch.zeros(3))

    def terms(x, draws, step):
        seen.append(((255 * x[:, 0, 0, 0]).round().int().tolist(), draws.initial_seed()))
        return {"a": 3 * weight[0], "b": 4 * weight[2]}

    data = np.arange(n, dtype=np.uint8)[:, None, None, None].repeat(3, 1)
    data = data.repeat(32, 2).repeat(32, 3)
    sgd = torch.optim.SGD([weight], 0.5)
    return Training(detector, "dae", data, terms, sgd, epochs=3, **options), weight, seen


def test_an_epoch_sees_each_image_once_in_an_order_of_its_own():
    training, _, seen = recorded(8)
    while training.step_done < training.total:
        training.update(training.losses())
    numbers, draws = zip(*seen, strict=True)
    epochs = [sum(numbers[k : k + 4], []) for k in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and len(set(draws)) == 12


def test_the_rate_falls_in_half_a_cosine_and_the_gradient_is_clipped():
    training, weight, _ = recorded(8, cosine=True, clip=0.1)
    for t in range(training.total):
        before = weight.detach().clone()
        training.update(training.losses())
        rate = 0.5 * (1 + math.cos(math.pi * t / 12)) / 2
        torch.testing.assert_close(before - weight.detach(), rate * torch.tensor([0.06, 0.0, 0.08]))
    plain, weight, _ = recorded(8)
    plain.update(plain.losses())
    torch.testing.assert_close(weight.detach(), -0.5 * torch.tensor([3.0, 0.0, 4.0]))


# --- DAE, MS-SSIM --------------------------------------------------------------------------------


def test_what_is_hidden_from_the_encoder_is_not_hidden_from_the_loss():
    detector, x = small("dae", denoise=0.5), torch.from_numpy(images(4)) / 255
    training = next(iter(detector.trainings(images(4))))
    got = training.terms(x, generator(), 0)["rec"].item()
    want = (x - detector.reconstruct(dae.hide(x, 0.5, generator()))).square().mean().item()
    assert got == pytest.approx(want, rel=1e-5)


def test_msssim_maps_are_eq_11_pixel_by_pixel():
    detector, x = small("msssim"), torch.from_numpy(images(2)) / 255
    with torch.no_grad():
        maps, scores = detector.score_batch(x)
        x_tilde = detector.reconstruct(x)
    torch.testing.assert_close(maps, residual_map(x, x_tilde, **setting(32), rho=0.15))
    torch.testing.assert_close(scores, detector.error(x, x_tilde))


# --- f-AnoGAN ------------------------------------------------------------------------------------


def test_the_terms_of_fanogan_are_those_of_its_losses():
    detector, x = small("fanogan", kappa=0.5), torch.from_numpy(images(4)) / 255
    gen, critic, encoder = detector.networks.train().values()
    terms = {k: v.item() for k, v in detector.gan_terms(x, generator(), 1).items()}
    draws = generator()
    z, mix = torch.randn(4, 128, generator=draws), torch.rand(4, generator=draws)
    fake, real = gen(z).detach(), 2 * x - 1
    penalty = fanogan.gradient_penalty(lambda y: critic(y)[:, 0], real, fake, mix)
    want = {"critic": critic(fake).mean() - critic(real).mean(), "penalty": 10 * penalty,
            "generator": -critic(fake).mean()}  # fmt: skip
    assert terms == pytest.approx({k: v.item() for k, v in want.items()}, rel=1e-4, abs=1e-6)
    detector.networks.eval()["encoder"].train()
    x_tilde = gen(encoder(real))
    f, f_tilde = critic[:-1](real), critic[:-1](x_tilde)
    want = {"image": (real - x_tilde).square().mean(),
            "features": 0.5 * (f - f_tilde).square().mean()}  # fmt: skip
    detector.networks.train()
    got = {k: v.item() for k, v in detector.encoder_terms(x, generator(), 0).items()}
    assert got == pytest.approx({k: v.item() for k, v in want.items()}, rel=1e-4)
    detector.networks.eval()
    shown = detector.reconstruct(x)
    torch.testing.assert_close(shown, (gen(encoder(real)) + 1) / 2)


def test_f_anogans_critic_norms_each_image_alone_and_the_others_norm_the_batch():
    kinds = {}
    for name, network in small("fanogan").networks.items():  # 3 blocks from 32 to 4 px
        norms = [m for m in network.modules() if "Norm" in type(m).__name__]
        kinds[name] = [(type(m), getattr(m, "num_groups", 0)) for m in norms]
    batch, alone = (nn.BatchNorm2d, 0), (nn.GroupNorm, 1)
    assert kinds == {"generator": 7 * [batch], "critic": 6 * [alone], "encoder": 6 * [batch]}
    last = [type(part) for part in fanogan.upwards(8, 32, 2)[-4:]]
    assert last == [nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.Tanh]


def test_f_anogan_generates_images_from_minus_one_to_one():
    y = fanogan.upwards(8, 32, 2)(torch.randn(16, 8, generator=generator()))
    assert y.shape == (16, 3, 32, 32) and -1 <= y.min() < -0.1 < 0.1 < y.max() <= 1


# --- OCGAN, ADGAN --------------------------------------------------------------------------------


def likely(logits):
    return -logits.double().sigmoid().log().mean().item()


def unlikely(logits):
    return -(1 - logits.double().sigmoid()).log().mean().item()


def test_the_terms_of_ocgan_are_those_of_its_losses():
    detector, x = small("ocgan"), torch.from_numpy(images(4)) / 255
    for name in ("latent", "visual", "classifier"):  # or all logits would be near 0
        detector.networks[name][-1].weight.data *= 30
    got = {k: v.item() for k, v in detector.terms(x, generator(), 0).items()}
    encoder, decoder, of_latent, of_image, classifier = detector.networks.children()
    draws = generator()
    s = 2 * torch.rand(4, 288, generator=draws) - 1
    n = 0.1 * torch.randn(x.shape, generator=draws)
    mined = ocgan.mine(s, lambda s: classifier(decoder(s))[:, 0], 5, 0.05)
    with torch.no_grad():
        z = encoder(x + n)
        x_tilde, drawn, negative = decoder(z), decoder(mined), decoder(s)
        want = {
            "rec": 10 * (2 * x - 2 * x_tilde).square().mean().item(),  # as in [-1, 1]
            "latent": likely(of_latent(z)), "visual": likely(of_image(drawn)),
            "latent_discriminator": likely(of_latent(s)) + unlikely(of_latent(z)),
            "visual_discriminator": likely(of_image(x)) + unlikely(of_image(negative)),
            "classifier": likely(classifier(x_tilde)) + unlikely(classifier(negative)),
        }  # fmt: skip
    assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", ["ocgan", "adgan"])
def test_discriminators_have_no_batch_norm_and_ocgans_the_papers_widths(name):
    """Batch norm would let a discriminator see how many of its batch are real."""
    networks = small(name, width=10).networks
    told = {"ocgan": ("latent", "visual", "classifier"), "adgan": ("of_latent", "of_image")}
    for part in told[name]:
        assert not any("BatchNorm" in type(m).__name__ for m in networks[part].modules()), part
    if name == "ocgan":
        widest = [networks[part][0].out_channels for part in ("visual", "classifier")]
        assert widest == [2, 10]  # 12 and 64 in the paper


@pytest.mark.parametrize(
    ("name", "part", "layers"),
    [
        ("adgan", "of_latent", "Linear 128, LeakyReLU 0.2, Linear 128, LeakyReLU 0.2, Linear 1"),
        ("ocgan", "latent", "Linear 128, LeakyReLU 0.2, Linear 64, LeakyReLU 0.2, Linear 32, "
         "LeakyReLU 0.2, Linear 16, LeakyReLU 0.2, Linear 1"),
        ("cutpaste", "image head", "Linear 2, BatchNorm1d 2, ReLU, Linear 3"),
        ("cutpaste", "patch head", "Linear 2, BatchNorm1d 2, ReLU, Linear 3"),
    ],
)  # fmt: skip
def test_what_is_between_the_layers_of_a_vector(name, part, layers):
    sizes = ("out_features", "negative_slope", "num_features")
    got = [
        " ".join([type(m).__name__, *(str(vars(m)[s]) for s in sizes if s in vars(m))])
        for m in small(name).networks[part]
    ]
    assert ", ".join(got) == layers


def test_the_averages_that_score_are_those_of_reconstructions():
    """Of the eight passes through OCGAN's decoder one is of what its encoder gives."""
    detector, x, seen = small("ocgan"), torch.from_numpy(images(4)) / 255, []
    encoder, decoder, *_ = detector.networks.train().children()
    norm = next(part for part in decoder.modules() if isinstance(part, nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda _, v: seen.append(v[0].detach()))
    detector.terms(x, generator(), 0)
    assert len(seen) == 8 and norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[0].mean(dim=(0, 2, 3)))
    draws = generator()
    torch.rand(4, 288, generator=draws)
    decoder(encoder(x + 0.1 * torch.randn(x.shape, generator=draws)))
    torch.testing.assert_close(seen[8], seen[0])
    assert norm.num_batches_tracked == 2


def test_the_terms_of_adgan_are_those_of_its_losses():
    detector, x = small("adgan"), torch.from_numpy(images(4)) / 255
    got = {k: v.item() for k, v in detector.terms(x, generator(), 0).items()}
    to_latent, to_image, of_latent, of_image = detector.networks.children()
    z = torch.randn(4, 128, generator=generator())
    with torch.no_grad():
        z_x, x_z = to_latent(x), to_image(z)
        want = {
            "x": 10 * (x - to_image(z_x)).abs().mean().item(),
            "z": (z - to_latent(x_z)).abs().mean().item(),
            "to_latent": likely(of_latent(z_x)), "to_image": likely(of_image(x_z)),
            "of_latent": likely(of_latent(z)) + unlikely(of_latent(z_x)),
            "of_image": likely(of_image(x)) + unlikely(of_image(x_z)),
        }  # fmt: skip
    assert got == pytest.approx(want, rel=1e-4)


# --- PANDA ---------------------------------------------------------------------------------------


def test_panda_scores_by_the_last_layer_and_maps_by_layers_two_and_three():
    detector = small("panda", image_size=64).fit(images(5, 64))
    x = torch.from_numpy(images(2, 64, seed=3)) / 255
    with torch.no_grad():
        _, two, three, four = stages(detector.networks["resnet"], x)
        pooled, local = detector.features(x)
        maps, scores = detector.score_batch(x)
    torch.testing.assert_close(pooled, four.mean(dim=(2, 3)))
    wide = three.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(local, torch.cat([two, wide], dim=1))
    bank, positions = detector.fitted["bank"], detector.fitted["positions"]
    torch.testing.assert_close(scores, panda.knn_distance(pooled, bank, 2), rtol=1e-4, atol=0)
    d = panda.knn_distance(local.permute(0, 2, 3, 1).flatten(0, 2), positions, 2)
    want = F.interpolate(d.view(2, 1, 8, 8), size=64, mode="bilinear", align_corners=False)
    torch.testing.assert_close(maps, want[:, 0], rtol=1e-4, atol=0)


def test_panda_pulls_layers_three_and_four_to_the_mean_of_the_start_features():
    detector, x = small("panda"), torch.from_numpy(images(4)) / 255
    with torch.no_grad():
        f = detector.features(x)[0]
    before = {k: v.clone() for k, v in detector.networks["resnet"].state_dict().items()}
    training = next(iter(detector.trainings(images(4))))
    terms = training.losses()
    want = f.var(0, unbiased=False).mean().item()
    assert terms["compact"].item() == pytest.approx(want, rel=1e-4)
    assert terms["ewc"].item() == 0
    training.update(terms)
    after = detector.networks["resnet"].state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert {k.split(".")[0] for k in moved} == {"layer3", "layer4"}
    assert not any("running" in k for k in moved)


def test_the_fisher_information_is_of_some_images_that_the_seed_draws(monkeypatch):
    seen = []

    def noted(resnet, x, weights, draws):
        seen.append((x, draws.initial_seed()))
        return [torch.zeros_like(w) for w in weights]

    monkeypatch.setattr(panda, "FISHER_IMAGES", 3)
    monkeypatch.setattr(panda, "fisher_information", noted)
    for seed in (5, 6):
        next(iter(small("panda", seed=seed).trainings(images(8))))
    (one, first), (other, second) = seen
    assert (first, second) == (5, 6) and not torch.equal(one, other)
    whole = torch.from_numpy(images(8)) / 255
    which = [[k for k in range(8) if torch.equal(x, whole[k])] for x in one]
    assert len(one) == 3 and all(map(len, which)) and which == sorted(which)


def test_panda_keeps_random_positions_of_every_image(monkeypatch):
    monkeypatch.setattr(panda, "KEPT", 12)
    detector = small("panda").fit(images(4))
    with torch.no_grad():
        local = detector.features(torch.from_numpy(images(4)) / 255)[1].flatten(2).mT  # (4, 16, D)
    kept = detector.fitted["positions"]  # (12, D), 3 of each image in random order
    nearest = torch.cdist(kept, local.flatten(0, 1)).argmin(dim=1)
    image, at = nearest // 16, nearest % 16
    torch.testing.assert_close(kept, local[image, at])
    assert image.bincount().tolist() == [3] * 4
    assert at.max() >= 8 and len({tuple(sorted(at[image == i].tolist())) for i in range(4)}) > 1
    for detector.seed in (1, 0):
        detector.keep(images(4))
        assert torch.equal(detector.fitted["positions"], kept) == (detector.seed == 0)
    monkeypatch.setattr(panda, "KEPT", 10)  # 3 of each would be 12
    assert len(small("panda").fit(images(4)).fitted["positions"]) == 10


# --- CutPaste ------------------------------------------------------------------------------------


def test_patches_are_a_quarter_of_the_side_and_32_at_least():
    for size, patch in ((32, 32), (64, 32), (128, 32), (256, 64)):
        detector = small("cutpaste", image_size=size)
        assert (detector.patch, detector.stride) == (patch, patch // 8)


def test_the_gaussian_of_patches_is_of_the_patch_networks_features(monkeypatch):
    detector, x = small("cutpaste", image_size=64, epochs=1), images(6, 64)
    detector.fit(x)
    with torch.no_grad():
        parts = detector.patches(torch.from_numpy(x) / 255)
        mu, w = cutpaste.gaussian(detector.features("patch", parts))  # all: fewer than KEPT
    torch.testing.assert_close(detector.fitted["patch mu"], mu, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(detector.fitted["patch w"], w, rtol=1e-3, atol=1e-2)
    monkeypatch.setattr(cutpaste, "KEPT", 12)  # 2 of 81 of an image
    seen = []
    detector.networks["patch"].conv1.register_forward_pre_hook(lambda _, v: seen.append(v[0]))
    detector.estimate(x)
    assert sum(map(len, seen)) == 12
    std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
    assert not torch.allclose(seen[0] * std + mean, parts[:12])  # of any place
    for detector.seed in (1, 0):
        detector.estimate(x)
    assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1])  # of the seed
    monkeypatch.setattr(cutpaste, "KEPT", 10)  # 2 of each of 6 images would be 12
    with mock.patch.object(cutpaste, "gaussian", side_effect=cutpaste.gaussian) as gaussian:
        detector.estimate(x)
        detector.estimate(x)
    features = [call.args[0] for call in gaussian.call_args_list]
    assert [len(f) for f in features] == [6, 10, 6, 10] and torch.equal(features[1], features[3])


def test_cutpaste_trains_one_network_on_images_and_the_other_on_patches():
    detector, seen = small("cutpaste", image_size=64, epochs=1), []
    for name in ("image", "patch"):
        detector.networks[name].conv1.register_forward_pre_hook(
            lambda m, v, name=name: seen.append((name, v[0].shape[-1], m.training))
        )
    for training in detector.trainings(images(4, 64)):
        seen.clear()
        training.update(training.losses())
        assert seen == [("patch", 32, True) if "patch" in training.name else ("image", 64, True)]
    x, draws = torch.from_numpy(images(4, 64)) / 255, generator(5)
    with mock.patch.object(detector, "loss") as loss:
        training.terms(x, draws, 0)
    _, patches, of_pastes = loss.call_args.args
    assert torch.equal(patches, detector.crop(x, generator(5))) and of_pastes is draws


def test_scars_are_uniform_in_width_length_and_angle():
    sides, _, _, angle, factors = cutpaste.draw_pastes(4000, 4096, generator(), scar=True)
    assert_uniform(sides[:, 0] / 16, 9.96, 25.04)  # of rounded sides
    assert_uniform(sides[:, 1] / 16, 1.96, 16.04)
    assert_uniform(angle, -math.pi / 4, math.pi / 4)
    assert_uniform(factors, 0.9 - 1e-6, 1.1 + 1e-6)


def test_all_numbers_of_a_paste_are_drawn_apart_and_it_reaches_each_edge():
    sides, source, target, angle, factors = cutpaste.draw_pastes(4000, 512, generator(), scar=True)
    drawn = torch.cat([sides, source, target, angle[:, None], factors], dim=1)
    assert (drawn.T.corrcoef() - torch.eye(10)).abs().max() < SIGMAS / math.sqrt(4000)
    sides, *centres, _, _ = cutpaste.draw_pastes(1000, 32, generator(), scar=False)
    for centre in centres:
        assert (centre - sides / 2).min() == 0 and (centre + sides / 2).max() == 32


def test_the_knn_distance_keeps_its_digits_far_from_zero():
    x, bank = (300 + torch.rand(n, 64, generator=generator(n)) for n in (5, 40))
    square = (x[:, None].double() - bank.double()).square().sum(dim=2)
    want = square.sort(dim=1).values[:, :2].mean(dim=1)
    torch.testing.assert_close(panda.knn_distance(x, bank, 2).double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["dae", "ocgan", "adgan", "msssim"])
def test_auto_encoders_train_with_batch_statistics_and_score_without(name):
    detector, x = small(name), torch.from_numpy(images(4)) / 255
    training = next(iter(detector.trainings(images(4))))
    detector.networks.eval()
    terms = training.terms(x, generator(), 0)
    assert detector.networks.training
    tracked = [v for k, v in detector.networks.state_dict().items() if "num_batches" in k]
    assert tracked and min(tracked) > 0
    if name == "msssim":
        want = detector.error(x, detector.reconstruct(x)).mean().item()
        assert terms["rec"].item() == pytest.approx(want, rel=1e-5)
        return
    detector.networks.eval()
    with torch.no_grad():
        got, want = detector.score_batch(x), squared_error(x, detector.reconstruct(x))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if name == "ocgan":
        z = detector.networks["encoder"](x)
        assert -1 <= z.min() < 0 < z.max() <= 1


def test_convolutions_and_their_mirror_have_a_norm_and_a_slope_of_a_fifth_in_between():
    names = [type(part).__name__ for part in convolutions(64, 2, 5)]
    block = ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert names == ["Conv2d", "LeakyReLU", *3 * block, "Flatten", "Linear"]
    plain = [type(part).__name__ for part in convolutions(64, 2, 5, norm=False)]
    assert plain == [name for name in names if name != "BatchNorm2d"]
    names = [type(part).__name__ for part in deconvolutions(5, 64, 2)]
    block = ["BatchNorm2d", "LeakyReLU", "ConvTranspose2d"]
    assert names == ["Linear", "Unflatten", *4 * block, "Sigmoid"]
    parts = [*convolutions(64, 2, 5), *deconvolutions(5, 64, 2)]
    slopes = {part.negative_slope for part in parts if isinstance(part, nn.LeakyReLU)}
    assert slopes == {0.2}


def test_the_draws_of_a_training_follow_the_seed_and_its_name():
    trainings = [next(iter(small("dae", seed=seed).trainings(images(8)))) for seed in (0, 1)]
    t = trainings[0]
    trainings.append(Training(t.detector, "dae too", t.data, t.terms, t.optimiser, epochs=1))
    orders = [repeat(t, 0)[0].numpy().tobytes() for t in trainings]
    draws = [repeat(t, 0)[1].initial_seed() for t in trainings]
    assert len(set(orders)) == len(set(draws)) == 3
