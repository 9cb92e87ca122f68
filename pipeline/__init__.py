"""The command line and its stages: the only layer that knows DeepSpeed, MLflow and Hydra."""
