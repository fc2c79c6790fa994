"""Flows to read, run and copy."""
