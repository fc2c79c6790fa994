"""Benchmarks: commands that anyone can run; every figure in the docs comes from one of them."""
