"""The YAML of a run: its keys, their checks, and where each value stands."""
