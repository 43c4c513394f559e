"""What the benchmarks of the store share: records, every way of storing them, rounds, and how results are written."""
