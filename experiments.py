"""The paper's ablations, and lists of settings, as commands: each row is some runs of pmsacl.py.

    python experiments.py --table 9 --data ./kvasir --seeds 5
    python experiments.py --table 5 8 --figure 7 --data ./kvasir --seeds 2 --preset quick
    python experiments.py --sweep settings.txt --data ./kvasir --epochs 20

Options that are not listed by --help are pmsacl.py's and hold for every run. Finished runs with
the same settings are reused, by other tables too, and the same command given again resumes a run
that was cut off. The tables are written again after each run, as .md, .csv and .png.

Not here: what a run does (support/job.py), its measures, the paper's numbers (support/tables.py).
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baselines.strong import STRONG
from support import layouts
from support.claim import claimed
from support.compared import deciding
from support.figures import dot_chart, png
from support.job import main_job
from support.options import Config, make_config, parse
from support.progress import complain, quietly, say
from support.run import Parser, encoded, make_folder, read_json, read_text, write_file
from support.tables import PRINTED, markdown_table

# Rows: the paper's name -> options. Table 8 starts from CCD as its caption has it, with eq. 9's
# term, and keeps that term, so that a row differs from the one above only by its name. Its third
# row keeps eq. 6's centring, part of l_PMSACL: without it and kappa, l_PMSACL is CCD's own loss.
ROWS: dict[str, dict[str, str]] = {
    "table 5": {"PMSACL": ""},
    "table 8": {
        "CCD": "--method ccd",
        "+ MedMix": "--method ccd --strong medmix",
        "+ l_PMSACL": "--terms pmsacl,aug,pos --alpha 1",
        "+ l_ctr": "--terms ctr,pmsacl,aug,pos --alpha 1",
        "+ kappa(n, m)": "--terms ctr,pmsacl,aug,pos",
    },
    "table 9": {
        "random weights": "--method random --init random",
        "ImageNet": "--method imagenet --init imagenet",
        "SimCLR": "--method simclr --classes 1",
        "Rot-Net": "--method rotnet --strong rotation",
        "CSI": "--method csi --strong rotation",
        "DROC": "--method droc --strong rotation",
        "SupCon": "--method supcon",
        "CCD": "--method ccd --strong permutation",
        "PMSACL": "",
    },
    "table 10": {
        "Random Centre": "--centres random",
        "Equidistant Centre": "--centres equidistant",
        "Re-estimate Centre": "--centres re-estimated",
        "Centres from untrained encoder": "",
    },
    "figure 6": {name: f"--strong {name}" for name in STRONG},
    "figure 7": {f"|A| = {k}": f"--classes {k}" for k in range(1, 9)},
}
DETECTOR = {"table 10": "igd", "figure 6": "igd"}  # of the paper, where it is not PaDiM
MEASURES = {  # in results.json or log.csv -> heading
    "image_auroc": "AUC",
    "gain": "AUC over",  # that of `reference`, seed by seed, so on the same test images
    "specificity": "Specificity",
    "sensitivity": "Sensitivity",
    "accuracy": "Accuracy",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "pretext": "f_beta's accuracy",
    "spread": "spread of z",
    "minutes": "minutes a run",  # of the last process only, if the run was resumed
}


@dataclass(frozen=True)
class Row:
    """One line of a table: its settings, and the results of the runs with them."""

    name: str
    options: str
    configs: tuple[Config, ...]  # one for each seed
    detector: str  # whose measures are shown: padim or igd
    paper: Mapping[str, float | None]  # heading -> figure
    results: tuple[Mapping[str, float], ...] = ()  # one for each finished run
    failure: str = ""

    def value(self, measure: str) -> tuple[float, float | None] | None:
        """Mean and standard deviation over the seeds; None without a run, no deviation of one."""
        values = [result[measure] for result in self.results if measure in result]
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


# --- runs ----------------------------------------------------------------------------------------


def folder_of(config: Config, out: Path) -> Path:
    """The folder of the run with these settings: one that exists, or a name for a new one."""
    for file in sorted(out.glob("*/config.json")):
        if _has_settings(config, read_json(file)):
            return file.parent
    settings = {name: getattr(config, name) for name in deciding(config)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return out / f"{_dataset(config)}-{config.method}-{digest}-seed{config.seed}"


def _has_settings(config: Config, saved: Mapping[str, Any]) -> bool:
    """Whether a saved config.json has these settings; one that it lacks had its default."""
    return all(saved.get(n, getattr(Config, n)) == getattr(config, n) for n in deciding(config))


def _dataset(config: Config) -> str:
    return Path(config.data).name or "phantom"


def run_job(config: Config, out: Path) -> None:
    """Begin or resume one run; all share one cache of decoded images."""
    folder = folder_of(config, out)
    folder.mkdir(parents=True, exist_ok=True)
    (out / "cache").mkdir(exist_ok=True)
    if not (folder / "cache").exists():
        with contextlib.suppress(OSError):  # where links are impossible, each run decodes its own
            os.symlink(Path("..", "cache"), folder / "cache", target_is_directory=True)
    chosen = dataclasses.replace(config, out=str(folder)), folder
    with claimed(lambda: chosen, resumed=True), contextlib.redirect_stdout(io.StringIO()):
        main_job(*chosen)  # without its own table


def result_of(config: Config, detector: str, out: Path) -> dict[str, float] | None:
    """MEASURES of a finished run with one of its detectors; None if there is no such run."""
    folder = folder_of(config, out)
    if not (folder / "results.json").exists():
        return None
    results = read_json(folder / "results.json")
    row = results[detector]
    result = {name: row[name] for name in MEASURES if name in row}
    result["minutes"] = sum(results["seconds"].values()) / 60
    if (folder / "log.csv").exists():
        last = list(csv.DictReader(read_text(folder / "log.csv").splitlines()))[-1]
        result["spread"] = float(last["spread"])
        if last.get("accuracy"):
            result["pretext"] = float(last["accuracy"])
    return result


# --- rows ----------------------------------------------------------------------------------------


def rows_of(name: str, options: Mapping[str, str], common: dict[str, Any], seeds: int) -> list[Row]:
    """Rows with their settings complete, so that a mistake shows before anything runs.

    name:    "table 9", "figure 7", or a sweep's.
    options: row -> its options, which win over the common ones.
    common:  options of all rows, as `parse` returns them.
    raises:  ValueError naming the row.
    """
    _, columns, printed = PRINTED.get(name, ("", (), {}))
    rows, usual = [], DETECTOR.get(name, "padim")
    for row, text in options.items():
        merged = {"detector": usual} | common | parse(shlex.split(text))[0]
        try:
            configs = tuple(make_config(merged | {"seed": seed}) for seed in range(seeds))
        except ValueError as error:
            raise ValueError(f"{name}, row {row}: {error}") from None
        figures = printed.get(row, [None] * len(columns))
        shown = usual if merged["detector"] == "both" else merged["detector"]
        rows.append(Row(row, text, configs, shown, dict(zip(columns, figures, strict=True))))
    for row, figures in printed.items():  # Table 5 has the paper's data sets
        if row not in options:
            rows.append(Row(f"paper: {row}", "", (), "", dict(zip(columns, figures, strict=True))))
    return rows


def read_sweep(file: Path) -> dict[str, str]:
    """Settings, one on each line: a name, then options of pmsacl.py; # begins a comment.

    The table compares every setting with the one named `base`, or else the first, seed by seed.
    raises: ValueError naming the line.
    """
    settings: dict[str, str] = {}
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not a text file") from None
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        if not words:
            continue
        name, options = words[0], words[1:]
        if name in settings or name.startswith("-"):
            what = "is there twice" if name in settings else "is an option: a name comes first"
            raise ValueError(f"{file}, line {number}: {name} {what}")
        with contextlib.redirect_stderr(io.StringIO()) as messages:
            try:
                of_row, resume = parse(options)
            except SystemExit:
                reason = messages.getvalue().strip().removeprefix("pmsacl.py: ")
                raise ValueError(f"{file}, line {number}: {reason}") from None
        if resume is not None or of_row.keys() & {"out", "seed", "data"}:
            raise ValueError(f"{file}, line {number}: no --resume, --out, --seed or --data here")
        settings[name] = shlex.join(options)
    if not settings:
        raise ValueError(f"{file}: no settings; a line holds a name and options of pmsacl.py")
    return settings


def reference(rows: Sequence[Row]) -> str:
    """The row that the others are compared with: a sweep's `base`, or else the first."""
    return next((row.name for row in rows if row.name == "base"), rows[0].name)


