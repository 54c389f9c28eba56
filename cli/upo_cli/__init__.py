"""The `upo` command. One file per subcommand; nothing heavy is imported before a subcommand runs."""
