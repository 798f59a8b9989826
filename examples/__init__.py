"""Programs to run and to read; packages only so that benchmarks and tests can import them from the repository root."""
