"""The student's own responses to prompts: what `stage=collect` is made of."""
