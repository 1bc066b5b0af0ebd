"""Kernels for CPUs, compiled on the machine that runs them: products, adapters, attention over blocks, norms, rotary, gates.

Torch's operators cost microseconds a call whatever they compute, and a decoding step makes over a thousand; these do the
work of most of them in some three hundred, and multiply with NF4 codes where torch needs a dense copy, four times the
bytes. They are C in the vector extensions of GCC and clang (products also in intrinsics: of Intel's matrix tiles in
`tiles.c`, of AVX2 and AVX-512 in `vectors.c`), built once for the processor at hand (`build.py`), called by tensors'
addresses (`library.py`), and each is held against torch's operators when a base is loaded (`products.py`,
`row_adapters.py`, `modeling.py`, the server's `attention_kernels.py`): what is wrong, or cannot be built, is not used, and
the log says so. Only bf16, only forward.
"""
