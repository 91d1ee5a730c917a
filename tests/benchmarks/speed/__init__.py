"""What `bench_speed.py` and `bench_full_size.py` measure for docs/performance.md."""
