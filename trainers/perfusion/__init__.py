"""Training of Perfusion concepts (arXiv 2305.01644), and of the covariances that they are measured in."""
