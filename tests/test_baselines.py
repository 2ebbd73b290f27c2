"""Table 9's pre-trainings: their losses against float64 loops, and each in the main job's loop.

Sizes as in baselines.py: N views, A classes, Z features.
"""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import U32, assert_within
from hypothesis import given
from hypothesis import strategies as st

import medmix
import pmsacl
import weak
from baselines import pretraining as baselines
from encoder import Encoder, ResNet18, frozen_averages
from support import options, phantom
from support.run import generator

TRAINED = [name for name in baselines.METHODS if name not in baselines.UNTRAINED]


@st.composite
def features(draw):
    """z (N, Z), class ids n in any order, pairs: N = 2 A B."""
    a, b, z_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8]))
    g = generator(draw(st.integers(0, 2**31 - 1)))
    n = torch.randperm(a, generator=g).repeat_interleave(2 * b)
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    return scale * torch.randn(len(n), z_dim, generator=g), n, torch.arange(len(n)) ^ 1


def units(z):
    return [[float(v) / max(float(row.norm()), 1e-4) for v in row] for row in z.double()]


def similarity(f, i, j, tau):
    return sum(p * q for p, q in zip(f[i], f[j], strict=True)) / tau


def printed_nt_xent(z, pair, tau):
    """Chen et al., eq. 1, averaged over all views."""
    f, total = units(z), 0.0
    for i in range(len(f)):
        others = sum(math.exp(similarity(f, i, j, tau)) for j in range(len(f)) if j != i)
        total -= math.log(math.exp(similarity(f, i, int(pair[i]), tau)) / others)
    return total / len(f)


def printed_supcon(z, n, tau):
    """Khosla et al., eq. 2, averaged over all views."""
    f, total = units(z), 0.0
    for i in range(len(f)):
        positives = [p for p in range(len(f)) if p != i and n[p] == n[i]]
        others = sum(math.exp(similarity(f, i, j, tau)) for j in range(len(f)) if j != i)
        for p in positives:
            total -= math.log(math.exp(similarity(f, i, p, tau)) / others) / len(positives)
    return total / len(f)


def printed_cross_entropy(logits, n):
    total = 0.0
    for row, target in zip(logits.double(), n, strict=True):
        total -= math.log(math.exp(float(row[target])) / sum(math.exp(float(v)) for v in row))
    return total / len(n)


def budget(z, want, tau):
    """f: 8 roundings a component, its sums over Z and N, amplified by 1/tau in the exponent."""
    return U32 * (1 / tau) * (16 + 2 * z.shape[1]) + U32 * (8 + 2 * len(z)) * (1 / tau + abs(want))


@given(features(), st.sampled_from([0.1, 0.2, 0.5]))
def test_nt_xent_is_the_printed_formula(args, tau):
    z, _, pair = args
    want = printed_nt_xent(z, pair, tau)
    got = baselines.nt_xent(z, pair, tau=tau)
    assert_within(got, torch.tensor(want, dtype=torch.float64), budget(z, want, tau))


@given(features(), st.sampled_from([0.1, 0.2, 0.5]))
def test_supervised_contrastive_is_the_printed_formula(args, tau):
    z, n, pair = args
    want = printed_supcon(z, n, tau)
    got = baselines.supervised_contrastive(z, n, pair, tau=tau)
    assert_within(got, torch.tensor(want, dtype=torch.float64), budget(z, want, tau))


def test_the_formulas_differ_where_a_class_has_several_images():
    z, n = torch.randn(8, 4, generator=generator(0)), torch.arange(2).repeat_interleave(4)
    pair = torch.arange(8) ^ 1
    con = float(baselines.nt_xent(z, pair, tau=0.2))
    sup = float(baselines.supervised_contrastive(z, n, pair, tau=0.2))
    assert abs(con - sup) > 1e-2  # a loss that took all positives for one would fail above


