"""`stage=evaluate` in parts: subjects, journals, suites, short tasks, results and figures."""
