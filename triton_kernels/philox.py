"""F1: the noise of host/sampling.py inside Triton kernels; that file is the definition.

    noise(first, key, position, stream, attempt, COUNT)   ids first .. first + COUNT - 1 -> fp32 [COUNT]
    gumbel(x)                                             uint32 words -> fp32

One Philox block serves four neighbouring ids. Words are bit-identical to philox_ref; noise agrees with gumbel_ref to
the last bits of log. `tl.philox` is Philox4x32-10 with counter and key where Random123 has them; the known answers
hold it to that.

| argument         | dtype  | unit                                                                    |
|------------------|--------|-------------------------------------------------------------------------|
| first, COUNT     | int32  | multiples of four                                                       |
| key              | int64  | 64-bit pattern: low word, high word                                     |
| position, stream | int32  | words 1 and 2 of the counter, 32-bit patterns                           |
| attempt          | int32  | word 3                                                                  |
| x                | uint32 | any shape                                                               |

Sources: Philox: Salmon et al., SC 2011. log1p from an accurate log: W. Kahan, as in D. Goldberg, "What every computer
scientist should know about floating-point arithmetic", 1991, theorem 4.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gumbel(x):
    """-log(-log1p(-u)) of u = x * 2**-32 + 2**-33, rounded once and kept below one.

    With w = 1 - u as rounded, log1p(-u) = log(w) * u / (1 - w) to a few ulp: log(w) / (1 - w) hardly moves with w.
    """
    u = tl.minimum(x.to(tl.float32) * 2.0**-32 + 2.0**-33, 1.0 - 2.0**-24)
    w = 1.0 - u
    lost = w == 1.0  # u is below half an ulp of one: -log1p(-u) = u
    exponential = tl.where(lost, u, -tl.log(w) * (u / tl.where(lost, 1.0, 1.0 - w)))
    return -tl.log(exponential)


@triton.jit
def noise(first, key, position, stream, attempt, COUNT: tl.constexpr):
    """Gumbel noise of the ids first .. first + COUNT - 1."""
    block = first // 4 + tl.arange(0, COUNT // 4)
    a, b, c, d = tl.philox(key, block, position, stream, attempt)
    return gumbel(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [COUNT]))
