"""FLOPs as the paper's Table 2 counts them: 2K − 1 for an output that sums K products."""

import math

from deeptwist import Plan
from deeptwist.layers.geometry import ConvGeometry

MEGA = 2**20  # the paper's M: of weights too


def paper_flops(convolution: ConvGeometry, size: tuple[int, ...]) -> int:
    """Return the FLOPs of a convolution for one example of this spatial input size."""
    outputs = convolution.out_channels * math.prod(convolution.output_size(size))
    return 2 * convolution.macs(size) - outputs


def plan_flops(plan: Plan, *, factored: bool) -> int:
    """Return the compressed layers' FLOPs of one example, dense or factored."""
    total = 0
    for layer in plan.compressed:
        for call in layer.calls:
            parts = [(layer.convolution, call.size)]
            if factored:
                parts = [
                    # A raw tile's convolution multiplies by zeros besides; the paper's, a 1×1 one
                    # over the windows that it sees, does not.
                    (part, size if part == convolution else convolution.output_size(size))
                    for part, (convolution, size) in zip(
                        layer.decomposition.parts(layer.convolution),
                        layer.decomposition.workload(layer.convolution, call.size),
                        strict=True,
                    )
                ]
            total += call.count * sum(paper_flops(part, size) for part, size in parts)
    return total // plan.examples
