"""Identity: orgs, the keys that sign tokens, tokens, and the seal on stored secrets."""
