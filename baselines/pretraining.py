"""The pre-trainings that Table 9 compares with: the settings of each, and the losses they add.

Each is pmsacl.py's loop with its own strong set and its own loss, z = f_theta of a weak view:

    simclr   Chen et al. 2020       no strong set    NT-Xent                        [S:(1)]
    rotnet   Gidaris et al. 2018    rotation         class of the strong set        [RN:§3.1]
    csi      Tack et al. 2020       rotation         NT-Xent + class                [CSI:§2.2]
    droc     Sohn et al. 2021       rotation         NT-Xent                        [DROC:§2]
    supcon   Khosla et al. 2020     MedMix           supervised contrastive         [SC:(2)]
    ccd      Tian et al. 2021       permutation      NT-Xent + class + position     [CCD:§2]

"Class" is the cross-entropy of eq. 8, "position" that of eq. 9; both are in losses.py. NT-Xent
over the views of a strong set takes every strong image for another instance, so that shifted
copies of an image repel it; over plain images it is SimCLR. It is eq. 5 with alpha = 1 and centres
at 0, and so runs on eq. 5's kernels. `imagenet`, `random` and `none` are initial weights without
training, those of `none` whatever --init says.

All have PMSACL's weak views, network and head.   [P!Tab.9 R33]

Not here: the papers' anomaly scores (Table 9 puts PaDiM on all of them), LARS, queues and large
batches, CSI's and DROC's other strong sets.

Sizes: A classes, B images, N = 2 A B views, R of them as queries, Z features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contrastive import contrastive
from losses import centred_features

# What a method sets unless the user does; temperatures are those of the authors' code, where they
# differ by data set those for CIFAR-10, whose images are the nearest in size to ours.
METHODS: dict[str, dict[str, Any]] = {
    "pmsacl": {},
    "ccd": {"strong": "permutation", "terms": "con,aug,pos", "local_terms": "con,aug,pos"},
    "simclr": {"classes": 1, "terms": "con", "local_terms": "con", "tau": 0.5},
    "rotnet": {"strong": "rotation", "terms": "aug", "local_terms": "aug"},
    "csi": {"strong": "rotation", "terms": "con,aug", "local_terms": "con,aug", "tau": 0.5},
    "droc": {"strong": "rotation", "terms": "con", "local_terms": "con"},
    "supcon": {"terms": "sup", "local_terms": "sup", "tau": 0.1},
    "imagenet": {"init": "imagenet"},
    "random": {"init": "random"},
    "none": {},
}
UNTRAINED = ("imagenet", "random", "none")


def nt_xent(z: Tensor, pair: Tensor, *, tau: float, rows: tuple[int, int] | None = None) -> Tensor:
    """l = E_i -log [ exp(f_i.f_pair(i) / tau) / sum_{j != i} exp(f_i.f_j / tau) ], f = z / ||z||.

    [S:(1)] over two views of each image; [CSI:§2.2] [DROC:§2] [CCD:§2] over two views of each
    strong image, where the sum runs over all classes alike (DROC's code: over second views alone).

    z:       (N, Z) features of the views.
    pair:    (N,) int64, the other weak view of the same strong image.
    tau:     temperature.
    rows:    (start, stop): only these views are queries.
    returns: scalar.
    """
    return _uncentred(z, pair, tau, "tau", rows).mean()


def supervised_contrastive(
    z: Tensor, n: Tensor, pair: Tensor, *, tau: float, rows: tuple[int, int] | None = None
) -> Tensor:
    """l = E_i -1/|P_i| sum_{p in P_i} log [ exp(f_i.f_p / tau) / sum_{j != i} exp(f_i.f_j / tau) ].

    P_i: the other views of i's class, f = z / ||z||.  [SC:(2)], on MedMix's classes. The mean over
    P_i moves into the logarithm's numerator, f_i.(sum of f over the class - f_i) / (|P_i| tau), so
    that no (N, N) matrix is stored.

    z, pair: as in `nt_xent`; each view has its pair, so |P_i| >= 1.
    n:       (N,) int64 class ids.
    returns: scalar.
    """
    denominator = _uncentred(z, pair, tau, 0.0, rows)
    f = z.to(denominator.dtype)
    f = centred_features(f, torch.zeros_like(n), f.new_zeros(1, f.shape[1]))
    sums = F.one_hot(n).to(f.dtype).T @ f  # (A, Z); index_add is in no fixed order on a GPU
    positives = (f * (sums[n] - f)).sum(dim=1) / (n.bincount()[n] - 1)  # (N,)
    return (denominator - positives[slice(*rows) if rows else slice(None)] / tau).mean()


def terms_of_others(
    z: Tensor, n: Tensor, pair: Tensor, *, tau: float, rows: tuple[int, int] | None = None
) -> dict[str, Callable[[], Tensor]]:
    """The losses that are no term of PMSACL's, by their names in METHODS; arguments as above."""
    return {
        "con": lambda: nt_xent(z, pair, tau=tau, rows=rows),
        "sup": lambda: supervised_contrastive(z, n, pair, tau=tau, rows=rows),
    }


def _uncentred(
    z: Tensor, pair: Tensor, tau: float, scale: str | float, rows: tuple[int, int] | None
) -> Tensor:
    """[P:(5)] of each query, (R,), with alpha = 1 and centres at 0: one class, f = z / ||z||."""
    n, c = torch.zeros_like(pair), z.new_zeros(1, z.shape[1])
    return contrastive(
        z, n, pair, c, tau=tau, alpha=1, positive_scale=scale, rows=rows, reduction="none"
    )
