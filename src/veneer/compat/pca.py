"""peft's face of the incremental PCA, which is scikit-learn's, over veneer's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..inits.pca import IncrementalPCA as Components


class IncrementalPCA:
    """n_components: how many directions, None for as many as the first batch allows. batch_size: rows that `fit` takes
    at once, None for five a column. The other options, which choose how a batch is decomposed, are taken and change
    nothing: one way serves them all.

    components_ (n_components, columns), singular_values_ (n_components,), explained_variance_ratio_ (n_components,),
    mean_ (columns,), n_samples_seen_.
    """

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ):
        self.n_components, self.batch_size, self.lowrank = n_components, batch_size, lowrank
        self.copy, self.svd_driver = copy, svd_driver
        self.lowrank_q, self.lowrank_niter, self.lowrank_seed = lowrank_q, lowrank_niter, lowrank_seed
        self._found: Components | None = None
        self._dtype = torch.get_default_dtype()

    def fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Forget what was seen and take all rows of X (rows, columns), a batch at a time."""
        X = self._checked(X)
        size = self.batch_size or 5 * X.shape[1]
        self._found = None
        batches = list(X.split(int(size)))
        if len(batches) > 1 and len(batches[-1]) < (self.n_components or 0):  # too few rows to stand alone
            batches[-2:] = [torch.cat(batches[-2:])]
        for batch in batches:
            self.partial_fit(batch)
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Merge one batch of rows. Raises ValueError for too few rows or columns, or another number of columns."""
        X = self._checked(X)
        if self._found is None:
            if self.n_components is None:
                self.n_components = min(X.shape)
            if self.n_components > len(X):
                raise ValueError(
                    f"n_components={self.n_components} must be less or equal to the batch number of samples {len(X)}"
                )
            self._found = Components(self.n_components)
        elif X.shape[1] != len(self._found.mean):
            raise ValueError(
                f"a batch has {X.shape[1]} columns and the ones before it {len(self._found.mean)}; fit() starts anew"
            )
        self._found.update(X)
        self._dtype = X.dtype
        return self

    def transform(self, X: Any) -> Tensor:
        """The rows in the directions found, (rows, n_components)."""
        found = self._fitted()
        X = self._checked(X)
        return (X - found.mean).to(X.dtype) @ found.components.mT.to(X.dtype)

    def _checked(self, X: Any) -> Tensor:
        X = torch.as_tensor(X)
        if X.dim() != 2:
            raise ValueError(f"rows of data are needed, (rows, columns), and these have the shape {tuple(X.shape)}")
        X = X if X.is_floating_point() else X.to(torch.get_default_dtype())
        n, columns = self.n_components, X.shape[1]
        if n is not None and not 1 <= n <= columns:
            raise ValueError(
                f"n_components={n} invalid for n_features={columns}, need more rows than columns for IncrementalPCA "
                "processing"
            )
        return X

    def _fitted(self) -> Components:
        if self._found is None:
            raise ValueError("nothing was fitted yet; call fit or partial_fit first")
        return self._found

    @property
    def components_(self) -> Tensor:
        return self._fitted().components.to(self._dtype)

    @property
    def singular_values_(self) -> Tensor:
        return self._fitted().values.to(self._dtype)

    @property
    def explained_variance_ratio_(self) -> Tensor:
        return self._fitted().explained.to(self._dtype)

    @property
    def mean_(self) -> Tensor:
        return self._fitted().mean.to(self._dtype)

    @property
    def n_samples_seen_(self) -> int:
        return self._fitted().rows
