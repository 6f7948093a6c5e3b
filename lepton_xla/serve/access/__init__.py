"""Who may ask what: addresses, tokens, certificates."""
