"""What happens when a run is stopped, from outside or by itself, and how it goes on."""
