"""The parts of `scripts/bench_serve.py`: what is asked for, who answers, and how the answers are compared."""
