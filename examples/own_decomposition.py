"""A decomposition of one's own, whole: the input channels alone, 1×1 into R, then d×d.

In the package it takes one line in the registry (``deeptwist/decompositions/__init__.py``) and one
in the tests' table (``METHODS`` in ``tests/cases.py``): the laws of ``tests/test_laws.py`` hold for
it then, or fail. Outside, ``deeptwist.decompositions.METHODS["input_basis"] = InputBasis`` lets
plans and saved models name it. Its options are its dataclass fields.
"""

from dataclasses import dataclass

import torch

from deeptwist.decompositions.base import SingleRankDecomposition
from deeptwist.decompositions.linalg import leading_subspace, power_step, to_unit_scale
from deeptwist.layers.geometry import pointwise


@dataclass(frozen=True)
class InputBasis(SingleRankDecomposition):
    method = "input_basis"

    def full_rank(self, convolution):
        return convolution.in_channels // convolution.groups

    def convolutions(self, convolution):
        dims, groups = convolution.dims, convolution.groups
        hidden = groups * self.resolved_rank
        return (
            (pointwise(dims, convolution.in_channels, hidden, groups),),
            (convolution.restricted_to(range(dims), hidden, convolution.out_channels, groups),),
        )

    def factorize(self, kernel, start, second_moment):
        by_input, _ = to_unit_scale(kernel.transpose(1, 2).flatten(2), 2)  # (g, i, o·Πk)
        if start is None:
            basis = leading_subspace(by_input, self.resolved_rank)
        else:
            basis = power_step(by_input, start[0])
        return basis, torch.einsum("goi...,gir->gor...", kernel, basis)

    def reconstruct(self, tensors, shape):
        basis, core = tensors
        return torch.einsum("gor...,gir->goi...", core, basis)

    def kernels(self, tensors, shape):
        basis, core = tensors
        return [basis.mT.reshape(*basis.mT.shape, *[1] * (len(shape) - 3)), core]
