"""The training step: views, the terms of eq. 1 and an update of the weights, each by hand.

Sizes as in pmsacl.py: B images, A classes, N = 2 A B views.
"""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import SHIPPED_WATCHED_VIEWS, generator
from hypothesis import given
from hypothesis import strategies as st
from page import printed_cross_entropy, printed_eq_3, printed_eq_5, printed_nt_xent, printed_supcon

import losses
import pmsacl
import weak
from baselines.pretraining import METHODS, UNTRAINED
from baselines.strong import STRONG
from encoder import Encoder, ResNet18, seeded
from support.options import Config, make_config
from support.worth import fake_lesions

TRAINED = [name for name in METHODS if name not in UNTRAINED]


def pictures(size=32, count=11):
    """(N, 3, S, S) uint8: blocks of 8 x 8 pixels of one colour."""
    g = np.random.default_rng(0)
    small = g.integers(0, 256, (count, 3, size // 8, size // 8), dtype=np.uint8)
    return small.repeat(8, axis=2).repeat(8, axis=3)


def tiny(**changes):
    """A config for 32 px and two classes (64 px where eq. 9 needs room, one class for SimCLR)."""
    options = {"data": "x", "device": "cpu", "epochs": 1, "batch_size": 4, "image_size": 32}
    options |= {"init": "random", "classes": 2}
    if changes.get("method") == "simclr":
        options["classes"] = 1
    if changes.get("method") == "ccd":
        options["image_size"] = 64
    return make_config(options | changes)


# --- the views ---------------------------------------------------------------------------------


def test_fake_lesions_are_measured_twenty_times_in_a_long_run(monkeypatch):
    training = pmsacl.Pretraining(pictures(), tiny(epochs=220))
    monkeypatch.setattr(training, "health", lambda: {"spread": 1.0})
    monkeypatch.setattr(pmsacl, "fake_lesions", lambda *_, **__: {"image_auroc": 0.5, "aupro": 0.5})
    measured = []
    for epoch in range(1, 221):
        training.step_done = epoch * training.steps
        measured += [epoch] * ("fake_auroc" in training.end_epoch())
    assert measured == [*range(11, 221, 11)]
    training.total, training.step_done = 7 * training.steps, 7 * training.steps
    assert "fake_auroc" in training.end_epoch()  # at the end in any case


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_view_class_and_pair_belong_to_the_image_that_they_came_from(classes, images, seed):
    """Image i is one grey, 0.1 (i + 1), and its strong version of class n is 0.01 n lighter."""
    with pytest.MonkeyPatch.context() as patch:

        def lighter(x, n, generator):
            return x.repeat(len(n) // len(x), 1, 1, 1) + 0.01 * n[:, None, None, None], None

        patch.setattr(pmsacl, "strong_set", lambda config: lighter)
        x = (torch.arange(1, images + 1) / 10)[:, None, None, None].expand(-1, 3, 32, 32)
        config = Config(classes=classes, jitter=0.0, weak="ccd", image_size=32)
        views, n, pair = pmsacl.class_views(x, config, generator(seed))
    assert views.shape == (2 * classes * images, 3, 32, 32)
    hundredths = (100 * views.double().mean(dim=(1, 2, 3))).round().long()
    image, lighter_by = hundredths // 10 - 1, hundredths % 10  # what each view shows
    assert torch.equal(n, lighter_by)
    assert torch.equal(image[pair], image) and torch.equal(n[pair], n)
    assert torch.equal(pair[pair], torch.arange(len(n))) and (pair != torch.arange(len(n))).all()
    shown = sorted(zip(image.tolist(), n.tolist(), strict=True))
    assert shown == sorted(2 * [(i, k) for i in range(images) for k in range(classes)])


def test_the_two_views_of_an_image_are_drawn_apart():
    x = torch.rand(3, 3, 32, 32, generator=generator(0))
    views, _, pair = pmsacl.class_views(x, Config(classes=2, image_size=32), generator(1))
    assert 0 <= views.min() and views.max() <= 1
    assert all(not torch.equal(views[i], views[j]) for i, j in enumerate(pair.tolist()))


@pytest.mark.parametrize("strong", STRONG)
def test_every_strong_set_gives_its_classes(strong):
    x = torch.rand(2, 3, 32, 32, generator=generator(0))
    config = Config(strong=strong, classes=3)
    augment = pmsacl.strong_set(config)
    changed, mask = augment(x, torch.full((2,), 1), generator(1))
    assert not torch.equal(changed, x) and mask.any()
    views, n, _ = pmsacl.class_views(x, config, generator(2))
    assert views.shape == (12, 3, 32, 32) and n.bincount().tolist() == [4, 4, 4]


def test_rotations_share_the_circle_among_the_classes():
    x = torch.rand(2, 3, 32, 32, generator=generator(0))
    augment = pmsacl.strong_set(Config(strong="rotation", classes=2))
    assert torch.equal(augment(x, torch.ones(2).long(), generator(1))[0], x.flip(2, 3))


def test_a_turned_view_is_not_mirrored_afterwards():
    """Else a quarter turn to the left could not be told from one to the right."""
    x = torch.linspace(1, 0, 32)[:, None].expand(2, 3, 32, 32)  # bright above, its own mirror image
    config = Config(strong="rotation", crop_area=1.0, jitter=0.0)
    views, n, pair = pmsacl.class_views(x, config, generator(1))
    sides = (views[..., :16, :], views[..., :16], views[..., 16:, :], views[..., 16:])
    brightest = torch.stack([side.mean((1, 2, 3)) for side in sides]).argmax(0)
    assert torch.equal(brightest, n)  # above, left, below, right: counter-clockwise
    a, b = views, views[pair]
    assert not torch.equal(a, b)  # blurred by another sigma


def test_lesion_area_crop_area_and_jitter_reach_medmix():
    x = torch.rand(8, 3, 64, 64, generator=generator(0))
    ones = torch.ones(8).long()
    shares = []
    for area in ("0.01,0.02", "0.2,0.3"):
        augment = pmsacl.strong_set(Config(lesion_area=area))
        shares.append(float(augment(x, ones, generator(1))[1].float().mean()))
    assert shares[0] < 0.03 and 0.1 < shares[1] < 0.35
    config = Config(classes=1, crop_area=1.0, jitter=0.0, weak="ccd")
    x = torch.rand(8, 3, 32, 32, generator=generator(2))
    views, _, _ = pmsacl.class_views(x, config, generator(3))
    grey = weak.luma(x).expand_as(x)
    plain = (x, x.flip(3), grey, grey.flip(3))
    for i, view in enumerate(views):  # neither cropped, jittered nor blurred; a fifth are grey
        assert any(torch.allclose(view, y[i // 2], atol=1e-5) for y in plain)


# --- the terms of eq. 1 ------------------------------------------------------------------------

READINGS = [  # of the main method, each away from its default
    {"tau": 0.3, "alpha": 3.0, "centre_weight": 0.7, "positive_scale": "0.5"},
    {"tau": 0.3, "alpha": 3.0, "positive_scale": "tau", "features": "raw"},
    {"alpha": 4.0, "aug_head": "projection"},
]


def printed_terms(encoder, x, c, config, generator, local):
    """The terms that a method has, by the loops of page.py, on the views that the draws give."""
    patches = None
    if local or config.method == "ccd":
        patches = losses.patch_pairs(x, generator)
    views, n, pair = pmsacl.class_views(patches[0] if local else x, config, generator)
    z, h = (t.double() for t in encoder.embed(views))
    logits = encoder.aug_logits(z.float(), h.float()).double()
    tau, alpha, scale = config.tau, config.alpha, config.positive_scale
    want = {}
    if config.method == "pmsacl":
        scale = {"kappa": 1 / (alpha * tau), "tau": 1 / tau}.get(scale) or float(scale)
        want["ctr"] = config.centre_weight * printed_eq_3(z, n, c.double())
        want["pmsacl"] = printed_eq_5(z, n, pair, c.double(), tau, alpha, scale)
    if config.method in ("simclr", "csi", "droc", "ccd"):
        want["con"] = printed_nt_xent(z, pair, tau)
    if config.method == "supcon":
        want["sup"] = printed_supcon(z, n, tau)
    if config.method in ("pmsacl", "rotnet", "csi", "ccd"):
        want["aug"] = printed_cross_entropy(logits, n)
    if config.method == "ccd" or local:
        with losses.frozen_averages(encoder):
            z_1, z_2 = encoder(torch.cat(patches[:2])).chunk(2)
        want["pos"] = printed_cross_entropy(encoder.position_logits(z_1, z_2), patches[2])
    return want


@pytest.mark.parametrize(
    ("method", "local", "changes"),
    [(method, False, {}) for method in TRAINED]
    + [("pmsacl", local, changes) for changes in READINGS for local in (False, True)],
)
def test_the_terms_of_a_step_are_the_page(method, local, changes):
    config = make_config({"method": method, "device": "cpu", "data": "x"} | changes)
    encoder = Encoder(
        classes=config.classes,
        features=config.features,
        aug_head=config.aug_head,
        generator=generator(0),
    ).eval()
    x = torch.rand(2, 3, 64, 64, generator=generator(1))
    c = torch.randn(config.classes, 128, generator=generator(3)) / 11  # about as long as z
    with torch.no_grad():
        terms = pmsacl.loss_terms(encoder, x, c, config, generator(2), local=local)
        want = printed_terms(encoder, x, c, config, generator(2), local)
    assert sorted(terms) == sorted(want)
    for name, value in want.items():
        assert float(terms[name]) == pytest.approx(value, rel=2e-5), name


def test_terms_names_the_terms_and_the_warm_up_leaves_out_those_that_need_centres():
    encoder = Encoder(classes=2, generator=generator(0)).train()
    x, c = torch.rand(2, 3, 64, 64, generator=generator(1)), torch.zeros(2, 128)

    def names(c, **changes):
        config = Config(classes=2, device="cpu", **changes)
        return list(pmsacl.loss_terms(encoder, x, c, config, generator(2)))

    assert names(c, terms="pos,aug,ctr,pmsacl") == ["ctr", "pmsacl", "aug", "pos"]
    assert names(c, terms="aug") == ["aug"]
    assert "pos" not in names(c)  # R13: only the local encoder learns positions by default
    assert names(torch.zeros(0)) == ["aug"]


# --- a step and an epoch -----------------------------------------------------------------------


@pytest.mark.parametrize("local", [False, True])
def test_steps_are_sgd_by_hand(local):
    """g = d(sum of terms)/dp + lambda p, v = m v + g, p -= eta v, eta on a cosine."""
    size = 64 if local else 32
    config = tiny(
        image_size=size, epochs=2, batch_size=3, lr=0.05, local_lr=0.08, momentum=0.8,
        weight_decay=0.01, lr_end=0.001,
    )  # fmt: skip
    training = pmsacl.Pretraining(pictures(size), config, local=local)
    by_hand = copy.deepcopy(training.encoder)
    start_weights = {name: p.detach().clone() for name, p in by_hand.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in by_hand.named_parameters()}
    start = 0.08 if local else 0.05
    for step in range(3):
        epoch, position = divmod(step, training.steps)
        rows = training._order(epoch)[3 * position : 3 * position + 3]
        terms = training.losses()
        x = training.batch_of(training.trained[rows])
        draws = training.draws(6, step, 0)
        again = pmsacl.loss_terms(by_hand, x, training.c, config, draws, local=local)
        assert list(terms) == list(again) == ["ctr", "pmsacl", "aug"] + ["pos"] * local
        total = 0.0
        for term in again.values():
            total = total + term
        parameters = dict(by_hand.named_parameters())
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        eta = 0.001 + (start - 0.001) * (1 + math.cos(math.pi * step / (2 * training.steps))) / 2
        with torch.no_grad():
            for (name, p), g in zip(parameters.items(), gradients, strict=True):
                if g is not None:
                    velocity[name] = 0.8 * velocity[name] + g + 0.01 * p
                    p -= eta * velocity[name]
        training.update(terms)
        assert training.step_done == step + 1
    for (name, got), want in zip(
        training.encoder.named_parameters(), by_hand.parameters(), strict=True
    ):
        moved = (want - start_weights[name]).norm()
        # Sums in another order give 0.003 at most, a decay of 0.009 for 0.01 gives 0.34.
        assert (got - want).norm() <= 0.02 * moved, name


def test_an_epoch_takes_every_image_once_and_each_epoch_has_its_order():
    training = pmsacl.Pretraining(pictures(count=18), tiny(batch_size=4, epochs=3))
    assert sorted([*training.watched, *training.trained]) == list(range(18))
    seen = []
    training.batch_of = lambda indices: seen.append(indices.tolist()) or torch.zeros(4, 3, 32, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pmsacl, "loss_terms", lambda *_, **__: {})
        patch.setattr(training, "centres_due", lambda: False)
        while training.step_done < training.total:
            training.losses()
            training.step_done += 1
    epochs = [sum(seen[k : k + training.steps], []) for k in range(0, len(seen), training.steps)]
    assert len(epochs) == 3 and epochs[0] != epochs[1] != epochs[2]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(training.trained.tolist())


def test_two_processes_have_half_of_an_epoch_and_of_the_centres_images_each(monkeypatch):
    """And their own draws."""
    steps, centres, draws = [], [], set()
    monkeypatch.setattr(pmsacl, "loss_terms", lambda *a, **_: draws.add(a[4].initial_seed()) or {})
    monkeypatch.setattr(pmsacl, "class_centres", lambda _, views: torch.zeros(len([*views]), 1))
    for rank in (0, 1):
        monkeypatch.setattr(pmsacl, "ranks", lambda rank=rank: (rank, 2))
        training = pmsacl.Pretraining(pictures(count=18), tiny(batch_size=4))
        training.views_of = lambda indices, _: centres.extend(indices.tolist())
        assert len(training.centres()) == training.steps // 2 == 2
        training.batch_of = lambda indices: steps.extend(indices.tolist())
        training.centres_due = lambda: False
        for step in range(training.total):
            training.step_done = step
            training.losses()
        assert len(steps) == len(centres) == 8 * (rank + 1) and len(draws) == 4 * (rank + 1)
    assert sorted(steps) == sorted(centres) == sorted(training.trained)


def test_a_state_goes_on_as_if_it_had_not_been_stopped_and_refuses_other_images():
    config, images = tiny(epochs=2, batch_size=3), pictures()
    whole, resumed = (pmsacl.Pretraining(images, config) for _ in range(2))
    for _ in range(2):
        whole.update(whole.losses())
    whole.spread, whole.collapsed, whole.init = 0.25, True, "imagenet"
    of_gpu = copy.deepcopy(whole.state_dict())
    of_gpu["optimiser"]["param_groups"][0]["fused"] = True  # as a GPU writes it
    resumed.load_state_dict(of_gpu)
    groups = (t.state_dict()["optimiser"]["param_groups"] for t in (resumed, whole))
    assert next(groups) == next(groups)
    assert (resumed.spread, resumed.collapsed, resumed.init) == (0.25, True, "imagenet")
    for training in (whole, resumed):
        training.update(training.losses())
    for name, value in whole.encoder.state_dict().items():
        assert torch.equal(value, resumed.encoder.state_dict()[name]), name
    with pytest.raises(ValueError, match="training images have changed"):
        pmsacl.Pretraining(pictures(count=8), config).load_state_dict(whole.state_dict())


def test_the_pre_training_begins_with_the_weights_that_init_names(tmp_path):
    start = ResNet18(generator(9))
    torch.save(start.state_dict(), tmp_path / "start.pt")
    config = tiny(method="none", init=str(tmp_path / "start.pt"))
    encoder, init = pmsacl.pretrain(pictures(), config, tmp_path)
    assert init == "start.pt" and torch.equal(encoder.backbone.conv1.weight, start.conv1.weight)


def test_start_weights_held_back_images_and_random_centres_follow_the_seed():
    trainings = [pmsacl.Pretraining(pictures(), tiny(centres="random", seed=k)) for k in (0, 1)]
    for k, training in enumerate(trainings):  # the untrained row of the results begins there, too
        start = ResNet18(seeded(k, 2)).conv1.weight
        assert torch.equal(training.encoder.backbone.conv1.weight, start)
    assert trainings[0].watched.tolist() != trainings[1].watched.tolist()
    assert not torch.equal(*(training.centres() for training in trainings))


def test_the_encoder_is_the_one_that_the_options_ask_for():
    config = tiny(features="raw", aug_head="projection", classes=3)
    encoder = pmsacl.Pretraining(pictures(), config).encoder
    assert (encoder.features, encoder.aug_head) == ("raw", "projection")
    assert encoder.f_beta.out_features == 3


@pytest.mark.parametrize(("count", "batch", "held"), [
    (120, 4, 6), (120, 32, 16), (40, 32, 10), (2000, 4, 64),
])  # fmt: skip
def test_a_twentieth_or_half_a_batch_is_held_back_64_and_a_quarter_at_most(count, batch, held):
    images = np.zeros((count, 3, 32, 32), np.uint8)
    assert len(pmsacl.Pretraining(images, tiny(batch_size=batch)).watched) == held


# --- centres and the health of the pretext task ------------------------------------------------


def test_centres_are_eq_2_of_the_start_weights_over_every_training_image():
    training = pmsacl.Pretraining(pictures(), tiny(batch_size=3))
    seen = []
    batch_of = training.batch_of
    training.batch_of = lambda indices: seen.extend(indices.tolist()) or batch_of(indices)
    c = training.centres()
    assert sorted(seen) == sorted(training.trained.tolist()) and c.shape == (2, 128)
    chunks = np.array_split(training.trained, training.steps)
    views = (training.views_of(chunk, training.draws(3, i)) for i, chunk in enumerate(chunks))
    torch.testing.assert_close(c, losses.class_centres(training.encoder, views))
    local = pmsacl.Pretraining(pictures(size=64), tiny(image_size=64), local=True)
    assert local.views_of(local.watched, local.draws(3, 0))[0].shape[2:] == (32, 32)  # of patches


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_centres_join_after_the_warm_up_and_stay(device):
    config = tiny(warmup_epochs=1, epochs=3, device=device)
    training = pmsacl.Pretraining(pictures(), config)
    for _ in range(training.steps):
        terms = training.losses()
        assert list(terms) == ["aug"] and len(training.c) == 0
        training.update(terms)
    start = pmsacl.Pretraining(pictures(), config)
    assert not torch.allclose(training.centres(), start.centres())  # of the weights as they are
    terms = training.losses()
    assert list(terms) == ["ctr", "pmsacl", "aug"] and training.c.shape == (2, 128)
    frozen = training.c
    for _ in range(2):
        training.update(terms)
        terms = training.losses()
    assert training.c is frozen


def test_table_10s_centres():
    images = pictures()
    c = {
        name: pmsacl.Pretraining(images, tiny(centres=name, classes=3)).centres()
        for name in ("untrained", "random", "equidistant", "re-estimated")
    }
    assert torch.equal(c["untrained"], c["re-estimated"])  # at the start
    torch.testing.assert_close(c["equidistant"] @ c["equidistant"].T, torch.eye(3))
    torch.testing.assert_close(c["random"].norm(dim=1), torch.ones(3))
    assert not torch.allclose(c["random"], c["equidistant"])


def test_re_estimated_centres_are_computed_every_five_epochs():
    training = pmsacl.Pretraining(pictures(), tiny(centres="re-estimated", epochs=11))
    frozen = pmsacl.Pretraining(pictures(), tiny(epochs=11))
    due = [[t.centres_due() for t.step_done in range(t.total)] for t in (training, frozen)]
    every = 5 * training.steps
    assert [i for i, now in enumerate(due[0]) if now] == [0, every, 2 * every]
    assert [i for i, now in enumerate(due[1]) if now] == [0]


def test_the_pretext_is_watched_on_400_views_and_four_images_are_enough(monkeypatch):
    monkeypatch.setattr(pmsacl, "WATCHED_VIEWS", SHIPPED_WATCHED_VIEWS)
    config = Config(image_size=32, batch_size=2, init="random", device="cpu")
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
    with pytest.raises(ValueError, match="3 healthy images are too few: 2 are held back"):
        pmsacl.Pretraining(np.zeros((3, 3, 32, 32), np.uint8), config)
    monkeypatch.setattr(pmsacl, "ranks", lambda: (0, 3))
    with pytest.raises(ValueError, match="--batch-size 5 is too small: .* 2 for each of 3"):
        pmsacl.Pretraining(pictures(count=18), tiny(batch_size=5))


def test_health_is_spread_distance_and_accuracy_on_fresh_views_of_held_back_images():
    training = pmsacl.Pretraining(pictures(), tiny(classes=3))
    encoder, watched = training.encoder.eval(), training.watched
    batches = [training.views_of(watched, training.draws(4, i)) for i in (0, 1)]  # 24 views
    n = torch.cat([classes for _, classes in batches])
    with torch.no_grad():
        z, h = (torch.cat(y) for y in zip(*(encoder.embed(x) for x, _ in batches), strict=True))
        encoder.f_beta.bias -= encoder.f_beta(h).mean(0)  # else it says one class only
    means = [z[n == k].mean(0) for k in range(3)]
    apart = [float((a - b).norm()) for a, b in itertools.combinations(means, 2)]
    want = {
        "spread": float(z.var(0).sqrt().mean()),
        "distance": sum(apart) / 3,
        "accuracy": float((encoder.f_beta(h).argmax(1) == n).double().mean()),
    }
    assert training.health() == pytest.approx(want, rel=1e-4)
    training.begin()
    assert training.spread == training.health()["spread"] and encoder.training


def test_a_collapse_is_said_once_and_not_of_the_first_steps(capsys):
    training = pmsacl.Pretraining(pictures(), tiny())
    now = training.health()["spread"]
    for training.step_done, start in (29, 11 * now), (30, 9 * now), (31, 11 * now), (32, 11 * now):
        training.spread = start  # a tenth of it is a collapse
        training.end_epoch()
        assert training.collapsed == (training.step_done >= 31)
    fell = f"collapse: the spread of z fell from {11 * now:.2g} to {now:.2g}"
    assert capsys.readouterr().err.count(fell) == 1


def test_an_epoch_logs_how_well_fake_lesions_are_found_except_on_patches():
    training = pmsacl.Pretraining(pictures(count=16), tiny(seed=1))
    before = copy.deepcopy(training.encoder.state_dict())
    row = training.end_epoch()
    fakes = fake_lesions(training.encoder.backbone, training.pixels, seed=1)
    assert (row["fake_auroc"], row["fake_aupro"]) == (fakes["image_auroc"], fakes["aupro"])
    assert training.encoder.training  # and watching it has changed nothing
    for name, value in training.encoder.state_dict().items():
        assert torch.equal(value, before[name])
    local = pmsacl.Pretraining(pictures(size=64), tiny(image_size=64), local=True)
    assert "fake_auroc" not in local.end_epoch()
