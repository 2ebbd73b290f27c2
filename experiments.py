"""The paper's ablations, and lists of settings, as commands: each row is some runs of pmsacl.py.

    python experiments.py --table 9 --data ./kvasir --seeds 5
    python experiments.py --table 5 8 --figure 7 --data ./kvasir --seeds 2 --preset quick
    python experiments.py --sweep settings.txt --data ./kvasir --epochs 20

Options that are not listed by --help are pmsacl.py's and hold for every run. Finished runs with
the same settings are reused, also by other tables, and a run that was cut off goes on: give the
same command again. The tables are written anew after each run, as .md, .csv and .png.

Not here: what a run does (pmsacl.py), its measures (measures.py), the paper's numbers (tables.py).
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

import pmsacl
from medmix import STRONG
from support import layouts
from support.figures import dot_chart, png
from support.options import Config, parse, settle
from support.run import Parser, make_folder, read_json, say, write_file
from support.tables import PAPER, PAPER_FIGURES

# Rows: the paper's name -> options. Table 8 starts from CCD as its caption has it, with eq. 9's
# term, and keeps that term, so that a row differs from the one above by what it is called. Its
# third row keeps eq. 6's centring, which is part of l_PMSACL: without it and kappa, l_PMSACL is
# CCD's own loss, as a test shows.
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
DETECTOR = {"table 10": "igd", "figure 6": "igd"}  # the paper's, where it is not PaDiM
Printed = tuple[str, tuple[str, ...], Mapping[str, Sequence[float | None]]]
PRINTED: dict[str, Printed] = {f"table {n}": v for n, v in PAPER.items()}
PRINTED |= {f"figure {n}": v for n, v in PAPER_FIGURES.items()}
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
    "minutes": "minutes a run",  # of the last process, if it was cut off and resumed
}


@dataclass(frozen=True)
class Row:
    """One line of a table: its settings and what the runs with them gave."""

    name: str
    options: str
    configs: tuple[Config, ...]  # one a seed
    detector: str  # whose measures are shown: padim or igd
    paper: Mapping[str, float | None]  # heading -> figure
    results: tuple[Mapping[str, float], ...] = ()  # one a finished run
    trouble: str = ""

    def value(self, measure: str) -> tuple[float, float | None] | None:
        """Mean and standard deviation over the seeds: None without a run, and of one run."""
        values = [result[measure] for result in self.results if measure in result]
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


# --- runs ----------------------------------------------------------------------------------------


def folder_of(config: Config, out: Path) -> Path:
    """The run folder with these settings: one that exists, or else the name of a new one."""
    for file in sorted(out.glob("*/config.json")):
        if _same(config, read_json(file)):
            return file.parent
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _idle(config)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return out / f"{_dataset(config)}-{config.method}-{digest}-seed{config.seed}"


def _same(config: Config, saved: Mapping[str, Any]) -> bool:
    """Are the settings those of a saved config.json? One that it lacks had its default."""
    wanted = dataclasses.asdict(config)
    names = wanted.keys() - _idle(config)
    return all(saved.get(name, getattr(Config, name)) == wanted[name] for name in names)


def _idle(config: Config) -> set[str]:
    """Options that change nothing in what a run does; runs of another device are reused."""
    of_igd = {n for n in Config.__dataclass_fields__ if n.startswith(("igd_", "local"))}
    return {"out", "device", "preset"} | (of_igd if config.detector == "padim" else set())


def _dataset(config: Config) -> str:
    return Path(config.data).name or "phantom"


def run(config: Config, out: Path) -> None:
    """Begin or go on with one run; all share one cache of decoded images."""
    folder = folder_of(config, out)
    folder.mkdir(parents=True, exist_ok=True)
    (out / "cache").mkdir(exist_ok=True)
    if not (folder / "cache").exists():
        with contextlib.suppress(OSError):  # no links here: each run decodes its own
            os.symlink(Path("..", "cache"), folder / "cache", target_is_directory=True)
    with contextlib.redirect_stdout(io.StringIO()):  # its own table
        pmsacl.main_job(dataclasses.replace(config, out=str(folder)), folder)


def result_of(config: Config, detector: str, out: Path) -> dict[str, float] | None:
    """MEASURES of a finished run with one of its detectors; None if there is no such run."""
    folder = folder_of(config, out)
    if not (folder / "results.json").exists():
        return None
    results = read_json(folder / "results.json")
    row = results[detector]
    found = {name: row[name] for name in MEASURES if name in row}
    found["minutes"] = sum(results["seconds"].values()) / 60
    if (folder / "log.csv").exists():
        last = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))[-1]
        found |= {"spread": float(last["spread"])}
        found |= {"pretext": float(last["accuracy"])} if last.get("accuracy") else {}
    return found


# --- rows ----------------------------------------------------------------------------------------


def rows_of(name: str, options: Mapping[str, str], given: dict[str, Any], seeds: int) -> list[Row]:
    """Rows with their settings resolved, so that a mistake shows before anything runs.

    name:    "table 9", "figure 7", or a sweep's.
    options: row -> its options, over those that were given for all.
    raises:  ValueError naming the row.
    """
    _, columns, printed = PRINTED.get(name, ("", (), {}))
    rows, usual = [], DETECTOR.get(name, "padim")
    for row, text in options.items():
        own, _ = parse(shlex.split(text))
        try:
            own = {"detector": usual} | given | own
            configs = tuple(settle(own | {"seed": seed}) for seed in range(seeds))
        except ValueError as error:
            raise ValueError(f"{name}, row {row}: {error}") from None
        figures = printed.get(row, [None] * len(columns))
        shown = usual if own["detector"] == "both" else own["detector"]
        rows.append(Row(row, text, configs, shown, dict(zip(columns, figures, strict=True))))
    for row, figures in printed.items():  # Table 5 has the paper's data sets
        if row not in options:
            paper = dict(zip(columns, figures, strict=True))
            rows.append(Row(f"paper: {row}", "", (), "", paper))
    return rows


def read_sweep(file: Path) -> dict[str, str]:
    """A setting a line: its name, then options of pmsacl.py; # begins a comment.

    The table compares the others with the one named `base`, or the first, seed by seed.

    raises: ValueError naming the line.
    """
    settings: dict[str, str] = {}
    try:
        lines = file.read_text().splitlines()
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
        with contextlib.redirect_stderr(io.StringIO()) as complaint:
            try:
                own, resume = parse(options)
            except SystemExit:
                reason = complaint.getvalue().strip().removeprefix("pmsacl.py: ")
                raise ValueError(f"{file}, line {number}: {reason}") from None
        if resume is not None or own.keys() & {"out", "seed", "data"}:
            raise ValueError(f"{file}, line {number}: no --resume, --out, --seed or --data here")
        settings[name] = shlex.join(options)
    if not settings:
        raise ValueError(f"{file}: no settings; a line holds a name and options of pmsacl.py")
    return settings


def reference(rows: Sequence[Row]) -> str:
    """The row that the others are compared with: a sweep's `base`, or else the first."""
    return next((row.name for row in rows if row.name == "base"), rows[0].name)


