"""The memory's scan in Triton; import it only where Triton is installed."""
