"""f_beta as a detector: it comes free with the pre-training.   [P!(8) R22]

Eq. 8 trains f_beta to tell images with 0, 1, 2 and 3 fake lesions apart, so that its output
for a new image is a score, 1 - P(n = 0 | x). The paper does not use it this way: our reading.

Sizes: B images, S pixels a side, A classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoder import Encoder, channels_last, to_unit

PIXELS = 2**19  # B S^2 that the network sees at once


class LesionClassifier:
    """s(x) = 1 - P(n = 0 | x), P the softmax of f_beta's logits.   [P!(8) R22]

    encoder: pre-trained with eq. 8, in evaluation mode.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder.eval()
        self.device = encoder.f_beta.weight.device

    @torch.no_grad()
    def score(self, images: np.ndarray | Tensor) -> tuple[None, Tensor]:
        """No heat maps, and a score for each image.

        images:  (B, 3, S, S), uint8 or floating in [0, 1].
        returns: None and scores (B,) in [0, 1].
        """
        step, scores = max(1, PIXELS // images.shape[-1] ** 2), []
        for k in range(0, len(images), step):
            x = channels_last(to_unit(images[k : k + step], self.device))
            logits = self.encoder.aug_logits(*self.encoder.embed(x))  # (B, A)
            scores.append(1 - logits.softmax(dim=1)[:, 0])
        return None, torch.cat(scores)

    def save(self, path: str | Path) -> None:
        """Write one file that holds everything; `of` reads what it holds."""
        state = {"kind": "f_beta", "classes": self.encoder.f_beta.out_features, "size": 32}  # least
        state |= {name: getattr(self.encoder, name) for name in ("features", "aug_head")}
        torch.save(state | {"encoder": self.encoder.state_dict()}, path)

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device | str = "cpu") -> LesionClassifier:
        """The detector whose `save` wrote this state: torch.load(path, weights_only=True)."""
        settings = {name: state[name] for name in ("classes", "features", "aug_head")}
        encoder = Encoder(**settings).to(device)
        encoder.load_state_dict(state["encoder"])
        return cls(encoder)
