"""Attention of V4: sliding window, compressed sparse (CSA) and heavily compressed (HCA)."""
