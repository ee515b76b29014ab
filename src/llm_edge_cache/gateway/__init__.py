"""The gateway: an ASGI application that puts the shared cache in front of any LLM API."""
