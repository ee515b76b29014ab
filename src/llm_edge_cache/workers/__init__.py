"""What application servers need around the slab: one module per server.

``llm_edge_cache.workers.gunicorn`` is a configuration module for gunicorn. uvicorn needs none: its workers attach by
name, and whichever comes first creates the slab.
"""
