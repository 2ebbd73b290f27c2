"""The paper's tables, and lists of settings, as commands: each row is some runs of pmsacl.py.

    python experiments.py --table 1 6 --data ./kvasir --seeds 5
    python experiments.py --table 5 8 --figure 7 --data ./kvasir --seeds 2 --preset quick
    python experiments.py --sweep settings.txt --data ./kvasir --epochs 20
    python experiments.py --figure 1 2 3 4 5 --run runs/kvasir

Options that are not listed by --help are pmsacl.py's and hold for every run. Finished runs with
the same settings are reused, by other tables too, and the same command given again resumes a run
that was cut off. The tables are written again after each run, as .md, .csv and .png, with every
run's measures in -runs.csv. Figures 1 to 5 are pictures of one run, with seed 0 or that of --run.

Not here: what a run does (support/job.py), the rows (support/rows.py), how a table is written
(support/sheets.py), its measures, the paper's numbers (support/tables.py), the pictures
(support/paper_figures.py).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from support import layouts
from support.cache import digest
from support.checks import check_places
from support.claim import claimed
from support.compared import chosen, deciding
from support.figures import png
from support.job import main_job
from support.options import Config, make_config, option, parse
from support.paper_figures import PICTURES, draw, draw_views
from support.progress import as_program, complain, duration, notify, show
from support.rows import MASKED, OF_SET, ROWS, Row, read_sweep, reference, rows_of, with_more
from support.run import Parser, given_path, make_folder, read_json, read_rows, real, write_file
from support.sheets import ENDS, MEASURES, write
from support.tables import papers_name
from support.training import check_start

MOST_SEEDS = 1000

# --- runs ----------------------------------------------------------------------------------------


def folder_of(config: Config, out: Path) -> Path:
    """The folder of the run with these settings: one that exists, or a name for a new one."""
    settings = {name: getattr(config, name) for name in deciding(config)}
    for file in sorted(out.glob("*/config.json")):
        saved = read_json(file)  # an option that it lacks had its default
        if settings == {name: saved.get(name, getattr(Config, name)) for name in settings}:
            return file.parent
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    what = "-".join([dataset_name(config), config.method, *chosen(config.detector)])
    return out / f"{what}-{key}-seed{config.seed}"


def dataset_name(config: Config) -> str:
    return Path(config.data).name or "phantom"


@functools.cache
def images_now(data: str, seed: int) -> str:
    dataset = layouts.discover(data, seed=seed)
    return digest(dataset.images, dataset.root)


def check_images(config: Config, out: Path) -> None:
    """raises: ValueError if a run with these settings was begun with other images."""
    folder = folder_of(config, out)
    begun_with = read_json(folder / "config.json").get("images")
    if config.data and begun_with and begun_with != images_now(config.data, config.seed):
        raise ValueError(
            f"{folder}: a run with other images than {config.data} holds now; name another --out"
        )


def run_job(config: Config, out: Path, keep: bool) -> None:
    """Begin or resume one run; all share one cache of decoded images.

    keep: whether its checkpoints stay when it is finished.
    """
    folder = folder_of(config, out)
    folder.mkdir(parents=True, exist_ok=True)
    (out / "cache").mkdir(exist_ok=True)
    if not (folder / "cache").exists():
        with contextlib.suppress(OSError):  # where links are impossible, each run decodes its own
            os.symlink(Path("..", "cache"), folder / "cache", target_is_directory=True)
    job = dataclasses.replace(config, out=str(folder)), folder
    with claimed(lambda: job), contextlib.redirect_stdout(io.StringIO()):
        main_job(*job)  # without its own table
    for checkpoint in () if keep else folder.glob("checkpoint*.pt"):
        checkpoint.unlink()


def result_of(config: Config, detector: str, out: Path) -> dict[str, Any] | None:
    """MEASURES of a finished run with one of its detectors; None if there is no such run.

    raises: ValueError if its files are damaged.
    """
    folder = folder_of(config, out)
    if not (folder / "results.json").exists():
        return None
    results = read_json(folder / "results.json")
    try:
        row = results[detector]
        result = {name: row[name] for name in MEASURES if name in row} | {"seed": config.seed}
        result["image_auroc"] = float(row["image_auroc"])
        result |= dict(zip(ENDS, row.get("image_auroc_interval", ()), strict=False))
        if "baseline" in row:
            result["baseline"] = row["baseline"]
        seconds = results["seconds"]
        phases = ("pretrain", detector, "evaluate")
        result["minutes"] = sum(seconds.get(phase, 0) for phase in phases) / 60
        if "fake_lesions" in results:
            result["fake_lesions"] = results["fake_lesions"]["image_auroc"]
        if (folder / "log.csv").exists():
            last = read_rows(folder / "log.csv")[-1]
            result["spread"] = float(last["spread"])
            if last.get("accuracy"):
                result["pretext"] = float(last["accuracy"])
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ValueError(
            f"{folder}: results.json or log.csv is damaged; delete the folder to run it again"
        ) from None
    return result


def filled(rows: Sequence[Row], out: Path) -> list[Row]:
    """The rows with the results of all runs that are finished, compared with `reference`'s.

    What needs no network is a last row: the row `trivial` of each seed's first run.
    """
    results = {row.name: [result_of(c, row.detector, out) for c in row.configs] for row in rows}
    base = reference(rows)
    for name in results.keys() - {base}:
        for result, other in zip(results[name], results[base], strict=False):
            if result and other:
                result["gain"] = result["image_auroc"] - other["image_auroc"]
    ours = [dataclasses.replace(r, results=tuple(filter(None, results[r.name]))) for r in rows]
    return ours + _trivial(rows, out)


def _trivial(rows: Sequence[Row], out: Path) -> list[Row]:
    """A row of the trivial baselines' measures; none without a run that has them."""
    found: dict[int, dict[str, Any]] = {}  # by seed
    for config in (config for row in rows for config in row.configs):
        file = folder_of(config, out) / "results.json"
        if config.seed not in found and "trivial" in read_json(file):
            result = result_of(config, "trivial", out) or {}
            own = ("image_auroc", "specificity", "sensitivity", "accuracy", "seed", "baseline")
            found[config.seed] = {k: v for k, v in result.items() if k in (*own, *ENDS)}
    names = dict.fromkeys(result.pop("baseline") for result in found.values())
    what = f"the best baseline without a network: {', or '.join(names)}"
    return [Row("trivial", what, (), "trivial", {}, tuple(found.values()))] if found else []


