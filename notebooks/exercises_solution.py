# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercises: write PMSACL's losses, PaDiM and MedMix's paste
#
# Each exercise is one equation of the paper (Tian et al., arXiv:2109.01303v3) as one function of
# tensors. Below it a test tells whether it is right. Where it says `NotImplementedError`, write
# your own lines; run the cell and the test; go on when it says `right`. Exercises are independent
# of each other, except that 4 puts 5, 6 and 7 together.
#
# Sizes: A classes (class n carries n fake lesions), B images, N = 2 A B views, Z features of a
# view, P positions of an image, D channels, S pixels a side.

# %%
import math
import os
import sys
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "passive"
sys.path.insert(0, str(Path.cwd().parent if Path.cwd().name == "notebooks" else Path.cwd()))

import torch
import torch.nn.functional as F

import losses
from detectors import PaDiM
from encoder import ResNet18, seeded
from kernels.mahalanobis import mahalanobis as kernel_mahalanobis
from support.exercises import check, close

A, B, Z, TAU, ALPHA = 4, 3, 6, 0.2, 2.0
draws = seeded(0)
n = torch.arange(A).repeat_interleave(2 * B)  # (N,) class ids
pair = torch.arange(len(n)) ^ 1  # (N,) the other weak view of the same strong image
z = torch.randn(len(n), Z, generator=draws, dtype=torch.float64)
c = torch.randn(A, Z, generator=draws, dtype=torch.float64)
results = {}  # exercise -> how its test ended

# %% [markdown]
# ## Equation 2: the centre of each class `[P:(2)]`
#
# $$\mathbf{c}_n = \mathbb{E}_{\mathbf{x} \in \mathcal{D}, a \sim \mathcal{A}_n}
# [f_\theta(a(\mathbf{x}))]$$
#
# The centres are computed once and frozen: no gradient may flow through them.


# %%
def class_centres(encoder, views, n):
    """encoder: f_theta.   views: (N, ...).   n: (N,).   returns: c (A, Z), without a gradient."""
    # BLANK: `torch.no_grad()`; then for each class the mean of the rows z[n == k]
    with torch.no_grad():
        z = encoder(views)
    return torch.stack([z[n == k].mean(dim=0) for k in range(int(n.max()) + 1)])
    # END


def test_2():
    encoder = torch.nn.Linear(5, Z).double()
    views = torch.randn(7, 5, generator=seeded(2), dtype=torch.float64)
    of_class = torch.tensor([0, 2, 1, 0, 0, 2, 1])  # classes of different sizes
    got = class_centres(encoder, views, of_class)
    members = [[encoder(views[i]).detach() for i in range(7) if of_class[i] == k] for k in range(3)]
    want = torch.stack([sum(rows) / len(rows) for rows in members])
    close(got, want, "row k is the mean over the views of class k alone")
    assert not got.requires_grad, "the centres are frozen: use torch.no_grad()"


check(results, "equation 2", test_2)

# %% [markdown]
# ## Equation 3: pull each view to the centre of its class `[P:(3)]`
#
# $$\ell_{ctr} = \mathbb{E}\, \|f_\theta(a(\mathbf{x})) - \mathbf{c}_n\|^2$$


# %%
def multi_centring_loss(z, n, c):
    """z: (N, Z).   n: (N,).   c: (A, Z).   returns: a scalar."""
    # BLANK: c[n] has each view's centre; the norm sums over features, the expectation is over views
    return (z - c[n]).square().sum(dim=1).mean()
    # END


def test_3():
    want = sum(sum((z[i, k] - c[n[i], k]) ** 2 for k in range(Z)) for i in range(len(n))) / len(n)
    got = multi_centring_loss(z, n, c)
    assert abs(float(got) * Z - float(want)) > 1e-6, "sum over the features, do not average them"
    close(got, want, "the mean over the views of the squared distance to their own centre")
    close(multi_centring_loss(c[n], n, c), torch.zeros((), dtype=z.dtype), "0 at the centres")


check(results, "equation 3", test_3)

# %% [markdown]
# ## Equation 6: features seen from the centre of their class `[P:(6)]`
#
# $$\mathbf{f} = \frac{f_\theta(\mathbf{x}) - \mathbf{c}_n}
# {\|f_\theta(\mathbf{x}) - \mathbf{c}_n\|_2}$$
#
# Eq. 3 drives the norm to 0, so it is clamped at `eps` (row R6 of the deviations).


