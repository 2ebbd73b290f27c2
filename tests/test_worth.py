"""What a number is worth: the bootstrap, trivial baselines, fake lesions, duplicates, f_beta."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import generator, picture
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
from encoder import Encoder, ResNet18
from measures import auroc
from support import worth
from support.layouts import Sample
from support.lesion_classifier import LesionClassifier


def smooth_images(count, size=32, seed=0):
    """(N, 3, S, S) uint8, each of 8 x 8 smooth blocks."""
    g = np.random.default_rng(seed)
    small = g.integers(60, 200, (count, 3, size // 8, size // 8), dtype=np.uint8)
    return small.repeat(8, axis=2).repeat(8, axis=3)


def test_what_a_number_is_worth_is_measured_at_these_sizes():
    sizes = worth.ROUNDS, worth.NEIGHBOURS, worth.THUMBNAIL, worth.FAKES, worth.FITTED, worth.ALIKE
    assert sizes == (2000, 5, 16, 300, 1000, 0.995)


# --- intervals -----------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 99), st.booleans())
def test_each_bootstrapped_auroc_is_that_of_the_resampled_images(positives, negatives, seed, ties):
    g = np.random.default_rng(seed)
    labels = g.permutation(np.r_[np.ones(positives, bool), np.zeros(negatives, bool)])
    scores = g.normal(size=len(labels)).round(1 if ties else 9)
    draws = worth.bootstrapped_aurocs([scores, -scores], labels, seed)
    assert draws.shape == (2, worth.ROUNDS)
    again = np.random.default_rng([seed, 2])  # the same draws, image by image
    counts = [again.multinomial(n, np.full(n, 1 / n), worth.ROUNDS) for n in (positives, negatives)]
    for k in (0, worth.ROUNDS - 1):
        resampled = np.r_[
            np.repeat(scores[labels], counts[0][k]), np.repeat(scores[~labels], counts[1][k])
        ]
        want = auroc(resampled, np.arange(positives + negatives) < positives)
        assert draws[0, k] == pytest.approx(want, abs=1e-5)
        assert draws[1, k] == pytest.approx(1 - want, abs=1e-5)


def test_an_interval_holds_95_percent_of_the_draws_and_narrows_with_more_images():
    g, widths = np.random.default_rng(0), []
    for n in (50, 800):
        labels = np.arange(2 * n) < n
        scores = g.normal(size=2 * n) + labels
        [draws] = worth.bootstrapped_aurocs([scores], labels, 0)
        low, high = worth.interval(draws)
        assert ((draws >= low) & (draws <= high)).mean() == pytest.approx(0.95, abs=0.01)
        assert low < auroc(scores, labels) < high
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.3)  # as the root of their number


def test_rows_get_their_interval_their_paired_difference_and_their_kinds():
    g = np.random.default_rng(1)
    labels = np.arange(300) >= 150
    kinds = np.array(["good"] * 150 + ["flat"] * 75 + ["round"] * 75)
    strong = g.normal(size=300) + 2 * (kinds == "round")
    scores = {"padim": strong, "untrained": strong + 0.1 * g.normal(size=300), "same": strong}
    test = np.arange(300) % 2 == 0
    rows = {name: {"image_auroc": auroc(s[test], labels[test])} for name, s in scores.items()}
    worth.add_worth(rows, scores, labels, test, kinds, 0, {})
    over = rows["padim"]["over_untrained"]
    difference = rows["padim"]["image_auroc"] - rows["untrained"]["image_auroc"]
    assert (
        over["difference"] == pytest.approx(difference)
        and "over_untrained" not in rows["untrained"]
    )
    low, high = over["interval"]  # paired: far narrower than the interval of either
    alone = np.ptp(rows["padim"]["image_auroc_interval"])
    assert low <= over["difference"] <= high and high - low < alone / 3
    assert rows["same"]["over_untrained"] == over
    flat = test & (kinds != "round")
    assert rows["padim"]["kinds"]["flat"] == auroc(strong[flat], labels[flat])
    assert rows["padim"]["kinds"]["round"] > 0.85 > rows["padim"]["kinds"]["flat"]
    one_kind = {"padim": {"image_auroc": 0.5}}
    names = np.where(labels, "polyp", "good")
    worth.add_worth(one_kind, {"padim": strong}, labels, test, names, 0, {})
    assert "kinds" not in one_kind["padim"]


# --- trivial baselines and duplicates ------------------------------------------------------------


def test_trivial_scores_are_distances_sizes_and_brightness(tmp_path):
    train, test = smooth_images(12), smooth_images(5, seed=1)
    samples = [Sample(picture(tmp_path / f"{i}.png", i), 0, "good") for i in range(5)]
    scores = worth.trivial_scores(train, test, samples)
    a, b = (
        np.array([
            [channel[i : i + 2, j : j + 2].mean() / 255 for channel in image
             for i in range(0, 32, 2) for j in range(0, 32, 2)]
            for image in images
        ])
        for images in (train, test)
    )  # fmt: skip
    near = scores["5 nearest neighbours on 16 x 16 pixels"]
    for i in range(5):
        distances = sorted(float(np.linalg.norm(b[i] - other)) for other in a)
        assert near[i] == pytest.approx(np.mean(distances[:5]), rel=1e-4)
    sizes = [sample.path.stat().st_size for sample in samples]
    assert scores["larger files"].tolist() == sizes
    assert scores["smaller files"].tolist() == [-size for size in sizes]
    assert scores["brighter images"] == pytest.approx(test.mean(axis=(1, 2, 3)) / 255, rel=1e-5)
    assert (scores["darker images"] == -scores["brighter images"]).all()


def test_the_best_baseline_is_named_and_the_others_are_listed():
    labels = np.arange(40) >= 20
    baselines = {"noise": np.arange(40) % 7.0, "perfect": labels.astype(float)}
    row, scores = evaluation.best_baseline(baselines, labels, seed=0, paper_protocol=False)
    assert row["baseline"] == "perfect" and row["image_auroc"] == 1
    assert set(row["baselines"]) == {"noise", "perfect"} and scores is baselines["perfect"]


def test_near_duplicates_are_copies_brighter_noisier_or_resized_and_nothing_else():
    train, test = smooth_images(30), smooth_images(20, seed=1)
    assert worth.near_duplicates(train, test) == []
    g = np.random.default_rng(0)
    noisy = np.clip(train[7].astype(int) + g.integers(-6, 7, train[7].shape), 0, 255)
    test[3], test[11] = noisy.astype(np.uint8), train[0] + 5
    assert worth.near_duplicates(train, test) == [(3, 7), (11, 0)]


def test_one_test_image_is_compared_with_the_mean_of_the_training_images():
    train = np.random.default_rng(3).integers(0, 256, (20, 3, 16, 16)).astype(np.uint8)
    assert worth.near_duplicates(train, train[4:5]) == [(0, 4)]


def test_thumbnails_are_means_of_blocks():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    blocks = images.reshape(2, 3, 16, 2, 16, 2).mean(axis=(3, 5)) / 255
    assert worth.thumbnails(images).numpy() == pytest.approx(blocks.reshape(2, -1), abs=1e-6)


# --- fake lesions and f_beta ---------------------------------------------------------------------


def test_fake_lesions_measure_what_medmix_pastes(monkeypatch):
    images, backbone = smooth_images(16), ResNet18(generator(0)).eval()
    seen = []

    def unchanged(x, n, generator, *, classes):
        seen.append((len(x), n.tolist(), classes))
        mask = torch.zeros(len(x), 1, 32, 32, dtype=torch.bool)
        mask[:, :, :8, :8] = True
        return x, mask

    monkeypatch.setattr(worth, "medmix", unchanged)
    nothing = worth.fake_lesions(backbone, images, seed=0)
    assert nothing["image_auroc"] == 0.5  # the same images twice: every score is tied
    assert seen == [(8, [1, 2, 3, 1, 2, 3, 1, 2], 4)]

    def blots(x, n, generator, *, classes):
        x_n, mask = unchanged(x, n, generator, classes=classes)
        return torch.where(mask, torch.tensor([1.0, 0.0, 1.0])[:, None, None], x_n), mask

    monkeypatch.setattr(worth, "medmix", blots)
    found = worth.fake_lesions(backbone, images, seed=0)
    assert found["image_auroc"] > 0.9 and found["aupro"] > nothing["aupro"] + 0.3


def test_fake_lesions_want_four_images():
    with pytest.raises(ValueError, match="4 healthy images or more, got 3"):
        worth.fake_lesions(ResNet18(), torch.zeros(3, 3, 32, 32, dtype=torch.uint8), seed=0)
    assert worth.fake_lesions(ResNet18(), smooth_images(4), seed=0)


def test_fake_lesions_repeat_and_leave_the_network_alone():
    images, backbone = smooth_images(16), ResNet18(generator(0)).eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    first = worth.fake_lesions(backbone, images, seed=3)
    assert worth.fake_lesions(backbone, images, seed=3) == first
    assert set(first) == {"image_auroc", "aupro"}
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("aug_head", ["backbone", "projection"])
def test_f_beta_scores_one_minus_the_probability_of_no_lesion(aug_head, tmp_path):
    encoder = Encoder(classes=3, aug_head=aug_head, features="raw", generator=generator(1)).eval()
    images = smooth_images(9)
    maps, scores = LesionClassifier(encoder).score(images)
    with torch.no_grad():
        logits = encoder.aug_logits(*encoder.embed(torch.from_numpy(images) / 255)).double()
    odds = logits.exp()
    assert maps is None
    torch.testing.assert_close(scores.double(), 1 - odds[:, 0] / odds.sum(dim=1), rtol=0, atol=1e-5)
    LesionClassifier(encoder).save(tmp_path / "detector_f_beta.pt")
    loaded = evaluation.load(tmp_path / "detector_f_beta.pt")
    assert torch.equal(loaded.score(images)[1], scores)
    in_parts = torch.cat([loaded.score(images[k : k + 4])[1] for k in (0, 4, 8)])
    torch.testing.assert_close(in_parts, scores, rtol=0, atol=1e-6)


def test_fake_lesions_are_scored_on_images_that_were_not_fitted(monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, backbone, *, seed):
            self.device, self.score = torch.device("cpu"), self.fit
            seen.append([seed])

        def fit(self, images):
            x = torch.as_tensor(images).float()
            ids = x[:, 0, 0, 0] * (255 if x.max() <= 1 else 1)
            seen[-1].append(ids.round().int().tolist())
            return self if len(seen[-1]) == 2 else (x[:, 0], x[:, 0, 0, 0])

    def unchanged(x, n, draws, *, classes):
        seen[-1].append(draws.initial_seed())
        return x, torch.arange(32 * 32).view(1, 1, 32, 32).repeat(len(x), 1, 1, 1) < 9

    monkeypatch.setattr(worth, "PaDiM", Recorder)
    monkeypatch.setattr(worth, "medmix", unchanged)
    images = np.arange(10, 30, dtype=np.uint8)[:, None, None, None].repeat(3, 1)
    images = images.repeat(32, 2).repeat(32, 3)
    for seed in (0, 1):
        worth.fake_lesions(None, images, seed=seed)
    for (seed, fitted, _, held, again), wanted in zip(seen, (0, 1), strict=True):
        assert seed == wanted and held == again and len(held) == 10
        assert sorted(fitted + held) == list(range(10, 30))  # each on one side, in order
    assert seen[0][1] != seen[1][1] and seen[0][2] != seen[1][2]  # both draws follow the seed
    monkeypatch.setattr(worth, "FAKES", 3)
    monkeypatch.setattr(worth, "FITTED", 5)
    worth.fake_lesions(None, images, seed=0)
    assert len(seen[-1][3]) == 3 and len(seen[-1][1]) == 5


def test_near_duplicates_correlate_above_the_limit_after_the_mean_training_image():
    g = np.random.default_rng(3)
    outline = g.integers(0, 2, (3, 16, 16)) * 150  # what all images share; thumbnails of themselves
    train = (outline + g.integers(0, 60, (20, 3, 16, 16))).astype(np.uint8)
    noise = g.normal(size=(12, 3, 16, 16)) * np.linspace(0.5, 9, 12)[:, None, None, None]
    test = np.clip(train[:12] + noise, 0, 255).round().astype(np.uint8)
    marked = train + 30 * g.integers(0, 2, (3, 16, 16)).astype(np.uint8)  # and no training image
    mean = train.reshape(20, -1).mean(axis=0)

    def correlated(test):
        pairs = zip(test, train, strict=False)
        return [np.corrcoef(b.ravel() - mean, a.ravel() - mean)[0, 1] for b, a in pairs]

    r = correlated(test)
    assert min(r) < 0.9 and sum(0.97 < v < 0.995 for v in r) > 1 and max(correlated(marked)) < 0.9
    assert worth.near_duplicates(train, test) == [(i, i) for i in range(12) if r[i] > 0.995]
    assert worth.near_duplicates(train, marked) == []
