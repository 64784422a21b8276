"""The ops in Triton: for any GPU that Triton compiles for, and for CPU tensors under its
interpreter (TRITON_INTERPRET=1).

A file per op: the kernel, a `launch_*` that takes tensors as they are, and the op, which checks
them first. `language.py` has what kernels share, `checks.py` what ops do, `mimi_product.py` and
`mimi_attention.py` the codec's kernels. docs/kernels.md shows how one is added.
"""