# %%
def centred_features(z, n, c, eps=1e-4):
    """z: (N, Z).   n: (N,).   c: (A, Z).   returns: f (N, Z), of length 1 away from the centre."""
    # BLANK: subtract, divide by the length of each row; `clamp_min(eps)` keeps 0/0 away
    u = z - c[n]
    return u / torch.linalg.vector_norm(u, dim=1, keepdim=True).clamp_min(eps)
    # END


def test_6():
    f = centred_features(z, n, c)
    want = z.clone()
    for i in range(len(n)):
        u = z[i] - c[n[i]]
        want[i] = u / math.sqrt(sum(float(v) ** 2 for v in u))
    close(f, want, "each row is z - c_n over its own length")
    close(centred_features(c[n], n, c), torch.zeros_like(z), "0 at the centre, not NaN")


check(results, "equation 6", test_6)

# %% [markdown]
# ## Equation 7: views of one class repel each other less `[P:(7)]`
#
# $$\kappa(n, m) = \begin{cases} 1/(\alpha\tau) & \text{if } n = m \\
# 1/\tau & \text{otherwise} \end{cases}$$


# %%
def kappas(n, tau, alpha):
    """n: (N,).   tau: temperature.   alpha: above 1.   returns: kappa (N, N) of all pairs."""
    # BLANK: n[:, None] == n[None, :] compares all pairs; torch.where chooses
    same = n[:, None] == n[None, :]
    return torch.where(same, 1 / (alpha * tau), 1 / tau)
    # END


def test_7():
    got = kappas(n, TAU, ALPHA)
    want = torch.tensor([[1 / (ALPHA * TAU) if i == j else 1 / TAU for j in n] for i in n])
    close(got, want, "1/(alpha tau) within a class, 1/tau between classes")


check(results, "equation 7", test_7)

# %% [markdown]
# ## Equation 5: the contrastive loss of each view `[P!(5) R2]`
#
# $$\ell_i = -\log \frac{\exp(\kappa_{i,p(i)}\, \mathbf{f}_i^\top \mathbf{f}_{p(i)})}
# {\sum_{j \neq i} \exp(\kappa_{ij}\, \mathbf{f}_i^\top \mathbf{f}_j)}$$
#
# p(i) is the other weak view of the same strong image. The paper prints 1/2 in the numerator; with
# kappa there, as here, the fraction is a softmax.


# %%
def contrastive_losses(f, pair, kappa):
    """f: (N, Z).   pair: (N,).   kappa: (N, N).   returns: l (N,)."""
    # BLANK: s = kappa * (f @ f.T); the diagonal becomes -inf; `logsumexp` is the stable denominator
    s = (kappa * (f @ f.T)).fill_diagonal_(-math.inf)
    return s.logsumexp(dim=1) - s[torch.arange(len(f)), pair]
    # END


def test_5():
    f = F.normalize(z, dim=1)
    kappa = 3 + torch.rand(len(f), len(f), generator=seeded(5), dtype=torch.float64)
    want = torch.zeros(len(f), dtype=torch.float64)
    for i in range(len(f)):
        others = [j for j in range(len(f)) if j != i]
        total = sum(math.exp(kappa[i, j] * (f[i] @ f[j])) for j in others)
        want[i] = math.log(total) - kappa[i, pair[i]] * (f[i] @ f[pair[i]])
    close(contrastive_losses(f, pair, kappa), want, "the sum runs over j != i; the pair is in it")
    large = contrastive_losses(f, pair, 1000 * kappa)
    assert torch.isfinite(large).all(), "exp overflows: use logsumexp"


check(results, "equation 5", test_5)

# %% [markdown]
# ## Equation 4: put 5, 6 and 7 together `[P:(4)]`


# %%
def contrastive_loss(z, n, pair, c, tau, alpha):
    """z: (N, Z).   n, pair: (N,).   c: (A, Z).   returns: the mean of eq. 5, a scalar."""
    # BLANK: eq. 6 gives f, eq. 7 gives kappa, eq. 5 a loss for each view
    f = centred_features(z, n, c)
    return contrastive_losses(f, pair, kappas(n, tau, alpha)).mean()
    # END


