"""AllMem's operators: a folder each, with the formula in plain PyTorch (``reference.py``).

This layer imports torch and the standard library only; nothing of the project lies below it.
"""
