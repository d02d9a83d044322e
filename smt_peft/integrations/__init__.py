"""Plugins for other people's trainers; each imports its host, so nothing here is imported by the rest of the package."""
