"""Every option of a run: its default, its check, and the command line that sets it.

A tag names the paper's section or the README's row that an option comes from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import medmix
from baselines import pretraining as baselines
from support.run import Parser, pick_device, read_json

TERMS = ("ctr", "pmsacl", "aug", "pos")  # of eq. 1, in its order
CENTRED = {"ctr", "pmsacl"}  # the terms that need the centres of eq. 2


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Every setting of a run, and the only source of its defaults; section 4.2 where it says."""

    data: str = _option("", "folder of images (default: phantom images are drawn)")
    out: str = _option("", "run folder (default: the next free runs/NAME)")
    preset: str = _option("", "paper (default with --data) or quick (what a CPU can finish)")
    method: str = _option("pmsacl", "the pre-training, one of Table 9's           [P:Tab.9]")
    strong: str = _option("medmix", "strong augmentation, one of Fig. 6's         [P:Fig.6]")
    terms: str = _option("ctr,pmsacl,aug", "of eq. 1, comma-separated          [P!(1) R13]")
    local_terms: str = _option("ctr,pmsacl,aug,pos", "for 32 px patches       [P!(9) R13]")
    classes: int = _option(4, "|A|: 0 to |A| - 1 lesions                         [P!§3.1 R1]")
    tau: float = _option(0.2, "temperature                                       [P!(7) R3]")
    alpha: float = _option(2.0, "weakens the repulsion within a class            [P!(7) R3]")
    positive_scale: str = _option("kappa", "kappa, tau or a number               [P!(5) R2]")
    features: str = _option("unit", "unit or raw                                 [P!(3) R20]")
    centre_weight: float = _option(1.0, "factor of l_ctr                         [P!(1) R20]")
    centres: str = _option("untrained", "one of Table 10's                       [P:Tab.10]")
    warmup_epochs: int = _option(0, "before the centres and what needs them      [P!(2) R20]")
    aug_head: str = _option("backbone", "f_beta sees the backbone or projection  [P!(8) R17]")
    weak: str = _option("simclr", "weak augmentation: simclr or ccd              [P!§4.2 R16]")
    crop_area: float = _option(0.0, "its smallest crop; 0: as --weak has it      [P!§4.2 R16]")
    jitter: float = _option(1.0, "factor of its colour jitter                    [P!§4.2 R16]")
    lesion_area: str = _option("0.005,0.08", "least and most of the image       [P!§4.2 R12]")
    init: str = _option("auto", "auto, imagenet, random or a FILE                [P!§4.2 R14]")
    epochs: int = _option(2000, "passes over the images                          [P!§4.2 R15]")
    batch_size: int = _option(32, "images; views are 2 |A| times as many         [P:§4.2]")
    image_size: int = _option(256, "pixels a side                                [P:§4.2]")
    lr: float = _option(0.01, "learning rate at the start                        [P:§4.2]")
    lr_end: float = _option(1e-5, "of the cosine                                 [P!§4.2 R15]")
    local_lr: float = _option(0.1, "at the start, for 32 px patches              [P!§4.2 R15]")
    momentum: float = _option(0.9, "of SGD                                       [P!§4.2 R15]")
    weight_decay: float = _option(3e-4, "of SGD                                  [P!§4.2 R15]")
    detector: str = _option("padim", "padim, igd or both")
    local: str = _option("auto", "IGD's local model: yes, no or auto (above 64 px) [P:§4.2]")
    igd_epochs: int = _option(256, "of IGD's global model                        [P!§4.2 R21]")
    igd_local_epochs: int = _option(256, "of its local model, over all patches    [P!§4.2 R21]")
    igd_batch_size: int = _option(16, "images in a step of the global model    [P!§4.2 R21]")
    igd_patches: int = _option(450, "in a step of the local model               [P!§4.2 R21]")
    igd_lr: float = _option(1e-4, "of IGD's Adam, at the start                 [P!§4.2 R21]")
    igd_encoder_lr: float = _option(1e-4, "the same, of the pre-trained encoders [P!§4.2 R21]")
    igd_warmup: float = _option(0.0, "share of --igd-epochs before eq. 12 joins [P!§4.2 R21]")
    igd_width: int = _option(64, "channels of IGD's decoder and critic at full size   [R21]")
    paper_protocol: bool = _option(False, "keep validation images in the test [P!§4.3 R8]")
    skip_bad: bool = _option(False, "leave unreadable files out instead of stopping")
    seed: int = _option(0, "of every random draw")
    device: str = _option("auto", "auto, cpu or cuda")

    def __post_init__(self) -> None:
        choices = {
            "preset": ("", *PRESETS),
            "method": tuple(baselines.METHODS),
            "strong": tuple(medmix.STRONG),
            "centres": ("untrained", "random", "equidistant", "re-estimated"),
            "features": ("unit", "raw"),
            "aug_head": ("backbone", "projection"),
            "weak": ("simclr", "ccd"),
            "detector": ("padim", "igd", "both"),
            "local": ("auto", "yes", "no"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise _bad(self, name, f"one of {', '.join(filter(None, allowed))}")
        for name in ("tau", "alpha", "lr", "lr_end", "local_lr", "igd_lr", "igd_encoder_lr"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise _bad(self, name, "above 0")
        for name in ("centre_weight", "jitter", "momentum", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise _bad(self, name, "0 or above")
        least = {
            "classes": 1,
            "warmup_epochs": 0,
            "epochs": 1,
            "batch_size": 2,
            "seed": 0,
            "igd_epochs": 1,
            "igd_local_epochs": 1,
            "igd_batch_size": 2,
            "igd_patches": 2,
            "igd_width": 1,
        }
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise _bad(self, name, f"{lowest} or above")
        if self.image_size < 32 or self.image_size % 32:
            raise _bad(self, "image_size", "a multiple of 32, 32 or above")
        if self.local == "yes" and self.image_size < 64:
            raise _bad(self, "local", f"no at --image-size {self.image_size}")
        for name in ("crop_area", "igd_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise _bad(self, name, "from 0 to 1")
        if "pos" in self.terms.split(",") and self.image_size < 64:
            raise _bad(self, "terms", f"without pos (eq. 9) at --image-size {self.image_size}")
        if self.centres == "equidistant" and self.classes > 128:
            raise _bad(self, "classes", "128 or below with --centres equidistant: z has 128 axes")
        if self.strong == "permutation" and self.classes > len(medmix.TILES):
            raise _bad(self, "classes", f"{len(medmix.TILES)} or below with --strong permutation")
        _check_method(self)
        positive_scale(self)  # a word or a number
        lesion_area(self)  # two numbers


def _check_method(config: Config) -> None:
    """raises: ValueError if terms, warm-up or start weights do not go with the method."""
    for name in ("terms", "local_terms"):
        terms = set(getattr(config, name).split(","))
        own = baselines.METHODS[config.method].get(name, ",".join(TERMS)).split(",")
        if not terms <= set(own):
            wanted = f"a comma-separated list out of {', '.join(own)} (--method {config.method})"
            raise _bad(config, name, wanted)
        if config.warmup_epochs and (config.warmup_epochs >= config.epochs or terms <= CENTRED):
            wanted = (
                f"below --epochs, and --{name.replace('_', '-')} with one that needs no centres"
            )
            raise _bad(config, "warmup_epochs", wanted)
    if config.method == "random" and config.init != "random":
        raise _bad(config, "init", "random for --method random")
    if config.method == "imagenet" and config.init in ("random", "auto"):
        raise _bad(config, "init", "imagenet or a FILE for --method imagenet")


def _bad(config: Config, name: str, wanted: str) -> ValueError:
    option = "--" + name.replace("_", "-")
    return ValueError(f"{option} must be {wanted}, got {getattr(config, name)!r}")


PRESETS: dict[str, dict[str, int | float | str]] = {
    "paper": {},  # section 4.2, the defaults above
    # what a CPU finishes in minutes
    "quick": {
        "image_size": 64,
        "batch_size": 16,
        "epochs": 8,
        "local": "yes",
        "igd_epochs": 20,
        "igd_local_epochs": 6,
        "igd_batch_size": 8,
        "igd_patches": 72,
        "igd_lr": 1e-3,
        "igd_encoder_lr": 3e-4,
        "igd_warmup": 0.5,
        "igd_width": 8,
    },
}


def positive_scale(config: Config) -> str | float:
    """The factor of eq. 5's numerator: "kappa", "tau" or a number.   [P!(5) R2]"""
    if config.positive_scale in ("kappa", "tau"):
        return config.positive_scale
    try:
        number = float(config.positive_scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _bad(config, "positive_scale", "kappa, tau or a number")
    return number


AS_PRINTED = {  # what the paper prints, in place of our defaults for R2, R17 and R20
    "positive_scale": "0.5",
    "aug_head": "projection",
    "features": "raw",
    "centre_weight": 1.0,
}


def lesion_area(config: Config) -> tuple[float, float]:
    """The least and the most area of a lesion's box, shares of the image.   [P!§4.2 R12]"""
    try:
        low, high = map(float, config.lesion_area.split(","))
    except ValueError:
        low = high = 0.0
    if not 0 < low <= high <= 1:
        raise _bad(config, "lesion_area", "two numbers, 0 < least <= most <= 1, as in 0.005,0.08")
    return low, high


# --- the command line --------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> tuple[dict[str, Any], str | None]:
    """The options that were given, by field of Config, and --resume's value (None if absent)."""
    parser = Parser(prog="pmsacl.py", description="Pre-trains, fits detectors, evaluates.")
    for field in dataclasses.fields(Config):
        option = "--" + field.name.replace("_", "-")
        kind = type(field.default)
        if kind is bool:
            parser.add_argument(
                option, action="store_true", default=None, help=field.metadata["help"]
            )
        else:
            default = f" (default: {field.default})" if field.default != "" else ""
            parser.add_argument(option, type=kind, help=field.metadata["help"] + default)
    parser.add_argument("--as-printed", action="store_true", help=f"as the paper: {AS_PRINTED}")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="go on with this run (default: --out)"
    )
    given = {
        name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None
    }
    if given.get("data"):
        given["data"] = str(Path(given["data"]).resolve())  # a run may go on from elsewhere
    if given.pop("as_printed"):
        given = AS_PRINTED | given
    return given, given.pop("resume", None)


def resolve(given: dict[str, Any], resume: str | None) -> tuple[Config, Path]:
    """The whole config: the given options over the run's own, or over the preset's.

    raises: ValueError if an option is impossible, or is not what the run to resume has.
    """
    run = Path(resume or given.get("out") or default_run(given.get("data", ""), resume is not None))
    saved = read_json(run / "config.json")
    saved = {name: saved[name] for name in Config.__dataclass_fields__ if name in saved}
    begun = run.is_dir() and {file.name for file in run.iterdir()} - {"cache", "phantom"}
    if resume is not None and saved:
        saved["data"] = saved.get("data") and str(Path(saved["data"]).resolve())
        if saved["data"] and not Path(saved["data"]).exists():
            if not given.get("data"):
                raise ValueError(
                    f"{saved['data']}: the images of {run} are not there; --data names their place"
                )
            saved["data"] = given["data"]
        for name, value in given.items():
            if name not in ("out", "device") and value != saved.get(name, value):
                option = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{run} was begun with {option} {saved[name]}, not {value}: leave the option "
                    "out, or begin another run without --resume"
                )
        given = saved | given
    elif resume and (begun or not given.get("data")):
        raise ValueError(f"--resume {resume}: no run, it has no config.json; begin one without it")
    elif begun and resume is None:
        raise ValueError(f"--out {run}: exists; add --resume to go on with it, or name another")
    return settle(given | {"out": str(run)}), run


def settle(given: dict[str, Any]) -> Config:
    """The given options over those that --method sets, and these over the preset's.

    raises: ValueError if an option is impossible.
    """
    preset = given.get("preset") or ("paper" if given.get("data") else "quick")
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    start = {} if given.get("data") else {"init": "random"}  # nothing to learn from ImageNet there
    device = pick_device(given.get("device", "auto"))
    method = baselines.METHODS.get(given.get("method", Config.method), {})
    settled = {"preset": preset, "device": device}
    merged: dict[str, Any] = start | PRESETS[preset] | method | given | settled
    if merged.get("image_size", Config.image_size) < 64 and "local" not in given:
        merged["local"] = "auto"  # a preset's "yes" is for images that hold patches
    return Config(**merged)


def default_run(source: str, newest: bool) -> Path:
    """runs/NAME of the data set, or NAME-2, ...: the newest that exists, or the next free one."""
    name = Path(source).resolve().name if source else "phantom"
    number, run = 1, Path("runs", name)
    while run.exists():
        number += 1
        following = Path("runs", f"{name}-{number}")
        if newest and not following.exists():
            break
        run = following
    return run
