# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # PMSACL step by step
#
# Eq. 1 to 7 and 13 in sections, on phantom images, in a minute or two on a CPU. Each ends with an
# `assert` on what it claims. The modules hold the method; nothing is defined here.

# %%
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "passive"
sys.path.insert(0, str(Path.cwd().parent if Path.cwd().name == "notebooks" else Path.cwd()))

import numpy as np
import torch
from IPython.display import display

import losses
from detectors import PaDiM
from encoder import Encoder, seeded, to_unit
from measures import auroc
from medmix import medmix
from pmsacl import class_views, pretrain
from support import data, layouts, phantom
from support.figures import image_grid
from support.options import Config

folder = Path(tempfile.mkdtemp())
phantom.draw(folder / "phantom", train=64, good=40, abnormal=40, size=64)
dataset = layouts.discover(folder / "phantom")
images, _ = data.decode(dataset.train, 64, folder)
x = to_unit(images[:8], "cpu")  # (B, 3, S, S) in [0, 1]
print(dataset.layout, images.shape)
assert images.dtype == np.uint8 and 0 <= x.min() <= x.max() <= 1

# %% [markdown]
# ## MedMix: class n carries n fake lesions `[P:§3.1]`

# %%
columns, areas = [x], [0.0]
for n in range(1, 4):
    mixed, mask = medmix(x, torch.full((len(x),), n), seeded(0, n))
    assert torch.equal(mixed[~mask.expand_as(x)], x[~mask.expand_as(x)])  # only inside the mask
    columns.append(mixed)
    areas.append(float(mask.float().mean()))
cells = [[(c[i] * 255).byte().numpy() for c in columns] for i in range(4)]
display(image_grid(cells, columns=[f"n = {n}" for n in range(4)]))
print("share of pixels altered:", [f"{a:.3f}" for a in areas])
assert areas == sorted(areas) and areas[1] > 0

# %% [markdown]
# ## Two weak views of each class `[P:(4)]`

# %%
config = Config(image_size=64, batch_size=8)
views, n, pair = class_views(x, config, seeded(1))
print(views.shape, n.tolist()[:20])
assert len(views) == 2 * 4 * 8 and torch.equal(pair[pair], torch.arange(len(n)))

# %% [markdown]
# ## Class centres of an untrained encoder `[P:(2)]` and the loss that pulls to them `[P:(3)]`

# %%
encoder = Encoder(generator=seeded(2)).train()
c = losses.class_centres(encoder, [(views, n)])  # (A, Z)
with torch.no_grad():
    z = encoder(views)
print("distances between the centres:", torch.pdist(c))
at_means = losses.multi_centring_loss(z, n, c)
shifted = losses.multi_centring_loss(z, n, c + 0.1)
assert at_means < shifted  # the centres are the means: nothing is closer

# %% [markdown]
# ## The contrastive loss `[P:(5)]` of features centred by `[P:(6)]`, with kappa of `[P:(7)]`

# %%
alpha_5 = losses.contrastive_loss(z, n, pair, c, alpha=5.0, positive_scale="tau")
alpha_1 = losses.contrastive_loss(z, n, pair, c, alpha=1.0, positive_scale="tau")
print(f"alpha 5: {alpha_5:.3f}   alpha 1: {alpha_1:.3f}")
assert alpha_5 < alpha_1  # above 1 it shrinks the denominator's terms of similar views of the class
collapsed = c[n].clone()  # every z at its centre: f = 0, and the loss is log(N - 1)
at_centre = losses.contrastive_loss(collapsed, n, pair, c)
assert abs(float(at_centre) - np.log(len(n) - 1)) < 1e-4

# %% [markdown]
# ## A few steps of the whole loss `[P:(1)]`

# %%
config = Config(image_size=64, batch_size=8, epochs=3, device="cpu", init="random")
encoder, _ = pretrain(images, config, folder)
log = (folder / "log.csv").read_text().splitlines()
print("\n".join(log))
assert len(log) == 4  # a header and three epochs

# %% [markdown]
# ## PaDiM on the encoder `[P:(13)]`

# %%
test, _ = data.decode([s.path for s in dataset.test], 64, folder)
labels = [s.label for s in dataset.test]
maps, scores = PaDiM(encoder.backbone).fit(images).score(test)
print(f"image AUROC after three epochs: {auroc(scores, labels):.2f}")
assert torch.equal(scores, maps.amax(dim=(1, 2)))  # s(x) = max of its map
