"""The environment variables that CLLM reads, each with what it does. The code that reads one stands where it acts; a test compares both lists."""

VARIABLES = {
    "CLLM_THREADS": "Number of worker threads, as `--threads`. Unset: every core that the process may use. Any number gives the same bits.",
    "CLLM_BACKEND": "Backend of every operation: `numba`, `triton`, `gluon`, `sdpa` or `torch`. An operation that it cannot serve is an error.",
    "CLLM_CACHE_DIR": "Folder for compiled kernels and measured values. Unset: `$XDG_CACHE_HOME/cllm`, or `~/.cache/cllm`.",
    "CLLM_STEP_PROGRAM": "`0` runs every training step on a CPU operation by operation instead of as a recorded program. The bits are the same.",
    "CLLM_KEEP_HEAP": "`0` lets the C library give freed memory back to the system after every operation, which slows small steps down.",
    "CLLM_SIMD_LANES": "Width of the CPU's vectors in float32 numbers (4, 8 or 16), to test the code of a smaller machine.",
    "CLLM_BF16_KERNEL": "Innermost loop of bfloat16 products on the CPU: `amx`, `vdpbf16ps` or `widened`, to test one that would not be chosen.",
    "CLLM_PROGRESS_FILE": "File in which a command keeps how far it is, and in the end its exit status, as a JSON object for programs that watch it.",
    "CLLM_API_KEY": "Key that clients of `cllm serve` and `cllm app` have to send, as `--api-key`, which other users of the machine could read.",
}