def filled(rows: Sequence[Row], out: Path) -> list[Row]:
    """The rows with the results of whatever runs are finished, compared with `reference`'s."""
    found = {row.name: [result_of(c, row.detector, out) for c in row.configs] for row in rows}
    base = reference(rows)
    for name in found.keys() - {base}:
        for own, other in zip(found[name], found[base], strict=False):
            if own and other:
                own["gain"] = own["image_auroc"] - other["image_auroc"]
    return [dataclasses.replace(r, results=tuple(filter(None, found[r.name]))) for r in rows]


def carry_out(name: str, rows: list[Row], out: Path) -> Iterator[list[Row]]:
    """Run what is missing, all rows of a seed before the next seed; the rows after each run."""
    seeds = max(len(row.configs) for row in rows)
    todo = [(i, seed) for seed in range(seeds) for i, row in enumerate(rows) if row.configs]
    for count, (i, seed) in enumerate(todo, 1):
        config = rows[i].configs[seed]
        if result_of(config, rows[i].detector, out) is None and not rows[i].trouble:
            say(f"\n{name}: {rows[i].name}, seed {seed} (run {count} of {len(todo)})")
            try:
                run(config, out)
            except (ValueError, OSError, FloatingPointError) as error:
                say(f"{name}: {rows[i].name} failed: {error}")
                rows[i] = dataclasses.replace(rows[i], trouble=str(error).replace("\n", " "))
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
    """The table, our mean ± standard deviation with the paper's figure beside it."""
    columns = headings(rows)
    heads = [f"paper: {name}" if paper else MEASURES[name] for name, paper in columns]
    heads = [f"{h} {reference(rows)}" if h == MEASURES["gain"] else h for h in heads]
    lines = [["", "seeds", *heads], ["---"] * (2 + len(heads))]
    for row in rows:
        cells = []
        for name, paper in columns:
            found = row.value(name) if not paper else None
            if paper:
                printed = row.paper.get(name)
                cells.append("" if printed is None else f"{printed:.{digits}f}")
            elif found:
                sd = "" if found[1] is None else f" ± {found[1]:.{digits}f}"
                cells.append(f"{found[0]:.3f}{sd}")
            else:
                cells.append("not run" if row.configs and not row.results else "")
        lines.append([row.name, str(len(row.results)) if row.configs else "", *cells])
    text = "".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |\n" for line in lines
    )
    notes = [
        f"- {row.name}: `{row.options or 'no options of its own'}`" for row in rows if row.configs
    ]
    notes += [f"- {row.name} failed: {row.trouble}" for row in rows if row.trouble]
    return (
        f"# {title}\n\n{text}\nMean ± standard deviation over the seeds.\n\n"
        + "\n".join(notes)
        + "\n"
    )


