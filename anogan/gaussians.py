"""Features of normal images as one normal distribution, and how far others lie from it."""

from dataclasses import dataclass

import torch
from sklearn.covariance import ShrunkCovariance, ledoit_wolf_shrinkage


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution of features."""

    mean: torch.Tensor  # (F,)
    precision: torch.Tensor  # (F, F), the inverse of the covariance

    def distance(self, features: torch.Tensor) -> torch.Tensor:
        """The squared Mahalanobis distance of features (..., F): (...)."""
        away = features - self.mean
        return (away @ self.precision * away).sum(-1)


def fit(features: torch.Tensor, least: float = 0.0) -> Gaussian:
    """The normal distribution of features (M, F).

    The covariance is shrunk towards a multiple of the identity, since M may be less than F: by the share of Ledoit and
    Wolf 2004, and by `least` at least. Theirs is too small where features are not independent, as those of the patches
    of one picture.
    """
    vectors = features.cpu().double().numpy()
    fitted = ShrunkCovariance(shrinkage=max(ledoit_wolf_shrinkage(vectors), least)).fit(vectors)
    return Gaussian(*(torch.from_numpy(each).to(features) for each in (fitted.location_, fitted.precision_)))
