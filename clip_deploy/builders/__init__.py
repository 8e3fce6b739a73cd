"""Build targets: one file a kind."""
