"""`stage=plan`: what a configuration will need, found out before any GPU is spent.

The memory of a forward and backward pass is not a formula: the stage's own objective runs over the
real model, two layers of it, on tensors without storage (`device.py`), and a tracker
(`tracker.py`) notes what lives when. Sizes that no pass shows, the optimizer's, follow DeepSpeed's
rules (`states.py`). FLOPs are those of `pipeline.flops`.
"""
