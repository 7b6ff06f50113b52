"""One readable script for each system: a verb of the command line each, with a config of the same name."""
