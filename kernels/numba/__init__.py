"""CPU kernels in numba: simd.py holds the vectors, gemm.py the matrix product, then one file per operation.

Nothing is imported here: numba costs half a second, so a kernel is loaded when it is first used.
"""
