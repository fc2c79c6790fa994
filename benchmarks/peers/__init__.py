"""Drivers of the peers: one program each, run in an environment of their own (`scripts/peers`)."""
