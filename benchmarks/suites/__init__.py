"""The suites: each measures one thing, alone or with the others; `compare` runs them."""