def as_csv(rows: Sequence[Row]) -> str:
    """A line a row: name, options, seeds, mean and deviation of each measure, the paper's."""
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


def write(name: str, rows: Sequence[Row], given: Mapping[str, Any], out: Path) -> str:
    """NAME-DATASET-HASH.md, .csv and .png in `out`; the Markdown text."""
    config = next(row.configs[0] for row in rows if row.configs)
    shared = {k: v for k, v in given.items() if k not in ("data", "device")}
    named = json.dumps(shared | {"data": config.data}, sort_keys=True)
    digest = hashlib.sha256(named.encode()).hexdigest()[:6]
    stem = f"{name.replace(' ', '')}-{_dataset(config)}-{digest}"
    values = {k.replace("_", "-"): "" if v is True else f" {v}" for k, v in shared.items()}
    options = " ".join(f"--{k}{v}" for k, v in values.items()) or "defaults"
    detectors = {"padim": "PaDiM", "igd": "IGD"}
    shown = [name for key, name in detectors.items() if any(r.detector == key for r in rows)]
    measured = f"{' and '.join(shown)} on {_dataset(config)}"
    title = f"{name.capitalize()}: {measured}"
    if name in PRINTED:
        title += f"; paper: {PRINTED[name][0]}"
    text = markdown(
        f"{title}\n\nOptions of all rows: `{options}`", rows, 4 if name == "table 5" else 3
    )
    write_file(out / f"{stem}.md", text.encode())
    write_file(out / f"{stem}.csv", as_csv(rows).encode())
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
    numbers = {
        kind: [int(n.split()[1]) for n in ROWS if n.startswith(kind)]
        for kind in ("table", "figure")
    }
    parser.add_argument("--table", type=int, nargs="+", default=[], choices=numbers["table"])
    parser.add_argument("--figure", type=int, nargs="+", default=[], choices=numbers["figure"])
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="a name and options a line")
    parser.add_argument("--seeds", type=int, default=5, help="runs a row (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="folder")
    parser.add_argument("--show", action="store_true", help="run nothing, show what is finished")
    args, rest = parser.parse_known_args(argv)
    try:
        given, resume = parse(rest)
        if resume is not None or "seed" in given:
            raise ValueError("neither --resume nor --seed goes here: --seeds N runs 0 to N - 1")
        if args.seeds < 1:
            raise ValueError(f"--seeds must be 1 or above, got {args.seeds}")
        if given.get("data"):
            found = layouts.discover(given["data"])
            if not found.test:
                raise ValueError(f"{given['data']}: {found.layout}, no test images to measure on")
            found.check_test()
        wanted = {f"table {n}": ROWS[f"table {n}"] for n in args.table}
        wanted |= {f"figure {n}": ROWS[f"figure {n}"] for n in args.figure}
        if args.sweep:
            wanted[args.sweep.stem] = read_sweep(args.sweep)
        if not wanted:
            raise ValueError("nothing to do: name a --table, a --figure or a --sweep")
        tables = {name: rows_of(name, o, given, args.seeds) for name, o in wanted.items()}
        make_folder(args.out)
        failed = False
        for name, rows in tables.items():
            text = write(name, filled(rows, args.out), given, args.out)
            for done in () if args.show else carry_out(name, rows, args.out):
                text = write(name, done, given, args.out)
            failed |= any(row.trouble for row in rows)
            print(text)
        say(f"tables and charts are in {args.out}")
    except (ValueError, OSError) as error:
        print("experiments.py:", str(error).replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
