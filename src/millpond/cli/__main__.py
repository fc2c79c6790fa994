"""`python -m millpond.cli`: how `millpond up` starts its own children, without relying on PATH."""

from millpond.cli.main import main

main()
