"""MegaMoE: expert-parallel dispatch, two FP8xFP4 products, SwiGLU and combine in one kernel."""
