"""AllMem's operators: each folder holds the formula in plain PyTorch (``reference.py``) and, later, fast kernels.

This layer imports torch and the standard library only; nothing of the project lies below it.
"""
