"""`python -m millpond.cli`: how `millpond up` starts its own children, without relying on PATH."""

from millpond.cli.main import main

# Child processes of steps load this module too, under another name.
if __name__ == "__main__":
    main()
