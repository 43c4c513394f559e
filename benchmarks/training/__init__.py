"""What the benchmarks of training share: sources of equal batches, and the steps that heads do on them."""