def test_4():
    at = z.clone().requires_grad_()
    got = contrastive_loss(at, n, pair, c, TAU, ALPHA)
    want = losses.contrastive_loss(z, n, pair, c, tau=TAU, alpha=ALPHA)
    close(got.detach(), want, "the mean over all views")
    [gradient] = torch.autograd.grad(got, at)
    assert gradient.abs().max() > 0, "the encoder learns from it: keep the gradient"


check(results, "equation 4", test_4)

# %% [markdown]
# ## Equation 8: how many fake lesions? `[P:(8)]`
#
# $$\ell_{aug} = -\mathbb{E} \log \mathbf{a}_n^\top f_\beta(f_\theta(a(\mathbf{x})))$$
#
# f_beta ends in a softmax; a_n is one-hot at n.


# %%
def augmentation_loss(logits, n):
    """logits: (N, A), before the softmax.   n: (N,).   returns: a scalar."""
    # BLANK: `log_softmax` over the classes, its entry at n, the mean with a minus
    return -logits.log_softmax(dim=1)[torch.arange(len(n)), n].mean()
    # END


def surprise(logits, k):
    """-log softmax(logits)_k of one view."""
    return math.log(sum(math.exp(v) for v in logits)) - logits[k]


def test_8():
    logits = 3 * torch.randn(len(n), A, generator=seeded(8), dtype=torch.float64)
    want = sum(surprise(row, k) for row, k in zip(logits, n, strict=True)) / len(n)
    close(augmentation_loss(logits, n), want, "minus the mean log-probability of the right class")
    assert torch.isfinite(augmentation_loss(1e4 * logits, n)), "log(softmax) is -inf: log_softmax"


check(results, "equation 8", test_8)

# %% [markdown]
# ## Equation 9: in which of eight directions does the neighbour lie? `[P!(9) R18]`
#
# $$\ell_{pos} = -\mathbb{E} \log \mathbf{p}^\top
# f_\gamma(f_\theta(\mathbf{x}_{\omega_1}), f_\theta(\mathbf{x}_{\omega_2}))$$
#
# Here f_gamma is a linear layer with a softmax, and it sees the difference of the two features.


# %%
def position_loss(z_1, z_2, f_gamma, p):
    """z_1, z_2: (B, Z) of a patch and its neighbour.   f_gamma: (B, Z) -> logits (B, 8).

    p: (B,) directions.   returns: a scalar.
    """
    # BLANK: f_gamma of z_1 - z_2, then as in eq. 8
    return F.cross_entropy(f_gamma(z_1 - z_2), p)
    # END


def test_9():
    f_gamma, p = torch.nn.Linear(Z, 8).double(), torch.arange(12) % 8
    z_1, z_2 = z[:12], z[12:]
    got, logits = position_loss(z_1, z_2, f_gamma, p), f_gamma(z_1 - z_2).detach()
    want = sum(surprise(row, k) for row, k in zip(logits, p, strict=True)) / 12
    close(got.detach(), want, "the difference is z_1 - z_2, in this order")
    assert got.requires_grad, "f_gamma learns from it"


check(results, "equation 9", test_9)

# %% [markdown]
# ## PaDiM: a Gaussian at each position `[D:(1)]`
#
# $$\Sigma_p = \frac{1}{N-1} \sum_n (\mathbf{x}_{np} - \mu_p)(\mathbf{x}_{np} - \mu_p)^\top
# + \epsilon I$$
#
# x are features of healthy images. Without the ridge, N <= D images would give a singular matrix.


# %%
def gaussians(x, eps=0.01):
    """x: (N, P, D).   returns: mu (P, D) and Sigma (P, D, D)."""
    # BLANK: the mean over the images; einsum "npd,npe->pde" of the centred features
    mu = x.mean(dim=0)
    r = x - mu
    sigma = torch.einsum("npd,npe->pde", r, r) / (len(x) - 1)
    return mu, sigma + eps * torch.eye(x.shape[2], dtype=x.dtype)
    # END


x_healthy = torch.randn(9, 5, 3, generator=seeded(12), dtype=torch.float64)  # (N, P, D)
x_new = torch.randn(4, 5, 3, generator=seeded(13), dtype=torch.float64)  # (B, P, D)


def moments_of(position):
    """mu and Sigma of one position, by loops."""
    rows = x_healthy[:, position]
    mu = sum(rows) / len(rows)
    sigma = sum(torch.outer(row - mu, row - mu) for row in rows) / (len(rows) - 1)
    return mu, sigma + 0.01 * torch.eye(3, dtype=torch.float64)


