"""encoder.py: the network is torchvision's ResNet-18, its heads and helpers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_uniform, generator
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from encoder import BasicBlock, Conv3x3, Encoder, ResNet18, normalise, seeded


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
    flat = x[:, :, :1]  # one row: not square
    torch.testing.assert_close(
        layer(flat), F.conv2d(flat, layer.weight, layer.bias, stride, padding=1)
    )
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
    states = []
    for noise in (5, 6):  # the caller's draws change nothing, in no head
        torch.manual_seed(noise)
        states.append(Encoder(generator=generator(1)).state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_an_encoders_weights_are_in_the_order_in_which_convolutions_are_fastest():
    encoder = Encoder()
    encoder.load_state_dict({k: v.contiguous() for k, v in encoder.state_dict().items()})
    kernels = [w for w in encoder.parameters() if w.ndim == 4]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)


def test_unit_features_have_length_one_and_raw_ones_do_not():
    x = torch.rand(2, 3, 32, 32, generator=generator(0))
    unit = Encoder(features="unit", generator=generator(1)).eval()(x)
    raw = Encoder(features="raw", generator=generator(1)).eval()(x)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(F.normalize(raw, dim=1), unit)
    assert not torch.allclose(raw.norm(dim=1), torch.ones(2))
    for wrong in ({"features": "none"}, {"aug_head": "none"}):
        with pytest.raises(ValueError, match="must be .*, got 'none'"):
            Encoder(**wrong)


def test_images_of_bytes_and_of_two_floats_have_the_same_features_and_other_integers_none():
    encoder, images = Encoder().eval(), torch.randint(256, (2, 3, 32, 32), generator=generator())
    want = encoder(images / 255)
    for same in (images.byte(), images.double() / 255):
        torch.testing.assert_close(encoder(same), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must be uint8 or floating"):
        encoder(images)


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


@pytest.mark.parametrize(("inputs", "stride"), [(4, 1), (3, 2)])
def test_a_basic_block_is_its_formula(inputs, stride):
    block, g = BasicBlock(inputs, 4, stride).eval(), generator(0)
    for value in block.state_dict().values():
        if value.is_floating_point():
            value.copy_(0.5 + torch.rand(value.shape, generator=g))
    x = torch.randn(2, inputs, 8, 8, generator=g)

    def normed(y, bn):
        mean, var, weight, bias = (
            t[:, None, None] for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        )
        return (y - mean) / (var + 1e-5).sqrt() * weight + bias

    y = F.conv2d(x, block.conv1.weight, stride=stride, padding=1)
    y = F.conv2d(normed(y, block.bn1).clamp(min=0), block.conv2.weight, padding=1)
    shortcut = x
    if block.downsample is not None:
        conv, bn = block.downsample
        shortcut = normed(F.conv2d(x, conv.weight, stride=stride), bn)
    want = (normed(y, block.bn2) - 60 + shortcut).clamp(min=0)
    block.bn2.bias.data -= 60  # some outputs are negative before the last ReLU
    assert (want == 0).any() and (want > 0).any()
    torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-3)


def test_start_weights_have_their_distributions():
    net = ResNet18(generator(0))
    for conv in (net.conv1, net.layer2[0].conv1, net.layer2[0].downsample[0]):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        count = conv.weight.numel()  # its deviation is off by 1 / sqrt(2 count) of itself
        assert abs(conv.weight.std() / math.sqrt(2 / fan_out) - 1) < 5 / math.sqrt(2 * count)
    bound = 1 / math.sqrt(512)
    for values in (net.fc.weight, net.fc.bias):
        assert_uniform(values.detach(), -bound, bound)


def test_pooled_is_the_mean_over_positions_and_the_stem_takes_maxima():
    net, x = ResNet18(generator(1)).eval(), torch.randn(2, 3, 64, 64, generator=generator(2))
    y = F.max_pool2d(net.bn1(net.conv1(x)).relu(), 3, 2, 1)
    want = net.layer4(net.layer3(net.layer2(net.layer1(y)))).flatten(2).mean(2)
    torch.testing.assert_close(net.pooled(x), want)


def test_the_encoder_is_its_backbone_and_two_linear_layers():
    encoder = Encoder(generator=generator(0)).eval()
    x = torch.rand(2, 3, 32, 32, generator=generator(1))
    z, h = encoder.embed(x)
    torch.testing.assert_close(h, encoder.backbone.pooled(normalise(x)))
    first, _, last = encoder.head
    want = last(first(h).clamp(min=0))
    torch.testing.assert_close(z, want / want.norm(dim=1, keepdim=True))
    assert (encoder.features, encoder.aug_head) == ("unit", "backbone")  # R20, R17
    got = encoder.position_logits(z[:1], z[1:])
    torch.testing.assert_close(got, encoder.f_gamma(z[:1] - z[1:]))


def test_batch_norms_are_torchvisions():
    """ImageNet's weights expect its eps; the momentum decides what a training's averages are."""
    norms = [part for part in ResNet18().modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert {(n.eps, n.momentum, n.affine, n.track_running_stats) for n in norms} == {
        (1e-5, 0.1, True, True)
    }
