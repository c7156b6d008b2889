"""The command `dfssm`: one module a subcommand, imported when it is called."""
