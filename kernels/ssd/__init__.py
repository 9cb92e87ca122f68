"""The state-space recurrence of Mamba-2 (SSD), for the paper's ``mamba2`` baseline."""

from kernels.ssd.reference import ssd_scan

__all__ = ["ssd_scan"]
