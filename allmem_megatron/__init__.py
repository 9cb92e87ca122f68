"""AllMem inside Megatron-Core: a GPTModel whose layers mix tokens by window and memory."""
