"""Benchmarks: each prints one JSON line a result, the peer's side measured in the same run."""
