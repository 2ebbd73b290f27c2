"""Every option of a run: its default, its check, and the command line that sets it.

A tag names the paper's section or the row of docs/deviations.md that an option comes from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baselines.pretraining import METHODS, UNTRAINED
from baselines.strong import STRONG, TILES
from igd import IGD
from support.checks import check_places
from support.claim import is_empty
from support.compared import NAMES, chosen
from support.depth import parse_window
from support.readers import read_config, short
from support.run import Parser, pick_device, real

TINY = 1e-12  # above 0
RATE = 1e3  # the highest learning rate: float32 has no room for 1e300
SCALE = 1e3  # the largest factor of eq. 5's numerator
TERMS = ("ctr", "pmsacl", "aug", "pos")  # of eq. 1, in its order
CENTRED = {"ctr", "pmsacl"}  # the terms that need the centres of eq. 2


def _option(
    default: Any,
    text: str,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    choices: Iterable[str] = (),
) -> Any:
    """A field of Config: its default, its help, and the values that it may have."""
    checks = {"choices": tuple(choices), "least": least, "most": most}
    return dataclasses.field(default=default, metadata={"help": text, **checks})


PRESETS: dict[str, dict[str, int | float | str]] = {
    "paper": {},  # section 4.2: the defaults below
    "quick": {  # what a CPU finishes in minutes, with views that keep most lesions in sight
        "image_size": 64,
        "batch_size": 8,
        "epochs": 4,
        "lr": 0.03,
        "crop_area": 0.6,
        "jitter": 0.25,
        "lesion_area": "0.01,0.15",
        "local": "yes",
        "igd_epochs": 6,
        "igd_local_epochs": 2,
        "igd_batch_size": 8,
        "igd_patches": 72,
        "igd_lr": 1e-3,
        "igd_encoder_lr": 3e-4,
        "igd_warmup": 0.5,
        "igd_width": 8,
    },
}


@dataclass(frozen=True)
class Config:
    """Every setting of a run, and the only source of its defaults; section 4.2 where it says."""

    # images and results
    data: str = _option("", "folder of images (default: phantom images are drawn)")
    out: str = _option("", "run folder (default: the next free runs/NAME)")
    preset: str = _option("", "default: paper with --data, else quick", choices=["", *PRESETS])
    image_size: int = _option(256, "pixels a side, a multiple of 32", 32, 4096)  # [P:§4.2]
    skip_bad: bool = _option(False, "leave unreadable files out instead of stopping")
    allow_duplicates: bool = _option(False, "continue if an image is in two sets or listed twice")
    window: str = _option("", "LOW,HIGH: black and white in files of more than 8 bits (CT: needed)")
    # pre-training: the loss
    method: str = _option("pmsacl", "the pre-training", choices=METHODS)  # [P:Tab.9]
    terms: str = _option("ctr,pmsacl,aug", "terms of eq. 1, comma-separated")  # [P!(1) R13]
    local_terms: str = _option("ctr,pmsacl,aug,pos", "the same, for 32 px patches")  # [P!(9) R13]
    classes: int = _option(4, "|A|: 0 to |A| - 1 lesions", 1, 1024)  # [P!§3.1 R1]
    tau: float = _option(0.2, "temperature", 1e-3, 1e3)  # [P!(7) R3]
    alpha: float = _option(2.0, "weakens the repulsion within a class", 1e-3, 1e3)  # [P!(7) R3]
    positive_scale: str = _option("kappa", "of the positive: kappa, tau or a number")  # [P!(5) R2]
    features: str = _option(  # [P!(3) R20]
        "unit", "z on the unit sphere, or raw", choices=["unit", "raw"]
    )
    centre_weight: float = _option(1.0, "weight of l_ctr", 0, 1e6)  # [P!(1) R20]
    centres: str = _option(  # [P:Tab.10]
        "untrained",
        "centres of the classes",
        choices=["untrained", "random", "equidistant", "re-estimated"],
    )
    warmup_epochs: int = _option(  # [P!(2) R20]
        0, "epochs before the centres are computed and their terms join", 0, 10**6
    )
    aug_head: str = _option(  # [P!(8) R17]
        "backbone", "input of f_beta", choices=["backbone", "projection"]
    )
    # pre-training: the views
    strong: str = _option("medmix", "strong augmentation", choices=STRONG)  # [P:Fig.6]
    lesion_area: str = _option("0.005,0.08", "min,max as shares of the image")  # [P!§4.2 R12]
    weak: str = _option("simclr", "weak augmentation", choices=["simclr", "ccd"])  # [P!§4.2 R16]
    crop_area: float = _option(  # [P!§4.2 R16]
        0.0, "smallest crop, as a share of the image; 0: that of --weak", 0, 1
    )
    jitter: float = _option(1.0, "factor of the colour jitter", 0, 10)  # [P!§4.2 R16]
    # pre-training: the optimiser
    encoder: str = _option("", "use the encoders of this other run instead of training")
    init: str = _option("auto", "auto (phantoms: random), imagenet, random or FILE")  # [P!§4.2 R14]
    epochs: int = _option(2000, "passes over the images", 1, 10**6)  # [P!§4.2 R15]
    batch_size: int = _option(32, "images, with 2 |A| views of each", 2, 2**16)  # [P!§4.2 R15]
    lr: float = _option(0.01, "learning rate at the start", TINY, RATE)  # [P:§4.2]
    lr_end: float = _option(1e-5, "learning rate at the end", TINY, RATE)  # [P!§4.2 R15]
    local_lr: float = _option(  # [P!§4.2 R15]
        0.1, "learning rate at the start, for 32 px patches", TINY, RATE
    )
    momentum: float = _option(0.9, "momentum of SGD", 0, 0.9999)  # [P!§4.2 R15]
    weight_decay: float = _option(3e-4, "weight decay of SGD", 0, 1)  # [P!§4.2 R15]
    # detectors
    healthy_share: float = _option(  # [P!§3.3 R29]
        0.1, "share of healthy images, 10 or more, held out: percentiles refer to them", 0, 0.5
    )
    detector: str = _option("padim", f"both (padim,igd), or some of {', '.join(NAMES)}")
    detector_epochs: int = _option(
        0, "epochs of each detector but padim and igd; 0: its default", 0, 10**6
    )
    detector_lr: float = _option(0.0, "learning rate of these; 0: their default", 0, RATE)
    denoise: float = _option(0.0, "share of pixels hidden from dae in training", 0, 1)
    local: str = _option(
        "auto", "IGD's local model; auto: above 64 px", choices=["auto", "yes", "no"]
    )
    igd_epochs: int = _option(IGD.epochs, "epochs of IGD's global model", 1, 10**6)  # [P!§4.2 R21]
    igd_local_epochs: int = _option(IGD.local_epochs, "epochs of IGD's local model", 1, 10**6)
    igd_batch_size: int = _option(IGD.batch_size, "images in a step of the global model", 2, 2**16)
    igd_patches: int = _option(IGD.patches, "patches in a step of the local model", 2, 10**6)
    igd_lr: float = _option(IGD.lr, "learning rate of IGD at the start", TINY, RATE)
    igd_encoder_lr: float = _option(IGD.encoder_lr, "rate of its encoders; 0: frozen", 0, RATE)
    igd_warmup: float = _option(IGD.warmup, "share of --igd-epochs before eq. 12 joins", 0, 1)
    igd_width: int = _option(IGD.width, "channels of IGD's networks at full size", 1, 1024)
    paper_protocol: bool = _option(False, "also measure images that set thresholds")  # [P!§4.3 R8]
    # the machine
    seed: int = _option(0, "of the random numbers", 0, 2**64 - 1)
    device: str = _option("auto", "auto, cpu or cuda")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_value(self, field)
        _check_together(self)
        _check_method(self)
        positive_scale(self)  # a word or a number
        lesion_area(self)  # two numbers
        parse_window(self.window)  # two numbers, or none
        chosen(self.detector)  # names

    @property
    def trains(self) -> bool:
        """Whether an encoder is pre-trained in this run."""
        return self.method not in UNTRAINED and not self.encoder

    def names_of_terms(self, local: bool) -> tuple[str, ...]:
        """Of eq. 1, for the encoder of images or for that of patches."""
        return tuple((self.local_terms if local else self.terms).split(","))

    @property
    def local_igd(self) -> bool:
        """Whether there is IGD, with a local model of 32 px patches.   [P:§4.2]"""
        wanted = self.local == "yes" or (self.local == "auto" and self.image_size > 64)
        return wanted and "igd" in chosen(self.detector)

    def igd_settings(self) -> dict[str, Any]:
        """The arguments of IGD: --igd-NAME is NAME there."""
        names = [field.name for field in dataclasses.fields(self) if field.name.startswith("igd_")]
        settings = {name.removeprefix("igd_"): getattr(self, name) for name in names}
        return settings | {"image_size": self.image_size, "seed": self.seed}


GROUPS = {  # titles of --help -> the first option of each group
    "images and results": "data",
    "pre-training: the loss": "method",
    "pre-training: the views": "strong",
    "pre-training: the optimiser": "encoder",
    "detectors": "healthy_share",
    "the machine": "seed",
}


def _check_value(config: Config, field: dataclasses.Field) -> None:
    """raises: ValueError if the option is not one of its choices, or out of range."""
    value, checks = getattr(config, field.name), field.metadata
    if checks["choices"] and value not in checks["choices"]:
        raise _bad(config, field.name, f"one of {', '.join(filter(None, checks['choices']))}")
    if isinstance(value, str):
        return
    if not checks["least"] <= value <= checks["most"]:  # so written, NaN is refused
        raise _bad(config, field.name, f"from {checks['least']} to {checks['most']}")


def _check_together(config: Config) -> None:
    """raises: ValueError if options that are possible alone do not go together."""
    size = config.image_size
    if size % 32:
        raise _bad(config, "image_size", "a multiple of 32, 32 or above")
    if config.local == "yes" and size < 64:
        raise _bad(config, "local", f"no at --image-size {size}")
    if "pos" in config.names_of_terms(local=False) and size < 64:
        raise _bad(config, "terms", f"without pos (eq. 9) at --image-size {size}")
    if config.centres == "equidistant" and config.classes > 128:
        raise _bad(config, "classes", "128 or below with --centres equidistant: z has 128 axes")
    if config.strong == "permutation" and config.classes > len(TILES):
        raise _bad(config, "classes", f"{len(TILES)} or below with --strong permutation")


def _check_method(config: Config) -> None:
    """raises: ValueError if terms, warm-up or initial weights do not go with the method."""
    for name in ("terms", "local_terms"):
        given = getattr(config, name).split(",")
        terms, allowed = set(given), METHODS[config.method].get(name, ",".join(TERMS)).split(",")
        if not terms <= set(allowed) or len(terms) < len(given):
            wanted = f"a comma-separated list of some of {', '.join(allowed)}, each once"
            raise _bad(config, name, f"{wanted} (--method {config.method})")
        if config.warmup_epochs and (config.warmup_epochs >= config.epochs or terms <= CENTRED):
            wanted = f"{option(name)} with one that needs no centres"
            raise _bad(config, "warmup_epochs", f"below --epochs, and {wanted}")
    if config.method == "random" and config.init != "random":
        raise _bad(config, "init", "random for --method random")
    if config.method == "imagenet" and config.init in ("random", "auto"):
        raise _bad(config, "init", "imagenet or a FILE for --method imagenet")


def option(name: str) -> str:
    """The option of a field of Config."""
    return "--" + name.replace("_", "-")


def _bad(config: Config, name: str, wanted: str) -> ValueError:
    return ValueError(f"{option(name)} must be {wanted}, got {short(getattr(config, name))}")


def positive_scale(config: Config) -> str | float:
    """The factor of eq. 5's numerator: "kappa", "tau" or a number.   [P!(5) R2]"""
    if config.positive_scale in ("kappa", "tau"):
        return config.positive_scale
    try:
        number = float(config.positive_scale)
    except ValueError:
        number = math.nan
    if not abs(number) <= SCALE:
        raise _bad(config, "positive_scale", f"kappa, tau or a number up to {SCALE:g}")
    return number