@given(features())
def test_simclr_is_eq_5_with_one_class_alpha_1_and_centres_at_zero(args):
    z, n, pair = args
    centres = torch.zeros(int(n.max()) + 1, z.shape[1])
    want = baselines.nt_xent(z, pair, tau=0.2)
    one = pmsacl.contrastive_loss(
        z, torch.zeros_like(n), pair, centres, tau=0.2, alpha=1.0, positive_scale="tau"
    )
    assert torch.equal(one, want)
    # with several classes too: row 3 of Table 8 is CCD's loss unless eq. 6 centres
    several = pmsacl.contrastive_loss(z, n, pair, centres, tau=0.2, alpha=1.0)
    assert_within(several, want.double(), 2 * budget(z, float(want), 0.2))


@given(features())
def test_supcon_with_a_class_for_each_image_is_simclr(args):
    z, _, pair = args
    each = torch.arange(len(z)) // 2
    want = baselines.nt_xent(z, pair, tau=0.2)
    got = baselines.supervised_contrastive(z, each, pair, tau=0.2)
    assert_within(got, want.double(), 2 * budget(z, float(want), 0.2))


def test_gradients_and_rows_of_several_processes():
    g = generator(3)
    z = torch.randn(8, 3, dtype=torch.float64, generator=g, requires_grad=True)
    n, pair = torch.arange(2).repeat_interleave(4), torch.arange(8) ^ 1
    for loss in (
        lambda z, rows=None: baselines.nt_xent(z, pair, tau=0.5, rows=rows),
        lambda z, rows=None: baselines.supervised_contrastive(z, n, pair, tau=0.5, rows=rows),
    ):
        assert torch.autograd.gradcheck(loss, z)
        halves = [loss(z, rows) for rows in ((0, 4), (4, 8))]
        torch.testing.assert_close(sum(halves) / 2, loss(z))


@pytest.mark.parametrize("method", TRAINED)
def test_each_method_is_its_strong_set_and_its_formula(method):
    """The terms of a step against the printed formulas on the very same views."""
    config = options.settle({"method": method, "device": "cpu", "data": "x"})
    encoder = Encoder(classes=config.classes, generator=generator(0)).eval()
    x = torch.rand(2, 3, 64, 64, generator=generator(1))
    terms = pmsacl.loss_terms(encoder, x, torch.zeros(4, 128), config, generator(2))
    g = generator(2)
    if "pos" in terms:
        patches = pmsacl.patch_pairs(x, g)
    views, n, pair = pmsacl.class_views(x, config, g)
    with torch.no_grad():
        z, h = encoder.embed(views)
        logits = encoder.aug_logits(z, h)
        want = {}
        if method in ("simclr", "csi", "droc", "ccd"):
            want["con"] = printed_nt_xent(z, pair, config.tau)
        if method == "supcon":
            want["sup"] = printed_supcon(z, n, config.tau)
        if method in ("rotnet", "csi", "ccd"):
            want["aug"] = printed_cross_entropy(logits, n)
        if method == "ccd":
            with frozen_averages(encoder):
                z_1, z_2 = encoder(torch.cat(patches[:2])).chunk(2)
            want["pos"] = printed_cross_entropy(encoder.position_logits(z_1, z_2), patches[2])
    if method != "pmsacl":
        assert list(terms) == list(want)
    for name, value in want.items():
        assert float(terms[name].detach()) == pytest.approx(value, rel=1e-5), name
    assert len(views) == 2 * 2 * config.classes


# --- in the loop -------------------------------------------------------------------------------


def tiny(**changes):
    given = {"data": "x", "device": "cpu", "epochs": 1, "batch_size": 4, "image_size": 32}
    given |= {"init": "random", "classes": 2}
    if changes.get("method") == "simclr":
        given["classes"] = 1
    if changes.get("method") == "ccd":
        given["image_size"] = 64  # eq. 9 needs room
    return options.settle(given | changes)


