"""Turn a CLIP-style checkpoint into every form in which it can be deployed, check each form and measure it."""
