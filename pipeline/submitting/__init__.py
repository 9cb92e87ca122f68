"""The recipe's stages as a chain of Slurm jobs: what `python -m pipeline.submit` is made of.

No torch is needed to look at a chain or to cancel it. Job scripts and what they need of the site's
environment are in `slurm/`; what a stage asks Slurm for is in the section `slurm`.
"""
