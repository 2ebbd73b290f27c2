"""Fig. 1 to 5 of the paper, drawn from a finished run: `experiments.py --figure 1 --run RUN`.

Fig. 6 and 7 are charts of many runs (experiments.py); that of section 4.6 is features.png of a run.
Sizes: N images, K of them shown, S pixels a side, A classes.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray as Array
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from baselines.strong import PASTED
from encoder import seeded, to_unit
from eval import load as read_detector
from eval import load_run
from pmsacl import Pretraining, strong_set
from support import data, figures, layouts, phantom
from support.charts import number, spread_out
from support.depth import window_of_set
from support.features import COLOURS, POINTS, scatter
from support.options import Config
from support.readers import read_config, read_results
from support.run import pick_device, read_rows
from support.tables import PAPERS_NAMES, measured
from support.training import load

PICTURES = {1: "", 2: "", 3: "padim", 4: "igd", 5: "igd"}  # figure -> the paper's detector
SIDE, TEXT = 220, 20  # pixels of an image and of its letters: both are legible at half that size
EXAMPLES = 3  # views of a class in Fig. 1, healthy images of Fig. 2
COLUMNS = 6  # images of a class in Fig. 5
FRAMES = {"judged correctly": figures.GREEN, "judged wrongly": figures.RED}


@dataclass(frozen=True)
class Run:
    """A run's folder, its settings and its images, decoded."""

    folder: Path
    config: Config
    window: tuple[float, float] | None  # of files of more than 8 bits
    dataset: layouts.Dataset

    @classmethod
    def of(cls, folder: Path) -> Run:
        """raises: ValueError if there is no run in this folder, or its images are not there."""
        saved = read_config(folder)
        if not saved:
            raise ValueError(f"{folder}: no run here, there is no config.json")
        known = {k: v for k, v in saved.items() if k in Config.__dataclass_fields__}
        config = Config(**known | {"device": pick_device("auto")})
        dataset = layouts.discover(config.data or folder / "phantom", seed=config.seed)
        return cls(folder, config, saved.get("values_shown"), dataset)

    @property
    def name(self) -> str:
        """Data set and method, for a title."""
        return f"{self.dataset.root.name}, {self.config.method}"

    def how(self) -> dict[str, Any]:
        """How its images are decoded."""
        how = {"size": self.config.image_size, "cache_dir": self.folder / "cache"}
        return how | {"skip_bad": self.config.skip_bad, "window": self.window}

    def train_images(self) -> Array:
        """(N, 3, S, S) uint8: those that trained, without what --healthy-share held out."""
        return data.decode_train(self.dataset.train, self.config.healthy_share, **self.how())[1]

    def test_images(self) -> tuple[layouts.Dataset, Array, Array | None, Array | None]:
        """As data.decode_test.   raises: ValueError if the data set has no test images."""
        if not self.dataset.test:
            raise ValueError(f"{self.dataset.root}: no test images, so there is nothing to detect")
        return data.decode_test(self.dataset, **self.how())


def draw(figure: int, folder: Path) -> Image.Image:
    """One of the figures 1 to 5, of the finished run in this folder.

    raises: ValueError, in one line, if there is no such run, or it lacks what the figure shows.
    """
    run = Run.of(folder)
    if figure == 1:
        return classes_figure(run)
    if figure == 2:
        return views_figure(run.train_images(), run.config, run.name)
    if figure == 5:
        return detections_figure(run)
    return lesions_figure(run, figure, PICTURES[figure])


