"""kernels/mahalanobis.py: both paths against the definition, the definition against the page.

Tolerances count roundings of U32 = 2^-24, one named term each; the float64 definition runs on the
same bits. Kernels run in the Triton interpreter where there is no GPU.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BACKENDS, DEVICE, ROOT, RUNS_TRITON, U32, assert_within, needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors import block_rows
from kernels import mahalanobis
from kernels.mahalanobis import mahalanobis_ref


def make_case(B, P, D, seed, *, scale=1.0, ridge=0.1, layout="BPD", dtype=torch.float32):
    """x (B, P, D), mean (P, D), W (P, D, D) of a covariance with condition number ~ 1 / ridge."""
    gen = torch.Generator().manual_seed(seed)
    samples = torch.randn(P, D + 2, D, generator=gen, dtype=torch.float64)
    sigma = samples.mT @ samples / (D + 2) + ridge * torch.eye(D, dtype=torch.float64)
    factor = torch.linalg.cholesky(sigma)
    eye = torch.eye(D, dtype=torch.float64).expand(P, D, D)
    W = torch.linalg.solve_triangular(factor, eye, upper=False)
    mean = torch.randn(P, D, generator=gen)
    x = mean + scale * torch.randn(B, P, D, generator=gen)
    if layout == "BDP":  # as a feature map gives it
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.to(DEVICE, dtype), mean.to(DEVICE), W.float().to(DEVICE), sigma.to(DEVICE)


@st.composite
def cases(draw):
    return make_case(
        draw(st.sampled_from([1, 2, 15, 16, 17, 33, 65])),  # both sides of every block of images
        draw(st.integers(1, 4)),
        draw(st.sampled_from([1, 3, 8, 31, 32, 33, 100])),
        draw(st.integers(0, 2**31 - 1)),
        scale=draw(st.sampled_from([0.0, 1e-6, 1.0, 1e3])),
        ridge=draw(st.sampled_from([1e-4, 0.1])),
        layout=draw(st.sampled_from(["BPD", "BDP"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    )[:3]


def budget(x, mean, W, stored: float = 0.0):
    """(B, P). y_i = sum_j W_ij delta_j is off by (delta 1 + sum D + storage of W) |W| |delta|.

    |y| is off by the norm of that; then square 1, sum D and root 1 relative to the result, of
    which the root halves the first two. A square below float32's smallest normal is lost.
    """
    D = x.shape[2]
    delta = (x.double() - mean.double()).abs()
    reach = torch.einsum("pij,bpj->bpi", W.double().abs(), delta).norm(dim=2)
    want = mahalanobis_ref(x.double(), mean.double(), W.double())
    return U32 * ((1 + D + stored) * reach + (1 + (D + 1) / 2) * want) + math.sqrt(D) * 2.0**-63


# ------------------------------------------------------------------- the page and the definition


def test_the_definition_is_the_page():
    x, mean, W, sigma = make_case(3, 4, 5, seed=1)
    got = mahalanobis_ref(x.double(), mean.double(), W.double())
    for b in range(3):
        for p in range(4):  # eq. 13 as printed, with the inverse covariance
            inverse = torch.linalg.inv(sigma[p]).tolist()
            d = (x[b, p].double() - mean[p].double()).tolist()
            square = sum(d[i] * inverse[i][j] * d[j] for i in range(5) for j in range(5))
            assert float(got[b, p]) == pytest.approx(math.sqrt(square), rel=1e-5)  # W is float32


def test_gradcheck_of_the_definition():
    x, mean, W, _ = make_case(2, 2, 3, seed=2)
    inputs = tuple(t.double().requires_grad_() for t in (x, mean, W))
    assert torch.autograd.gradcheck(mahalanobis_ref, inputs)
    with torch.no_grad():  # where none is recorded, the shipped paths take such inputs
        torch.testing.assert_close(mahalanobis.mahalanobis(*inputs), mahalanobis_ref(*inputs))


# ------------------------------------------------------------------- the shipped paths


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_distances_stay_within_their_rounding_budget(backend, case):
    want = mahalanobis_ref(*(t.double() for t in case))
    got = mahalanobis.mahalanobis(*case, backend=backend)
    assert got.dtype == torch.float32
    assert_within(got, want, budget(*case))


@needs_triton
@settings(max_examples=20)
@given(case=cases())
def test_tf32_rounds_both_factors_to_ten_bits(case):
    want = mahalanobis_ref(*(t.double() for t in case))
    got = mahalanobis.mahalanobis(*case, backend="triton", allow_tf32=True)
    assert_within(got, want, budget(*case, stored=2 * 2.0**-11 / U32))


@needs_triton
def test_tf32_is_for_several_images_and_coarser():
    x, mean, W, _ = make_case(3, 4, 40, seed=14)
    for B in (1, 3):
        want = mahalanobis_ref(x[:B].double(), mean.double(), W.double())
        got = mahalanobis.mahalanobis(x[:B], mean, W, backend="triton", allow_tf32=True)
        off = ((got - want).abs() / budget(x[:B], mean, W)).max()
        assert (off > 1) == (B > 1)  # one image has no matrix product


@given(case=cases())
def test_block_rows_stand_for_the_whole_of_w(case):
    x, mean, W = case
    rows, unread = block_rows(W), torch.full_like(W, math.nan)
    assert sum(row[0].numel() for row in rows) <= math.ceil(5 * W.shape[1] ** 2 / 8) + W.shape[1]
    got = mahalanobis.mahalanobis(x, mean, unread, rows=rows, backend="torch")
    want = mahalanobis_ref(*(t.double() for t in case))
    assert_within(got, want, budget(x, mean, W))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B", [1, 3])
def test_whitening_stored_as_bfloat16(backend, B):
    """2^-9 of each element, as documented, and no more: on the stored bits it is exact."""
    x, mean, W, _ = make_case(B, 3, 40, seed=3)
    got = mahalanobis.mahalanobis(x, mean, W.bfloat16(), backend=backend)
    stored = mahalanobis_ref(x.double(), mean.double(), W.bfloat16().double())
    assert_within(got, stored, budget(x, mean, W.bfloat16()))
    exact = mahalanobis_ref(x.double(), mean.double(), W.double())
    assert_within(got, exact, budget(x, mean, W, stored=2.0**-9 / U32))


@needs_triton
@pytest.mark.parametrize(("B", "D"), [(1, 448), (2, 550), (1, 1024)])
def test_many_channels(B, D):
    x, mean, W, _ = make_case(B, 1, D, seed=4)
    want = mahalanobis_ref(x.double(), mean.double(), W.double())
    assert_within(mahalanobis.mahalanobis(x, mean, W, backend="triton"), want, budget(x, mean, W))


@needs_triton
@pytest.mark.parametrize("B", [1, 2])
def test_strides_whose_multiples_pass_int32(B):
    """Rows of W lie 2^30 values apart; an offset that wraps reads a zero instead."""
    x, mean, W, _ = make_case(B, 1, 3, seed=14)
    nothing = np.zeros(2**32 + 3, np.float16)  # pages nobody touches take no memory
    far = torch.from_numpy(nothing).to(DEVICE).as_strided((1, 3, 3), (3, 2**30, 1), 2**31)
    far.copy_(W)
    got = mahalanobis.mahalanobis(x, mean, far, backend="triton")
    want = mahalanobis_ref(x.double(), mean.double(), far.double())
    assert_within(got, want, budget(x, mean, far))


@pytest.mark.parametrize("B", [1, 5])
def test_float64_stays_float64_and_steps_of_positions_join(B, monkeypatch):
    monkeypatch.setattr(mahalanobis, "SCRATCH", 3 * B * 6)
    case = tuple(t.double() for t in make_case(B, 7, 6, seed=5)[:3])  # steps of 3, 3 and 1
    got = mahalanobis.mahalanobis(*case, backend="torch")
    torch.testing.assert_close(got, mahalanobis_ref(*case), rtol=1e-13, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_budget_rejects_known_wrong_answers(backend):
    x, mean, W, _ = make_case(4, 3, 40, seed=6)
    x64, mean64, W64 = x.double(), mean.double(), W.double()
    allowed = budget(x, mean, W)
    want = mahalanobis_ref(x64, mean64, W64)
    wrong = {
        "W transposed": mahalanobis_ref(x64, mean64, W64.mT),
        "no mean": mahalanobis_ref(x64, 0 * mean64, W64),
        "the square": want**2,
        "Euclidean": (x64 - mean64).norm(dim=2),
        "W as bfloat16": mahalanobis_ref(x64, mean64, W.bfloat16().double()),
        "x as bfloat16": mahalanobis_ref(x.bfloat16().double(), mean64, W64),
    }
    for name, answer in wrong.items():
        with pytest.raises(AssertionError):
            assert_within(answer, want, allowed)
            pytest.fail(f"the budget accepts: {name}")


# ------------------------------------------------------------------- invariances and bounds


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(case=cases(), seed=st.integers(0, 2**31 - 1))
def test_permuting_images_and_positions_permutes_the_result(backend, case, seed):
    x, mean, W = case
    gen = torch.Generator().manual_seed(seed)
    b = torch.randperm(x.shape[0], generator=gen).to(DEVICE)
    p = torch.randperm(x.shape[1], generator=gen).to(DEVICE)
    moved = mahalanobis.mahalanobis(x[b][:, p], mean[p], W[p], backend=backend)
    want = mahalanobis_ref(x.double(), mean.double(), W.double())[b][:, p]
    assert_within(moved, want, budget(x, mean, W)[b][:, p])


@needs_triton
@pytest.mark.parametrize("B", [1, 5])
def test_the_kernel_never_reads_above_the_diagonal(B):
    x, mean, W, _ = make_case(B, 3, 40, seed=7)
    above = torch.ones(40, 40, dtype=torch.bool, device=DEVICE).triu(1)
    poisoned = W.masked_fill(above, math.nan)
    got = mahalanobis.mahalanobis(x, mean, poisoned, backend="triton")
    assert torch.equal(got, mahalanobis.mahalanobis(x, mean, W, backend="triton"))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(case=cases())
def test_no_distance_is_negative_and_the_mean_is_at_zero(backend, case):
    x, mean, W = case
    assert (mahalanobis.mahalanobis(x, mean, W, backend=backend) >= 0).all()
    at_mean = mahalanobis.mahalanobis(mean[None], mean, W, backend=backend)
    assert torch.equal(at_mean, torch.zeros_like(at_mean))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_power_of_two_scales_exactly_and_runs_repeat(backend):
    x, mean, W, _ = make_case(3, 2, 20, seed=8)
    got = mahalanobis.mahalanobis(x, mean, W, backend=backend)
    assert torch.equal(mahalanobis.mahalanobis(4 * x, 4 * mean, W, backend=backend), 4 * got)
    assert torch.equal(mahalanobis.mahalanobis(x, mean, W, backend=backend), got)


# ------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, m, W: (x[0], m, W), "must be"),
        (lambda x, m, W: (x[:0], m, W), "must be"),
        (lambda x, m, W: (x, m[:1], W), "must be"),
        (lambda x, m, W: (x, m, W[:, :2]), "must be"),
        (lambda x, m, W: (x.long(), m, W), "floating point"),
        (lambda x, m, W: (x, m.to("meta"), W), "one device"),
        (lambda x, m, W: (x.requires_grad_(), m, W), "no gradient"),
    ],
)
def test_what_is_undefined_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        mahalanobis.mahalanobis(*change(*make_case(2, 2, 3, seed=10)[:3]))


def test_rows_that_are_not_those_of_w_are_refused():
    x, mean, W, _ = make_case(2, 3, 4, seed=13)
    whole = mahalanobis.mahalanobis(x, mean, W, rows=[W.mT], backend="torch")
    assert torch.equal(whole, mahalanobis.mahalanobis(x, mean, W, backend="torch"))
    for rows in ([W.mT[:, :2, :2]], [W.mT[:, :, :2]], [W.mT[:1]]):
        with pytest.raises(ValueError, match="block rows"):
            mahalanobis.mahalanobis(x, mean, W, rows=rows)


def test_unusable_backends_are_refused():
    x, mean, W, _ = make_case(2, 2, 3, seed=11)
    with pytest.raises(ValueError, match="backend"):
        mahalanobis.mahalanobis(x, mean, W, backend="numpy")
    if RUNS_TRITON:
        with pytest.raises(ValueError, match="Triton path takes"):
            mahalanobis.mahalanobis(x.double(), mean, W, backend="triton")
        with pytest.raises(ValueError, match="D <= 1024"):
            wide = torch.zeros(1, 1, 1025, device=DEVICE)
            square = torch.zeros(1, 1, 1, device=DEVICE).expand(1, 1025, 1025)
            mahalanobis.mahalanobis(wide, wide[0], square, backend="triton")


# ------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 8, 40, 128])
def test_paper_size_on_the_gpu(B):
    x, mean, W, _ = make_case(B, 512, 100, seed=12)
    want = mahalanobis_ref(x.double(), mean.double(), W.double())
    assert_within(mahalanobis.mahalanobis(x, mean, W, backend="triton"), want, budget(x, mean, W))
    tf32 = mahalanobis.mahalanobis(x, mean, W, backend="triton", allow_tf32=True)
    assert_within(tf32, want, budget(x, mean, W, stored=2 * 2.0**-11 / U32))


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 8])
def test_a_graph_and_another_gpu_change_no_bit(B):
    """And bfloat16 for all, positions last in memory; nothing waits."""
    x, mean, W, _ = make_case(B, 64, 100, seed=15)
    x, mean = x.bfloat16().transpose(1, 2).contiguous().transpose(1, 2), mean.bfloat16()
    W = W.bfloat16().permute(1, 2, 0).contiguous().permute(2, 0, 1)
    got = mahalanobis.mahalanobis(x, mean, W, backend="triton")
    want = mahalanobis_ref(x.double(), mean.double(), W.double())
    assert_within(got, want, budget(x, mean, W))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = mahalanobis.mahalanobis(x, mean, W, backend="triton")
    graph.replay()
    last = torch.device("cuda", torch.cuda.device_count() - 1)  # not the current one, if two
    there = mahalanobis.mahalanobis(*(t.to(last) for t in (x, mean, W)), backend="triton")
    assert torch.equal(again, got) and torch.equal(there.to(DEVICE), got)


@pytest.mark.gpu
def test_compute_sanitizer_finds_nothing():
    sanitizer = Path("/usr/local/cuda/bin/compute-sanitizer")
    if not sanitizer.exists():
        pytest.skip("compute-sanitizer is not installed")
    first = [sanitizer, sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"]
    if subprocess.run(first, capture_output=True, timeout=120).returncode:
        pytest.skip("compute-sanitizer does not know this device, or may not look at it")
    chosen = [f"{ROOT}/tests/test_mahalanobis.py", f"{ROOT}/tests/test_contrastive.py"]
    command = [sanitizer, "--report-api-errors", "no", "--error-exitcode", "9", sys.executable]
    command += ["-m", "pytest", "-q", *chosen, "-k", "stay_within or many_channels or wide"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        pytest.skip("compute-sanitizer took more than ten minutes")
    assert run.returncode == 0, run.stdout[-2000:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_a_call_costs_no_digits(backend):
    x, mean, W, _ = make_case(3, 4, 20, seed=16)
    want = mahalanobis.mahalanobis(x, mean, W, backend=backend)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = mahalanobis.mahalanobis(x, mean, W, backend=backend)
    assert torch.equal(got, want)
