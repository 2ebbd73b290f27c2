"""A training step on a GPU waits once, for its losses; counted on the meta device."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from conftest import DEVICE
from test_pmsacl import pictures, tiny

import encoder
import pmsacl
from baselines import steps
from detectors import PaDiM
from encoder import ResNet18, to_unit
from igd import IGD
from support.data import resident
from support.launches import Launches, of_step
from support.options import Config
from support.scoring import score_batch
from support.training import step

WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "nonzero": lambda x: x.nonzero(),
    "list": lambda x: x.tolist(),
    "mask": lambda x: x[x > 0],
    "mask of the host": lambda x: x[torch.ones(len(x), dtype=torch.bool)],
    "index of the host": lambda x: x[torch.zeros(3, dtype=torch.int64)],
    "back": lambda x: x.cpu(),
    "copy": lambda x: torch.zeros(4).to(x.device),
    "large copy": lambda x: torch.zeros(2**20).to(x.device, non_blocking=True),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "copy_": lambda x: x.copy_(torch.zeros(len(x))),
}
FREE = {
    "arithmetic": lambda x: (2 * x).sum(),
    "index": lambda x: x[torch.zeros(3, dtype=torch.int64, device=x.device)],
    "scalar": lambda x: x.mul_(torch.tensor(2.0)),
    "small copy": lambda x: torch.zeros(4).to(x.device, non_blocking=True),
    "pinned copy": lambda x: torch.zeros(2**20).pin_memory().to(x.device, non_blocking=True),
}


@pytest.mark.parametrize("name", [*WAITING, *FREE])
def test_a_wait_is_counted_and_nothing_else_is(name):
    with Launches() as counted:
        (WAITING | FREE)[name](torch.empty(8, device="meta"))
    assert counted.waits.total() == (name in WAITING)


@pytest.mark.parametrize(
    ("changes", "most"),
    [({}, 900), ({"terms": "ctr,pmsacl,aug,pos"}, 1250), ({"weak": "ccd"}, 850)],
)
def test_a_step_waits_once_and_launches_little_beside_its_encoder(changes, most):
    config = Config(device="meta", init="random", **changes)  # 256 views of 256 px
    images = np.zeros((64, 3, 256, 256), np.uint8)
    whole, encoder = of_step(config, images, resident="terms" not in changes)
    waits = {line: times for line, times in whole.waits.items() if times}
    assert list(waits.values()) == [1] and "training.py" in str(waits), waits
    assert whole.launches.total() - encoder.launches.total() < most
    assert encoder.launches.total() > 150 and not encoder.waits.total()


@pytest.mark.parametrize(("which", "there"), [(0, False), (1, True)])
def test_a_step_of_igd_waits_for_nothing_but_its_losses(which, there, monkeypatch):
    """Whether the GPU has the images or not."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "Adam", lambda *_, **__: None)
    network = ResNet18().to("meta")
    detector = IGD(network, network, image_size=64, width=8)
    images = np.zeros((32, 3, 64, 64), np.uint8)
    training = list(detector.trainings(torch.from_numpy(images).to("meta") if there else images))[
        which
    ]
    training.step_done = 1  # mu and sigma^2 are there
    with Launches() as counted:
        torch.stack(list(training.losses().values())).sum().backward()
    assert not counted.waits.total() and counted.launches.total() > 500
    assert len(counted.pinned) == (not there)


def test_padim_waits_once_a_fit_and_twice_a_batch_of_scores(monkeypatch):
    """For whether the covariances are definite; for maps and scores. A batch is not waited for."""
    monkeypatch.setattr("detectors.mahalanobis", lambda x, mean, w, rows: x.sum(2))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    images, detector = np.zeros((64, 3, 64, 64), np.uint8), PaDiM(ResNet18().to("meta"))
    assert detector.network and detector.chosen  # made once
    for pixels in (images, torch.from_numpy(images).to("meta")):
        with Launches() as counted:
            detector.fit(pixels)
        assert counted.waits.total() == 1 and counted.launches.total() < 300
        assert len(counted.pinned) == 2 * isinstance(pixels, np.ndarray)  # batches of 32
    with Launches() as counted:
        score_batch(detector, images[:8], "")
    assert counted.waits.total() == 2 and counted.launches.total() < 100


