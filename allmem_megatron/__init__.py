"""AllMem inside Megatron-Core: a GPTModel whose layers mix tokens by window and memory."""

import warnings

# Megatron-Core tells which optional packages (Apex, Transformer Engine) it does without, and of
# defaults of its own that it no longer likes.
for _message in (r".*not installed\. Falling back", "full scope is deprecated"):
    warnings.filterwarnings("ignore", message=_message, module=r"megatron\.")
