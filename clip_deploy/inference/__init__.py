"""What runs without PyTorch and transformers: a package opened, images and texts embedded and searched."""
