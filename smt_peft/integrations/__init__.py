"""Plugins for other people's trainers. Each imports its host, and nothing else in the package imports them."""
