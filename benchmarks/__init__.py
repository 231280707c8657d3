"""Time FastWGAN against PyTorch, train the papers' claims again, and make README's tables: ``python -m benchmarks``."""
