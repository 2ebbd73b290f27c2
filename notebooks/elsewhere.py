# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The encoder and PaDiM in other libraries
#
# A run's `encoder.pt` holds ResNet-18's weights under torchvision's names, so other libraries load
# it as it is. Each cell runs where its library is installed, and says so where it is not.

# %%
import importlib
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "passive"
sys.path.insert(0, str(Path.cwd().parent if Path.cwd().name == "notebooks" else Path.cwd()))

import torch
import torch.nn.functional as F
from torch import nn

from detectors import PaDiM
from encoder import normalise, to_unit
from kernels.mahalanobis import mahalanobis
from pmsacl import pretrain
from support import data, layouts, phantom
from support.options import make_config

folder = Path(tempfile.mkdtemp())
phantom.draw(folder / "phantom", train=32, good=4, abnormal=4, size=64)
dataset = layouts.discover(folder / "phantom")
images, _ = data.decode(dataset.train, 64, folder)
test, _ = data.decode([sample.path for sample in dataset.test], 64, folder)
config = make_config({"preset": "quick", "epochs": 1, "init": "random", "device": "cpu"})
encoder, _ = pretrain(images, config, folder)
torch.save(encoder.backbone.state_dict(), folder / "encoder.pt")  # as in a run's folder
weights = torch.load(folder / "encoder.pt", weights_only=True)
x = normalise(to_unit(test, "cpu"))  # (B, 3, S, S), with ImageNet's mean and standard deviation
with torch.no_grad():
    ours = encoder.backbone.pooled(x)  # (B, 512)


def imported(name):
    """The module; None, with the reason, where it cannot be used."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, AttributeError) as error:  # or made for another torch
        print(f"{name} cannot be used here ({error}); pip install {name.split('.')[0]}")
        return None


# %% [markdown]
# ## torchvision: a strict load `[P:§3.3]`

# %%
if torchvision := imported("torchvision"):
    network = torchvision.models.resnet18()
    print(network.load_state_dict(weights, strict=True))
    network.fc = nn.Identity()
    with torch.no_grad():
        theirs = network.eval()(x)
    print("largest difference of the features:", float((theirs - ours).abs().max()))
    assert torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5)

# %% [markdown]
# ## timm: the same names `[P:§3.3]`

# %%
if timm := imported("timm"):
    network = timm.create_model("resnet18", pretrained=False)
    print(network.load_state_dict(weights, strict=True))
    network.reset_classifier(0)
    with torch.no_grad():
        theirs = network.eval()(x)
    print("largest difference of the features:", float((theirs - ours).abs().max()))
    assert torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5)

# %% [markdown]
# ## anomalib: its PaDiM on our encoder, beside ours `[P:(13)]`
#
# anomalib draws its own channels and adds 1e-5 to the ridge; with ours instead of these, the
# distances agree position by position.

# %%
padim = PaDiM(encoder.backbone, seed=0, eps=0.01 + 1e-5).fit(images)
if padim_of_anomalib := imported("anomalib.models.image.padim.torch_model"):
    model = padim_of_anomalib.PadimModel("resnet18", pre_trained=False)
    network = model.feature_extractor.feature_extractor
    of_layers = {k: v for k, v in weights.items() if k in network.state_dict()}  # 1 to 3
    print(network.load_state_dict(of_layers, strict=True))
    model.idx = padim.channels
    model.train()(normalise(to_unit(images, "cpu")))
    model.fit()
    gaussian, embedding = model.gaussian, model(x)  # (B, D, h, h)
    stats = [gaussian.mean, gaussian.inv_covariance]
    theirs = model.anomaly_map_generator.compute_distance(embedding, stats).flatten(1)  # (B, P)
    ours = mahalanobis(padim.embeddings(test), padim.mean, padim.whitening)
    print("largest relative difference:", float(((theirs - ours) / ours).abs().max()))
    assert torch.allclose(theirs, ours, rtol=1e-3)

# %% [markdown]
# ## ONNX: the encoder and PaDiM's scores, for any runtime `[P:(13)]`
#
# PaDiM scores with a network, one matrix for each position and one for the upsampling; written as
# a single module, all of it is exported, for batches of any size.


# %%
class Scoring(nn.Module):
    """Eq. 13 of a fitted PaDiM: images (B, 3, S, S) in [0, 1] -> maps (B, S, S), scores (B,)."""

    def __init__(self, padim):
        super().__init__()
        self.padim, self.backbone = padim, padim.backbone

    def forward(self, x):
        up, h = self.padim.upsampling, self.padim.upsampling.shape[1]
        stages = self.backbone.stages(normalise(x), last=3)
        parts = [
            F.interpolate(layer[:, chosen], size=(h, h), mode="nearest")
            for layer, chosen in zip(stages, self.padim.chosen, strict=True)
        ]
        r = torch.cat(parts, dim=1).flatten(2).transpose(1, 2) - self.padim.mean  # (B, P, D)
        s = torch.einsum("pij,bpj->bpi", self.padim.whitening, r).square().sum(dim=2).sqrt()
        maps = up @ s.reshape(-1, h, h) @ up.T
        return maps, maps.amax(dim=(1, 2))


def differs(name, module, inputs, outputs, wanted):
    """Export a module, run it in onnxruntime on `inputs`: the largest relative difference."""
    file, batch = str(folder / f"{name}.onnx"), {"x": {0: "B"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's newer exporter takes ten times as long
        torch.onnx.export(
            module.eval(), (inputs[:2],), file, dynamo=False, dynamic_axes=batch,
            input_names=["x"], output_names=outputs,
        )  # fmt: skip
    got = onnxruntime.InferenceSession(file).run(None, {"x": inputs.numpy()})
    pairs = [(torch.from_numpy(a), b) for a, b in zip(got, wanted, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


# %%
if onnxruntime := imported("onnxruntime"):
    raw, z = to_unit(test, "cpu"), encoder(to_unit(test, "cpu")).detach()
    of_encoder = differs("encoder", encoder, raw, ["z"], [z])
    of_padim = differs("padim", Scoring(padim), raw, ["maps", "scores"], padim.score(raw))
    print(f"largest relative difference: encoder {of_encoder:.1e}, PaDiM {of_padim:.1e}")
    assert max(of_encoder, of_padim) < 1e-5
