"""How good a target is: embeddings, accuracy, gates."""
