"""What choices and claims are worth, by training: `python -m scripts.studies.run --list`."""
