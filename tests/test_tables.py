"""tables.py: the paper's figures, our tables, files that are whole or absent."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from support import tables
from support.cache import digest
from support.layouts import Dataset, Sample
from support.readers import ROW_COUNTS
from support.run import read_rows, write_file


def test_the_papers_tables_have_all_their_rows():
    printed = [tables.PRINTED[f"table {number}"] for number in range(1, 11)]
    assert [len(rows) for _, _, rows in printed] == [13, 10, 12, 10, 3, 6, 6, 5, 8, 4]
    assert list(tables.PRINTED)[10:] == ["figure 6", "figure 7"]
    for data, columns, rows in printed:
        assert all(len(v) == len(columns) for v in rows.values()), data
        assert all(0 < x < 1 for v in rows.values() for x in v), data
    assert tables.PRINTED["table 1"][2]["PMSACL - PaDiM"] == (0.996, 0.966, 0.981, 0.983)
    assert tables.PRINTED["table 7"][2]["PMSACL - IGD"] == (0.516, 0.667, 0.693)
    assert tables.PRINTED["table 8"][2]["+ l_ctr"] == (0.993, 0.753)
    assert tables.PRINTED["table 9"][2]["DROC"] == (0.931, 0.954, 0.881, 0.914)
    assert tables.PRINTED["table 10"][2]["Re-estimate Centre"] == (0.985, 0.864, 0.878, 0.876)


ROW = {
    "image_auroc": 0.9, "image_auroc_interval": [0.85, 0.95],
    "specificity": 0.8, "sensitivity": 0.7, "accuracy": 0.75,
    "threshold": 1.5, "notes": ["A sentence."],
    "images": dict.fromkeys(ROW_COUNTS, 10),
    "iou": 0.4, "dice": 0.5, "pro": 0.6, "iou_sd": None, "dice_sd": None, "pro_sd": None,
    "pixel_threshold": 2.0, "best_possible": {"threshold": 2.1, "iou": 0.41, "dice": 0.51},
    "pixel_auroc": 0.95, "aupro": 0.65,
}  # fmt: skip


def result_rows(layout):
    row = ROW | {"data": {"layout": layout, "root": "somewhere"}}
    return {"padim": row, "untrained": row, "init": "random", "config": {"method": "pmsacl"}}


def test_the_papers_figure_stands_beside_ours_on_its_data_set_only():
    for layout in ("Hyper-Kvasir archive", "HyperKvasir"):
        table = tables.results_table(result_rows(layout))
        assert "| paper, Table 1: PMSACL - PaDiM | 0.996 | 0.966 | 0.981 | 0.983 |" in table
        assert "| paper, Table 6: PMSACL - PaDiM | 0.406 | 0.554 | 0.854 |  |  |" in table
        assert table.count("paper, Table") == 4 - 2  # none beside the untrained encoder
        assert table.count("- A sentence.\n") == 1  # though it is of both rows
    table = tables.results_table(result_rows("MVTec"))
    assert "paper, Table" not in table
    assert "|  | AUC | Specificity | Sensitivity | Accuracy |" in table
    assert "|  | IoU | Dice | Pro | Pro, all | pixel AUROC |" in table
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert widths == {6, 7}


@pytest.mark.parametrize(
    ("root", "config", "row", "lines"),
    [
        (
            "LAG",
            {"method": "ccd"},
            "igd",
            ["Table 2: CCD - IGD | 0.874", "Table 7: CCD - IGD | 0.509"],
        ),
        ("liu", {"method": "none"}, "padim", ["Table 3: PaDiM | 0.741"]),
        ("liu", {"method": "pmsacl"}, "dae", ["Table 3: DAE* | 0.629"]),
        ("covidx", {"method": "pmsacl"}, "msssim", ["Table 4: MS-SSIM | 0.634"]),
        ("LAG", {"method": "simclr"}, "padim", []),
        ("LAG", {"method": "pmsacl", "encoder": "runs/a"}, "padim", []),
        ("LAG", {"method": "pmsacl"}, "ocgan", []),  # not in Table 2
        ("LAG", {"method": "pmsacl"}, "panda", []),  # the paper's starts from no pre-training
        ("LAG", {"method": "none"}, "panda", ["Table 2: PANDA | 0.789"]),
        ("liu", {"method": "pmsacl"}, "adgan", ["Table 3: ADGAN* | 0.730"]),
        ("LAG", {"method": "pmsacl"}, "fanogan", ["Table 2: f-AnoGAN | 0.778"]),
        ("LAG", {"method": "none"}, "cutpaste", ["Table 2: CutPaste | 0.745"]),
        ("LAG", {}, "padim", []),
        ("polyps", {"method": "pmsacl"}, "padim", []),
    ],
)
def test_the_papers_row_is_that_of_the_images_the_pre_training_and_the_detector(
    root, config, row, lines
):
    ours = ROW | {"data": {"layout": "MVTec", "root": root}}
    table = tables.results_table({row: ours, "untrained": ours, "init": "random", "config": config})
    assert re.findall(r"\| paper, (.*? \| .*?) ", table) == lines


@pytest.mark.parametrize(
    ("layout", "folder", "name"),
    [
        ("Hyper-Kvasir archive", "images", "Hyper-Kvasir"),
        ("HyperKvasir", "kvasir", "Hyper-Kvasir"),
        ("MVTec", "hyper-kvasir", "Hyper-Kvasir"),
        ("MVTec", "colon_kvasir_patch", ""),
        ("MVTec", "LAG", "LAG"),
        ("BMAD", "lag_256", "LAG"),
        ("Hyper-Kvasir archive", "lag", "LAG"),  # its authors' code has the same folders
        ("MVTec", "flags", ""),
        ("MVTec", "covid-x", "Covid-X"),
        ("MVTec", "COVIDx_CXR", "Covid-X"),
        ("MVTec", "covid", ""),
        ("MVTec", "liu-colonoscopy", "Liu et al."),
        ("MVTec", "liuhe", ""),
    ],
)
def test_the_papers_images_are_told_by_their_folder_or_layout(layout, folder, name):
    assert tables.papers_name(Dataset(layout, Path("/x", folder), (), ())) == name
    assert not name or name in {source for source, _, _ in tables.PRINTED.values()}


def test_the_cells_of_a_table_never_split():
    text = tables.markdown_table([["", "|A| = 2"], ["a", "b|c"]])
    assert text == "|  | \\|A\\| = 2 |\n| --- | --- |\n| a | b\\|c |\n"


def test_rows_are_of_one_origin_if_data_seed_and_protocol_are_the_same():
    one, other = (Dataset("MVTec", Path(root), (), ()) for root in ("/a", "/b"))
    more = Dataset("MVTec", Path("/a"), (), (Sample(Path("/a/test/good/1.png"), 0, "good"),))
    trained = Dataset("MVTec", Path("/a"), (Path("/a/train/good/1.png"),), ())
    same = tables.origin(one, 3, False)
    source = {"layout": "MVTec", "root": "/a", "seed": 3, "paper_protocol": False}
    assert same == source | {"images": digest([], Path("/a"))}
    assert tables.origin(trained, 3, False) == same  # its test images count
    changed = [tables.origin(d, seed, False) for d, seed in ((other, 3), (one, 4), (more, 3))]
    assert all(origin != same for origin in [*changed, tables.origin(one, 3, True)])


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="not JSON compliant"):
        tables.write_results(tmp_path, result_rows("MVTec") | {"seconds": {"fit": np.nan}})
    assert not list(tmp_path.iterdir())
    rows = result_rows("MVTec")
    rows |= {"seconds": {"fit": np.float32(1.5)}, "config": {"data": Path("x")}}
    tables.write_results(tmp_path, rows)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["padim"]["image_auroc"] == rows["padim"]["image_auroc"]
    assert stored["seconds"] == {"fit": 1.5} and stored["config"] == {"data": "x"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "results.md"]

    def fails(*what):
        raise OSError(*what)

    monkeypatch.setattr(os, "fsync", lambda file: fails(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left on device: '.*results.json'"):
        write_file(tmp_path / "results.json", b"new")  # the system does not say which file
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", lambda *_: fails("disk full"))
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "results.json", b"new")
    assert (tmp_path / "results.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_scores_keep_columns_of_the_same_images_and_kinds_with_commas(tmp_path):
    samples = [Sample(Path(f"{i}.png"), i, "a, b") for i in range(2)]
    rows = {name: {"image_auroc": 1, "threshold": 0.5} for name in ("padim", "f_beta")}
    old, new = {"f_beta": np.array([0.2, 0.8])}, {"padim": np.array([0.1, 0.9])}
    split = np.zeros(2, bool)
    for scores in (old, new):
        tables.write_scores(tmp_path, samples, scores, rows, split, {})
    last = read_rows(tmp_path / "scores.csv")[1]
    assert (last["kind"], last["f_beta_score"], last["padim_score"]) == ("a, b", "0.8", "0.9")
    tables.write_scores(tmp_path, samples[::-1], new, rows, split, {})
    assert "f_beta_score" not in read_rows(tmp_path / "scores.csv")[0]


def row_of(text: str, name: str, heading: str) -> dict[str, str]:
    """Heading -> cell of a row, in the table of results.md that has this heading."""
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in cells] for cells in lines]
    first = next(i for i, cells in enumerate(table) if heading in cells)
    cells = next(cells for cells in table[first:] if cells[0] == name)
    return dict(zip(table[first], cells, strict=True))


def test_each_number_of_results_md_stands_under_its_heading():
    padim = ROW | {
        "image_auroc_mean_of_map": 0.456, "kinds": {"flat": 0.123, "round": 0.987},
        "iou_sd": 0.03, "over_untrained": {"difference": 0.1, "interval": [-0.05, 0.2]},
        "images": dict(zip(ROW_COUNTS, (1, 2, 3, 4), strict=True)),
    }  # fmt: skip
    text = tables.results_table({"padim": padim})
    assert "from 1 normal and 2 abnormal test images; measured on 3 normal and 4 abnormal" in text
    want = {"AUC": "0.900", "Specificity": "0.800", "Sensitivity": "0.700", "Accuracy": "0.750"}
    assert row_of(text, "padim", "Accuracy") == {"": "padim"} | want
    want = {"AUC": "0.900", "95% interval": "0.850 to 0.950"}
    want |= {"over untrained": "+0.100 (-0.050 to +0.200)"}
    want |= {"mean of map": "0.456", "flat": "0.123", "round": "0.987"}
    assert row_of(text, "padim", "mean of map") == {"": "padim"} | want
    want = {"IoU": "0.400 ± 0.030", "Dice": "0.500", "Pro": "0.600", "Pro, all": "0.650"}
    assert row_of(text, "padim", "IoU") == {"": "padim"} | want | {"pixel AUROC": "0.950"}
    assert (
        "- padim: an image is abnormal at a score of 1.5 or more. A pixel: at 2 or more; the best "
        "possible threshold, 2.1, gives IoU 0.410 and Dice 0.510."
    ) in text
