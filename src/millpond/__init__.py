"""Millpond: durable, fair, visible runs of AI work for many organizations, on Postgres alone."""
