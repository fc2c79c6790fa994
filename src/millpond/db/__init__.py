"""Postgres: pools, org-scoped transactions, named SQL, migrations, the embedded server."""