def filled(rows: Sequence[Row], out: Path) -> list[Row]:
    """The rows with the results of all runs that are finished, compared with `reference`'s."""
    results = {row.name: [result_of(c, row.detector, out) for c in row.configs] for row in rows}
    base = reference(rows)
    for name in results.keys() - {base}:
        for result, other in zip(results[name], results[base], strict=False):
            if result and other:
                result["gain"] = result["image_auroc"] - other["image_auroc"]
    return [dataclasses.replace(r, results=tuple(filter(None, results[r.name]))) for r in rows]


def carry_out(name: str, rows: list[Row], out: Path) -> Iterator[list[Row]]:
    """Run what is missing, all rows of a seed before the next seed; yield the rows each time."""
    seeds = max(len(row.configs) for row in rows)
    todo = [(i, seed) for seed in range(seeds) for i, row in enumerate(rows) if row.configs]
    for count, (i, seed) in enumerate(todo, 1):
        config = rows[i].configs[seed]
        if result_of(config, rows[i].detector, out) is None and not rows[i].failure:
            say(f"\n{name}: {rows[i].name}, seed {seed} (run {count} of {len(todo)})")
            try:
                run_job(config, out)
            except (ValueError, OSError, FloatingPointError) as error:
                say(f"{name}: {rows[i].name} failed: {error}")
                rows[i] = dataclasses.replace(rows[i], failure=str(error).replace("\n", " "))
        yield filled(rows, out)


