"""Several processes give what one gives: two and three on gloo, with odd numbers of images.

Every process runs `together`, which saves what it got; sizes as in the modules.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import HAS_GPU, ROOT, TINY, generator
from test_pmsacl import pictures
from torch import nn

import eval as evaluation
from autoencoder import gaussian
from detectors import PaDiM
from encoder import ResNet18, seeded
from igd import IGD
from losses import contrastive_loss, multi_centring_loss
from support import run, scoring
from support.together import Together
from support.training import step


@contextlib.contextmanager
def frozen_norms():
    """Batch norm in evaluation mode, since gloo has none over all processes."""
    with pytest.MonkeyPatch.context() as patch:
        forward = nn.BatchNorm2d.forward

        def frozen(self, x):
            training, self.training = self.training, False
            try:
                return forward(self, x)
            finally:
                self.training = training

        patch.setattr(nn.BatchNorm2d, "forward", frozen)
        yield


class Scorer:
    """A detector whose map and score tell which image it saw."""

    def score(self, images):
        assert len(images)
        x = torch.from_numpy(images).float()
        return x.mean(dim=1), x.mean(dim=(1, 2, 3))


def an_igd_step(group=None):
    """The losses of a step of IGD with eq. 12, from 13 images; its gradients; sigma^2."""
    igd = IGD(ResNet18(seeded(5)), image_size=32, width=4, batch_size=12, epochs=2, stride=16)
    (training,) = igd.trainings(pictures(count=13), group)
    with frozen_norms():
        losses = run.averaged(training.losses, training.networks)
        values = step(training, losses, None)
    gradients = {
        name: p.grad for name, p in training.networks.named_parameters() if p.grad is not None
    }
    return values, gradients, training.model.sigma2


def measured(detector):
    """All measures of 30 images, of which every other one has a lesion's mask."""
    masks = np.zeros((30, 32, 32), bool)
    masks[1::2, 8:20, 4:16] = True
    scores, maps = scoring.score_set(detector, pictures(count=30), batch=4)
    return evaluation.protocol(scores, masks.any((1, 2)), maps, masks, seed=0)


