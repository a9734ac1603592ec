"""Attention kernels as pure functions on arrays; this package knows nothing of `ml` and can be used by itself."""
