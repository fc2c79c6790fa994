"""The engine: registers flows, accepts intents, claims work fairly, executes and records it."""
