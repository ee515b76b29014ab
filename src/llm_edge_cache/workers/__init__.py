"""What application servers need around the slab: one module per server.

``llm_edge_cache.workers.gunicorn`` is a configuration module for gunicorn, ``llm_edge_cache.workers.gateway`` has its
worker class for the gateway. uvicorn needs none: its workers attach by name, and whichever comes first creates the
slab.
"""
