"""Training with Direct Consistency Optimization (arXiv 2402.12004)."""
