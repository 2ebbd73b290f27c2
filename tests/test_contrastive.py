"""kernels/contrastive.py: every path against the definition, the definition against the page.

Tolerances count roundings of U32 = 2^-24, one named term each; the float64 definition runs on the
same bits. Kernels run in the Triton interpreter where there is no GPU.
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import BACKENDS, DEVICE, HAS_GPU, ROOT, RUNS_TRITON, U32, assert_within, needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st
from page import printed_rows_of_eq_5

import losses
from kernels import contrastive
from losses import centred_features, contrastive_losses, kappas

HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # rounding of 16-bit floats


@dataclass(frozen=True)
class Case:
    """A batch: z (N, Z), class ids, pair ids, centres (A, Z) and the constants of eq. 5 and 7."""

    z: torch.Tensor
    n: torch.Tensor
    pair: torch.Tensor
    c: torch.Tensor
    tau: float = 0.2
    alpha: float = 2.0
    positive_scale: str | float = "kappa"
    rows: tuple[int, int] | None = None
    allow_tf32: bool = False

    @property
    def constants(self) -> dict:
        return {k: getattr(self, k) for k in ("tau", "alpha", "positive_scale", "rows")}

    def losses(self, backend: str, **more) -> torch.Tensor:
        ids = self.z, self.n, self.pair, self.c
        more = {"reduction": "none", "backend": backend, "allow_tf32": self.allow_tf32} | more
        return contrastive.contrastive(*ids, **self.constants, **more)

    def definition(self) -> torch.Tensor:
        """losses.contrastive_losses in float64, which is held against the page below."""
        return contrastive_losses(
            self.z.double(), self.n, self.pair, self.c.double(), **self.constants
        )


def make_case(classes: list[int], Z: int, seed: int, spread: float = 1.0, **constants) -> Case:
    """classes: the number of images of each class; two views each, in random order."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.arange(len(classes)).repeat_interleave(torch.tensor(classes)).repeat(2)
    N = len(ids)
    order = torch.randperm(N, generator=gen)
    place = order.argsort()
    pair = place[(order + N // 2) % N]
    c = torch.randn(len(classes), Z, generator=gen)
    z = c[ids[order]] + spread * torch.randn(N, Z, generator=gen)
    return Case(z.to(DEVICE), ids[order].to(DEVICE), pair.to(DEVICE), c.to(DEVICE), **constants)


@st.composite
def cases(draw, half: bool = True, most: int = 45) -> Case:
    classes = draw(
        st.lists(st.integers(1, most), min_size=1, max_size=4).filter(lambda s: sum(s) <= most)
    )
    case = make_case(
        classes,
        Z=draw(st.sampled_from([1, 2, 16, 17, 33])),
        seed=draw(st.integers(0, 2**31 - 1)),
        spread=draw(st.sampled_from([0.0, 1e-6, 1.0, 1e3])),  # the centre, in the clamp, outside it
        tau=draw(st.sampled_from([0.02, 0.07, 0.2, 1.0])),  # 0.02: exp(1/tau) overflows
        alpha=draw(st.sampled_from([0.5, 1.0, 2.0])),
        positive_scale=draw(st.sampled_from(["kappa", "tau", 0.5])),
    )
    N = len(case.z)
    if draw(st.booleans()):
        start = draw(st.integers(0, N - 1))
        case = replace(case, rows=(start, draw(st.integers(start + 1, N))))
    if half:
        stored = draw(st.sampled_from(["float32", "float16", "tf32"]))
        case = replace(case, z=case.z.half() if stored == "float16" else case.z)
        case = replace(case, allow_tf32=stored == "tf32")
    if draw(st.booleans()):  # columns of z with a stride
        case = replace(case, z=torch.stack([case.z, case.z], dim=2)[..., 0])
    return case


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Blocks and splits so small that few rows reach every branch of the loops over them."""
    monkeypatch.setattr(losses, "PAIRS", 300)
    monkeypatch.setattr(contrastive, "PROGRAMS", 4)


# ------------------------------------------------------------------- counting roundings


def terms(k: int) -> float:
    """Roundings of a sum of k terms: k at worst, 5 sqrt(k) at 5 standard deviations."""
    return min(k, 5 * math.sqrt(k))


def feature_error(case: Case, kernel: bool) -> float:
    """Relative error of f: z - c 1, square 1, sum Z/2, root 1, quotient 1; then storage."""
    return 4 + terms(case.z.shape[1]) / 2 + stored(case, kernel)


def is_half(case: Case) -> bool:
    return case.z.dtype in HALF_UNIT


def stored(case: Case, kernel: bool) -> float:
    """Rounding of what the kernels multiply: 16-bit, tf32, two parts of tf32 (of 11 bits each)."""
    if not kernel or max(kappas(case.tau, case.alpha, "kappa")[:2]) > contrastive.MAX_KAPPA:
        return 0
    if is_half(case) or case.allow_tf32:
        return HALF_UNIT.get(case.z.dtype, 2.0**-11) / U32
    return 6 if HAS_GPU else 0  # each part 2^-22, and the product of the two rests


def product_error(case: Case, kernel: bool) -> float:
    """Error of f_i.f_j, of which |f_i| |f_j| <= 1: both factors, the sum of Z products."""
    return 2 * feature_error(case, kernel) + terms(case.z.shape[1])


def loss_budget(case: Case, want: torch.Tensor, kernel: bool) -> torch.Tensor:
    same, different, s = kappas(case.tau, case.alpha, case.positive_scale)
    k, N, e = max(same, different), len(case.z), product_error(case, kernel)
    exponent = k * (e + 2 + 4)  # kappa 1, times 1, minus the largest 2 (of 2 k), in exp 2
    total = 4 * N / 16 + 8 + 2  # a tile at a time: exp, product, sum, add; within a tile 8; exp 2
    lse = 2 * (2 * k + math.log(N)) + k + 1  # log of what is e^-2k at the least, last add
    return U32 * (exponent + total + lse + abs(s) * (e + 2) + want.abs())


def gradient_budget(case: Case, g: torch.Tensor, kernel: bool) -> torch.Tensor:
    """(N, 1): err(df) <= kappa W (relative error of p, f, sum), through eq. 6 twice, over norm."""
    same, different, s = kappas(case.tau, case.alpha, case.positive_scale)
    N, Z = case.z.shape
    start, stop = case.rows or (0, N)
    k, e, e_f = max(same, different), product_error(case, kernel), feature_error(case, kernel)
    u = case.z.double() - case.c.double()[case.n]
    norm = u.norm(dim=1, keepdim=True).clamp_min(contrastive.EPS)
    f = u / norm
    x = torch.where(case.n[start:stop, None] == case.n, same, different) * (f[start:stop] @ f.T)
    x.diagonal(start).fill_(-math.inf)
    weight = torch.zeros(N, dtype=torch.float64, device=f.device)
    weight[start:stop] = g.abs().double()
    p = weight[start:stop, None] * x.softmax(dim=1)  # of the queries: the others weigh nothing
    W = p.sum(dim=0)
    W[start:stop] += p.sum(dim=1)
    W = W[:, None]
    exponent = 2 * k * (e + 6) + 4 * N / 16 + 12 + 2 * math.log(N)  # s - lse, exp
    half = stored(case, kernel)  # of w
    narrow = kernel and case.z.dtype == torch.float16
    tiny = N * weight.max() * k * 2.0 ** (-25 if narrow else -126)  # underflow of w
    df = k * W * (exponent + e_f + terms(N) + 4 + half) * U32 + tiny
    partner = (weight + weight[case.pair])[:, None] * abs(s)
    df += partner * (e_f + 3) * U32
    size = k * W + partner
    dz = (2 * df + size * (3 * e_f + terms(Z) + 5) * U32) / norm
    rounded = HALF_UNIT[case.z.dtype] if is_half(case) else 0  # dz in the dtype of z
    return dz * (1 + rounded) + rounded * size / norm + (2.0**-25 if rounded else 0)


# ------------------------------------------------------------------- the page and the definition


@pytest.mark.parametrize("positive_scale", ["kappa", "tau", 0.5])
@pytest.mark.parametrize("classes", [[1], [3, 1, 2]])
def test_the_definition_is_the_page(classes, positive_scale):
    case = make_case(classes, 5, seed=1, positive_scale=positive_scale)
    scale = kappas(case.tau, case.alpha, positive_scale)[2]
    rows = printed_rows_of_eq_5(case.z, case.n, case.pair, case.c, case.tau, case.alpha, scale)
    want = torch.tensor(rows, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(case.definition(), want, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_the_definition_in_blocks_and_in_one():
    case = make_case([2, 1, 10], 3, seed=2)  # 26 views: three blocks of 11 rows
    z, c = (t.double().requires_grad_() for t in (case.z, case.c))
    n, pair = case.n, case.pair
    for rows in (None, (3, 11)):
        more = replace(case, rows=rows).constants
        assert torch.autograd.gradcheck(
            lambda z, c, more=more: contrastive_losses(z, n, pair, c, **more), (z, c)
        )


# ------------------------------------------------------------------- the shipped paths


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_losses_stay_within_their_rounding_budget(backend, case):
    want = case.definition()
    assert_within(case.losses(backend), want, loss_budget(case, want, backend == "triton"))


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(), expanded=st.booleans(), seed=st.integers(0, 2**31 - 1))
def test_gradients_stay_within_their_rounding_budget(backend, case, expanded, seed):
    start, stop = case.rows or (0, len(case.z))
    gen = torch.Generator().manual_seed(seed)
    g = torch.randn(1 if expanded else stop - start, generator=gen).to(DEVICE)
    g = g.expand(stop - start)
    z64, c64 = (t.double().requires_grad_() for t in (case.z, case.c))
    ids = case.n, case.pair
    contrastive_losses(z64, *ids, c64, **case.constants).backward(g.double())
    z, c = (t.detach().requires_grad_() for t in (case.z, case.c))
    replace(case, z=z, c=c).losses(backend).backward(g)
    if case.z.dtype == torch.float16 and z64.grad.abs().max() > 6e4:  # its numbers end at 65504
        return
    budget = gradient_budget(case, g, backend == "triton").expand_as(z64.grad)
    assert_within(z.grad, z64.grad, budget)
    members = (case.n[None, :] == torch.arange(len(case.c), device=DEVICE)[:, None]).double()
    added = members @ z64.grad.abs() * terms(len(case.z)) * U32
    assert_within(c.grad, c64.grad, members @ budget + added)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_budgets_reject_known_wrong_answers(backend):
    case = make_case([9, 4, 7], 17, seed=3, alpha=1.5)
    want = case.definition()
    budget = loss_budget(case, want, backend == "triton")
    f = centred_features(case.z.double(), case.n, case.c.double())
    with_self = torch.logaddexp(
        want, kappas(case.tau, case.alpha, "kappa")[0] * (1 - (f * f[case.pair]).sum(dim=1))
    )
    wrong = {
        "itself in the denominator": with_self,
        "one temperature": replace(case, alpha=1.0, positive_scale=1 / 0.3).definition(),
        "positive as printed": replace(case, positive_scale=0.5).definition(),
        "the next class's centre": replace(case, c=case.c.roll(1, 0)).definition(),
        "half precision": replace(case, z=case.z.half()).definition(),
    }
    for name, answer in wrong.items():
        with pytest.raises(AssertionError):
            assert_within(answer, want, budget)
            pytest.fail(f"the budget accepts: {name}")


def test_the_gradient_budget_rejects_known_wrong_answers():
    case = make_case([9, 4, 7], 17, seed=4)
    z = case.z.double().requires_grad_()
    g = torch.ones(len(z), dtype=torch.float64, device=DEVICE)
    (right,) = torch.autograd.grad(replace(case, z=z).losses("torch").sum(), z)
    f = centred_features(z, case.n, case.c.double())
    (one_sided,) = torch.autograd.grad(  # the keys as constants: half of the gradient
        (contrastive_one_sided(case, f)).sum(), z
    )
    with pytest.raises(AssertionError):
        assert_within(one_sided, right, gradient_budget(case, g, True))


def contrastive_one_sided(case: Case, f: torch.Tensor) -> torch.Tensor:
    same, different, s = kappas(case.tau, case.alpha, case.positive_scale)
    x = torch.where(case.n[:, None] == case.n, same, different) * (f @ f.detach().T)
    x = x.masked_fill(torch.eye(len(f), dtype=torch.bool, device=f.device), -math.inf)
    return x.logsumexp(dim=1) - s * (f * f[case.pair]).sum(dim=1)


# ------------------------------------------------------------------- invariances and bounds


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(case=cases(half=False), seed=st.integers(0, 2**31 - 1))
def test_permuting_the_batch_changes_nothing(backend, case, seed):
    case = replace(case, rows=None)
    order = torch.randperm(len(case.z), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    place = order.argsort()
    moved = replace(case, z=case.z[order], n=case.n[order], pair=place[case.pair[order]])
    want = case.definition()[order]
    assert_within(moved.losses(backend), want, loss_budget(case, want, backend == "triton"))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(case=cases(half=False))
def test_renaming_the_classes_changes_no_bit_of_the_kernel(backend, case):
    A = len(case.c)
    renamed = replace(case, n=A - 1 - case.n, c=case.c.flip(0))
    got, want = renamed.losses(backend), case.losses(backend)
    if backend == "triton":
        assert torch.equal(got, want)
    else:  # sums of products may be ordered otherwise
        assert_within(got, want, 2 * loss_budget(case, want, False))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(case=cases(half=False))
def test_the_loss_is_bounded_and_repeats_bit_for_bit(backend, case):
    case = replace(case, positive_scale="kappa")  # then the fraction is a softmax
    loss, N = case.losses(backend), len(case.z)
    slack = loss_budget(case, loss, backend == "triton").max()
    same, different, _ = kappas(case.tau, case.alpha, "kappa")
    assert loss.min() >= -slack
    assert loss.max() <= math.log(N - 1) + max(same, different) + same + slack
    assert torch.equal(loss, case.losses(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_with_one_image_and_a_batch_of_one_pair(backend):
    lonely = make_case([1, 12, 1], 6, seed=5)
    want = lonely.definition()
    assert_within(lonely.losses(backend), want, loss_budget(lonely, want, backend == "triton"))
    pair = make_case([1], 4, seed=6)  # the only other view is the positive: -log 1
    assert_within(pair.losses(backend), torch.zeros(2).double().to(DEVICE), 40 * U32 * 2.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_the_centre_the_loss_is_log_of_the_others_and_the_gradient_finite(backend):
    case = make_case([3, 4], 8, seed=7, spread=0.0)
    z = case.z.clone().requires_grad_()
    loss = replace(case, z=z).losses(backend)
    assert_within(loss, torch.full_like(loss, math.log(13)).double(), 8 * U32 * math.log(13))
    loss.sum().backward()
    assert torch.isfinite(z.grad).all()
    assert z.grad.norm(dim=1).max() < 1 / losses.EPS * 10  # clamp: |df| / EPS at most
    half = case.z.half().requires_grad_()
    (0 * replace(case, z=half).losses(backend).sum()).backward()
    assert half.grad.count_nonzero() == 0  # where no loss counts, there is no largest |g|


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_public_mean_and_gathered_rows_add_up(backend):
    case = make_case([8, 9, 3], 16, seed=8)
    args, more = (case.n, case.pair, case.c), {"tau": 0.2, "alpha": 2.0, "backend": backend}
    z = case.z.clone().requires_grad_()
    contrastive.contrastive(z, *args, **more).backward()
    parts = case.z.clone().requires_grad_()
    N = len(parts)
    for rows in ((0, 13), (13, N)):  # two ranks, unequal: weight each mean by its rows
        share = contrastive.contrastive(parts, *args, rows=rows, **more)
        (share * (rows[1] - rows[0]) / N).backward()
    budget = gradient_budget(case, torch.full((N,), 1 / N, device=DEVICE), backend == "triton")
    assert_within(parts.grad, z.grad.double(), 3 * budget)


@needs_triton
@pytest.mark.parametrize("Z", [128, 200, 512])
def test_wide_features(Z):
    assert_right(make_case([9, 12], Z, seed=9))


def assert_right(case: Case) -> None:
    """Losses and gradients of the kernels within their budgets."""
    z, z64 = case.z.detach().requires_grad_(), case.z.double().requires_grad_()
    want = replace(case, z=z64).definition()
    loss = replace(case, z=z).losses("triton")
    assert_within(loss, want, loss_budget(case, want, True))
    g = torch.randn(len(loss), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    loss.backward(g)
    want.backward(g.double())
    assert_within(z.grad, z64.grad, gradient_budget(case, g, True).expand_as(z64.grad))


@needs_triton
@pytest.mark.parametrize("kind", ["float16", "tf32", "tf32x3", "ieee"])
def test_several_tiles_of_rows_and_columns(kind, monkeypatch):
    """Tiles with and without the diagonal and the edge, blocks with and without queries."""
    if kind == "ieee":  # as on chips whose matrix units know no tf32
        monkeypatch.setattr(contrastive, "precision", lambda device, allow_tf32: "ieee")
    case = make_case([70, 80], 24, seed=18, rows=(70, 140))
    z = case.z.half() if kind == "float16" else case.z
    assert_right(replace(case, z=z, allow_tf32=kind == "tf32"))


@needs_triton
def test_the_largest_kappa_of_the_kernels_between_opposite_views():
    """Every exponent is -2 kappa, and 1 / sum is near the largest float32."""
    u = torch.nn.functional.normalize(torch.arange(1.0, 6.0, device=DEVICE), dim=0)
    z, n = torch.stack([u, -u]), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    case = Case(z, n, 1 - torch.arange(2, device=DEVICE), torch.zeros(1, 5, device=DEVICE))
    assert_right(replace(case, tau=1 / contrastive.MAX_KAPPA, alpha=1.0))


@needs_triton
@pytest.mark.parametrize(
    ("name", "wrong"),
    [("n", -1), ("n", 2), ("n", 10**12), ("pair", -1), ("pair", 10), ("pair", 4), ("pair", 2)],
)
def test_wrong_ids_turn_the_losses_of_the_kernels_into_nan(name, wrong):
    """Without a wait for the GPU. 4 is row 4 itself, 2 is a row with another pair."""
    case = make_case([2, 3], 4, seed=10)
    ids = getattr(case, name).clone()
    ids[4] = wrong
    z = case.z.clone().requires_grad_()
    loss = replace(case, z=z, **{name: ids}).losses("triton", reduction="mean")
    assert loss.isnan()
    loss.backward()
    assert z.grad.isnan().any()
    with pytest.raises(ValueError, match="n must be in"):
        replace(case, **{name: ids}).losses("torch")


@needs_triton
def test_columns_whose_multiples_pass_int32():
    """Columns of z lie 2^30 values apart; an offset that wraps reads a zero instead."""
    case = make_case([1, 1], 3, seed=20)
    nothing = np.zeros(2**32 + 4, np.float16)  # pages nobody touches take no memory
    far = torch.from_numpy(nothing).to(DEVICE).as_strided((4, 3), (1, 2**30), 2**31)
    far.copy_(case.z)
    near = replace(case, z=case.z.half()).losses("triton")
    assert torch.equal(replace(case, z=far).losses("triton"), near)


@needs_triton
def test_inputs_that_are_not_contiguous_change_no_bit():
    case = make_case([2, 3], 5, seed=21)
    results = []
    for strided in (False, True):
        leaves = [t.clone().requires_grad_() for t in (case.z, case.c)]
        z, c, n, pair = (
            torch.stack([t, t], dim=1)[:, 1] if strided else t for t in (*leaves, case.n, case.pair)
        )
        loss = replace(case, z=z, c=c, n=n, pair=pair).losses("triton")
        one = torch.ones((), device=DEVICE).expand(len(loss)) if strided else torch.ones_like(loss)
        gradients = torch.autograd.grad(loss, leaves, one)
        results.append((loss.detach(), *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_triton
def test_a_second_derivative_is_refused():
    case = make_case([1, 1], 3, seed=22)
    z = case.z.clone().requires_grad_()
    loss = replace(case, z=z).losses("triton").sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, z, create_graph=True)


@needs_triton
def test_autocast_changes_no_bit_of_the_kernels():
    case = make_case([9, 12], 40, seed=19)
    results = []
    for enabled in (False, True):
        z, c = (t.clone().requires_grad_() for t in (case.z, case.c))
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            loss = replace(case, z=z, c=c).losses("triton").sum()
            loss.backward()
        results.append((loss.detach(), z.grad, c.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: {"z": k.z[0]}, "z must be"),
        (lambda k: {"z": k.z[:1], "n": k.n[:1], "pair": k.pair[:1]}, "z must be"),
        (lambda k: {"z": k.z[:, :0], "c": k.c[:, :0]}, "z must be"),
        (lambda k: {"z": k.z.long()}, "z must be"),
        (lambda k: {"c": k.c[:, :2]}, "c must be"),
        (lambda k: {"c": k.c.long()}, "c must be"),
        (lambda k: {"n": k.n[:-1]}, "n must be int64"),
        (lambda k: {"pair": k.pair.int()}, "pair must be int64"),
        (lambda k: {"c": k.c.to("meta")}, "one device"),
        (lambda k: {"rows": (3, 3)}, "rows must be"),
        (lambda k: {"rows": (0, 99)}, "rows must be"),
        (lambda k: {"n": k.n + 1}, "n must be in"),
        (lambda k: {"n": k.n - 1}, "n must be in"),
        (lambda k: {"pair": torch.arange(len(k.n), device=DEVICE)}, "pair"),
        (lambda k: {"pair": (torch.arange(len(k.n), device=DEVICE) + 1) % len(k.n)}, "pair"),
        (lambda k: {"pair": k.pair + len(k.n)}, "pair"),
        (lambda k: {"n": torch.arange(len(k.n), device=DEVICE) % 2}, "same class"),
        (lambda k: {"tau": 0.0}, "tau and alpha"),
        (lambda k: {"alpha": -1.0}, "tau and alpha"),
        (lambda k: {"positive_scale": "half"}, "positive_scale"),
        (lambda k: {"positive_scale": math.nan}, "positive_scale"),
    ],
)
def test_what_is_undefined_is_refused(change, message):
    case = make_case([2, 3], 4, seed=10)
    with pytest.raises(ValueError, match=message):
        replace(case, **change(case)).losses("torch")


def test_unusable_backends_are_refused():
    case = make_case([2, 3], 4, seed=11)
    with pytest.raises(ValueError, match="backend"):
        case.losses("cuda")
    with pytest.raises(ValueError, match="reduction"):
        case.losses("torch", reduction="sum")
    if RUNS_TRITON:
        with pytest.raises(ValueError, match="Triton path takes"):
            replace(case, z=case.z.double()).losses("triton")
        with pytest.raises(ValueError, match="Z <= 512"):
            make_case([1, 1], 513, seed=0).losses("triton")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, kernels
from kernels.contrastive import contrastive
from kernels.mahalanobis import mahalanobis
z, pair = torch.randn(4, 3), torch.tensor([1, 0, 3, 2])
contrastive(z, pair // 2, pair, torch.zeros(2, 3), tau=0.2, alpha=2.0)
mahalanobis(z[None], z, torch.eye(3).expand(4, 3, 3))
try:
    contrastive(z, pair // 2, pair, torch.zeros(2, 3), tau=0.2, alpha=2.0, backend="triton")
except ValueError as error:
    print(error)
"""


def test_everything_but_the_kernels_works_without_triton():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "pip install triton" in run.stdout


# ------------------------------------------------------------------- memory

# An out-of-range store corrupts the interpreter's heap instead of failing, so this runs apart:
# every tensor that the path allocates gets a margin of canaries on both sides.
GUARDED = """
import os, sys
os.environ["TRITON_INTERPRET"] = "0" if sys.argv[1] == "cuda" else "1"
import torch
PAD, MARK, blocks = 4096, 12345.0, []
def guard(make):
    def made(*args, **kwargs):
        like = make(*args, **kwargs)
        block = make_empty(like.numel() + 2 * PAD, dtype=like.dtype, device=like.device)
        block.fill_(MARK)
        blocks.append(block)
        return block[PAD : PAD + like.numel()].view(like.shape).copy_(like)
    return made
make_empty = torch.empty
from kernels import contrastive, mahalanobis
torch.Tensor.new_empty = guard(torch.Tensor.new_empty)
torch.full_like, torch.zeros_like = guard(torch.full_like), guard(torch.zeros_like)
contrastive.PROGRAMS = 4
for N, Z, rows in ((2, 1, None), (70, 17, None), (66, 40, (33, 60)), (34, 130, (0, 33))):
    z = torch.randn(N, Z, device=sys.argv[1], requires_grad=True)
    c = torch.zeros(2, Z, device=z.device, requires_grad=True)
    pair = torch.arange(N, device=z.device) ^ 1
    torch.empty = guard(make_empty)
    loss = contrastive.contrastive(z, pair // 2 % 2, pair, c, tau=0.2, alpha=2.0, rows=rows,
                                   backend="triton")
    loss.backward()
    torch.empty = make_empty
for B, P, D in ((1, 3, 5), (3, 2, 33), (17, 2, 40), (70, 1, 20)):
    x = torch.randn(B, P, D, device=sys.argv[1])
    w = torch.randn(P, D, D, device=x.device)
    torch.empty = guard(make_empty)
    mahalanobis.mahalanobis(x, x[0], w, backend="triton")
    torch.empty = make_empty
mark = torch.tensor(MARK)
for block in blocks:
    edges = torch.cat([block[:PAD], block[-PAD:]])
    assert (edges == mark.to(block.dtype)).all(), block.shape
print(len(blocks), "blocks intact")
"""


@needs_triton
def test_no_kernel_writes_outside_its_tensors():
    command = [sys.executable, "-c", GUARDED, DEVICE.type]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[0]) >= 4 * 7 + 4


def test_memory_of_the_torch_path_is_linear(monkeypatch):
    """What is saved for the backward pass: with N doubled it doubles, and is far below N^2."""
    monkeypatch.setattr(losses, "PAIRS", 2**18)
    saved: list[int] = []
    for images in (512, 1024):
        case = make_case([images] * 2, 8, seed=12)
        z = case.z.clone().requires_grad_()
        kept: dict[int, int] = {}  # address -> bytes
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.update({t.data_ptr(): t.nbytes}), t)[1], lambda t: t
        ):
            loss = replace(case, z=z).losses("torch").sum()
        saved.append(sum(kept.values()))
        loss.backward()
    assert saved[1] < 2.1 * saved[0] < 2048 * 2048


