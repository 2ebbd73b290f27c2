"""encoder.py: the network is torchvision's ResNet-18, its heads and helpers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from conftest import generator
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from encoder import Conv3x3, Encoder, ResNet18, normalise, seeded


def torchvision_names():
    """torchvision's resnet18 state dict, written down from its published layout."""
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    names = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{k}" for k in norm}
    for layer in range(1, 5):
        for block in range(2):
            stem = f"layer{layer}.{block}"
            names |= {f"{stem}.conv{i}.weight" for i in (1, 2)}
            names |= {f"{stem}.bn{i}.{k}" for i in (1, 2) for k in norm}
        if layer > 1:
            stem = f"layer{layer}.0.downsample"
            names |= {f"{stem}.0.weight"} | {f"{stem}.1.{k}" for k in norm}
    return names


def test_resnet18_has_torchvisions_names_and_shapes():
    state = ResNet18().state_dict()
    assert set(state) == torchvision_names() and len(state) == 122
    assert sum(v.numel() for k, v in state.items() if "running" not in k and "num" not in k) == (
        11_689_512  # parameters of torchvision's resnet18
    )
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert state["layer4.0.downsample.0.weight"].shape == (512, 256, 1, 1)
    assert state["fc.weight"].shape == (1000, 512)


def test_stages_have_a_resnets_shapes_and_logits_come_from_their_pooled_end():
    net, x = ResNet18().eval(), torch.rand(2, 3, 64, 64, generator=generator(0))
    shapes = [tuple(stage.shape) for stage in net.stages(x)]
    assert shapes == [(2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4), (2, 512, 2, 2)]
    torch.testing.assert_close(net(x), F.linear(net.pooled(x), net.fc.weight, net.fc.bias))


@given(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.integers(0, 2**31 - 1))
def test_a_convolution_of_a_small_map_is_a_convolution(side, stride, seed):
    g = generator(seed)
    x = torch.randn(3, 5, side, side, generator=g, dtype=torch.float64).requires_grad_()
    layer = Conv3x3(5, 4, stride).double()
    layer.bias = nn.Parameter(torch.randn(4, generator=g, dtype=torch.float64))  # as when folded
    got, want = layer(x), F.conv2d(x, layer.weight, layer.bias, stride, padding=1)
    torch.testing.assert_close(got, want)
    weights = torch.randn(want.shape, generator=g, dtype=torch.float64)
    of = [x, layer.weight, layer.bias]
    torch.testing.assert_close(
        torch.autograd.grad((got * weights).sum(), of),
        torch.autograd.grad((want * weights).sum(), of),
    )


def test_start_weights_depend_on_the_generator_alone():
    one, same, other = (ResNet18(generator(s)).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_unit_features_have_length_one_and_raw_ones_do_not():
    x = torch.rand(2, 3, 32, 32, generator=generator(0))
    unit = Encoder(features="unit", generator=generator(1)).eval()(x)
    raw = Encoder(features="raw", generator=generator(1)).eval()(x)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(F.normalize(raw, dim=1), unit)
    assert not torch.allclose(raw.norm(dim=1), torch.ones(2))


def test_normalise_subtracts_imagenets_statistics():
    x = torch.tensor([0.485, 0.456, 0.406])[None, :, None, None].expand(1, 3, 2, 2)
    assert normalise(x).abs().max() == 0
    torch.testing.assert_close(
        normalise(x + 0.1)[0, :, 0, 0], torch.tensor([0.1 / 0.229, 0.1 / 0.224, 0.1 / 0.225])
    )


def test_generators_depend_on_every_part_of_their_key():
    draws = [torch.rand(1, generator=seeded(*key)).item()
             for key in ((0, 1), (1, 0), (0, 1, 0), (0, 2), (0, 1))]  # fmt: skip
    assert draws[0] == draws[-1] and len(set(draws)) == 4
