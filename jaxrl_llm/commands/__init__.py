"""The verbs of the command line: each module has `run(config, workdir) -> int | None`."""
