"""What lies under an adapter: which weights a config names, and how they are stored, packed, sharded, told apart."""
