"""The HTTP API: authenticates, authorizes, validates, accepts intents, and shows what became of them."""