def carry_out(name: str, rows: list[Row], out: Path, keep: bool) -> Iterator[list[Row]]:
    """Run what is missing, all rows of a seed before the next seed; yield the rows each time."""
    seeds = max(len(row.configs) for row in rows)
    todo = [(i, seed) for seed in range(seeds) for i, row in enumerate(rows) if row.configs]
    for count, (i, seed) in enumerate(todo, 1):
        config = rows[i].configs[seed]
        if result_of(config, rows[i].detector, out) is None and not rows[i].failure:
            left = time_left([row for row in rows if not row.failure], out)
            notify(f"\n{name}: {rows[i].name}, seed {seed} (run {count} of {len(todo)}{left})")
            try:
                run_job(config, out, keep)
            except (ValueError, OSError, FloatingPointError) as error:
                notify(f"{name}: {rows[i].name} failed: {error}")
                rows[i] = dataclasses.replace(rows[i], failure=str(error).replace("\n", " "))
        yield filled(rows, out)


def time_left(rows: Sequence[Row], out: Path) -> str:
    """How long the missing runs will take, by the finished ones: those of their row, or all.

    What pre-trains nothing takes seconds, and says nothing of the other rows.
    """
    took: dict[str, list[float]] = {}
    missing, names = {}, {row.name for row in rows}
    counted = {row.name for row in rows if row.configs and row.configs[0].trains} or names
    for row in rows:
        for config in row.configs:
            folder = folder_of(config, out)
            if results := read_json(folder / "results.json"):
                took.setdefault(row.name, []).append(sum(results["seconds"].values()))
            else:
                missing[folder] = row.name
    means = {name: statistics.fmean(seconds) for name, seconds in took.items()}
    if not means.keys() & counted:
        return ""
    mean = statistics.fmean(means[name] for name in means.keys() & counted)
    seconds = sum(means.get(name, mean) for name in missing.values())
    return f", about {duration(seconds)} left for all"


# --- pictures ------------------------------------------------------------------------------------


def pictures(args: argparse.Namespace, common: dict[str, Any]) -> Iterator[Path]:
    """Draw what is asked for of Fig. 1 to 5: of --run, else of a run that all of them share.

    yields: the files.   raises: ValueError if a picture needs what the run has not.
    """
    wanted = [number for number in dict.fromkeys(args.figure) if number in PICTURES]
    names = {PICTURES[number] for number in wanted} - {""}
    usual = {"detector": ",".join(sorted(names, reverse=True)) or "padim", "healthy_share": 0.0}
    common = usual | common | {"seed": 0}
    for number in wanted:
        if args.run is None and number == 2:
            config = make_config(common)
            name, picture = f"{dataset_name(config)}-{config.strong}", draw_views(config)
        else:
            folder = args.run or finished(make_config(common), args)
            name, picture = real(folder).name, draw(number, folder)
        file = args.out / f"figure{number}-{name}.png"
        write_file(file, png(picture))
        yield file


def finished(config: Config, args: argparse.Namespace) -> Path:
    """The folder of the finished run with these settings; what is missing is run."""
    folder = folder_of(config, args.out)
    check_images(config, args.out)
    if not (folder / "results.json").exists():
        notify(f"\nthe run of the pictures: {folder}")
        run_job(config, args.out, args.keep)
    return folder


