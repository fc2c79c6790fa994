"""Ways out to other systems: mail so far."""