# ------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "tf32", "float32"])
@pytest.mark.parametrize("rows", [None, (333, 700)])
def test_every_product_on_the_gpu(kind, rows):
    case = make_case([200, 100, 200], 128, seed=13, rows=rows)
    z = case.z.to(getattr(torch, kind)) if "float" in kind else case.z
    assert_right(replace(case, z=z, allow_tf32=kind == "tf32"))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(0, 1), (1, 2), None])
def test_arguments_that_triton_folds_on_the_gpu(rows):
    """Sizes and strides of 1 become constants of the compiled kernels."""
    assert_right(make_case([1, 1], 1, seed=23, rows=rows))
    case = make_case([3], 17, seed=24, rows=rows, positive_scale=1)
    assert_right(replace(case, z=case.z.T.contiguous().T))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_features_take_centres_of_both_kinds_on_the_gpu(dtype):
    case = make_case([30, 40], 128, seed=25)
    for c in (case.c, case.c.to(dtype)):
        z, z64 = case.z.to(dtype).requires_grad_(), case.z.to(dtype).double().requires_grad_()
        c, c64 = c.clone().requires_grad_(), c.double().requires_grad_()
        replace(case, z=z, c=c).losses("triton").sum().backward()
        replace(case, z=z64, c=c64).definition().sum().backward()
        assert z.grad.dtype == dtype and c.grad.dtype == c.dtype
        for got, want in ((z.grad, z64.grad), (c.grad, c64.grad)):
            assert (got.double() - want).norm() < 2e-2 * want.norm()