@pytest.mark.gpu
def test_a_step_waits_once_on_the_gpu():
    training = pmsacl.Pretraining(pictures(), tiny(device="cuda"))
    for _ in range(2):  # the second step has its centres and its optimiser's state
        step(training, training.losses, None)
    try:
        torch.cuda.set_sync_debug_mode("error")  # which does not refuse an event's synchronize
        step(training, training.losses, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_bfloat16_where_the_card_has_it_and_one_precision_everywhere():
    major, _ = torch.cuda.get_device_capability()
    assert encoder.autocast(DEVICE)._enabled == (major >= 8)
    training = pmsacl.Pretraining(pictures(), tiny(device="cuda"))
    views, _ = training.views_of(training.watched, training.draws(1))
    z, h = training.encoder.embed(views)
    assert z.dtype == h.dtype == torch.float32
    seen = []
    training.encoder.head.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    training.losses(), training.health(), training.centres()
    assert len(set(seen)) == 1 and (seen[0] == torch.bfloat16) == (major >= 8)


@pytest.mark.parametrize("autocast", [encoder.autocast, steps.autocast])
def test_emulated_bfloat16_is_not_taken(autocast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for real in (True, False):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, real=real: including_emulation or real,
        )
        assert autocast(torch.device("cuda"))._enabled == real
    assert not autocast(torch.device("cpu"))._enabled


def test_images_that_fit_a_quarter_of_the_free_memory_stay_on_the_gpu(monkeypatch):
    images, device = pictures(), torch.device("meta")
    free = 4 * images.nbytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    there = resident(images, device)
    assert there.is_meta and there.shape == images.shape and there.dtype == torch.uint8
    free -= 1
    assert resident(images, device) is images and resident(images, torch.device("cpu")) is images
    assert resident(there, device) is there


@pytest.mark.parametrize("which", [0, 1])
def test_igd_takes_the_same_from_a_tensor_and_from_an_array(which):
    images, ids = np.concatenate([pictures()[:4]] * 4).reshape(4, 3, 64, 64), np.array([1, 3, 2])
    detector = IGD(ResNet18(), ResNet18(), image_size=64, width=8)
    of, there = (list(detector.trainings(x))[which] for x in (images, torch.from_numpy(images)))
    assert there.count == of.count and torch.equal(there.take(ids), of.take(ids))
    if which:  # 3 x 3 patches an image
        assert torch.equal(
            of.take(np.array([9 + 5]))[0], to_unit(images[1:2, :, 16:48, 32:64], "cpu")[0]
        )
    else:
        assert torch.equal(of.take(ids), to_unit(images[ids], "cpu"))


@pytest.mark.gpu
def test_a_batch_is_the_same_from_the_gpu_and_from_the_host(monkeypatch):
    kept = pmsacl.Pretraining(pictures(), tiny(device="cuda"))
    monkeypatch.setattr("support.data.RESIDENT", 0.0)
    read = pmsacl.Pretraining(pictures(), tiny(device="cuda"))
    assert isinstance(kept.pixels, torch.Tensor) and isinstance(read.pixels, np.ndarray)
    rows = np.array([5, 2, 9])
    assert torch.equal(kept.batch_of(rows), read.batch_of(rows))
    assert torch.equal(kept.batch_of(rows), to_unit(pictures()[[2, 5, 9]], DEVICE))


@pytest.mark.gpu
def test_images_reach_the_gpu_unchanged():
    images = pictures()
    for given in (images, torch.from_numpy(images), torch.from_numpy(images).to(DEVICE)):
        for device in (DEVICE, "cpu"):  # whose divisions differ in the last place
            want = torch.from_numpy(images).to(device).float() / 255
            assert torch.equal(to_unit(given, device), want)
