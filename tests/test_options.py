"""Options: what is refused, presets, methods, help."""

from __future__ import annotations

import dataclasses

import pytest

from support import options
from support.claim import Claim


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
    config = options.make_config({"method": method, "data": "x"})
    assert (config.strong, config.classes, config.tau) == (strong, classes, tau)
    assert sorted(config.terms.split(",")) == sorted(terms.split(","))


def test_the_defaults_are_the_papers_and_those_that_the_deviations_state():
    want = {
        "image_size": 256, "method": "pmsacl", "classes": 4, "tau": 0.2, "alpha": 2.0,
        "terms": "ctr,pmsacl,aug", "local_terms": "ctr,pmsacl,aug,pos", "positive_scale": "kappa",
        "features": "unit", "centre_weight": 1.0, "centres": "untrained", "warmup_epochs": 0,
        "aug_head": "backbone", "strong": "medmix", "lesion_area": "0.005,0.08", "weak": "simclr",
        "crop_area": 0.0, "jitter": 1.0, "init": "auto", "epochs": 2000, "batch_size": 32,
        "lr": 0.01, "lr_end": 1e-5, "local_lr": 0.1, "momentum": 0.9, "weight_decay": 3e-4,
        "healthy_share": 0.1, "detector": "padim", "denoise": 0.0, "paper_protocol": False,
    }  # fmt: skip
    config = options.Config()
    assert {name: getattr(config, name) for name in want} == want
    assert options.parse(["--as-printed"])[0] == {
        "positive_scale": "0.5", "aug_head": "projection", "features": "raw",
        "centre_weight": 1.0, "local_lr": 0.01,
    }  # fmt: skip


def test_the_quick_preset_is_what_the_docs_measured():
    assert options.PRESETS["quick"] == {
        "image_size": 64, "batch_size": 8, "epochs": 4, "lr": 0.03, "crop_area": 0.6,
        "jitter": 0.25, "lesion_area": "0.01,0.15", "local": "yes", "igd_epochs": 6,
        "igd_local_epochs": 2, "igd_batch_size": 8, "igd_patches": 72, "igd_lr": 1e-3,
        "igd_encoder_lr": 3e-4, "igd_warmup": 0.5, "igd_width": 8,
    }  # fmt: skip


def test_igd_has_a_local_model_above_64_pixels_or_where_it_is_asked_for():
    def local(size, detector="both", **given):
        return options.make_config(
            {"data": "x", "image_size": size, "detector": detector} | given
        ).local_igd

    assert [local(size) for size in (32, 64, 96, 256)] == [False, False, True, True]
    assert local(64, local="yes") and not local(256, local="no") and not local(256, "padim")


def test_a_method_gives_way_to_options():
    config = options.make_config({"method": "ccd", "strong": "medmix", "data": "x"})
    assert (config.strong, config.terms) == ("medmix", "con,aug,pos")


def test_as_printed_sets_the_papers_readings_and_gives_way_to_options():
    given, _ = options.parse(["--as-printed", "--features", "unit"])
    config = options.make_config(given)
    printed = (config.features, config.aug_head, config.positive_scale, config.local_lr)
    assert printed == ("unit", "projection", "0.5", 0.01)
    assert options.parse([])[0] == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "moco"}, "--method must be one of pmsacl, ccd"),
        ({"strong": "permutation", "classes": 9}, "--classes"),
        ({"epochs": 0}, "--epochs"),
        ({"igd_lr": 0.0}, "--igd-lr"),
        (
            {"method": "simclr", "terms": "aug"},
            "--terms must be a comma-separated list of some of con",
        ),
        ({"terms": "con"}, "some of ctr, pmsacl, aug, pos"),
        ({"terms": "aug,pos", "image_size": 32}, "--terms must be without pos"),
        ({"centres": "equidistant", "classes": 129}, "--classes must be 128 or below"),
        ({"method": "imagenet", "init": "random"}, "--init must be imagenet"),
        ({"method": "random", "init": "imagenet"}, "--init must be random"),
        ({"warmup_epochs": 2, "epochs": 2}, "--warmup-epochs must be below --epochs"),
        ({"warmup_epochs": 1, "terms": "ctr,pmsacl"}, "--warmup-epochs .* needs no centres"),
    ],
)
def test_impossible_settings_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        options.make_config({"data": "x"} | changes)


def test_help_names_choices_and_the_presets_values(capsys):
    with pytest.raises(SystemExit) as stop:
        options.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "[P" not in text
    assert "--features {unit,raw}" in text and "some of padim, igd, dae," in text
    assert "pixels a side, a multiple of 32 (default: 256; quick: 64)" in text
    for title in options.GROUPS:
        assert f"{title}:" in text


def test_every_option_is_in_one_group_and_igds_defaults_are_igds():
    names = [field.name for field in dataclasses.fields(options.Config)]
    starts = [names.index(first) for first in options.GROUPS.values()]
    assert starts[0] == 0 and starts == sorted(starts)
    assert options.Config().igd_lr == options.IGD.lr == 1e-4


def test_a_run_that_was_killed_before_it_had_a_config_can_be_begun_again(tmp_path):
    for name in ("config.json.partial", "run.lock"):
        (tmp_path / name).touch()
    assert options.resolve({"out": str(tmp_path)}, None)[1] == tmp_path
    Claim(tmp_path).release()
    (tmp_path / "encoder.pt").touch()
    with pytest.raises(ValueError, match="exists; add --resume"):
        options.resolve({"out": str(tmp_path)}, None)
