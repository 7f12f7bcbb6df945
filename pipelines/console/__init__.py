"""The command line: parsing, typed options, the connection to Ray."""
