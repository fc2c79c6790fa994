"""The command line: reads settings, composes every room into processes, calls the HTTP API."""
