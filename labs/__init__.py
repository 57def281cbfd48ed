"""Labs: one file per technique, each a lesson and a tool; `python -m labs.NAME --help`."""
