"""What a run will take of memory, told before any weight is loaded."""