def test_gaussians():
    mu, sigma = gaussians(x_healthy)
    for p in range(5):
        want_mu, want_sigma = moments_of(p)
        close(mu[p], want_mu, "the mean over the images, position by position")
        close(sigma[p], want_sigma, "N - 1, and the ridge on the diagonal")


check(results, "PaDiM's Gaussians", test_gaussians)

# %% [markdown]
# ## Equation 13: how far a new image is from them `[P:(13)]`
#
# $$s(\mathbf{x}_\omega) = \sqrt{(\mathbf{x}_\omega - \mu_\omega)^\top \Sigma_\omega^{-1}
# (\mathbf{x}_\omega - \mu_\omega)}$$


# %%
def mahalanobis(x, mu, sigma):
    """x: (B, P, D) of new images.   mu: (P, D).   sigma: (P, D, D).   returns: s (B, P)."""
    # BLANK: torch.linalg.inv(sigma); einsum "bpd,pde,bpe->bp"; the root
    r = x - mu
    return torch.einsum("bpd,pde,bpe->bp", r, torch.linalg.inv(sigma), r).sqrt()
    # END


def test_13():
    moments = [moments_of(p) for p in range(5)]
    mu, sigma = (torch.stack(part) for part in zip(*moments, strict=True))
    squares = [[r @ torch.linalg.solve(sigma[p], r) for p, r in enumerate(x - mu)] for x in x_new]
    want = torch.tensor(squares, dtype=torch.float64).sqrt()
    close(mahalanobis(x_new, mu, sigma), want, "the root of r^T Sigma^-1 r at each position")
    whitening = torch.linalg.inv(torch.linalg.cholesky(sigma)).float()
    ours = kernel_mahalanobis(x_new.float(), mu.float(), whitening)
    assert torch.allclose(ours.double(), want, rtol=1e-4), "the repository's distance differs"


check(results, "equation 13", test_13)

# %% [markdown]
# ## MedMix: paste a lesion through a soft mask `[P:§3.1]`
#
# share is 1 in the middle of the lesion and falls to 0 at its rim, so that no edge shows.


# %%
def paste(image, patch, share, top, left):
    """image: (3, S, S).   patch: (3, h, w).   share: (h, w) in [0, 1].   top, left: its corner.

    returns: a new image; the given one stays as it is.
    """
    # BLANK: clone; in the window image[:, top : top + h, left : left + w] blend by share
    out = image.clone()
    h, w = share.shape
    window = out[:, top : top + h, left : left + w]
    window += share * (patch - window)
    return out
    # END


def test_paste():
    draw = seeded(31)
    image, patch = torch.rand(3, 16, 16, generator=draw), torch.rand(3, 5, 4, generator=draw)
    share, before = torch.rand(5, 4, generator=draw), image.clone()
    got = paste(image, patch, share, 7, 2)
    assert torch.equal(image, before), "the image that is given must stay as it is: clone it"
    want = image.clone()
    for y in range(5):
        for x in range(4):
            s = share[y, x]
            want[:, 7 + y, 2 + x] = (1 - s) * image[:, 7 + y, 2 + x] + s * patch[:, y, x]
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[7:12, 2:6] = False
    assert got.shape == image.shape and torch.equal(got[:, outside], image[:, outside]), (
        "outside the window nothing changes: rows from top, columns from left"
    )
    close(got, want, "(1 - share) image + share patch")


check(results, "MedMix's paste", test_paste)

# %% [markdown]
# ## How far you are, and your PaDiM on images `[P:(13)]`

# %%
right = [exercise for exercise, end in results.items() if end == "right"]
print(f"{len(right)} of {len(results)} exercises are right")
if len(right) == len(results):  # your PaDiM against that of detectors.py, on images
    images = torch.rand(12, 3, 32, 32, generator=seeded(40))
    ours = PaDiM(ResNet18(seeded(41)).eval(), channels=20).fit(images)
    x = ours.embeddings(images)  # (B, P, D)
    yours = mahalanobis(x.double(), *gaussians(x.double())).float()  # (B, P)
    assert torch.allclose(yours, kernel_mahalanobis(x, ours.mean, ours.whitening), rtol=1e-3)
    print("your PaDiM and that of detectors.py give the same distances")
