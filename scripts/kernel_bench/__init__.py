"""What `scripts/bench_kernels.py` measures and with whom it compares; one file per kernel lists its cases."""
