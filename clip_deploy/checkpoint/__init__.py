"""A checkpoint: fetched, verified, looked through and loaded."""
