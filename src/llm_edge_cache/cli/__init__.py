"""The command `llm-edge-cache`: one module a group of subcommands, each with `add_parsers`."""
