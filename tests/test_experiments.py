"""Tables as commands: rows, reuse and resume of runs, what a table and a chart show."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import experiments
from support import layouts, sheets, tables
from support.cache import digest
from support.compared import COMPARED
from support.options import PRESETS, Config, make_config
from support.rows import ROWS, Row, read_sweep, rows_of, with_more
from support.run import read_rows

OPTIONS = "--image-size 32 --batch-size 4 --epochs 1 --classes 2 --init random".split()


def config(**changes):
    common = {"data": "/x/kvasir", "device": "cpu", "image_size": 32, "init": "random"}
    return make_config(common | changes)


def finished(out: Path, settings: Config, auroc: float, log: str = "") -> Path:
    """A run folder as the main job leaves it."""
    folder = experiments.folder_of(settings, out)
    folder.mkdir(parents=True)
    content = {f: getattr(settings, f) for f in Config.__dataclass_fields__}
    (folder / "config.json").write_text(json.dumps(content | {"out": str(folder)}))
    row = {"image_auroc": auroc, "specificity": 0.5, "sensitivity": 0.6, "accuracy": 0.7}
    (folder / "results.json").write_text(json.dumps({"padim": row, "seconds": {"pretrain": 90.0}}))
    if log:
        (folder / "log.csv").write_text(log)
    return folder


# --- rows ---------------------------------------------------------------------------------------


def test_every_row_of_the_papers_tables_is_a_setting_that_the_main_job_takes():
    for name, options in ROWS.items():
        rows = rows_of(name, options, {"data": "x", "device": "cpu"}, 2)
        ours = [row for row in rows if row.configs]
        assert [row.name for row in ours] == list(options)
        assert [c.seed for c in ours[0].configs] == [0, 1]
    for number in (8, 9, 10):
        assert set(tables.PRINTED[f"table {number}"][2]) <= set(ROWS[f"table {number}"])
    assert set(tables.PRINTED["figure 6"][2]) <= set(ROWS["figure 6"])


def test_rows_of_table_8_differ_by_what_they_are_called():
    rows = rows_of("table 8", ROWS["table 8"], {"data": "x"}, 1)
    settings = [vars(row.configs[0]) for row in rows]
    changed = [{k for k in a if a[k] != b[k]} for a, b in zip(settings, settings[1:], strict=False)]
    assert changed[0] == {"strong"}
    assert changed[1] == {"method", "terms", "local_terms", "alpha"}
    assert changed[2:] == [{"terms"}, {"alpha"}]
    assert settings[3]["alpha"] == 1 and settings[4]["alpha"] == Config.alpha


COMPARED_TABLES = (1, 2, 3, 4, 6, 7)


@pytest.mark.parametrize("number", COMPARED_TABLES)
def test_the_papers_figures_stand_beside_ours_on_the_papers_images_alone(number):
    name = f"table {number}"
    source, columns, printed = tables.PRINTED[name]
    for data_set in (source, "", "another"):
        rows = rows_of(name, ROWS[name], {"data": "x", "init": "random"}, 1, data_set)
        assert [row.name for row in rows] == list(ROWS[name])
        assert len(rows) == (6 if number > 4 else 13)
        figures = {row.name: tuple(row.paper.values()) for row in rows if any(row.paper.values())}
        starless = {row.removesuffix("*"): figures for row, figures in printed.items()}
        assert figures == (starless if data_set == source else {})
        text = sheets.write(name, rows, {}, "x", None)
        assert text.count("paper: ") == (len(columns) + 1 if data_set == source else 0)
        assert text.count("| not run |") == len(rows)


def test_rows_of_one_pretraining_are_one_run_and_table_6_adds_none(tmp_path):
    shared = {"data": "x", "init": "random"}
    rows = [*rows_of("table 1", ROWS["table 1"], shared, 1)]
    folders = {row.name: experiments.folder_of(row.configs[0], tmp_path) for row in rows}
    assert len(set(folders.values())) == 11
    for method in ("CCD", "PMSACL"):
        assert folders[f"{method} - PaDiM"] == folders[f"{method} - IGD"]
    assert [row.detector for row in rows[-6:]] == ["padim"] * 3 + ["igd"] * 3
    assert {row.detector for row in rows[:7]} == set(COMPARED)
    assert all(r.detector == r.name.lower().replace("-", "") for r in rows[:7])
    for row in rows_of("table 6", ROWS["table 6"], shared, 1):
        assert experiments.folder_of(row.configs[0], tmp_path) == folders[row.name]
    other = rows_of("table 1", ROWS["table 1"], shared | {"epochs": 3, "lr": 0.5}, 1)
    same = {r.name for r in other if experiments.folder_of(r.configs[0], tmp_path) in
            folders.values()}  # fmt: skip
    assert same == {row.name for row in rows} - {r.name for r in rows if " - " in r.name}
    assert all(row.configs[0].method == "none" for row in rows if row.name in same)


def test_further_options_of_single_rows_come_from_a_file(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text("DAE --detector-epochs 7\n'CCD - IGD' --igd-epochs 3\n")
    more = with_more(ROWS["table 1"], read_sweep(file))
    rows = {row.name: row.configs[0] for row in rows_of("table 1", more, {"data": "x"}, 1)}
    assert rows["DAE"].detector_epochs == 7 and rows["OCGAN"].detector_epochs == 0
    assert rows["CCD - IGD"].igd_epochs == 3 != rows["PMSACL - IGD"].igd_epochs
    assert with_more(ROWS["table 9"], {}) == ROWS["table 9"]
    [row] = rows_of("s", with_more({"a": "--alpha 3"}, {"a": "--alpha 4"}), {"data": "x"}, 1)
    assert row.configs[0].alpha == 4  # the single row's options win


def test_a_table_shows_the_papers_detector_unless_told():
    def shown(name, **options):
        [row] = rows_of(name, {"medmix": ""}, {"data": "x"} | options, 1)[:1]
        return row.configs[0].detector, row.detector

    assert shown("figure 7") == ("padim", "padim") and shown("figure 6") == ("igd", "igd")
    assert shown("table 9") == ("padim", "padim") and shown("table 10") == ("igd", "igd")
    assert shown("figure 6", detector="padim") == ("padim", "padim")
    assert shown("figure 6", detector="both") == ("both", "igd")
    assert shown("figure 7", detector="both") == ("both", "padim")
    assert shown("figure 7", detector="dae,igd") == ("dae,igd", "dae")


def test_options_of_a_row_win_over_those_of_all():
    rows = rows_of("table 9", ROWS["table 9"], {"init": "random"}, 1)
    by_name = {row.name: row.configs[0] for row in rows}
    assert by_name["ImageNet"].init == "imagenet" and by_name["CSI"].init == "random"


def test_the_rows_of_table_9_and_figure_7_are_what_they_are_called_whatever_all_rows_have():
    common = {"data": "x", "init": "random", "strong": "cutout", "classes": 5}
    rows = rows_of("table 9", ROWS["table 9"], common, 1)
    got = {row.name: (row.configs[0].strong, row.configs[0].classes) for row in rows}
    assert got["SimCLR"][1] == 1 and got["PMSACL"] == got["SupCon"] == ("cutout", 5)
    assert got["Rot-Net"] == got["CSI"] == got["DROC"] == ("rotation", 5)
    assert got["CCD"] == ("permutation", 5)
    rows = rows_of("figure 7", ROWS["figure 7"], common, 1)
    assert {row.name: row.configs[0].classes for row in rows if row.configs} == {
        f"|A| = {k}": k for k in range(1, 9)
    }


def test_all_healthy_images_train_in_a_table_unless_told_otherwise():
    def share(**given):
        return rows_of("table 9", {"PMSACL": ""}, {"data": "x"} | given, 1)[0].configs[0]

    assert share().healthy_share == 0 and share(healthy_share=0.2).healthy_share == 0.2


def test_an_impossible_row_is_named_before_anything_runs():
    with pytest.raises(ValueError, match="table 9, row SimCLR: --terms"):
        rows_of("table 9", {"SimCLR": "--method simclr"}, {"terms": "aug"}, 1)


def test_a_sweep_is_a_name_and_options_a_line(tmp_path):
    file = tmp_path / "settings.txt"
    file.write_text("# what decides R20\nplain\n\nraw   --features raw --alpha 5  # collapses\n")
    assert read_sweep(file) == {"plain": "", "raw": "--features raw --alpha 5"}


# --- runs ---------------------------------------------------------------------------------------


def test_runs_are_found_again_by_their_settings(tmp_path):
    a = config()
    folder = finished(tmp_path, a, 0.5)
    assert experiments.folder_of(a, tmp_path) == folder
    again = {name: getattr(a, name) for name in PRESETS["quick"]}  # what the preset would change
    same = config(**{"out": "elsewhere", "preset": "quick"} | again)
    assert experiments.folder_of(same, tmp_path) == folder
    for other in (config(seed=1), config(alpha=3.0), config(data="/x/lag"), config(data="")):
        assert experiments.folder_of(other, tmp_path) != folder
    saved = json.loads((folder / "config.json").read_text())
    del saved["lesion_area"]  # a run from before the option had what is its default now
    (folder / "config.json").write_text(json.dumps(saved))
    assert experiments.folder_of(a, tmp_path) == folder
    assert experiments.folder_of(config(lesion_area="0.01,0.02"), tmp_path) != folder
    assert experiments.folder_of(config(igd_epochs=3, local="no"), tmp_path) == folder  # PaDiM
    igd = finished(tmp_path, config(detector="igd"), 0.5)
    assert igd != folder and experiments.folder_of(config(detector="igd"), tmp_path) == igd
    assert experiments.folder_of(config(detector="igd", igd_epochs=3), tmp_path) != igd


def test_a_run_without_pre_training_is_reused_for_the_same_start_and_the_same_detectors(tmp_path):
    def folder(**changes):
        return experiments.folder_of(config(method="none", **changes), tmp_path)

    assert folder() == folder(alpha=3.0, epochs=7, strong="rotation")  # what pre-trains
    for changes in ({"init": "/w/a.pt"}, {"healthy_share": 0.3}, {"encoder": "/runs/a"}):
        assert folder() != folder(**changes), changes
    assert folder(init="/w/a.pt") != folder(init="/w/b.pt")
    quick = {name: getattr(config(), name) for name in PRESETS["quick"]}
    assert folder(preset="quick", **quick, detector_epochs=3) == folder()  # PaDiM has none of them
    dae = folder(detector="dae")
    for changes in ({"detector_epochs": 3}, {"detector_lr": 0.1}, {"denoise": 0.1}):
        assert folder(detector="dae", **changes) != dae, changes
    assert folder(detector="dae", preset="quick", **quick) != dae  # it has settings of its own


def test_a_run_with_other_images_is_not_shown_as_one_with_these(phantoms, tmp_path):
    this = config(data=str(phantoms), preset="quick")
    experiments.check_images(this, tmp_path)  # nothing has been run
    files = layouts.discover(phantoms).images
    saved = dataclasses.asdict(this) | {"images": digest(files, phantoms)}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(saved))
    experiments.check_images(this, tmp_path)
    (folder / "config.json").write_text(json.dumps(saved | {"images": "of another day"}))
    with pytest.raises(ValueError, match="run: a run with other images than .*phantom holds now"):
        experiments.check_images(this, tmp_path)


def test_means_and_deviations_are_over_the_seeds(tmp_path):
    log = "epoch,spread,accuracy\n1,0.5,0.25\n2,0.03,0.75\n"
    for seed, auroc in enumerate((0.6, 0.7, 0.8)):
        finished(tmp_path, config(seed=seed), auroc, log)
    [row] = experiments.filled(rows_of("s", {"a": ""}, vars(config()), 3), tmp_path)
    mean, sd = row.value("image_auroc")
    assert mean == pytest.approx(0.7) and sd == pytest.approx(0.1)
    assert row.value("pretext")[0] == 0.75 and row.value("spread")[0] == pytest.approx(0.03)
    assert row.value("minutes")[0] == 1.5 and row.value("aupro") is None


def test_a_row_has_the_minutes_of_its_detector_and_the_auroc_of_fake_lesions(tmp_path):
    folder = finished(tmp_path, config(), 0.5)
    results = json.loads((folder / "results.json").read_text())
    seconds = {"pretrain": 60.0, "padim": 30.0, "igd": 600.0, "dae": 600.0, "evaluate": 30.0}
    results |= {"seconds": seconds, "fake_lesions": {"image_auroc": 0.7, "aupro": 0.2}}
    (folder / "results.json").write_text(json.dumps(results))
    result = experiments.result_of(config(), "padim", tmp_path)
    assert (result["minutes"], result["fake_lesions"]) == (2, 0.7)


@pytest.mark.parametrize("names", [("base", "raw"), ("raw", "base"), ("first", "other")])
def test_rows_are_compared_with_base_or_the_first_on_the_same_seeds(names, tmp_path):
    settings = {"base": "", "raw": "--features raw", "first": "", "other": "--features raw"}
    rows = rows_of("s", {n: settings[n] for n in names}, vars(config()), 3)
    reference, other = sorted(rows, key=lambda row: row.name)
    for seed, auroc in {1: 0.6, 2: 0.7}.items():
        finished(tmp_path, reference.configs[seed], auroc)
    for seed, auroc in {0: 0.9, 1: 0.61}.items():
        finished(tmp_path, other.configs[seed], auroc)
    results = experiments.filled(rows, tmp_path)
    reference, other = sorted(results, key=lambda row: row.name)
    assert other.value("gain") == (pytest.approx(0.01), None)  # seed 1 is all that both have
    assert reference.value("gain") is None and len(other.results) == 2
    assert f"| AUC over {reference.name} |" in sheets.markdown("s", "t", results)


def test_a_damaged_config_among_the_runs_is_named(tmp_path, capsys):
    (tmp_path / "runs/bad").mkdir(parents=True)
    (tmp_path / "runs/bad/config.json").write_text("{")
    assert experiments.main(["--table", "9", "--show", "--out", str(tmp_path / "runs")]) == 2
    assert "bad/config.json: damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["{}", '{"padim": []}', '{"padim": {"image_auroc": "x"}}', '{"padim": {}}']
)
def test_a_run_with_damaged_results_is_named(text, tmp_path):
    folder = finished(tmp_path, config(), 0.5)
    assert experiments.result_of(config(), "padim", tmp_path)
    (folder / "results.json").write_text(text)
    with pytest.raises(ValueError, match=f"{folder}: results.json or log.csv is damaged"):
        experiments.result_of(config(), "padim", tmp_path)


def test_tables_of_two_data_sets_do_not_overwrite_each_other(tmp_path):
    for data in ("/x/images", "/y/images"):
        common = {"data": data, "skip_bad": True}
        rows = rows_of("s", {"a": ""}, common, 1)
        assert "`--skip-bad`" in sheets.write("s", rows, common, "images", tmp_path)
    assert len(list(tmp_path.glob("*.md"))) == 2


def test_tables_whose_rows_have_other_options_do_not_overwrite_each_other(tmp_path):
    """--rows changes single rows of a table."""
    for more in ({}, {"PMSACL": "--alpha 3"}):
        rows = rows_of("table 9", with_more(ROWS["table 9"], more), {"data": "x"}, 1)
        sheets.write("table 9", rows, {"data": "x"}, "x", tmp_path)
    assert len(list(tmp_path.glob("table9-x-*.md"))) == 2


def test_the_time_left_is_that_of_the_finished_runs(tmp_path):
    rows = rows_of("s", {"a": "", "b": "--alpha 3", "c": "--alpha 4"}, vars(config()), 2)
    assert experiments.time_left(rows, tmp_path) == ""
    for row, seconds in zip(rows[:2], (60.0, 300.0), strict=True):
        folder = finished(tmp_path, row.configs[0], 0.5)
        results = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps(results | {"seconds": {"all": seconds}}))
    text = experiments.time_left(rows, tmp_path)
    assert text == ", about 12 min 00 s left for all"  # 1 of a, 5 of b, two of 3 each
    quick = rows_of(
        "t", {"r": "--method random --init random", "b": "--alpha 3"}, vars(config()), 2
    )
    finished(tmp_path, quick[0].configs[0], 0.5)
    text = experiments.time_left(quick, tmp_path)
    assert text == ", about 6 min 30 s left for all"  # 90 s of r, 300 s of b
    nothing_trained = quick[:1] + rows_of("u", {"d": "--alpha 5"}, vars(config()), 2)
    assert experiments.time_left(nothing_trained, tmp_path) == ""
    assert experiments.time_left(quick[:1], tmp_path) == ", about 1 min 30 s left for all"


def test_trivial_baselines_are_the_last_row_and_not_of_tables_of_localisation(tmp_path):
    rows = rows_of("s", {"a": "", "b": "--alpha 3"}, vars(config()), 2)
    for seed, auroc in enumerate((0.6, 0.7)):
        folder = finished(tmp_path, rows[1].configs[seed], 0.5)
        results = json.loads((folder / "results.json").read_text())
        trivial = {"image_auroc": auroc, "image_auroc_interval": [auroc - 0.1, auroc + 0.1]}
        trivial |= {"accuracy": 0.7, "baseline": ("darker images", "larger files")[seed]}
        trivial |= {"specificity": 0.4, "sensitivity": 0.8}
        (folder / "results.json").write_text(json.dumps(results | {"trivial": trivial}))
    *_, last = done = experiments.filled(rows, tmp_path)
    assert last.name == "trivial" and last.value("image_auroc")[0] == pytest.approx(0.65)
    rates = [last.value(name)[0] for name in ("specificity", "sensitivity", "accuracy")]
    assert rates == pytest.approx([0.4, 0.8, 0.7])
    text = sheets.markdown("s", "t", done)
    assert "| trivial | 2 | 0.650 ± 0.071 | 0.550 to 0.750 |" in text
    assert "without a network: darker images, or larger files" in text
    assert sheets.runs_csv(done).splitlines()[-1].startswith("trivial,1,0.7,")
    assert sheets.shown("table 6", done) == done[:2] and sheets.shown("table 1", done) == done


def test_a_failing_row_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    tried = []

    def job(settings, folder):
        tried.append((settings.alpha, settings.seed))
        if settings.alpha == 3:
            raise ValueError("no weights")
        finished(tmp_path, settings, 0.5)

    monkeypatch.setattr(experiments, "run_job", lambda settings, out, keep: job(settings, out))
    rows = rows_of("s", {"a": "--alpha 3", "b": "--alpha 4"}, vars(config()), 2)
    rows.append(Row("paper: c", "", (), "", {}))  # as in Table 5: nothing to run
    last = list(experiments.carry_out("s", rows, tmp_path, False))[-1]
    assert tried == [(3, 0), (4, 0), (4, 1)]  # a seed of all rows before the next seed
    assert [len(row.results) for row in last] == [0, 2, 0] and last[0].failure == "no weights"
    text = sheets.markdown("s", "t", last)
    assert "| a | 0 | not run |" in text and "a failed: no weights" in text
    (tmp_path / "s.txt").write_text("a --alpha 3\nb --alpha 4\n")
    command = ["--sweep", str(tmp_path / "s.txt"), "--out", str(tmp_path / "out"), "--seeds", "1"]
    assert experiments.main(command) == 1


def test_the_command_runs_what_is_missing_and_reuses_the_rest(phantoms, tmp_path, capsys):
    sweep, out = tmp_path / "pair.txt", tmp_path / "out"
    sweep.write_text("plain\nnothing --method random\n")
    command = ["--sweep", str(sweep), "--data", str(phantoms), "--seeds", "1", "--out", str(out)]
    assert experiments.main([*command, *OPTIONS, "--show"]) == 0
    assert "| plain | 0 | not run |" in capsys.readouterr().out and not out.exists()
    assert experiments.main([*command, *OPTIONS]) == 0
    assert "| plain | 1 | " in capsys.readouterr().out
    runs = sorted(out.glob("*/results.json"))
    before = [file.stat().st_mtime_ns for file in runs]
    assert len(runs) == 2
    runs[0].unlink()  # as if it had been cut off before its end
    assert experiments.main([*command, *OPTIONS]) == 0
    after = [file.stat().st_mtime_ns for file in sorted(out.glob("*/results.json"))]
    assert after[0] != before[0] and after[1] == before[1]
    decoded = {file.name for file in (out / "cache").glob("*.u8")}
    assert decoded and decoded == {file.name for file in out.glob("*/cache/*.u8")}
    written = sorted(file.suffix for file in out.glob("pair-phantom-*"))
    assert written == [".csv", ".csv", ".md", ".png"]
    files = sorted(out.glob("pair-phantom-*.csv"), key=lambda f: "-runs" in f.name)
    table, of_runs = map(read_rows, files)
    assert [line["row"] for line in table] == ["plain", "nothing", "trivial"]
    assert float(table[0]["image_auroc_mean"]) >= 0 and table[0]["image_auroc_sd"] == ""
    assert [(line["row"], line["seed"]) for line in of_runs] == [
        ("plain", "0"), ("nothing", "0"), ("trivial", "0"),
    ]  # fmt: skip
    assert of_runs[0]["image_auroc"] == table[0]["image_auroc_mean"] and of_runs[0]["aupro"]
    assert not list(out.glob("*/checkpoint*.pt")) and len(list(out.glob("*/encoder.pt"))) == 2
    sweep.write_text("plain\n")
    command[command.index("1")] = "2"
    assert experiments.main([*command, *OPTIONS, "--keep"]) == 0
    kept = {file.parent.name[-1] for file in out.glob("*/checkpoint.pt")}
    assert kept == {"1"}  # of the new seed's run
    for file in out.glob("*/config.json"):  # as if they had been run on other images
        file.write_text(json.dumps(json.loads(file.read_text()) | {"images": "other"}))
    stamps = {file: file.stat().st_mtime_ns for file in out.glob("pair-phantom-*")}
    for more in ([], ["--show"]):
        assert experiments.main([*command, *OPTIONS, *more]) == 2
        assert "a run with other images than" in capsys.readouterr().err
    assert stamps == {file: file.stat().st_mtime_ns for file in out.glob("pair-phantom-*")}


# --- tables ---------------------------------------------------------------------------------------


def test_the_papers_figure_stands_beside_ours(tmp_path):
    base = vars(config()) | {"seed": 0}
    finished(tmp_path, config(), 0.6123)
    rows = rows_of("table 9", {"PMSACL": ""}, base, 1)
    lines = sheets.markdown("table 9", "t", experiments.filled(rows, tmp_path)).splitlines()
    head = lines[2].split(" | ")
    assert head[1:4] == ["seeds", "AUC", "paper: AUC"]
    assert lines[4].startswith("| PMSACL | 1 | 0.612 | 0.996 |")


@pytest.mark.parametrize(
    ("name", "want"),
    [
        (
            "table 1",
            {"AUC": "0.910", "95% interval": "0.800 to 0.950", "Specificity": "0.700",
             "Sensitivity": "0.600", "Accuracy": "0.650"},
        ),
        (
            "table 6",
            {"IoU": "0.300", "Dice": "0.400", "Pro": "0.500", "AUPRO": "0.550",
             "pixel AUROC": "0.930"},
        ),
        (
            "table 9",
            {"AUC": "0.910", "AUC of fake lesions": "0.750", "f_beta's accuracy": "0.850",
             "spread of z": "0.040", "AUPRO": "0.550", "pixel AUROC": "0.930"},
        ),
    ],
)  # fmt: skip
def test_each_measure_stands_under_its_heading(name, want):
    result = {
        "image_auroc": 0.91, "interval_low": 0.8, "interval_high": 0.95, "specificity": 0.7,
        "sensitivity": 0.6, "accuracy": 0.65, "iou": 0.3, "dice": 0.4, "pro": 0.5,
        "pixel_auroc": 0.93, "aupro": 0.55, "fake_lesions": 0.75, "pretext": 0.85, "spread": 0.04,
        "minutes": 2.0, "seed": 0,
    }  # fmt: skip
    row = Row("a", "", (config(),), "padim", {}, (result,))
    lines = sheets.markdown(name, "t", [row]).splitlines()
    heads, cells = ([cell.strip() for cell in lines[k].split("|")[1:-1]] for k in (2, 4))
    table = dict(zip(heads, cells, strict=True))
    assert want | {"minutes a run": "2.000", "seeds": "1"} == {
        head: table[head] for head in (*want, "minutes a run", "seeds")
    }


@pytest.mark.parametrize(
    ("name", "heading", "values", "printed", "axis", "title"),
    [
        ("table 1", "AUC", [0.91], True, "image AUROC", "anomaly detection on x"),
        ("table 6", "IoU", [0.3], True, "IoU", "anomaly localisation on x"),
        ("table 5", "AUC", [0.91], False, "image AUROC", "PaDiM on x"),  # deviations
    ],
)
def test_the_chart_of_a_table_shows_its_first_measure_beside_the_papers(
    name, heading, values, printed, axis, title, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(sheets, "dot_chart", lambda *given, **more: seen.append((*given, more)))
    monkeypatch.setattr(sheets, "png", lambda _: b"")
    result = {"image_auroc": 0.91, "iou": 0.3, "dice": 0.4, "minutes": 2.0, "seed": 0}
    row = Row("PMSACL", "", (config(),), "padim", {heading: 0.25}, (result,))
    sheets.write(name, [row], {}, "x", tmp_path)
    [(dots, diamonds, more)] = seen
    assert dots == {"PMSACL": values} and more["axis"] == axis and title in more["title"]
    assert diamonds == ({f"paper: {heading}": {"PMSACL": 0.25}} if printed else {})


def test_table_5_shows_the_papers_deviations_as_rows():
    rows = rows_of("table 5", ROWS["table 5"], {"data": "x"}, 5)
    text = sheets.markdown("table 5", "t", rows)
    assert "| paper: LAG |" in text and "0.0163" in text


def test_rows_on_liu_et_al_have_the_papers_64_pixels_unless_told_otherwise():
    def side(data_set: str, **given) -> int:
        common = {"data": "x", "preset": "paper"} | given
        return rows_of("table 3", ROWS["table 3"], common, 1, data_set)[0].configs[0].image_size

    assert (side("Liu et al."), side("LAG"), side("Liu et al.", image_size=128)) == (64, 256, 128)
