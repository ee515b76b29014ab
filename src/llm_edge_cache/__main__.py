"""`python -m llm_edge_cache` is the command `llm-edge-cache`."""

import sys

from llm_edge_cache.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
