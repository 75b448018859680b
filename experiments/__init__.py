"""What a person runs: the command line, the loop of a run, the run folder, and experiment files."""
