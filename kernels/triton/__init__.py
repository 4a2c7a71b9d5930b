"""Triton kernels, one file per operation, each with the functions of its twin in `kernels/torch`.

Nothing is compiled or imported before an operation first runs on a GPU. Every launch goes through `launch.py`, which can also record it:
that is how all configurations are compiled and inspected on a machine without a GPU.
"""
