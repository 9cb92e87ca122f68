"""One module a stage, each with `run(config: RunConfig, context: StageContext) -> None`."""