def pictures(size=32, count=11):
    g = np.random.default_rng(0)
    small = g.integers(0, 256, (count, 3, size // 8, size // 8), dtype=np.uint8)
    return small.repeat(8, axis=2).repeat(8, axis=3)


def weights(encoder):
    return {name: value.clone() for name, value in encoder.state_dict().items()}


@pytest.mark.parametrize("method", TRAINED)
def test_each_method_trains_and_goes_on_where_it_was_stopped(method, tmp_path):
    config = tiny(method=method)
    images = pictures(config.image_size)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    encoder, _ = pmsacl.pretrain(images, config, tmp_path / "whole")
    started = pmsacl.Pretraining(images, config)
    assert any(not torch.equal(v, weights(encoder)[k]) for k, v in weights(started.encoder).items())
    started.spread = started.health()["spread"]
    started.step()
    started.save(tmp_path / "cut/checkpoint.pt")
    resumed, _ = pmsacl.pretrain(images, config, tmp_path / "cut")
    assert all(torch.equal(v, weights(resumed)[k]) for k, v in weights(encoder).items())
    row = list(csv.DictReader((tmp_path / "whole/log.csv").read_text().splitlines()))[-1]
    assert 0 < float(row["spread"]) < 1
    assert ("accuracy" in row) == (method in ("pmsacl", "rotnet", "csi", "ccd"))
    assert ("distance" in row) == (method != "simclr")


@pytest.mark.parametrize("method", ["simclr", "rotnet", "supcon"])
def test_each_method_stops_when_its_loss_is_not_finite(method, tmp_path):
    config = tiny(method=method, lr=1e30, features="raw", epochs=9)
    with pytest.raises(FloatingPointError, match="not finite"):
        pmsacl.pretrain(pictures(), config, tmp_path)


def test_random_trains_nothing_and_its_detector_is_the_untrained_one(tmp_path):
    run, root = tmp_path / "run", tmp_path / "images"
    phantom.draw(root, train=8, good=4, abnormal=4, size=32)
    options = "--method random --epochs 3 --image-size 32 --batch-size 4".split()
    assert pmsacl.main(["--data", str(root), *options, "--out", str(run)]) == 0
    saved = torch.load(run / "encoder.pt", weights_only=True)
    assert torch.equal(saved["conv1.weight"], ResNet18(generator(0, 2)).conv1.weight)
    results = json.loads((run / "results.json").read_text())
    assert results["padim"]["image_auroc"] == results["untrained"]["image_auroc"]


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "strong", "classes", "terms", "tau"),
    [
        ("simclr", "medmix", 1, "con", 0.5),  # one class: no strong augmentation
        ("rotnet", "rotation", 4, "aug", 0.2),
        ("csi", "rotation", 4, "con,aug", 0.5),
        ("droc", "rotation", 4, "con", 0.2),
        ("supcon", "medmix", 4, "sup", 0.1),
        ("ccd", "permutation", 4, "con,aug,pos", 0.2),
        ("pmsacl", "medmix", 4, "ctr,pmsacl,aug", 0.2),
    ],
)
def test_each_method_has_its_strong_set_its_terms_and_its_temperature(
    method, strong, classes, terms, tau
):
    config = options.settle({"method": method, "data": "x"})
    assert (config.strong, config.classes, config.tau) == (strong, classes, tau)
    assert sorted(config.terms.split(",")) == sorted(terms.split(","))


def test_a_method_sets_what_the_user_does_not():
    config = options.settle({"method": "ccd", "data": "x"})
    assert (config.strong, config.terms) == ("permutation", "con,aug,pos")
    assert options.settle({"method": "ccd", "strong": "medmix", "data": "x"}).strong == "medmix"
    assert options.settle({"method": "simclr", "data": "x"}).classes == 1
    assert options.settle({"data": "x"}).terms == pmsacl.Config.terms


def test_as_printed_sets_the_papers_readings_and_gives_way_to_options():
    given, _ = options.parse(["--as-printed", "--features", "unit"])
    config = options.settle(given)
    assert (config.features, config.aug_head, config.positive_scale) == (
        "unit",
        "projection",
        "0.5",
    )
    assert options.parse([])[0] == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "moco"}, "--method must be one of pmsacl, ccd"),
        ({"method": "simclr", "terms": "aug"}, "--terms must be a comma-separated list out of con"),
        ({"terms": "con"}, "out of ctr, pmsacl, aug, pos"),
        ({"terms": "aug,pos", "image_size": 32}, "--terms must be without pos"),
        ({"positive_scale": "nan"}, "--positive-scale must be"),
        ({"centres": "equidistant", "classes": 129}, "--classes must be 128 or below"),
        ({"method": "imagenet", "init": "random"}, "--init must be imagenet"),
        ({"method": "random", "init": "imagenet"}, "--init must be random"),
        ({"strong": "blur"}, "--strong"),
        ({"centres": "mean"}, "--centres"),
        ({"crop_area": 1.5}, "--crop-area"),
        ({"jitter": -1.0}, "--jitter"),
        ({"lesion_area": "0.5"}, "--lesion-area"),
        ({"lesion_area": "0.5,0.1"}, "--lesion-area"),
        ({"warmup_epochs": -1}, "--warmup-epochs"),
        ({"warmup_epochs": 2, "epochs": 2}, "--warmup-epochs must be below --epochs"),
        ({"warmup_epochs": 1, "terms": "ctr,pmsacl"}, "--warmup-epochs .* needs no centres"),
    ],
)
def test_impossible_settings_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        options.settle({"data": "x"} | changes)


