"""How fast a target is: latency, memory, work, and the way from JPEG to embedding."""