# --- tables --------------------------------------------------------------------------------------


def headings(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Columns: each measure that a run has (False), and the paper's of that name (True) beside."""
    columns: list[tuple[str, bool]] = []
    paper = dict.fromkeys(heading for row in rows for heading in row.paper)
    for measure, heading in MEASURES.items():
        ours = measure == "image_auroc" or any(row.value(measure) for row in rows)
        columns += [(measure, False)] if ours else []
        columns += [(p, True) for p in paper if p == heading or p.startswith(heading + " ")]
    return columns


def markdown(title: str, rows: Sequence[Row], digits: int) -> str:
    """The table: our mean ± standard deviation, with the paper's figure beside it."""
    columns = headings(rows)
    heads = [f"paper: {name}" if paper else MEASURES[name] for name, paper in columns]
    heads = [f"{h} {reference(rows)}" if h == MEASURES["gain"] else h for h in heads]
    lines = [["", "seeds", *heads]]
    for row in rows:
        cells = [_cell(row, column, paper, digits) for column, paper in columns]
        lines.append([row.name, str(len(row.results)) if row.configs else "", *cells])
    notes = [f"- {r.name}: `{r.options or 'no options of its own'}`" for r in rows if r.configs]
    notes += [f"- {row.name} failed: {row.failure}" for row in rows if row.failure]
    head, text = f"# {title}\n\n{markdown_table(lines)}", "\n".join(notes)
    return f"{head}\nMean ± standard deviation over the seeds.\n\n{text}\n"


def _cell(row: Row, name: str, paper: bool, digits: int) -> str:
    """Our mean ± standard deviation of a measure, or the paper's figure under a heading."""
    if paper:
        figure = row.paper.get(name)
        return "" if figure is None else f"{figure:.{digits}f}"
    value = row.value(name)
    if value is None:
        return "not run" if row.configs and not row.results else ""
    mean, sd = value
    return f"{mean:.3f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def as_csv(rows: Sequence[Row]) -> str:
    """A line for each row: name, options, seeds, our means and deviations, the paper's figures."""
    file, columns = io.StringIO(), headings(rows)
    writer = csv.writer(file, lineterminator="\n")
    heads = [[f"paper {n}"] if paper else [f"{n}_mean", f"{n}_sd"] for n, paper in columns]
    writer.writerow(["row", "options", "seeds", *sum(heads, [])])
    for row in rows:
        cells: list[Any] = [row.name, row.options, len(row.results)]
        for name, paper in columns:
            cells += [row.paper.get(name)] if paper else row.value(name) or (None, None)
        writer.writerow(cells)
    return file.getvalue()


def write(name: str, rows: Sequence[Row], common: Mapping[str, Any], out: Path) -> str:
    """Write NAME-DATASET-HASH.md, .csv and .png to `out`; return the Markdown text."""
    config = next(row.configs[0] for row in rows if row.configs)
    common = {k: v for k, v in common.items() if k not in ("data", "device")}
    settings = json.dumps(common | {"data": config.data}, sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:6]
    stem = f"{name.replace(' ', '')}-{_dataset(config)}-{digest}"
    values = {k.replace("_", "-"): "" if v is True else f" {v}" for k, v in common.items()}
    options = " ".join(f"--{k}{v}" for k, v in values.items()) or "defaults"
    shown = [d for d in ("PaDiM", "IGD") if any(row.detector == d.lower() for row in rows)]
    title = f"{name.capitalize()}: {' and '.join(shown)} on {_dataset(config)}"
    if name in PRINTED:
        title += f"; paper: {PRINTED[name][0]}"
    digits = 4 if name == "table 5" else 3
    text = markdown(f"{title}\n\nOptions of all rows: `{options}`", rows, digits)
    write_file(out / f"{stem}.md", encoded(text))
    write_file(out / f"{stem}.csv", encoded(as_csv(rows)))
    dots = {r.name: [result["image_auroc"] for result in r.results] for r in rows if r.configs}
    columns = [column for column, paper in headings(rows) if paper and column.startswith("AUC")]
    printed = {f"paper: {c}": {r.name: r.paper.get(c) for r in rows} for c in columns}
    printed = {} if name == "table 5" else printed  # deviations, not values
    note = f"Options of all rows: {options}"
    picture = dot_chart(dots, printed, title=title, axis="image AUROC", note=note)
    write_file(out / f"{stem}.png", png(picture))
    return text


# --- the command line ----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """0, 1 if a row failed, 2 for a mistake of the user's (one line), 130 when interrupted."""
    parser = Parser(prog="experiments.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    for kind in ("table", "figure"):
        numbers = [int(name.split()[1]) for name in ROWS if name.startswith(kind)]
        parser.add_argument(f"--{kind}", type=int, nargs="+", default=[], choices=numbers)
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="a name and options a line")
    parser.add_argument("--seeds", type=int, default=5, help="runs for each row (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="folder")
    parser.add_argument("--show", action="store_true", help="run nothing, show what is finished")
    args, rest = parser.parse_known_args(argv)
    try:
        common = _common_options(rest, args.seeds)
        wanted = {name: ROWS[name] for name in (f"table {n}" for n in args.table)}
        wanted |= {name: ROWS[name] for name in (f"figure {n}" for n in args.figure)}
        if args.sweep:
            wanted[args.sweep.stem] = read_sweep(args.sweep)
        if not wanted:
            raise ValueError("nothing to do: name a --table, a --figure or a --sweep")
        tables = {name: rows_of(name, o, common, args.seeds) for name, o in wanted.items()}
        make_folder(args.out)
        for name, rows in tables.items():
            text = write(name, filled(rows, args.out), common, args.out)
            for done in () if args.show else carry_out(name, rows, args.out):
                text = write(name, done, common, args.out)
            print(text)
        say(f"tables and charts are in {args.out}")
    except (ValueError, OSError) as error:
        return complain("experiments.py", error)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    return int(any(row.failure for rows in tables.values() for row in rows))


def _common_options(arguments: Sequence[str], seeds: int) -> dict[str, Any]:
    """The options of all rows.   raises: ValueError if a table cannot be made with them."""
    options, resume = parse(arguments)
    if resume is not None or "seed" in options:
        raise ValueError("neither --resume nor --seed goes here: --seeds N runs 0 to N - 1")
    if seeds < 1:
        raise ValueError(f"--seeds must be 1 or above, got {seeds}")
    if options.get("data"):
        dataset = layouts.discover(options["data"])
        if not dataset.test:
            raise ValueError(f"{options['data']}: {dataset.layout}, no test images to measure on")
        dataset.check_test()
    return options


if __name__ == "__main__":
    sys.exit(quietly(main))
