"""The command line, ``mimo VERB``. Nothing outside imports it."""
