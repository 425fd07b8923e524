"""Benchmarks: timing, measured ceilings, peers, recorded rows, and what is made from them."""
