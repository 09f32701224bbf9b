"""Records that lory makes: identities, self-instruct, formulas."""
