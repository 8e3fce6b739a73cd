"""Packages over HTTP: requests parsed or refused, batched, answered and counted."""