# --- the command line ----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """0, 1 if a row failed, 2 for a mistake of the user's (one line), 130 when interrupted."""
    args, rest = _parser().parse_known_args(argv)
    try:
        common, images, of_paper = _common_options(rest, args)
        tables = {
            name: rows_of(name, options, common, args.seeds, of_paper)
            for name, options in _wanted(args).items()
        }
        if tables and not args.show:
            make_folder(args.out)
        for config in (c for rows in tables.values() for row in rows for c in row.configs):
            check_images(config, args.out)
        for file in pictures(args, OF_SET.get(of_paper, {}) | common):
            show(f"{file}\n")
        for name, rows in tables.items():
            into = None if args.show else args.out
            text = write(name, filled(rows, args.out), common, images, into)
            for done in carry_out(name, rows, args.out, args.keep) if into else ():
                text = write(name, done, common, images, into)
            show(f"{text}\n")
        if not args.show:
            notify(f"tables, charts and pictures are in {args.out}")
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        return complain("experiments.py", error)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to continue", file=sys.stderr)
        return 130
    return int(any(row.failure for rows in tables.values() for row in rows))


def _parser() -> Parser:
    parser = Parser(
        prog="experiments.py",
        description=__doc__.split("\n")[0],
        epilog="Tables 1 to 4, 6 and 7 show the paper's figures next to ours if the images are "
        "the paper's: Hyper-Kvasir by its layout, Hyper-Kvasir, LAG, Liu or Covid-X by the name of "
        "their folder. All other options are those of pmsacl.py.",
    )
    add = parser.add_argument
    for kind in ("table", "figure"):
        numbers = [*PICTURES] if kind == "figure" else []
        numbers += [int(name.split()[1]) for name in ROWS if name.startswith(kind)]
        add(f"--{kind}", type=int, nargs="+", default=[], choices=numbers)
    add("--run", type=given_path, help="draw figures 1 to 5 from this finished run")
    add("--sweep", type=given_path, metavar="FILE", help="in each line: a name and options")
    more = "in each line: the name of a row and more options for it"
    add("--rows", type=given_path, metavar="FILE", help=more)
    add("--seeds", type=int, default=5, help="runs for each row (default: 5)")
    out = Path("runs/experiments")
    add("--out", type=given_path, default=out, help="folder of runs and tables")
    add("--keep", action="store_true", help="keep finished runs' checkpoints")
    add("--show", action="store_true", help="run nothing, show the finished runs")
    return parser


def _wanted(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The tables asked for: name -> row -> options.   raises: ValueError or OSError."""
    charts = [n for n in args.figure if n not in PICTURES]
    names = [f"table {n}" for n in args.table] + [f"figure {n}" for n in charts]
    wanted = {name: ROWS[name] for name in names}
    if args.sweep:
        wanted[args.sweep.stem] = read_sweep(args.sweep)
    if not (wanted or args.figure):
        raise ValueError("nothing to do: name a --table, a --figure or a --sweep")
    if args.show and len(charts) < len(args.figure):
        raise ValueError("--show prints tables: leave it out for figures 1 to 5")
    if args.run and (wanted or not args.figure):
        raise ValueError("--run goes with --figure 1 to 5: tables and charts are of many runs")
    more = read_sweep(args.rows) if args.rows else {}
    if unknown := more.keys() - {row for rows in wanted.values() for row in rows}:
        raise ValueError(f"--rows {args.rows}: no row is called {', '.join(sorted(unknown))}")
    return {name: with_more(rows, more) for name, rows in wanted.items()}


def _common_options(
    arguments: Sequence[str], args: argparse.Namespace
) -> tuple[dict[str, Any], str, str]:
    """The options of all rows; the images' name, and the paper's name of them, or "".

    raises: ValueError if a table cannot be made with them.
    """
    options, resume = parse(arguments)
    if resume is not None or "seed" in options:
        raise ValueError(
            "neither --resume nor --seed is possible here: --seeds N runs seeds 0 to N - 1"
        )
    if not 1 <= args.seeds <= MOST_SEEDS:
        raise ValueError(f"--seeds must be from 1 to {MOST_SEEDS}, got {args.seeds}")
    if args.run and options:
        given = ", ".join(map(option, options))
        raise ValueError(f"--run {args.run} has its own settings: leave out {given}")
    if not options.get("data"):
        return options, "phantom", ""
    check_places(options["data"], args.out)
    check_start(options.get("encoder", ""), options.get("init", "auto"), args.out)
    dataset = layouts.discover(options["data"])
    if not dataset.test and (args.table or args.sweep or set(args.figure) - {1, 2}):
        raise ValueError(f"{options['data']}: {dataset.layout}, no test images to measure on")
    dataset.check_test()
    masked = [n for n in args.table if f"table {n}" in MASKED]
    if masked and not dataset.has_masks:
        raise ValueError(f"{options['data']}: no masks, which --table {masked[0]} measures with")
    return options, dataset.root.name, papers_name(dataset)


if __name__ == "__main__":
    sys.exit(as_program(main))