AS_PRINTED = {  # what the paper prints, in place of our defaults for R2, R15, R17 and R20
    "positive_scale": "0.5",
    "aug_head": "projection",
    "features": "raw",
    "centre_weight": 1.0,
    "local_lr": 0.01,
}


def lesion_area(config: Config) -> tuple[float, float]:
    """The least and the most area of a lesion's box, shares of the image.   [P!§4.2 R12]"""
    try:
        low, high = map(float, config.lesion_area.split(","))
    except ValueError:
        low = high = 0.0
    if not 1e-6 <= low <= high <= 1:
        raise _bad(config, "lesion_area", "two numbers, 0 < least <= most <= 1, as in 0.005,0.08")
    return low, high


# --- the command line --------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> tuple[dict[str, Any], str | None]:
    """The options that were given, by field of Config, and --resume's value (None if absent)."""
    parser = Parser(prog="pmsacl.py", description="Pre-trains, fits detectors, evaluates.")
    titles = {first: title for title, first in GROUPS.items()}
    for field in dataclasses.fields(Config):
        if field.name in titles:
            group = parser.add_argument_group(titles[field.name])
        _add_option(group, field)
    printed = " ".join(f"{option(name)} {value}" for name, value in AS_PRINTED.items())
    parser.add_argument("--as-printed", action="store_true", help=f"as the paper has it: {printed}")
    parser.add_argument("--dry-run", action="store_true", default=None, help="print the plan alone")
    parser.add_argument(
        "--resume", nargs="?", const=True, metavar="RUN", help="continue this run (default: --out)"
    )
    options = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    for name, value in options.items():
        if value == "":  # of a shell's variable that is not set
            parser.error(f"argument {option(name)}: is empty")
        weights = name == "init" and value not in ("auto", "imagenet", "random")
        if name in ("data", "encoder") or weights:
            options[name] = str(real(value))  # a run may be resumed from elsewhere
    if options.pop("as_printed"):
        options = AS_PRINTED | options
    check_encoder(options)
    return options, "" if (resume := options.pop("resume", None)) is True else resume


