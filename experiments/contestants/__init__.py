"""What `fedclip bench engine` times: each file runs as a process of its own, `python -m experiments.contestants.NAME`."""
