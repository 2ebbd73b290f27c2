"""The one training loop: checkpoints, log, what is not finite, initial weights."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import generator
from test_pmsacl import TRAINED, pictures, tiny

import pmsacl
from encoder import ResNet18
from support import training
from support.run import read_rows
from support.training import start_weights, train


class Toy:
    """Two terms, 3 (w - 1)^2 and 2 w^2, by plain gradient descent; three steps an epoch."""

    name, rate_option, device, images = "toy", "--toy-lr", torch.device("cpu"), 1
    total, steps, start_rate, rate = 6, 3, 0.02, 0.01

    def __init__(self):
        self.w, self.step_done, self.worst = torch.zeros(()), 0, math.inf

    def losses(self):
        w = self.w.requires_grad_()
        first = 3 * (w - 1) ** 2
        return {"a": first * math.nan if self.step_done == self.worst else first, "b": 2 * w**2}

    def update(self, terms):
        (g,) = torch.autograd.grad(sum(terms.values()), self.w)
        self.w = (self.w - self.rate * g).detach()
        self.step_done += 1

    def end_epoch(self):
        return {"health": float(self.w)}

    def state_dict(self):
        return {"w": self.w, "nested": [{"w": self.w}], "step_done": self.step_done}

    def load_state_dict(self, state):
        self.w, self.step_done = state["w"], state["step_done"]


def by_hand(steps):
    """w after each step."""
    w = [0.0]
    for _ in range(steps):
        w.append(w[-1] - 0.01 * (6 * (w[-1] - 1) + 4 * w[-1]))
    return w


def test_a_log_that_a_kill_left_out_is_written_at_the_next_start(tmp_path):
    rows = train(Toy(), tmp_path / "c.pt", tmp_path / "log.csv")
    before = (tmp_path / "log.csv").read_bytes()
    (tmp_path / "log.csv").unlink()  # the checkpoint is written first
    assert train(Toy(), tmp_path / "c.pt", tmp_path / "log.csv") == rows
    assert (tmp_path / "log.csv").read_bytes() == before


def test_the_log_has_the_mean_of_each_term_over_an_epoch(tmp_path):
    toy = Toy()
    rows = train(toy, tmp_path / "c.pt", tmp_path / "log.csv")
    w = by_hand(6)
    assert float(toy.w) == pytest.approx(w[6], rel=1e-5)
    for k, row in enumerate(rows):
        seen = w[3 * k : 3 * k + 3]
        assert row["a"] == pytest.approx(sum(3 * (v - 1) ** 2 for v in seen) / 3, rel=1e-5)
        assert row["b"] == pytest.approx(sum(2 * v**2 for v in seen) / 3, rel=1e-5)
        assert row["health"] == pytest.approx(w[3 * k + 3], rel=1e-5)
        assert (row["epoch"], row["lr"]) == (k + 1, 0.01)
    written = read_rows(tmp_path / "log.csv")
    assert [row["epoch"] for row in written] == ["1", "2"]
    for one, row in zip(written, rows, strict=True):  # to six digits
        assert {k: float(v) for k, v in one.items()} == pytest.approx(row, rel=1e-5)


def test_a_training_goes_on_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    whole = train(Toy(), tmp_path / "whole.pt", tmp_path / "whole.csv")

    class Stopped(Toy):
        def update(self, terms):
            if self.step_done == 4:
                raise KeyboardInterrupt
            super().update(terms)

    with pytest.raises(KeyboardInterrupt):
        train(Stopped(), tmp_path / "c.pt", tmp_path / "log.csv", save_every=0.0)
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step_done"] == 4
    toy = Toy()
    resumed = train(toy, tmp_path / "c.pt", tmp_path / "log.csv")
    for one, two in zip(resumed, whole, strict=True):
        assert one | {"images_per_second": 0} == two | {"images_per_second": 0}
    assert toy.step_done == 6 and train(toy, tmp_path / "c.pt", tmp_path / "log.csv") == resumed


def test_a_loss_that_is_not_finite_keeps_the_checkpoint(tmp_path):
    toy = Toy()
    toy.worst = 4
    with pytest.raises(FloatingPointError, match="toy the loss is not finite in epoch 2, step 2 .*"
                       "'a': nan.*lower --toy-lr .0.02.*good state is kept in .*c.pt"):  # fmt: skip
        train(toy, tmp_path / "c.pt", tmp_path / "log.csv", save_every=0.0)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert saved["step_done"] == 4 and float(saved["w"]) == pytest.approx(by_hand(4)[4])
    toy = Toy()
    toy.worst = 0
    with pytest.raises(FloatingPointError, match="no state was saved yet"):
        train(toy, tmp_path / "none.pt", tmp_path / "log.csv")


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    class Exploding(Toy):
        def update(self, terms):
            super().update(terms)
            if self.step_done == 2:
                self.w = self.w / 0.0

    with pytest.raises(FloatingPointError, match="a weight is not finite after step 2"):
        train(Exploding(), tmp_path / "c.pt", tmp_path / "log.csv", save_every=0.0)
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step_done"] == 1


def test_checkpoints_of_another_version_and_refused_states_name_the_file(tmp_path):
    old = {"w": torch.zeros(()), "step_done": 1, "sums": {}, "log": []}
    for content in (old, [1], {}, old | {"format": training.FORMAT + 1}):
        torch.save(content, tmp_path / "c.pt")
        with pytest.raises(ValueError, match="c.pt: a checkpoint of another version"):
            train(Toy(), tmp_path / "c.pt", tmp_path / "log.csv")

    (tmp_path / "c.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="c.pt: no checkpoint, or a damaged one"):
        train(Toy(), tmp_path / "c.pt", tmp_path / "log.csv")

    class Refusing(Toy):
        def load_state_dict(self, state):
            raise ValueError("of other images")

    torch.save(old | {"format": training.FORMAT}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="c.pt: of other images"):
        train(Refusing(), tmp_path / "c.pt", tmp_path / "log.csv")


# --- the pre-training in the loop --------------------------------------------------------------


@pytest.mark.parametrize("method", TRAINED)
def test_each_method_trains_and_goes_on_where_it_was_stopped(method, tmp_path):
    config = tiny(method=method)
    images = pictures(config.image_size)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    encoder, _ = pmsacl.pretrain(images, config, tmp_path / "whole")
    started = pmsacl.Pretraining(images, config)
    before = {name: value.clone() for name, value in started.encoder.state_dict().items()}
    after = encoder.state_dict()
    assert any(not torch.equal(v, after[k]) for k, v in before.items())
    started.begin()
    started.update(started.losses())
    training.save(started, tmp_path / "cut/checkpoint.pt", {}, [])
    resumed, _ = pmsacl.pretrain(images, config, tmp_path / "cut")
    assert all(torch.equal(v, after[k]) for k, v in resumed.state_dict().items())
    row = read_rows(tmp_path / "whole/log.csv")[-1]
    assert 0 < float(row["spread"]) < 1
    last = pmsacl.cosine(config.lr, config.lr_end, 1 - 1 / started.total)  # of the last step
    assert float(row["lr"]) == pytest.approx(last, rel=1e-4) and not encoder.training
    assert ("accuracy" in row) == (method in ("pmsacl", "rotnet", "csi", "ccd"))
    assert ("distance" in row) == (method != "simclr")


def test_the_log_of_a_warm_up_leaves_the_later_terms_empty(tmp_path):
    config = tiny(warmup_epochs=1, epochs=2)
    pmsacl.pretrain(pictures(), config, tmp_path)
    rows = read_rows(tmp_path / "log.csv")
    assert rows[0]["ctr"] == "" and float(rows[1]["ctr"]) > 0


# --- initial weights -----------------------------------------------------------------------------


def test_weights_load_from_a_file_and_a_wrong_file_is_named(tmp_path):
    source, target = ResNet18(generator(1)), ResNet18(generator(2))
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    assert start_weights(target, str(tmp_path / "weights.pt")) == "weights.pt"
    assert torch.equal(source.conv1.weight, target.conv1.weight)
    wrong = tmp_path / "other.pt"
    for content in ({"a": torch.zeros(1)}, [1], {1: torch.zeros(1)}, "not weights", ""):
        torch.save(content, wrong) if not isinstance(content, str) else wrong.write_text(content)
        with pytest.raises(ValueError, match="--init .*other.pt: no state dict of a resnet18") as e:
            start_weights(target, str(wrong))
        assert "weights_only" not in str(e.value)
    with pytest.raises(ValueError, match="--init .*nowhere.pt: No such file"):
        start_weights(target, str(tmp_path / "nowhere.pt"))


def test_imagenets_weights_are_taken_and_only_auto_does_without_them(monkeypatch, capsys):
    source = ResNet18(generator(1))
    monkeypatch.setattr(training, "_imagenet", source.state_dict)
    for init in ("imagenet", "auto"):
        target = ResNet18(generator(2))
        assert start_weights(target, init) == "imagenet"
        assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())

    def offline():
        raise OSError("no network")

    monkeypatch.setattr(training, "_imagenet", offline)
    target = ResNet18(generator(2))
    assert start_weights(target, "auto") == "random" == start_weights(target, "random")
    assert torch.equal(target.conv1.weight, ResNet18(generator(2)).conv1.weight)
    assert "random initial weights" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--init imagenet: no weights from .*no network"):
        start_weights(target, "imagenet")
