"""Proofs about TileLang kernels, read from the IR that is really compiled."""
