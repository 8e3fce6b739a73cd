"""Images, captions and classes, as samples and as encoders take them."""
