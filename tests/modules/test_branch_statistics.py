"""The statistics of a sum of branches, from those of each branch."""

import torch
import torch.nn.functional as F

from orepa.modules.branch_statistics import sum_statistics

OUT, KERNEL = 5, (5, 4, 3, 3)


def test_one_branch_keeps_its_statistics():
    mean, variance = torch.randn(OUT), torch.rand(OUT) + 0.1

    got_mean, got_variance = sum_statistics([torch.randn(KERNEL)], [mean], [variance])

    torch.testing.assert_close((got_mean, got_variance), (mean.double(), variance.double()))


def test_white_input_gives_the_variance_of_the_sum():
    torch.manual_seed(0)
    kernels = [torch.randn(KERNEL, dtype=torch.float64) * scale for scale in (1.0, 0.3)]
    kernels.append(F.pad(torch.randn(5, 4, 1, 1, dtype=torch.float64), (1, 1, 1, 1)) - kernels[0])
    variances = [kernel.square().sum((1, 2, 3)) for kernel in kernels]
    means = [torch.randn(OUT, dtype=torch.float64) for _ in kernels]

    mean, variance = sum_statistics(kernels, means, variances)

    torch.testing.assert_close(mean, means[0] + means[1] + means[2])
    torch.testing.assert_close(variance, (kernels[0] + kernels[1] + kernels[2]).square().sum((1, 2, 3)))


def test_branches_that_cancel_leave_a_positive_variance():
    kernel = torch.randn(KERNEL)
    zero = torch.zeros(OUT)

    _, variance = sum_statistics([kernel, -kernel, 0 * kernel], [zero] * 3, [zero + 1, zero + 1, zero])

    assert ((variance > 0) & (variance < 1e-6)).all()