@pytest.mark.gpu
def test_another_stream_and_another_gpu_change_no_bit():
    case, results = make_case([60, 68], 128, seed=26), []
    last = torch.device("cuda", torch.cuda.device_count() - 1)  # not the current one, if two
    side = torch.cuda.Stream()
    for device, stream in ((DEVICE, torch.cuda.current_stream()), (DEVICE, side), (last, None)):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            z, n, pair, c = (t.to(device) for t in (case.z, case.n, case.pair, case.c))
            z = z.clone().requires_grad_()
            loss = replace(case, z=z, n=n, pair=pair, c=c).losses("triton")
            loss.sum().backward()
        torch.cuda.synchronize(device)
        results.append((loss.detach().cpu(), z.grad.cpu()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_large_batch_on_the_gpu(dtype):
    case = make_case([12_000, 11_768, 8_000, 1_000], 128, seed=13)  # N = 65536: N^2 passes 2^31
    assert_right(replace(case, z=case.z.to(dtype), rows=(30_000, 30_064)))


@pytest.mark.gpu
def test_rows_whose_offsets_pass_int32_on_the_gpu():
    """N Z values of f are 2^31 and more; the losses of the last 32 views, in blocks of columns."""
    N, Z = 2**22 + 64, 512
    gen = torch.Generator(DEVICE).manual_seed(27)
    z = torch.randn(N, Z, generator=gen, device=DEVICE, dtype=torch.bfloat16)
    n, pair = torch.zeros(N, dtype=torch.int64, device=DEVICE), torch.arange(N, device=DEVICE) ^ 1
    case = Case(z, n, pair, torch.zeros(1, Z, device=DEVICE), rows=(N - 32, N))

    def features(rows: torch.Tensor) -> torch.Tensor:  # as the kernels store them
        return torch.nn.functional.normalize(rows.float(), dim=1).bfloat16().double()

    f, kappa = features(z[-32:]), kappas(0.2, 2.0, "kappa")[0]
    total = sum((kappa * f @ features(part).T).exp().sum(1) for part in z.split(2**18))
    total = total - (kappa * f * f).sum(1).exp()
    want = total.log() - kappa * (f * f[torch.arange(32) ^ 1]).sum(1)
    assert_within(case.losses("triton"), want, 0.05)


@pytest.mark.gpu
def test_other_work_on_the_gpu_changes_no_bit():
    case = make_case([1000, 1049], 128, seed=28)
    work, results = torch.ones(4096, 4096, device=DEVICE), []
    for _ in range(100):
        z = case.z.bfloat16().requires_grad_()
        work @ work
        loss = replace(case, z=z).losses("triton")
        loss.sum().backward()
        results.append((loss.detach(), z.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
def test_memory_is_linear_on_the_gpu():
    case = make_case([2048, 2048], 128, seed=14)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    z = case.z.clone().requires_grad_()
    replace(case, z=z).losses("triton").sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 128 * 2**20  # N^2 alone is 256 MB


@pytest.mark.gpu
def test_a_cuda_graph_captures_a_step_and_nothing_waits():
    case = make_case([60, 68], 128, seed=15)
    z = case.z.clone().requires_grad_()

    def step() -> None:
        replace(case, z=z).losses("triton", reduction="mean").backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        z.grad = None
        try:
            torch.cuda.set_sync_debug_mode("error")
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    want, z.grad = z.grad, None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    z.grad.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(z.grad, want)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_and_eager_agree_on_the_gpu():
    case = make_case([60, 68], 128, seed=16)
    n, pair, c = case.n, case.pair, case.c

    def loss(z: torch.Tensor) -> torch.Tensor:
        return contrastive.contrastive(2 * z, n, pair, c, tau=0.2, alpha=2.0, backend="triton")

    z, same = (case.z.clone().requires_grad_() for _ in range(2))
    compiled = torch.compile(loss, fullgraph=True, dynamic=False)(z)
    want = loss(same).double()
    assert_within(compiled, want, 8 * U32 * want)
    compiled.backward()
    loss(same).backward()
    torch.testing.assert_close(z.grad, same.grad, rtol=1e-4, atol=1e-7)
