# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The paper's figures
#
# Each figure of the paper, drawn from a run, and what to look at. The run here is of phantom
# images and trains for seconds, so that the figures show how they are read and nothing about the
# method. For a run of your own: `python experiments.py --figure 1 2 3 4 5 --run runs/kvasir`.

# %%
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "passive"
sys.path.insert(0, str(Path.cwd().parent if Path.cwd().name == "notebooks" else Path.cwd()))

import torch
from IPython.display import Image, display

from baselines.strong import STRONG
from detectors import PaDiM
from encoder import seeded
from measures import auroc
from medmix import medmix
from pmsacl import Pretraining
from support import data, layouts, phantom
from support.cards import jpeg
from support.figures import dot_chart
from support.job import main_job
from support.options import make_config
from support.paper_figures import draw
from support.run import read_json, read_rows


def show(picture):
    """A JPEG file: as PNG these pictures take four times the room."""
    display(Image(jpeg(picture)))


folder = Path(tempfile.mkdtemp())
phantom.draw(folder / "phantom", train=40, good=24, abnormal=24, size=64)
quick = {"data": str(folder / "phantom"), "preset": "quick", "init": "random"}
run = folder / "run"
with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
    options = {"epochs": 1, "detector": "both", "local": "no", "igd_epochs": 3, "out": str(run)}
    main_job(make_config(quick | options), run)
assert (run / "results.json").exists()

# %% [markdown]
# ## Figure 1: the classes of views, and where they land `[P:Fig.1]`
#
# The views of a class share a colour; after a long training each colour gathers in a cluster of its
# own, as in the paper's sketch. After one epoch the colours still lie mixed and the four means are
# close together: eq. 2 begins from there.

# %%
show(draw(1, run))
last = read_rows(run / "log.csv")[-1]
assert float(last["distance"]) < 0.1 and float(last["accuracy"]) < 0.5  # of the four class means

# %% [markdown]
# ## Figure 2: MedMix `[P:Fig.2]`
#
# From left to right each healthy image gets none, one, two and three fake lesions. Look at how they
# differ in colour, texture and shape, and at how their soft rims hide the edge.

# %%
show(draw(2, run))
n = torch.arange(4).repeat_interleave(8)
_, mask = medmix(torch.rand(8, 3, 64, 64, generator=seeded(0)), n, seeded(1))
assert torch.equal(mask.flatten(1).any(dim=1), n > 0)  # none, then one to three

# %% [markdown]
# ## Figures 3 and 4: lesions found by PaDiM and by IGD `[P:Fig.3]` `[P:Fig.4]`
#
# Compare the yellow prediction with the cyan truth, from the image that scores highest to the one
# that scores lowest. PaDiM's maps have the coarse blocks of the network's third layer; IGD's follow
# what its auto-encoder could not draw again.

# %%
show(draw(3, run))
show(draw(4, run))
results = read_json(run / "results.json")
assert results["padim"]["pixel_auroc"] > 0.8 and results["igd"]["pixel_auroc"] > 0.5

# %% [markdown]
# ## Figure 5: detections with their scores `[P:Fig.5]`
#
# A red frame is a mistake: in the upper row an image with a score that is too high, in the lower
# one a lesion that passed. Mistakes have scores near the threshold if the detector is any good.

# %%
show(draw(5, run))
threshold = results["padim"]["threshold"]
for row in read_rows(run / "scores.csv"):
    assert (float(row["padim_score"]) >= threshold) == (row["padim_predicted"] == "1")

# %% [markdown]
# ## Figures 6 and 7: which augmentation, and how many classes? `[P:Fig.6]` `[P:Fig.7]`
#
# A dot is the image AUROC of PaDiM (the paper's Figure 6: of IGD) after pre-training with that
# augmentation, or with that many classes. After four steps at 32 pixels all differences are noise:
# `experiments.py --figure 6 7` trains each row for real, with several seeds, and draws bars of one
# standard deviation.

# %%
small = folder / "small"
phantom.draw(small, train=24, good=24, abnormal=24, size=32)
dataset = layouts.discover(small)
train, _ = data.decode(dataset.train, 32, folder)
test, _ = data.decode([sample.path for sample in dataset.test], 32, folder)


def auroc_of(**options):
    """Image AUROC of PaDiM on an encoder that took four steps with these options."""
    given = {"data": str(small), "preset": "quick", "image_size": 32, "batch_size": 4}
    training = Pretraining(train, make_config(given | {"init": "random"} | options))
    for _ in range(4):
        training.update(training.losses())
    scores = PaDiM(training.encoder.backbone).fit(train).score(test)[1]
    return [auroc(scores, [sample.label for sample in dataset.test])]


with contextlib.redirect_stderr(io.StringIO()):
    strong = {name: auroc_of(strong=name) for name in STRONG}
    classes = {f"|A| = {k}": auroc_of(classes=k) for k in (1, 2, 3)} | {"|A| = 4": strong["medmix"]}
for title, values in (("Fig. 6: augmentations", strong), ("Fig. 7: classes", classes)):
    show(dot_chart(values, {}, title=f"{title}, small phantoms", axis="image AUROC of PaDiM"))
assert all(0 <= value <= 1 for [value] in (strong | classes).values())

# %% [markdown]
# ## Section 4.6: the features `[P:§4.6]`
#
# t-SNE of f_theta's features: healthy images with fake lesions in colours, test images as rings.
# At best, black rings (normal) lie among the blue dots and red ones (abnormal) away from them; real
# lesions need not lie among the colours of the fake ones.

# %%
display(Image(run / "figures" / "features.png"))
assert results["f_beta"]["image_auroc"] < 0.9  # after three steps the classes lie mixed still
