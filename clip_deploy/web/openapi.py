"""What can be asked, as OpenAPI says it, and as a page that needs nothing from elsewhere."""

OPENAPI: dict[str, object] = {}
DOCS = ""
