"""Slow implementations that the tests compare against. They need NumPy and nothing else."""
