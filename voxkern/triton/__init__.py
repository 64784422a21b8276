"""The ops in Triton: for any GPU that Triton compiles for, and for CPU tensors under its
interpreter (TRITON_INTERPRET=1).

One file per op: the kernel, a `launch_*` function that launches it without checks, and the op,
which checks its tensors first. `language.py` has helpers for kernels, `checks.py` those for ops,
`packed_gemm.py`, `codec_gemm.py` and `codec_attention.py` the kernels that several ops share.
docs/kernels.md shows how to add an op.
"""