def draw_views(config: Config) -> Image.Image:
    """Fig. 2 without a run: the images are all that it needs."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(config.data or Path(folder) / "phantom")
        if not config.data:
            phantom.draw(root, train=EXAMPLES, good=2, abnormal=2, size=config.image_size)
        dataset = layouts.discover(root, seed=config.seed)
        paths = [dataset.train[i] for i in spread_out(len(dataset.train), EXAMPLES)]
        window = window_of_set(dataset.images, config.window, {})
        size, skip = config.image_size, config.skip_bad
        images, _ = data.decode(paths, size, folder, skip_bad=skip, window=window)
        return views_figure(np.array(images), config, f"{root.name}, {config.method}")


# --- Fig. 1: the classes of views, and where they land -------------------------------------------


def classes_figure(run: Run) -> Image.Image:
    """Weak views of each class's images, and where z = f_theta of such views lies.   [P:Fig.1]

    The images were held back from the training.
    """
    training = trained(run)
    held = training.watched[: POINTS // 2]
    rounds = math.ceil(POINTS / (2 * len(held)))
    batches = [training.views_of(held, training.draws(11, i)) for i in range(rounds)]
    with torch.no_grad():
        embedded = [training.encoder.embed(views) for views, _ in batches]
    z, h = (torch.cat(part) for part in zip(*embedded, strict=True))  # (N, Z), (N, 512)
    n = torch.cat([classes for _, classes in batches])  # (N,)
    axes, share = principal_axes(z.cpu())
    names = class_names(run.config)
    groups = {name: axes[(n == k).cpu()].numpy() for k, name in enumerate(names)}
    plot = scatter(groups, f"Fig. 1, the classes and where they land: {run.name}", means=True)

    views, of_class = batches[0]
    side = max(40, (plot.height - 54) // len(names) - 6)
    cells: list[list[Image.Image]] = []
    for k in range(len(names)):
        shown = views[of_class == k][::2][:EXAMPLES]  # the first view of each image
        colour = ImageColor.getrgb(COLOURS[k % len(COLOURS)])
        cells.append([framed(to_bytes(x), colour, side) for x in shown])
    words = (
        "Left: weak views of held-back healthy images, framed in the colour of their class. Right: "
        f"z on its two principal axes, which hold {share:.0%} of its variance."
    )
    if len(names) > 1 and "aug" in training.terms:
        right = (training.encoder.aug_logits(z, h).argmax(dim=1) == n).float().mean()
        words += f" f_beta is right about {right:.0%} of these views; chance: {1 / len(names):.0%}."
    pictures = figures.image_grid(cells, side=side)
    height = max(plot.height, 42 + pictures.height)  # the plot begins 48 pixels below its title
    sheet = Image.new("RGB", (pictures.width + plot.width, height), "white")
    sheet.paste(pictures, (0, 42))
    sheet.paste(plot, (pictures.width, 0))
    return with_key(sheet, {}, None, words)


def trained(run: Run) -> Pretraining:
    """The pre-training of a run as it ended, its encoder in evaluation mode.

    raises: ValueError if the run kept no encoder with its projection.
    """
    whole, checkpoint = run.folder / "detector_f_beta.pt", run.folder / "checkpoint.pt"
    if run.config.encoder:
        raise ValueError(f"{run.folder}: its encoder is of another run; name {run.config.encoder}")
    training = Pretraining(run.train_images(), run.config)
    if whole.is_file():
        training.encoder = read_detector(whole, run.config.device).encoder
    elif checkpoint.is_file():
        load(training, checkpoint)
    elif training.total:
        raise ValueError(
            f"{run.folder}: no detector_f_beta.pt or checkpoint.pt here, which hold f_theta; "
            "finish the run with --resume, or make it again with --keep"
        )
    else:
        training.begin()  # --method random or imagenet
    training.encoder.eval()
    return training


def principal_axes(z: Tensor) -> tuple[Tensor, float]:
    """z on the two axes along which it varies most (N, 2), and their share of its variance."""
    u, s, _ = torch.linalg.svd(z.double() - z.double().mean(dim=0), full_matrices=False)
    return u[:, :2] * s[:2], float(s[:2].square().sum() / s.square().sum().clamp_min(1e-300))


def class_names(config: Config) -> list[str]:
    """A_0, A_1, ..., with the number of lesions where there are any."""
    names = [f"A_{k}" for k in range(config.classes)]
    if config.strong in PASTED:
        names = [f"{name}: {k} lesion{'s' * (k != 1)}" for k, name in enumerate(names)]
    return names


# --- Fig. 2: MedMix ------------------------------------------------------------------------------


def views_figure(images: Array, config: Config, name: str) -> Image.Image:
    """Images under A_0, A_1, ...; below each, what MedMix pasted is outlined.   [P:Fig.2]

    images: (N, 3, S, S) uint8, of which EXAMPLES are drawn.   name: data set and method.
    """
    x = to_unit(images[spread_out(len(images), EXAMPLES)], "cpu")
    generator, augment, names = seeded(config.seed, 7), strong_set(config), class_names(config)
    pairs = [(x, torch.zeros_like(x[:, :1]))]
    if len(x) > 1:  # lesions are cut from another image
        pairs += [augment(x, torch.full((len(x),), k), generator) for k in range(1, len(names))]
    cells: list[list[Any]] = []
    for i in range(len(x)):
        cells.append([to_bytes(images[i]) for images, _ in pairs])
        if config.strong in PASTED:
            shown = zip(cells[-1], (masks[i, 0].numpy() for _, masks in pairs), strict=True)
            cells.append([figures.outlined(c, m, figures.YELLOW, SIDE) for c, m in shown])
    title = f"Fig. 2, {config.strong}: {name}"
    figure = figures.image_grid(cells, columns=names, title=title, side=SIDE, text=TEXT)
    key = {"where it was pasted": figures.YELLOW} if config.strong in PASTED else {}
    words = "A class a column, from healthy images alone."
    return with_key(figure, key, None, words)


# --- Fig. 3, 4 and 5: detections -----------------------------------------------------------------


@dataclass(frozen=True)
class Detections:
    """A detector's scores of the N test images that are measured, the dataset's."""

    row: Mapping[str, Any]  # of results.json
    images: Array  # (N, 3, S, S) uint8
    masks: Array | None  # (N, S, S)
    known: Array  # (N,) whether the mask is known, if there are any
    dataset: layouts.Dataset
    scores: Array  # (N,)


def detectors_of(run: Run) -> list[str]:
    """The measured detectors with heat maps, but not the one on the untrained network."""
    rows = measured(read_results(run.folder)).items()
    return [name for name, row in rows if name != "untrained" and "map_scale" in row]


def detections(run: Run, name: str) -> Detections:
    """name: of the detector.   raises: ValueError if the run has no such detections."""
    have, row = detectors_of(run), read_results(run.folder).get(name, {})
    if name not in have:
        there = f"it has {', '.join(have)}" if have else "nothing was measured in it"
        raise ValueError(f"{run.folder}: no detections of {name} (--detector {name}); {there}")
    dataset, images, masks, known = run.test_images()
    lines = read_rows(run.folder / "scores.csv")
    if [Path(line["path"]).name for line in lines] != [s.path.name for s in dataset.test]:
        raise ValueError(f"{run.folder}/scores.csv is of other images: python eval.py {run.folder}")
    everything = bool(row.get("data", {}).get("paper_protocol"))
    index = [i for i, line in enumerate(lines) if everything or line["split"] == "test"]
    return Detections(
        row, images[index], None if masks is None else masks[index],
        np.ones(len(index), bool) if known is None else known[index],
        dataclasses.replace(dataset, test=tuple(dataset.test[i] for i in index)),
        np.array([float(lines[i][f"{name}_score"]) for i in index]),
    )  # fmt: skip


def lesions_figure(run: Run, number: int, name: str) -> Image.Image:
    """Four abnormal images, heat maps and, with masks, predictions and ground truth.   [P:Fig.3]

    From the highest to the lowest score of all abnormal images, at even ranks.   [P:Fig.4]
    number: of the figure.   name: of the detector.
    """
    d = detections(run, name)
    masked, test, y = "pixel_threshold" in d.row, d.dataset.test, d.dataset.labels
    cases = figures.choose_cases(d.scores, y, d.known | (not masked), lesions=4, normals=0)
    detectors = load_run(run.folder, run.config.device)[2]
    maps = detectors[name].score(d.images[cases])[0].cpu().numpy()
    title = f"Fig. {number}, localisation by {PAPERS_NAMES[name]}: {run.name}"
    figure = figures.localisation_figure(
        d.images[cases], maps, None if d.masks is None else d.masks[cases],
        [test[i] for i in cases], d.scores[cases], d.row, range(len(cases)), title, SIDE, TEXT,
    )  # fmt: skip
    key = dict(FRAMES)
    if masked:
        key |= {"predicted lesion": figures.YELLOW, "true lesion": figures.CYAN}
    words = "" if masked else "Without masks, no prediction: nothing says how bright a lesion is."
    return with_key(figure, key, d.row["map_scale"], words)


def detections_figure(run: Run) -> Image.Image:
    """Normal and abnormal images with scores, framed by the verdict.   [P:Fig.5]

    Each class at even ranks, from its highest to its lowest score. IGD's if the run has it.
    """
    name = next(iter(sorted(detectors_of(run), key="igd".__ne__)), "igd")
    d = detections(run, name)
    y = d.dataset.labels
    cells: list[list[Image.Image]] = []
    for lesions, normals in ((0, COLUMNS), (COLUMNS, 0)):
        cells.append([])
        for i in figures.choose_cases(d.scores, y, np.ones_like(y), lesions, normals):
            high, label = d.scores[i] >= d.row["threshold"], y[i]
            verdict = figures.VERDICTS[int(label)][int(high)]
            colour = figures.GREEN if high == label else figures.RED
            caption = f"{number(d.scores[i])} {verdict}"
            cells[-1].append(framed(d.images[i], colour, SIDE, caption))
    words = (
        f"Abnormal at a score of {number(d.row['threshold'])} or more. Of {len(d.scores)} images: "
        f"specificity {d.row['specificity']:.3f}, sensitivity {d.row['sensitivity']:.3f}. "
        "Each row: even ranks from the highest to the lowest score of its class."
    )
    title = f"Fig. 5, detections by {PAPERS_NAMES.get(name, name)}: {run.name}"
    grid = figures.image_grid(cells, rows=("normal", "abnormal"), title=title, side=SIDE, text=TEXT)
    return with_key(grid, FRAMES, None, words)


# --- what the figures share ----------------------------------------------------------------------


def to_bytes(x: Tensor) -> Array:
    """An image in [0, 1] as uint8."""
    return (x.clamp(0, 1) * 255).byte().cpu().numpy()


def framed(image: Array, colour: tuple[int, ...], side: int, caption: str = "") -> Image.Image:
    """The image in a frame of this colour, which is wide enough at the bottom for a caption."""
    shown, width = figures.picture(image, side), max(3, side // 36)
    draw = ImageDraw.Draw(shown)
    draw.rectangle((0, 0, side - 1, side - 1), None, colour, width)
    if caption:
        draw.rectangle((0, side - TEXT - 10, side, side), colour)
        font = ImageFont.load_default(TEXT)
        draw.text((side / 2, side - TEXT / 2 - 5), caption, "white", font, anchor="mm")
    return shown


def with_key(
    figure: Image.Image,
    swatches: Mapping[str, tuple[int, int, int]],
    scale: tuple[float, float] | None,
    words: str,
) -> Image.Image:
    """The figure with what its colours stand for below it.

    swatches: name -> colour.   scale: of heat maps, drawn as a bar.   words: wrapped, at the end.
    """
    font, line = ImageFont.load_default(TEXT), round(1.4 * TEXT)
    notes = textwrap.wrap(words, int(figure.width / (0.52 * TEXT)), break_on_hyphens=False)
    rows = len(notes) + bool(swatches) + (scale is not None)
    width = max(figure.width, int(sum(3 * TEXT + font.getlength(name) for name in swatches)))
    sheet = Image.new("RGB", (width, figure.height + line * rows + TEXT), "white")
    sheet.paste(figure, (0, 0))
    draw, y = ImageDraw.Draw(sheet), figure.height + TEXT // 2
    x = 8.0
    for name, colour in swatches.items():
        draw.rectangle((x, y, x + TEXT, y + TEXT), colour)
        draw.text((x + 1.4 * TEXT, y + TEXT / 2), name, "black", font, anchor="lm")
        x += 3 * TEXT + font.getlength(name)
    y += line * bool(swatches)
    if scale is not None:
        low, high = (f"heat map: {number(scale[0])}", number(scale[1]))
        x = 8 + font.getlength(low) + TEXT / 2
        bar = figures.heat_colours(np.linspace(0, 1, 10 * TEXT))[None].repeat(TEXT, axis=0)
        draw.text((8, y + TEXT / 2), low, "black", font, anchor="lm")
        sheet.paste(Image.fromarray(bar), (round(x), y))
        draw.text((x + 10.5 * TEXT, y + TEXT / 2), high, "black", font, anchor="lm")
        y += line
    for k, note in enumerate(notes):
        draw.text((8, y + k * line), note, "black", font)
    return sheet