def together(rank: int, world: int, folder: str) -> None:
    """All that processes do together, to a file."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    got = {}
    # eq. 5 over all rows, and the mean gradient
    x, n, pair, c, weight = torch.load(f"{folder}/whole.pt", weights_only=True)
    own = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    net.weight.data = weight if rank == 0 else torch.zeros_like(weight)  # those of the first count

    def losses():
        z = net(x[own])
        z_all, n_all, pair_all, rows = run.gather(z, n[own], pair[own] - own.start)
        contrastive = contrastive_loss(z_all, n_all, pair_all, c, rows=rows)
        return {"pmsacl": contrastive, "ctr": multi_centring_loss(z, n[own], c)}

    averaged = run.averaged(losses, net)  # kept: its hooks work in the backward pass
    terms = averaged()
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    got["loss"], got["gradient"] = run.mean_of_processes(loss.detach(), 1), net.weight.grad
    got["mean"] = run.mean_of_processes(torch.tensor([float(rank)]), rank + 1)
    # PaDiM, IGD's Gaussian and step, the scores of a set
    padim = PaDiM(ResNet18(seeded(5)), channels=20).fit(pictures(count=13), group=dist.group.WORLD)
    got |= {"mu": padim.mean, "whitening": padim.whitening}
    z = torch.randn(13, 4, generator=generator(3)).split([4, 3, 3, 3])
    got["gaussian"] = gaussian(iter(z[rank::world]), 0.7, dist.group.WORLD)
    got["igd"] = an_igd_step(dist.group.WORLD)
    for n in (1, 5, 11):  # the last batch is smaller than the number of processes, or odd
        got[n] = (
            scoring.score_set(Together(Scorer()), pictures(count=n), batch=4)
            if rank == 0
            else [Together(Scorer()).score(pictures(count=n)[k : k + 4]) for k in range(0, n, 4)]
        )
    if rank == 0:
        got["measures"] = measured(Together(padim))
    else:
        for k in range(0, 30, 4):
            Together(padim).score(pictures(count=30)[k : k + 4])
    run.wait_for_all()
    torch.save(got, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_processes_want_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is set without LOCAL_RANK"):
        run.join_processes()


def same_numbers(got, want):
    """Two rows of results: the numbers to 1e-4, since rounding may move a threshold."""
    assert got.keys() == want.keys() and "aupro" in got
    for name, value in want.items():
        if isinstance(value, float) or name == "map_scale":
            assert got[name] == pytest.approx(value, rel=1e-4), name
        elif name != "best_possible":
            assert got[name] == value, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_give_what_one_gives(world, tmp_path):
    g, views = seeded(0), 4 * world
    n = torch.arange(2).repeat_interleave(2).repeat(world)
    pair = torch.arange(views) ^ 1
    x, c = torch.randn(views, 6, generator=g), torch.randn(2, 5, generator=g)
    weight = torch.randn(5, 6, generator=g)
    torch.save((x, n, pair, c, weight), tmp_path / "whole.pt")
    torch.multiprocessing.spawn(together, (world, str(tmp_path)), nprocs=world)
    every = [torch.load(tmp_path / f"rank{i}.pt", weights_only=False) for i in range(world)]

    net = nn.Linear(6, 5, bias=False)
    net.weight.data = weight.clone()
    z = net(x)
    loss = contrastive_loss(z, n, pair, c) + multi_centring_loss(z, n, c)
    loss.backward()
    padim = PaDiM(ResNet18(seeded(5)), channels=20).fit(pictures(count=13))
    wanted = gaussian([torch.randn(13, 4, generator=generator(3))], 0.7)
    values, gradients, sigma2 = an_igd_step()
    for n in (1, 5, 11):
        for one, several in zip(
            scoring.score_set(Scorer(), pictures(count=n)), every[0][n], strict=True
        ):
            np.testing.assert_allclose(several, one, rtol=1e-6)
    same_numbers(every[0]["measures"], measured(padim))
    for got in every:
        torch.testing.assert_close(got["loss"], loss.detach())
        torch.testing.assert_close(got["gradient"], net.weight.grad)
        expected = sum(i * (i + 1) for i in range(world)) / sum(range(1, world + 1))
        assert float(got["mean"]) == pytest.approx(expected)
        for name, want in (("mu", padim.mean), ("whitening", padim.whitening)):
            assert (got[name] - want).norm() < 1e-6 * want.norm(), name
        torch.testing.assert_close(got["gaussian"], wanted)
        torch.testing.assert_close(got["igd"][2], sigma2)
        assert list(got["igd"][1]) == list(gradients)
        for name, want in gradients.items():
            assert (got["igd"][1][name] - want).abs().max() < 1e-4 * want.abs().max(), name
    total = sum(sum(got["igd"][0].values()) for got in every) / world
    assert total == pytest.approx(sum(values.values()), rel=1e-5)


@pytest.mark.skipif(HAS_GPU, reason="two processes want two GPUs, and `finished` has one")
def test_the_main_job_by_two_processes(phantoms, finished, tmp_path):
    """They train and score together; one process gets the same from their detectors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["pmsacl.py", "--data", str(phantoms), "--out", str(tmp_path / "run"), *TINY]
    command += ["--detector", "padim,panda"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    file = tmp_path / "run" / "results.json"
    by_two = json.loads(file.read_text())
    alone = json.loads((finished / "results.json").read_text())
    same_numbers(by_two["untrained"], alone["untrained"])
    assert evaluation.main([str(tmp_path / "run")]) == 0
    again = json.loads(file.read_text())
    for name in ("padim", "panda"):
        same_numbers(again[name], by_two[name])
    assert again["f_beta"]["image_auroc"] == by_two["f_beta"]["image_auroc"]
