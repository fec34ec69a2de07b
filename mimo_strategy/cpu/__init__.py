"""Running megatron-core without CUDA, over gloo.

megatron-core 0.19.2 names CUDA and NCCL all through its code. Here its own modules, and nobody else's, are
handed a ``torch`` that redirects those names to the CPU (:mod:`.import_hook`, :mod:`.redirected_torch`); what
gloo lacks is filled in (:mod:`.collectives`), and the Mamba kernels get a reference implementation
(:mod:`.mamba_kernels`). ``torch`` itself is left as it is. With a GPU present nothing is installed.
"""
