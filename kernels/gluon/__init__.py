"""Kernels that need Hopper's instructions. Backend "gluon": chosen where it was measured to be faster, or asked for by name."""