def _add_option(group: Any, field: dataclasses.Field) -> None:
    """One option with its choices, its default and the presets' values in its help."""
    flag, text = option(field.name), field.metadata["help"]
    if isinstance(field.default, bool):
        group.add_argument(flag, action="store_true", default=None, help=text)
        return
    values = {"default": field.default}
    values |= {name: preset[field.name] for name, preset in PRESETS.items() if field.name in preset}
    if field.default != "":
        text += " (" + "; ".join(f"{name}: {value}" for name, value in values.items()) + ")"
    words = ",".join(filter(None, field.metadata["choices"]))
    metavar = "{" + words + "}" if words else None
    group.add_argument(flag, type=type(field.default), metavar=metavar, help=text)


def resolve(options: dict[str, Any], resume: str | None) -> tuple[Config, Path]:
    """The whole config: the options over the run's own, or over the preset's; and the run's folder.

    raises: ValueError if an option is impossible, or is not what the run to resume has.
    """
    newest = resume is not None
    folder = Path(resume or options.get("out") or default_folder(options.get("data", ""), newest))
    saved = read_config(folder)
    saved = {name: saved[name] for name in Config.__dataclass_fields__ if name in saved}
    begun = folder.is_dir() and not is_empty(folder)
    if resume and options.get("out", resume) != resume:
        raise ValueError(f"--resume {resume} resumes in that folder: leave out --out")
    if resume is not None and saved:
        options = _continued(options, saved, folder)
    elif newest and (begun or not options.get("data")):
        raise ValueError(f"--resume {folder}: no run, it has no config.json; begin one without it")
    elif begun and resume is None:
        raise ValueError(f"--out {folder}: exists; add --resume to go on with it, or name another")
    config = make_config(options | {"out": str(folder)})
    check_places(config.data, folder)
    return config, folder