@pytest.mark.parametrize("strong", medmix.STRONG)
def test_every_strong_set_gives_its_classes(strong):
    x = torch.rand(2, 3, 32, 32, generator=generator(0))
    config = pmsacl.Config(strong=strong, classes=3)
    augment = pmsacl.strong_set(config)
    changed, mask = augment(x, torch.full((2,), 1), generator(1))
    assert not torch.equal(changed, x) and mask.any()
    views, n, _ = pmsacl.class_views(x, config, generator(2))
    assert views.shape == (12, 3, 32, 32) and n.bincount().tolist() == [4, 4, 4]


def test_rotations_share_the_circle_among_the_classes():
    x = torch.rand(2, 3, 32, 32, generator=generator(0))
    augment = pmsacl.strong_set(pmsacl.Config(strong="rotation", classes=2))
    assert torch.equal(augment(x, torch.ones(2).long(), generator(1))[0], x.flip(2, 3))


def test_lesion_area_crop_area_and_jitter_reach_medmix():
    x = torch.rand(8, 3, 64, 64, generator=generator(0))
    ones = torch.ones(8).long()
    shares = []
    for area in ("0.01,0.02", "0.2,0.3"):
        augment = pmsacl.strong_set(pmsacl.Config(lesion_area=area))
        shares.append(float(augment(x, ones, generator(1))[1].float().mean()))
    assert shares[0] < 0.03 and 0.1 < shares[1] < 0.35
    config = pmsacl.Config(classes=1, crop_area=1.0, jitter=0.0, weak="ccd")
    flat = torch.rand(8, 3, 1, 1, generator=generator(2)).expand(8, 3, 32, 32)
    views, _, _ = pmsacl.class_views(flat, config, generator(3))
    grey = weak.luma(flat).expand_as(flat)
    for i, view in enumerate(views):  # neither cropped nor jittered; a fifth of them are grey
        assert any(torch.allclose(view, y[i // 2], atol=1e-5) for y in (flat, grey))


# --- centres -----------------------------------------------------------------------------------


def test_the_warm_up_goes_without_centres_and_resumes(tmp_path):
    config, images = tiny(warmup_epochs=1, epochs=2), pictures()
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    training = pmsacl.Pretraining(images, config)
    for _ in range(training.steps):
        assert list(training.step()) == ["aug"] and len(training.c) == 0
    training.end_epoch({})
    training.save(tmp_path / "cut/checkpoint.pt")
    learned = pmsacl.Pretraining(images, config)
    assert not torch.allclose(training.centres(), learned.centres())
    assert list(training.step()) == ["ctr", "pmsacl", "aug"] and training.c.shape == (2, 128)
    encoder, _ = pmsacl.pretrain(images, config, tmp_path / "whole")
    resumed, _ = pmsacl.pretrain(images, config, tmp_path / "cut")
    assert all(torch.equal(v, weights(resumed)[k]) for k, v in weights(encoder).items())
    rows = list(csv.DictReader((tmp_path / "whole/log.csv").read_text().splitlines()))
    assert rows[0]["ctr"] == "" and float(rows[1]["ctr"]) > 0


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


def test_settings_of_methods_are_settings_of_the_main_job():
    fields = set(pmsacl.Config.__dataclass_fields__)
    assert all(set(settings) <= fields for settings in baselines.METHODS.values())