def _continued(options: dict[str, Any], saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The options of the run in `folder`; those given again must agree with them."""
    saved["data"] = saved.get("data") and str(real(saved["data"]))
    if saved["data"] and not Path(saved["data"]).exists():
        if not options.get("data"):
            raise ValueError(
                f"{saved['data']}: the images of {folder} are not there; --data names their place"
            )
        saved["data"] = options["data"]
    for name, value in options.items():
        if name not in ("out", "device") and value != saved.get(name, value):
            raise ValueError(
                f"{folder} was begun with {option(name)} {saved[name]}, not {value}: "
                "leave the option out, or begin another run without --resume"
            )
    return saved | options


def make_config(options: dict[str, Any]) -> Config:
    """The options over those that --method sets, and these over the preset's.

    raises: ValueError if an option is impossible.
    """
    if options.get("dry_run"):
        raise ValueError("--dry-run goes with pmsacl.py alone")
    preset = options.get("preset") or ("paper" if options.get("data") else "quick")
    start = {} if options.get("data") else {"init": "random"}  # phantoms gain nothing by ImageNet
    method = METHODS.get(options.get("method", Config.method), {})
    device = pick_device(options.get("device", "auto"))
    merged: dict[str, Any] = start | PRESETS.get(preset, {}) | method | options
    merged |= {"preset": preset, "device": device}
    if merged.get("image_size", Config.image_size) < 64 and "local" not in options:
        merged["local"] = "auto"  # a preset's "yes" is for images that hold patches
    return Config(**merged)


def check_encoder(options: Mapping[str, Any]) -> None:
    """raises: ValueError if options of the pre-training are given that --encoder replaces."""
    names = list(Config.__dataclass_fields__)
    loss = names[names.index("method") : names.index("strong")]
    sgd = names[names.index("epochs") : names.index("healthy_share")]
    unused = [option(k) for k in loss + sgd if options.get(k, "none") not in UNTRAINED]
    if options.get("encoder") and unused:
        raise ValueError(f"--encoder replaces the pre-training: leave out {', '.join(unused)}")


def default_folder(source: str, newest: bool) -> Path:
    """runs/NAME of the data set, or NAME-2, ...: the newest that exists, or the next free one."""
    name = real(source).name if source else "phantom"
    number, folder = 1, Path("runs", name)
    while folder.exists():
        number += 1
        following = Path("runs", f"{name}-{number}")
        if newest and not following.exists():
            break
        folder = following
    return folder
